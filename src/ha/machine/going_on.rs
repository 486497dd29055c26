//! Going on without the registry: words, promises, and of two hosts who switches the other off.
//! [`crate::ha::pact`] has the rules and why they hold.

use super::{Action, Machine, Phase};
use crate::ha::pact::Own;
use crate::ha::race::Side;
use crate::ha::report::{IN_DOUBT, Report};
use crate::ha::sabotage::{Bug, sabotaged};
use crate::ha::state::{PoolState, Proof};
use crate::ha::time::Millis;
use crate::pool::{HostId, Incarnation};
use crate::registry::Versioned;
use std::collections::BTreeMap;

impl Machine {
    /// A voter says that it knows a state in which this host is a member; see [`crate::ha::pact`].
    pub(super) fn be_seen(&mut self, report: &Report) {
        let (Some(state), Some(joined)) = (&self.state, self.joined_at) else {
            return;
        };
        let version = report.registry.version;
        self.seen |= state.value.is_voter(report.host, report.incarnation)
            && version >= joined
            && version != IN_DOUBT;
    }

    pub(super) fn own<'a>(
        &'a self,
        state: &'a Versioned<PoolState>,
        heard: &'a BTreeMap<HostId, &'a Report>,
    ) -> Own<'a> {
        Own {
            me: (self.config.me, self.config.incarnation),
            timing: &self.config.timing,
            power_fencing: self.config.power_fencing,
            state,
            heard,
        }
    }

    pub(super) fn newest(&self) -> BTreeMap<HostId, &Report> {
        let newest = self.contacts.iter();
        newest.map(|(host, c)| (host, &c.report)).collect()
    }

    /// Whether no write of this host is under way or in doubt.
    pub(super) fn knows(&self) -> bool {
        self.writing.is_none() && self.doubt.is_none()
    }

    /// What others say may be an acknowledgement of a promise, a promise, or a word to go on by.
    pub(super) fn hear_word(&mut self) {
        let Some(state) = &self.state else {
            return;
        };
        let mut pact = std::mem::take(&mut self.pact);
        let heard = self.newest();
        let own = self.own(state, &heard);
        pact.acknowledged(own.me, &heard, |seq| self.lease.sent_at(seq));
        let (by, until) = if self.knows() {
            (pact.goes_on_by(own, self.seq), pact.pledged(own))
        } else {
            (None, None)
        };
        self.pact = pact;
        if let Some(seq) = by {
            self.lease.vouched(seq);
        }
        if let Some(until) = until {
            self.lease.promised(until);
        }
    }

    /// That life is over for certain, by this proof, or as its next life has begun.
    pub(super) fn is_over(
        &mut self,
        now: Millis,
        life: (HostId, Incarnation),
        proof: Option<Proof>,
        actions: &mut Vec<Action>,
    ) {
        let mut pact = std::mem::take(&mut self.pact);
        let heard = self.newest();
        let state = self.state.as_ref().filter(|_| self.knows());
        let own = state.map(|state| self.own(state, &heard));
        if pact.is_over(life, proof, own, now) {
            let name = state.map_or_else(String::new, |state| state.value.name(life.0));
            actions.push(Action::Alert(format!(
                "{name} has died while neither of two hosts reached the registry: this host goes on alone. The VMs of {name} stay down until the registry is back"
            )));
        }
        self.pact = pact;
    }

    /// Before a report is sent: does it promise?
    pub(super) fn promise(&mut self, now: Millis, actions: &mut Vec<Action>) {
        self.pact.promise_nothing();
        let timing = &self.config.timing;
        let stopped = matches!(self.phase, Phase::Stopping { .. } | Phase::Stopped { .. });
        let lost = now.since(self.registry_at) >= timing.registry_lost();
        if !lost && self.phase == Phase::Member && !self.pact.binds_of_two() && !self.remembering {
            // What a life promised that joined anew, or has the registry back, binds nobody.
            if self.remembered.take().is_some() {
                actions.push(Action::Forget);
            }
        }
        let promises = self.knows() && (lost || stopped);
        let Some(state) = self.state.as_ref().filter(|_| promises) else {
            return;
        };
        let mut pact = std::mem::take(&mut self.pact);
        let heard = self.newest();
        let own = self.own(state, &heard);
        let written = self.remembered == Some(self.config.incarnation);
        if own.other_of_two().is_none() || written {
            pact.promise(own, now, stopped, |seq| self.lease.sent_at(seq));
        } else if !self.remembering && !stopped {
            self.remembering = true;
            actions.push(Action::Remember(self.config.incarnation));
        }
        self.pact = pact;
    }

    /// Of two hosts without a registry: whether to switch the other off.
    pub(super) fn race(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let timing = self.config.timing;
        let heard = self.newest();
        let own = self.state.as_ref().map(|state| self.own(state, &heard));
        let other = own.and_then(|own| own.other_of_two().map(|other| (own, other)));
        let Some((own, (other, life))) = other else {
            return self.race.ends();
        };
        let known = heard.get(&other).map(|report| report.incarnation);
        if known.is_some_and(|known| known > life) {
            // It does not act before it has joined, and then says what this life promised.
            let tells = heard.get(&other).is_some_and(|next| next.registry.former);
            if tells && !self.pact.is_known_over(other, life) {
                self.is_over(now, (other, life), None, actions);
            }
            return self.race.ends();
        }
        let registry = now.since(self.registry_at) < timing.network_lost;
        let pledged = self.pact.pledged(own).is_some_and(|until| now < until);
        let serves = pledged || self.pact.binds_of_two() && registry;
        let silent = own.state.value.is_in(other, life)
            && self.contacts.may_judge(now)
            && !self.contacts.is_heard(other, life, now);
        let able = self.phase == Phase::Member && self.lease.holds(now);
        let over = self.pact.is_known_over(other, life);
        if !serves || !silent || !able || over {
            return self.race.ends();
        }
        let mine = self.report(now);
        let side = Side {
            registry,
            gateway: mine.reaches_gateway(timing.network_lost),
            better: heard
                .get(&other)
                .is_none_or(|theirs| mine.matters_more_than(theirs)),
        };
        if self.race.shoots(now, side.waits(timing.race_step())) {
            actions.push(Action::Fence {
                host: other,
                incarnation: life,
            });
        }
    }

    /// Nothing runs here; and nobody goes on by a promise that this life is there to keep.
    pub(super) fn may_say_farewell(&self) -> bool {
        let stopped = matches!(self.phase, Phase::Stopped { .. });
        stopped && !self.pact.binds_of_two()
    }

    /// A host that promised and is heard by no majority stops for good.
    pub(super) fn keep_promise(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let lives = matches!(self.phase, Phase::Joining | Phase::Member);
        let looks = lives || self.pact.binds_of_two();
        if looks && !self.pact.is_kept(&self.config.timing, now) && lives {
            let why = format!(
                "without the registry this host promised to give nobody up, and for {} no majority of the pool has heard it: the others may go on without it",
                self.config.timing.lease
            );
            self.stop(why, actions);
        }
    }

    /// Whether this host may give others up, and admit who joined.
    #[must_use]
    pub fn may_give_up(&self) -> bool {
        self.is_seen() && !self.pact.binds() || sabotaged(Bug::JoinerDecides)
    }

    /// Whether it votes, a voter has seen it join, or no voters are left that could, as the state
    /// shows or a person has said.
    pub(super) fn is_seen(&self) -> bool {
        let (me, life) = (self.config.me, self.config.incarnation);
        let seen = |state: &Versioned<PoolState>| {
            let over = |host, life| self.pact.is_declared(host, life);
            let state = &state.value;
            self.seen || state.is_voter(me, life) || state.is_orphaned_without(over)
        };
        self.state.as_ref().is_some_and(seen)
    }
}
