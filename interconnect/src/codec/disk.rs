//! Batches of disk writes, in the order the guest made them.
//!
//! All integers are little-endian:
//!
//! ```text
//! u16  count          1 ..= BATCH_WRITES_MAX
//! u8   body encoding  0 invalid, 1 plain, 2 zstd, 3 lz4 (since protocol version 2)
//! u8   reserved, zero
//! u32  body bytes     of the data when plain, at most BATCH_BODY_BYTES_MAX
//! then count times
//!   u16  disk         index in the VM's spec
//!   u8   operation    0 invalid, 1 data, 2 zero, 3 trim
//!   u8   reserved, zero
//!   u64  offset       first byte on the disk
//!   u64  length       bytes
//! ...  body           the data, one write after the other
//! ```

use super::buffers::Buffers;
use super::cursor::{Cursor, cap};
use super::pack::{Packing, looks_compressible, pack, unpack};
use super::{Codec, CodecError};
use bytes::{BufMut, Bytes};

/// Most writes in one batch: with the smallest writes (512 bytes) half a MiB.
pub const BATCH_WRITES_MAX: usize = 1024;
/// Most data in one batch, in bytes; as a page batch, so that sending overlaps encoding.
pub const BATCH_BODY_BYTES_MAX: usize = 1 << 20;
/// Most data of one write, in bytes; NBD allows 32 MiB, so writers split: [`split_write`].
pub const DISK_WRITE_BYTES_MAX: usize = BATCH_BODY_BYTES_MAX;

const HEAD_BYTES: usize = 8;
const ENTRY_BYTES: usize = 20;
const OP_DATA: u8 = 1;
const OP_ZERO: u8 = 2;
const OP_TRIM: u8 = 3;

const _: () = assert!(
    HEAD_BYTES + BATCH_WRITES_MAX * ENTRY_BYTES + BATCH_BODY_BYTES_MAX
        <= crate::frame::PAYLOAD_BYTES_MAX
);
const _: () = assert!(BATCH_WRITES_MAX <= u16::MAX as usize);

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

    fn data(&self) -> &[u8] {
        match &self.op {
            DiskOp::Data(data) => data,
            DiskOp::Zero { .. } | DiskOp::Trim { .. } => &[],
        }
    }
}

/// The same write in pieces that fit a batch each (shares the data, no copy).
pub fn split_write(write: &DiskWrite) -> impl Iterator<Item = DiskWrite> {
    let pieces = match &write.op {
        DiskOp::Data(data) => data.len().div_ceil(DISK_WRITE_BYTES_MAX).max(1),
        DiskOp::Zero { .. } | DiskOp::Trim { .. } => 1,
    };
    (0..pieces).map(move |piece| match &write.op {
        DiskOp::Data(data) => {
            let start = piece * DISK_WRITE_BYTES_MAX;
            let end = data.len().min(start + DISK_WRITE_BYTES_MAX);
            DiskWrite {
                disk: write.disk,
                offset: write.offset.saturating_add(start as u64),
                op: DiskOp::Data(data.slice(start..end)),
            }
        }
        DiskOp::Zero { .. } | DiskOp::Trim { .. } => write.clone(),
    })
}

/// A batch of disk writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskBatch {
    /// Writes in it, at least one.
    pub writes: usize,
    /// Bytes of data, before packing.
    pub data_bytes: u64,
    /// For a frame.
    pub payload: Bytes,
}

/// Encoder of disk batches; holds its buffers, so keep it.
#[derive(Debug, Default)]
pub struct DiskEncoder {
    payloads: Buffers<Vec<u8>>,
    body: Vec<u8>,
    packed: Vec<u8>,
}

impl DiskEncoder {
    /// Encode writes from the front of `writes` into one batch until it is full; `None` if
    /// there are none. Give [`Codec::Lz4`] only for a partner of [`super::CodecVersion::V2`].
    ///
    /// # Errors
    /// [`CodecError::TooBig`] for a write with more than [`DISK_WRITE_BYTES_MAX`] of
    /// data ([`split_write`] it before).
    pub fn encode(
        &mut self,
        writes: &[DiskWrite],
        codec: Codec,
    ) -> Result<Option<DiskBatch>, CodecError> {
        let mut taken = 0;
        let mut body_bytes = 0;
        for write in writes.iter().take(BATCH_WRITES_MAX) {
            let bytes = write.data().len();
            cap("data of one disk write", bytes, DISK_WRITE_BYTES_MAX)?;
            if body_bytes + bytes > BATCH_BODY_BYTES_MAX {
                break;
            }
            body_bytes += bytes;
            taken += 1;
        }
        if taken == 0 {
            return Ok(None);
        }
        let writes = &writes[..taken];
        let packed = if codec == Codec::Raw {
            None
        } else {
            self.body.clear();
            for write in writes {
                self.body.extend_from_slice(write.data());
            }
            Some(&self.body)
                .filter(|body| looks_compressible(body))
                .and_then(|body| pack(codec, body, &mut self.packed))
                .and_then(|bytes| self.packed.get(..bytes))
        };
        let packing = packed.map_or(Packing::Plain, |_| Packing::of(codec));
        let mut out = self.payloads.take();
        out.clear();
        out.reserve(HEAD_BYTES + taken * ENTRY_BYTES + packed.map_or(body_bytes, <[u8]>::len));
        out.put_u16_le(u16::try_from(taken).unwrap_or(u16::MAX));
        out.put_u8(packing as u8);
        out.put_u8(0);
        out.put_u32_le(u32::try_from(body_bytes).unwrap_or(u32::MAX));
        for write in writes {
            out.put_u16_le(write.disk);
            out.put_u8(match write.op {
                DiskOp::Data(_) => OP_DATA,
                DiskOp::Zero { .. } => OP_ZERO,
                DiskOp::Trim { .. } => OP_TRIM,
            });
            out.put_u8(0);
            out.put_u64_le(write.offset);
            out.put_u64_le(write.length());
        }
        match packed {
            Some(packed) => out.put_slice(packed),
            None => writes.iter().for_each(|write| out.put_slice(write.data())),
        }
        Ok(Some(DiskBatch {
            writes: taken,
            data_bytes: body_bytes as u64,
            payload: out.freeze(),
        }))
    }
}

/// Decode a batch; `disk_bytes[i]` is the size of disk i. Plain data stays where
/// it was received (slices of `batch`).
///
/// # Errors
/// [`CodecError`]; nothing of the batch may be used then.
pub fn decode_disk_writes(batch: &Bytes, disk_bytes: &[u64]) -> Result<Vec<DiskWrite>, CodecError> {
    let mut cursor = Cursor::new(batch, "disk batch");
    let count = usize::from(cursor.u16()?);
    cap("writes in a batch", count, BATCH_WRITES_MAX)?;
    let encoding = cursor.u8()?;
    let reserved = cursor.u8()?;
    cursor.reserved(u64::from(reserved))?;
    let body_bytes = cursor.u32()? as usize;
    cap("data of a disk batch", body_bytes, BATCH_BODY_BYTES_MAX)?;
    let mut table = Cursor::new(cursor.take(count * ENTRY_BYTES)?, "write table of a batch");
    let start = batch.len() - cursor.remaining();
    let body = match Packing::from_wire("body encoding", encoding)? {
        Packing::Plain => {
            cursor.take(body_bytes)?;
            cursor.end()?;
            batch.slice(start..)
        }
        packing => {
            let packed = cursor.take(cursor.remaining())?;
            let mut body = Vec::new();
            unpack(
                packing,
                packed,
                body_bytes,
                "data of a disk batch",
                &mut body,
            )?;
            Bytes::from(body)
        }
    };
    let mut writes = Vec::with_capacity(count);
    let mut used = 0;
    for _ in 0..count {
        let disk = table.u16()?;
        let op = table.u8()?;
        let reserved = table.u8()?;
        table.reserved(u64::from(reserved))?;
        let offset = table.u64()?;
        let length = table.u64()?;
        let inside = disk_bytes
            .get(usize::from(disk))
            .is_some_and(|size| offset.checked_add(length).is_some_and(|end| end <= *size));
        if !inside {
            return Err(CodecError::DiskRange {
                disk,
                offset,
                length,
            });
        }
        let op = match op {
            OP_DATA => {
                let left = body.len() - used;
                let Some(bytes) = usize::try_from(length).ok().filter(|bytes| *bytes <= left)
                else {
                    return Err(CodecError::Length {
                        what: "data of a disk write",
                        have: left as u64,
                        need: length,
                    });
                };
                used += bytes;
                DiskOp::Data(body.slice(used - bytes..used))
            }
            OP_ZERO => DiskOp::Zero { length },
            OP_TRIM => DiskOp::Trim { length },
            value => {
                return Err(CodecError::Unknown {
                    what: "disk operation",
                    value: u64::from(value),
                });
            }
        };
        writes.push(DiskWrite { disk, offset, op });
    }
    if used != body.len() {
        return Err(CodecError::Length {
            what: "data of a disk batch",
            have: body.len() as u64,
            need: used as u64,
        });
    }
    Ok(writes)
}
