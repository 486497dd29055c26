//! The constants of mirroring, each with its reason, and the relations between them.

use super::Micros;

/// Epochs sent and not yet acknowledged. One: the next cut waits for the last commit,
/// so at most one epoch is staged, and a slow link slows the cuts and nothing else. The
/// machines work for any number.
pub const MAX_IN_FLIGHT: usize = 1;

/// Epochs a standby acknowledges ahead of applying them. One is applied while the next
/// arrives; a standby that cannot keep up acknowledges later, which slows the cuts and so
/// the guest, and keeps its buffers within this many epochs and those in flight.
pub const APPLY_BACKLOG_MAX: u64 = 2;

/// Cuts of one epoch that may fail in a row before mirroring is given up: one failure is
/// a QMP hiccup, three are a broken QEMU.
pub const CUT_FAILURES_MAX: u32 = 3;

/// First wait after a registry that gave no answer.
pub const REGISTRY_RETRY_MIN: Micros = Micros::from_millis(50);

/// Longest wait between attempts to reach the registry: a VM that stands still should
/// not wait much longer than the outage, and a registry that comes back should not drown.
pub const REGISTRY_RETRY_MAX: Micros = Micros::from_millis(1000);

/// A standby that has heard of no epoch for this long reads the record: the primary's last
/// word (handed over, dismissed, confirmed) may have been lost with its host. Twice the
/// longest interval between cuts of [`super::Policy::default`].
pub const SILENCE_BOUND: Micros = Micros::from_millis(500);

/// Times of one pair. Both sides must be configured alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Silence after which the failure detector calls a host lost.
    pub detection: Micros,
    /// How much later than the primary a standby claims. If only the link is cut both
    /// notice at the same time; the primary should win then and the VM stay where it is.
    /// Longer than one registry write on a loaded host, as short as the blackout allows.
    pub claim_delay: Micros,
    /// Rule 5: least time from a standby's last acknowledgement to its promotion.
    pub lease: Micros,
    /// Rule 5: longest time from sending an epoch to releasing it.
    pub release_within: Micros,
    /// How long the link may be down before the primary claims, while heartbeats still arrive.
    pub link_down_bound: Micros,
    /// How long an epoch may stay unacknowledged, from its cut, before the primary claims.
    pub ack_overdue: Micros,
    /// How long a named standby goes without an epoch before it claims although the
    /// primary's host is alive: the VM is gone there and its last word was lost, or its
    /// shell hangs. Later than the primary itself would give up.
    pub silence_claim: Micros,
    /// A partner that has not made a standby ready by then will not: QEMU starts in 50 to
    /// 90 ms (QEMU.md section 5), the rest is allocation of memory.
    pub prepare_patience: Micros,
    /// A standby whose primary is lost and which the record does not name keeps reading this
    /// long after its last epoch, in case the primary's last write is still on its way; then
    /// it stands down.
    pub orphan_patience: Micros,
    /// Replication lag at which a VM is no longer called mirrored and an alert is raised.
    pub lag_alarm: Micros,
}

impl Timing {
    /// The default: detection in 100 ms, blackout well under 250 ms.
    pub const DEFAULT: Self = Self {
        detection: Micros::from_millis(100),
        claim_delay: Micros::from_millis(40),
        lease: Micros::from_millis(140),
        release_within: Micros::from_millis(120),
        link_down_bound: Micros::from_millis(100),
        ack_overdue: Micros::from_millis(3000),
        silence_claim: Micros::from_millis(4000),
        prepare_patience: Micros::from_millis(30_000),
        orphan_patience: Micros::from_millis(10_000),
        lag_alarm: Micros::from_millis(1000),
    };
}

impl Default for Timing {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const _: () = {
    let t = Timing::DEFAULT;
    assert!(
        t.release_within.0 < t.lease.0,
        "the primary's lease must end first"
    );
    // Clocks of two hosts may differ by 1000 ppm and still keep the order.
    assert!(t.lease.0 - t.release_within.0 > t.lease.0 / 1000);
    assert!(
        t.lease.0 <= t.detection.0 + t.claim_delay.0,
        "the lease must not add blackout"
    );
    assert!(t.silence_claim.0 > t.ack_overdue.0 + 2 * SILENCE_BOUND.0 - 1);
    assert!(t.orphan_patience.0 > t.silence_claim.0);
    assert!(REGISTRY_RETRY_MIN.0 <= REGISTRY_RETRY_MAX.0);
    assert!(MAX_IN_FLIGHT >= 1 && APPLY_BACKLOG_MAX >= 1);
};
