//! A state of the model: two hosts, what is between them, the record, and what really is.

use crate::mirror::{
    ClaimOutcome, Micros, Primary, Standby, Ticket, Timing, Verdict, Versioned, VmRecord,
};
use crate::pool::{Epoch, Generation, HostName};
use std::hash::{DefaultHasher, Hash, Hasher};

/// One step of the clock. All times of [`TIMING`] are a few of these.
pub(super) const TICK: Micros = Micros::from_millis(50);

/// In the order and with the margins of [`Timing::DEFAULT`], as few ticks as that allows; what
/// only has to be long is cut short.
pub(super) const TIMING: Timing = Timing {
    detection: Micros(2 * TICK.0),
    claim_delay: TICK,
    lease: Micros(3 * TICK.0),
    release_within: Micros(2 * TICK.0),
    link_down_bound: Micros(2 * TICK.0),
    ack_overdue: Micros(5 * TICK.0),
    silence_claim: Micros(26 * TICK.0),
    prepare_patience: Micros(6 * TICK.0),
    orphan_patience: Micros(28 * TICK.0),
    lag_alarm: Micros(20 * TICK.0),
};

/// Between checkpoints while no output waits; if some does, the next tick brings one.
pub(super) const INTERVAL_MAX: Micros = Micros(2 * TICK.0);

/// Ticks of silence until the detector says lost.
pub(super) const SILENT_MAX: u8 = 2;

const _: () = assert!(SILENT_MAX as u64 * TICK.0 == TIMING.detection.0);
const _: () = assert!(TIMING.release_within.0 < TIMING.lease.0);
const _: () = assert!(TIMING.lease.0 <= TIMING.detection.0 + TIMING.claim_delay.0);

/// Names by index.
pub(super) const NAMES: [&str; 2] = ["a", "b"];

/// How often each kind of trouble, and each wish of the operator, may still come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    /// A host loses power, also between any two of its machine's actions.
    pub(super) crashes: u8,
    /// A host stands still for as long as it likes, also between two actions.
    pub(super) freezes: u8,
    /// The link, the heartbeats of one direction or all of it is cut, until it heals.
    pub(super) cuts: u8,
    /// A message is lost.
    pub(super) losses: u8,
    /// A message, a registry operation, its answer or an apply takes as long as it likes.
    pub(super) delays: u8,
    /// A copy of an epoch or an acknowledgement arrives some time later.
    pub(super) copies: u8,
    /// A registry operation ends without an answer: with effect, without, or with a late one.
    pub(super) unknowns: u8,
    /// The guest dies on either side, its daemon lives.
    pub(super) deaths: u8,
    /// A checkpoint fails.
    pub(super) cut_failures: u8,
    /// Output waits, so that the next checkpoint comes sooner.
    pub(super) outputs: u8,
    /// A host is asked to start the VM by the record, after a crash or a death.
    pub(super) starts: u8,
    pub(super) protects: u8,
    pub(super) unprotects: u8,
    pub(super) switchovers: u8,
    pub(super) shutdowns: u8,
}

impl Budget {
    pub(super) const NONE: Self = Self {
        crashes: 0,
        freezes: 0,
        cuts: 0,
        losses: 0,
        delays: 0,
        copies: 0,
        unknowns: 0,
        deaths: 0,
        cut_failures: 0,
        outputs: 0,
        starts: 0,
        protects: 0,
        unprotects: 0,
        switchovers: 0,
        shutdowns: 0,
    };

    /// Both.
    pub(super) const fn and(self, other: Self) -> Self {
        Self {
            crashes: self.crashes + other.crashes,
            freezes: self.freezes + other.freezes,
            cuts: self.cuts + other.cuts,
            losses: self.losses + other.losses,
            delays: self.delays + other.delays,
            copies: self.copies + other.copies,
            unknowns: self.unknowns + other.unknowns,
            deaths: self.deaths + other.deaths,
            cut_failures: self.cut_failures + other.cut_failures,
            outputs: self.outputs + other.outputs,
            starts: self.starts + other.starts,
            protects: self.protects + other.protects,
            unprotects: self.unprotects + other.unprotects,
            switchovers: self.switchovers + other.switchovers,
            shutdowns: self.shutdowns + other.shutdowns,
        }
    }
}

/// Against what numbers and times are read, so that states that differ only in them are one.
#[derive(Clone, Copy, Debug)]
pub(in crate::mirror) struct Frame {
    pub(in crate::mirror) now: Micros,
    version: u64,
    generation: Generation,
}

impl Frame {
    /// Time left until `at`; all that is past is alike.
    pub(in crate::mirror) fn ahead(&self, at: Micros) -> u64 {
        match at {
            Micros::MAX => u64::MAX,
            at => at.since(self.now).0,
        }
    }

    /// Time since `at`; from `most` on all is alike.
    pub(in crate::mirror) fn ago(&self, at: Micros, most: Micros) -> u64 {
        self.now.since(at).min(most).0
    }

    /// Time left until `at`, or since it, up to just over `most`.
    pub(in crate::mirror) fn around(&self, at: Micros, most: Micros) -> (u64, u64) {
        (self.ahead(at), self.ago(at, most + Micros(1)))
    }

    pub(in crate::mirror) const fn generation(&self, generation: Generation) -> i64 {
        generation.0.cast_signed() - self.generation.0.cast_signed()
    }

    pub(in crate::mirror) const fn version(&self, version: u64) -> i64 {
        version.cast_signed() - self.version.cast_signed()
    }

    pub(in crate::mirror) fn value(&self, value: &VmRecord, into: &mut impl Hasher) {
        let VmRecord {
            generation,
            owner,
            standby,
            running,
        } = value;
        (self.generation(*generation), owner, standby, running).hash(into);
    }

    pub(in crate::mirror) fn record(&self, record: &Versioned<VmRecord>, into: &mut impl Hasher) {
        self.version(record.version).hash(into);
        self.value(&record.value, into);
    }
}

/// What one host tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Message {
    Prepare(Generation),
    Ready(Generation),
    Refused(Generation),
    StandbyGone(Generation),
    Epoch(Generation, Epoch),
    Ack(Generation, Epoch),
    Confirm(Generation, Epoch),
    /// The attempt, then what `Handover` says.
    Handover(Generation, Generation, Epoch),
    Gone(Generation),
    Dismiss(Generation),
}

/// The lanes: epochs overtake control messages and the other way round.
pub(super) const EPOCHS: usize = 0;
pub(super) const CONTROL: usize = 1;

/// The instance of the guest on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Guest {
    /// Its output and writes are held apart.
    pub(super) gated: bool,
    /// Told to stand still.
    pub(super) held: bool,
    /// Seeding goes on.
    pub(super) seeding: bool,
    /// A checkpoint is being taken; true if the guest is to stand afterwards.
    pub(super) cutting: Option<(Epoch, bool)>,
    /// Cut and not yet handed to the link.
    pub(super) unsent: Option<Epoch>,
    /// The shell's session: the newest attempt.
    pub(super) attempt: Generation,
}

/// A standby's copy of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) attempt: Generation,
    /// Its QEMU is being started.
    pub(super) preparing: bool,
    /// The checkpoint that memory and disk are.
    pub(super) applied: Epoch,
    /// The epoch that is being put in; true if that takes long.
    pub(super) applying: Option<(Epoch, bool)>,
    /// The guest is being let run, by this record.
    pub(super) promoting: Option<Versioned<VmRecord>>,
}

#[derive(Clone, Debug)]
pub(super) enum Role {
    Idle,
    Primary(Box<Primary>, Guest),
    Standby(Box<Standby>, Copied),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Frozen {
    No,
    /// Since this very moment.
    Now,
    ForSomeTime,
}

#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) up: bool,
    pub(super) frozen: Frozen,
    /// Ticks since the partner's heartbeats were heard.
    pub(super) silent: u8,
    /// Its partner's heartbeats do not reach it.
    pub(super) deaf: bool,
    pub(super) verdict: Verdict,
    /// What the machine was told about the link.
    pub(super) link_told: bool,
    pub(super) role: Role,
    /// What it found when it was asked to start the VM.
    pub(super) starting: Option<Versioned<VmRecord>>,
    /// Lost the guest or the copy it had, by a crash or a death.
    pub(super) harmed: bool,
    /// Gave its copy up because nobody named it for [`Timing::orphan_patience`].
    pub(super) gave_up: bool,
}

/// A registry operation on its way.
#[derive(Clone, Debug)]
pub(super) struct Op {
    pub(super) host: usize,
    /// None: nobody waits for the answer any more.
    pub(super) ticket: Option<Ticket>,
    pub(super) write: Option<(u64, VmRecord)>,
    /// It took effect.
    pub(super) done: Option<ClaimOutcome>,
    /// Takes as long as it likes.
    pub(super) slow: bool,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) now: Micros,
    pub(super) left: Budget,
    pub(super) hosts: [Host; 2],
    /// The interconnect carries nothing.
    pub(super) link_down: bool,
    /// By sender and lane.
    pub(super) lanes: [[Vec<Message>; 2]; 2],
    /// Receiver and message, on their way for as long as they like.
    pub(super) late: Vec<(usize, Message)>,
    pub(super) ops: Vec<Op>,
    pub(super) record: Versioned<VmRecord>,
    /// Truth: the newest attempt whose standby the record has ever named.
    pub(super) named: Generation,
    /// Truth: the newest whole epoch on a standby, and what was released, by attempt.
    pub(super) whole: (Generation, Epoch),
    pub(super) released: (Generation, Epoch),
    /// Truth: the host whose guest last came to life.
    pub(super) alive_on: usize,
    /// The last step let something out; not part of the state.
    pub(super) spoke: bool,
    /// What happened, while a trace is printed; not part of the state.
    pub(super) log: Option<Vec<String>>,
}

pub(super) fn name(host: usize) -> HostName {
    HostName::new(NAMES[host]).expect("a valid name")
}

impl Host {
    pub(super) fn new() -> Self {
        Self {
            up: true,
            frozen: Frozen::No,
            silent: 0,
            deaf: false,
            verdict: Verdict::Alive,
            link_told: true,
            role: Role::Idle,
            starting: None,
            harmed: false,
            gave_up: false,
        }
    }

    /// Takes part in what happens.
    pub(super) fn runs(&self) -> bool {
        self.up && self.frozen == Frozen::No
    }

    pub(super) fn next_wakeup(&self) -> Micros {
        match &self.role {
            Role::Idle => Micros::MAX,
            Role::Primary(machine, _) => machine.next_wakeup(),
            Role::Standby(machine, _) => machine.next_wakeup(),
        }
    }

    /// Actions that a freeze interrupted.
    pub(super) fn has_actions(&self) -> bool {
        match &self.role {
            Role::Idle => false,
            Role::Primary(machine, _) => machine.has_actions(),
            Role::Standby(machine, _) => machine.has_actions(),
        }
    }

    /// An instance whose packets and writes go straight to the world.
    pub(super) const fn ungated(&self) -> bool {
        self.up && matches!(&self.role, Role::Primary(_, guest) if !guest.gated)
    }

    /// Waits for others, and for no time of its own that comes soon.
    pub(super) fn is_at_rest(&self) -> bool {
        match &self.role {
            Role::Idle => false,
            Role::Primary(_, guest) => !guest.gated,
            Role::Standby(_, copy) => copy.preparing || copy.applied == Epoch(0),
        }
    }

    /// What the detector should say.
    pub(super) fn verdict_due(&self) -> Option<Verdict> {
        match self.verdict {
            Verdict::Alive if self.silent >= SILENT_MAX => Some(Verdict::Lost),
            Verdict::Lost if self.silent == 0 => Some(Verdict::Alive),
            _ => None,
        }
    }
}

impl World {
    pub(super) const fn frame(&self) -> Frame {
        Frame {
            now: self.now,
            version: self.record.version,
            generation: self.record.value.generation,
        }
    }

    /// Equal for states with the same future, and, but for collisions, for no others.
    pub(super) fn fingerprint(&self) -> u64 {
        let Self {
            now: _,
            left,
            hosts,
            link_down,
            lanes,
            late,
            ops,
            record,
            named,
            whole,
            released,
            alive_on,
            spoke: _,
            log: _,
        } = self;
        let frame = self.frame();
        let mut hasher = DefaultHasher::new();
        let into = &mut hasher;
        (left, link_down, alive_on).hash(into);
        frame.record(record, into);
        for generation in [*named, whole.0, released.0] {
            frame.generation(generation).max(-4).hash(into);
        }
        // A promotion looks whether it has what was released, a release whether it is whole.
        (whole.1.0.cast_signed() - released.1.0.cast_signed())
            .clamp(-3, 3)
            .hash(into);
        for host in hosts {
            host.view(&frame, *whole, *released, into);
        }
        for (from, lane) in lanes.iter().flatten().enumerate() {
            lane.len().hash(into);
            for message in lane {
                self.message(1 - from / 2, message, &frame, into);
            }
        }
        late.len().hash(into);
        for (to, message) in late {
            to.hash(into);
            self.message(*to, message, &frame, into);
        }
        ops.len().hash(into);
        for Op {
            host,
            ticket,
            write,
            done,
            slow,
        } in ops
        {
            (host, ticket.is_some(), slow, write.is_some()).hash(into);
            if let Some((expected, value)) = write {
                frame.version(*expected).hash(into);
                frame.value(value, into);
            }
            match done {
                None => 0.hash(into),
                Some(ClaimOutcome::Won(record)) => {
                    1.hash(into);
                    frame.record(record, into);
                }
                Some(ClaimOutcome::Lost(found)) => {
                    2.hash(into);
                    found.iter().for_each(|record| frame.record(record, into));
                }
                Some(ClaimOutcome::Unreachable { .. }) => 3.hash(into),
            }
        }
        hasher.finish()
    }

    /// A message as its receiver sees it.
    fn message(&self, to: usize, message: &Message, frame: &Frame, into: &mut impl Hasher) {
        std::mem::discriminant(message).hash(into);
        let (generation, epoch) = match *message {
            Message::Prepare(g)
            | Message::Ready(g)
            | Message::Refused(g)
            | Message::StandbyGone(g)
            | Message::Gone(g)
            | Message::Dismiss(g) => (g, None),
            Message::Epoch(g, epoch) | Message::Ack(g, epoch) | Message::Confirm(g, epoch) => {
                (g, Some(epoch))
            }
            Message::Handover(g, owner, epoch) => {
                frame.generation(owner).hash(into);
                (g, Some(epoch))
            }
        };
        frame.generation(generation).hash(into);
        let base = match &self.hosts[to].role {
            Role::Idle => return,
            Role::Primary(machine, _) => machine.newest_committed(),
            Role::Standby(machine, _) => machine.newest_acked(),
        };
        // Older than what the receiver has is old, whatever its number.
        let from_base = |epoch: Epoch| (epoch.0.cast_signed() - base.0.cast_signed()).max(0);
        epoch.map(from_base).hash(into);
    }
}

impl Host {
    fn view(
        &self,
        frame: &Frame,
        whole: (Generation, Epoch),
        released: (Generation, Epoch),
        into: &mut impl Hasher,
    ) {
        let Self {
            up,
            frozen,
            silent,
            deaf,
            verdict,
            link_told,
            role,
            starting,
            harmed,
            gave_up,
        } = self;
        (
            up, frozen, silent, deaf, verdict, link_told, harmed, gave_up,
        )
            .hash(into);
        starting
            .iter()
            .for_each(|record| frame.record(record, into));
        std::mem::discriminant(role).hash(into);
        let off = |a: Epoch, b: Epoch| (a.0.cast_signed() - b.0.cast_signed()).clamp(-3, 3);
        match role {
            Role::Idle => {}
            Role::Primary(machine, guest) => {
                let Guest {
                    gated,
                    held,
                    seeding,
                    cutting,
                    unsent,
                    attempt,
                } = *guest;
                (gated, held, seeding, frame.generation(attempt)).hash(into);
                let committed = machine.newest_committed();
                cutting
                    .map(|(epoch, stay)| (off(epoch, committed), stay))
                    .hash(into);
                unsent.map(|epoch| off(epoch, committed)).hash(into);
                machine.view(frame, into);
                if gated {
                    off(whole.1, committed).hash(into);
                }
            }
            Role::Standby(machine, copy) => {
                let Copied {
                    attempt,
                    preparing,
                    applied,
                    applying,
                    promoting,
                } = copy;
                let acked = machine.newest_acked();
                (preparing, frame.generation(*attempt), off(*applied, acked)).hash(into);
                applying
                    .map(|(epoch, slow)| (off(epoch, acked), slow))
                    .hash(into);
                promoting
                    .iter()
                    .for_each(|record| frame.record(record, into));
                machine.view(frame, into);
                (off(whole.1, acked), off(released.1, acked)).hash(into);
            }
        }
    }
}
