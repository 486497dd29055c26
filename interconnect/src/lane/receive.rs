//! The receiving side of a lane.

use super::wire::{LaneAck, Piece};
use super::{LaneId, LinkIndex, Micros};
use bytes::Bytes;

/// Why a lane is broken: the partner broke the protocol. The session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// Beyond the window.
    #[error("bytes to {end} of lane {lane} came in, {allowed} is as far as the window goes")]
    Window {
        /// The lane.
        lane: LaneId,
        /// Where the piece ends.
        end: u64,
        /// How far it may go.
        allowed: u64,
    },
    /// Two ends, or bytes after the end.
    #[error("lane {lane} ends at {end} and at {other}")]
    End {
        /// The lane.
        lane: LaneId,
        /// One end.
        end: u64,
        /// The other, or where bytes lie beyond the end.
        other: u64,
    },
    /// In more parts than a sender makes.
    #[error("lane {lane} comes in more than {max} parts out of order")]
    Parts {
        /// The lane.
        lane: LaneId,
        /// Most of them.
        max: usize,
    },
}

/// The receiving side of one lane.
#[derive(Debug)]
pub struct LaneReceiver {
    lane: LaneId,
}

impl LaneReceiver {
    /// A lane of which nothing has come. `window_bytes`: as in the [`super::wire::Join`]
    /// this side sent.
    #[must_use]
    pub fn new(lane: LaneId, window_bytes: u64) -> Self {
        let _ = window_bytes;
        Self { lane }
    }

    /// A new connection stands on this link; needed for the lane's first, too, before
    /// anything of it is inserted. It is owed an acknowledgement if anything was delivered.
    pub fn link_up(&mut self, link: LinkIndex) {
        let _ = link;
    }

    /// Its connection is gone.
    pub fn link_down(&mut self, link: LinkIndex) {
        let _ = link;
    }

    /// A piece came in on this link's connection.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn insert(
        &mut self,
        link: LinkIndex,
        piece: Piece,
        now: Micros,
    ) -> Result<(), ReceiveError> {
        let _ = (link, piece, now, self.lane);
        Ok(())
    }

    /// The next bytes in order. Taking them is what moves the window: take them when there
    /// is room for them.
    pub fn pop(&mut self, now: Micros) -> Option<Bytes> {
        let _ = now;
        None
    }

    /// Whether the lane's end was reached and everything before it was taken.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        false
    }

    /// Whether this link is owed an acknowledgement now; ask after each insert and pop.
    #[must_use]
    pub fn ack_due(&self, link: LinkIndex) -> bool {
        let _ = link;
        false
    }

    /// The acknowledgement this link is owed now; it is then taken for sent there.
    pub fn next_ack(&mut self, link: LinkIndex, now: Micros) -> Option<LaneAck> {
        let _ = (link, now);
        None
    }

    /// When acknowledgements become due though nothing happens: ask every link then.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Micros> {
        None
    }

    /// Bytes held: in order and not taken, or waiting for earlier ones.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        0
    }

    /// Bytes that came more than once so far.
    #[must_use]
    pub fn repeated_bytes(&self) -> u64 {
        0
    }
}
