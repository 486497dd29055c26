//! What a connection's path carries: measured from acknowledgements. Pure but for
//! [`figures`], which asks a connection.
//!
//! A sample runs from one acknowledgement to a later one, at least [`SAMPLE_MIN`] apart.
//! Its rate is what was acknowledged in between over the time it took to arrive or to be
//! sent, whichever was longer (after Cheng et al., draft-cheng-iccrg-delivery-rate-estimation:
//! acknowledgements that come late and all at once would else show a rate that never was).
//! Two kinds of sample:
//!
//! - **full**: the sender had more to send all the time and only the window held it. Such a
//!   sample is what the path carries, for better or worse.
//! - **starved**: there was not always something to send. It shows what the path carries at
//!   least: it can raise the capacity, never lower it.
//!
//! The capacity is the largest of the last [`SAMPLES_KEPT`]: a receiver that stood still for
//! a few ms lowers nothing, a link that really slowed down shows within a tenth of a second.

use super::congestion::PrivateLink;
use std::time::{Duration, Instant};

/// Figures of one connection's path, as its congestion controller measured them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct PathFigures {
    /// What the path was measured to carry, in bytes of UDP payload a second; `None` until
    /// enough was sent at once to tell.
    pub(super) bytes_per_s: Option<u64>,
    /// Whether that is all the path carries. If not, nobody has asked for more yet, and it
    /// carries that much at least.
    pub(super) saturated: bool,
    /// Least round-trip time seen lately; zero before the first.
    pub(super) rtt_min: Duration,
    /// What may be on its way unacknowledged, in bytes.
    pub(super) window_bytes: u64,
}

/// The figures of `connection` now. Copies a few hundred bytes under the connection's lock:
/// for every few milliseconds, not for every packet.
pub(super) fn figures(connection: &quinn::Connection) -> PathFigures {
    connection
        .congestion_state()
        .into_any()
        .downcast::<PrivateLink>()
        .map_or_else(|_| PathFigures::default(), |state| state.figures())
}

/// Shortest sample. Three acknowledgements of a receiver that waits its longest (1 ms,
/// `transport`); a token bucket filled while nothing was sent adds little to it.
pub(super) const SAMPLE_MIN: Duration = Duration::from_millis(3);
/// Samples of which the largest counts: 100 ms of a busy link.
const SAMPLES_KEPT: usize = 32;

/// What was acknowledged since a moment.
#[derive(Clone, Copy, Debug)]
struct Running {
    /// When the acknowledgement before the first counted one came.
    began: Instant,
    /// When the newest packet of that one was sent.
    sent_before: Instant,
    bytes: u64,
    lost_bytes: u64,
    starved: bool,
    /// Since when nothing has been on its way.
    idle_since: Option<Instant>,
}

/// A sample that ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sample {
    /// Bytes a second.
    pub(super) rate: u64,
    /// The window alone held the sender.
    pub(super) full: bool,
    /// Of 1,000 bytes, how many were lost.
    pub(super) lost_per_mille: u64,
}

/// Measures a path's capacity.
#[derive(Clone, Debug, Default)]
pub(super) struct Meter {
    running: Option<Running>,
    /// When the newest acknowledged packet was sent.
    newest_sent: Option<Instant>,
    /// A ring, the oldest at `next`; (0, false) where none is yet.
    kept: [(u64, bool); SAMPLES_KEPT],
    next: usize,
}

impl Meter {
    /// A packet sent at `sent` was acknowledged.
    pub(super) fn acked(&mut self, sent: Instant, bytes: u64) {
        self.newest_sent = self.newest_sent.max(Some(sent));
        if let Some(running) = &mut self.running {
            running.bytes += bytes;
        }
    }

    /// Bytes were found lost.
    pub(super) fn lost(&mut self, bytes: u64) {
        if let Some(running) = &mut self.running {
            running.lost_bytes += bytes;
        }
    }

    /// There was nothing to send, or something else than the window held it.
    pub(super) fn starve(&mut self) {
        if let Some(running) = &mut self.running {
            running.starved = true;
        }
    }

    /// One acknowledgement was worked through at `now`; `idle`: nothing is on its way any more,
    /// and nothing waits for it.
    pub(super) fn end_acks(&mut self, now: Instant, idle: bool) -> Option<Sample> {
        let newest_sent = self.newest_sent?;
        if idle {
            self.starve();
        }
        // A short gap counts into a starved sample, or a sender that waits for the first figure
        // before it sends more would never get one; a long one spoils it.
        self.running = self.running.filter(|running| {
            let gap = running
                .idle_since
                .map(|at| now.saturating_duration_since(at));
            gap.is_none_or(|gap| gap < SAMPLE_MIN)
        });
        let sample = self
            .running
            .filter(|running| now.saturating_duration_since(running.began) >= SAMPLE_MIN)
            .map(|running| self.finish(running, now, newest_sent));
        if sample.is_some() || self.running.is_none() {
            self.running = Some(Running {
                began: now,
                sent_before: newest_sent,
                bytes: 0,
                lost_bytes: 0,
                starved: false,
                idle_since: None,
            });
        }
        if let Some(running) = &mut self.running {
            running.starved |= idle;
            running.idle_since = idle.then_some(now);
        }
        sample
    }

    fn finish(&mut self, running: Running, now: Instant, newest_sent: Instant) -> Sample {
        let arrived_in = now.saturating_duration_since(running.began);
        let sent_in = newest_sent.saturating_duration_since(running.sent_before);
        let nanos = arrived_in.max(sent_in).as_nanos().max(1);
        let rate = u128::from(running.bytes) * 1_000_000_000 / nanos;
        let lost = u128::from(running.lost_bytes) * 1000;
        let sample = Sample {
            rate: u64::try_from(rate).unwrap_or(u64::MAX),
            full: !running.starved,
            lost_per_mille: u64::try_from(
                lost / u128::from((running.bytes + running.lost_bytes).max(1)),
            )
            .unwrap_or(1000),
        };
        if sample.full || sample.rate > self.capacity().unwrap_or(0) {
            self.kept[self.next] = (sample.rate, sample.full);
            self.next = (self.next + 1) % SAMPLES_KEPT;
        }
        sample
    }

    /// What the path carries, in bytes a second.
    pub(super) fn capacity(&self) -> Option<u64> {
        let largest = self.kept.iter().map(|kept| kept.0).max();
        largest.filter(|rate| *rate > 0)
    }

    /// Whether that is what it carries, not only what it carries at least.
    pub(super) fn is_known(&self) -> bool {
        self.kept.iter().any(|kept| kept.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Acknowledges `bytes` each ms for `ms`, sent 1 ms before; the last sample.
    fn flow(meter: &mut Meter, now: &mut Instant, ms: u32, bytes: u64, starved: bool) -> u64 {
        let mut rate = 0;
        for _ in 0..ms {
            *now += MS;
            meter.acked(*now - MS, bytes);
            if starved {
                meter.starve();
            }
            if let Some(sample) = meter.end_acks(*now, false) {
                rate = sample.rate;
            }
        }
        rate
    }

    #[test]
    fn it_measures_what_arrives_and_follows_a_link_down_and_up() {
        let (mut meter, mut now) = (Meter::default(), Instant::now());
        assert_eq!(flow(&mut meter, &mut now, 10, 125_000, false), 125_000_000);
        assert_eq!(meter.capacity(), Some(125_000_000));
        // The cap is lifted: at once.
        flow(&mut meter, &mut now, 4, 1_000_000, false);
        assert!(meter.capacity().unwrap() > 600_000_000);
        // It slows down: after the samples kept.
        flow(&mut meter, &mut now, 20, 12_500, false);
        assert!(meter.capacity().unwrap() > 600_000_000);
        flow(&mut meter, &mut now, 100, 12_500, false);
        assert_eq!(meter.capacity(), Some(12_500_000));
    }

    #[test]
    fn a_sender_with_little_to_send_lowers_nothing() {
        let (mut meter, mut now) = (Meter::default(), Instant::now());
        flow(&mut meter, &mut now, 100, 125_000, false);
        flow(&mut meter, &mut now, 1000, 1_000, true);
        assert_eq!(meter.capacity(), Some(125_000_000));
        // But what did get through can be carried.
        flow(&mut meter, &mut now, 10, 250_000, true);
        assert_eq!(meter.capacity(), Some(250_000_000));
        assert!(meter.is_known());
    }

    #[test]
    fn acknowledgements_that_come_at_once_show_no_rate_that_never_was() {
        let (mut meter, mut now) = (Meter::default(), Instant::now());
        flow(&mut meter, &mut now, 10, 125_000, false);
        // Nothing for 20 ms, then all of it within 3 ms.
        let stall = now;
        now += 20 * MS;
        for part in 1..=4 {
            meter.acked(stall + 5 * part * MS, 625_000);
            meter.end_acks(now, false);
            now += MS;
        }
        flow(&mut meter, &mut now, 6, 125_000, false);
        assert_eq!(meter.capacity(), Some(125_000_000));
    }

    #[test]
    fn bursts_that_wait_for_each_other_are_a_figure_too() {
        let (mut meter, mut now) = (Meter::default(), Instant::now());
        for _ in 0..10 {
            now += MS;
            meter.acked(now - MS, 256 << 10);
            meter.end_acks(now, true);
        }
        assert!(meter.capacity().is_some_and(|rate| rate > 200_000_000));
        assert!(!meter.is_known());
    }

    #[test]
    fn idle_time_is_no_sample() {
        let (mut meter, mut now) = (Meter::default(), Instant::now());
        for _ in 0..100 {
            now += 10 * MS;
            meter.acked(now - MS, 100_000);
            assert_eq!(meter.end_acks(now, true), None);
        }
        assert_eq!(meter.capacity(), None);
    }
}
