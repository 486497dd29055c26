//! The guest's memory: who wrote which page, a copy of it, and the standby's image.
//!
//! On the primary a [`Tracker`] watches QEMU's mapping of the RAM file and at
//! each checkpoint copies the pages that were written since the last one into
//! a [`Staging`] buffer. [`seed()`] makes the first full copy while the guest
//! runs. On the standby a [`RamImage`] takes the pages.
//!
//! # Invariant: no dirty page is ever forgotten
//!
//! A page that the guest wrote is at any time in at least one of these places:
//! marked written by the kernel, marked as *carried* in the tracker, or held by
//! a staging buffer. It leaves the last one only when the caller clears the
//! staging after it has handed its pages on. An epoch that is dropped goes back
//! with [`Tracker::give_back`]. If the kernel fails in the middle of a scan the
//! tracker says so, refuses further work, and only a new seeding helps.
//!
//! # What it must never do
//!
//! Write the RAM of a running guest: the kernel does not report writes made
//! through another process's mapping, so they would be lost without a sound.
//! [`RamView`] is read-only for that reason.

mod carried;
mod crew;
pub mod image;
pub mod inject;
mod maps;
mod region;
pub mod seed;
pub mod staging;
mod tracee;
pub mod tracker;
pub(crate) mod uapi;

pub use image::{ImageError, RamImage, RamView};
pub use inject::{InjectError, userfaultfd_in};
pub use seed::{SeedError, SeedLimits, SeedOutcome, SeedProgress, SeedSource, seed};
pub use staging::{Staging, StagingError};
pub use tracker::{CollectStats, PRECOPY_WORTH_PAGES, TrackError, Tracker};

/// Bytes of a guest page, the unit of everything in this room.
///
/// It is the page size of x86-64 and so the grain of the kernel's tracking.
pub const PAGE_SIZE: usize = 4096;

/// The content of one guest page.
pub type Page = [u8; PAGE_SIZE];

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_qemu;
