//! `pollux lab …`

use super::link::{PORT, create_both};
use super::print_json;
use crate::api::client::Client;
use crate::api::types::LinkAddrs;
use crate::lab::{HostNet, KeepPolicy, Lab, LabSpec, Place};
use crate::pool::HostName;
use anyhow::{Context, bail};
use clap::Subcommand;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Name of a lab unless told otherwise.
const DEFAULT_LAB: &str = "lab";

#[derive(Subcommand)]
pub(super) enum LabCommand {
    /// Make hosts, start their daemons, link them in pairs.
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

/// A lab host's configuration.
fn host_config(name: &HostName, net: &HostNet) -> String {
    let path = |p: &Path| toml::Value::String(p.display().to_string()).to_string();
    format!(
        "name = \"{name}\"\nstate_dir = {}\nrun_dir = {}\nram_dir = {}\napi_socket = {}\nregistry_dir = {}\n",
        path(&net.state_dir),
        path(&net.run_dir),
        path(&net.run_dir.join("ram")),
        path(&net.api_socket),
        path(&net.shared_dir),
    )
}

/// How long a lab's daemons may take until they answer.
const DAEMON_DEADLINE: Duration = Duration::from_secs(30);

/// Wait until the daemon behind `socket` answers.
pub(crate) fn wait_daemon(socket: &Path) -> anyhow::Result<()> {
    let client = Client::new(socket);
    let begun = Instant::now();
    loop {
        let asked: Result<crate::api::types::HostInfo, _> = crate::api::client::block(client.get("/v1/host"));
        match asked {
            Ok(_) => return Ok(()),
            Err(e) if begun.elapsed() > DAEMON_DEADLINE => return Err(e.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Make a lab whose daemons answer and are linked in pairs.
pub(crate) fn lab_up(
    name: &str,
    hosts: Vec<HostName>,
    private_links: u8,
    keep: KeepPolicy,
) -> anyhow::Result<Lab> {
    let mut spec = LabSpec::new(name, Box::new(host_config))?;
    spec.hosts = hosts;
    spec.private_links = private_links;
    spec.keep = keep;
    let lab = Lab::up(spec)?;
    let nets = lab.plan().hosts.clone();
    for net in &nets {
        wait_daemon(&net.api_socket).with_context(|| {
            format!("the daemon of host {} does not answer; see {}", net.name, net.daemon_log.display())
        })?;
    }
    for (i, net) in nets.iter().enumerate() {
        for partner in &nets[i + 1..] {
            let links: Vec<LinkAddrs> = net
                .links
                .iter()
                .filter(|l| l.partner == partner.name)
                .map(|l| LinkAddrs {
                    local: SocketAddr::new(l.local.into(), PORT),
                    peer: SocketAddr::new(l.remote.into(), PORT),
                })
                .collect();
            create_both(&Client::new(&net.api_socket), &Client::new(&partner.api_socket), &links)?;
        }
    }
    Ok(lab)
}

pub(super) fn run(command: LabCommand, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        LabCommand::Up { name, hosts, links } => {
            let lab = lab_up(&name, hosts, links, KeepPolicy::Detached)?;
            if json {
                print_json(&lab.status()?)?;
            } else {
                println!("lab {name} is up in {}", lab.plan().dir.display());
                for net in &lab.plan().hosts {
                    println!("  host {}: pollux --api {} status", net.name, net.api_socket.display());
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
