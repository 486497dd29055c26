//! One host's part in the pool: reports, reads, holds its lease, decides when it coordinates.
//!
//! ```text
//!            a read or a won write           no lease, or ousted        all VMs stopped
//!  Joining ------------------------> Member ---------------------> Stopping ----------> Stopped
//!                shows it In                                                   says farewell |
//!                                                              the state shows it out: Over v
//! ```
//!
//! The caller does what [`Action`] says and hands back what came of it as [`Input`]; at most
//! one read and one write are under way. A machine lives one incarnation: after
//! [`Action::Over`] the next one begins with nothing running.
//!
//! Besides own reads and vouches ([`super::lease`]) there is a third way to a lease, for a
//! pool that lost its registry whole: the word of the other voters ([`super::pact`]).
//!
//! Must never: earn a lease from when an answer came, decide by a state it read before it
//! stood still, restart anything before the proof is committed.

use super::deciding::{self, Oustings};
use super::detector::{Contacts, PathVerdict};
use super::lease::Lease;
use super::pact::Pact;
use super::race::Race;
use super::report::{IN_DOUBT, Path, RegistryView, Report};
use super::sabotage::{Bug, sabotaged};
use super::state::{PoolState, Proof, Standing};
use super::time::Millis;
use crate::pool::{HostId, Incarnation, Seq};
use crate::registry::Versioned;
use std::collections::{BTreeMap, BTreeSet};

mod going_on;
mod io;
mod joining;
pub use io::{Action, Config, Input, Local, Phase, WriteOutcome};

/// The newest report of each host.
type NewestHeard = BTreeMap<HostId, (Incarnation, Seq)>;

/// The machine.
#[derive(Clone, Debug)]
pub struct Machine {
    config: Config,
    phase: Phase,
    contacts: Contacts,
    lease: Lease,
    seq: Seq,
    local: Local,
    /// The read under way: when it began, and whom this host had heard then.
    reading: Option<(Millis, NewestHeard)>,
    /// When the newest successful read began. Forgotten after a stall.
    read_at: Option<Millis>,
    vouches: NewestHeard,
    state: Option<Versioned<PoolState>>,
    /// The write under way: when it began, and what.
    writing: Option<(Millis, PoolState)>,
    /// A write whose fate is unknown: the version that it expected.
    doubt: Option<u64>,
    pact: Pact,
    race: Race,
    /// The life of this host that is written down to have promised as one of two.
    remembered: Option<Incarnation>,
    /// Whether [`Action::Remember`] is under way.
    remembering: bool,
    /// The first version that showed this life as a member.
    joined_at: Option<u64>,
    /// When this life began.
    born: Millis,
    /// Somebody was told that no member hears it.
    told_stranded: bool,
    /// Whether a voter has seen it join.
    seen: bool,
    /// When the newest successful read began, or this life did, or a stall ended.
    registry_at: Millis,
    oustings: Oustings,
    told_restart: BTreeSet<(HostId, Incarnation)>,
    over: bool,
}

impl Machine {
    /// A life begins.
    #[must_use]
    pub fn new(config: Config, now: Millis) -> Self {
        Self {
            contacts: Contacts::new(config.timing, now),
            lease: Lease::new(config.timing.lease),
            remembered: config.promised,
            remembering: false,
            config,
            phase: Phase::Joining,
            seq: Seq(0),
            local: Local::default(),
            reading: None,
            read_at: None,
            vouches: BTreeMap::new(),
            state: None,
            writing: None,
            doubt: None,
            pact: Pact::default(),
            race: Race::default(),
            joined_at: None,
            born: now,
            told_stranded: false,
            seen: false,
            registry_at: now,
            oustings: Oustings::default(),
            told_restart: BTreeSet::new(),
            over: false,
        }
    }

    /// Where this host is in its life.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// When its lease ends.
    #[must_use]
    pub fn lease_until(&self) -> Option<Millis> {
        self.lease.until()
    }

    /// The newest pool state that it has seen.
    #[must_use]
    pub fn state(&self) -> Option<&Versioned<PoolState>> {
        self.state.as_ref()
    }

    /// The newest report of another host, however old.
    #[must_use]
    pub fn report_of(&self, host: HostId) -> Option<&Report> {
        self.contacts.get(host).map(|contact| &contact.report)
    }

    /// Age of the newest successful read of the registry, from its begin.
    #[must_use]
    pub fn read_age(&self, now: Millis) -> Option<Millis> {
        self.read_at.map(|at| now.since(at))
    }

    /// How each path to each other host stands, with the age of what came last.
    #[must_use]
    pub fn paths(&self, now: Millis) -> BTreeMap<HostId, Vec<(Path, PathVerdict, Millis)>> {
        let paths = |host: HostId, contact: &super::detector::Contact| {
            let paths = contact.paths.iter();
            paths
                .map(|(path, last)| {
                    let verdict = self.contacts.path(host, *path, now);
                    (*path, verdict, now.since(*last))
                })
                .collect()
        };
        self.contacts
            .iter()
            .map(|(host, contact)| (host, paths(host, contact)))
            .collect()
    }

    /// Something happened at `now`; what is to be done, in this order.
    pub fn handle(&mut self, now: Millis, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        self.keep_promise(now, &mut actions);
        match input {
            Input::Tick => self.tick(now, &mut actions),
            Input::Heard { path, report } => self.heard(now, path, report),
            Input::Local(local) => self.local = local,
            Input::Read(result) => self.read(now, result, &mut actions),
            Input::Written(outcome) => self.written(now, outcome, &mut actions),
            Input::Fenced {
                host,
                incarnation,
                confirmed,
            } => {
                let confirmed = confirmed || sabotaged(Bug::FenceUnconfirmed);
                self.oustings.fenced(now, host, incarnation, confirmed);
                self.race.fenced(now);
                if confirmed {
                    let proof = Some(Proof::PowerOff);
                    self.is_over(now, (host, incarnation), proof, &mut actions);
                }
                self.decide(now, &mut actions);
            }
            Input::Declared { host, incarnation } => {
                let proof = Some(Proof::Declared);
                self.is_over(now, (host, incarnation), proof, &mut actions);
                self.oustings.proved((host, incarnation), Proof::Declared);
                self.decide(now, &mut actions);
            }
            Input::Remembered(done) => {
                self.remembering = false;
                if done {
                    self.remembered = Some(self.config.incarnation);
                }
            }
            Input::Stopped => {
                if let Phase::Stopping { why } = &self.phase {
                    self.phase = Phase::Stopped { why: why.clone() };
                }
                // That it is out it may have read while it stopped.
                self.end(&mut actions);
            }
            Input::Leave { why } => {
                if matches!(self.phase, Phase::Joining | Phase::Member) {
                    self.stop(why, &mut actions);
                }
            }
        }
        actions
    }

    fn tick(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if let Some(stood) = self.contacts.tick(now) {
            self.read_at = None;
            // It was not asked meanwhile, so it is not lost.
            self.registry_at = now;
            actions.push(Action::Alert(format!(
                "this host stood still for {stood}; it listens before it judges any other"
            )));
        }
        if self.phase == Phase::Member && !self.lease.holds(now) {
            let why = format!(
                "for {} neither the registry nor any other host has said that this host is a member",
                self.config.timing.lease
            );
            self.stop(why, actions);
        }
        self.seq.0 += 1;
        self.lease.sent(self.seq, now);
        self.hear_word();
        self.promise(now, actions);
        actions.push(Action::Publish(self.report(now)));
        if self.reading.is_none() && self.writing.is_none() {
            self.reading = Some((now, self.contacts.newest()));
            actions.push(Action::Read);
        }
        self.decide(now, actions);
        self.race(now, actions);
        if self.phase == Phase::Member
            && let Some(until) = self.lease.until()
        {
            actions.push(Action::PetUntil(until));
        }
    }

    fn report(&self, now: Millis) -> Report {
        let doubt = self.writing.is_some() || self.doubt.is_some();
        Report {
            host: self.config.me,
            incarnation: self.config.incarnation,
            seq: self.seq,
            heard: self.contacts.told(now),
            gateway_age: self.local.gateway_age,
            registry: RegistryView {
                age: self.read_at.map(|at| now.since(at)),
                version: match &self.state {
                    _ if doubt => IN_DOUBT,
                    Some(state) if self.pact.hides(state.version) => IN_DOUBT,
                    Some(state) => state.version,
                    None => IN_DOUBT,
                },
                vouches: self.vouches.clone(),
                promise: self.pact.promises(),
                promised: self
                    .state
                    .as_ref()
                    .map(|state| self.pact.promised(state))
                    .unwrap_or_default(),
                former: self
                    .remembered
                    .is_some_and(|life| life < self.config.incarnation)
                    && !sabotaged(Bug::PromiseForgotten),
            },
            storage_ok: self.local.storage_ok,
            standby_lag: self.local.standby_lag,
            weight: self.local.weight,
            watchdog: self.config.watchdog,
            farewell: self.may_say_farewell()
                || (sabotaged(Bug::FarewellTooSoon)
                    && matches!(self.phase, Phase::Stopping { .. })),
        }
    }

    fn heard(&mut self, now: Millis, path: Path, report: Report) {
        let (me, incarnation) = (self.config.me, self.config.incarnation);
        if report.host == me {
            return;
        }
        if let Some((life, seq)) = report.registry.vouches.get(&me)
            && *life == incarnation
        {
            self.lease.vouched(*seq);
        }
        let lease = &self.lease;
        self.pact
            .heard((me, incarnation), &self.config.timing, &report, |seq| {
                lease.sent_at(seq)
            });
        self.be_seen(&report);
        // The same again over another path says nothing new.
        if self.contacts.heard(now, path, report) {
            self.hear_word();
        }
    }

    fn read(
        &mut self,
        now: Millis,
        result: Result<Option<Versioned<PoolState>>, String>,
        actions: &mut Vec<Action>,
    ) {
        let Some((began, heard)) = self.reading.take() else {
            return;
        };
        let Ok(found) = result else {
            return;
        };
        // A machine that stood still meanwhile goes by the next read.
        self.registry_at = self.registry_at.max(began);
        if self.contacts.listens_since(began) {
            self.read_at = self.read_at.max(Some(began));
        }
        match found {
            Some(found) => {
                self.vouches = heard
                    .into_iter()
                    .filter(|(host, (life, _))| found.value.is_in(*host, *life))
                    .collect();
                if self.doubt.is_some_and(|expected| found.version > expected) {
                    self.doubt = None;
                }
                let is_in = found.value.is_in(self.config.me, self.config.incarnation);
                self.adopt(now, found, actions);
                if is_in {
                    self.lease.own_read(began);
                    self.become_member(actions);
                } else {
                    self.join(now, actions);
                }
                self.leave(now, actions);
            }
            None => self.found_pool(now, actions),
        }
        self.decide(now, actions);
    }

    /// The watchdog is armed before anything may run.
    fn become_member(&mut self, actions: &mut Vec<Action>) {
        if self.phase == Phase::Joining
            && let Some(until) = self.lease.until()
        {
            self.phase = Phase::Member;
            if !sabotaged(Bug::WatchdogArmedLate) {
                actions.push(Action::PetUntil(until));
            }
        }
    }

    /// Take over a state that is committed.
    fn adopt(&mut self, now: Millis, found: Versioned<PoolState>, actions: &mut Vec<Action>) {
        if self
            .state
            .as_ref()
            .is_some_and(|known| known.version >= found.version)
        {
            return;
        }
        let (me, life) = (self.config.me, self.config.incarnation);
        self.curb(now, actions);
        self.oustings.follow(now, &found.value, &self.pact.proofs());
        self.pact.follow((me, life), &found.value);
        match found.value.standing(me, life) {
            None => {}
            Some(Standing::In) => {
                self.joined_at.get_or_insert(found.version);
            }
            Some(_) => {
                self.lease.revoke();
                let newest = found.value.decisions.iter().rev();
                let cause = newest
                    .filter(|decision| decision.about == me)
                    .map(|decision| decision.cause.as_str())
                    .next()
                    .unwrap_or("no cause is kept");
                let why = format!("the pool has given this host up: {cause}");
                if matches!(self.phase, Phase::Joining | Phase::Member) {
                    self.stop(why, actions);
                }
            }
        }
        self.state = Some(found);
        self.end(actions);
    }

    /// Nothing runs, and the state shows this life over: the next one may begin.
    fn end(&mut self, actions: &mut Vec<Action>) {
        let (me, life) = (self.config.me, self.config.incarnation);
        let standing = self.state.as_ref().map(|s| s.value.standing(me, life));
        let ended = matches!(standing, Some(Some(Standing::Dead(_) | Standing::Away)));
        if ended && matches!(self.phase, Phase::Stopped { .. }) && !self.over {
            self.over = true;
            actions.push(Action::Over);
        }
    }

    fn stop(&mut self, why: String, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopping { why: why.clone() };
        actions.push(Action::StopVms { why });
    }

    /// Others may give this host up again, from what is done next on.
    fn curb(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if sabotaged(Bug::LongLease) {
            return;
        }
        if let Some(until) = self.lease.curb(now)
            && self.phase == Phase::Member
        {
            actions.push(Action::PetUntil(until));
        }
    }

    fn write(&mut self, now: Millis, state: PoolState, actions: &mut Vec<Action>) {
        let expected = self.state.as_ref().map(|state| state.version);
        self.curb(now, actions);
        self.writing = Some((now, state.clone()));
        actions.push(Action::Write { expected, state });
    }

    fn written(&mut self, now: Millis, outcome: WriteOutcome, actions: &mut Vec<Action>) {
        let Some((began, value)) = self.writing.take() else {
            return;
        };
        match outcome {
            WriteOutcome::Won { version } => {
                let is_in = value.is_in(self.config.me, self.config.incarnation);
                self.adopt(now, Versioned { version, value }, actions);
                if is_in {
                    // At its commit, later than its begin, this host was a member.
                    self.lease.own_read(began);
                    self.become_member(actions);
                }
                self.decide(now, actions);
            }
            WriteOutcome::Lost => {}
            WriteOutcome::Unknown => {
                self.doubt = Some(self.state.as_ref().map_or(0, |state| state.version));
            }
        }
    }

    /// Reports of all that are heard, and the own one.
    fn reports<'a>(&'a self, own: &'a Report, now: Millis) -> BTreeMap<HostId, &'a Report> {
        let heard = self.contacts.iter().filter(|(host, contact)| {
            self.contacts
                .is_heard(*host, contact.report.incarnation, now)
        });
        let heard = heard.map(|(host, contact)| (host, &contact.report));
        heard.chain([(self.config.me, own)]).collect()
    }

    fn decide(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let timing = &self.config.timing;
        let fresh = self
            .read_at
            .is_some_and(|at| now.since(at) < timing.network_lost);
        let able = self.phase == Phase::Member
            && self.lease.holds(now)
            && self.writing.is_none()
            && self.doubt.is_none()
            && fresh
            && self.contacts.may_judge(now);
        let Some(state) = self.state.as_ref().filter(|_| able) else {
            return;
        };
        let mut oustings = std::mem::take(&mut self.oustings);
        let own = self.report(now);
        let reports = self.reports(&own, now);
        let view = deciding::View {
            now,
            config: &self.config,
            state: &state.value,
            reports: &reports,
            ages: self.contacts.report_ages(now),
            contacts: &self.contacts,
            may_give_up: self.may_give_up(),
            is_seen: self.is_seen(),
        };
        let decided = deciding::decide(&view, &mut oustings);
        self.oustings = oustings;
        if let Some(next) = decided.write {
            self.write(now, next, actions);
            return;
        }
        for (host, incarnation) in decided.fence {
            actions.push(Action::Fence { host, incarnation });
        }
        actions.extend(decided.alerts.into_iter().map(Action::Alert));
        for (host, incarnation, proof) in decided.may_restart {
            if self.told_restart.insert((host, incarnation)) {
                actions.push(Action::MayRestart {
                    host,
                    incarnation,
                    proof,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
