//! What the standby asks of the registry, and what the answers mean.
//!
//! At most one operation is outstanding; which one is wanted is a function of the state.
//! After an unknown outcome the same claim is tried again: if it has landed, the second
//! try loses against a record that names this host as owner, which counts as won.

use super::machine::Standby;
use super::{StandbyAction, StandbyEnd, StandbyState};
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::{
    Alert, ClaimOutcome, Micros, REGISTRY_RETRY_MAX, REGISTRY_RETRY_MIN, SILENCE_BOUND, Ticket,
    Versioned, VmRecord,
};

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

impl Standby {
    fn standing(&self, record: &VmRecord) -> Standing {
        let mine = self.config.generation;
        let named = record.standby.as_ref() == Some(&self.config.me);
        if record.generation < mine {
            Standing::Behind
        } else if record.owner == self.config.me
            && record.generation > mine
            && record.running
            && !sabotaged(Bug::OwnWinNotSeen)
        {
            Standing::Owner
        } else if record.owner == self.config.primary && record.generation == mine && record.running
        {
            match (&record.standby, named) {
                (None, _) if sabotaged(Bug::ClaimUnnamed) => Standing::Named,
                (None, _) => Standing::NotYet,
                (_, true) => Standing::Named,
                (_, false) => Standing::Other,
            }
        } else {
            Standing::Other
        }
    }

    pub(super) fn wants_registry(&self) -> bool {
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

    pub(super) fn ask_registry(&mut self) {
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

    pub(super) fn claimed(&self, record: &VmRecord) -> VmRecord {
        VmRecord {
            generation: record.generation.next(),
            owner: self.config.me.clone(),
            standby: None,
            running: true,
        }
    }

    pub(super) fn registry_answered(&mut self, ticket: Ticket, outcome: ClaimOutcome) {
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

    pub(super) fn unreachable(&mut self, reason: String) {
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
    pub(super) fn found(&mut self, found: Versioned<VmRecord>) {
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
            // Later states too: a slow answer may be older than the confirmation.
            (Standing::NotYet, S::Checking | S::Mirrored | S::Suspecting | S::Claiming) => {
                let given_up =
                    self.now.since(self.last_epoch_at) >= self.config.timing.orphan_patience;
                if given_up && self.state != S::Suspecting {
                    let reason = "the primary was lost before the record named this host".into();
                    return self.stand_down(StandbyEnd::NotNamed { reason });
                }
                self.record = None;
                self.retry_at = self.now + self.backoff;
            }
            (Standing::Behind, _) => {
                self.actions
                    .push_back(StandbyAction::Alert(Alert::RecordMissing));
                self.record = None;
                self.unreachable("the record went back to an older generation".into());
            }
            (_, S::Preparing | S::Seeding | S::Promoting | S::Promoted | S::StoodDown) => {}
            (Standing::Other, _) => {
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
    pub(super) fn own(&mut self, record: Versioned<VmRecord>) {
        if self.state != StandbyState::Claiming {
            self.urgent = true;
            self.become_(StandbyState::Claiming);
        }
        self.record = Some(record);
        self.op = None;
        self.become_(StandbyState::Promoting);
        self.actions.push_back(StandbyAction::DropIncomplete);
    }

    pub(super) fn stand_down(&mut self, why: StandbyEnd) {
        self.become_(StandbyState::StoodDown);
        self.op = None;
        self.actions.push_back(StandbyAction::StandDown { why });
    }
}
