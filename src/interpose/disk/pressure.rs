//! How full an overlay may get, and how the guest is slowed on the way. Pure.
//!
//! The rule that keeps QEMU's `stop` from hanging: `stop` drains the block layer, so a write that
//! waits for a commit that waits for a checkpoint that waits for `stop` would wait for ever. So
//! no write waits between [`super::Disk::checkpoint_begins`] and `checkpoint_ends`, and outside
//! of that none waits longer than [`HOLD_MAX`], however full the overlay is. What can exceed the
//! limit is therefore what QEMU had in flight when a checkpoint began (at most 16 requests per
//! connection, `MAX_NBD_REQUESTS` in QEMU's block/nbd.c), and 16 requests a second if nobody takes
//! a checkpoint at all.

use std::time::Duration;

/// Default limit of a disk's overlay: some hundred epochs of a busy disk, small beside a guest.
pub const OVERLAY_BYTES_MAX_DEFAULT: u64 = 256 << 20;

/// Longest a write is held back at the limit. Longer than any epoch with a living standby, shorter
/// than what a guest's kernel complains about (120 s).
pub(super) const HOLD_MAX: Duration = Duration::from_secs(1);

/// Longest delay between the soft limit and the limit.
const DELAY_MAX: Duration = Duration::from_millis(20);

const _: () = assert!(DELAY_MAX.as_millis() < HOLD_MAX.as_millis());

/// The overlay asks for a checkpoint and slows the guest from here on.
pub(super) fn soft_limit_bytes(max: u64) -> u64 {
    max / 2
}

/// How long to hold a write back when `held` of `max` bytes are taken: nothing up to the soft
/// limit, growing with the square of the excess up to the limit, then until there is room again
/// but never longer than [`HOLD_MAX`].
pub(super) fn delay(held: u64, max: u64) -> Duration {
    let soft = soft_limit_bytes(max);
    if held <= soft {
        return Duration::ZERO;
    }
    if held >= max {
        return HOLD_MAX;
    }
    #[allow(clippy::cast_precision_loss)] // A ratio; the lost bits are nanoseconds.
    let excess = (held - soft) as f64 / (max - soft) as f64;
    DELAY_MAX.mul_f64(excess * excess)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_grows_and_stays_bounded() {
        let max = 1000;
        let mut last = Duration::ZERO;
        for held in 0..3000 {
            let now = delay(held, max);
            assert!(now >= last && now <= HOLD_MAX);
            last = now;
        }
        assert_eq!(delay(500, max), Duration::ZERO);
        assert!(delay(999, max) <= DELAY_MAX);
        assert_eq!(delay(0, 0), Duration::ZERO);
    }
}
