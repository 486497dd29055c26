//! What ends an epoch on the wire.
//!
//! All integers are little-endian:
//!
//! ```text
//! u16  flags         bit 0: the guest flushed; bit 1: audit sums follow
//! u16  disk sums     number of them, 0 without audit
//! u32  frames        of this epoch before this one, without ingress
//! u64  pages         entries in all page batches
//! u64  disk writes   entries in all disk batches
//! u64  guest pages   size of the guest's RAM
//! u64  clock ns      the primary's CLOCK_MONOTONIC at the cut
//! 32   digest        SHA-256 over the headers of those frames, in order
//! then with bit 1:
//!   u64  memory sum
//!   u64  × disk sums
//! ```
//!
//! A header holds the length and the CRC of its payload, so the digest stands for
//! all of the epoch without a second run over its content.

use crate::codec::CodecError;
use crate::codec::cursor::{Cursor, cap};
use bytes::{BufMut, Bytes, BytesMut};

/// Most disks of one VM that an epoch end can name.
pub const DISKS_MAX: usize = 256;
const FIXED_BYTES: usize = 2 + 2 + 4 + 8 + 8 + 8 + 8 + 32;
const _: () = assert!(FIXED_BYTES + 8 + DISKS_MAX * 8 <= crate::frame::EPOCH_END_BYTES_MAX);

const FLAG_FLUSH: u16 = 1;
const FLAG_AUDIT: u16 = 2;

/// Sums over everything, for the audit that the standby equals the primary.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AuditSums {
    /// Over the guest's RAM.
    pub memory: u64,
    /// Over each disk, in the order of the VM's spec; at most [`DISKS_MAX`].
    pub disks: Vec<u64>,
}

/// What the primary says about an epoch as it ends.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EpochMeta {
    /// The guest flushed a disk in this epoch: under `durability = "disk"` it is
    /// acknowledged only after its writes are durable.
    pub flush: bool,
    /// The primary's `CLOCK_MONOTONIC` at the cut, in ns.
    pub clock_ns: u64,
    /// Size of the guest's RAM, in pages.
    pub guest_pages: u64,
    /// Sums at the cut, when the audit is on.
    pub audit: Option<AuditSums>,
}

/// Counts and digest of an epoch: the writer and the assembler each keep their own
/// and they must be equal.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Totals {
    pub(super) frames: u32,
    pub(super) pages: u64,
    pub(super) disk_writes: u64,
    pub(super) digest: [u8; 32],
}

/// Payload of an `EpochEnd` frame.
pub(super) fn encode_end(totals: &Totals, meta: &EpochMeta) -> Result<Bytes, CodecError> {
    let sums = meta.audit.as_ref().map_or(&[][..], |audit| &audit.disks);
    cap("disks in the audit sums", sums.len(), DISKS_MAX)?;
    let mut out = BytesMut::with_capacity(FIXED_BYTES + 8 + sums.len() * 8);
    let flags =
        if meta.flush { FLAG_FLUSH } else { 0 } | if meta.audit.is_some() { FLAG_AUDIT } else { 0 };
    out.put_u16_le(flags);
    out.put_u16_le(u16::try_from(sums.len()).unwrap_or(u16::MAX));
    out.put_u32_le(totals.frames);
    out.put_u64_le(totals.pages);
    out.put_u64_le(totals.disk_writes);
    out.put_u64_le(meta.guest_pages);
    out.put_u64_le(meta.clock_ns);
    out.put_slice(&totals.digest);
    if let Some(audit) = &meta.audit {
        out.put_u64_le(audit.memory);
        for sum in &audit.disks {
            out.put_u64_le(*sum);
        }
    }
    Ok(out.freeze())
}

/// Undo [`encode_end`].
pub(super) fn decode_end(payload: &[u8]) -> Result<(Totals, EpochMeta), CodecError> {
    let mut cursor = Cursor::new(payload, "epoch end");
    let flags = cursor.u16()?;
    if flags & !(FLAG_FLUSH | FLAG_AUDIT) != 0 {
        return Err(CodecError::Unknown {
            what: "flags of an epoch end",
            value: u64::from(flags),
        });
    }
    let sums = usize::from(cursor.u16()?);
    cap("disks in the audit sums", sums, DISKS_MAX)?;
    let frames = cursor.u32()?;
    let pages = cursor.u64()?;
    let disk_writes = cursor.u64()?;
    let guest_pages = cursor.u64()?;
    let clock_ns = cursor.u64()?;
    let mut digest = [0; 32];
    digest.copy_from_slice(cursor.take(32)?);
    let audit = if flags & FLAG_AUDIT != 0 {
        let memory = cursor.u64()?;
        let disks = (0..sums).map(|_| cursor.u64()).collect::<Result<_, _>>()?;
        Some(AuditSums { memory, disks })
    } else {
        None
    };
    cursor.end()?;
    let meta = EpochMeta {
        flush: flags & FLAG_FLUSH != 0,
        clock_ns,
        guest_pages,
        audit,
    };
    Ok((
        Totals {
            frames,
            pages,
            disk_writes,
            digest,
        },
        meta,
    ))
}
