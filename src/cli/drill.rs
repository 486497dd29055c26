//! `pollux drill …` and `pollux demo`

use crate::drill::lab_env::{Guest, LabEnv};
use crate::drill::{DrillKind, DrillSpec, Load, Service, run as rehearse, table};
use clap::{Args, Subcommand, ValueEnum};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Subcommand)]
pub(super) enum DrillCommand {
    /// Rehearse a failure on a real VM in a lab of its own, with clients outside.
    ///
    /// The VM works its disk and memory while clients count upwards over one TCP
    /// connection each; the failure comes at a random moment; the report says what the
    /// clients saw and whether anything was lost. Exit status 0 only if nothing was.
    Run(Run),
    /// Run scenario files on labs of real daemons, as far as the faults exist there.
    ///
    /// The same files as of `pollux sim run`; each case makes a lab of its own. A case whose faults a
    /// lab does not have is named and left out. Exit status 0 only if all that ran went as
    /// expected.
    #[command(
        after_long_help = "  pollux drill scenario scenarios/lab.toml\n  pollux drill scenario scenarios/crash.toml --case 'power fencing'"
    )]
    Scenario(Scenario),
}

#[derive(Args)]
pub(super) struct Scenario {
    /// The file.
    file: std::path::PathBuf,
    /// Run only the cases whose name contains this.
    #[arg(long)]
    case: Option<String>,
}

impl Scenario {
    fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        use crate::drill::scenario::{not_in_lab, run_case};
        let text = std::fs::read_to_string(&self.file)
            .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", self.file.display()))?;
        let name = self.file.display().to_string();
        let scenario = crate::sim::scenario::Scenario::parse(&text, &name)?;
        let mut outcomes = Vec::new();
        for case in &scenario.cases {
            if self.case.as_ref().is_some_and(|c| !case.name.contains(c)) {
                continue;
            }
            if let Some(why) = not_in_lab(case) {
                eprintln!("{}: left out, {why}", case.name);
                continue;
            }
            let outcome = run_case(case, &lab_name("scenario"), None, |step| {
                eprintln!("{}: {step}", case.name);
            })?;
            if !json {
                print!("{}", outcome_text(&outcome));
            }
            outcomes.push(outcome);
        }
        if json {
            super::print_json(&outcomes)?;
        }
        if outcomes.is_empty() {
            anyhow::bail!("{name}: no case was run");
        }
        let good = outcomes.iter().all(|outcome| outcome.unmet.is_empty());
        Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn outcome_text(outcome: &crate::drill::scenario::Outcome) -> String {
    let seconds = |ms: Option<u64>| {
        ms.map_or("never".into(), |ms| {
            format!("{}.{} s", ms / 1000, ms % 1000 / 100)
        })
    };
    let verdict = if outcome.unmet.is_empty() {
        "as expected"
    } else {
        "NOT as expected"
    };
    let mut text = format!(
        "{}: {verdict}; given up {}, VMs may restart {}, resets {}",
        outcome.case,
        seconds(outcome.given_up_ms),
        seconds(outcome.may_restart_ms),
        outcome.resets
    );
    if let Some(xenserver) = &outcome.xenserver {
        text.push_str(&format!("; XenServer {xenserver}"));
    }
    text.push('\n');
    for unmet in &outcome.unmet {
        text.push_str(&format!("  {unmet}\n"));
    }
    for decision in &outcome.decisions {
        text.push_str(&format!("  {decision}\n"));
    }
    text
}

#[derive(Args)]
pub(super) struct Run {
    /// Which failure.
    kind: Kind,
    /// How many in a row, each followed by re-protection.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// Clients, one connection each.
    #[arg(long, default_value_t = 2)]
    clients: u16,
    /// Writes per second of the guest's disk worker.
    #[arg(long, default_value_t = 200)]
    disk_iops: u32,
    /// Pages per second that the guest's memory worker dirties.
    #[arg(long, default_value_t = 2000)]
    mem_pages: u32,
    /// Private links of the pair.
    #[arg(long, default_value_t = 2)]
    links: u8,
    /// Cut one of the links, in the calm time before the failure; it heals with the rest.
    #[arg(long)]
    cut_before: bool,
    /// Full-size packets through the guest meanwhile.
    #[arg(long)]
    net: bool,
    /// Clients use redis (INCR) in the guest instead of the built-in counter.
    #[arg(long)]
    redis: bool,
    /// Repeats the random moments of an earlier drill; default: the time of day.
    #[arg(long)]
    seed: Option<u64>,
    /// Do not compare memory and disk with the checkpoint at each promotion (the
    /// comparison is part of the blackout).
    #[arg(long)]
    no_audit: bool,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Machine type as in a spec.
    #[arg(long, default_value = "auto")]
    machine: String,
    /// Leave the lab's directory with logs and disks behind, and say where it is.
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// The host that runs the VM loses power.
    KillHost,
    /// The VM's QEMU process is killed.
    KillQemu,
    /// The private link of the pair is cut.
    CutLink,
    /// The host that runs the VM stands still, and later goes on.
    FreezeHost,
    /// A planned swap of the roles.
    Switchover,
    /// One private link of several is cut and comes back, perhaps another one after it;
    /// the VM is to stay mirrored.
    CutOneLink,
    /// One private link of several carries next to nothing for a while; the VM is to stay
    /// mirrored.
    SlowLink,
}

impl From<Kind> for DrillKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::KillHost => Self::KillHost,
            Kind::KillQemu => Self::KillQemu,
            Kind::CutLink => Self::CutLink,
            Kind::FreezeHost => Self::FreezeHost,
            Kind::Switchover => Self::Switchover,
            Kind::CutOneLink => Self::CutOneLink,
            Kind::SlowLink => Self::SlowLink,
        }
    }
}

fn time_of_day() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

fn lab_name(what: &str) -> String {
    format!("{what}-{}", std::process::id())
}

fn exit(status: i32) -> ExitCode {
    u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)
}

pub(super) fn run(command: DrillCommand, json: bool) -> anyhow::Result<ExitCode> {
    let run = match command {
        DrillCommand::Run(run) => run,
        DrillCommand::Scenario(scenario) => return scenario.run(json),
    };
    let guest = Guest {
        memory_mib: run.memory,
        vcpus: run.vcpus,
        machine: run.machine,
        ..Guest::new(&Guest::find_images()?)
    };
    let spec = DrillSpec {
        kind: run.kind.into(),
        repeat: run.repeat,
        links: run.links,
        cut_before: run.cut_before,
        load: Load {
            clients: run.clients,
            disk_iops: run.disk_iops,
            mem_pages_s: run.mem_pages,
            net: run.net,
        },
        service: if run.redis {
            Service::Redis
        } else {
            Service::Counter
        },
        seed: run.seed.unwrap_or_else(time_of_day),
        audit: !run.no_audit,
        json,
    };
    let report = rehearse(
        &spec,
        &mut LabEnv::new(lab_name("drill"), guest).keep_files(run.keep),
    )?;
    if json {
        println!("{}", report.to_json()?);
    } else {
        print!("{}", table::table(&report));
    }
    Ok(exit(report.exit_status()))
}

const INTRODUCTION: &str = "\
pollux demo: two hosts, a and b, made of namespaces on this machine. A real VM (QEMU,
Debian's kernel) runs on a, mirrored to b: every few milliseconds its memory, devices and
disk writes are copied, and nothing it says gets out before b holds what it was saying.
Clients outside count upwards with it over TCP, each number written to its disk first.
Then a's power is cut.
";

pub(super) fn demo(json: bool) -> anyhow::Result<ExitCode> {
    if !json {
        eprintln!("{INTRODUCTION}");
    }
    let spec = DrillSpec {
        kind: DrillKind::KillHost,
        repeat: 1,
        links: 1,
        cut_before: false,
        load: Load {
            clients: 2,
            disk_iops: 200,
            mem_pages_s: 2000,
            net: false,
        },
        service: Service::Counter,
        seed: time_of_day(),
        audit: true,
        json,
    };
    let guest = Guest::new(&Guest::find_images()?);
    let report = rehearse(&spec, &mut LabEnv::new(lab_name("demo"), guest))?;
    if json {
        println!("{}", report.to_json()?);
    } else {
        print!("{}", table::table(&report));
    }
    Ok(exit(report.exit_status()))
}
