//! The interconnect to one partner: keeps a session up, carries lanes over it.
//!
//! One QUIC connection at a time (a session), on the first link of the pair that
//! works. The side with the lower fingerprint dials, for ever; the other accepts.
//! A newer session replaces an older one: only the side that dials makes one, and
//! it does so only when it believes the old one dead.
//!
//! What this must never do: talk to another identity than the pinned one, block a
//! caller of [`Interconnect::control`], or let a caller take a frame for delivered:
//! a session that ends may have lost everything not acknowledged by the product.

mod capacity;
mod config;
mod congestion;
mod drivers;
mod hello;
mod keeper;
mod queue;
mod session;
mod socket;
mod stats;
mod transport;

pub use config::{LinkAddr, LinkSettings, OnAck, PairConfig, StartError};
pub use session::EpochLane;
pub use stats::{LaneKind, LanePressure, LaneStats, LinkState, LinkStats, PairStats};

use keeper::Shared;
use queue::PushError;
use session::Lanes;
use std::sync::Arc;

use crate::frame::{Frame, FrameError};
use crate::heartbeat::HeartbeatKey;
use crate::ids::{Generation, VmId};
use std::net::SocketAddr;
use tokio::sync::mpsc;

/// Number of a session (an established QUIC connection); counts up from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// What the partner said of itself when the session came up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The partner's host name.
    pub host: String,
    /// Its build, for people.
    pub build: String,
    /// The protocol version both sides speak.
    pub version: u16,
}

/// What happens on the interconnect.
#[derive(Debug)]
pub enum LinkEvent {
    /// A session stands.
    Up {
        /// Its number.
        session: SessionId,
        /// The partner.
        peer: Hello,
        /// For [`crate::heartbeat::Heartbeat::set_key`].
        heartbeat_key: HeartbeatKey,
    },
    /// The session is gone; all its lanes with it. Comes exactly once for each `Up`.
    Down {
        /// Its number.
        session: SessionId,
        /// Why, in plain words.
        reason: String,
    },
    /// A frame from the control lane, in order.
    Control {
        /// The session it came on.
        session: SessionId,
        /// The frame.
        frame: Frame,
    },
    /// The partner opened an epoch lane.
    EpochLane {
        /// The VM.
        vm: VmId,
        /// Its generation at the partner.
        generation: Generation,
        /// The session it belongs to.
        session: SessionId,
        /// The frames, in order; ends when the lane does. Bounded: while nobody
        /// reads, the sender is slowed. Read it with `blocking_recv` from a thread.
        rx: mpsc::Receiver<Frame>,
    },
    /// A session could not be made, and trying again will not help until somebody
    /// acts (wrong identity, wrong host, no common version). Told once per reason;
    /// redialling goes on.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// A frame that was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// There is no session.
    #[error("the interconnect to {peer} is down: wait for the session to come up again")]
    Down {
        /// The partner.
        peer: String,
    },
    /// The session of this lane is gone.
    #[error("the epoch lane is gone with its session: open a new one when the interconnect is up")]
    LaneGone,
    /// The queue is at its limit.
    #[error(
        "the queue to {peer} is full ({queued_bytes} bytes): the partner or the link is too slow"
    )]
    Full {
        /// The partner.
        peer: String,
        /// Bytes waiting.
        queued_bytes: usize,
    },
    /// Not a frame that may be sent here.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A kind that does not belong on this lane.
    #[error("{0:?} frames do not go on this lane")]
    Kind(crate::frame::FrameKind),
}

/// Events that may wait for the product. Control frames behind them hold the
/// partner by flow control.
const EVENTS_MAX: usize = 256;

/// Refuse what the partner would refuse, before it is queued.
fn check_size(frame: &Frame) -> Result<(), SendError> {
    let (kind, bytes, max) = (
        frame.kind,
        frame.payload.len(),
        frame.kind.payload_bytes_max(),
    );
    if kind == crate::frame::FrameKind::Invalid {
        return Err(FrameError::Kind(0).into());
    }
    if bytes > max {
        return Err(FrameError::TooBig { kind, bytes, max }.into());
    }
    Ok(())
}

/// The interconnect to one partner. Cheap to clone; the last one dropped closes it.
#[derive(Clone)]
pub struct Interconnect {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    local_addrs: Vec<SocketAddr>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl std::fmt::Debug for Interconnect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Interconnect(to {}, session {:?})",
            self.inner.shared.config.peer,
            self.session()
        )
    }
}

impl Interconnect {
    /// Bind all links and keep a session with the partner for ever, on a thread of its own
    /// that ends with the last task, or with `runtime`.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        config: PairConfig,
        runtime: tokio::runtime::Handle,
    ) -> Result<(Self, mpsc::Receiver<LinkEvent>), StartError> {
        if config.links.is_empty() {
            return Err(StartError::NoLink { peer: config.peer });
        }
        let fingerprint = config.peer_fingerprint;
        if config.identity.fingerprint() == fingerprint {
            return Err(StartError::OwnFingerprint {
                peer: config.peer,
                fingerprint,
            });
        }
        // The tasks of a pair share one thread, not the caller's (`drivers`).
        let own = drivers::own_thread(&config.peer, &runtime);
        let (runtime, thread) = own.map_err(StartError::Thread)?;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let entered = runtime.enter();
        let mut endpoints = Vec::with_capacity(config.links.len());
        for link in 0..config.links.len() {
            endpoints.push(transport::endpoint(&config, link)?);
        }
        drop(entered);
        let local_addrs = endpoints
            .iter()
            .zip(&config.links)
            .map(|((endpoint, _), link)| endpoint.local_addr().unwrap_or(link.local))
            .collect();
        let shared = Shared::new(config, events, runtime, thread);
        keeper::keep(&shared, endpoints);
        Ok((
            Self {
                inner: Arc::new(Inner {
                    shared,
                    local_addrs,
                }),
            },
            receiver,
        ))
    }

    fn lanes(&self) -> Result<Arc<dyn Lanes>, SendError> {
        let shared = &self.inner.shared;
        shared.current().ok_or_else(|| SendError::Down {
            peer: shared.config.peer.clone(),
        })
    }

    /// Send on the control lane: ordered, never blocks, from any thread.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn control(&self, frame: Frame) -> Result<(), SendError> {
        if !frame.kind.is_control() {
            return Err(SendError::Kind(frame.kind));
        }
        check_size(&frame)?;
        let peer = || self.inner.shared.config.peer.clone();
        self.lanes()?.control(frame).map_err(|error| match error {
            PushError::Closed => SendError::Down { peer: peer() },
            PushError::Full(queued_bytes) => SendError::Full {
                peer: peer(),
                queued_bytes,
            },
        })
    }

    /// Open an epoch lane on the session that stands.
    ///
    /// # Errors
    /// [`SendError::Down`].
    pub fn open_epoch_lane(
        &self,
        vm: VmId,
        generation: Generation,
    ) -> Result<EpochLane, SendError> {
        let queue_bytes = self.inner.shared.config.settings.lane_queue_bytes;
        Ok(self.lanes()?.open_epoch_lane(vm, generation, queue_bytes))
    }

    /// End that session if it still stands (the partner sent nonsense); a new one is
    /// made.
    pub fn drop_session(&self, session: SessionId, reason: &str) {
        if let Some(lanes) = self
            .inner
            .shared
            .current()
            .filter(|lanes| lanes.id() == session)
        {
            lanes.close(session::CODE_PROTOCOL, reason);
        }
    }

    /// The session that stands.
    #[must_use]
    pub fn session(&self) -> Option<SessionId> {
        self.inner.shared.current().map(|lanes| lanes.id())
    }

    /// Figures of links and lanes.
    #[must_use]
    pub fn stats(&self) -> PairStats {
        let shared = &self.inner.shared;
        let mut stats = PairStats {
            links: vec![LinkStats::default(); shared.config.links.len()],
            last_error: shared.last_error(),
            ..PairStats::default()
        };
        let Some(lanes) = shared.current() else {
            return stats;
        };
        stats.session = Some(lanes.id());
        let (index, mut link) = lanes.stats();
        if let (Some((local, _)), Some(bound)) = (&mut link.path, self.inner.local_addrs.get(index))
        {
            local.set_port(bound.port());
            if !bound.ip().is_unspecified() {
                local.set_ip(bound.ip());
            }
        }
        if let Some(slot) = stats.links.get_mut(index) {
            *slot = link;
        }
        stats
    }

    /// The addresses the links are bound to (ports filled in).
    #[must_use]
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.inner.local_addrs.clone()
    }
}

/// Read a Hello of any content.
pub(crate) fn fuzz_hello(data: &[u8]) {
    hello::fuzz(data);
}

#[cfg(test)]
mod tests;
