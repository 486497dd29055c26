//! The host's configuration file: one TOML file, read once at start.

mod pool;
mod registry;

pub use pool::{Address, PoolConfig, PoolHost, PoolTiming};
pub use registry::{RegistryConfig, TieBreaker};

use crate::mirror::{Micros, Timing};
use crate::pool::HostName;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What one host's daemon is told. Every path may be absolute or relative to the
/// folder of the configuration file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// This host's name in the pool.
    pub name: HostName,
    /// Survives a reboot: identity, links, VM specs and, in `images`, disk images.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets and logs of running VMs; may vanish with a reboot.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// A tmpfs: guest RAM and device state live here.
    #[serde(default = "default_ram_dir")]
    pub ram_dir: PathBuf,
    /// The API's unix socket.
    #[serde(default = "default_api_socket")]
    pub api_socket: PathBuf,
    /// A folder on storage that all hosts of the pool reach, for a registry in a locked file.
    /// Either this or `registry`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    registry_dir: Option<PathBuf>,
    /// The registry; see [`HostConfig::registry`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    registry: Option<RegistryConfig>,
    /// The pool this host belongs to; without it the host is alone with its partners.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolConfig>,
    /// The QEMU binary: a path, or a name looked up in PATH.
    #[serde(default = "default_qemu")]
    pub qemu: String,
    /// The unprivileged user id QEMU runs as.
    #[serde(default = "default_unprivileged")]
    pub qemu_uid: u32,
    /// The unprivileged group id QEMU runs as.
    #[serde(default = "default_unprivileged")]
    pub qemu_gid: u32,
    /// How long a partner may be silent before it counts as lost, in milliseconds.
    #[serde(default = "default_detection_ms")]
    pub detection_ms: u64,
    /// Heartbeat period, in milliseconds.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
}

/// Longest detection time, a minute: the pair's other times are stretched with it.
const DETECTION_MS_MAX: u64 = 60_000;
/// The user and group `nobody`/`nogroup` of Debian.
const UNPRIVILEGED_ID: u32 = 65_534;

fn default_state_dir() -> PathBuf {
    "/var/lib/pollux".into()
}
fn default_run_dir() -> PathBuf {
    "/run/pollux".into()
}
fn default_ram_dir() -> PathBuf {
    "/dev/shm/pollux".into()
}
fn default_api_socket() -> PathBuf {
    crate::api::DEFAULT_SOCKET.into()
}
fn default_qemu() -> String {
    "qemu-system-x86_64".into()
}
const fn default_unprivileged() -> u32 {
    UNPRIVILEGED_ID
}
const fn default_detection_ms() -> u64 {
    100
}
const fn default_heartbeat_ms() -> u64 {
    10
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the host configuration {path}: {source}; pass another with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a host configuration.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where in it, and what is wrong.
        message: String,
    },
    /// No registry.
    #[error(
        "{path}: no registry is named; give `registry_dir`, or a table `[registry]` with `kind`"
    )]
    NoRegistry {
        /// The file.
        path: PathBuf,
    },
    /// Two of them.
    #[error(
        "{path}: both `registry_dir` and `[registry]` are given; keep the one that all hosts of the pool use"
    )]
    TwoRegistries {
        /// The file.
        path: PathBuf,
    },
    /// A pool that does not hold together.
    #[error("{path}: [pool]: {what}")]
    Pool {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A pair's registry without a pair.
    #[error("{path}: [registry] kind = \"pair\": {what}")]
    Pair {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A value that cannot work.
    #[error("{path}: {key} = {value}: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// Why that cannot be.
        reason: &'static str,
    },
}

impl HostConfig {
    /// Read and check the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`] with the file, the key and what to do.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Read and check the text of the file at `path`, which need not be there.
    ///
    /// # Errors
    /// [`ConfigError`] with the file, the key and what to do.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.into(),
            message: explain_toml(text, &e),
        })?;
        let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
        for p in [
            &mut config.state_dir,
            &mut config.run_dir,
            &mut config.ram_dir,
            &mut config.api_socket,
        ] {
            if p.is_relative() {
                *p = folder.join(&*p);
            }
        }
        let dir = config.registry_dir.take();
        let mut registry = RegistryConfig::choose(path, dir, config.registry.take())?;
        registry.anchor(&folder);
        if let Some(pool) = &mut config.pool {
            pool.anchor(&folder);
            let slot = match &registry {
                RegistryConfig::Statefile { slot, .. } => Some(*slot),
                _ => None,
            };
            pool.check(path, &config.name, slot)?;
        }
        registry.check(path, config.pool.as_ref())?;
        config.registry = Some(registry);
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let bad = |key, value: String, reason| {
            Err(ConfigError::Value {
                path: path.into(),
                key,
                value,
                reason,
            })
        };
        if self.heartbeat_ms == 0 || self.heartbeat_ms > 1000 {
            return bad(
                "heartbeat_ms",
                self.heartbeat_ms.to_string(),
                "must be 1 to 1000",
            );
        }
        if self.detection_ms > DETECTION_MS_MAX {
            return bad(
                "detection_ms",
                self.detection_ms.to_string(),
                "must be at most 60000, or a VM stands still for minutes before its standby goes on",
            );
        }
        if self.detection_ms < 3 * self.heartbeat_ms {
            return bad(
                "detection_ms",
                self.detection_ms.to_string(),
                "must be at least three heartbeats, or one lost datagram looks like a dead host",
            );
        }
        if self.qemu_uid == 0 {
            return bad(
                "qemu_uid",
                "0".into(),
                "QEMU must not run as root; name an unprivileged user id",
            );
        }
        Ok(())
    }

    /// The times of this host's pairs: the defaults stretched with the detection time.
    #[must_use]
    pub fn timing(&self) -> Timing {
        let base = Timing::DEFAULT;
        let stretch = |t: Micros| Micros(t.0 * self.detection_ms * 1000 / base.detection.0);
        Timing {
            detection: Micros::from_millis(self.detection_ms),
            claim_delay: stretch(base.claim_delay),
            lease: stretch(base.lease),
            release_within: stretch(base.release_within),
            link_down_bound: stretch(base.link_down_bound),
            ..base
        }
    }

    /// The registry that all hosts of the pool share.
    ///
    /// # Panics
    /// Never after [`HostConfig::read`], which sees to it that there is one.
    #[must_use]
    pub fn registry(&self) -> &RegistryConfig {
        self.registry.as_ref().expect("checked by read")
    }

    /// Where this host's disk images live; relative disk paths of specs start here.
    #[must_use]
    pub fn images_dir(&self) -> PathBuf {
        self.state_dir.join("images")
    }
}

/// The keys a host configuration may have, for the nearest-key hint.
const KEYS: [&str; 13] = [
    "name",
    "state_dir",
    "run_dir",
    "ram_dir",
    "api_socket",
    "registry_dir",
    "registry",
    "pool",
    "qemu",
    "qemu_uid",
    "qemu_gid",
    "detection_ms",
    "heartbeat_ms",
];

/// One line: line number, what is wrong and, for an unknown key, the nearest known one.
fn explain_toml(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(1, |s| {
        text.get(..s.start)
            .map_or(1, |t| t.matches('\n').count() + 1)
    });
    let message = error.message();
    let hint = message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split('`').next())
        .and_then(|key| {
            KEYS.iter()
                .chain(RegistryConfig::KEYS.iter())
                .chain(PoolConfig::KEYS.iter())
                .min_by_key(|k| strsim::damerau_levenshtein(k, key))
        });
    match hint {
        Some(near) => {
            let first = message.split(',').next().unwrap_or(message);
            format!("line {line}: {first}; did you mean `{near}`?")
        }
        None => format!("line {line}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{HostConfig, explain_toml};

    fn parse(text: &str) -> Result<HostConfig, String> {
        toml::from_str(text).map_err(|e| explain_toml(text, &e))
    }

    #[test]
    fn unknown_key_names_the_nearest() {
        let e = parse("name = 'a'\nregistry_dir = 'r'\nstate_dri = 'x'\n").unwrap_err();
        assert_eq!(
            e,
            "line 3: unknown field `state_dri`; did you mean `state_dir`?"
        );
    }

    #[test]
    fn a_detection_time_that_no_clock_reckons_with_is_refused() {
        let parse = |ms: u64| {
            let text = format!("name = 'a'\nregistry_dir = 'r'\ndetection_ms = {ms}\n");
            HostConfig::parse(&text, std::path::Path::new("/h.toml")).map_err(|e| e.to_string())
        };
        assert!(parse(60_000).is_ok());
        let told = parse(1 << 60).unwrap_err();
        assert!(told.contains("must be at most 60000"), "{told}");
    }

    #[test]
    fn defaults_fill_in() {
        let c = parse("name = 'a'\nregistry_dir = 'r'\n").unwrap();
        assert_eq!(
            (c.detection_ms, c.heartbeat_ms, c.qemu_uid),
            (100, 10, 65_534)
        );
        assert_eq!(c.timing(), crate::mirror::Timing::DEFAULT);
    }
}
