//! Disk Paxos (Gafni & Lamport, "Disk Paxos", Distributed Computing 16, 2003) as a state
//! machine without disks, clocks or threads: actions out, their results in.
//!
//! ```text
//!          look()                      nobody proposes in the newest instance
//!  Idle ----------> Look -------------------------------------------> Current(i - 1)
//!                    | somebody does: look again
//!                    v
//!                   Again ---- on a majority, with nobody above -----> Current(i)
//!                    | cannot tell                                       ^
//!  propose() ------> Phase 1 --- nobody proposed, nothing to propose --> | Current(i - 1)
//!                    | a value                                           |
//!                    v                                                   |
//!                   Phase 2 ---- written and nobody above ---------------+ Current(i)
//!
//!  anybody above, anywhere: Preempted          too many disks failed: NoMajority
//! ```
//!
//! The paper decides one value. Here each version of the pool's document is an instance of
//! its own, and a host has one block for all of them: a [`Record`] names the instance it
//! works on and the value *chosen* in the instance before. Whoever moves on has therefore
//! left word of what was chosen, and a host that meets a record of a later instance knows
//! that its own is decided and looks again. Records of an earlier instance count as
//! "nothing proposed".
//!
//! Two things go beyond the paper. A host that only reads may conclude that a value is
//! chosen without writing: it sees on a majority of the disks a record that proposes it
//! (`bal == mbal`), and *afterwards*, on the same disks, no record with a higher ballot. That
//! is the check which the proposer makes at the end of phase 2, by another pair of eyes: a
//! higher ballot not yet on those disks is written later, and its phase 1 then reads the
//! proposal. And a disk counts for a phase only if the host's own record is read back as it
//! was written, so a disk that loses writes is noticed and left out.
//!
//! Must never: count a disk for a phase before its own record is on it and every record on it
//! was read after that; use a ballot twice; call a value chosen that another majority could
//! miss.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub use super::record::{
    Ballot, DISKS_MAX, HOSTS_MAX, HostSlot, Incarnation, Instance, NUMBER_MAX, Pass, Place, Record,
    ValueId, majority, merge, recover,
};

/// What is to be done. One at a time for each disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Write this host's record to the disk, the values it names before it.
    Write {
        /// Index of the disk.
        disk: usize,
        /// The record.
        record: Record,
    },
    /// Read the records of all hosts.
    Read {
        /// Index of the disk.
        disk: usize,
    },
    /// Get hold of a value, from any of these places.
    Fetch {
        /// Which.
        value: ValueId,
        /// Where it was seen.
        places: Vec<Place>,
    },
}

/// The disk did not do it, or holds what cannot be trusted. Why is the caller's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Failed;

/// How a round ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The newest chosen instance, at a moment between the call and now.
    Current {
        /// Which; 0 if nothing was ever chosen.
        instance: Instance,
        /// What was chosen in it; `None` for instance 0.
        value: Option<ValueId>,
        /// Where its bytes can be read; empty if this host has them.
        places: Vec<Place>,
    },
    /// Another host is ahead. Look again, after a pause that differs from host to host.
    Preempted,
    /// Fewer than a majority of the disks answered well.
    NoMajority,
    /// Another process writes to this host's slot. Nothing is safe until it stops.
    SlotTaken,
    /// Two records name different values for one instance: a disk lies.
    Contradiction,
}

/// One disk in a phase.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Write,
    Read,
    Done(Pass),
    Failed,
}

/// One disk in a look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Looked {
    first: Option<Pass>,
    second: Option<Pass>,
    failed: bool,
}

/// The proposal with the highest ballot of the newest instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Top {
    host: HostSlot,
    bal: Ballot,
    value: ValueId,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    /// Nothing to do.
    Idle,
    /// Finding the newest instance; with `top`, whether its proposal is chosen.
    Look {
        disks: Vec<Looked>,
        at: Instance,
        top: Option<Top>,
    },
    /// Waiting for a value without which the next record cannot be written.
    Fetch {
        then: Record,
        input: Option<ValueId>,
    },
    /// A phase of the ballot `own.mbal`; phase 2 once `own.bal` equals it.
    Phase {
        disks: Vec<Step>,
        input: Option<ValueId>,
    },
}

/// Rules left out on purpose, to see the model check find it.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Sabotage {
    #[default]
    None,
    /// Phase 1 ends with what was read before the ballot was written.
    NoReadInPhase1,
    /// Phase 2 ends when it is written.
    NoReadInPhase2,
    /// A reader does not look a second time.
    OneLook,
    /// A proposer puts its own value though another was proposed.
    OwnValueAlways,
}

/// The machine of one host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    me: HostSlot,
    incarnation: Incarnation,
    /// The run before this one, whose records a disk that loses writes still shows.
    before: Incarnation,
    /// What this host's blocks say, or will once they are written.
    own: Record,
    /// Per disk: an action is under way; whether it belongs to the present round.
    busy: Vec<Option<bool>>,
    work: Work,
    /// Highest ballot met in the newest instance met.
    highest: (Instance, Ballot),
    fetch: Option<Action>,
    outcome: Option<Outcome>,
    #[cfg(test)]
    pub(super) sabotage: Sabotage,
    /// What the last look read, for the sabotage of phase 1.
    #[cfg(test)]
    last_look: Vec<Option<Pass>>,
}

impl Machine {
    /// A machine for host `me`, whose disks say `recovered` of it ([`recover`]).
    #[must_use]
    pub fn new(me: HostSlot, disks: usize, incarnation: Incarnation, recovered: Record) -> Self {
        Self {
            me,
            incarnation,
            before: recovered.incarnation,
            own: Record {
                incarnation,
                ..recovered
            },
            busy: vec![None; disks],
            work: Work::Idle,
            highest: (recovered.instance, recovered.mbal),
            fetch: None,
            outcome: None,
            #[cfg(test)]
            sabotage: Sabotage::None,
            #[cfg(test)]
            last_look: vec![None; disks],
        }
    }

    /// What this host's blocks say, or will. The caller keeps the bytes of both its values.
    #[must_use]
    pub fn own(&self) -> &Record {
        &self.own
    }

    /// Find the newest chosen instance; ends in an outcome.
    pub fn look(&mut self) {
        self.begin(Work::Look {
            disks: vec![Looked::default(); self.busy.len()],
            at: Instance(0),
            top: None,
        });
    }

    /// Propose `value` for the instance after `base`, which a look has just found current.
    /// The caller holds the bytes of both.
    pub fn propose(&mut self, base: (Instance, Option<ValueId>), value: ValueId) {
        let record = self.record_for(Instance(base.0.0 + 1), base.1);
        if record.instance < self.own.instance {
            self.finish(Outcome::Preempted);
            return;
        }
        self.begin_phase_1(record, Some(value));
    }

    /// Leave what is being done. What is under way on a disk keeps that disk busy.
    pub fn abandon(&mut self) {
        self.begin(Work::Idle);
    }

    /// Whether an action is under way on the disk.
    #[must_use]
    pub fn is_busy(&self, disk: usize) -> bool {
        self.busy.get(disk).is_some_and(Option::is_some)
    }

    /// How the round ended, once.
    pub fn poll_outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// The next thing to do, if there is one now.
    pub fn poll_action(&mut self) -> Option<Action> {
        if let Some(fetch) = self.fetch.take() {
            return Some(fetch);
        }
        for disk in 0..self.busy.len() {
            if self.busy[disk].is_some() {
                continue;
            }
            let action = match &self.work {
                Work::Look { disks, top, .. } => {
                    let looked = &disks[disk];
                    let wants =
                        looked.first.is_none() || (top.is_some() && looked.second.is_none());
                    (wants && !looked.failed).then_some(Action::Read { disk })
                }
                Work::Phase { disks, .. } => match disks[disk] {
                    Step::Write => Some(Action::Write {
                        disk,
                        record: self.own,
                    }),
                    Step::Read => Some(Action::Read { disk }),
                    Step::Done(_) | Step::Failed => None,
                },
                Work::Idle | Work::Fetch { .. } => None,
            };
            if action.is_some() {
                self.busy[disk] = Some(true);
                return action;
            }
        }
        None
    }

    /// A write ended. After `Failed` the record may be on the disk or not.
    pub fn handle_written(&mut self, disk: usize, result: Result<(), Failed>) {
        if !self.settle(disk) {
            return;
        }
        #[cfg(test)]
        let skipped = self.skipped_read(disk);
        if let Work::Phase { disks, .. } = &mut self.work {
            disks[disk] = if result.is_ok() {
                Step::Read
            } else {
                Step::Failed
            };
            #[cfg(test)]
            if let (Ok(()), Some(pass)) = (result, skipped) {
                disks[disk] = Step::Done(pass);
            }
            self.check_phase();
        }
    }

    /// A read ended: the records of all hosts, by slot.
    pub fn handle_read(&mut self, disk: usize, result: Result<Pass, Failed>) {
        if !self.settle(disk) {
            return;
        }
        if let Ok(pass) = &result {
            for record in pass {
                if record.instance > self.highest.0 {
                    self.highest = (record.instance, record.mbal);
                } else if record.instance == self.highest.0 {
                    self.highest.1 = self.highest.1.max(record.mbal);
                }
            }
        }
        match &self.work {
            Work::Look { .. } => self.looked(disk, result),
            Work::Phase { .. } => self.phase_read(disk, result),
            Work::Idle | Work::Fetch { .. } => {}
        }
    }

    /// The value of an [`Action::Fetch`] is there, or could not be had.
    pub fn handle_fetched(&mut self, result: Result<(), Failed>) {
        let Work::Fetch { then, input } = &self.work else {
            return;
        };
        let (then, input) = (*then, *input);
        match result {
            // Its owner has moved on and written over it: so has the pool.
            Err(Failed) => self.finish(Outcome::Preempted),
            Ok(()) if then.proposed.is_some() => self.begin_phase(then, input),
            Ok(()) => self.begin_phase_1(then, input),
        }
    }

    /// The action on the disk has ended; whether the present round asked for it.
    fn settle(&mut self, disk: usize) -> bool {
        self.busy.get_mut(disk).and_then(Option::take) == Some(true)
    }

    fn begin(&mut self, work: Work) {
        for busy in self.busy.iter_mut().flatten() {
            *busy = false;
        }
        self.outcome = None;
        self.fetch = None;
        self.work = work;
    }

    fn finish(&mut self, outcome: Outcome) {
        self.begin(Work::Idle);
        self.outcome = Some(outcome);
    }

    /// This host's record for `instance`: what it has, or a new one on top of `chosen`.
    fn record_for(&self, instance: Instance, chosen: Option<ValueId>) -> Record {
        if self.own.instance >= instance {
            return self.own;
        }
        Record {
            incarnation: self.incarnation,
            instance,
            mbal: Ballot::NONE,
            bal: Ballot::NONE,
            chosen,
            proposed: None,
        }
    }

    /// A new ballot on `record`, above all that was met in its instance.
    fn begin_phase_1(&mut self, mut record: Record, input: Option<ValueId>) {
        let met = if self.highest.0 == record.instance {
            self.highest.1
        } else {
            Ballot::NONE
        };
        record.mbal = record.mbal.max(met).above(self.me);
        self.begin_phase(record, input);
    }

    fn begin_phase(&mut self, record: Record, input: Option<ValueId>) {
        self.own = record;
        self.begin(Work::Phase {
            disks: vec![Step::Write; self.busy.len()],
            input,
        });
    }

    fn looked(&mut self, disk: usize, result: Result<Pass, Failed>) {
        let quorum = majority(self.busy.len());
        let Work::Look { disks, at, top } = &mut self.work else {
            return;
        };
        let looked = &mut disks[disk];
        match result {
            Err(Failed) => looked.failed = true,
            Ok(pass) if looked.first.is_none() => looked.first = Some(pass),
            Ok(pass) => looked.second = Some(pass),
        }
        if disks.iter().filter(|d| d.failed).count() > disks.len() - quorum {
            self.finish(Outcome::NoMajority);
            return;
        }
        if let Some(top) = *top {
            let at = *at;
            self.look_again(at, top);
        } else if disks.iter().filter(|d| d.first.is_some()).count() >= quorum {
            self.look_first();
        }
    }

    /// All records of the look's first passes at `instance`, with where they were.
    fn records_at(&self, instance: Instance) -> Vec<(Option<usize>, HostSlot, Record)> {
        let mut records = vec![(None, self.me, self.own)];
        let passes: Vec<Option<&Pass>> = match &self.work {
            Work::Look { disks, .. } => disks.iter().map(|d| d.first.as_ref()).collect(),
            Work::Phase { disks, .. } => disks
                .iter()
                .map(|d| match d {
                    Step::Done(pass) => Some(pass),
                    _ => None,
                })
                .collect(),
            Work::Idle | Work::Fetch { .. } => Vec::new(),
        };
        for (disk, pass) in passes.into_iter().enumerate() {
            for (host, record) in (0..).zip(pass.into_iter().flatten()) {
                records.push((Some(disk), HostSlot(host), *record));
            }
        }
        records.retain(|(_, _, record)| record.instance == instance);
        records
    }

    /// A majority was read once: which instance is the newest, and is there a proposal in it?
    fn look_first(&mut self) {
        let newest = match &self.work {
            Work::Look { disks, .. } => disks
                .iter()
                .filter_map(|d| d.first.as_ref())
                .flatten()
                .map(|r| r.instance)
                .chain([self.own.instance])
                .max()
                .unwrap_or_default(),
            _ => return,
        };
        let records = self.records_at(newest);
        let chosen = records.first().and_then(|(_, _, r)| r.chosen);
        if records.iter().any(|(_, _, r)| r.chosen != chosen) {
            self.finish(Outcome::Contradiction);
            return;
        }
        let found = top(&records);
        #[cfg(test)]
        self.remember_look();
        match found {
            None => {
                let places = chosen.map_or(Vec::new(), |value| places(&records, value));
                self.finish(Outcome::Current {
                    instance: Instance(newest.0.saturating_sub(1)),
                    value: chosen,
                    places,
                });
            }
            Some(found) => {
                if let Work::Look { at, top, .. } = &mut self.work {
                    *at = newest;
                    *top = Some(found);
                }
                #[cfg(test)]
                if self.sabotage == Sabotage::OneLook {
                    if let Work::Look { disks, .. } = &mut self.work {
                        for d in disks {
                            d.second.clone_from(&d.first);
                        }
                    }
                    self.look_again(newest, found);
                }
            }
        }
    }

    /// Something was read after the proposal `top` had been seen.
    fn look_again(&mut self, at: Instance, top: Top) {
        let quorum = majority(self.busy.len());
        let Work::Look { disks, .. } = &self.work else {
            return;
        };
        let ahead = |r: &Record| r.instance > at || (r.instance == at && r.mbal > top.bal);
        let proposes = |pass: &Pass| {
            pass.get(usize::from(top.host.0))
                .is_some_and(|r| r.instance == at && r.bal == top.bal && r.mbal == top.bal)
        };
        let sure = disks
            .iter()
            .filter(|d| match (&d.first, &d.second) {
                (Some(first), Some(second)) => proposes(first) && !second.iter().any(ahead),
                _ => false,
            })
            .count();
        if sure >= quorum {
            let places = places(&self.records_at(at), top.value);
            self.finish(Outcome::Current {
                instance: at,
                value: Some(top.value),
                places,
            });
            return;
        }
        if disks.iter().filter(|d| d.second.is_some()).count() < quorum {
            return;
        }
        let passed = disks
            .iter()
            .flat_map(|d| [&d.first, &d.second])
            .flatten()
            .flatten()
            .any(|r| r.instance > at);
        if passed {
            self.finish(Outcome::Preempted);
            return;
        }
        // It may or may not be chosen: finish it.
        let records = self.records_at(at);
        let chosen = records.first().and_then(|(_, _, r)| r.chosen);
        let record = self.record_for(at, chosen);
        match chosen {
            Some(value) if !self.holds(value) => {
                self.fetch(value, places(&records, value), record, None);
            }
            _ => self.begin_phase_1(record, None),
        }
    }

    fn holds(&self, value: ValueId) -> bool {
        self.own.chosen == Some(value) || self.own.proposed == Some(value)
    }

    fn fetch(&mut self, value: ValueId, places: Vec<Place>, then: Record, input: Option<ValueId>) {
        self.begin(Work::Fetch { then, input });
        self.fetch = Some(Action::Fetch { value, places });
    }

    fn phase_read(&mut self, disk: usize, result: Result<Pass, Failed>) {
        let own = self.own;
        let mine = usize::from(self.me.0);
        let Work::Phase { disks, .. } = &mut self.work else {
            return;
        };
        let Ok(pass) = result else {
            disks[disk] = Step::Failed;
            self.check_phase();
            return;
        };
        match pass.get(mine) {
            Some(there) if *there == own => {}
            Some(there)
                if ![own.incarnation, self.before, Record::FIRST.incarnation]
                    .contains(&there.incarnation) =>
            {
                self.finish(Outcome::SlotTaken);
                return;
            }
            // It said it had written the record, and has not.
            _ => {
                disks[disk] = Step::Failed;
                self.check_phase();
                return;
            }
        }
        let ahead = pass.iter().any(|r| {
            r.instance > own.instance || (r.instance == own.instance && r.mbal > own.mbal)
        });
        if ahead {
            self.finish(Outcome::Preempted);
            return;
        }
        disks[disk] = Step::Done(pass);
        self.check_phase();
    }

    /// The paper's EndPhase1or2.
    fn check_phase(&mut self) {
        let quorum = majority(self.busy.len());
        let Work::Phase { disks, input } = &self.work else {
            return;
        };
        let input = *input;
        if disks.iter().filter(|d| **d == Step::Failed).count() > disks.len() - quorum {
            self.finish(Outcome::NoMajority);
            return;
        }
        let done = disks.iter().filter(|d| matches!(d, Step::Done(_))).count();
        if done < quorum {
            return;
        }
        let own = self.own;
        if own.bal == own.mbal {
            self.finish(Outcome::Current {
                instance: own.instance,
                value: own.proposed,
                places: Vec::new(),
            });
            return;
        }
        let records = self.records_at(own.instance);
        let adopted = top(&records);
        #[cfg(test)]
        let adopted = match (self.sabotage, input) {
            (Sabotage::OwnValueAlways, Some(_)) => None,
            _ => adopted,
        };
        let Some(value) = adopted.map(|top| top.value).or(input) else {
            // Nothing was chosen in this instance when the phase began, so the one before is
            // the newest.
            self.finish(Outcome::Current {
                instance: Instance(own.instance.0.saturating_sub(1)),
                value: own.chosen,
                places: Vec::new(),
            });
            return;
        };
        let next = Record {
            bal: own.mbal,
            proposed: Some(value),
            ..own
        };
        if input == Some(value) || self.holds(value) {
            self.begin_phase(next, input);
        } else {
            self.fetch(value, places(&records, value), next, input);
        }
    }

    #[cfg(test)]
    fn remember_look(&mut self) {
        // Only the sabotaged machine keeps it: it would multiply the states to explore.
        if let (Work::Look { disks, .. }, true) =
            (&self.work, self.sabotage == Sabotage::NoReadInPhase1)
        {
            self.last_look = disks.iter().map(|d| d.first.clone()).collect();
        }
    }

    #[cfg(test)]
    fn skipped_read(&self, disk: usize) -> Option<Pass> {
        let phase_2 = self.own.bal == self.own.mbal;
        match self.sabotage {
            Sabotage::NoReadInPhase1 if !phase_2 => {
                Some(self.last_look[disk].clone().unwrap_or_default())
            }
            Sabotage::NoReadInPhase2 if phase_2 => Some(Vec::new()),
            _ => None,
        }
    }
}

/// The proposal with the highest ballot.
fn top(records: &[(Option<usize>, HostSlot, Record)]) -> Option<Top> {
    records
        .iter()
        .filter_map(|(_, host, r)| {
            r.proposed.map(|value| Top {
                host: *host,
                bal: r.bal,
                value,
            })
        })
        .max_by_key(|top| top.bal)
}

/// Where `value` is named by one of `records`.
fn places(records: &[(Option<usize>, HostSlot, Record)], value: ValueId) -> Vec<Place> {
    records
        .iter()
        .filter(|(_, _, r)| r.chosen == Some(value) || r.proposed == Some(value))
        .filter_map(|(disk, host, _)| disk.map(|disk| Place { disk, host: *host }))
        .collect()
}
