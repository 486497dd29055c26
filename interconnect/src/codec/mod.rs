//! What the payloads of frames look like: batches of pages, of disk writes, of
//! packets, and the delta of device states. Pure but for the buffers' lock.
//!
//! The decoders must never trust a length, an index or a count from the wire:
//! each is checked against a cap and against the guest before anything is
//! allocated or handed up. One file owns each layout.

pub mod choose;
pub mod delta;
pub mod disk;
pub mod encoder;
pub mod packets;
pub mod pages;
pub mod patch;
pub mod policy;

mod base;
pub(crate) mod buffers;
pub(crate) mod cursor;
pub mod pack;
#[cfg(test)]
pub(crate) mod tests;

pub use delta::{DEVICE_STATE_BYTES_MAX, decode_delta, encode_delta};
pub use disk::{DiskBatch, DiskEncoder, DiskOp, DiskWrite, decode_disk_writes};
pub use encoder::{Batch, BatchStats, PageEncoder};
pub use packets::{decode_packets, encode_packets};
pub use pages::{DecodeBuffers, PAGE_BYTES, Page, PageBatch, PageContent, decode_pages};
pub use patch::PagePatch;
pub use policy::{Codec, CodecChoice, CodecVersion, EncodePolicy, EncodeStats, LinkFacts, Why};

/// A payload that is not what its frame says, or content that cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The bytes end early, or go on too long.
    #[error(
        "{what}: {have} bytes where {need} were needed: the partner sent a malformed batch, drop the session"
    )]
    Length {
        /// Which part.
        what: &'static str,
        /// Bytes there.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// A field has a value its layout does not know.
    #[error("{what} has the unknown value {value}: run the same pollux version on both hosts")]
    Unknown {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A count or size exceeds its cap.
    #[error("{what} is {value}, the limit is {max}")]
    TooBig {
        /// Which count or size.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Its cap.
        max: u64,
    },
    /// A page index beyond the guest's RAM.
    #[error(
        "page {index} is outside the guest's RAM of {guest_pages} pages: primary and standby disagree on the VM's memory"
    )]
    PageIndex {
        /// The index.
        index: u64,
        /// Pages the guest has.
        guest_pages: u64,
    },
    /// A disk range beyond the disk, or a disk the VM does not have.
    #[error(
        "disk {disk}, bytes {offset}..+{length} is outside the VM's disks: primary and standby disagree on the disks or their sizes"
    )]
    DiskRange {
        /// Index of the disk in the VM's spec.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The compressed part does not decompress to what it should.
    #[error("{what} does not decompress: {reason}")]
    Compression {
        /// Which part.
        what: &'static str,
        /// What the decompressor said.
        reason: &'static str,
    },
    /// A page patch whose outcome is not the sender's page: its base is another one.
    #[error(
        "a page patch gives a page of XXH3 {found:016x}, expected {expected:016x}: the standby's memory is not what the primary takes it for, drop the standby and seed anew"
    )]
    PatchBase {
        /// The sender's page.
        expected: u64,
        /// What came out.
        found: u64,
    },
    /// A delta against a state this side does not hold.
    #[error(
        "device state is a delta against a state of CRC {wanted:08x}, this side holds {have}: ask for a full state"
    )]
    DeltaBase {
        /// CRC the sender's base has.
        wanted: u32,
        /// What this side holds.
        have: String,
    },
    /// The decoded state is not what the sender encoded.
    #[error(
        "device state has CRC {found:08x} after decoding, expected {expected:08x}: drop the epoch"
    )]
    StateCrc {
        /// The sender's CRC.
        expected: u32,
        /// The CRC of what came out.
        found: u32,
    },
}
