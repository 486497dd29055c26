//! Labs whose hosts run pollux: what tests, drills, `pollux lab up` and `pollux demo` begin with.
//!
//! [`lab_up`] is the usual way in; [`daemon_spec`] and [`up_linked`] are its two halves, for
//! whoever wants to change the spec in between. Must never touch a VM.

use super::{HostNet, KeepPolicy, Lab, LabError, LabSpec};
use crate::api::client::{Client, ClientError, block, pin_both};
use crate::api::types::{HostInfo, LINK_PORT, LinkAddrs};
use crate::pool::HostName;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a lab's daemons may take until they answer.
const DAEMON_DEADLINE: Duration = Duration::from_secs(30);
/// How often a daemon that does not answer yet is asked again.
const DAEMON_POLL: Duration = Duration::from_millis(20);

/// Why a lab has no linked daemons.
#[derive(Debug, thiserror::Error)]
pub enum DaemonsError {
    /// The lab itself.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A daemon does not come up.
    #[error("the daemon of host {host} does not answer: {source}; see {}", log.display())]
    NoAnswer {
        /// The host.
        host: HostName,
        /// Its daemon's log.
        log: PathBuf,
        /// What was heard instead.
        source: Box<ClientError>,
    },
    /// Two daemons cannot be linked.
    #[error("hosts {a} and {b} cannot be linked: {source}")]
    Link {
        /// One host.
        a: HostName,
        /// The other.
        b: HostName,
        /// Which daemon said what.
        source: Box<ClientError>,
    },
}

/// The configuration of a lab host's daemon, TOML: its directories, its API socket and
/// the registry: the lab's statefile, or a locked file if it has none. More keys may be put
/// before it, more tables appended.
#[must_use]
pub fn host_config(name: &HostName, net: &HostNet) -> String {
    let path = |p: &Path| toml::Value::String(p.display().to_string()).to_string();
    let registry = if net.statefile.is_empty() {
        format!("kind = \"file\"\ndir = {}", path(&net.shared_dir))
    } else {
        let disks: Vec<String> = net.statefile.iter().map(|disk| path(disk)).collect();
        format!(
            "kind = \"statefile\"\ndisks = [{}]\nslot = {}",
            disks.join(", "),
            net.index
        )
    };
    config_with(name, net, &registry)
}

/// The same with a registry held twice, a copy on each of two hosts; they must be a pool.
#[must_use]
pub fn pair_config(name: &HostName, net: &HostNet) -> String {
    let registry = "kind = \"pair\"\ntie-breaker = \"gateway\"";
    config_with(name, net, registry)
}

fn config_with(name: &HostName, net: &HostNet, registry: &str) -> String {
    let path = |p: &Path| toml::Value::String(p.display().to_string()).to_string();
    let pool = net
        .pool
        .as_ref()
        .map(|pool| pool.to_toml(net.gateway))
        .unwrap_or_default();
    format!(
        "name = \"{name}\"\nstate_dir = {}\nrun_dir = {}\nram_dir = {}\napi_socket = {}\n\n[registry]\n{registry}\n{pool}",
        path(&net.state_dir),
        path(&net.run_dir),
        path(&net.run_dir.join("ram")),
        path(&net.api_socket),
    )
}

/// A lab of these hosts, each with a daemon, `private_links` links between each two, and a
/// statefile of one disk.
///
/// # Errors
/// [`LabError::Io`] if the running program's path cannot be read.
pub fn daemon_spec(
    name: &str,
    hosts: Vec<HostName>,
    private_links: u8,
    keep: KeepPolicy,
) -> Result<LabSpec, LabError> {
    let mut spec = LabSpec::new(name, Box::new(host_config))?;
    spec.hosts = hosts;
    spec.private_links = private_links;
    spec.keep = keep;
    spec.statefile_disks = 1;
    Ok(spec)
}

/// Bring `spec` up, wait until every daemon answers, link the hosts in pairs.
///
/// # Errors
/// [`DaemonsError`]; the lab is gone then if it was to die with its maker.
pub fn up_linked(spec: LabSpec) -> Result<Lab, DaemonsError> {
    let lab = Lab::up(spec)?;
    let nets = &lab.plan().hosts;
    for net in nets {
        wait_daemon(&net.api_socket).map_err(|source| DaemonsError::NoAnswer {
            host: net.name.clone(),
            log: net.daemon_log.clone(),
            source: Box::new(source),
        })?;
    }
    for (i, net) in nets.iter().enumerate() {
        for partner in &nets[i + 1..] {
            let (here, there) = (
                Client::new(&net.api_socket),
                Client::new(&partner.api_socket),
            );
            block(pin_both(&here, &there, &link_addrs(net, &partner.name))).map_err(|source| {
                DaemonsError::Link {
                    a: net.name.clone(),
                    b: partner.name.clone(),
                    source: Box::new(source),
                }
            })?;
        }
    }
    Ok(lab)
}

/// Make a lab whose daemons answer and are linked in pairs.
///
/// # Errors
/// [`DaemonsError`].
pub fn lab_up(
    name: &str,
    hosts: Vec<HostName>,
    private_links: u8,
    keep: KeepPolicy,
) -> Result<Lab, DaemonsError> {
    up_linked(daemon_spec(name, hosts, private_links, keep)?)
}

/// The private links from `net` to `partner`, as `pollux link create` takes them.
#[must_use]
pub fn link_addrs(net: &HostNet, partner: &HostName) -> Vec<LinkAddrs> {
    net.links
        .iter()
        .filter(|l| l.partner == *partner)
        .map(|l| LinkAddrs {
            local: SocketAddr::new(l.local.into(), LINK_PORT),
            peer: SocketAddr::new(l.remote.into(), LINK_PORT),
        })
        .collect()
}

/// Wait until the daemon behind `socket` answers; also after a host was given power again.
///
/// # Errors
/// What was heard last, once [`DAEMON_DEADLINE`] is over.
pub fn wait_daemon(socket: &Path) -> Result<(), ClientError> {
    let client = Client::new(socket);
    let begun = Instant::now();
    loop {
        match block(client.get::<HostInfo>("/v1/host")) {
            Ok(_) => return Ok(()),
            Err(e) if begun.elapsed() > DAEMON_DEADLINE => return Err(e),
            Err(_) => std::thread::sleep(DAEMON_POLL),
        }
    }
}
