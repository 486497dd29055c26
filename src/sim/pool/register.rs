//! etcd in virtual time: one register that takes effect at one moment, answers late or not at
//! all, and pauses while it chooses a leader.

use crate::ha::machine::{Input, WriteOutcome};
use crate::ha::state::PoolState;
use crate::registry::Versioned;

/// A call that has not taken effect yet.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Read,
    Write {
        expected: Option<u64>,
        state: PoolState,
    },
}

/// The register.
#[derive(Debug, Default)]
pub(super) struct Register {
    pub(super) value: Option<Versioned<PoolState>>,
    /// No leader until then.
    pub(super) paused_until: u64,
}

impl Register {
    /// The call takes effect now; its answer.
    pub(super) fn apply(&mut self, call: Call) -> Input {
        match call {
            Call::Read => Input::Read(Ok(self.value.clone())),
            Call::Write { expected, state } => {
                let at = self.value.as_ref().map(|value| value.version);
                if at != expected {
                    return Input::Written(WriteOutcome::Lost);
                }
                let version = at.unwrap_or(0) + 1;
                self.value = Some(Versioned {
                    version,
                    value: state,
                });
                Input::Written(WriteOutcome::Won { version })
            }
        }
    }
}
