//! Lanes over several links: ordered, reliable byte streams of frames that outlive any
//! one link. Pure: no socket, clock, thread or file; `now` is an argument.
//!
//! ```text
//!  frames ─push─▶ LaneSender ─next(link)─▶ segments ─▶ link 0 ═══▶ ┐
//!                    ▲    │                └────────▶ link 1 ═══▶ ├─insert─▶ LaneReceiver ─pop─▶ frames
//!                    │    └──── Links: who may take what (stripe) ┘               │
//!                    └──────────── acked(link) ◀─ LaneAck on every link ◀─next_ack(link)
//! ```
//!
//! A lane is a stream of bytes with offsets of its own, above those of QUIC (as MPTCP's
//! data sequence numbers stand above a subflow's, RFC 8684 §3.3). The sender cuts it into
//! **segments** of at most [`SEGMENT_BYTES_MAX`] and hands each to one link (control lane:
//! to every link). The receiver puts them in order by offset and drops what it has.
//!
//! A [`LaneAck`](wire::LaneAck) says two things. `delivered`: everything below it has been
//! taken out in order by the receiver's reader; the sender forgets it, and may go no further
//! than the window beyond it. `received`: how much of this lane has come over the very
//! connection the record travels on. A lane's stream on one connection is ordered, so this
//! names exactly which segments have arrived there, though an earlier one is still missing
//! elsewhere; without it a slow link would make the fast one look overdue.
//!
//! The end of a lane counts as one byte after its last in both figures, so that it is
//! acknowledged and sent again like any other.
//!
//! A segment on a link that goes down is sent again elsewhere unless it was received. One
//! that is overdue makes its link **suspect**: copies of what is on its way there go over
//! another link, and it gets nothing new until it acknowledges something again. With no
//! other link, a suspect one is used as it is: slow beats nothing.
//!
//! A stream of a lane that is over at the receiver (a late copy, or the last acknowledgement
//! was lost with its link) is answered with [`LaneStop`](wire::LaneStop); the sender then
//! abandons the lane.
//!
//! What this must never do: hand up a byte twice or out of order, hold more than the
//! window, or send again what is known to have arrived.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod incoming;
pub mod links;
mod queue;
pub mod receive;
pub mod send;
pub mod stripe;
pub mod wire;

use std::fmt;

/// Number of a lane within a session and a direction; 0 is the control lane, the sender
/// counts the others up from 1 and never uses one twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LaneId(pub u32);

impl LaneId {
    /// The control lane, which needs no start.
    pub const CONTROL: Self = Self(0);
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Index of a link in the pair's configuration, below [`LINKS_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LinkIndex(pub u8);

impl fmt::Display for LinkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Microseconds since a start of the caller's choice; also a span of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// The farthest point there is.
    pub const MAX: Self = Self(u64::MAX);

    /// This much later, or [`Micros::MAX`].
    #[must_use]
    pub const fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// How long after `earlier` this is; zero if before it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl From<std::time::Duration> for Micros {
    fn from(span: std::time::Duration) -> Self {
        Self(u64::try_from(span.as_micros()).unwrap_or(u64::MAX))
    }
}

impl From<Micros> for std::time::Duration {
    fn from(span: Micros) -> Self {
        Self::from_micros(span.0)
    }
}

/// What a lane is for; decides how its segments go over the links.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum LaneClass {
    /// Small, ordered, every segment on every link; the first copy counts.
    Control,
    /// Bulk: striped over the links by what each carries.
    Epoch,
    /// Requests and replies: each segment on the link that completes it first, frames
    /// with a deadline.
    Io,
}

/// Most links of a pair. Hosts have a handful of ports; it bounds every table by link.
pub const LINKS_MAX: usize = 8;
/// Segment of a lane that is striped, in bytes, unless a link is fast enough for a larger
/// one: at 10 Gbit/s 52 µs, at 1 Gbit/s half a millisecond. The grain of striping, and what a
/// link may be late by alone; large enough that its 16 bytes of header and one decision cost
/// nothing.
pub const SEGMENT_BYTES: usize = 64 << 10;
/// Largest segment, in bytes: that of a link which has no other beside it, or is so fast that
/// its grain is still fine. For each packet the QUIC library looks through all pieces of a
/// stream that are on their way one by one, so fewer and larger ones cost less.
pub const SEGMENT_BYTES_MAX: usize = 256 << 10;
/// What a lane may have handed out beyond what was delivered, in bytes: 12 ms of a
/// 10 Gbit/s link, several overdue times of a 1 Gbit/s one. Bounds the sender's copies and
/// the receiver's buffer; the smaller one of the two sides' counts.
pub const LANE_WINDOW_BYTES: u64 = 16 << 20;
/// The smallest window a peer may ask for: a frame's worth, or nothing would be delivered
/// for want of room.
pub const LANE_WINDOW_BYTES_MIN: u64 = 1 << 20;
/// Segments a lane may have handed out and not seen delivered: four times what striped ones
/// need, so that short ones do not fill tables.
pub const LANE_SEGMENTS_MAX: usize = 1024;
/// Acknowledge at least when this much came in since the last time, in bytes.
pub const ACK_BYTES: u64 = 256 << 10;
/// Acknowledge at the latest this long after something came in.
pub const ACK_DELAY: Micros = Micros(2_000);

const _: () = assert!(LANE_WINDOW_BYTES_MIN <= LANE_WINDOW_BYTES);
const _: () = assert!(LANE_WINDOW_BYTES >= 4 * ACK_BYTES);
const _: () = assert!(LANE_SEGMENTS_MAX as u64 * SEGMENT_BYTES as u64 >= LANE_WINDOW_BYTES);
const _: () = assert!(SEGMENT_BYTES <= SEGMENT_BYTES_MAX);
const _: () = assert!(SEGMENT_BYTES_MAX as u64 <= LANE_WINDOW_BYTES_MIN);

#[cfg(test)]
mod tests;
