//! The interconnect to one partner: keeps a session up, carries lanes over it.
//!
//! Every link of the pair has its own QUIC connection, dialled for ever by the side with
//! the lower fingerprint. A **session** is an association of two running processes over all
//! of them; it outlives single connections, and for a moment the loss of all. Its **lanes**
//! are ordered, reliable streams of frames over whatever links stand ([`crate::lane`]).
//!
//! ```text
//!  product ─▶ lanes ─▶ session ─▶ outgoing ─▶ member (one connection) ─▶ QUIC
//!  product ◀─ events ◀─ session ◀─ incoming ◀─ member ◀─ QUIC
//!                        ▲ join ◀─ keeper: dial, accept, hello, for ever on every link
//!                        plain: the same for a partner of protocol version 1
//! ```
//!
//! What this must never do: talk to another identity than the pinned one, block a
//! caller of [`Interconnect::control`], or let a caller take a frame for delivered:
//! a session that ends may have lost everything not acknowledged by the product.

mod capacity;
mod config;
mod congestion;
mod drivers;
mod event;
mod hello;
mod incoming;
mod join;
mod keeper;
mod keys;
mod lanes;
mod member;
mod outgoing;
mod plain;
mod queue;
mod session;
mod socket;
mod stats;
mod transport;

pub use config::{LinkAddr, LinkSettings, OnAck, PairConfig, StartError};
pub use event::{Hello, LinkEvent, SendError, SessionId};
pub use lanes::{EpochLane, IoEvent, IoLane, IoSender, IoTicket};
pub use stats::{LaneKind, LanePressure, LaneStats, LinkState, LinkStats, PairStats};

use crate::frame::Frame;
use crate::identity::{Fingerprint, Identity};
use crate::ids::{Generation, VmId};
use event::{check_size, check_version};
use keeper::{LinkEndpoint, Shared};
use keys::Keys;
use lanes::Lanes;
use queue::PushError;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// Events that may wait for the product. Control frames behind them hold the
/// partner by flow control.
const EVENTS_MAX: usize = 256;

/// The interconnect to one partner. Cheap to clone; the last one dropped closes it.
#[derive(Clone)]
pub struct Interconnect {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    /// Its senders are gone when no socket is open any more.
    sockets_open: watch::Receiver<()>,
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
        if config.links.len() > crate::lane::LINKS_MAX {
            return Err(StartError::TooManyLinks {
                links: config.links.len(),
                peer: config.peer,
            });
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
        let keys = Keys {
            identity: Arc::clone(&config.identity),
            pins: vec![fingerprint],
        };
        let (open, sockets_open) = watch::channel(());
        let mut endpoints = Vec::with_capacity(config.links.len());
        for link in 0..config.links.len() {
            let (endpoint, transport) = transport::endpoint(&config, &keys, link, open.clone())?;
            endpoints.push(LinkEndpoint {
                endpoint,
                transport,
            });
        }
        drop((entered, open));
        let local_addrs = endpoints
            .iter()
            .zip(&config.links)
            .map(|(link, config)| link.endpoint.local_addr().unwrap_or(config.local))
            .collect();
        let shared = Shared::new(config, keys, endpoints, events, runtime, thread);
        keeper::keep(&shared);
        Ok((
            Self {
                inner: Arc::new(Inner {
                    shared,
                    sockets_open,
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
        let peer = &self.inner.shared.config.peer;
        let lanes = self.lanes()?;
        check_version(frame.kind, lanes.version(), peer)?;
        lanes.control(frame).map_err(|error| match error {
            PushError::Closed => SendError::Down { peer: peer.clone() },
            PushError::Full(queued_bytes) => SendError::Full {
                peer: peer.clone(),
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

    /// Open an I/O lane on the session that stands; the partner is told with
    /// [`LinkEvent::IoLane`].
    ///
    /// # Errors
    /// [`SendError::Down`], [`SendError::Version`].
    pub fn open_io_lane(&self, vm: VmId, generation: Generation) -> Result<IoLane, SendError> {
        self.lanes()?.open_io_lane(vm, generation)
    }

    /// Be another identity for connections made from now on; those that stand stay until
    /// [`Interconnect::redial`].
    pub fn set_identity(&self, identity: Arc<Identity>) {
        self.inner
            .shared
            .change_keys(|keys| keys.identity = identity);
    }

    /// Accept these identities, and no others, on connections made from now on; those that
    /// stand stay until [`Interconnect::redial`].
    pub fn set_pins(&self, pins: Vec<Fingerprint>) {
        self.inner.shared.change_keys(|keys| keys.pins = pins);
    }

    /// End the connection of this link (index in [`PairConfig::links`]) and make a new one.
    /// The session goes on over the other links; with a single one it waits
    /// [`LinkSettings::session_keep`] for the new connection.
    pub fn redial(&self, link: usize) {
        self.inner.shared.redial(link);
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
            lanes.close(plain::CODE_PROTOCOL, reason);
        }
    }

    /// End everything for good, for all clones of this. The future, which holds none of it,
    /// is done when the sockets of all links are closed and their addresses free again.
    pub fn close(&self) -> impl Future<Output = ()> + Send + use<> {
        self.inner.shared.stop();
        let mut open = self.inner.sockets_open.clone();
        async move { while open.changed().await.is_ok() {} }
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
            links: shared.link_stats(),
            last_error: shared.last_error(),
            ..PairStats::default()
        };
        if let Some(lanes) = shared.current() {
            stats.session = Some(lanes.id());
            stats.version = lanes.version();
            lanes.stats(&mut stats);
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
