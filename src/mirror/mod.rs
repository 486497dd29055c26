//! Primary and standby of a mirrored VM as pure state machines.
//!
//! One [`Primary`] drives the side that runs the VM, one [`Standby`] the side that
//! holds its copy. Neither has a clock, a thread, a socket or a file. A shell drives
//! each by the same loop: put what happened into `handle`, carry out every
//! `poll_action` **in order**, sleep until `next_wakeup` at the latest, put in `Tick`.
//! `now` is the host's monotonic clock ([`Micros`]); it must go on while the host is
//! frozen (CLOCK_BOOTTIME), and the two hosts' clocks need not agree.
//!
//! What must never happen here: output leaves before its epoch is committed; a VM is
//! promoted or goes solo without a won claim; an unknown registry outcome is taken
//! for a known one.
//!
//! # Who may run the VM
//!
//! The registry holds one [`VmRecord`] per VM. A generation is one tenure: one owner
//! and at most one standby. The rules, and why each is there:
//!
//! 1. **An attempt to mirror wins a generation of its own first** (`standby: None`),
//!    and all its epochs and acknowledgements carry it. So no two attempts share a
//!    number, and a standby left over from an earlier one can never be taken for the
//!    newest, whatever order messages and restarts come in.
//! 2. **The standby may claim only when the record names it** under its own generation.
//!    The primary writes that after the first acknowledged epoch, and releases nothing
//!    it has held since the first cut until it knows that the write is done.
//! 3. **Leaving needs a won claim** (`generation + 1`) on either side: the primary to
//!    go solo, the standby to be promoted. Both expect the same version, so one wins.
//! 4. **After an unknown outcome nobody gives up the write, they replace it**: a
//!    delayed write may land later, so the way back is another compare-and-set of the
//!    same version, never a read alone.
//! 5. **An acknowledgement is a lease.** A standby is not promoted sooner than
//!    [`Timing::lease`] after its last acknowledgement (unless the primary itself said
//!    it is gone), and a primary releases on an acknowledgement only within
//!    [`Timing::release_within`] of the moment the epoch was sent. So even a
//!    primary frozen between acknowledgement and release cannot speak after the standby does.
//!    The lease is no longer than detection and claim delay take anyway: it costs no blackout.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod flow;
mod limits;
#[cfg(test)]
mod model;
pub mod primary;
mod record;
pub(crate) mod sabotage;
pub mod schedule;
pub mod standby;

pub use flow::{Flow, LaneLevel, Limited};
pub use limits::*;
pub use primary::{
    Primary, PrimaryAction, PrimaryConfig, PrimaryInput, PrimaryState, PrimaryStatus,
};
pub use record::{BadRecord, VmRecord, record_key};
pub use schedule::{Policy, Schedule};
pub use standby::{
    Standby, StandbyAction, StandbyConfig, StandbyInput, StandbyState, StandbyStatus,
};

pub use crate::registry::Versioned;

use crate::pool::HostName;
use std::fmt;
use std::ops::{Add, Sub};

/// Microseconds: a point on a host's monotonic clock, or a length of time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// Zero.
    pub const ZERO: Self = Self(0);
    /// Later than everything.
    pub const MAX: Self = Self(u64::MAX);

    /// `n` milliseconds.
    #[must_use]
    pub const fn from_millis(n: u64) -> Self {
        Self(n * 1000)
    }

    /// From `earlier` to `self`, zero if that is negative.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl Add for Micros {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Micros {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.since(other)
    }
}

impl fmt::Debug for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} ms", self.0 / 1000, self.0 % 1000)
    }
}

/// What the failure detector says about the partner host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Its heartbeats arrive.
    Alive,
    /// Nothing was heard for the detection time.
    Lost,
}

/// Names one registry operation; its result carries the same ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// How a registry operation ended, for `Claim` as well as for `ReadRecord`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// Claim: written; the record as it is now. Never the answer to a read.
    Won(Versioned<VmRecord>),
    /// Claim: the version was not the expected one; what is there instead.
    /// Read: what is there.
    Lost(Option<Versioned<VmRecord>>),
    /// No answer; a claim may or may not have been written.
    Unreachable {
        /// The registry's own words.
        reason: String,
    },
}

/// Something an operator would be woken for, or wants to find in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alert {
    /// The registry cannot be reached; the guest stands still until it can.
    RegistryUnreachable {
        /// The registry's own words.
        reason: String,
    },
    /// The VM's record is missing from the registry; nothing is released until it is back.
    RecordMissing,
    /// A request of the operator was not carried out.
    Refused {
        /// `protect`, `unprotect` or `switchover`.
        what: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// Mirroring ended or did not begin; the VM runs on unmirrored.
    NotMirrored {
        /// Why.
        reason: String,
    },
    /// The newest committed epoch is older than the lag alarm.
    Lagging {
        /// Age of the newest committed epoch.
        lag: Micros,
    },
    /// The guest dirties more than the links carry.
    Overloaded {
        /// What is on the lane and not with the partner, bytes.
        bytes: u64,
        /// Time until it is, if known.
        drains_in: Option<Micros>,
    },
    /// The partner broke the protocol; its message was dropped.
    PartnerConfused {
        /// What it said and why that cannot be.
        reason: String,
    },
    /// Another host runs the VM now.
    Deposed {
        /// Which one, if known.
        by: HostName,
    },
    /// A checkpoint failed; the guest runs on and the next one includes it.
    CheckpointFailed {
        /// Why.
        reason: String,
    },
    /// The guest or its QEMU ended.
    GuestGone {
        /// How.
        reason: String,
    },
}
