//! The same payload to every peer over every network, and what they send.
//!
//! One thread owns the sockets, one for each network, bound to the host's address on it. It
//! sends a payload as soon as it is published and repeats it if none follows; a payload that is
//! not renewed for [`STALE_PERIODS`] is not sent any more, so that a host whose daemon hangs
//! falls silent. What it hears it puts in an [`Inbox`].
//!
//! What this must never do: wait for a lock that an ordinary thread may hold, or for a name
//! server; let strangers take more than a bounded share of the processor; log from the thread,
//! or tell the same failure twice.

mod counters;
mod inbox;
mod socket;
mod thread;

pub use counters::{NetworkStatus, PathStatus};
pub use inbox::{Batch, Inbox, PER_SENDER_MAX, Received};

use super::keys::PoolKeys;
use super::packet::{HOSTS_MAX, Incarnation, NETWORKS_MAX, NetworkIndex, PAYLOAD_BYTES_MAX};
use crate::pool::HostName;
use counters::{NetworkCounters, PathCounters};
use interconnect::heartbeat::{boot_time, realtime};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Default time between heartbeats: four fit in the silence after which a path counts as lost,
/// so that three may be lost on the way.
pub const PERIOD_DEFAULT: Duration = Duration::from_millis(500);
/// Shortest period: a stranger may cause 512 datagrams of work in each on each network (see
/// `thread.rs`); with four networks that is 3.2 % of one processor at the default (bench `beat`)
/// and five times as much at this.
pub const PERIOD_MIN: Duration = Duration::from_millis(100);
/// Longest period.
pub const PERIOD_MAX: Duration = Duration::from_secs(10);
/// Periods after which a payload that was not renewed is not sent any more.
pub const STALE_PERIODS: u32 = 4;
/// UDP port unless told otherwise: beside those of a pair's link (7443) and heartbeats (7444).
pub const PORT_DEFAULT: u16 = 7445;

/// A network heartbeats travel over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Network {
    /// Its number, the same on every host.
    pub index: NetworkIndex,
    /// This host's address on it. A concrete one: a packet that comes to it came this way.
    pub local: SocketAddr,
    /// The interface, if packets are to pass through no other even if routes or addresses are
    /// set up wrongly (SO_BINDTODEVICE, socket(7)).
    pub device: Option<String>,
}

/// Another host of the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its name.
    pub name: HostName,
    /// Its address on each network, from which its packets come too.
    pub addrs: BTreeMap<NetworkIndex, SocketAddr>,
}

/// What a transport needs.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// This host.
    pub me: HostName,
    /// Its life, see [`super::next_incarnation`].
    pub incarnation: Incarnation,
    /// Keys of the pool.
    pub keys: PoolKeys,
    /// The networks; may be changed later.
    pub networks: Vec<Network>,
    /// The other hosts; may be changed later. This host among them is passed over.
    pub peers: Vec<Peer>,
    /// Time between heartbeats.
    pub period: Duration,
}

/// Why a transport cannot be what it is told to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The configuration makes no sense.
    #[error("pool heartbeats: {0}")]
    Config(String),
    /// The thread could not be started.
    #[error("cannot start the thread of the pool's heartbeats: {0}")]
    Thread(std::io::Error),
}

/// Something people should know; told when it begins and when it ends.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Event {
    /// Nothing goes out on a network.
    #[error(
        "heartbeats on network {network} fail: {error}; they go on by themselves once it works: check the host's address and interface on it"
    )]
    NetworkFails {
        /// The network.
        network: NetworkIndex,
        /// What the kernel says.
        error: nix::errno::Errno,
    },
    /// They go out again.
    #[error("heartbeats on network {network} work again")]
    NetworkWorks {
        /// The network.
        network: NetworkIndex,
    },
    /// Nothing goes out to one peer on a network on which others can be sent to.
    #[error(
        "heartbeats to {peer} on network {network} fail: {error}; check the route and the firewall"
    )]
    PathFails {
        /// The network.
        network: NetworkIndex,
        /// The peer.
        peer: HostName,
        /// What the kernel says.
        error: nix::errno::Errno,
    },
    /// They go out again.
    #[error("heartbeats to {peer} on network {network} work again")]
    PathWorks {
        /// The network.
        network: NetworkIndex,
        /// The peer.
        peer: HostName,
    },
    /// More comes in on a network than is read.
    #[error(
        "network {network} is flooded with packets on the heartbeats' port: heartbeats on it may be lost; the status counts them by reason"
    )]
    Flooded {
        /// The network.
        network: NetworkIndex,
    },
    /// It is over.
    #[error("network {network} is no longer flooded")]
    FloodOver {
        /// The network.
        network: NetworkIndex,
    },
    /// Nothing was published for too long; nothing is sent any more.
    #[error(
        "this host's report is too old to be sent: its daemon does not keep up, and the others will count it as lost"
    )]
    ReportStale,
    /// Something was published again.
    #[error("this host's report is sent again")]
    ReportFresh,
}

/// Figures of a transport.
#[derive(Clone, Debug, Default)]
pub struct TransportStatus {
    /// Not at real-time priority, and why.
    pub priority_warning: Option<String>,
    /// Memory not locked, and why.
    pub memory_warning: Option<String>,
    /// The networks.
    pub networks: Vec<NetworkStatus>,
    /// Every peer on every network it has an address on.
    pub paths: Vec<PathStatus>,
    /// Reports that were replaced by newer ones before they were read.
    pub replaced: u64,
}

/// Where everybody is, with the counters that belong to it.
#[derive(Clone, Default)]
struct Layout {
    networks: BTreeMap<NetworkIndex, (Network, Arc<NetworkCounters>)>,
    peers: BTreeMap<HostName, BTreeMap<NetworkIndex, (SocketAddr, Arc<PathCounters>)>>,
}

impl Layout {
    fn new(me: &HostName, networks: &[Network], peers: &[Peer]) -> Result<Self, TransportError> {
        let bad = |text: String| Err(TransportError::Config(text));
        let mut layout = Self::default();
        let mut locals = BTreeSet::new();
        for network in networks {
            let Network { index, local, .. } = network;
            if usize::from(index.0) >= NETWORKS_MAX {
                return bad(format!(
                    "network {index}: there are networks 0 to {}",
                    NETWORKS_MAX - 1
                ));
            }
            if local.ip().is_unspecified() || local.ip().is_multicast() || local.port() == 0 {
                return bad(format!(
                    "network {index}: {local} is no address and port of this host: a path must be the network it stands for"
                ));
            }
            if !locals.insert(*local) {
                return bad(format!(
                    "network {index}: {local} is on another network too"
                ));
            }
            let with_counters = (network.clone(), Arc::default());
            if layout.networks.insert(*index, with_counters).is_some() {
                return bad(format!("network {index} is given twice"));
            }
        }
        for peer in peers.iter().filter(|peer| peer.name != *me) {
            let mut paths = BTreeMap::new();
            for (index, addr) in &peer.addrs {
                if usize::from(index.0) >= NETWORKS_MAX {
                    return bad(format!("{}: there is no network {index}", peer.name));
                }
                let (known, of) = (layout.networks.get(index), &peer.name);
                if known.is_some_and(|(network, _)| network.local.is_ipv4() != addr.is_ipv4()) {
                    return bad(format!(
                        "{of}: {addr} on network {index} is of another family than this host's address there"
                    ));
                }
                paths.insert(*index, (*addr, Arc::default()));
            }
            if layout.peers.insert(peer.name.clone(), paths).is_some() {
                return bad(format!("{} is given twice", peer.name));
            }
        }
        if layout.peers.len() >= HOSTS_MAX {
            return bad(format!(
                "{} hosts, a pool has at most {HOSTS_MAX}",
                layout.peers.len() + 1
            ));
        }
        Ok(layout)
    }

    /// Take over the counters of what stays.
    fn inherit(&mut self, old: &Self) {
        for (index, (network, counters)) in &mut self.networks {
            if let Some((before, kept)) = old.networks.get(index)
                && before == network
            {
                *counters = Arc::clone(kept);
            }
        }
        for (name, paths) in &mut self.peers {
            for (index, (addr, counters)) in paths {
                if let Some((before, kept)) = old.peers.get(name).and_then(|p| p.get(index))
                    && before == addr
                {
                    *counters = Arc::clone(kept);
                }
            }
        }
    }
}

/// What the thread is to take up; of each the newest.
#[derive(Default)]
struct Mail {
    layout: Option<Layout>,
    keys: Option<PoolKeys>,
    payload: Option<Vec<u8>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    mail: Mutex<Mail>,
    /// Priority and memory warnings.
    warnings: Mutex<(Option<String>, Option<String>)>,
    inbox: Arc<inbox::Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Running heartbeats of the pool; they stop when it is dropped.
pub struct Transport {
    me: HostName,
    shared: Arc<Shared>,
    wake: EventFd,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    layout: Mutex<Layout>,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Transport({})", self.me)
    }
}

impl Transport {
    /// Start the thread. A network whose address this host does not have (yet) is no error: it
    /// is told in the inbox and tried again each period. Nothing is sent before the first
    /// [`Self::publish`].
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn start(config: TransportConfig) -> Result<(Self, Inbox), TransportError> {
        if config.period < PERIOD_MIN || config.period > PERIOD_MAX {
            return Err(TransportError::Config(format!(
                "the period of {:?} is not between {PERIOD_MIN:?} and {PERIOD_MAX:?}",
                config.period
            )));
        }
        let layout = Layout::new(&config.me, &config.networks, &config.peers)?;
        let shared = Arc::new(Shared::default());
        lock(&shared.mail).layout = Some(layout.clone());
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|error| TransportError::Thread(error.into()))?;
        let wake_of_thread = wake
            .as_fd()
            .try_clone_to_owned()
            .map_err(TransportError::Thread)?;
        let me = config.me.clone();
        let beat = thread::Beat::new(&config, wake_of_thread, Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("pool-beat".to_owned())
            .stack_size(realtime::STACK_BYTES)
            .spawn(move || beat.run())
            .map_err(TransportError::Thread)?;
        let inbox = Inbox(Arc::clone(&shared.inbox));
        let transport = Self {
            me,
            shared,
            wake,
            thread: Mutex::new(Some(thread)),
            layout: Mutex::new(layout),
        };
        Ok((transport, inbox))
    }

    fn wake(&self) {
        // A full counter wakes the thread as well.
        let _ = self.wake.write(1);
    }

    /// Send this to everybody now and each period, until it is replaced or stale.
    ///
    /// # Errors
    /// [`TransportError::Config`] if it is longer than [`PAYLOAD_BYTES_MAX`].
    pub fn publish(&self, payload: Vec<u8>) -> Result<(), TransportError> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(TransportError::Config(format!(
                "a report of {} bytes is too long, at most {PAYLOAD_BYTES_MAX} are sent",
                payload.len()
            )));
        }
        lock(&self.shared.mail).payload = Some(payload);
        self.wake();
        Ok(())
    }

    /// Use these networks and peers from now on. What stays keeps its socket, its counters and
    /// what is known of it.
    ///
    /// # Errors
    /// [`TransportError::Config`]; then all stays as it was.
    pub fn set_layout(&self, networks: &[Network], peers: &[Peer]) -> Result<(), TransportError> {
        let mut new = Layout::new(&self.me, networks, peers)?;
        let mut layout = lock(&self.layout);
        new.inherit(&layout);
        *layout = new.clone();
        lock(&self.shared.mail).layout = Some(new);
        drop(layout);
        self.wake();
        Ok(())
    }

    /// Use these keys from now on.
    pub fn set_keys(&self, keys: &PoolKeys) {
        lock(&self.shared.mail).keys = Some(keys.clone());
        self.wake();
    }

    /// Figures now.
    #[must_use]
    pub fn status(&self) -> TransportStatus {
        let now = boot_time();
        let layout = lock(&self.layout);
        let networks = layout
            .networks
            .iter()
            .map(|(index, (network, counters))| counters.status(*index, network.local));
        let paths = layout.peers.iter().flat_map(|(name, paths)| {
            paths
                .iter()
                .map(move |(index, (_, counters))| counters.status(name, *index, now))
        });
        let (priority_warning, memory_warning) = lock(&self.shared.warnings).clone();
        TransportStatus {
            priority_warning,
            memory_warning,
            networks: networks.collect(),
            paths: paths.collect(),
            replaced: self.shared.inbox.replaced(),
        }
    }

    /// End the heartbeats for good; when it returns the sockets are closed.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = lock(&self.thread).take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
        self.shared.inbox.close();
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
