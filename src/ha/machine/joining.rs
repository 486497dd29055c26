//! Becoming a member, and being none any more.

use super::{Action, Machine, Phase};
use crate::ha::deciding;
use crate::ha::liveset::{Verdict, judge};
use crate::ha::sabotage::{Bug, sabotaged};
use crate::ha::state::{Member, PoolState, Proof, Standing};
use crate::ha::time::Millis;
use crate::pool::HostId;

impl Machine {
    pub(super) fn found_pool(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if self.phase != Phase::Joining || self.writing.is_some() {
            return;
        }
        let mut state = PoolState::default();
        self.enter(&mut state);
        state.admit(|_, _| true);
        deciding::take_over(&mut state, &self.config, "it is the pool's first host");
        self.write(now, state, actions);
    }

    /// Ask to be a member, unless the members would give this host up at once.
    pub(super) fn join(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if self.phase != Phase::Joining || self.writing.is_some() {
            return;
        }
        let Some(state) = &self.state else {
            return;
        };
        let mut next = state.value.clone();
        let known = next.members.get(&self.config.me);
        if known.is_some_and(|known| known.incarnation >= self.config.incarnation) {
            // A later life of this very host, or this one, is out: nothing to join by.
            return;
        }
        if let Some(life) = self
            .remembered
            .filter(|_| !sabotaged(Bug::PromiseForgotten))
        {
            next.unbind_other_of_two((self.config.me, life), state.version);
        }
        self.enter(&mut next);
        let own = self.report(now);
        let verdicts = judge(
            &self.config.timing,
            &next,
            &self.reports(&own, now),
            &self.contacts.report_ages(now),
        );
        let stays = verdicts.get(&self.config.me) == Some(&Verdict::Stays);
        let listens = !self.contacts.may_judge(now);
        if !stays || listens || self.is_before_me(&state.value, now) {
            return;
        }
        if self.is_stranded(now) {
            if !std::mem::replace(&mut self.told_stranded, true) {
                actions.push(Action::Alert(format!(
                    "no member of the pool says that it hears this host, and they would give it up again: it joins once one does, or after {}; look at its networks",
                    self.config.timing.stranded()
                )));
            }
            return;
        }
        if next.is_orphaned() {
            next.admit(|_, _| true);
        }
        self.write(now, next, actions);
    }

    /// Whether members would give this host up as soon as it has joined: there are some, none says
    /// that it hears this life, and one of them gave up its former one, or it is new.
    fn is_stranded(&self, now: Millis) -> bool {
        let Some(state) = &self.state else {
            return false;
        };
        let me = self.config.me;
        let former = state.value.members.get(&me);
        let given_up = former
            .is_none_or(|former| matches!(former.standing, Standing::Ousted | Standing::Dead(_)));
        if !given_up || now.since(self.born) >= self.config.timing.stranded() {
            return false;
        }
        let newest = |host| self.contacts.get(host).map(|contact| &contact.report);
        let others = state.value.members_in().filter(|(host, member)| {
            let known = newest(*host).map(|report| report.incarnation);
            *host != me && known.is_none_or(|known| known <= member.incarnation)
        });
        let hears_me = |host: HostId, life| {
            let heard = newest(host).filter(|report| report.incarnation == life);
            let heard = heard.and_then(|report| report.heard.get(&me));
            heard.is_some_and(|heard| heard.incarnation == self.config.incarnation)
                && self.contacts.is_heard(host, life, now)
        };
        let mut heard = others.map(|(host, member)| hears_me(host, member.incarnation));
        heard
            .next()
            .is_some_and(|first| !first && !heard.any(|heard| heard))
    }

    /// Whether a host of a lower number is about to join as well: of many that begin together one
    /// wins each write, so they go one after the other. One that does not read the registry is
    /// not waited for.
    pub(super) fn is_before_me(&self, state: &PoolState, now: Millis) -> bool {
        self.contacts.iter().any(|(host, contact)| {
            let report = &contact.report;
            let age = report.registry.age;
            host < self.config.me
                && !report.farewell
                && state.standing(host, report.incarnation).is_none()
                && self.contacts.is_heard(host, report.incarnation, now)
                && age.is_some_and(|age| age < self.config.timing.network_lost)
        })
    }

    /// Nothing runs here any more: say so where it counts, in case nobody else is left to.
    pub(super) fn leave(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let Some(state) = &self.state else {
            return;
        };
        if !self.may_say_farewell() || self.writing.is_some() {
            return;
        }
        let (me, life) = (self.config.me, self.config.incarnation);
        let (standing, what) = match state.value.standing(me, life) {
            Some(Standing::In) => (Standing::Away, "away"),
            Some(Standing::Ousted) => (Standing::Dead(Proof::Farewell), "dead"),
            _ => return,
        };
        let mut next = state.value.clone();
        next.become_standing(me, standing);
        next.decide(me, me, what, &Proof::Farewell.to_string());
        self.write(now, next, actions);
    }

    pub(super) fn enter(&self, state: &mut PoolState) {
        let config = &self.config;
        let before = state.members.get(&config.me);
        let former = before.and_then(|before| match before.standing {
            Standing::In | Standing::Ousted => Some((before.incarnation, Proof::Farewell)),
            Standing::Dead(proof) => Some((before.incarnation, proof)),
            Standing::Away => before.former,
        });
        let member = Member {
            name: config.name.clone(),
            incarnation: config.incarnation,
            standing: Standing::In,
            former,
            watchdog: config.watchdog,
            unbound: None,
        };
        state.members.insert(config.me, member);
        let cause = "it began a new life, in which nothing of a former one runs";
        state.decide(config.me, config.me, "joined", cause);
    }
}
