//! Figures of the transport, written by its thread and read by anybody.

use super::super::gate::{REASONS, Reason};
use super::super::packet::{Incarnation, KeyNumber, NetworkIndex};
use crate::pool::HostName;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How often packets were refused, by reason.
#[derive(Default)]
pub(super) struct Refusals([AtomicU64; REASONS]);

impl Refusals {
    pub(super) fn count(&self, reason: Reason) {
        if let Some(at) = Reason::ALL.iter().position(|other| *other == reason) {
            self.0[at].fetch_add(1, Relaxed);
        }
    }

    fn seen(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .into_iter()
            .zip(self.0.iter().map(|count| count.load(Relaxed)))
            .filter(|(_, count)| *count != 0)
            .collect()
    }
}

/// One peer on one network.
#[derive(Default)]
pub(super) struct PathCounters {
    pub(super) sent: AtomicU64,
    pub(super) send_failed: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) refused: Refusals,
    /// Time since boot, ns; 0: never.
    pub(super) heard_ns: AtomicU64,
    pub(super) incarnation: AtomicU64,
    pub(super) key_newest: AtomicU32,
}

impl PathCounters {
    pub(super) fn status(
        &self,
        peer: &HostName,
        network: NetworkIndex,
        now: Duration,
    ) -> PathStatus {
        let heard = Some(self.heard_ns.load(Relaxed)).filter(|ns| *ns != 0);
        PathStatus {
            peer: peer.clone(),
            network,
            sent: self.sent.load(Relaxed),
            send_failed: self.send_failed.load(Relaxed),
            received: self.received.load(Relaxed),
            refused: self.refused.seen(),
            age: heard.map(|ns| now.saturating_sub(Duration::from_nanos(ns))),
            incarnation: heard.map(|_| Incarnation(self.incarnation.load(Relaxed))),
            key_newest: heard.map(|_| KeyNumber(self.key_newest.load(Relaxed))),
        }
    }
}

/// One network.
#[derive(Default)]
pub(super) struct NetworkCounters {
    pub(super) open: AtomicBool,
    pub(super) refused: Refusals,
    pub(super) flooded: AtomicU64,
}

impl NetworkCounters {
    pub(super) fn status(&self, network: NetworkIndex, local: SocketAddr) -> NetworkStatus {
        NetworkStatus {
            network,
            local,
            open: self.open.load(Relaxed),
            refused: self.refused.seen(),
            flooded: self.flooded.load(Relaxed),
        }
    }
}

/// How heartbeats with one peer over one network stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathStatus {
    /// The peer.
    pub peer: HostName,
    /// The network.
    pub network: NetworkIndex,
    /// Packets given to the kernel.
    pub sent: u64,
    /// Packets the kernel did not take.
    pub send_failed: u64,
    /// Packets heard.
    pub received: u64,
    /// Packets refused that named this peer as their sender, by reason.
    pub refused: Vec<(Reason, u64)>,
    /// Age of the newest heard.
    pub age: Option<Duration>,
    /// The life it was of.
    pub incarnation: Option<Incarnation>,
    /// Highest number of a key the peer said it holds: a change of the pool's key can take its
    /// next step when all have it.
    pub key_newest: Option<KeyNumber>,
}

/// How one network stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkStatus {
    /// Its number.
    pub network: NetworkIndex,
    /// The address this host has on it.
    pub local: SocketAddr,
    /// A socket is bound to that address.
    pub open: bool,
    /// Packets refused that named no peer, by reason.
    pub refused: Vec<(Reason, u64)>,
    /// Periods in which more came in than is read in one.
    pub flooded: u64,
}
