//! What the interconnect tells the product, and why it would not send.

use super::lanes::IoLane;
use crate::frame::{Frame, FrameError, FrameKind};
use crate::heartbeat::HeartbeatKey;
use crate::ids::{Generation, VmId};
use std::net::SocketAddr;
use tokio::sync::mpsc;

/// Number of a session with the partner; counts up from 1.
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
    /// A connection of the session stands on this link. After `Up`.
    LinkUp {
        /// The session.
        session: SessionId,
        /// Index of the link in [`super::PairConfig::links`].
        link: usize,
        /// Local and partner's address.
        path: (SocketAddr, SocketAddr),
    },
    /// It is gone; the session goes on while another one stands, and for
    /// [`super::LinkSettings::session_keep`] without any. Once for each `LinkUp`, before
    /// the session's `Down`.
    LinkDown {
        /// The session.
        session: SessionId,
        /// Index of the link.
        link: usize,
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
    /// The partner opened an I/O lane.
    IoLane {
        /// The VM.
        vm: VmId,
        /// Its generation at the partner.
        generation: Generation,
        /// The session it belongs to.
        session: SessionId,
        /// This side's end of it.
        lane: IoLane,
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
    /// The session of this lane is gone, or the partner stopped reading it.
    #[error("the lane is gone with its session: open a new one when the interconnect is up")]
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
    Kind(FrameKind),
    /// The partner's build is too old for it.
    #[error(
        "{peer} speaks protocol version {version}, {what} needs {needed}: bring both hosts to the same pollux version"
    )]
    Version {
        /// The partner.
        peer: String,
        /// What was to be sent.
        what: &'static str,
        /// The version spoken.
        version: u16,
        /// The version it takes.
        needed: u16,
    },
}

/// Refuse what the partner would refuse, before it is queued.
pub(super) fn check_size(frame: &Frame) -> Result<(), SendError> {
    let (kind, bytes, max) = (
        frame.kind,
        frame.payload.len(),
        frame.kind.payload_bytes_max(),
    );
    if kind == FrameKind::Invalid {
        return Err(FrameError::Kind(0).into());
    }
    if bytes > max {
        return Err(FrameError::TooBig { kind, bytes, max }.into());
    }
    Ok(())
}

/// Refuse a kind the partner does not know.
pub(super) fn check_version(kind: FrameKind, version: u16, peer: &str) -> Result<(), SendError> {
    let needed = kind.since_version();
    if needed <= version {
        return Ok(());
    }
    Err(SendError::Version {
        peer: peer.to_owned(),
        what: "this kind of frame",
        version,
        needed,
    })
}
