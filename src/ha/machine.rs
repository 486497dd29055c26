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
use super::liveset::{Verdict, judge};
use super::pact::{Own, Pact};
use super::report::{Path, RegistryView, Report};
use super::sabotage::{Bug, sabotaged};
use super::state::{Member, PoolState, Proof, Standing};
use super::time::Millis;
use super::timing::Timing;
use crate::pool::{HostId, HostName, Incarnation, Seq};
use crate::registry::Versioned;
use std::collections::{BTreeMap, BTreeSet};

/// The newest report of each host.
type NewestHeard = BTreeMap<HostId, (Incarnation, Seq)>;

/// Said of the state's version while a write of this host is under way or in doubt.
const IN_DOUBT: u64 = u64::MAX;

/// What a machine is told at its begin.
#[derive(Clone, Debug)]
pub struct Config {
    /// This host.
    pub me: HostId,
    /// Its name.
    pub name: HostName,
    /// This life of it, higher than all before; nothing of a former life runs any more.
    pub incarnation: Incarnation,
    /// The pool's times.
    pub timing: Timing,
    /// What this host's watchdog is armed with, if it has one that really resets it.
    pub watchdog: Option<Millis>,
    /// Whether hosts can be switched off by a fence agent.
    pub power_fencing: bool,
}

/// What this host sees of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Local {
    /// Age of the gateway's newest answer.
    pub gateway_age: Option<Millis>,
    /// Whether the storage of its VMs answers.
    pub storage_ok: bool,
    /// Largest replication lag of its standbys.
    pub standby_lag: Option<Millis>,
    /// Sum of its VMs' weights.
    pub weight: u32,
}

/// How a write of the pool state ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteOutcome {
    /// It is written.
    Won {
        /// The version it has.
        version: u64,
    },
    /// Another was faster, or nothing was written.
    Lost,
    /// It may be written, or may yet be.
    Unknown,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time went on; once a period.
    Tick,
    /// An authenticated report came.
    Heard {
        /// Over which path.
        path: Path,
        /// The report.
        report: Report,
    },
    /// What this host sees of itself, newly.
    Local(Local),
    /// The answer to [`Action::Read`]; `None` if there is no state yet, an error if the
    /// registry gave none.
    Read(Result<Option<Versioned<PoolState>>, String>),
    /// The answer to [`Action::Write`].
    Written(WriteOutcome),
    /// What became of [`Action::Fence`]. `confirmed` means that the agent, asked anew, said
    /// that the power is off; an agent's mere success is not that.
    Fenced {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
        /// Whether it is off for certain.
        confirmed: bool,
    },
    /// All VMs of this host are stopped, and no process of any is left.
    Stopped,
    /// This host is to leave the pool, in order.
    Leave {
        /// Why.
        why: String,
    },
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Send this over every path.
    Publish(Report),
    /// Read the pool state.
    Read,
    /// Compare-and-set the pool state.
    Write {
        /// The version it must be at.
        expected: Option<u64>,
        /// The value.
        state: PoolState,
    },
    /// Pet the watchdog until then and no longer.
    PetUntil(Millis),
    /// Switch that host's power off, and make certain of it.
    Fence {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// Stop all VMs by their isolation response and start none; then [`Input::Stopped`].
    StopVms {
        /// Why.
        why: String,
    },
    /// The VMs that this life of the host ran may be restarted elsewhere, each by a
    /// compare-and-set of its record. Said again after a change of coordinator.
    MayRestart {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
        /// Why it runs them no more.
        proof: Proof,
    },
    /// Somebody should look at this.
    Alert(String),
    /// This life is over; begin the next one.
    Over,
}

/// Where this host is in its life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Not a member yet.
    Joining,
    /// A member, with a lease.
    Member,
    /// Its VMs are being stopped.
    Stopping {
        /// Why.
        why: String,
    },
    /// Nothing runs, and nothing will.
    Stopped {
        /// Why.
        why: String,
    },
}

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
    /// The first version that showed this life as a member.
    joined_at: Option<u64>,
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
            joined_at: None,
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
                self.decide(now, &mut actions);
            }
            Input::Stopped => {
                if let Phase::Stopping { why } = &self.phase {
                    self.phase = Phase::Stopped { why: why.clone() };
                }
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
        self.promise(now);
        actions.push(Action::Publish(self.report(now)));
        if self.reading.is_none() && self.writing.is_none() {
            self.reading = Some((now, self.contacts.newest()));
            actions.push(Action::Read);
        }
        self.decide(now, actions);
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
            },
            storage_ok: self.local.storage_ok,
            standby_lag: self.local.standby_lag,
            weight: self.local.weight,
            watchdog: self.config.watchdog,
            farewell: matches!(self.phase, Phase::Stopped { .. })
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
        self.pact.heard(&report);
        self.be_seen(&report);
        // The same again over another path says nothing new.
        if self.contacts.heard(now, path, report) {
            self.hear_word();
        }
    }

    /// A voter says that it knows a state in which this host is a member; see [`super::pact`].
    fn be_seen(&mut self, report: &Report) {
        let (Some(state), Some(joined)) = (&self.state, self.joined_at) else {
            return;
        };
        let version = report.registry.version;
        self.seen |= state.value.is_voter(report.host, report.incarnation)
            && version >= joined
            && version != IN_DOUBT;
    }

    /// What others say may be an acknowledgement of a promise, or a word to go on by.
    fn hear_word(&mut self) {
        let Some(state) = &self.state else {
            return;
        };
        let newest = self.contacts.iter().map(|(host, c)| (host, &c.report));
        let heard = newest.collect();
        let own = Own {
            me: (self.config.me, self.config.incarnation),
            timing: &self.config.timing,
            state,
            heard: &heard,
        };
        let lease = &self.lease;
        self.pact
            .acknowledged(own.me, &heard, |seq| lease.sent_at(seq));
        let known = self.writing.is_none() && self.doubt.is_none();
        let by = self.pact.goes_on_by(own, self.seq).filter(|_| known);
        if let Some(seq) = by {
            self.lease.vouched(seq);
        }
    }

    /// Before a report is sent: does it promise?
    fn promise(&mut self, now: Millis) {
        self.pact.promise_nothing();
        let timing = &self.config.timing;
        let known = self.writing.is_none() && self.doubt.is_none();
        let stopped = matches!(self.phase, Phase::Stopping { .. } | Phase::Stopped { .. });
        let lost = now.since(self.registry_at) >= timing.registry_lost();
        let promises = known && (lost || stopped);
        let Some(state) = self.state.as_ref().filter(|_| promises) else {
            return;
        };
        let newest = self.contacts.iter().map(|(host, c)| (host, &c.report));
        let own = Own {
            me: (self.config.me, self.config.incarnation),
            timing,
            state,
            heard: &newest.collect(),
        };
        let lease = &self.lease;
        self.pact
            .promise(own, now, stopped, |seq| lease.sent_at(seq));
    }

    /// A host that promised and is heard by no majority stops for good.
    fn keep_promise(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let lives = matches!(self.phase, Phase::Joining | Phase::Member);
        if lives && !self.pact.is_kept(&self.config.timing, now) {
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
        let (me, life) = (self.config.me, self.config.incarnation);
        let may = |state: &Versioned<PoolState>| {
            self.seen || state.value.is_voter(me, life) || state.value.is_orphaned()
        };
        let joiner = sabotaged(Bug::JoinerDecides);
        self.state.as_ref().is_some_and(may) && !self.pact.binds() || joiner
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
        self.oustings.follow(now, &found.value);
        self.pact.follow(&found.value);
        let (me, life) = (self.config.me, self.config.incarnation);
        match found.value.standing(me, life) {
            None => {}
            Some(Standing::In) => {
                self.joined_at.get_or_insert(found.version);
            }
            Some(out) => {
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
                let ended = matches!(out, Standing::Dead(_) | Standing::Away);
                if ended && matches!(self.phase, Phase::Stopped { .. }) && !self.over {
                    self.over = true;
                    actions.push(Action::Over);
                }
            }
        }
        self.state = Some(found);
    }

    fn stop(&mut self, why: String, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopping { why: why.clone() };
        actions.push(Action::StopVms { why });
    }

    fn write(&mut self, now: Millis, state: PoolState, actions: &mut Vec<Action>) {
        let expected = self.state.as_ref().map(|state| state.version);
        self.writing = Some((now, state.clone()));
        actions.push(Action::Write { expected, state });
    }

    fn found_pool(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if self.phase != Phase::Joining || self.writing.is_some() {
            return;
        }
        let mut state = PoolState::default();
        self.enter(&mut state);
        state.admit();
        deciding::take_over(&mut state, &self.config, "it is the pool's first host");
        self.write(now, state, actions);
    }

    /// Ask to be a member, unless the members would give this host up at once.
    fn join(&mut self, now: Millis, actions: &mut Vec<Action>) {
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
        self.enter(&mut next);
        let own = self.report(now);
        let verdicts = judge(
            &self.config.timing,
            &next,
            &self.reports(&own, now),
            &self.contacts.report_ages(now),
        );
        let stays = verdicts.get(&self.config.me) == Some(&Verdict::Stays);
        if !stays || !self.contacts.may_judge(now) || self.is_before_me(&state.value, now) {
            return;
        }
        if next.is_orphaned() {
            next.admit();
        }
        self.write(now, next, actions);
    }

    /// Whether a host of a lower number is about to join as well: of many that begin together one
    /// wins each write, so they go one after the other. One that does not read the registry is
    /// not waited for.
    fn is_before_me(&self, state: &PoolState, now: Millis) -> bool {
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
    fn leave(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let Some(state) = &self.state else {
            return;
        };
        if !matches!(self.phase, Phase::Stopped { .. }) || self.writing.is_some() {
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

    fn enter(&self, state: &mut PoolState) {
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
        };
        state.members.insert(config.me, member);
        let cause = "it began a new life, in which nothing of a former one runs";
        state.decide(config.me, config.me, "joined", cause);
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
        };
        let decided = deciding::decide(&view, &mut oustings);
        self.oustings = oustings;
        if let Some(mut next) = decided.write {
            if self.may_give_up() {
                next.admit();
            }
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
