//! API sketch; bodies follow.
use super::extents::DiskWrite;
use super::image::DiskError;
use super::stats::DiskStats;
use super::Durability;
use crate::pool::{Epoch, Generation};
use bytes::Bytes;
use std::ops::Range;
use std::path::Path;
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
    /// Standby's copy: reads served, guest writes refused, [`Disk::apply`] writes.
    Standby,
    /// Deposed or shut down: everything is refused. Committed epochs are still written out.
    Stopped,
}

/// Calls out of a disk. Called from I/O threads: must not block and must not call back into the disk.
#[derive(Clone, Default)]
pub struct DiskHooks {
    /// The overlay is half full: take a checkpoint now. Once per running epoch.
    pub on_pressure: Option<Arc<dyn Fn() + Send + Sync>>,
    /// A committed epoch could not be written to the file (retried until it can).
    pub on_write_error: Option<Arc<dyn Fn(&std::io::Error) + Send + Sync>>,
}

/// How to open a disk.
#[derive(Clone)]
pub struct DiskOptions {
    /// Mode to begin with; [`Mode::Overlay`] is reached by [`Disk::set_mode`].
    pub mode: Mode,
    /// Generation in force.
    pub generation: Generation,
    /// Durability policy.
    pub durability: Durability,
    /// Limit of the overlay, in bytes.
    pub overlay_bytes_max: u64,
    /// Calls out.
    pub hooks: DiskHooks,
}

/// One epoch's writes, taken by [`Disk::cut`].
#[derive(Clone, Debug, Default)]
pub struct EpochWrites {
    /// Which epoch.
    pub epoch: Epoch,
    /// Coalesced: ascending offsets, no overlaps.
    pub writes: Vec<DiskWrite>,
    /// The guest flushed (or wrote with FUA) in this epoch.
    pub flushed: bool,
    /// Payload bytes in `writes`.
    pub bytes: u64,
}

/// A VM's disk.
pub struct Disk {}

#[allow(unused_variables, missing_docs, clippy::todo, clippy::missing_errors_doc)]
impl Disk {
    /// Open an existing raw image of at least `size` bytes; exactly `size` bytes are served.
    pub fn open(path: &Path, size: u64, options: DiskOptions) -> Result<Arc<Self>, DiskError> { todo!() }
    pub fn len(&self) -> u64 { todo!() }
    pub fn mode(&self) -> Mode { todo!() }
    pub fn generation(&self) -> Generation { todo!() }
    /// Change mode; refused if `generation` is lower than the one in force. Returns when no I/O of the old mode is under way.
    /// Overlay -> Direct is `go_direct`. Standby/Stopped -> see the table.
    pub fn set_mode(&self, mode: Mode, generation: Generation) -> Result<(), DiskError> { todo!() }
    /// Call just before QMP `stop`: no guest write waits from here until `checkpoint_ends`.
    pub fn checkpoint_begins(&self) { todo!() }
    /// Call after `cont` (or when the checkpoint failed).
    pub fn checkpoint_ends(&self) { todo!() }
    /// End the running epoch; `next` runs from now.
    pub fn cut(&self, next: Epoch) -> Result<EpochWrites, DiskError> { todo!() }
    /// All cut epochs up to `through` are committed: write them to the file, in order, in the background.
    pub fn commit(&self, through: Epoch) { todo!() }
    /// Put all cut, uncommitted epochs >= `from` back into the running one, which is numbered `running` from now.
    /// (checkpoint n failed: `uncut(n, n)`; epoch n dropped while n+1 runs: `uncut(n, n+1)`.)
    pub fn uncut(&self, from: Epoch, running: Epoch) -> Result<(), DiskError> { todo!() }
    /// Forget everything not committed (deposed primary). Only in Stopped.
    pub fn discard_uncommitted(&self) -> Result<u64, DiskError> { todo!() }
    /// Solo: write all that is held to the file, sync, then Direct.
    pub fn go_direct(&self, generation: Generation) -> Result<(), DiskError> { todo!() }
    /// Standby: apply one committed epoch (or seeded blocks), in order.
    pub fn apply(&self, generation: Generation, writes: &[DiskWrite]) -> Result<(), DiskError> { todo!() }
    pub fn begin_dirty_tracking(&self) { todo!() }
    /// Ranges written since the last call (64 KiB blocks, merged, ascending); tracking goes on.
    pub fn take_dirty(&self) -> Vec<Range<u64>> { todo!() }
    pub fn end_dirty_tracking(&self) { todo!() }
    /// Ranges of the file that hold data (SEEK_DATA / SEEK_HOLE).
    pub fn allocated_ranges(&self) -> Result<Vec<Range<u64>>, DiskError> { todo!() }
    /// Bytes of the file itself, without the overlay; at most 32 MiB.
    pub fn read_base(&self, range: Range<u64>) -> Result<Bytes, DiskError> { todo!() }
    /// fdatasync of the file.
    pub fn sync(&self) -> Result<(), DiskError> { todo!() }
    /// Wait until every committed epoch is in the file.
    pub fn wait_written(&self) -> Result<(), DiskError> { todo!() }
    pub fn stats(&self) -> DiskStats { todo!() }
}
