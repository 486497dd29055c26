//! How a primary leaves a mirror: back to solo, handed over, deposed.

use super::machine::Primary;
use super::{PrimaryAction, PrimaryEnd, PrimaryState};
use crate::mirror::Alert;
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::pool::HostName;

impl Primary {
    /// The partner or the way to it is broken.
    pub(super) fn mirror_broken(&mut self, reason: String) {
        use PrimaryState as S;
        match self.state {
            S::Reserving | S::Preparing | S::Seeding | S::FirstEpoch => self.abort_attempt(reason),
            S::Confirming | S::Mirrored | S::LastEpoch | S::HandingOver => self.begin_claim(reason),
            S::Solo | S::Claiming | S::Ending | S::StoodDown => {}
        }
    }

    /// Before a write that names the standby was ever asked for, going back needs no claim.
    pub(super) fn abort_attempt(&mut self, reason: String) {
        use PrimaryState as S;
        let before = self.state;
        if before == S::Seeding {
            self.actions.push_back(PrimaryAction::EndSeeding {
                reason: reason.clone(),
            });
        }
        if before == S::FirstEpoch {
            self.go_solo();
        } else {
            self.become_(S::Solo);
        }
        if before != S::Reserving {
            self.actions.push_back(PrimaryAction::DismissStandby);
        }
        self.not_mirrored(reason);
    }

    pub(super) fn not_mirrored(&mut self, reason: String) {
        self.partner = None;
        self.last_reason = Some(reason.clone());
        self.actions
            .push_back(PrimaryAction::Alert(Alert::NotMirrored { reason }));
    }

    pub(super) fn begin_claim(&mut self, reason: String) {
        self.last_reason = Some(reason);
        self.probe = None;
        self.retry_at = self.now;
        self.become_(PrimaryState::Claiming);
        if sabotaged(Bug::SoloWithoutClaim) {
            self.op = None;
            self.go_solo();
        }
    }

    /// Output goes direct from here on.
    pub(super) fn go_solo(&mut self) {
        self.generation = self.record.value.generation;
        if self.state != PrimaryState::Ending {
            self.become_(PrimaryState::Solo);
        }
        self.actions.push_back(PrimaryAction::GoSolo {
            generation: self.generation,
        });
        self.resume();
        if let Some((epoch, _)) = self.cutting.take() {
            self.stray_cut = Some(self.last_epoch == Some(epoch));
        }
        self.early_ack = None;
        self.in_flight.clear();
        self.last_epoch = None;
        self.probe = None;
    }

    pub(super) fn resume(&mut self) {
        if (self.holding_still || self.guest_stopped) && self.state != PrimaryState::Ending {
            self.actions.push_back(PrimaryAction::Resume);
        }
        self.holding_still = false;
        self.guest_stopped = false;
        self.unreachable_alerted = false;
    }

    pub(super) fn depose(&mut self, by: HostName) {
        self.actions
            .push_back(PrimaryAction::Alert(Alert::Deposed { by: by.clone() }));
        self.stand_down(PrimaryEnd::Deposed { by });
    }

    pub(super) fn hand_over(&mut self) {
        let to = self.record.value.owner.clone();
        self.actions.push_back(PrimaryAction::Handover {
            generation: self.record.value.generation,
            epoch: self.committed,
        });
        self.stand_down(PrimaryEnd::HandedOver { to });
    }

    pub(super) fn stand_down(&mut self, why: PrimaryEnd) {
        self.become_(PrimaryState::StoodDown);
        self.op = None;
        self.actions.push_back(PrimaryAction::StandDown { why });
    }

    /// The registry names the standby: from here acknowledgements release.
    pub(super) fn confirmed(&mut self) {
        self.become_(PrimaryState::Mirrored);
        self.resume();
        self.actions.push_back(PrimaryAction::ConfirmMirrored {
            generation: self.generation,
            epoch: self.committed,
        });
    }

    /// The attempt has its generation.
    pub(super) fn begin_preparing(&mut self, partner: HostName) {
        self.generation = self.record.value.generation;
        self.prepare_until = self.now + self.config.timing.prepare_patience;
        self.become_(PrimaryState::Preparing);
        self.actions.push_back(PrimaryAction::PrepareStandby {
            partner,
            generation: self.generation,
        });
    }
}
