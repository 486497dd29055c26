//! Which link takes the next segment, and when one is overdue. Pure functions of how the
//! links stand; the state is in [`super::links`].
//!
//! An epoch is bound by its last byte, so the aim is the earliest completion of all that
//! waits: a link takes a segment if it completes it no later than the other links together
//! would complete everything that waits without it. With much waiting, every link is busy
//! in proportion to what it carries; near the end the slow ones stand back. This is list
//! scheduling on uniform machines (Graham 1969; for paths: "earliest completion first",
//! Lim et al., CoNEXT 2017).

use super::{ACK_BYTES, ACK_DELAY, LINKS_MAX, LinkIndex, Micros, SEGMENT_BYTES, SEGMENT_BYTES_MAX};

/// What an unmeasured link is taken to carry while no other is measured, in bytes a second:
/// 1 Gbit/s, the slowest that mirroring is worth a cable.
pub const CAPACITY_ASSUMED: u64 = 125_000_000;
/// What an unmeasured link may have on its way, in bytes: a few segments, enough to measure
/// a link by, too little to hold an epoch up for long should it turn out slow.
pub const IN_FLIGHT_UNMEASURED: u64 = 4 * SEGMENT_BYTES as u64;
/// Least that a measured link may have on its way, in bytes: two acknowledgements' worth,
/// so that a figure that is too low can still grow.
pub const IN_FLIGHT_MIN: u64 = 2 * ACK_BYTES;
/// What may wait in front of a link's wire beyond its round trip: the queue of 4 ms by which
/// QUIC's congestion control measures it, which must be what holds the link and not this; the
/// delay of an acknowledgement; and as much again for our own tasks to wake up.
pub const QUEUE_DELAY: Micros = Micros(4 * ACK_DELAY.0);
/// No segment is overdue before this: two cores busy with a checkpoint are late by several
/// milliseconds.
pub const OVERDUE_MIN: Micros = Micros(20_000);
/// Overdue is this many times the expected time.
pub const OVERDUE_FACTOR: u64 = 4;
/// What a segment may take on the wire of a link that is striped with others, where that
/// allows more than [`SEGMENT_BYTES`]: a tenth of the least epoch worth the name.
const SEGMENT_TIME: Micros = Micros(100);
/// An unmeasured link's segments are expected as from one of this capacity, in bytes a
/// second: 100 Mbit/s. Being patient costs one late epoch, being rash a repeat.
const CAPACITY_PATIENT: u64 = 12_500_000;

const _: () = assert!(OVERDUE_MIN.0 > 4 * ACK_DELAY.0);

/// Whether a link may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkHealth {
    /// No connection.
    #[default]
    Down,
    /// A connection stands, but something is overdue or it came and went too often: only
    /// if there is no other.
    Suspect,
    /// It carries segments.
    Up,
}

/// How one link stands when a decision is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkView {
    /// Whether it may be used.
    pub health: LinkHealth,
    /// What it was measured to carry, in bytes a second; `None` until known.
    pub capacity: Option<u64>,
    /// Smoothed round-trip time.
    pub rtt: Micros,
    /// Least round-trip time seen.
    pub rtt_min: Micros,
    /// Bytes handed to it and not known to be received.
    pub in_flight: u64,
}

/// The links of a pair, by index; those it does not have are down.
pub type LinkViews = [LinkView; LINKS_MAX];

/// Time to put `bytes` on a wire of `capacity` bytes a second.
fn span(bytes: u64, capacity: u64) -> Micros {
    let micros = u128::from(bytes) * 1_000_000 / u128::from(capacity.max(1));
    Micros(u64::try_from(micros).unwrap_or(u64::MAX))
}

/// What a link is reckoned to carry: as measured, or half of the slowest that is.
fn reckoned(view: &LinkView, views: &LinkViews) -> u64 {
    view.capacity.unwrap_or_else(|| {
        let known = views
            .iter()
            .filter(|other| other.health == LinkHealth::Up)
            .filter_map(|other| other.capacity)
            .min();
        known.map_or(CAPACITY_ASSUMED, |slowest| slowest / 2)
    })
}

/// Most that a link may have on its way, in bytes: what its wire holds in a round trip and
/// in [`QUEUE_DELAY`]. More would only wait in front of it, where it can go nowhere else.
#[must_use]
pub fn in_flight_max(view: &LinkView) -> u64 {
    let Some(capacity) = view.capacity else {
        return IN_FLIGHT_UNMEASURED;
    };
    let time = u128::from(view.rtt_min.plus(QUEUE_DELAY).0);
    let bytes = u128::from(capacity) * time / 1_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX).max(IN_FLIGHT_MIN)
}

/// Whether a link may be given anything: it is up, or stands while none is up.
#[must_use]
pub fn usable(link: LinkIndex, views: &LinkViews) -> bool {
    let any_up = views.iter().any(|view| view.health == LinkHealth::Up);
    match views
        .get(usize::from(link.0))
        .map_or(LinkHealth::Down, |view| view.health)
    {
        LinkHealth::Up => true,
        LinkHealth::Suspect => !any_up,
        LinkHealth::Down => false,
    }
}

/// Whether another link than `link` may be given anything.
fn has_other(link: LinkIndex, views: &LinkViews) -> bool {
    (0u8..)
        .zip(views)
        .any(|(index, _)| index != link.0 && usable(LinkIndex(index), views))
}

/// Largest segment to cut for this link, in bytes.
#[must_use]
pub fn segment_bytes(link: LinkIndex, views: &LinkViews) -> u64 {
    let max = SEGMENT_BYTES_MAX as u64;
    if !has_other(link, views) {
        return max;
    }
    let capacity = views
        .get(usize::from(link.0))
        .and_then(|view| view.capacity);
    let bytes = u128::from(capacity.unwrap_or(0)) * u128::from(SEGMENT_TIME.0) / 1_000_000;
    u64::try_from(bytes)
        .unwrap_or(max)
        .clamp(SEGMENT_BYTES as u64, max)
}

/// Whether `link` shall take the next segment of `segment` bytes, of `backlog` that wait
/// (that segment among them). For a segment alone, `backlog` is `segment`.
#[must_use]
pub fn takes(link: LinkIndex, views: &LinkViews, segment: u64, backlog: u64) -> bool {
    if !usable(link, views) {
        return false;
    }
    if !has_other(link, views) {
        // No choice: QUIC's windows and the lane's are bounds enough.
        return true;
    }
    let view = &views[usize::from(link.0)];
    if view.in_flight > 0 && view.in_flight + segment > in_flight_max(view) {
        return false;
    }
    let here = completion(view, reckoned(view, views), segment);
    here <= others_complete(link, views, segment, backlog)
}

/// The least round trip, since the smoothed one holds our own queue a second time.
fn completion(view: &LinkView, capacity: u64, bytes: u64) -> Micros {
    span(view.in_flight.saturating_add(bytes), capacity).plus(Micros(view.rtt_min.0 / 2))
}

/// When the usable links other than `link` would have completed `bytes` together: water
/// filled into vessels that start at different heights, but a segment is not divided: no
/// sooner than one of them completes one. So the link that completes a segment first of all
/// never leaves it to the others.
fn others_complete(link: LinkIndex, views: &LinkViews, segment: u64, bytes: u64) -> Micros {
    let mut others = [(Micros::MAX, 0); LINKS_MAX];
    let (mut count, mut first) = (0, Micros::MAX);
    for (index, view) in (0u8..).zip(views) {
        if index != link.0 && usable(LinkIndex(index), views) {
            let capacity = reckoned(view, views);
            first = first.min(completion(view, capacity, segment));
            others[count] = (completion(view, capacity, 0), capacity);
            count += 1;
        }
    }
    let others = &mut others[..count];
    others.sort_unstable();
    // The links so far carry `rate` together and have come to `at`, with `left` to go.
    let (mut left, mut rate, mut at) = (bytes, 0_u64, Micros::MAX);
    for &(ready, capacity) in others.iter() {
        if rate > 0 {
            if at.plus(span(left, rate)) <= ready {
                break;
            }
            let carried = u128::from(rate) * u128::from(ready.since(at).0) / 1_000_000;
            left = left.saturating_sub(u64::try_from(carried).unwrap_or(u64::MAX));
        }
        at = ready;
        rate = rate.saturating_add(capacity);
    }
    at.plus(span(left, rate)).max(first)
}

/// How long after now a segment handed to this link becomes overdue; `in_flight` of the
/// view already holds it.
#[must_use]
pub fn overdue_after(view: &LinkView) -> Micros {
    let capacity = view.capacity.unwrap_or(CAPACITY_PATIENT);
    // The smoothed round trip holds our own queue; beyond that it tells of a path that has
    // become longer, which is no reason for suspicion.
    let expected = span(view.in_flight, capacity)
        .plus(view.rtt_min)
        .max(view.rtt)
        .plus(ACK_DELAY);
    Micros(expected.0.saturating_mul(OVERDUE_FACTOR)).max(OVERDUE_MIN)
}
