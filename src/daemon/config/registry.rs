//! Which registry the host uses: the locked file, the statefile, or etcd.

use super::ConfigError;
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
}

impl RegistryConfig {
    /// The keys of the table, for the nearest-key hint.
    pub(super) const KEYS: [&str; 10] = [
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
        }
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
