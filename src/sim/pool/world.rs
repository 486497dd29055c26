//! Everything there is, and what happens next.

use super::host::Host;
use super::paxos;
use super::register::{self, Register};
use super::{BOOT_MS, Violation};
use crate::ha::machine::{Action, Input, Local};
use crate::ha::report::{Path, Report};
use crate::ha::state::{PoolState, Proof};
use crate::ha::time::Millis;
use crate::ha::timing::Timing;
use crate::pool::{HostId, Incarnation};
use crate::sim::Rng;
use crate::sim::scenario::{Case, RegistryKind};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;

mod registry;

/// A registry call to etcd without an answer ends after this.
const ETCD_CALL_MS: u64 = 1000;
/// VMs are stopped within.
const STOP_MS: (u64, u64) = (20, 800);
/// A file of a host is on its disk within.
const WRITE_DOWN_MS: (u64, u64) = (1, 300);
/// A heartbeat through storage is found by its reader within.
const STORAGE_MS: (u64, u64) = (10, 700);
/// A packet takes.
const PACKET_MS: (u64, u64) = (1, 4);
/// Networks of a pool: management, and the private links.
pub(super) const NETWORKS: usize = 2;

/// What happens.
pub(super) enum Item {
    Tick(usize, u64),
    Input(usize, u64, Input),
    /// A report reaches a host.
    Hear(usize, u64, Path, Rc<Report>),
    /// A call to etcd takes effect.
    Etcd(usize, u64, register::Call),
    /// The same, late, and nobody hears the answer.
    Late(usize, u64, register::Call),
    /// A disk action ends.
    Disk(usize, u64, paxos::Started),
    /// A host's call to the statefile is looked at.
    Client(usize, u64),
    Boot(usize, u64),
    Thaw(usize),
    Dog(usize, u64),
    Stall(usize),
    /// A fence agent cuts the power of a host.
    PowerOff(usize),
    Fault(usize),
}

struct Due {
    at: u64,
    number: u64,
    /// Boxed: the queue moves it about.
    item: Box<Item>,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// The registry of the pool.
pub(super) enum Registry {
    Etcd(Register),
    Statefile(paxos::Disks),
}

/// What was seen to happen, with the virtual time of each.
#[derive(Default)]
pub(super) struct Log {
    pub(super) may_restart: Vec<(u64, usize, u64, Proof)>,
    pub(super) resets: Vec<(u64, usize)>,
    pub(super) given_up: Vec<(u64, usize, u64)>,
    pub(super) proved: Vec<(u64, usize, Proof)>,
    pub(super) coordinators: Vec<(u64, usize)>,
    pub(super) trace: Vec<String>,
}

/// The world.
pub(super) struct World {
    pub(super) now: u64,
    pub(super) seed: u64,
    pub(super) rng: Rng,
    pub(super) hosts: Vec<Host>,
    /// `net[network][from][to]`: whether packets get through.
    pub(super) net: Vec<Vec<Vec<bool>>>,
    pub(super) loss_permille: u64,
    pub(super) registry: Registry,
    watchdog: bool,
    fencing: Option<Millis>,
    pub(super) fence_works: bool,
    pub(super) lost_answers: bool,
    stalls: Option<Millis>,
    weights: Vec<u32>,
    /// The committed state, as it really is.
    pub(super) committed: Option<PoolState>,
    committed_version: u64,
    queue: BinaryHeap<Reverse<Due>>,
    numbered: u64,
    pub(super) events: u64,
    pub(super) log: Log,
    pub(super) tracing: bool,
    pub(super) violation: Option<Violation>,
    /// Since when invariants count, and times are told from.
    pub(super) formed_at: u64,
    /// There was one fault, and no more: somebody has to run.
    pub(super) single_fault: bool,
    pub(super) faults: Vec<crate::sim::scenario::Event>,
    /// Who `the coordinator` and `another host` are.
    pub(super) roles: Option<(usize, usize)>,
}

impl World {
    pub(super) fn new(case: &Case, seed: u64) -> Self {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(7));
        let (least, most) = case.hosts;
        let count = usize::try_from(rng.between(least as u64, most as u64)).unwrap_or(least);
        let (registry, disks) = match case.registry {
            RegistryKind::Etcd => (Registry::Etcd(Register::default()), 0),
            RegistryKind::Statefile { disks } => {
                let disks = usize::from(disks);
                (Registry::Statefile(paxos::Disks::new(disks, count)), disks)
            }
        };
        let hosts = (0..count).map(|_| Host::new(&mut rng, disks)).collect();
        let mut world = Self {
            now: 0,
            seed,
            rng,
            hosts,
            net: vec![vec![vec![true; count]; count]; NETWORKS],
            loss_permille: 0,
            registry,
            watchdog: case.watchdog,
            fencing: case.fencing,
            fence_works: true,
            lost_answers: false,
            stalls: case.stalls,
            weights: case.weights.clone(),
            committed: None,
            committed_version: 0,
            queue: BinaryHeap::new(),
            numbered: 0,
            events: 0,
            log: Log::default(),
            tracing: false,
            violation: None,
            formed_at: 0,
            single_fault: false,
            faults: Vec::new(),
            roles: None,
        };
        for n in 0..count {
            let at = world.rng.between(0, 3000);
            world.boot(n, at);
            if let Some(stalls) = world.stalls {
                let at = world.rng.between(0, stalls.0 * 100);
                world.push(at, Item::Stall(n));
            }
        }
        world
    }

    pub(super) fn push(&mut self, at: u64, item: Item) {
        self.numbered += 1;
        self.queue.push(Reverse(Due {
            at,
            number: self.numbered,
            item: Box::new(item),
        }));
    }

    fn after(&mut self, range: (u64, u64)) -> u64 {
        self.now + self.rng.between(range.0, range.1)
    }

    /// Give a host power at `at`.
    pub(super) fn boot(&mut self, n: usize, at: u64) {
        self.hosts[n].boots = true;
        let life = self.hosts[n].life;
        self.push(at, Item::Boot(n, life));
    }

    pub(super) fn violate(&mut self, invariant: &'static str, what: String) {
        if self.violation.is_none() {
            self.violation = Some(Violation {
                invariant,
                what,
                at_ms: self.now.saturating_sub(self.formed_at),
                seed: self.seed,
            });
        }
    }

    pub(super) fn trace(&mut self, what: impl FnOnce(&Self) -> String) {
        if self.tracing {
            let at = self.now.saturating_sub(self.formed_at);
            let line = format!("{:>4}.{:03} s  {}", at / 1000, at % 1000, what(self));
            self.log.trace.push(line);
        }
    }

    pub(super) fn state(&self) -> Option<&PoolState> {
        self.committed.as_ref()
    }

    /// Who the committed state names.
    pub(super) fn coordinator(&self) -> Option<usize> {
        let coordinator = self.state()?.coordinator?;
        Some(usize::from(coordinator.host.0))
    }

    /// Whether anything can prove the death of a host, `unbound` or not.
    pub(super) fn has_proofs(&self, unbound: bool) -> bool {
        (self.watchdog && !unbound) || (self.fencing.is_some() && self.fence_works)
    }

    pub(super) fn all_members(&self) -> bool {
        self.hosts.iter().all(Host::is_member)
    }

    /// Go on until `end`, or until it is `so`; whether it was.
    pub(super) fn run_until(&mut self, end: u64, so: impl Fn(&Self) -> bool) -> bool {
        while self.violation.is_none() {
            if so(self) {
                return true;
            }
            match self.queue.peek() {
                Some(Reverse(due)) if due.at <= end => {}
                _ => {
                    self.now = self.now.max(end);
                    return so(self);
                }
            }
            let Some(Reverse(due)) = self.queue.pop() else {
                break;
            };
            self.now = due.at;
            self.events += 1;
            self.happen(*due.item);
        }
        false
    }

    fn happen(&mut self, item: Item) {
        match item {
            Item::Tick(n, life) => {
                if self.hosts[n].life != life || self.hosts[n].machine.is_none() {
                    return;
                }
                if self.now < self.hosts[n].frozen_until {
                    self.hosts[n].tick_held = true;
                } else {
                    self.tick(n);
                }
            }
            Item::Input(n, life, input) => self.arrive(n, life, input),
            Item::Hear(n, life, path, report) => {
                let report = (*report).clone();
                self.arrive(n, life, Input::Heard { path, report });
            }
            Item::Etcd(n, life, call) => self.etcd(n, life, call),
            Item::Late(n, life, call) => {
                self.apply(n, life, call);
            }
            Item::Disk(n, life, started) => self.disk(n, life, &started),
            Item::Client(n, life) => {
                let host = &self.hosts[n];
                let until = host.frozen_until;
                if host.life == life && self.now < until {
                    self.push(until, Item::Client(n, life));
                } else if host.life == life {
                    self.client(n);
                }
            }
            Item::Boot(n, life) => {
                let host = &self.hosts[n];
                if host.boots && host.life == life {
                    self.begin(n);
                }
            }
            Item::Thaw(n) => self.thaw(n),
            Item::Dog(n, life) => self.dog(n, life),
            Item::Stall(n) => self.stall(n),
            Item::PowerOff(n) => {
                self.trace(|_| format!("the power of {} is cut", super::host::name(n)));
                self.crash(n);
            }
            Item::Fault(index) => self.fault(self.faults[index]),
        }
    }

    fn arrive(&mut self, n: usize, life: u64, input: Input) {
        let host = &mut self.hosts[n];
        if host.life != life || host.machine.is_none() {
            return;
        }
        if self.now < host.frozen_until {
            host.held.push_back(input);
        } else {
            self.feed(n, input);
        }
    }

    fn begin(&mut self, n: usize) {
        let (watchdog, fencing) = (self.watchdog, self.fencing.is_some());
        let now = self.now;
        let host = &mut self.hosts[n];
        host.begin(n, now, watchdog, fencing);
        let life = host.life;
        if let Registry::Statefile(disks) = &self.registry {
            host.client = paxos::Client::open(disks, n, life, &host.disks);
        }
        self.trace(|_| format!("{} begins life {life}", super::host::name(n)));
        let at = self.now + self.rng.between(0, 400);
        self.push(at, Item::Tick(n, life));
    }

    fn tick(&mut self, n: usize) {
        let host = &mut self.hosts[n];
        host.tick_held = false;
        let life = host.life;
        let next = self.now + host.takes(Timing::DEFAULT.period);
        let local = Local {
            gateway_age: host.gateway.then_some(Millis(100)),
            storage_ok: true,
            weight: self.weights.get(n).copied().unwrap_or(1),
            ..Local::default()
        };
        // Disks that came back let a statefile be taken up again.
        if host.client.is_none()
            && let Registry::Statefile(disks) = &self.registry
        {
            host.client = paxos::Client::open(disks, n, life, &host.disks);
        }
        self.push(next, Item::Tick(n, life));
        self.feed(n, Input::Local(local));
        self.feed(n, Input::Tick);
    }

    fn thaw(&mut self, n: usize) {
        if self.now < self.hosts[n].frozen_until || self.hosts[n].machine.is_none() {
            return;
        }
        self.trace(|_| format!("{} goes on", super::host::name(n)));
        while let Some(input) = self.hosts[n].held.pop_front() {
            self.feed(n, input);
        }
        if self.hosts[n].machine.is_some() && self.hosts[n].tick_held {
            self.tick(n);
        }
    }

    pub(super) fn freeze(&mut self, n: usize, length: u64) {
        let until = self.now + length;
        if self.hosts[n].machine.is_some() && until > self.hosts[n].frozen_until {
            self.hosts[n].frozen_until = until;
            self.push(until, Item::Thaw(n));
        }
    }

    fn stall(&mut self, n: usize) {
        let Some(stalls) = self.stalls else {
            return;
        };
        let length = self.rng.between(1, stalls.0);
        self.freeze(n, length);
        let next = self.now + self.rng.between(stalls.0, stalls.0 * 100);
        self.push(next, Item::Stall(n));
    }

    /// The watchdog looks whether it was petted.
    fn dog(&mut self, n: usize, life: u64) {
        let host = &self.hosts[n];
        let Some(until) = host.pet_until.filter(|_| host.life == life) else {
            return;
        };
        let fires = host.when(until + Timing::DEFAULT.watchdog);
        if self.now < fires {
            self.push(fires, Item::Dog(n, life));
            return;
        }
        self.trace(|_| format!("the watchdog resets {}", super::host::name(n)));
        if !self.hosts[n].touched && self.formed_at > 0 {
            let what = format!(
                "{} was reset, and no fault was about it",
                super::host::name(n)
            );
            self.violate("innocent", what);
        }
        self.log.resets.push((self.now, n));
        self.crash(n);
        self.hosts[n].resets += 1;
        self.boot(n, self.now + BOOT_MS);
    }

    /// Power is gone.
    pub(super) fn crash(&mut self, n: usize) {
        let host = &mut self.hosts[n];
        if let (Registry::Statefile(disks), Some(client)) = (&mut self.registry, &mut host.client) {
            client.lose_power(disks, &host.disks, &mut self.rng);
        }
        host.lose_power();
        self.look_who_runs();
    }

    fn look_who_runs(&mut self) {
        if self.single_fault && !self.hosts.iter().any(|host| host.effect) {
            self.violate("somebody-runs", "after a single fault no host runs".into());
        }
    }

    fn feed(&mut self, n: usize, input: Input) {
        let now = self.now;
        let host = &mut self.hosts[n];
        if matches!(input, Input::Stopped) {
            // As the daemon does: nothing runs any more, so the watchdog is disarmed.
            host.effect = false;
            host.pet_until = None;
        }
        if matches!(input, Input::Remembered(true)) {
            host.promised = Some(Incarnation(host.life));
        }
        let clock = host.clock(now);
        if let Input::Read(Err(why)) = &input {
            let why = why.clone();
            self.trace(|_| format!("{} read nothing: {why}", super::host::name(n)));
        }
        let host = &mut self.hosts[n];
        let Some(machine) = &mut host.machine else {
            return;
        };
        let actions = machine.handle(clock, input);
        host.effect |= host.is_member();
        let life = host.life;
        for action in actions {
            if self.hosts[n].life == life && self.hosts[n].machine.is_some() {
                self.act(n, action);
            }
        }
        self.look_who_runs();
    }

    fn act(&mut self, n: usize, action: Action) {
        let life = self.hosts[n].life;
        match action {
            Action::Publish(report) => self.publish(n, &report),
            Action::Read => match &mut self.registry {
                Registry::Etcd(_) => {
                    let at = self.after((1, 30));
                    self.push(at, Item::Etcd(n, life, register::Call::Read));
                }
                Registry::Statefile(_) => self.call(n, None),
            },
            Action::Write { expected, state } => match &mut self.registry {
                Registry::Etcd(_) => {
                    let call = register::Call::Write { expected, state };
                    let at = self.after((1, 30));
                    self.push(at, Item::Etcd(n, life, call));
                }
                Registry::Statefile(_) => self.call(n, Some((expected, state))),
            },
            Action::PetUntil(until) => {
                let before = self.hosts[n].pet_until.replace(until);
                if self.watchdog && before.is_none_or(|before| until < before) {
                    let fires = self.hosts[n].when(until + Timing::DEFAULT.watchdog);
                    self.push(fires.max(self.now), Item::Dog(n, life));
                }
            }
            Action::Fence { host, incarnation } => self.fence(n, host, incarnation),
            Action::Remember(_) => {
                let at = self.after(WRITE_DOWN_MS);
                self.push(at, Item::Input(n, life, Input::Remembered(true)));
            }
            Action::Forget => self.hosts[n].promised = None,
            Action::StopVms { why } => {
                self.trace(|_| format!("{} stops its VMs: {why}", super::host::name(n)));
                let at = self.after(STOP_MS);
                self.push(at, Item::Input(n, life, Input::Stopped));
            }
            Action::MayRestart {
                host,
                incarnation,
                proof,
            } => self.may_restart(host, incarnation, proof),
            Action::Alert(text) => self.trace(|_| format!("{}: {text}", super::host::name(n))),
            // Nothing runs any more: the next life begins at once.
            Action::Over => {
                self.hosts[n].pet_until = None;
                self.boot(n, self.now + 10);
            }
        }
    }

    fn may_restart(&mut self, host: HostId, incarnation: Incarnation, proof: Proof) {
        let index = usize::from(host.0);
        let former = &self.hosts[index];
        if former.effect && former.life == incarnation.0 {
            let what = format!(
                "the VMs of {} in life {} may be restarted ({proof}), and it still runs them",
                super::host::name(index),
                incarnation.0
            );
            self.violate("one-life", what);
        }
        self.trace(|_| {
            format!(
                "the VMs of {} may restart: {proof}",
                super::host::name(index)
            )
        });
        self.log
            .may_restart
            .push((self.now, index, incarnation.0, proof));
    }

    fn fence(&mut self, n: usize, host: HostId, incarnation: Incarnation) {
        let life = self.hosts[n].life;
        let takes = self.fencing.map_or(0, |takes| takes.0);
        let target = usize::from(host.0);
        let confirmed = self.fence_works;
        if confirmed {
            let at = self.after((0, takes));
            self.push(at, Item::PowerOff(target));
        }
        let done = Input::Fenced {
            host,
            incarnation,
            confirmed,
        };
        let at = self.now + takes;
        self.push(at, Item::Input(n, life, done));
    }

    fn publish(&mut self, n: usize, report: &Report) {
        // What travels is bytes.
        let Ok(report) = Report::decode(&report.encode()) else {
            return self.violate("reports", "a report cannot be read back".into());
        };
        let report = Rc::new(report);
        for other in (0..self.hosts.len()).filter(|other| *other != n) {
            let life = self.hosts[other].life;
            if self.hosts[other].machine.is_none() {
                continue;
            }
            for network in 0..NETWORKS {
                if self.net[network][n][other] && !self.rng.permille(self.loss_permille) {
                    let at = self.after(PACKET_MS);
                    let path = Path::Network(u8::try_from(network).unwrap_or(0));
                    self.push(at, Item::Hear(other, life, path, Rc::clone(&report)));
                }
            }
            let (here, there) = (&self.hosts[n].disks, &self.hosts[other].disks);
            let common = here
                .iter()
                .zip(there)
                .position(|(here, there)| *here && *there);
            if let Some(disk) = common.and_then(|disk| u8::try_from(disk).ok()) {
                let at = self.after(STORAGE_MS);
                let path = Path::Storage(disk);
                self.push(at, Item::Hear(other, life, path, Rc::clone(&report)));
            }
        }
    }
}
