//! The table `[pool]`: the hosts, the networks they hear each other on, gateway, fencing, watchdog.
//!
//! But for paths it is the same on every host: a host finds its own addresses under its name.

use super::ConfigError;
use crate::beat::PORT_DEFAULT;
use crate::ha::report::NETWORKS_MAX;
use crate::ha::time::Millis;
use crate::ha::timing::Timing;
use crate::pool::{HostId, HostName, POOL_HOSTS_MAX};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Longest of the pool's times: what is reckoned from them stays far from the end of numbers.
const TIME_MS_MAX: u64 = 3_600_000;

/// What this host knows of its pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Names of the networks that heartbeats go over, in the same order on every host.
    pub networks: Vec<String>,
    /// The interface of this host to bind a network's socket to, where routes alone do not tell.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, String>,
    /// UDP port of the heartbeats, for addresses that name none.
    #[serde(default = "default_port")]
    pub port: u16,
    /// The router through which clients come; an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The file that says how each host's power is switched off (docs/fencing.md).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fencing: Option<PathBuf>,
    /// A watchdog device, or the socket of a `pollux watchdog` outside of this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<PathBuf>,
    /// The pool's times, the same on every host.
    #[serde(default)]
    pub timing: PoolTiming,
    /// All hosts of the pool, this one among them.
    #[serde(rename = "host")]
    pub hosts: Vec<PoolHost>,
}

/// A host of the pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolHost {
    /// Its name.
    pub name: HostName,
    /// Its number, never another's; with a statefile the same as its slot.
    pub id: u8,
    /// Its address on each network that it is on, with or without a port.
    pub addresses: BTreeMap<String, Address>,
}

/// An IP address, perhaps with a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Address {
    /// Address and port.
    Full(SocketAddr),
    /// An address on the pool's port.
    Ip(IpAddr),
}

/// The times in milliseconds; what is left out has its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolTiming {
    /// Between two heartbeats.
    pub period_ms: u64,
    /// Silence after which a network path is lost.
    pub network_lost_ms: u64,
    /// The same of a path through storage.
    pub storage_lost_ms: u64,
    /// How long a host may go on without a word that it is a member.
    pub lease_ms: u64,
    /// What the watchdog is armed with.
    pub watchdog_ms: u64,
    /// How long a side that does not reach the gateway lets the other be first.
    pub hesitation_ms: u64,
}

impl Default for PoolTiming {
    fn default() -> Self {
        let t = Timing::DEFAULT;
        Self {
            period_ms: t.period.0,
            network_lost_ms: t.network_lost.0,
            storage_lost_ms: t.storage_lost.0,
            lease_ms: t.lease.0,
            watchdog_ms: t.watchdog.0,
            hesitation_ms: t.hesitation.0,
        }
    }
}

impl PoolTiming {
    /// The keys with their values.
    const fn all(&self) -> [(&'static str, u64); 6] {
        [
            ("period_ms", self.period_ms),
            ("network_lost_ms", self.network_lost_ms),
            ("storage_lost_ms", self.storage_lost_ms),
            ("lease_ms", self.lease_ms),
            ("watchdog_ms", self.watchdog_ms),
            ("hesitation_ms", self.hesitation_ms),
        ]
    }

    /// As the decisions take them.
    #[must_use]
    pub fn timing(&self) -> Timing {
        Timing {
            period: Millis(self.period_ms),
            network_lost: Millis(self.network_lost_ms),
            storage_lost: Millis(self.storage_lost_ms),
            lease: Millis(self.lease_ms),
            watchdog: Millis(self.watchdog_ms),
            hesitation: Millis(self.hesitation_ms),
            ..Timing::DEFAULT
        }
    }
}

const fn default_port() -> u16 {
    PORT_DEFAULT
}

impl PoolConfig {
    /// The keys of the table and of those in it, for the nearest-key hint.
    pub(super) const KEYS: [&str; 18] = [
        "pool",
        "networks",
        "devices",
        "port",
        "gateway",
        "fencing",
        "watchdog",
        "timing",
        "host",
        "id",
        "addresses",
        "period_ms",
        "network_lost_ms",
        "storage_lost_ms",
        "lease_ms",
        "watchdog_ms",
        "hesitation_ms",
        "name",
    ];

    /// Make relative paths begin at the configuration file's folder.
    pub(super) fn anchor(&mut self, folder: &Path) {
        for path in [&mut self.fencing, &mut self.watchdog]
            .into_iter()
            .flatten()
        {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        }
    }

    /// The host of this name.
    #[must_use]
    pub fn host(&self, name: &HostName) -> Option<&PoolHost> {
        self.hosts.iter().find(|host| host.name == *name)
    }

    /// The host of this number.
    #[must_use]
    pub fn host_by_id(&self, id: HostId) -> Option<&PoolHost> {
        self.hosts.iter().find(|host| host.id == id.0)
    }

    /// An address with its port.
    #[must_use]
    pub fn socket(&self, address: Address) -> SocketAddr {
        match address {
            Address::Full(socket) => socket,
            Address::Ip(ip) => SocketAddr::new(ip, self.port),
        }
    }

    /// Whether it holds together for the host `me`, whose slot in the statefile is `slot`.
    ///
    /// # Errors
    /// [`ConfigError::Pool`]: what is wrong and what to do.
    pub(super) fn check(
        &self,
        path: &Path,
        me: &HostName,
        slot: Option<u16>,
    ) -> Result<(), ConfigError> {
        self.sound(me, slot).map_err(|what| ConfigError::Pool {
            path: path.into(),
            what,
        })
    }

    fn sound(&self, me: &HostName, slot: Option<u16>) -> Result<(), String> {
        let long = self
            .timing
            .all()
            .into_iter()
            .find(|(_, ms)| *ms > TIME_MS_MAX);
        if let Some((key, ms)) = long {
            return Err(format!(
                "{key} = {ms}: at most {TIME_MS_MAX} ms, an hour; nobody waits longer for a dead host"
            ));
        }
        self.timing.timing().check()?;
        let networks: BTreeSet<&String> = self.networks.iter().collect();
        if self.networks.is_empty() || self.networks.len() > usize::from(NETWORKS_MAX) {
            return Err(format!(
                "{} networks; name 1 to {NETWORKS_MAX} in `networks`",
                self.networks.len()
            ));
        }
        if networks.len() != self.networks.len() {
            return Err("a network is named twice in `networks`".into());
        }
        if let Some(name) = self.devices.keys().find(|name| !networks.contains(name)) {
            return Err(format!(
                "`devices` names network `{name}`, which is not in `networks`"
            ));
        }
        let mut names = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for host in &self.hosts {
            let at = format!("[[pool.host]] `{}`", host.name);
            if usize::from(host.id) >= POOL_HOSTS_MAX {
                return Err(format!(
                    "{at}: id {}; ids are 0 to {}",
                    host.id,
                    POOL_HOSTS_MAX - 1
                ));
            }
            if !names.insert(&host.name) {
                return Err(format!("{at} is there twice"));
            }
            if !ids.insert(host.id) {
                return Err(format!("{at}: id {} is another host's already", host.id));
            }
            if let Some(name) = host.addresses.keys().find(|name| !networks.contains(name)) {
                return Err(format!(
                    "{at}: an address on network `{name}`, which is not in `networks`"
                ));
            }
        }
        let Some(own) = self.host(me) else {
            return Err(format!(
                "there is no [[pool.host]] with the name of this host, `{me}`"
            ));
        };
        if let Some(slot) = slot.filter(|slot| *slot != u16::from(own.id)) {
            return Err(format!(
                "host `{me}` has id {}, but slot {slot} of the statefile; they must be the same",
                own.id
            ));
        }
        if own.addresses.is_empty() {
            return Err(format!(
                "host `{me}` has no address on any network; give it one in `addresses`"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostConfig;

    const POOL: &str = "\
[pool]
networks = [\"management\", \"private\"]
gateway = \"10.77.0.1\"
watchdog = \"watchdog.sock\"
[[pool.host]]
name = \"a\"
id = 0
addresses = { management = \"10.77.0.101\", private = \"10.78.0.101:7000\" }
[[pool.host]]
name = \"b\"
id = 1
addresses = { management = \"10.77.0.102\" }
";

    fn read(text: &str) -> Result<HostConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.toml");
        std::fs::write(&path, format!("name = \"a\"\nregistry_dir = \"r\"\n{text}")).unwrap();
        HostConfig::read(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn a_pool_is_read_and_its_paths_begin_at_the_files_folder() {
        let config = read(POOL).unwrap();
        let pool = config.pool.unwrap();
        assert!(pool.watchdog.as_ref().unwrap().is_absolute());
        let own = &pool.host(&config.name).unwrap().addresses;
        assert_eq!(
            pool.socket(own["management"]),
            "10.77.0.101:7445".parse().unwrap()
        );
        assert_eq!(
            pool.socket(own["private"]),
            "10.78.0.101:7000".parse().unwrap()
        );
        assert_eq!(pool.timing.timing(), crate::ha::timing::Timing::DEFAULT);
    }

    #[test]
    fn what_cannot_be_a_pool_is_refused_in_words() {
        for (from, to, says) in [
            ("id = 1", "id = 0", "id 0 is another host's already"),
            ("id = 1", "id = 64", "ids are 0 to 63"),
            (
                "name = \"a\"",
                "name = \"c\"",
                "with the name of this host, `a`",
            ),
            ("name = \"b\"", "name = \"a\"", "is there twice"),
            (
                "{ management = \"10.77.0.102\" }",
                "{ lan = \"10.77.0.102\" }",
                "network `lan`, which is not in",
            ),
            ("[\"management\", \"private\"]", "[]", "name 1 to 4"),
            ("gateway", "gatway", "did you mean `gateway`?"),
            (
                "watchdog = ",
                "timing = { lease_ms = 1 }\nwatchdog = ",
                "lease 0.001 s must be at least",
            ),
            (
                "watchdog = ",
                "timing = { period_ms = 9000000000000000000 }\nwatchdog = ",
                "period_ms = 9000000000000000000: at most 3600000 ms",
            ),
        ] {
            let told = read(&POOL.replacen(from, to, 1)).unwrap_err();
            assert!(told.contains(says), "{told}");
        }
    }
}
