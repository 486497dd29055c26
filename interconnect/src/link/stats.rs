//! What links and lanes did so far, for status, metrics and tests of a pair. Counters
//! only grow within a session's life; rates are the reader's to take from two readings.

use super::capacity;
use super::event::SessionId;
use crate::ids::{Generation, VmId};
use std::net::SocketAddr;
use std::time::Duration;

/// How a link stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkState {
    /// No connection.
    #[default]
    Down,
    /// A connection stands, but what was sent on it is overdue: it gets nothing new.
    Suspect,
    /// It carries segments.
    Up,
}

/// One link of a pair.
#[derive(Clone, Debug, Default)]
pub struct LinkStats {
    /// How it stands.
    pub state: LinkState,
    /// For how long it has stood so.
    pub since: Duration,
    /// Local and partner's address; `None` before the first connection.
    pub path: Option<(SocketAddr, SocketAddr)>,
    /// Smoothed round-trip time, as QUIC measures it.
    pub rtt: Duration,
    /// Least round-trip time seen on this connection.
    pub rtt_min: Duration,
    /// What the link was measured to carry, in bytes of payload a second; `None` until
    /// more was to be sent than it takes.
    pub capacity_bytes_per_s: Option<u64>,
    /// UDP payload bytes sent.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets declared lost (QUIC sends their content again by itself).
    pub lost_packets: u64,
    /// Bytes of segments sent again on this link because another one failed them.
    pub resent_bytes: u64,
    /// Bytes of segments on their way on this link, not acknowledged by the lanes.
    pub in_flight_bytes: u64,
    /// How often a connection on it ended.
    pub flaps: u64,
    /// How often losses looked like a path that swallows large packets.
    pub black_holes: u64,
    /// Largest UDP payload in use, in bytes.
    pub mtu_bytes: u16,
    /// What may be on its way, in bytes.
    pub window_bytes: u64,
    /// Why its last connection ended or its last attempt failed.
    pub last_error: Option<String>,
}

impl LinkStats {
    /// Fill in what the connection knows.
    pub(super) fn read(&mut self, connection: &quinn::Connection) {
        let quic = connection.stats();
        let figures = capacity::figures(connection);
        self.rtt = quic.path.rtt;
        self.rtt_min = figures.rtt_min;
        self.capacity_bytes_per_s = figures.bytes_per_s.filter(|_| figures.saturated);
        self.sent_bytes = quic.udp_tx.bytes;
        self.received_bytes = quic.udp_rx.bytes;
        self.sent_packets = quic.path.sent_packets;
        self.lost_packets = quic.path.lost_packets;
        self.black_holes = quic.path.black_holes_detected;
        self.mtu_bytes = quic.path.current_mtu;
        self.window_bytes = figures.window_bytes;
    }
}

/// What a lane is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LaneKind {
    /// The control lane.
    Control,
    /// A VM's epochs.
    Epoch,
    /// A VM's remote disk and network I/O.
    Io,
}

/// One lane of a session.
#[derive(Clone, Copy, Debug)]
pub struct LaneStats {
    /// What it is for.
    pub kind: LaneKind,
    /// The VM; all zero for the control lane.
    pub vm: VmId,
    /// Its generation.
    pub generation: Generation,
    /// Whether this side sends on it.
    pub outgoing: bool,
    /// Frames handed to the lane (outgoing) or to the product (incoming).
    pub frames: u64,
    /// Bytes of those frames.
    pub bytes: u64,
    /// Outgoing: bytes that wait for a link. Incoming: bytes held for an earlier piece.
    pub queued_bytes: u64,
    /// Outgoing: bytes sent and not acknowledged by the partner.
    pub unacked_bytes: u64,
    /// Bytes sent again (outgoing) or received twice (incoming).
    pub repeated_bytes: u64,
    /// Frames dropped because their deadline passed before a link took them (I/O lanes).
    pub expired_frames: u64,
}

/// A pair's interconnect.
#[derive(Clone, Debug, Default)]
pub struct PairStats {
    /// The session that stands, if one does.
    pub session: Option<SessionId>,
    /// The protocol version spoken in it; 0 without one.
    pub version: u16,
    /// Every configured link, in order.
    pub links: Vec<LinkStats>,
    /// The lanes of the session.
    pub lanes: Vec<LaneStats>,
    /// Why the last session ended or the last attempt failed.
    pub last_error: Option<String>,
}

/// How a lane stands for whoever fills it: back-pressure as a figure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LanePressure {
    /// Bytes that wait for a link.
    pub queued_bytes: u64,
    /// Bytes sent and not acknowledged.
    pub unacked_bytes: u64,
    /// What all links that stand carry together, in bytes a second; `None` while one of them
    /// has always carried what it was given.
    pub capacity_bytes_per_s: Option<u64>,
}

impl LanePressure {
    /// Time until what is queued now has been put on the wire; `None` while the capacity
    /// is not known.
    #[must_use]
    pub fn drains_in(&self) -> Option<Duration> {
        let rate = self.capacity_bytes_per_s.filter(|rate| *rate > 0)?;
        let nanos = u128::from(self.queued_bytes) * 1_000_000_000 / u128::from(rate);
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_drains_at_the_measured_rate_or_nobody_knows() {
        let mut pressure = LanePressure {
            queued_bytes: 5_000_000,
            unacked_bytes: 1,
            capacity_bytes_per_s: Some(1_000_000_000),
        };
        assert_eq!(pressure.drains_in(), Some(Duration::from_millis(5)));
        pressure.capacity_bytes_per_s = Some(0);
        assert_eq!(pressure.drains_in(), None);
        pressure.queued_bytes = u64::MAX;
        pressure.capacity_bytes_per_s = Some(1);
        assert_eq!(pressure.drains_in(), Some(Duration::from_nanos(u64::MAX)));
    }
}
