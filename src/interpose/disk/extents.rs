//! API sketch.
use bytes::Bytes;
/// What one write puts on the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WriteData {
    /// These bytes.
    Data(Bytes),
    /// This many zero bytes, storage kept allocated.
    Zero(u64),
    /// This many bytes given up: read as zeros on both sides from now on, storage freed where the file system can.
    Trim(u64),
}
/// One write: where and what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskWrite {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Content.
    pub data: WriteData,
}
