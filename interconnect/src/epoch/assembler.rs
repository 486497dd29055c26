//! skeleton
use super::ReceivedEpoch;
use crate::codec::CodecError;
use crate::frame::{Frame, FrameKind};
use crate::ids::{Epoch, Generation, VmId};
use bytes::Bytes;
/// What one assembler may hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EpochLimits {
    /// Size of each disk in bytes, in the order of the VM's spec.
    pub disk_bytes: Vec<u64>,
    /// Most bytes of decoded content in one epoch.
    pub epoch_bytes_max: u64,
    /// Most bytes of ingress kept for epochs that are still open.
    pub ingress_bytes_max: u64,
}
/// A frame that does not fit the epoch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EpochError {
    /// [`EpochAssembler::expect`] was not called.
    #[error("no epoch is expected")]
    NotExpecting,
    /// A kind that has no place in an epoch.
    #[error("{0:?} frame in an epoch lane")]
    Kind(FrameKind),
    /// A payload that does not decode.
    #[error(transparent)]
    Codec(#[from] CodecError),
}
/// Buffers one epoch apart until it is whole.
#[derive(Debug)]
pub struct EpochAssembler {}
impl EpochAssembler {
    /// An assembler that expects nothing yet.
    #[must_use]
    pub fn new(_guest_pages: u64, _limits: EpochLimits) -> Self {
        unimplemented!()
    }
    /// From now on take only frames of `vm` in `generation`, the next whole epoch
    /// being `next`. Drops what is half received, all ingress, and (if the
    /// generation differs or `next` does not follow the last whole epoch) the
    /// base for device-state deltas.
    pub fn expect(&mut self, _vm: VmId, _generation: Generation, _next: Epoch) {
        unimplemented!()
    }
    /// Take one frame; `Some` when it made the epoch whole and everything holds.
    ///
    /// # Errors
    /// [`EpochError`]; the half-received epoch is dropped then, the expected
    /// epoch stays the same. Drop the lane.
    pub fn push(&mut self, _frame: Frame) -> Result<Option<ReceivedEpoch>, EpochError> {
        unimplemented!()
    }
    /// Drop the half-received epoch (the lane is gone). Ingress of open epochs
    /// stays: it may be replayed after a promotion.
    pub fn reset(&mut self) {
        unimplemented!()
    }
    /// The epoch that must come next.
    #[must_use]
    pub fn next_epoch(&self) -> Option<(VmId, Generation, Epoch)> {
        unimplemented!()
    }
    /// Packets delivered to the guest since the last whole epoch, oldest first:
    /// replay these after a promotion.
    #[must_use]
    pub fn open_ingress(&self) -> Vec<Bytes> {
        unimplemented!()
    }
    /// Bytes held now.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        unimplemented!()
    }
}
