//! One cut of a running VM.
//!
//! ```text
//!  guest runs | fire stop ........ returned
//!  guest still|                    | fire save ........ saved      (QEMU)
//!             |                    | hooks.stopped(), hooks.capture()   (meanwhile, here)
//!             |                                        | read the state, repair the clock
//!             |                    | fire cont ........ returned
//!  guest runs |                                        | hooks.resumed(), re-arm
//! ```
//!
//! Whatever fails before `cont`: the guest is resumed if QEMU still answers, the error
//! names the step, and the caller drops the epoch.

use super::HookError;
use super::clock::{ClockError, ClockRepair, ClockStamp, TimerState};
use super::host_clock::HostInstant;
use super::outcome::{
    ClockStatus, Cut, CutCause, CutError, CutHooks, CutOptions, CutStep, CutTimings, Monitors,
};
use crate::vm::qmp::{COMMAND_DEADLINE, EVENTS_MAX, QmpError, QmpEvent};
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

/// Largest device state taken. The fattest measured, with serial, rng and balloon on
/// modern virtio, is 262 KB; VGA models bring up to 16 MiB of their own.
pub const STATE_BYTES_MAX: u64 = 64 << 20;

/// The repair of guest time as far as it has come.
#[derive(Debug)]
enum Clock {
    Off,
    Pending,
    Found(ClockRepair),
    Impossible(String),
}

/// What a taken cut needs to be resumed.
#[derive(Debug)]
struct Held {
    state: Bytes,
    stopped_at: HostInstant,
    was_running: bool,
}

/// Runs cuts of one VM. Owns its monitors; used by one thread.
#[derive(Debug)]
pub struct Checkpointer {
    monitors: Monitors,
    options: CutOptions,
    clock: Clock,
    /// The guest stands still because of [`Checkpointer::cut_and_stay`].
    held: Option<Held>,
    /// False from a STOP event that was not ours until the guest is seen running.
    guest_runs: bool,
    events: VecDeque<QmpEvent>,
}

impl Checkpointer {
    /// Takes over three monitors of a QEMU whose guest runs or stands still, and types the
    /// three commands ahead.
    ///
    /// # Errors
    /// [`CutStep::Arm`] with what the monitors met.
    pub fn new(monitors: Monitors, options: CutOptions) -> Result<Self, CutError> {
        let clock = if options.repair_clock {
            Clock::Pending
        } else {
            Clock::Off
        };
        let mut new = Self {
            monitors,
            options,
            clock,
            held: None,
            guest_runs: true,
            events: VecDeque::new(),
        };
        let running = new.query_running().map_err(|cause| CutError {
            step: CutStep::Arm,
            cause: cause.into(),
            resumed: true,
        })?;
        new.guest_runs = running;
        new.arm()?;
        Ok(new)
    }

    /// Runs one cut: stops the guest, lets the hooks take network, disk and memory, saves
    /// the device state, lets the guest run again.
    ///
    /// # Errors
    /// The epoch is void; see [`CutError::resumed`] for the guest.
    pub fn cut(&mut self, hooks: &mut dyn CutHooks) -> Result<Cut, CutError> {
        let begun = Instant::now();
        let mut cut = self.take(hooks)?;
        cut.timings.cont_us = self.let_run()?;
        cut.timings.pause_us = micros(begun.elapsed());
        hooks.resumed();
        self.arm_quietly();
        Ok(cut)
    }

    /// The same, but the guest stays stopped: the last cut before a switchover. Go back with
    /// [`Self::resume`].
    ///
    /// # Errors
    /// As [`Self::cut`]; after an error the guest runs on if it could be resumed.
    pub fn cut_and_stay(&mut self, hooks: &mut dyn CutHooks) -> Result<Cut, CutError> {
        let begun = Instant::now();
        let mut cut = self.take(hooks)?;
        cut.timings.pause_us = micros(begun.elapsed());
        Ok(cut)
    }

    /// Lets the guest run after [`Self::cut_and_stay`], its time repaired. Nothing happens
    /// if there was none.
    ///
    /// # Errors
    /// [`CutStep::Cont`].
    pub fn resume(&mut self, hooks: &mut dyn CutHooks) -> Result<(), CutError> {
        if self.held.is_some() {
            self.let_run()?;
            hooks.resumed();
            self.arm_quietly();
        }
        Ok(())
    }

    /// Stops the guest without a cut. Its time stands still until [`Self::cont`].
    ///
    /// # Errors
    /// [`CutStep::Stop`].
    pub fn stop(&mut self) -> Result<(), CutError> {
        self.arm()?;
        self.fire_stop()
            .map_err(|cause| self.failed(CutStep::Stop, cause.into(), true))?;
        self.guest_runs = false;
        self.arm_quietly();
        Ok(())
    }

    /// Lets the guest run after [`Self::stop`]; the time in between is not given back.
    ///
    /// # Errors
    /// [`CutStep::Cont`].
    pub fn cont(&mut self) -> Result<(), CutError> {
        self.arm()?;
        self.held = None;
        if let Clock::Found(repair) = &mut self.clock {
            repair.forget_lead();
        }
        self.fire_cont()
            .map_err(|cause| self.failed(CutStep::Cont, cause.into(), false))?;
        self.guest_runs = true;
        self.arm_quietly();
        Ok(())
    }

    /// The oldest event not yet taken that is not the STOP or RESUME of a cut. Never waits.
    pub fn poll_event(&mut self) -> Option<QmpEvent> {
        self.sort_events();
        self.events.pop_front()
    }

    /// What becomes of the guest's time.
    #[must_use]
    pub fn clock_status(&self) -> ClockStatus {
        match &self.clock {
            Clock::Off => ClockStatus::Off,
            Clock::Pending => ClockStatus::Pending,
            Clock::Found(_) => ClockStatus::Repairing,
            Clock::Impossible(reason) => ClockStatus::Unrepaired {
                reason: reason.clone(),
            },
        }
    }

    /// Gives the monitors back, nothing typed ahead any more.
    ///
    /// # Errors
    /// If a monitor is lost.
    pub fn into_monitors(mut self) -> Result<Monitors, QmpError> {
        self.monitors.stop.disarm()?;
        self.monitors.save.disarm()?;
        self.monitors.cont.disarm()?;
        Ok(self.monitors)
    }

    /// Everything up to the saved state; the guest is stopped afterwards and
    /// [`Self::held`] says how to go on. On an error it has been resumed if possible.
    fn take(&mut self, hooks: &mut dyn CutHooks) -> Result<Cut, CutError> {
        self.arm()?;
        self.sort_events();
        let mut timings = CutTimings::default();
        // Cutting a held guest again keeps what it was before.
        let before = self.held.take().map(|held| held.was_running);
        let was_running = before.unwrap_or(self.guest_runs);

        let mark = Instant::now();
        if let Err(error) = self.fire_stop() {
            return Err(self.failed(CutStep::Stop, error.into(), was_running));
        }
        let stopped_at = HostInstant::now();
        timings.stop_us = micros(mark.elapsed());

        let saving = Instant::now();
        if let Err(error) = self.monitors.save.fire() {
            return Err(self.failed(CutStep::Save, error.into(), was_running));
        }
        let taken = run_hooks(hooks, &mut timings);
        // QEMU saves in any case: take its answer before saying anything else to it.
        let saved = self.monitors.save.complete(COMMAND_DEADLINE);
        timings.save_us = micros(saving.elapsed());
        if let Err(error) = saved {
            return Err(self.failed(CutStep::Save, error.into(), was_running));
        }
        if let Err((step, error)) = taken {
            return Err(self.failed(step, CutCause::Hook(error), was_running));
        }
        let read = self
            .read_state()
            .and_then(|state| Ok((TimerState::of(&state)?, state)));
        let (timer, state) = match read {
            Ok(read) => read,
            Err(cause) => return Err(self.failed(CutStep::ReadState, cause, was_running)),
        };
        self.held = Some(Held {
            state: state.clone(),
            stopped_at,
            was_running,
        });
        Ok(Cut {
            device_state: state,
            clock: ClockStamp {
                guest_clock_ns: timer.clock_ns.max(0).unsigned_abs(),
                host_monotonic_ns: stopped_at.monotonic_ns.max(0).unsigned_abs(),
            },
            timings,
            was_running,
        })
    }

    /// Repairs the clock and resumes the guest of the held cut, if it was running.
    /// Returns how long `cont` took, µs.
    fn let_run(&mut self) -> Result<u64, CutError> {
        let Some(held) = self.held.take() else {
            return Ok(0);
        };
        if !held.was_running {
            return Ok(0);
        }
        self.repair_clock(&held);
        let mark = Instant::now();
        if let Err(error) = self.fire_cont() {
            return Err(self.failed(CutStep::Cont, error.into(), true));
        }
        Ok(micros(mark.elapsed()))
    }

    fn repair_clock(&mut self, held: &Held) {
        let outcome = match &mut self.clock {
            Clock::Off | Clock::Impossible(_) => return,
            Clock::Pending => {
                match ClockRepair::find(self.options.qemu_pid, &held.state, held.stopped_at) {
                    Ok(mut found) => {
                        let repaired = found.repair(&held.state, held.stopped_at);
                        self.clock = Clock::Found(found);
                        repaired
                    }
                    Err(error) => Err(error),
                }
            }
            Clock::Found(repair) => repair.repair(&held.state, held.stopped_at),
        };
        if let Err(error) = outcome {
            self.give_up_clock(&error);
        }
    }

    fn give_up_clock(&mut self, error: &ClockError) {
        tracing::warn!(%error, "the guest's clock loses the time of every pause");
        self.clock = Clock::Impossible(error.to_string());
    }

    fn fire_stop(&mut self) -> Result<(), QmpError> {
        self.monitors.stop.fire()?;
        self.monitors.stop.complete(COMMAND_DEADLINE).map(drop)
    }

    fn fire_cont(&mut self) -> Result<(), QmpError> {
        self.monitors.cont.fire()?;
        self.monitors.cont.complete(COMMAND_DEADLINE).map(drop)
    }

    /// Builds the error of a step and, if the guest ran before, tries to let it run again.
    fn failed(&mut self, step: CutStep, cause: CutCause, was_running: bool) -> CutError {
        self.held = None;
        // A device state was perhaps saved, perhaps not: no basis for a repair.
        if let Clock::Found(repair) = &mut self.clock {
            repair.forget_lead();
        }
        let resumed = was_running && self.recover(step).unwrap_or(false);
        self.guest_runs = resumed;
        self.arm_quietly();
        CutError {
            step,
            cause,
            resumed,
        }
    }

    /// `cont` by whatever means are left; says whether the guest runs.
    fn recover(&mut self, step: CutStep) -> Result<bool, QmpError> {
        if step != CutStep::Cont && self.monitors.cont.is_armed() {
            self.fire_cont()?;
        } else {
            self.monitors.cont.execute("cont", Value::Null)?;
        }
        self.query_running()
    }

    fn query_running(&mut self) -> Result<bool, QmpError> {
        let answer = self.monitors.cont.execute("query-status", Value::Null)?;
        let running = answer.get("running").and_then(Value::as_bool);
        Ok(running.unwrap_or(false))
    }

    /// Types ahead what is not yet typed.
    fn arm(&mut self) -> Result<(), CutError> {
        let path = self.options.state_name.to_string_lossy().into_owned();
        let save = json!({ "filename": path, "live": false });
        let monitors = &mut self.monitors;
        let armed = [
            (&mut monitors.stop, "stop", Value::Null),
            (&mut monitors.save, "xen-save-devices-state", save),
            (&mut monitors.cont, "cont", Value::Null),
        ]
        .into_iter()
        .try_for_each(|(monitor, command, args)| {
            if monitor.is_armed() {
                return Ok(());
            }
            monitor.arm(command, args)
        });
        armed.map_err(|error| CutError {
            step: CutStep::Arm,
            cause: error.into(),
            resumed: self.guest_runs,
        })
    }

    /// Outside the pause. What fails here fails again at the next cut, which reports it.
    fn arm_quietly(&mut self) {
        let _ = self.arm();
        self.sort_events();
    }

    /// Takes in the events of all monitors. Every monitor gets each of them, so only one
    /// monitor's are kept.
    fn sort_events(&mut self) {
        for monitor in [&mut self.monitors.save, &mut self.monitors.cont] {
            while let Ok(Some(_)) = monitor.poll_event() {}
        }
        while let Ok(Some(event)) = self.monitors.stop.poll_event() {
            match event.name.as_str() {
                "STOP" => self.guest_runs = false,
                "RESUME" => self.guest_runs = true,
                _ => {
                    if self.events.len() == EVENTS_MAX {
                        self.events.pop_front();
                    }
                    self.events.push_back(event);
                }
            }
        }
    }

    fn read_state(&self) -> Result<Bytes, CutCause> {
        let path = &self.options.state_file;
        let error = |source| CutCause::StateFile {
            path: path.clone(),
            source,
        };
        // Opened each time: if somebody replaced the file, a kept descriptor would show an
        // old state.
        let file = File::open(path).map_err(error)?;
        let len = file.metadata().map_err(error)?.len();
        if len > STATE_BYTES_MAX {
            let why = format!("{len} bytes, more than {STATE_BYTES_MAX}");
            return Err(error(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        let mut state = Vec::with_capacity(usize::try_from(len).unwrap_or(0) + 1);
        file.take(STATE_BYTES_MAX)
            .read_to_end(&mut state)
            .map_err(error)?;
        Ok(state.into())
    }
}

/// What the caller does while QEMU saves, and how long it took.
fn run_hooks(
    hooks: &mut dyn CutHooks,
    timings: &mut CutTimings,
) -> Result<(), (CutStep, HookError)> {
    let mark = Instant::now();
    hooks.stopped().map_err(|error| (CutStep::Drain, error))?;
    timings.drain_us = micros(mark.elapsed());
    let mark = Instant::now();
    hooks.capture().map_err(|error| (CutStep::Capture, error))?;
    timings.capture_us = micros(mark.elapsed());
    Ok(())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
