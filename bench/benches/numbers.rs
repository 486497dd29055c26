//! The promised numbers on a real VM in a lab of two hosts: unprotected and mirrored side by
//! side in one run, each beside its target and beside what the throw-away prototype reached.
//!
//! `cargo bench -p pollux-bench --bench numbers [-- SECTION …]` with sections `idle`, `latency`,
//! `cpu`, `many`, `memory`, `failover`, `drift`; all without one. The table goes to standard
//! output, progress to standard error, the same as JSON to target/bench/numbers.json.
//! A missed target does not fail the run: it measures, tests judge.

use anyhow::{Context, Result};
use pollux::api::types::{Percentiles, Role};
use pollux::drill::client::Mode;
use pollux::drill::env::{DrillEnv, Quantiles};
use pollux::drill::lab_env::Guest;
use pollux::drill::stats::{Rng, micros, quantiles};
use pollux::drill::{DrillKind, MonotonicNs};
use pollux_bench::figure::{Figure, Target, ms, spread, table};
use pollux_bench::load::Served;
use pollux_bench::scene::{Scene, quantiles_of};
use serde::Serialize;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// One stretch of a figure that is measured unprotected and mirrored.
const STRETCH: Duration = Duration::from_secs(4);
/// How often the two alternate; what else the machine does then falls on both.
const ROUNDS: u32 = 2;
/// An idle VM is watched this long: some hundred epochs.
const IDLE: Duration = Duration::from_secs(15);
/// Failovers in a row.
const FAILOVERS: u64 = 12;
/// Each failover comes at a random moment this long after the VM is mirrored.
const CALM: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(900));
/// The guest's clock is compared with the host's over this time: two readings good to a few
/// ms give 0.05 %.
const DRIFT: Duration = Duration::from_secs(12);
/// Readings of the guest's clock of which the quickest counts.
const CLOCK_READINGS: u32 = 8;
/// Longest wait for one step of a failover.
const STEP_MAX: Duration = Duration::from_secs(60);
/// Clients of the many-client load.
const MANY: u16 = 32;

const SECTIONS: [(&str, Section); 7] = [
    ("idle", idle),
    ("latency", latency),
    ("cpu", cpu),
    ("many", many),
    ("memory", memory),
    ("failover", failover),
    ("drift", drift),
];

type Section = fn(&mut Scene) -> Result<Vec<Figure>>;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let rest = args.get(1..).unwrap_or_default();
    // This program is also the lab's keeper, its daemons and the clients outside.
    if let Some(code) = pollux::lab::hidden_main(rest).or_else(|| pollux::drill::hidden_main(rest))
    {
        return u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    if rest.first().is_some_and(|a| a == "daemon") {
        return pollux::cli::main(args);
    }
    let wanted: Vec<&str> = rest
        .iter()
        .filter_map(|a| a.to_str())
        .filter(|a| !a.starts_with("--"))
        .collect();
    match measure(&wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("numbers: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is written as JSON.
#[derive(Serialize)]
struct Report {
    /// 1-minute load average before and after.
    load: (f64, f64),
    cores: usize,
    figures: Vec<Figure>,
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|w| w.parse().ok())
        .unwrap_or(f64::NAN)
}

fn measure(wanted: &[&str]) -> Result<()> {
    let sections: Vec<_> = SECTIONS
        .iter()
        .filter(|(n, _)| wanted.is_empty() || wanted.contains(n))
        .collect();
    anyhow::ensure!(
        !sections.is_empty(),
        "no such section; there are {:?}",
        SECTIONS.map(|s| s.0)
    );
    let before = load_average();
    let guest = Guest {
        // A buffer that makes the guest use its memory, for the section `memory`.
        cmdline: "pollux.mem_mb=380".into(),
        ..Guest::new(&Guest::find_images()?)
    };
    eprintln!("starting hosts and guest");
    let mut scene = Scene::up(guest)?;
    let mut figures = Vec::new();
    let mut failed = None;
    for (name, section) in sections {
        eprintln!("{name} (load {})", load_average());
        match section(&mut scene).with_context(|| format!("section {name}")) {
            Ok(more) => figures.extend(more),
            Err(e) => {
                scene.explain();
                failed = Some(e);
                break;
            }
        }
    }
    drop(scene);
    let report = Report {
        load: (before, load_average()),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        figures,
    };
    println!("{}", table(&report.figures));
    println!(
        "{} cores shared by two hosts, guest (512 MiB, 1 vCPU, TCG) and clients; load average {} before, {} after",
        report.cores, report.load.0, report.load.1
    );
    let path = json_path();
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&path, serde_json::to_string_pretty(&report)?)?;
    println!("also in {}", path.display());
    failed.map_or(Ok(()), Err)
}

/// target/bench/numbers.json of the tree this program was built in.
fn json_path() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../target/bench/numbers.json"
    ))
}

fn shown(name: &str, p: Percentiles, count: u64) -> Vec<Figure> {
    spread(
        name,
        &quantiles_of(p, count),
        (Target::None, Target::None),
        [""; 3],
    )
}

/// Pauses of a VM that does nothing.
fn idle(scene: &mut Scene) -> Result<Vec<Figure>> {
    scene.workers(0, 0, 0)?;
    scene.protect()?;
    std::thread::sleep(IDLE);
    let e = scene.epochs()?;
    scene.unprotect()?;
    let mut figures = spread(
        "pause, idle",
        &quantiles_of(e.pause_us, e.window),
        (Target::AtMost(2.0), Target::None),
        ["2.6", "3.7", "5.1"],
    );
    for (name, part) in [
        ("  stop", e.stop_us),
        ("  capture (during save)", e.capture_us),
        ("  save", e.save_us),
        ("  cont", e.cont_us),
        ("resume to commit, idle", e.commit_us),
        ("replication lag at commit, idle", e.lag_us),
    ] {
        figures.push(Figure::part(format!("{name}, p50"), "ms", ms(part.p50)));
    }
    Ok(figures)
}

/// Latency of one client, and the parts of a cycle meanwhile.
fn latency(scene: &mut Scene) -> Result<Vec<Figure>> {
    scene.workers(0, 0, 0)?;
    let mut figures = Vec::new();
    for (name, mode) in [("echo", Mode::Echo), ("counter", Mode::Counter)] {
        let load = scene.clients(mode, 1)?;
        let alone = load.serve(STRETCH)?;
        scene.protect()?;
        let mirrored = load.serve(2 * STRETCH)?;
        let e = scene.epochs()?;
        scene.unprotect()?;
        figures.extend(spread(
            &format!("{name}, unprotected"),
            &alone.latency,
            (Target::None, Target::None),
            ["0.28", "0.42", "0.84"],
        ));
        figures.extend(spread(
            &format!("{name}, mirrored"),
            &mirrored.latency,
            (Target::AtMost(4.0), Target::Below(12.0)),
            ["3.15", "3.6", "7.6"],
        ));
        figures.extend(shown("  pause", e.pause_us, e.window));
        figures.extend(shown("  resume to commit", e.commit_us, e.window));
        figures.push(Figure::part(
            "  epoch length, p50",
            "ms",
            ms(e.length_us.p50),
        ));
    }
    Ok(figures)
}

/// Iterations per second of the guest's CPU worker, by the host's clock.
fn iterations(scene: &Scene, over: Duration) -> Result<f64> {
    let look = || -> Result<(f64, MonotonicNs)> {
        let answer = scene.ask("CPU")?;
        let first = answer.split_whitespace().next().unwrap_or_default();
        Ok((
            first
                .parse()
                .with_context(|| format!("`CPU` was answered `{answer}`"))?,
            MonotonicNs::now(),
        ))
    };
    let (from, began) = look()?;
    std::thread::sleep(over);
    let (to, ended) = look()?;
    Ok((to - from) / ended.since(began).as_secs_f64())
}

/// One kept share from alternating stretches: all mirrored over all unprotected.
fn kept(alone: &[f64], mirrored: &[f64]) -> f64 {
    100.0 * mirrored.iter().sum::<f64>() / alone.iter().sum::<f64>()
}

/// What a CPU-bound guest keeps.
fn cpu(scene: &mut Scene) -> Result<Vec<Figure>> {
    scene.workers(0, 0, 1)?;
    let (mut alone, mut mirrored) = (Vec::new(), Vec::new());
    let mut pause = Percentiles::default();
    let mut epochs = 0;
    for _ in 0..ROUNDS {
        alone.push(iterations(scene, STRETCH)?);
        scene.protect()?;
        mirrored.push(iterations(scene, STRETCH)?);
        let e = scene.epochs()?;
        (pause, epochs) = (e.pause_us, e.window);
        scene.unprotect()?;
    }
    scene.workers(0, 0, 0)?;
    let share = kept(&alone, &mirrored);
    let mut figures = vec![Figure::new(
        "CPU-bound throughput kept",
        "%",
        Target::AtLeast(70.0),
        Some(share),
        "",
    )];
    figures.extend(shown("  pause", pause, epochs));
    Ok(figures)
}

/// What many clients keep.
fn many(scene: &mut Scene) -> Result<Vec<Figure>> {
    scene.workers(0, 0, 0)?;
    let mut figures = Vec::new();
    for (name, mode) in [("counter", Mode::Counter), ("echo", Mode::Echo)] {
        let load = scene.clients(mode, MANY)?;
        let (mut alone, mut mirrored) = (Vec::new(), Vec::new());
        let (mut last, mut last_alone) = (Served::default(), Served::default());
        let mut epochs = None;
        for _ in 0..ROUNDS {
            last_alone = load.serve(STRETCH)?;
            alone.push(last_alone.per_second);
            scene.protect()?;
            last = load.serve(STRETCH)?;
            mirrored.push(last.per_second);
            epochs = Some(scene.epochs()?);
            scene.unprotect()?;
        }
        let share = kept(&alone, &mirrored);
        figures.push(Figure::new(
            format!("{MANY} clients, {name}: throughput kept"),
            "%",
            Target::AtLeast(70.0),
            Some(share),
            "",
        ));
        figures.push(Figure::part("  unprotected", "/s", last_alone.per_second));
        figures.push(Figure::part("  mirrored", "/s", last.per_second));
        figures.push(Figure::part(
            "  latency unprotected, p50",
            "ms",
            ms(last_alone.latency.p50_us),
        ));
        figures.push(Figure::part(
            "  latency mirrored, p50",
            "ms",
            ms(last.latency.p50_us),
        ));
        if let Some(e) = epochs {
            figures.push(Figure::part(
                "  epoch length, p50",
                "ms",
                ms(e.length_us.p50),
            ));
            figures.push(Figure::part("  pause, p50", "ms", ms(e.pause_us.p50)));
            figures.push(Figure::part(
                "  resume to commit, p50",
                "ms",
                ms(e.commit_us.p50),
            ));
            figures.push(Figure::part(
                "  pages an epoch, p50",
                "",
                e.pages.p50 as f64,
            ));
        }
    }
    Ok(figures)
}

/// What a guest that has touched its memory costs both hosts, under load.
fn memory(scene: &mut Scene) -> Result<Vec<Figure>> {
    // Unprotected first, so that the pages are touched before the seeding.
    scene.workers(500, 40_000, 0)?;
    std::thread::sleep(2 * STRETCH);
    scene.workers(500, 4000, 0)?;
    scene.protect()?;
    std::thread::sleep(STRETCH);
    let e = scene.epochs()?;
    let mut figures = Vec::new();
    for (role, target) in [
        (Role::Standby, Target::AtMost(1.25)),
        (Role::Primary, Target::None),
    ] {
        let (net, status) = scene.side(role)?;
        let daemon = daemon_anonymous_bytes(&net.config_file);
        let of_guest = |bytes: u64| bytes as f64 / status.memory_bytes as f64;
        let vm = status.resident_bytes;
        figures.push(Figure::new(
            format!("memory of the {role:?}'s host over the guest's").to_lowercase(),
            "x",
            target,
            vm.map(|vm| of_guest(vm + daemon)),
            "",
        ));
        figures.push(Figure::part(
            "  of it the daemon's own",
            "x",
            of_guest(daemon),
        ));
    }
    scene.unprotect()?;
    scene.workers(0, 0, 0)?;
    figures.extend(shown(
        "pause, 500 writes and 4000 pages a second",
        e.pause_us,
        e.window,
    ));
    figures.push(Figure::part(
        "  pages an epoch, p50",
        "",
        e.pages.p50 as f64,
    ));
    figures.push(Figure::part(
        "  resume to commit, p50",
        "ms",
        ms(e.commit_us.p50),
    ));
    Ok(figures)
}

/// Anonymous memory of the daemon with this configuration: staging, buffers, code's data
/// (proc(5), RssAnon). The RAM files it maps are counted by the VM's status.
fn daemon_anonymous_bytes(config: &std::path::Path) -> u64 {
    let config = config.to_string_lossy();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let of = |folder: PathBuf| -> Option<u64> {
        let line = std::fs::read_to_string(folder.join("cmdline")).ok()?;
        let words: Vec<&str> = line.split('\0').collect();
        if words.get(1) != Some(&"daemon") || !words.contains(&&*config) {
            return None;
        }
        let status = std::fs::read_to_string(folder.join("status")).ok()?;
        let kib = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
        kib.split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
            .map(|k| k * 1024)
    };
    processes.filter_map(|p| of(p.path())).sum()
}

/// Hosts lose power, one after the other, under the drill's load.
fn failover(scene: &mut Scene) -> Result<Vec<Figure>> {
    scene.workers(200, 2000, 0)?;
    let load = scene.clients(Mode::Counter, 2)?;
    let echo = scene.clients(Mode::Echo, 1)?;
    scene.protect()?;
    let mut rng = Rng::new(7);
    let (mut detection, mut claim, mut promotion, mut blackout) = (vec![], vec![], vec![], vec![]);
    let (mut service, mut echoes) = (Vec::new(), Vec::new());
    for number in 1..=FAILOVERS {
        let before = scene.env.wait_mirrored(STEP_MAX)?;
        std::thread::sleep(rng.duration(CALM.0, CALM.1));
        let at = scene.env.inject(DrillKind::KillHost, &before.host)?;
        let after = scene.env.wait_running(before.generation, STEP_MAX)?;
        let f = after
            .last_failover
            .context("a promotion without its times")?;
        load.wait_answers(f.running_ns, STEP_MAX)?;
        echo.wait_answers(f.running_ns, STEP_MAX)?;
        let gap = load
            .blackout_us(at, MonotonicNs::now())
            .context("no client was served")?;
        let of_echo = echo
            .blackout_us(at, MonotonicNs::now())
            .context("no client was served")?;
        detection.push(micros(f.suspected_at_ns.since(at)));
        claim.push(micros(f.promote_started_ns.since(f.suspected_at_ns)));
        promotion.push(micros(f.running_ns.since(f.promote_started_ns)));
        service.push(gap.saturating_sub(micros(f.running_ns.since(at))));
        blackout.push(gap);
        echoes.push(of_echo);
        let promoted = after
            .events
            .iter()
            .rev()
            .find(|e| e.text.starts_with("promoted"));
        eprintln!(
            "failover {number}: blackout {} ms, of echo {} ms, running after {} ms; {}",
            gap / 1000,
            of_echo / 1000,
            micros(f.running_ns.since(at)) / 1000,
            promoted.map_or("", |e| e.text.as_str())
        );
        scene.env.repair(DrillKind::KillHost, &before.host)?;
    }
    scene.env.wait_mirrored(STEP_MAX)?;
    drop((load, echo));
    scene.unprotect()?;
    scene.workers(0, 0, 0)?;
    let shown = |name: &str, values: Vec<u64>| {
        Figure::part(format!("  {name}, p50"), "ms", ms(quantiles(values).p50_us))
    };
    let q: Quantiles = quantiles(promotion);
    let mut figures = spread(
        "promotion",
        &q,
        (Target::AtMost(10.0), Target::None),
        ["7.4", "", ""],
    );
    figures.extend(spread(
        "blackout (100 ms detection)",
        &quantiles(blackout),
        (Target::AtMost(250.0), Target::Below(500.0)),
        [""; 3],
    ));
    figures.push(shown("blackout of a client that needs no disk", echoes));
    figures.push(shown("power cut to suspicion", detection));
    figures.push(shown("suspicion to promotion", claim));
    figures.push(shown("running to the last client's answer", service));
    Ok(figures)
}

/// The guest's clock against the host's, both in ns.
fn clocks(scene: &Scene) -> Result<(u64, u64)> {
    let mut best: Option<(Duration, u64, u64)> = None;
    for _ in 0..CLOCK_READINGS {
        let asked = MonotonicNs::now();
        let guest: u64 = scene.ask("TIME")?.parse()?;
        let trip = MonotonicNs::now().since(asked);
        let half = u64::try_from(trip.as_nanos() / 2)?;
        if best.is_none_or(|b| trip < b.0) {
            best = Some((trip, guest, asked.0 + half));
        }
    }
    let (_, guest, host) = best.context("no reading")?;
    Ok((guest, host))
}

/// The guest's clock with a checkpoint every 10 ms.
fn drift(scene: &mut Scene) -> Result<Vec<Figure>> {
    scene.restart_with(|spec| {
        let line = |l: &str| match l.split_once('=') {
            Some((key, _)) if key.trim() == "epoch_interval_max_ms" => format!("{key}= 10"),
            _ => l.to_owned(),
        };
        spec.lines().map(line).collect::<Vec<_>>().join("\n")
    })?;
    scene.workers(0, 0, 0)?;
    let over = |scene: &Scene| -> Result<f64> {
        let (guest, host) = clocks(scene)?;
        std::thread::sleep(DRIFT);
        let (guest_then, host_then) = clocks(scene)?;
        let (guest, host) = ((guest_then - guest) as f64, (host_then - host) as f64);
        Ok(100.0 * (guest - host).abs() / host)
    };
    let alone = over(scene)?;
    scene.protect()?;
    let mirrored = over(scene)?;
    let e = scene.epochs()?;
    scene.unprotect()?;
    Ok(vec![
        Figure::new(
            "drift of the guest's clock, 10 ms epochs",
            "%",
            Target::Below(0.5),
            Some(mirrored),
            "0.0 to 0.3",
        ),
        Figure::part("  unprotected", "%", alone),
        Figure::part("  epoch length, p50", "ms", ms(e.length_us.p50)),
        Figure::part("  pause, p50", "ms", ms(e.pause_us.p50)),
    ])
}
