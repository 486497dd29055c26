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
}

impl RegistryConfig {
    /// The keys of the table, for the nearest-key hint.
    pub(super) const KEYS: [&str; 4] = ["kind", "dir", "disks", "slot"];

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
