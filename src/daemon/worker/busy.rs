//! How busy a guest's vCPUs are, and what a QEMU costs its host, from /proc.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Measures the busiest vCPU between two samples.
pub struct BusyMeter {
    pid: u32,
    threads: Vec<VCpu>,
    last_ns: u64,
    own_ns: u64,
    paused_ns: u64,
    cuts: u64,
    permille: u16,
    crowding_ns: u64,
}

/// One vCPU thread and its last reading.
struct VCpu {
    tid: i32,
    stat: Option<File>,
    used: CpuTime,
}

/// A thread's time on a core and its time waiting for one, nanoseconds.
#[derive(Clone, Copy, Default)]
struct CpuTime {
    ran: u64,
    waited: u64,
}

/// Time between two measurements at least: the kernel's own accounting is exact, but a
/// share of a very short time says little.
const SAMPLE_NS_MIN: u64 = 20_000_000;

impl BusyMeter {
    /// A meter of these vCPU threads of QEMU.
    pub fn new(pid: u32, threads: Vec<i32>) -> Self {
        let vcpu = |tid| VCpu {
            tid,
            stat: File::open(format!("/proc/{pid}/task/{tid}/stat")).ok(),
            used: CpuTime::default(),
        };
        Self {
            pid,
            threads: threads.into_iter().map(vcpu).collect(),
            last_ns: 0,
            own_ns: 0,
            paused_ns: 0,
            cuts: 0,
            permille: 0,
            crowding_ns: 0,
        }
    }

    /// QEMU's main thread answers the monitor within the pause: the vCPUs must not keep it
    /// waiting for a core. QEMU's threads inherit the daemon's priority; take it from the vCPUs.
    pub fn prioritise(&self) {
        for vcpu in &self.threads {
            // SAFETY: setpriority takes plain numbers and changes only scheduling.
            unsafe {
                libc::setpriority(libc::PRIO_PROCESS, vcpu.tid.unsigned_abs(), 0);
            }
        }
    }

    /// The guest stood still for that long for a cut.
    pub const fn paused(&mut self, ns: u64) {
        self.paused_ns += ns;
        self.cuts += 1;
    }

    /// The guest stood still for that long, for another reason.
    pub const fn stood(&mut self, ns: u64) {
        self.paused_ns += ns;
    }

    /// Measure now, if long enough after the last time.
    pub fn sample(&mut self, now_ns: u64) {
        let wall = now_ns.saturating_sub(self.last_ns);
        if wall < SAMPLE_NS_MIN {
            return;
        }
        let running = wall.saturating_sub(self.paused_ns).max(1);
        let (mut wanted, mut waited) = (0, 0);
        for vcpu in &mut self.threads {
            if let Some(used) = cpu_time(self.pid, vcpu.tid) {
                let ran = used.ran.saturating_sub(vcpu.used.ran);
                let wait = used.waited.saturating_sub(vcpu.used.waited);
                wanted = wanted.max(ran + wait);
                waited = waited.max(wait);
                vcpu.used = used;
            }
        }
        let own = own_cpu_ns();
        if self.last_ns != 0 {
            self.permille =
                u16::try_from((wanted.saturating_mul(1000) / running).min(1000)).unwrap_or(1000);
            // Others may keep it from a core as well; the cuts answer for no more than
            // they used.
            let ours = waited.min(own.saturating_sub(self.own_ns));
            self.crowding_ns = ours / self.cuts.max(1);
        }
        self.last_ns = now_ns;
        self.own_ns = own;
        self.paused_ns = 0;
        self.cuts = 0;
    }

    /// Time the busiest vCPU ran or waited for a core, per mille of the time it might have run.
    pub const fn permille(&self) -> u16 {
        self.permille
    }

    /// How long it waited for a core because of one cut's work, at most, nanoseconds.
    pub const fn crowding_ns(&self) -> u64 {
        self.crowding_ns
    }

    /// Whether every vCPU waits for something to do at this moment.
    pub fn idle(&self) -> bool {
        self.threads.iter().all(|vcpu| {
            let mut text = [0; 64];
            let read = vcpu.stat.as_ref().map(|f| f.read_at(&mut text, 0));
            matches!(read, Some(Ok(n)) if state_of(&text[..n]) == Some(b'S'))
        })
    }
}

/// The state in a line of /proc/PID/stat: the letter after the name in brackets, which may
/// itself hold brackets (proc(5)).
fn state_of(stat: &[u8]) -> Option<u8> {
    let end = stat.iter().rposition(|&b| b == b')')?;
    stat.get(end + 2).copied()
}

/// First and second field of schedstat (Documentation/scheduler/sched-stats.rst).
fn cpu_time(pid: u32, tid: i32) -> Option<CpuTime> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    let mut fields = text.split_whitespace().map(str::parse);
    Some(CpuTime {
        ran: fields.next()?.ok()?,
        waited: fields.next()?.ok()?,
    })
}

/// CPU time of this process so far, nanoseconds.
fn own_cpu_ns() -> u64 {
    let mut used = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `used` is a live timespec that the call fills; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut used) };
    used.tv_sec.unsigned_abs() * 1_000_000_000 + used.tv_nsec.unsigned_abs()
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

#[cfg(test)]
mod tests {
    use super::{BusyMeter, cpu_time, own_cpu_ns, state_of};

    #[test]
    fn the_state_is_found_behind_any_name() {
        assert_eq!(state_of(b"12 (CPU 0/TCG) S 1 2"), Some(b'S'));
        assert_eq!(state_of(b"12 (a) S (b) R 1 2"), Some(b'R'));
        assert_eq!(state_of(b"12 (a)"), None);
        assert_eq!(state_of(b""), None);
    }

    #[test]
    fn a_thread_that_asks_is_not_idle_and_one_that_is_gone_neither() {
        let me = std::process::id();
        let tid = nix::unistd::gettid().as_raw();
        assert!(cpu_time(me, tid).is_some() && own_cpu_ns() > 0);
        assert!(!BusyMeter::new(me, vec![tid]).idle());
        assert!(!BusyMeter::new(me, vec![-1]).idle());
    }
}
