//! What can happen next in a state.

use super::shell::Stop;
use super::world::{Budget, Frozen, Message, Role, World, name};
use crate::mirror::{PrimaryState, VmRecord};

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
    pub(super) fn listens(&self, h: usize) -> bool {
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
}
