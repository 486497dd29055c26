//! The shell of a host in the model: forwards inputs, carries out actions in order, and
//! can be stopped between any two of them.

use super::guest::Guest;
use super::registry::Request;
use super::world::{Event, Message, Role, World};
use crate::mirror::primary::PrimaryEnd;
use crate::mirror::{
    Alert, ClaimOutcome, Micros, PrimaryAction, PrimaryInput, StandbyAction, StandbyInput, Ticket,
    VmRecord,
};
use crate::pool::Epoch;

/// All three parts of an epoch.
pub(super) const WHOLE: u8 = 0b111;

impl World {
    pub(super) fn tell_primary(&mut self, host: usize, input: PrimaryInput) {
        if let Role::Primary { machine, .. } = &mut self.hosts[host].role {
            machine.handle(input, self.now);
            self.drain(host);
        }
    }

    pub(super) fn tell_standby(&mut self, host: usize, input: StandbyInput) {
        if let Role::Standby { machine, .. } = &mut self.hosts[host].role {
            machine.handle(input, self.now);
            self.drain(host);
        }
    }

    /// Carry out what the machine asks for, unless the host crashes or freezes meanwhile.
    fn drain(&mut self, host: usize) {
        loop {
            if self.now < self.hosts[host].frozen_until {
                return;
            }
            if self.stopped_between(host) {
                return;
            }
            match &mut self.hosts[host].role {
                Role::Idle => return,
                Role::Primary { machine, .. } => match machine.poll_action() {
                    Some(action) => self.primary_action(host, action),
                    None => break,
                },
                Role::Standby { machine, .. } => match machine.poll_action() {
                    Some(action) => self.standby_action(host, action),
                    None => break,
                },
            }
        }
        let wakeup = match &self.hosts[host].role {
            Role::Idle => return,
            Role::Primary { machine, .. } => machine.next_wakeup(),
            Role::Standby { machine, .. } => machine.next_wakeup(),
        };
        let due = self.hosts[host].tick_at;
        if wakeup != Micros::MAX && (due <= self.now || wakeup < due) {
            self.hosts[host].tick_at = wakeup.max(self.now + Micros(1));
            let late = Micros(self.rng.between(1, 200));
            self.after(wakeup.since(self.now) + late, Event::Tick { host });
        }
    }

    fn stopped_between(&mut self, host: usize) -> bool {
        let it = &mut self.hosts[host];
        let mut due = |counter: fn(&mut super::world::Host) -> &mut Option<u64>| {
            let counter = counter(it);
            let due = *counter == Some(0);
            *counter = counter.and_then(|left| left.checked_sub(1));
            due
        };
        let (crash, freeze) = (due(|it| &mut it.crash_in), due(|it| &mut it.freeze_in));
        if crash {
            self.crash(host);
        } else if freeze {
            self.freeze(host);
        }
        crash || freeze
    }

    fn ask(&mut self, host: usize, ticket: Ticket, write: Option<(u64, VmRecord)>) {
        let id = self.rng.next();
        let course = self.registry.course(&mut self.rng);
        self.requests
            .insert(id, (Request { write }, None, course.known));
        if let Some(effect) = course.effect {
            self.after(effect, Event::RegistryEffect { id });
        }
        let life = self.hosts[host].life;
        self.after(
            course.answer,
            Event::RegistryAnswer {
                id,
                host,
                life,
                ticket,
            },
        );
    }

    fn primary_action(&mut self, host: usize, action: PrimaryAction) {
        let life = self.hosts[host].life;
        let Role::Primary { guest, attempt, .. } = &mut self.hosts[host].role else {
            return;
        };
        guest.account(self.now);
        match action {
            PrimaryAction::PrepareStandby { generation, .. } => {
                *attempt = generation;
                self.send(host, Message::Prepare(generation));
            }
            PrimaryAction::BeginSeeding => {
                let generation = *attempt;
                self.load.open(host, self.now);
                let delay = Micros(self.rng.between(10_000, 120_000));
                self.after(
                    delay,
                    Event::Converged {
                        host,
                        life,
                        generation,
                    },
                );
            }
            PrimaryAction::EndSeeding { .. } | PrimaryAction::Alert(_) => {}
            PrimaryAction::Cut {
                epoch,
                stay_stopped,
            } => {
                if !guest.gated {
                    guest.gated = true;
                    guest.ran = Micros::ZERO;
                    guest.epoch = epoch.0;
                }
                guest.paused = true;
                let ok = !self.rng.permille(5);
                let pause = Micros(self.rng.between(800, 4000));
                self.report.cuts += 1;
                self.after(
                    pause,
                    Event::CutEnd {
                        host,
                        life,
                        epoch,
                        ok,
                        pause,
                        stay_stopped,
                    },
                );
            }
            PrimaryAction::Release { through, until } => {
                if self.now >= until {
                    return self
                        .tell_primary(host, PrimaryInput::SelfStalled { for_: Micros::ZERO });
                }
                let generation = *attempt;
                self.check_release(host, generation, through);
                self.release(host, Some(through));
            }
            PrimaryAction::ConfirmMirrored { generation, epoch } => {
                self.send(host, Message::Confirm(generation, epoch));
            }
            PrimaryAction::Claim {
                ticket,
                expected,
                value,
            } => {
                self.ask(host, ticket, Some((expected, value)));
            }
            PrimaryAction::ReadRecord { ticket } => self.ask(host, ticket, None),
            // The one stop takes the place of the other.
            PrimaryAction::HoldStill { .. } => {
                guest.held = true;
                guest.held_back = false;
            }
            PrimaryAction::Resume => guest.held = false,
            PrimaryAction::HoldBack => {
                guest.held_back = true;
                self.report.holds += 1;
            }
            PrimaryAction::LetGo => guest.held_back = false,
            PrimaryAction::GoSolo { .. } => {
                if guest.gated {
                    self.report.solos += 1;
                }
                self.check_solo(host);
                self.release(host, None);
            }
            PrimaryAction::DismissStandby => {
                let generation = *attempt;
                self.send(host, Message::Dismiss(generation));
            }
            PrimaryAction::Handover { generation, epoch } => {
                let session = *attempt;
                self.send(host, Message::Handover(session, generation, epoch));
            }
            PrimaryAction::TellGone { .. } => {
                let generation = *attempt;
                self.send(host, Message::Gone(generation));
            }
            PrimaryAction::StandDown { why } => {
                if matches!(why, PrimaryEnd::Deposed { .. }) {
                    self.check_deposed(host);
                }
                self.hosts[host].role = Role::Idle;
                self.hosts[host].life += 1;
            }
        }
    }

    /// Let packets leave: through an epoch, or everything.
    fn release(&mut self, host: usize, through: Option<Epoch>) {
        let Role::Primary { guest, .. } = &mut self.hosts[host].role else {
            return;
        };
        let Guest { gate, gated, .. } = guest;
        let leaving = match through {
            Some(epoch) => gate
                .extract_if(.., |(tag, _)| *tag <= epoch.0)
                .collect::<Vec<_>>(),
            None => {
                *gated = false;
                std::mem::take(gate)
            }
        };
        for (_, answer) in leaving {
            self.leaves(host, answer);
        }
    }

    fn standby_action(&mut self, host: usize, action: StandbyAction) {
        let life = self.hosts[host].life;
        let Role::Standby { copy, attempt, .. } = &mut self.hosts[host].role else {
            return;
        };
        let attempt = *attempt;
        match action {
            StandbyAction::TellReady => self.send(host, Message::Ready(attempt)),
            StandbyAction::Ack { generation, epoch } => {
                self.send(host, Message::Ack(generation, epoch));
                // Now and then a copy of it wanders about for long.
                if self.rng.permille(60) {
                    let delay = Micros(self.rng.between(1000, 1_500_000));
                    let message = Message::Ack(generation, epoch);
                    self.after(
                        delay,
                        Event::Deliver {
                            to: 1 - host,
                            from_life: life,
                            message,
                        },
                    );
                }
            }
            StandbyAction::Apply { epoch } => {
                let slow = self.rng.permille(50);
                let delay = Micros(self.rng.between(100, if slow { 200_000 } else { 3000 }));
                self.after(delay, Event::ApplyDisk { host, life, epoch });
            }
            StandbyAction::DropIncomplete => copy.buffered.retain(|_, (parts, _)| *parts == WHOLE),
            StandbyAction::Claim {
                ticket,
                expected,
                value,
            } => {
                self.ask(host, ticket, Some((expected, value)));
            }
            StandbyAction::ReadRecord { ticket } => self.ask(host, ticket, None),
            StandbyAction::Promote { epoch, record, .. } => {
                let state = copy.state;
                self.check_promote(host, attempt, epoch);
                self.check_promoted(host, attempt, epoch, state);
                let delay = Micros(self.rng.between(3000, 9000));
                self.after(
                    delay,
                    Event::PromoteEnd {
                        host,
                        life,
                        epoch,
                        record,
                    },
                );
            }
            StandbyAction::StandDown { why } => {
                self.check_standby_end(host, attempt, &why);
                if matches!(why, crate::mirror::standby::StandbyEnd::Broken { .. }) {
                    self.send(host, Message::StandbyGone(attempt));
                }
                self.hosts[host].role = Role::Idle;
                self.hosts[host].life += 1;
            }
            StandbyAction::TellBroken { .. } => self.send(host, Message::StandbyGone(attempt)),
            StandbyAction::Alert(Alert::PartnerConfused { reason }) => {
                self.violated(
                    "bounded",
                    format!("a standby is confused by an honest primary: {reason}"),
                );
            }
            StandbyAction::Alert(_) => {}
        }
    }

    /// Events that belong to one host and one machine on it.
    pub(super) fn on_host(&mut self, event: Event) {
        match event {
            Event::Tick { host } => {
                self.hosts[host].tick_at = Micros::MAX;
                self.tell_level(host);
                self.tell_machine(host, PrimaryInput::Tick, StandbyInput::Tick);
            }
            Event::Continue { host, life } if life == self.hosts[host].life => self.drain(host),
            Event::Deliver {
                to,
                from_life,
                message,
            } if self.hosts[to].up => {
                // Sent by a machine that is no more: on the wire already, or not.
                let orphan = self.faults_on && from_life != self.hosts[1 - to].life;
                if !(orphan && self.rng.permille(300)) {
                    self.deliver(to, message);
                }
            }
            Event::CutEnd {
                host,
                life,
                epoch,
                ok,
                pause,
                stay_stopped,
            } if life == self.hosts[host].life => {
                self.cut_end(host, epoch, ok.then_some(stay_stopped), pause);
            }
            Event::Closing { host, life, epoch } if life == self.hosts[host].life => {
                let at = self.now;
                self.tell_primary(host, PrimaryInput::Sent { epoch, at });
            }
            Event::Converged {
                host,
                life,
                generation,
            } if life == self.hosts[host].life => {
                if matches!(&self.hosts[host].role, Role::Primary { attempt, .. } if *attempt == generation)
                {
                    let input = if self.rng.permille(20) {
                        PrimaryInput::SeedingFailed {
                            reason: "by chance".into(),
                        }
                    } else {
                        PrimaryInput::SeedingConverged
                    };
                    self.tell_primary(host, input);
                }
            }
            Event::StandbyUp { host, life, ok } if life == self.hosts[host].life => {
                let reason = "by chance".into();
                self.tell_standby(
                    host,
                    if ok {
                        StandbyInput::ShellReady
                    } else {
                        StandbyInput::ShellFailed { reason }
                    },
                );
            }
            Event::ApplyDisk { host, life, epoch } if life == self.hosts[host].life => {
                if let Role::Standby { copy, .. } = &mut self.hosts[host].role
                    && let Some((_, state)) = copy.buffered.get(&epoch.0)
                {
                    copy.state.disk = state.disk;
                    let delay = Micros(self.rng.between(100, 2000));
                    self.after(delay, Event::ApplyRest { host, life, epoch });
                }
            }
            Event::ApplyRest { host, life, epoch } if life == self.hosts[host].life => {
                if let Role::Standby { copy, .. } = &mut self.hosts[host].role
                    && let Some((_, state)) = copy.buffered.remove(&epoch.0)
                {
                    let disk = copy.state.disk;
                    copy.state = super::GuestState { disk, ..state };
                    self.tell_standby(host, StandbyInput::Applied { epoch });
                }
            }
            Event::PromoteEnd {
                host,
                life,
                epoch,
                record,
            } if life == self.hosts[host].life => {
                let Role::Standby { attempt, copy, .. } = &self.hosts[host].role else {
                    return;
                };
                let (attempt, state) = (*attempt, copy.state);
                self.check_promoted(host, attempt, epoch, state);
                self.tell_standby(host, StandbyInput::Promoted);
                if !self.hosts[host].up {
                    return;
                }
                self.report.promotions += 1;
                self.start_primary(host, record, state);
            }
            Event::RegistryAnswer {
                id,
                host,
                life,
                ticket,
            } => {
                let Some((_, outcome, known)) = self.requests.get(&id).cloned() else {
                    return;
                };
                if life != self.hosts[host].life {
                    return;
                }
                let outcome = match outcome {
                    Some(outcome) if known => outcome,
                    _ => ClaimOutcome::Unreachable {
                        reason: "no answer".into(),
                    },
                };
                let input = PrimaryInput::ClaimResult {
                    ticket,
                    outcome: outcome.clone(),
                };
                self.tell_machine(host, input, StandbyInput::ClaimResult { ticket, outcome });
            }
            _ => {}
        }
    }

    fn cut_end(&mut self, host: usize, epoch: Epoch, taken: Option<bool>, pause: Micros) {
        let Role::Primary { guest, attempt, .. } = &mut self.hosts[host].role else {
            return;
        };
        let generation = *attempt;
        guest.account(self.now);
        guest.paused = false;
        let Some(stay_stopped) = taken else {
            return self.tell_primary(
                host,
                PrimaryInput::CutFailed {
                    epoch,
                    reason: "by chance".into(),
                },
            );
        };
        guest.held |= stay_stopped;
        guest.epoch = epoch.0 + 1;
        let ran = std::mem::take(&mut guest.ran);
        let state = guest.state;
        self.checkpoints.insert((generation, epoch), state);
        let busy = u16::try_from(self.rng.between(0, 1000)).unwrap_or(0);
        self.tell_primary(
            host,
            PrimaryInput::GuestBusy {
                permille: busy,
                crowding: Micros::ZERO,
            },
        );
        let bytes = self.load.epoch_bytes(ran);
        let pages = bytes / 4096;
        self.tell_primary(
            host,
            PrimaryInput::CutDone {
                epoch,
                pause,
                bytes,
                pages,
            },
        );
        for part in 0..3 {
            let through = self.load.put(host, bytes / 3, self.now);
            if part == 2 {
                self.close_epoch(host, epoch, through);
            }
            let message = Message::Part {
                generation,
                epoch,
                part,
                state,
            };
            self.send_after(through, host, message);
        }
        self.tell_level(host);
    }
}
