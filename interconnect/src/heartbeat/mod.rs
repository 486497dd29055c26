//! skeleton
use crate::detector::Verdict;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
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
pub struct Heartbeat {}
impl Heartbeat {
    /// Bind the sockets and start the thread. Nothing is sent before a key is set.
    ///
    /// # Errors
    /// [`HeartbeatError`].
    pub fn start(_config: HeartbeatConfig) -> Result<Self, HeartbeatError> {
        unimplemented!()
    }
    /// Use the key of a new session; the one before stays accepted.
    pub fn set_key(&self, _key: HeartbeatKey) {
        unimplemented!()
    }
    /// The detector's verdict now.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        unimplemented!()
    }
    /// Age of the newest heartbeat on any link; `None` if never heard.
    #[must_use]
    pub fn last_heard(&self) -> Option<Duration> {
        unimplemented!()
    }
    /// The partner's incarnation: another number means its daemon was restarted.
    #[must_use]
    pub fn peer_incarnation(&self) -> Option<u64> {
        unimplemented!()
    }
    /// Whether this host stood still at any time since `since`, and how long. Also
    /// true while the heartbeat thread has not yet run after a freeze, so that
    /// whoever runs first after it can ask.
    #[must_use]
    pub fn own_stall_since(&self, _since: Instant) -> Option<Duration> {
        unimplemented!()
    }
    /// The last own stall: its length and how long ago it ended.
    #[must_use]
    pub fn stalled(&self) -> Option<(Duration, Duration)> {
        unimplemented!()
    }
    /// How the thread stands.
    #[must_use]
    pub fn status(&self) -> HeartbeatStatus {
        unimplemented!()
    }
}

impl std::fmt::Debug for HeartbeatKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HeartbeatKey(..)")
    }
}
