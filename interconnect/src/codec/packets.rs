//! skeleton
use super::CodecError;
use bytes::{Bytes, BytesMut};
/// Encode packets from the front of `packets` until the batch is full; returns how many were taken.
///
/// # Errors
/// [`CodecError::TooBig`].
pub fn encode_packets(_packets: &[Bytes], _out: &mut BytesMut) -> Result<usize, CodecError> {
    unimplemented!()
}
/// Decode a batch of packets (slices of `batch`, no copy).
///
/// # Errors
/// [`CodecError`].
pub fn decode_packets(_batch: &Bytes) -> Result<Vec<Bytes>, CodecError> {
    unimplemented!()
}
