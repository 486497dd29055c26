//! Which registry the host uses: the locked file, the statefile, etcd, or a copy on each of two
//! hosts.

use super::{ConfigError, PoolConfig};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The table `[registry]` of a host's configuration. All hosts of a pool name the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RegistryConfig {
    /// A locked file on a shared file system.
    File {
        /// The folder it is in; `registry_dir = "…"` says the same in one line.
        dir: PathBuf,
    },
    /// Disk Paxos on one or three shared files or block devices, made by
    /// `pollux statefile format`.
    Statefile {
        /// The disks, in the same order on every host.
        disks: Vec<PathBuf>,
        /// This host's slot, no other's: 0 is the first.
        slot: u16,
    },
    /// etcd, for pools that have outgrown one pair or have no shared storage.
    Etcd {
        /// Client URLs of its members, all of one cluster.
        endpoints: Vec<String>,
        /// The pool's name in it, part of every key.
        pool: String,
        /// PEM file of the authority that signed the members' certificates; for `https`.
        #[serde(default)]
        ca: Option<PathBuf>,
        /// PEM file of this host's certificate, if the members ask for one.
        #[serde(default)]
        certificate: Option<PathBuf>,
        /// PEM file of its key.
        #[serde(default)]
        key: Option<PathBuf>,
        /// Speak plain `http` to other machines: whoever owns the network owns the VMs.
        #[serde(default)]
        allow_plain_http: bool,
    },
    /// A copy on each host of a pool of two that has neither shared storage nor etcd.
    Pair {
        /// What a host must reach to go on without its partner, once that is confirmed off.
        #[serde(rename = "tie-breaker")]
        tie_breaker: TieBreaker,
        /// TCP port of the two hosts' connection; one above the pool's if it is left out.
        #[serde(default)]
        port: Option<u16>,
    },
}

/// What decides between two hosts that do not hear each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TieBreaker {
    /// The pool's gateway.
    Gateway,
}

impl RegistryConfig {
    /// The keys of the table, for the nearest-key hint.
    pub(super) const KEYS: [&str; 12] = [
        "kind",
        "dir",
        "disks",
        "slot",
        "endpoints",
        "pool",
        "ca",
        "certificate",
        "key",
        "allow_plain_http",
        "tie-breaker",
        "port",
    ];

    /// Make relative paths begin at the configuration file's folder.
    pub(super) fn anchor(&mut self, folder: &Path) {
        let anchor = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        };
        match self {
            Self::File { dir } => anchor(dir),
            Self::Statefile { disks, .. } => disks.iter_mut().for_each(anchor),
            Self::Etcd {
                ca,
                certificate,
                key,
                ..
            } => [ca, certificate, key]
                .into_iter()
                .flatten()
                .for_each(anchor),
            Self::Pair { .. } => {}
        }
    }

    /// Whether `pool` is one that this registry can be of.
    ///
    /// # Errors
    /// [`ConfigError::Pair`]: what is wrong and what to do.
    pub(super) fn check(&self, path: &Path, pool: Option<&PoolConfig>) -> Result<(), ConfigError> {
        let Self::Pair { port, .. } = self else {
            return Ok(());
        };
        pair_is_sound(*port, pool).map_err(|what| ConfigError::Pair {
            path: path.into(),
            what,
        })
    }

    /// What a folder and a table together mean.
    ///
    /// # Errors
    /// If there is neither, or both.
    pub(super) fn choose(
        path: &Path,
        dir: Option<PathBuf>,
        table: Option<Self>,
    ) -> Result<Self, ConfigError> {
        match (dir, table) {
            (Some(dir), None) => Ok(Self::File { dir }),
            (None, Some(table)) => Ok(table),
            (None, None) => Err(ConfigError::NoRegistry { path: path.into() }),
            (Some(_), Some(_)) => Err(ConfigError::TwoRegistries { path: path.into() }),
        }
    }
}

fn pair_is_sound(port: Option<u16>, pool: Option<&PoolConfig>) -> Result<(), String> {
    let pool = pool.ok_or("it needs the table [pool], with both hosts and their networks")?;
    let [one, other] = &pool.hosts[..] else {
        return Err(format!(
            "it is for a pool of two hosts, and [pool] names {}; use a statefile or etcd",
            pool.hosts.len()
        ));
    };
    if pool.gateway.is_none() {
        return Err(
            "tie-breaker = \"gateway\" needs `gateway` in [pool], the router through which clients come"
                .into(),
        );
    }
    if port == Some(0) || (port.is_none() && pool.port == u16::MAX) {
        return Err("there is no such port; give one from 1 to 65535 in `port`".into());
    }
    let mut both = one.addresses.keys();
    if !both.any(|network| other.addresses.contains_key(network)) {
        return Err(format!(
            "`{}` and `{}` have no network in common; give both an address on one in `addresses`",
            one.name, other.name
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::HostConfig;
    use super::*;

    fn read(text: &str) -> Result<RegistryConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.toml");
        std::fs::write(&path, format!("name = \"a\"\n{text}")).unwrap();
        let config = HostConfig::read(&path).map_err(|e| e.to_string())?;
        let mut registry = config.registry().clone();
        // What was relative begins at the file's folder.
        let strip = |path: &mut PathBuf| *path = path.strip_prefix(dir.path()).unwrap().into();
        match &mut registry {
            RegistryConfig::File { dir } => strip(dir),
            RegistryConfig::Statefile { disks, .. } => disks.iter_mut().for_each(strip),
            RegistryConfig::Etcd { ca, .. } => ca.iter_mut().for_each(strip),
            RegistryConfig::Pair { .. } => {}
        }
        Ok(registry)
    }

    #[test]
    fn each_kind_is_read_and_the_short_form_means_a_file() {
        let file = RegistryConfig::File { dir: "r".into() };
        assert_eq!(read("registry_dir = \"r\""), Ok(file.clone()));
        assert_eq!(read("[registry]\nkind = \"file\"\ndir = \"r\""), Ok(file));
        let statefile = RegistryConfig::Statefile {
            disks: vec!["s0".into(), "s1".into(), "s2".into()],
            slot: 1,
        };
        let text = "[registry]\nkind = \"statefile\"\ndisks = [\"s0\", \"s1\", \"s2\"]\nslot = 1";
        assert_eq!(read(text), Ok(statefile));
        let text = "[registry]\nkind = \"etcd\"\nendpoints = [\"https://e:2379\"]\npool = \"p\"\nca = \"ca.pem\"";
        let RegistryConfig::Etcd {
            endpoints,
            ca,
            allow_plain_http,
            ..
        } = read(text).unwrap()
        else {
            panic!("not etcd");
        };
        assert_eq!(
            (endpoints.len(), ca, allow_plain_http),
            (1, Some("ca.pem".into()), false)
        );
    }

    const PAIR: &str = "\
[registry]
kind = \"pair\"
tie-breaker = \"gateway\"
[pool]
networks = [\"lan\", \"direct\"]
gateway = \"10.0.0.1\"
[[pool.host]]
name = \"a\"
id = 3
addresses = { lan = \"10.0.0.2\" }
[[pool.host]]
name = \"b\"
id = 5
addresses = { lan = \"10.0.0.3\", direct = \"10.1.0.3\" }
";

    #[test]
    fn a_pair_is_read_and_one_that_cannot_be_is_refused_in_words() {
        let pair = RegistryConfig::Pair {
            tie_breaker: TieBreaker::Gateway,
            port: None,
        };
        assert_eq!(read(PAIR), Ok(pair));
        let third =
            "[[pool.host]]\nname = \"c\"\nid = 7\naddresses = {}\n[[pool.host]]\nname = \"b\"";
        for (from, to, says) in [
            (
                "tie-breaker = \"gateway\"\n",
                "",
                "missing field `tie-breaker`",
            ),
            ("= \"gateway\"\n", "= \"coin\"\n", "unknown variant `coin`"),
            ("gateway = \"10.0.0.1\"\n", "", "needs `gateway` in [pool]"),
            ("[[pool.host]]\nname = \"b\"", third, "[pool] names 3"),
            ("{ lan = \"10.0.0.3\", ", "{ ", "no network in common"),
            ("[pool]\n", "port = 0\n[pool]\n", "no such port"),
            ("tie-breaker", "tiebreaker", "did you mean `tie-breaker`?"),
        ] {
            let told = read(&PAIR.replacen(from, to, 1)).unwrap_err();
            assert!(told.contains(says), "{told}");
        }
        let told = read(PAIR.split("[pool]").next().unwrap()).unwrap_err();
        assert!(told.contains("needs the table [pool]"), "{told}");
    }

    #[test]
    fn none_two_and_misspelt_ones_are_refused_in_words() {
        let told = |text: &str| read(text).unwrap_err();
        assert!(told("").contains("no registry is named"));
        let both = "registry_dir = \"r\"\n[registry]\nkind = \"file\"\ndir = \"r\"";
        assert!(told(both).contains("both `registry_dir` and `[registry]`"));
        let slots = "[registry]\nkind = \"statefile\"\ndisks = [\"s\"]\nslot = 0\nslots = 3";
        assert!(
            told(slots).contains("did you mean `slot`?"),
            "{}",
            told(slots)
        );
        assert!(told("[registry]\nkind = \"zookeeper\"").contains("zookeeper"));
    }
}
