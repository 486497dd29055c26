//! Breadth first through all states, so that what is found is found by the shortest way; and
//! from each state the one way on without faults, to see that it ends well.

use super::check::{Violation, ensure};
use super::event::{Event, Step};
use super::shell::Stop;
use super::world::{Budget, Host, NAMES, Role, TICK, World, name};
use crate::mirror::{PrimaryState, Versioned, VmRecord};
use crate::pool::Generation;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::hash::{BuildHasherDefault, DefaultHasher};

/// Maps by fingerprint; their order is never looked at.
type Hashed = BuildHasherDefault<DefaultHasher>;

/// Steps without a fault until a pair has settled or never will.
const SETTLING_STEPS_MAX: usize = 5000;

/// How far an exploration came.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Explored {
    pub(super) states: usize,
    pub(super) steps: usize,
    /// Every state within the budget was seen.
    pub(super) whole: bool,
    /// States in which a promoted guest runs, and in which one runs solo after a mirror.
    pub(super) promoted: usize,
    pub(super) solo: usize,
    /// States of either machine that were seen, a bit for each.
    pub(super) primaries: u32,
    pub(super) standbys: u32,
    /// Longest time until one side has effect again once faults are over, ticks.
    pub(super) settled_in: u64,
}

/// A broken rule and the shortest way to it.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) violation: Violation,
    pub(super) states: usize,
    pub(super) trace: Vec<String>,
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { invariant, what } = &self.violation;
        writeln!(f, "{invariant} is violated: {what}")?;
        writeln!(
            f,
            "found after {} states; the shortest way there:",
            self.states
        )?;
        self.trace.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl World {
    /// Host `a` runs the VM, solo.
    pub(super) fn solo() -> Self {
        let record = Versioned {
            version: 1,
            value: VmRecord::started(name(0), None),
        };
        let mut world = Self {
            now: TICK,
            left: Budget::NONE,
            hosts: [Host::new(), Host::new()],
            link_down: false,
            lanes: Default::default(),
            late: Vec::new(),
            ops: Vec::new(),
            record: record.clone(),
            named: Generation(0),
            whole: Default::default(),
            released: Default::default(),
            alive_on: 0,
            spoke: false,
            log: None,
        };
        world.start_primary(0, record);
        world
    }

    /// Host `a` has mirrored the VM to `b` for a few ticks.
    pub(super) fn mirrored() -> Self {
        let mut world = Self::solo();
        world.left.protects = 1;
        world
            .take(Event {
                step: Step::Protect(0),
                stop: None,
            })
            .expect("a calm start");
        let until = world.now + crate::mirror::Micros(4 * TICK.0);
        let mut steps = Vec::new();
        while world.now < until {
            world.calm(&mut steps).expect("a calm start");
        }
        let mirrored = matches!(&world.hosts[0].role, Role::Primary(machine, _)
            if machine.status(world.now).state == PrimaryState::Mirrored);
        assert!(mirrored && world.released.1.0 > 0);
        world
    }

    /// The next step if no fault comes any more.
    fn calm(&mut self, steps: &mut Vec<Step>) -> Result<Step, Violation> {
        self.steps(steps);
        let step = steps[0];
        self.take(Event { step, stop: None })?;
        Ok(step)
    }

    fn with(mut self, budget: Budget) -> Self {
        self.left = budget;
        self
    }
}

/// Ticks until a side has effect; none if nobody can be blamed that none ever has.
type Ahead = Option<u64>;

struct Explorer {
    seen: HashSet<u64, Hashed>,
    /// How each state was first reached: from which, by what.
    came: Vec<(u32, Event)>,
    /// States without faults to come, and ticks until a side has effect.
    settled: HashMap<u64, Ahead, Hashed>,
    done: Explored,
}

/// Explore all that `budget` allows from `start`.
pub(super) fn explore(
    start: World,
    budget: Budget,
    states_max: usize,
) -> Result<Explored, Box<Found>> {
    let start = start.with(budget);
    let mut explorer = Explorer {
        seen: HashSet::default(),
        came: Vec::new(),
        settled: HashMap::default(),
        done: Explored::default(),
    };
    explorer.seen.insert(start.fingerprint());
    let mut open = VecDeque::from([(start.clone(), u32::MAX)]);
    let mut steps = Vec::new();
    while let Some((world, at)) = open.pop_front() {
        explorer.look(&world, &start, at)?;
        world.steps(&mut steps);
        for step in &steps {
            let plain = Event {
                step: *step,
                stop: None,
            };
            let actions = explorer.follow(&world, plain, &start, at, &mut open)?;
            for after in 0..actions {
                for crash in [false, true] {
                    let left = match crash {
                        true => world.left.crashes,
                        false => world.left.freezes,
                    };
                    // The step itself may be such a fault.
                    if left > 0 && world.host_of(*step).is_some() {
                        let stop = Some(Stop { after, crash });
                        let event = Event { step: *step, stop };
                        explorer.follow(&world, event, &start, at, &mut open)?;
                    }
                }
            }
        }
        if explorer.seen.len() >= states_max {
            explorer.done.states = explorer.seen.len();
            return Ok(explorer.done);
        }
    }
    explorer.done.states = explorer.seen.len();
    explorer.done.whole = true;
    Ok(explorer.done)
}

impl Explorer {
    /// The state after an event, to be looked at later if it is new.
    fn follow(
        &mut self,
        world: &World,
        event: Event,
        start: &World,
        at: u32,
        open: &mut VecDeque<(World, u32)>,
    ) -> Result<u8, Box<Found>> {
        let mut next = world.clone();
        self.done.steps += 1;
        let actions = next
            .take(event)
            .map_err(|violation| self.found(violation, start, at, Some(event)))?;
        if self.seen.insert(next.fingerprint()) {
            let index = u32::try_from(self.came.len()).expect("fewer states than memory holds");
            self.came.push((at, event));
            open.push_back((next, index));
        }
        Ok(actions)
    }

    fn look(&mut self, world: &World, start: &World, at: u32) -> Result<(), Box<Found>> {
        let ungated = world.hosts.iter().position(Host::ungated);
        for host in &world.hosts {
            match &host.role {
                Role::Idle => {}
                Role::Primary(machine, _) => {
                    self.done.primaries |= 1 << machine.status(world.now).state as u32;
                }
                Role::Standby(machine, _) => {
                    self.done.standbys |= 1 << machine.status(world.now).state as u32;
                }
            }
        }
        self.done.promoted += usize::from(ungated == Some(1));
        self.done.solo += usize::from(ungated == Some(0) && world.released.1.0 > 0);
        let mut worlds = vec![world.clone().with(Budget::NONE)];
        // A write that nobody waits for lands at last, or never.
        if world.ops.iter().any(|op| op.ticket.is_none()) {
            let mut other = worlds[0].clone();
            other.ops.retain(|op| op.ticket.is_some());
            worlds.push(other);
        }
        for world in worlds {
            match self.settle(world) {
                Ok(ahead) => self.done.settled_in = self.done.settled_in.max(ahead.unwrap_or(0)),
                Err(violation) => return Err(self.found(violation, start, at, None)),
            }
        }
        Ok(())
    }

    /// **liveness**: follow the one way on without faults until it goes round in a circle. In
    /// it one side has effect outside, or all that had the VM came to harm.
    fn settle(&mut self, mut world: World) -> Result<Ahead, Violation> {
        /// A state on the way: ticks to the next one, whether something has effect until then.
        struct Passed {
            state: u64,
            ticks: u64,
            effect: bool,
        }
        let mut way: Vec<Passed> = Vec::new();
        let mut index: HashMap<u64, usize, Hashed> = HashMap::default();
        let mut steps = Vec::new();
        let mut ahead = loop {
            let state = world.fingerprint();
            if let Some(ahead) = self.settled.get(&state) {
                break *ahead;
            }
            if let Some(first) = index.get(&state) {
                let mut circle = way[*first..].iter();
                let lives = circle.any(|passed| passed.effect);
                ensure(lives || world.is_excused(), "liveness", || {
                    format!(
                        "without any further fault neither side ever has effect again: {}",
                        world.standing()
                    )
                })?;
                // Ticks from the circle's begin to its first effect.
                let idle = way[*first..].iter().take_while(|passed| !passed.effect);
                break lives.then(|| idle.map(|passed| passed.ticks).sum());
            }
            ensure(way.len() < SETTLING_STEPS_MAX, "liveness", || {
                "the pair does not settle without faults".into()
            })?;
            index.insert(state, way.len());
            let (before, ungated) = (world.now, world.hosts.iter().any(Host::ungated));
            if world.calm(&mut steps).is_err() {
                // The exploration comes by there as well, and by a shorter way.
                return Ok(None);
            }
            way.push(Passed {
                state,
                ticks: world.now.since(before).0 / TICK.0,
                effect: ungated || world.spoke,
            });
        };
        for passed in way.iter().rev() {
            ahead = match passed.effect {
                true => Some(0),
                false => ahead.map(|ticks| ticks + passed.ticks),
            };
            self.settled.insert(passed.state, ahead);
        }
        Ok(ahead)
    }

    /// The shortest way to a violation, in words.
    fn found(
        &self,
        violation: Violation,
        start: &World,
        mut at: u32,
        last: Option<Event>,
    ) -> Box<Found> {
        let mut events: Vec<Event> = last.into_iter().collect();
        while at != u32::MAX {
            let (from, event) = self.came[at as usize];
            events.push(event);
            at = from;
        }
        events.reverse();
        let mut world = start.clone();
        let mut trace = vec![format!("at the start: {}", world.standing())];
        for event in events {
            world.tell_of(event, &mut trace);
        }
        if last.is_none() {
            trace.push("no fault comes any more:".into());
            world.left = Budget::NONE;
            let mut steps = Vec::new();
            // As far as is worth reading.
            for _ in 0..60 {
                world.steps(&mut steps);
                let step = steps[0];
                world.tell_of(Event { step, stop: None }, &mut trace);
            }
        }
        Box::new(Found {
            violation,
            states: self.seen.len(),
            trace,
        })
    }
}

impl World {
    fn tell_of(&mut self, event: Event, trace: &mut Vec<String>) {
        trace.push(format!("{:?}  {}", self.now, self.words(event)));
        self.log = Some(Vec::new());
        // The last one breaks the rule.
        let _ = self.take(event);
        trace.extend(self.log.take().unwrap_or_default());
    }

    fn standing(&self) -> String {
        let sides: Vec<String> = (0..2)
            .map(|h| {
                let host = &self.hosts[h];
                let what = match &host.role {
                    _ if !host.up => "down".to_owned(),
                    Role::Idle => "has nothing of the VM".to_owned(),
                    Role::Primary(machine, _) => {
                        format!("primary {:?}", machine.status(self.now).state)
                    }
                    Role::Standby(machine, _) => {
                        format!("standby {:?}", machine.status(self.now).state)
                    }
                };
                format!("{} {what}", NAMES[h])
            })
            .collect();
        format!("{}; {}", sides.join(", "), self.summary())
    }
}
