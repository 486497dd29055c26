//! What a connection's path was measured to carry, for whoever divides work between links.

use super::congestion::PrivateLink;
use std::time::Duration;

/// Figures of one connection's path, as its congestion controller measured them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct PathFigures {
    /// What the path was measured to carry, in bytes of UDP payload a second; `None` until
    /// enough was sent at once to tell.
    pub(super) bytes_per_s: Option<u64>,
    /// Least round-trip time seen lately; zero before the first.
    pub(super) rtt_min: Duration,
}

/// The figures of `connection` now. Copies some dozen words under the connection's lock:
/// for every few milliseconds, not for every packet.
#[allow(dead_code)]
pub(super) fn figures(connection: &quinn::Connection) -> PathFigures {
    connection
        .congestion_state()
        .into_any()
        .downcast::<PrivateLink>()
        .map_or_else(|_| PathFigures::default(), |state| state.figures())
}
