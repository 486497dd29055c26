//! Threads that pack batches: the only ones of this crate that compress, and never those
//! that do I/O.
//!
//! A batch is handed over whole with its buffers and comes back whole, so a worker shares
//! nothing with anybody. Who hands batches over keeps their order ([`super::packer`]).

use crate::codec::Codec;
use crate::codec::encoder::{Batch, Draft};
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Most threads that are ever started: beyond these the one thread that sorts pages is the
/// bottleneck.
pub const THREADS_MAX: usize = 16;
/// Threads by default, at most: a host runs guests too.
const THREADS_DEFAULT_MAX: usize = 4;

/// A draft on its way through a worker.
struct Job {
    draft: Draft,
    back: SyncSender<Packed>,
}

/// A draft that came back.
pub(super) struct Packed {
    pub(super) codec: Codec,
    pub(super) batch: Batch,
    pub(super) ns: u64,
}

/// Threads that encode for all VMs of a host. Cheap to clone; they end with the last clone.
///
/// With one thread there is none: the caller packs for itself, because handing a batch to
/// another thread and waiting for it is not free.
#[derive(Clone, Debug)]
pub struct EncodePool {
    jobs: Option<SyncSender<Job>>,
    threads: usize,
}

impl Default for EncodePool {
    /// No thread: callers pack for themselves.
    fn default() -> Self {
        Self {
            jobs: None,
            threads: 1,
        }
    }
}

impl EncodePool {
    /// Half of the cores, at least 1, at most 4.
    #[must_use]
    pub fn default_threads() -> usize {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        (cores / 2).clamp(1, THREADS_DEFAULT_MAX)
    }

    /// A pool of `threads` threads, of which 1 is the caller's own; 0 counts as 1, and no
    /// more than [`THREADS_MAX`] are started.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let threads = threads.clamp(1, THREADS_MAX);
        if threads == 1 {
            return Ok(Self::default());
        }
        // As many wait as are worked on: a writer is never held up by an idle worker, and
        // what waits is bounded.
        let (jobs, queue) = sync_channel(threads);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..threads {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new()
                .name(format!("encode-{number}"))
                .spawn(move || work(&queue))?;
        }
        Ok(Self {
            jobs: Some(jobs),
            threads,
        })
    }

    /// Threads that pack.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Hand a draft over; gives it back if there is nobody to take it. What comes back
    /// comes once; nothing comes if the worker died of it.
    pub(super) fn submit(&self, draft: Draft) -> Result<Receiver<Packed>, Box<Draft>> {
        let Some(jobs) = &self.jobs else {
            return Err(Box::new(draft));
        };
        let (back, receiver) = sync_channel(1);
        jobs.send(Job { draft, back })
            .map_err(|e| Box::new(e.0.draft))?;
        Ok(receiver)
    }
}

/// Pack a draft and say how long it took.
pub(super) fn seal(draft: Draft) -> Packed {
    let begun = Instant::now();
    let codec = draft.codec();
    let batch = draft.seal();
    let ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    Packed { codec, batch, ns }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        // One waits at the queue with the lock, the others at the lock: the same thing.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { draft, back }) = job else {
            return;
        };
        // An error: nobody waits any more, the epoch was given up.
        let _ = back.send(seal(draft));
    }
}
