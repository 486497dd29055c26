//! What a pool is for the planner: hosts, VMs, groups, policy. Written in TOML or JSON.
//!
//! Must never: hold a pool whose references do not resolve. [`Pool::parse`] and
//! [`Pool::check`] are the only ways in; the rest of the room relies on names that exist,
//! sizes that cannot overflow a sum, and dependencies without cycles.

mod check;
mod units;

pub use check::Fault;
pub use units::{Bytes, Seconds, Vcpus};

use crate::pool::HostName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Most hosts; sets of hosts are one machine word.
pub const HOSTS_MAX: usize = 64;
/// Most VMs.
pub const VMS_MAX: usize = 16_384;
/// Most groups.
pub const GROUPS_MAX: usize = 4_096;
/// Most kinds of devices in one pool: each is one more dimension of the packing.
pub const DEVICE_KINDS_MAX: usize = 5;
/// Longest pool file, in bytes: 16,384 VMs written out at length are about 6 MiB.
pub const TEXT_BYTES_MAX: usize = 16 << 20;
/// Most memory of a host or VM: with [`VMS_MAX`] VMs no sum overflows 64 bits.
pub const MEMORY_MAX: Bytes = Bytes(64 << 40);
/// Most vCPUs of a host or VM, and most devices of a kind.
pub const COUNT_MAX: u32 = 1 << 20;
const _: () = assert!(MEMORY_MAX.0.checked_mul(4 * VMS_MAX as u64).is_some());
const _: () = assert!(HOSTS_MAX <= u64::BITS as usize);

/// A pool as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// How many simultaneous failures are to be survived.
    #[serde(default)]
    pub tolerate: u32,
    /// What fails at once.
    #[serde(default)]
    pub fails: Fails,
    /// What is allowed in an emergency.
    #[serde(default)]
    pub policy: Policy,
    /// The hosts.
    #[serde(default, rename = "host")]
    pub hosts: Vec<Host>,
    /// The VMs.
    #[serde(default, rename = "vm", skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<Vm>,
    /// VMs that belong together or apart.
    #[serde(default, rename = "group", skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
}

/// What one failure takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fails {
    /// One host.
    #[default]
    Host,
    /// All hosts of one failure domain; a host without a domain is one of its own.
    Domain,
}

/// What is allowed in an emergency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// A change that makes the pool overcommitted is warned of instead of refused.
    #[serde(default)]
    pub allow_overcommit: bool,
    /// As a last resort, running VMs are shrunk to their `min_memory`.
    #[serde(default)]
    pub shrink: bool,
    /// As a last resort, running best-effort VMs are stopped.
    #[serde(default)]
    pub stop_best_effort: bool,
    /// How many VMs one host starts at the same time; absent: 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starts_per_host: Option<u32>,
}

/// Whether a host takes part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Runs VMs and takes restarts.
    #[default]
    Live,
    /// What runs on it goes on; nothing is started on it.
    Maintenance,
    /// Dead; its VMs are to be placed with every further failure.
    Failed,
}

/// One host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name.
    pub name: HostName,
    /// All its memory.
    pub memory: Bytes,
    /// Of it, what is not for VMs: the kernel, daemons, QEMU's own needs.
    #[serde(default, skip_serializing_if = "Bytes::is_zero")]
    pub overhead: Bytes,
    /// Of it, set aside as huge pages; only VMs with `hugepages` use it.
    #[serde(default, skip_serializing_if = "Bytes::is_zero")]
    pub hugepages: Bytes,
    /// How many vCPUs it may run; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<Vcpus>,
    /// Whether it takes part.
    #[serde(default)]
    pub state: HostState,
    /// Rack, power feed: what fails together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// How many devices of each kind it can give to VMs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, u32>,
}

/// How a VM is protected; the words of a VM spec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protection {
    /// Dies with its host.
    None,
    /// Started again on a host with room.
    #[default]
    Restart,
    /// Started again on its partner, which holds memory for it.
    Reserved,
    /// A standby on its partner goes on at once.
    Mirrored,
}

impl Protection {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Restart => "restart",
            Self::Reserved => "reserved",
            Self::Mirrored => "mirrored",
        }
    }

    /// Whether a partner holds memory for it.
    #[must_use]
    pub const fn has_standby(self) -> bool {
        matches!(self, Self::Reserved | Self::Mirrored)
    }
}

/// Whether a VM may be left down; the words of a VM spec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Priority {
    /// It is to run again.
    #[default]
    Always,
    /// If room is left.
    BestEffort,
}

impl Priority {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::BestEffort => "best-effort",
        }
    }
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub memory: Bytes,
    /// What it can be shrunk to; absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_memory: Option<Bytes>,
    /// Its vCPUs.
    #[serde(default = "one_vcpu", skip_serializing_if = "is_one_vcpu")]
    pub vcpus: Vcpus,
    /// Whether its memory is huge pages.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hugepages: bool,
    /// How it is protected.
    #[serde(default)]
    pub protection: Protection,
    /// Whether it may be left down.
    #[serde(default)]
    pub priority: Priority,
    /// Of VMs of one priority, lower orders start first and matter more.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub order: u32,
    /// From its start until VMs of a higher order are started.
    #[serde(default, skip_serializing_if = "Seconds::is_zero")]
    pub delay_s: Seconds,
    /// VMs that start before it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Where it runs; absent: it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// Where its standby or its reservation is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<HostName>,
    /// The hosts that reach its disks and networks; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<HostName>>,
    /// Devices of its host that it is given, by kind.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, u32>,
}

fn one_vcpu() -> Vcpus {
    Vcpus(1)
}
#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_one_vcpu(vcpus: &Vcpus) -> bool {
    vcpus.0 == 1
}
#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// How the VMs of a group lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// Those that restart go to one host: to where another of them still runs, if one does.
    Together,
    /// None restarts where another of them runs.
    Apart,
}

/// VMs that belong together or apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// How they lie.
    pub rule: Rule,
    /// Their names.
    pub vms: Vec<String>,
}

/// A pool that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The text is no pool.
    #[error("{origin}: {what}")]
    Text {
        /// Which file.
        origin: String,
        /// What is wrong, with its line where known.
        what: String,
    },
    /// It reads well and contradicts itself.
    #[error("{origin}: {} wrong with this pool:{}", things(.faults.len()), Faults(.faults))]
    Faults {
        /// Which file.
        origin: String,
        /// All that was found.
        faults: Vec<Fault>,
    },
}

fn things(n: usize) -> String {
    if n == 1 {
        "one thing is".into()
    } else {
        format!("{n} things are")
    }
}

/// Faults that are printed; the rest is counted.
const FAULTS_SHOWN: usize = 20;

struct Faults<'a>(&'a [Fault]);
impl fmt::Display for Faults<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in self.0.iter().take(FAULTS_SHOWN) {
            write!(f, "\n  {fault}")?;
        }
        match self.0.len().saturating_sub(FAULTS_SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

impl Pool {
    /// Read a pool: JSON if the text begins with `{`, TOML otherwise. `origin` is named in errors.
    ///
    /// # Errors
    /// [`PoolError`] with the place in the text, or with every contradiction found.
    pub fn parse(text: &str, origin: &str) -> Result<Self, PoolError> {
        let bad = |what: String| PoolError::Text {
            origin: origin.to_owned(),
            what,
        };
        if text.len() > TEXT_BYTES_MAX {
            return Err(bad(format!(
                "{} bytes are more than the {TEXT_BYTES_MAX} a pool file may have",
                text.len()
            )));
        }
        let pool: Self = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|e| bad(e.to_string()))?
        } else {
            toml::from_str(text).map_err(|e| bad(e.to_string().trim_end().to_owned()))?
        };
        let faults = pool.check();
        if faults.is_empty() {
            return Ok(pool);
        }
        Err(PoolError::Faults {
            origin: origin.to_owned(),
            faults,
        })
    }

    /// Everything about it that does not hold; empty if it can be planned.
    #[must_use]
    pub fn check(&self) -> Vec<Fault> {
        check::faults(self)
    }

    /// What is odd about it and no reason to refuse it, one sentence each.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        check::remarks(self)
    }

    /// As TOML that [`Pool::parse`] reads back to the same pool.
    #[must_use]
    pub fn to_toml(&self) -> String {
        // Plain data with string keys: cannot fail.
        toml::to_string(self).unwrap_or_default()
    }

    /// As JSON that [`Pool::parse`] reads back to the same pool.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Plain data with string keys: cannot fail.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// The host of this name.
    #[must_use]
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name.as_str() == name)
    }

    /// The VM of this name.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<&Vm> {
        self.vms.iter().find(|vm| vm.name == name)
    }
}

#[cfg(test)]
mod tests;
