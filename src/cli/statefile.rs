//! `pollux statefile …`

use super::print_json;
use crate::registry::statefile::{
    Geometry, Report, SLOT_BYTES_DEFAULT, SLOTS_DEFAULT, Severity, format, inspect, replace,
};
use clap::{Args, Subcommand};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use uuid::Uuid;

#[derive(Subcommand)]
pub(super) enum StatefileCommand {
    /// Make one or three files or block devices the statefile of a new pool.
    #[command(after_long_help = FORMAT_HELP)]
    Format(FormatArgs),
    /// Show what the disks hold: pool, hosts, keys of the newest document.
    Show {
        /// All disks, in the order of their indexes.
        #[arg(required = true)]
        disks: Vec<PathBuf>,
    },
    /// Look for everything that is wrong with the disks; exit status 0 only if they are well.
    #[command(after_long_help = CHECK_HELP)]
    Check {
        /// All disks, in the order of their indexes.
        #[arg(required = true)]
        disks: Vec<PathBuf>,
        /// The pool they must be of; default: the one that most of them say.
        #[arg(long)]
        pool: Option<Uuid>,
    },
    /// Put a new disk in for a broken one, with what the others know.
    #[command(after_long_help = REPLACE_HELP)]
    Replace(ReplaceArgs),
}

#[derive(Args)]
pub(super) struct FormatArgs {
    /// One or three disks; their order gives them their indexes, 0 first.
    #[arg(required = true)]
    disks: Vec<PathBuf>,
    /// The pool; default: a new one is drawn.
    #[arg(long)]
    pool: Option<Uuid>,
    /// Hosts that the pool can ever have at a time.
    #[arg(long, default_value_t = SLOTS_DEFAULT)]
    slots: u16,
    /// KiB for the whole document of the pool; every disk needs four times that per slot.
    #[arg(long, value_name = "KIB", default_value_t = SLOT_BYTES_DEFAULT / 1024)]
    document_kib: u64,
    /// Overwrite disks that hold something, also the statefile of another pool.
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
pub(super) struct ReplaceArgs {
    /// The disks that stay, each once.
    #[arg(required = true)]
    others: Vec<PathBuf>,
    /// Index of the disk to be replaced (`pollux statefile check` says it).
    #[arg(long)]
    index: u16,
    /// The disk to be put in; may be the broken one itself, with --force.
    #[arg(long, value_name = "DISK")]
    with: PathBuf,
    /// Overwrite the new disk though it holds something.
    #[arg(long)]
    force: bool,
}

const FORMAT_HELP: &str = "\
The statefile is where the hosts of a pool agree who runs what: they write to these disks
directly, and a majority of them is enough. So three, on storage that fails independently,
survive the loss of one; one alone is a pool's single point of failure; two are worse than
one. Never put it on storage that pollux mirrors, nor on a file system with a cache per host.

  pollux statefile format /dev/mapper/sf-a /dev/mapper/sf-b /dev/mapper/sf-c
  pollux statefile format /srv/pool.statefile --slots 4 --document-kib 256

Files are created and filled. A disk that holds anything is refused without --force.";

const CHECK_HELP: &str = "\
Reads everything, writes nothing; hosts may be at work. Each finding has one word:

  io           cannot be opened or read      unformatted  empty where a header should be
  wrong-size   shorter than it should be     corrupt      a checksum does not fit
  foreign      of another pool               swapped      in the place of another disk
  stale        lost writes it had confirmed  old-set      was replaced by another disk
  value        a document is damaged         majority     too few disks count
  torn         a write cut by a loss of power: harmless, only told

  pollux statefile check /dev/mapper/sf-a /dev/mapper/sf-b /dev/mapper/sf-c";

const REPLACE_HELP: &str = "\
All other disks of the set are needed, not only a majority: what the broken disk and a
missing one had agreed upon would be lost. Hosts may go on meanwhile; they notice the new
generation of the set by themselves. If the new disk has another path, change it in every
host's configuration: until then that host uses the other two.

Cut short, it leaves a set that hosts refuse to use; run it again.

  pollux statefile replace --index 2 --with /dev/mapper/sf-d /dev/mapper/sf-a /dev/mapper/sf-b";

pub(super) fn run(command: StatefileCommand, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        StatefileCommand::Format(args) => {
            let geometry = Geometry {
                disks: u16::try_from(args.disks.len()).unwrap_or(u16::MAX),
                slots: args.slots,
                slot_bytes: args.document_kib.saturating_mul(1024),
            };
            let pool = args.pool.unwrap_or_else(Uuid::new_v4);
            format(&args.disks, geometry, pool, args.force)?;
            let report = inspect(&args.disks, Some(pool));
            tell(&report, json, false)
        }
        StatefileCommand::Show { disks } => {
            let report = inspect(&disks, None);
            tell(&report, json, true)
        }
        StatefileCommand::Check { disks, pool } => {
            let report = inspect(&disks, pool);
            tell(&report, json, false)
        }
        StatefileCommand::Replace(args) => {
            let header = replace(&args.others, args.index, &args.with, args.force)?;
            if json {
                print_json(&header)?;
            } else {
                println!(
                    "{} is disk {} of pool {} now (set generation {}). If its path is new, change it on every host",
                    args.with.display(),
                    header.disk,
                    header.pool,
                    header.set
                );
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Print what was found; the exit status says whether it is well.
fn tell(report: &Report, json: bool, all: bool) -> anyhow::Result<ExitCode> {
    if json {
        print_json(report)?;
    } else {
        print!("{}", text(report, all));
    }
    Ok(if report.is_well() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn text(report: &Report, all: bool) -> String {
    let mut out = String::new();
    match (&report.pool, &report.geometry) {
        (Some(pool), Some(geometry)) => {
            let _ = writeln!(
                out,
                "pool {pool}: {} disk(s), {} host slots, documents up to {} KiB",
                geometry.disks,
                geometry.slots,
                geometry.slot_bytes / 1024
            );
        }
        _ => out.push_str("no statefile\n"),
    }
    for (index, disk) in report.disks.iter().enumerate() {
        let state = if disk.well { "well" } else { "DOES NOT COUNT" };
        let cached = match (&disk.header, disk.direct) {
            (Some(_), false) => " (no direct I/O: for hosts on this machine only)",
            _ => "",
        };
        let _ = writeln!(
            out,
            "disk {index}  {}: {state}{cached}",
            disk.path.display()
        );
    }
    if let Some(instance) = report.instance {
        let more = if report.proposed {
            ", and a change is under way or was cut short (the next read decides)"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "document {}: {} keys{more}",
            instance.0,
            report.keys.len()
        );
    }
    if all {
        for host in &report.hosts {
            let _ = writeln!(
                out,
                "host slot {:<3} {}: last write {} s ago, instance {}, heartbeat {}",
                host.slot.0,
                host.name,
                host.written_us_ago / 1_000_000,
                host.instance.0,
                host.beat
            );
        }
        for key in &report.keys {
            let _ = writeln!(
                out,
                "{}  version {}, {} bytes",
                key.key, key.version, key.bytes
            );
        }
    }
    for problem in &report.problems {
        let severity = match problem.severity {
            Severity::Note => "note",
            Severity::Problem => "PROBLEM",
        };
        let disk = problem
            .disk
            .as_ref()
            .map_or(String::new(), |d| format!(" {}:", d.display()));
        let _ = writeln!(
            out,
            "{severity} [{}]{disk} {}\n  -> {}",
            problem.kind, problem.what, problem.remedy
        );
    }
    if report.is_well() {
        out.push_str("well\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_formatted_set_is_told_as_well_and_a_broken_one_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let disks: Vec<PathBuf> = (0..3).map(|n| dir.path().join(format!("d{n}"))).collect();
        let geometry = Geometry {
            disks: 3,
            slots: 2,
            slot_bytes: 4096,
        };
        format(&disks, geometry, Uuid::from_u128(1), false).unwrap();
        let well = text(&inspect(&disks, None), true);
        assert!(
            well.ends_with("well\n") && well.contains("document 0: 0 keys"),
            "{well}"
        );
        std::fs::remove_file(&disks[1]).unwrap();
        let report = inspect(&disks, None);
        let broken = text(&report, false);
        assert!(broken.contains("PROBLEM [io]"), "{broken}");
        assert!(broken.contains("pollux statefile replace"), "{broken}");
        assert!(!broken.contains("well\nwell"), "{broken}");
        assert!(!report.is_well());
        replace(&[disks[0].clone(), disks[2].clone()], 1, &disks[1], false).unwrap();
        assert!(inspect(&disks, None).is_well());
    }
}
