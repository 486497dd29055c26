//! skeleton
mod config;
pub use config::{LinkAddr, LinkSettings, PairConfig, StartError};

use crate::frame::{Frame, FrameError};
use crate::heartbeat::HeartbeatKey;
use crate::ids::{Generation, VmId};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;

/// Number of a session (an established QUIC connection); counts up from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// What the partner said of itself when the session came up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The partner's host name.
    pub host: String,
    /// Its build, for people.
    pub build: String,
    /// The protocol version both sides speak.
    pub version: u16,
}

/// What happens on the interconnect.
#[derive(Debug)]
pub enum LinkEvent {
    /// A session stands.
    Up {
        /// Its number.
        session: SessionId,
        /// The partner.
        peer: Hello,
        /// For [`crate::heartbeat::Heartbeat::set_key`].
        heartbeat_key: HeartbeatKey,
    },
    /// The session is gone; all its lanes with it. Comes exactly once for each `Up`.
    Down {
        /// Its number.
        session: SessionId,
        /// Why, in plain words.
        reason: String,
    },
    /// A frame from the control lane, in order.
    Control {
        /// The session it came on.
        session: SessionId,
        /// The frame.
        frame: Frame,
    },
    /// The partner opened an epoch lane.
    EpochLane {
        /// The VM.
        vm: VmId,
        /// Its generation at the partner.
        generation: Generation,
        /// The session it belongs to.
        session: SessionId,
        /// The frames, in order; ends when the lane does. Bounded: while nobody
        /// reads, the sender is slowed. Read it with `blocking_recv` from a thread.
        rx: mpsc::Receiver<Frame>,
    },
    /// A session could not be made, and trying again will not help until somebody
    /// acts (wrong identity, wrong host, no common version). Told once per reason;
    /// redialling goes on.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// A frame that was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// There is no session.
    #[error("the interconnect to {peer} is down: wait for the session to come up again")]
    Down {
        /// The partner.
        peer: String,
    },
    /// The session of this lane is gone.
    #[error("the epoch lane is gone with its session: open a new one when the interconnect is up")]
    LaneGone,
    /// The queue is at its limit.
    #[error(
        "the queue to {peer} is full ({queued_bytes} bytes): the partner or the link is too slow"
    )]
    Full {
        /// The partner.
        peer: String,
        /// Bytes waiting.
        queued_bytes: usize,
    },
    /// Not a frame that may be sent here.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A kind that does not belong on this lane.
    #[error("{0:?} frames do not go on this lane")]
    Kind(crate::frame::FrameKind),
}

/// What the interconnect has done so far, and its path now.
#[derive(Clone, Debug, Default)]
pub struct LinkStats {
    /// The session that stands, if one does.
    pub session: Option<SessionId>,
    /// Index of the link it runs on.
    pub link: usize,
    /// Local and partner's address.
    pub path: Option<(SocketAddr, SocketAddr)>,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// UDP payload bytes sent in this session.
    pub sent_bytes: u64,
    /// UDP payload bytes received in this session.
    pub received_bytes: u64,
    /// Packets declared lost in this session.
    pub lost_packets: u64,
    /// Largest UDP payload in use, in bytes.
    pub mtu_bytes: u16,
    /// Congestion window, in bytes.
    pub window_bytes: u64,
    /// Why the last session ended or the last attempt failed.
    pub last_error: Option<String>,
}

/// The interconnect to one partner. Cheap to clone; the last one dropped closes it.
#[derive(Clone)]
pub struct Interconnect {}

impl Interconnect {
    /// Bind all links and keep a session with the partner for ever.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        _config: PairConfig,
        _runtime: tokio::runtime::Handle,
    ) -> Result<(Self, mpsc::Receiver<LinkEvent>), StartError> {
        unimplemented!()
    }
    /// Send on the control lane: ordered, never blocks, from any thread.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn control(&self, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }
    /// Open an epoch lane on the session that stands.
    ///
    /// # Errors
    /// [`SendError::Down`].
    pub fn open_epoch_lane(
        &self,
        _vm: VmId,
        _generation: Generation,
    ) -> Result<EpochLane, SendError> {
        unimplemented!()
    }
    /// End the session that stands (the partner sent nonsense); a new one is made.
    pub fn drop_session(&self, _session: SessionId, _reason: &str) {
        unimplemented!()
    }
    /// The session that stands.
    #[must_use]
    pub fn session(&self) -> Option<SessionId> {
        unimplemented!()
    }
    /// Figures of the path.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        unimplemented!()
    }
    /// The addresses the links are bound to (ports filled in).
    #[must_use]
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        unimplemented!()
    }
}

/// A lane of one VM's epochs; dropping it ends the lane after what is queued is sent.
pub struct EpochLane {}

impl EpochLane {
    /// Send, waiting while the queue is full. Not from a tokio task.
    ///
    /// # Errors
    /// [`SendError::LaneGone`], [`SendError::Frame`].
    pub fn send_blocking(&self, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }
    /// Send if the queue has room.
    ///
    /// # Errors
    /// As `send_blocking`, and [`SendError::Full`].
    pub fn try_send(&self, _frame: Frame) -> Result<(), SendError> {
        unimplemented!()
    }
    /// Bytes queued and not yet handed to QUIC.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        unimplemented!()
    }
    /// The session it belongs to.
    #[must_use]
    pub fn session(&self) -> SessionId {
        unimplemented!()
    }
    /// Whether its session still stands.
    #[must_use]
    pub fn is_open(&self) -> bool {
        unimplemented!()
    }
}
