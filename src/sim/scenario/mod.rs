//! What happens to a pool, and what must come of it: scenario files, in words. Pure.
//!
//! A file holds cases; a case says what the pool is, which events happen when, and what is
//! expected. Nothing here depends on who carries it out: the simulator does in virtual time, a
//! lab with real hosts as far as the fault exists there ([`Event::in_lab`]).
//!
//! ```toml
//! about = "What XenServer's daemon was measured on."
//!
//! [[case]]
//! name = "one of two hosts dies"
//! hosts = 2
//! events = ["5 s: crash b"]
//! expect = ["the VMs of b may restart within 15 s", "nobody else resets"]
//! ```
//!
//! Times of events count from when the pool stands, times of expectations from the last event.

mod file;
mod words;

pub use file::{BadScenario, Case, Random, RegistryKind, Scenario};
pub use words::{BadWords, duration, host_name};

use crate::ha::time::Millis;

/// One host or several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The host of this index: `a` is 0.
    Host(usize),
    /// Who coordinates when the first event happens.
    Coordinator,
    /// The first host that does not coordinate then.
    Another,
    /// Every host.
    All,
}

/// Which of a pool's networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// The one that every host is on.
    Management,
    /// The private links.
    Interconnect,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its power goes.
    Crash(Who),
    /// It gets power.
    PowerOn(Who),
    /// It stands still for so long.
    Freeze(Who, Millis),
    /// Two hosts hear each other over no network.
    Cut(Who, Who),
    /// What the first sends to the second over networks is lost.
    CutOneWay(Who, Who),
    /// One network of a host, or of all, carries nothing.
    CutNetwork(Network, Who),
    /// All networks carry again, and lose nothing.
    HealNetworks,
    /// So many of a thousand packets are lost everywhere.
    Lose(u64),
    /// The host has no way to the registry, nor to heartbeats through storage.
    TakeRegistry(Who),
    /// It has again.
    GiveRegistry(Who),
    /// One disk of the statefile answers the host with errors.
    TakeDisk(u8, Who),
    /// It works again.
    GiveDisk(u8, Who),
    /// The host does not reach the gateway.
    TakeGateway(Who),
    /// It does again.
    GiveGateway(Who),
    /// The member of etcd that leads stops; the others choose another.
    StopLeader,
    /// Whether a fence agent does anything from now on.
    FenceAgents(bool),
}

impl Event {
    /// Whether a lab with this registry has this fault.
    #[must_use]
    pub const fn in_lab(&self, registry: RegistryKind) -> bool {
        match self {
            Self::Crash(_)
            | Self::PowerOn(_)
            | Self::Freeze(..)
            | Self::CutNetwork(Network::Management, _)
            | Self::HealNetworks
            | Self::StopLeader => true,
            Self::TakeRegistry(_)
            | Self::GiveRegistry(_)
            | Self::TakeDisk(..)
            | Self::GiveDisk(..) => matches!(registry, RegistryKind::Statefile { .. }),
            Self::Cut(..)
            | Self::CutOneWay(..)
            | Self::CutNetwork(Network::Interconnect, _)
            | Self::Lose(_)
            | Self::TakeGateway(_)
            | Self::GiveGateway(_)
            | Self::FenceAgents(_) => false,
        }
    }

    /// Hosts it is about.
    #[must_use]
    pub fn about(&self) -> Vec<Who> {
        match self {
            Self::Crash(who)
            | Self::PowerOn(who)
            | Self::Freeze(who, _)
            | Self::CutNetwork(_, who)
            | Self::TakeRegistry(who)
            | Self::GiveRegistry(who)
            | Self::TakeDisk(_, who)
            | Self::GiveDisk(_, who)
            | Self::TakeGateway(who)
            | Self::GiveGateway(who) => vec![*who],
            Self::Cut(a, b) | Self::CutOneWay(a, b) => vec![*a, *b],
            Self::HealNetworks | Self::Lose(_) | Self::StopLeader => vec![Who::All],
            Self::FenceAgents(_) => Vec::new(),
        }
    }
}

/// By what a death is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProofKind {
    /// Lease and watchdog have run out.
    Watchdog,
    /// The power is off.
    Power,
    /// It said so itself.
    Farewell,
}

/// What must come of it. Times count from the last event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Its VMs may be restarted elsewhere.
    MayRestart(Who, Millis),
    /// They never may.
    NoRestart(Who),
    /// No watchdog fires.
    NobodyResets,
    /// None of a host that no event is about.
    NobodyElseResets,
    /// It is reset by its watchdog.
    Resets(Who, Millis),
    /// It is a member in the same life until the end.
    Stays(Who),
    /// The pool gives it up.
    GivenUp(Who, Millis),
    /// Another host coordinates than at the first event.
    AnotherCoordinates(Millis),
    /// Every host is a member, in whatever life.
    AllMembers(Millis),
    /// How its death is proved.
    Proved(Who, ProofKind),
}

impl Expect {
    /// By when it must have come, if it says so.
    #[must_use]
    pub const fn limit(&self) -> Option<Millis> {
        match self {
            Self::MayRestart(_, limit)
            | Self::Resets(_, limit)
            | Self::GivenUp(_, limit)
            | Self::AnotherCoordinates(limit)
            | Self::AllMembers(limit) => Some(*limit),
            Self::NoRestart(_)
            | Self::NobodyResets
            | Self::NobodyElseResets
            | Self::Stays(_)
            | Self::Proved(..) => None,
        }
    }
}
