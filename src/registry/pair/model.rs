//! Model check of [`super::core`]: every order of messages, losses of the session, calls, crashes
//! between any two durable steps, restarts, power confirmed off and farewells, up to a bound.
//!
//! What is checked in every state, for one key: all hosts that would answer a read give the same
//! answer; it is never older than one that was, or could have been, given before; a won change
//! has its version to itself for ever; one that was called not done is never seen; a host that is
//! alone is the only one that serves; no session is refused. From the states where something
//! ended, the two come together again once nothing fails any more. The rules are shown to be
//! needed by leaving each out.
//!
//! A crash inside an input's outputs is explored before each `Store`; one between two sends is
//! the same as one after both with the later message lost, which is explored anyway.
//!
//! `POLLUX_MODEL_STEPS` raises the bound: the number of states explored per case.

use super::super::Versioned;
use super::copy::{Epoch, OwnCopy, Side, Standing};
use super::core::{Answer, CallId, Core, Input, OrderId, Output, Sabotage, Select, SessionId};
use super::message::Message;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

const KEY: &str = "k";

/// What one exploration may do.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Changes that each host's clients ask for.
    changes: [u8; 2],
    sessions: u8,
    /// Sessions that a side loses.
    losses: u8,
    crashes: u8,
    /// Orders to switch the partner off.
    orders: u8,
    farewells: u8,
    /// Both begin without a copy; otherwise paired, after a common crash.
    new: bool,
    sabotage: Sabotage,
}

impl Bounds {
    const QUIET: Self = Self {
        changes: [1, 1],
        sessions: 1,
        losses: 0,
        crashes: 0,
        orders: 0,
        farewells: 0,
        new: false,
        sabotage: Sabotage::None,
    };
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Host {
    /// `None`: it has no power, or its daemon ended.
    core: Option<Core>,
    durable: OwnCopy,
    life: u64,
    /// The session that it is in, and the one that came up and it has not taken up yet.
    session: Option<u64>,
    pending: Option<u64>,
    /// On their way to it.
    wire: VecDeque<(u64, Message)>,
    /// Its order under way, and what came of it.
    order: Option<OrderId>,
    fenced: Option<(OrderId, bool)>,
    /// The client's change under way: its value, and the floor when it was asked for.
    call: Option<(u8, u64)>,
    changes: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    hosts: [Host; 2],
    left: [u8; 5],
    opened: u64,
    asked: u8,
    /// The newest version that anybody was, or could have been, told.
    floor: u64,
    /// What each version was seen to be.
    values: BTreeMap<u64, u8>,
    not_done: BTreeSet<u8>,
}

const SESSIONS: usize = 0;
const LOSSES: usize = 1;
const CRASHES: usize = 2;
const ORDERS: usize = 3;
const FAREWELLS: usize = 4;

/// One thing that can happen; `cut`: the host crashes before its n-th durable step of it.
#[derive(Clone, Copy, Debug)]
enum Event {
    Connect,
    Step(usize, What, Option<u8>),
    Crash(usize),
    Start(usize),
    /// The order of this host is carried out, or fails.
    Shoot(usize, bool),
}

/// What a host is told.
#[derive(Clone, Copy, Debug)]
enum What {
    Up,
    Lose,
    Hear,
    HearOld,
    Change,
    GiveUp,
    Silent,
    Fenced,
    Leave,
}

const SIDES: [Side; 2] = [Side::Lower, Side::Higher];

fn key() -> Select {
    Select::Key(KEY.to_owned())
}

impl State {
    fn new(bounds: &Bounds) -> Self {
        let host = |h: usize| {
            let mut copy = OwnCopy::new();
            if !bounds.new {
                (copy.standing, copy.epoch) = (Standing::Paired, Epoch(1));
            }
            Host {
                core: Some(Core::new(SIDES[h], 1, copy.clone()).sabotaged(bounds.sabotage)),
                durable: copy,
                life: 1,
                session: None,
                pending: None,
                wire: VecDeque::new(),
                order: None,
                fenced: None,
                call: None,
                changes: bounds.changes[h],
            }
        };
        Self {
            hosts: [host(0), host(1)],
            left: [
                bounds.sessions,
                bounds.losses,
                bounds.crashes,
                bounds.orders,
                bounds.farewells,
            ],
            opened: 0,
            asked: 0,
            floor: 0,
            values: BTreeMap::new(),
            not_done: BTreeSet::new(),
        }
    }

    fn events(&self, bounds: &Bounds) -> Vec<Event> {
        let mut events = Vec::new();
        let all_up = self.hosts.iter().all(|host| host.core.is_some());
        if all_up && self.left[SESSIONS] > 0 {
            events.push(Event::Connect);
        }
        for (h, host) in self.hosts.iter().enumerate() {
            let Some(core) = &host.core else {
                events.push(Event::Start(h));
                continue;
            };
            let mut steps = Vec::new();
            if host.pending.is_some() {
                steps.push(What::Up);
            }
            if host.session.is_some() && self.left[LOSSES] > 0 {
                steps.push(What::Lose);
            }
            if host.wire.iter().any(|(id, _)| Some(*id) == host.session) {
                steps.push(What::Hear);
            }
            if bounds.sabotage == Sabotage::OldSession
                && host.session.is_some()
                && host.wire.iter().any(|(id, _)| Some(*id) < host.session)
            {
                steps.push(What::HearOld);
            }
            if host.call.is_some() {
                steps.push(What::GiveUp);
            } else if host.changes > 0 && core.look(&key()).is_ok() {
                steps.push(What::Change);
            }
            let fences = core.is_live() || bounds.sabotage == Sabotage::StaleAlone;
            if self.left[ORDERS] > 0
                && fences
                && !core.is_linked()
                && core.order().is_none()
                && core.copy().standing == Standing::Paired
            {
                steps.push(What::Silent);
            }
            if host.fenced.is_some() {
                steps.push(What::Fenced);
            }
            if self.left[FAREWELLS] > 0 && core.is_live() {
                steps.push(What::Leave);
            }
            for what in steps {
                events.push(Event::Step(h, what, None));
                if self.left[CRASHES] > 0 {
                    events.extend((0..3).map(|cut| Event::Step(h, what, Some(cut))));
                }
            }
            if self.left[CRASHES] > 0 {
                events.push(Event::Crash(h));
            }
            if host.order.is_some() {
                events.extend([true, false].map(|done| Event::Shoot(h, done)));
            }
        }
        events
    }

    /// The state after an event; `None` if there is no such crash point.
    fn after(&self, event: Event, bounds: &Bounds) -> Result<Option<Self>, String> {
        let mut next = self.clone();
        match event {
            Event::Connect => {
                next.left[SESSIONS] -= 1;
                next.opened += 1;
                for host in &mut next.hosts {
                    host.pending = Some(next.opened);
                }
            }
            Event::Start(h) => next.start(h, bounds),
            Event::Crash(h) => {
                next.left[CRASHES] -= 1;
                next.crash(h);
            }
            Event::Shoot(h, done) => {
                let order = next.hosts[h].order.take();
                next.hosts[h].fenced = order.map(|order| (order, done));
                if done {
                    next.crash(1 - h);
                }
            }
            Event::Step(h, what, cut) => {
                let input = next.input(h, what);
                if !next.step(h, input, cut)? {
                    return Ok(None);
                }
            }
        }
        next.check()?;
        Ok(Some(next))
    }

    fn start(&mut self, h: usize, bounds: &Bounds) {
        let host = &mut self.hosts[h];
        host.life += 1;
        let core = Core::new(SIDES[h], host.life, host.durable.clone());
        host.core = Some(core.sabotaged(bounds.sabotage));
    }

    fn crash(&mut self, h: usize) {
        let host = &mut self.hosts[h];
        host.core = None;
        host.session = None;
        host.pending = None;
        host.wire.clear();
        host.order = None;
        host.fenced = None;
        host.call = None;
    }

    fn input(&mut self, h: usize, what: What) -> Input {
        let (floor, asked) = (self.floor, self.asked + 1);
        let host = &mut self.hosts[h];
        match what {
            What::Up => {
                let id = host.pending.take().unwrap();
                host.session = Some(id);
                if !matches!(host.wire.front(), Some((old, _)) if *old < id) {
                    host.wire.retain(|(of, _)| *of >= id);
                }
                Input::Up(SessionId(id))
            }
            What::Lose => {
                self.left[LOSSES] -= 1;
                let id = host.session.take().unwrap();
                Input::Down(SessionId(id))
            }
            What::Hear | What::HearOld => {
                let now = host.session;
                let at = host.wire.iter().position(|(id, _)| match what {
                    What::Hear => Some(*id) == now,
                    _ => Some(*id) < now,
                });
                let (id, message) = host.wire.remove(at.unwrap()).unwrap();
                Input::Heard(SessionId(id), message)
            }
            What::Change => {
                host.changes -= 1;
                host.call = Some((asked, floor));
                self.asked = asked;
                let found = host.core.as_ref().unwrap().look(&key()).unwrap();
                Input::Change {
                    call: CallId(asked.into()),
                    key: KEY.to_owned(),
                    expected: found.first().map(|(_, entry)| entry.version),
                    value: vec![asked],
                }
            }
            What::GiveUp => Input::GiveUp(CallId(host.call.unwrap().0.into())),
            What::Silent => {
                self.left[ORDERS] -= 1;
                Input::Silent
            }
            What::Fenced => {
                let (order, confirmed) = host.fenced.take().unwrap();
                Input::Fenced { order, confirmed }
            }
            What::Leave => {
                self.left[FAREWELLS] -= 1;
                Input::Leave
            }
        }
    }

    /// Whether there was such a crash point.
    fn step(&mut self, h: usize, input: Input, cut: Option<u8>) -> Result<bool, String> {
        let Some(core) = &mut self.hosts[h].core else {
            return Ok(false);
        };
        let outputs = core.handle(input);
        let mut stores = 0;
        for output in outputs {
            match output {
                Output::Store(copy) => {
                    if cut == Some(stores) {
                        self.left[CRASHES] -= 1;
                        self.crash(h);
                        return Ok(true);
                    }
                    stores += 1;
                    self.hosts[h].durable = copy;
                }
                Output::Send(id, message) => {
                    let other = &mut self.hosts[1 - h];
                    let listens = other.pending == Some(id.0) || other.session == Some(id.0);
                    if other.core.is_some() && listens {
                        other.wire.push_back((id.0, message));
                    }
                }
                Output::Answer(call, answer) => self.answered(h, call, answer)?,
                Output::Fence(order) => self.hosts[h].order = Some(order),
                Output::HangAll => {
                    self.hosts[h].session = None;
                    self.hosts[h].pending = None;
                }
                Output::Hang(_, fault) => return Err(format!("host {h}: {fault}")),
            }
        }
        Ok(cut.is_none())
    }

    fn answered(&mut self, h: usize, call: CallId, answer: Answer) -> Result<(), String> {
        let (value, floor) = self.hosts[h].call.take().ok_or("an answer to nobody")?;
        assert_eq!(CallId(value.into()), call);
        match answer {
            Answer::Won { version } => self.see(version, value)?,
            Answer::Lost(found) => {
                let version = found.as_ref().map_or(0, |entry| entry.version);
                if version < floor {
                    return Err(format!(
                        "host {h} lost to version {version}, {floor} was known"
                    ));
                }
                if let Some(Versioned { version, value }) = found {
                    self.see(version, value[0])?;
                }
                self.never(value)?;
            }
            Answer::NotDone(_) => self.never(value)?,
            Answer::Unknown(_) => {}
            Answer::Found(_) => return Err("a change was read".into()),
        }
        Ok(())
    }

    fn never(&mut self, value: u8) -> Result<(), String> {
        self.not_done.insert(value);
        match self.values.values().any(|seen| *seen == value) {
            true => Err(format!("change {value} is called not done, and was seen")),
            false => Ok(()),
        }
    }

    /// Somebody is, or could be, told this.
    fn see(&mut self, version: u64, value: u8) -> Result<(), String> {
        self.floor = self.floor.max(version);
        let was = *self.values.entry(version).or_insert(value);
        if was != value {
            return Err(format!("version {version} was {was}, and is {value} now"));
        }
        if self.not_done.contains(&value) {
            return Err(format!("change {value} was called not done, and is seen"));
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        let floor = self.floor;
        let mut told = Vec::new();
        for (h, host) in self.hosts.iter().enumerate() {
            let Some(Ok(found)) = host.core.as_ref().map(|core| core.look(&key())) else {
                continue;
            };
            let entry = found.into_iter().next().map(|(_, entry)| entry);
            let version = entry.as_ref().map_or(0, |entry| entry.version);
            if version < floor {
                return Err(format!(
                    "host {h} reads version {version}, {floor} was known"
                ));
            }
            told.push(entry);
        }
        if let [a, b] = &told[..]
            && a != b
        {
            return Err(format!("one host reads {a:?}, the other {b:?}"));
        }
        for entry in told.into_iter().flatten() {
            self.see(entry.version, entry.value[0])?;
        }
        let live = |host: &Host| host.core.as_ref().is_some_and(Core::is_live);
        let alone = |host: &Host| live(host) && host.durable.standing == Standing::Alone;
        if self.hosts.iter().any(alone) && self.hosts.iter().all(live) {
            return Err("one host is alone beside another that serves".into());
        }
        Ok(())
    }

    /// Once nothing fails any more, the two come together.
    fn converges(&self, bounds: &Bounds) -> Result<(), String> {
        let mut state = self.clone();
        for h in 0..2 {
            let left = |core: &Core| core.look(&key()) == Err(super::core::Why::Left);
            if state.hosts[h].core.as_ref().is_none_or(left) {
                state.crash(h);
                state.start(h, bounds);
            }
            state.hosts[h].order = None;
            state.hosts[h].fenced = None;
        }
        state.left = [1, 0, 0, 0, 0];
        state = state.after(Event::Connect, bounds)?.ok_or("no session")?;
        while let Some(event) = state
            .events(bounds)
            .into_iter()
            .find(|event| matches!(event, Event::Step(_, What::Up | What::Hear, None)))
        {
            state = state.after(event, bounds)?.ok_or("no such step")?;
        }
        let cores = state
            .hosts
            .each_ref()
            .map(|host| host.core.clone().unwrap());
        let same = cores[0].copy().entries == cores[1].copy().entries;
        let linked = cores
            .iter()
            .all(|core| core.is_linked() && core.is_live() && core.copy().prepared.is_none());
        match same && linked {
            true => Ok(()),
            false => Err(format!("they do not come together: {cores:#?}")),
        }
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// How far an exploration came.
#[derive(Debug, Default)]
struct Explored {
    states: usize,
    /// Every state within the bounds was seen.
    whole: bool,
    /// The most changes that counted, to see that something happened at all.
    won: usize,
    /// States in which a host was alone.
    alone: usize,
}

/// Breadth first, so that what is found is found by the shortest way.
fn explore(bounds: Bounds, states_max: usize) -> Result<Explored, String> {
    let first = State::new(&bounds);
    let mut seen = HashSet::from([first.fingerprint()]);
    let mut open = VecDeque::from([(first, Vec::new())]);
    let mut explored = Explored::default();
    while let Some((state, trail)) = open.pop_front() {
        explored.won = explored.won.max(state.values.len());
        let alone = |host: &Host| host.durable.standing == Standing::Alone;
        explored.alone += usize::from(state.hosts.iter().any(alone));
        if state.left[SESSIONS] == 0 {
            state
                .converges(&bounds)
                .map_err(|e| format!("{e}\nafter {trail:?}"))?;
        }
        for event in state.events(&bounds) {
            let trail: Vec<Event> = trail.iter().copied().chain([event]).collect();
            let next = state
                .after(event, &bounds)
                .map_err(|e| format!("{e}\nby {trail:?}"))?;
            let Some(next) = next else {
                continue;
            };
            if seen.insert(next.fingerprint()) {
                if seen.len() >= states_max {
                    explored.states = seen.len();
                    return Ok(explored);
                }
                open.push_back((next, trail));
            }
        }
    }
    explored.states = seen.len();
    explored.whole = true;
    Ok(explored)
}

/// Random histories to their ends, for cases too wide to explore.
fn walk(bounds: Bounds, walks: u64) -> Result<Explored, String> {
    let mut explored = Explored::default();
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
        for _ in 0..300 {
            let events = state.events(&bounds);
            if events.is_empty() {
                break;
            }
            let mut event = events[draw(events.len())];
            // Faults are as many as steps to choose from, and would all come at once.
            let fault = |event: &Event| {
                matches!(
                    event,
                    Event::Crash(_)
                        | Event::Connect
                        | Event::Step(_, What::Lose | What::Leave | What::GiveUp, _)
                        | Event::Step(_, _, Some(_))
                )
            };
            for _ in 0..2 {
                if fault(&event) && draw(4) > 0 {
                    event = events[draw(events.len())];
                }
            }
            let next = state
                .after(event, &bounds)
                .map_err(|e| format!("walk {seed}: {e}\nat {event:?}"))?;
            let Some(next) = next else {
                continue;
            };
            state = next;
            explored.states += 1;
        }
        state
            .converges(&bounds)
            .map_err(|e| format!("walk {seed}: {e}"))?;
        explored.won = explored.won.max(state.values.len());
        let alone = |host: &Host| host.durable.standing == Standing::Alone;
        explored.alone += usize::from(state.hosts.iter().any(alone));
    }
    Ok(explored)
}

/// States a case explores in `cargo test`; the wider ones do not end within it.
const STATES: usize = 150_000;

fn states_max() -> usize {
    std::env::var("POLLUX_MODEL_STEPS")
        .ok()
        .map_or(STATES, |n| {
            n.parse().expect("POLLUX_MODEL_STEPS is a number")
        })
}

#[test]
fn two_hosts_in_sync_agree_in_every_order_of_their_messages() {
    let bounds = Bounds {
        changes: [2, 2],
        ..Bounds::QUIET
    };
    let explored = explore(bounds, usize::MAX).unwrap();
    println!("{explored:?}");
    assert!(explored.whole && explored.won == 4, "{explored:?}");
}

#[test]
fn lost_sessions_leave_no_two_answers() {
    let bounds = Bounds {
        sessions: 2,
        losses: 2,
        ..Bounds::QUIET
    };
    let explored = explore(bounds, states_max()).unwrap();
    println!("{explored:?}");
    assert!(explored.won >= 2, "{explored:?}");
}

#[test]
fn a_pair_forms_and_outlives_a_crash_at_every_step() {
    let bounds = Bounds {
        sessions: 2,
        crashes: 2,
        new: true,
        ..Bounds::QUIET
    };
    let explored = explore(bounds, states_max()).unwrap();
    println!("{explored:?}");
    assert!(explored.won >= 2, "{explored:?}");
}

#[test]
fn a_host_goes_on_alone_and_takes_its_partner_back_with_a_crash_at_every_step() {
    let bounds = Bounds {
        sessions: 2,
        losses: 1,
        crashes: 1,
        orders: 1,
        ..Bounds::QUIET
    };
    let explored = explore(bounds, states_max()).unwrap();
    println!("{explored:?}");
    assert!(explored.won >= 2 && explored.alone > 0, "{explored:?}");
}

#[test]
fn a_farewell_is_as_good_as_power_off() {
    let bounds = Bounds {
        sessions: 2,
        losses: 1,
        crashes: 1,
        farewells: 1,
        ..Bounds::QUIET
    };
    let explored = explore(bounds, states_max()).unwrap();
    println!("{explored:?}");
    assert!(explored.won >= 2 && explored.alone > 0, "{explored:?}");
}

/// All of it, further than can be explored.
const WIDE: Bounds = Bounds {
    changes: [4, 4],
    sessions: 6,
    losses: 5,
    crashes: 4,
    orders: 4,
    farewells: 2,
    new: false,
    sabotage: Sabotage::None,
};

#[test]
fn long_histories_with_everything_agree() {
    let walks = (states_max() / 20) as u64;
    for new in [false, true] {
        let explored = walk(Bounds { new, ..WIDE }, walks).unwrap();
        println!("{explored:?}");
        assert!(explored.won >= 5 && explored.alone > 0, "{explored:?}");
    }
}

/// What leaving a rule out does, found by exploring or by walking.
fn found(sabotage: Sabotage, bounds: Bounds) -> String {
    let bounds = Bounds { sabotage, ..bounds };
    let result = explore(bounds, STATES)
        .and_then(|_| walk(bounds, 5_000))
        .and_then(|_| walk(Bounds { sabotage, ..WIDE }, 20_000));
    let found = result.expect_err("a broken rule is found");
    println!("{sabotage:?}: {found}");
    found
}

/// One change each, one lost session, one crash, one order.
const ALONE: Bounds = Bounds {
    sessions: 2,
    losses: 1,
    crashes: 1,
    orders: 1,
    ..Bounds::QUIET
};

#[test]
fn going_alone_without_a_confirmation_is_found() {
    found(Sabotage::AloneUnconfirmed, ALONE);
}

#[test]
fn reading_what_is_only_prepared_is_found() {
    found(Sabotage::ReadPrepared, ALONE);
}

#[test]
fn a_stale_copy_that_goes_alone_is_found() {
    found(Sabotage::StaleAlone, ALONE);
}

#[test]
fn serving_before_being_in_sync_is_found() {
    found(Sabotage::LiveAtStart, ALONE);
}

#[test]
fn committing_before_the_partner_holds_it_is_found() {
    found(Sabotage::CommitEarly, ALONE);
}

#[test]
fn serving_a_copy_before_it_counts_is_found() {
    found(Sabotage::LiveWhenHeld, ALONE);
}

#[test]
fn a_prepared_change_that_nobody_adopts_is_found() {
    found(Sabotage::NoAdoption, ALONE);
}

#[test]
fn going_alone_without_what_is_prepared_is_found() {
    found(Sabotage::AloneForgets, ALONE);
}

#[test]
fn an_order_that_outlives_a_session_is_found() {
    found(Sabotage::OrderOutlives, ALONE);
}

#[test]
fn changing_while_the_copy_is_on_its_way_is_found() {
    found(Sabotage::ChangesWhileCopying, ALONE);
}

#[test]
fn a_pair_that_takes_an_unfinished_beginning_for_a_lost_copy_is_found() {
    let bounds = Bounds { new: true, ..ALONE };
    found(Sabotage::JoiningCounts, bounds);
}

#[test]
fn messages_of_an_ended_session_that_are_taken_are_found() {
    found(Sabotage::OldSession, ALONE);
}
