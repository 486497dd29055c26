//! What a decision costs in a pool of the largest size: 64 hosts that hear each other on every
//! path, and one of them falls silent.
//!
//! `cargo bench -p pollux-bench --bench decision`; docs/promises.md holds the numbers. Pure code, so
//! that a busy machine shows in the spread alone. Measured are, of the machine of the coordinator,
//!
//! - `give up`: the tick at which the host is lost: report, judging all, the new pool state;
//! - `tick`: the same without a host lost, as it happens twice a second;
//! - `hear`: taking in one report of another host, 63 of them in half a second.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use pollux::ha::machine::{Action, Config, Input, Local, Machine, WriteOutcome};
use pollux::ha::report::{Heard, NETWORKS_MAX, Path, RegistryView, Report, STORAGES_MAX};
use pollux::ha::state::PoolState;
use pollux::ha::time::Millis;
use pollux::ha::timing::Timing;
use pollux::pool::{HostId, HostName, Incarnation, POOL_HOSTS_MAX, Seq};
use pollux::registry::Versioned;
use std::hint::black_box;

/// Who falls silent.
const LOST: HostId = HostId(63);
/// Long enough for the pool to form, and to listen.
const QUIET_TICKS: u64 = 40;
/// Within these it must be noticed.
const NOTICED_TICKS: u64 = 20;

fn hosts() -> impl Iterator<Item = HostId> + Clone {
    (0..POOL_HOSTS_MAX).map(|n| HostId(u8::try_from(n).unwrap_or(u8::MAX)))
}

fn paths() -> impl Iterator<Item = Path> {
    let networks = (0..NETWORKS_MAX).map(Path::Network);
    networks.chain((0..STORAGES_MAX).map(Path::Storage))
}

fn config(me: HostId) -> Config {
    Config {
        me,
        name: HostName::new(format!("host-{}", me.0)).expect("a name"),
        incarnation: Incarnation(1),
        timing: Timing::DEFAULT,
        watchdog: Some(Timing::DEFAULT.watchdog),
        power_fencing: true,
        promised: None,
    }
}

/// The coordinator of a pool of 64, and what surrounds it.
struct Scene {
    now: Millis,
    machine: Machine,
    state: Option<Versioned<PoolState>>,
    seq: u64,
    silent_since: Option<Millis>,
}

impl Scene {
    fn new() -> Self {
        Self {
            now: Millis(0),
            machine: Machine::new(config(HostId(0)), Millis(0)),
            state: None,
            seq: 0,
            silent_since: None,
        }
    }

    /// What host `of` says now: it hears all, on every path; the lost one no more.
    fn report(&self, of: HostId) -> Report {
        let others = hosts().filter(|host| *host != of);
        let heard = others.clone().map(|host| {
            let silence = match self.silent_since {
                Some(since) if host == LOST => self.now.since(since),
                _ => Millis(120),
            };
            let heard = Heard {
                incarnation: Incarnation(1),
                seq: Seq(self.seq),
                ages: paths().map(|path| (path, silence)).collect(),
            };
            (host, heard)
        });
        Report {
            host: of,
            incarnation: Incarnation(1),
            seq: Seq(self.seq),
            heard: heard.collect(),
            gateway_age: Some(Millis(100)),
            registry: RegistryView {
                age: Some(Millis(200)),
                version: self.state.as_ref().map_or(0, |state| state.version),
                vouches: others
                    .map(|h| (h, (Incarnation(1), Seq(self.seq))))
                    .collect(),
                ..RegistryView::default()
            },
            storage_ok: true,
            standby_lag: Some(Millis(10)),
            weight: 7,
            watchdog: Some(Timing::DEFAULT.watchdog),
            farewell: false,
        }
    }

    fn local() -> Input {
        Input::Local(Local {
            gateway_age: Some(Millis(100)),
            storage_ok: true,
            ..Local::default()
        })
    }

    /// A period: all that speak are heard on every path.
    fn hear_all(&mut self) {
        self.now = self.now + Timing::DEFAULT.period;
        self.seq += 1;
        self.machine.handle(self.now, Self::local());
        for host in hosts().skip(1) {
            if host == LOST && self.silent_since.is_some() {
                continue;
            }
            let report = self.report(host);
            for path in paths() {
                let report = report.clone();
                self.machine.handle(self.now, Input::Heard { path, report });
            }
        }
    }

    /// Tick, and be the registry. Whether somebody was given up.
    fn tick(&mut self) -> bool {
        let mut inputs = vec![Input::Tick];
        let mut gave_up = false;
        while let Some(input) = inputs.pop() {
            for action in self.machine.handle(self.now, input) {
                match action {
                    Action::Read => inputs.push(Input::Read(Ok(self.state.clone()))),
                    Action::Write { mut state, .. } => {
                        gave_up |= gives_up(&state);
                        let mut version = self.state.as_ref().map_or(1, |s| s.version + 1);
                        inputs.push(Input::Written(WriteOutcome::Won { version }));
                        // The first to write is alone; the others join in the next breath.
                        if self.state.is_none() {
                            version += 1;
                            let first = state.members.values().next().cloned();
                            let first = first.expect("the founder");
                            for host in hosts() {
                                let mut member = first.clone();
                                member.name = config(host).name;
                                state.members.insert(host, member);
                            }
                        }
                        self.state = Some(Versioned {
                            version,
                            value: state,
                        });
                    }
                    _ => {}
                }
            }
        }
        gave_up
    }
}

fn gives_up(state: &PoolState) -> bool {
    !state.is_in(LOST, Incarnation(1)) && state.members.len() == POOL_HOSTS_MAX
}

/// Just before the tick at which the host is given up.
fn about_to_give_up() -> Scene {
    let mut scene = Scene::new();
    for _ in 0..QUIET_TICKS {
        scene.hear_all();
        assert!(!scene.tick(), "nobody is silent yet");
    }
    scene.silent_since = Some(scene.now);
    for _ in 0..NOTICED_TICKS {
        scene.hear_all();
        let before = (scene.machine.clone(), scene.state.clone());
        if scene.tick() {
            (scene.machine, scene.state) = before;
            return scene;
        }
    }
    panic!("a host is silent, and nobody gives it up");
}

/// One tick, and the answer to the read that it asks for.
fn turn(scene: &Scene, machine: &mut Machine) -> Vec<Action> {
    let mut actions = machine.handle(scene.now, Input::Tick);
    if actions.contains(&Action::Read) {
        let read = Input::Read(Ok(scene.state.clone()));
        actions.extend(machine.handle(scene.now, read));
    }
    actions
}

fn decision(c: &mut Criterion) {
    let mut group = c.benchmark_group("decision of 64 hosts");
    let scene = about_to_give_up();
    let decided = turn(&scene, &mut scene.machine.clone());
    let decides =
        |action: &Action| matches!(action, Action::Write { state, .. } if gives_up(state));
    assert!(decided.iter().any(decides), "{decided:?}");
    group.bench_function("give up", |b| {
        b.iter_batched_ref(
            || scene.machine.clone(),
            |machine| black_box(turn(&scene, machine)),
            BatchSize::SmallInput,
        );
    });
    let mut quiet = Scene::new();
    for _ in 0..QUIET_TICKS {
        quiet.hear_all();
        quiet.tick();
    }
    quiet.hear_all();
    group.bench_function("tick", |b| {
        b.iter_batched_ref(
            || quiet.machine.clone(),
            |machine| black_box(turn(&quiet, machine)),
            BatchSize::SmallInput,
        );
    });
    let report = quiet.report(HostId(17));
    group.bench_function("hear", |b| {
        b.iter_batched(
            || (quiet.machine.clone(), report.clone()),
            |(mut machine, report)| {
                let path = Path::Network(1);
                machine.handle(quiet.now, Input::Heard { path, report });
                machine
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, decision);
criterion_main!(benches);
