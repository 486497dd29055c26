//! When an epoch's closing frame may be handed to its lane.
//!
//! The lease of an acknowledgement counts from that moment (rule 5 of [`crate::mirror`]): the
//! standby cannot have acknowledged before. Handed over behind a long queue, the lease would
//! be over before the frame has left, on a slow link for every epoch anew, and nothing would
//! ever be released. So the frame waits outside until little is queued before it.

use interconnect::link::{EpochLane, LanePressure};
use std::time::{Duration, Instant};

/// What may be queued before it while nobody knows what the links carry: at 10 MB/s half of
/// what [`crate::mirror::Timing::release_within`] leaves.
const BACKLOG_BYTES: u64 = 512 << 10;
/// The same as time, once somebody knows.
const BACKLOG: Duration = Duration::from_millis(10);
/// Between two looks: little against what a slow link takes.
const LOOK: Duration = Duration::from_micros(500);
/// The wait is not for ever; by then the machine has given the epoch up.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Whether too much is queued for a closing frame.
fn behind(pressure: &LanePressure) -> bool {
    match pressure.drains_in() {
        Some(time) => time > BACKLOG,
        None => pressure.queued_bytes > BACKLOG_BYTES,
    }
}

/// Wait until a closing frame handed to `lane` leaves soon. On links that keep up there is
/// nothing to wait for.
pub fn wait_for_room(lane: &EpochLane) {
    let begun = Instant::now();
    while behind(&lane.pressure()) && lane.is_open() && begun.elapsed() < WAIT_MAX {
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::behind;
    use interconnect::link::LanePressure;

    #[test]
    fn the_frame_waits_for_a_backlog_in_time_or_in_bytes() {
        let of = |queued_bytes, capacity_bytes_per_s| {
            behind(&LanePressure {
                queued_bytes,
                unacked_bytes: 0,
                capacity_bytes_per_s,
            })
        };
        assert!(!of(0, None) && !of(500 << 10, None) && of(600 << 10, None));
        assert!(!of(8 << 20, Some(1_000_000_000)) && of(8 << 20, Some(100_000_000)));
        assert!(of(20_000, Some(1_000_000)) && !of(5_000, Some(1_000_000)));
    }
}
