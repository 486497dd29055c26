//! The one fact about a VM that everybody must agree on: who may run it.

use crate::pool::{Generation, HostName, VmId};
use serde::{Deserialize, Serialize};

/// Longest record in bytes: two host names and a few numbers, with room to grow.
pub const RECORD_BYTES_MAX: usize = 4096;

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
    /// Not the JSON of a record.
    #[error(
        "VM record cannot be read: {0}; the registry value is damaged or was written by a newer pollux"
    )]
    Json(#[from] serde_json::Error),
}

/// The registry key of a VM's record.
#[must_use]
pub fn record_key(vm: VmId) -> String {
    format!("vm/{vm}")
}

impl VmRecord {
    /// The record of a VM that `owner` starts, following `previous` if there is one.
    #[must_use]
    pub fn started(owner: HostName, previous: Option<&Self>) -> Self {
        let generation = previous.map_or(Generation(1), |record| record.generation.next());
        Self {
            generation,
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
        Ok(serde_json::from_slice(bytes)?)
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
        assert!(matches!(
            VmRecord::from_bytes(&[b' '; 5000]),
            Err(BadRecord::TooLong { bytes: 5000 })
        ));
    }

    #[test]
    fn each_start_has_its_own_generation() {
        let first = VmRecord::started(host("a"), None);
        assert_eq!(first.generation, Generation(1));
        assert_eq!(
            VmRecord::started(host("b"), Some(&first)).generation,
            Generation(2)
        );
    }
}
