//! skeleton
use super::EpochMeta;
use crate::codec::{CodecError, CompressMode, DiskWrite, Page};
use crate::frame::Frame;
use crate::ids::{Epoch, Generation, VmId};
use bytes::Bytes;
/// Why an epoch could not be written; `E` is the error of the caller's `send`.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E> {
    /// The caller's `send` failed.
    #[error("{0}")]
    Send(E),
    /// Content that cannot be encoded.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The calls came out of order.
    #[error("epoch writer: {0}")]
    Order(&'static str),
}
/// Frames for packets delivered to the guest during the running `epoch`, which may
/// be sent from any thread: they are not part of the digest.
///
/// # Errors
/// [`CodecError::TooBig`] for a packet above `PACKET_BYTES_MAX`.
pub fn ingress_frames(
    _vm: VmId,
    _generation: Generation,
    _epoch: Epoch,
    _packets: &[Bytes],
) -> Result<Vec<Frame>, CodecError> {
    unimplemented!()
}
/// Turns the content of one epoch after the other into frames; lives as long as
/// its lane (make a new one for a new lane: the first device state is then full).
pub struct EpochWriter {}
impl EpochWriter {
    /// A writer for a fresh lane.
    #[must_use]
    pub fn new(_vm: VmId, _generation: Generation, _mode: CompressMode) -> Self {
        unimplemented!()
    }
    /// Start the frames of `epoch`; drops an unfinished one.
    pub fn begin(&mut self, _epoch: Epoch) {
        unimplemented!()
    }
    /// Send pages (page index, content), batch by batch as they are encoded.
    ///
    /// # Errors
    /// [`WriteError`]; the epoch is then spoilt: `begin` anew on a new lane.
    pub fn pages<'a, E>(
        &mut self,
        _pages: impl Iterator<Item = (u64, &'a Page)>,
        _send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        unimplemented!()
    }
    /// Send disk writes, in the guest's order.
    ///
    /// # Errors
    /// As [`EpochWriter::pages`].
    pub fn disk<E>(
        &mut self,
        _writes: &[DiskWrite],
        _send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        unimplemented!()
    }
    /// Send the device state; once an epoch, after pages and disk writes.
    ///
    /// # Errors
    /// As [`EpochWriter::pages`].
    pub fn device_state<E>(
        &mut self,
        _state: Bytes,
        _send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        unimplemented!()
    }
    /// End the epoch.
    ///
    /// # Errors
    /// As [`EpochWriter::pages`].
    pub fn finish<E>(
        &mut self,
        _meta: &EpochMeta,
        _send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        unimplemented!()
    }
}
