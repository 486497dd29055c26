//! The deterministic simulator of a mirrored pair.
//!
//! Two hosts run the very machines of [`crate::mirror`] against a model of everything
//! else: guests (some dirty more than the link carries), the network between the hosts, heartbeats, the registry, an operator and
//! a client outside. One thread, virtual time, one seed that decides everything. A safety
//! phase with faults of every kind is followed by a liveness phase: all faults end, and
//! the VM must run, be mirrored and answer again.
//!
//! After every event the invariants are checked against what really is, which no machine
//! can see. The first violation ends the run and is returned with its name.

mod check;
mod fault;
mod guest;
mod lane;
mod outside;
pub mod pool;
mod registry;
mod rng;
pub mod scenario;
mod shell;
#[cfg(test)]
mod tests;
mod wire;
mod world;

pub use guest::{Guest, GuestState};
pub use rng::Rng;
pub use world::World;

use crate::mirror::Micros;

/// Length of the safety phase.
pub const SAFETY_PHASE: Micros = Micros::from_millis(4000);

/// The liveness phase lasts at least this long, so that what a slow link does to a mirror
/// shows.
pub const LIVENESS_LEAST: Micros = Micros::from_millis(12_000);

/// Share of the time mirrored without a fault, per mille, in which the lag may be over its
/// alarm: the guest may surprise the link once, and then the epoch under way has to get
/// through, for three seconds at most.
pub const OVER_ALARM_PERMILLE_MAX: u64 = 350;

/// The shares of less time than this say nothing.
pub const SHARE_OF_LEAST: Micros = Micros::from_millis(6000);

/// By then, counted from the end of all faults, the VM must be mirrored and answer: an
/// orphaned standby waits 10 s, a lost request to prepare one 30 s, everything else less.
pub const LIVENESS_BOUND: Micros = Micros::from_millis(60_000);

/// Most events of one run, some ten times what a long one takes.
pub const EVENTS_MAX: u64 = 5_000_000;

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{invariant} at {at:?}, seed {seed}: {what}\nreplay: POLLUX_SEED={seed} cargo test -p pollux --lib sim::"
)]
pub struct Violation {
    /// Its name in the design.
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
    /// When, in virtual time.
    pub at: Micros,
    /// Replays it.
    pub seed: u64,
}

/// What a run did, to see that runs are not empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events handled.
    pub events: u64,
    /// Epochs cut.
    pub cuts: u64,
    /// Promotions.
    pub promotions: u64,
    /// Times a primary went solo from a mirror.
    pub solos: u64,
    /// Times a guest was held back for the link's sake.
    pub holds: u64,
    /// Answers the client saw.
    pub answers: u64,
    /// Faults injected.
    pub faults: u64,
    /// VMs lost because nothing held them any more, and started anew.
    pub restarts: u64,
    /// Digest of all that happened: equal for equal seeds.
    pub digest: u64,
}

/// Run one seed.
///
/// # Errors
/// The first [`Violation`].
pub fn run(seed: u64) -> Result<Report, Violation> {
    World::new(seed).run()
}
