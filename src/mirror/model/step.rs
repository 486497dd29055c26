//! The state that follows a step.

use super::check::Violation;
use super::event::{Cut, Event, Step};
use super::world::{Frozen, Host, Message, Op, Role, SILENT_MAX, TICK, World, name};
use crate::mirror::{ClaimOutcome, Micros, PrimaryInput, StandbyInput, VmRecord};

impl World {
    /// Do it. Returns how many actions it led to, so that the host may be stopped in them.
    pub(super) fn take(&mut self, event: Event) -> Result<u8, Violation> {
        self.spoke = false;
        let host = self.host_of(event.step);
        if let Some(stop) = event.stop {
            match stop.crash {
                true => self.left.crashes -= 1,
                false => self.left.freezes -= 1,
            }
        }
        self.step(event.step);
        let mut actions = 0;
        if let Some(h) = host {
            actions = self.carry_out(h, event.stop)?;
        }
        self.forget_what_is_past();
        self.check_state()?;
        self.check_bounded()?;
        Ok(actions)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Resume { .. } | Step::Heal | Step::Ghost(_) | Step::Late(_) => self.free(step),
            Step::HurryOp(i) => self.ops[i].slow = false,
            Step::HurryApply(h) => self.slow_apply(h, false),
            Step::Pass => self.pass(),
            Step::Effect(i) => {
                let write = self.ops[i].write.clone();
                self.ops[i].done = Some(self.execute(write.as_ref()));
            }
            Step::Answer(i) => {
                let op = self.ops.remove(i);
                if let Some(outcome) = op.done.clone() {
                    self.answer(&op, outcome);
                }
            }
            Step::Continue(_) => {}
            Step::Verdict(h) => {
                if let Some(verdict) = self.hosts[h].verdict_due() {
                    self.hosts[h].verdict = verdict;
                    self.tell(
                        h,
                        PrimaryInput::PeerVerdict(verdict),
                        StandbyInput::PeerVerdict(verdict),
                    );
                }
            }
            Step::LinkNews(h) => {
                self.hosts[h].link_told = !self.link_down;
                let reason = || "cut".to_owned();
                match self.link_down {
                    false => self.tell(h, PrimaryInput::LinkUp, StandbyInput::LinkUp),
                    true => self.tell(
                        h,
                        PrimaryInput::LinkDown { reason: reason() },
                        StandbyInput::LinkDown { reason: reason() },
                    ),
                }
            }
            Step::Wake(h) => self.tell(h, PrimaryInput::Tick, StandbyInput::Tick),
            Step::CutDone(h) => self.cut_ends(h, true),
            Step::Send(h) => self.send_epoch(h),
            Step::Deliver { from, lane } => {
                let message = self.lanes[from][lane].remove(0);
                self.deliver(1 - from, message);
            }
            Step::Converged(h) => {
                if let Role::Primary(_, guest) = &mut self.hosts[h].role {
                    guest.seeding = false;
                }
                self.tell_primary(h, PrimaryInput::SeedingConverged);
            }
            Step::StandbyUp(_) | Step::Applied(_) | Step::Promoted(_) => self.standby_step(step),
            Step::StartClaim(h) => {
                if let Some(found) = self.hosts[h].starting.take() {
                    let value = VmRecord::started(name(h), Some(&found.value));
                    let write = (found.version, value);
                    if let ClaimOutcome::Won(record) = self.execute(Some(&write)) {
                        self.start_primary(h, record);
                    }
                }
            }
            fault => self.fault(fault),
        }
    }

    fn free(&mut self, step: Step) {
        match step {
            Step::Resume { h, hears_first } => {
                self.hosts[h].frozen = Frozen::No;
                if hears_first && self.hears(h) {
                    self.hosts[h].silent = 0;
                }
            }
            Step::Heal => {
                self.link_down = false;
                self.hosts.iter_mut().for_each(|host| host.deaf = false);
            }
            Step::Ghost(i) => {
                let op = self.ops.remove(i);
                self.execute(op.write.as_ref());
            }
            Step::Late(i) => {
                let (to, message) = self.late.remove(i);
                self.deliver(to, message);
            }
            _ => {}
        }
    }

    fn standby_step(&mut self, step: Step) {
        let (Step::StandbyUp(h) | Step::Applied(h) | Step::Promoted(h)) = step else {
            return;
        };
        let Role::Standby(_, copy) = &mut self.hosts[h].role else {
            return;
        };
        match step {
            Step::StandbyUp(_) => {
                copy.preparing = false;
                self.tell_standby(h, StandbyInput::ShellReady);
            }
            Step::Applied(_) => {
                if let Some((epoch, _)) = copy.applying.take() {
                    copy.applied = epoch;
                    self.tell_standby(h, StandbyInput::Applied { epoch });
                }
            }
            _ => {
                if let Some(record) = copy.promoting.take() {
                    self.tell_standby(h, StandbyInput::Promoted);
                    self.start_primary(h, record);
                }
            }
        }
    }

    fn fault(&mut self, step: Step) {
        let left = &mut self.left;
        match step {
            Step::Crash { h, wire_lost } => {
                left.crashes -= 1;
                self.crash(h, wire_lost);
            }
            Step::Freeze(h) => {
                left.freezes -= 1;
                self.hosts[h].frozen = Frozen::Now;
            }
            Step::Cut(cut) => {
                left.cuts -= 1;
                self.link_down = matches!(cut, Cut::Link | Cut::All);
                for h in 0..2 {
                    self.hosts[h].deaf = cut == Cut::All || cut == Cut::Heartbeats(h);
                }
            }
            Step::Lose { from, lane } => {
                left.losses -= 1;
                self.lanes[from][lane].remove(0);
            }
            Step::Delay { from, lane } => {
                left.delays -= 1;
                let message = self.lanes[from][lane].remove(0);
                self.put_off(1 - from, message);
            }
            Step::Copy { from, lane } => {
                left.copies -= 1;
                let message = self.lanes[from][lane].remove(0);
                self.put_off(1 - from, message);
                self.deliver(1 - from, message);
            }
            Step::DelayOp(i) => {
                left.delays -= 1;
                self.ops[i].slow = true;
            }
            Step::DelayApply(h) => {
                left.delays -= 1;
                self.slow_apply(h, true);
            }
            Step::NoAnswer { op, lands_later } => {
                left.unknowns -= 1;
                let op = self.ops.remove(op);
                if lands_later {
                    self.ops.push(Op {
                        ticket: None,
                        ..op.clone()
                    });
                }
                let reason = "no answer".into();
                self.answer(&op, ClaimOutcome::Unreachable { reason });
            }
            Step::Dies(h) => {
                left.deaths -= 1;
                self.hosts[h].harmed = true;
                let reason = || "by chance".to_owned();
                self.tell(
                    h,
                    PrimaryInput::GuestDied { reason: reason() },
                    StandbyInput::StandbyGuestDied { reason: reason() },
                );
            }
            Step::CutFails(h) => {
                left.cut_failures -= 1;
                self.cut_ends(h, false);
            }
            Step::Output(h) => {
                left.outputs -= 1;
                self.tell_primary(h, PrimaryInput::OutputWaiting);
            }
            Step::Start(h) => {
                left.starts -= 1;
                if !self.hosts[h].up {
                    let Host {
                        deaf,
                        harmed,
                        gave_up,
                        ..
                    } = self.hosts[h];
                    self.hosts[h] = Host {
                        deaf,
                        harmed,
                        gave_up,
                        ..Host::new()
                    };
                }
                let may = VmRecord::start(&name(h), Some(&self.record.value), false).is_ok();
                self.hosts[h].starting = may.then(|| self.record.clone());
            }
            Step::Protect(h) => {
                left.protects -= 1;
                let partner = name(1 - h);
                self.tell_primary(h, PrimaryInput::Protect { partner });
            }
            Step::Unprotect(h) => {
                left.unprotects -= 1;
                self.tell_primary(h, PrimaryInput::Unprotect);
            }
            Step::Switchover(h) => {
                left.switchovers -= 1;
                self.tell_primary(h, PrimaryInput::Switchover);
            }
            Step::Shutdown(h) => {
                left.shutdowns -= 1;
                self.tell_primary(h, PrimaryInput::GuestShutdown);
            }
            _ => {}
        }
    }

    fn slow_apply(&mut self, h: usize, is_slow: bool) {
        if let Role::Standby(_, copy) = &mut self.hosts[h].role
            && let Some((_, slow)) = &mut copy.applying
        {
            *slow = is_slow;
        }
    }

    fn put_off(&mut self, to: usize, message: Message) {
        self.late.push((to, message));
        // They have no order.
        self.late.sort_unstable();
    }

    fn answer(&mut self, op: &Op, outcome: ClaimOutcome) {
        if let Some(ticket) = op.ticket {
            let for_standby = outcome.clone();
            self.tell(
                op.host,
                PrimaryInput::ClaimResult { ticket, outcome },
                StandbyInput::ClaimResult {
                    ticket,
                    outcome: for_standby,
                },
            );
        }
    }

    fn hears(&self, h: usize) -> bool {
        self.hosts[1 - h].runs() && !self.hosts[h].deaf
    }

    /// Time goes on: a tick, or more while nothing can happen that counts ticks.
    fn pass(&mut self) {
        let still = |h: usize| {
            let host = &self.hosts[h];
            !host.up || self.hears(h) && host.silent == 0 || host.silent == SILENT_MAX
        };
        let quiet = still(0)
            && still(1)
            && self.hosts.iter().all(|host| host.frozen == Frozen::No)
            && !self.link_down
            && self.late.is_empty()
            && self.ops.is_empty();
        let wake = self.hosts.iter().filter(|host| host.runs());
        let wake = wake.map(Host::next_wakeup).min().unwrap_or(Micros::MAX);
        let ticks = match quiet && wake != Micros::MAX {
            true => wake.since(self.now).0.div_ceil(TICK.0).max(1),
            false => 1,
        };
        for h in 0..2 {
            let heard = self.hears(h) && self.hosts[h].frozen == Frozen::No;
            let host = &mut self.hosts[h];
            host.silent = match heard {
                true => 0,
                false => (host.silent + 1).min(SILENT_MAX),
            };
            if !host.up {
                host.silent = 0;
            }
            if host.frozen == Frozen::Now {
                host.frozen = Frozen::ForSomeTime;
            }
        }
        self.now = self.now + Micros(ticks * TICK.0);
        for h in 0..2 {
            // Other inputs wake it as well: states are not to differ in the phase of a timer alone.
            if self.listens(h) && self.hosts[h].is_at_rest() {
                self.tell(h, PrimaryInput::Tick, StandbyInput::Tick);
            }
        }
    }

    /// Writes that nobody waits for and that can never win change nothing.
    fn forget_what_is_past(&mut self) {
        let version = self.record.version;
        self.ops.retain(|op| {
            op.ticket.is_some()
                || op.done.is_none() && op.write.as_ref().is_some_and(|(v, _)| *v == version)
        });
    }
}
