//! Which lanes of the partner are new, known or over: a lane's streams come over several
//! links in any order, some after the lane has ended.

use super::LaneId;
use std::collections::BTreeSet;

/// Lanes below the highest seen that have not been seen themselves, at most. Lanes come
/// nearly in order; the lowest ones are taken for over beyond this.
const GAPS_MAX: usize = 256;

/// Numbers of the partner's lanes seen in a session.
#[derive(Debug, Default)]
pub struct IncomingLanes {
    /// Every lane below this was seen, is in `gaps`, or is taken for over. One more than a
    /// lane's number can be.
    next: u64,
    gaps: BTreeSet<u64>,
}

impl IncomingLanes {
    /// None seen.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether this lane starts now: `true` the first time it is asked about. Afterwards it
    /// is known as long as the caller keeps it, and over when it does not.
    pub fn starts(&mut self, lane: LaneId) -> bool {
        let number = u64::from(lane.0);
        if number < self.next {
            return self.gaps.remove(&number);
        }
        let first = number.saturating_sub(GAPS_MAX as u64);
        self.gaps.extend(self.next.max(first)..number);
        while self.gaps.len() > GAPS_MAX {
            self.gaps.pop_first();
        }
        self.next = number + 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_starts_once_in_whatever_order_its_streams_come() {
        let mut lanes = IncomingLanes::new();
        for (lane, starts) in [
            (1, true),
            (1, false),
            (4, true),
            (2, true),
            (4, false),
            (2, false),
            (3, true),
            (0, true),
            (0, false),
        ] {
            assert_eq!(lanes.starts(LaneId(lane)), starts, "lane {lane}");
        }
    }

    #[test]
    fn a_leap_in_the_numbers_costs_no_memory() {
        let mut lanes = IncomingLanes::new();
        assert!(lanes.starts(LaneId(u32::MAX - 1)));
        assert_eq!(lanes.gaps.len(), GAPS_MAX);
        assert!(lanes.starts(LaneId(u32::MAX - 2)));
        assert!(lanes.starts(LaneId(u32::MAX)));
        assert!(!lanes.starts(LaneId(u32::MAX)), "the last number, too");
        assert!(!lanes.starts(LaneId(5)), "long over");
    }
}
