//! The controller on a modelled link in virtual time: a queue in front of a wire of a given
//! rate, delay each way, random loss, a receiver that acknowledges as ours does.

use super::*;
use std::collections::VecDeque;

const MS: Duration = Duration::from_millis(1);
const STEP: Duration = Duration::from_micros(20);
const PACKET: u64 = 1472;
/// Packets of one send.
const SEND: u64 = 10;
const MBIT: u64 = 125_000;
/// The receiver acknowledges after so many bytes, or this late (the timer's resolution
/// included), or at once after a gap.
const ACK_BYTES: u64 = 256 << 10;
const ACK_DELAY: Duration = Duration::from_millis(2);
/// Without an acknowledgement for this long the sender sends one packet more, whatever the
/// window: the library's probe.
const PROBE_AFTER: Duration = Duration::from_millis(10);

#[derive(Clone, Copy)]
struct Packet {
    number: u64,
    sent: Instant,
    arrives: Instant,
}

/// What happened since the last look.
#[derive(Default, Debug)]
struct Seen {
    delivered: u64,
    lost: u64,
    /// Longest time a packet waited in the queue.
    queue: Duration,
}

struct Model {
    sender: PrivateLink,
    now: Instant,
    rate: u64,
    delay: Duration,
    queue_bytes_max: u64,
    /// Of 1,000 packets.
    lost_per_mille: u64,
    random: u64,
    wire_free: Instant,
    next_number: u64,
    wire: VecDeque<Packet>,
    /// Arrived, not acknowledged; and since when.
    pending: Vec<Packet>,
    pending_since: Option<Instant>,
    /// Acknowledgements on their way.
    acks: VecDeque<(Instant, Vec<Packet>)>,
    /// Sent and not known to have arrived.
    outstanding: VecDeque<Packet>,
    /// When something was acknowledged last.
    progress: Instant,
    seen: Seen,
    /// Bytes there are to send; `None`: always more.
    left: Option<u64>,
}

impl Model {
    fn new(rate: u64, delay: Duration) -> Self {
        let now = Instant::now();
        let mut model = Self {
            sender: PrivateLink::new(WINDOW_BYTES_MAX),
            now,
            rate,
            delay,
            queue_bytes_max: 64 << 20,
            lost_per_mille: 0,
            random: 0x2545_f491_4f6c_dd1d,
            wire_free: now,
            next_number: 0,
            wire: VecDeque::new(),
            pending: Vec::new(),
            pending_since: None,
            acks: VecDeque::new(),
            outstanding: VecDeque::new(),
            progress: now,
            seen: Seen::default(),
            left: None,
        };
        // The handshake.
        model.now += 2 * delay;
        model.sender.acked(now, PACKET);
        model.sender.end_acks(model.now, 0, true);
        model
    }

    fn is_lost(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 1000 < self.lost_per_mille
    }

    fn send(&mut self) {
        let waits = self.wire_free.saturating_duration_since(self.now);
        let queued = waits.as_nanos() * u128::from(self.rate) / 1_000_000_000;
        let lost = self.is_lost() || queued > u128::from(self.queue_bytes_max);
        let mut packet = Packet {
            number: self.next_number,
            sent: self.now,
            arrives: self.now,
        };
        self.next_number += 1;
        if !lost {
            self.seen.queue = self.seen.queue.max(waits);
            let takes = Duration::from_nanos(PACKET * 1_000_000_000 / self.rate);
            self.wire_free = self.wire_free.max(self.now) + takes;
            packet.arrives = self.wire_free + self.delay;
            self.wire.push_back(packet);
        }
        self.outstanding.push_back(packet);
    }

    fn fill(&mut self) {
        while self.sender.window() > WINDOW_BYTES_MAX && self.left != Some(0) {
            let mut bytes = 0;
            while bytes < SEND * PACKET && self.left != Some(0) {
                self.send();
                bytes += PACKET;
                if let Some(left) = &mut self.left {
                    *left = left.saturating_sub(PACKET);
                }
            }
            self.sender.sent(bytes);
        }
    }

    fn in_flight(&self) -> u64 {
        self.outstanding.len() as u64 * PACKET
    }

    fn receive(&mut self) {
        let mut gap = false;
        while self.wire.front().is_some_and(|p| p.arrives <= self.now) {
            let packet = self.wire.pop_front().unwrap();
            gap |= self
                .pending
                .last()
                .is_some_and(|last| last.number + 1 != packet.number);
            self.pending_since = self.pending_since.or(Some(packet.arrives));
            self.pending.push(packet);
            self.seen.delivered += PACKET;
        }
        let late = self
            .pending_since
            .is_some_and(|at| self.now >= at + ACK_DELAY);
        let full = self.pending.len() as u64 * PACKET >= ACK_BYTES;
        if gap || late || full {
            let packets = std::mem::take(&mut self.pending);
            self.pending_since = None;
            self.acks.push_back((self.now + self.delay, packets));
        }
    }

    fn take_acks(&mut self) {
        while self.acks.front().is_some_and(|ack| ack.0 <= self.now) {
            let (_, packets) = self.acks.pop_front().unwrap();
            let newest = packets.last().unwrap().number;
            let before = self.outstanding.len();
            self.outstanding.retain(|o| {
                packets
                    .binary_search_by_key(&o.number, |p| p.number)
                    .is_err()
            });
            assert!(before - self.outstanding.len() <= packets.len());
            for packet in packets {
                self.sender.acked(packet.sent, PACKET);
            }
            let starved = self.left == Some(0);
            let in_flight = self.in_flight();
            self.sender.end_acks(self.now, in_flight, starved);
            self.progress = self.now;
            self.give_up(newest);
        }
        if self.in_flight() > 0 && self.now >= self.progress + PROBE_AFTER {
            self.progress = self.now;
            self.send();
        }
    }

    fn give_up(&mut self, newest: u64) {
        let before = self.in_flight();
        self.outstanding.retain(|packet| packet.number + 3 > newest);
        let lost = before - self.in_flight();
        if lost > 0 {
            self.sender.lost(lost);
            self.seen.lost += lost;
        }
    }

    fn run(&mut self, time: Duration) -> Seen {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            self.receive();
            self.take_acks();
            self.fill();
        }
        std::mem::take(&mut self.seen)
    }

    /// Share of the wire's rate that arrived in `time`.
    fn share(&mut self, time: Duration) -> f64 {
        let delivered = self.run(time).delivered as f64;
        delivered / (self.rate as f64 * time.as_secs_f64())
    }

    fn capacity(&self) -> f64 {
        self.sender.figures().bytes_per_s.unwrap_or(0) as f64 / self.rate as f64
    }
}

fn cable(mbit: u64) -> Model {
    Model::new(mbit * MBIT, Duration::from_micros(50))
}

#[test]
fn it_fills_links_of_every_speed_and_keeps_their_queue_short() {
    for mbit in [100, 1_000, 2_500, 10_000] {
        let mut model = cable(mbit);
        model.run(100 * MS);
        let seen = model.run(300 * MS);
        let share = seen.delivered as f64 / (model.rate as f64 * 0.3);
        assert!(share > 0.98, "{mbit} Mbit/s: {share}");
        assert!(seen.queue < 2 * QUEUE, "{mbit} Mbit/s: {seen:?}");
        let capacity = model.capacity();
        assert!((0.95..1.1).contains(&capacity), "{mbit}: {capacity}");
    }
}

#[test]
fn the_first_window_waits_for_nothing_and_a_fast_link_is_full_at_once() {
    let mut model = cable(10_000);
    let share = model.share(20 * MS);
    assert!(share > 0.8, "{share}");
}

#[test]
fn random_loss_costs_what_was_lost() {
    let mut model = Model::new(2_500 * MBIT, Duration::from_micros(200));
    model.lost_per_mille = 10;
    model.run(100 * MS);
    let share = model.share(500 * MS);
    assert!(share > 0.97, "{share}");
}

#[test]
fn one_lost_packet_costs_nothing() {
    let mut model = cable(10_000);
    model.run(100 * MS);
    model.lost_per_mille = 1000;
    model.run(STEP);
    model.lost_per_mille = 0;
    let share = model.share(20 * MS);
    assert!(share > 0.95, "{share}");
}

#[test]
fn it_follows_a_link_that_slows_down_and_is_well_again() {
    let mut model = cable(1_000);
    model.run(200 * MS);
    model.rate = 100 * MBIT;
    model.run(500 * MS);
    let slow = model.run(300 * MS);
    assert!(slow.queue < 10 * MS, "{slow:?}");
    assert!((0.95..1.1).contains(&model.capacity()));
    model.rate = 1_000 * MBIT;
    model.run(100 * MS);
    let share = model.share(200 * MS);
    assert!(share > 0.98, "{share}");
    assert!((0.95..1.1).contains(&model.capacity()));
}

#[test]
fn a_sender_with_little_to_send_keeps_what_it_knew() {
    let mut model = cable(1_000);
    model.run(200 * MS);
    let known = model.sender.figures();
    for _ in 0..200 {
        model.left = Some(50_000);
        model.run(10 * MS);
    }
    assert_eq!(model.sender.figures().bytes_per_s, known.bytes_per_s);
    model.left = None;
    let share = model.share(50 * MS);
    assert!(share > 0.9, "{share}");
}

#[test]
fn a_switch_with_a_small_queue_is_not_flooded() {
    let mut model = cable(1_000);
    // 1 ms of the link: far less than this controller likes to have.
    model.queue_bytes_max = 128 << 10;
    model.run(500 * MS);
    let seen = model.run(1000 * MS);
    let lost = seen.lost as f64 / (seen.lost + seen.delivered) as f64;
    let share = seen.delivered as f64 / model.rate as f64;
    assert!(lost < 0.1, "{lost}");
    // Such a queue empties before a held back acknowledgement comes.
    assert!(share > 0.4, "{share}");
}

#[test]
fn a_saturated_link_does_not_take_its_own_queue_for_distance() {
    let mut model = cable(1_000);
    let mut longest = Duration::ZERO;
    model.run(1000 * MS);
    for _ in 0..35 {
        let seen = model.run(1000 * MS);
        longest = longest.max(seen.queue);
        assert!(seen.delivered as f64 > 0.97 * model.rate as f64);
    }
    assert!(longest < QUEUE + 3 * MS, "{longest:?}");
    assert!(model.sender.figures().rtt_min < MS);
    // A longer way is believed after a while.
    model.delay = 10 * MS;
    model.run(Duration::from_secs(15));
    assert!(model.sender.figures().rtt_min >= 20 * MS);
    let share = model.share(1000 * MS);
    assert!(share > 0.9, "{share}");
}

#[test]
fn mere_acknowledgements_do_not_use_the_window_up() {
    let mut link = PrivateLink::new(WINDOW_BYTES_MAX);
    for _ in 0..1_000_000 {
        link.sent(60);
    }
    assert!(link.window() > u64::from(u32::MAX), "paced or shut");
    for _ in 0..100 {
        link.sent(SEND * PACKET);
    }
    assert_eq!(link.window(), WINDOW_BYTES_SHUT);
    link.end_acks(Instant::now(), 0, true);
    assert!(link.window() > u64::from(u32::MAX));
}
