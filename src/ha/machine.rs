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
use super::race::{Race, Side};
use super::report::{IN_DOUBT, Path, RegistryView, Report};
use super::sabotage::{Bug, sabotaged};
use super::state::{Member, PoolState, Proof, Standing};
use super::time::Millis;
use crate::pool::{HostId, Incarnation, Seq};
use crate::registry::Versioned;
use std::collections::{BTreeMap, BTreeSet};

mod io;
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
                    self.is_over(now, (host, incarnation), Some(Proof::PowerOff));
                }
                self.decide(now, &mut actions);
            }
            Input::Declared { host, incarnation } => {
                self.is_over(now, (host, incarnation), Some(Proof::Declared));
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

    fn own<'a>(
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

    fn newest(&self) -> BTreeMap<HostId, &Report> {
        let newest = self.contacts.iter();
        newest.map(|(host, c)| (host, &c.report)).collect()
    }

    /// Whether no write of this host is under way or in doubt.
    fn knows(&self) -> bool {
        self.writing.is_none() && self.doubt.is_none()
    }

    /// What others say may be an acknowledgement of a promise, a promise, or a word to go on by.
    fn hear_word(&mut self) {
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
    fn is_over(&mut self, now: Millis, life: (HostId, Incarnation), proof: Option<Proof>) {
        let mut pact = std::mem::take(&mut self.pact);
        let heard = self.newest();
        let state = self.state.as_ref().filter(|_| self.knows());
        let own = state.map(|state| self.own(state, &heard));
        pact.is_over(life, proof, own, now);
        self.pact = pact;
    }

    /// Before a report is sent: does it promise?
    fn promise(&mut self, now: Millis, actions: &mut Vec<Action>) {
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
    fn race(&mut self, now: Millis, actions: &mut Vec<Action>) {
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
                self.is_over(now, (other, life), None);
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
        if self.race.shoots(now, side.waits(timing.hesitation)) {
            actions.push(Action::Fence {
                host: other,
                incarnation: life,
            });
        }
    }

    /// Nothing runs here; and nobody goes on by a promise that this life is there to keep.
    fn may_say_farewell(&self) -> bool {
        let stopped = matches!(self.phase, Phase::Stopped { .. });
        stopped && !self.pact.binds_of_two()
    }

    /// A host that promised and is heard by no majority stops for good.
    fn keep_promise(&mut self, now: Millis, actions: &mut Vec<Action>) {
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
            unbound: None,
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
