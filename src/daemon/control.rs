//! What the two sides of a mirrored VM say to each other on the control lane.
//!
//! So do two hosts about their own keys. JSON in a control frame whose header carries the VM and the sender's generation.
//! Epochs and their acknowledgements are frames of their own; nothing here is per epoch.

use interconnect::identity::Fingerprint;
use serde::{Deserialize, Serialize};

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ControlMsg {
    /// Primary to standby host: make a standby for this VM and wait.
    Prepare {
        /// The whole spec, TOML.
        spec: String,
        /// The versioned machine type the primary runs.
        machine: String,
        /// Accelerator of the primary's QEMU.
        accel: String,
        /// QEMU version of the primary.
        qemu: String,
    },
    /// Standby to primary: its QEMU waits for an incoming state.
    Ready,
    /// Standby to primary: it cannot, and why.
    Refused {
        /// What failed, on what, and what to do.
        reason: String,
    },
    /// Standby to primary: it was ready, and is no more.
    StandbyGone {
        /// Why.
        reason: String,
    },
    /// Standby to primary's host, whenever a session comes up: it is still here. A host
    /// that does not run the VM (its daemon was restarted) answers `PrimaryGone`.
    StandbyHere,
    /// Primary to standby: the registry's record names it; from here it may claim.
    MirrorConfirmed {
        /// The epoch from which on it is mirrored.
        epoch: u64,
    },
    /// Primary to standby: the record names it the owner; go on from this epoch.
    Handover {
        /// The last epoch.
        epoch: u64,
    },
    /// Primary to standby: guest or QEMU is gone here; take over now.
    PrimaryGone {
        /// Why.
        reason: String,
    },
    /// Primary to standby: not needed any more.
    Dismiss,
    /// Host to partner, about no VM: it shows `present` and is going to show `next`. Pin
    /// both, and answer `NewKeyPinned`.
    NewKey {
        /// Of the identity in use.
        present: Fingerprint,
        /// Of the identity to come.
        next: Fingerprint,
    },
    /// The answer, once the pin would survive a crash.
    NewKeyPinned {
        /// The one asked for.
        next: Fingerprint,
    },
    /// Host to partner, about no VM: from now on it shows this identity and no other. Drop
    /// every other pin of it.
    OnlyKey {
        /// Of the identity in use.
        present: Fingerprint,
    },
}

impl ControlMsg {
    /// As the payload of a control frame.
    #[must_use]
    pub fn to_bytes(&self) -> bytes::Bytes {
        serde_json::to_vec(self)
            .expect("a message of strings and numbers always serialises")
            .into()
    }

    /// From the payload of a control frame.
    ///
    /// # Errors
    /// The parser's words; the frame is dropped and the sender named in the log.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::ControlMsg;

    #[test]
    fn round_trip_and_refusal() {
        let message = ControlMsg::Handover { epoch: 7 };
        assert_eq!(ControlMsg::from_bytes(&message.to_bytes()), Ok(message));
        assert!(ControlMsg::from_bytes(b"{\"say\":\"jump\"}").is_err());
        assert!(ControlMsg::from_bytes(&[0xff; 40]).is_err());
    }
}
