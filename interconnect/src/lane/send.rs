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

pub use super::queue::{FrameNumber, PushError};

use super::links::Links;
use super::queue::{FrameQueue, earlier};
use super::stripe::{self, LinkHealth, LinkViews};
use super::wire::{LaneAck, SegmentHeader};
use super::{LANE_SEGMENTS_MAX, LINKS_MAX, LaneClass, LinkIndex, Micros, SEGMENT_BYTES};
use bytes::Bytes;
use std::collections::{BTreeSet, VecDeque};

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

/// A segment handed out and not delivered.
#[derive(Debug)]
struct Entry {
    header: SegmentHeader,
    chunks: Vec<Bytes>,
    /// Links on which it is on its way, a bit each.
    on: u8,
    /// It has come over some link; an earlier one is missing.
    received: bool,
}

impl Entry {
    /// What it counts in acknowledgements: its bytes, and one for a lane's end.
    fn counts(&self) -> u64 {
        u64::from(self.header.bytes) + u64::from(self.header.fin)
    }

    fn end(&self) -> u64 {
        self.header.offset + self.counts()
    }
}

/// A segment on its way on one link.
#[derive(Debug)]
struct Flying {
    /// The entry's number; it may be gone by now.
    entry: u64,
    counts: u64,
    due: Micros,
}

/// One link's connection as this lane uses it.
#[derive(Debug, Default)]
struct Flight {
    stands: bool,
    /// In the order handed out, which is the order they arrive in.
    flying: VecDeque<Flying>,
    /// Handed to this connection, in all.
    sent: u64,
    /// Of those, no longer flying.
    returned: u64,
    /// Control lane: the entry to send next.
    cursor: u64,
}

/// The sending side of one lane.
#[derive(Debug)]
pub struct LaneSender {
    class: LaneClass,
    window_bytes: u64,
    queue: FrameQueue,
    fin_sent: bool,
    /// Handed out and not delivered, by offset.
    entries: VecDeque<Entry>,
    /// Number of the first of `entries`.
    first: u64,
    /// Where the next segment starts; past the end by one when that was handed out.
    offset: u64,
    delivered: u64,
    /// Entries to hand out again.
    again: BTreeSet<u64>,
    again_bytes: u64,
    repeated_bytes: u64,
    flights: [Flight; LINKS_MAX],
    /// Links that were up when last looked, a bit each.
    up: u8,
}

fn bit(link: usize) -> u8 {
    1 << link
}

impl LaneSender {
    /// A lane with nothing on it. `queue_bytes`: what may wait to be handed out (exceeded by
    /// at most one frame). `window_bytes`: what may be handed out beyond what is delivered:
    /// the smaller of both sides' [`super::LANE_WINDOW_BYTES`].
    #[must_use]
    pub fn new(class: LaneClass, queue_bytes: u64, window_bytes: u64) -> Self {
        Self {
            class,
            window_bytes,
            queue: FrameQueue::new(queue_bytes),
            fin_sent: false,
            entries: VecDeque::new(),
            first: 0,
            offset: 0,
            delivered: 0,
            again: BTreeSet::new(),
            again_bytes: 0,
            repeated_bytes: 0,
            flights: Default::default(),
            up: 0,
        }
    }

    /// Queue a frame: its header, and its payload if it has one. With a deadline it is
    /// dropped whole if no byte of it was handed out by then ([`LaneSender::expired`]).
    ///
    /// # Errors
    /// [`PushError`]; the frame is not queued.
    pub fn push(
        &mut self,
        header: Bytes,
        payload: Bytes,
        deadline: Option<Micros>,
    ) -> Result<FrameNumber, PushError> {
        self.queue.push(header, payload, deadline)
    }

    /// No more frames come; the lane ends after those queued.
    pub fn finish(&mut self) {
        self.queue.finish();
    }

    /// What this link may send now. Call until `None`; again after anything of this lane or
    /// of any link has changed, and at [`LaneSender::next_wakeup`].
    pub fn next(&mut self, link: LinkIndex, links: &mut Links, now: Micros) -> Option<Segment> {
        let at = usize::from(link.0);
        if !self.flights.get(at)?.stands {
            return None;
        }
        self.queue.expire(now);
        let entry = match self.class {
            LaneClass::Control => self.next_control(at),
            LaneClass::Epoch | LaneClass::Io => self.next_striped(link, links, now),
        }?;
        self.hand_out(link, entry, links, now)
    }

    /// Every link goes through all entries at its own pace.
    fn next_control(&mut self, at: usize) -> Option<u64> {
        let cursor = self.flights[at].cursor.max(self.first);
        if cursor >= self.first + self.entries.len() as u64 {
            self.cut(SEGMENT_BYTES as u64)?;
        }
        self.flights[at].cursor = cursor + 1;
        Some(cursor)
    }

    fn next_striped(&mut self, link: LinkIndex, links: &Links, now: Micros) -> Option<u64> {
        let views = links.views(self.class, now);
        self.rescue(&views);
        let here = bit(usize::from(link.0));
        // Those that are on their way on a link that is well again need not go again. Those
        // that are on their way here stay, for another link to take.
        let up = self.up;
        let needless = |entry: Option<&Entry>| entry.is_none_or(|entry| entry.on & up != 0);
        while let Some(&number) = self.again.iter().find(|n| needless(self.entry(**n))) {
            self.strike(number);
        }
        let again = self.again.iter().find_map(|&number| {
            let entry = self.entry(number)?;
            (entry.on & here == 0).then(|| (number, entry.counts()))
        });
        let takes = |segment: u64| {
            let backlog = match self.class {
                LaneClass::Epoch => (self.queue.bytes() + self.again_bytes).max(segment),
                LaneClass::Control | LaneClass::Io => segment,
            };
            stripe::takes(link, &views, segment, backlog)
        };
        if let Some((number, bytes)) = again {
            return takes(bytes).then_some(number);
        }
        let largest = stripe::segment_bytes(link, &views);
        if !takes(self.queue.bytes().clamp(1, largest)) {
            return None;
        }
        self.cut(largest)
    }

    /// Turn at most `largest` bytes at the front of the queue into an entry, if there is
    /// anything and the window has room; its number.
    fn cut(&mut self, largest: u64) -> Option<u64> {
        let ends = self.queue.is_finished() && !self.fin_sent;
        if self.fin_sent || (self.queue.is_empty() && !ends) {
            return None;
        }
        let bytes = self.queue.bytes().min(largest);
        if self.offset + bytes > self.delivered + self.window_bytes
            || self.entries.len() >= LANE_SEGMENTS_MAX
        {
            return None;
        }
        let (chunks, frame_end) = self.queue.take(bytes);
        let fin = ends && self.queue.is_empty();
        self.fin_sent |= fin;
        let entry = Entry {
            header: SegmentHeader {
                offset: self.offset,
                bytes: u32::try_from(bytes).unwrap_or(0),
                fin,
                frame_end,
            },
            chunks,
            on: 0,
            received: false,
        };
        self.offset = entry.end();
        self.entries.push_back(entry);
        Some(self.first + self.entries.len() as u64 - 1)
    }

    fn hand_out(
        &mut self,
        link: LinkIndex,
        number: u64,
        links: &mut Links,
        now: Micros,
    ) -> Option<Segment> {
        let at = usize::from(link.0);
        let again = self.strike(number);
        let entry = self.entry_mut(number)?;
        entry.on |= bit(at);
        let counts = entry.counts();
        let segment = Segment {
            header: entry.header,
            chunks: entry.chunks.clone(),
            again,
        };
        if again {
            self.repeated_bytes += u64::from(segment.header.bytes);
        }
        links.sent(link, self.class, counts);
        // All that is on its way on the link: patience is cheap here.
        let view = links.views(LaneClass::Control, now)[at];
        let flight = &mut self.flights[at];
        flight.sent += counts;
        flight.flying.push_back(Flying {
            entry: number,
            counts,
            due: now.plus(stripe::overdue_after(&view)),
        });
        Some(segment)
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
        // A lane that is done or abandoned waits for nothing.
        if self.is_done() {
            return Ok(());
        }
        let LaneAck {
            delivered,
            received,
            ..
        } = ack;
        if delivered > self.offset {
            let sent = self.offset;
            return Err(AckError::Delivered { delivered, sent });
        }
        let Some(flight) = self
            .flights
            .get_mut(usize::from(link.0))
            .filter(|flight| flight.stands)
        else {
            return Ok(());
        };
        if received > flight.sent {
            let sent = flight.sent;
            return Err(AckError::Received {
                link,
                received,
                sent,
            });
        }
        let mut arrived = Vec::new();
        while let Some(flying) = flight.flying.front()
            && flight.returned + flying.counts <= received
        {
            flight.returned += flying.counts;
            links.returned(link, self.class, flying.counts, now);
            arrived.push(flying.entry);
            flight.flying.pop_front();
        }
        for number in arrived {
            self.strike(number);
            if let Some(entry) = self.entry_mut(number) {
                entry.on &= !bit(usize::from(link.0));
                entry.received = true;
            }
        }
        self.delivered = self.delivered.max(delivered);
        while let Some(entry) = self.entries.front()
            && entry.end() <= self.delivered
        {
            self.strike(self.first);
            self.entries.pop_front();
            self.first += 1;
        }
        if self.is_done() {
            self.release(links, now);
        }
        Ok(())
    }

    /// A new connection stands on this link (after [`Links::up`]).
    pub fn link_up(&mut self, link: LinkIndex) {
        if let Some(flight) = self.flights.get_mut(usize::from(link.0)) {
            *flight = Flight {
                stands: true,
                ..Flight::default()
            };
        }
    }

    /// The link's connection is gone (after [`Links::down`]): what was on its way there goes
    /// again elsewhere.
    pub fn link_down(&mut self, link: LinkIndex) {
        let at = usize::from(link.0);
        let Some(flight) = self.flights.get_mut(at) else {
            return;
        };
        let flight = std::mem::take(flight);
        for flying in flight.flying {
            let Some(entry) = self.entry_mut(flying.entry) else {
                continue;
            };
            entry.on &= !bit(at);
            if !entry.received && entry.on == 0 {
                self.mark(flying.entry);
            }
        }
        // What is left on suspect links alone is looked for again.
        self.up = 0;
    }

    /// Look for overdue segments and passed deadlines. Returns the links that are suspect
    /// from now on; if any, ask all links of all lanes for what they may send. Call at
    /// [`LaneSender::next_wakeup`].
    pub fn tick(&mut self, links: &mut Links, now: Micros) -> Vec<LinkIndex> {
        self.queue.expire(now);
        let mut news = Vec::new();
        for (index, flight) in (0u8..).zip(&self.flights) {
            let overdue = flight.flying.front().is_some_and(|front| front.due <= now);
            if overdue && links.suspect(LinkIndex(index), now) {
                news.push(LinkIndex(index));
            }
        }
        news
    }

    /// When to call [`LaneSender::tick`] though nothing happens.
    #[must_use]
    pub fn next_wakeup(&self, links: &Links) -> Option<Micros> {
        let due = (0u8..)
            .zip(&self.flights)
            .filter(|(index, _)| links.may_turn_suspect(LinkIndex(*index)))
            .filter_map(|(_, flight)| Some(flight.flying.front()?.due))
            .min();
        earlier(due, self.queue.deadline())
    }

    /// Copies of what is on its way on links that are not up alone, once one is up: they may
    /// take long, or for ever.
    fn rescue(&mut self, views: &LinkViews) {
        let up = (0..LINKS_MAX)
            .filter(|at| views[*at].health == LinkHealth::Up)
            .fold(0, |up, at| up | bit(at));
        if up == std::mem::replace(&mut self.up, up) || up == 0 {
            return;
        }
        for number in self.first..self.first + self.entries.len() as u64 {
            if let Some(entry) = self.entry(number)
                && !entry.received
                && entry.on & up == 0
            {
                self.mark(number);
            }
        }
    }

    /// This entry goes out again.
    fn mark(&mut self, number: u64) {
        if let Some(entry) = self.entry(number)
            && self.class != LaneClass::Control
        {
            let counts = entry.counts();
            if self.again.insert(number) {
                self.again_bytes += counts;
            }
        }
    }

    /// It need not any more, or does so now. Whether it was to.
    fn strike(&mut self, number: u64) -> bool {
        let was = self.again.remove(&number);
        if was && let Some(entry) = self.entry(number) {
            self.again_bytes -= entry.counts();
        }
        was
    }

    fn entry(&self, number: u64) -> Option<&Entry> {
        let at = number.checked_sub(self.first)?;
        self.entries.get(usize::try_from(at).ok()?)
    }

    fn entry_mut(&mut self, number: u64) -> Option<&mut Entry> {
        let at = number.checked_sub(self.first)?;
        self.entries.get_mut(usize::try_from(at).ok()?)
    }

    /// Frames dropped since last asked because their deadline passed: certainly not sent.
    pub fn expired(&mut self) -> Vec<FrameNumber> {
        self.queue.expired()
    }

    /// Count nothing of this lane as on its way: a link may have yet to say that copies and
    /// last segments came, and nobody will be there to hear it.
    fn release(&mut self, links: &mut Links, now: Micros) {
        for (index, flight) in (0u8..).zip(&mut self.flights) {
            let bytes = flight.flying.drain(..).map(|flying| flying.counts).sum();
            flight.returned = flight.sent;
            links.returned(LinkIndex(index), self.class, bytes, now);
        }
    }

    /// Nobody wants the lane any more: forget all of it. Its streams are to be reset.
    pub fn abandon(&mut self, links: &mut Links, now: Micros) {
        self.release(links, now);
        *self = Self::new(self.class, 0, self.window_bytes);
        self.queue.finish();
        self.fin_sent = true;
    }

    /// Whether everything and the lane's end was delivered (or the lane abandoned).
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.fin_sent && self.entries.is_empty()
    }

    /// Bytes that wait to be handed out for the first time.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        self.queue.bytes()
    }

    /// Bytes handed out and not delivered.
    #[must_use]
    pub fn unacked_bytes(&self) -> u64 {
        self.offset - self.delivered
    }

    /// Segments handed out and not delivered.
    #[cfg(test)]
    pub(super) fn entries_held(&self) -> usize {
        self.entries.len()
    }

    /// Bytes handed out again so far.
    #[must_use]
    pub fn repeated_bytes(&self) -> u64 {
        self.repeated_bytes
    }

    /// Frames dropped for their deadline so far.
    #[must_use]
    pub fn expired_frames(&self) -> u64 {
        self.queue.expired_frames()
    }

    /// Whether this frame, if it has not expired, has begun to be handed out: its fate is
    /// the partner's word.
    #[must_use]
    pub fn is_handed_out(&self, frame: FrameNumber) -> bool {
        self.queue.is_handed_out(frame)
    }
}
