//! The consistent cut: stop, capture, save, resume; and its inverse, promotion.
//!
//! [`Checkpointer`] runs one cut of a running VM over its own QMP monitors; the caller
//! brings network, disk and memory to it through [`CutHooks`]. [`blocks`] takes the RAM
//! that lies outside the shared file, once at seeding; [`clock`] gives the guest back the
//! time the cuts take; [`Incoming`] is the standby QEMU that waits for state and becomes
//! the running VM.
//!
//! What it must never do: resume a guest whose cut the caller takes for good when it is
//! not, write to QEMU's memory at a place it is not sure of, or leave a guest stopped
//! because of an error while its QEMU still answers.
//!
//! Invariant (whole-epoch): what [`CutHooks::capture`] takes and [`Cut::device_state`]
//! are of the same instant: the guest does not run between the return of `stop` and the
//! end of both.

pub mod blocks;
pub mod clock;
mod cut;
mod host_clock;
#[cfg(test)]
mod measure;
mod outcome;
pub mod promote;
pub mod stream;
#[cfg(test)]
mod testbed;
#[cfg(test)]
mod tests;

pub use blocks::{BlocksError, capture_blocks_prefix};
pub use clock::{ClockError, ClockRepair, ClockStamp, patch_state_clock};
pub use cut::Checkpointer;
pub use host_clock::{HostInstant, ticks_per_second};
pub use outcome::{
    ClockStatus, Cut, CutCause, CutError, CutHooks, CutOptions, CutStep, CutTimings, Monitors,
};
pub use promote::{Incoming, PromoteError, PromoteTimings};

/// What a caller's hook failed with; it goes unchanged into the error of the step.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;
