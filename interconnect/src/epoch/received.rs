//! skeleton
use super::EpochMeta;
use crate::codec::{DiskWrite, PageContent};
use crate::ids::{Epoch, Generation, VmId};
use bytes::Bytes;
/// A whole, verified epoch.
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
}
impl ReceivedEpoch {
    /// The pages (page index, content) in the order they were sent. An index may
    /// come more than once: the last one holds.
    pub fn pages(&self) -> impl Iterator<Item = (u64, PageContent<'_>)> {
        std::iter::empty()
    }
    /// Number of entries [`ReceivedEpoch::pages`] yields.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        unimplemented!()
    }
}
