//! The side that holds the copy.
//!
//! Must never acknowledge what it does not hold whole, never acknowledge once it has
//! begun to claim, and never be promoted without a won claim, with an epoch missing, or
//! within the lease of its last acknowledgement. Invariant: `applied <= acked <= whole`.
//!
//! ```text
//!              ShellReady          EpochWhole(1)            MirrorConfirmed
//!   Preparing -----------> Seeding -------------> Unconfirmed -------------> Mirrored
//!       |                     |                        |                     |   ^
//!       | failed, dismissed,  |           primary lost |        primary lost |   | alive again
//!       v primary lost        v                        v                     v   |
//!   StoodDown <------------------------------------ Checking              Suspecting
//!       ^   ^   not named for orphan_patience          | named               | delay over, or
//!       |   |                                          v                     | it said so
//!       |   +----------- lost --------------------- Claiming <---------------+
//!       |                                              | won (or handed over)
//!       +----- failed ------- Promoting <--------------+
//!                                 | Promoted
//!                                 v
//!                             Promoted
//! ```

mod machine;
mod registry;
mod state;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod view;

pub use machine::Standby;
pub use state::{STANDBY_TRANSITIONS, StandbyState};

use super::{Alert, ClaimOutcome, Micros, Ticket, Timing, Verdict, Versioned, VmRecord};
use crate::pool::{Epoch, Generation, HostName};

/// What a standby is told once.
#[derive(Clone, Debug)]
pub struct StandbyConfig {
    /// This host.
    pub me: HostName,
    /// The host that runs the VM.
    pub primary: HostName,
    /// The attempt, as in `PrepareStandby`.
    pub generation: Generation,
    /// The pair's times.
    pub timing: Timing,
    /// As [`super::PrimaryConfig::max_in_flight`]; more unacknowledged epochs are refused.
    pub max_in_flight: usize,
}

/// What happened, for [`Standby::handle`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StandbyInput {
    /// Time has passed.
    Tick,
    /// The interconnect carries epochs.
    LinkUp,
    /// The interconnect carries nothing. Alone it is no proof of anything: the failure
    /// detector's verdict decides.
    LinkDown {
        /// Why.
        reason: String,
    },
    /// The failure detector's word on the primary's host.
    PeerVerdict(Verdict),
    /// The standby QEMU waits; seeding may begin.
    ShellReady,
    /// It cannot be made ready.
    ShellFailed {
        /// Why.
        reason: String,
    },
    /// Buffered apart, complete and verified (and, by policy, durable). Epoch 1 comes
    /// with everything seeded before it.
    EpochWhole {
        /// The attempt it belongs to.
        generation: Generation,
        /// Which one.
        epoch: Epoch,
    },
    /// An epoch's digest does not hold, or it broke a limit; it was dropped.
    EpochBad {
        /// Which one.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Memory and disk are those of this epoch's checkpoint.
    Applied {
        /// Which one.
        epoch: Epoch,
    },
    /// The primary says that the record names this host.
    MirrorConfirmed {
        /// The attempt.
        generation: Generation,
        /// The newest committed epoch.
        epoch: Epoch,
    },
    /// The primary says that the record names this host as owner.
    Handover {
        /// The generation to run under.
        generation: Generation,
        /// The epoch to run from.
        epoch: Epoch,
    },
    /// The primary itself says that its guest is dead.
    PrimaryGone {
        /// Why.
        reason: String,
    },
    /// The primary needs no standby any more.
    Dismissed,
    /// Answer to [`StandbyAction::Claim`] or [`StandbyAction::ReadRecord`].
    ClaimResult {
        /// As in the action.
        ticket: Ticket,
        /// How it ended.
        outcome: ClaimOutcome,
    },
    /// The guest runs here.
    Promoted,
    /// It does not and will not.
    PromotionFailed {
        /// Why.
        reason: String,
    },
    /// The standby QEMU died.
    StandbyGuestDied {
        /// How.
        reason: String,
    },
    /// This process did not run for that long.
    SelfStalled {
        /// How long.
        for_: Micros,
    },
}

/// Why a standby ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StandbyEnd {
    /// The primary needs none any more.
    Dismissed,
    /// The record names somebody else, or not this host.
    NotNamed {
        /// For the log.
        reason: String,
    },
    /// The standby cannot do its work; the primary should be told (`StandbyGone`).
    Broken {
        /// What broke.
        reason: String,
    },
}

/// What the shell has to do, in order, from [`Standby::poll_action`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StandbyAction {
    /// Tell the primary that seeding may begin.
    TellReady,
    /// Tell the primary that everything up to this epoch is here, whole.
    Ack {
        /// The attempt.
        generation: Generation,
        /// The newest whole epoch.
        epoch: Epoch,
    },
    /// Put this epoch into memory and disk. Answer: `Applied`.
    Apply {
        /// Which one; in order, one at a time.
        epoch: Epoch,
    },
    /// Throw away what has arrived of epochs that were not acknowledged, and accept no more.
    DropIncomplete,
    /// Compare-and-set the VM's record. Answer: `ClaimResult`.
    Claim {
        /// Comes back in the answer.
        ticket: Ticket,
        /// The version it must be at.
        expected: u64,
        /// What to write.
        value: VmRecord,
    },
    /// Read the VM's record. Answer: `ClaimResult` with `Lost` (what is there) or `Unreachable`.
    ReadRecord {
        /// Comes back in the answer.
        ticket: Ticket,
    },
    /// Run the VM from this epoch. Everything through it is applied. Answer: `Promoted`
    /// or `PromotionFailed`. Afterwards a [`super::Primary`] is made with `record`.
    Promote {
        /// The generation to run under.
        generation: Generation,
        /// The epoch to run from.
        epoch: Epoch,
        /// The record as the registry has it.
        record: Versioned<VmRecord>,
    },
    /// Kill the standby QEMU, give everything back. Nothing follows.
    StandDown {
        /// Why; for `Broken` tell the primary `StandbyGone`.
        why: StandbyEnd,
    },
    /// Tell the primary `StandbyGone`: no more is acknowledged. The copy stays, though, until
    /// the primary has dismissed it or is lost and it is promoted.
    TellBroken {
        /// What broke.
        reason: String,
    },
    /// Tell the operator.
    Alert(Alert),
}

/// What is, for `pollux status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Where the machine is.
    pub state: StandbyState,
    /// The attempt, or after a won claim the generation run under.
    pub generation: Generation,
    /// The newest acknowledged epoch.
    pub acked: Epoch,
    /// The newest applied epoch.
    pub applied: Epoch,
    /// Since the newest acknowledgement.
    pub since_ack: Option<Micros>,
}
