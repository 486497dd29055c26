//! Self-fencing: a host that has lost its permission to live dies by itself, and the
//! others know by when.
//!
//! ```text
//! decisions --deadline--> [lease] --read by--> petter (real-time thread) --pet--> watchdog
//!                                                                    /dev/watchdog, or the
//!                                                                    lab's supervisor process
//! ```
//!
//! The invariant: **after the lease's deadline at most the watchdog's timeout passes until
//! the host is dead**, whatever is frozen or killed on the host. A pet says when it was
//! permitted: the supervisor counts from there and not from its arrival. `/dev/watchdog`
//! has no such field; there a process that is stopped between reading the clock and the
//! system call and goes on after the deadline would pet once more, late.
//!
//! Nothing here disarms but [`Petter::farewell`], the host's orderly goodbye: a dropped
//! petter, a closed socket or a dead daemon leave the watchdog counting.

mod device;
mod petter;
mod supervisor;
#[cfg(test)]
mod tests;

pub use device::Device;
pub use petter::{Lease, PetState, Petter};
pub use supervisor::{Ended, Remote, Supervisor};

use nix::time::{ClockId, clock_gettime};
use std::io;
use std::time::Duration;

/// Shortest timeout: below, a busy machine would kill itself.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(200);
/// Longest timeout: it is added to every takeover that no fence agent confirms.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(120);

/// An instant of `CLOCK_BOOTTIME`, nanoseconds: it goes on while the machine is suspended,
/// and is the same in all processes of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BootNs(pub u64);

impl BootNs {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let t = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has it since 2.6.39");
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        Self(seconds * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0))
    }

    /// `by` later.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

/// An armed watchdog.
pub trait Watchdog: Send {
    /// How long after the last pet it kills the host, as it says itself.
    fn timeout(&self) -> Duration;

    /// Keep the host alive until `permitted` + timeout. `permitted` is an instant just past.
    ///
    /// # Errors
    /// [`WatchdogError`]: the host will die unless a later pet succeeds.
    fn pet(&mut self, permitted: BootNs) -> Result<(), WatchdogError>;

    /// The magic close: stop counting. Only for an orderly farewell.
    ///
    /// # Errors
    /// [`WatchdogError`]: it may still be counting.
    fn disarm(self: Box<Self>) -> Result<(), WatchdogError>;
}

/// A watchdog that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// The kernel said no.
    #[error("watchdog {on}: {step}: {source}")]
    Io {
        /// Device or socket.
        on: String,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It works, but its promise is not worth anything to the pool.
    #[error("watchdog {on} is refused: {why}")]
    Refused {
        /// Device or socket.
        on: String,
        /// Why, and what to do.
        why: String,
    },
}

/// Whether `timeout` is one a watchdog may have here.
fn check_timeout(on: &str, timeout: Duration) -> Result<(), WatchdogError> {
    if (TIMEOUT_MIN..=TIMEOUT_MAX).contains(&timeout) {
        return Ok(());
    }
    Err(WatchdogError::Refused {
        on: on.to_owned(),
        why: format!("a timeout of {timeout:?}; use {TIMEOUT_MIN:?} to {TIMEOUT_MAX:?}"),
    })
}
