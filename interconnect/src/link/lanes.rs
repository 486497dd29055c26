//! The lanes of a pair as the product sees them, whatever carries them.

use super::event::{SendError, SessionId, check_size, check_version};
use super::queue::PushError;
use super::stats::{LanePressure, PairStats};
use crate::frame::Frame;
use crate::ids::{Generation, VmId};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// A session's lanes: over several links, or, with a partner of protocol version 1, over
/// one connection.
pub(super) trait Lanes: Send + Sync {
    fn id(&self) -> SessionId;
    /// The protocol version spoken.
    fn version(&self) -> u16;
    fn control(&self, frame: Frame) -> Result<(), PushError>;
    fn open_epoch_lane(&self, vm: VmId, generation: Generation, queue_bytes: usize) -> EpochLane;
    fn open_io_lane(&self, vm: VmId, generation: Generation) -> Result<IoLane, SendError>;
    /// Fill in what only the lanes know.
    fn stats(&self, stats: &mut PairStats);
    fn close(&self, code: u32, reason: &str);
}

/// What takes the frames of one lane.
pub(super) trait LaneSink: Send + Sync {
    /// Queue a frame, waiting for room.
    fn push_blocking(&self, frame: Frame) -> Result<(), PushError>;
    /// Queue a frame if there is room.
    fn try_push(&self, frame: Frame) -> Result<(), PushError>;
    /// Queue a frame that is worth nothing after `deadline`; its number.
    fn push_until(&self, frame: Frame, deadline: Instant) -> Result<u64, PushError>;
    /// Bytes that wait for a link.
    fn queued_bytes(&self) -> usize;
    fn pressure(&self) -> LanePressure;
    fn is_closed(&self) -> bool;
    /// No more frames come; what is queued is still sent.
    fn finish(&self);
}

/// A lane of one VM's epochs; dropping it ends the lane after what is queued is sent.
pub struct EpochLane {
    pub(super) sink: Arc<dyn LaneSink>,
    pub(super) session: SessionId,
    pub(super) peer: String,
    pub(super) version: u16,
}

impl std::fmt::Debug for EpochLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "EpochLane(session {}, {} bytes queued)",
            self.session.0,
            self.queued_bytes()
        )
    }
}

fn push_error(peer: &str, error: &PushError) -> SendError {
    match *error {
        PushError::Closed => SendError::LaneGone,
        PushError::Full(queued_bytes) => SendError::Full {
            peer: peer.to_owned(),
            queued_bytes,
        },
    }
}

impl EpochLane {
    fn check(&self, frame: &Frame) -> Result<(), SendError> {
        if frame.kind.is_control() || frame.kind.is_io() {
            return Err(SendError::Kind(frame.kind));
        }
        check_version(frame.kind, self.version, &self.peer)?;
        check_size(frame)
    }

    /// Send, waiting while the queue is full. Not from a tokio task.
    ///
    /// # Errors
    /// [`SendError::LaneGone`], [`SendError::Frame`], [`SendError::Kind`],
    /// [`SendError::Version`].
    pub fn send_blocking(&self, frame: Frame) -> Result<(), SendError> {
        self.check(&frame)?;
        self.sink
            .push_blocking(frame)
            .map_err(|error| push_error(&self.peer, &error))
    }

    /// Send if the queue has room.
    ///
    /// # Errors
    /// As [`EpochLane::send_blocking`], and [`SendError::Full`].
    pub fn try_send(&self, frame: Frame) -> Result<(), SendError> {
        self.check(&frame)?;
        self.sink
            .try_push(frame)
            .map_err(|error| push_error(&self.peer, &error))
    }

    /// Bytes queued and not yet handed to a link.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.sink.queued_bytes()
    }

    /// How much waits on this lane and how fast it leaves.
    #[must_use]
    pub fn pressure(&self) -> LanePressure {
        self.sink.pressure()
    }

    /// The session it belongs to.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Whether its session still stands and the partner still reads it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.sink.is_closed()
    }
}

impl Drop for EpochLane {
    fn drop(&mut self) {
        self.sink.finish();
    }
}

/// Number of a frame on this side of an I/O lane; counts up from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IoTicket(pub u64);

/// What happens on an I/O lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IoEvent {
    /// A frame from the partner, in order.
    Frame(Frame),
    /// This frame was not handed to any link by its deadline, and never will be: the
    /// partner does not know of it.
    Expired(IoTicket),
}

/// The sending half of an I/O lane; cheap to clone. The lane ends after what is queued is
/// sent when the last one is dropped.
#[derive(Clone)]
pub struct IoSender {
    pub(super) inner: Arc<IoEnd>,
}

pub(super) struct IoEnd {
    pub(super) sink: Arc<dyn LaneSink>,
    pub(super) session: SessionId,
    pub(super) peer: String,
}

impl Drop for IoEnd {
    fn drop(&mut self) {
        self.sink.finish();
    }
}

impl std::fmt::Debug for IoSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoSender(session {})", self.inner.session.0)
    }
}

impl IoSender {
    /// Send, never waiting. If no link takes the frame by `deadline`, it is dropped whole
    /// and [`IoEvent::Expired`] says so; otherwise its fate is unknown until the partner
    /// answers.
    ///
    /// # Errors
    /// [`SendError::LaneGone`], [`SendError::Full`], [`SendError::Frame`],
    /// [`SendError::Kind`].
    pub fn send(&self, frame: Frame, deadline: Instant) -> Result<IoTicket, SendError> {
        if !frame.kind.is_io() {
            return Err(SendError::Kind(frame.kind));
        }
        check_size(&frame)?;
        self.inner
            .sink
            .push_until(frame, deadline)
            .map(IoTicket)
            .map_err(|error| push_error(&self.inner.peer, &error))
    }

    /// How much waits on this lane and how fast it leaves.
    #[must_use]
    pub fn pressure(&self) -> LanePressure {
        self.inner.sink.pressure()
    }

    /// Whether its session still stands and the partner still reads it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.inner.sink.is_closed()
    }

    /// The session it belongs to.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.inner.session
    }
}

/// A lane for one VM's remote disk and network I/O: small frames both ways, before all
/// bulk. It does not outlive its session.
#[derive(Debug)]
pub struct IoLane {
    /// Sends to the partner.
    pub tx: IoSender,
    /// Frames of the partner and news of this side's own; ends with the lane. Bounded:
    /// while nobody reads, the partner is slowed.
    pub rx: mpsc::Receiver<IoEvent>,
}

impl IoLane {
    /// As [`IoSender::send`].
    ///
    /// # Errors
    /// As [`IoSender::send`].
    pub fn send(&self, frame: Frame, deadline: Instant) -> Result<IoTicket, SendError> {
        self.tx.send(frame, deadline)
    }

    /// What happens next; `None`: the lane is over.
    pub async fn recv(&mut self) -> Option<IoEvent> {
        self.rx.recv().await
    }

    /// As [`IoLane::recv`], from a plain thread.
    pub fn blocking_recv(&mut self) -> Option<IoEvent> {
        self.rx.blocking_recv()
    }
}
