//! The simulator of whole pools: 2 to 64 hosts in virtual time, one thread, one seed.
//!
//! Every host runs the very machine that runs in a daemon ([`crate::ha::machine`]), on a clock of
//! its own rate; its reports are encoded and decoded; the statefile is the very Disk Paxos of
//! the registry over disks that fail. Around them is a model of everything else: networks,
//! disks, etcd, gateway, watchdogs, fence agents, power.
//!
//! After every event the invariants are checked against what really is, which no machine sees:
//!
//! - **one-life**: no VM may be restarted while its former host can still have effect;
//! - **one-coordinator**: nobody writes a decision about another host but the coordinator that
//!   the state names, or one that takes over with a higher term;
//! - **somebody-runs**: after a single fault at least one host runs;
//! - **innocent**: a host that no fault is about is neither given up nor reset;
//! - **ends**: what was begun against a host ends, if its death can be proved at all; and when
//!   all faults are over, all hosts are members again.
//!
//! A case of a scenario is one run; its expectations are judged at the end.

mod faults;
mod host;
mod judge;
mod paxos;
mod register;
mod run;
#[cfg(test)]
mod tests;
mod world;

pub use judge::{Seen, Times};
pub use run::{Report, Summary, run_case, run_seeds};

/// Longest time until the hosts are one pool.
pub const FORMING_MS: u64 = 60_000;
/// By then, counted from the end of all faults, all hosts are members: a watchdog that has yet to
/// fire, a boot, listening, and some turns at the registry.
pub const LIVENESS_MS: u64 = 120_000;
/// From a reset until the host has power again.
pub const BOOT_MS: u64 = 8_000;

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{invariant}, {at_ms} ms after the pool stood, seed {seed}: {what}")]
pub struct Violation {
    /// Its name.
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
    /// When.
    pub at_ms: u64,
    /// Replays it.
    pub seed: u64,
}
