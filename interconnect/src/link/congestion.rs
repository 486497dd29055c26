//! Congestion control for a private link.
//!
//! Cubic, NewReno and BBR share a path with strangers: they start at a dozen
//! packets and take a lost packet for a full queue somewhere, so that one flipped
//! bit on the cable costs half the rate. On a private link there are no strangers
//! and no routers; the only queues are the two hosts' own socket buffers and
//! perhaps one switch. So the window starts where it should be, at what the
//! partner's socket buffer holds, gives way a little when packets are lost (a switch
//! ran over), and is back after a few epochs.
//! It never falls below [`WINDOW_BYTES_MIN`]: an epoch must not wait for slow start.
//!
//! While nothing is lost there is no pacing either. The library sends at most 256
//! packets, then waits for a timer, and timers come by the millisecond: an epoch of
//! 800 raw pages would wait nine times for a queue that is not there.

use super::capacity::PathFigures;
use quinn::congestion::{Controller, ControllerFactory};
use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

/// Largest window, in bytes: 10 Gbit/s for 6 ms, or four epochs of 500 pages.
pub(super) const WINDOW_BYTES_MAX: u64 = 8 << 20;
/// Smallest window, in bytes: what an unraised socket buffer (Debian's
/// `net.core.rmem_max`, 208 KiB) takes in one burst.
pub(super) const WINDOW_BYTES_MIN: u64 = 192 << 10;
/// Told to the library while nothing is lost: above 4 GiB it does not pace. What is
/// on its way is then bounded by the send window (`transport`).
const WINDOW_BYTES_UNPACED: u64 = 1 << 40;
const _: () = assert!(WINDOW_BYTES_MIN < WINDOW_BYTES_MAX);
const _: () = assert!(WINDOW_BYTES_UNPACED > u32::MAX as u64);

#[derive(Debug, Clone)]
pub(super) struct PrivateLink {
    window: u64,
    window_max: u64,
    /// One reduction for each round trip: packets sent before it are not counted again.
    reduced_at: Option<Instant>,
}

impl PrivateLink {
    fn new(window_max: u64) -> Self {
        Self {
            window: window_max,
            window_max,
            reduced_at: None,
        }
    }

    /// What the path was measured to carry.
    pub(super) fn figures(&self) -> PathFigures {
        PathFigures::default()
    }

    /// An eighth of what got through: a reduction is undone after one or two windows.
    fn got_through(&mut self, bytes: u64) {
        self.window = (self.window + bytes / 8).min(self.window_max);
    }
}

impl Controller for PrivateLink {
    fn on_ack(
        &mut self,
        _now: Instant,
        _sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &quinn_proto::RttEstimator,
    ) {
        self.got_through(bytes);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        persistent: bool,
        _lost_bytes: u64,
    ) {
        if self.reduced_at.is_some_and(|at| sent <= at) {
            return;
        }
        self.reduced_at = Some(now);
        // A fifth: loss is rare here and mostly noise. Persistent: the partner does
        // not read at all; probe with little until it does.
        let reduced = if persistent { 0 } else { self.window / 5 * 4 };
        self.window = reduced.max(WINDOW_BYTES_MIN.min(self.window_max));
    }

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        if self.window < self.window_max {
            self.window
        } else {
            WINDOW_BYTES_UNPACED
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.window_max
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Makes the controller of each connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct PrivateLinkConfig {
    /// Window to start with and to return to, in bytes.
    pub(super) window_max: u64,
}

impl ControllerFactory for PrivateLinkConfig {
    fn build(self: Arc<Self>, _now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(PrivateLink::new(self.window_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MAX: u64 = WINDOW_BYTES_MAX;

    fn fresh() -> PrivateLink {
        PrivateLink::new(MAX)
    }

    #[test]
    fn without_losses_the_library_does_not_pace() {
        assert!(fresh().window() > u64::from(u32::MAX));
    }

    #[test]
    fn a_loss_costs_a_fifth_once_a_round_trip_and_is_undone_by_what_gets_through() {
        let mut window = fresh();
        let sent = Instant::now();
        let told = sent + Duration::from_millis(1);
        window.on_congestion_event(told, sent, false, 1452);
        window.on_congestion_event(told, sent, false, 1452);
        assert_eq!(window.window(), MAX / 5 * 4);
        window.got_through(MAX);
        assert_eq!(window.window(), MAX / 5 * 4 + MAX / 8);
        window.got_through(MAX);
        assert!(window.window() > u64::from(u32::MAX));
    }

    #[test]
    fn it_never_collapses() {
        let mut window = fresh();
        let mut now = Instant::now();
        for _ in 0..100 {
            now += Duration::from_millis(2);
            window.on_congestion_event(now, now - Duration::from_millis(1), true, 1452);
        }
        assert_eq!(window.window(), WINDOW_BYTES_MIN);
        let mut through = 0;
        while window.window() < MAX {
            window.got_through(WINDOW_BYTES_MIN);
            through += WINDOW_BYTES_MIN;
        }
        assert!(through <= 8 * MAX, "{through} bytes until it is back");
    }
}
