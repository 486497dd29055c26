//! The shell of a host in the model: forwards inputs, carries out actions in order, and can be
//! stopped between any two of them.

use super::check::{Checked, Violation, ensure};
use super::world::{
    CONTROL, Copied, EPOCHS, Frozen, Guest, Host, INTERVAL_MAX, Message, NAMES, Op, Role, TIMING,
    World, name,
};
use crate::mirror::primary::PrimaryEnd;
use crate::mirror::sabotage::{Bug, sabotaged};
use crate::mirror::standby::StandbyEnd;
use crate::mirror::{
    Alert, ClaimOutcome, MAX_IN_FLIGHT, Micros, Policy, Primary, PrimaryAction, PrimaryConfig,
    PrimaryInput, Standby, StandbyAction, StandbyConfig, StandbyInput, Ticket, Verdict, Versioned,
    VmRecord,
};
use crate::pool::spec::Overload;
use crate::pool::{Epoch, Generation};

/// A host stops after so many of its machine's actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stop {
    pub(super) after: u8,
    /// For good, or for a while.
    pub(super) crash: bool,
}

impl World {
    pub(super) fn tell_primary(&mut self, h: usize, input: PrimaryInput) {
        let now = self.now;
        if let Role::Primary(machine, _) = &mut self.hosts[h].role {
            if let Some(log) = &mut self.log {
                log.push(format!("    {} <- {input:?}", NAMES[h]));
            }
            machine.handle(input, now);
        }
    }

    pub(super) fn tell_standby(&mut self, h: usize, input: StandbyInput) {
        let now = self.now;
        if let Role::Standby(machine, _) = &mut self.hosts[h].role {
            if let Some(log) = &mut self.log {
                log.push(format!("    {} <- {input:?}", NAMES[h]));
            }
            machine.handle(input, now);
        }
    }

    /// Whichever machine the host runs gets its version of the news.
    pub(super) fn tell(&mut self, h: usize, primary: PrimaryInput, standby: StandbyInput) {
        self.tell_primary(h, primary);
        self.tell_standby(h, standby);
    }

    /// Carry out what the host's machine asks for. Returns the number of actions.
    pub(super) fn carry_out(&mut self, h: usize, stop: Option<Stop>) -> Result<u8, Violation> {
        let mut done = 0;
        while self.hosts[h].has_actions() {
            if let Some(stop) = stop
                && stop.after == done
            {
                match stop.crash {
                    true => self.crash(h, false),
                    false => self.hosts[h].frozen = Frozen::Now,
                }
                break;
            }
            done += 1;
            match &mut self.hosts[h].role {
                Role::Idle => {}
                Role::Primary(machine, _) => {
                    if let Some(action) = machine.poll_action() {
                        self.note(h, &action);
                        self.primary_action(h, action)?;
                    }
                }
                Role::Standby(machine, _) => {
                    if let Some(action) = machine.poll_action() {
                        self.note(h, &action);
                        self.standby_action(h, action)?;
                    }
                }
            }
        }
        Ok(done)
    }

    fn note(&mut self, h: usize, action: &impl std::fmt::Debug) {
        if let Some(log) = &mut self.log {
            log.push(format!("    {} -> {action:?}", NAMES[h]));
        }
    }

    fn primary_action(&mut self, h: usize, action: PrimaryAction) -> Checked {
        let Role::Primary(_, guest) = &mut self.hosts[h].role else {
            return Ok(());
        };
        let attempt = guest.attempt;
        match action {
            PrimaryAction::PrepareStandby { generation, .. } => {
                guest.attempt = generation;
                self.send(h, CONTROL, Message::Prepare(generation));
            }
            PrimaryAction::BeginSeeding => guest.seeding = true,
            PrimaryAction::EndSeeding { .. } => guest.seeding = false,
            PrimaryAction::Cut {
                epoch,
                stay_stopped,
            } => {
                guest.gated = true;
                guest.cutting = Some((epoch, stay_stopped));
            }
            PrimaryAction::Release { through, until } => {
                if self.now >= until && !sabotaged(Bug::ClockNotLookedAt) {
                    let for_ = Micros::ZERO;
                    self.tell_primary(h, PrimaryInput::SelfStalled { for_ });
                    return Ok(());
                }
                self.check_release(h, attempt, through)?;
                self.released = match self.released {
                    (of, released) if of == attempt => (of, released.max(through)),
                    _ => (attempt, through),
                };
                self.spoke = true;
            }
            PrimaryAction::ConfirmMirrored { generation, epoch } => {
                self.send(h, CONTROL, Message::Confirm(generation, epoch));
            }
            PrimaryAction::Claim {
                ticket,
                expected,
                value,
            } => self.ask(h, ticket, Some((expected, value))),
            PrimaryAction::ReadRecord { ticket } => self.ask(h, ticket, None),
            PrimaryAction::HoldStill { .. } => guest.held = true,
            PrimaryAction::Resume => guest.held = false,
            PrimaryAction::GoSolo { .. } => {
                guest.gated = false;
                guest.unsent = None;
                self.check_solo(h)?;
                self.spoke = true;
            }
            PrimaryAction::DismissStandby => self.send(h, CONTROL, Message::Dismiss(attempt)),
            PrimaryAction::Handover { generation, epoch } => {
                self.send(h, CONTROL, Message::Handover(attempt, generation, epoch));
            }
            PrimaryAction::TellGone { .. } => self.send(h, CONTROL, Message::Gone(attempt)),
            PrimaryAction::StandDown { why } => {
                if matches!(why, PrimaryEnd::Deposed { .. }) {
                    self.check_deposed(h)?;
                }
                self.end_role(h);
            }
            PrimaryAction::HoldBack | PrimaryAction::LetGo | PrimaryAction::Alert(_) => {}
        }
        Ok(())
    }

    fn standby_action(&mut self, h: usize, action: StandbyAction) -> Checked {
        let now = self.now;
        let Role::Standby(machine, copy) = &mut self.hosts[h].role else {
            return Ok(());
        };
        let attempt = copy.attempt;
        match action {
            StandbyAction::TellReady => self.send(h, CONTROL, Message::Ready(attempt)),
            StandbyAction::Ack { generation, epoch } => {
                self.send(h, CONTROL, Message::Ack(generation, epoch));
            }
            StandbyAction::Apply { epoch } => copy.applying = Some((epoch, false)),
            StandbyAction::Claim {
                ticket,
                expected,
                value,
            } => self.ask(h, ticket, Some((expected, value))),
            StandbyAction::ReadRecord { ticket } => self.ask(h, ticket, None),
            StandbyAction::Promote { epoch, record, .. } => {
                copy.promoting = Some(record);
                let applied = copy.applied;
                self.check_promote(h, attempt, epoch, applied)?;
                // From here its QEMU may run at any moment.
                self.alive_on = h;
            }
            StandbyAction::StandDown { why } => {
                let gave_up = machine.has_lost_patience(now);
                if !gave_up {
                    self.check_standby_end(h, attempt, &why)?;
                }
                self.hosts[h].gave_up = gave_up;
                if matches!(why, StandbyEnd::Broken { .. }) {
                    self.hosts[h].harmed = true;
                    self.send(h, CONTROL, Message::StandbyGone(attempt));
                }
                self.end_role(h);
            }
            StandbyAction::TellBroken { .. } => {
                self.send(h, CONTROL, Message::StandbyGone(attempt))
            }
            StandbyAction::Alert(Alert::PartnerConfused { reason }) => {
                return ensure(false, "bounded", || {
                    format!("a standby is confused by an honest primary: {reason}")
                });
            }
            StandbyAction::DropIncomplete | StandbyAction::Alert(_) => {}
        }
        Ok(())
    }

    pub(super) fn send(&mut self, from: usize, lane: usize, message: Message) {
        if self.hosts[1 - from].up {
            self.lanes[from][lane].push(message);
        }
    }

    fn ask(&mut self, host: usize, ticket: Ticket, write: Option<(u64, VmRecord)>) {
        self.ops.push(Op {
            host,
            ticket: Some(ticket),
            write,
            done: None,
            slow: false,
        });
    }

    /// The operation takes effect.
    pub(super) fn execute(&mut self, write: Option<&(u64, VmRecord)>) -> ClaimOutcome {
        match write {
            Some((expected, value)) if *expected == self.record.version => {
                if value.standby.is_some() {
                    self.named = self.named.max(value.generation);
                }
                self.record = Versioned {
                    version: expected + 1,
                    value: value.clone(),
                };
                ClaimOutcome::Won(self.record.clone())
            }
            _ => ClaimOutcome::Lost(Some(self.record.clone())),
        }
    }

    /// The host's machine is no more; what it asked for may still come about.
    fn end_role(&mut self, h: usize) {
        self.hosts[h].role = Role::Idle;
        for op in self.ops.iter_mut().filter(|op| op.host == h) {
            op.ticket = None;
        }
    }

    pub(super) fn crash(&mut self, h: usize, wire_lost: bool) {
        let gave_up = self.hosts[h].gave_up;
        // A host that had nothing of the VM loses nothing.
        let harmed = self.hosts[h].harmed || !matches!(self.hosts[h].role, Role::Idle);
        self.end_role(h);
        self.hosts[h] = Host {
            up: false,
            harmed,
            gave_up,
            deaf: self.hosts[h].deaf,
            ..Host::new()
        };
        self.lanes[1 - h] = [Vec::new(), Vec::new()];
        self.late.retain(|(to, _)| *to != h);
        if wire_lost {
            self.lanes[h] = [Vec::new(), Vec::new()];
        }
    }

    /// A machine for a VM that runs on the host from now on.
    pub(super) fn start_primary(&mut self, h: usize, record: Versioned<VmRecord>) {
        let config = PrimaryConfig {
            me: name(h),
            timing: TIMING,
            policy: Policy {
                // Flow control is not what is checked here; so it never holds the guest.
                overload: Overload::Solo,
                interval_max: INTERVAL_MAX,
                ..Policy::default()
            },
            max_in_flight: MAX_IN_FLIGHT,
        };
        let attempt = record.value.generation;
        let machine = Primary::new(config, record, self.now);
        let guest = Guest {
            gated: false,
            held: false,
            seeding: false,
            cutting: None,
            unsent: None,
            attempt,
        };
        let host = &mut self.hosts[h];
        host.role = Role::Primary(Box::new(machine), guest);
        host.harmed = false;
        host.gave_up = false;
        self.alive_on = h;
        let verdict = self.hosts[h].verdict;
        self.tell_primary(h, PrimaryInput::PeerVerdict(verdict));
        if !self.hosts[h].link_told {
            let reason = "cut".into();
            self.tell_primary(h, PrimaryInput::LinkDown { reason });
        }
    }

    /// The shell takes a message in: control messages only of its own session.
    pub(super) fn deliver(&mut self, h: usize, message: Message) {
        let reason = || "it says so".to_owned();
        let standby_of = match &self.hosts[h].role {
            Role::Standby(_, copy) => Some(copy.attempt),
            _ => None,
        };
        let primary_of = match &self.hosts[h].role {
            Role::Primary(_, guest) => Some(guest.attempt),
            _ => None,
        };
        match message {
            Message::Prepare(generation) => self.prepare(h, generation),
            Message::Epoch(generation, epoch) if standby_of == Some(generation) => {
                self.whole = match self.whole {
                    (of, whole) if of == generation && epoch != whole.next() => (of, whole),
                    _ => (generation, epoch),
                };
                self.tell_standby(h, StandbyInput::EpochWhole { generation, epoch });
            }
            // The machine itself has to tell old acknowledgements from new ones.
            Message::Ack(generation, epoch) => {
                self.tell_primary(h, PrimaryInput::Acked { generation, epoch });
            }
            Message::Ready(g) if primary_of == Some(g) => {
                self.tell_primary(h, PrimaryInput::StandbyReady);
            }
            Message::Refused(g) if primary_of == Some(g) => {
                let reason = reason();
                self.tell_primary(h, PrimaryInput::StandbyRefused { reason });
            }
            Message::StandbyGone(g) if primary_of == Some(g) => {
                let reason = reason();
                self.tell_primary(h, PrimaryInput::StandbyGone { reason });
            }
            Message::Confirm(generation, epoch) => {
                self.tell_standby(h, StandbyInput::MirrorConfirmed { generation, epoch });
            }
            Message::Handover(session, generation, epoch) if standby_of == Some(session) => {
                self.tell_standby(h, StandbyInput::Handover { generation, epoch });
            }
            Message::Gone(g) if standby_of == Some(g) => {
                let reason = reason();
                self.tell_standby(h, StandbyInput::PrimaryGone { reason });
            }
            Message::Dismiss(g) if standby_of == Some(g) => {
                self.tell_standby(h, StandbyInput::Dismissed);
            }
            _ => {}
        }
    }

    fn prepare(&mut self, h: usize, generation: Generation) {
        match &self.hosts[h].role {
            Role::Primary(..) => return self.send(h, CONTROL, Message::Refused(generation)),
            Role::Standby(_, copy) if copy.attempt >= generation => return,
            Role::Standby(..) | Role::Idle => {}
        }
        self.end_role(h);
        let config = StandbyConfig {
            me: name(h),
            primary: name(1 - h),
            generation,
            timing: TIMING,
            max_in_flight: MAX_IN_FLIGHT,
        };
        let machine = Box::new(Standby::new(config, self.now));
        let copy = Copied {
            attempt: generation,
            preparing: true,
            applied: Epoch(0),
            applying: None,
            promoting: None,
        };
        let host = &mut self.hosts[h];
        host.role = Role::Standby(machine, copy);
        host.harmed = false;
        host.gave_up = false;
        if host.verdict == Verdict::Lost {
            self.tell_standby(h, StandbyInput::PeerVerdict(Verdict::Lost));
        }
    }

    /// The checkpoint is taken, or not; what it holds goes to the link next.
    pub(super) fn cut_ends(&mut self, h: usize, taken: bool) {
        let Role::Primary(_, guest) = &mut self.hosts[h].role else {
            return;
        };
        let Some((epoch, stay_stopped)) = guest.cutting.take() else {
            return;
        };
        if !taken {
            let reason = "by chance".into();
            return self.tell_primary(h, PrimaryInput::CutFailed { epoch, reason });
        }
        guest.held |= stay_stopped;
        // A cut of a given-up attempt is taken but not sent.
        guest.unsent = guest.gated.then_some(epoch);
        let input = PrimaryInput::CutDone {
            epoch,
            pause: Micros::ZERO,
            bytes: 0,
            pages: 0,
        };
        self.tell_primary(h, input);
    }

    /// The closing frame of the epoch is handed to the link.
    pub(super) fn send_epoch(&mut self, h: usize) {
        let Role::Primary(_, guest) = &mut self.hosts[h].role else {
            return;
        };
        let generation = guest.attempt;
        if let Some(epoch) = guest.unsent.take() {
            let at = self.now;
            self.tell_primary(h, PrimaryInput::Sent { epoch, at });
            self.send(h, EPOCHS, Message::Epoch(generation, epoch));
        }
    }
}
