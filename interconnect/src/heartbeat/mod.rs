//! Heartbeats: liveness of the partner on sockets of their own, never behind bulk
//! data, sent and received by one real-time thread. They go on when QUIC is down.
//!
//! The keys come from the QUIC session (TLS exporter), so that only the pinned
//! partner can be heard. Before the first session nothing is sent or heard.
//!
//! What this must never do: count a datagram that is not authentic and new; call
//! the partner lost for time during which its own thread stood still (see
//! [`crate::detector`]); wait for a lock that an ordinary thread may hold.

mod packet;
pub mod realtime;
mod thread;

pub use packet::LINKS_MAX;

use crate::detector::{DETECTION_PERIODS_MIN, Verdict};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thread::{Beat, Shared};
/// Secrets that authenticate the heartbeats of one session; from
/// [`crate::link::LinkEvent::Up`].
#[derive(Clone)]
pub struct HeartbeatKey {
    /// Authenticates what this side sends.
    pub(crate) send: [u8; 32],
    /// Authenticates what the partner sends.
    pub(crate) receive: [u8; 32],
}
/// One way heartbeats travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeartbeatLink {
    /// Local address and port; not the port of the QUIC link.
    pub local: SocketAddr,
    /// The partner's.
    pub peer: SocketAddr,
}
/// Called on the heartbeat thread at each change of verdict, with the age of the
/// newest heartbeat (`None`: never heard). Runs at real-time priority: must not
/// block and must be short.
pub type OnVerdict = Box<dyn Fn(Verdict, Option<Duration>) + Send>;
/// What a heartbeat needs.
pub struct HeartbeatConfig {
    /// This host.
    pub me: String,
    /// The partner.
    pub peer: String,
    /// All ways; a heartbeat is sent on each, one heard on any counts.
    pub links: Vec<HeartbeatLink>,
    /// Time between heartbeats; [`PERIOD_DEFAULT`].
    pub period: Duration,
    /// Silence after which the partner is lost; [`DETECTION_DEFAULT`].
    pub detection: Duration,
    /// Told of each change.
    pub on_verdict: OnVerdict,
}
/// Default time between heartbeats.
pub const PERIOD_DEFAULT: Duration = Duration::from_millis(10);
/// Shortest period: below it the timer slack of a busy host is all there is.
pub const PERIOD_MIN: Duration = Duration::from_millis(1);
/// Default detection time.
pub const DETECTION_DEFAULT: Duration = Duration::from_millis(100);
/// Why heartbeats cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeartbeatError {
    /// A socket could not be bound.
    #[error(
        "cannot bind the heartbeat socket {addr}: {source}: give the link an address of this host"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The configuration makes no sense.
    #[error("heartbeat configuration: {0}")]
    Config(String),
    /// The thread could not be started.
    #[error("cannot start the heartbeat thread: {0}")]
    Thread(std::io::Error),
}
/// How the heartbeat thread stands, for status.
#[derive(Clone, Debug, Default)]
pub struct HeartbeatStatus {
    /// Not at real-time priority, and why.
    pub priority_warning: Option<String>,
    /// Memory not locked, and why.
    pub memory_warning: Option<String>,
    /// Heartbeats sent.
    pub sent: u64,
    /// Heartbeats accepted.
    pub heard: u64,
    /// Datagrams refused (foreign, replayed, malformed).
    pub refused: u64,
}
/// Running heartbeats; stops when dropped.
pub struct Heartbeat {
    shared: Arc<Shared>,
    /// Written to wake and end the thread.
    wake: nix::sys::eventfd::EventFd,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    local_addrs: Vec<SocketAddr>,
}

impl std::fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Heartbeat({:?}, last heard {:?} ago)",
            self.verdict(),
            self.last_heard()
        )
    }
}

impl Heartbeat {
    /// Bind the sockets and start the thread. Nothing is sent before a key is set.
    ///
    /// # Errors
    /// [`HeartbeatError`].
    pub fn start(config: HeartbeatConfig) -> Result<Self, HeartbeatError> {
        let links = config.links.len();
        if links == 0 || links > LINKS_MAX {
            return Err(HeartbeatError::Config(format!(
                "{links} links given, it takes 1 to {LINKS_MAX}"
            )));
        }
        if config.period < PERIOD_MIN {
            return Err(HeartbeatError::Config(format!(
                "the period of {:?} is below {PERIOD_MIN:?}",
                config.period
            )));
        }
        if config.detection < config.period * DETECTION_PERIODS_MIN {
            return Err(HeartbeatError::Config(format!(
                "the detection time of {:?} must be at least {DETECTION_PERIODS_MIN} periods of {:?}",
                config.detection, config.period
            )));
        }
        let mut sockets = Vec::with_capacity(links);
        let mut local_addrs = Vec::with_capacity(links);
        for link in &config.links {
            let bind = |source| HeartbeatError::Bind {
                addr: link.local,
                source,
            };
            let socket = UdpSocket::bind(link.local).map_err(bind)?;
            socket.set_nonblocking(true).map_err(bind)?;
            local_addrs.push(socket.local_addr().map_err(bind)?);
            sockets.push((socket, link.peer));
        }
        let shared = Arc::new(Shared::default());
        let flags =
            nix::sys::eventfd::EfdFlags::EFD_NONBLOCK | nix::sys::eventfd::EfdFlags::EFD_CLOEXEC;
        let wake = nix::sys::eventfd::EventFd::from_value_and_flags(0, flags)
            .map_err(|error| HeartbeatError::Thread(error.into()))?;
        let wake_of_thread: OwnedFd = std::os::fd::AsFd::as_fd(&wake)
            .try_clone_to_owned()
            .map_err(HeartbeatError::Thread)?;
        let name = format!("beat-{}", config.peer).chars().take(15).collect();
        let beat = Beat::new(config, sockets, wake_of_thread, Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(realtime::STACK_BYTES)
            .spawn(move || beat.run())
            .map_err(HeartbeatError::Thread)?;
        Ok(Self {
            shared,
            wake,
            thread: Mutex::new(Some(thread)),
            local_addrs,
        })
    }

    /// Use the key of a new session; the one before stays accepted.
    pub fn set_key(&self, key: HeartbeatKey) {
        self.shared
            .new_keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(key);
        // A full counter wakes the thread as well.
        let _ = self.wake.write(1);
    }

    /// The detector's verdict now.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.shared.verdict(thread::boot_time())
    }

    /// Age of the newest heartbeat on any link; `None` if never heard.
    #[must_use]
    pub fn last_heard(&self) -> Option<Duration> {
        self.shared
            .since(&self.shared.last_heard_ns, thread::boot_time())
    }

    /// The partner's incarnation: another number means its daemon was restarted.
    #[must_use]
    pub fn peer_incarnation(&self) -> Option<u64> {
        Some(self.shared.peer_incarnation.load(Ordering::Acquire))
            .filter(|incarnation| *incarnation != 0)
    }

    /// Whether this host stood still at any time since `since`, and how long. Also
    /// true while the heartbeat thread has not yet run after a freeze, so that
    /// whoever runs first after it can ask.
    #[must_use]
    pub fn own_stall_since(&self, since: Instant) -> Option<Duration> {
        let now = thread::boot_time();
        let polled = self.shared.since(&self.shared.last_poll_ns, now)?;
        let limit = Duration::from_nanos(self.shared.stall_limit_ns.load(Ordering::Acquire));
        if polled > limit {
            return Some(polled);
        }
        // `Instant` does not count while the host sleeps, but a sleep that ended
        // after `since` ended less than `since.elapsed()` ago on either clock.
        let (length, ended_ago) = self.stalled()?;
        (ended_ago <= since.elapsed()).then_some(length)
    }

    /// The last own stall: its length and how long ago it ended.
    #[must_use]
    pub fn stalled(&self) -> Option<(Duration, Duration)> {
        let ended_ago = self
            .shared
            .since(&self.shared.stall_end_ns, thread::boot_time())?;
        Some((
            Duration::from_nanos(self.shared.stall_ns.load(Ordering::Acquire)),
            ended_ago,
        ))
    }

    /// How the thread stands.
    #[must_use]
    pub fn status(&self) -> HeartbeatStatus {
        let warnings = self
            .shared
            .warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        HeartbeatStatus {
            sent: self.shared.sent.load(Ordering::Relaxed),
            heard: self.shared.heard.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
            ..warnings
        }
    }

    /// The addresses the sockets are bound to (ports filled in).
    #[must_use]
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.local_addrs.clone()
    }
}

impl Heartbeat {
    /// End the heartbeats for good, whoever still holds this; when it returns the sockets are
    /// closed and their addresses free (unless the verdict's callback calls it).
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.wake.write(1);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic in the callback was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop();
    }
}

impl std::fmt::Debug for HeartbeatKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HeartbeatKey(..)")
    }
}

pub(crate) use packet::fuzz;

#[cfg(test)]
mod tests;
