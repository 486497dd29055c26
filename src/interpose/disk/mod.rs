//! A VM's disk: raw image, write overlay, NBD server.
//!
//! QEMU reaches its disk over NBD on a unix socket ([`server`]); behind it a [`Disk`] decides what
//! a read sees and where a write goes. While the VM is mirrored, writes stay in memory, tagged
//! with the running epoch, until the standby has committed that epoch; only then do they reach the
//! file. So the file always holds a whole number of committed epochs, apart from the one being
//! written out, which the overlay still covers.
//!
//! What it must never do: let a write of an uncommitted epoch reach the file (output-commit for
//! disks), serve or write for a generation that has been passed (no-ghost-write), or hold a
//! guest's write back for ever while a checkpoint waits for QEMU to drain.

mod connection;
mod dirty;
#[allow(clippy::module_inception)]
mod disk;
mod extents;
mod guest;
mod image;
mod modes;
pub mod nbd;
mod options;
mod overlay;
mod pressure;
mod pulse;
pub mod server;
mod stats;
#[cfg(test)]
mod tests;
mod writer;

pub use dirty::DIRTY_BLOCK_BYTES;
pub use disk::{Disk, EpochWrites};
pub use extents::{DiskWrite, WriteData};
pub use image::{DiskError, READ_BASE_BYTES_MAX, SECTOR_BYTES, create_sparse, create_sparse_for};
pub use options::{DiskHooks, DiskOptions, Mode, PressureHook, WriteErrorHook};
pub use pressure::OVERLAY_BYTES_MAX_DEFAULT;
pub use pulse::Pulse;
pub use server::{DiskServer, Owner, ServerError};
pub use stats::{DiskStats, LatencySummary};

/// When an epoch that contains a guest flush counts as committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Both hosts hold the writes in memory. Survives the loss of either host, not of both at once.
    #[default]
    Memory,
    /// The standby's journal holds them on stable storage. Not available yet: refused by
    /// [`Disk::open`].
    Disk,
}
