//! The statefile in virtual time: the very Disk Paxos machine of the registry, over disks that are
//! late, hang, fail for one host, or lose the end of a write with their writer's power.
//!
//! One document, the pool state; its version is the number of times it was written. A disk holds
//! one record per host, as the machine reads and writes it; what a value's identity stands for
//! is kept beside, for its bytes are on the disk before the record that names them.

use crate::ha::machine::{Input, WriteOutcome};
use crate::ha::state::PoolState;
use crate::registry::Versioned;
use crate::registry::statefile::paxos::{
    Action, Failed, HostSlot, Incarnation, Instance, Machine, Outcome, Pass, Record, ValueId,
    recover,
};
use crate::sim::Rng;
use std::collections::{BTreeMap, VecDeque};

/// A registry call takes at most this long, as the real one.
pub(super) const CALL_MS: u64 = 1000;
/// One disk action, fastest and slowest, when all is well.
const ACTION_MS: (u64, u64) = (1, 12);

/// The pool's document as it was written, and on top of what.
#[derive(Clone, Debug)]
struct Value {
    /// Who wrote it, in which life.
    by: (usize, u64),
    version: u64,
    state: PoolState,
    parent: Option<ValueId>,
}

/// All disks.
#[derive(Debug)]
pub(super) struct Disks {
    records: Vec<Pass>,
    values: BTreeMap<ValueId, Value>,
    next_value: u128,
}

/// What a call is to do.
#[derive(Clone, Debug)]
enum Call {
    Read,
    Write {
        expected: Option<u64>,
        state: PoolState,
        /// Values proposed for it: any of them may be chosen yet.
        proposed: Vec<ValueId>,
    },
}

/// One host's registry.
#[derive(Debug)]
pub(super) struct Client {
    me: HostSlot,
    life: u64,
    machine: Machine,
    call: Option<(Call, u64)>,
    /// Calls that wait for their turn: a host does one at a time.
    waiting: VecDeque<Call>,
    /// Not before then the next round, after another host was ahead.
    pause_until: u64,
    /// Number of each disk's action under way; one that was given up may end late.
    under_way: Vec<Option<(u64, Option<Record>)>>,
    actions: u64,
}

/// A disk action to end later.
#[derive(Clone, Copy, Debug)]
pub(super) struct Started {
    pub(super) disk: usize,
    pub(super) action: u64,
    /// `None`: it hangs for as long as the disk is away, and then fails.
    pub(super) after_ms: Option<u64>,
}

impl Disks {
    /// Freshly formatted.
    pub(super) fn new(disks: usize, hosts: usize) -> Self {
        Self {
            records: vec![vec![Record::FIRST; hosts]; disks],
            values: BTreeMap::new(),
            next_value: 1,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn value(&mut self, value: Value) -> ValueId {
        let id = ValueId {
            hash: self.next_value,
            len: 1,
        };
        self.next_value += 1;
        self.values.insert(id, value);
        id
    }

    /// Whether `id` is in the history that `tip` ends.
    fn is_in_history(&self, id: ValueId, tip: Option<ValueId>) -> bool {
        let mut at = tip;
        while let Some(here) = at {
            if here == id {
                return true;
            }
            at = self.values.get(&here).and_then(|value| value.parent);
        }
        false
    }
}

impl Client {
    /// A host that starts: it reads its own records from the disks it reaches. `None` if those
    /// are too few.
    pub(super) fn open(disks: &Disks, me: usize, life: u64, reach: &[bool]) -> Option<Self> {
        let passes: Vec<Option<Pass>> = disks
            .records
            .iter()
            .zip(reach)
            .map(|(pass, reach)| reach.then(|| pass.clone()))
            .collect();
        let slot = HostSlot(u16::try_from(me).unwrap_or(u16::MAX));
        let own = recover(slot, &passes)?;
        Some(Self {
            me: slot,
            life,
            machine: Machine::new(slot, disks.len(), Incarnation(life), own),
            call: None,
            waiting: VecDeque::new(),
            pause_until: 0,
            under_way: vec![None; disks.len()],
            actions: 0,
        })
    }

    /// Read, once the calls before are done.
    pub(super) fn read(&mut self, now: u64) {
        self.waiting.push_back(Call::Read);
        self.next_call(now);
    }

    /// Write, once the calls before are done.
    pub(super) fn write(&mut self, now: u64, expected: Option<u64>, state: PoolState) {
        self.waiting.push_back(Call::Write {
            expected,
            state,
            proposed: Vec::new(),
        });
        self.next_call(now);
    }

    fn next_call(&mut self, now: u64) {
        if self.call.is_none()
            && let Some(call) = self.waiting.pop_front()
        {
            self.call = Some((call, now + CALL_MS));
            self.pause_until = 0;
            self.machine.look();
        }
    }

    /// What the machine wants done, with how long each takes.
    pub(super) fn start(&mut self, reach: &[bool], rng: &mut Rng) -> Vec<Started> {
        let mut started = Vec::new();
        while let Some(action) = self.machine.poll_action() {
            let (disk, record) = match action {
                Action::Read { disk } => (disk, None),
                Action::Write { disk, record } => (disk, Some(record)),
                // Values are known as soon as a record names them.
                Action::Fetch { .. } => {
                    self.machine.handle_fetched(Ok(()));
                    continue;
                }
            };
            self.actions += 1;
            self.under_way[disk] = Some((self.actions, record));
            // A disk that is away answers with errors, or not at all.
            let hangs = !reach[disk] && rng.permille(500);
            started.push(Started {
                disk,
                action: self.actions,
                after_ms: (!hangs).then(|| rng.between(ACTION_MS.0, ACTION_MS.1)),
            });
        }
        started
    }

    /// A disk action ends, well or not.
    pub(super) fn end(&mut self, disks: &mut Disks, disk: usize, action: u64, reach: bool) {
        let Some((_, record)) = self.under_way[disk].take_if(|(number, _)| *number == action)
        else {
            return;
        };
        let slot = usize::from(self.me.0);
        match record {
            Some(record) => {
                if reach {
                    disks.records[disk][slot] = record;
                }
                let result = if reach { Ok(()) } else { Err(Failed) };
                self.machine.handle_written(disk, result);
            }
            None => {
                let result = if reach {
                    Ok(disks.records[disk].clone())
                } else {
                    Err(Failed)
                };
                self.machine.handle_read(disk, result);
            }
        }
    }

    /// The host loses power: what is being written is on the disk or not.
    pub(super) fn lose_power(&mut self, disks: &mut Disks, reach: &[bool], rng: &mut Rng) {
        let slot = usize::from(self.me.0);
        for (disk, action) in self.under_way.iter_mut().enumerate() {
            if let Some((_, Some(record))) = action.take()
                && reach[disk]
                && rng.permille(500)
            {
                disks.records[disk][slot] = record;
            }
        }
    }

    /// When it wants to be looked at again without a disk's word.
    pub(super) fn wakes_at(&self) -> Option<u64> {
        let (_, deadline) = self.call.as_ref()?;
        Some(if self.pause_until > 0 {
            self.pause_until.min(*deadline)
        } else {
            *deadline
        })
    }

    /// Go on; the answer if the call has ended. The next one begins then.
    pub(super) fn go_on(&mut self, disks: &mut Disks, now: u64, rng: &mut Rng) -> Option<Input> {
        let answer = self.step(disks, now, rng);
        if answer.is_some() {
            self.next_call(now);
        }
        answer
    }

    fn step(&mut self, disks: &mut Disks, now: u64, rng: &mut Rng) -> Option<Input> {
        let (_, deadline) = self.call.as_ref()?;
        if now >= *deadline {
            self.machine.abandon();
            self.pause_until = 0;
            return self.give_up("the disks did not answer in time");
        }
        if self.pause_until > 0 {
            if now < self.pause_until {
                return None;
            }
            self.pause_until = 0;
            self.machine.look();
            return None;
        }
        match self.machine.poll_outcome()? {
            Outcome::Current {
                instance, value, ..
            } => self.current(disks, instance, value),
            Outcome::Preempted => {
                self.pause_until = now + rng.between(1, 40);
                None
            }
            Outcome::NoMajority => self.give_up("fewer than a majority of the disks answer"),
            Outcome::SlotTaken => self.give_up("another process writes to this host's slot"),
            Outcome::Contradiction => self.give_up("two records contradict each other"),
        }
    }

    /// The newest chosen document is known.
    fn current(
        &mut self,
        disks: &mut Disks,
        instance: Instance,
        value: Option<ValueId>,
    ) -> Option<Input> {
        let found = value.and_then(|id| disks.values.get(&id));
        let version = found.map(|value| value.version);
        let (call, _) = self.call.as_mut()?;
        match call {
            Call::Read => {
                let found = found.map(|value| Versioned {
                    version: value.version,
                    value: value.state.clone(),
                });
                self.call = None;
                Some(Input::Read(Ok(found)))
            }
            Call::Write {
                expected,
                state,
                proposed,
            } => {
                if proposed.iter().any(|id| disks.is_in_history(*id, value)) {
                    let version = expected.map_or(1, |version| version + 1);
                    self.call = None;
                    return Some(Input::Written(WriteOutcome::Won { version }));
                }
                if version != *expected {
                    self.call = None;
                    return Some(Input::Written(WriteOutcome::Lost));
                }
                let next = Value {
                    by: (usize::from(self.me.0), self.life),
                    version: expected.map_or(1, |version| version + 1),
                    state: state.clone(),
                    parent: value,
                };
                let id = disks.value(next);
                proposed.push(id);
                self.machine.propose((instance, value), id);
                None
            }
        }
    }

    fn give_up(&mut self, why: &str) -> Option<Input> {
        let (call, _) = self.call.take()?;
        Some(match call {
            Call::Read => Input::Read(Err(why.to_owned())),
            Call::Write { proposed, .. } if proposed.is_empty() => {
                Input::Written(WriteOutcome::Lost)
            }
            Call::Write { .. } => Input::Written(WriteOutcome::Unknown),
        })
    }
}

impl Disks {
    /// The newest chosen document, if it is newer than `version`: who proposed it and what it
    /// says. What the machines conclude, seen by somebody who sees all disks at once.
    pub(super) fn newly_chosen(&self, version: u64) -> Option<((usize, u64), u64, PoolState)> {
        let majority = self.records.len() / 2 + 1;
        let hosts = self.records.first().map_or(0, Vec::len);
        let mut newest: Option<((usize, u64), &Value)> = None;
        for host in 0..hosts {
            for record in self.records.iter().filter_map(|pass| pass.get(host)) {
                let Some(value) = record.proposed.and_then(|id| self.values.get(&id)) else {
                    continue;
                };
                if value.version <= version {
                    continue;
                }
                let accepted = self.records.iter().filter(|pass| {
                    pass.get(host).is_some_and(|other| {
                        other.proposed == record.proposed
                            && other.instance == record.instance
                            && other.bal == record.bal
                            && other.bal == other.mbal
                            && !pass.iter().any(|above| {
                                above.instance == other.instance && above.mbal > other.bal
                            })
                    })
                });
                if accepted.count() >= majority
                    && newest.is_none_or(|(_, known)| value.version > known.version)
                {
                    newest = Some((value.by, value));
                }
            }
        }
        newest.map(|(by, value)| (by, value.version, value.state.clone()))
    }
}
