//! The pool state: the one value in the registry that says who is a member and who coordinates.
//!
//! Every change is a compare-and-set of the whole value at the version that was read, so a
//! coordinator that was deposed, or stood still, writes nothing.
//!
//! ```text
//!             joins                 ousted               first proof
//!   (none) ----------> In -----------------> Ousted ----------------> Dead
//!     ^                |  said farewell         |  said farewell        |
//!     |                +--------> Away <--------+                       |
//!     +---------- joins with a higher incarnation: In <-----------------+
//! ```

use super::time::Millis;
use crate::pool::{HostId, HostName, Incarnation, POOL_HOSTS_MAX};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// The registry's key of it.
pub const STATE_KEY: &str = "pool/state";
/// Most bytes of its JSON: 64 members and the decisions kept, with room to grow.
pub const STATE_BYTES_MAX: usize = 64 << 10;
/// Decisions that are kept for `pollux why`.
pub const DECISIONS_MAX: usize = 64;
/// Longest cause of a decision, in bytes; what is longer is cut.
pub const CAUSE_BYTES_MAX: usize = 400;

/// Highest number of a term or a decision: each can be followed by others for ever.
const NUMBER_MAX: u64 = 1 << 56;

/// How a host's death, or that it runs nothing, is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Proof {
    /// A fence agent switched its power off and confirmed that it is off.
    PowerOff,
    /// It said itself, in that incarnation, that it runs nothing and will start nothing.
    Farewell,
    /// A person has made certain that it is off, and said so.
    Declared,
    /// The registry revoked the lease by which it lived, and that lease's time is over.
    LeaseRevoked,
    /// Its lease and its watchdog have run out since it was ousted.
    WatchdogBound {
        /// What its watchdog was armed with, in milliseconds, as it had reported.
        watchdog: Millis,
    },
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("its power is off, as its fence agent confirmed"),
            Self::Farewell => f.write_str("it said farewell itself"),
            Self::Declared => f.write_str("it is off, as a person has made certain and said"),
            Self::LeaseRevoked => f.write_str("its lease was revoked"),
            Self::WatchdogBound { watchdog } => {
                write!(f, "its lease and its watchdog of {watchdog} have run out")
            }
        }
    }
}

/// What a host is to the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Standing {
    /// A member: it may run VMs, with a lease.
    In,
    /// Given up: it must stop, but its VMs may not be restarted yet.
    Ousted,
    /// Its VMs may be restarted.
    Dead(Proof),
    /// It left by itself, with nothing running.
    Away,
}

impl Standing {
    /// Whether a member may become `next` within the same incarnation.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::In, Self::Ousted | Self::Away) | (Self::Ousted, Self::Dead(_) | Self::Away)
        )
    }
}

/// A host of the pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its name.
    pub name: HostName,
    /// The life it stands in.
    pub incarnation: Incarnation,
    /// What it is to the pool.
    pub standing: Standing,
    /// The life before this one, and how it is known to be over: its VMs may be restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former: Option<(Incarnation, Proof)>,
    /// What its watchdog is armed with in this life, if it has one that really resets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Millis>,
    /// It may go on without a lease that others could wait out, until it says that it knows a
    /// newer version than this: see [`super::pact`]. No watchdog bound proves its death.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unbound: Option<u64>,
}

/// Who decides now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coordinator {
    /// The host.
    pub host: HostId,
    /// In this life.
    pub incarnation: Incarnation,
}

/// Something that was decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// Rises by one.
    pub number: u64,
    /// Who decided.
    pub by: HostId,
    /// About whom.
    pub about: HostId,
    /// What: "ousted", "dead", "joined", "coordinates".
    pub what: String,
    /// Who saw what, and which rule followed from it.
    pub cause: String,
}

/// Who is a member, who coordinates, what was decided.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolState {
    /// Rises with every coordinator.
    pub term: u64,
    /// Who decides; `None` before the first.
    pub coordinator: Option<Coordinator>,
    /// The hosts.
    pub members: BTreeMap<HostId, Member>,
    /// The lives that may give members up, and without a majority of which nobody goes on when
    /// the registry is lost: see [`super::pact`].
    #[serde(default)]
    pub voters: BTreeMap<HostId, Incarnation>,
    /// Number of the next decision.
    pub next_decision: u64,
    /// The newest decisions, oldest first.
    pub decisions: VecDeque<Decision>,
}

/// A state that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BadState {
    /// Larger than one can be.
    #[error(
        "pool state of {0} bytes, the most is {STATE_BYTES_MAX}; the registry's value is damaged"
    )]
    TooLong(usize),
    /// More hosts than a pool has, or one with an impossible number.
    #[error("pool state with impossible hosts: at most {POOL_HOSTS_MAX}, numbered from 0")]
    Hosts,
    /// More decisions than are kept, or a number that none can follow.
    #[error("pool state with impossible numbers; the registry's value is damaged")]
    Numbers,
    /// Not the JSON of a state.
    #[error("pool state cannot be read: {0}; it is damaged or was written by a newer pollux")]
    Json(#[from] serde_json::Error),
}

impl PoolState {
    /// Read it from the registry's bytes.
    ///
    /// # Errors
    /// [`BadState`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadState> {
        if bytes.len() > STATE_BYTES_MAX {
            return Err(BadState::TooLong(bytes.len()));
        }
        let state: Self = serde_json::from_slice(bytes)?;
        let in_range = |host: &HostId| usize::from(host.0) < POOL_HOSTS_MAX;
        let named = state.coordinator.iter().map(|who| &who.host);
        let named = named.chain(state.voters.keys());
        let named = named.chain(state.decisions.iter().flat_map(|d| [&d.by, &d.about]));
        if !state.members.keys().chain(named).all(in_range) {
            return Err(BadState::Hosts);
        }
        if state.decisions.len() > DECISIONS_MAX
            || [state.term, state.next_decision]
                .iter()
                .any(|n| *n > NUMBER_MAX)
        {
            return Err(BadState::Numbers);
        }
        Ok(state)
    }

    /// The registry's bytes of it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Plain data with string keys: cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Whether that host, in that life, is a member.
    #[must_use]
    pub fn is_in(&self, host: HostId, incarnation: Incarnation) -> bool {
        self.standing(host, incarnation) == Some(Standing::In)
    }

    /// What that host, in that life, is to the pool.
    #[must_use]
    pub fn standing(&self, host: HostId, incarnation: Incarnation) -> Option<Standing> {
        self.members
            .get(&host)
            .filter(|member| member.incarnation == incarnation)
            .map(|member| member.standing)
    }

    /// All that are in, in order.
    pub fn members_in(&self) -> impl Iterator<Item = (HostId, &Member)> {
        self.members
            .iter()
            .filter(|(_, member)| member.standing == Standing::In)
            .map(|(host, member)| (*host, member))
    }

    /// Whether that life of a host is a voter.
    #[must_use]
    pub fn is_voter(&self, host: HostId, incarnation: Incarnation) -> bool {
        self.voters.get(&host) == Some(&incarnation)
    }

    /// Whether `votes` of the voters are a majority of them.
    #[must_use]
    pub fn is_quorum(&self, votes: usize) -> bool {
        votes * 2 > self.voters.len()
    }

    /// Whether the voters whose lives are not over are no majority any more: then no host goes on
    /// by their word, and any member may give others up.
    #[must_use]
    pub fn is_orphaned(&self) -> bool {
        self.is_orphaned_without(|_, _| false)
    }

    /// The same, if lives that are `over` are counted as over.
    #[must_use]
    pub fn is_orphaned_without(&self, over: impl Fn(HostId, Incarnation) -> bool) -> bool {
        let voters = self.voters.iter().map(|(host, life)| (*host, *life));
        let may_live =
            voters.filter(|(host, life)| self.may_live(*host, *life) && !over(*host, *life));
        !self.is_quorum(may_live.count())
    }

    fn may_live(&self, host: HostId, life: Incarnation) -> bool {
        let standing = self.standing(host, life);
        matches!(standing, Some(Standing::In | Standing::Ousted))
    }

    /// The lives that may give a member up: those that are in, and voters that may still live.
    pub fn may_act(&self) -> impl Iterator<Item = (HostId, Incarnation)> {
        let lives = self.members.iter().map(|(host, m)| (*host, m.incarnation));
        lives.filter(|(host, life)| {
            self.is_in(*host, *life) || self.is_voter(*host, *life) && self.may_live(*host, *life)
        })
    }

    /// Whether each member is a voter that votes already or is `heard`, and nobody else.
    #[must_use]
    pub fn is_admitted(&self, heard: impl Fn(HostId, Incarnation) -> bool) -> bool {
        let lives = self.to_admit(heard);
        lives.eq(self.voters.iter().map(|(host, life)| (*host, *life)))
    }

    /// Make the members that vote already, or are `heard`, the voters.
    pub fn admit(&mut self, heard: impl Fn(HostId, Incarnation) -> bool) {
        self.voters = self.to_admit(heard).collect();
    }

    fn to_admit(
        &self,
        heard: impl Fn(HostId, Incarnation) -> bool,
    ) -> impl Iterator<Item = (HostId, Incarnation)> {
        let lives = self.members_in().map(|(host, m)| (host, m.incarnation));
        lives.filter(move |(host, life)| self.is_voter(*host, *life) || heard(*host, *life))
    }

    /// Name of a host, for people.
    #[must_use]
    pub fn name(&self, host: HostId) -> String {
        self.members
            .get(&host)
            .map_or_else(|| host.to_string(), |member| member.name.to_string())
    }

    /// A life of a host that promised as one of two is over: the other, if it may still live, may
    /// go on by that promise, at `version` and no later one.
    pub fn unbind_other_of_two(&mut self, promised: (HostId, Incarnation), version: u64) {
        if self.voters.len() != 2 || !self.is_voter(promised.0, promised.1) {
            return;
        }
        let other = self.voters.iter().find(|(host, _)| **host != promised.0);
        let Some((host, life)) = other.map(|(host, life)| (*host, *life)) else {
            return;
        };
        if self.may_live(host, life)
            && let Some(member) = self.members.get_mut(&host)
        {
            member.unbound = Some(version);
        }
    }

    /// That life of a host knows `version`: it goes by that, and has a lease as usual. Whether
    /// that was unknown.
    pub fn bind(&mut self, host: HostId, incarnation: Incarnation, version: u64) -> bool {
        let member = self.members.get_mut(&host);
        let member = member.filter(|member| member.incarnation == incarnation);
        let knows = |unbound: &mut u64| version > *unbound;
        member.is_some_and(|member| member.unbound.take_if(knows).is_some())
    }

    /// Note a decision.
    pub fn decide(&mut self, by: HostId, about: HostId, what: &str, cause: &str) {
        if self.decisions.len() == DECISIONS_MAX {
            self.decisions.pop_front();
        }
        let end = cause.floor_char_boundary(CAUSE_BYTES_MAX);
        self.decisions.push_back(Decision {
            number: self.next_decision,
            by,
            about,
            what: what.to_owned(),
            cause: cause[..end].to_owned(),
        });
        self.next_decision += 1;
    }

    /// Change what a host is to the pool; whether that was possible.
    pub fn become_standing(&mut self, host: HostId, next: Standing) -> bool {
        match self.members.get_mut(&host) {
            Some(member) if member.standing.may_become(next) => {
                member.standing = next;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> PoolState {
        let member = |name: &str| Member {
            name: HostName::new(name).unwrap(),
            incarnation: Incarnation(1),
            standing: Standing::In,
            former: None,
            watchdog: None,
            unbound: None,
        };
        PoolState {
            term: 1,
            members: [(HostId(0), member("a")), (HostId(1), member("b"))].into(),
            ..PoolState::default()
        }
    }

    #[test]
    fn a_member_is_ousted_before_it_is_dead_and_never_comes_back_in_its_life() {
        let mut state = state();
        let proof = Standing::Dead(Proof::PowerOff);
        assert!(!state.become_standing(HostId(1), proof));
        assert!(state.become_standing(HostId(1), Standing::Ousted));
        assert!(!state.become_standing(HostId(1), Standing::In));
        assert!(state.become_standing(HostId(1), proof));
        for next in [Standing::In, Standing::Ousted, Standing::Away] {
            assert!(!state.become_standing(HostId(1), next), "{next:?}");
        }
        assert!(!state.is_in(HostId(1), Incarnation(1)) && state.is_in(HostId(0), Incarnation(1)));
        assert!(!state.is_in(HostId(0), Incarnation(2)));
    }

    #[test]
    fn voters_whose_lives_are_over_make_no_majority() {
        let mut state = PoolState::default();
        assert!(state.is_orphaned() && state.is_admitted(|_, _| true));
        for n in 0..3 {
            let member = Member {
                name: HostName::new(format!("h{n}")).unwrap(),
                incarnation: Incarnation(1),
                standing: Standing::In,
                former: None,
                watchdog: None,
                unbound: None,
            };
            state.members.insert(HostId(n), member);
        }
        assert!(!state.is_admitted(|_, _| true));
        state.admit(|_, _| true);
        assert!(state.is_admitted(|_, _| true) && !state.is_orphaned());
        // One that joined and is not heard does not vote; one that votes goes on to.
        let mut joined = state.clone();
        let member = joined.members[&HostId(0)].clone();
        joined.members.insert(HostId(9), member);
        assert!(!joined.is_admitted(|_, _| true) && joined.is_admitted(|_, _| false));
        joined.admit(|_, _| false);
        assert_eq!(joined.voters, state.voters);
        joined.admit(|host, _| host == HostId(9));
        assert_eq!(joined.voters.len(), 4);
        // One that is given up may still live; one that began a new life does not in the old one.
        state.become_standing(HostId(0), Standing::Ousted);
        state.members.get_mut(&HostId(1)).unwrap().incarnation = Incarnation(2);
        assert!(!state.is_orphaned() && !state.is_admitted(|_, _| true));
        assert!(state.is_voter(HostId(1), Incarnation(1)));
        state.become_standing(HostId(0), Standing::Dead(Proof::PowerOff));
        assert!(state.is_orphaned());
        // Half of an even number is no majority.
        state.voters.remove(&HostId(0));
        assert!(state.is_orphaned());
    }

    #[test]
    fn the_other_of_two_is_unbound_until_it_knows_a_newer_version() {
        let mut state = state();
        state.admit(|_, _| true);
        let (a, b) = ((HostId(0), Incarnation(1)), (HostId(1), Incarnation(1)));
        let unbound = |state: &PoolState| state.members[&HostId(1)].unbound;
        // A life that does not vote promised nothing that matters.
        state.unbind_other_of_two((HostId(0), Incarnation(2)), 7);
        assert_eq!(unbound(&state), None);
        state.unbind_other_of_two(a, 7);
        assert_eq!(unbound(&state), Some(7));
        assert!(!state.bind(b.0, b.1, 7) && !state.bind(b.0, Incarnation(2), 8));
        assert!(state.bind(b.0, b.1, 8) && !state.bind(b.0, b.1, 8));
        assert_eq!(unbound(&state), None);
        // One that is over, or is not one of two, needs nothing.
        state.become_standing(HostId(1), Standing::Away);
        state.unbind_other_of_two(a, 9);
        assert_eq!(unbound(&state), None);
    }

    #[test]
    fn the_largest_state_fits_and_comes_back_as_it_was() {
        let mut state = PoolState::default();
        for n in 0..64 {
            let member = Member {
                name: HostName::new(format!("h{n}").repeat(20)).unwrap(),
                incarnation: Incarnation(u64::MAX),
                standing: Standing::Dead(Proof::WatchdogBound {
                    watchdog: Millis(5000),
                }),
                former: Some((Incarnation(u64::MAX), Proof::PowerOff)),
                watchdog: Some(Millis(5000)),
                unbound: Some(u64::MAX),
            };
            state.members.insert(HostId(n), member);
            state.voters.insert(HostId(n), Incarnation(u64::MAX));
            state.decide(HostId(0), HostId(n), "ousted", &"ä".repeat(1000));
            state.decide(HostId(0), HostId(n), "dead", "x");
        }
        assert_eq!(state.decisions.len(), DECISIONS_MAX);
        assert_eq!(state.decisions.back().unwrap().number, 127);
        let bytes = state.to_bytes();
        assert!(bytes.len() < STATE_BYTES_MAX, "{}", bytes.len());
        assert_eq!(PoolState::from_bytes(&bytes).unwrap(), state);
    }

    #[test]
    fn damaged_states_are_refused_in_words() {
        let told = |bytes: &[u8]| PoolState::from_bytes(bytes).unwrap_err().to_string();
        assert!(told(b"{").contains("damaged"));
        assert!(told(&vec![b' '; STATE_BYTES_MAX + 1]).contains("65537 bytes"));
        let mut state = state();
        let member = state.members[&HostId(0)].clone();
        let mut voters = state.clone();
        voters.voters.insert(HostId(64), Incarnation(1));
        assert!(told(&voters.to_bytes()).contains("impossible hosts"));
        state.members.insert(HostId(64), member);
        assert!(told(&state.to_bytes()).contains("impossible hosts"));
        // What could not be followed by a further decision, or would grow by each.
        state.members.clear();
        state.next_decision = u64::MAX;
        assert!(told(&state.to_bytes()).contains("impossible numbers"));
        state.next_decision = 0;
        state.decide(HostId(0), HostId(1), "dead", "x");
        state.decisions = vec![state.decisions[0].clone(); DECISIONS_MAX + 1].into();
        assert!(told(&state.to_bytes()).contains("impossible numbers"));
        state.decisions.truncate(1);
        assert!(PoolState::from_bytes(&state.to_bytes()).is_ok());
        state.decisions[0].by = HostId(64);
        assert!(told(&state.to_bytes()).contains("impossible hosts"));
    }
}
