//! The standby: epochs in, claim, promotion.

use super::{StandbyAction, StandbyConfig, StandbyEnd, StandbyInput, StandbyState, StandbyStatus};
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::{
    APPLY_BACKLOG_MAX, Alert, Micros, REGISTRY_RETRY_MIN, SILENCE_BOUND, Ticket, Verdict,
    Versioned, VmRecord,
};
use crate::pool::{Epoch, Generation};
use std::collections::{BTreeSet, VecDeque};

/// The side that holds the copy; see the module.
#[derive(Clone, Debug)]
pub struct Standby {
    pub(super) config: StandbyConfig,
    pub(super) state: StandbyState,
    pub(super) now: Micros,
    /// The record as last read, while it names this host.
    pub(super) record: Option<Versioned<VmRecord>>,
    /// Whole epochs after `acked`.
    pub(super) whole: BTreeSet<Epoch>,
    pub(super) acked: Epoch,
    pub(super) applied: Epoch,
    pub(super) applying: bool,
    pub(super) last_ack_at: Option<Micros>,
    /// An epoch was bad: acknowledge no more, keep what is acknowledged.
    pub(super) broken: bool,
    pub(super) peer: Verdict,
    pub(super) suspect_since: Micros,
    /// The primary itself said that it is gone or has handed over: no delay, no lease.
    pub(super) urgent: bool,
    pub(super) promote_asked: bool,
    /// Outstanding operation and what it would write.
    pub(super) op: Option<(Ticket, Option<VmRecord>)>,
    pub(super) next_ticket: u64,
    pub(super) retry_at: Micros,
    pub(super) backoff: Micros,
    pub(super) silence_at: Micros,
    /// When an epoch last came, or this side last woke from a freeze.
    pub(super) last_epoch_at: Micros,
    pub(super) unreachable_alerted: bool,
    pub(super) actions: VecDeque<StandbyAction>,
    pub(super) promised_wakeup: Micros,
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

    pub(super) fn generation(&self) -> Generation {
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

    pub(super) fn apply(&mut self, input: StandbyInput) {
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
    pub(super) fn stalled(&mut self) {
        self.suspect_since = self.now;
        self.last_epoch_at = self.now;
    }

    // ---- epochs ----

    pub(super) fn epoch_whole(&mut self, generation: Generation, epoch: Epoch) {
        if generation != self.config.generation || !self.takes_epochs() || self.broken {
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

    fn takes_epochs(&self) -> bool {
        let claims = matches!(self.state, StandbyState::Claiming | StandbyState::Promoting);
        self.state.acknowledges() || claims && sabotaged(Bug::AckWhileClaiming)
    }

    /// Acknowledge what is whole, in order, no further ahead of applying than allowed.
    pub(super) fn acknowledge(&mut self) {
        if !self.takes_epochs() {
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

    pub(super) fn ack(&mut self, newest: Epoch) {
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

    pub(super) fn epoch_bad(&mut self, epoch: Epoch, reason: &str) {
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

    pub(super) fn peer_verdict(&mut self, verdict: Verdict) {
        self.peer = verdict;
        if verdict == Verdict::Alive && !self.urgent {
            match self.state {
                StandbyState::Suspecting => self.become_(StandbyState::Mirrored),
                StandbyState::Checking => self.become_(StandbyState::Unconfirmed),
                _ => {}
            }
        }
    }

    pub(super) fn primary_gone(&mut self, reason: String) {
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

    pub(super) fn handed_over(&mut self, epoch: Epoch) {
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

    pub(super) fn begin_checking(&mut self) {
        self.suspect_since = self.now;
        self.backoff = REGISTRY_RETRY_MIN;
        self.retry_at = self.now;
        self.become_(StandbyState::Checking);
    }

    pub(super) fn begin_claim(&mut self) {
        self.retry_at = self.now;
        self.become_(StandbyState::Claiming);
    }

    // ---- after every input ----

    /// Conditions on data, looked at after every input, in this order.
    pub(super) fn evaluate(&mut self) {
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

    pub(super) fn claim_at(&self) -> Micros {
        self.suspect_since + self.config.timing.claim_delay
    }

    /// Rule 5: when the last acknowledgement is surely of no use to the primary any more.
    pub(super) fn lease_over_at(&self) -> Micros {
        match self.last_ack_at {
            _ if sabotaged(Bug::LeaseNotWaited) => Micros::ZERO,
            Some(at) if !self.urgent => at + self.config.timing.lease,
            _ => Micros::ZERO,
        }
    }

    pub(super) fn try_promote(&mut self) {
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
    pub(super) fn become_(&mut self, next: StandbyState) {
        debug_assert!(
            self.state.may_become(next),
            "illegal step {:?} -> {next:?}",
            self.state
        );
        self.state = next;
    }
}
