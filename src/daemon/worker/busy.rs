//! How busy a guest's vCPUs are, and what a QEMU costs its host, from /proc.

use std::fs;

/// Measures the busiest vCPU between two samples.
pub struct BusyMeter {
    pid: u32,
    threads: Vec<i32>,
    last_cpu_ns: Vec<u64>,
    last_ns: u64,
    paused_ns: u64,
    permille: u16,
}

/// Time between two measurements at least: the kernel's own accounting is exact, but a
/// share of a very short time says little.
const SAMPLE_NS_MIN: u64 = 20_000_000;

impl BusyMeter {
    /// A meter of these vCPU threads of QEMU.
    pub fn new(pid: u32, threads: Vec<i32>) -> Self {
        let last_cpu_ns = vec![0; threads.len()];
        Self {
            pid,
            threads,
            last_cpu_ns,
            last_ns: 0,
            paused_ns: 0,
            permille: 0,
        }
    }

    /// QEMU's main thread answers the monitor within the pause: the vCPUs must not keep it
    /// waiting for a core. QEMU's threads inherit the daemon's priority; take it from the vCPUs.
    pub fn prioritise(&self) {
        for tid in &self.threads {
            // SAFETY: setpriority takes plain numbers and changes only scheduling.
            unsafe {
                libc::setpriority(libc::PRIO_PROCESS, tid.unsigned_abs(), 0);
            }
        }
    }

    /// The guest stood still for that long since the last sample.
    pub const fn paused(&mut self, ns: u64) {
        self.paused_ns += ns;
    }

    /// Measure now, if long enough after the last time.
    pub fn sample(&mut self, now_ns: u64) {
        let wall = now_ns.saturating_sub(self.last_ns);
        if wall < SAMPLE_NS_MIN {
            return;
        }
        let running = wall.saturating_sub(self.paused_ns).max(1);
        let mut busiest = 0;
        for (tid, last) in self.threads.iter().zip(&mut self.last_cpu_ns) {
            if let Some(cpu) = cpu_ns(self.pid, *tid) {
                busiest = busiest.max(cpu.saturating_sub(*last));
                *last = cpu;
            }
        }
        if self.last_ns != 0 {
            self.permille =
                u16::try_from((busiest.saturating_mul(1000) / running).min(1000)).unwrap_or(1000);
        }
        self.last_ns = now_ns;
        self.paused_ns = 0;
    }

    /// CPU time of the busiest vCPU per mille of the time it might have run.
    pub const fn permille(&self) -> u16 {
        self.permille
    }
}

/// CPU time of a thread in nanoseconds: first field of schedstat
/// (Documentation/scheduler/sched-stats.rst).
fn cpu_ns(pid: u32, tid: i32) -> Option<u64> {
    fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat"))
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Resident memory of a process, bytes: anonymous, file and shared (proc(5), VmRSS).
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Memory of a process that is not the shared RAM file, bytes (proc(5), VmRSS less RssShmem).
pub fn private_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some(field("VmRSS:")?.saturating_sub(field("RssShmem:")?) * 1024)
}
