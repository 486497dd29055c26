//! What a lab is to be: hosts, links, addresses, directories. Pure.
//!
//! The address plan is fixed, since every lab lives in namespaces of its own and
//! two labs never see each other:
//!
//! ```text
//!  outside 10.77.0.1 --- lan0 (switch) ---+--- a: br0 10.77.0.101   (VM taps join br0)
//!                                         +--- b: br0 10.77.0.102
//!  a: ic0 10.78.0.101 ------- private link 0 ------- b: ic0 10.78.0.102
//!  a: ic1 10.78.1.101 ------- private link 1 ------- b: ic1 10.78.1.102
//! ```

use super::pool::{PoolLab, PoolNet};
use super::{LabError, MonotonicNs};
use crate::pool::HostName;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most hosts of one lab: 120 pairs times [`PRIVATE_LINKS_MAX`] links still fit the address plan.
pub const HOSTS_MAX: usize = 16;
/// Most private links between two hosts.
pub const PRIVATE_LINKS_MAX: u8 = 8;
/// Longest lab name, in bytes; it is part of unix socket paths, which end at 107 bytes.
pub const LAB_NAME_BYTES_MAX: usize = 24;
/// Longest path of a unix socket, in bytes, without the closing zero (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// MTU of a private link unless told otherwise: jumbo frames, as operators set on such links.
pub const PRIVATE_MTU_DEFAULT: u16 = 9000;
/// The gateway's address in `outside`, and the prefix length of the lan.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Prefix length of every network of the lab.
pub const PREFIX_LEN: u8 = 24;
/// Bridge in `outside` that is the lan's switch.
pub const LAN_BRIDGE: &str = "lan0";
/// Bridge inside each host that joins the lan and the VMs' taps.
pub const HOST_BRIDGE: &str = "br0";
/// The name that means the clients' namespace and no host.
pub const OUTSIDE: &str = "outside";

/// Who keeps a lab alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum KeepPolicy {
    /// It dies with the process that made it, however that dies, and with the [`super::Lab`] value.
    WithCreator,
    /// It stays until `pollux lab down` (what `pollux lab up` uses).
    Detached,
}

/// Makes the content of one host's config file.
pub type HostConfigFn = dyn Fn(&HostName, &HostNet) -> String;

/// What a lab is to be. [`LabSpec::new`] gives the defaults.
pub struct LabSpec {
    /// Name, `a-z 0-9 -`, at most [`LAB_NAME_BYTES_MAX`].
    pub name: String,
    /// The lab's directory; nothing is made outside of it. Default: [`default_dir`].
    pub dir: PathBuf,
    /// Its hosts, two to [`HOSTS_MAX`] (one is allowed too). Default `a`, `b`.
    pub hosts: Vec<HostName>,
    /// Private links between each two hosts. Default 1.
    pub private_links: u8,
    /// MTU of the private links, bytes. Default [`PRIVATE_MTU_DEFAULT`].
    pub private_mtu: u16,
    /// Who keeps it alive. Default [`KeepPolicy::WithCreator`].
    pub keep: KeepPolicy,
    /// Leave the directory (disks, logs) when the lab goes down. Default false.
    pub keep_files: bool,
    /// The pollux binary; it is also the keeper. Default: the running program.
    pub program: PathBuf,
    /// What each host's init starts once the network stands, as argv; `{config}` and
    /// `{host}` are replaced in every argument. Empty: nothing.
    /// Default: `PROGRAM daemon --config {config}`.
    pub daemon_argv: Vec<String>,
    /// Content of each host's config file.
    pub host_config: Box<HostConfigFn>,
    /// Disks of the statefile in the shared folder, formatted before the hosts get power: 1
    /// or 3, or 0 for none. Default 0.
    pub statefile_disks: u8,
    /// The statefile's disks can be taken from single hosts: each host reaches them through a
    /// loop device of its own. Default: they cannot.
    pub takeable_disks: bool,
    /// The hosts are one pool, with heartbeats, watchdogs and fencing. Default: they are not.
    pub pool: Option<PoolLab>,
}

impl LabSpec {
    /// A lab of two hosts `a` and `b` with one private link, running this very program.
    ///
    /// # Errors
    /// [`LabError::Io`] if the running program's path cannot be read.
    pub fn new(name: impl Into<String>, host_config: Box<HostConfigFn>) -> Result<Self, LabError> {
        let name = name.into();
        let program = std::env::current_exe()
            .map_err(LabError::io("reading the path of the running program"))?;
        Ok(Self {
            dir: default_dir(&name),
            name,
            hosts: ["a", "b"]
                .iter()
                .filter_map(|n| HostName::new(*n).ok())
                .collect(),
            private_links: 1,
            private_mtu: PRIVATE_MTU_DEFAULT,
            keep: KeepPolicy::WithCreator,
            keep_files: false,
            daemon_argv: vec![
                program.display().to_string(),
                "daemon".into(),
                "--config".into(),
                "{config}".into(),
            ],
            program,
            host_config,
            statefile_disks: 0,
            takeable_disks: false,
            pool: None,
        })
    }

    /// The whole plan in a form that can be written down; checks everything.
    ///
    /// # Errors
    /// [`LabError::Spec`] naming the field and what is allowed.
    pub fn plan(&self) -> Result<LabPlan, LabError> {
        check_name(&self.name)?;
        if self.hosts.is_empty() || self.hosts.len() > HOSTS_MAX {
            return Err(LabError::Spec(format!(
                "{} hosts; a lab has 1 to {HOSTS_MAX}",
                self.hosts.len()
            )));
        }
        for (i, host) in self.hosts.iter().enumerate() {
            if host.as_str() == OUTSIDE {
                return Err(LabError::Spec(format!(
                    "no host can be called `{OUTSIDE}`: it names the clients' side"
                )));
            }
            if self.hosts[..i].contains(host) {
                return Err(LabError::Spec(format!("host `{host}` is named twice")));
            }
        }
        if self.private_links > PRIVATE_LINKS_MAX {
            return Err(LabError::Spec(format!(
                "{} private links; at most {PRIVATE_LINKS_MAX}",
                self.private_links
            )));
        }
        // 68 is the least an IPv4 link may have (RFC 791); QUIC needs 1280 (RFC 9000, section 14).
        if self.private_mtu < 1280 {
            return Err(LabError::Spec(format!(
                "private MTU {}; QUIC needs 1280 or more",
                self.private_mtu
            )));
        }
        if !self.dir.is_absolute() {
            return Err(LabError::Spec(format!(
                "directory {} is not an absolute path",
                self.dir.display()
            )));
        }
        let mut hosts: Vec<HostNet> = (0..self.hosts.len()).map(|i| self.host_net(i)).collect();
        if let Some(pool) = self.pool {
            super::pool::plan(pool, &self.dir, &mut hosts);
        }
        for host in &hosts {
            let bytes = host.api_socket.as_os_str().len();
            if bytes > SOCKET_PATH_BYTES_MAX {
                return Err(LabError::Spec(format!(
                    "{} is {bytes} bytes long; a unix socket's path ends at {SOCKET_PATH_BYTES_MAX}: choose a shorter directory or name",
                    host.api_socket.display()
                )));
            }
        }
        Ok(LabPlan {
            id: LabId::fresh(),
            name: self.name.clone(),
            dir: self.dir.clone(),
            hosts,
            private_mtu: self.private_mtu,
            private_links: self.private_links,
            takeable_disks: self.takeable_disks,
            keep: self.keep,
            keep_files: self.keep_files,
            daemon_argv: self.daemon_argv.clone(),
        })
    }

    fn host_net(&self, index: usize) -> HostNet {
        let name = self.hosts[index].clone();
        let dir = self.dir.join("hosts").join(name.as_str());
        let mut links = Vec::new();
        for other in (0..self.hosts.len()).filter(|&o| o != index) {
            for k in 0..self.private_links {
                let subnet = pair_index(index.min(other), index.max(other))
                    * usize::from(self.private_links)
                    + usize::from(k);
                links.push(PrivateLink {
                    interface: format!("ic{}", links.len()),
                    partner: self.hosts[other].clone(),
                    index: k,
                    mtu: self.private_mtu,
                    local: private_addr(subnet, index),
                    remote: private_addr(subnet, other),
                });
            }
        }
        HostNet {
            name,
            index,
            management: Ipv4Addr::new(10, 77, 0, host_octet(index)),
            gateway: GATEWAY,
            prefix_len: PREFIX_LEN,
            bridge: HOST_BRIDGE.into(),
            links,
            config_file: dir.join("pollux.toml"),
            daemon_log: dir.join("daemon.log"),
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
            api_socket: dir.join("api.sock"),
            shared_dir: self.dir.join("shared"),
            statefile: (0..self.statefile_disks)
                .map(|disk| self.dir.join(format!("shared/statefile{disk}")))
                .collect(),
            dir,
            pool: None,
        }
    }
}

/// Which lab it is, among all that ever lived on this machine since it booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabId {
    created_at_ns: MonotonicNs,
    creator: u32,
}

impl LabId {
    fn fresh() -> Self {
        Self {
            created_at_ns: MonotonicNs::now(),
            creator: std::process::id(),
        }
    }
}

/// A lab's spec with every name and address worked out; kept in the lab's directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabPlan {
    /// Tells this lab from an earlier or later one in the same directory.
    pub id: LabId,
    /// The lab's name.
    pub name: String,
    /// The lab's directory.
    pub dir: PathBuf,
    /// Its hosts in order.
    pub hosts: Vec<HostNet>,
    /// MTU of the private links, bytes.
    pub private_mtu: u16,
    /// Private links between each two hosts.
    pub private_links: u8,
    /// Each host reaches the statefile through loop devices of its own.
    #[serde(default)]
    pub takeable_disks: bool,
    /// Who keeps it alive.
    pub keep: KeepPolicy,
    /// Leave the directory at the end.
    pub keep_files: bool,
    /// The daemon's argv before replacement.
    pub daemon_argv: Vec<String>,
}

/// One end of a private link between two hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateLink {
    /// Interface inside this host: `ic0`, `ic1`, …
    pub interface: String,
    /// The host at the other end.
    pub partner: HostName,
    /// Which of the links to this partner, from 0.
    pub index: u8,
    /// MTU in bytes.
    pub mtu: u16,
    /// This end's address.
    pub local: Ipv4Addr,
    /// The other end's address.
    pub remote: Ipv4Addr,
}

/// What one host of the lab has: its addresses and its directories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNet {
    /// The host.
    pub name: HostName,
    /// Its place in the lab, from 0.
    pub index: usize,
    /// Its address on the lan, on [`HostNet::bridge`].
    pub management: Ipv4Addr,
    /// The lan's gateway, in `outside`.
    pub gateway: Ipv4Addr,
    /// Prefix length of every network here.
    pub prefix_len: u8,
    /// Bridge that VM taps join.
    pub bridge: String,
    /// This host's ends of its private links.
    pub links: Vec<PrivateLink>,
    /// All of the host's files.
    pub dir: PathBuf,
    /// The config file that [`LabSpec::host_config`] filled.
    pub config_file: PathBuf,
    /// Where the daemon's output goes.
    pub daemon_log: PathBuf,
    /// On disk; survives power cuts.
    pub state_dir: PathBuf,
    /// A tmpfs of this host alone: what is in it is gone with the host's power.
    pub run_dir: PathBuf,
    /// For the daemon's API; reachable from every namespace and from outside the lab.
    pub api_socket: PathBuf,
    /// One directory that all hosts reach.
    pub shared_dir: PathBuf,
    /// The disks of the statefile in it; the host's slot is its index.
    pub statefile: Vec<PathBuf>,
    /// The pool it belongs to.
    #[serde(default)]
    pub pool: Option<PoolNet>,
}

/// A host of the lab, or the clients' side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where clients and the gateway are.
    Outside,
    /// Inside a host's namespaces.
    Host(HostName),
}

impl FromStr for Place {
    type Err = crate::pool::host::BadHostName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == OUTSIDE {
            Ok(Self::Outside)
        } else {
            HostName::new(text).map(Self::Host)
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside => f.write_str(OUTSIDE),
            Self::Host(host) => host.fmt(f),
        }
    }
}

/// `$TMPDIR/pollux-lab-NAME`.
#[must_use]
pub fn default_dir(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("pollux-lab-{name}"))
}

/// Check a lab's name.
///
/// # Errors
/// [`LabError::Spec`] with what is allowed.
pub fn check_name(name: &str) -> Result<(), LabError> {
    let ok = !name.is_empty()
        && name.len() <= LAB_NAME_BYTES_MAX
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-');
    if ok {
        Ok(())
    } else {
        Err(LabError::Spec(format!(
            "name `{name}`: use 1 to {LAB_NAME_BYTES_MAX} of a-z, 0-9 and '-', not starting with '-'"
        )))
    }
}

impl LabPlan {
    /// The host of this name.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`] with the names there are.
    pub fn host(&self, name: &HostName) -> Result<&HostNet, LabError> {
        self.hosts
            .iter()
            .find(|h| h.name == *name)
            .ok_or_else(|| LabError::NoSuchHost {
                lab: self.name.clone(),
                host: name.clone(),
                have: self
                    .hosts
                    .iter()
                    .map(|h| h.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// Where the keeper answers.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket_path(&self.dir)
    }

    /// Where the keeper logs.
    #[must_use]
    pub fn keeper_log(&self) -> PathBuf {
        self.dir.join("keeper.log")
    }
}

/// The keeper's socket in a lab's directory.
pub(crate) fn socket_path(dir: &Path) -> PathBuf {
    dir.join("keeper.sock")
}

/// Number of the pair (low, high), low < high, counting (0,1), (0,2), (1,2), (0,3), …:
/// independent of how many hosts there are.
pub(crate) fn pair_index(low: usize, high: usize) -> usize {
    high * (high - 1) / 2 + low
}

fn private_addr(subnet: usize, host: usize) -> Ipv4Addr {
    // At most 120 pairs * 8 links = 960 subnets: 10.78.0.0 to 10.81.191.0.
    let [high, low] = u16::try_from(subnet).unwrap_or(u16::MAX).to_be_bytes();
    Ipv4Addr::new(10, 78 + high, low, host_octet(host))
}

fn host_octet(index: usize) -> u8 {
    101 + u8::try_from(index).unwrap_or(u8::MAX - 101)
}

const _: () = assert!(HOSTS_MAX <= 100, "host octets run from 101 to 200");

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn spec(hosts: &[&str], links: u8) -> LabSpec {
        let mut spec = LabSpec::new("t", Box::new(|_, _| String::new())).unwrap();
        spec.hosts = hosts.iter().map(|h| HostName::new(*h).unwrap()).collect();
        spec.private_links = links;
        spec
    }

    #[test]
    fn two_hosts_get_the_documented_addresses() {
        let plan = spec(&["a", "b"], 2).plan().unwrap();
        let a = &plan.hosts[0];
        assert_eq!(a.management, Ipv4Addr::new(10, 77, 0, 101));
        assert_eq!(a.links[1].interface, "ic1");
        assert_eq!(a.links[1].local, Ipv4Addr::new(10, 78, 1, 101));
        assert_eq!(a.links[1].remote, Ipv4Addr::new(10, 78, 1, 102));
        assert_eq!(plan.hosts[1].links[1].local, a.links[1].remote);
    }

    #[test]
    fn every_private_link_of_a_full_lab_has_a_subnet_of_its_own() {
        let names: Vec<String> = (0..HOSTS_MAX).map(|i| format!("h{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let plan = spec(&names, PRIVATE_LINKS_MAX).plan().unwrap();
        let mut subnets = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for host in &plan.hosts {
            for link in &host.links {
                let partner = plan.host(&link.partner).unwrap();
                let back = partner
                    .links
                    .iter()
                    .find(|l| l.partner == host.name && l.index == link.index)
                    .unwrap();
                assert_eq!((back.local, back.remote), (link.remote, link.local));
                subnets.insert(link.local.octets()[..3].to_vec());
                assert!(addresses.insert(link.local));
            }
        }
        assert_eq!(
            subnets.len(),
            HOSTS_MAX * (HOSTS_MAX - 1) / 2 * usize::from(PRIVATE_LINKS_MAX)
        );
    }

    #[test]
    fn bad_specs_are_refused_with_the_reason() {
        let refused = |change: &dyn Fn(&mut LabSpec), word: &str| {
            let mut s = spec(&["a", "b"], 1);
            change(&mut s);
            let text = s.plan().unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        };
        refused(&|s| s.hosts.clear(), "0 hosts");
        refused(&|s| s.hosts[1] = s.hosts[0].clone(), "twice");
        refused(
            &|s| s.hosts[1] = HostName::new("outside").unwrap(),
            "clients",
        );
        refused(&|s| s.private_links = 9, "at most 8");
        refused(&|s| s.private_mtu = 600, "1280");
        refused(&|s| s.name = "A/../b".into(), "name `A/../b`");
        refused(&|s| s.dir = "tmp".into(), "absolute");
        refused(
            &|s| s.dir = PathBuf::from("/").join("x".repeat(100)),
            "shorter",
        );
    }
}
