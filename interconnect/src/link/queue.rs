//! A queue of frames bounded in bytes, from plain threads into one tokio task.

use crate::frame::Frame;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Why a frame was not queued.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PushError {
    /// Nobody takes from the queue any more.
    Closed,
    /// At its limit, with this many bytes.
    Full(usize),
}

#[derive(Default)]
struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    closed: bool,
}

/// The queue. A frame is admitted while the queue holds fewer bytes than its
/// limit, so it exceeds the limit by at most one frame.
pub(super) struct FrameQueue {
    state: Mutex<State>,
    bytes_max: usize,
    /// Room came up, or the queue closed.
    room: Condvar,
    /// Frames came in, or the queue closed.
    work: Notify,
}

impl FrameQueue {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            state: Mutex::default(),
            bytes_max,
            room: Condvar::new(),
            work: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change under the lock is whole, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, mut state: MutexGuard<'_, State>, frame: Frame) {
        state.bytes += frame.wire_bytes();
        state.frames.push_back(frame);
        drop(state);
        self.work.notify_one();
    }

    /// Queue a frame if there is room.
    pub(super) fn try_push(&self, frame: Frame) -> Result<(), PushError> {
        let state = self.lock();
        if state.closed {
            return Err(PushError::Closed);
        }
        if state.bytes >= self.bytes_max {
            return Err(PushError::Full(state.bytes));
        }
        self.admit(state, frame);
        Ok(())
    }

    /// Queue a frame, waiting for room.
    pub(super) fn push_blocking(&self, frame: Frame) -> Result<(), PushError> {
        let state = self
            .room
            .wait_while(self.lock(), |state| {
                !state.closed && state.bytes >= self.bytes_max
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return Err(PushError::Closed);
        }
        self.admit(state, frame);
        Ok(())
    }

    /// Take frames, waiting for the first: as many as make up `bytes`, at least
    /// one. `false`: closed and empty.
    pub(super) async fn take(&self, bytes: usize, into: &mut Vec<Frame>) -> bool {
        loop {
            {
                let mut state = self.lock();
                let mut taken = 0;
                while taken < bytes
                    && let Some(frame) = state.frames.pop_front()
                {
                    taken += frame.wire_bytes();
                    into.push(frame);
                }
                state.bytes -= taken;
                if taken > 0 {
                    drop(state);
                    self.room.notify_all();
                    return true;
                }
                if state.closed {
                    return false;
                }
            }
            self.work.notified().await;
        }
    }

    /// No more frames come in; what is queued may still be taken.
    pub(super) fn finish(&self) {
        self.lock().closed = true;
        self.room.notify_all();
        self.work.notify_one();
    }

    /// The taker is gone: drop what is queued, refuse what comes.
    pub(super) fn close(&self) {
        {
            let mut state = self.lock();
            state.closed = true;
            state.frames.clear();
            state.bytes = 0;
        }
        self.room.notify_all();
        self.work.notify_one();
    }

    pub(super) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameKind, HEADER_BYTES};
    use crate::ids::{Epoch, Generation, VmId};
    use std::sync::Arc;

    fn frame(epoch: u64) -> Frame {
        Frame::empty(
            FrameKind::EpochAck,
            VmId([0; 16]),
            Generation(0),
            Epoch(epoch),
        )
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
    }

    #[test]
    fn it_is_bounded_and_keeps_the_order() {
        let queue = FrameQueue::new(3 * HEADER_BYTES);
        for epoch in 0..3 {
            queue.try_push(frame(epoch)).unwrap();
        }
        assert_eq!(
            queue.try_push(frame(3)),
            Err(PushError::Full(3 * HEADER_BYTES))
        );
        let mut frames = Vec::new();
        assert!(runtime().block_on(queue.take(2 * HEADER_BYTES, &mut frames)));
        assert_eq!(frames.iter().map(|f| f.epoch.0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(queue.bytes(), HEADER_BYTES);
        queue.try_push(frame(3)).unwrap();
        queue.finish();
        assert_eq!(queue.try_push(frame(4)), Err(PushError::Closed));
        assert!(runtime().block_on(queue.take(usize::MAX, &mut frames)));
        assert!(!runtime().block_on(queue.take(usize::MAX, &mut frames)));
        assert_eq!(frames.len(), 4);
    }

    #[test]
    fn a_waiting_sender_gets_room_or_the_news_that_it_is_over() {
        let queue = Arc::new(FrameQueue::new(1));
        queue.try_push(frame(0)).unwrap();
        let sender = std::thread::spawn({
            let queue = Arc::clone(&queue);
            move || (queue.push_blocking(frame(1)), queue.push_blocking(frame(2)))
        });
        let mut frames = Vec::new();
        runtime().block_on(queue.take(1, &mut frames));
        runtime().block_on(async {
            while queue.bytes() == 0 {
                tokio::task::yield_now().await;
            }
        });
        queue.close();
        assert_eq!(sender.join().unwrap(), (Ok(()), Err(PushError::Closed)));
    }
}
