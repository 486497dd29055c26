//! The guest's side of a disk: read, write, flush, as NBD asks for them.

use super::disk::{Disk, ModeKind, State};
use super::extents::{DiskWrite, Piece, WriteData};
use super::pressure;
use super::stats::count;
use std::io;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

/// Why a guest's request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum GuestIoError {
    #[error("bytes {}..{} are outside the disk", .0.start, .0.end)]
    OutOfRange(Range<u64>),
    #[error("the disk belongs to a standby: the guest may not write to it")]
    Standby,
    #[error("the disk is stopped: another side runs the VM, or it is shut down")]
    Stopped,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// May a read wait for the storage?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Patience {
    /// Answer only from memory and page cache.
    CacheOnly,
    /// Wait.
    Wait,
}

impl Disk {
    /// Append `len` bytes at `offset` to `out`. `Ok(false)`: it needs patience; `out` is as before.
    pub(super) fn guest_read(
        &self,
        offset: u64,
        len: u32,
        out: &mut Vec<u8>,
        patience: Patience,
        arrived: Instant,
    ) -> Result<bool, GuestIoError> {
        let range = self.guest_range(offset, u64::from(len))?;
        let pieces = {
            let state = self.core.lock();
            match (state.mode, &state.overlay) {
                (ModeKind::Stopped, _) => return Err(GuestIoError::Stopped),
                (_, Some(overlay)) => overlay.resolve(range),
                (_, None) => vec![Piece::Base(u64::from(len))],
            }
        };
        let before = out.len();
        let mut at = offset;
        for piece in pieces {
            let len = piece.len();
            // Pieces lie inside a range of u32 length.
            #[allow(clippy::cast_possible_truncation)]
            let new_len = out.len() + len as usize;
            match piece {
                Piece::Data(bytes) => out.extend_from_slice(&bytes),
                Piece::Zero(_) => out.resize(new_len, 0),
                Piece::Base(_) => {
                    let from = out.len();
                    out.resize(new_len, 0);
                    let buf = &mut out[from..];
                    if !self.core.image.read_cached(buf, at) {
                        if patience == Patience::CacheOnly {
                            out.truncate(before);
                            return Ok(false);
                        }
                        if let Err(error) = self.core.image.read(buf, at) {
                            out.truncate(before);
                            return Err(error.into());
                        }
                    }
                }
            }
            at += len;
        }
        let counters = &self.core.counters;
        count(&counters.reads, 1);
        count(&counters.read_bytes, u64::from(len));
        counters.read_latency.add(arrived.elapsed());
        Ok(true)
    }

    /// Write for the guest; with `fua` the write is durable (mode Direct) or its epoch counts as
    /// flushed. May be held back while the overlay is too full, see [`pressure`].
    pub(super) fn guest_write(
        &self,
        write: DiskWrite,
        fua: bool,
        arrived: Instant,
    ) -> Result<(), GuestIoError> {
        let len = write.data.len();
        let plain = matches!(write.data, WriteData::Data(_));
        let range = self.guest_range(write.offset, len)?;
        let core = &*self.core;
        let mut guard = self.admit(true, arrived)?;
        let mut tell = false;
        if guard.mode == ModeKind::Direct {
            guard.direct_in_flight += 1;
            drop(guard);
            let mut result = core.image.write_one(&write);
            if fua && result.is_ok() {
                result = core.image.sync();
            }
            let mut guard = core.lock();
            // After the write, so that a copy made before it landed is made again; also after a
            // failed one, which may have landed in part.
            guard.dirty.mark(&range);
            self.leave(guard);
            result?;
        } else {
            let state = &mut *guard;
            if let Some(overlay) = state.overlay.as_mut() {
                overlay.write(write);
                if fua {
                    overlay.flush();
                }
                tell = !state.pressure_told
                    && overlay.cost_bytes() > pressure::soft_limit_bytes(core.overlay_bytes_max);
                state.pressure_told |= tell;
            }
            drop(guard);
        }
        if tell && let Some(hook) = &core.hooks.on_pressure {
            hook();
        }
        self.count_write(plain, len, fua, arrived);
        Ok(())
    }

    fn count_write(&self, plain: bool, len: u64, fua: bool, arrived: Instant) {
        let counters = &self.core.counters;
        count(
            if plain {
                &counters.writes
            } else {
                &counters.trims
            },
            1,
        );
        count(&counters.write_bytes, if plain { len } else { 0 });
        count(&counters.flushes, u64::from(fua));
        counters.write_latency.add(arrived.elapsed());
    }

    /// Flush for the guest: fdatasync in mode Direct; mirrored, it marks the epoch.
    pub(super) fn guest_flush(&self) -> Result<(), GuestIoError> {
        let core = &*self.core;
        let mut state = match self.admit(false, Instant::now()) {
            Ok(state) => state,
            // QEMU flushes when it lets go of a standby's disk; there is nothing of the guest's.
            Err(GuestIoError::Standby) => return Ok(()),
            Err(error) => return Err(error),
        };
        if state.mode == ModeKind::Direct {
            state.direct_in_flight += 1;
            drop(state);
            let result = core.image.sync();
            self.leave(core.lock());
            result?;
        } else if let Some(overlay) = state.overlay.as_mut() {
            overlay.flush();
        }
        count(&core.counters.flushes, 1);
        Ok(())
    }

    /// Would a write be held back now? Then answers that are ready should go out first.
    pub(super) fn holds_back(&self) -> bool {
        let state = self.core.lock();
        state.admission_closed
            || state.overlay.as_ref().is_some_and(|overlay| {
                overlay.cost_bytes() > pressure::soft_limit_bytes(self.core.overlay_bytes_max)
            })
    }

    /// Does a flush or a durable write wait for the storage now?
    pub(super) fn sync_waits(&self) -> bool {
        self.core.lock().mode == ModeKind::Direct
    }

    fn guest_range(&self, offset: u64, len: u64) -> Result<Range<u64>, GuestIoError> {
        let range = offset..offset.saturating_add(len);
        if range.end > self.len() {
            return Err(GuestIoError::OutOfRange(range));
        }
        Ok(range)
    }

    /// Wait until a write may go on, in mode Direct or Overlay.
    fn admit(
        &self,
        throttle: bool,
        arrived: Instant,
    ) -> Result<MutexGuard<'_, State>, GuestIoError> {
        let core = &*self.core;
        let mut state = core.lock();
        let mut counted = false;
        loop {
            match state.mode {
                ModeKind::Standby => return Err(GuestIoError::Standby),
                ModeKind::Stopped => return Err(GuestIoError::Stopped),
                ModeKind::Direct | ModeKind::Overlay => {}
            }
            if state.admission_closed {
                state = core.wait(state);
                continue;
            }
            let held = match &state.overlay {
                Some(overlay) if throttle && !state.checkpoint_running => overlay.cost_bytes(),
                _ => return Ok(state),
            };
            let delay = pressure::delay(held, core.overlay_bytes_max);
            let left = delay.saturating_sub(arrived.elapsed());
            if left.is_zero() {
                return Ok(state);
            }
            if !counted {
                count(&core.counters.throttled, 1);
                counted = true;
            }
            state = core
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// A direct I/O has ended.
    fn leave(&self, mut state: MutexGuard<'_, State>) {
        state.direct_in_flight -= 1;
        if state.direct_in_flight == 0 {
            self.core.changed.notify_all();
        }
    }
}
