//! An epoch of about 1,000 dirty pages of a real guest, from its first page to its
//! acknowledgement over a real interconnect on loopback, beside a bare `memcpy` and TCP
//! loopback echo of the same raw bytes, epoch by epoch in one run; and the bytes it puts on
//! the wire beside QEMU's XBZRLE for the same guest and load.
//!
//! `cargo bench -p pollux-bench --bench epoch [-- fresh] [-- rounds=N]`. With `fresh` the pages are
//! captured anew and XBZRLE is measured again; else both are kept in target/bench. The
//! promise is the line `auto`: at most 2.5 times the echo, p50.
//!
//! Both ends run in this process and share its cores; the acknowledgement comes after the
//! epoch is whole, its digest holds and it is applied to the standby's memory, every patch
//! checked (the product acknowledges before it applies).

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use interconnect::codec::{
    CodecChoice, CodecVersion, EncodePolicy, EncodeStats, LinkFacts, PAGE_BYTES, Page,
};
use interconnect::epoch::{EncodePool, EpochMeta, EpochWriter};
use interconnect::ids::{Epoch, Generation};
use pollux_bench::pages::pair::{AckAfter, Echo, Pair, Ram, VM};
use pollux_bench::pages::{Capture, guest};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Epochs captured, and pages of each.
const EPOCHS: usize = 48;
const PAGES: u64 = 1000;
/// Of them the first are not counted: caches and windows open.
const WARM: usize = 8;
/// How often all epochs are sent under each policy.
const ROUNDS: u64 = 4;
/// A device state of the lab's VM (QEMU.md: 4.6 KB to 34 KB).
const STATE_BYTES: usize = 8 << 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let fresh = args.iter().any(|arg| arg == "fresh");
    let rounds = args
        .iter()
        .find_map(|arg| arg.strip_prefix("rounds="))
        .map_or(Ok(ROUNDS), str::parse)?;
    let (capture, theirs) = Capture::kept_with_xbzrle(EPOCHS, PAGES, fresh)?;
    let pages: usize = capture.epochs.iter().map(|e| e.pages.len()).sum();
    println!(
        "{EPOCHS} epochs of {} dirty pages on average ({:.0} ms each): redis, {} clients, {} MiB guest",
        pages / EPOCHS,
        capture.epoch_ms,
        guest::CLIENTS,
        guest::RAM_MIB,
    );
    println!(
        "{:<22} {:>8} {:>8} {:>8} {:>7} {:>11} {:>10}  pages z/u/d/p/r of 100, codec (why), link MB/s",
        "", "p50 us", "p90 us", "echo p50", "ratio", "bytes/page", "encode us"
    );
    let mut auto_bytes = 0.0;
    for (name, policy, threads) in policies() {
        let found = run(&capture, policy, threads, rounds)?;
        found.print(name);
        if name == "auto" {
            auto_bytes = found.wire_per_page();
        }
    }
    println!(
        "XBZRLE ({} MiB cache, QEMU migrate): {:.0} bytes a dirty page over {} passes of {} pages ({} % encoded, {} % missed, {} % too long); pollux auto {:.0}, ratio {:.2}",
        theirs.cache_bytes >> 20,
        theirs.bytes_per_page(),
        theirs.passes,
        theirs.pages / theirs.passes.max(1),
        100 * theirs.encoded / theirs.pages.max(1),
        100 * theirs.misses / theirs.pages.max(1),
        100 * theirs.overflows / theirs.pages.max(1),
        auto_bytes,
        auto_bytes / theirs.bytes_per_page(),
    );
    Ok(())
}

fn policies() -> Vec<(&'static str, EncodePolicy, usize)> {
    let policy = |codec, delta| {
        let policy = EncodePolicy::for_guest(guest::RAM_MIB << 20, codec, CodecVersion::V2);
        EncodePolicy { delta, ..policy }
    };
    vec![
        ("auto", policy(CodecChoice::Auto, true), 1),
        ("auto, 2 threads", policy(CodecChoice::Auto, true), 2),
        ("delta, raw", policy(CodecChoice::Raw, true), 1),
        ("delta, lz4", policy(CodecChoice::Lz4, true), 1),
        ("delta, zstd", policy(CodecChoice::Zstd, true), 1),
        ("no delta, raw", policy(CodecChoice::Raw, false), 1),
        ("no delta, lz4", policy(CodecChoice::Lz4, false), 1),
        ("no delta, zstd", policy(CodecChoice::Zstd, false), 1),
        ("version 1, zstd", EncodePolicy::v1(CodecChoice::Zstd), 1),
    ]
}

#[derive(Default)]
struct Found {
    epochs: Vec<Duration>,
    echoes: Vec<Duration>,
    ratios: Vec<f64>,
    pages: u64,
    wire_bytes: u64,
    encode_ns: u64,
    classes: [u64; 5],
    last: EncodeStats,
    /// What the link was said to carry, MB/s, epoch by epoch.
    link: Vec<u64>,
}

fn percentile(times: &[Duration], p: usize) -> f64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    times
        .get(times.len() * p / 100)
        .map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
}

impl Found {
    fn wire_per_page(&self) -> f64 {
        self.wire_bytes as f64 / self.pages.max(1) as f64
    }

    fn print(&self, name: &str) {
        let (mine, echo) = (percentile(&self.epochs, 50), percentile(&self.echoes, 50));
        let shares: Vec<String> = self
            .classes
            .iter()
            .map(|n| format!("{:.0}", 100.0 * *n as f64 / self.pages.max(1) as f64))
            .collect();
        println!(
            "{name:<22} {mine:>8.0} {:>8.0} {echo:>8.0} {:>7.2} {:>11.0} {:>10.0}  {}, {} ({}), {:?}",
            percentile(&self.epochs, 90),
            mine / echo,
            self.wire_per_page(),
            self.encode_ns as f64 / 1e3 / self.epochs.len().max(1) as f64,
            shares.join("/"),
            self.last.codec.word(),
            self.last.why.words(),
            self.link.iter().min().zip(self.link.iter().max()),
        );
    }
}

fn run(capture: &Capture, policy: EncodePolicy, threads: usize, rounds: u64) -> Result<Found> {
    let guest_pages = usize::try_from(capture.guest_pages)?;
    let ram: Ram = Arc::new(Mutex::new(vec![[0; PAGE_BYTES]; guest_pages]));
    let pair = Pair::start(&ram, AckAfter::Applied)?;
    let pool = EncodePool::start(threads)?;
    let mut echo = Echo::start()?;
    let mut found = Found::default();
    let state = Bytes::from(vec![7; STATE_BYTES]);
    let meta = EpochMeta {
        guest_pages: capture.guest_pages,
        ..EpochMeta::default()
    };
    for round in 1..=rounds {
        {
            let mut ram = ram.lock().unwrap_or_else(PoisonError::into_inner);
            for (index, page) in &capture.before {
                ram[usize::try_from(*index)?] = **page;
            }
        }
        let lane = pair.lane(Generation(round))?;
        let mut writer = EpochWriter::with_pool(VM, Generation(round), policy, pool.clone());
        for (number, epoch) in capture.epochs.iter().enumerate() {
            let echoed = echo.send(&epoch.pages)?;
            let this = Epoch(number as u64 + 1);
            let pressure = lane.lane.pressure();
            let link = LinkFacts {
                bytes_per_s: pressure.capacity_bytes_per_s,
                queued_bytes: pressure.queued_bytes,
            };
            let mut wire_bytes = 0;
            let begun = Instant::now();
            writer.begin(this, link);
            let mut send = |frame: interconnect::frame::Frame| {
                wire_bytes += frame.wire_bytes() as u64;
                lane.lane.send_blocking(frame)
            };
            let pages = epoch.pages.iter().map(|(index, page)| (*index, &**page));
            writer.pages(pages, &mut send)?;
            writer.device_state(state.clone(), &mut send)?;
            writer.finish(&meta, &mut send)?;
            let took = pair.acknowledged(this)?.duration_since(begun);
            if number < WARM {
                continue;
            }
            let stats = *writer.stats();
            found.epochs.push(took);
            found.echoes.push(echoed);
            found.ratios.push(took.as_secs_f64() / echoed.as_secs_f64());
            found.pages += epoch.pages.len() as u64;
            found.wire_bytes += wire_bytes;
            found.encode_ns += stats.encode_ns();
            let classes = [
                stats.zero,
                stats.unchanged,
                stats.patched,
                stats.packed,
                stats.raw,
            ];
            found
                .classes
                .iter_mut()
                .zip(classes)
                .for_each(|(sum, n)| *sum += n);
            found.last = stats;
            found
                .link
                .extend(link.bytes_per_s.map(|rate| rate / 1_000_000));
        }
        lane.end().context("the standby of a round")?;
        check(capture, &ram)?;
    }
    Ok(found)
}

/// The standby's memory is the guest's, page by page.
fn check(capture: &Capture, ram: &Ram) -> Result<()> {
    let ram = ram.lock().unwrap_or_else(PoisonError::into_inner);
    let mut newest: std::collections::HashMap<u64, &Page> = std::collections::HashMap::new();
    for (index, page) in capture.epochs.iter().flat_map(|epoch| &epoch.pages) {
        newest.insert(*index, page);
    }
    for (index, page) in newest {
        ensure!(
            ram[usize::try_from(index)?] == *page,
            "page {index} of the standby is not the guest's"
        );
    }
    Ok(())
}
