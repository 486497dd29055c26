//! A whole epoch, ready to be applied.

use super::EpochMeta;
use crate::codec::pages::PageBatch;
use crate::codec::{DiskWrite, PageContent};
use crate::ids::{Epoch, Generation, VmId};
use bytes::Bytes;

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
    pub(super) batches: Vec<PageBatch>,
}

impl ReceivedEpoch {
    /// The pages (page index, content) in the order they were sent. An index may
    /// come more than once: the last one holds.
    pub fn pages(&self) -> impl Iterator<Item = (u64, PageContent<'_>)> {
        self.batches.iter().flat_map(PageBatch::pages)
    }

    /// Number of entries [`ReceivedEpoch::pages`] yields.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.batches.iter().map(|batch| batch.len() as u64).sum()
    }
}
