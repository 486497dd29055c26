//! The egress gate: what the guest sent waits here until its epoch is committed. Pure.
//!
//! Invariant (output-commit): [`Gate::release`] hands out frames of committed epochs only, in the
//! order they came, each once.

use crate::pool::Epoch;
use bytes::Bytes;
use std::collections::VecDeque;
use std::time::Duration;

/// Most frames held: at 1,500 bytes 24 MB, about 200 ms of a full gigabit. An epoch that takes
/// longer has trouble of its own.
pub const GATE_PACKETS_MAX: usize = 16_384;

/// Most bytes held: the same with a mean of 4 KiB, for large MTUs.
pub const GATE_BYTES_MAX: usize = 64 << 20;

/// Largest Ethernet frame taken from a guest or a tap.
pub const FRAME_BYTES_MAX: usize = 65_535;

const _: () = assert!(GATE_BYTES_MAX > 2 * FRAME_BYTES_MAX);

/// The gate takes no more: the frame is dropped, as a full queue of any router does, and the
/// guest's TCP sends it again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the egress gate holds {packets} frames of {bytes} bytes: frame dropped")]
pub struct GateFull {
    /// Frames held.
    pub packets: usize,
    /// Bytes held.
    pub bytes: usize,
}

/// What a push was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pushed {
    /// The first frame of its epoch: output waits from now on.
    pub first: bool,
    /// The gate has just become half full: time for a checkpoint.
    pub pressure: bool,
}

/// A frame in the gate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// Epoch it was sent in.
    pub epoch: Epoch,
    /// When it came, on the caller's clock.
    pub at: Duration,
    /// The frame.
    pub frame: Bytes,
}

/// See the module's text.
#[derive(Debug)]
pub struct Gate {
    held: VecDeque<Held>,
    bytes: usize,
    packets_max: usize,
    bytes_max: usize,
    pressure_told: bool,
}

impl Default for Gate {
    fn default() -> Self {
        Self::with_limits(GATE_PACKETS_MAX, GATE_BYTES_MAX)
    }
}

impl Gate {
    /// An empty gate with other limits than the usual.
    #[must_use]
    pub fn with_limits(packets_max: usize, bytes_max: usize) -> Self {
        Self {
            held: VecDeque::new(),
            bytes: 0,
            packets_max,
            bytes_max,
            pressure_told: false,
        }
    }

    /// Hold a frame of `epoch`, which is no lower than that of any frame held; `now` is on the
    /// caller's clock.
    ///
    /// # Errors
    /// [`GateFull`]: the frame is not held.
    pub fn push(&mut self, epoch: Epoch, frame: Bytes, now: Duration) -> Result<Pushed, GateFull> {
        debug_assert!(self.held.back().is_none_or(|last| last.epoch <= epoch));
        let bytes = self.bytes + frame.len();
        if self.held.len() >= self.packets_max || bytes > self.bytes_max {
            return Err(GateFull {
                packets: self.held.len(),
                bytes: self.bytes,
            });
        }
        let first = self.held.back().is_none_or(|last| last.epoch != epoch);
        self.bytes = bytes;
        self.held.push_back(Held {
            epoch,
            at: now,
            frame,
        });
        let half = self.held.len() * 2 > self.packets_max || bytes * 2 > self.bytes_max;
        let pressure = half && !self.pressure_told;
        self.pressure_told |= half;
        Ok(Pushed { first, pressure })
    }

    /// Take out up to `most` of the frames whose epoch is at most `through`, oldest first.
    pub fn release(&mut self, through: Epoch, most: usize) -> impl ExactSizeIterator<Item = Held> {
        let count = self
            .held
            .partition_point(|held| held.epoch <= through)
            .min(most);
        self.bytes -= self
            .held
            .range(..count)
            .map(|held| held.frame.len())
            .sum::<usize>();
        self.pressure_told &=
            (self.held.len() - count) * 2 > self.packets_max || self.bytes * 2 > self.bytes_max;
        self.held.drain(..count)
    }

    /// The newest frames of `epoch`, in order, as many as fit into `bytes_max` bytes.
    #[must_use]
    pub fn newest_of(&self, epoch: Epoch, bytes_max: usize) -> Vec<Bytes> {
        let mut room = bytes_max;
        let mut frames: Vec<Bytes> = self
            .held
            .iter()
            .rev()
            .skip_while(|held| held.epoch > epoch)
            .take_while(|held| held.epoch == epoch)
            .map_while(|held| {
                room = room.checked_sub(held.frame.len())?;
                Some(held.frame.clone())
            })
            .collect();
        frames.reverse();
        frames
    }

    /// Frames of epochs from `from` on count as of `running` now: their epoch goes on. Answers
    /// whether there are any. `running` must be at least the epoch of every other frame.
    pub fn uncut(&mut self, from: Epoch, running: Epoch) -> bool {
        let first = self.held.partition_point(|held| held.epoch < from);
        for held in self.held.range_mut(first..) {
            held.epoch = running;
        }
        first < self.held.len()
    }

    /// Forget all frames; answers how many there were.
    pub fn discard(&mut self) -> usize {
        let count = self.held.len();
        self.held.clear();
        self.bytes = 0;
        self.pressure_told = false;
        count
    }

    /// A new epoch has begun: pressure is told again.
    pub fn epoch_begins(&mut self) {
        self.pressure_told = false;
    }

    /// Frames held.
    #[must_use]
    pub fn packets(&self) -> usize {
        self.held.len()
    }

    /// Frames held of `epoch`, which is the newest.
    #[must_use]
    pub fn packets_of(&self, epoch: Epoch) -> usize {
        self.held.len() - self.held.partition_point(|held| held.epoch < epoch)
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the oldest frame held came.
    #[must_use]
    pub fn oldest(&self) -> Option<Duration> {
        self.held.front().map(|held| held.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_newest_frames_of_one_epoch_are_shown_and_stay() {
        let mut gate = Gate::default();
        for (epoch, byte) in [(1, 0), (2, 1), (2, 2), (2, 3), (3, 4)] {
            gate.push(Epoch(epoch), Bytes::from(vec![byte; 10]), Duration::ZERO)
                .unwrap();
        }
        let firsts = |frames: Vec<Bytes>| frames.iter().map(|f| f[0]).collect::<Vec<_>>();
        assert_eq!(firsts(gate.newest_of(Epoch(2), 100)), [1, 2, 3]);
        assert_eq!(firsts(gate.newest_of(Epoch(2), 25)), [2, 3]);
        assert_eq!(firsts(gate.newest_of(Epoch(4), 100)), [0; 0]);
        assert_eq!(gate.packets(), 5);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Push(u16),
        Cut,
        /// Commit up to this many epochs behind the running one (at least 1).
        Release(u64, usize),
        Uncut(bool),
        Discard,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (1_u16..2000).prop_map(Op::Push),
            3 => Just(Op::Cut),
            3 => (1_u64..4, 1_usize..40).prop_map(|(behind, most)| Op::Release(behind, most)),
            1 => any::<bool>().prop_map(Op::Uncut),
            1 => Just(Op::Discard),
        ]
    }

    proptest! {
        /// Against a plain list: order, once, never before its epoch, limits, counters.
        #[test]
        fn frames_leave_in_order_once_and_only_committed(
            ops in proptest::collection::vec(op(), 1..200)
        ) {
            let (packets_max, bytes_max) = (20, 16_000);
            let mut gate = Gate::with_limits(packets_max, bytes_max);
            let mut model: Vec<(u64, u32, usize)> = Vec::new();
            let mut running = 10_u64;
            let mut committed = 0_u64;
            let mut serial = 0_u32;
            for op in ops {
                match op {
                    Op::Push(len) => {
                        serial += 1;
                        let mut frame = vec![0; usize::from(len) + 4];
                        frame[..4].copy_from_slice(&serial.to_be_bytes());
                        let bytes: usize = model.iter().map(|(_, _, len)| len).sum();
                        let fits = model.len() < packets_max && bytes + frame.len() <= bytes_max;
                        let len = frame.len();
                        let pushed = gate.push(Epoch(running), frame.into(), Duration::ZERO);
                        prop_assert_eq!(pushed.is_ok(), fits);
                        if let Ok(pushed) = pushed {
                            let first = model.iter().all(|(epoch, ..)| *epoch != running);
                            prop_assert_eq!(pushed.first, first);
                            model.push((running, serial, len));
                        }
                    }
                    Op::Cut => running += 1,
                    Op::Release(behind, most) => {
                        let through = running.saturating_sub(behind);
                        committed = committed.max(through);
                        for held in gate.release(Epoch(through), most) {
                            prop_assert!(held.epoch.0 <= committed);
                            let (epoch, serial, _) = model.remove(0);
                            prop_assert_eq!(epoch, held.epoch.0);
                            prop_assert_eq!(&held.frame[..4], &serial.to_be_bytes());
                        }
                        let left = model.iter().filter(|(epoch, ..)| *epoch <= through).count();
                        prop_assert!(left == 0 || most < packets_max);
                    }
                    Op::Uncut(back) => {
                        let from = running - 1;
                        if from > committed {
                            let number = if back { from } else { running };
                            gate.uncut(Epoch(from), Epoch(number));
                            for frame in model.iter_mut().filter(|(epoch, ..)| *epoch >= from) {
                                frame.0 = number;
                            }
                            running = number;
                        }
                    }
                    Op::Discard => {
                        prop_assert_eq!(gate.discard(), model.len());
                        model.clear();
                    }
                }
                prop_assert_eq!(gate.packets(), model.len());
                prop_assert_eq!(gate.bytes(), model.iter().map(|(_, _, len)| len).sum::<usize>());
            }
        }
    }

    #[test]
    fn pressure_is_told_once_until_it_is_gone() {
        let mut gate = Gate::with_limits(4, 1 << 20);
        let push = |gate: &mut Gate| {
            gate.push(Epoch(1), Bytes::from_static(b"x"), Duration::ZERO)
                .map(|p| p.pressure)
        };
        assert_eq!(push(&mut gate), Ok(false));
        assert_eq!(push(&mut gate), Ok(false));
        assert_eq!(push(&mut gate), Ok(true));
        assert_eq!(push(&mut gate), Ok(false));
        assert!(push(&mut gate).is_err());
        assert_eq!(gate.release(Epoch(1), 4).len(), 4);
        for _ in 0..2 {
            assert_eq!(push(&mut gate), Ok(false));
        }
        assert_eq!(push(&mut gate), Ok(true));
    }
}
