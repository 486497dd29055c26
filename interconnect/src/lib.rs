//! The private QUIC interconnect of a host pair.
//!
//! State flows one way: the primary turns an epoch into [`frame::Frame`]s with
//! an [`epoch::EpochWriter`], sends them down an [`link::EpochLane`]; the
//! partner's [`epoch::EpochAssembler`] holds them apart until the epoch is whole
//! and its digest holds, and the product acknowledges it on the control lane.
//!
//! - [`identity`]: who a host is, and the pinning of exactly one partner.
//! - [`frame`]: the one wire layout of everything on a lane. Pure.
//! - [`codec`]: page batches, disk write batches, packets, device-state delta. Pure.
//! - [`epoch`]: an epoch to frames and back. Pure.
//! - [`lane`]: ordered streams over several links: striping, re-sending. Pure.
//! - [`link`]: QUIC sessions and lanes.
//! - [`heartbeat`], [`detector`]: liveness on sockets of their own, never behind
//!   bulk data; the detector is pure.
//!
//! What this crate must never do: hand up an epoch that is not whole, accept a
//! peer other than the pinned one, or allocate what a peer told it to without a cap.

pub mod codec;
pub mod detector;
pub mod epoch;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
pub mod heartbeat;
pub mod identity;
pub mod ids;
pub mod lane;
pub mod link;
pub mod probe;
