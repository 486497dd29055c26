//! Processor time of this process, and binding it to one core.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use std::time::Duration;

/// Processor time this process used so far, all threads, its own and the kernel's for it.
///
/// # Errors
/// If the kernel does not tell.
pub fn used() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("getrusage")?;
    let part = |time: nix::sys::time::TimeVal| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        let micros = u64::try_from(time.tv_usec()).unwrap_or(0);
        Duration::from_secs(seconds) + Duration::from_micros(micros)
    };
    Ok(part(usage.user_time()) + part(usage.system_time()))
}

/// Binds this process to one core. Call before threads are started.
///
/// # Errors
/// If there is no such core.
pub fn bind(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("bind to core {core}"))
}
