//! The sending side of a lane.
//!
//! ```text
//!   push ─▶ queue ──cut──▶ entries (handed out, not delivered) ──delivered──▶ gone
//!             │              ▲   │ on a link that failed them
//!          deadline          │   ▼
//!          expired()         └─ again: these first
//! ```
//!
//! Invariants: what is handed out lies within the window beyond `delivered`; an entry is on
//! its way on a link, received, or in `again`; nothing received goes out again.

use super::links::Links;
use super::wire::{LaneAck, SegmentHeader};
use super::{LaneClass, LinkIndex, Micros};
use bytes::Bytes;

/// Number of a frame on its lane, in the order pushed, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FrameNumber(pub u64);

/// What one link sends next of a lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its head.
    pub header: SegmentHeader,
    /// Its content, `header.bytes` in all; shared with the lane, not copied.
    pub chunks: Vec<Bytes>,
    /// It went out before on another link.
    pub again: bool,
}

/// Why a lane is broken: the partner acknowledged what it cannot have. The session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AckError {
    /// More delivered than was handed out.
    #[error("the partner says it has {delivered} bytes of a lane of which {sent} were sent")]
    Delivered {
        /// Said.
        delivered: u64,
        /// Handed out so far.
        sent: u64,
    },
    /// More received on a connection than was handed to it.
    #[error(
        "the partner says {received} bytes of a lane came on link {link}, which was given {sent}"
    )]
    Received {
        /// The link.
        link: LinkIndex,
        /// Said.
        received: u64,
        /// Handed to it.
        sent: u64,
    },
}

/// The queue of a lane is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lane's queue is full ({queued_bytes} bytes)")]
pub struct Full {
    /// Bytes waiting.
    pub queued_bytes: u64,
}

/// The sending side of one lane.
#[derive(Debug)]
pub struct LaneSender {
    class: LaneClass,
}

impl LaneSender {
    /// A lane with nothing on it. `queue_bytes`: what may wait to be handed out (exceeded by
    /// at most one frame). `window_bytes`: what may be handed out beyond what is delivered:
    /// the smaller of both sides' [`super::LANE_WINDOW_BYTES`].
    #[must_use]
    pub fn new(class: LaneClass, queue_bytes: u64, window_bytes: u64) -> Self {
        let _ = (queue_bytes, window_bytes);
        Self { class }
    }

    /// Queue a frame: its header, and its payload if it has one. With a deadline it is
    /// dropped whole if no byte of it was handed out by then ([`LaneSender::expired`]).
    /// Call no more after [`LaneSender::finish`].
    ///
    /// # Errors
    /// [`Full`]; the frame is not queued.
    pub fn push(
        &mut self,
        header: Bytes,
        payload: Bytes,
        deadline: Option<Micros>,
    ) -> Result<FrameNumber, Full> {
        let _ = (header, payload, deadline);
        Ok(FrameNumber(0))
    }

    /// No more frames come; the lane ends after those queued.
    pub fn finish(&mut self) {}

    /// What this link may send now. Call until `None`; again after anything of this lane or
    /// of any link has changed, and at [`LaneSender::next_wakeup`].
    pub fn next(&mut self, link: LinkIndex, links: &mut Links, now: Micros) -> Option<Segment> {
        let _ = (link, links, now, self.class);
        None
    }

    /// An acknowledgement came in on this link's connection that stands now.
    ///
    /// # Errors
    /// [`AckError`].
    pub fn acked(
        &mut self,
        link: LinkIndex,
        ack: LaneAck,
        links: &mut Links,
        now: Micros,
    ) -> Result<(), AckError> {
        let _ = (link, ack, links, now);
        Ok(())
    }

    /// A new connection stands on this link (after [`Links::up`]).
    pub fn link_up(&mut self, link: LinkIndex) {
        let _ = link;
    }

    /// The link's connection is gone (after [`Links::down`]): what was on its way there goes
    /// again elsewhere.
    pub fn link_down(&mut self, link: LinkIndex, links: &Links, now: Micros) {
        let _ = (link, links, now);
    }

    /// Look for overdue segments and passed deadlines. Returns the links that are suspect
    /// from now on. Call at [`LaneSender::next_wakeup`].
    pub fn tick(&mut self, links: &mut Links, now: Micros) -> Vec<LinkIndex> {
        let _ = (links, now);
        Vec::new()
    }

    /// When to call [`LaneSender::tick`] though nothing happens.
    #[must_use]
    pub fn next_wakeup(&self, links: &Links) -> Option<Micros> {
        let _ = links;
        None
    }

    /// Frames dropped since last asked because their deadline passed: certainly not sent.
    pub fn expired(&mut self) -> Vec<FrameNumber> {
        Vec::new()
    }

    /// Nobody wants the lane any more: forget all of it.
    pub fn abandon(&mut self, links: &mut Links, now: Micros) {
        let _ = (links, now);
    }

    /// Whether everything and the lane's end was delivered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        false
    }

    /// Bytes that wait to be handed out for the first time.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        0
    }

    /// Bytes handed out and not delivered.
    #[must_use]
    pub fn unacked_bytes(&self) -> u64 {
        0
    }

    /// Bytes handed out again so far.
    #[must_use]
    pub fn repeated_bytes(&self) -> u64 {
        0
    }

    /// Frames dropped for their deadline so far.
    #[must_use]
    pub fn expired_frames(&self) -> u64 {
        0
    }

    /// Whether this frame has begun to be handed out: its fate is the partner's word.
    #[must_use]
    pub fn is_handed_out(&self, frame: FrameNumber) -> bool {
        let _ = frame;
        false
    }
}
