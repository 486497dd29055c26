//! Congestion control for a private link.
//!
//! Cubic, NewReno and BBR share a path with strangers: they start at a dozen
//! packets and take a lost packet for a full queue somewhere, so that one flipped
//! bit on the cable costs half the rate. On a private link there are no strangers;
//! the only queues are the two hosts' own, one switch's, and that of whatever caps
//! the link. What counts here is that the link is never idle while something waits,
//! and that what waits does so in this host, where an urgent frame can pass it.
//! So the window follows from what the path is measured to carry ([`Meter`]):
//!
//! ```text
//! window = capacity * (least round trip + QUEUE)      between WINDOW_BYTES_MIN and the limit
//! ```
//!
//! - While the window is larger than what the path holds, the queue is [`QUEUE`] long; if the
//!   path could carry more, the window lets it: the same bytes come back within less than
//!   `least round trip + QUEUE`, the measured rate rises, and the window with it.
//! - Lost packets change nothing, unless they are so many ([`HEAVY_LOSS_PER_MILLE`]) that a
//!   queue must have run over, one that holds less than [`QUEUE`]. Then the limit comes down
//!   by a sixth for each sample, and creeps up again while nothing like it happens.
//! - The least round trip is looked for anew after [`RTT_KNOWN_FOR`]: a saturated link never
//!   shows it by itself, and each time taken from a queue it would make the queue longer.
//!
//! There is no pacing. The library's sends at most 256 packets, then waits for a timer, and
//! timers come by the millisecond: an epoch of 800 raw pages would wait nine times for a queue
//! that is not there. It does not pace windows above 4 GiB, so this controller counts what is
//! on its way itself and tells a window without bound until its own is used up, then one that
//! lets nothing through ([`PrivateLink::window`]).

use super::capacity::{Meter, PathFigures};
use quinn::congestion::{Controller, ControllerFactory};
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest window, in bytes: 10 Gbit/s for 3 ms, or an epoch of 1,000 raw pages. A larger one
/// makes nothing faster here: at such rates acknowledgements come by number, long before their
/// delay, and the library goes through all that a stream has on its way for each packet
/// (quinn-proto, `SendBuffer::get`): with twice the window a GiB cost 5 to 10 % more.
pub(super) const WINDOW_BYTES_MAX: u64 = 4 << 20;
/// Smallest window, in bytes: one full send, so that batches stay whole. 5 ms of 100 Mbit/s.
pub(super) const WINDOW_BYTES_MIN: u64 = 64 << 10;
/// Window while nothing is known, in bytes: 8 ms of 1 Gbit/s, and most of an epoch; with 10
/// Gbit/s two samples later it is where it should be.
const WINDOW_BYTES_FIRST: u64 = 1 << 20;
/// How long the queue may get that this controller makes. Twice [`ACK_HELD_MAX`], so that the
/// link does not run dry while an acknowledgement is held back, and a link that could carry
/// more shows it; a fifth of the usual epoch.
const QUEUE: Duration = Duration::from_millis(4);
/// Loss in a sample beyond which a queue ran over. Noise on a cable is below 10^-5; 10 ‰ is
/// what a bad one is tested with, and a sample of 100 packets that loses 10 ‰ on average
/// stays below this in 9,999 of 10,000 cases.
const HEAVY_LOSS_PER_MILLE: u64 = 50;
/// How long a least round trip is believed without being seen again.
const RTT_KNOWN_FOR: Duration = Duration::from_secs(10);
/// Longest time to let the path run empty for it; with the time above 0.2 % of the rate.
const DRAIN_MAX: Duration = Duration::from_millis(20);
/// What a receiver may add to a round trip of little data by holding its acknowledgement back:
/// 1 ms (`transport`) and the resolution of the runtime's clock.
const ACK_HELD_MAX: Duration = Duration::from_millis(2);
/// A round trip within this of the least one is the least one, seen again.
const RTT_NOISE: Duration = Duration::from_micros(200);
/// Sends of fewer bytes are not counted as being on their way: they may be mere
/// acknowledgements, which nobody acknowledges. (The longest is below; a shorter one with
/// content is counted as soon as the next acknowledgement tells the exact number.)
const COUNTED_BYTES_MIN: u64 = 1200;
/// Told to the library while there is room: above 4 GiB it does not pace.
const WINDOW_BYTES_UNPACED: u64 = 1 << 40;
/// Told when there is none.
const WINDOW_BYTES_SHUT: u64 = 1;
const _: () = assert!(QUEUE.as_nanos() >= 2 * ACK_HELD_MAX.as_nanos());
const _: () = assert!(WINDOW_BYTES_MIN < WINDOW_BYTES_FIRST);
const _: () = assert!(WINDOW_BYTES_FIRST < WINDOW_BYTES_MAX);
const _: () = assert!(WINDOW_BYTES_UNPACED > u32::MAX as u64);

/// The least round trip and how fresh it is.
#[derive(Debug, Clone, Copy)]
struct RttMin {
    value: Duration,
    seen: Instant,
    /// Since when the path is being run empty to see it again, and the least seen since the
    /// window was used up no more.
    drain: Option<(Instant, Option<Duration>)>,
}

#[derive(Debug, Clone)]
pub(super) struct PrivateLink {
    meter: Meter,
    rtt_min: Option<RttMin>,
    /// What the partner's socket takes in one burst: never more.
    window_max: u64,
    /// What the queues on the path turned out to take.
    limit: u64,
    /// What may be on its way, in bytes: [`Self::compute_room`] after the last acknowledgement.
    /// The library asks twice for each packet.
    room: u64,
    /// On its way, in bytes; exact after each acknowledgement.
    in_flight: u64,
    /// Of the acknowledgement being worked through: when its newest packet was sent.
    newest_sent: Option<Instant>,
}

impl PrivateLink {
    fn new(window_max: u64) -> Self {
        Self {
            meter: Meter::default(),
            rtt_min: None,
            window_max,
            limit: window_max,
            room: WINDOW_BYTES_FIRST.min(window_max),
            in_flight: 0,
            newest_sent: None,
        }
    }

    /// What the path was measured to carry.
    pub(super) fn figures(&self) -> PathFigures {
        PathFigures {
            bytes_per_s: self.meter.capacity(),
            saturated: self.meter.is_known(),
            rtt_min: self.rtt_min.map_or(Duration::ZERO, |rtt| rtt.value),
            window_bytes: self.room,
        }
    }

    /// What may be on its way, in bytes.
    fn compute_room(&self) -> u64 {
        let Some((rtt, rate)) = self.rtt_min.zip(self.meter.capacity()) else {
            return WINDOW_BYTES_FIRST.min(self.window_max);
        };
        if rtt.drain.is_some() {
            return WINDOW_BYTES_MIN.min(self.window_max);
        }
        let nanos = (rtt.value + QUEUE).as_nanos();
        let bytes = u128::from(rate) * nanos / 1_000_000_000;
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        // What was carried at least says nothing about a smaller window than the first one.
        let least = if self.meter.is_known() {
            WINDOW_BYTES_MIN
        } else {
            WINDOW_BYTES_FIRST
        };
        bytes.max(least).min(self.limit).min(self.window_max)
    }

    fn see_rtt(&mut self, now: Instant, rtt: Duration) {
        let Some(min) = &mut self.rtt_min else {
            self.rtt_min = Some(RttMin {
                value: rtt,
                seen: now,
                drain: None,
            });
            return;
        };
        if rtt <= min.value + RTT_NOISE {
            min.value = min.value.min(rtt);
            min.seen = now;
            min.drain = None;
            return;
        }
        match &mut min.drain {
            None if now.saturating_duration_since(min.seen) >= RTT_KNOWN_FOR => {
                min.drain = Some((now, None));
            }
            None => {}
            Some((began, least)) => {
                // A packet sent before the window was small waited behind the others.
                if now.checked_sub(rtt).is_some_and(|sent| sent >= *began) {
                    *least = Some(least.map_or(rtt, |least| least.min(rtt)));
                }
                if now.saturating_duration_since(*began) >= DRAIN_MAX {
                    let found = least.unwrap_or(rtt).saturating_sub(ACK_HELD_MAX);
                    min.value = min.value.max(found);
                    min.seen = now;
                    min.drain = None;
                }
            }
        }
    }

    fn draining(&self) -> bool {
        self.rtt_min.is_some_and(|rtt| rtt.drain.is_some())
    }

    fn sent(&mut self, bytes: u64) {
        if bytes >= COUNTED_BYTES_MIN {
            self.in_flight += bytes;
        }
    }

    fn acked(&mut self, sent: Instant, bytes: u64) {
        self.meter.acked(sent, bytes);
        self.newest_sent = self.newest_sent.max(Some(sent));
    }

    fn lost(&mut self, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.meter.lost(bytes);
    }

    /// An acknowledgement was worked through.
    fn end_acks(&mut self, now: Instant, in_flight: u64, starved: bool) {
        self.in_flight = in_flight;
        if let Some(sent) = self.newest_sent.take() {
            self.see_rtt(now, now.saturating_duration_since(sent));
        }
        if starved || self.draining() {
            self.meter.starve();
        }
        // A small window may come back with one acknowledgement: that is not idle.
        if let Some(sample) = self.meter.end_acks(now, in_flight == 0 && starved) {
            if sample.lost_per_mille > HEAVY_LOSS_PER_MILLE && sample.full {
                self.limit = (self.room / 6 * 5).max(WINDOW_BYTES_MIN);
            } else {
                self.limit = (self.limit + self.limit / 32).min(self.window_max);
            }
        }
        self.room = self.compute_room();
    }
}

impl Controller for PrivateLink {
    fn on_sent(&mut self, _now: Instant, bytes: u64, _last_packet_number: u64) {
        self.sent(bytes);
    }

    fn on_ack(
        &mut self,
        _now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &quinn_proto::RttEstimator,
    ) {
        self.acked(sent, bytes);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.end_acks(now, in_flight, app_limited);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        _is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost(lost_bytes);
    }

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    /// Not a number of bytes but an answer: may more be sent? The library asks before each
    /// packet; it reports what it made after at most 10 of them, by which the window may be
    /// exceeded.
    fn window(&self) -> u64 {
        if self.in_flight < self.room {
            WINDOW_BYTES_UNPACED
        } else {
            WINDOW_BYTES_SHUT
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        WINDOW_BYTES_FIRST.min(self.window_max)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Makes the controller of each connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct PrivateLinkConfig {
    /// Largest window, in bytes: what the partner's socket takes in one burst.
    pub(super) window_max: u64,
}

impl ControllerFactory for PrivateLinkConfig {
    fn build(self: Arc<Self>, _now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(PrivateLink::new(self.window_max))
    }
}

#[cfg(test)]
mod tests;
