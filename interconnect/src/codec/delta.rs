//! skeleton
use super::CodecError;
use bytes::Bytes;
/// Largest device state, in bytes.
pub const DEVICE_STATE_BYTES_MAX: usize = 16 << 20;
/// Encode `new` as its difference from `previous`; full if `previous` is `None`.
///
/// # Errors
/// [`CodecError::TooBig`].
pub fn encode_delta(_previous: Option<&[u8]>, _new: &[u8]) -> Result<Bytes, CodecError> {
    unimplemented!()
}
/// Undo [`encode_delta`].
///
/// # Errors
/// [`CodecError`].
pub fn decode_delta(_previous: Option<&[u8]>, _delta: &[u8]) -> Result<Bytes, CodecError> {
    unimplemented!()
}
