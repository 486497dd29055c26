//! The disks and the machine of one host, put together: forwards actions to the threads of
//! the disks and their answers back, until an outcome or a deadline.

use super::disk::{Disk, Evidence, Expect, Write};
use super::document::Document;
use super::fault::DiskFault;
use super::layout::Header;
use super::paxos::{
    Action, Failed, HostSlot, Incarnation, Instance, Machine, Outcome, Pass, Place, Record,
    ValueId, majority, recover,
};
use super::worker::{Answer, Done, Job, Ticket, Worker};
use super::{OpenError, StatefileOptions};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Longest pause after being overtaken; it doubles from 1 ms. A change takes a few ms on
/// storage that is well, and every host of a pool may be at it.
const PAUSE_MAX: Duration = Duration::from_millis(32);

/// Jobs that are not the machine's.
const OPENING: Ticket = Ticket(0);

/// Why there was no outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Deadline,
    NoMajority,
    SlotTaken,
    Contradiction,
    /// The newest document is named, but nowhere whole.
    NoDocument,
}

/// The newest chosen document.
pub(super) struct Current {
    pub(super) instance: Instance,
    pub(super) value: Option<ValueId>,
    pub(super) document: Arc<Document>,
}

pub(super) struct Shell {
    pub(super) me: HostSlot,
    pub(super) incarnation: Incarnation,
    pub(super) expect: Expect,
    workers: Vec<Worker>,
    inbox: Receiver<Answer>,
    evidence: Arc<Evidence>,
    machine: Machine,
    /// Bytes of the values that this host may have to write.
    values: HashMap<ValueId, Arc<[u8]>>,
    /// The newest document met, decoded; found by its value, never trusted to be the newest.
    decoded: Option<(ValueId, Arc<Document>)>,
    seq: u64,
    /// Per disk: the job of the machine's action there.
    tickets: Vec<Ticket>,
    tickets_given: u64,
    /// Per disk: a value was asked for and has not come.
    fetching: Vec<bool>,
    /// The value that the machine, or the caller, waits for.
    wanted: Option<(ValueId, Vec<Place>)>,
    /// Per disk what was last wrong with it.
    pub(super) faults: Vec<Option<DiskFault>>,
    pauses: u32,
    luck: u64,
}

impl Shell {
    /// Find the disks' headers and this host's own records; needs a majority.
    pub(super) fn open(options: &StatefileOptions) -> Result<Self, OpenError> {
        let deadline = Instant::now() + options.call_wait;
        let disks = options.disks.len();
        if !matches!(disks, 1 | 3) {
            return Err(OpenError::Disks(disks));
        }
        let incarnation = Incarnation(uuid::Uuid::new_v4().as_u64_pair().0);
        let evidence = Arc::new(Evidence::new());
        let (done, inbox) = mpsc::channel();
        let mut workers = Vec::new();
        for (index, path) in (0_u16..).zip(&options.disks) {
            let disk = Disk::new(
                path.clone(),
                index,
                options.slot,
                options.name.clone(),
                evidence.clone(),
            );
            let worker =
                Worker::start(index.into(), disk, done.clone()).map_err(OpenError::Thread)?;
            workers.push(worker);
        }
        drop(done);
        let mut opening = Opening {
            headers: (0..disks).map(|_| None).collect(),
            faults: (0..disks).map(|_| None).collect(),
        };
        for worker in &workers {
            worker.ask(OPENING, Job::Header);
        }
        opening.collect_headers(&inbox, deadline);
        let expect = opening.expect(options)?;
        evidence.begin_set(expect.set);
        let machine = Machine::new(options.slot, disks, incarnation, Record::FIRST);
        let mut shell = Self {
            me: options.slot,
            incarnation,
            expect,
            workers,
            inbox,
            evidence,
            machine,
            values: HashMap::new(),
            decoded: None,
            seq: 0,
            tickets: vec![OPENING; disks],
            tickets_given: OPENING.0,
            fetching: vec![false; disks],
            wanted: None,
            faults: opening.faults,
            pauses: 0,
            luck: incarnation.0 | 1,
        };
        shell.recover(options, &opening.headers, deadline)?;
        Ok(shell)
    }

    /// The paper's recovery: own records from a majority, and the values they name.
    fn recover(
        &mut self,
        options: &StatefileOptions,
        headers: &[Option<Header>],
        deadline: Instant,
    ) -> Result<(), OpenError> {
        let mut asked = 0;
        for (worker, _) in self
            .workers
            .iter()
            .zip(headers)
            .filter(|(_, h)| h.is_some())
        {
            worker.ask(OPENING, Job::Read(self.expect));
            asked += 1;
        }
        let mut passes: Vec<Option<Pass>> = vec![None; self.workers.len()];
        let mut names = Vec::new();
        while asked > 0 {
            let wait = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(wait) {
                Ok((disk, _, Done::Read(Ok(blocks)))) => {
                    asked -= 1;
                    let own = &blocks[usize::from(self.me.0)];
                    names.push(own.name.clone());
                    self.seq = self.seq.max(own.seq);
                    passes[disk] = Some(blocks.iter().map(|b| b.record).collect());
                }
                Ok((disk, _, Done::Read(Err(fault)))) => {
                    asked -= 1;
                    self.faults[disk] = Some(fault);
                }
                // A header that comes late; its disk joins when it is next asked.
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let record = recover(self.me, &passes)
            .ok_or_else(|| OpenError::NoMajority(self.describe(options)))?;
        if let Some(other) = names
            .into_iter()
            .find(|name| !name.is_empty() && *name != options.name)
            && !options.take_slot
        {
            return Err(OpenError::SlotOf {
                slot: self.me.0,
                other,
            });
        }
        self.machine = Machine::new(self.me, passes.len(), self.incarnation, record);
        for id in [record.chosen, record.proposed].into_iter().flatten() {
            let places = (0..passes.len())
                .filter(|disk| passes[*disk].is_some())
                .map(|disk| Place {
                    disk,
                    host: self.me,
                })
                .collect();
            if self.value(id, places, deadline).is_err() {
                return Err(OpenError::OwnValue(self.describe(options)));
            }
        }
        Ok(())
    }

    /// What is wrong with the disks, for an error's text.
    pub(super) fn describe(&self, options: &StatefileOptions) -> String {
        let told: Vec<String> = options
            .disks
            .iter()
            .zip(&self.faults)
            .enumerate()
            .map(|(disk, (path, fault))| match fault {
                Some(fault) => format!("{}: {fault}; {}", path.display(), fault.remedy()),
                None if self.machine.is_busy(disk) => {
                    format!("{}: it has not answered yet", path.display())
                }
                None => format!("{}: well", path.display()),
            })
            .collect();
        told.join("; ")
    }

    /// Until nothing is under way on any disk, so that a test may touch them.
    #[cfg(test)]
    pub(super) fn settle(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while (0..self.workers.len()).any(|disk| self.machine.is_busy(disk)) {
            assert!(self.wait(deadline), "a disk does not answer");
        }
    }

    /// The record this host has on the disks, or will have.
    pub(super) fn own(&self) -> &Record {
        self.machine.own()
    }

    /// The newest chosen document, as of a moment after this call began.
    pub(super) fn current(&mut self, deadline: Instant) -> Result<Current, Stop> {
        loop {
            self.machine.look();
            match self.drive(deadline)? {
                Outcome::Current {
                    instance,
                    value,
                    places,
                } => {
                    let document = match value {
                        None => Arc::new(Document::default()),
                        Some(id) => match self.document(id, places, deadline) {
                            Ok(document) => document,
                            Err(Stop::NoDocument) => {
                                // Its owner may have moved on since; if not, it is damaged.
                                self.pause(deadline).map_err(|_| Stop::NoDocument)?;
                                continue;
                            }
                            Err(stop) => return Err(stop),
                        },
                    };
                    self.pauses = 0;
                    return Ok(Current {
                        instance,
                        value,
                        document,
                    });
                }
                _ => self.pause(deadline)?,
            }
        }
    }

    /// Propose a document on top of `base`. Ends with the value chosen in that instance, or
    /// `None` if another host is ahead.
    pub(super) fn propose(
        &mut self,
        base: &Current,
        id: ValueId,
        bytes: Vec<u8>,
        deadline: Instant,
    ) -> Result<Option<ValueId>, Stop> {
        self.values.insert(id, bytes.into());
        self.machine.propose((base.instance, base.value), id);
        match self.drive(deadline)? {
            Outcome::Current {
                instance, value, ..
            } if instance > base.instance => Ok(value),
            _ => Ok(None),
        }
    }

    /// Wait a little, differently from the others, before another try.
    pub(super) fn pause(&mut self, deadline: Instant) -> Result<(), Stop> {
        let most = Duration::from_millis(1 << self.pauses.min(10)).min(PAUSE_MAX);
        self.pauses += 1;
        // Xorshift (Marsaglia 2003); differs between hosts by their incarnations.
        self.luck ^= self.luck << 13;
        self.luck ^= self.luck >> 7;
        self.luck ^= self.luck << 17;
        let pause = most.mul_f64(f64::from(u8::try_from(self.luck & 0xff).unwrap_or(0)) / 255.0);
        if Instant::now() + pause >= deadline {
            return Err(Stop::Deadline);
        }
        std::thread::sleep(pause);
        Ok(())
    }

    /// Run the machine until it has an outcome.
    fn drive(&mut self, deadline: Instant) -> Result<Outcome, Stop> {
        loop {
            match self.machine.poll_outcome() {
                None => {}
                Some(Outcome::NoMajority) => {
                    if self.follow_set() {
                        return Ok(Outcome::Preempted);
                    }
                    return Err(Stop::NoMajority);
                }
                Some(Outcome::SlotTaken) => return Err(Stop::SlotTaken),
                Some(Outcome::Contradiction) => return Err(Stop::Contradiction),
                Some(outcome) => return Ok(outcome),
            }
            while let Some(action) = self.machine.poll_action() {
                self.start(action);
            }
            if Instant::now() >= deadline || !self.wait(deadline) {
                self.machine.abandon();
                self.wanted = None;
                return Err(Stop::Deadline);
            }
        }
    }

    /// A disk was replaced: go on with the new set, if a majority is of it. What is under way
    /// for the old one does not count.
    fn follow_set(&mut self) -> bool {
        let found = self
            .faults
            .iter()
            .flatten()
            .filter_map(|fault| match fault {
                DiskFault::SetChanged { found, .. } => Some(*found),
                _ => None,
            })
            .max();
        match found {
            Some(found) if found > self.expect.set => {
                self.expect.set = found;
                self.evidence.begin_set(found);
                true
            }
            _ => false,
        }
    }

    fn start(&mut self, action: Action) {
        match action {
            Action::Read { disk } => {
                let ticket = self.ticket(disk);
                self.workers[disk].ask(ticket, Job::Read(self.expect));
            }
            Action::Write { disk, record } => {
                self.seq += 1;
                let values = [record.chosen, record.proposed]
                    .into_iter()
                    .flatten()
                    .filter_map(|id| Some((id, self.values.get(&id)?.clone())))
                    .collect();
                let write = Write {
                    record,
                    values,
                    seq: self.seq,
                };
                let ticket = self.ticket(disk);
                self.workers[disk].ask(ticket, Job::Write(self.expect, write));
            }
            Action::Fetch { value, places } => {
                if self.values.contains_key(&value) {
                    self.machine.handle_fetched(Ok(()));
                } else {
                    self.ask_for(value, places);
                }
            }
        }
    }

    fn ticket(&mut self, disk: usize) -> Ticket {
        self.tickets_given += 1;
        self.tickets[disk] = Ticket(self.tickets_given);
        self.tickets[disk]
    }

    /// Ask every place for a value, one per disk at a time.
    fn ask_for(&mut self, value: ValueId, places: Vec<Place>) {
        self.wanted = Some((value, places));
        self.ask_next();
    }

    fn ask_next(&mut self) {
        let Some((value, places)) = &mut self.wanted else {
            return;
        };
        let value = *value;
        let mut ask = Vec::new();
        places.retain(|place| {
            let free = !self.fetching[place.disk];
            if free {
                self.fetching[place.disk] = true;
                ask.push(*place);
            }
            !free
        });
        let nowhere = places.is_empty() && ask.is_empty() && !self.fetching.contains(&true);
        for place in ask {
            self.workers[place.disk].ask(OPENING, Job::Value(self.expect, place.host, value));
        }
        if nowhere {
            self.wanted = None;
            self.machine.handle_fetched(Err(Failed));
        }
    }

    /// Take one answer; false at the deadline.
    fn wait(&mut self, deadline: Instant) -> bool {
        let wait = deadline.saturating_duration_since(Instant::now());
        let (disk, ticket, done) = match self.inbox.recv_timeout(wait) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => return false,
            // All threads are gone, which only a panic in each could do.
            Err(RecvTimeoutError::Disconnected) => return false,
        };
        match done {
            Done::Header(_) | Done::BeatWritten(_) | Done::Beats(_) => {}
            // Asked for while opening, and too late for it.
            Done::Read(_) | Done::Written(_) if ticket != self.tickets[disk] => {}
            Done::Read(result) => {
                let result = self.noted(disk, result);
                let pass = result.map(|blocks| blocks.iter().map(|b| b.record).collect());
                self.machine.handle_read(disk, pass);
            }
            Done::Written(result) => {
                let result = self.noted(disk, result);
                self.machine.handle_written(disk, result);
            }
            Done::Value(id, result) => {
                self.fetching[disk] = false;
                if let Ok(bytes) = result
                    && self.wanted.as_ref().is_some_and(|(want, _)| *want == id)
                {
                    self.values.insert(id, bytes);
                    self.wanted = None;
                    self.machine.handle_fetched(Ok(()));
                } else {
                    self.ask_next();
                }
            }
        }
        true
    }

    fn noted<T>(&mut self, disk: usize, result: Result<T, DiskFault>) -> Result<T, Failed> {
        match result {
            Ok(done) => {
                self.faults[disk] = None;
                Ok(done)
            }
            Err(fault) => {
                self.faults[disk] = Some(fault);
                Err(Failed)
            }
        }
    }

    /// The bytes of a value, from memory or from one of `places`.
    fn value(
        &mut self,
        id: ValueId,
        places: Vec<Place>,
        deadline: Instant,
    ) -> Result<Arc<[u8]>, Stop> {
        if !self.values.contains_key(&id) {
            self.ask_for(id, places);
            while self.wanted.is_some() {
                if !self.wait(deadline) {
                    self.wanted = None;
                    return Err(Stop::Deadline);
                }
            }
        }
        self.values.get(&id).cloned().ok_or(Stop::NoDocument)
    }

    fn document(
        &mut self,
        id: ValueId,
        places: Vec<Place>,
        deadline: Instant,
    ) -> Result<Arc<Document>, Stop> {
        if let Some((known, document)) = &self.decoded
            && *known == id
            && self.values.contains_key(&id)
        {
            return Ok(document.clone());
        }
        let bytes = self.value(id, places, deadline)?;
        let document = Document::decode(&bytes, id).map_err(|_| Stop::NoDocument)?;
        let document = Arc::new(document);
        self.decoded = Some((id, document.clone()));
        // What this host's record names, and what it may build upon; nothing else.
        let own = *self.machine.own();
        self.values
            .retain(|v, _| *v == id || own.chosen == Some(*v) || own.proposed == Some(*v));
        Ok(document)
    }
}

struct Opening {
    headers: Vec<Option<Header>>,
    faults: Vec<Option<DiskFault>>,
}

impl Opening {
    fn collect_headers(&mut self, inbox: &Receiver<Answer>, deadline: Instant) {
        for _ in 0..self.headers.len() {
            let wait = deadline.saturating_duration_since(Instant::now()) / 2;
            match inbox.recv_timeout(wait) {
                Ok((disk, _, Done::Header(Ok(header)))) => self.headers[disk] = Some(header),
                Ok((disk, _, Done::Header(Err(fault)))) => self.faults[disk] = Some(fault),
                Ok(_) => {}
                Err(_) => break,
            }
        }
    }

    /// What the disks have to be: what the newest set of a majority says.
    fn expect(&mut self, options: &StatefileOptions) -> Result<Expect, OpenError> {
        let disks = self.headers.len();
        let of_pool = |header: &&Header| options.pool.is_none_or(|pool| header.pool == pool);
        let newest = self
            .headers
            .iter()
            .flatten()
            .filter(of_pool)
            .max_by_key(|header| {
                let alike = self
                    .headers
                    .iter()
                    .flatten()
                    .filter(|other| other.pool == header.pool)
                    .count();
                (alike, header.set)
            })
            .cloned();
        let Some(newest) = newest else {
            return Err(OpenError::NoMajority(self.describe(options)));
        };
        if usize::from(newest.geometry.disks) != disks {
            return Err(OpenError::SetOf {
                said: newest.geometry.disks,
                given: disks,
            });
        }
        if options.slot.0 >= newest.geometry.slots {
            return Err(OpenError::Slot {
                slot: options.slot.0,
                slots: newest.geometry.slots,
            });
        }
        let expect = Expect {
            pool: newest.pool,
            set: newest.set,
            geometry: newest.geometry,
        };
        for (index, header) in (0_u16..).zip(&mut self.headers) {
            if let Some(found) = header
                && let Err(fault) = super::disk::check_header(found, index, &expect)
            {
                self.faults[usize::from(index)] = Some(fault);
                *header = None;
            }
        }
        if self.headers.iter().flatten().count() < majority(disks) {
            return Err(OpenError::NoMajority(self.describe(options)));
        }
        Ok(expect)
    }

    fn describe(&self, options: &StatefileOptions) -> String {
        let told: Vec<String> = options
            .disks
            .iter()
            .zip(self.faults.iter().zip(&self.headers))
            .map(|(path, (fault, header))| match (fault, header) {
                (Some(fault), _) => {
                    format!("{}: {fault}; {}", path.display(), fault.remedy())
                }
                (None, Some(_)) => format!("{}: well", path.display()),
                (None, None) => format!("{}: it has not answered yet", path.display()),
            })
            .collect();
        told.join("; ")
    }
}
