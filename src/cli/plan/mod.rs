//! `pollux plan …`: the failover planner at the command line. Reads pool files, asks `plan`,
//! shows the answers. Needs no daemon.

mod change;
mod help;
mod show;

use super::print_json;
use crate::plan::advice::{Ways, advise};
use crate::plan::answer::{Answer, Word};
use crate::plan::certificate::Certificate;
use crate::plan::largest::{Largest, largest};
use crate::plan::layout::Scope;
use crate::plan::model::{Pool, TEXT_BYTES_MAX};
use crate::plan::random::{Random, pool as random_pool};
use crate::plan::restart;
use crate::plan::tolerance::{Budget, Checker, Part, Runner};
use crate::plan::verify::verify;
use crate::plan::whatif::{Admission, checker, judge};
use crate::pool::HostName;
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Subcommand)]
pub(super) enum PlanCommand {
    /// Is every set of r failures survived? With a proof, or with one set that is not.
    #[command(after_long_help = help::CHECK)]
    Check(Check),
    /// How many failures are survived at most, and what would be lost with one more?
    #[command(after_long_help = help::MAX)]
    Max(Files),
    /// These hosts just died: what is started where, in which order?
    #[command(after_long_help = help::RESTART)]
    Restart(Restart),
    /// Would the pool still be safe after a change? Exit status 0 if it may be done.
    #[command(after_long_help = help::WHATIF)]
    Whatif(WhatIf),
    /// What each host holds, why the answer is what it is, and what to do about it.
    #[command(after_long_help = help::EXPLAIN)]
    Explain(Files),
    /// Write a random pool to standard output.
    #[command(after_long_help = help::RANDOM)]
    Random(RandomArgs),
}

#[derive(Args)]
pub(super) struct Files {
    /// Pool files, TOML or JSON; `-` reads standard input.
    #[arg(long = "pool", required = true, num_args = 1.., value_name = "FILE")]
    pools: Vec<PathBuf>,
    /// Failures to survive; default: what the pool says under `tolerate`.
    #[arg(long, short = 'r', value_name = "R")]
    failures: Option<u32>,
    /// Threads; default: one for each core.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

#[derive(Args)]
pub(super) struct Check {
    #[command(flatten)]
    files: Files,
    /// Write the proof to this file as JSON; with one pool only.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct Restart {
    #[command(flatten)]
    files: Files,
    /// The hosts that died.
    #[arg(long, required = true, value_delimiter = ',', value_name = "HOST,…")]
    dead: Vec<HostName>,
}

#[derive(Args)]
pub(super) struct WhatIf {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    change: change::ChangeArgs,
}

#[derive(Args)]
pub(super) struct RandomArgs {
    /// How many hosts.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    hosts: u8,
    /// Memory of each host in GiB; default: 64, or with --vms as much as --used asks for.
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=65536))]
    memory: Option<u64>,
    /// How many VMs; default: as many as --used allows.
    #[arg(long)]
    vms: Option<u16>,
    /// How much of all memory the VMs take, in percent.
    #[arg(long, default_value_t = 60, value_name = "PERCENT", value_parser = clap::value_parser!(u64).range(1..=100))]
    used: u64,
    /// Failures to survive.
    #[arg(long, short = 'r', default_value_t = 2)]
    failures: u32,
    /// The same seed makes the same pool.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Racks, standbys, reservations, groups, vCPUs and restrictions too.
    #[arg(long)]
    mixed: bool,
}

/// Runs the first pass on threads.
struct Threads(usize);

impl Runner for Threads {
    fn parts(&self) -> usize {
        self.0
    }
    fn run(&self, parts: usize, job: &(dyn Fn(usize) -> Part + Sync)) -> Vec<Part> {
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..parts)
                .map(|part| scope.spawn(move || job(part)))
                .collect();
            started
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|e| std::panic::resume_unwind(e))
                })
                .collect()
        })
    }
}

/// One pool file.
struct Loaded {
    file: String,
    pool: Pool,
}

impl Files {
    fn load(&self) -> anyhow::Result<Vec<Loaded>> {
        self.pools.iter().map(|path| self.load_one(path)).collect()
    }

    fn load_one(&self, path: &std::path::Path) -> anyhow::Result<Loaded> {
        let file = path.display().to_string();
        let mut bytes = Vec::new();
        let limit = TEXT_BYTES_MAX as u64 + 1;
        if file == "-" {
            std::io::stdin().take(limit).read_to_end(&mut bytes)?;
        } else {
            std::fs::File::open(path)
                .and_then(|open| open.take(limit).read_to_end(&mut bytes))
                .with_context(|| format!("cannot read {file}"))?;
        }
        let text = String::from_utf8(bytes).with_context(|| format!("{file} is no text"))?;
        let mut pool = Pool::parse(&text, &file)?;
        if let Some(failures) = self.failures {
            pool.tolerate = failures;
        }
        Ok(Loaded { file, pool })
    }

    /// For commands that are about one pool.
    fn load_single(&self) -> anyhow::Result<Loaded> {
        let [path] = self.pools.as_slice() else {
            bail!("this is asked of one pool at a time; give one file after --pool");
        };
        self.load_one(path)
    }

    fn runner(&self) -> Threads {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Threads(self.jobs.unwrap_or_else(cores).max(1))
    }
}

pub(super) fn run(command: PlanCommand, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        PlanCommand::Check(check) => check.run(json),
        PlanCommand::Max(files) => max(&files, json),
        PlanCommand::Restart(restart) => restart.run(json),
        PlanCommand::Whatif(whatif) => whatif.run(json),
        PlanCommand::Explain(files) => explain(&files, json),
        PlanCommand::Random(args) => {
            let pool = random_pool(&Random {
                hosts: args.hosts,
                memory_gib: args.memory,
                vms: args.vms,
                used_permille: args.used * 10,
                tolerate: args.failures,
                mixed: args.mixed,
                seed: args.seed,
            });
            let text = if json { pool.to_json() } else { pool.to_toml() };
            show::print(&text)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn exit(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What `check` found out about one pool.
#[derive(Serialize)]
struct Checked {
    file: String,
    hosts: usize,
    vms: usize,
    #[serde(flatten)]
    answer: Answer,
    /// Whether the verifier agrees with the proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<bool>,
    remarks: Vec<String>,
}

impl Check {
    fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        if self.certificate.is_some() && self.files.pools.len() > 1 {
            bail!("--certificate writes the proof of one pool; give one file after --pool");
        }
        let runner = self.files.runner();
        let mut all = Vec::new();
        for Loaded { file, pool } in self.files.load()? {
            let checker = checker(&runner, &pool, Budget::default());
            let certificate = Certificate::of(&checker, pool.fails);
            if let Some(certificate) = &certificate {
                // A solver that errs must not be believed.
                verify(&pool, certificate).map_err(|what| {
                    anyhow::anyhow!("{file}: the verifier refuses the proof ({what}); this is a bug in pollux, do not rely on this answer")
                })?;
            }
            if let Some(path) = &self.certificate {
                let Some(certificate) = &certificate else {
                    bail!("{file} is not survived, so there is no proof to write");
                };
                let text = serde_json::to_vec(certificate)?;
                std::fs::write(path, text)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            let checked = Checked {
                hosts: pool.hosts.len(),
                vms: pool.vms.iter().filter(|vm| vm.host.is_some()).count(),
                answer: Answer::of(&checker),
                verified: certificate.map(|_| true),
                remarks: pool.remarks(),
                file,
            };
            if !json {
                show::print(&show::checked(&checked, &pool))?;
            }
            all.push(checked);
        }
        if json {
            print_json(&all)?;
        }
        let good = |checked: &Checked| checked.answer.answer == Word::Survives;
        Ok(exit(all.iter().all(good)))
    }
}

/// Both classes of one pool.
#[derive(Serialize)]
struct Most {
    file: String,
    classes: Vec<Largest>,
}

fn max(files: &Files, json: bool) -> anyhow::Result<ExitCode> {
    let runner = files.runner();
    let mut all = Vec::new();
    for Loaded { file, pool } in files.load()? {
        let classes = [Scope::Always, Scope::All]
            .map(|scope| largest(&runner, &pool, scope, Budget::default()))
            .into();
        let most = Most { file, classes };
        if !json {
            show::print(&show::most(&most, &pool))?;
        }
        all.push(most);
    }
    if json {
        print_json(&all)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Restart {
    fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let Loaded { pool, .. } = self.files.load_single()?;
        let runner = self.files.runner();
        let checker = checker(&runner, &pool, Budget::default());
        let plan = restart::plan(&pool, &self.dead, Some(&checker)).map_err(anyhow::Error::msg)?;
        if json {
            print_json(&plan)?;
        } else {
            show::print(&show::restart(&plan))?;
        }
        Ok(exit(plan.left_over.is_empty()))
    }
}

impl WhatIf {
    fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let Loaded { pool, .. } = self.files.load_single()?;
        let change = self.change.read(&pool)?;
        let runner = self.files.runner();
        let mut checker = checker(&runner, &pool, Budget::default());
        let what = judge(&runner, &mut checker, &pool, &change);
        if json {
            print_json(&what)?;
        } else {
            show::print(&show::whatif(&what))?;
        }
        Ok(exit(what.admission != Admission::Refused))
    }
}

/// Everything about one pool.
#[derive(Serialize)]
struct Explained {
    file: String,
    hosts: Vec<show::HostLine>,
    #[serde(flatten)]
    answer: Answer,
    remarks: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<Ways>,
}

fn explain(files: &Files, json: bool) -> anyhow::Result<ExitCode> {
    let runner = files.runner();
    let mut all = Vec::new();
    for Loaded { file, pool } in files.load()? {
        let checker: Checker = checker(&runner, &pool, Budget::default());
        let answer = Answer::of(&checker);
        let advice = (answer.answer == Word::Overcommitted).then(|| advise(&pool, &checker));
        let explained = Explained {
            hosts: show::host_lines(&pool),
            answer,
            remarks: pool.remarks(),
            advice,
            file,
        };
        if !json {
            show::print(&show::explained(&explained, &pool))?;
        }
        all.push(explained);
    }
    if json {
        print_json(&all)?;
    }
    Ok(ExitCode::SUCCESS)
}
