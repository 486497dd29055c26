//! Decides which packets are heard. Pure: bytes in, a verdict out.
//!
//! A packet is heard if it was sealed by a member of the pool, for this host, on this network,
//! in this life of this host, and is newer than all heard before on its path:
//!
//! ```text
//!                     authentic, incarnation higher than known
//!            +--------------------------------------------------------+
//!            v                                                        |
//!  Unheard ------> Known(i) -----------------------------------> Proven(i)
//!                  its packets are not heard;    echo = this host's   its packets are heard,
//!                  we echo i to it               incarnation          each sequence once a path
//! ```
//!
//! Each packet echoes the recipient's incarnation as far as its sender knows it. One with this
//! host's present incarnation was made after this host started; so a recording, of however many
//! lives of however many hosts, is never heard by a host that has restarted since, even though
//! it remembers nothing. In the other direction incarnations rise (`state.rs`), and an authentic
//! one, proven or not, ends all lower ones: they are dead. A recording can hold no higher one
//! than the host itself has had.
//!
//! Must never: allocate because of a packet more than two names; do more than one derivation
//! and one MAC for it; let a packet without a valid MAC change anything.

use super::keys::{Keyring, PoolKeys};
use super::packet::{
    self, HOSTS_MAX, Header, Incarnation, KeyNumber, Medium, NETWORKS_MAX, NetworkIndex, NoPacket,
    PAYLOAD_BYTES_MAX, Sequence,
};
use crate::pool::HostName;
use ring::hmac;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Why a datagram was not heard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    /// No packet of ours, cut off, or with impossible fields.
    Malformed,
    /// Another version of the format.
    Version,
    /// Another pool's.
    ForeignPool,
    /// Sealed with a key of the pool that this host does not hold.
    UnknownKey,
    /// For another host.
    NotForMe,
    /// Its sender is no peer of this host (or this host itself).
    UnknownSender,
    /// Sent for another network than the one it came in on.
    WrongNetwork,
    /// From another address than the sender's on this network.
    WrongAddress,
    /// Of a life of its sender that has ended.
    OldIncarnation,
    /// The MAC does not hold.
    BadMac,
    /// Authentic, but its sender does not know this host's present life; it may be a recording.
    Unproven,
    /// Not newer than what was heard on its path.
    Replayed,
}

/// How many reasons there are.
pub const REASONS: usize = 12;

impl Reason {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; REASONS] = [
        Self::Malformed,
        Self::Version,
        Self::ForeignPool,
        Self::UnknownKey,
        Self::NotForMe,
        Self::UnknownSender,
        Self::WrongNetwork,
        Self::WrongAddress,
        Self::OldIncarnation,
        Self::BadMac,
        Self::Unproven,
        Self::Replayed,
    ];

    /// For status and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Version => "version",
            Self::ForeignPool => "foreign-pool",
            Self::UnknownKey => "unknown-key",
            Self::NotForMe => "not-for-me",
            Self::UnknownSender => "unknown-sender",
            Self::WrongNetwork => "wrong-network",
            Self::WrongAddress => "wrong-address",
            Self::OldIncarnation => "old-incarnation",
            Self::BadMac => "bad-mac",
            Self::Unproven => "unproven",
            Self::Replayed => "replayed",
        }
    }
}

impl From<NoPacket> for Reason {
    fn from(error: NoPacket) -> Self {
        match error {
            NoPacket::Malformed => Self::Malformed,
            NoPacket::Version => Self::Version,
        }
    }
}

/// A datagram that was not heard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refused {
    pub(super) reason: Reason,
    /// The peer it says it is from; proven by a MAC for [`Reason::Unproven`] and
    /// [`Reason::Replayed`] alone.
    pub(super) sender: Option<HostName>,
    /// A life of the peer became known by it: it waits for our echo.
    pub(super) learned: bool,
}

/// A datagram that was heard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Accepted<'a> {
    pub(super) sender: HostName,
    pub(super) incarnation: Incarnation,
    pub(super) sequence: Sequence,
    pub(super) echo: Sequence,
    pub(super) key_newest: KeyNumber,
    pub(super) payload: &'a [u8],
    /// As in [`Refused`].
    pub(super) learned: bool,
}

/// Addresses of a peer, by network.
pub(super) type Addrs = [Option<SocketAddr>; NETWORKS_MAX];

/// What is known of a peer.
struct Peer {
    addrs: Addrs,
    /// Its highest incarnation of which an authentic packet came; 0: none.
    known: Incarnation,
    /// Newest sequence heard on each network.
    newest: [Sequence; NETWORKS_MAX],
    /// Its key in the known incarnation, by number; of at most two.
    keys: Vec<(KeyNumber, hmac::Key)>,
}

impl Peer {
    fn newest_on_any(&self) -> Sequence {
        self.newest.iter().copied().max().unwrap_or(Sequence(0))
    }
}

/// Everything about who is heard.
pub(super) struct Gate {
    me: HostName,
    incarnation: Incarnation,
    keyring: Keyring,
    sending: Option<hmac::Key>,
    peers: BTreeMap<HostName, Peer>,
    /// Peers of before; at most [`HOSTS_MAX`].
    gone: BTreeMap<HostName, Peer>,
}

/// The same address, whatever scope and flow an IPv6 address is written with.
fn same(a: SocketAddr, b: SocketAddr) -> bool {
    a.ip() == b.ip() && a.port() == b.port()
}

impl Gate {
    pub(super) fn new(me: HostName, incarnation: Incarnation, keys: &PoolKeys) -> Self {
        let mut gate = Self {
            me,
            incarnation,
            keyring: Keyring::new(keys),
            sending: None,
            peers: BTreeMap::new(),
            gone: BTreeMap::new(),
        };
        gate.set_keys(keys);
        gate
    }

    /// Use these keys from now on. What was heard stays heard.
    pub(super) fn set_keys(&mut self, keys: &PoolKeys) {
        self.keyring = Keyring::new(keys);
        self.sending = self.keyring.sending_key(
            self.keyring.present(),
            Medium::Network,
            &self.me,
            self.incarnation,
        );
        for peer in self.peers.values_mut().chain(self.gone.values_mut()) {
            peer.keys.clear();
        }
    }

    /// Hear these and no others. What is known of one that goes is kept for when it comes back.
    pub(super) fn set_peers(&mut self, peers: impl IntoIterator<Item = (HostName, Addrs)>) {
        let mut old = std::mem::take(&mut self.peers);
        old.append(&mut self.gone);
        for (name, addrs) in peers {
            if name == self.me {
                continue;
            }
            let peer = match old.remove(&name) {
                Some(peer) => Peer { addrs, ..peer },
                None => Peer {
                    addrs,
                    known: Incarnation(0),
                    newest: [Sequence(0); NETWORKS_MAX],
                    keys: Vec::new(),
                },
            };
            self.peers.insert(name, peer);
        }
        self.gone = old.into_iter().take(HOSTS_MAX).collect();
    }

    /// Write a packet for a peer into `out`; `false` if it is no peer or the payload too long.
    pub(super) fn seal(
        &self,
        recipient: &HostName,
        network: NetworkIndex,
        sequence: Sequence,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> bool {
        let (Some(peer), Some(key)) = (self.peers.get(recipient), &self.sending) else {
            return false;
        };
        if payload.len() > PAYLOAD_BYTES_MAX {
            return false;
        }
        let header = Header {
            medium: Medium::Network,
            path: network.0,
            pool: self.keyring.pool,
            key: self.keyring.present(),
            key_newest: self.keyring.newest(),
            incarnation: self.incarnation,
            sequence,
            echo: peer.known.0,
            echo_sequence: peer.newest_on_any(),
            sender: self.me.clone(),
            recipient: Some(recipient.clone()),
        };
        header.write(payload, out);
        let mac = hmac::sign(key, out);
        out.extend_from_slice(mac.as_ref());
        true
    }

    /// Judge a datagram of any content that came in on a network.
    pub(super) fn accept<'a>(
        &mut self,
        network: NetworkIndex,
        from: SocketAddr,
        datagram: &'a [u8],
    ) -> Result<Accepted<'a>, Refused> {
        let stranger = |reason| Refused {
            reason,
            sender: None,
            learned: false,
        };
        let parts =
            packet::parse(Medium::Network, datagram).map_err(|error| stranger(error.into()))?;
        let header = parts.header;
        let on_path = usize::from(network.0);
        // From cheap to dear; up to the MAC nothing is proven and nothing changes.
        if !parts.rest.is_empty() || on_path >= NETWORKS_MAX {
            return Err(stranger(Reason::Malformed));
        }
        if header.pool != self.keyring.pool {
            return Err(stranger(Reason::ForeignPool));
        }
        if header.recipient.as_ref() != Some(&self.me) {
            return Err(stranger(Reason::NotForMe));
        }
        let Some(peer) = self.peers.get_mut(&header.sender) else {
            return Err(stranger(Reason::UnknownSender));
        };
        let refused = |reason, learned| Refused {
            reason,
            sender: Some(header.sender.clone()),
            learned,
        };
        if header.path != network.0 {
            return Err(refused(Reason::WrongNetwork, false));
        }
        if !peer.addrs[on_path].is_some_and(|addr| same(addr, from)) {
            return Err(refused(Reason::WrongAddress, false));
        }
        if !self.keyring.holds(header.key) {
            return Err(refused(Reason::UnknownKey, false));
        }
        if header.incarnation < peer.known {
            return Err(refused(Reason::OldIncarnation, false));
        }
        let cached = peer
            .keys
            .iter()
            .find(|key| key.0 == header.key)
            .filter(|_| header.incarnation == peer.known)
            .map(|key| key.1.clone());
        let is_cached = cached.is_some();
        let key = cached.or_else(|| {
            self.keyring.sending_key(
                header.key,
                Medium::Network,
                &header.sender,
                header.incarnation,
            )
        });
        let Some(key) = key.filter(|key| hmac::verify(key, parts.signed, parts.mac).is_ok()) else {
            return Err(refused(Reason::BadMac, false));
        };

        let learned = header.incarnation > peer.known;
        if learned {
            peer.known = header.incarnation;
            peer.newest = [Sequence(0); NETWORKS_MAX];
            peer.keys.clear();
        }
        if !is_cached {
            peer.keys.push((header.key, key));
        }
        if header.echo != self.incarnation.0 {
            return Err(refused(Reason::Unproven, learned));
        }
        if header.sequence <= peer.newest[on_path] {
            return Err(refused(Reason::Replayed, learned));
        }
        peer.newest[on_path] = header.sequence;
        Ok(Accepted {
            sender: header.sender,
            incarnation: header.incarnation,
            sequence: header.sequence,
            echo: header.echo_sequence,
            key_newest: header.key_newest,
            payload: parts.payload,
            learned,
        })
    }
}

#[cfg(test)]
mod tests;
