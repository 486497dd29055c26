//! Making sure that a host is dead: power fencing by fence agents, self-fencing by a
//! watchdog, and what an isolated host does with its VMs meanwhile.
//!
//! It decides nothing about who is to die; it does what it is told and says truthfully
//! what came of it. The invariant: [`job::Outcome::Confirmed`] is returned only if every
//! device of a level has done `off` **and afterwards** said in `status` that it is off;
//! all else (a success without that, a rehearsal, a cancelled run) is a different variant.
//! docs/fencing.md argues what counts as proof.
//!
//! [`config`], [`metadata`] and [`isolation`] are pure; [`agent`], [`job`] and
//! [`watchdog`] touch the world.

pub mod agent;
pub mod config;
pub mod isolation;
pub mod job;
pub mod metadata;
#[cfg(test)]
mod tests;
pub mod watchdog;
