//! A pair of hosts with up to eight links in virtual time: no clock, one seed.
//!
//! A link carries what it is given in order, at its capacity and after its delay. It may
//! stall (nothing arrives, nothing is lost), change its capacity, or be cut: then what is on
//! its way is lost, and both ends learn of it some time later, as QUIC would tell them. Every
//! byte that comes out of a lane is compared with what went in at that offset.

use crate::lane::links::{LinkMeasure, Links};
use crate::lane::receive::LaneReceiver;
use crate::lane::send::LaneSender;
use crate::lane::stripe::LinkHealth;
use crate::lane::wire::{LaneAck, Piece};
use crate::lane::{LANE_SEGMENTS_MAX, LANE_WINDOW_BYTES_MIN, LaneClass, LaneId, LinkIndex, Micros};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

/// What is on a lane repeats after this; odd, so that it lines up with nothing.
const PATTERN_BYTES: usize = (1 << 20) + 7;
/// Pieces arrive in at most this many bytes: some packets at a time.
const PIECE_BYTES: usize = 16 << 10;
/// A link's capacity is known once this much was received over it.
const MEASURED_AFTER: u64 = 128 << 10;

fn pattern() -> &'static Bytes {
    static PATTERN: OnceLock<Bytes> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut random = Random(7);
        (0..2 * PATTERN_BYTES)
            .scan(Vec::new(), |period: &mut Vec<u8>, at| {
                if at < PATTERN_BYTES {
                    period.push(random.next().to_le_bytes()[0]);
                }
                Some(period[at % PATTERN_BYTES])
            })
            .collect::<Vec<_>>()
            .into()
    })
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(super) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }
}

#[derive(Debug)]
enum Event {
    /// Content of a lane arrives over a connection.
    Piece { lane: usize, piece: Piece },
    /// An acknowledgement arrives.
    Ack(LaneAck),
    /// Both ends learn that the connection is gone.
    Gone,
    /// A new connection stands.
    Back,
}

/// What the test does at a set time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Everything on its way is lost; the ends learn of it after the first span, a new
    /// connection stands after the second. `None`: never again.
    Cut(Micros, Option<Micros>),
    /// Nothing arrives for so long.
    Stall(Micros),
    /// From now on it carries so much.
    Capacity(u64),
}

pub(super) struct Wire {
    pub(super) capacity: u64,
    pub(super) delay: u64,
    /// Counts up with each connection.
    connection: u64,
    stands: bool,
    cut: bool,
    /// When the wire is free for the next byte.
    free_at: u64,
    stalled_until: u64,
    last_arrival: u64,
    last_ack: u64,
    received: u64,
    /// What each lane gave this connection, in order: offset, what it counts.
    sent: Vec<(usize, u64, u64)>,
    /// Bytes of segments it was given, and those that went out before elsewhere.
    pub(super) given: u64,
    pub(super) again: u64,
}

pub(super) struct Lane {
    pub(super) class: LaneClass,
    pub(super) sender: LaneSender,
    pub(super) receiver: LaneReceiver,
    pushed: u64,
    pub(super) taken: u64,
    /// The reader takes nothing before.
    pub(super) reads_from: Micros,
    pub(super) finished: bool,
}

pub(super) struct World {
    pub(super) now: Micros,
    pub(super) random: Random,
    pub(super) wires: Vec<Wire>,
    pub(super) links: Links,
    pub(super) lanes: Vec<Lane>,
    pub(super) window: u64,
    events: BTreeMap<(u64, u64), (usize, u64, Event)>,
    faults: BTreeMap<(u64, u64), (usize, Fault)>,
    order: u64,
    /// Segments known to have arrived: lane, offset.
    arrived: BTreeSet<(usize, u64)>,
    /// Links that became suspect, and when.
    pub(super) suspects: Vec<(Micros, LinkIndex)>,
    /// What was on its way on links that were cut and not known to be received, and what
    /// overdue links held: all that may ever be sent again.
    pub(super) may_repeat: u64,
    /// Off by up to so many percent is what the hosts think a link carries.
    pub(super) measure_error: u64,
}

impl World {
    /// Links of (capacity in bytes a second, one-way delay in microseconds).
    pub(super) fn new(seed: u64, wires: &[(u64, u64)]) -> Self {
        let mut world = Self {
            now: Micros(1_000_000),
            random: Random(seed),
            wires: Vec::new(),
            links: Links::new(),
            lanes: Vec::new(),
            window: crate::lane::LANE_WINDOW_BYTES,
            events: BTreeMap::new(),
            faults: BTreeMap::new(),
            order: 0,
            arrived: BTreeSet::new(),
            suspects: Vec::new(),
            may_repeat: 0,
            measure_error: 0,
        };
        for (capacity, delay) in wires {
            world.wires.push(Wire {
                capacity: *capacity,
                delay: *delay,
                connection: 0,
                stands: false,
                cut: false,
                free_at: 0,
                stalled_until: 0,
                last_arrival: 0,
                last_ack: 0,
                received: 0,
                sent: Vec::new(),
                given: 0,
                again: 0,
            });
            world.link_up(world.wires.len() - 1);
        }
        world
    }

    pub(super) fn open(&mut self, class: LaneClass) -> usize {
        assert!(self.window >= LANE_WINDOW_BYTES_MIN);
        let id = LaneId(u32::try_from(self.lanes.len()).unwrap());
        let mut sender = LaneSender::new(class, u64::MAX, self.window);
        let mut receiver = LaneReceiver::new(id, self.window);
        for (at, wire) in self.wires.iter().enumerate() {
            if wire.stands {
                sender.link_up(index(at));
                receiver.link_up(index(at));
            }
        }
        self.lanes.push(Lane {
            class,
            sender,
            receiver,
            pushed: 0,
            taken: 0,
            reads_from: Micros(0),
            finished: false,
        });
        self.lanes.len() - 1
    }

    /// Queue a frame of so many bytes in all (at most a MiB).
    pub(super) fn push(&mut self, lane: usize, bytes: u64) {
        let lane = &mut self.lanes[lane];
        let from = usize::try_from(lane.pushed % PATTERN_BYTES as u64).unwrap();
        let frame = pattern().slice(from..from + usize::try_from(bytes).unwrap());
        let head = frame.slice(..frame.len().min(52));
        lane.sender
            .push(head, frame.slice(frame.len().min(52)..), None)
            .unwrap();
        lane.pushed += bytes;
    }

    pub(super) fn fault(&mut self, after: Micros, wire: usize, fault: Fault) {
        self.order += 1;
        self.faults
            .insert((self.now.plus(after).0, self.order), (wire, fault));
    }

    fn at(&mut self, time: u64, wire: usize, event: Event) {
        self.order += 1;
        let connection = self.wires[wire].connection;
        self.events
            .insert((time, self.order), (wire, connection, event));
    }

    fn link_up(&mut self, at: usize) {
        let wire = &mut self.wires[at];
        wire.connection += 1;
        (wire.stands, wire.cut, wire.received) = (true, false, 0);
        wire.sent.clear();
        (wire.free_at, wire.last_arrival, wire.last_ack) = (0, 0, 0);
        self.links.up(index(at), self.now);
        for lane in &mut self.lanes {
            lane.sender.link_up(index(at));
            lane.receiver.link_up(index(at));
        }
        self.measure(at);
    }

    fn measure(&mut self, at: usize) {
        let error = self.random.below(2 * self.measure_error + 1) + 100 - self.measure_error;
        let wire = &self.wires[at];
        let queue = wire.free_at.saturating_sub(self.now.0);
        self.links.measured(
            index(at),
            LinkMeasure {
                saturated: true,
                capacity: (wire.received >= MEASURED_AFTER).then(|| wire.capacity * error / 100),
                rtt: Micros(2 * wire.delay + queue),
                rtt_min: Micros(2 * wire.delay),
            },
        );
    }

    fn break_wire(&mut self, at: usize, fault: Fault) {
        match fault {
            Fault::Capacity(capacity) => self.wires[at].capacity = capacity,
            Fault::Stall(span) => {
                let until = self.now.plus(span).0;
                self.wires[at].stalled_until = self.wires[at].stalled_until.max(until);
                // What has not come by now comes afterwards, in its order.
                let late: Vec<_> = self
                    .events
                    .iter()
                    .filter(|((time, _), (wire, _, event))| {
                        *wire == at
                            && *time < until
                            && matches!(event, Event::Piece { .. } | Event::Ack(_))
                    })
                    .map(|(key, _)| *key)
                    .collect();
                for key in late {
                    let event = self.events.remove(&key).unwrap();
                    self.events.insert((until, key.1), event);
                }
                let wire = &mut self.wires[at];
                wire.last_arrival = wire.last_arrival.max(until);
                wire.last_ack = wire.last_ack.max(until);
                wire.free_at = wire.free_at.max(until);
            }
            Fault::Cut(learn, back) => {
                if !self.wires[at].stands || self.wires[at].cut {
                    return;
                }
                self.wires[at].cut = true;
                self.events
                    .retain(|_, (wire, _, event)| *wire != at || matches!(event, Event::Back));
                let learn = self.now.plus(learn).0;
                self.at(learn, at, Event::Gone);
                if let Some(back) = back {
                    self.at(learn + back.0, at, Event::Back);
                }
            }
        }
    }

    /// Let everything that may happen now happen.
    fn pump(&mut self) {
        loop {
            let mut moved = false;
            for lane in 0..self.lanes.len() {
                moved |= self.take(lane);
                for at in 0..self.wires.len() {
                    while let Some(segment) =
                        self.lanes[lane]
                            .sender
                            .next(index(at), &mut self.links, self.now)
                    {
                        moved = true;
                        assert!(self.wires[at].stands, "sent on a link that is down");
                        self.send(lane, at, segment);
                    }
                    while let Some(ack) = self.lanes[lane].receiver.next_ack(index(at), self.now) {
                        moved = true;
                        if !self.wires[at].cut {
                            let wire = &mut self.wires[at];
                            let time = self.now.0.max(wire.stalled_until) + wire.delay;
                            wire.last_ack = wire.last_ack.max(time);
                            let time = wire.last_ack;
                            self.at(time, at, Event::Ack(ack));
                        }
                    }
                }
            }
            self.check();
            if !moved {
                return;
            }
        }
    }

    fn send(&mut self, lane: usize, at: usize, segment: crate::lane::send::Segment) {
        let header = segment.header;
        let total: usize = segment.chunks.iter().map(Bytes::len).sum();
        assert_eq!(total, header.bytes as usize);
        self.wires[at].given += total as u64;
        self.check_repeat(lane, at, &segment);
        let counts = total as u64 + u64::from(header.fin);
        self.wires[at].sent.push((lane, header.offset, counts));
        if segment.again {
            self.wires[at].again += total as u64;
        }
        let (mut offset, mut left) = (header.offset, total);
        let mut pieces = Vec::new();
        for mut chunk in segment.chunks {
            while !chunk.is_empty() {
                let bytes = chunk.split_to(chunk.len().min(PIECE_BYTES));
                left -= bytes.len();
                let last = left == 0;
                pieces.push(Piece {
                    offset,
                    fin: header.fin && last,
                    frame_end: header.frame_end && last,
                    bytes: bytes.clone(),
                });
                offset += bytes.len() as u64;
            }
        }
        if total == 0 {
            pieces.push(Piece {
                offset,
                bytes: Bytes::new(),
                fin: header.fin,
                frame_end: header.frame_end,
            });
        }
        for piece in pieces {
            let wire = &mut self.wires[at];
            let start = wire.free_at.max(self.now.0).max(wire.stalled_until);
            let span = (piece.bytes.len() as u64 + 16) * 1_000_000 / wire.capacity.max(1);
            wire.free_at = start + span;
            wire.last_arrival = wire.last_arrival.max(wire.free_at + wire.delay);
            let time = wire.last_arrival;
            if !wire.cut {
                self.at(time, at, Event::Piece { lane, piece });
            }
        }
    }

    /// Nothing goes twice but what is not known to have arrived and is on no link that is
    /// well.
    fn check_repeat(&self, lane: usize, here: usize, segment: &crate::lane::send::Segment) {
        if self.lanes[lane].class == LaneClass::Control {
            return;
        }
        let offset = segment.header.offset;
        assert!(!self.arrived.contains(&(lane, offset)), "it has arrived");
        for (at, wire) in self.wires.iter().enumerate().filter(|(_, w)| w.stands) {
            let on_it = wire.sent.iter().any(|s| (s.0, s.1) == (lane, offset));
            if on_it {
                assert!(segment.again && at != here);
                assert_ne!(self.links.health(index(at), self.now), LinkHealth::Up);
            }
        }
    }

    /// What an acknowledgement says to have arrived.
    fn note_arrived(&mut self, at: usize, ack: &LaneAck) {
        let lane = ack.lane.0 as usize;
        let mut left = ack.received;
        for (_, offset, counts) in self.wires[at].sent.iter().filter(|sent| sent.0 == lane) {
            if *counts > left {
                break;
            }
            left -= counts;
            self.arrived.insert((lane, *offset));
        }
    }

    fn take(&mut self, lane: usize) -> bool {
        let (now, lane) = (self.now, &mut self.lanes[lane]);
        if lane.reads_from > now {
            return false;
        }
        let mut moved = false;
        while let Some(bytes) = lane.receiver.pop(now) {
            moved = true;
            let from = usize::try_from(lane.taken % PATTERN_BYTES as u64).unwrap();
            let want = &pattern()[from..];
            let head = bytes.len().min(want.len());
            assert!(bytes[..head] == want[..head], "at {}", lane.taken);
            assert!(bytes[head..] == pattern()[..bytes.len() - head]);
            lane.taken += bytes.len() as u64;
            assert!(lane.taken <= lane.pushed, "more came out than went in");
        }
        if lane.receiver.is_finished() && !lane.finished {
            lane.finished = true;
            moved = true;
            assert_eq!(lane.taken, lane.pushed, "the end came early");
        }
        moved
    }

    /// The limits hold.
    fn check(&self) {
        for lane in &self.lanes {
            assert!(lane.receiver.held_bytes() <= self.window);
            assert!(lane.sender.unacked_bytes() <= self.window + 1);
            assert!(lane.sender.entries_held() <= LANE_SEGMENTS_MAX);
        }
        let done = self.lanes.iter().all(|lane| lane.sender.is_done());
        for at in 0..self.wires.len() {
            if done || !self.wires[at].stands {
                assert_eq!(self.links.in_flight(index(at)), 0);
            }
        }
    }

    fn happen(&mut self, at: usize, event: Event) {
        match event {
            Event::Piece { lane, piece } => {
                self.wires[at].received += piece.bytes.len() as u64;
                let lane = &mut self.lanes[lane];
                lane.receiver.insert(index(at), piece, self.now).unwrap();
            }
            Event::Ack(ack) => {
                self.note_arrived(at, &ack);
                let lane = &mut self.lanes[ack.lane.0 as usize];
                lane.sender
                    .acked(index(at), ack, &mut self.links, self.now)
                    .unwrap();
                self.measure(at);
            }
            Event::Gone => {
                self.wires[at].stands = false;
                self.may_repeat += self.links.in_flight(index(at));
                self.links.down(index(at), self.now);
                for lane in &mut self.lanes {
                    lane.sender.link_down(index(at));
                    lane.receiver.link_down(index(at));
                }
            }
            Event::Back => self.link_up(at),
        }
    }

    /// Run until `done`, or panic when it has not come within `limit`. Returns how long it
    /// took.
    pub(super) fn run(&mut self, limit: Micros, done: impl Fn(&Self) -> bool) -> Micros {
        let start = self.now;
        let mut idle = 0;
        loop {
            self.pump();
            if done(self) {
                return self.now.since(start);
            }
            let lanes = self.lanes.iter();
            let next = lanes
                .flat_map(|lane| {
                    let reads = (lane.reads_from > self.now).then_some(lane.reads_from);
                    [
                        lane.sender.next_wakeup(&self.links),
                        lane.receiver.next_wakeup(),
                        reads,
                    ]
                })
                .flatten()
                .chain(self.links.next_wakeup(self.now))
                .map(|at| at.0)
                .chain(self.events.keys().next().map(|key| key.0))
                .chain(self.faults.keys().next().map(|key| key.0))
                .min();
            let next = next.unwrap_or_else(|| panic!("nothing will ever happen: {}", self.tell()));
            idle = if next <= self.now.0 { idle + 1 } else { 0 };
            assert!(idle < 10_000, "time stands still: {}", self.tell());
            self.now = self.now.max(Micros(next));
            assert!(self.now.since(start) <= limit, "too late: {}", self.tell());
            while let Some(entry) = self.faults.first_entry() {
                if entry.key().0 > self.now.0 {
                    break;
                }
                let (wire, fault) = entry.remove();
                self.break_wire(wire, fault);
            }
            while let Some(entry) = self.events.first_entry() {
                if entry.key().0 > self.now.0 {
                    break;
                }
                let (wire, connection, event) = entry.remove();
                if connection == self.wires[wire].connection {
                    self.happen(wire, event);
                }
            }
            for lane in &mut self.lanes {
                for link in lane.sender.tick(&mut self.links, self.now) {
                    self.suspects.push((self.now, link));
                    self.may_repeat += self.links.in_flight(link);
                }
            }
        }
    }

    pub(super) fn tell(&self) -> String {
        let lanes: Vec<_> = self
            .lanes
            .iter()
            .map(|lane| {
                (
                    lane.pushed,
                    lane.taken,
                    lane.sender.queued_bytes(),
                    lane.sender.unacked_bytes(),
                )
            })
            .collect();
        let views = self.links.views(LaneClass::Control, self.now);
        format!(
            "at {} lanes (pushed, taken, queued, unacked) {lanes:?} links {:?}",
            self.now.0,
            &views[..self.wires.len()]
        )
    }

    /// Push so many bytes in frames of half a MiB and run until all came out.
    pub(super) fn carry(&mut self, lane: usize, bytes: u64, limit: Micros) -> Micros {
        let mut left = bytes;
        while left > 0 {
            let frame = left.min(512 << 10);
            self.push(lane, frame);
            left -= frame;
        }
        self.run(limit, |world| {
            world.lanes[lane].taken == world.lanes[lane].pushed
        })
    }

    pub(super) fn again(&self) -> u64 {
        self.wires.iter().map(|wire| wire.again).sum()
    }
}

pub(super) fn index(at: usize) -> LinkIndex {
    LinkIndex(u8::try_from(at).unwrap())
}
