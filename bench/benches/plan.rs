//! The failover planner: how long a first proof takes, an update after a VM starts, a restart plan;
//! and how many random pools that are safe it accepts. `cargo bench -p pollux-bench --bench plan`
//! prints the tables; with `-- NAME` only criterion's measurement of that part runs.
//!
//! One thread; times are what it got of a processor, so that other load on the machine does not
//! count. Beside the first proofs stands what xapi's planner needs for the same size by published
//! measurements; beside the safe pools how many of them worst-fit decreasing alone places, set by set.

use criterion::Criterion;
use nix::time::{ClockId, clock_gettime};
use pollux::plan::layout::Scope;
use pollux::plan::model::{Bytes, Pool, Vm};
use pollux::plan::random::{Random, pool as random};
use pollux::plan::restart;
use pollux::plan::tolerance::{Budget, Checker, Outcome};
use std::hint::black_box;
use std::time::Duration;

/// A pool of one size, how full it is, and how long the first proof may take.
struct Size {
    hosts: u8,
    failures: u32,
    vms: u16,
    used_permille: u64,
    target_ms: u64,
    xapi: &'static str,
}

const SIZES: [Size; 6] = [
    size(16, 3, 512, 700, 500, "4.6 s"),
    size(16, 3, 512, 810, 500, "4.6 s"),
    size(32, 2, 1_638, 850, 500, "3.7 s"),
    size(32, 2, 1_638, 936, 500, "3.7 s"),
    size(64, 3, 2_000, 800, 5_000, "estimates"),
    size(64, 3, 2_000, 925, 5_000, "estimates"),
];

const fn size(
    hosts: u8,
    failures: u32,
    vms: u16,
    used_permille: u64,
    target_ms: u64,
    xapi: &'static str,
) -> Size {
    Size {
        hosts,
        failures,
        vms,
        used_permille,
        target_ms,
        xapi,
    }
}

impl Size {
    fn pool(&self) -> Pool {
        random(&Random {
            hosts: self.hosts,
            memory_gib: None,
            vms: Some(self.vms),
            used_permille: self.used_permille,
            tolerate: self.failures,
            mixed: false,
            seed: 1,
        })
    }

    fn name(&self) -> String {
        format!(
            "{} hosts, r = {}, {} VMs, {} % used",
            self.hosts,
            self.failures,
            self.vms,
            self.used_permille as f64 / 10.0
        )
    }
}

fn prove(pool: &Pool) -> Checker {
    Checker::new(pool, pool.tolerate, Scope::Always, Budget::default())
}

/// The pool with one more VM of 4 GiB on its `n`th host.
fn one_more(pool: &Pool, n: usize) -> Pool {
    let mut pool = pool.clone();
    let host = n % pool.hosts.len();
    pool.vms.push(Vm {
        name: format!("started-{n}"),
        memory: Bytes::gib(4),
        host: Some(pool.hosts[host].name.clone()),
        ..Vm::default()
    });
    pool
}

fn main() {
    let named = std::env::args().skip(1).any(|arg| !arg.starts_with('-'));
    if named {
        let mut c = Criterion::default()
            .measurement_time(Duration::from_secs(3))
            .sample_size(20)
            .configure_from_args();
        parts(&mut c);
        c.final_summary();
        return;
    }
    proofs();
    accepted();
}

fn parts(c: &mut Criterion) {
    let small = SIZES[0].pool();
    c.bench_function("proof-16", |b| b.iter(|| black_box(prove(&small))));
    let large = SIZES[4].pool();
    let more = one_more(&large, 1);
    let mut checker = prove(&large);
    c.bench_function("update-64-start-and-stop", |b| {
        b.iter(|| {
            checker.update(&more);
            checker.update(&large);
        });
    });
    let dead = [large.hosts[0].name.clone(), large.hosts[1].name.clone()];
    c.bench_function("restart-64", |b| {
        b.iter(|| black_box(restart::plan(&large, &dead, Some(&checker))));
    });
}

/// What this thread has got of a processor so far (clock_gettime(2)); schedstat counts in ticks.
fn spent() -> Duration {
    let got = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    Duration::from(got.expect("a thread has this clock"))
}

/// How long `work` takes.
fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let before = spent();
    black_box(work());
    spent().saturating_sub(before)
}

/// Middle of several runs, and the longest.
fn times(runs: usize, mut once: impl FnMut(usize) -> Duration) -> (Duration, Duration) {
    let mut all: Vec<Duration> = (0..runs).map(&mut once).collect();
    all.sort();
    (all[runs / 2], all[runs - 1])
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Survives => "survives",
        Outcome::Overcommitted(_) => "overcommitted",
        Outcome::Unknown { .. } => "unknown",
    }
}

fn proofs() {
    println!(
        "{:<40} {:>8} {:>13} {:>22} {:>10} {:>10}",
        "FIRST PROOF, COLD", "SETS", "ANSWER", "MIDDLE / MOST OF 5", "TARGET", "XAPI"
    );
    for size in &SIZES {
        let pool = size.pool();
        let (middle, most) = times(5, |_| timed(|| prove(&pool)));
        let checker = prove(&pool);
        let target = Duration::from_millis(size.target_ms);
        println!(
            "{:<40} {:>8} {:>13} {:>22} {:>10} {:>10}{}",
            size.name(),
            checker.sets().len(),
            word(checker.outcome()),
            format!("{} / {}", ms(middle), ms(most)),
            format!("< {} ms", size.target_ms),
            size.xapi,
            if most < target { "" } else { "  MISSED" }
        );
    }
    println!(
        "\n{:<40} {:>30} {:>10}",
        "AFTER ONE VM STARTED, AND A RESTART PLAN", "MIDDLE / MOST OF 30", "TARGET"
    );
    for size in [&SIZES[2], &SIZES[4], &SIZES[5]] {
        let pool = size.pool();
        let mut checker = prove(&pool);
        let (middle, most) = times(30, |n| {
            let more = one_more(&pool, n);
            let time = timed(|| checker.update(&more).clone());
            checker.update(&pool);
            time
        });
        let what = format!("update, {}", size.name());
        line(&what, middle, most, 10);
        let (middle, most) = times(30, |n| {
            let dead: Vec<_> = (0..size.failures as usize)
                .map(|k| pool.hosts[(n + 7 * k) % pool.hosts.len()].name.clone())
                .collect();
            timed(|| restart::plan(&pool, &dead, Some(&checker)))
        });
        let what = format!("restart, {}", size.name());
        line(&what, middle, most, 5);
    }
}

fn line(what: &str, middle: Duration, most: Duration, target_ms: u64) {
    let missed = match Duration::from_millis(target_ms) {
        target if most < target => "",
        target if middle < target => "  missed by the longest",
        _ => "  MISSED",
    };
    println!(
        "{what:<48} {:>22} {:>10}{missed}",
        format!("{} / {}", ms(middle), ms(most)),
        format!("< {target_ms} ms")
    );
}

/// Random pools of 8 hosts of 64 GiB, r = 2.
fn accepted() {
    println!(
        "\n{:<40} {:>8} {:>10} {:>10}",
        "200 RANDOM POOLS, 8 HOSTS, r = 2", "SAFE", "UNDECIDED", "WORST-FIT"
    );
    for used_permille in [550, 600, 650, 700] {
        let (mut safe, mut undecided, mut worst) = (0, 0, 0);
        for seed in 0..200 {
            let pool = random(&Random {
                hosts: 8,
                memory_gib: Some(64),
                vms: None,
                used_permille,
                tolerate: 2,
                mixed: false,
                seed,
            });
            match prove(&pool).outcome() {
                Outcome::Survives => safe += 1,
                Outcome::Unknown { .. } => undecided += 1,
                Outcome::Overcommitted(_) => {}
            }
            worst += u32::from(worst_fit_accepts(&pool));
        }
        let used = format!("{} % used", used_permille / 10);
        println!("{used:<40} {safe:>8} {undecided:>10} {worst:>10}");
    }
}

/// Whether worst-fit decreasing places what every two hosts lose.
fn worst_fit_accepts(pool: &Pool) -> bool {
    let runs = |vm: &Vm, host: usize| vm.host.as_ref() == Some(&pool.hosts[host].name);
    let free: Vec<u64> = (0..pool.hosts.len())
        .map(|host| {
            let used: u64 = (pool.vms.iter())
                .filter(|vm| runs(vm, host))
                .map(|vm| vm.memory.0)
                .sum();
            pool.hosts[host].memory.0 - used
        })
        .collect();
    for a in 0..free.len() {
        for b in 0..a {
            let mut lost: Vec<u64> = (pool.vms.iter())
                .filter(|vm| runs(vm, a) || runs(vm, b))
                .map(|vm| vm.memory.0)
                .collect();
            lost.sort_unstable_by(|a, b| b.cmp(a));
            let mut left: Vec<u64> = (0..free.len())
                .filter(|host| *host != a && *host != b)
                .map(|host| free[host])
                .collect();
            for need in lost {
                match left.iter_mut().max() {
                    Some(most) if *most >= need => *most -= need,
                    _ => return false,
                }
            }
        }
    }
    true
}
