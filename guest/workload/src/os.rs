//! The few system calls `std` has no name for. The only unsafe code of the guest's program.

use std::io;

/// `CLOCK_MONOTONIC`, in nanoseconds: what a failover must not make jump.
pub fn mono_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME`, in nanoseconds since 1970.
pub fn real_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec for the length of the call; both clocks always exist.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1_000_000_000 + nanos.unwrap_or(0)
}

/// How the guest ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// Restart.
    Reboot,
    /// Switch off.
    PowerOff,
}

/// Write back what is cached and restart or switch off at once. Returns only on failure
/// (not root).
pub fn end(how: End) -> io::Error {
    let command = match how {
        End::Reboot => libc::RB_AUTOBOOT,
        End::PowerOff => libc::RB_POWER_OFF,
    };
    // SAFETY: both calls take no pointers.
    unsafe {
        libc::sync();
        libc::reboot(command);
    }
    io::Error::last_os_error()
}
