//! Storage heartbeats: one block per host and disk that others read. What a heartbeat says is
//! the caller's affair; here it is bytes with a sequence and a checksum.
//!
//! They have threads of their own, so that a registry call that waits for a disk holds up no
//! heartbeat. A disk that has not finished the last one gets no further one.

use super::disk::{Disk, Evidence, Expect, wall_us};
use super::fault::DiskFault;
use super::layout::{BEAT_BYTES_MAX, BadBeat, Beat};
use super::paxos::HostSlot;
use super::worker::{Answer, Done, Job, Ticket, Worker};
use super::{OpenError, StatefileOptions};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// What [`Beats`] need: as for the registry on the same disks.
pub type BeatsOptions = StatefileOptions;

/// The newest heartbeat of a host that could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeardBeat {
    /// Whose.
    pub host: HostSlot,
    /// Rises with each heartbeat of the host, also over its restarts.
    pub seq: u64,
    /// Indexes of the disks that showed this one.
    pub disks: Vec<usize>,
    /// What it says.
    pub payload: Vec<u8>,
}

/// What a disk made of the last request.
#[derive(Debug, thiserror::Error)]
pub enum BeatFault {
    /// It did not do it.
    #[error(transparent)]
    Disk(#[from] DiskFault),
    /// It has not answered yet; nothing more is asked of it before it does.
    #[error("it has not answered yet")]
    Waiting,
}

/// This host's heartbeats and the way to read the others'.
pub struct Beats {
    expect: Expect,
    workers: Vec<Worker>,
    inbox: Receiver<Answer>,
    /// Per disk what it still owes an answer to.
    owed: Vec<Option<Ticket>>,
    tickets: u64,
    seq: u64,
}

impl Beats {
    /// Open the disks for heartbeats of `options.slot`.
    ///
    /// # Errors
    /// As [`super::Statefile::open`].
    pub fn open(options: &BeatsOptions) -> Result<Self, OpenError> {
        // The registry's way to find out which disks these are; its threads end with it.
        let expect = super::shell::Shell::open(options)?.expect;
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
            workers
                .push(Worker::start(index.into(), disk, done.clone()).map_err(OpenError::Thread)?);
        }
        let mut beats = Self {
            expect,
            owed: vec![None; workers.len()],
            workers,
            inbox,
            tickets: 0,
            // Above all earlier ones, though a disk that held one may not be readable now.
            seq: wall_us(),
        };
        let (heard, _) = beats.read_heartbeats(options.call_wait);
        if let Some(own) = heard.iter().find(|beat| beat.host == options.slot) {
            beats.seq = beats.seq.max(own.seq);
        }
        Ok(beats)
    }

    /// Write a heartbeat of at most [`BEAT_BYTES_MAX`] bytes to every disk, and wait for them
    /// no longer than `wait`. Per disk how that ended; one is enough for others to hear it.
    ///
    /// # Errors
    /// The whole is an error only if the payload is too long; then holds its length.
    pub fn write_heartbeat(
        &mut self,
        payload: &[u8],
        wait: Duration,
    ) -> Result<Vec<Result<(), BeatFault>>, usize> {
        if payload.len() > BEAT_BYTES_MAX {
            return Err(payload.len());
        }
        self.seq += 1;
        let (expect, seq) = (self.expect, self.seq);
        let answers = self.ask(wait, |_| Job::WriteBeat(expect, payload.to_vec(), seq));
        let told = answers.into_iter().map(|answer| match answer {
            Some(Done::BeatWritten(result)) => Ok(result?),
            _ => Err(BeatFault::Waiting),
        });
        Ok(told.collect())
    }

    /// The newest heartbeat of each host that ever wrote one, by slot, from the disks that
    /// answer within `wait`; and per disk what was wrong with it. A heartbeat caught while it
    /// was written is left out: its host has another disk, or is heard the next time.
    pub fn read_heartbeats(&mut self, wait: Duration) -> (Vec<HeardBeat>, Vec<Option<BeatFault>>) {
        let expect = self.expect;
        let mut heard: BTreeMap<HostSlot, HeardBeat> = BTreeMap::new();
        let mut faults = Vec::new();
        let answers = self.ask(wait, |_| Job::ReadBeats(expect));
        for (disk, answer) in answers.into_iter().enumerate() {
            let beats = match answer {
                Some(Done::Beats(Ok(beats))) => {
                    faults.push(None);
                    beats
                }
                Some(Done::Beats(Err(fault))) => {
                    faults.push(Some(fault.into()));
                    continue;
                }
                _ => {
                    faults.push(Some(BeatFault::Waiting));
                    continue;
                }
            };
            for beat in beats.into_iter().filter_map(Result::<Beat, BadBeat>::ok) {
                if beat.seq == 0 {
                    continue;
                }
                let newest = heard.get(&beat.host).map_or(0, |other| other.seq);
                if beat.seq > newest {
                    heard.insert(
                        beat.host,
                        HeardBeat {
                            host: beat.host,
                            seq: beat.seq,
                            disks: vec![disk],
                            payload: beat.payload,
                        },
                    );
                } else if beat.seq == newest
                    && let Some(other) = heard.get_mut(&beat.host)
                {
                    other.disks.push(disk);
                }
            }
        }
        (heard.into_values().collect(), faults)
    }

    /// Ask every disk that owes nothing, and collect what is answered in time.
    fn ask(&mut self, wait: Duration, job: impl Fn(usize) -> Job) -> Vec<Option<Done>> {
        let deadline = Instant::now() + wait;
        while let Ok((disk, ticket, _)) = self.inbox.try_recv() {
            self.settle(disk, ticket);
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        for (disk, worker) in self.workers.iter().enumerate() {
            if self.owed[disk].is_none() && worker.ask(ticket, job(disk)) {
                self.owed[disk] = Some(ticket);
            }
        }
        let mut answers: Vec<Option<Done>> = self.workers.iter().map(|_| None).collect();
        while self.owed.contains(&Some(ticket)) {
            let wait = deadline.saturating_duration_since(Instant::now());
            let Ok((disk, answered, done)) = self.inbox.recv_timeout(wait) else {
                break;
            };
            self.settle(disk, answered);
            if answered == ticket {
                answers[disk] = Some(done);
            }
        }
        answers
    }

    fn settle(&mut self, disk: usize, ticket: Ticket) {
        if self.owed[disk] == Some(ticket) {
            self.owed[disk] = None;
        }
    }
}
