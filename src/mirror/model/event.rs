//! What can happen next in a state, and what state follows.

use super::check::{Violation, ensure};
use super::shell::Stop;
use super::world::{Budget, Frozen, Host, Message, Op, Role, SILENT_MAX, TICK, World, name};
use crate::mirror::{
    ClaimOutcome, Micros, PrimaryInput, PrimaryState, StandbyInput, Verdict, VmRecord,
};

/// What a cut takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Link,
    /// The heartbeats to this host.
    Heartbeats(usize),
    All,
}

/// One thing that can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    // Ends of what was held up; may come at any time.
    Resume {
        h: usize,
        hears_first: bool,
    },
    Heal,
    Late(usize),
    HurryOp(usize),
    HurryApply(usize),
    /// A write that nobody waits for lands.
    Ghost(usize),
    // What comes within the tick.
    Continue(usize),
    Verdict(usize),
    LinkNews(usize),
    Wake(usize),
    CutDone(usize),
    Send(usize),
    Deliver {
        from: usize,
        lane: usize,
    },
    Effect(usize),
    Answer(usize),
    StandbyUp(usize),
    Converged(usize),
    Applied(usize),
    Promoted(usize),
    StartClaim(usize),
    // Nothing is left to come within the tick.
    Pass,
    // Faults and wishes.
    Crash {
        h: usize,
        wire_lost: bool,
    },
    Freeze(usize),
    Cut(Cut),
    Lose {
        from: usize,
        lane: usize,
    },
    Delay {
        from: usize,
        lane: usize,
    },
    Copy {
        from: usize,
        lane: usize,
    },
    DelayOp(usize),
    DelayApply(usize),
    NoAnswer {
        op: usize,
        lands_later: bool,
    },
    Dies(usize),
    CutFails(usize),
    Output(usize),
    Start(usize),
    Protect(usize),
    Unprotect(usize),
    Switchover(usize),
    Shutdown(usize),
}

/// A step, and where the host it happens on is stopped in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) step: Step,
    pub(super) stop: Option<Stop>,
}

impl World {
    /// Everything that can happen: first what ends a fault, then what comes within the tick,
    /// then time, then faults.
    pub(super) fn steps(&self, steps: &mut Vec<Step>) {
        steps.clear();
        self.ends_of_faults(steps);
        let before = steps.len();
        for h in 0..2 {
            self.prompt(h, steps);
        }
        self.prompt_ops(steps);
        if steps.len() == before {
            steps.push(Step::Pass);
        }
        if self.left != Budget::NONE {
            self.faults(steps);
        }
    }

    fn ends_of_faults(&self, steps: &mut Vec<Step>) {
        for h in 0..2 {
            let host = &self.hosts[h];
            if host.frozen == Frozen::ForSomeTime {
                for hears_first in [true, false] {
                    // The same if it has missed nothing.
                    if hears_first || host.silent > 0 {
                        steps.push(Step::Resume { h, hears_first });
                    }
                }
            }
            if let Role::Standby(_, copy) = &host.role
                && matches!(copy.applying, Some((_, true)))
                && host.runs()
            {
                steps.push(Step::HurryApply(h));
            }
        }
        if self.link_down || self.hosts.iter().any(|host| host.deaf) {
            steps.push(Step::Heal);
        }
        for (i, (to, _)) in self.late.iter().enumerate() {
            if self.listens(*to) && !self.link_down {
                steps.push(Step::Late(i));
            }
        }
        for (i, op) in self.ops.iter().enumerate() {
            match op.ticket {
                Some(_) if op.slow => steps.push(Step::HurryOp(i)),
                Some(_) => {}
                None => steps.push(Step::Ghost(i)),
            }
        }
    }

    /// Takes inputs: up, not frozen, and through with what a freeze interrupted.
    fn listens(&self, h: usize) -> bool {
        self.hosts[h].runs() && !self.hosts[h].has_actions()
    }

    fn prompt(&self, h: usize, steps: &mut Vec<Step>) {
        let host = &self.hosts[h];
        if !host.runs() {
            return;
        }
        if host.has_actions() {
            return steps.push(Step::Continue(h));
        }
        if host.verdict_due().is_some() {
            steps.push(Step::Verdict(h));
        }
        if host.link_told == self.link_down {
            steps.push(Step::LinkNews(h));
        }
        if host.next_wakeup() <= self.now {
            steps.push(Step::Wake(h));
        }
        if host.starting.is_some() {
            steps.push(Step::StartClaim(h));
        }
        match &host.role {
            Role::Idle => {}
            Role::Primary(_, guest) => {
                if guest.cutting.is_some() {
                    steps.push(Step::CutDone(h));
                }
                if guest.unsent.is_some() {
                    steps.push(Step::Send(h));
                }
                // A checkpoint of the attempt before is over by then.
                if guest.seeding && guest.cutting.is_none() {
                    steps.push(Step::Converged(h));
                }
            }
            Role::Standby(_, copy) => {
                if copy.preparing {
                    steps.push(Step::StandbyUp(h));
                }
                if matches!(copy.applying, Some((_, false))) {
                    steps.push(Step::Applied(h));
                }
                if copy.promoting.is_some() {
                    steps.push(Step::Promoted(h));
                }
            }
        }
        for lane in 0..2 {
            if !self.link_down && !self.lanes[1 - h][lane].is_empty() {
                steps.push(Step::Deliver { from: 1 - h, lane });
            }
        }
    }

    fn prompt_ops(&self, steps: &mut Vec<Step>) {
        for (i, op) in self.ops.iter().enumerate() {
            if op.slow || op.ticket.is_none() {
                continue;
            }
            match op.done {
                None => steps.push(Step::Effect(i)),
                Some(_) if self.listens(op.host) => steps.push(Step::Answer(i)),
                Some(_) => {}
            }
        }
    }

    fn faults(&self, steps: &mut Vec<Step>) {
        let left = &self.left;
        for h in 0..2 {
            self.faults_of(h, steps);
            for lane in 0..2 {
                if self.lanes[h][lane].is_empty() {
                    continue;
                }
                let from = h;
                if left.losses > 0 {
                    steps.push(Step::Lose { from, lane });
                }
                if left.delays > 0 {
                    steps.push(Step::Delay { from, lane });
                }
                // A control lane delivers once; a session that is set up anew re-sends epochs.
                let twice = matches!(
                    self.lanes[h][lane][0],
                    Message::Epoch(..) | Message::Ack(..)
                );
                if left.copies > 0 && twice && self.listens(1 - h) && !self.link_down {
                    steps.push(Step::Copy { from, lane });
                }
            }
        }
        if left.cuts > 0 && !self.link_down && self.hosts.iter().all(|host| !host.deaf) {
            let cuts = [Cut::Link, Cut::Heartbeats(0), Cut::Heartbeats(1), Cut::All];
            steps.extend(cuts.map(Step::Cut));
        }
        for (i, op) in self.ops.iter().enumerate() {
            if op.ticket.is_none() {
                continue;
            }
            if left.delays > 0 && !op.slow {
                steps.push(Step::DelayOp(i));
            }
            if left.unknowns > 0 && self.listens(op.host) {
                let op_ = i;
                for lands_later in [false, true] {
                    if !lands_later || op.done.is_none() && op.write.is_some() {
                        steps.push(Step::NoAnswer {
                            op: op_,
                            lands_later,
                        });
                    }
                }
            }
        }
    }

    fn faults_of(&self, h: usize, steps: &mut Vec<Step>) {
        let (left, host) = (&self.left, &self.hosts[h]);
        if left.crashes > 0 && host.up {
            for wire_lost in [false, true] {
                if !wire_lost || self.lanes[h].iter().any(|lane| !lane.is_empty()) {
                    steps.push(Step::Crash { h, wire_lost });
                }
            }
        }
        if left.freezes > 0 && host.runs() && !matches!(host.role, Role::Idle) {
            steps.push(Step::Freeze(h));
        }
        let previous = &self.record.value;
        let may_start = || VmRecord::start(&name(h), Some(previous), false).is_ok();
        let idle = matches!(host.role, Role::Idle) && host.starting.is_none();
        if left.starts > 0 && (!host.up || host.runs() && idle && may_start()) {
            steps.push(Step::Start(h));
        }
        if !self.listens(h) {
            return;
        }
        match &host.role {
            Role::Idle => {}
            Role::Standby(_, copy) => {
                if left.deaths > 0 {
                    steps.push(Step::Dies(h));
                }
                if left.delays > 0 && matches!(copy.applying, Some((_, false))) {
                    steps.push(Step::DelayApply(h));
                }
            }
            Role::Primary(machine, guest) => {
                let state = machine.status(self.now).state;
                if left.deaths > 0 && state != PrimaryState::Ending {
                    steps.push(Step::Dies(h));
                }
                if left.cut_failures > 0 && guest.cutting.is_some() {
                    steps.push(Step::CutFails(h));
                }
                if left.outputs > 0 && guest.gated && state != PrimaryState::Claiming {
                    steps.push(Step::Output(h));
                }
                if left.protects > 0 && state == PrimaryState::Solo {
                    steps.push(Step::Protect(h));
                }
                if left.unprotects > 0
                    && !matches!(state, PrimaryState::Solo | PrimaryState::Ending)
                {
                    steps.push(Step::Unprotect(h));
                }
                if left.switchovers > 0 && state == PrimaryState::Mirrored {
                    steps.push(Step::Switchover(h));
                }
                if left.shutdowns > 0 && state != PrimaryState::Ending {
                    steps.push(Step::Shutdown(h));
                }
            }
        }
    }

    /// The host whose machine gets an input by this step.
    pub(super) fn host_of(&self, step: Step) -> Option<usize> {
        match step {
            Step::Continue(h)
            | Step::Verdict(h)
            | Step::LinkNews(h)
            | Step::Wake(h)
            | Step::CutDone(h)
            | Step::Send(h)
            | Step::StandbyUp(h)
            | Step::Converged(h)
            | Step::Applied(h)
            | Step::Promoted(h)
            | Step::StartClaim(h)
            | Step::Dies(h)
            | Step::CutFails(h)
            | Step::Output(h)
            | Step::Protect(h)
            | Step::Unprotect(h)
            | Step::Switchover(h)
            | Step::Shutdown(h) => Some(h),
            Step::Deliver { from, .. } | Step::Copy { from, .. } => Some(1 - from),
            Step::Late(i) => Some(self.late[i].0),
            Step::Answer(i) | Step::NoAnswer { op: i, .. } => Some(self.ops[i].host),
            _ => None,
        }
    }

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
        let verdicts_of_the_dead = |host: &mut Host| {
            if !host.up {
                host.verdict = Verdict::Alive;
            }
        };
        self.hosts.iter_mut().for_each(verdicts_of_the_dead);
    }

    /// **bounded**: whatever happens, neither side sends or asks without end.
    fn check_bounded(&self) -> Result<(), Violation> {
        let most = self.lanes.iter().flatten().map(Vec::len).max().unwrap_or(0);
        ensure(most <= 16 && self.ops.len() <= 8, "bounded", || {
            "messages or registry operations pile up".into()
        })
    }
}
