//! Model check of [`super::paxos`]: every order in which the hosts' actions can take effect,
//! with crashes, restarts, lost disks and failed actions, up to a bound.
//!
//! What is checked in every state: of each instance at most one value is ever called chosen,
//! and no look ends with an instance older than one that was called chosen before it began.
//! The rules are shown to be needed by leaving each out.
//!
//! `POLLUX_MODEL_STEPS` raises the bound: the number of states explored per case, and of
//! walks where a case is too wide to be explored.

use super::paxos::{
    Action, Failed, HostSlot, Incarnation, Instance, Machine, Outcome, Pass, Record, Sabotage,
    ValueId, recover,
};
use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What one exploration may do.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    hosts: u16,
    disks: usize,
    /// Values each host tries to get chosen.
    proposals: u8,
    /// Looks each host makes in all, those before proposals included.
    looks: u8,
    crashes: u8,
    /// Actions that end in an error, with or without effect.
    errors: u8,
    /// Disks that go away for good.
    lost: u8,
    /// A read takes the records one after the other instead of all at once.
    split: bool,
    /// A restarted host forgets its ballots (a broken rule).
    forgets: bool,
    sabotage: Sabotage,
}

impl Bounds {
    const fn of(hosts: u16, disks: usize) -> Self {
        Self {
            hosts,
            disks,
            proposals: 1,
            looks: 2,
            crashes: 0,
            errors: 0,
            lost: 0,
            split: false,
            forgets: false,
            sabotage: Sabotage::None,
        }
    }
}

/// An action on its way to a disk; a split read with what it has read so far.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Flight {
    action: Action,
    partial: Pass,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host {
    /// `None`: crashed.
    machine: Option<Machine>,
    flights: Vec<Option<Flight>>,
    fetch: Option<Action>,
    proposals: u8,
    looks: u8,
    incarnation: u64,
    /// What the running look must find at least.
    floor: Instance,
    looking: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    hosts: Vec<Host>,
    /// Per disk the records, by host; `None`: lost.
    disks: Vec<Option<Pass>>,
    /// What was called chosen, by instance from 1.
    chosen: Vec<ValueId>,
    crashes: u8,
    errors: u8,
    lost: u8,
}

/// One thing that can happen.
#[derive(Clone, Copy, Debug)]
enum Event {
    Begin(usize),
    Act(usize, usize),
    /// The action fails; a write may have landed.
    Fail(usize, usize, bool),
    Fetch(usize),
    Crash(usize),
    Restart(usize),
    Lose(usize),
}

impl State {
    fn new(bounds: &Bounds) -> Self {
        let hosts = (0..bounds.hosts)
            .map(|slot| {
                let mut machine =
                    Machine::new(HostSlot(slot), bounds.disks, Incarnation(1), Record::FIRST);
                machine.sabotage = bounds.sabotage;
                Host {
                    machine: Some(machine),
                    flights: vec![None; bounds.disks],
                    fetch: None,
                    proposals: bounds.proposals,
                    looks: bounds.looks,
                    incarnation: 1,
                    floor: Instance(0),
                    looking: false,
                }
            })
            .collect();
        Self {
            hosts,
            disks: vec![Some(vec![Record::FIRST; usize::from(bounds.hosts)]); bounds.disks],
            chosen: Vec::new(),
            crashes: bounds.crashes,
            errors: bounds.errors,
            lost: bounds.lost,
        }
    }

    fn events(&self, bounds: &Bounds) -> Vec<Event> {
        let mut events = Vec::new();
        for (h, host) in self.hosts.iter().enumerate() {
            if host.machine.is_none() {
                if host.looks > 0 {
                    events.push(Event::Restart(h));
                }
                continue;
            }
            if !host.looking && host.looks > 0 {
                events.push(Event::Begin(h));
            }
            let busy = host.fetch.is_some() || host.flights.iter().any(Option::is_some);
            for d in 0..bounds.disks {
                if let Some(flight) = &host.flights[d] {
                    events.push(Event::Act(h, d));
                    if self.errors > 0 && self.disks[d].is_some() {
                        events.push(Event::Fail(h, d, false));
                        if matches!(flight.action, Action::Write { .. }) {
                            events.push(Event::Fail(h, d, true));
                        }
                    }
                }
            }
            if host.fetch.is_some() {
                events.push(Event::Fetch(h));
            }
            // A crash of a host that is about nothing is a restart; only that matters then.
            if self.crashes > 0 && (busy || host.looks > 0) {
                events.push(Event::Crash(h));
            }
        }
        if self.lost > 0 {
            events.extend((0..bounds.disks).map(Event::Lose));
        }
        events
    }

    /// The state after `event`, or what rule it broke.
    fn after(&self, event: Event, bounds: &Bounds) -> Result<Self, String> {
        let mut next = self.clone();
        match event {
            Event::Begin(h) => {
                let host = &mut next.hosts[h];
                host.looks -= 1;
                host.looking = true;
                host.floor = Instance(next.chosen.len() as u64);
                if let Some(machine) = &mut host.machine {
                    machine.look();
                }
                next.pump(h)?;
            }
            Event::Act(h, d) => next.act(h, d, bounds)?,
            Event::Fail(h, d, landed) => {
                next.errors -= 1;
                if let Some(flight) = next.hosts[h].flights[d].take() {
                    if landed {
                        next.land(h, d, &flight.action);
                    }
                    next.answer(h, d, &flight.action, Err(Failed))?;
                }
            }
            Event::Fetch(h) => {
                if let Some(Action::Fetch { value, places }) = next.hosts[h].fetch.take() {
                    let there = places.iter().any(|place| {
                        next.disks[place.disk].as_ref().is_some_and(|disk| {
                            let r = &disk[usize::from(place.host.0)];
                            r.chosen == Some(value) || r.proposed == Some(value)
                        })
                    });
                    if let Some(machine) = &mut next.hosts[h].machine {
                        machine.handle_fetched(if there { Ok(()) } else { Err(Failed) });
                    }
                    next.pump(h)?;
                }
            }
            Event::Crash(h) => {
                next.crashes -= 1;
                let host = &mut next.hosts[h];
                host.machine = None;
                host.flights = vec![None; bounds.disks];
                host.fetch = None;
                host.looking = false;
            }
            Event::Restart(h) => {
                // A refused start changes nothing: it is tried again or never.
                let slot = HostSlot(u16::try_from(h).unwrap());
                if let Some(record) = recover(slot, &next.disks) {
                    let record = if bounds.forgets {
                        Record::FIRST
                    } else {
                        record
                    };
                    let host = &mut next.hosts[h];
                    host.incarnation += 1;
                    let mut machine =
                        Machine::new(slot, bounds.disks, Incarnation(host.incarnation), record);
                    machine.sabotage = bounds.sabotage;
                    host.machine = Some(machine);
                }
            }
            Event::Lose(d) => {
                next.lost -= 1;
                next.disks[d] = None;
            }
        }
        Ok(next)
    }

    fn land(&mut self, h: usize, d: usize, action: &Action) {
        if let (Action::Write { record, .. }, Some(disk)) = (action, &mut self.disks[d]) {
            disk[h] = *record;
        }
    }

    fn act(&mut self, h: usize, d: usize, bounds: &Bounds) -> Result<(), String> {
        let Some(mut flight) = self.hosts[h].flights[d].take() else {
            return Ok(());
        };
        let Some(disk) = &self.disks[d] else {
            return self.answer(h, d, &flight.action, Err(Failed));
        };
        let pass = match flight.action {
            Action::Read { .. } if bounds.split => {
                flight.partial.push(disk[flight.partial.len()]);
                if flight.partial.len() < disk.len() {
                    self.hosts[h].flights[d] = Some(flight);
                    return Ok(());
                }
                std::mem::take(&mut flight.partial)
            }
            Action::Read { .. } => disk.clone(),
            _ => Vec::new(),
        };
        self.land(h, d, &flight.action);
        self.answer(h, d, &flight.action, Ok(pass))
    }

    fn answer(
        &mut self,
        h: usize,
        d: usize,
        action: &Action,
        result: Result<Pass, Failed>,
    ) -> Result<(), String> {
        if let Some(machine) = &mut self.hosts[h].machine {
            match action {
                Action::Write { .. } => machine.handle_written(d, result.map(|_| ())),
                _ => machine.handle_read(d, result),
            }
        }
        self.pump(h)
    }

    /// Take the host's outcome, go on as its registry would, and send its actions off.
    fn pump(&mut self, h: usize) -> Result<(), String> {
        let host = &mut self.hosts[h];
        let Some(machine) = &mut host.machine else {
            return Ok(());
        };
        match machine.poll_outcome() {
            None => {}
            Some(Outcome::Current {
                instance, value, ..
            }) => {
                if let Some(value) = value {
                    let known = usize::try_from(instance.0).unwrap();
                    match self.chosen.get(known - 1) {
                        Some(was) if *was != value => {
                            return Err(format!(
                                "host {h} calls {value:?} chosen in {instance:?}, which was {was:?}"
                            ));
                        }
                        Some(_) => {}
                        None if self.chosen.len() + 1 == known => self.chosen.push(value),
                        None => return Err(format!("{instance:?} before the one below it")),
                    }
                }
                if instance < host.floor {
                    return Err(format!(
                        "host {h} finds {instance:?}, {:?} was chosen before",
                        host.floor
                    ));
                }
                if host.proposals > 0 {
                    host.proposals -= 1;
                    let mine = ValueId {
                        hash: (h as u128) << 8 | u128::from(host.proposals),
                        len: 1,
                    };
                    machine.propose((instance, value), mine);
                } else {
                    host.looking = false;
                }
            }
            Some(Outcome::Preempted | Outcome::NoMajority) => host.looking = false,
            Some(bad @ (Outcome::SlotTaken | Outcome::Contradiction)) => {
                return Err(format!("host {h}: {bad:?}"));
            }
        }
        while let Some(action) = machine.poll_action() {
            match action {
                Action::Fetch { .. } => host.fetch = Some(action),
                Action::Write { disk, .. } | Action::Read { disk } => {
                    assert!(host.flights[disk].is_none(), "two actions on one disk");
                    host.flights[disk] = Some(Flight {
                        action,
                        partial: Vec::new(),
                    });
                }
            }
        }
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// How far an exploration came.
#[derive(Debug)]
struct Explored {
    #[expect(dead_code, reason = "printed")]
    states: usize,
    /// Every state within the bounds was seen.
    whole: bool,
    /// The longest history of chosen values, to see that something happened at all.
    chosen: usize,
}

/// Breadth first, so that what is found is found by the shortest way.
fn explore(bounds: Bounds, states_max: usize) -> Result<Explored, String> {
    let first = State::new(&bounds);
    let mut seen = HashSet::from([first.fingerprint()]);
    let mut open = VecDeque::from([first]);
    let mut chosen = 0;
    while let Some(state) = open.pop_front() {
        chosen = chosen.max(state.chosen.len());
        for event in state.events(&bounds) {
            let next = state.after(event, &bounds)?;
            if seen.insert(next.fingerprint()) {
                if seen.len() >= states_max {
                    return Ok(Explored {
                        states: seen.len(),
                        whole: false,
                        chosen,
                    });
                }
                open.push_back(next);
            }
        }
    }
    Ok(Explored {
        states: seen.len(),
        whole: true,
        chosen,
    })
}

/// Random histories to their ends, for cases too wide to explore.
fn walk(bounds: Bounds, walks: u64) -> Result<usize, String> {
    let mut chosen = 0;
    for seed in 0..walks {
        // SplitMix64 (Steele, Lea, Flood 2014).
        let mut counter = seed << 32;
        let mut draw = |below: usize| {
            counter = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = counter;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            usize::try_from((z ^ (z >> 31)) % below as u64).unwrap()
        };
        let mut state = State::new(&bounds);
        for _ in 0..400 {
            let events = state.events(&bounds);
            if events.is_empty() {
                break;
            }
            let mut event = events[draw(events.len())];
            // Faults are as many as steps to choose from, and would all come at once.
            if matches!(event, Event::Crash(_) | Event::Lose(_) | Event::Fail(..)) && draw(8) > 0 {
                event = events[draw(events.len())];
            }
            state = state
                .after(event, &bounds)
                .map_err(|e| format!("walk {seed}: {e}"))?;
        }
        chosen = chosen.max(state.chosen.len());
    }
    Ok(chosen)
}

/// States a case explores in `cargo test`; the wider ones do not end within it.
const STATES: usize = 60_000;

fn states_max() -> usize {
    std::env::var("POLLUX_MODEL_STEPS")
        .ok()
        .map_or(STATES, |n| {
            n.parse().expect("POLLUX_MODEL_STEPS is a number")
        })
}

fn walks_max() -> u64 {
    (states_max() / 30) as u64
}

#[test]
fn two_hosts_on_one_disk_agree_in_every_order_of_their_actions() {
    let explored = explore(Bounds::of(2, 1), usize::MAX).unwrap();
    println!("{explored:?}");
    assert!(explored.whole && explored.chosen == 2, "{explored:?}");
}

#[test]
fn two_hosts_on_one_disk_agree_with_records_read_one_by_one() {
    let bounds = Bounds {
        split: true,
        ..Bounds::of(2, 1)
    };
    let explored = explore(bounds, usize::MAX).unwrap();
    println!("{explored:?}");
    assert!(explored.whole && explored.chosen == 2, "{explored:?}");
}

#[test]
fn two_hosts_agree_when_one_crashes_between_any_two_actions_and_comes_back() {
    let bounds = Bounds {
        crashes: 1,
        ..Bounds::of(2, 1)
    };
    let explored = explore(bounds, states_max() * 4).unwrap();
    println!("{explored:?}");
    assert!(explored.chosen >= 1, "{explored:?}");
}

#[test]
fn hosts_on_three_disks_agree_with_crashes_errors_and_a_lost_disk() {
    let bounds = Bounds {
        crashes: 1,
        errors: 1,
        lost: 1,
        ..Bounds::of(2, 3)
    };
    let explored = explore(bounds, states_max()).unwrap();
    println!("{explored:?}");
    let deep = Bounds {
        proposals: 2,
        looks: 6,
        ..bounds
    };
    let chosen = walk(deep, walks_max()).unwrap();
    assert!(chosen >= 2, "{chosen}");
    let three = Bounds { hosts: 3, ..deep };
    let chosen = walk(three, walks_max()).unwrap();
    assert!(chosen >= 3, "{chosen}");
}

#[test]
fn three_hosts_on_one_disk_agree_as_far_as_is_explored() {
    let explored = explore(Bounds::of(3, 1), states_max()).unwrap();
    println!("{explored:?}");
    let deep = Bounds {
        proposals: 2,
        looks: 6,
        crashes: 2,
        split: true,
        ..Bounds::of(3, 1)
    };
    assert!(walk(deep, walks_max()).unwrap() >= 3);
}

/// What leaving a rule out does, found by exploring or by walking.
fn found(bounds: Bounds) -> Option<String> {
    explore(bounds, STATES)
        .and_then(|_| walk(bounds, 20_000))
        .err()
}

#[test]
fn a_phase_1_that_does_not_read_after_writing_is_found() {
    let bounds = Bounds {
        sabotage: Sabotage::NoReadInPhase1,
        ..Bounds::of(2, 1)
    };
    assert!(found(bounds).is_some_and(|e| e.contains("chosen")));
}

#[test]
fn a_phase_2_that_does_not_read_after_writing_is_found() {
    let bounds = Bounds {
        sabotage: Sabotage::NoReadInPhase2,
        ..Bounds::of(2, 1)
    };
    assert!(found(bounds).is_some_and(|e| e.contains("chosen")));
}

#[test]
fn a_proposer_that_ignores_what_was_proposed_is_found() {
    let bounds = Bounds {
        sabotage: Sabotage::OwnValueAlways,
        looks: 2,
        ..Bounds::of(2, 1)
    };
    assert!(found(bounds).is_some_and(|e| e.contains("chosen")));
}

#[test]
fn a_reader_that_looks_once_is_found() {
    let bounds = Bounds {
        sabotage: Sabotage::OneLook,
        split: true,
        ..Bounds::of(3, 1)
    };
    assert!(found(bounds).is_some_and(|e| e.contains("chosen")));
}

#[test]
fn a_restart_that_forgets_its_ballots_is_found() {
    let bounds = Bounds {
        forgets: true,
        crashes: 1,
        looks: 3,
        ..Bounds::of(2, 1)
    };
    assert!(found(bounds).is_some());
}
