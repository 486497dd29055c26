//! `pollux sim …`

use super::print_json;
use crate::sim::pool::{Summary, run_case};
use crate::sim::scenario::{Case, Scenario};
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

const RUN_HELP: &str = "\
A scenario file holds cases: what the pool is, what happens when, and what is expected, in
sentences (scenarios/README.md lists them). Each case runs once per seed: the seed decides latencies,
clock rates, who is first, and random faults where the case asks for some. After every event the
invariants are checked; the first that does not hold ends the case and prints how to replay it.

Examples:
  pollux sim run scenarios/xenserver-table.toml
  pollux sim run scenarios/ --seeds 10000 --jobs 8
  pollux sim run scenarios/random.toml --seed 4711 --trace

Exit status 0 only if every expectation was met and every invariant held.";

#[derive(Subcommand)]
pub(super) enum SimCommand {
    /// Run scenarios in virtual time, with the very code that decides on real hosts.
    #[command(after_long_help = RUN_HELP)]
    Run(Run),
}

#[derive(Args)]
pub(super) struct Run {
    /// Scenario files, or folders of them.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// How many seeds each case runs with.
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// Run this one seed instead.
    #[arg(long)]
    seed: Option<u64>,
    /// Run only the cases whose name contains this.
    #[arg(long)]
    case: Option<String>,
    /// How many seeds run side by side; as many as there are processors if left out.
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Print what happens, line by line; for one seed.
    #[arg(long, requires = "seed")]
    trace: bool,
}

/// One file's results.
#[derive(Serialize)]
struct FileResult {
    file: String,
    about: String,
    cases: Vec<Summary>,
}

pub(super) fn run(command: SimCommand, json: bool) -> anyhow::Result<ExitCode> {
    let SimCommand::Run(run) = command;
    let mut results = Vec::new();
    for path in files(&run.files)? {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let scenario = Scenario::parse(&text, &path.display().to_string())?;
        if run.trace {
            trace(&run, &scenario);
        }
        let cases = scenario
            .cases
            .iter()
            .filter(|case| {
                let wanted = run.case.as_ref();
                wanted.is_none_or(|wanted| case.name.contains(wanted))
            })
            .map(|case| {
                let (first, seeds) = match run.seed {
                    Some(seed) => (seed, 1),
                    None => (1, run.seeds.min(case.seeds_max.unwrap_or(u64::MAX))),
                };
                let shows = std::io::stderr().is_terminal();
                let jobs = run.jobs.unwrap_or_else(processors);
                let summary = run_seeds(case, first, seeds, jobs, |done| {
                    if shows && done.is_multiple_of(100) {
                        eprint!("\r{}: {done}/{seeds} seeds\x1b[K", case.name);
                    }
                });
                if shows {
                    eprint!("\r\x1b[K");
                }
                summary
            })
            .collect();
        let result = FileResult {
            file: path.display().to_string(),
            about: scenario.about.trim().to_owned(),
            cases,
        };
        if !json {
            print!("{}", table(&result));
        }
        results.push(result);
    }
    if json {
        print_json(&results)?;
    }
    let mut cases = results.iter().flat_map(|result| &result.cases).peekable();
    if cases.peek().is_none() {
        bail!("no case has such a name; leave --case out to run all");
    }
    Ok(if cases.all(Summary::is_good) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn processors() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Run a case with `seeds` seeds from `first` on, `jobs` of them side by side; each run has one
/// thread. After a violation no later seed is begun, so that the first one is told whatever `jobs`
/// is.
fn run_seeds(
    case: &Case,
    first: u64,
    seeds: u64,
    jobs: NonZeroUsize,
    progress: impl Fn(u64),
) -> Summary {
    let next = AtomicU64::new(first);
    let end = AtomicU64::new(first.saturating_add(seeds));
    let (done, ended) = channel();
    std::thread::scope(|scope| {
        for _ in 0..jobs.get() {
            let (next, end, done) = (&next, &end, done.clone());
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end.load(Ordering::Relaxed) {
                        return;
                    }
                    let outcome = run_case(case, seed, false).map_err(|(violation, _)| violation);
                    if outcome.is_err() {
                        end.fetch_min(seed, Ordering::Relaxed);
                    }
                    if done.send((seed, outcome)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        let mut runs = BTreeMap::new();
        for (seed, outcome) in ended {
            runs.insert(seed, outcome);
            progress(runs.len() as u64);
        }
        Summary::of(case, runs)
    })
}

fn trace(run: &Run, scenario: &Scenario) {
    let wanted = run.case.as_ref();
    for case in &scenario.cases {
        if wanted.is_some_and(|wanted| !case.name.contains(wanted)) {
            continue;
        }
        let lines = match run_case(case, run.seed.unwrap_or(1), true) {
            Ok(report) => report.trace,
            Err((_, trace)) => trace,
        };
        println!("{}:", case.name);
        for line in lines {
            println!("  {line}");
        }
    }
}

/// The files that are meant, in order.
fn files(given: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in given {
        if path.is_dir() {
            let mut inside = Vec::new();
            for entry in std::fs::read_dir(path)
                .with_context(|| format!("cannot list {}", path.display()))?
            {
                let entry = entry?.path();
                if entry.extension().is_some_and(|ext| ext == "toml") {
                    inside.push(entry);
                }
            }
            if inside.is_empty() {
                bail!("{} holds no scenario files (*.toml)", path.display());
            }
            inside.sort();
            all.extend(inside);
        } else {
            all.push(path.clone());
        }
    }
    Ok(all)
}

fn times(pair: Option<(u64, u64)>) -> String {
    pair.map_or("-".into(), |(middle, most)| {
        format!("{:.1} / {:.1} s", seconds(middle), seconds(most))
    })
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

fn table(result: &FileResult) -> String {
    let name = Path::new(&result.file)
        .file_name()
        .map_or(result.file.clone(), |name| name.to_string_lossy().into());
    let compares = result.cases.iter().any(|case| case.xenserver.is_some());
    let mut out = format!("{name}: {}\n", result.about);
    let width = result
        .cases
        .iter()
        .map(|case| case.case.len())
        .max()
        .unwrap_or(0)
        .max(4);
    let _ = write!(
        out,
        "  {:<width$} {:>6} {:<5} {:>15} {:>15} {:>6}",
        "CASE", "SEEDS", "", "GIVEN UP", "MAY RESTART", "RESETS"
    );
    out.push_str(if compares { "  XENSERVER\n" } else { "\n" });
    for case in &result.cases {
        let _ = write!(
            out,
            "  {:<width$} {:>6} {:<5} {:>15} {:>15} {:>6}",
            case.case,
            case.seeds,
            if case.is_good() { "ok" } else { "BAD" },
            times(case.decided_ms),
            times(case.may_restart_ms),
            case.resets
        );
        if let Some(xenserver) = &case.xenserver {
            let _ = write!(out, "  {xenserver}");
        }
        out.push('\n');
        for (seed, unmet) in &case.unmet {
            let _ = writeln!(out, "    seed {seed}: {unmet}");
        }
        if let Some(violation) = &case.violation {
            let _ = writeln!(out, "    VIOLATION {violation}");
        }
        if let Some(seed) = case.failed_seed {
            let _ = writeln!(
                out,
                "    replay: pollux sim run {} --case '{}' --seed {seed} --trace",
                result.file, case.case
            );
        }
    }
    out
}
