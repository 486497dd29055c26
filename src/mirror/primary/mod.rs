//! The side that runs the VM.
//!
//! Must never release output of an epoch that is not committed, nor go solo without a
//! won claim. Invariant: `released <= committed <= cut`, and output is held from the
//! first cut of an attempt until [`PrimaryAction::GoSolo`].
//!
//! ```text
//!         Protect            won            StandbyReady        SeedingConverged
//!   Solo ---------> Reserving ---> Preparing ----------> Seeding ----------> FirstEpoch
//!    ^ ^               |               |                    |                 |     |
//!    | +---------------+---------------+--------------------+-----------------+     | Acked(1)
//!    |                       any failure before the record names the standby        v
//!    |                                                                          Confirming
//!    |   won       partner lost, Unprotect      won                                 |
//!    +------ Claiming <-------------- Mirrored <------------------------------------+
//!               ^  |                    |  ^   (partner lost here too: Claiming)
//!               |  | deposed            |  | cut failed
//!               |  v         Switchover v  |
//!               | StoodDown <-- HandingOver <-- LastEpoch
//!               +-------------------+---------------+  partner lost
//! ```
//!
//! From every state: guest shut down -> Ending -> StoodDown, guest died -> StoodDown.

mod epochs;
mod leave;
mod machine;
mod registry;
mod state;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod view;

pub use machine::Primary;
pub use state::{PRIMARY_TRANSITIONS, PrimaryState};

use super::{
    Alert, ClaimOutcome, LaneLevel, Limited, Micros, Policy, Ticket, Timing, Verdict, VmRecord,
};
use crate::pool::{Epoch, Generation, HostName};

/// What a primary is told once.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// This host.
    pub me: HostName,
    /// The pair's times.
    pub timing: Timing,
    /// When to cut; may be changed live by [`PrimaryInput::SetPolicy`].
    pub policy: Policy,
    /// Epochs sent and not yet acknowledged; [`super::MAX_IN_FLIGHT`] unless there is a reason.
    pub max_in_flight: usize,
}

/// Which buffer nears its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PressureKind {
    /// Packets in the egress gate.
    Gate,
    /// Writes in the overlay.
    Overlay,
    /// Dirty memory, as estimated.
    Memory,
}

/// What happened, for [`Primary::handle`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrimaryInput {
    /// Time has passed.
    Tick,
    /// The operator wants the VM mirrored to `partner`.
    Protect {
        /// The other host of the pair.
        partner: HostName,
    },
    /// The operator wants the VM no longer mirrored.
    Unprotect,
    /// The operator wants the roles swapped.
    Switchover,
    /// The operator changed the schedule.
    SetPolicy(Policy),
    /// The interconnect carries epochs again; what was sent and not acknowledged is re-sent by it.
    LinkUp,
    /// The interconnect carries nothing.
    LinkDown {
        /// Why.
        reason: String,
    },
    /// The failure detector's word on the partner.
    PeerVerdict(Verdict),
    /// The standby's QEMU waits and its shell can take seeding.
    StandbyReady,
    /// The partner will not hold a standby.
    StandbyRefused {
        /// Why.
        reason: String,
    },
    /// The standby is no more.
    StandbyGone {
        /// Why.
        reason: String,
    },
    /// Little enough is left to copy: the first cut will be short.
    SeedingConverged,
    /// Seeding cannot go on.
    SeedingFailed {
        /// Why.
        reason: String,
    },
    /// The gate or the overlay holds something of the running epoch that somebody waits for.
    OutputWaiting,
    /// A buffer nears its limit.
    Pressure(PressureKind),
    /// How the epoch lane stands; to be told at least every few ms while an epoch is under way.
    Lane(LaneLevel),
    /// What the busiest vCPU wanted of a core, fed at or just before each `CutDone`.
    GuestBusy {
        /// Time it ran or waited for a core, per mille of the time it was allowed to: 0 to 1000.
        permille: u16,
        /// How long a cut's work kept it from a core, besides the pause.
        crowding: Micros,
    },
    /// No vCPU has anything to do at this moment; asked for by [`Primary::awaits_idle`].
    GuestIdle,
    /// The cut is taken and the guest runs on (or stands, if `stay_stopped`).
    CutDone {
        /// As in [`PrimaryAction::Cut`].
        epoch: Epoch,
        /// How long the guest stood still.
        pause: Micros,
        /// Bytes to send, before encoding.
        bytes: u64,
        /// Dirty pages.
        pages: u64,
    },
    /// The cut was not taken; the guest runs on in the same epoch, and every page the
    /// failed cut had collected still counts as dirty.
    CutFailed {
        /// As in [`PrimaryAction::Cut`].
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// The epoch's closing frame is about to be handed to the link. Optional: without it
    /// the lease of rule 5 counts from the cut, which big epochs on slow links may outlast.
    Sent {
        /// Which one.
        epoch: Epoch,
        /// Just before it was handed over, whenever this is told: told late, the lease
        /// must not count from the telling.
        at: Micros,
    },
    /// The epoch cannot be sent.
    SendFailed {
        /// Which one.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// The standby holds everything up to this epoch whole.
    Acked {
        /// The attempt it speaks of.
        generation: Generation,
        /// The newest whole epoch.
        epoch: Epoch,
    },
    /// Answer to [`PrimaryAction::Claim`] or [`PrimaryAction::ReadRecord`].
    ClaimResult {
        /// As in the action.
        ticket: Ticket,
        /// How it ended.
        outcome: ClaimOutcome,
    },
    /// This process did not run for that long.
    SelfStalled {
        /// How long.
        for_: Micros,
    },
    /// QEMU or the guest died.
    GuestDied {
        /// How.
        reason: String,
    },
    /// The guest powered itself off, or the operator did.
    GuestShutdown,
}

/// Why a primary ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrimaryEnd {
    /// Another host runs the VM.
    Deposed {
        /// Which.
        by: HostName,
    },
    /// The partner took over as planned.
    HandedOver {
        /// The new owner.
        to: HostName,
    },
    /// There is no guest any more.
    GuestGone,
}

/// What the shell has to do, in order, from [`Primary::poll_action`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrimaryAction {
    /// Ask the partner for a standby; it answers with `StandbyReady` or `StandbyRefused`.
    PrepareStandby {
        /// Whom.
        partner: HostName,
        /// The attempt: every epoch and acknowledgement carries it.
        generation: Generation,
    },
    /// Copy memory and disk live until `SeedingConverged`.
    BeginSeeding,
    /// Stop copying.
    EndSeeding {
        /// Why.
        reason: String,
    },
    /// Take a checkpoint that ends `epoch`, send it. The first one (epoch 1) begins
    /// holding output and writes. Answer: `CutDone` or `CutFailed`.
    Cut {
        /// The epoch it ends; counts from 1 in each attempt.
        epoch: Epoch,
        /// Leave the guest stopped afterwards.
        stay_stopped: bool,
    },
    /// Let packets up to and including this epoch leave, write its overlay to the own disk.
    Release {
        /// The newest epoch to release; all older ones with it.
        through: Epoch,
        /// Look at the clock once more just before the first packet leaves: from this
        /// moment on release nothing and put in `SelfStalled` (rule 5). A later `Release`
        /// covers what was left.
        until: Micros,
    },
    /// Tell the standby that the record names it: it may claim from here.
    ConfirmMirrored {
        /// The attempt.
        generation: Generation,
        /// The newest committed epoch.
        epoch: Epoch,
    },
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
    /// Stop the vCPUs: whether the VM may run cannot be found out.
    HoldStill {
        /// For the operator.
        reason: String,
    },
    /// Run the vCPUs again (after `HoldStill` or a cut with `stay_stopped`).
    Resume,
    /// Stop the vCPUs for the links' sake, until `LetGo`: soon, and again and again.
    HoldBack,
    /// Run the vCPUs again after `HoldBack`.
    LetGo,
    /// Release everything that is held; from here packets and writes go direct.
    GoSolo {
        /// The generation the VM runs under.
        generation: Generation,
    },
    /// Tell the partner that its standby is not needed any more.
    DismissStandby,
    /// Tell the partner that the record names it as owner.
    Handover {
        /// The generation it runs under.
        generation: Generation,
        /// The epoch it runs from.
        epoch: Epoch,
    },
    /// Tell the partner that this side's guest is dead: it should claim at once.
    TellGone {
        /// Why.
        reason: String,
    },
    /// Kill QEMU, discard what is held. Nothing follows.
    StandDown {
        /// Why.
        why: PrimaryEnd,
    },
    /// Tell the operator.
    Alert(Alert),
}

/// What is, for `pollux status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimaryStatus {
    /// Where the machine is.
    pub state: PrimaryState,
    /// The generation the VM runs under (of the attempt, once one has begun).
    pub generation: Generation,
    /// The partner, if there is or is to be one.
    pub partner: Option<HostName>,
    /// The running epoch; 0 while unmirrored.
    pub epoch: Epoch,
    /// The newest epoch the standby has acknowledged.
    pub committed: Epoch,
    /// Age of the newest committed epoch: since its cut began. `None` before the first.
    pub lag: Option<Micros>,
    /// True only in `Mirrored` (or switching over from it), with a lag below the alarm.
    pub mirrored: bool,
    /// True while the guest stands still for want of a registry.
    pub holding_still: bool,
    /// How the links bound the VM, if they do.
    pub limited: Option<Limited>,
    /// Why the last attempt to mirror ended, if it did.
    pub last_reason: Option<String>,
}
