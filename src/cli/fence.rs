//! `pollux fence …` and `pollux watchdog`: stand-alone, no daemon is asked.

use super::print_json;
use crate::fence::config::FenceConfig;
use crate::fence::job::{Check, Job, Outcome, Power, check};
use crate::fence::watchdog::{Ended, Supervisor};
use crate::pool::HostName;
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const TEST_HELP: &str = "\
Asks every device of every level for its status, for `monitor`, and whether it knows `off`.
Nothing is switched. A device that fails here will fail when it is needed.

Example:
  pollux fence test b --config /etc/pollux/fence.toml

Run it from every host that may have to fence, and again after every change of a password
or cable. Once, before you trust it, pull the host's plug in earnest with `pollux fence off`.";

#[derive(Subcommand)]
pub(super) enum FenceCommand {
    /// Find out whether a host could be fenced, without switching anything.
    #[command(after_long_help = TEST_HELP)]
    Test(Which),
    /// Show what each device says about the host's power.
    Status(Which),
    /// Take a host's power, level by level, until one has confirmed it.
    ///
    /// The VMs on it die. Exit status 0 only if the power is proved to be off; a rehearsal
    /// with fence_dummy is no proof.
    Off {
        #[command(flatten)]
        which: Which,
        /// Yes, kill this host.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Args)]
pub(super) struct Which {
    /// The host.
    host: HostName,
    /// The file that says how hosts are fenced (docs/fencing.md).
    #[arg(long, default_value = "/etc/pollux/fence.toml")]
    config: PathBuf,
}

impl Which {
    fn read(&self) -> anyhow::Result<FenceConfig> {
        let path = self.config.display();
        let text = std::fs::read_to_string(&self.config)
            .with_context(|| format!("cannot read {path}; pass another file with --config"))?;
        FenceConfig::parse(&text).with_context(|| format!("{path}"))
    }
}

pub(super) fn run(command: FenceCommand, json: bool) -> anyhow::Result<ExitCode> {
    let good = match command {
        FenceCommand::Test(which) => checked(&which, true, json)?,
        FenceCommand::Status(which) => checked(&which, false, json)?,
        FenceCommand::Off { which, yes } => {
            if !yes {
                bail!(
                    "this kills host `{0}` and every VM on it; if you mean it: \
                     pollux fence off {0} --yes",
                    which.host
                );
            }
            let outcome = Job::start(&which.read()?, &which.host)?.wait();
            if json {
                print_json(&outcome)?;
            } else {
                print!("{}", outcome_text(&which.host, &outcome));
            }
            matches!(outcome, Outcome::Confirmed { .. })
        }
    };
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn checked(which: &Which, thorough: bool, json: bool) -> anyhow::Result<bool> {
    let checks = check(&which.read()?, &which.host, thorough)?;
    if json {
        print_json(&checks)?;
    } else {
        print!("{}", checks_text(&checks));
    }
    Ok(checks.iter().all(|c| c.problem.is_none()))
}

fn checks_text(checks: &[Check]) -> String {
    let mut text = String::new();
    for c in checks {
        let power = match c.power {
            Ok(Power::On) => "on",
            Ok(Power::Off) => "off",
            Err(_) => "unknown",
        };
        text.push_str(&format!("level {}  {:<20} power {power}", c.level, c.agent));
        if let Some(problem) = &c.problem {
            text.push_str(&format!("  {problem}"));
        }
        text.push('\n');
    }
    text
}

fn outcome_text(host: &HostName, outcome: &Outcome) -> String {
    match outcome {
        Outcome::Confirmed {
            level,
            took,
            agents,
        } => format!(
            "host `{host}` has no power: level {level} ({}) confirmed it after {:.1} s\n",
            agents.join(", "),
            took.as_secs_f64()
        ),
        Outcome::Rehearsed { level, .. } => {
            format!("rehearsed: level {level} of host `{host}` only pretends; nothing is proved\n")
        }
        Outcome::Cancelled => format!("given up; host `{host}` may or may not have power\n"),
        Outcome::Failed { reasons } => {
            let mut text = format!("host `{host}` may still have power; no level confirmed:\n");
            for r in reasons {
                text.push_str(&format!("  level {}  {}: {}\n", r.level, r.agent, r.why));
            }
            text
        }
    }
}

#[derive(Args)]
pub(super) struct Watchdog {
    /// Where the daemon connects to arm and pet it; a unix socket that is made here.
    #[arg(long)]
    socket: PathBuf,
    /// How long after the last pet the host is killed, milliseconds.
    #[arg(long)]
    timeout_ms: u64,
    /// The first process of the lab host's pid namespace, as seen from here.
    #[arg(long)]
    kill_pid: i32,
}

impl Watchdog {
    /// Serve until the host is dead.
    pub(super) fn run(&self) -> anyhow::Result<ExitCode> {
        use interconnect::heartbeat::realtime;
        for failed in [realtime::raise_priority(), realtime::lock_memory()] {
            if let Err(e) = failed {
                eprintln!("pollux watchdog: may be late on a busy machine: {e}");
            }
        }
        let host = nix::unistd::Pid::from_raw(self.kill_pid);
        let timeout = Duration::from_millis(self.timeout_ms);
        // It must outlive the terminal and the daemon; a leader of a group stays in it.
        let _ = nix::unistd::setsid();
        match Supervisor::new(&self.socket, host, timeout)?.run()? {
            Ended::Fired => println!("nobody petted for {timeout:?}: process {host} is killed"),
            Ended::HostGone => println!("process {host} has ended by itself"),
        }
        Ok(ExitCode::SUCCESS)
    }
}
