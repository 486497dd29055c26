//! The two host clocks QEMU makes the guest's from: the tick counter and `CLOCK_MONOTONIC`.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the tick counter is compared with the monotonic clock. The two readings are
/// each good to a microsecond, so this gives 0.01 %; what is computed from it is one gap of
/// some 100 ms at a promotion.
const TICKS_SPAN: Duration = Duration::from_millis(20);

/// The host's two clocks, read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostInstant {
    /// The CPU's tick counter (`rdtsc`), the one QEMU reads.
    pub ticks: i64,
    /// `CLOCK_MONOTONIC`, ns, the one QEMU reads.
    pub monotonic_ns: i64,
}

impl HostInstant {
    /// Now. Ticks are 0 on a host without a known counter; [`super::ClockRepair::find`] refuses
    /// there.
    #[must_use]
    pub fn now() -> Self {
        Self {
            ticks: host_ticks().unwrap_or(0),
            monotonic_ns: i64::try_from(monotonic_ns()).unwrap_or(i64::MAX),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps)]
pub(super) fn host_ticks() -> Option<i64> {
    // SAFETY: rdtsc has no operands and touches no memory; every x86-64 CPU has it, and
    // Linux lets user space execute it (QEMU itself depends on that).
    let ticks = unsafe { core::arch::x86_64::_rdtsc() };
    Some(ticks.cast_signed())
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn host_ticks() -> Option<i64> {
    None
}

/// `CLOCK_MONOTONIC` in ns. `Instant` does not show its value.
pub(super) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid, writable timespec for the duration of the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // The clock counts from boot, so neither part is ever negative.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Ticks a second of this host's counter, measured once per process against
/// `CLOCK_MONOTONIC` (the first call takes 20 ms; call it before it is urgent). Measured
/// and not asked for, because the kernel shows its own figure only in its log and CPUID
/// leaf 0x15 is empty on many CPUs and under hypervisors. 0 on a host without a counter.
#[must_use]
pub fn ticks_per_second() -> u64 {
    static MEASURED: OnceLock<u64> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let from = HostInstant::now();
        let begun = Instant::now();
        while begun.elapsed() < TICKS_SPAN {
            std::thread::sleep(TICKS_SPAN - begun.elapsed().min(TICKS_SPAN));
        }
        let to = HostInstant::now();
        let ticks = u128::from((to.ticks - from.ticks).unsigned_abs());
        let nanos = u128::from((to.monotonic_ns - from.monotonic_ns).unsigned_abs()).max(1);
        u64::try_from(ticks * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    })
}
