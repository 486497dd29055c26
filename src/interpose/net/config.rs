//! What a port is made of, its modes, errors and counters.

use super::announce::MacAddr;
use super::tap::{Tap, TapError};
use crate::interpose::disk::Owner;
use crate::pool::{Epoch, Generation};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Where frames go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NetMode {
    /// Solo: frames pass at once.
    Direct,
    /// Mirrored primary: the guest's frames wait under the running epoch.
    Hold {
        /// The running epoch.
        epoch: Epoch,
    },
    /// Standby: both directions are dropped.
    Standby,
    /// Deposed: both directions are dropped, all held frames were discarded.
    Stopped,
}

/// Called with the NIC's index.
pub type NicHook = Arc<dyn Fn(usize) + Send + Sync>;
/// Called with the NIC's index and a frame.
pub type FrameHook = Arc<dyn Fn(usize, &[u8]) + Send + Sync>;

/// Calls out of a port. Called from the port's thread with no lock held; they must not block.
#[derive(Clone, Default)]
pub struct NetHooks {
    /// The first frame waits in the running epoch.
    pub on_output_waiting: Option<NicHook>,
    /// A frame was handed to the guest in mode Hold: for the standby's replay.
    pub on_ingress: Option<FrameHook>,
    /// The gate is half full: take a checkpoint now.
    pub on_pressure: Option<NicHook>,
}

/// The tap of a port.
#[derive(Debug)]
pub enum TapSource {
    /// One made already.
    Ready(Tap),
    /// Make one in the calling thread's network namespace.
    Create {
        /// Interface name, at most 15 bytes.
        name: String,
        /// Largest packet, in bytes.
        mtu: u32,
        /// Bridge to join.
        bridge: Option<String>,
    },
}

/// What a port is made of.
pub struct NetPortConfig {
    /// Index of the NIC in the VM, passed to the hooks.
    pub nic: usize,
    /// The host's side.
    pub tap: TapSource,
    /// Socket the port binds: QEMU's `remote.path`.
    pub pollux_sock: PathBuf,
    /// Socket QEMU binds: its `local.path`. May appear later and be replaced at any time.
    pub qemu_sock: PathBuf,
    /// Who may send to the port; `None`: the daemon's own user.
    pub owner: Option<Owner>,
    /// The guest's address, for announcements.
    pub mac: MacAddr,
    /// Mode to begin with.
    pub mode: NetMode,
    /// Generation in force.
    pub generation: Generation,
    /// Most frames the gate holds, up to [`super::GATE_PACKETS_MAX`].
    pub held_packets_max: usize,
    /// Calls out.
    pub hooks: NetHooks,
}

/// Why a port could not start or change.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The path is taken.
    #[error("{path} is in use: is this VM running already?")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in the way.
    #[error("{path} exists and is not a socket: remove it, or choose another path")]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// A step of setting up failed.
    #[error("cannot {doing} for the network socket {path}: {source}")]
    Step {
        /// The step.
        doing: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A deposed side spoke.
    #[error(
        "NIC {nic}: refused for {given:?}, {in_force:?} is in force: another side has taken over \
         since"
    )]
    StaleGeneration {
        /// Index of the NIC.
        nic: usize,
        /// Generation given.
        given: Generation,
        /// Generation in force.
        in_force: Generation,
    },
    /// A step that does not fit the mode.
    #[error("NIC {nic}: cannot {step} in mode {mode:?}")]
    WrongMode {
        /// Index of the NIC.
        nic: usize,
        /// What was asked.
        step: &'static str,
        /// Mode it was in.
        mode: NetMode,
    },
    /// Epoch numbers that do not fit.
    #[error("NIC {nic}: epoch {given:?} does not fit the running epoch {running:?}")]
    Epoch {
        /// Index of the NIC.
        nic: usize,
        /// Epoch given.
        given: Epoch,
        /// The running epoch.
        running: Epoch,
    },
}

/// Counters since the port was started, and what it holds now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NetStats {
    /// Frames waiting for their commit.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Age of the oldest of them, in microseconds; 0 without one.
    pub oldest_us: u64,
    /// Guest frames dropped because the gate was full.
    pub dropped_full: u64,
    /// Frames dropped for another reason: mode, size, tap down, QEMU away.
    pub dropped_other: u64,
    /// Frames written to the tap.
    pub egress: u64,
    /// Frames handed to the guest.
    pub ingress: u64,
}
