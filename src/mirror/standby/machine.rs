//! The standby: epochs in, claim, promotion.

use super::{StandbyAction, StandbyConfig, StandbyEnd, StandbyInput, StandbyState, StandbyStatus};
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::{
    APPLY_BACKLOG_MAX, Alert, ClaimOutcome, Micros, ORPHAN_PATIENCE, REGISTRY_RETRY_MAX,
    REGISTRY_RETRY_MIN, SILENCE_BOUND, Ticket, Verdict, Versioned, VmRecord,
};
use crate::pool::{Epoch, Generation};
use std::collections::{BTreeSet, VecDeque};

/// What the record says about this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Standby of this attempt.
    Named,
    /// Owner: a claim or handover has been won.
    Owner,
    /// The attempt goes on, nobody is named yet.
    NotYet,
    /// The registry is older than this attempt: damaged or restored. Says nothing.
    Behind,
    /// Somebody else's.
    Other,
}

/// The side that holds the copy; see the module.
#[derive(Clone, Debug)]
pub struct Standby {
    config: StandbyConfig,
    state: StandbyState,
    now: Micros,
    /// The record as last read, while it names this host.
    record: Option<Versioned<VmRecord>>,
    /// Whole epochs after `acked`.
    whole: BTreeSet<Epoch>,
    acked: Epoch,
    applied: Epoch,
    applying: bool,
    last_ack_at: Option<Micros>,
    /// An epoch was bad: acknowledge no more, keep what is acknowledged.
    broken: bool,
    peer: Verdict,
    suspect_since: Micros,
    /// The primary itself said that it is gone or has handed over: no delay, no lease.
    urgent: bool,
    promote_asked: bool,
    /// Outstanding operation and what it would write.
    op: Option<(Ticket, Option<VmRecord>)>,
    next_ticket: u64,
    retry_at: Micros,
    backoff: Micros,
    silence_at: Micros,
    /// When an epoch last came, or this side last woke from a freeze.
    last_epoch_at: Micros,
    unreachable_alerted: bool,
    actions: VecDeque<StandbyAction>,
    promised_wakeup: Micros,
}

impl Standby {
    /// A standby whose shell begins to start its QEMU.
    #[must_use]
    pub fn new(config: StandbyConfig, now: Micros) -> Self {
        let mut standby = Self {
            config,
            state: StandbyState::Preparing,
            now,
            record: None,
            whole: BTreeSet::new(),
            acked: Epoch(0),
            applied: Epoch(0),
            applying: false,
            last_ack_at: None,
            broken: false,
            peer: Verdict::Alive,
            suspect_since: now,
            urgent: false,
            promote_asked: false,
            op: None,
            next_ticket: 1,
            retry_at: now,
            backoff: REGISTRY_RETRY_MIN,
            silence_at: now + SILENCE_BOUND,
            last_epoch_at: now,
            unreachable_alerted: false,
            actions: VecDeque::new(),
            promised_wakeup: Micros::MAX,
        };
        standby.promised_wakeup = standby.next_wakeup();
        standby
    }

    /// The next thing to do, oldest first.
    pub fn poll_action(&mut self) -> Option<StandbyAction> {
        self.actions.pop_front()
    }

    /// What is.
    #[must_use]
    pub fn status(&self, now: Micros) -> StandbyStatus {
        StandbyStatus {
            state: self.state,
            generation: self.generation(),
            acked: self.acked,
            applied: self.applied,
            since_ack: self.last_ack_at.map(|at| now.since(at)),
        }
    }

    fn generation(&self) -> Generation {
        match (self.state, &self.record) {
            (StandbyState::Promoting | StandbyState::Promoted, Some(record)) => {
                record.value.generation
            }
            _ => self.config.generation,
        }
    }

    /// Put in what happened.
    pub fn handle(&mut self, input: StandbyInput, now: Micros) {
        let overslept = now.since(self.promised_wakeup) > self.config.timing.detection;
        self.now = self.now.max(now);
        if matches!(self.state, StandbyState::StoodDown | StandbyState::Promoted) {
            return;
        }
        if overslept {
            self.stalled();
        }
        self.apply(input);
        self.evaluate();
        self.promised_wakeup = self.next_wakeup();
        debug_assert!(self.applied <= self.acked);
        debug_assert!(self.whole.len() <= self.config.max_in_flight.max(1));
    }

    fn apply(&mut self, input: StandbyInput) {
        use StandbyState as S;
        match input {
            // The failure detector decides who is lost, the link alone proves nothing.
            StandbyInput::Tick | StandbyInput::LinkUp | StandbyInput::LinkDown { .. } => {}
            StandbyInput::PeerVerdict(verdict) => self.peer_verdict(verdict),
            StandbyInput::ShellReady if self.state == S::Preparing => {
                self.become_(S::Seeding);
                self.actions.push_back(StandbyAction::TellReady);
            }
            StandbyInput::ShellReady => {}
            StandbyInput::ShellFailed { reason }
            | StandbyInput::StandbyGuestDied { reason }
            | StandbyInput::PromotionFailed { reason } => {
                self.actions
                    .push_back(StandbyAction::Alert(Alert::GuestGone {
                        reason: reason.clone(),
                    }));
                self.stand_down(StandbyEnd::Broken { reason });
            }
            StandbyInput::EpochWhole { generation, epoch } => self.epoch_whole(generation, epoch),
            StandbyInput::EpochBad { epoch, reason } => self.epoch_bad(epoch, &reason),
            StandbyInput::Applied { epoch } => {
                if self.applying && epoch == self.applied.next() {
                    self.applying = false;
                    self.applied = epoch;
                    self.acknowledge();
                }
            }
            StandbyInput::MirrorConfirmed { generation, .. } => {
                if generation == self.config.generation && self.state == S::Unconfirmed {
                    self.become_(S::Mirrored);
                    self.retry_at = self.now;
                }
            }
            StandbyInput::Handover { epoch, .. } => self.handed_over(epoch),
            StandbyInput::PrimaryGone { reason } => self.primary_gone(reason),
            StandbyInput::Dismissed => {
                // A primary dismisses after its own won claim, so a claim of this side that
                // is already out will be lost; its answer decides.
                if !matches!(self.state, S::Claiming | S::Promoting) {
                    self.stand_down(StandbyEnd::Dismissed);
                }
            }
            StandbyInput::ClaimResult { ticket, outcome } => {
                self.registry_answered(ticket, outcome)
            }
            StandbyInput::Promoted if self.state == S::Promoting && self.promote_asked => {
                self.become_(S::Promoted);
            }
            StandbyInput::Promoted => {}
            StandbyInput::SelfStalled { .. } => self.stalled(),
        }
    }

    /// Frozen: silence heard meanwhile is this side's own. The primary gets its head start anew.
    fn stalled(&mut self) {
        self.suspect_since = self.now;
        self.last_epoch_at = self.now;
    }

    // ---- epochs ----

    fn epoch_whole(&mut self, generation: Generation, epoch: Epoch) {
        if generation != self.config.generation || !self.state.acknowledges() || self.broken {
            return;
        }
        self.silence_at = self.now + SILENCE_BOUND;
        self.last_epoch_at = self.now;
        if epoch <= self.acked {
            return self.ack(self.acked);
        }
        let window = u64::try_from(self.config.max_in_flight.max(1)).unwrap_or(u64::MAX);
        if epoch.0 - self.acked.0 > window {
            let reason = format!(
                "sent epoch {epoch}, the newest acknowledged is {}",
                self.acked
            );
            return self
                .actions
                .push_back(StandbyAction::Alert(Alert::PartnerConfused { reason }));
        }
        self.whole.insert(epoch);
        self.acknowledge();
        if sabotaged(Bug::AckBeforeWhole) {
            self.actions.push_back(StandbyAction::Ack {
                generation,
                epoch: epoch.next(),
            });
        }
    }

    /// Acknowledge what is whole, in order, no further ahead of applying than allowed.
    fn acknowledge(&mut self) {
        if !self.state.acknowledges() {
            return;
        }
        let mut newest = self.acked;
        while newest.0 - self.applied.0 < APPLY_BACKLOG_MAX && self.whole.remove(&newest.next()) {
            newest = newest.next();
        }
        if newest > self.acked {
            self.ack(newest);
        }
    }

    fn ack(&mut self, newest: Epoch) {
        if self.state == StandbyState::Seeding {
            self.become_(StandbyState::Unconfirmed);
        }
        self.acked = newest;
        self.last_ack_at = Some(self.now);
        self.actions.push_back(StandbyAction::Ack {
            generation: self.config.generation,
            epoch: newest,
        });
    }

    fn epoch_bad(&mut self, epoch: Epoch, reason: &str) {
        if !self.state.acknowledges() || self.broken {
            return;
        }
        self.broken = true;
        let reason = format!("epoch {epoch} is bad: {reason}");
        self.actions
            .push_back(StandbyAction::Alert(Alert::PartnerConfused {
                reason: reason.clone(),
            }));
        self.actions.push_back(StandbyAction::TellBroken { reason });
    }

    // ---- the primary is lost ----

    fn peer_verdict(&mut self, verdict: Verdict) {
        self.peer = verdict;
        if verdict == Verdict::Alive && !self.urgent {
            match self.state {
                StandbyState::Suspecting => self.become_(StandbyState::Mirrored),
                StandbyState::Checking => self.become_(StandbyState::Unconfirmed),
                _ => {}
            }
        }
    }

    fn primary_gone(&mut self, reason: String) {
        use StandbyState as S;
        match self.state {
            S::Preparing | S::Seeding => self.stand_down(StandbyEnd::NotNamed { reason }),
            S::Unconfirmed | S::Checking => {
                self.urgent = true;
                self.begin_checking();
            }
            S::Mirrored | S::Suspecting => {
                self.urgent = true;
                self.begin_claim();
            }
            S::Claiming => self.urgent = true,
            S::Promoting => self.urgent = true,
            S::Promoted | S::StoodDown => {}
        }
    }

    fn handed_over(&mut self, epoch: Epoch) {
        use StandbyState as S;
        if !matches!(
            self.state,
            S::Unconfirmed | S::Mirrored | S::Suspecting | S::Checking | S::Claiming
        ) {
            return;
        }
        if epoch != self.acked {
            let reason = format!(
                "handed over epoch {epoch}, the newest acknowledged is {}",
                self.acked
            );
            self.actions
                .push_back(StandbyAction::Alert(Alert::PartnerConfused { reason }));
        }
        // Its word is not the registry's: read.
        self.record = None;
        self.urgent = true;
        self.begin_claim();
    }

    fn begin_checking(&mut self) {
        self.suspect_since = self.now;
        self.backoff = REGISTRY_RETRY_MIN;
        self.retry_at = self.now;
        self.become_(StandbyState::Checking);
    }

    fn begin_claim(&mut self) {
        self.retry_at = self.now;
        self.become_(StandbyState::Claiming);
    }

    // ---- the registry ----

    fn standing(&self, record: &VmRecord) -> Standing {
        let mine = self.config.generation;
        let named = record.standby.as_ref() == Some(&self.config.me);
        if record.generation < mine {
            Standing::Behind
        } else if record.owner == self.config.me && record.generation > mine && record.running {
            Standing::Owner
        } else if record.owner == self.config.primary && record.generation == mine && record.running
        {
            match (&record.standby, named) {
                (None, _) => Standing::NotYet,
                (_, true) => Standing::Named,
                (_, false) => Standing::Other,
            }
        } else {
            Standing::Other
        }
    }

    fn wants_registry(&self) -> bool {
        use StandbyState as S;
        match self.state {
            S::Claiming | S::Checking => self.now >= self.retry_at,
            S::Mirrored => {
                self.now >= self.retry_at && (self.record.is_none() || self.now >= self.silence_at)
            }
            S::Unconfirmed => self.now >= self.retry_at && self.now >= self.silence_at,
            _ => false,
        }
    }

    fn ask_registry(&mut self) {
        if self.op.is_some() || !self.wants_registry() {
            return;
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let claim = self
            .record
            .as_ref()
            .filter(|_| self.state == StandbyState::Claiming);
        let wanted = claim.map(|record| self.claimed(&record.value));
        let action = match (claim, wanted.clone()) {
            (Some(record), Some(value)) => StandbyAction::Claim {
                ticket,
                expected: record.version,
                value,
            },
            _ => StandbyAction::ReadRecord { ticket },
        };
        self.silence_at = self.now + SILENCE_BOUND;
        self.actions.push_back(action);
        self.op = Some((ticket, wanted));
    }

    fn claimed(&self, record: &VmRecord) -> VmRecord {
        VmRecord {
            generation: record.generation.next(),
            owner: self.config.me.clone(),
            standby: None,
            running: true,
        }
    }

    fn registry_answered(&mut self, ticket: Ticket, outcome: ClaimOutcome) {
        let Some((_, wanted)) = self.op.take_if(|(asked, _)| *asked == ticket) else {
            return;
        };
        match outcome {
            ClaimOutcome::Won(record) => self.own(record),
            ClaimOutcome::Unreachable { .. }
                if sabotaged(Bug::UnknownIsWon) && wanted.is_some() =>
            {
                if let (Some(value), Some(record)) = (wanted, &self.record) {
                    self.own(Versioned {
                        version: record.version + 1,
                        value,
                    });
                }
            }
            ClaimOutcome::Unreachable { reason } => self.unreachable(reason),
            ClaimOutcome::Lost(None) => {
                self.actions
                    .push_back(StandbyAction::Alert(Alert::RecordMissing));
                self.record = None;
                self.unreachable("the VM's record is missing".into());
            }
            ClaimOutcome::Lost(Some(found)) => self.found(found),
        }
    }

    fn unreachable(&mut self, reason: String) {
        self.retry_at = self.now + self.backoff;
        self.backoff = Micros(self.backoff.0 * 2).min(REGISTRY_RETRY_MAX);
        let matters = matches!(self.state, StandbyState::Claiming | StandbyState::Checking);
        if matters && !self.unreachable_alerted {
            self.unreachable_alerted = true;
            self.actions
                .push_back(StandbyAction::Alert(Alert::RegistryUnreachable { reason }));
        }
    }

    /// What the registry holds: the answer to a read or to a lost claim.
    fn found(&mut self, found: Versioned<VmRecord>) {
        use StandbyState as S;
        self.backoff = REGISTRY_RETRY_MIN;
        self.unreachable_alerted = false;
        match (self.standing(&found.value), self.state) {
            // Also the answer to a claim that landed although its first answer was lost.
            (
                Standing::Owner,
                S::Unconfirmed | S::Mirrored | S::Suspecting | S::Checking | S::Claiming,
            ) => {
                self.own(found);
            }
            (Standing::Named, state) => {
                self.record = Some(found);
                self.retry_at = self.now;
                match state {
                    S::Unconfirmed => self.become_(S::Mirrored),
                    S::Checking if self.urgent => self.begin_claim(),
                    S::Checking => {
                        self.suspect_since = self.now;
                        self.become_(S::Suspecting);
                    }
                    _ => {}
                }
            }
            (Standing::NotYet, S::Unconfirmed) => {}
            (Standing::NotYet, S::Checking) => {
                if self.now.since(self.last_epoch_at) >= ORPHAN_PATIENCE {
                    let reason = "the primary was lost before the record named this host".into();
                    return self.stand_down(StandbyEnd::NotNamed { reason });
                }
                self.retry_at = self.now + self.backoff;
            }
            (Standing::Behind, _) => {
                self.actions
                    .push_back(StandbyAction::Alert(Alert::RecordMissing));
                self.record = None;
                self.unreachable("the record went back to an older generation".into());
            }
            (_, S::Preparing | S::Seeding | S::Promoting | S::Promoted | S::StoodDown) => {}
            (Standing::NotYet | Standing::Other, _) => {
                let reason = format!(
                    "generation {} runs on {}, standby {}",
                    found.value.generation,
                    found.value.owner,
                    found
                        .value
                        .standby
                        .as_ref()
                        .map_or("none", |host| host.as_str()),
                );
                self.stand_down(StandbyEnd::NotNamed { reason });
            }
        }
    }

    /// The record names this host as owner.
    fn own(&mut self, record: Versioned<VmRecord>) {
        if self.state != StandbyState::Claiming {
            self.urgent = true;
            self.become_(StandbyState::Claiming);
        }
        self.record = Some(record);
        self.op = None;
        self.become_(StandbyState::Promoting);
        self.actions.push_back(StandbyAction::DropIncomplete);
    }

    fn stand_down(&mut self, why: StandbyEnd) {
        self.become_(StandbyState::StoodDown);
        self.op = None;
        self.actions.push_back(StandbyAction::StandDown { why });
    }

    // ---- after every input ----

    /// Conditions on data, looked at after every input, in this order.
    fn evaluate(&mut self) {
        use StandbyState as S;
        if self.peer == Verdict::Lost {
            match self.state {
                S::Preparing | S::Seeding => self.stand_down(StandbyEnd::NotNamed {
                    reason: "the primary was lost before the first whole epoch".into(),
                }),
                S::Unconfirmed => self.begin_checking(),
                S::Mirrored => {
                    self.suspect_since = self.now;
                    self.become_(S::Suspecting);
                }
                _ => {}
            }
        }
        if self.now >= self.last_epoch_at + self.config.timing.silence_claim {
            match self.state {
                S::Unconfirmed => self.begin_checking(),
                S::Mirrored => self.begin_claim(),
                _ => {}
            }
        }
        if self.state == S::Suspecting && self.now >= self.claim_at() {
            self.begin_claim();
            if sabotaged(Bug::PromoteWithoutClaim) {
                let base = VmRecord {
                    generation: self.config.generation,
                    owner: self.config.me.clone(),
                    standby: None,
                    running: true,
                };
                self.own(Versioned {
                    version: 1,
                    value: self.claimed(&base),
                });
            }
        }
        self.ask_registry();
        if self.state != S::StoodDown && !self.applying && self.applied < self.acked {
            self.applying = true;
            self.actions.push_back(StandbyAction::Apply {
                epoch: self.applied.next(),
            });
        }
        self.try_promote();
    }

    fn claim_at(&self) -> Micros {
        self.suspect_since + self.config.timing.claim_delay
    }

    /// Rule 5: when the last acknowledgement is surely of no use to the primary any more.
    fn lease_over_at(&self) -> Micros {
        match self.last_ack_at {
            Some(at) if !self.urgent => at + self.config.timing.lease,
            _ => Micros::ZERO,
        }
    }

    fn try_promote(&mut self) {
        if self.state != StandbyState::Promoting
            || self.promote_asked
            || self.now < self.lease_over_at()
        {
            return;
        }
        if self.applied < self.acked && !sabotaged(Bug::PromoteBeforeApply) {
            return;
        }
        let Some(record) = self.record.clone() else {
            return;
        };
        self.promote_asked = true;
        self.actions.push_back(StandbyAction::Promote {
            generation: record.value.generation,
            epoch: self.acked,
            record,
        });
    }

    /// When `Tick` is due at the latest.
    #[must_use]
    pub fn next_wakeup(&self) -> Micros {
        use StandbyState as S;
        let at = match self.state {
            S::StoodDown | S::Promoted => return Micros::MAX,
            S::Suspecting => self.claim_at(),
            S::Checking | S::Claiming if self.op.is_none() => self.retry_at,
            S::Promoting if !self.promote_asked => self.lease_over_at().max(self.now + Micros(1)),
            S::Unconfirmed | S::Mirrored if self.op.is_none() => self.silence_at.max(self.retry_at),
            _ => Micros::MAX,
        };
        at.min(self.now + SILENCE_BOUND)
    }

    /// The only place that changes the state.
    fn become_(&mut self, next: StandbyState) {
        debug_assert!(
            self.state.may_become(next),
            "illegal step {:?} -> {next:?}",
            self.state
        );
        self.state = next;
    }
}
