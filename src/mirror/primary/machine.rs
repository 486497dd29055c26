//! The primary: inputs, epochs, release. What it asks of the registry is in `registry.rs`.

use super::{PrimaryAction, PrimaryConfig, PrimaryEnd, PrimaryInput, PrimaryState, PrimaryStatus};
use crate::mirror::flow::OVERLOAD_PATIENCE;
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::{
    Alert, Flow, Micros, REGISTRY_RETRY_MIN, Schedule, Ticket, Verdict, Versioned, VmRecord,
};
use crate::pool::spec::Overload;
use crate::pool::{Epoch, Generation, HostName};
use std::collections::VecDeque;

/// An epoch that is cut and not yet acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) epoch: Epoch,
    pub(super) cut_at: Micros,
    /// No later than the moment its last byte could have left.
    pub(super) sent_at: Micros,
}

/// What one registry operation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// Win a generation for an attempt.
    Reserve,
    /// Name the standby.
    Confirm,
    /// Name the partner as owner.
    HandOver,
    /// Name no standby.
    Solo,
    /// Say that the guest has shut down.
    End,
    /// Before `Unprotect` or `Switchover` touches a running mirror: is the registry there at all?
    Probe(Wish),
    /// After a stall: does the record still name this host?
    Verify,
}

/// What the operator wants of a running mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wish {
    Unprotect,
    Switchover,
}

/// One registry operation without an answer yet.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) ticket: Ticket,
    pub(super) purpose: Purpose,
    /// What a claim would write.
    pub(super) wanted: Option<VmRecord>,
    /// [`Primary::stalls`] when it was asked: an answer from before a freeze verifies nothing.
    pub(super) stalls: u64,
}

/// How often slow links are looked at while they bound the guest: what they carry in that
/// time is little against [`crate::mirror::flow::UNDER_WAY_MAX`].
const LOOK_AT_SLOW_LINKS: Micros = Micros::from_millis(5);

/// The side that runs the VM; see the module.
#[derive(Clone, Debug)]
pub struct Primary {
    pub(super) config: PrimaryConfig,
    pub(super) state: PrimaryState,
    pub(super) now: Micros,
    /// As the registry last said.
    pub(super) record: Versioned<VmRecord>,
    pub(super) partner: Option<HostName>,
    /// Of the attempt, or of the tenure while solo.
    pub(super) generation: Generation,
    pub(super) schedule: Schedule,
    pub(super) flow: Flow,
    /// Stands for the links' sake.
    pub(super) held_back: bool,
    pub(super) overload_alerted: bool,
    /// Asked for and not yet done.
    pub(super) cutting: Option<(Epoch, Micros)>,
    pub(super) last_cut: Epoch,
    pub(super) in_flight: VecDeque<InFlight>,
    pub(super) committed: Epoch,
    pub(super) committed_cut_at: Option<Micros>,
    /// Rule 5: the newest acknowledgement is good until then.
    pub(super) fresh_until: Micros,
    pub(super) released: Epoch,
    pub(super) cut_failures: u32,
    /// The last epoch of a switchover, once its cut is asked for.
    pub(super) last_epoch: Option<Epoch>,
    /// An acknowledgement that came before its own `CutDone`.
    pub(super) early_ack: Option<Epoch>,
    pub(super) peer: Verdict,
    pub(super) link_down_since: Option<Micros>,
    pub(super) prepare_until: Micros,
    pub(super) op: Option<Pending>,
    pub(super) next_ticket: u64,
    pub(super) retry_at: Micros,
    pub(super) backoff: Micros,
    /// Frozen since the registry was last asked: release nothing before it answers.
    pub(super) verify: bool,
    pub(super) probe: Option<Wish>,
    pub(super) holding_still: bool,
    pub(super) stalls: u64,
    /// Stands since a cut with `stay_stopped`.
    pub(super) guest_stopped: bool,
    /// A cut of a given-up attempt without an answer yet; true if it leaves the guest stopped.
    pub(super) stray_cut: Option<bool>,
    pub(super) lag_alerted: bool,
    pub(super) unreachable_alerted: bool,
    pub(super) last_reason: Option<String>,
    pub(super) actions: VecDeque<PrimaryAction>,
    pub(super) promised_wakeup: Micros,
}

impl Primary {
    /// A VM that runs here unmirrored, by `record`. If the record names another owner the
    /// machine stands down at once.
    #[must_use]
    pub fn new(config: PrimaryConfig, record: Versioned<VmRecord>, now: Micros) -> Self {
        let mut primary = Self {
            state: PrimaryState::Solo,
            now,
            partner: None,
            generation: record.value.generation,
            schedule: Schedule::new(config.policy, now),
            flow: Flow::new(now),
            held_back: false,
            overload_alerted: false,
            cutting: None,
            last_cut: Epoch(0),
            in_flight: VecDeque::new(),
            committed: Epoch(0),
            committed_cut_at: None,
            fresh_until: Micros::ZERO,
            released: Epoch(0),
            cut_failures: 0,
            last_epoch: None,
            early_ack: None,
            peer: Verdict::Alive,
            link_down_since: None,
            prepare_until: Micros::MAX,
            op: None,
            next_ticket: 1,
            retry_at: Micros::ZERO,
            backoff: REGISTRY_RETRY_MIN,
            verify: false,
            probe: None,
            holding_still: false,
            stalls: 0,
            guest_stopped: false,
            stray_cut: None,
            lag_alerted: false,
            unreachable_alerted: false,
            last_reason: None,
            actions: VecDeque::new(),
            promised_wakeup: Micros::MAX,
            config,
            record,
        };
        if primary.record.value.owner != primary.config.me {
            primary.depose(primary.record.value.owner.clone());
        }
        primary.promised_wakeup = primary.next_wakeup();
        primary
    }

    /// The next thing to do, oldest first.
    pub fn poll_action(&mut self) -> Option<PrimaryAction> {
        self.actions.pop_front()
    }

    /// What is.
    #[must_use]
    pub fn status(&self, now: Micros) -> PrimaryStatus {
        let lag = self.lag(now);
        let named = matches!(self.state, PrimaryState::Mirrored | PrimaryState::LastEpoch);
        PrimaryStatus {
            state: self.state,
            generation: self.generation,
            partner: self.partner.clone(),
            epoch: if self.state.holds_output() {
                self.last_cut.next()
            } else {
                Epoch(0)
            },
            committed: self.committed,
            lag,
            mirrored: named && lag.is_some_and(|lag| lag < self.config.timing.lag_alarm),
            holding_still: self.holding_still,
            limited: self.flow.limited().filter(|_| self.state.holds_output()),
            last_reason: self.last_reason.clone(),
        }
    }

    /// Put in what happened.
    pub fn handle(&mut self, input: PrimaryInput, now: Micros) {
        // Called this late, the process was frozen, whoever says so or not.
        let overslept = now.since(self.promised_wakeup) > self.config.timing.detection;
        self.now = self.now.max(now);
        if self.state == PrimaryState::StoodDown {
            return;
        }
        if overslept {
            self.stalled();
        }
        self.apply(input);
        self.evaluate();
        self.promised_wakeup = self.next_wakeup();
        debug_assert!(self.released <= self.committed || sabotaged_release());
        debug_assert!(self.in_flight.len() <= self.config.max_in_flight.max(1));
    }

    pub(super) fn apply(&mut self, input: PrimaryInput) {
        use PrimaryState as S;
        match input {
            PrimaryInput::Tick => {}
            PrimaryInput::Protect { partner } => self.protect(partner),
            PrimaryInput::Unprotect => self.unprotect(),
            PrimaryInput::Switchover => self.switchover(),
            PrimaryInput::SetPolicy(policy) => {
                self.config.policy = policy;
                self.schedule.set_policy(policy);
            }
            PrimaryInput::LinkUp => self.link_down_since = None,
            PrimaryInput::LinkDown { reason } => {
                self.link_down_since.get_or_insert(self.now);
                self.last_reason = Some(format!("link down: {reason}"));
                // What was asked of the partner, or half copied to it, is gone with the session.
                if matches!(self.state, S::Preparing | S::Seeding) {
                    self.mirror_broken(format!("the link went down: {reason}"));
                }
            }
            PrimaryInput::PeerVerdict(verdict) => self.peer = verdict,
            PrimaryInput::StandbyReady if self.state == S::Preparing => {
                self.become_(S::Seeding);
                self.actions.push_back(PrimaryAction::BeginSeeding);
            }
            PrimaryInput::StandbyReady => {}
            PrimaryInput::StandbyRefused { reason } => {
                self.mirror_broken(format!("the partner refused to hold a standby: {reason}"));
            }
            PrimaryInput::StandbyGone { reason } => {
                self.mirror_broken(format!("the standby is gone: {reason}"));
            }
            PrimaryInput::SeedingConverged if self.state == S::Seeding => self.begin_epochs(),
            PrimaryInput::SeedingConverged => {}
            PrimaryInput::SeedingFailed { reason } if self.state == S::Seeding => {
                self.mirror_broken(format!("seeding failed: {reason}"));
            }
            PrimaryInput::SeedingFailed { .. } => {}
            PrimaryInput::OutputWaiting => self.schedule.output_waiting(self.now),
            PrimaryInput::Pressure(_) => self.schedule.pressure(),
            PrimaryInput::Lane(level) => self.flow.level(level, self.now),
            PrimaryInput::GuestBusy { permille, crowding } => {
                self.schedule.guest_busy(permille, crowding);
            }
            PrimaryInput::GuestIdle => self.schedule.guest_idle(),
            PrimaryInput::CutDone {
                epoch,
                pause,
                bytes,
                pages,
            } => self.cut_done(epoch, pause, bytes, pages),
            PrimaryInput::CutFailed { epoch, reason } => self.cut_failed(epoch, &reason),
            PrimaryInput::Sent { epoch, at } => {
                for flight in self
                    .in_flight
                    .iter_mut()
                    .filter(|flight| flight.epoch == epoch)
                {
                    flight.sent_at = at.min(self.now);
                }
            }
            PrimaryInput::SendFailed { epoch, reason } => {
                if self.in_flight.iter().any(|flight| flight.epoch == epoch) {
                    self.mirror_broken(format!("epoch {epoch} could not be sent: {reason}"));
                }
            }
            PrimaryInput::Acked { generation, epoch } => self.acked(generation, epoch),
            PrimaryInput::ClaimResult { ticket, outcome } => {
                self.registry_answered(ticket, outcome)
            }
            PrimaryInput::SelfStalled { .. } => self.stalled(),
            PrimaryInput::GuestDied { reason } => self.guest_died(reason),
            PrimaryInput::GuestShutdown => self.guest_shutdown(),
        }
    }

    // ---- operator ----

    pub(super) fn refuse(&mut self, what: &'static str, reason: impl Into<String>) {
        self.actions.push_back(PrimaryAction::Alert(Alert::Refused {
            what,
            reason: reason.into(),
        }));
    }

    pub(super) fn protect(&mut self, partner: HostName) {
        if self.state != PrimaryState::Solo {
            return self.refuse(
                "protect",
                format!("the VM is not solo but {:?}", self.state),
            );
        }
        if partner == self.config.me {
            return self.refuse("protect", "the partner must be another host");
        }
        if self.peer == Verdict::Lost || self.link_down_since.is_some() {
            return self.refuse(
                "protect",
                format!("host {partner} cannot be reached; mend the link first"),
            );
        }
        self.partner = Some(partner);
        self.last_reason = None;
        self.retry_at = self.now;
        self.become_(PrimaryState::Reserving);
    }

    pub(super) fn unprotect(&mut self) {
        use PrimaryState as S;
        match self.state {
            S::Reserving | S::Preparing | S::Seeding | S::FirstEpoch => {
                self.abort_attempt("unprotected by the operator".into());
            }
            S::Mirrored if self.probe.is_none() => self.probe = Some(Wish::Unprotect),
            S::Claiming => {}
            _ => self.refuse(
                "unprotect",
                format!("the VM is {:?}; ask again", self.state),
            ),
        }
    }

    pub(super) fn switchover(&mut self) {
        if self.state == PrimaryState::Mirrored && self.probe.is_none() {
            self.probe = Some(Wish::Switchover);
        } else {
            self.refuse(
                "switchover",
                format!(
                    "the VM is not mirrored but {:?}; protect it first",
                    self.state
                ),
            );
        }
    }

    /// The registry answers: do what the operator wished.
    pub(super) fn grant(&mut self, wish: Wish) {
        match wish {
            Wish::Unprotect => {
                if sabotaged(Bug::DismissBeforeCommit) {
                    self.actions.push_back(PrimaryAction::DismissStandby);
                }
                self.begin_claim("unprotected by the operator".into());
            }
            Wish::Switchover => {
                self.last_epoch = None;
                self.become_(PrimaryState::LastEpoch);
            }
        }
    }

    // ---- the guest and this process ----

    pub(super) fn stalled(&mut self) {
        if sabotaged(Bug::FreezeNotNoticed) {
            return;
        }
        self.verify = true;
        self.stalls += 1;
    }

    pub(super) fn guest_died(&mut self, reason: String) {
        if self.state.holds_output() {
            self.actions.push_back(PrimaryAction::TellGone {
                reason: reason.clone(),
            });
        } else if self.state == PrimaryState::Seeding {
            self.actions.push_back(PrimaryAction::EndSeeding {
                reason: reason.clone(),
            });
            self.actions.push_back(PrimaryAction::DismissStandby);
        } else if self.state == PrimaryState::Preparing {
            self.actions.push_back(PrimaryAction::DismissStandby);
        }
        self.actions
            .push_back(PrimaryAction::Alert(Alert::GuestGone { reason }));
        self.stand_down(PrimaryEnd::GuestGone);
    }

    pub(super) fn guest_shutdown(&mut self) {
        use PrimaryState as S;
        if matches!(
            self.state,
            S::Reserving | S::Preparing | S::Seeding | S::FirstEpoch
        ) {
            self.abort_attempt("the guest shut down".into());
        }
        self.retry_at = self.now;
        self.become_(S::Ending);
    }

    // ---- after every input ----

    /// Conditions on data, looked at after every input, in this order.
    pub(super) fn evaluate(&mut self) {
        use PrimaryState as S;
        if let Some(reason) = self.broken_reason() {
            self.mirror_broken(reason);
        }
        self.try_release();
        if self.state == S::LastEpoch && self.last_epoch == Some(self.committed) {
            self.retry_at = self.now;
            self.become_(S::HandingOver);
        }
        self.ask_registry();
        self.mind_the_links();
        if self.may_cut() {
            match self.state {
                S::LastEpoch if self.in_flight.is_empty() => self.cut(true),
                S::FirstEpoch | S::Mirrored if self.schedule.next_cut() <= self.now => {
                    self.cut(false)
                }
                _ => {}
            }
        }
        self.check_lag();
    }

    pub(super) fn may_cut(&self) -> bool {
        let room = self.in_flight.len() < self.config.max_in_flight.max(1);
        let wanted = match self.state {
            // Only epoch 1: a second one has no place before the record names the standby.
            PrimaryState::FirstEpoch => self.last_cut == Epoch(0),
            PrimaryState::Mirrored => true,
            PrimaryState::LastEpoch => self.last_epoch.is_none(),
            _ => false,
        };
        let stands = self.holding_still || self.guest_stopped || self.held_back;
        wanted && room && self.cutting.is_none() && !stands
    }

    /// Hold the guest back, or let it go, as the links bear it.
    pub(super) fn mind_the_links(&mut self) {
        use PrimaryState as S;
        self.schedule
            .links(self.flow.backlog_until(), self.flow.cut_by());
        let slow = self.state == S::Mirrored && self.flow.slow_since().is_some();
        if slow && !self.overload_alerted {
            let limited = self.flow.limited();
            self.actions
                .push_back(PrimaryAction::Alert(Alert::Overloaded {
                    bytes: limited.map_or(0, |l| l.bytes),
                    drains_in: limited.and_then(|l| l.drains_in),
                }));
        }
        self.overload_alerted = slow;
        // The guest is not this side's to hold, or stands for another reason already.
        let stands = self.holding_still || self.guest_stopped || self.cutting.is_some();
        let hold = slow
            && !stands
            && self.config.policy.overload == Overload::Throttle
            && self.flow.holds(self.now)
            && !sabotaged(Bug::NeverHeldBack);
        if hold && !self.held_back {
            self.flow.hold(self.now);
            self.actions.push_back(PrimaryAction::HoldBack);
        } else if !hold && self.held_back {
            self.flow.let_go(self.now);
            self.schedule.let_go(self.now);
            if !self.holding_still && self.state != S::StoodDown {
                self.actions.push_back(PrimaryAction::LetGo);
            }
        }
        self.held_back = hold;
    }

    pub(super) fn broken_reason(&self) -> Option<String> {
        use PrimaryState as S;
        let timing = &self.config.timing;
        let with_partner = !matches!(
            self.state,
            S::Solo | S::Reserving | S::Claiming | S::Ending | S::StoodDown
        );
        if !with_partner {
            return None;
        }
        if self.peer == Verdict::Lost {
            return Some("the partner host is lost".into());
        }
        if let Some(since) = self.link_down_since
            && self.now.since(since) >= timing.link_down_bound
        {
            return Some("the link to the partner is down".into());
        }
        if self.state == S::Preparing && self.now >= self.prepare_until {
            return Some("the partner made no standby ready in time".into());
        }
        if self.state == S::Mirrored
            && self.config.policy.overload == Overload::Solo
            && let Some(since) = self.flow.slow_since()
            && self.now.since(since) >= OVERLOAD_PATIENCE
        {
            return Some("the guest dirties more than the links to the partner carry".into());
        }
        let oldest = self.in_flight.front()?;
        (self.state.holds_output() && self.now.since(oldest.cut_at) >= timing.ack_overdue)
            .then(|| format!("epoch {} was not acknowledged in time", oldest.epoch))
    }

    /// When `Tick` is due at the latest. Never later than half the detection time ahead
    /// while output is held, so that a freeze shows in the machine's own clock.
    #[must_use]
    pub fn next_wakeup(&self) -> Micros {
        use PrimaryState as S;
        let timing = &self.config.timing;
        let mut at = self.now + Micros::from_millis(1000);
        if self.state == S::StoodDown {
            return Micros::MAX;
        }
        if self.state.holds_output() {
            at = self.now + Micros(timing.detection.0 / 2);
        }
        if self.op.is_none() && self.wanted_purpose().is_some() {
            at = at.min(self.retry_at);
        }
        if self.state == S::Preparing {
            at = at.min(self.prepare_until);
        }
        if let Some(since) = self.link_down_since {
            let bound = since + timing.link_down_bound;
            at = at.min(bound.max(self.now + Micros(1000)));
        }
        if let Some(oldest) = self.in_flight.front() {
            at = at.min((oldest.cut_at + timing.ack_overdue).max(self.now + Micros(1000)));
        }
        if self.may_cut() && matches!(self.state, S::FirstEpoch | S::Mirrored) {
            at = at.min(self.schedule.next_cut());
        }
        if self.state == S::Mirrored && self.flow.slow_since().is_some() {
            at = at.min(self.now + LOOK_AT_SLOW_LINKS);
            if let Some(go) = self.flow.let_go_at(self.now) {
                at = at.min(go.max(self.now + Micros(500)));
            }
        }
        at
    }

    /// Whether [`PrimaryInput::GuestIdle`] would bring the next cut forward: worth a look at
    /// the vCPUs now and then.
    #[must_use]
    pub fn awaits_idle(&self, now: Micros) -> bool {
        self.state == PrimaryState::Mirrored && self.may_cut() && self.schedule.awaits_idle(now)
    }

    /// The only place that changes the state.
    pub(super) fn become_(&mut self, next: PrimaryState) {
        debug_assert!(
            self.state.may_become(next) || sabotaged_solo(),
            "illegal step {:?} -> {next:?}",
            self.state
        );
        self.state = next;
    }
}

fn sabotaged_solo() -> bool {
    sabotaged(Bug::SoloWithoutClaim) || sabotaged(Bug::UnknownIsLost)
}

fn sabotaged_release() -> bool {
    sabotaged(Bug::ReleaseBeforeAck)
}
