//! The world of a run: events in time order, hosts, and the loop over both phases.

use super::guest::{Guest, GuestState};
use super::lane::Load;
use super::registry::{RegistryModel, Request};
use super::rng::{Rng, mix};
use super::{EVENTS_MAX, LIVENESS_BOUND, LIVENESS_LEAST, Report, SAFETY_PHASE, Violation};
use crate::mirror::{
    ClaimOutcome, Micros, Policy, Primary, PrimaryConfig, PrimaryInput, Standby, StandbyInput,
    Ticket, Timing, Verdict, Versioned, VmRecord,
};
use crate::pool::{Epoch, Generation, HostName};
use std::collections::BTreeMap;

/// What one host tells the other.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Prepare(Generation),
    Ready(Generation),
    Refused(Generation),
    StandbyGone(Generation),
    /// One of three parts of an epoch, each on a lane of its own.
    Part {
        generation: Generation,
        epoch: Epoch,
        part: u8,
        state: GuestState,
    },
    Ack(Generation, Epoch),
    Confirm(Generation, Epoch),
    /// The attempt, then what `Handover` says.
    Handover(Generation, Generation, Epoch),
    Gone(Generation),
    Dismiss(Generation),
}

/// What may happen.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Tick {
        host: usize,
    },
    /// Carry out what a freeze interrupted.
    Continue {
        host: usize,
        life: u64,
    },
    Deliver {
        to: usize,
        from_life: u64,
        message: Message,
    },
    Heartbeat {
        host: usize,
    },
    Heard {
        host: usize,
    },
    Detect {
        host: usize,
    },
    CutEnd {
        host: usize,
        life: u64,
        epoch: Epoch,
        ok: bool,
        pause: Micros,
        stay_stopped: bool,
    },
    Converged {
        host: usize,
        life: u64,
        generation: Generation,
    },
    StandbyUp {
        host: usize,
        life: u64,
        ok: bool,
    },
    /// First the disk, then the rest.
    ApplyDisk {
        host: usize,
        life: u64,
        epoch: Epoch,
    },
    ApplyRest {
        host: usize,
        life: u64,
        epoch: Epoch,
    },
    PromoteEnd {
        host: usize,
        life: u64,
        epoch: Epoch,
        record: Versioned<VmRecord>,
    },
    RegistryEffect {
        id: u64,
    },
    RegistryAnswer {
        id: u64,
        host: usize,
        life: u64,
        ticket: Ticket,
    },
    Request {
        number: u64,
        story: u64,
    },
    ClientResend {
        number: u64,
        story: u64,
    },
    Answer {
        number: u64,
        story: u64,
    },
    /// An epoch's closing frame is handed to the lane.
    Closing {
        host: usize,
        life: u64,
        epoch: Epoch,
    },
    /// The link carries more or less from now on.
    Capacity,
    Work,
    Operator,
    Fault,
    Heal(super::fault::Heal),
}

/// What a host runs of the VM.
#[derive(Debug)]
pub(super) enum Role {
    Idle,
    Primary {
        machine: Box<Primary>,
        guest: Guest,
        attempt: Generation,
    },
    Standby {
        machine: Box<Standby>,
        attempt: Generation,
        copy: StandbyCopy,
    },
}

/// What a standby holds.
#[derive(Debug, Default)]
pub(super) struct StandbyCopy {
    /// Epochs not applied: which parts are here, and what.
    pub(super) buffered: BTreeMap<u64, (u8, GuestState)>,
    /// As applied, part by part.
    pub(super) state: GuestState,
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) name: HostName,
    pub(super) up: bool,
    pub(super) frozen_until: Micros,
    /// Changes with every machine and every boot: events of an earlier one are dropped.
    pub(super) life: u64,
    pub(super) role: Role,
    pub(super) last_heard: Micros,
    pub(super) verdict: Verdict,
    pub(super) tick_at: Micros,
    /// Carry out so many actions more, then crash or freeze.
    pub(super) crash_in: Option<u64>,
    pub(super) freeze_in: Option<u64>,
}

/// One direction between the hosts.
#[derive(Debug, Default)]
pub(super) struct Direction {
    pub(super) cut: bool,
    /// What is sent while cut is lost and not late.
    pub(super) reset: bool,
    pub(super) heartbeats_cut: bool,
    pub(super) stuck: Vec<Event>,
}

#[derive(Debug, Default)]
pub(super) struct Client {
    /// Rises when the VM is lost for good and starts anew: earlier packets mean nothing.
    pub(super) story: u64,
    pub(super) next: u64,
    pub(super) acked: u64,
}

/// Everything there is.
#[derive(Debug)]
pub struct World {
    pub(super) seed: u64,
    pub(super) rng: Rng,
    pub(super) now: Micros,
    queue: BTreeMap<(Micros, u64), Event>,
    order: u64,
    pub(super) hosts: [Host; 2],
    /// `directions[from]`.
    pub(super) directions: [Direction; 2],
    pub(super) registry: RegistryModel,
    pub(super) requests: BTreeMap<u64, (Request, Option<ClaimOutcome>, bool)>,
    pub(super) client: Client,
    pub(super) faults_on: bool,
    pub(super) load: Load,
    /// Truth: time mirrored with no fault about, and the part of it with the lag over its
    /// alarm.
    pub(super) mirrored_for: Micros,
    pub(super) over_alarm_for: Micros,
    /// Truth: every checkpoint taken.
    pub(super) checkpoints: BTreeMap<(Generation, Epoch), GuestState>,
    /// Truth: the newest epoch of each attempt whose parts all arrived, none missing before it.
    pub(super) whole: BTreeMap<Generation, Epoch>,
    /// Truth: the host whose guest last came to life.
    pub(super) alive_on: usize,
    /// Truth: when a host or a guest on it last died.
    pub(super) harmed: [Micros; 2],
    /// Truth: when the record was last written.
    pub(super) named_at: Micros,
    pub(super) report: Report,
    pub(super) violation: Option<Violation>,
}

impl World {
    /// The start of a run: host `a` runs the VM, solo.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let name = |text: &str| HostName::new(text).expect("a valid name");
        let host = |text| Host {
            name: name(text),
            up: true,
            frozen_until: Micros::ZERO,
            life: 0,
            role: Role::Idle,
            last_heard: Micros::ZERO,
            verdict: Verdict::Alive,
            tick_at: Micros::MAX,
            crash_in: None,
            freeze_in: None,
        };
        let record = VmRecord::started(name("a"), None);
        let mut world = Self {
            seed,
            rng: Rng::new(mix(seed ^ 0x706f_6c6c_7578)),
            now: Micros::ZERO,
            queue: BTreeMap::new(),
            order: 0,
            hosts: [host("a"), host("b")],
            directions: [Direction::default(), Direction::default()],
            registry: RegistryModel::new(record),
            requests: BTreeMap::new(),
            client: Client {
                story: 0,
                next: 1,
                acked: 0,
            },
            faults_on: true,
            load: Load::new(&mut Rng::new(mix(seed ^ 0x6c69_6e6b))),
            mirrored_for: Micros::ZERO,
            over_alarm_for: Micros::ZERO,
            checkpoints: BTreeMap::new(),
            whole: BTreeMap::new(),
            alive_on: 0,
            harmed: [Micros::ZERO; 2],
            named_at: Micros::ZERO,
            report: Report::default(),
            violation: None,
        };
        let record = world.registry.record.clone();
        world.start_primary(0, record, GuestState::default());
        for host in 0..2 {
            world.after(Micros(1000), Event::Heartbeat { host });
            world.after(Micros(5000), Event::Detect { host });
        }
        world.after(
            Micros(100),
            Event::Request {
                number: 1,
                story: 0,
            },
        );
        world.after(Micros(3000), Event::Work);
        world.after(Micros(10_000), Event::Operator);
        world.after(Micros(300_000), Event::Fault);
        world.after(Micros(200_000), Event::Capacity);
        world
    }

    /// Both phases.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub fn run(mut self) -> Result<Report, Violation> {
        while self.now < SAFETY_PHASE {
            self.step()?;
        }
        self.end_all_faults();
        let deadline = self.now + LIVENESS_BOUND;
        let answers = self.report.answers;
        let least = self.now + LIVENESS_LEAST;
        while self.now < least || !(self.healthy() && self.report.answers > answers + 20) {
            if self.now > deadline {
                let roles: Vec<String> = self.hosts.iter().map(Self::describe).collect();
                self.violated(
                    "liveness",
                    format!(
                        "not mirrored and answering again: {roles:?}, {:?}",
                        self.registry.record
                    ),
                );
            }
            self.step()?;
        }
        self.check_bounded();
        self.violation.clone().map_or(Ok(self.report), Err)
    }

    fn describe(host: &Host) -> String {
        if !host.up {
            return "down".into();
        }
        match &host.role {
            Role::Idle => "idle".into(),
            Role::Primary { machine, guest, .. } => format!("{machine:?} {guest:?}"),
            Role::Standby { machine, .. } => format!("{machine:?}"),
        }
    }

    fn healthy(&self) -> bool {
        self.hosts.iter().any(|host| match &host.role {
            Role::Primary { machine, guest, .. } => {
                machine.status(self.now).mirrored && guest.runs()
            }
            _ => false,
        })
    }

    fn step(&mut self) -> Result<(), Violation> {
        if let Some(((at, _), event)) = self.queue.pop_first() {
            let passed = at.since(self.now);
            self.account_lag(passed);
            self.now = self.now.max(at);
            self.report.events += 1;
            if self.report.events > EVENTS_MAX {
                self.violated("bounded", "the run does not end".into());
            }
            self.report.digest = mix(self.report.digest ^ at.0);
            self.dispatch(event);
            self.check_truthful();
        }
        self.violation.clone().map_or(Ok(()), Err)
    }

    /// Put an event `delay` from now.
    pub(super) fn after(&mut self, delay: Micros, event: Event) {
        self.order += 1;
        self.queue.insert((self.now + delay, self.order), event);
    }

    /// The host an event happens on, if it is one that a freeze delays.
    const fn host_of(event: &Event) -> Option<usize> {
        match event {
            Event::Tick { host }
            | Event::Continue { host, .. }
            | Event::Deliver { to: host, .. }
            | Event::Heartbeat { host }
            | Event::Heard { host }
            | Event::Detect { host }
            | Event::CutEnd { host, .. }
            | Event::Converged { host, .. }
            | Event::StandbyUp { host, .. }
            | Event::ApplyDisk { host, .. }
            | Event::ApplyRest { host, .. }
            | Event::PromoteEnd { host, .. }
            | Event::Closing { host, .. }
            | Event::RegistryAnswer { host, .. } => Some(*host),
            _ => None,
        }
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(host) = Self::host_of(&event) {
            let thaw = self.hosts[host].frozen_until;
            if self.now < thaw {
                let jitter = self.rng.between(0, 300);
                return self.after(thaw.since(self.now) + Micros(jitter), event);
            }
        }
        match event {
            Event::Heartbeat { host } => {
                let direction = &self.directions[host];
                if self.hosts[host].up && !direction.heartbeats_cut {
                    let delay = Micros(self.rng.between(100, 2000));
                    self.after(delay, Event::Heard { host: 1 - host });
                }
                self.after(Micros(20_000), Event::Heartbeat { host });
            }
            Event::Heard { host } => {
                self.hosts[host].last_heard = self.now;
                self.detect(host);
            }
            Event::Detect { host } => {
                self.detect(host);
                self.after(Micros(10_000), Event::Detect { host });
            }
            Event::Request { number, story } => self.request(number, story),
            Event::ClientResend { number, story } => {
                if story == self.client.story && number == self.client.next {
                    self.request(number, story);
                    self.after(Micros(200_000), Event::ClientResend { number, story });
                }
            }
            Event::Answer { number, story } => self.answered(number, story),
            Event::Work => {
                let noise = self.rng.next();
                for host in &mut self.hosts {
                    if let Role::Primary { guest, .. } = &mut host.role
                        && guest.runs()
                        && host.frozen_until <= self.now
                    {
                        guest.state.work(noise);
                    }
                }
                let delay = Micros(self.rng.between(500, 6000));
                self.after(delay, Event::Work);
            }
            Event::Capacity => self.change_capacity(),
            Event::Operator => self.operator(),
            Event::Fault => self.fault(),
            Event::Heal(heal) => self.heal(heal),
            Event::RegistryEffect { id } => {
                if let Some((request, outcome, _)) = self.requests.get_mut(&id) {
                    let before = self.registry.record.version;
                    *outcome = Some(self.registry.execute(request));
                    if self.registry.record.version != before {
                        self.named_at = self.now;
                    }
                }
            }
            other => self.on_host(other),
        }
    }

    fn detect(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        let silent = self.now.since(it.last_heard) > Timing::DEFAULT.detection;
        let verdict = if silent {
            Verdict::Lost
        } else {
            Verdict::Alive
        };
        if it.up && verdict != it.verdict {
            it.verdict = verdict;
            self.tell_machine(
                host,
                PrimaryInput::PeerVerdict(verdict),
                StandbyInput::PeerVerdict(verdict),
            );
        }
    }

    /// Whichever machine the host runs gets its version of the news.
    pub(super) fn tell_machine(
        &mut self,
        host: usize,
        primary: PrimaryInput,
        standby: StandbyInput,
    ) {
        match self.hosts[host].role {
            Role::Primary { .. } => self.tell_primary(host, primary),
            Role::Standby { .. } => self.tell_standby(host, standby),
            Role::Idle => {}
        }
    }

    /// A machine for a VM that runs on `host` from now on.
    pub(super) fn start_primary(
        &mut self,
        host: usize,
        record: Versioned<VmRecord>,
        state: GuestState,
    ) {
        let config = PrimaryConfig {
            me: self.hosts[host].name.clone(),
            timing: Timing::DEFAULT,
            policy: Policy::default(),
            max_in_flight: crate::mirror::MAX_IN_FLIGHT,
        };
        let machine = Box::new(Primary::new(config, record, self.now));
        let guest = Guest {
            state,
            seen_at: self.now,
            ..Guest::default()
        };
        self.hosts[host].life += 1;
        self.hosts[host].role = Role::Primary {
            machine,
            guest,
            attempt: Generation(0),
        };
        self.alive_on = host;
        let verdict = self.hosts[host].verdict;
        self.tell_primary(host, PrimaryInput::PeerVerdict(verdict));
        if self.directions[host].cut {
            self.tell_primary(
                host,
                PrimaryInput::LinkDown {
                    reason: "cut".into(),
                },
            );
        }
    }
}
