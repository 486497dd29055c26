//! How the links of a session stand, shared by all its lanes.
//!
//! ```text
//!            up                      overdue
//!   Down ─────────▶ Up ─────────────────────────────▶ Suspect
//!    ▲  ▲           │ ▲  all that was on its way then      │
//!    │  └───────────┘ └─────── has been received ──────────┘
//!    │     down                                            │
//!    └──────────────────────────── down ◀──────────────────┘
//! ```
//!
//! A link that comes and goes is held back a little longer each time: it counts as suspect
//! for a while though it is up. Ten quiet seconds clear its name.

use super::stripe::{LinkHealth, LinkView, LinkViews};
use super::{LINKS_MAX, LaneClass, LinkIndex, Micros};

/// Troubles (down, suspect) that cost nothing: anyone trips once.
const TROUBLES_FREE: u32 = 1;
/// How long a link is held back after its first trouble that counts; doubles with each.
const HOLD_MIN: Micros = Micros(100_000);
/// Longest it is held back.
const HOLD_MAX: Micros = Micros(5_000_000);
/// A link that had no trouble for this long starts anew.
const TROUBLE_FORGOTTEN: Micros = Micros(10_000_000);

const _: () = assert!(HOLD_MAX.0 < TROUBLE_FORGOTTEN.0);

/// What QUIC knows of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkMeasure {
    /// What it carries, in bytes a second; `None` until known.
    pub capacity: Option<u64>,
    /// Whether that is all it carries; else it carries that much at least.
    pub saturated: bool,
    /// Smoothed round-trip time.
    pub rtt: Micros,
    /// Least round-trip time of the connection.
    pub rtt_min: Micros,
}

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    health: LinkHealth,
    measure: LinkMeasure,
    /// On their way, in bytes: of control and epoch lanes, of I/O lanes.
    bulk: u64,
    io: u64,
    /// While suspect: bytes that were on their way then and have yet to be received.
    suspicion: u64,
    troubles: u32,
    trouble_at: Micros,
    held_until: Micros,
}

/// The links of a session.
#[derive(Clone, Debug, Default)]
pub struct Links {
    links: [Link; LINKS_MAX],
}

impl Links {
    /// All down.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn at(&self, link: LinkIndex) -> Option<&Link> {
        self.links.get(usize::from(link.0))
    }

    fn at_mut(&mut self, link: LinkIndex) -> Option<&mut Link> {
        self.links.get_mut(usize::from(link.0))
    }

    /// A connection stands on this link (a new one: nothing is known of it yet). Tell every
    /// lane, too.
    pub fn up(&mut self, link: LinkIndex, now: Micros) {
        if let Some(link) = self.at_mut(link) {
            if now.since(link.trouble_at) >= TROUBLE_FORGOTTEN {
                link.troubles = 0;
            }
            *link = Link {
                health: LinkHealth::Up,
                troubles: link.troubles,
                trouble_at: link.trouble_at,
                ..Link::default()
            };
            link.hold(now);
        }
    }

    /// Its connection is gone. Tell every lane afterwards.
    pub fn down(&mut self, link: LinkIndex, now: Micros) {
        if let Some(link) = self.at_mut(link)
            && link.health != LinkHealth::Down
        {
            link.trouble(now);
            link.health = LinkHealth::Down;
            link.measure = LinkMeasure::default();
            (link.bulk, link.io, link.suspicion) = (0, 0, 0);
        }
    }

    /// New figures of a link, as often as there are any.
    pub fn measured(&mut self, link: LinkIndex, measure: LinkMeasure) {
        if let Some(link) = self.at_mut(link)
            && link.health != LinkHealth::Down
        {
            link.measure = measure;
        }
    }

    /// How a link stands.
    #[must_use]
    pub fn health(&self, link: LinkIndex, now: Micros) -> LinkHealth {
        self.at(link)
            .map_or(LinkHealth::Down, |link| link.health_at(now))
    }

    /// Bytes on their way on a link.
    #[must_use]
    pub fn in_flight(&self, link: LinkIndex) -> u64 {
        self.at(link).map_or(0, |link| link.bulk + link.io)
    }

    /// What the links that are up carry together, in bytes a second; `None` if there is
    /// none, or one of them was never given more than it carries: it is not what holds a lane.
    #[must_use]
    pub fn capacity(&self, now: Micros) -> Option<u64> {
        self.links
            .iter()
            .filter(|link| link.health_at(now) == LinkHealth::Up)
            .map(|link| link.measure.capacity.filter(|_| link.measure.saturated))
            .reduce(|sum, link| Some(sum?.saturating_add(link?)))
            .flatten()
    }

    /// The links as a lane of this class sees them. QUIC sends I/O before bulk, so bulk is
    /// not in its way.
    #[must_use]
    pub fn views(&self, class: LaneClass, now: Micros) -> LinkViews {
        self.links.map(|link| LinkView {
            health: link.health_at(now),
            capacity: link.measure.capacity,
            rtt: link.measure.rtt,
            rtt_min: link.measure.rtt_min,
            in_flight: match class {
                LaneClass::Io => link.io,
                LaneClass::Control | LaneClass::Epoch => link.bulk + link.io,
            },
        })
    }

    /// When to look again though nothing happens: a held link is free.
    #[must_use]
    pub fn next_wakeup(&self, now: Micros) -> Option<Micros> {
        self.links
            .iter()
            .filter(|link| link.health == LinkHealth::Up && link.held_until > now)
            .map(|link| link.held_until)
            .min()
    }

    /// Bytes were handed to a link.
    pub(super) fn sent(&mut self, link: LinkIndex, class: LaneClass, bytes: u64) {
        if let Some(link) = self.at_mut(link) {
            *link.in_flight(class) += bytes;
        }
    }

    /// Bytes handed to a link were received, or nobody waits for them any more.
    pub(super) fn returned(&mut self, link: LinkIndex, class: LaneClass, bytes: u64, now: Micros) {
        if let Some(link) = self.at_mut(link) {
            let in_flight = link.in_flight(class);
            *in_flight = in_flight.saturating_sub(bytes);
            link.suspicion = link.suspicion.saturating_sub(bytes);
            if link.health == LinkHealth::Suspect && link.suspicion == 0 {
                link.health = LinkHealth::Up;
                link.hold(now);
            }
        }
    }

    /// Whether something overdue on this link would be news.
    pub(super) fn may_turn_suspect(&self, link: LinkIndex) -> bool {
        self.at(link)
            .is_some_and(|link| link.health == LinkHealth::Up)
    }

    /// Something on this link is overdue. Whether that is news.
    pub(super) fn suspect(&mut self, link: LinkIndex, now: Micros) -> bool {
        self.at_mut(link).is_some_and(|link| {
            let news = link.health == LinkHealth::Up;
            if news {
                link.health = LinkHealth::Suspect;
                link.suspicion = link.bulk + link.io;
                link.trouble(now);
            }
            news
        })
    }
}

impl Link {
    fn health_at(&self, now: Micros) -> LinkHealth {
        match self.health {
            LinkHealth::Up if now < self.held_until => LinkHealth::Suspect,
            health => health,
        }
    }

    fn in_flight(&mut self, class: LaneClass) -> &mut u64 {
        match class {
            LaneClass::Io => &mut self.io,
            LaneClass::Control | LaneClass::Epoch => &mut self.bulk,
        }
    }

    fn trouble(&mut self, now: Micros) {
        if now.since(self.trouble_at) >= TROUBLE_FORGOTTEN {
            self.troubles = 0;
        }
        self.troubles = self.troubles.saturating_add(1);
        self.trouble_at = now;
    }

    fn hold(&mut self, now: Micros) {
        self.held_until = match self.troubles.checked_sub(TROUBLES_FREE + 1) {
            None => now,
            Some(counted) => {
                let doubled = HOLD_MIN.0.checked_shl(counted).unwrap_or(u64::MAX);
                now.plus(Micros(doubled).min(HOLD_MAX))
            }
        };
    }
}
