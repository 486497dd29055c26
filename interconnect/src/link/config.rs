//! What an interconnect is told when it starts.

use super::hello::PROTOCOL_VERSION;
use crate::frame::Frame;
use crate::identity::{Fingerprint, Identity};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// One physical link between the hosts of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkAddr {
    /// Address and UDP port of this host on the link; port 0 picks one.
    pub local: SocketAddr,
    /// Address and UDP port of the partner on the link.
    pub peer: SocketAddr,
}

/// Takes acknowledgements straight from the thread that received them. Must not
/// block: it holds up everything on the interconnect.
pub type OnAck = Arc<dyn Fn(Frame) + Send + Sync>;

/// What may be set about an interconnect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkSettings {
    /// Silence after which QUIC gives up a session. Heartbeats decide about the
    /// partner's life much earlier; this only makes the session be dialled anew.
    pub idle_timeout: Duration,
    /// Largest UDP payload to send or take, in bytes; what the route takes is found
    /// out below it. 1,472 on 1,500-byte links, 8,972 with jumbo frames (9,000 less
    /// IPv4 and UDP headers).
    pub mtu_bytes_max: u16,
    /// Bytes one epoch lane may queue in this host before the sender waits: enough to
    /// encode the next batch while one is sent. What is queued when seeding ends is
    /// what the first epoch waits behind.
    pub lane_queue_bytes: usize,
    /// How long a session outlives its last connection: what its lanes hold is sent when a
    /// link comes back within it.
    pub session_keep: Duration,
    /// Highest protocol version offered, for tests and for a partner whose newer version
    /// is not to be trusted; 1 is the least.
    #[doc(hidden)]
    pub version_max: u16,
}

/// A pair as seen from one side.
#[derive(Clone)]
pub struct PairConfig {
    /// This host's identity.
    pub identity: Arc<Identity>,
    /// This host's name, told to the partner.
    pub me: String,
    /// The partner's name; another one is refused.
    pub peer: String,
    /// The identity that is accepted, until [`super::Interconnect::set_pins`] says otherwise.
    pub peer_fingerprint: Fingerprint,
    /// The links, best first: with a partner of protocol version 1 one at a time is used,
    /// otherwise all that stand.
    pub links: Vec<LinkAddr>,
    /// Settings.
    pub settings: LinkSettings,
    /// If set, `EpochAck` frames go here and not to the events.
    pub on_ack: Option<OnAck>,
}

/// Why an interconnect cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No link given.
    #[error("the pair with {peer} has no link: give at least one with `pollux link create`")]
    NoLink {
        /// The partner.
        peer: String,
    },
    /// Both sides have the same identity.
    #[error(
        "the fingerprint pinned for {peer} is this host's own ({fingerprint}): give the partner's, as `pollux link create` prints it there"
    )]
    OwnFingerprint {
        /// The partner.
        peer: String,
        /// The fingerprint.
        fingerprint: Fingerprint,
    },
    /// A link's local address cannot be used.
    #[error(
        "cannot bind link {link} to {addr}: {source}: give an address of this host that no other daemon uses"
    )]
    Bind {
        /// Index of the link.
        link: usize,
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// More links than lanes go over.
    #[error(
        "the pair with {peer} has {links} links, at most {} are used",
        crate::lane::LINKS_MAX
    )]
    TooManyLinks {
        /// The partner.
        peer: String,
        /// How many were given.
        links: usize,
    },
    /// The thread of the pair could not be started.
    #[error("cannot start the thread of an interconnect: {0}")]
    Thread(std::io::Error),
    /// The TLS or QUIC configuration was refused.
    #[error(
        "cannot set up TLS for the pair with {peer}: {reason}: remove the identity folder to make a new identity, then pin its fingerprint on the partner"
    )]
    Tls {
        /// The partner.
        peer: String,
        /// Why.
        reason: String,
    },
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_millis(1500),
            mtu_bytes_max: 8972,
            lane_queue_bytes: 2 << 20,
            session_keep: Duration::from_secs(2),
            version_max: PROTOCOL_VERSION,
        }
    }
}
