//! The receiving side of a lane.
//!
//! ```text
//!  0 ........ taken ▓▓▓▓▓▓▓▓▓▓▓▓ in_order ░░░ gap ░░░▓▓▓▓▓▓▓░░░░▓▓▓▓░░░ taken + window
//!    with the reader    ready                        beyond   beyond
//! ```
//!
//! Invariants: what is held lies between `taken` and the window's end, each byte once.

use super::wire::{LaneAck, Piece};
use super::{ACK_BYTES, ACK_DELAY, LANE_SEGMENTS_MAX, LINKS_MAX, LaneId, LinkIndex, Micros};
use bytes::{Buf, Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};

/// Pieces below this are gathered by copying, in bytes; a packet on an Ethernet of
/// 1,500 bytes is just above.
const PIECE_SMALL_BYTES: usize = 1 << 10;
/// What is gathered before it is set apart, in bytes.
const TAIL_BYTES: usize = 16 << 10;
/// Parts beyond a gap, at most: a sender has one for each segment it may have handed out,
/// and a copy that comes in pieces of its own may start another.
const PARTS_MAX: usize = 2 * LANE_SEGMENTS_MAX;

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

/// Bytes that follow one another. Small pieces are gathered, so that many of them cost no
/// more memory than their bytes and none keeps a whole datagram's buffer alive.
#[derive(Debug, Default)]
struct Run {
    chunks: VecDeque<Bytes>,
    /// Gathered small pieces, after `chunks`.
    tail: BytesMut,
    bytes: u64,
}

impl Run {
    fn push(&mut self, bytes: Bytes) {
        self.bytes += bytes.len() as u64;
        if bytes.len() >= PIECE_SMALL_BYTES {
            self.settle();
            self.chunks.push_back(bytes);
        } else {
            self.tail.extend_from_slice(&bytes);
            if self.tail.len() >= TAIL_BYTES {
                self.settle();
            }
        }
    }

    fn settle(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }

    fn append(&mut self, mut other: Self) {
        other.settle();
        self.settle();
        self.bytes += other.bytes;
        self.chunks.append(&mut other.chunks);
    }

    fn pop(&mut self) -> Option<Bytes> {
        if self.chunks.is_empty() {
            self.settle();
        }
        let chunk = self.chunks.pop_front()?;
        self.bytes -= chunk.len() as u64;
        Some(chunk)
    }
}

/// What one link's connection brought, and what it was told.
#[derive(Clone, Copy, Debug, Default)]
struct Arrivals {
    stands: bool,
    received: u64,
    /// The last round of acknowledgements this link took part in.
    round: u64,
}

/// The receiving side of one lane.
#[derive(Debug)]
pub struct LaneReceiver {
    lane: LaneId,
    window_bytes: u64,
    /// Taken out by the reader.
    taken: u64,
    /// In order, not taken: from `taken` to `in_order`.
    ready: Run,
    in_order: u64,
    /// Beyond a gap, by offset; no two overlap, none starts at `in_order` or below.
    beyond: BTreeMap<u64, Run>,
    beyond_bytes: u64,
    /// Highest offset seen.
    highest: u64,
    end: Option<u64>,
    /// The farthest end of a frame seen.
    frame_end: u64,
    arrivals: [Arrivals; LINKS_MAX],
    /// Rounds of acknowledgements so far: in each, every link tells the same.
    round: u64,
    /// Since the last round: bytes that came, bytes taken, and when the first did.
    came: u64,
    taken_since: u64,
    since: Option<Micros>,
    repeated_bytes: u64,
}

impl LaneReceiver {
    /// A lane of which nothing has come. `window_bytes`: as in the [`super::wire::Join`]
    /// this side sent.
    #[must_use]
    pub fn new(lane: LaneId, window_bytes: u64) -> Self {
        Self {
            lane,
            window_bytes,
            taken: 0,
            ready: Run::default(),
            in_order: 0,
            beyond: BTreeMap::new(),
            beyond_bytes: 0,
            highest: 0,
            end: None,
            frame_end: 0,
            arrivals: [Arrivals::default(); LINKS_MAX],
            round: 0,
            came: 0,
            taken_since: 0,
            since: None,
            repeated_bytes: 0,
        }
    }

    /// A new connection stands on this link; for those that stand when the lane starts, too.
    /// Its first acknowledgement is owed at once if there is anything to tell.
    pub fn link_up(&mut self, link: LinkIndex) {
        let round = match self.taken {
            0 => self.round,
            _ => u64::MAX,
        };
        if let Some(arrivals) = self.arrivals.get_mut(usize::from(link.0)) {
            *arrivals = Arrivals {
                stands: true,
                received: 0,
                round,
            };
        }
    }

    /// Its connection is gone.
    pub fn link_down(&mut self, link: LinkIndex) {
        if let Some(arrivals) = self.arrivals.get_mut(usize::from(link.0)) {
            *arrivals = Arrivals::default();
        }
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
        let (start, counts) = (piece.offset, piece.bytes.len() as u64);
        let allowed = self.taken.saturating_add(self.window_bytes);
        let end = start
            .checked_add(counts)
            .filter(|end| *end <= allowed)
            .ok_or(ReceiveError::Window {
                lane: self.lane,
                end: start.saturating_add(counts),
                allowed,
            })?;
        self.check_end(&piece, end)?;
        self.highest = self.highest.max(end);
        if piece.frame_end {
            self.frame_end = self.frame_end.max(end);
        }
        let before = self.held_bytes();
        self.place(start, piece.bytes)?;
        self.repeated_bytes += counts - (self.held_bytes() - before);

        if let Some(arrivals) = self.arrivals.get_mut(usize::from(link.0)) {
            arrivals.received += counts + u64::from(piece.fin);
        }
        self.came += counts;
        // A frame's end closes what a sender waits for most: an epoch.
        self.stir(now, self.came >= ACK_BYTES || piece.fin || piece.frame_end);
        Ok(())
    }

    fn check_end(&mut self, piece: &Piece, end: u64) -> Result<(), ReceiveError> {
        let known = match self.end {
            Some(known) => known,
            None if piece.fin => end.max(self.highest),
            None => return Ok(()),
        };
        if end > known || (piece.fin && end != known) {
            return Err(ReceiveError::End {
                lane: self.lane,
                end: known,
                other: end,
            });
        }
        self.end = Some(known);
        Ok(())
    }

    /// Put bytes where they belong, less those that are there.
    fn place(&mut self, mut start: u64, mut bytes: Bytes) -> Result<(), ReceiveError> {
        loop {
            // All of these may have moved since the last part.
            let mut free_from = start.max(self.in_order);
            if let Some((&at, run)) = self.beyond.range(..=free_from).next_back() {
                free_from = free_from.max(at + run.bytes);
            }
            let have = usize::try_from(free_from - start).unwrap_or(usize::MAX);
            if have >= bytes.len() {
                return Ok(());
            }
            bytes.advance(have);
            let next = self.beyond.range(free_from..).next();
            let free = next.map_or(usize::MAX, |(&at, _)| {
                usize::try_from(at - free_from).unwrap_or(usize::MAX)
            });
            let part = bytes.split_to(free.min(bytes.len()));
            start = free_from + part.len() as u64;
            if !part.is_empty() {
                self.add(free_from, part)?;
            }
        }
    }

    /// Put bytes into a free place.
    fn add(&mut self, start: u64, part: Bytes) -> Result<(), ReceiveError> {
        if start == self.in_order {
            self.in_order += part.len() as u64;
            self.ready.push(part);
            while let Some(run) = self.beyond.remove(&self.in_order) {
                self.in_order += run.bytes;
                self.beyond_bytes -= run.bytes;
                self.ready.append(run);
            }
            return Ok(());
        }
        self.beyond_bytes += part.len() as u64;
        if let Some((&at, run)) = self.beyond.range_mut(..start).next_back()
            && at + run.bytes == start
        {
            run.push(part);
            return Ok(());
        }
        if self.beyond.len() >= PARTS_MAX {
            return Err(ReceiveError::Parts {
                lane: self.lane,
                max: PARTS_MAX,
            });
        }
        self.beyond.entry(start).or_default().push(part);
        Ok(())
    }

    /// The next bytes in order. Taking them is what moves the window: take them when there
    /// is room for them.
    pub fn pop(&mut self, now: Micros) -> Option<Bytes> {
        let bytes = self.ready.pop()?;
        let before = self.taken;
        self.taken += bytes.len() as u64;
        self.taken_since += bytes.len() as u64;
        let frame = before < self.frame_end && self.taken >= self.frame_end;
        self.stir(
            now,
            frame || self.taken_since >= ACK_BYTES || self.is_finished(),
        );
        Some(bytes)
    }

    /// Something is to be told: with the next round, or now with a round of its own.
    fn stir(&mut self, now: Micros, at_once: bool) {
        self.since.get_or_insert(now);
        if at_once {
            self.start_round();
        }
    }

    fn start_round(&mut self) {
        self.round += 1;
        (self.came, self.taken_since, self.since) = (0, 0, None);
    }

    /// Whether the lane's end was reached and everything before it was taken.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.end == Some(self.taken)
    }

    /// Whether this link is owed an acknowledgement now; ask after each insert and pop.
    #[must_use]
    pub fn ack_due(&self, link: LinkIndex) -> bool {
        self.arrivals
            .get(usize::from(link.0))
            .is_some_and(|arrivals| arrivals.stands && arrivals.round != self.round)
    }

    /// The acknowledgement this link is owed now; it is then taken for sent there.
    pub fn next_ack(&mut self, link: LinkIndex, now: Micros) -> Option<LaneAck> {
        if self.next_wakeup().is_some_and(|at| at <= now) {
            self.start_round();
        }
        if !self.ack_due(link) {
            return None;
        }
        let delivered = self.taken + u64::from(self.is_finished());
        let arrivals = self.arrivals.get_mut(usize::from(link.0))?;
        arrivals.round = self.round;
        Some(LaneAck {
            lane: self.lane,
            delivered,
            received: arrivals.received,
        })
    }

    /// When acknowledgements become due though nothing happens: ask every link then.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Micros> {
        Some(self.since?.plus(ACK_DELAY))
    }

    /// Bytes held: in order and not taken, or waiting for earlier ones.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.ready.bytes + self.beyond_bytes
    }

    /// Bytes that came more than once so far.
    #[must_use]
    pub fn repeated_bytes(&self) -> u64 {
        self.repeated_bytes
    }
}
