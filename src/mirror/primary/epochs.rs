//! Epochs of a primary: cut, acknowledged, released.

use super::machine::{InFlight, Primary};
use super::{PrimaryAction, PrimaryState};
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::{Alert, CUT_FAILURES_MAX, Flow, Micros};
use crate::pool::{Epoch, Generation};

impl Primary {
    pub(super) fn begin_epochs(&mut self) {
        self.cutting = None;
        self.last_cut = Epoch(0);
        self.in_flight.clear();
        self.committed = Epoch(0);
        self.committed_cut_at = None;
        self.fresh_until = Micros::ZERO;
        self.released = Epoch(0);
        self.cut_failures = 0;
        self.last_epoch = None;
        self.early_ack = None;
        self.flow = Flow::new(self.now);
        self.become_(PrimaryState::FirstEpoch);
        self.cut(false);
    }

    pub(super) fn cut(&mut self, stay_stopped: bool) {
        let epoch = self.last_cut.next();
        self.cutting = Some((epoch, self.now));
        self.schedule.cut_begun();
        if stay_stopped {
            self.last_epoch = Some(epoch);
        }
        self.actions.push_back(PrimaryAction::Cut {
            epoch,
            stay_stopped,
        });
    }

    pub(super) fn cut_done(&mut self, epoch: Epoch, pause: Micros, bytes: u64, pages: u64) {
        if let Some(stays_stopped) = self.stray_cut.take() {
            if stays_stopped {
                self.actions.push_back(PrimaryAction::Resume);
            }
            return;
        }
        let Some((cutting, cut_at)) = self.cutting else {
            return;
        };
        if cutting != epoch {
            return;
        }
        self.cutting = None;
        self.cut_failures = 0;
        self.last_cut = epoch;
        self.guest_stopped = self.last_epoch == Some(epoch);
        self.schedule.cut_done(self.now, pause, pages);
        self.flow.cut_done(cut_at, bytes, self.now);
        self.in_flight.push_back(InFlight {
            epoch,
            cut_at,
            sent_at: cut_at,
        });
        if sabotaged(Bug::ReleaseBeforeAck) && self.state == PrimaryState::Mirrored {
            self.actions.push_back(PrimaryAction::Release {
                through: epoch,
                until: Micros::MAX,
            });
        }
        if let Some(early) = self.early_ack.take() {
            self.acked(self.generation, early);
        }
    }

    pub(super) fn cut_failed(&mut self, epoch: Epoch, reason: &str) {
        if self.stray_cut.take().is_some()
            || self.cutting.map(|(cutting, _)| cutting) != Some(epoch)
        {
            return;
        }
        self.cutting = None;
        self.cut_failures += 1;
        self.early_ack = None;
        self.schedule.cut_failed(self.now);
        self.actions
            .push_back(PrimaryAction::Alert(Alert::CheckpointFailed {
                reason: reason.to_owned(),
            }));
        if self.last_epoch == Some(epoch) {
            self.last_epoch = None;
            if self.state == PrimaryState::LastEpoch {
                self.become_(PrimaryState::Mirrored);
                self.refuse(
                    "switchover",
                    format!("the last checkpoint failed: {reason}"),
                );
            }
        }
        if self.cut_failures >= CUT_FAILURES_MAX {
            self.mirror_broken(format!(
                "{CUT_FAILURES_MAX} checkpoints failed in a row: {reason}"
            ));
        }
    }

    pub(super) fn acked(&mut self, generation: Generation, epoch: Epoch) {
        if generation != self.generation && !sabotaged(Bug::GenerationNotCompared) {
            return;
        }
        if !self.state.holds_output() || epoch <= self.committed {
            return;
        }
        if epoch > self.last_cut {
            if self.cutting.map(|(cutting, _)| cutting) == Some(epoch) {
                self.early_ack = Some(epoch);
            } else if !sabotaged(Bug::GenerationNotCompared) {
                self.actions
                    .push_back(PrimaryAction::Alert(Alert::PartnerConfused {
                        reason: format!(
                            "acknowledged epoch {epoch}, the newest cut is {}",
                            self.last_cut
                        ),
                    }));
            }
            return;
        }
        while let Some(flight) = self.in_flight.front().copied() {
            if flight.epoch > epoch {
                break;
            }
            self.in_flight.pop_front();
            self.committed = flight.epoch;
            self.committed_cut_at = Some(flight.cut_at);
            self.fresh_until = flight.sent_at + self.config.timing.release_within;
        }
        if self.in_flight.is_empty() {
            self.flow.acknowledged(self.now);
        }
        if self.state == PrimaryState::FirstEpoch {
            self.retry_at = self.now;
            self.become_(PrimaryState::Confirming);
            if sabotaged(Bug::ReleaseBeforeConfirm) {
                self.release();
            }
        }
    }

    /// Release what is committed, if the acknowledgement is fresh and nothing is in doubt.
    pub(super) fn try_release(&mut self) {
        let named = matches!(self.state, PrimaryState::Mirrored | PrimaryState::LastEpoch);
        if !named || self.released >= self.committed {
            return;
        }
        if !sabotaged(Bug::StaleAckAccepted) {
            if self.verify || self.holding_still {
                return;
            }
            if self.now >= self.fresh_until {
                // The next epoch's acknowledgement will cover this one: get it soon.
                self.schedule.output_waiting(self.now);
                return;
            }
        }
        self.release();
    }

    pub(super) fn release(&mut self) {
        self.released = self.committed;
        let until = if sabotaged(Bug::StaleAckAccepted) {
            Micros::MAX
        } else {
            self.fresh_until
        };
        self.actions.push_back(PrimaryAction::Release {
            through: self.committed,
            until,
        });
    }

    pub(super) fn lag(&self, now: Micros) -> Option<Micros> {
        let since = self
            .committed_cut_at
            .filter(|_| self.state.holds_output())?;
        Some(now.since(since))
    }

    pub(super) fn check_lag(&mut self) {
        let Some(lag) = self.lag(self.now) else {
            self.lag_alerted = false;
            return;
        };
        let lagging = lag >= self.config.timing.lag_alarm;
        if lagging && !self.lag_alerted {
            self.actions
                .push_back(PrimaryAction::Alert(Alert::Lagging { lag }));
        }
        self.lag_alerted = lagging;
    }
}
