//! Frames of a lane that wait to be handed out: in order, bounded, with deadlines.

use super::Micros;
use bytes::Bytes;
use std::collections::VecDeque;

/// Number of a frame on its lane, in the order pushed, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FrameNumber(pub u64);

/// Why a frame was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The queue is at its limit.
    #[error("the lane's queue is full ({queued_bytes} bytes)")]
    Full {
        /// Bytes waiting.
        queued_bytes: u64,
    },
    /// The lane was finished or abandoned.
    #[error("the lane was finished")]
    Finished,
}

/// A frame, or what is left of one.
#[derive(Debug)]
struct Queued {
    number: u64,
    header: Bytes,
    payload: Bytes,
    deadline: Option<Micros>,
    /// Its first bytes were handed out: it can no longer expire.
    begun: bool,
}

impl Queued {
    fn bytes(&self) -> u64 {
        (self.header.len() + self.payload.len()) as u64
    }

    /// Move up to `bytes` from its front to `chunks`; how many.
    fn take(&mut self, bytes: u64, chunks: &mut Vec<Bytes>) -> u64 {
        self.begun = true;
        let mut left = bytes;
        for part in [&mut self.header, &mut self.payload] {
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(part.len());
            if take > 0 {
                chunks.push(part.split_to(take));
                left -= take as u64;
            }
        }
        bytes - left
    }
}

/// The queue.
#[derive(Debug)]
pub(super) struct FrameQueue {
    frames: VecDeque<Queued>,
    bytes: u64,
    bytes_max: u64,
    pushed: u64,
    /// Frames below this number have begun to be handed out, or have expired.
    handed_out: u64,
    /// The earliest deadline, of a frame that has begun perhaps.
    deadline: Option<Micros>,
    expired: Vec<FrameNumber>,
    expired_frames: u64,
    finished: bool,
}

impl FrameQueue {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
            bytes_max,
            pushed: 0,
            handed_out: 0,
            deadline: None,
            expired: Vec::new(),
            expired_frames: 0,
            finished: false,
        }
    }

    pub(super) fn push(
        &mut self,
        header: Bytes,
        payload: Bytes,
        deadline: Option<Micros>,
    ) -> Result<FrameNumber, PushError> {
        if self.finished {
            return Err(PushError::Finished);
        }
        if self.bytes >= self.bytes_max {
            let queued_bytes = self.bytes;
            return Err(PushError::Full { queued_bytes });
        }
        let number = self.pushed;
        self.pushed += 1;
        let frame = Queued {
            number,
            header,
            payload,
            deadline,
            begun: false,
        };
        if frame.bytes() > 0 {
            self.bytes += frame.bytes();
            self.deadline = earlier(self.deadline, deadline);
            self.frames.push_back(frame);
        }
        Ok(FrameNumber(number))
    }

    pub(super) fn finish(&mut self) {
        self.finished = true;
    }

    /// Take `bytes`, not more than there are; whether a frame ends with them.
    pub(super) fn take(&mut self, bytes: u64) -> (Vec<Bytes>, bool) {
        let (mut chunks, mut left, mut frame_end) = (Vec::new(), bytes, false);
        while left > 0
            && let Some(frame) = self.frames.front_mut()
        {
            left -= frame.take(left, &mut chunks);
            self.handed_out = frame.number + 1;
            frame_end = frame.bytes() == 0;
            if frame_end {
                self.frames.pop_front();
            }
        }
        self.bytes -= bytes - left;
        (chunks, frame_end)
    }

    /// Drop the frames whose deadline has passed and that have not begun.
    pub(super) fn expire(&mut self, now: Micros) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let (mut next, mut dropped) = (None, 0);
        let expired = &mut self.expired;
        self.frames.retain(|frame| {
            let keep = frame.begun || frame.deadline.is_none_or(|deadline| now < deadline);
            if !keep {
                expired.push(FrameNumber(frame.number));
                dropped += frame.bytes();
                self.expired_frames += 1;
            } else if !frame.begun {
                next = earlier(next, frame.deadline);
            }
            keep
        });
        self.bytes -= dropped;
        self.deadline = next;
    }

    pub(super) fn expired(&mut self) -> Vec<FrameNumber> {
        std::mem::take(&mut self.expired)
    }

    pub(super) fn expired_frames(&self) -> u64 {
        self.expired_frames
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    pub(super) fn deadline(&self) -> Option<Micros> {
        self.deadline
    }

    pub(super) fn is_handed_out(&self, frame: FrameNumber) -> bool {
        frame.0 < self.handed_out
    }
}

/// The earlier of two points, where either may be none.
pub(super) fn earlier(one: Option<Micros>, other: Option<Micros>) -> Option<Micros> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
