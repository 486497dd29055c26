//! The one fact about a VM that everybody must agree on: who may run it.

use crate::pool::{Generation, HostName, VmId};
use serde::{Deserialize, Serialize};

/// Longest record in bytes: two host names and a few numbers, with room to grow.
pub const RECORD_BYTES_MAX: usize = 4096;

/// Highest generation: a thousand changes a second for two thousand years stay below.
pub const GENERATION_MAX: u64 = 1 << 56;

/// Who runs a VM. JSON in the registry under [`record_key`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    /// Raised with every change of who may run the VM.
    pub generation: Generation,
    /// The host that may run it.
    pub owner: HostName,
    /// The host that may claim it: it holds a committed epoch of this generation.
    pub standby: Option<HostName>,
    /// Whether the VM is meant to run. False after the guest has shut itself down.
    pub running: bool,
}

/// A record that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BadRecord {
    /// Larger than a record can be.
    #[error(
        "VM record is {bytes} bytes, the most is {RECORD_BYTES_MAX}; the registry value is damaged"
    )]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// A generation that none can follow.
    #[error(
        "VM record of generation {0}, the most is {GENERATION_MAX}; the registry value is damaged"
    )]
    Generation(u64),
    /// Not the JSON of a record.
    #[error(
        "VM record cannot be read: {0}; the registry value is damaged or was written by a newer pollux"
    )]
    Json(#[from] serde_json::Error),
}

/// Why a VM must not be started here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRefused {
    /// Another host is its owner and has not said that it stopped.
    #[error("host {owner} may be running it; stop it there first")]
    RunsElsewhere {
        /// That host.
        owner: HostName,
    },
    /// It ran elsewhere last.
    #[error(
        "it ran on host {owner} last, whose disks are the newest; start it there, or with --force from the disks here, which gives up what was written since they were mirrored"
    )]
    NewerElsewhere {
        /// That host.
        owner: HostName,
    },
    /// A standby is named in the record.
    #[error(
        "host {standby} holds its standby and may take over at any moment; start it there once it has, or, if both hosts were lost, with --force from the disks here, which gives up what only the standby held"
    )]
    StandbyMayTakeOver {
        /// That host.
        standby: HostName,
    },
}

/// The registry key of a VM's record.
#[must_use]
pub fn record_key(vm: VmId) -> String {
    format!("vm/{vm}")
}

impl VmRecord {
    /// The record of a VM that `me` starts, following `previous` if there is one.
    ///
    /// Whoever ran it last has its newest disks, and a named standby may hold newer writes
    /// still and take over at any moment. `force` gives such writes up; it does not help
    /// against another host that may be running the VM: that one would not notice.
    ///
    /// # Errors
    /// [`StartRefused`].
    pub fn start(
        me: &HostName,
        previous: Option<&Self>,
        force: bool,
    ) -> Result<Self, StartRefused> {
        if let Some(Self {
            owner,
            standby,
            running,
            ..
        }) = previous
        {
            if owner != me && *running {
                return Err(StartRefused::RunsElsewhere {
                    owner: owner.clone(),
                });
            }
            if owner != me && !force {
                return Err(StartRefused::NewerElsewhere {
                    owner: owner.clone(),
                });
            }
            if let (Some(standby), true, false) = (standby, running, force) {
                return Err(StartRefused::StandbyMayTakeOver {
                    standby: standby.clone(),
                });
            }
        }
        Ok(Self::started(me.clone(), previous))
    }

    /// The record once `owner` has started the VM, for who has found that it may.
    #[must_use]
    pub fn started(owner: HostName, previous: Option<&Self>) -> Self {
        Self {
            generation: previous.map_or(Generation(1), |record| record.generation.next()),
            owner,
            standby: None,
            running: true,
        }
    }

    /// As JSON.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has only strings and numbers")
    }

    /// From JSON.
    ///
    /// # Errors
    /// [`BadRecord`] if it is too long or not a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadRecord> {
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(BadRecord::TooLong { bytes: bytes.len() });
        }
        let record: Self = serde_json::from_slice(bytes)?;
        if record.generation.0 > GENERATION_MAX {
            return Err(BadRecord::Generation(record.generation.0));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    #[test]
    fn a_record_survives_its_own_json() {
        let record = VmRecord {
            generation: Generation(7),
            owner: host("a"),
            standby: Some(host("b")),
            running: true,
        };
        assert_eq!(VmRecord::from_bytes(&record.to_bytes()).unwrap(), record);
    }

    #[test]
    fn damaged_records_are_refused() {
        for bad in [
            &b""[..],
            b"{}",
            b"{\"generation\":1,\"owner\":\"A\",\"standby\":null,\"running\":true}",
        ] {
            assert!(VmRecord::from_bytes(bad).is_err());
        }
        let last = b"{\"generation\":18446744073709551615,\"owner\":\"a\",\"standby\":null,\"running\":true}";
        assert!(matches!(
            VmRecord::from_bytes(last),
            Err(BadRecord::Generation(u64::MAX))
        ));
        assert!(matches!(
            VmRecord::from_bytes(&[b' '; 5000]),
            Err(BadRecord::TooLong { bytes: 5000 })
        ));
    }

    #[test]
    fn a_start_is_refused_where_newer_state_may_be() {
        let (a, b) = (host("a"), host("b"));
        let first = VmRecord::start(&a, None, false).unwrap();
        assert_eq!(first.generation, Generation(1));
        let again = VmRecord::start(&a, Some(&first), false).unwrap();
        assert_eq!(again.generation, Generation(2));
        let elsewhere = StartRefused::RunsElsewhere { owner: a.clone() };
        assert_eq!(VmRecord::start(&b, Some(&first), true), Err(elsewhere));
        let stopped = VmRecord {
            running: false,
            ..first.clone()
        };
        assert_eq!(
            VmRecord::start(&b, Some(&stopped), false),
            Err(StartRefused::NewerElsewhere { owner: a.clone() })
        );
        assert_eq!(VmRecord::start(&b, Some(&stopped), true).unwrap().owner, b);
        let mirrored = VmRecord {
            standby: Some(b.clone()),
            ..first
        };
        assert_eq!(
            VmRecord::start(&a, Some(&mirrored), false),
            Err(StartRefused::StandbyMayTakeOver { standby: b })
        );
        assert_eq!(
            VmRecord::start(&a, Some(&mirrored), true).unwrap().standby,
            None
        );
    }
}
