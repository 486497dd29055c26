//! One life of this host in the pool: the thread that owns the machine.
//!
//! Every input is handled when it comes and every action carried out at once or handed to a
//! thread of its own; nothing here waits for the registry, a disk, an agent or a VM.

use super::isolating::{Manner, stop_all};
use super::notes::Notes;
use super::storage::{self, StorageBeats};
use super::watchdog::HostWatchdog;
use super::{Event, Setup};
use crate::beat::{
    Inbox, Network, NetworkIndex, Peer, Transport, TransportConfig, load_keys, load_promised,
};
use crate::fence::job::{Job, Outcome};
use crate::fence::watchdog::BootNs;
use crate::ha::detector::{Listening, PathVerdict};
use crate::ha::machine::{Action, Config, Input, Local, Machine, Phase, WriteOutcome};
use crate::ha::report::{Path, Report};
use crate::ha::state::{PoolState, STATE_KEY, Standing};
use crate::ha::time::Millis;
use crate::pool::{HostId, HostName, Incarnation};
use crate::registry::{CasOutcome, RegistryError, Versioned};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

/// How long the ear waits before it looks whether its transport has stopped.
const EAR_PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks for a change of the pool's keys.
const KEYS_EVERY: Millis = Millis(2000);
/// Of the time until the watchdog fires, kept back for what comes after stopping the VMs.
const STOP_RESERVE: Millis = Millis(1000);

/// How a life ended.
pub(super) enum End {
    /// The pool has given this life up, and nothing runs.
    Over,
    /// This host has left in order.
    Left,
    /// It cannot be a member; why, and what to do.
    Failed(String),
}

pub(super) struct Life<'a> {
    setup: &'a Setup,
    incarnation: Incarnation,
    machine: Machine,
    /// Ticks with the machine, for what is shown.
    listening: Listening,
    transport: Transport,
    storage: Option<StorageBeats>,
    notes: Notes,
    watchdog: Option<HostWatchdog>,
    fences: BTreeMap<(HostId, Incarnation), Job>,
    inbox: Receiver<Event>,
    tell: Sender<Event>,
    next_tick: Millis,
    next_keys: Millis,
    registry_error: Option<String>,
    storage_trouble: Option<String>,
    /// Of the newest change of the pool's state, if it did not go through.
    write_error: Option<String>,
    failed: Option<String>,
    leaving: bool,
    end: Option<End>,
}

/// Now, by the clock that all of this goes by.
pub(super) fn boot_now() -> Millis {
    Millis(BootNs::now().0 / 1_000_000)
}

fn duration(millis: Millis) -> Duration {
    Duration::from_millis(millis.0)
}

impl<'a> Life<'a> {
    /// Begin one.
    ///
    /// # Errors
    /// What is missing and what to do.
    pub(super) fn begin(
        setup: &'a Setup,
        incarnation: Incarnation,
        tell: Sender<Event>,
        inbox: Receiver<Event>,
    ) -> Result<Self, String> {
        let timing = setup.pool.timing.timing();
        let (networks, peers) = layout(setup);
        let (transport, ear) = Transport::start(TransportConfig {
            me: setup.host.clone(),
            incarnation,
            keys: super::lock(&setup.keys).clone(),
            networks,
            peers,
            period: duration(timing.period),
        })
        .map_err(|e| e.to_string())?;
        listen(ear, tell.clone()).map_err(|e| format!("no thread to listen: {e}"))?;
        let storage = setup.statefile.clone().map(|options| {
            StorageBeats::start(storage::Setup {
                options,
                me: setup.host.clone(),
                incarnation,
                keys: Arc::clone(&setup.keys),
                period: duration(timing.period),
                tell: tell.clone(),
            })
        });
        let storage = storage
            .transpose()
            .map_err(|e| format!("no thread for heartbeats through storage: {e}"))?;
        let place = setup.pool.watchdog.as_deref();
        let config = Config {
            me: setup.id,
            name: setup.host.clone(),
            incarnation,
            timing,
            watchdog: place.map(|_| timing.watchdog),
            power_fencing: setup.fencing.is_some(),
            promised: load_promised(&setup.state_dir).map_err(|e| e.to_string())?,
        };
        tracing::info!(incarnation = incarnation.0, "a life in the pool begins");
        let now = boot_now();
        Ok(Self {
            setup,
            incarnation,
            machine: Machine::new(config, now),
            listening: Listening::new(timing, now),
            transport,
            storage,
            notes: Notes::start(setup.state_dir.clone(), tell.clone())
                .map_err(|e| format!("no thread to write down promises: {e}"))?,
            watchdog: place.map(|place| HostWatchdog::new(place, duration(timing.watchdog))),
            fences: BTreeMap::new(),
            inbox,
            tell,
            next_tick: boot_now(),
            next_keys: boot_now(),
            registry_error: None,
            storage_trouble: None,
            write_error: None,
            failed: None,
            leaving: false,
            end: None,
        })
    }

    /// Live it.
    pub(super) fn run(mut self) -> End {
        loop {
            let now = boot_now();
            if now >= self.next_tick {
                self.tick(now);
            }
            match self
                .inbox
                .recv_timeout(duration(self.next_tick.since(boot_now())))
            {
                Ok(event) => self.take(event),
                // This life holds a sender itself.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(end) = self.end.take() {
                return end;
            }
        }
    }

    fn tick(&mut self, now: Millis) {
        let timing = self.setup.pool.timing.timing();
        self.next_tick = now + timing.period;
        let trouble = self.setup.disks.trouble(duration(timing.storage_lost));
        let storage_ok = trouble.is_none();
        self.note_storage(trouble);
        let local = Local {
            storage_ok,
            gateway_age: self
                .setup
                .gateway
                .as_ref()
                .and_then(|probe| probe.status().age)
                .map(|age| Millis(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))),
            ..self
                .setup
                .vms
                .upgrade()
                .map(|host| host.local())
                .unwrap_or_default()
        };
        self.input(Input::Local(local));
        self.poll_fences();
        self.look_for_keys(now);
        self.listening.tick(boot_now());
        self.input(Input::Tick);
        self.show();
    }

    /// `pollux pool key` changes the keys in the state folder.
    fn look_for_keys(&mut self, now: Millis) {
        if now < self.next_keys {
            return;
        }
        self.next_keys = now + KEYS_EVERY;
        match load_keys(&self.setup.state_dir) {
            Ok(Some(found)) => {
                let mut keys = super::lock(&self.setup.keys);
                if found != *keys {
                    tracing::info!(
                        "the pool's keys have changed; the present is {}",
                        found.present().0
                    );
                    self.transport.set_keys(&found);
                    *keys = found;
                }
            }
            // Those in use go on; the command that damaged the file has said so.
            Ok(None) => {}
            Err(e) => tracing::warn!("the pool's keys: {e}"),
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Heard {
                path,
                sender,
                incarnation,
                report,
            } => {
                let host = self.setup.pool.host_by_id(report.host);
                let speaks_for_itself = host.is_some_and(|host| host.name == sender)
                    && report.incarnation == incarnation;
                if speaks_for_itself {
                    self.setup.heard.note(boot_now());
                    self.input(Input::Heard { path, report });
                } else {
                    tracing::warn!(
                        "{sender} reports as host {} in life {}, which it is not; its [pool] differs from this host's",
                        report.host,
                        report.incarnation.0
                    );
                }
            }
            Event::Read(result) => {
                self.note_registry(result.as_ref().err());
                self.input(Input::Read(result));
            }
            Event::Written(outcome, problem) => {
                self.note_write(problem);
                self.input(Input::Written(outcome));
            }
            Event::Stopped => {
                self.input(Input::Stopped);
                if let Some(watchdog) = &mut self.watchdog {
                    watchdog.disarm();
                }
            }
            Event::Remembered(done) => self.input(Input::Remembered(done)),
            Event::Declare { host, answer } => {
                // Whoever asked may be gone.
                let _ = answer.send(self.declare(&host));
            }
            Event::Leave => {
                if !std::mem::replace(&mut self.leaving, true) {
                    self.input(Input::Leave {
                        why: "its daemon was told to end".into(),
                    });
                }
            }
        }
        self.has_left();
    }

    /// A life that is to end by itself has ended once the pool knows, or never knew of it.
    fn has_left(&mut self) {
        if !(self.leaving || self.failed.is_some())
            || !matches!(self.machine.phase(), Phase::Stopped { .. })
        {
            return;
        }
        let standing = self
            .machine
            .state()
            .and_then(|state| state.value.standing(self.setup.id, self.incarnation));
        if !matches!(standing, Some(Standing::In | Standing::Ousted)) {
            self.finish();
        }
    }

    fn finish(&mut self) {
        self.end = Some(match self.failed.take() {
            Some(reason) if !self.leaving => End::Failed(reason),
            _ if self.leaving => End::Left,
            _ => End::Over,
        });
    }

    fn note_storage(&mut self, trouble: Option<String>) {
        match (&trouble, &self.storage_trouble) {
            (Some(trouble), None) => {
                tracing::error!("the storage of this host's VMs does not answer: {trouble}");
            }
            (None, Some(_)) => tracing::info!("the storage of this host's VMs answers again"),
            _ => {}
        }
        self.storage_trouble = trouble;
    }

    fn note_registry(&mut self, problem: Option<&String>) {
        if let Some(problem) = problem.filter(|_| self.registry_error.is_none()) {
            tracing::warn!("the pool's state cannot be read: {problem}");
        }
        if problem.is_none() && self.registry_error.is_some() {
            tracing::info!("the pool's state can be read again");
        }
        self.registry_error = problem.cloned();
    }

    /// It is tried again with every look at the pool: told once.
    fn note_write(&mut self, problem: Option<String>) {
        if let Some(problem) = problem.as_ref().filter(|_| self.write_error.is_none()) {
            tracing::warn!("the pool's state cannot be changed: {problem}");
        }
        if problem.is_none() && self.write_error.is_some() {
            tracing::info!("the pool's state can be changed again");
        }
        self.write_error = problem;
    }

    fn input(&mut self, input: Input) {
        let before = self.machine.phase().clone();
        let actions = self.machine.handle(boot_now(), input);
        for action in actions {
            self.act(action);
        }
        let phase = self.machine.phase();
        if *phase != before {
            tracing::info!("in the pool: {}", super::showing::phase_words(phase));
            self.show();
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Publish(report) => self.publish(&report),
            Action::Read => self.read(),
            Action::Write { expected, state } => self.write(expected, &state),
            Action::PetUntil(until) => self.pet_until(until),
            Action::Fence { host, incarnation } => self.fence(host, incarnation),
            Action::Remember(life) => self.notes.write(Some(life)),
            Action::Forget => self.notes.write(None),
            Action::StopVms { why } => self.stop_vms(why),
            Action::MayRestart { host, proof, .. } => {
                tracing::warn!("the VMs of {} may be restarted: {proof}", self.name(host));
                self.setup.restarts.may_restart();
            }
            Action::Alert(text) => {
                tracing::error!("{text}");
                self.setup.shown.alert(text);
            }
            Action::Over => self.finish(),
        }
    }

    fn name(&self, host: HostId) -> String {
        let known = self.setup.pool.host_by_id(host);
        known.map_or_else(|| host.to_string(), |host| host.name.to_string())
    }

    fn publish(&self, report: &Report) {
        let bytes = report.encode();
        if let Some(storage) = &self.storage {
            storage.publish(&bytes);
        }
        if let Err(e) = self.transport.publish(bytes) {
            tracing::error!("{e}");
        }
    }

    fn read(&self) {
        let tell = self.tell.clone();
        self.setup.claims.work(move |registry| {
            let found = registry.and_then(|registry| {
                let found = registry.read(STATE_KEY).map_err(|e| e.to_string())?;
                found
                    .map(|Versioned { version, value }| {
                        let value = PoolState::from_bytes(&value).map_err(|e| e.to_string())?;
                        Ok(Versioned { version, value })
                    })
                    .transpose()
            });
            let _ = tell.send(Event::Read(found));
        });
    }

    fn write(&self, expected: Option<u64>, state: &PoolState) {
        let tell = self.tell.clone();
        let bytes = state.to_bytes();
        self.setup.claims.work(move |registry| {
            let (outcome, problem) = match registry
                .map(|registry| registry.compare_and_set(STATE_KEY, expected, &bytes))
            {
                Ok(Ok(CasOutcome::Won { version })) => (WriteOutcome::Won { version }, None),
                Ok(Ok(CasOutcome::Lost(_))) => (WriteOutcome::Lost, None),
                Ok(Err(e @ RegistryError::NotDone { .. })) => {
                    (WriteOutcome::Lost, Some(e.to_string()))
                }
                Ok(Err(e @ RegistryError::Unknown { .. })) => {
                    (WriteOutcome::Unknown, Some(e.to_string()))
                }
                Err(reason) => (WriteOutcome::Lost, Some(reason)),
            };
            let _ = tell.send(Event::Written(outcome, problem));
        });
    }

    /// The gate opens only behind an armed watchdog.
    fn pet_until(&mut self, until: Millis) {
        if let Some(watchdog) = &mut self.watchdog
            && let Err(reason) = watchdog.pet_until(until)
        {
            self.fail(reason);
            return;
        }
        if *self.machine.phase() == Phase::Member {
            self.setup.gate.set_open();
        }
    }

    fn fail(&mut self, reason: String) {
        if self.failed.is_none() {
            self.failed = Some(reason.clone());
            self.input(Input::Leave { why: reason });
        }
    }

    fn fence(&mut self, host: HostId, incarnation: Incarnation) {
        let name = self.setup.pool.host_by_id(host).map(|host| &host.name);
        let started = match (&self.setup.fencing, name) {
            (Some(config), Some(name)) => {
                tracing::warn!("switching host {name} off");
                Job::start(config, name).map_err(|e| e.to_string())
            }
            _ => Err(format!(
                "host {host} cannot be fenced: [pool] does not name it"
            )),
        };
        match started {
            Ok(job) => {
                self.fences.insert((host, incarnation), job);
            }
            Err(reason) => {
                tracing::error!("{reason}");
                self.setup.shown.alert(reason);
                // Asked again after a while, not at once.
                self.input(Input::Fenced {
                    host,
                    incarnation,
                    confirmed: false,
                });
            }
        }
    }

    fn poll_fences(&mut self) {
        let mut done = Vec::new();
        self.fences.retain(|life, job| match job.poll() {
            None => true,
            Some(outcome) => {
                done.push((*life, outcome.clone()));
                false
            }
        });
        for ((host, incarnation), outcome) in done {
            let name = self.name(host);
            let confirmed = matches!(outcome, Outcome::Confirmed { .. });
            if confirmed {
                tracing::warn!("the power of {name} is off, and confirmed to be");
            } else {
                let text = format!(
                    "the power of {name} could not be switched off: {outcome:?}; if it is off for certain, say `pollux pool off {name}`"
                );
                tracing::error!("{text}");
                self.setup.shown.alert(text);
            }
            self.input(Input::Fenced {
                host,
                incarnation,
                confirmed,
            });
        }
    }

    /// A person says that a host is off.
    fn declare(&mut self, name: &HostName) -> Result<(), String> {
        let known = self.setup.pool.host(name);
        let host = known.map(|host| HostId(host.id)).ok_or_else(|| {
            format!("{name} is no host of this pool; `pollux pool status` lists them")
        })?;
        if host == self.setup.id {
            return Err(format!("{name} is this host, and it runs"));
        }
        let state = self.machine.state().map(|state| &state.value);
        let state = state.ok_or("this host has not seen the pool's state yet; try again")?;
        let member = state.members.get(&host);
        let member = member.filter(|m| matches!(m.standing, Standing::In | Standing::Ousted));
        let Some(incarnation) = member.map(|member| member.incarnation) else {
            return Err(format!(
                "{name} is no member, or its death is proved already: nothing waits for this"
            ));
        };
        let heard = self.machine.paths(boot_now()).remove(&host);
        let heard = heard
            .into_iter()
            .flatten()
            .find(|(_, verdict, _)| *verdict != PathVerdict::Lost);
        if let Some((_, _, age)) = heard {
            return Err(format!("{name} was heard {age} ago: it is not off"));
        }
        let coordinator = state.coordinator.map(|c| c.host);
        if coordinator != Some(self.setup.id)
            && (coordinator != Some(host) || state.may_act().count() > 2)
        {
            let who = coordinator.map_or_else(|| "nobody".into(), |host| self.name(host));
            return Err(format!(
                "{who} coordinates: say it there; if that is the host that is off, wait until another does"
            ));
        }
        tracing::warn!("a person says that {name} is off");
        self.input(Input::Declared { host, incarnation });
        Ok(())
    }

    fn stop_vms(&mut self, why: String) {
        tracing::error!("all VMs of this host are stopped: {why}");
        self.setup.gate.close(why.clone());
        let timing = self.setup.pool.timing.timing();
        let lease = self.machine.lease_until().unwrap_or_else(boot_now);
        let left = (lease.max(boot_now()) + timing.watchdog)
            .since(boot_now())
            .since(STOP_RESERVE);
        let manner = if self.leaving || self.failed.is_some() {
            Manner::Leaving
        } else {
            Manner::Isolated {
                left: duration(left),
            }
        };
        let (vms, gate, tell) = (
            self.setup.vms.clone(),
            self.setup.gate.clone(),
            self.tell.clone(),
        );
        let spawned = std::thread::Builder::new()
            .name("pool-stop".into())
            .spawn(move || {
                if let Some(host) = vms.upgrade() {
                    stop_all(&host, &gate, &why, manner);
                }
                let _ = tell.send(Event::Stopped);
            });
        if let Err(e) = spawned {
            // The watchdog is petted no more, and does it.
            tracing::error!("no thread to stop the VMs: {e}; the watchdog will reset this host");
        }
    }

    fn show(&self) {
        let transport = self.transport.status();
        self.setup.shown.update(&super::showing::Seen {
            setup: self.setup,
            incarnation: self.incarnation,
            machine: &self.machine,
            listening: &self.listening,
            watchdog: self.watchdog.as_ref(),
            registry_error: self
                .registry_error
                .as_deref()
                .or(self.write_error.as_deref()),
            transport: &transport,
        });
    }
}

fn layout(setup: &Setup) -> (Vec<Network>, Vec<Peer>) {
    let pool = &setup.pool;
    let index = |name: &str| {
        let at = pool.networks.iter().position(|network| network == name)?;
        u8::try_from(at).ok().map(NetworkIndex)
    };
    let own = pool.host(&setup.host).map(|host| &host.addresses);
    let networks = own
        .into_iter()
        .flatten()
        .filter_map(|(name, address)| {
            Some(Network {
                index: index(name)?,
                local: pool.socket(*address),
                device: pool.devices.get(name).cloned(),
            })
        })
        .collect();
    let peers = pool
        .hosts
        .iter()
        .filter(|host| host.name != setup.host)
        .map(|host| Peer {
            name: host.name.clone(),
            addrs: host
                .addresses
                .iter()
                .filter_map(|(name, address)| Some((index(name)?, pool.socket(*address))))
                .collect(),
        })
        .collect();
    (networks, peers)
}

/// Hand over what the networks bring, until the transport or the life has ended.
fn listen(ear: Inbox, tell: Sender<Event>) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("pool-ear".into())
        .spawn(move || {
            while let Some(batch) = ear.wait(EAR_PATIENCE) {
                for event in batch.events {
                    tracing::warn!("{event}");
                }
                for received in batch.received {
                    let report = match Report::decode(&received.payload) {
                        Ok(report) => report,
                        Err(e) => {
                            tracing::warn!(host = %received.sender, "{e}");
                            continue;
                        }
                    };
                    let heard = Event::Heard {
                        path: Path::Network(received.network.0),
                        sender: received.sender,
                        incarnation: received.incarnation,
                        report,
                    };
                    if tell.send(heard).is_err() {
                        return;
                    }
                }
            }
        })
        .map(drop)
}
