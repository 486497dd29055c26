//! Going on when the registry is lost whole: the word of the others, and promises.
//!
//! The **voters** of a pool state are those by whose majority the pool goes on without the
//! registry. Who joins may give members up once a voter has seen it join, in a report, and is
//! made a voter with the next write of one that may ([`PoolState::admit`]).
//!
//! A host H that is in at version V goes on without the registry by a report s of its own if of
//! **every other life D that may act** at V ([`PoolState::may_act`]) it knows that D gives H up
//! after s was sent, if ever:
//!
//! - **D's own word**: D has heard s, knows no newer version than V, and has no write under way
//!   or in doubt. Whatever D writes, it writes later.
//! - **a majority's word for a silent D**: a majority of the voters, each at version V, has heard
//!   s, and the newest that each has heard of D is a **promise** at V.
//!
//! So a pool that lost its registry survives the death of hosts as long as a majority of the
//! voters lives.
//!
//! # Promises
//! A member that has not read the registry for [`Timing::registry_lost`] promises, in each report,
//! with no write under way or in doubt: for [`Timing::promise`] (P) from now, by its clock, it
//! gives nobody up, admits nobody, and does not say that it knows a newer version. While any
//! promise binds it, the newest report of its own that a majority of the voters has heard must
//! have been sent less than one lease (L, shorter than P) ago; else it stops, for good in this
//! life, also if the registry is back.
//!
//! # Why a majority's word is enough
//! Let H go on by report s, and by the word of a majority M for D. Each of M said so after s was
//! sent. Let q be the newest promise of D that any of M had heard. Suppose D gives H up, admits
//! somebody, or says that it knows a newer version, at C before s was sent. At q it knew no newer
//! version than V and had nothing under way, and the promise binds it for P: C is later than
//! q + P. By then D had stopped for good, at q + L, unless a majority had acknowledged a report
//! later than q before C. Any two majorities share a voter, and that one, when it spoke for M
//! after C, had heard of D something newer than q. That is a contradiction, so C is later than s,
//! and the argument of the lease holds.
//!
//! One that joined after V gives H up only after a voter of V said that it knows a newer version,
//! or wrote one; both are later than s. The exception is a pool whose voters' lives are over, but
//! for a minority ([`PoolState::is_orphaned`]): then any member may decide, and the next write
//! makes the members the voters. H, at a V that was not orphaned, needs the word of one whose life
//! is over by then, so it goes on by no report that was sent later. That a life is over may be
//! known by its farewell, so who said farewell has no word for itself or others; its promise
//! lasts.
//!
//! # Of two
//! Of two voters one is no majority. Where nobody else may act and hosts can be switched off, the
//! two promise otherwise: for [`Timing::promise_of_two`] (P2) from now to give the other up only
//! once its power is off for certain, to admit nobody, to say neither farewell nor a newer
//! version. Nobody stops for that. H counts P2 from when it sent the newest report that D had
//! heard when it promised: D promised later. Until then D does not give H up, so H goes on for
//! one lease more; see [`Lease::promised`](super::lease::Lease::promised).
//!
//! If D falls silent H switches it off ([`super::race`]). If that is confirmed before P2 is over,
//! or D's next life is heard, D never gave H up and never will: H has **outlived** D, and goes on.
//!
//! Then H has no lease that others could wait out. Who may act meanwhile is D's next life alone,
//! for the pool is orphaned once that life has joined. So D writes down, before its first such
//! promise, that this life makes one ([`super::machine::Action::Remember`]), and its next life
//! says in its reports that its begin proves nothing yet. It joins with a write that says of H that it is
//! **unbound** ([`Member::unbound`](super::state::Member::unbound)): no watchdog bound proves
//! the death of H, until H has said that it knows a newer version. Once H knows one it goes by
//! that, and its lease is cut to what is usual ([`Lease::curb`](super::lease::Lease::curb)); so
//! it is before H writes one.
//!
//! Must never: promise with a write under way or in doubt, count a stopped lease anew after a
//! broken promise, outlive another whose power was confirmed off after P2.

use super::report::Report;
use super::sabotage::{Bug, sabotaged};
use super::state::{PoolState, Proof};
use super::time::Millis;
use super::timing::Timing;
use crate::pool::{HostId, Incarnation, Seq};
use crate::registry::Versioned;
use std::collections::{BTreeMap, BTreeSet};

/// The newest that was heard of one life of a host; kept when its next life is heard.
#[derive(Clone, Copy, Debug)]
struct Word {
    seq: Seq,
    version: u64,
    promise: bool,
}

/// What this host promised.
#[derive(Clone, Debug)]
struct Promise {
    version: u64,
    voters: BTreeMap<HostId, Incarnation>,
    until: Millis,
    /// When the newest own report was sent that a majority of the voters has heard.
    acknowledged: Millis,
    /// The other, if it is the promise of one of two.
    of_two: Option<(HostId, Incarnation)>,
}

/// A promise of the other of two, as it is certain here.
#[derive(Clone, Copy, Debug)]
struct Pledge {
    version: u64,
    until: Millis,
}

/// The promises of this host and of the others.
#[derive(Clone, Debug, Default)]
pub(super) struct Pact {
    words: BTreeMap<(HostId, Incarnation), Word>,
    promise: Option<Promise>,
    /// Whether the report of this tick promises.
    promises: bool,
    pledges: BTreeMap<(HostId, Incarnation), Pledge>,
    /// Lives that are over for certain, and by what, if not by their next life.
    over: BTreeMap<(HostId, Incarnation), Option<Proof>>,
    /// The version at which this host has outlived the other of two, and which.
    outlived: Option<(u64, HostId, Incarnation)>,
}

/// This host, and what it knows for certain.
#[derive(Clone, Copy)]
pub(super) struct Own<'a> {
    pub(super) me: (HostId, Incarnation),
    pub(super) timing: &'a Timing,
    /// Whether hosts can be switched off.
    pub(super) power_fencing: bool,
    pub(super) state: &'a Versioned<PoolState>,
    /// The newest report of each other host.
    pub(super) heard: &'a BTreeMap<HostId, &'a Report>,
}

impl Own<'_> {
    /// The newest report of that life, and which of this host's it has heard. One that has
    /// said farewell is believed to be over, wherever that is known, and has no word any more.
    fn says(&self, host: HostId, life: Incarnation) -> Option<(&Report, Seq)> {
        let report = self.heard.get(&host).filter(|r| r.incarnation == life)?;
        let heard = report.heard.get(&self.me.0)?;
        let speaks = !report.farewell || sabotaged(Bug::WordAfterFarewell);
        (speaks && heard.incarnation == self.me.1).then_some((*report, heard.seq))
    }

    /// All others that may act.
    fn others(&self) -> impl Iterator<Item = (HostId, Incarnation)> {
        let lives = self.state.value.may_act();
        lives.filter(|(host, _)| *host != self.me.0)
    }

    fn voters(&self) -> impl Iterator<Item = (HostId, Incarnation)> {
        let voters = self.state.value.voters.iter().map(|(h, l)| (*h, *l));
        voters.filter(|(host, _)| *host != self.me.0)
    }

    fn is_voter(&self) -> bool {
        self.state.value.is_voter(self.me.0, self.me.1)
    }

    /// The other of two: both vote, nobody else may act, and hosts can be switched off.
    pub(super) fn other_of_two(&self) -> Option<(HostId, Incarnation)> {
        let state = &self.state.value;
        let mut others = self.others();
        let (other, life) = others.next()?;
        let two = others.next().is_none() && state.voters.len() == 2;
        let vote = self.is_voter() && state.is_voter(other, life);
        let is_in = state.is_in(self.me.0, self.me.1);
        (self.power_fencing && two && vote && is_in).then_some((other, life))
    }
}

/// The largest number that a majority of the voters reaches, of those that `numbers` are of and,
/// if `mine`, of this host, which reaches any.
fn majority(state: &PoolState, mine: bool, mut numbers: Vec<Seq>) -> Option<Seq> {
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mine = usize::from(mine);
    if state.is_quorum(mine) {
        return Some(Seq(u64::MAX));
    }
    let needed = (1..=numbers.len()).find(|n| state.is_quorum(n + mine))?;
    numbers.get(needed - 1).copied()
}

impl Pact {
    /// A report came; the newest of its life or not.
    pub(super) fn heard(
        &mut self,
        me: (HostId, Incarnation),
        timing: &Timing,
        report: &Report,
        sent: impl Fn(Seq) -> Option<Millis>,
    ) {
        let life = (report.host, report.incarnation);
        let heard = report.heard.get(&me.0).filter(|h| h.incarnation == me.1);
        if report.registry.promise
            && let Some(at) = heard.and_then(|heard| sent(heard.seq))
        {
            let (version, length) = (report.registry.version, timing.promise_of_two());
            let until = at + timing.at_least(length);
            let pledge = self
                .pledges
                .entry(life)
                .or_insert(Pledge { version, until });
            if pledge.version != version {
                *pledge = Pledge { version, until };
            }
            pledge.until = pledge.until.max(until);
        }
        let word = Word {
            seq: report.seq,
            version: report.registry.version,
            promise: report.registry.promise,
        };
        let known = self.words.entry(life).or_insert(word);
        if word.seq > known.seq {
            *known = word;
        }
    }

    /// A committed state: lives that are neither voters nor the newest that is heard are
    /// forgotten, so that at most two of each host are kept.
    pub(super) fn follow(&mut self, me: (HostId, Incarnation), state: &PoolState) {
        // Only the other of two could give this host up, and knows so.
        if self.binds_of_two() && !state.is_in(me.0, me.1) {
            self.promise = None;
        }
        let newest: BTreeMap<HostId, Incarnation> = self.words.keys().copied().collect();
        self.words
            .retain(|(host, life), _| state.is_voter(*host, *life) || newest[host] == *life);
        self.pledges
            .retain(|(host, life), _| state.is_voter(*host, *life));
        self.over
            .retain(|(host, life), _| state.standing(*host, *life).is_some());
    }

    /// Until when the other of two, at the version of this host, does not give it up, for certain.
    pub(super) fn pledged(&self, own: Own<'_>) -> Option<Millis> {
        let pledge = self.pledges.get(&own.other_of_two()?)?;
        (pledge.version == own.state.version).then_some(pledge.until)
    }

    /// That life of a host is over for certain, by this proof, or as its next life has begun.
    /// `own` is `None` with no state, or with a write under way or in doubt. Whether this host has
    /// outlived it.
    pub(super) fn is_over(
        &mut self,
        (host, life): (HostId, Incarnation),
        proof: Option<Proof>,
        own: Option<Own<'_>>,
        now: Millis,
    ) -> bool {
        let known = self.over.entry((host, life)).or_default();
        *known = known.or(proof);
        let promised = self.promise.as_ref().and_then(|promise| promise.of_two);
        if promised == Some((host, life)) {
            self.promise = None;
        }
        let Some(own) = own.filter(|own| own.other_of_two() == Some((host, life))) else {
            return false;
        };
        let in_time = self.pledged(own).is_some_and(|until| now < until);
        let outlives = in_time || sabotaged(Bug::OutlivesTooLate);
        if outlives {
            self.outlived = Some((own.state.version, host, life));
        }
        outlives
    }

    /// Whether that life is over for certain.
    pub(super) fn is_known_over(&self, host: HostId, life: Incarnation) -> bool {
        self.over.contains_key(&(host, life))
    }

    /// Whether a person has made certain that this life is over.
    pub(super) fn is_declared(&self, host: HostId, life: Incarnation) -> bool {
        self.over.get(&(host, life)) == Some(&Some(Proof::Declared))
    }

    /// Lives whose death can be proved, and by what.
    pub(super) fn proofs(&self) -> BTreeMap<(HostId, Incarnation), Proof> {
        let over = self.over.iter();
        over.filter_map(|(life, proof)| Some((*life, (*proof)?)))
            .collect()
    }

    /// Who may act and whose newest word here is a promise at the version of this host.
    pub(super) fn promised(&self, state: &Versioned<PoolState>) -> BTreeSet<HostId> {
        let lives = state.value.may_act();
        lives
            .filter(|(host, life)| self.has_promised(state.version, *host, *life))
            .map(|(host, _)| host)
            .collect()
    }

    fn has_promised(&self, version: u64, host: HostId, life: Incarnation) -> bool {
        let word = self.words.get(&(host, life));
        word.is_some_and(|word| word.promise && word.version == version)
    }

    /// The newest own report by which this host goes on without the registry; see the module.
    /// To be asked with no write under way or in doubt.
    pub(super) fn goes_on_by(&self, own: Own<'_>, newest: Seq) -> Option<Seq> {
        let Versioned { version, value } = own.state;
        if !value.is_in(own.me.0, own.me.1) || value.is_orphaned() {
            return None;
        }
        let mut by = newest;
        for (host, life) in own.others() {
            if self.outlived == Some((*version, host, life)) {
                continue;
            }
            let word = own.says(host, life);
            let word = word.filter(|(report, _)| report.registry.version <= *version);
            let word = word.map(|(_, seq)| seq);
            if word.is_some_and(|seq| seq >= by) {
                continue;
            }
            let for_it = own.voters().filter(|other| other.0 != host);
            let for_it = for_it.filter_map(|(other, life)| {
                let (report, seq) = own.says(other, life)?;
                let registry = &report.registry;
                let speaks = registry.version == *version && registry.promised.contains(&host);
                speaks.then_some(seq)
            });
            let mine = own.is_voter() && self.has_promised(*version, host, life);
            by = by.min(word.max(majority(value, mine, for_it.collect()))?);
        }
        Some(by)
    }

    /// Promise anew, in the report that is sent at `now`, or do not. `sent` tells when an own
    /// report was sent; `stays_stopped`: this host gives nobody up any more in this life.
    pub(super) fn promise(
        &mut self,
        own: Own<'_>,
        now: Millis,
        stays_stopped: bool,
        sent: impl Fn(Seq) -> Option<Millis>,
    ) {
        self.promises = false;
        let binds_elsewhere = self
            .promise
            .as_ref()
            .is_some_and(|promise| promise.version != own.state.version);
        let is_in = own.state.value.is_in(own.me.0, own.me.1);
        let of_two = own.other_of_two();
        // Of two voters neither is a majority: if none can be switched off promises serve nobody.
        let serves = own.state.value.voters.len() > 2 || of_two.is_some();
        if !is_in || !serves || binds_elsewhere {
            return;
        }
        if let Some(other) = of_two {
            // It says farewell once it is bound no more.
            if !stays_stopped && !self.over.contains_key(&other) {
                self.promise = Some(Promise {
                    version: own.state.version,
                    voters: own.state.value.voters.clone(),
                    until: now + own.timing.promise_of_two(),
                    acknowledged: now,
                    of_two,
                });
                self.promises = true;
            }
            return;
        }
        if self.promise.is_none() {
            self.promise = Some(Promise {
                version: own.state.version,
                voters: own.state.value.voters.clone(),
                until: now,
                acknowledged: Millis(0),
                of_two: None,
            });
            self.acknowledged(own.me, own.heard, &sent);
        }
        let Some(promise) = &mut self.promise else {
            return;
        };
        let kept = now < promise.acknowledged + own.timing.lease;
        if !kept && !stays_stopped {
            if promise.until <= now {
                self.promise = None;
            }
            return;
        }
        promise.until = now + own.timing.promise();
        self.promises = true;
    }

    /// No promise in the report that is sent next.
    pub(super) fn promise_nothing(&mut self) {
        self.promises = false;
    }

    /// Whether the report of this tick promises.
    pub(super) fn promises(&self) -> bool {
        self.promises
    }

    /// Somebody may have heard a newer report of this host.
    pub(super) fn acknowledged(
        &mut self,
        me: (HostId, Incarnation),
        heard: &BTreeMap<HostId, &Report>,
        sent: impl Fn(Seq) -> Option<Millis>,
    ) {
        let Some(promise) = &mut self.promise else {
            return;
        };
        let mut seqs: Vec<Seq> = promise
            .voters
            .iter()
            .filter(|(host, _)| **host != me.0)
            .filter_map(|(host, life)| {
                let report = heard.get(host).filter(|r| r.incarnation == *life)?;
                let heard = report.heard.get(&me.0)?;
                (heard.incarnation == me.1).then_some(heard.seq)
            })
            .collect();
        seqs.sort_unstable_by(|a, b| b.cmp(a));
        // So many others are a majority, with this host if it votes.
        let votes = promise.voters.get(&me.0) == Some(&me.1);
        let others = promise.voters.len() / 2 + usize::from(!votes);
        let newest = others.checked_sub(1).and_then(|n| seqs.get(n));
        if let Some(at) = newest.and_then(|seq| sent(*seq)) {
            promise.acknowledged = promise.acknowledged.max(at);
        }
    }

    /// Whether a promise was kept until `now`; one that binds no more is forgotten. To be asked
    /// before anything else is done.
    pub(super) fn is_kept(&mut self, timing: &Timing, now: Millis) -> bool {
        let Some(promise) = &self.promise else {
            return true;
        };
        let ends = promise.acknowledged + timing.lease;
        let stops = promise.of_two.is_none();
        if stops && now >= ends && ends < promise.until && !sabotaged(Bug::PromiseWithoutEnd) {
            return false;
        }
        if now >= promise.until {
            self.promise = None;
        }
        true
    }

    /// Whether a promise forbids to say that this version is known.
    pub(super) fn hides(&self, version: u64) -> bool {
        let promise = self.promise.as_ref();
        promise.is_some_and(|promise| promise.version < version)
    }

    /// Whether the promise of one of two binds this host.
    pub(super) fn binds_of_two(&self) -> bool {
        let promise = self.promise.as_ref();
        promise.is_some_and(|promise| promise.of_two.is_some())
    }

    /// Whether a promise binds this host.
    pub(super) fn binds(&self) -> bool {
        self.promise.is_some() && !sabotaged(Bug::PromiseBroken)
    }
}

#[cfg(test)]
mod tests;
