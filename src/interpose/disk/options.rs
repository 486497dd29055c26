//! How a disk is opened: mode, policy, limit, calls out.

use super::Durability;
use super::pressure::OVERLAY_BYTES_MAX_DEFAULT;
use crate::pool::{Epoch, Generation};
use std::sync::Arc;

/// What a disk does with reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Solo: writes go straight to the file, a flush is fdatasync.
    Direct,
    /// Mirrored primary: writes stay in the overlay under the running epoch, acknowledged at once.
    Overlay {
        /// The epoch that runs from now.
        epoch: Epoch,
    },
    /// Standby's copy: reads served, guest writes refused, [`super::Disk::apply`] writes.
    Standby,
    /// Deposed or shut down: everything is refused. What was committed before is still written.
    Stopped,
}

/// Called when the overlay fills.
pub type PressureHook = Arc<dyn Fn() + Send + Sync>;
/// Called with what the kernel said.
pub type WriteErrorHook = Arc<dyn Fn(&std::io::Error) + Send + Sync>;

/// Calls out of a disk. Called from I/O threads with no lock held; they must not block.
#[derive(Clone, Default)]
pub struct DiskHooks {
    /// The overlay is half full: take a checkpoint now. Once per running epoch.
    pub on_pressure: Option<PressureHook>,
    /// A committed epoch could not be written to the file (it is retried until it can).
    pub on_write_error: Option<WriteErrorHook>,
}

/// How to open a disk.
#[derive(Clone)]
pub struct DiskOptions {
    /// Mode to begin with.
    pub mode: Mode,
    /// Generation in force.
    pub generation: Generation,
    /// Durability policy.
    pub durability: Durability,
    /// Limit of the overlay, in bytes of memory; see [`OVERLAY_BYTES_MAX_DEFAULT`].
    pub overlay_bytes_max: u64,
    /// Calls out.
    pub hooks: DiskHooks,
}

impl DiskOptions {
    /// Defaults around a mode and a generation.
    #[must_use]
    pub fn new(mode: Mode, generation: Generation) -> Self {
        Self {
            mode,
            generation,
            durability: Durability::default(),
            overlay_bytes_max: OVERLAY_BYTES_MAX_DEFAULT,
            hooks: DiskHooks::default(),
        }
    }
}
