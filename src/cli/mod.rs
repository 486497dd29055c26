//! The commands of the one binary: parse, ask a daemon, show the answer.
//!
//! Every command that shows something takes `--json`; errors go to standard error with
//! what failed, on what, and what to do; the exit status is 0 only if it was done.

mod drill;
mod fence;
mod lab;
mod link;
mod plan;
mod pool;
mod show;
mod sim;
mod statefile;
mod vm;

use crate::api::client::{Client, block};
use crate::api::types::HostStatus;
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// pollux keeps a virtual machine running when its host dies.
///
/// On each host runs `pollux daemon`. A VM is created from a spec, started, and mirrored
/// to the standby on a partner host; when the host dies the standby goes on from the last
/// committed epoch with the same memory and the same open connections.
///
/// First steps on one machine: `pollux demo` shows a failover of a real VM in a lab.
#[derive(Parser)]
#[command(
    name = "pollux",
    version,
    propagate_version = true,
    max_term_width = 100
)]
struct Cli {
    /// The daemon's API socket.
    #[arg(long, global = true, env = "POLLUX_API", default_value = crate::api::DEFAULT_SOCKET)]
    api: PathBuf,
    /// Print JSON for scripts instead of text for people.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run this host's daemon in the foreground.
    ///
    /// Logs go to standard error; RUST_LOG chooses how much (default: info).
    Daemon {
        /// The host's configuration.
        #[arg(long, default_value = "/etc/pollux/host.toml")]
        config: PathBuf,
    },
    /// Show this host, its partners and its VMs, with the age of what is known.
    Status,
    /// This host.
    #[command(subcommand)]
    Host(HostCommand),
    /// VMs: create, start, mirror, switch over.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Links to partner hosts.
    #[command(subcommand)]
    Link(link::LinkCommand),
    /// The disks on which the hosts of a pool agree: format, show, check, replace.
    #[command(subcommand)]
    Statefile(statefile::StatefileCommand),
    /// The pool this host belongs to.
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// Say why the pool decided what it decided about a host or a VM.
    Why(pool::Why),
    /// Hosts on this one machine, in namespaces, for trying and drilling.
    #[command(subcommand)]
    Lab(lab::LabCommand),
    /// Rehearsed failures with measurements.
    #[command(subcommand)]
    Drill(drill::DrillCommand),
    /// Whole pools in virtual time, with faults of every kind.
    #[command(subcommand)]
    Sim(sim::SimCommand),
    /// The failover planner: what is survived, where VMs restart, what a change would do.
    #[command(subcommand)]
    Plan(plan::PlanCommand),
    /// Power fencing: test it, ask for a host's power, take it.
    #[command(subcommand)]
    Fence(fence::FenceCommand),
    /// The watchdog of a lab host: kills it when its daemon stops petting.
    ///
    /// Start it outside of the host. It is armed by the first connection; only an orderly
    /// farewell disarms it (docs/fencing.md).
    Watchdog(fence::Watchdog),
    /// Cut the power of a lab host under a mirrored VM, and show what happened.
    Demo,
    /// Print a completion script for a shell.
    Completion {
        /// bash, zsh, fish, elvish or powershell.
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum HostCommand {
    /// Show its name, fingerprint, QEMU, and whether it can mirror.
    Show,
}

/// Run the command line `args`.
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    match run(cli) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("pollux: {}", explain(&e));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each said once: many of ours name theirs already.
fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let client = Client::new(&cli.api);
    let json = cli.json;
    match cli.command {
        Command::Daemon { config } => {
            log_to_stderr("info");
            crate::daemon::run(&config)?;
        }
        Command::Status => {
            let status: HostStatus = block(client.get("/v1/status"))?;
            if json {
                print_json(&status)?
            } else {
                print!("{}", show::host_status(&status))
            }
        }
        Command::Host(HostCommand::Show) => {
            let info: crate::api::types::HostInfo = block(client.get("/v1/host"))?;
            if json {
                print_json(&info)?
            } else {
                print!("{}", show::host_info(&info))
            }
        }
        Command::Vm(command) => vm::run(command, &client, json)?,
        Command::Link(command) => return link::run(command, &client, json),
        Command::Statefile(command) => return statefile::run(command, json),
        Command::Pool(command) => return pool::run(command, &client, json),
        Command::Why(why) => return why.run(&client, json),
        Command::Lab(command) => return lab::run(command, json),
        Command::Drill(command) => return drill::run(command, json),
        Command::Sim(command) => return sim::run(command, json),
        Command::Plan(command) => return plan::run(command, json),
        Command::Fence(command) => return fence::run(command, json),
        Command::Watchdog(watchdog) => return watchdog.run(),
        Command::Demo => return drill::demo(json),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "pollux", &mut std::io::stdout());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn log_to_stderr(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    use std::io::Write;
    let text = serde_json::to_string_pretty(value)?;
    match writeln!(std::io::stdout(), "{text}") {
        // Whoever reads has read enough (`| head`).
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn completion_knows_every_command_of_links() {
        let mut script = Vec::new();
        let shell = clap_complete::Shell::Bash;
        clap_complete::generate(shell, &mut Cli::command(), "pollux", &mut script);
        let script = String::from_utf8(script).unwrap();
        for command in [
            "create", "export", "list", "show", "test", "rotate", "remove",
        ] {
            assert!(
                script.contains(&format!("pollux__subcmd__link__subcmd__{command}")),
                "{command}"
            );
        }
    }

    #[test]
    fn the_ways_to_link_two_hosts_do_not_mix() {
        use clap::Parser;
        let parses = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        for good in [
            "pollux link create --link 10.0.0.1=10.0.0.2",
            "pollux link create --link 10.0.0.1=10.0.0.2 --yes-code 12345678",
            "pollux link create --file b.link",
            "pollux link create --file b.link --link 10.0.0.1=10.0.0.2",
            "pollux link create --partner b --fingerprint sha256:0 --link 10.0.0.1=10.0.0.2",
            "pollux link create --partner-api /run/b.sock --link 10.0.0.1=10.0.0.2",
            "pollux link create a b",
            "pollux link create --cancel",
        ] {
            assert!(parses(good), "{good}");
        }
        for bad in [
            "pollux link create a",
            "pollux link create a b --file b.link",
            "pollux link create --partner b --link 10.0.0.1=10.0.0.2",
            "pollux link create --file b.link --yes-code 12345678",
            "pollux link create --yes-code 1234 --link 10.0.0.1=10.0.0.2",
            "pollux link test b --seconds 0",
            "pollux link test b --seconds 1000",
            "pollux link rotate --give-up --status",
        ] {
            assert!(!parses(bad), "{bad}");
        }
    }
}
