//! Whether the partner lives, from when it was heard. Pure: `now` is an argument.
//!
//! Silence counts only while this side was able to listen. A detector that was not
//! scheduled for a second has not observed a second of silence; it was deaf. So a
//! gap between two of its own polls above [`stall_limit`](Detector) is an own
//! stall: it is not counted as the partner's silence, and after it the partner has
//! a grace to be heard, since what arrived meanwhile sits in the socket.
//!
//! The caller must, in this order, at least once a period: drain the socket
//! (`heard` for what is accepted), then `polled`.
//!
//! What this must never do: report `Lost` for time during which its own thread
//! stood still, or before the partner was ever heard.

use std::time::Duration;

/// What the detector thinks of the partner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing was heard since the start: no ground for any claim.
    Unknown,
    /// Heard within half the detection time.
    Alive,
    /// Silent for more than half the detection time.
    Suspect,
    /// Silent for the whole detection time, as observed by a thread that itself ran.
    Lost,
    /// This host itself stood still this long (frozen, starved): what it believes
    /// about the partner and about its own role may be out of date.
    SelfStalled {
        /// How long.
        stalled: Duration,
    },
}

/// A gap between own polls of this many periods is an own stall. The thread runs
/// at real-time priority with a timer, so even two periods are unusual; four keep
/// a busy hypervisor's jitter (some ms of steal) from spoiling the count, and at
/// 10 ms in 100 leave more than half the detection time to the partner.
pub const STALL_PERIODS: u32 = 4;
/// After an own stall the partner is not lost for this many periods: its next
/// heartbeat comes within one, a second may be lost, the third allows for its own
/// recovery when both hosts were stalled by one cause (a shared hypervisor).
pub const GRACE_PERIODS: u32 = 3;
/// The detection time must hold at least this many periods: three lost datagrams
/// in a row are an event, one or two are weather.
pub const DETECTION_PERIODS_MIN: u32 = 3;

/// The failure detector of one partner. Times are durations since any fixed origin
/// on one clock that also runs while the host sleeps (`CLOCK_BOOTTIME`).
///
/// ```text
/// Unknown --heard--> Alive --silent 1/2--> Suspect --silent 1/1--> Lost
///                      ^---------------heard----------|-------------'
/// ```
#[derive(Debug, Clone)]
pub struct Detector {
    period: Duration,
    detection: Duration,
    last_heard: Option<Duration>,
    last_poll: Option<Duration>,
    /// Own stalls since the partner was last heard: not its silence.
    deaf: Duration,
    /// End of the grace after the last own stall.
    grace_until: Duration,
}

impl Detector {
    /// A detector with one heartbeat each `period` and this detection time, of which
    /// at least [`DETECTION_PERIODS_MIN`] periods are used.
    #[must_use]
    pub fn new(period: Duration, detection: Duration) -> Self {
        Self {
            period,
            detection: detection.max(period * DETECTION_PERIODS_MIN),
            last_heard: None,
            last_poll: None,
            deaf: Duration::ZERO,
            grace_until: Duration::ZERO,
        }
    }

    /// Gap between own polls above which this side was stalled: four periods, but
    /// never more than half the detection time.
    #[must_use]
    pub fn stall_limit(&self) -> Duration {
        (self.period * STALL_PERIODS).min(self.detection / 2)
    }

    /// An authentic heartbeat was received at `at`.
    pub fn heard(&mut self, at: Duration) {
        if self.last_heard.is_none_or(|last| at > last) {
            self.last_heard = Some(at);
            self.deaf = Duration::ZERO;
        }
    }

    /// The socket was drained at `now`: the verdict. `SelfStalled` is told once,
    /// at the first poll after the stall; ask again at the next poll.
    pub fn polled(&mut self, now: Duration) -> Verdict {
        let gap = self
            .last_poll
            .map_or(Duration::ZERO, |last| now.saturating_sub(last));
        self.last_poll = Some(now);
        if gap > self.stall_limit() {
            // What was heard after the stall began ends the silence by itself.
            let stall_begin = now.saturating_sub(gap);
            if self.last_heard.is_some_and(|heard| heard <= stall_begin) {
                self.deaf += gap;
            }
            self.grace_until = now + self.period * GRACE_PERIODS;
            return Verdict::SelfStalled { stalled: gap };
        }
        self.verdict(now)
    }

    /// The verdict at `now`, as of the last poll.
    #[must_use]
    pub fn verdict(&self, now: Duration) -> Verdict {
        let Some(heard) = self.last_heard else {
            return Verdict::Unknown;
        };
        let silence = now.saturating_sub(heard).saturating_sub(self.deaf);
        if silence >= self.detection && now >= self.grace_until {
            Verdict::Lost
        } else if silence >= self.detection / 2 {
            Verdict::Suspect
        } else {
            Verdict::Alive
        }
    }

    /// Age of the newest heartbeat, own stalls included: what status shows.
    #[must_use]
    pub fn age(&self, now: Duration) -> Option<Duration> {
        self.last_heard.map(|heard| now.saturating_sub(heard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn detector() -> Detector {
        Detector::new(ms(10), ms(100))
    }

    /// Poll every 10 ms from `from` to `to`; the partner is heard at each poll if `alive`.
    fn run(detector: &mut Detector, from: u64, to: u64, alive: bool) -> Vec<(u64, Verdict)> {
        let mut changes: Vec<(u64, Verdict)> = Vec::new();
        for t in (from..to).step_by(10) {
            if alive {
                detector.heard(ms(t));
            }
            let verdict = detector.polled(ms(t));
            if changes.last().is_none_or(|(_, last)| *last != verdict) {
                changes.push((t, verdict));
            }
        }
        changes
    }

    #[test]
    fn a_partner_never_heard_is_never_lost() {
        assert_eq!(
            run(&mut detector(), 0, 10_000, false),
            [(0, Verdict::Unknown)]
        );
    }

    #[test]
    fn silence_becomes_suspect_and_then_lost() {
        let mut detector = detector();
        assert_eq!(
            run(&mut detector, 1000, 2000, true),
            [(1000, Verdict::Alive)]
        );
        assert_eq!(
            run(&mut detector, 2000, 3000, false),
            [
                (2000, Verdict::Alive),
                (2040, Verdict::Suspect),
                (2090, Verdict::Lost)
            ]
        );
        assert_eq!(
            run(&mut detector, 3000, 3100, true),
            [(3000, Verdict::Alive)]
        );
    }

    #[test]
    fn a_frozen_detector_does_not_call_the_partner_lost() {
        let mut detector = detector();
        run(&mut detector, 0, 1000, true);
        // Frozen for five seconds; what the partner sent meanwhile was not kept.
        assert_eq!(
            detector.polled(ms(6000)),
            Verdict::SelfStalled { stalled: ms(5010) }
        );
        assert_eq!(detector.verdict(ms(6000)), Verdict::Alive);
        assert_eq!(
            run(&mut detector, 6010, 6100, true),
            [(6010, Verdict::Alive)]
        );
    }

    #[test]
    fn a_partner_that_died_during_the_freeze_is_lost_one_detection_time_later() {
        let mut detector = detector();
        run(&mut detector, 0, 1000, true);
        assert!(matches!(
            detector.polled(ms(6000)),
            Verdict::SelfStalled { .. }
        ));
        let changes = run(&mut detector, 6010, 7000, false);
        assert_eq!(
            changes,
            [
                (6010, Verdict::Alive),
                (6050, Verdict::Suspect),
                (6100, Verdict::Lost)
            ]
        );
    }

    #[test]
    fn silence_before_a_stall_does_not_run_out_right_after_it() {
        let mut detector = detector();
        run(&mut detector, 0, 1000, true);
        run(&mut detector, 1000, 1090, false);
        assert!(matches!(
            detector.polled(ms(3000)),
            Verdict::SelfStalled { .. }
        ));
        // Silence observed is 90 ms; without the grace it were lost at 3010.
        let changes = run(&mut detector, 3010, 3200, false);
        assert_eq!(changes, [(3010, Verdict::Suspect), (3030, Verdict::Lost)]);
    }

    #[test]
    fn a_heartbeat_drained_after_the_stall_counts() {
        let mut detector = detector();
        run(&mut detector, 0, 1000, true);
        detector.heard(ms(6000));
        assert!(matches!(
            detector.polled(ms(6000)),
            Verdict::SelfStalled { .. }
        ));
        assert_eq!(detector.polled(ms(6010)), Verdict::Alive);
        assert_eq!(detector.age(ms(6010)), Some(ms(10)));
    }

    #[test]
    fn a_detection_time_too_short_for_its_period_is_raised() {
        let mut detector = Detector::new(ms(10), ms(1));
        run(&mut detector, 0, 100, true);
        let changes = run(&mut detector, 100, 200, false);
        assert_eq!(changes.last(), Some(&(120, Verdict::Lost)));
    }
}
