//! A whole epoch, ready to be applied.

use super::EpochMeta;
use crate::codec::pages::PageBatch;
use crate::codec::{DiskWrite, PageContent};
use crate::ids::{Epoch, Generation, VmId};
use bytes::Bytes;

/// What decoding an epoch took, while it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DecodeStats {
    /// Time spent on its frames: CRC, digest, decompression, checks; in ns.
    pub decode_ns: u64,
    /// Payload bytes of its frames.
    pub wire_bytes: u64,
}

/// A whole, verified epoch: memory, disk and devices of one checkpoint. Every page
/// index and disk range in it lies within the guest.
#[derive(Debug)]
pub struct ReceivedEpoch {
    /// The VM.
    pub vm: VmId,
    /// Its generation.
    pub generation: Generation,
    /// The epoch.
    pub epoch: Epoch,
    /// The guest's disk writes, in order.
    pub disk: Vec<DiskWrite>,
    /// The full device state (any delta is undone).
    pub device_state: Bytes,
    /// Packets delivered to the guest during this epoch, as far as they came.
    pub ingress: Vec<Bytes>,
    /// What the primary says about it.
    pub meta: EpochMeta,
    /// What decoding it took.
    pub decode: DecodeStats,
    pub(super) batches: Vec<PageBatch>,
}

impl ReceivedEpoch {
    /// The pages (page index, content) in the order they were sent. An index may
    /// come more than once. They must be applied in this order, to the RAM that all
    /// epochs before this one were applied to: a page may be a
    /// [patch](PageContent::Patch) on what it is by then. A patch that is refused means
    /// that this was not so, and that the standby is lost.
    pub fn pages(&self) -> impl Iterator<Item = (u64, PageContent<'_>)> {
        self.batches.iter().flat_map(PageBatch::pages)
    }

    /// Number of entries [`ReceivedEpoch::pages`] yields.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.batches.iter().map(|batch| batch.len() as u64).sum()
    }
}
