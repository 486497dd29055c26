//! What a cut needs, what it gives, how it fails.

use super::HookError;
use super::clock::ClockStamp;
use super::stream::StreamError;
use crate::vm::qmp::{Qmp, QmpError};
use bytes::Bytes;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// What the caller does around and inside the pause. All of it runs on the thread that
/// called [`super::Checkpointer::cut`].
pub trait CutHooks {
    /// The guest stands still and its block layer is drained: everything it sent in this
    /// epoch is in the caller's sockets. Drain them and advance the epoch tags. Must be quick.
    ///
    /// # Errors
    /// Any error drops the epoch.
    fn stopped(&mut self) -> Result<(), HookError>;

    /// Collect and copy the dirty pages into staging. Runs while QEMU saves the device state.
    ///
    /// # Errors
    /// Any error drops the epoch.
    fn capture(&mut self) -> Result<(), HookError>;

    /// The guest runs again.
    fn resumed(&mut self);
}

/// The monitors of one checkpointer. Each keeps one command typed ahead; nobody else may
/// use them.
#[derive(Debug)]
pub struct Monitors {
    /// For `stop`; also the one whose events are reported.
    pub stop: Qmp,
    /// For `xen-save-devices-state`.
    pub save: Qmp,
    /// For `cont`.
    pub cont: Qmp,
}

/// How a [`super::Checkpointer`] works.
#[derive(Debug, Clone)]
pub struct CutOptions {
    /// QEMU's process, as pollux sees it.
    pub qemu_pid: u32,
    /// Where QEMU writes the device state: on tmpfs, in a folder QEMU's uid may write to.
    pub state_file: PathBuf,
    /// The same file as QEMU is told, perhaps from its working folder: QEMU 7.2 reads its
    /// monitor one byte a poll, 3 to 4 µs each, so every letter costs CPU time in each epoch.
    pub state_name: PathBuf,
    /// Whether to give the guest back the time of the pauses.
    pub repair_clock: bool,
}

/// The step of a cut at which it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutStep {
    /// Typing the commands ahead, before the pause.
    Arm,
    /// `stop`.
    Stop,
    /// The caller's [`CutHooks::stopped`].
    Drain,
    /// The caller's [`CutHooks::capture`].
    Capture,
    /// `xen-save-devices-state`.
    Save,
    /// Reading the state QEMU wrote.
    ReadState,
    /// `cont`.
    Cont,
}

impl fmt::Display for CutStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Arm => "arm",
            Self::Stop => "stop",
            Self::Drain => "drain",
            Self::Capture => "capture",
            Self::Save => "save",
            Self::ReadState => "read-state",
            Self::Cont => "cont",
        })
    }
}

/// Why a cut failed. The epoch is void: drop what the hooks took.
#[derive(Debug, thiserror::Error)]
#[error("checkpoint failed at step {step}: {cause}; {}", if *resumed {
    "the guest runs on, the epoch is dropped"
} else {
    "the guest is not running any more"
})]
pub struct CutError {
    /// Where.
    pub step: CutStep,
    /// Why.
    #[source]
    pub cause: CutCause,
    /// Whether the guest runs (again).
    pub resumed: bool,
}

impl CutError {
    /// Whether a monitor is gone: QEMU has ended, or nobody can stop, save or resume its
    /// guest any more.
    #[must_use]
    pub fn monitor_is_gone(&self) -> bool {
        matches!(&self.cause, CutCause::Qmp(cause) if cause.is_fatal())
    }
}

/// What stood behind a [`CutError`].
#[derive(Debug, thiserror::Error)]
pub enum CutCause {
    /// QEMU's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The caller's hook.
    #[error("{0}")]
    Hook(HookError),
    /// The state file.
    #[error("device state file {}: {source}", path.display())]
    StateFile {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The state is no device state.
    #[error("device state as QEMU wrote it: {0}")]
    State(#[from] StreamError),
}

/// Durations inside one cut, µs, by the monotonic clock. Capture and save overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CutTimings {
    /// `stop` fired until it returned.
    pub stop_us: u64,
    /// The caller's drain.
    pub drain_us: u64,
    /// The caller's capture.
    pub capture_us: u64,
    /// `xen-save-devices-state` fired until its answer was taken (not before the capture
    /// was done, as both are taken by one thread).
    pub save_us: u64,
    /// `cont` fired until it returned.
    pub cont_us: u64,
    /// `stop` fired until `cont` returned. After [`super::Checkpointer::cut_and_stay`]: until the
    /// state was read.
    pub pause_us: u64,
}

/// A good cut.
#[derive(Debug, Clone)]
pub struct Cut {
    /// The device state as QEMU wrote it, with its 8-byte header.
    pub device_state: Bytes,
    /// The guest's clock at the instant of the cut.
    pub clock: ClockStamp,
    /// How long everything took.
    pub timings: CutTimings,
    /// Whether the guest was running before the cut. One that had stopped by itself
    /// (powered off, halted on an I/O error) is cut all the same and left as it was.
    pub was_running: bool,
}

/// What becomes of the guest's time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClockStatus {
    /// Not asked for.
    Off,
    /// The first cut has yet to find the fields.
    Pending,
    /// Each pause is given back.
    Repairing,
    /// Not possible: the guest's clock loses every pause. For the VM's status, as a warning.
    Unrepaired {
        /// Why.
        reason: String,
    },
}
