//! Who is alive, and who may go on: the pure half of high availability.
//!
//! ```text
//!  reports of all hosts --> detector --> live set --> machine --> claims on the pool state
//!  registry reads ----------------------------^          |-----> power fencing, proofs
//!  own reports <-------- lease <-------------------------'-----> "its VMs may restart"
//! ```
//!
//! A host reports with every heartbeat whom it hears and what it reaches ([`report`]); from
//! the reports follows who is in, the same wherever the same reports are ([`liveset`]). Nothing
//! is done by that alone: a host is only given up by a won compare-and-set of the pool state
//! ([`state`]), and its VMs may be restarted only once its death is proved. A host goes on
//! only with a [`lease`], and what proves that a lease has ended is argued there.
//!
//! Must never: look at a clock, compare the times of two hosts, take silence for death.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod deciding;
pub mod detector;
pub mod lease;
pub mod liveset;
pub mod machine;
mod pact;
mod race;
pub mod report;
pub mod restart;
pub(crate) mod sabotage;
pub mod state;
pub mod time;
pub mod timing;
