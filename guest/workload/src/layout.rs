//! Where things lie on the guest's disk.
//!
//! The layout follows from the size of the disk alone, so that guest and host agree without
//! a superblock: a disk image with nothing on it is a valid, empty one.

use crate::checksum::BLOCK_BYTES;
use std::fmt;
use std::ops::Range;

/// Where the boot block lies (see [`crate::boot`]), in bytes.
pub const BOOT_BLOCK_OFFSET: u64 = 0;

/// Where the counter's records begin, in bytes. 1 MiB, so that both areas are aligned for
/// every image format and NBD block size.
pub const RECORDS_OFFSET: u64 = 1 << 20;

/// Smallest disk with a layout, in bytes: below it the areas are too small to tell anything.
pub const DISK_BYTES_MIN: u64 = 8 << 20;

/// Most records written in one go (one write, one flush). Recovery relies on it: no more than
/// this many slots beyond the last flushed record can be in doubt after a crash.
pub const GROUP_RECORDS_MAX: u64 = 64;

const _: () =
    assert!((DISK_BYTES_MIN - RECORDS_OFFSET) / 2 / BLOCK_BYTES as u64 > 4 * GROUP_RECORDS_MAX);

/// A disk too small for the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskTooSmall {
    /// Size of the disk, in bytes.
    pub bytes: u64,
}

impl fmt::Display for DiskTooSmall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the workload's disk has {} bytes and needs {DISK_BYTES_MIN} or more",
            self.bytes
        )
    }
}

impl std::error::Error for DiskTooSmall {}

/// The two areas of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The counter's records, in bytes from the start of the disk: a ring of slots of
    /// [`BLOCK_BYTES`]; record number n lies in slot (n - 1) modulo [`Layout::record_slots`].
    pub records: Range<u64>,
    /// The disk worker's blocks, in bytes from the start of the disk.
    pub blocks: Range<u64>,
}

impl Layout {
    /// The layout of a disk of `bytes` bytes: half of what follows [`RECORDS_OFFSET`] for the
    /// records, the rest for the disk worker.
    ///
    /// # Errors
    /// [`DiskTooSmall`] below [`DISK_BYTES_MIN`].
    pub fn for_disk(bytes: u64) -> Result<Self, DiskTooSmall> {
        if bytes < DISK_BYTES_MIN {
            return Err(DiskTooSmall { bytes });
        }
        let block = BLOCK_BYTES as u64;
        let records_end = RECORDS_OFFSET + (bytes - RECORDS_OFFSET) / 2 / block * block;
        let end = bytes / block * block;
        Ok(Self {
            records: RECORDS_OFFSET..records_end,
            blocks: records_end..end,
        })
    }

    /// How many records fit before the ring wraps.
    #[must_use]
    pub fn record_slots(&self) -> u64 {
        (self.records.end - self.records.start) / BLOCK_BYTES as u64
    }

    /// Where record `number` (from 1) lies, in bytes from the start of the disk.
    #[must_use]
    pub fn record_offset(&self, number: u64) -> u64 {
        self.records.start + number.saturating_sub(1) % self.record_slots() * BLOCK_BYTES as u64
    }

    /// How many blocks the disk worker has.
    #[must_use]
    pub fn block_slots(&self) -> u64 {
        (self.blocks.end - self.blocks.start) / BLOCK_BYTES as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_aligned_apart_and_within_the_disk() {
        for bytes in [
            DISK_BYTES_MIN,
            DISK_BYTES_MIN + 4095,
            256 << 20,
            (1 << 40) + 512,
        ] {
            let layout = Layout::for_disk(bytes).unwrap();
            assert!(layout.records.end <= layout.blocks.start && layout.blocks.end <= bytes);
            for edge in [layout.records.end, layout.blocks.start, layout.blocks.end] {
                assert_eq!(edge % BLOCK_BYTES as u64, 0);
            }
            assert!(layout.block_slots() > 0);
            let slots = layout.record_slots();
            assert_eq!(layout.record_offset(1), RECORDS_OFFSET);
            assert_eq!(
                layout.record_offset(slots + 1),
                RECORDS_OFFSET,
                "the ring wraps"
            );
            assert_eq!(
                layout.record_offset(slots),
                layout.records.end - BLOCK_BYTES as u64
            );
        }
    }

    #[test]
    fn a_small_disk_is_refused_with_its_size() {
        let error = Layout::for_disk(4096).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
    }
}
