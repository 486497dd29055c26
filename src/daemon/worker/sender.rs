//! The thread that encodes a mirrored VM's epochs and puts them on its lane.
//!
//! One thread a mirroring attempt; it ends when its queue is dropped. It keeps the audit's
//! tables, because it is the one place that sees every page and write that is sent.

use super::WorkerEvent;
use crate::daemon::clock::now;
use crate::interpose::audit::AuditTable;
use crate::interpose::disk::{Disk, DiskWrite, WriteData};
use crate::interpose::memory::{PAGE_SIZE, Page, Staging};
use crate::pool::{Epoch, Generation, VmId};
use bytes::Bytes;
use interconnect::codec::{self, DiskOp, EncodePolicy, EncodeStats, LinkFacts};
use interconnect::epoch::{
    AuditSums, EncodePool, EpochMeta, EpochWriter, WriteError, ingress_frames,
};
use interconnect::frame::Frame;
use interconnect::link::{EpochLane, SendError};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};

/// Most bytes of a disk read at once.
pub const DISK_CHUNK_BYTES: u64 = 1 << 20;

/// Packets in one frame of egress.
const EGRESS_BATCH: usize = 64;

/// One epoch to send.
pub struct EpochJob {
    /// Which.
    pub epoch: Epoch,
    /// Its dirty pages.
    pub staging: Staging,
    /// The guest's disk writes, one list per disk.
    pub writes: Vec<Vec<DiskWrite>>,
    /// Only with the first epoch: ranges of each disk's image that seeding left to it.
    pub base: Vec<Vec<Range<u64>>>,
    /// The device state.
    pub device_state: Bytes,
    /// Packets the gate holds of it, for the standby to let out if this side cannot.
    pub egress: Vec<Bytes>,
    /// What the primary says of it; the audit's sums are filled in here.
    pub meta: EpochMeta,
}

/// What became of an [`EpochJob`].
pub struct SentEpoch {
    /// Which.
    pub epoch: Epoch,
    /// The attempt.
    pub generation: Generation,
    /// Its staging, empty again.
    pub staging: Staging,
    /// Bytes of its frames, or why it was not sent.
    pub result: Result<u64, String>,
    /// What encoding it took and gave.
    pub stats: EncodeStats,
}

/// Sums over everything sent so far; None where an audit is not wanted or not possible.
pub struct Audit {
    /// Of all memory.
    pub memory: AuditTable,
    /// Of each disk; None after a write that does not cover whole blocks.
    pub disks: Vec<Option<AuditTable>>,
}

impl Audit {
    /// Empty tables for a guest of `pages` and disks of these sizes in bytes.
    #[must_use]
    pub fn new(pages: u64, disks: &[Arc<Disk>]) -> Self {
        Self {
            memory: AuditTable::new(pages),
            disks: disks
                .iter()
                .map(|d| Some(AuditTable::new(d.len().div_ceil(PAGE_SIZE as u64))))
                .collect(),
        }
    }

    /// Note what a write puts on disk `index`.
    pub fn disk_write(&mut self, index: usize, offset: u64, data: &WriteData) {
        let Some(slot) = self.disks.get_mut(index) else {
            return;
        };
        let Some(table) = slot else { return };
        let unit = PAGE_SIZE as u64;
        let length = match data {
            WriteData::Data(bytes) => bytes.len() as u64,
            WriteData::Zero(n) | WriteData::Trim(n) => *n,
        };
        if !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
            *slot = None;
            return;
        }
        for i in 0..length / unit {
            match data {
                WriteData::Data(bytes) => {
                    let at = usize::try_from(i)
                        .unwrap_or(usize::MAX)
                        .saturating_mul(PAGE_SIZE);
                    if let Some(block) = bytes.get(at..).and_then(|b| b.first_chunk::<PAGE_SIZE>())
                    {
                        table.update(offset / unit + i, block);
                    }
                }
                WriteData::Zero(_) | WriteData::Trim(_) => table.update_zero(offset / unit + i),
            }
        }
    }

    fn sums(&self) -> Option<AuditSums> {
        let disks: Option<Vec<u64>> = self
            .disks
            .iter()
            .map(|t| t.as_ref().map(AuditTable::sum))
            .collect();
        Some(AuditSums {
            memory: self.memory.sum(),
            disks: disks?,
        })
    }
}

/// The way to a sender.
pub struct SenderHandle {
    jobs: SyncSender<EpochJob>,
}

impl SenderHandle {
    /// Queue an epoch; gives it back if the sender has ended.
    pub fn send(&self, job: EpochJob) -> Result<(), Box<EpochJob>> {
        self.jobs.send(job).map_err(|e| Box::new(e.0))
    }
}

/// What a sender works with.
pub struct SenderConfig {
    /// The VM.
    pub vm: VmId,
    /// The attempt.
    pub generation: Generation,
    /// How pages are packed.
    pub policy: EncodePolicy,
    /// The threads that do.
    pub pool: EncodePool,
    /// Its lane.
    pub lane: Arc<EpochLane>,
    /// The VM's disks.
    pub disks: Vec<Arc<Disk>>,
    /// Tables that cover the seeding, if an audit is wanted.
    pub audit: Option<Audit>,
    /// Where the outcome goes.
    pub inbox: Sender<WorkerEvent>,
}

/// Start a sender.
///
/// # Errors
/// If no thread can be started.
pub fn start(config: SenderConfig) -> std::io::Result<SenderHandle> {
    // One epoch is under way and one may be handed over ahead (mirror::MAX_IN_FLIGHT).
    let (jobs, queue) = sync_channel(crate::mirror::MAX_IN_FLIGHT);
    std::thread::Builder::new()
        .name("epoch-send".into())
        .spawn(move || serve(config, &queue))?;
    Ok(SenderHandle { jobs })
}

fn serve(mut config: SenderConfig, queue: &Receiver<EpochJob>) {
    let mut writer = EpochWriter::with_pool(
        config.vm,
        config.generation,
        config.policy,
        config.pool.clone(),
    );
    while let Ok(mut job) = queue.recv() {
        let result = send(&mut config, &mut writer, &mut job);
        let mut staging = job.staging;
        staging.clear();
        let done = SentEpoch {
            epoch: job.epoch,
            generation: config.generation,
            staging,
            result,
            stats: *writer.stats(),
        };
        if config.inbox.send(WorkerEvent::Sent(done)).is_err() {
            return;
        }
    }
}

fn send(
    config: &mut SenderConfig,
    writer: &mut EpochWriter,
    job: &mut EpochJob,
) -> Result<u64, String> {
    let mut bytes = 0;
    let lane = Arc::clone(&config.lane);
    let mut put = |frame: Frame| -> Result<(), SendError> {
        bytes += frame.wire_bytes() as u64;
        lane.send_blocking(frame)
    };
    let words = |e: WriteError<SendError>| e.to_string();
    let epoch = job.epoch;
    tracing::debug!(%epoch, pages = job.staging.len_pages(), queued = lane.queued_bytes(), "epoch to the lane");
    writer.begin(epoch, link_facts(&lane));
    writer.pages(job.staging.iter(), &mut put).map_err(words)?;
    for (index, ranges) in job.base.iter().enumerate() {
        for chunk in ranges.iter().flat_map(|r| chunks(r.clone())) {
            let offset = chunk.start;
            let data = config.disks[index]
                .read_base(chunk)
                .map_err(|e| e.to_string())?;
            let write = DiskWrite {
                offset,
                data: WriteData::Data(data),
            };
            if let Some(audit) = &mut config.audit {
                audit.disk_write(index, write.offset, &write.data);
            }
            writer
                .disk(&[to_wire(index, write)], &mut put)
                .map_err(words)?;
        }
    }
    for (index, writes) in std::mem::take(&mut job.writes).into_iter().enumerate() {
        if let Some(audit) = &mut config.audit {
            for write in &writes {
                audit.disk_write(index, write.offset, &write.data);
            }
        }
        let writes: Vec<codec::DiskWrite> = writes.into_iter().map(|w| to_wire(index, w)).collect();
        if !writes.is_empty() {
            writer.disk(&writes, &mut put).map_err(words)?;
        }
    }
    for batch in job.egress.chunks(EGRESS_BATCH) {
        let frames = ingress_frames(config.vm, config.generation, job.epoch, batch)
            .map_err(|e| e.to_string())?;
        for frame in frames {
            put(frame).map_err(|e| e.to_string())?;
        }
    }
    writer
        .device_state(job.device_state.clone(), &mut put)
        .map_err(words)?;
    if let Some(audit) = &mut config.audit {
        for (index, page) in job.staging.iter() {
            audit.memory.update(index, page);
        }
        job.meta.audit = audit.sums();
    }
    super::closing::wait_for_room(&lane);
    // The lease counts from here: the standby cannot acknowledge before it has the end.
    let closing = WorkerEvent::Closing {
        generation: config.generation,
        epoch,
        at: now(),
    };
    config
        .inbox
        .send(closing)
        .map_err(|_| "the worker has ended".to_owned())?;
    writer.finish(&job.meta, &mut put).map_err(words)?;
    let stats = writer.stats();
    tracing::debug!(
        %epoch,
        bytes,
        queued = lane.queued_bytes(),
        codec = stats.codec.word(),
        why = stats.why.words(),
        zero = stats.zero,
        unchanged = stats.unchanged,
        patched = stats.patched,
        packed = stats.packed,
        raw = stats.raw,
        encode_us = stats.encode_ns() / 1000,
        "epoch in the lane"
    );
    Ok(bytes)
}

/// What an encoder may know of the link.
pub fn link_facts(lane: &EpochLane) -> LinkFacts {
    let pressure = lane.pressure();
    LinkFacts {
        bytes_per_s: pressure.capacity_bytes_per_s,
        queued_bytes: pressure.queued_bytes,
    }
}

/// `range` in pieces of at most [`DISK_CHUNK_BYTES`].
pub fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    (range.start..end)
        .step_by(usize::try_from(DISK_CHUNK_BYTES).unwrap_or(usize::MAX))
        .map(move |start| start..(start + DISK_CHUNK_BYTES).min(end))
}

/// A disk write as it travels.
pub fn to_wire(disk: usize, write: DiskWrite) -> codec::DiskWrite {
    codec::DiskWrite {
        disk: u16::try_from(disk).unwrap_or(u16::MAX),
        offset: write.offset,
        op: match write.data {
            WriteData::Data(bytes) => DiskOp::Data(bytes),
            WriteData::Zero(n) => DiskOp::Zero { length: n },
            WriteData::Trim(n) => DiskOp::Trim { length: n },
        },
    }
}

/// A disk write as it came: disk index and write.
pub fn from_wire(write: codec::DiskWrite) -> (usize, DiskWrite) {
    let data = match write.op {
        DiskOp::Data(bytes) => WriteData::Data(bytes),
        DiskOp::Zero { length } => WriteData::Zero(length),
        DiskOp::Trim { length } => WriteData::Trim(length),
    };
    (
        usize::from(write.disk),
        DiskWrite {
            offset: write.offset,
            data,
        },
    )
}

/// One guest page's worth of zeros.
pub const ZERO_PAGE: Page = [0; PAGE_SIZE];

#[cfg(test)]
mod tests {
    use super::{DISK_CHUNK_BYTES, chunks};

    #[test]
    fn chunks_cover_the_range_once() {
        let range = 4096..DISK_CHUNK_BYTES * 2 + 512;
        let parts: Vec<_> = chunks(range.clone()).collect();
        assert_eq!(parts.first().map(|p| p.start), Some(range.start));
        assert_eq!(parts.last().map(|p| p.end), Some(range.end));
        assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
        assert!(parts.iter().all(|p| p.end - p.start <= DISK_CHUNK_BYTES));
    }
}
