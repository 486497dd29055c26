//! A disk: what a read sees, where a write goes, and who may write.
//!
//! Which mode follows which, and how, is in `modes`.
//!
//! Invariants: the file never holds a byte of an uncommitted epoch; an epoch leaves the overlay
//! only after the file holds it, so a read is right at every instant; a lower generation changes
//! nothing. A change of mode returns only when no I/O of the old mode is under way.

use super::Durability;
use super::dirty::{DIRTY_BLOCK_BYTES, DirtyBitmap};
use super::extents::DiskWrite;
use super::image::{DiskError, Image, READ_BASE_BYTES_MAX};
use super::options::{DiskHooks, DiskOptions, Mode};
use super::overlay::Overlay;
use super::pulse::Pulse;
use super::stats::{Counters, DiskStats};
use super::writer;
use crate::pool::{Epoch, Generation};
use bytes::Bytes;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// One epoch's writes, taken by [`Disk::cut`].
#[derive(Clone, Debug, Default)]
pub struct EpochWrites {
    /// Which epoch ended.
    pub epoch: Epoch,
    /// Coalesced: ascending offsets, no overlaps. Buffers are shared with the overlay, not copied.
    pub writes: Vec<DiskWrite>,
    /// The guest flushed (or wrote with FUA) in this epoch.
    pub flushed: bool,
    /// Payload bytes in `writes`; zeros and trims count nothing.
    pub bytes: u64,
}

/// A VM's disk. Shared between the NBD server, the checkpoint and the daemon.
pub struct Disk {
    pub(super) core: Arc<Core>,
    /// One change of mode at a time.
    pub(super) changing: Mutex<()>,
    writer: Option<JoinHandle<()>>,
}

/// What the disk and its writer thread share.
pub(super) struct Core {
    pub image: Image,
    pub overlay_bytes_max: u64,
    pub hooks: DiskHooks,
    pub counters: Counters,
    state: Mutex<State>,
    /// Anything a guest's write or a change of mode may wait for.
    pub changed: Condvar,
    /// Work for the writer thread.
    pub writer_wake: Condvar,
}

pub(super) struct State {
    pub mode: ModeKind,
    pub generation: Generation,
    /// Present in mode Overlay, and in Stopped as long as something is left of it.
    pub overlay: Option<Overlay>,
    pub dirty: DirtyBitmap,
    /// I/Os that write to the file now, other than the writer thread's.
    pub direct_in_flight: u32,
    /// A change of mode is about to happen: new writes wait (never for the guest or the standby).
    pub admission_closed: bool,
    /// Between `checkpoint_begins` and `checkpoint_ends`: no write is held back.
    pub checkpoint_running: bool,
    /// `on_pressure` was called for the running epoch.
    pub pressure_told: bool,
    pub writer_stop: bool,
    pub write_error: Option<String>,
    /// Failed attempts of the writer so far: lets a waiter tell a new failure from an old one.
    pub write_failures: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ModeKind {
    Direct,
    Overlay,
    Standby,
    Stopped,
}

impl From<Mode> for ModeKind {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Direct => Self::Direct,
            Mode::Overlay { .. } => Self::Overlay,
            Mode::Standby => Self::Standby,
            Mode::Stopped => Self::Stopped,
        }
    }
}

impl Core {
    /// The state; a panic elsewhere does not take the disk away from a running guest, and every
    /// change of the state is complete before anything in it can panic.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wrong_mode(&self, state: &State, step: &str, remedy: &'static str) -> DiskError {
        DiskError::WrongMode {
            path: self.image.path.clone(),
            step: step.to_owned(),
            mode: format!("{:?}", state.mode),
            remedy,
        }
    }

    pub fn check_generation(&self, state: &State, given: Generation) -> Result<(), DiskError> {
        if given < state.generation {
            return Err(DiskError::StaleGeneration {
                path: self.image.path.clone(),
                given,
                in_force: state.generation,
            });
        }
        Ok(())
    }

    fn epoch_error(&self, reason: &impl ToString) -> DiskError {
        DiskError::Epoch {
            path: self.image.path.clone(),
            reason: reason.to_string(),
        }
    }
}

impl Disk {
    /// Open an existing raw image or block device of at least `size` bytes; exactly `size` bytes
    /// are served.
    ///
    /// # Errors
    /// [`DiskError`]: missing, smaller than stated, no disk size, or durability `disk`.
    pub fn open(path: &Path, size: u64, options: DiskOptions) -> Result<Arc<Self>, DiskError> {
        if options.durability == Durability::Disk {
            return Err(DiskError::DurabilityUnavailable);
        }
        let overlay = match options.mode {
            Mode::Overlay { epoch } => Some(Overlay::new(epoch)),
            _ => None,
        };
        let core = Arc::new(Core {
            image: Image::open(path, size)?,
            overlay_bytes_max: options.overlay_bytes_max,
            hooks: options.hooks,
            counters: Counters::default(),
            state: Mutex::new(State {
                mode: options.mode.into(),
                generation: options.generation,
                overlay,
                dirty: DirtyBitmap::default(),
                direct_in_flight: 0,
                admission_closed: false,
                checkpoint_running: false,
                pressure_told: false,
                writer_stop: false,
                write_error: None,
                write_failures: 0,
            }),
            changed: Condvar::new(),
            writer_wake: Condvar::new(),
        });
        let writer = writer::start(Arc::clone(&core)).map_err(|source| DiskError::Thread {
            path: path.to_owned(),
            source,
        })?;
        Ok(Arc::new(Self {
            core,
            changing: Mutex::new(()),
            writer: Some(writer),
        }))
    }

    /// Size of the disk, in bytes; never 0.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // A disk of no bytes cannot be opened.
    pub fn len(&self) -> u64 {
        self.core.image.size
    }

    /// The mode in force.
    #[must_use]
    pub fn mode(&self) -> Mode {
        let state = self.core.lock();
        match state.mode {
            ModeKind::Direct => Mode::Direct,
            ModeKind::Standby => Mode::Standby,
            ModeKind::Stopped => Mode::Stopped,
            ModeKind::Overlay => Mode::Overlay {
                epoch: state.overlay.as_ref().map_or(Epoch(0), Overlay::running),
            },
        }
    }

    /// The generation in force.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.core.lock().generation
    }

    /// Announce a checkpoint, just before QMP `stop`: no guest write is held back from here until
    /// [`Disk::checkpoint_ends`], so that QEMU can drain.
    pub fn checkpoint_begins(&self) {
        self.core.lock().checkpoint_running = true;
        self.core.changed.notify_all();
    }

    /// The guest runs again (or the checkpoint failed).
    pub fn checkpoint_ends(&self) {
        self.core.lock().checkpoint_running = false;
    }

    /// End the running epoch; `next` runs from now. Called while the guest stands still. Costs a
    /// handle per extent, no copy of content.
    ///
    /// # Errors
    /// Not in mode Overlay, or `next` is not higher than the running epoch.
    pub fn cut(&self, next: Epoch) -> Result<EpochWrites, DiskError> {
        let mut state = self.core.lock();
        if state.mode != ModeKind::Overlay {
            let remedy = "only a mirrored disk has epochs";
            return Err(self.core.wrong_mode(&state, "end an epoch", remedy));
        }
        state.pressure_told = false;
        let Some(overlay) = state.overlay.as_mut() else {
            return Ok(EpochWrites::default());
        };
        let (epoch, map, flushed) = overlay
            .cut(next)
            .map_err(|reason| self.core.epoch_error(&reason))?;
        drop(state);
        Ok(EpochWrites {
            epoch,
            writes: map.writes(),
            flushed,
            bytes: map.payload_bytes(),
        })
    }

    /// All cut epochs up to `through` are committed: they are written to the file in the
    /// background, in order, and then leave the overlay.
    pub fn commit(&self, through: Epoch) {
        let mut state = self.core.lock();
        if let Some(overlay) = state.overlay.as_mut() {
            overlay.commit(through);
            self.core.writer_wake.notify_all();
        }
    }

    /// Put all cut, uncommitted epochs from `from` on back into the running one, which has the
    /// number `running` from now. Checkpoint `n` failed before the guest went on: `uncut(n, n)`.
    /// Epoch `n` was dropped while `n+1` runs: `uncut(n, n+1)`.
    ///
    /// # Errors
    /// Not in mode Overlay, or the numbers do not fit the epochs held.
    pub fn uncut(&self, from: Epoch, running: Epoch) -> Result<(), DiskError> {
        let mut state = self.core.lock();
        if state.mode == ModeKind::Overlay
            && let Some(overlay) = state.overlay.as_mut()
        {
            return overlay
                .uncut(from, running)
                .map_err(|reason| self.core.epoch_error(&reason));
        }
        Err(self.core.wrong_mode(
            &state,
            "take an epoch back",
            "only a mirrored disk has epochs",
        ))
    }

    /// Forget everything that is not committed: the other side took over. Answers how many bytes
    /// of disk were given up; their blocks are marked for a resync if tracking is on.
    ///
    /// # Errors
    /// Not in mode Stopped: a guest may still rely on them.
    pub fn discard_uncommitted(&self) -> Result<u64, DiskError> {
        let mut guard = self.core.lock();
        if guard.mode != ModeKind::Stopped {
            return Err(self
                .core
                .wrong_mode(&guard, "discard writes", "stop the disk first"));
        }
        let state = &mut *guard;
        let mut bytes = 0;
        if let Some(overlay) = state.overlay.as_mut() {
            for range in overlay.discard_uncommitted() {
                bytes += range.end - range.start;
                state.dirty.mark(&range);
            }
        }
        Ok(bytes)
    }

    /// Standby: put one committed epoch, or seeded blocks, into the file, in order.
    ///
    /// # Errors
    /// A lower generation, not in mode Standby, a write outside the disk (nothing is applied
    /// then), or the file fails (the copy is then incomplete and must be resynced).
    pub fn apply(&self, generation: Generation, writes: &[DiskWrite]) -> Result<(), DiskError> {
        let core = &*self.core;
        for write in writes {
            self.check_range(&(write.offset..write.end()), u64::MAX)?;
        }
        let mut state = core.lock();
        core.check_generation(&state, generation)?;
        if state.mode != ModeKind::Standby || state.admission_closed {
            return Err(core.wrong_mode(&state, "apply an epoch", "only a standby applies epochs"));
        }
        state.direct_in_flight += 1;
        drop(state);
        let result = core.image.write(writes.iter());
        let mut state = core.lock();
        for write in writes {
            state.dirty.mark(&(write.offset..write.end()));
        }
        state.direct_in_flight -= 1;
        core.changed.notify_all();
        drop(state);
        result.map_err(|source| {
            core.image.error(
                "applying an epoch",
                writes.first().map_or(0, |w| w.offset),
                source,
            )
        })
    }

    fn check_range(&self, range: &Range<u64>, len_max: u64) -> Result<(), DiskError> {
        let len = range.end.checked_sub(range.start);
        if range.end > self.len() || len.is_none_or(|len| len > len_max) {
            return Err(DiskError::OutOfRange {
                path: self.core.image.path.clone(),
                range: range.clone(),
                size: self.len(),
            });
        }
        Ok(())
    }

    /// Note from now on which blocks of the file change; for seeding. To seed without a gap:
    /// begin tracking, copy, `take_dirty` and copy until little is left, stop the guest,
    /// `set_mode(Overlay)`, `take_dirty` once more; until the first commit the file stands still.
    pub fn begin_dirty_tracking(&self) {
        self.core.lock().dirty.begin(self.core.image.size);
    }

    /// Ranges changed since the last call, in blocks of 64 KiB, merged, ascending.
    #[must_use]
    pub fn take_dirty(&self) -> Vec<Range<u64>> {
        self.core.lock().dirty.take()
    }

    /// Stop noting changes.
    pub fn end_dirty_tracking(&self) {
        self.core.lock().dirty.end();
    }

    /// Ranges of the file that hold data, in blocks of 64 KiB, ascending.
    ///
    /// # Errors
    /// The file system refused to tell.
    pub fn allocated_ranges(&self) -> Result<Vec<Range<u64>>, DiskError> {
        let image = &self.core.image;
        image
            .allocated(DIRTY_BLOCK_BYTES)
            .map_err(|e| image.error("looking for data", 0, e))
    }

    /// Bytes of the file itself, without the overlay; at most 32 MiB at once.
    ///
    /// # Errors
    /// Outside the disk, too many, or the file fails.
    pub fn read_base(&self, range: Range<u64>) -> Result<Bytes, DiskError> {
        self.check_range(&range, READ_BASE_BYTES_MAX)?;
        let len = usize::try_from(range.end - range.start).unwrap_or(0);
        let mut bytes = vec![0; len];
        let image = &self.core.image;
        image
            .read(&mut bytes, range.start)
            .map_err(|e| image.error("read", range.start, e))?;
        Ok(bytes.into())
    }

    /// fdatasync of the file. What is only in the overlay is not in it.
    ///
    /// # Errors
    /// The file fails.
    pub fn sync(&self) -> Result<(), DiskError> {
        self.core
            .image
            .sync()
            .map_err(|e| self.core.image.error("sync", 0, e))
    }

    /// Wait until every committed epoch is in the file.
    ///
    /// # Errors
    /// An attempt to write one failed (it is retried in the background all the same).
    pub fn wait_written(&self) -> Result<(), DiskError> {
        self.drain(self.core.lock()).map(drop)
    }

    /// Whether the storage under it answers; outlives the disk.
    #[must_use]
    pub fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.core.image.pulse)
    }

    /// Counters and what is held.
    #[must_use]
    pub fn stats(&self) -> DiskStats {
        let mut stats = self.core.counters.snapshot();
        let state = self.core.lock();
        if let Some(overlay) = &state.overlay {
            stats.overlay_bytes = overlay.cost_bytes();
            stats.overlay_epochs = overlay.epochs();
        }
        stats.write_error.clone_from(&state.write_error);
        stats
    }
}

impl Drop for Disk {
    /// Committed epochs are still written (one attempt); uncommitted ones are lost, which a stop
    /// in good order has excluded by then.
    fn drop(&mut self) {
        let mut state = self.core.lock();
        if state.overlay.as_ref().is_some_and(Overlay::has_uncommitted) {
            tracing::warn!(disk = %self.core.image.path.display(), "closed with uncommitted writes");
        }
        state.writer_stop = true;
        drop(state);
        self.core.writer_wake.notify_all();
        if let Some(writer) = self.writer.take() {
            // A panic of the writer has been reported by the panic hook.
            let _ = writer.join();
        }
    }
}
