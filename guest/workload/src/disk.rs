//! The guest's disk, read and written past the page cache.

use pollux_workload::checksum::BLOCK_BYTES;
use pollux_workload::layout::{GROUP_RECORDS_MAX, Layout};
use pollux_workload::record::ReadBlocks;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Bytes of a [`Buffer`]: one whole group of records.
#[expect(clippy::cast_possible_truncation, reason = "64 blocks")]
pub const BUFFER_BYTES: usize = GROUP_RECORDS_MAX as usize * BLOCK_BYTES;

/// Memory fit for `O_DIRECT`: aligned to a page, which is more than any block size asks.
#[repr(C, align(4096))]
pub struct Buffer(pub [u8; BUFFER_BYTES]);

impl Buffer {
    /// A zeroed buffer.
    pub fn new() -> Box<Self> {
        Box::new(Self([0; BUFFER_BYTES]))
    }

    /// Its first block.
    pub fn block(&mut self) -> &mut [u8; BLOCK_BYTES] {
        &mut self.0.as_chunks_mut().0[0]
    }
}

/// The disk and where things lie on it.
pub struct Disk {
    file: File,
    /// Places of records and blocks.
    pub layout: Layout,
}

impl Disk {
    /// Open a block device (or, in tests, a file).
    ///
    /// # Errors
    /// No such device, no `O_DIRECT`, or too small.
    pub fn open(path: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        let layout = Layout::for_disk(bytes).map_err(io::Error::other)?;
        Ok(Self { file, layout })
    }

    /// Write whole blocks from a [`Buffer`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Flush: what was written is on the disk when this returns.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl ReadBlocks for Disk {
    fn read_blocks(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}
