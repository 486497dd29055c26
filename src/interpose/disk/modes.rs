//! Changes of a disk's mode: who may write, and where to.
//!
//! ```text
//!              set_mode                       go_direct
//!   Standby ────────────> Direct <──────────────────────── Overlay
//!    ^  │ └───────────────────────────────────────────────> ^  │
//!    │  │                   └──── set_mode ────────────────> │  │
//!    │  └──────────────┬──────────────┬────────────────────────┤
//!    │                 v   set_mode   v                        │
//!    ├────────────── Stopped (-> Direct, Overlay only with a   │
//!    │                        higher generation)               │
//!    └──────────── (switchover: all committed, written) ───────┘
//! ```
//!
//! A change closes admission, waits until the file is at rest and holds every committed epoch, and
//! only then becomes effective; on an error nothing has changed. Only a stop does not wait.

use super::disk::{Disk, ModeKind, State};
use super::image::DiskError;
use super::options::Mode;
use super::overlay::Overlay;
use crate::pool::Generation;
use std::sync::{MutexGuard, PoisonError};

impl Disk {
    /// Change mode. Answers when no I/O of the old mode is under way; guest I/O waits meanwhile
    /// (except for `Stopped`, which refuses it at once). To the same mode: only raises the
    /// generation. `Overlay -> Direct` is [`Disk::go_direct`].
    ///
    /// # Errors
    /// A lower generation, a step the table in this module does not have, uncommitted writes
    /// where there may be none, or the file cannot take what is committed. Nothing has changed then.
    pub fn set_mode(&self, mode: Mode, generation: Generation) -> Result<(), DiskError> {
        let to = ModeKind::from(mode);
        if to == ModeKind::Stopped {
            return self.stop(generation);
        }
        if to == ModeKind::Direct && self.core.lock().mode == ModeKind::Overlay {
            return self.go_direct(generation);
        }
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let core = &*self.core;
        let mut state = core.lock();
        core.check_generation(&state, generation)?;
        if state.mode == to {
            let running = state.overlay.as_ref().map(Overlay::running);
            if let Mode::Overlay { epoch } = mode
                && running != Some(epoch)
            {
                let remedy = "epochs advance by `cut` alone";
                return Err(core.wrong_mode(&state, "change the running epoch", remedy));
            }
            state.generation = generation;
            return Ok(());
        }
        let uncommitted = state.overlay.as_ref().is_some_and(Overlay::has_uncommitted);
        match (state.mode, to) {
            (ModeKind::Direct, ModeKind::Overlay)
            | (ModeKind::Standby, ModeKind::Direct | ModeKind::Overlay) => {}
            (ModeKind::Overlay | ModeKind::Stopped, _) if uncommitted => {
                let remedy = "it holds uncommitted writes: commit them, or stop and discard them";
                return Err(core.wrong_mode(&state, &format!("become {to:?}"), remedy));
            }
            (ModeKind::Overlay | ModeKind::Stopped, ModeKind::Standby) => {}
            (ModeKind::Stopped, _) if generation > state.generation => {}
            (ModeKind::Stopped, _) => {
                let remedy = "a stopped disk runs again only under a higher generation";
                return Err(core.wrong_mode(&state, &format!("become {to:?}"), remedy));
            }
            _ => {
                let remedy = "stop it first";
                return Err(core.wrong_mode(&state, &format!("become {to:?}"), remedy));
            }
        }
        let from = state.mode;
        let mut state = self.quiesce(state)?;
        // A stop does not wait for its turn.
        if state.mode != from || generation < state.generation {
            state.admission_closed = false;
            core.changed.notify_all();
            let remedy = "it was stopped meanwhile";
            return Err(core.wrong_mode(&state, &format!("become {to:?}"), remedy));
        }
        state.mode = to;
        state.generation = generation;
        state.overlay = match mode {
            Mode::Overlay { epoch } => Some(Overlay::new(epoch)),
            _ => None,
        };
        state.pressure_told = false;
        state.admission_closed = false;
        core.changed.notify_all();
        Ok(())
    }

    /// Refuse everything from now on; answers when nothing is under way any more. Does not wait
    /// for another change of mode: being deposed is urgent.
    fn stop(&self, generation: Generation) -> Result<(), DiskError> {
        let core = &*self.core;
        let mut state = core.lock();
        core.check_generation(&state, generation)?;
        state.mode = ModeKind::Stopped;
        state.generation = generation;
        core.changed.notify_all();
        while state.direct_in_flight > 0 {
            state = core.wait(state);
        }
        Ok(())
    }

    /// Close admission and wait until the file is at rest and holds every committed epoch.
    /// On error admission is open again.
    fn quiesce<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> Result<MutexGuard<'a, State>, DiskError> {
        state.admission_closed = true;
        while state.direct_in_flight > 0 {
            state = self.core.wait(state);
        }
        match self.drain(state) {
            Ok(state) => Ok(state),
            Err(error) => {
                self.core.lock().admission_closed = false;
                self.core.changed.notify_all();
                Err(error)
            }
        }
    }

    /// Wait until every committed epoch is in the file, or an attempt fails.
    pub(super) fn drain<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> Result<MutexGuard<'a, State>, DiskError> {
        let failures = state.write_failures;
        self.core.writer_wake.notify_all();
        while !state.overlay.as_ref().is_none_or(Overlay::all_written) {
            if state.write_failures != failures {
                let why = state.write_error.clone().unwrap_or_default();
                let source = std::io::Error::other(why);
                return Err(self
                    .core
                    .image
                    .error("write of a committed epoch", 0, source));
            }
            state = self.core.wait(state);
        }
        Ok(state)
    }

    /// Go solo: everything held, committed or not, is written to the file and synced, then the
    /// disk is Direct. The guest may run meanwhile: most of the overlay drains beside it, only
    /// what it wrote since waits for the rest. Call only with a won claim.
    ///
    /// # Errors
    /// A lower generation; not in mode Overlay or Direct; or the file cannot take the writes: then
    /// the disk is still in mode Overlay, holds what is not written, and the call may be repeated.
    pub fn go_direct(&self, generation: Generation) -> Result<(), DiskError> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let core = &*self.core;
        let mut state = core.lock();
        core.check_generation(&state, generation)?;
        match state.mode {
            ModeKind::Direct => {
                state.generation = generation;
                return Ok(());
            }
            ModeKind::Overlay => {}
            ModeKind::Standby | ModeKind::Stopped => {
                return Err(core.wrong_mode(&state, "go solo", "only a mirrored disk can"));
            }
        }
        state.generation = generation;
        if let Some(overlay) = state.overlay.as_mut() {
            overlay.commit_all();
        }
        state = self.drain(state)?;
        // What was written meanwhile is little; now nothing new comes in until it is in the file.
        state.admission_closed = true;
        if let Some(overlay) = state.overlay.as_mut() {
            overlay.commit_all();
        }
        state = self.quiesce(state)?;
        let stopped = state.mode != ModeKind::Overlay;
        if !stopped {
            state.mode = ModeKind::Direct;
            state.overlay = None;
        }
        state.admission_closed = false;
        core.changed.notify_all();
        if stopped {
            return Err(core.wrong_mode(&state, "go solo", "it was stopped meanwhile"));
        }
        drop(state);
        // Flushes acknowledged from memory are owed to the guest now that it is alone.
        self.sync()
    }
}
