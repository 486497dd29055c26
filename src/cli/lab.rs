//! `pollux lab …`

use super::print_json;
use crate::ha::timing::Timing;
use crate::lab::daemons::{daemon_spec, pair_config, up_linked};
use crate::lab::pool::PoolLab;
use crate::lab::{KeepPolicy, Lab, Place};
use crate::pool::HostName;
use anyhow::bail;
use clap::{Args, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

/// Name of a lab unless told otherwise.
const DEFAULT_LAB: &str = "lab";

#[derive(Subcommand)]
pub(super) enum LabCommand {
    /// Make hosts, start their daemons, link them in pairs, make them a pool.
    Up {
        /// Name of the lab; several may stand side by side.
        #[arg(long, default_value = DEFAULT_LAB)]
        name: String,
        /// Names of the hosts.
        #[arg(long, value_delimiter = ',', default_value = "a,b")]
        hosts: Vec<HostName>,
        /// Private links between each two hosts.
        #[arg(long, default_value_t = 1)]
        links: u8,
        /// Where the pool's decisions are kept. `pair`: a copy on each of two hosts, and neither
        /// shared storage nor etcd.
        #[arg(long, default_value = "statefile")]
        registry: LabRegistry,
        /// Disks of the statefile: 1 or 3.
        #[arg(long, default_value_t = 1)]
        statefile_disks: u8,
        /// The hosts are no pool: no heartbeats but those of mirrored pairs, no watchdogs.
        #[arg(long)]
        no_pool: bool,
        /// The hosts of the pool cannot be switched off: a death is proved by the watchdog.
        #[arg(long)]
        no_fencing: bool,
    },
    /// End a lab: all its processes, namespaces and files.
    Down {
        /// Name of the lab.
        #[arg(long, default_value = DEFAULT_LAB)]
        name: String,
    },
    /// Show a lab's hosts, links and API sockets.
    Status {
        /// Name of the lab.
        #[arg(long, default_value = DEFAULT_LAB)]
        name: String,
    },
    /// Give a host power, or take it: no farewell, no flush.
    Power {
        #[command(flatten)]
        of: OfHost,
        /// What to do.
        to: Switch,
    },
    /// Stop all processes of a host where they are.
    Freeze(OfHost),
    /// Let a frozen host go on.
    Thaw(OfHost),
    /// Cut a host's cable to the management network at the switch, or heal it.
    Cable {
        #[command(flatten)]
        of: OfHost,
        /// What to do.
        to: Cable,
    },
    /// Run a program on a host of a lab, or `outside` where the clients are.
    ///
    /// `pollux lab exec a -- pollux status` asks host a's daemon: inside a lab's host
    /// POLLUX_API names its socket.
    Exec {
        /// Name of the lab.
        #[arg(long, default_value = DEFAULT_LAB)]
        name: String,
        /// A host, or `outside`.
        place: String,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        argv: Vec<OsString>,
    },
}

#[derive(Args)]
pub(super) struct OfHost {
    /// Name of the lab.
    #[arg(long, default_value = DEFAULT_LAB)]
    name: String,
    /// The host.
    host: HostName,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LabRegistry {
    /// Shared disks.
    Statefile,
    /// A copy on each of two hosts.
    Pair,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Switch {
    /// Boot it.
    On,
    /// Kill everything on it at once.
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Cable {
    /// Frames are lost, the carrier stays.
    Cut,
    /// It carries again.
    Heal,
}

pub(super) fn run(command: LabCommand, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        LabCommand::Up {
            name,
            hosts,
            links,
            registry,
            statefile_disks,
            no_pool,
            no_fencing,
        } => {
            let count = hosts.len();
            let mut spec = daemon_spec(&name, hosts, links, KeepPolicy::Detached)?;
            spec.statefile_disks = statefile_disks;
            if registry == LabRegistry::Pair {
                if count != 2 || no_pool {
                    bail!("--registry pair is for two hosts that are a pool");
                }
                spec.statefile_disks = 0;
                spec.host_config = Box::new(pair_config);
            }
            spec.pool = (!no_pool).then(|| PoolLab {
                watchdog: Some(Duration::from_millis(Timing::DEFAULT.watchdog.0)),
                fencing: !no_fencing,
            });
            let lab = up_linked(spec)?;
            if json {
                print_json(&lab.status()?)?;
            } else {
                println!("lab {name} is up in {}", lab.plan().dir.display());
                for net in &lab.plan().hosts {
                    println!(
                        "  host {}: pollux --api {} status",
                        net.name,
                        net.api_socket.display()
                    );
                }
            }
        }
        LabCommand::Down { name } => {
            let lab = Lab::open(&name);
            match lab {
                Ok(lab) => lab.down()?,
                Err(e) => {
                    let dir = crate::lab::default_dir(&name);
                    if !dir.exists() {
                        bail!(e);
                    }
                    crate::lab::take_down(&dir)?;
                }
            }
        }
        LabCommand::Status { name } => {
            let status = Lab::open(&name)?.status()?;
            print_json(&status)?;
        }
        LabCommand::Power { of, to } => {
            let lab = Lab::open(&of.name)?;
            match to {
                Switch::On => lab.power_on(&of.host)?,
                Switch::Off => lab.power_cut(&of.host)?,
            };
        }
        LabCommand::Freeze(of) => {
            Lab::open(&of.name)?.freeze(&of.host)?;
        }
        LabCommand::Thaw(of) => {
            Lab::open(&of.name)?.thaw(&of.host)?;
        }
        LabCommand::Cable { of, to } => {
            let lab = Lab::open(&of.name)?;
            match to {
                Cable::Cut => lab.cut_lan(&of.host)?,
                Cable::Heal => lab.heal_lan(&of.host)?,
            };
        }
        LabCommand::Exec { name, place, argv } => {
            let lab = Lab::open(&name)?;
            let place: Place = place.parse()?;
            let status = lab.exec(&place, &argv)?;
            let code = status.code().and_then(|c| u8::try_from(c).ok());
            return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
        }
    }
    Ok(ExitCode::SUCCESS)
}
