//! The heartbeat thread's loop.
//!
//! ```text
//!  send if due -> wait (sockets, wake-up, next send) -> drain sockets -> detector -> verdict
//! ```

use super::packet::{Keys, PACKET_BYTES};
use super::{HeartbeatConfig, HeartbeatKey, HeartbeatStatus, realtime};
use crate::detector::{Detector, Verdict};
use nix::poll::{PollFd, PollFlags};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Datagrams read from one socket in one period; a flood of more is left in the
/// socket until the next, so that it cannot take the processor at this priority. It
/// is more than a socket buffer of the usual 208 KiB holds (about 280, each counted
/// with its kernel overhead), so after an own stall one pass drains it.
const DATAGRAMS_PER_PERIOD_MAX: u32 = 512;
/// For this long after a new key, heartbeats go out under the key before it as
/// well: the partner may take up its copy a little later.
const KEY_OVERLAP: Duration = Duration::from_secs(1);

/// Time since boot, also while the host sleeps.
#[must_use]
pub fn boot_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec for the kernel to write; CLOCK_BOOTTIME has
    // existed since Linux 2.6.39, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

const UNKNOWN: u8 = 0;
const ALIVE: u8 = 1;
const SUSPECT: u8 = 2;
const LOST: u8 = 3;

/// What the thread and its owner share. Times are ns since boot, 0: never.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) stop: AtomicBool,
    pub(super) new_keys: Mutex<Vec<HeartbeatKey>>,
    pub(super) warnings: Mutex<HeartbeatStatus>,
    pub(super) last_heard_ns: AtomicU64,
    pub(super) last_poll_ns: AtomicU64,
    pub(super) stall_limit_ns: AtomicU64,
    pub(super) stall_ns: AtomicU64,
    pub(super) stall_end_ns: AtomicU64,
    pub(super) peer_incarnation: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) heard: AtomicU64,
    pub(super) refused: AtomicU64,
    verdict: AtomicU8,
}

impl Shared {
    /// How long ago a time was.
    pub(super) fn since(&self, time: &AtomicU64, now: Duration) -> Option<Duration> {
        match time.load(Ordering::Acquire) {
            0 => None,
            ns => Some(now.saturating_sub(Duration::from_nanos(ns))),
        }
    }

    pub(super) fn verdict(&self, now: Duration) -> Verdict {
        let limit = Duration::from_nanos(self.stall_limit_ns.load(Ordering::Acquire));
        if let Some(stalled) = self
            .since(&self.last_poll_ns, now)
            .filter(|gap| *gap > limit)
        {
            return Verdict::SelfStalled { stalled };
        }
        match self.verdict.load(Ordering::Acquire) {
            ALIVE => Verdict::Alive,
            SUSPECT => Verdict::Suspect,
            LOST => Verdict::Lost,
            _ => Verdict::Unknown,
        }
    }
}

/// The thread's own state.
pub(super) struct Beat {
    config: HeartbeatConfig,
    sockets: Vec<(UdpSocket, SocketAddr)>,
    wake: OwnedFd,
    shared: Arc<Shared>,
    detector: Detector,
    keys: Keys,
    incarnation: u64,
    sequence: u64,
    overlap_until: Duration,
    told: Option<Verdict>,
}

impl Beat {
    pub(super) fn new(
        config: HeartbeatConfig,
        sockets: Vec<(UdpSocket, SocketAddr)>,
        wake: OwnedFd,
        shared: Arc<Shared>,
    ) -> Self {
        let detector = Detector::new(config.period, config.detection);
        shared
            .stall_limit_ns
            .store(nanos(detector.stall_limit()), Ordering::Release);
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            config,
            sockets,
            wake,
            shared,
            detector,
            keys: Keys::default(),
            // Only has to differ from one start to the next; never 0.
            incarnation: since_epoch.map_or(1, |time| nanos(time).max(1)),
            sequence: 0,
            overlap_until: Duration::ZERO,
            told: None,
        }
    }

    pub(super) fn run(mut self) {
        let priority_warning = realtime::raise_priority().err().map(|error| {
            format!("heartbeats run without real-time priority ({error}): a busy host may be taken for a dead one; start pollux with CAP_SYS_NICE")
        });
        let memory_warning = realtime::lock_memory().err().map(|error| {
            format!("the heartbeats' memory is not locked ({error}): a swapping host may be taken for a dead one; start pollux with CAP_IPC_LOCK or a higher memlock limit")
        });
        *self
            .shared
            .warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = HeartbeatStatus {
            priority_warning,
            memory_warning,
            ..HeartbeatStatus::default()
        };

        let mut next = boot_time();
        let mut budget = DATAGRAMS_PER_PERIOD_MAX;
        while !self.shared.stop.load(Ordering::Acquire) {
            self.take_keys();
            let now = boot_time();
            if now >= next {
                self.send(now);
                budget = DATAGRAMS_PER_PERIOD_MAX;
                next = if next + self.config.period > now {
                    next
                } else {
                    now
                } + self.config.period;
            }
            self.wait(next.saturating_sub(now), budget > 0);
            let now = boot_time();
            if let Some(heard) = self.drain(&mut budget) {
                self.detector.heard(now);
                self.shared
                    .last_heard_ns
                    .store(nanos(now), Ordering::Release);
                self.shared.peer_incarnation.store(heard, Ordering::Release);
            }
            self.judge(boot_time());
        }
    }

    /// Take new keys, without waiting: an ordinary thread may hold the lock and not
    /// be running.
    fn take_keys(&mut self) {
        let Ok(mut new) = self.shared.new_keys.try_lock() else {
            return;
        };
        if new.is_empty() {
            return;
        }
        new.iter().for_each(|key| self.keys.add(key));
        new.clear();
        self.overlap_until = boot_time() + KEY_OVERLAP;
    }

    fn send(&mut self, now: Duration) {
        for (link, (socket, peer)) in self.sockets.iter().enumerate() {
            let link = u16::try_from(link).unwrap_or(u16::MAX);
            for newest in [true, false] {
                if !newest && now >= self.overlap_until {
                    continue;
                }
                self.sequence += 1;
                let Some(packet) = self
                    .keys
                    .sign(newest, link, self.incarnation, self.sequence)
                else {
                    continue;
                };
                // A link that is down, or a partner that is (ICMP), is what this
                // thread is there to find out: the silence tells.
                if socket.send_to(&packet, peer).is_ok() {
                    self.shared.sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn wait(&self, timeout: Duration, read: bool) {
        // At most LINKS_MAX + 1; a fixed array would need no heap, but the allocator
        // keeps this one at hand.
        let mut fds = Vec::with_capacity(self.sockets.len() + 1);
        fds.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        if read {
            fds.extend(
                self.sockets
                    .iter()
                    .map(|(socket, _)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
            );
        }
        let timeout = nix::sys::time::TimeSpec::from_duration(timeout);
        // An interruption is as good as a time-out: the loop looks at everything.
        let _ = nix::poll::ppoll(&mut fds, Some(timeout), None);
        let mut counter = [0; 8];
        let _ = nix::unistd::read(&self.wake, &mut counter);
    }

    /// Read all that is there, within the budget; the partner's incarnation if a
    /// heartbeat was among it.
    fn drain(&mut self, budget: &mut u32) -> Option<u64> {
        // One byte more than a heartbeat: a longer datagram is cut and refused.
        let mut datagram = [0; PACKET_BYTES + 1];
        let mut heard = None;
        for (socket, _) in &self.sockets {
            while *budget > 0 {
                match socket.recv_from(&mut datagram) {
                    Ok((length, _)) => {
                        *budget -= 1;
                        // The source address proves nothing, the key does.
                        if let Some(accepted) = self.keys.accept(&datagram[..length]) {
                            heard = Some(accepted.incarnation);
                            self.shared.heard.fetch_add(1, Ordering::Relaxed);
                        } else {
                            self.shared.refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    // An ICMP error from an earlier send: there may be more behind it.
                    Err(_) => *budget -= 1,
                }
            }
        }
        heard
    }

    fn judge(&mut self, now: Duration) {
        let verdict = self.detector.polled(now);
        if let Verdict::SelfStalled { stalled } = verdict {
            self.shared
                .stall_ns
                .store(nanos(stalled), Ordering::Release);
            self.shared
                .stall_end_ns
                .store(nanos(now), Ordering::Release);
        }
        // After the stall is noted: who sees a fresh poll must also see the stall.
        self.shared
            .last_poll_ns
            .store(nanos(now), Ordering::Release);
        self.shared.verdict.store(
            match self.detector.verdict(now) {
                Verdict::Alive => ALIVE,
                Verdict::Suspect => SUSPECT,
                Verdict::Lost => LOST,
                Verdict::Unknown | Verdict::SelfStalled { .. } => UNKNOWN,
            },
            Ordering::Release,
        );
        if self.told != Some(verdict) {
            self.told = Some(verdict);
            (self.config.on_verdict)(verdict, self.detector.age(now));
        }
    }
}
