//! A trace in words.

use super::event::{Cut, Event, Step};
use super::world::{CONTROL, Message, NAMES, World};
use crate::mirror::Verdict;
use std::fmt;

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prepare(g) => write!(f, "prepare a standby for generation {g}"),
            Self::Ready(g) => write!(f, "the standby of generation {g} is ready"),
            Self::Refused(g) => write!(f, "no standby for generation {g}"),
            Self::StandbyGone(g) => write!(f, "the standby of generation {g} is gone"),
            Self::Epoch(g, epoch) => write!(f, "epoch {epoch} of generation {g}"),
            Self::Ack(g, epoch) => write!(f, "epoch {epoch} of generation {g} is here"),
            Self::Confirm(g, _) => write!(f, "the record names you in generation {g}"),
            Self::Handover(_, g, epoch) => {
                write!(f, "you own generation {g} from epoch {epoch}")
            }
            Self::Gone(g) => write!(f, "the guest of generation {g} is dead here"),
            Self::Dismiss(g) => write!(f, "the standby of generation {g} is not needed"),
        }
    }
}

impl World {
    /// What the event is, seen from the state it happens in.
    pub(super) fn words(&self, event: Event) -> String {
        let mut words = self.step_words(event.step);
        if let (Some(stop), Some(h)) = (event.stop, self.host_of(event.step)) {
            let how = match stop.crash {
                true => "loses power",
                false => "freezes",
            };
            words += &format!(
                "; {} {how} once it has carried out {} of what follows",
                NAMES[h], stop.after
            );
        }
        words
    }

    fn head(&self, from: usize, lane: usize) -> String {
        let message = self.lanes[from][lane].first();
        let message = message.map_or_else(String::new, ToString::to_string);
        format!("{}'s message \"{message}\"", NAMES[from])
    }

    fn op(&self, i: usize) -> String {
        let op = &self.ops[i];
        let whose = NAMES[op.host];
        match &op.write {
            None => format!("{whose}'s read"),
            Some((expected, value)) => format!(
                "{whose}'s write on version {expected} (generation {}, owner {}, standby {})",
                value.generation,
                value.owner,
                value.standby.as_ref().map_or("none", |host| host.as_str()),
            ),
        }
    }

    fn step_words(&self, step: Step) -> String {
        let name = |h: usize| NAMES[h];
        match step {
            Step::Resume { h, hears_first } => {
                let first = match hears_first {
                    true => "hears its partner first",
                    false => "has heard nothing yet",
                };
                format!("{} thaws and {first}", name(h))
            }
            Step::Heal => "link and heartbeats are back".into(),
            Step::Late(i) => {
                let (to, message) = &self.late[i];
                format!("the late message \"{message}\" reaches {}", name(*to))
            }
            Step::HurryOp(i) => format!("{} goes on", self.op(i)),
            Step::HurryApply(h) => format!("{} goes on applying", name(h)),
            Step::Ghost(i) => format!("{} lands late", self.op(i)),
            Step::Continue(h) => format!("{} goes on where it froze", name(h)),
            Step::Verdict(h) => {
                let verdict = match self.hosts[h].verdict_due() {
                    Some(Verdict::Lost) => "lost",
                    _ => "alive",
                };
                format!(
                    "the detector on {} says that {} is {verdict}",
                    name(h),
                    name(1 - h)
                )
            }
            Step::LinkNews(h) => {
                let link = match self.link_down {
                    true => "down",
                    false => "up",
                };
                format!("{} learns that the link is {link}", name(h))
            }
            Step::Wake(h) => format!("{} wakes by its timer", name(h)),
            Step::CutDone(h) => format!("the checkpoint on {} is taken", name(h)),
            Step::Send(h) => format!("{} hands the epoch to the link", name(h)),
            Step::Deliver { from, lane } => format!("{} arrives", self.head(from, lane)),
            Step::Effect(i) => format!("the registry carries out {}", self.op(i)),
            Step::Answer(i) => format!("the answer to {} arrives", self.op(i)),
            Step::StandbyUp(h) => format!("the standby's QEMU waits on {}", name(h)),
            Step::Converged(h) => format!("seeding from {} is nearly done", name(h)),
            Step::Applied(h) => format!("{} has applied the epoch", name(h)),
            Step::Promoted(h) => format!("the guest runs on {}", name(h)),
            Step::StartClaim(h) => format!("{} claims the VM to start it", name(h)),
            Step::Pass => "time passes".into(),
            Step::Crash { h, wire_lost } => {
                let wire = match wire_lost {
                    true => ", and what it had sent is lost",
                    false => "",
                };
                format!("FAULT: {} loses power{wire}", name(h))
            }
            Step::Freeze(h) => format!("FAULT: {} freezes", name(h)),
            Step::Cut(Cut::Link) => "FAULT: the link is cut, heartbeats are not".into(),
            Step::Cut(Cut::All) => "FAULT: link and heartbeats are cut".into(),
            Step::Cut(Cut::Heartbeats(h)) => format!("FAULT: {} hears no heartbeats", name(h)),
            Step::Lose { from, lane } => format!("FAULT: {} is lost", self.head(from, lane)),
            Step::Delay { from, lane } => format!("FAULT: {} is held up", self.head(from, lane)),
            Step::Copy { from, lane } => {
                format!(
                    "FAULT: {} arrives, a copy is held up",
                    self.head(from, lane)
                )
            }
            Step::DelayOp(i) => format!("FAULT: {} is held up", self.op(i)),
            Step::DelayApply(h) => format!("FAULT: applying takes long on {}", name(h)),
            Step::NoAnswer { op, lands_later } => {
                let effect = match (self.ops[op].done.is_some(), lands_later) {
                    (true, _) => "it took effect",
                    (false, true) => "it may land later",
                    (false, false) => "it did not happen",
                };
                format!("FAULT: {} ends without an answer; {effect}", self.op(op))
            }
            Step::Dies(h) => format!("FAULT: the guest dies on {}", name(h)),
            Step::CutFails(h) => format!("FAULT: the checkpoint on {} fails", name(h)),
            Step::Output(h) => format!("output waits on {}", name(h)),
            Step::Start(h) => format!(
                "{} is told to start the VM if the record allows it",
                name(h)
            ),
            Step::Protect(h) => format!("the operator has the VM mirrored from {}", name(h)),
            Step::Unprotect(h) => format!("the operator unprotects the VM on {}", name(h)),
            Step::Switchover(h) => format!("the operator switches over from {}", name(h)),
            Step::Shutdown(h) => format!("the guest on {} shuts itself down", name(h)),
        }
    }

    /// One line on where everything is.
    pub(super) fn summary(&self) -> String {
        let record = &self.record.value;
        let control: usize = self.lanes.iter().map(|lanes| lanes[CONTROL].len()).sum();
        format!(
            "record version {}: generation {}, owner {}, standby {}; {control} control messages and {} operations on their way",
            self.record.version,
            record.generation,
            record.owner,
            record.standby.as_ref().map_or("none", |host| host.as_str()),
            self.ops.len(),
        )
    }
}
