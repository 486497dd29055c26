//! What the primary asks of the registry, and what the answers mean.
//!
//! At most one operation is outstanding. Which one is wanted is a function of the state,
//! so a change of mind while one is on its way simply asks for the next when the answer
//! is in. After an unknown outcome the same write is tried again: if it has landed, the
//! second try loses against the very value it wanted, which counts as won.

use super::machine::{Pending, Primary, Purpose};
use super::{PrimaryAction, PrimaryEnd, PrimaryState};
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::{
    Alert, ClaimOutcome, Micros, REGISTRY_RETRY_MAX, REGISTRY_RETRY_MIN, Ticket, Versioned,
    VmRecord,
};

impl Primary {
    /// The operation the state calls for.
    pub(super) fn wanted_purpose(&self) -> Option<Purpose> {
        use PrimaryState as S;
        match self.state {
            S::Reserving => Some(Purpose::Reserve),
            S::Confirming => Some(Purpose::Confirm),
            S::HandingOver => Some(Purpose::HandOver),
            S::Claiming => Some(Purpose::Solo),
            S::Ending => Some(Purpose::End),
            S::StoodDown => None,
            _ if self.verify => Some(Purpose::Verify),
            S::Mirrored => self.probe.map(Purpose::Probe),
            _ => None,
        }
    }

    pub(super) fn ask_registry(&mut self) {
        if self.op.is_some() || self.now < self.retry_at {
            return;
        }
        let Some(purpose) = self.wanted_purpose() else {
            return;
        };
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let wanted = self.wanted_record(purpose);
        self.actions.push_back(match wanted.clone() {
            None => PrimaryAction::ReadRecord { ticket },
            Some(value) => PrimaryAction::Claim {
                ticket,
                expected: self.record.version,
                value,
            },
        });
        self.op = Some(Pending {
            ticket,
            purpose,
            wanted,
            stalls: self.stalls,
        });
    }

    /// What a claim would write; `None` for a read.
    fn wanted_record(&self, purpose: Purpose) -> Option<VmRecord> {
        let mut record = self.record.value.clone();
        match purpose {
            Purpose::Probe(_) | Purpose::Verify => return None,
            // The attempt has its generation already (rule 1).
            Purpose::Confirm => record.standby.clone_from(&self.partner),
            Purpose::Reserve | Purpose::Solo | Purpose::End | Purpose::HandOver => {
                record.generation = record.generation.next();
                record.standby = None;
                record.running = purpose != Purpose::End;
                if let (Purpose::HandOver, Some(partner)) = (purpose, &self.partner) {
                    record.owner.clone_from(partner);
                }
            }
        }
        Some(record)
    }

    pub(super) fn registry_answered(&mut self, ticket: Ticket, outcome: ClaimOutcome) {
        let Some(op) = self.op.take_if(|op| op.ticket == ticket) else {
            return;
        };
        match outcome {
            ClaimOutcome::Unreachable { .. }
                if sabotaged(Bug::UnknownIsWon) && op.wanted.is_some() =>
            {
                let value = op
                    .wanted
                    .clone()
                    .unwrap_or_else(|| self.record.value.clone());
                let version = self.record.version + 1;
                self.won(op.purpose, Versioned { version, value });
            }
            ClaimOutcome::Unreachable { reason }
                if sabotaged(Bug::UnknownIsLost)
                    && op.purpose == Purpose::Confirm
                    && self.state == PrimaryState::Confirming =>
            {
                self.go_solo();
                self.actions.push_back(PrimaryAction::DismissStandby);
                self.not_mirrored(reason);
            }
            ClaimOutcome::Unreachable { reason } => self.unreachable(op.purpose, reason),
            ClaimOutcome::Won(record) => {
                self.reached();
                self.won(op.purpose, record);
            }
            ClaimOutcome::Lost(None) => {
                self.actions
                    .push_back(PrimaryAction::Alert(Alert::RecordMissing));
                self.unreachable(op.purpose, "the VM's record is missing".into());
            }
            ClaimOutcome::Lost(Some(found)) => {
                self.reached();
                self.found(&op, found);
            }
        }
    }

    fn reached(&mut self) {
        self.backoff = REGISTRY_RETRY_MIN;
        self.unreachable_alerted = false;
        self.retry_at = self.now;
    }

    fn unreachable(&mut self, purpose: Purpose, reason: String) {
        self.retry_at = match sabotaged(Bug::NeverAsksAgain) {
            true => Micros::MAX,
            false => self.now + self.backoff,
        };
        self.backoff = Micros(self.backoff.0 * 2).min(REGISTRY_RETRY_MAX);
        match purpose {
            Purpose::Probe(wish) => {
                // Nothing was touched: leave the running mirror alone.
                let what = match wish {
                    super::machine::Wish::Unprotect => "unprotect",
                    super::machine::Wish::Switchover => "switchover",
                };
                self.probe = None;
                let reason =
                    format!("the registry cannot be reached: {reason}; try again when it can");
                return self
                    .actions
                    .push_back(PrimaryAction::Alert(Alert::Refused { what, reason }));
            }
            Purpose::Reserve => {
                if self.state == PrimaryState::Reserving {
                    self.mirror_broken(format!("the registry cannot be reached: {reason}"));
                }
                return;
            }
            Purpose::Confirm
            | Purpose::HandOver
            | Purpose::Solo
            | Purpose::End
            | Purpose::Verify => {}
        }
        if !self.unreachable_alerted {
            self.unreachable_alerted = true;
            self.actions
                .push_back(PrimaryAction::Alert(Alert::RegistryUnreachable {
                    reason: reason.clone(),
                }));
        }
        // Solo, the registry has no say in whether the VM runs; ending, nothing runs.
        if self.state.holds_output() && !self.holding_still {
            self.holding_still = true;
            self.actions.push_back(PrimaryAction::HoldStill { reason });
        }
    }

    /// `record` is what the registry holds, and it is what `purpose` wanted.
    fn won(&mut self, purpose: Purpose, record: Versioned<VmRecord>) {
        use PrimaryState as S;
        self.record = record;
        // Whatever the state is by now: with another owner this side is done.
        if self.record.value.owner != self.config.me {
            return self.hand_over();
        }
        match (purpose, self.state) {
            (Purpose::Reserve, S::Reserving) => {
                if let Some(partner) = self.partner.clone() {
                    self.begin_preparing(partner);
                }
            }
            (Purpose::Confirm, S::Confirming) => self.confirmed(),
            (Purpose::Solo, S::Claiming) => {
                let reason = self.last_reason.clone().unwrap_or_default();
                self.go_solo();
                self.actions.push_back(PrimaryAction::DismissStandby);
                self.not_mirrored(reason);
            }
            (Purpose::End, S::Ending) => {
                self.go_solo();
                self.actions.push_back(PrimaryAction::DismissStandby);
                self.stand_down(PrimaryEnd::GuestGone);
            }
            (_, S::Solo) => self.generation = self.record.value.generation,
            // The state has moved on while the answer was under way; it asks anew.
            _ => {}
        }
    }

    /// `found` is what the registry holds: the answer to a read or to a lost claim.
    fn found(&mut self, op: &Pending, found: Versioned<VmRecord>) {
        if op.wanted.as_ref() == Some(&found.value) {
            return self.won(op.purpose, found);
        }
        if found.value.owner != self.config.me {
            return self.depose(found.value.owner);
        }
        let mine = self.record.value.generation;
        if found.value.generation < mine {
            self.actions
                .push_back(PrimaryAction::Alert(Alert::RecordMissing));
            return self.unreachable(
                op.purpose,
                format!(
                    "the record went back to generation {}",
                    found.value.generation
                ),
            );
        }
        if found.value.generation > mine.next() {
            // Two steps ahead is no late write of this machine's: the VM was started anew.
            return self.depose(found.value.owner);
        }
        self.record = found;
        match op.purpose {
            Purpose::Verify if op.stalls == self.stalls => self.verified(),
            Purpose::Probe(wish) if self.state == PrimaryState::Mirrored => {
                self.probe = None;
                self.grant(wish);
            }
            // A late write of this machine's own, or another field changed: ask again.
            _ => {}
        }
    }

    fn verified(&mut self) {
        self.verify = false;
        let named = matches!(self.state, PrimaryState::Mirrored | PrimaryState::LastEpoch);
        if named && self.record.value.standby != self.partner {
            return self.mirror_broken("the record does not name the standby any more".into());
        }
        if self.holding_still {
            self.holding_still = false;
            // After the last cut of a switchover the guest stands for another reason.
            if !self.guest_stopped {
                self.actions.push_back(PrimaryAction::Resume);
            }
        }
    }
}
