//! Which devices take the power of which host: a TOML file, checked before use. Pure.

use crate::pool::HostName;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

/// Largest configuration, bytes: 64 hosts with all levels full fit several times.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Levels of a host (pacemaker has nine).
pub const LEVELS_MAX: usize = 9;
/// Devices of a level: a server has no more power supplies.
pub const DEVICES_MAX: usize = 8;
/// Parameters of a device, and bytes of a value: together they fit into a pipe, so that
/// writing them never waits for the agent.
pub const PARAMETERS_MAX: usize = 32;
/// Longest name or value of a parameter, bytes.
pub const VALUE_BYTES_MAX: usize = 512;
/// A pipe of Linux holds 64 KiB (pipe(7)).
const PIPE_BYTES: usize = 64 << 10;
const _: () = assert!((PARAMETERS_MAX + 2) * 2 * (VALUE_BYTES_MAX + 2) < PIPE_BYTES);
/// Longest time for one call of an agent, seconds.
pub const TIMEOUT_S_MAX: u64 = 600;
/// Most repetitions of a failed call.
pub const RETRIES_MAX: u32 = 10;

/// Agents that cut something other than power, or nothing at all: what they confirm says
/// nothing about whether the host still runs.
const NO_POWER: [(&str, &str); 14] = [
    ("fence_ack_manual", "asks a person and switches nothing"),
    ("fence_heuristics_ping", "pings and switches nothing"),
    (
        "fence_kdump",
        "listens for a crash dump and switches nothing",
    ),
    (
        "fence_sbd",
        "writes a request to a disk, which the host may not read",
    ),
    ("fence_scsi", "cuts a disk, not power"),
    ("fence_mpath", "cuts a disk, not power"),
    ("fence_vmware_scsi", "cuts a disk, not power"),
    ("fence_azure_net", "cuts the network, not power"),
    ("fence_brocade", "cuts the storage network, not power"),
    ("fence_cisco_mds", "cuts the storage network, not power"),
    ("fence_sanbox2", "cuts the storage network, not power"),
    ("fence_mcdata", "cuts the storage network, not power"),
    ("fence_ifmib", "cuts a switch port, not power"),
    ("fence_aws_vpc_net", "cuts the network, not power"),
];

/// An agent that only remembers what it was told; for rehearsals in a lab.
pub const DUMMY: &str = "fence_dummy";

/// All of the file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceConfig {
    /// Hosts here are namespaces: allows [`DUMMY`], whose confirmation is only a rehearsal.
    #[serde(default)]
    pub lab: bool,
    /// The folder the agents are in; absolute.
    #[serde(default = "default_agents_dir")]
    pub agents_dir: PathBuf,
    /// The hosts that can be fenced.
    #[serde(default, rename = "host")]
    pub hosts: Vec<HostFencing>,
}

/// How one host is fenced.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFencing {
    /// The host to be switched off.
    pub name: HostName,
    /// Tried in this order until one has confirmed.
    #[serde(rename = "level")]
    pub levels: Vec<Level>,
}

/// Devices that together take all power of the host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// All of them must confirm.
    #[serde(rename = "device")]
    pub devices: Vec<Device>,
}

/// One power switch.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name of the agent's program, `fence_…`.
    pub agent: String,
    /// Limit of each call, seconds.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
    /// Repetitions of a failed call.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// Ask for the status after `off`. Must be true: see docs/fencing.md.
    #[serde(default = "default_verify")]
    pub verify: bool,
    /// A file whose first line is the password, read at each use.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// What else the agent is told: `ip`, `username`, `plug`, …
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
}

impl Device {
    /// Limit of each call.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s)
    }
}

fn default_agents_dir() -> PathBuf {
    "/usr/sbin".into()
}
const fn default_timeout_s() -> u64 {
    40
}
const fn default_retries() -> u32 {
    1
}
const fn default_verify() -> bool {
    true
}

/// A configuration that cannot be used; the text says where, what and what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {problem}")]
pub struct BadConfig {
    at: String,
    problem: String,
}

const KEYS: [&str; 12] = [
    "lab",
    "agents_dir",
    "host",
    "name",
    "level",
    "device",
    "agent",
    "timeout_s",
    "retries",
    "verify",
    "password_file",
    "parameters",
];

impl FenceConfig {
    /// Read and check the text of a configuration.
    ///
    /// # Errors
    /// [`BadConfig`] for anything unknown, out of bounds, or that could never be proof. It
    /// never quotes a value of a parameter.
    pub fn parse(text: &str) -> Result<Self, BadConfig> {
        if text.len() > CONFIG_BYTES_MAX {
            return Err(bad(
                "the file",
                format!("longer than {CONFIG_BYTES_MAX} bytes"),
            ));
        }
        let config: Self = toml::from_str(text).map_err(|e| explain(text, &e))?;
        config.check()?;
        Ok(config)
    }

    /// How `host` is fenced, if it can be.
    #[must_use]
    pub fn host(&self, host: &HostName) -> Option<&HostFencing> {
        self.hosts.iter().find(|h| h.name == *host)
    }

    fn check(&self) -> Result<(), BadConfig> {
        if !self.agents_dir.is_absolute() {
            return Err(bad("agents_dir", "must be an absolute path"));
        }
        let mut seen = BTreeSet::new();
        for host in &self.hosts {
            let at = format!("host `{}`", host.name);
            if !seen.insert(&host.name) {
                return Err(bad(&at, "is listed twice; put all its levels into one"));
            }
            if host.levels.is_empty() || host.levels.len() > LEVELS_MAX {
                return Err(bad(&at, format!("needs 1 to {LEVELS_MAX} levels")));
            }
            for (index, level) in host.levels.iter().enumerate() {
                let at = format!("{at}, level {}", index + 1);
                if level.devices.is_empty() || level.devices.len() > DEVICES_MAX {
                    return Err(bad(&at, format!("needs 1 to {DEVICES_MAX} devices")));
                }
                for device in &level.devices {
                    self.check_device(device, &at)?;
                }
            }
        }
        Ok(())
    }

    fn check_device(&self, device: &Device, at: &str) -> Result<(), BadConfig> {
        let name = &device.agent;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        let is_agent = name.len() > "fence_".len()
            && name.len() <= 64
            && name.starts_with("fence_")
            && name.chars().all(plain);
        if !is_agent {
            let problem = "an agent's name is `fence_` and letters, digits, `_` or `-`; it is \
                           looked up in agents_dir alone";
            return Err(bad(at, format!("agent {name:?}: {problem}")));
        }
        let at = &format!("{at}, {name}");
        if let Some((_, why)) = NO_POWER.iter().find(|(agent, _)| agent == name) {
            return Err(bad(
                at,
                format!("this agent {why}: no proof that a host is dead"),
            ));
        }
        if name == DUMMY && !self.lab {
            return Err(bad(
                at,
                "switches nothing; only a file with `lab = true` may rehearse with it",
            ));
        }
        if device.timeout_s == 0 || device.timeout_s > TIMEOUT_S_MAX {
            return Err(bad(at, format!("timeout_s must be 1 to {TIMEOUT_S_MAX}")));
        }
        if device.retries > RETRIES_MAX {
            return Err(bad(at, format!("retries must be at most {RETRIES_MAX}")));
        }
        if !device.verify {
            return Err(bad(
                at,
                "verify = false: an `off` without a status that says off proves nothing; remove it",
            ));
        }
        if device
            .password_file
            .as_ref()
            .is_some_and(|p| !p.is_absolute())
        {
            return Err(bad(at, "password_file must be an absolute path"));
        }
        if device.parameters.len() > PARAMETERS_MAX {
            return Err(bad(at, format!("more than {PARAMETERS_MAX} parameters")));
        }
        for (key, value) in &device.parameters {
            check_parameter(key, value).map_err(|problem| bad(at, problem))?;
        }
        Ok(())
    }
}

fn check_parameter(key: &str, value: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if key.is_empty() || key.len() > VALUE_BYTES_MAX || !key.chars().all(plain) {
        return Err(format!(
            "parameter {key:?}: use letters, digits, `_` and `-`"
        ));
    }
    if value.len() > VALUE_BYTES_MAX || value.chars().any(char::is_control) {
        return Err(format!(
            "parameter `{key}`: longer than {VALUE_BYTES_MAX} bytes or with control characters"
        ));
    }
    let lower = key.to_ascii_lowercase().replace('-', "_");
    match lower.as_str() {
        "action" | "option" => Err(format!("parameter `{key}`: pollux sets the action itself")),
        "verbose" | "verbose_level" | "debug" | "debug_file" => Err(format!(
            "parameter `{key}`: would make the agent print its password; run it by hand for that"
        )),
        // `passwd_script` names a program and is no secret.
        _ if (lower.contains("passw") || lower.contains("secret") || lower.contains("token"))
            && !lower.ends_with("_script") =>
        {
            Err(format!(
                "parameter `{key}`: secrets do not belong here; use password_file"
            ))
        }
        _ => Ok(()),
    }
}

fn bad(at: &str, problem: impl Into<String>) -> BadConfig {
    BadConfig {
        at: at.to_owned(),
        problem: problem.into(),
    }
}

fn explain(text: &str, error: &toml::de::Error) -> BadConfig {
    let line = error.span().map_or(1, |s| {
        text.get(..s.start)
            .map_or(1, |t| t.matches('\n').count() + 1)
    });
    let message = error.message();
    let unknown = message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split('`').next());
    let problem = match unknown {
        Some(key) => {
            let near = KEYS
                .iter()
                .min_by_key(|k| strsim::damerau_levenshtein(k, key))
                .unwrap_or(&KEYS[0]);
            format!("unknown key `{key}`; did you mean `{near}`?")
        }
        // The parser may quote what it found, and that may be a password in a wrong place.
        None if message.contains("invalid") => {
            "a value of the wrong type or a syntax error".to_owned()
        }
        None => message.to_owned(),
    };
    bad(&format!("line {line}"), problem)
}

#[cfg(test)]
mod tests {
    use super::FenceConfig;

    fn parse(device: &str, head: &str) -> Result<FenceConfig, String> {
        let text = format!(
            "{head}\n[[host]]\nname = 'a'\n[[host.level]]\n[[host.level.device]]\n{device}\n"
        );
        FenceConfig::parse(&text).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_fill_in() {
        let config = parse("agent = 'fence_ipmilan'", "").unwrap();
        let device = &config.hosts[0].levels[0].devices[0];
        assert!(device.verify);
        assert_eq!((device.timeout_s, device.retries), (40, 1));
        assert_eq!(config.agents_dir.to_str(), Some("/usr/sbin"));
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let e = parse("agent = 'fence_apc'\ntimeout = 3", "").unwrap_err();
        assert!(e.contains("`timeout`; did you mean `timeout_s`?"), "{e}");
    }

    #[test]
    fn what_can_never_be_proof_is_refused() {
        for (device, says) in [
            ("agent = 'fence_dummy'", "lab = true"),
            ("agent = 'fence_kdump'", "no proof"),
            ("agent = 'fence_scsi'", "not power"),
            ("agent = 'fence_apc'\nverify = false", "proves nothing"),
        ] {
            let e = parse(device, "").unwrap_err();
            assert!(e.contains(says), "{device}: {e}");
        }
        assert!(parse("agent = 'fence_dummy'", "lab = true").is_ok());
        assert!(parse("agent = 'fence_kdump'", "lab = true").is_err());
    }

    #[test]
    fn a_path_is_no_agent() {
        for name in [
            "fence_../../bin/sh",
            "/bin/sh",
            "fence_",
            "sh",
            "fence_a b",
            "fence_\\u0000",
        ] {
            assert!(parse(&format!("agent = \"{name}\""), "").is_err(), "{name}");
        }
    }

    #[test]
    fn secrets_and_injected_lines_are_refused_without_quoting_them() {
        for parameter in [
            "password = 'hunter2'",
            "passwd = 'hunter2'",
            "snmp_priv_passwd = 'hunter2'",
            "ip = \"hunter2\\naction=on\"",
            "action = 'hunter2'",
            "verbose = 'hunter2'",
            "port = [ 'hunter2' ]",
        ] {
            let device =
                format!("agent = 'fence_apc'\n[host.level.device.parameters]\n{parameter}");
            let e = parse(&device, "").unwrap_err();
            assert!(!e.contains("hunter2"), "{e}");
        }
    }
}
