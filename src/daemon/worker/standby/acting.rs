//! What a standby does when its machine says so.

use super::StandbySide;
use super::applier::LastApplied;
use crate::daemon::claims::Reply;
use crate::daemon::clock::{now, now_ns};
use crate::daemon::control::ControlMsg;
use crate::daemon::worker::WorkerEvent;
use crate::mirror::standby::StandbyEnd;
use crate::mirror::{Alert, StandbyAction, StandbyInput, Ticket};
use crate::pool::Epoch;
use interconnect::frame::{Frame, FrameKind};

impl StandbySide<'_> {
    pub(super) fn input(&mut self, input: StandbyInput) {
        self.machine.handle(input, now());
        while let Some(action) = self.machine.poll_action() {
            if let Some(answer) = self.carry_out(action) {
                self.machine.handle(answer, now());
            }
        }
    }

    fn carry_out(&mut self, action: StandbyAction) -> Option<StandbyInput> {
        let vm = self.config.spec.uuid;
        match action {
            StandbyAction::TellReady => self.peer.say(vm, self.generation, &ControlMsg::Ready),
            StandbyAction::Ack { generation, epoch } => {
                let ack = Frame::empty(FrameKind::EpochAck, vm, generation, epoch);
                if let Err(e) = self.peer.interconnect.control(ack) {
                    tracing::info!(%epoch, "an acknowledgement could not be sent: {e}");
                }
            }
            StandbyAction::Apply { epoch } => return self.apply(epoch),
            StandbyAction::DropIncomplete => {
                let mut assembler = self.landing.assembler();
                assembler.reset();
            }
            StandbyAction::Claim {
                ticket,
                expected,
                value,
            } => {
                let reply = self.claim_reply(ticket);
                self.env.claims.claim(vm, Some(expected), value, reply);
            }
            StandbyAction::ReadRecord { ticket } => {
                let reply = self.claim_reply(ticket);
                self.env.claims.read(vm, reply);
            }
            StandbyAction::Promote {
                generation,
                epoch,
                record,
            } => {
                return Some(match self.promote(generation, epoch) {
                    Ok(control) => {
                        self.promoted = Some((control, record));
                        StandbyInput::Promoted
                    }
                    Err(reason) => StandbyInput::PromotionFailed { reason },
                });
            }
            StandbyAction::StandDown { why } => {
                self.over = true;
                let words = match why {
                    StandbyEnd::Dismissed => "dismissed".to_owned(),
                    StandbyEnd::NotNamed { reason } => reason,
                    StandbyEnd::Broken { reason } => {
                        let message = ControlMsg::StandbyGone {
                            reason: reason.clone(),
                        };
                        self.peer.say(vm, self.generation, &message);
                        reason
                    }
                };
                self.shared.event(format!("standby stands down: {words}"));
            }
            StandbyAction::TellBroken { reason } => {
                self.shared.event(format!("standby broken: {reason}"));
                self.peer
                    .say(vm, self.generation, &ControlMsg::StandbyGone { reason });
            }
            StandbyAction::Alert(alert) => match alert {
                Alert::Refused { what, reason } => {
                    self.shared.event(format!("{what} refused: {reason}"));
                }
                other => self.shared.event(format!("{other:?}")),
            },
        }
        None
    }

    fn claim_reply(&self, ticket: Ticket) -> Reply {
        let inbox = self.inbox.clone();
        let asked_ns = now_ns();
        Box::new(move |outcome| {
            let _ = inbox.send(WorkerEvent::Claim {
                ticket,
                outcome,
                asked_ns,
            });
        })
    }

    /// Hand the epoch to the applier; its answer comes by the inbox.
    fn apply(&mut self, epoch: Epoch) -> Option<StandbyInput> {
        let failed = |reason: &str| StandbyInput::StandbyGuestDied {
            reason: format!("epoch {epoch} could not be applied: {reason}"),
        };
        let Some(received) = self.whole.pop_front().filter(|r| r.epoch == epoch) else {
            return Some(failed("it is not here"));
        };
        (!self.applier.apply(received)).then(|| failed("the applier has ended"))
    }

    /// The applier's answer.
    pub(super) fn applied(&mut self, epoch: Epoch, outcome: Result<Box<LastApplied>, String>) {
        if let Some(slots) = &self.slots {
            slots.give_back();
        }
        match outcome {
            Ok(last) => {
                self.epochs += 1;
                self.last = Some(*last);
                self.input(StandbyInput::Applied { epoch });
            }
            Err(reason) => self.input(StandbyInput::StandbyGuestDied {
                reason: format!("epoch {epoch} could not be applied: {reason}"),
            }),
        }
    }
}
