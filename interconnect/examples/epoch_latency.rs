//! Time of one epoch from the first page to its acknowledgement, over loopback, and
//! where it goes: `cargo run --release -p pollux-interconnect --example epoch_latency [WORKERS [adaptive|raw [PAGES]]]`.
//!
//! Both sides run in this process on one runtime each; on a machine with few cores
//! they compete, so two hosts do better than this.

use bytes::Bytes;
use interconnect::codec::{CodecChoice, EncodePolicy, LinkFacts, Page};
use interconnect::epoch::{EpochAssembler, EpochLimits, EpochMeta, EpochWriter};
use interconnect::frame::{Frame, FrameKind};
use interconnect::identity::Identity;
use interconnect::ids::{Epoch, Generation, VmId};
use interconnect::link::{Interconnect, LinkAddr, LinkEvent, LinkSettings, PairConfig};
use std::error::Error;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

const VM: VmId = VmId([1; 16]);
const GENERATION: Generation = Generation(1);
const EPOCHS: u64 = 2000;
const WARM_UP: u64 = 200;

type Main<T> = Result<T, Box<dyn Error>>;

fn free_addr() -> std::io::Result<SocketAddr> {
    UdpSocket::bind("127.0.0.1:0")?.local_addr()
}

/// A quarter each: zero, sparse, text, random.
fn page(n: u64) -> Page {
    let mut page = [0; 4096];
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()
    };
    match n % 4 {
        0 => {}
        1 => (0..40).for_each(|i| page[i * 100] = random()[0]),
        2 => page
            .chunks_mut(16)
            .for_each(|c| c.copy_from_slice(format!("{:016x}", u64::from(random()[0])).as_bytes())),
        _ => page
            .chunks_mut(8)
            .for_each(|c| c.copy_from_slice(&random())),
    }
    page
}

fn percentile(times: &mut [Duration], p: usize) -> f64 {
    times.sort_unstable();
    times[times.len() * p / 100].as_secs_f64() * 1e6
}

fn runtime(threads: usize) -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
}

fn main() -> Main<()> {
    let threads = std::env::args().nth(1).map_or(Ok(1), |n| n.parse())?;
    let raw = std::env::args().nth(2).is_some_and(|mode| mode == "raw");
    let page_count = std::env::args().nth(3).map_or(Ok(200), |n| n.parse())?;
    let mode = if raw {
        EncodePolicy::v1(CodecChoice::Raw)
    } else {
        EncodePolicy::default()
    };
    let (id_a, id_b) = (
        Arc::new(Identity::generate()?),
        Arc::new(Identity::generate()?),
    );
    let (at_a, at_b) = (free_addr()?, free_addr()?);
    let config =
        |me: &Arc<Identity>, peer: &Arc<Identity>, local, remote, names: (&str, &str)| PairConfig {
            identity: Arc::clone(me),
            me: names.0.to_owned(),
            peer: names.1.to_owned(),
            peer_fingerprint: peer.fingerprint(),
            links: vec![LinkAddr {
                local,
                peer: remote,
            }],
            settings: LinkSettings::default(),
            on_ack: None,
        };
    let (ack_tx, ack_rx) = mpsc::channel();
    let mut config_a = config(&id_a, &id_b, at_a, at_b, ("a", "b"));
    config_a.on_ack = Some(Arc::new(move |frame: Frame| {
        ack_tx
            .send((frame.epoch, Instant::now()))
            .unwrap_or_default()
    }));
    let (runtime_a, runtime_b) = (runtime(threads)?, runtime(threads)?);
    let (a, mut events_a) = Interconnect::start(config_a, runtime_a.handle().clone())?;
    let (b, mut events_b) = Interconnect::start(
        config(&id_b, &id_a, at_b, at_a, ("b", "a")),
        runtime_b.handle().clone(),
    )?;
    while !matches!(events_a.blocking_recv(), Some(LinkEvent::Up { .. })) {}
    while !matches!(events_b.blocking_recv(), Some(LinkEvent::Up { .. })) {}

    // The standby: assemble, acknowledge; reports when first and last frame came.
    let (report_tx, report_rx) = mpsc::channel();
    let standby_link = b.clone();
    std::thread::spawn(move || {
        let guest_pages = page_count * 10;
        let mut assembler =
            EpochAssembler::new(guest_pages, EpochLimits::for_guest(guest_pages, vec![]));
        assembler.expect(VM, GENERATION, Epoch(1));
        let mut rx = loop {
            match events_b.blocking_recv() {
                Some(LinkEvent::EpochLane { rx, .. }) => break rx,
                Some(_) => {}
                None => return,
            }
        };
        let mut first = None;
        while let Some(frame) = rx.blocking_recv() {
            let came = Instant::now();
            first.get_or_insert(came);
            if let Ok(Some(epoch)) = assembler.push(frame) {
                let ack = Frame::empty(FrameKind::EpochAck, VM, GENERATION, epoch.epoch);
                let _ = standby_link.control(ack);
                let _ = report_tx.send((first.take(), came, Instant::now()));
                std::hint::black_box(epoch.pages().count());
            }
        }
    });

    let lane = a.open_epoch_lane(VM, GENERATION)?;
    let mut writer = EpochWriter::new(VM, GENERATION, mode);
    let pages: Vec<(u64, Page)> = (0..page_count).map(|n| (n * 7, page(n))).collect();
    let state = Bytes::from(
        (0..34_000u32)
            .map(|n| n.to_le_bytes()[1])
            .collect::<Vec<u8>>(),
    );
    let meta = EpochMeta {
        guest_pages: page_count * 10,
        ..EpochMeta::default()
    };
    let names = [
        "encode and queue",
        "queued -> first frame",
        "first -> last frame",
        "last frame -> whole, ack queued",
        "ack -> primary",
        "total",
    ];
    let mut parts: Vec<Vec<Duration>> = vec![Vec::new(); names.len()];
    let mut wire_bytes = 0;
    for n in 1..=EPOCHS {
        let begin = Instant::now();
        writer.begin(Epoch(n), LinkFacts::default());
        let mut send = |frame: Frame| {
            if n == EPOCHS {
                wire_bytes += frame.wire_bytes();
            }
            lane.send_blocking(frame)
        };
        writer.pages(pages.iter().map(|(i, p)| (*i, p)), &mut send)?;
        writer.device_state(state.clone(), &mut send)?;
        writer.finish(&meta, &mut send)?;
        let encoded = Instant::now();
        let (epoch, acked) = ack_rx.recv()?;
        assert_eq!(epoch, Epoch(n));
        let (first, last, whole) = report_rx.recv()?;
        let first = first.unwrap_or(last);
        if n > WARM_UP {
            let spans = [
                encoded - begin,
                first.saturating_duration_since(encoded),
                last - first,
                whole - last,
                acked.saturating_duration_since(whole),
                acked - begin,
            ];
            parts
                .iter_mut()
                .zip(spans)
                .for_each(|(part, span)| part.push(span));
        }
    }
    println!(
        "{page_count} pages, {mode:?}, {wire_bytes} bytes in frames, {threads} worker(s) a side; µs p50 / p90 / p99"
    );
    for (name, times) in names.iter().zip(&mut parts) {
        println!(
            "{name:32} {:8.0} {:8.0} {:8.0}",
            percentile(times, 50),
            percentile(times, 90),
            percentile(times, 99)
        );
    }
    println!("{:?}", a.stats());
    Ok(())
}
