//! One thread per disk, so that a disk that hangs holds up nobody but itself.
//!
//! Jobs of a disk are done one after the other. Whoever asks keeps their number bounded: the
//! machine has one action per disk under way, and one fetch per disk is waited for. A job
//! whose caller has given up goes on here until the kernel is done with it, and nothing else
//! touches that disk before: a late write can never overtake a newer one.

use super::disk::{Disk, Expect, Write};
use super::fault::DiskFault;
use super::layout::{BadBeat, Beat, Block, Header};
use super::paxos::{HostSlot, ValueId};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

/// What a disk is asked to do.
pub(super) enum Job {
    Header,
    Read(Expect),
    Write(Expect, Write),
    Value(Expect, HostSlot, ValueId),
    WriteBeat(Expect, Vec<u8>, u64),
    ReadBeats(Expect),
}

/// What came of it.
pub(super) enum Done {
    Header(Result<Header, DiskFault>),
    Read(Result<Vec<Block>, DiskFault>),
    Written(Result<(), DiskFault>),
    Value(ValueId, Result<Arc<[u8]>, DiskFault>),
    BeatWritten(Result<(), DiskFault>),
    Beats(Result<Vec<Result<Beat, BadBeat>>, DiskFault>),
}

/// Which job an answer is for; a caller that gave up gets answers it no longer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(pub(super) u64);

/// From disk, for job, what came of it.
pub(super) type Answer = (usize, Ticket, Done);

/// The way to a disk's thread. The thread ends when this is dropped and its last job is done.
pub(super) struct Worker {
    jobs: Sender<(Ticket, Job)>,
}

impl Worker {
    /// A thread for disk `index`; it reports to `done` under that index.
    pub(super) fn start(index: usize, mut disk: Disk, done: Sender<Answer>) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        std::thread::Builder::new()
            .name(format!("statefile-{index}"))
            .spawn(move || {
                for (ticket, job) in inbox {
                    let answer = match job {
                        Job::Header => Done::Header(disk.header()),
                        Job::Read(expect) => Done::Read(disk.read(&expect)),
                        Job::Write(expect, write) => Done::Written(disk.write(&expect, &write)),
                        Job::Value(expect, host, id) => {
                            Done::Value(id, disk.value(&expect, host, id))
                        }
                        Job::WriteBeat(expect, payload, seq) => {
                            Done::BeatWritten(disk.write_beat(&expect, payload, seq))
                        }
                        Job::ReadBeats(expect) => Done::Beats(disk.read_beats(&expect)),
                    };
                    if done.send((index, ticket, answer)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self { jobs })
    }

    /// Whether the thread is there to do it.
    pub(super) fn ask(&self, ticket: Ticket, job: Job) -> bool {
        self.jobs.send((ticket, job)).is_ok()
    }
}
