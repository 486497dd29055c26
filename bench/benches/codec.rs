//! The page codec on pages of a real guest under load (criterion):
//! `cargo bench -p pollux-bench --bench codec [-- NAME]`.
//!
//! `epoch`: one epoch of about 1,000 dirty pages, encoded and decoded under each policy;
//! `pages`: what one class of them costs. The pages are captured from the test guest with
//! redis and clients the first time, and kept in target/bench.

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use interconnect::codec::{
    CodecChoice, CodecVersion, DecodeBuffers, EncodePolicy, PAGE_BYTES, Page, PageBatch,
    PageContent, PageEncoder,
};
use pollux_bench::pages::{Capture, Epoch};
use std::hint::black_box;
use std::time::Duration;

/// Epochs captured, and pages of each.
const EPOCHS: usize = 16;
const PAGES: u64 = 1000;

fn main() -> anyhow::Result<()> {
    let capture = Capture::kept(EPOCHS, PAGES)?;
    let mut c = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500))
        .configure_from_args();
    epochs(&mut c, &capture);
    classes(&mut c, &capture);
    c.final_summary();
    Ok(())
}

fn policies() -> [(&'static str, EncodePolicy); 8] {
    let policy = |codec, delta| EncodePolicy {
        codec,
        delta,
        ..EncodePolicy::default()
    };
    [
        ("raw", policy(CodecChoice::Raw, false)),
        ("lz4", policy(CodecChoice::Lz4, false)),
        ("zstd", policy(CodecChoice::Zstd, false)),
        ("delta raw", policy(CodecChoice::Raw, true)),
        ("delta lz4", policy(CodecChoice::Lz4, true)),
        ("delta zstd", policy(CodecChoice::Zstd, true)),
        ("delta zstd-small", policy(CodecChoice::Zstd, true)),
        (
            "version 1",
            EncodePolicy {
                version: CodecVersion::V1,
                ..policy(CodecChoice::Zstd, false)
            },
        ),
    ]
}

fn encode(encoder: &mut PageEncoder, epoch: &Epoch) -> Vec<Bytes> {
    let mut pages = epoch.pages.iter().map(|(index, page)| (*index, &**page));
    let mut batches = Vec::new();
    while let Some(batch) = encoder.encode(&mut pages).expect("real pages") {
        if !batch.payload.is_empty() {
            batches.push(batch.payload);
        }
    }
    batches
}

fn apply(ram: &mut [Page], batches: &[Bytes], buffers: &DecodeBuffers) {
    for batch in batches {
        let pages = ram.len() as u64;
        let batch = PageBatch::decode(batch, pages, buffers).expect("what was encoded");
        for (index, content) in batch.pages() {
            let page = &mut ram[usize::try_from(index).expect("in the guest")];
            match content {
                PageContent::Zero => *page = [0; PAGE_BYTES],
                PageContent::Raw(new) => *page = *new,
                PageContent::Patch(patch) => patch.apply(page).expect("in order"),
            }
        }
    }
}

fn ram_before(capture: &Capture) -> Vec<Page> {
    let mut ram = vec![[0; PAGE_BYTES]; usize::try_from(capture.guest_pages).expect("fits")];
    for (index, page) in &capture.before {
        ram[usize::try_from(*index).expect("in the guest")] = **page;
    }
    ram
}

/// Whole epochs: all but the last make the bases, the last is measured.
fn epochs(c: &mut Criterion, capture: &Capture) {
    let (last, earlier) = capture.epochs.split_last().expect("captured");
    let mut group = c.benchmark_group("epoch");
    group.throughput(Throughput::Bytes((last.pages.len() * PAGE_BYTES) as u64));
    let buffers = DecodeBuffers::default();
    for (name, policy) in policies() {
        let ready = || {
            let mut encoder = PageEncoder::new(policy);
            if name.ends_with("small") {
                encoder.set_codec(interconnect::codec::Codec::ZstdSmall);
            }
            for epoch in earlier {
                encode(&mut encoder, epoch);
            }
            encoder
        };
        let mut encoder = ready();
        let mut pages = last.pages.iter().map(|(index, page)| (*index, &**page));
        let (mut sums, mut batches) = ([0; 7], Vec::new());
        while let Some(batch) = encoder.encode(&mut pages).expect("real pages") {
            let s = batch.stats;
            let found = [
                s.zero,
                s.unchanged,
                s.patched,
                s.packed,
                s.raw,
                s.patch_bytes,
                s.bytes,
            ];
            sums.iter_mut().zip(found).for_each(|(sum, n)| *sum += n);
            batches.push(batch.payload);
        }
        let [zero, unchanged, patched, packed, raw, patch_bytes, bytes] = sums;
        eprintln!(
            "{name}: {} pages: {zero} zero, {unchanged} unchanged, {patched} patched ({patch_bytes} bytes), {packed} packed, {raw} raw; {bytes} bytes, {:.1} % of raw",
            last.pages.len(),
            100.0 * bytes as f64 / (last.pages.len() * PAGE_BYTES) as f64
        );
        group.bench_function(format!("encode {name}"), |b| {
            b.iter_batched_ref(
                ready,
                |encoder| encode(encoder, last),
                BatchSize::PerIteration,
            );
        });
        // Decoded onto what the epochs before it left.
        let mut ram = ram_before(capture);
        let mut encoder = ready();
        let mut fresh = PageEncoder::new(policy);
        for epoch in earlier {
            apply(&mut ram, &encode(&mut fresh, epoch), &buffers);
        }
        batches = encode(&mut encoder, last);
        group.bench_function(format!("decode and apply {name}"), |b| {
            // A patch applied again gives the same page, so the RAM need not be put back.
            b.iter(|| apply(&mut ram, &batches, &buffers));
        });
    }
    group.finish();
}

/// The pages of one class alone, ns a page.
fn classes(c: &mut Criterion, capture: &Capture) {
    let (last, earlier) = capture.epochs.split_last().expect("captured");
    let mut ram = ram_before(capture);
    for epoch in earlier {
        for (index, page) in &epoch.pages {
            ram[usize::try_from(*index).expect("in the guest")] = **page;
        }
    }
    let is_zero = |page: &Page| page.iter().all(|byte| *byte == 0);
    let base = |index: u64| &ram[usize::try_from(index).expect("in the guest")];
    let take = |wanted: &dyn Fn(u64, &Page) -> bool| Epoch {
        pages: last
            .pages
            .iter()
            .filter(|(index, page)| wanted(*index, page))
            .cloned()
            .collect(),
    };
    let policy = EncodePolicy {
        codec: CodecChoice::Raw,
        ..EncodePolicy::default()
    };
    let mut group = c.benchmark_group("pages");
    for (name, set, delta) in [
        ("zero", take(&|_, page| is_zero(page)), false),
        ("unchanged", take(&|index, page| page == base(index)), true),
        (
            "changed, as patches",
            take(&|index, page| !is_zero(page) && page != base(index)),
            true,
        ),
        (
            "changed, raw",
            take(&|index, page| !is_zero(page) && page != base(index)),
            false,
        ),
        ("all, not seen before", take(&|_, _| true), true),
    ] {
        if set.pages.is_empty() {
            eprintln!("{name}: none in this epoch");
            continue;
        }
        let old = Epoch {
            pages: set
                .pages
                .iter()
                .map(|(index, _)| (*index, Box::new(*base(*index))))
                .collect(),
        };
        let known = name != "all, not seen before";
        group.throughput(Throughput::Elements(set.pages.len() as u64));
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || {
                    let mut encoder = PageEncoder::new(EncodePolicy { delta, ..policy });
                    // Twice what is measured, so that its buffers are there.
                    for _ in 0..2 {
                        if known {
                            encode(&mut encoder, &old);
                        }
                    }
                    encoder
                },
                |encoder| black_box(encode(encoder, &set)),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}
