//! The path between two hosts, measured whole: what an epoch lane carries beside what TCP and
//! TLS carry, over two links, with one of them cut, with loss, with heartbeats beside it, and
//! what it costs.
//!
//! `cargo bench -p pollux-bench --bench link [-- SECTION …]` with sections `bulk`, `pair`,
//! `cut`, `loss`, `heartbeat`, `core`; all without one. Needs root: it makes namespaces and
//! removes them. The table goes to standard output, progress to standard error, the same as
//! JSON to target/bench/link.json. A missed target does not fail the run: it measures, tests
//! judge.
//!
//! What is compared alternates within one run, and the median of the rounds counts: what else
//! the machine does then falls on both. Both hosts share this machine's cores.

use anyhow::{Context, Result, ensure};
use pollux_bench::figure::{Figure, Target, table};
use pollux_bench::wire::lanes::{self, End};
use pollux_bench::wire::net::{LinkKind, Net, Side};
use pollux_bench::wire::peer::{Order, Peer, Report, hidden_main};
use pollux_bench::wire::{epochs, relay, tcp};
use serde::Serialize;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Rounds of a comparison.
const ROUNDS: usize = 5;
/// One stretch, in s, after its warm-up.
const STRETCH_S: f64 = 1.0;
/// Not measured at the start: windows open, caches fill, in s.
const WARM_UP_S: f64 = 0.3;
/// The MTUs that Ethernet has.
const MTUS: [u16; 2] = [1500, 9000];
/// The cap of capped links.
const CAP_MBIT: u32 = 1000;
/// Pages of an epoch in section `cut`.
const EPOCH_PAGES: usize = 1000;
/// The stream of epochs of one cut, in s, and when it is cut.
const CUT_STREAM_S: f64 = 5.0;
const CUT_AFTER: Duration = Duration::from_millis(2500);
/// Cuts, each on a pair of its own.
const CUTS: usize = 3;
/// Heartbeats are watched so long, in s: one every 10 ms.
const HEARTBEAT_S: f64 = 10.0;
/// Ports, of every host: they are alone in their namespaces.
const TCP_PORT: u16 = 7000;
const QUIC_PORT: u16 = 7001;
const HEARTBEAT_PORT: u16 = 7002;
const RELAY_PORT: u16 = 7003;

const GIB: f64 = (1_u64 << 30) as f64;

const SECTIONS: [(&str, Section); 6] = [
    ("bulk", bulk),
    ("pair", pair),
    ("cut", cut),
    ("loss", loss),
    ("heartbeat", heartbeat),
    ("core", core),
];

type Section = fn(&Path) -> Result<Vec<Figure>>;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let rest = args.get(1..).unwrap_or_default();
    // This program is also its senders and receivers.
    let result = hidden_main(rest).unwrap_or_else(|| {
        let wanted: Vec<&str> = rest
            .iter()
            .filter_map(|a| a.to_str())
            .filter(|a| !a.starts_with("--"))
            .collect();
        measure(&wanted)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("link: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is written as JSON.
#[derive(Serialize)]
struct Written {
    /// 1-minute load average before and after.
    load: (f64, f64),
    cores: usize,
    figures: Vec<Figure>,
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|w| w.parse().ok()).unwrap_or(f64::NAN)
}

fn measure(wanted: &[&str]) -> Result<()> {
    let sections: Vec<_> = SECTIONS
        .iter()
        .filter(|(n, _)| wanted.is_empty() || wanted.contains(n))
        .collect();
    ensure!(
        !sections.is_empty(),
        "no such section; there are {:?}",
        SECTIONS.map(|s| s.0)
    );
    let folder = tempfile::tempdir()?;
    tcp::make_certificate(folder.path())?;
    let before = load_average();
    let mut figures = Vec::new();
    let mut failed = Ok(());
    for (name, section) in sections {
        eprintln!("{name} (load {})", load_average());
        match section(folder.path()).with_context(|| format!("section {name}")) {
            Ok(more) => figures.extend(more),
            Err(e) => {
                eprintln!("{e:#}");
                failed = Err(e);
            }
        }
    }
    let written = Written {
        load: (before, load_average()),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        figures,
    };
    println!("{}", table(&written.figures));
    println!(
        "{} cores shared by both hosts; load average {} before, {} after",
        written.cores, written.load.0, written.load.1
    );
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    std::fs::create_dir_all(&path)?;
    std::fs::write(path.join("link.json"), serde_json::to_vec_pretty(&written)?)?;
    failed
}

/// Both ends of a stream: the sender's report and the receiver's.
struct Ends {
    sender: Report,
    receiver: Report,
}

impl Ends {
    /// Processor time of both for a GiB, sender first, in s.
    fn cpu_per_gib(&self) -> (f64, f64) {
        let of = |report: &Report| report.cpu_seconds / (report.bytes as f64 / GIB);
        (of(&self.sender), of(&self.receiver))
    }
}

/// Runs a receiver, then a sender, bound to these cores.
fn run(net: &Net, cores: [Option<usize>; 2], orders: [Order; 2]) -> Result<Ends> {
    let [sender, receiver] = orders;
    let mut receiver = Peer::start(net, Side::B, cores[1], &receiver)?;
    receiver.ready()?;
    let sender = Peer::start(net, Side::A, cores[0], &sender)?;
    let receiver = receiver.report()?;
    Ok(Ends {
        sender: sender.report()?,
        receiver,
    })
}

const ANY_CORE: [Option<usize>; 2] = [None, None];
const ONE_CORE_EACH: [Option<usize>; 2] = [Some(0), Some(1)];

fn tcp_stream(net: &Net, tls: Option<&Path>, cores: [Option<usize>; 2]) -> Result<Ends> {
    let stream = tcp::Stream {
        address: (net.address(Side::B, 0), TCP_PORT).into(),
        tls: tls.map(Path::to_path_buf),
        warm_up_s: WARM_UP_S,
        seconds: STRETCH_S,
    };
    let orders = [Order::TcpSend(stream.clone()), Order::TcpReceive(stream)];
    run(net, cores, orders)
}

/// Both ends over the first `links` links.
fn ends(net: &Net, folder: &Path, links: usize) -> Result<[End; 2]> {
    let address = |side, link| SocketAddr::from((net.address(side, link), QUIC_PORT));
    let links: Vec<_> = (0..links)
        .map(|link| (address(Side::A, link), address(Side::B, link)))
        .collect();
    End::pair(folder, &links)
}

fn lane_of(net: &Net, ends: [End; 2], cores: [Option<usize>; 2]) -> Result<Ends> {
    let plan = |end| lanes::Plan {
        end,
        warm_up_s: WARM_UP_S,
        seconds: STRETCH_S,
        idle: false,
        heartbeat: None,
    };
    let [a, b] = ends.map(plan);
    run(net, cores, [Order::LaneSend(a), Order::LaneReceive(b)])
}

fn lane(net: &Net, folder: &Path, links: usize, cores: [Option<usize>; 2]) -> Result<Ends> {
    lane_of(net, ends(net, folder, links)?, cores)
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn quantile(values: &[f64], of: f64) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    // Below the number of values.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let at = (values.len() as f64 * of) as usize;
    values.get(at).copied()
}

fn mb(rate: f64) -> f64 {
    rate / 1e6
}

const fn fast(mtu_bytes: u16) -> LinkKind {
    LinkKind {
        mtu_bytes,
        mbit_per_s: None,
    }
}

/// One epoch lane against TLS over TCP with the same cipher, and bare TCP for reference.
fn bulk(folder: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for mtu in MTUS {
        let net = Net::new(&[fast(mtu)])?;
        let (mut bare, mut tls, mut ours) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bare.push(tcp_stream(&net, None, ANY_CORE)?);
            tls.push(tcp_stream(&net, Some(folder), ANY_CORE)?);
            ours.push(lane(&net, folder, 1, ANY_CORE)?);
        }
        let rate = |ends: &[Ends]| median(ends.iter().map(|e| e.receiver.rate()));
        let cost = |ends: &[Ends]| {
            median(ends.iter().map(|e| {
                let (sender, receiver) = e.cpu_per_gib();
                sender + receiver
            }))
        };
        figures.push(Figure::new(
            format!("bulk at MTU {mtu}: lane / TLS over TCP"),
            "",
            Target::AtLeast(0.9),
            Some(rate(&ours) / rate(&tls)),
            "",
        ));
        let parts = [("lane", &ours), ("TLS over TCP", &tls), ("bare TCP", &bare)];
        for (name, ends) in parts {
            let name = format!("  {name}");
            figures.push(Figure::part(name.clone(), "MB/s", mb(rate(ends))));
            let name = format!("{name}, processor time of both ends");
            figures.push(Figure::part(name, "s/GiB", cost(ends)));
        }
    }
    Ok(figures)
}

/// Two capped links against one.
fn pair(folder: &Path) -> Result<Vec<Figure>> {
    let capped = LinkKind {
        mtu_bytes: 1500,
        mbit_per_s: Some(CAP_MBIT),
    };
    let net = Net::new(&[capped, capped])?;
    let (mut one, mut two, mut round_trips) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS.min(3) {
        let alone = lane(&net, folder, 1, ANY_CORE)?;
        round_trips.extend(alone.sender.note("rtt_ms0"));
        one.push(alone.receiver.rate());
        two.push(lane(&net, folder, 2, ANY_CORE)?.receiver.rate());
    }
    let (one, two) = (median(one), median(two));
    Ok(vec![
        Figure::new(
            format!("two links of {CAP_MBIT} Mbit/s / one"),
            "",
            Target::AtLeast(1.8),
            Some(two / one),
            "",
        ),
        Figure::part("  one", "MB/s", mb(one)),
        Figure::part("  two", "MB/s", mb(two)),
        Figure::part("  round trip on one while full", "ms", median(round_trips)),
    ])
}

/// What one cut of a link did.
struct Cut {
    usual_ms: f64,
    worst_ms: f64,
    detected_ms: Option<f64>,
    wrong: f64,
    not_acknowledged: f64,
}

fn cut_once(folder: &Path) -> Result<Cut> {
    let capped = LinkKind {
        mtu_bytes: 1500,
        mbit_per_s: Some(CAP_MBIT),
    };
    let net = Net::new(&[capped, capped])?;
    let [a, b] = ends(&net, folder, 2)?.map(|end| epochs::Plan {
        end,
        pages: EPOCH_PAGES,
        seconds: CUT_STREAM_S,
    });
    let mut receiver = Peer::start(&net, Side::B, None, &Order::EpochsReceive(b))?;
    receiver.ready()?;
    let mut sender = Peer::start(&net, Side::A, None, &Order::EpochsSend(a))?;
    ensure!(sender.line()? == "streaming", "no epochs are sent");
    std::thread::sleep(CUT_AFTER);
    // In the middle of the cable: neither interface goes down.
    let at = epochs::now_s()?;
    net.swallow(Side::A, 0)?;
    net.swallow(Side::B, 0)?;
    let (sender, receiver) = (sender.report()?, receiver.report()?);
    let (usual_ms, _) = epochs::usual_and_worst_ms(&sender.times_us)?;
    // The first ones find out what the links carry.
    let steady = sender.times_us.get(10..).unwrap_or_default();
    let (_, worst_ms) = epochs::usual_and_worst_ms(steady)?;
    let noticed = ["suspect_at_s0", "down_at_s0"]
        .into_iter()
        .filter_map(|name| sender.note(name))
        .reduce(f64::min);
    let told = |name| sender.note(name).map(|noticed| (noticed - at) * 1e3);
    eprintln!(
        "  usual {usual_ms:.1} ms, longest {worst_ms:.1} ms; after the cut: suspect {:.1?} ms, down {:.1?} ms; other link suspect {:.1?}",
        told("suspect_at_s0"),
        told("down_at_s0"),
        told("suspect_at_s1"),
    );
    Ok(Cut {
        usual_ms,
        worst_ms,
        detected_ms: noticed.map(|noticed| (noticed - at) * 1e3),
        wrong: receiver.note("wrong").context("no count")?,
        not_acknowledged: sender.note("lost").context("no count")?,
    })
}

/// One of two links is cut in the middle of a stream of epochs.
fn cut(folder: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut cuts = Vec::new();
    for _ in 0..CUTS {
        cuts.push(cut_once(folder)?);
    }
    let worst = cuts.iter().max_by(|a, b| a.worst_ms.total_cmp(&b.worst_ms));
    let worst = worst.context("no cut")?;
    let detected = worst.detected_ms.unwrap_or(f64::INFINITY);
    figures.push(Figure::new(
        format!("worst of {CUTS} cuts: longest epoch beyond detection / usual epoch"),
        "",
        Target::AtMost(3.0),
        worst
            .detected_ms
            .map(|detected| (worst.worst_ms - detected) / worst.usual_ms),
        "",
    ));
    figures.push(Figure::part("  usual epoch", "ms", worst.usual_ms));
    figures.push(Figure::part("  longest epoch", "ms", worst.worst_ms));
    figures.push(Figure::part("  detection", "ms", detected));
    figures.push(Figure::new(
        "  epochs lost, repeated or out of order",
        "",
        Target::AtMost(0.0),
        Some(cuts.iter().map(|c| c.wrong + c.not_acknowledged).sum()),
        "",
    ));
    Ok(figures)
}

/// A path of 0.2 ms and 1 % loss each way against the same path without loss.
fn loss(folder: &Path) -> Result<Vec<Figure>> {
    let net = Net::new(&[fast(1500)])?;
    let at = |side, port| SocketAddr::from((net.address(side, 0), port));
    let mut rates = [Vec::new(), Vec::new()];
    let mut lost = Vec::new();
    for round in 0..ROUNDS {
        for (kind, lost_ppm) in [0, 10_000].into_iter().enumerate() {
            // The relay stands on the receiver's host.
            let plan = relay::Plan {
                own: [at(Side::B, RELAY_PORT), at(Side::B, RELAY_PORT + 1)],
                ends: [at(Side::A, QUIC_PORT), at(Side::B, QUIC_PORT)],
                delay_us: 200,
                lost_ppm,
                seed: round as u64 + 1,
            };
            let mut relay = Peer::start(&net, Side::B, None, &Order::Relay(plan.clone()))?;
            relay.ready()?;
            let [mut a, mut b] = End::pair(folder, &[(plan.ends[0], plan.own[0])])?;
            a.links = vec![(plan.ends[0], plan.own[0])];
            b.links = vec![(plan.ends[1], plan.own[1])];
            let ends = lane_of(&net, [a, b], ANY_CORE)?;
            relay.end();
            let relay = relay.report()?;
            rates[kind].push(ends.receiver.rate());
            if lost_ppm > 0 {
                let (gone, passed) = (relay.note("lost0"), relay.note("passed0"));
                if let (Some(gone), Some(passed)) = (gone, passed) {
                    lost.push(100.0 * gone / (gone + passed));
                }
            }
        }
    }
    let [without, with] = rates.map(median);
    Ok(vec![
        Figure::new(
            "0.2 ms each way: with 1 % loss / without",
            "",
            Target::AtLeast(0.5),
            Some(with / without),
            "",
        ),
        Figure::part("  without loss", "MB/s", mb(without)),
        Figure::part("  with 1 % loss", "MB/s", mb(with)),
        Figure::part("  datagrams the relay dropped", "%", median(lost)),
    ])
}

/// How late heartbeats are while a lane is full, and while nothing is sent.
fn heartbeat(folder: &Path) -> Result<Vec<Figure>> {
    let net = Net::new(&[fast(1500)])?;
    let beat = |side| SocketAddr::from((net.address(side, 0), HEARTBEAT_PORT));
    let mut figures = Vec::new();
    for (name, idle) in [("saturated", false), ("idle", true)] {
        let [mut a, mut b] = ends(&net, folder, 1)?.map(|end| lanes::Plan {
            end,
            warm_up_s: WARM_UP_S,
            seconds: HEARTBEAT_S,
            idle,
            heartbeat: None,
        });
        a.heartbeat = Some((beat(Side::A), beat(Side::B)));
        b.heartbeat = Some((beat(Side::B), beat(Side::A)));
        let ends = run(&net, ANY_CORE, [Order::LaneSend(a), Order::LaneReceive(b)])?;
        let late = &ends.sender.times_us;
        let target = if idle {
            Target::None
        } else {
            Target::Below(5.0)
        };
        figures.push(Figure::new(
            format!("heartbeat late by, lane {name}, p99"),
            "ms",
            target,
            quantile(late, 0.99).map(|us| us / 1e3),
            "",
        ));
        figures.push(Figure::part(
            format!("  p50 of {}", late.len()),
            "ms",
            quantile(late, 0.5).unwrap_or(f64::NAN) / 1e3,
        ));
        if !idle {
            figures.push(Figure::part("  lane", "MB/s", mb(ends.receiver.rate())));
        }
    }
    Ok(figures)
}

/// What one core moves: each end has a core to itself.
fn core(folder: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for mtu in MTUS {
        let net = Net::new(&[fast(mtu)])?;
        let (mut tls, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS.min(3) {
            tls.push(tcp_stream(&net, Some(folder), ONE_CORE_EACH)?);
            ours.push(lane(&net, folder, 1, ONE_CORE_EACH)?);
        }
        for (name, ends) in [("lane", &ours), ("TLS over TCP", &tls)] {
            let sender = median(ends.iter().map(|e| e.cpu_per_gib().0));
            let receiver = median(ends.iter().map(|e| e.cpu_per_gib().1));
            let rate = median(ends.iter().map(|e| e.receiver.rate()));
            figures.extend([
                Figure::part(format!("a core each, MTU {mtu}, {name}"), "MB/s", mb(rate)),
                Figure::part("  sender", "s/GiB", sender),
                Figure::part("  receiver", "s/GiB", receiver),
                Figure::part(
                    "  a busy core moves",
                    "MB/s",
                    mb(GIB / sender.max(receiver)),
                ),
            ]);
        }
    }
    Ok(figures)
}
