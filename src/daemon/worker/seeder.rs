//! The first full copy, while the guest runs: disks, then memory, then what changed.
//!
//! One thread a mirroring attempt. It borrows the tracker and the lane from the worker and
//! gives the tracker back when it ends. Afterwards one checkpoint makes the standby whole.

use super::WorkerEvent;
use super::publish::Shared;
use super::sender::{Audit, ZERO_PAGE, chunks, link_facts, to_wire};
use crate::api::types::SeedingStatus;
use crate::interpose::disk::{Disk, DiskWrite, WriteData};
use crate::interpose::memory::{Page, SeedLimits, Tracker, seed};
use crate::pool::{Generation, VmId};
use interconnect::codec::{EncodePolicy, pages::BATCH_PAGES_MAX};
use interconnect::epoch::{EncodePool, SeedWriter};
use interconnect::link::EpochLane;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

/// Rounds over the disks' dirty blocks at most; what is left goes with the first epoch.
const DISK_ROUNDS_MAX: u32 = 5;
/// Dirty bytes of a disk small enough to go with the first epoch, which the standby buffers.
const DISK_SMALL_BYTES: u64 = 4 << 20;
/// Pages small enough for the first checkpoint: 16 MiB are copied in about 10 ms.
const SMALL_PAGES: u64 = 4096;
/// Pages handed to the writer at once: batches for each of its threads, 8 MiB.
const ROUND_PAGES: usize = 8 * BATCH_PAGES_MAX;
/// Scan-and-copy rounds at most.
const ROUNDS_MAX: u32 = 8;

/// What the seeder needs.
pub struct SeedJob {
    /// The VM.
    pub vm: VmId,
    /// The attempt.
    pub generation: Generation,
    /// Armed on the running guest.
    pub tracker: Tracker,
    /// The lane.
    pub lane: Arc<EpochLane>,
    /// The VM's disks, dirty tracking begun.
    pub disks: Vec<Arc<Disk>>,
    /// How pages are packed.
    pub policy: EncodePolicy,
    /// The threads that do.
    pub pool: EncodePool,
    /// Whether to keep an audit.
    pub audit: bool,
    /// Set to give up.
    pub abort: Arc<AtomicBool>,
}

/// How seeding ended.
pub struct Seeded {
    /// The attempt.
    pub generation: Generation,
    /// The tracker, still armed.
    pub tracker: Tracker,
    /// Disk ranges left for the first epoch.
    pub base: Vec<Vec<Range<u64>>>,
    /// The audit's tables over everything sent.
    pub audit: Option<Audit>,
    /// Whether it converged, or why not.
    pub result: Result<(), String>,
}

/// Start a seeder.
///
/// # Errors
/// If no thread can be started.
pub fn start(job: SeedJob, shared: Arc<Shared>, inbox: Sender<WorkerEvent>) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("seeder".into())
        .spawn(move || {
            let mut seeder = Seeder::new(job, shared);
            let result = seeder.run();
            let _ = inbox.send(WorkerEvent::Seeded(Box::new(Seeded {
                generation: seeder.job.generation,
                tracker: seeder.job.tracker,
                base: seeder.base,
                audit: seeder.audit,
                result,
            })));
        })
        .map(drop)
}

struct Seeder {
    job: SeedJob,
    writer: SeedWriter,
    shared: Arc<Shared>,
    audit: Option<Audit>,
    base: Vec<Vec<Range<u64>>>,
    progress: SeedingStatus,
}

impl Seeder {
    fn new(job: SeedJob, shared: Arc<Shared>) -> Self {
        let audit = job
            .audit
            .then(|| Audit::new(job.tracker.pages(), &job.disks));
        let writer = SeedWriter::new(job.vm, job.generation, job.policy, job.pool.clone());
        Self {
            job,
            writer,
            shared,
            audit,
            base: Vec::new(),
            progress: SeedingStatus::default(),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        let mut ranges = Vec::new();
        for disk in &self.job.disks {
            ranges.push(disk.allocated_ranges().map_err(|e| e.to_string())?);
        }
        self.progress.total_bytes = ranges.iter().flatten().map(|r| r.end - r.start).sum();
        for (index, ranges) in ranges.iter().enumerate() {
            self.send_disk(index, ranges)?;
        }
        self.seed_memory()?;
        self.base = vec![Vec::new(); self.job.disks.len()];
        for index in 0..self.job.disks.len() {
            for round in 0..DISK_ROUNDS_MAX {
                let dirty = self.job.disks[index].take_dirty();
                let bytes: u64 = dirty.iter().map(|r| r.end - r.start).sum();
                if bytes <= DISK_SMALL_BYTES || round + 1 == DISK_ROUNDS_MAX {
                    self.base[index] = dirty;
                    break;
                }
                self.send_disk(index, &dirty)?;
            }
        }
        Ok(())
    }

    fn check_abort(&self) -> Result<(), String> {
        if self.job.abort.load(Ordering::Relaxed) {
            Err("given up".into())
        } else {
            Ok(())
        }
    }

    fn send_disk(&mut self, index: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        for chunk in ranges.iter().flat_map(|r| chunks(r.clone())) {
            self.check_abort()?;
            let length = chunk.end - chunk.start;
            let offset = chunk.start;
            let bytes = self.job.disks[index]
                .read_base(chunk)
                .map_err(|e| e.to_string())?;
            let data = WriteData::Data(bytes);
            if let Some(audit) = &mut self.audit {
                audit.disk_write(index, offset, &data);
            }
            let writes = [to_wire(index, DiskWrite { offset, data })];
            let lane = &self.job.lane;
            self.writer.choose(link_facts(lane));
            self.writer
                .disk(&writes, &mut |frame| lane.send_blocking(frame))
                .map_err(|e| e.to_string())?;
            self.progress.done_bytes += length;
            self.shared.seeding(&self.progress);
        }
        Ok(())
    }

    fn seed_memory(&mut self) -> Result<(), String> {
        let disk_bytes = self.progress.done_bytes;
        let limits = SeedLimits {
            rounds_max: ROUNDS_MAX,
            small_pages: SMALL_PAGES,
        };
        let mut batch: Vec<(u64, Page)> = Vec::with_capacity(ROUND_PAGES);
        let (writer, lane) = (&mut self.writer, &self.job.lane);
        let mut flush = |batch: &mut Vec<(u64, Page)>| -> Result<(), String> {
            writer.choose(link_facts(lane));
            let pages = batch.iter().map(|(index, page)| (*index, page));
            writer
                .pages(pages, &mut |frame| lane.send_blocking(frame))
                .map_err(|e| e.to_string())?;
            batch.clear();
            Ok(())
        };
        let (audit, abort, shared) = (&mut self.audit, &self.job.abort, &self.shared);
        let mut status = self.progress.clone();
        let outcome = seed(
            &mut self.job.tracker,
            limits,
            &mut |index, page: &Page| -> Result<(), String> {
                if abort.load(Ordering::Relaxed) {
                    return Err("given up".into());
                }
                if let Some(audit) = audit {
                    if *page == ZERO_PAGE {
                        audit.memory.update_zero(index);
                    } else {
                        audit.memory.update(index, page);
                    }
                }
                batch.push((index, *page));
                if batch.len() == ROUND_PAGES {
                    flush(&mut batch)
                } else {
                    Ok(())
                }
            },
            &mut |progress| {
                status.round = progress.round;
                status.done_bytes = disk_bytes + progress.bytes_done;
                status.total_bytes = disk_bytes + progress.bytes_total;
                shared.seeding(&status);
            },
        )
        .map_err(|e| e.to_string())?;
        flush(&mut batch)?;
        tracing::info!(
            rounds = outcome.rounds,
            pages = outcome.pages_sent,
            converged = outcome.converged,
            "memory seeded"
        );
        Ok(())
    }
}
