//! skeleton
use super::{CodecError, CompressMode};
use bytes::{Bytes, BytesMut};
/// What a disk write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskOp {
    /// Write these bytes.
    Data(Bytes),
    /// Write this many zero bytes.
    Zero {
        /// Bytes.
        length: u64,
    },
    /// Discard this many bytes; they may read as anything afterwards.
    Trim {
        /// Bytes.
        length: u64,
    },
}
/// One write of the guest, in the order it was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskWrite {
    /// Index of the disk in the VM's spec.
    pub disk: u16,
    /// First byte on the disk.
    pub offset: u64,
    /// What is done there.
    pub op: DiskOp,
}
impl DiskWrite {
    /// Bytes of the disk it touches.
    #[must_use]
    pub fn length(&self) -> u64 {
        match &self.op {
            DiskOp::Data(data) => data.len() as u64,
            DiskOp::Zero { length } | DiskOp::Trim { length } => *length,
        }
    }
}
/// Encode writes from the front of `writes` into one batch until it is full;
/// returns how many were taken (at least one). A write whose data exceeds
/// `DISK_WRITE_BYTES_MAX` must be split before: [`split_write`].
///
/// # Errors
/// [`CodecError::TooBig`].
pub fn encode_disk_writes(
    _writes: &[DiskWrite],
    _mode: CompressMode,
    _out: &mut BytesMut,
) -> Result<usize, CodecError> {
    unimplemented!()
}
/// Decode a batch; `disk_bytes[i]` is the size of disk i.
///
/// # Errors
/// [`CodecError`].
pub fn decode_disk_writes(
    _batch: &Bytes,
    _disk_bytes: &[u64],
) -> Result<Vec<DiskWrite>, CodecError> {
    unimplemented!()
}
