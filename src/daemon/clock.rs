//! The daemon's clocks, read here and passed on as arguments.

use crate::mirror::Micros;
use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of a clock.
fn read_ns(clock: ClockId) -> u64 {
    let t = clock_gettime(clock).expect("both clocks exist on every Linux since 2.6.39");
    u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0)
}

/// CLOCK_MONOTONIC now, nanoseconds: for figures and events. The same in every network
/// and pid namespace of a machine, so that a lab's hosts can be compared.
#[must_use]
pub fn now_ns() -> u64 {
    read_ns(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_BOOTTIME now, for the state machines: it goes on while the machine is suspended,
/// so that a host that slept knows it.
#[must_use]
pub fn now() -> Micros {
    Micros(read_ns(ClockId::CLOCK_BOOTTIME) / 1000)
}
