//! The RAM file of a guest, mapped by us.
use super::Page;
use std::ops::{Deref, Range};
use std::path::Path;

/// Why the RAM file could not be made, opened or read.
#[derive(Debug, thiserror::Error)]
#[error("pending")]
pub struct ImageError;

/// A read-only mapping of a RAM file: all that a primary may have.
#[derive(Debug)]
pub struct RamView;

/// A writable mapping of a RAM file: the standby's. Reads through [`RamView`].
#[derive(Debug)]
pub struct RamImage {
    view: RamView,
}

impl RamView {
    /// Maps the file at `path`, which must be exactly `len` bytes long (a
    /// multiple of the page size).
    pub fn open(path: &Path, len: u64) -> Result<Self, ImageError> {
        let _ = (path, len);
        Err(ImageError)
    }
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        0
    }
    /// Length in pages.
    pub fn pages(&self) -> u64 {
        0
    }
    /// The content of page `index`, only while nobody writes it (guest stopped,
    /// or the standby's own image). Reading a hole of the file fills it with a
    /// page of zeros. Panics if `index` is out of range.
    pub fn page(&self, index: u64) -> &Page {
        let _ = index;
        &[0; 4096]
    }
    /// Copies page `index` as it is now; allowed while the guest runs, when the
    /// copy may be torn. Panics if `index` is out of range.
    pub fn copy_page(&self, index: u64, into: &mut Page) {
        let _ = (index, into);
    }
    /// The page ranges that have storage, in order; all others are zero.
    pub fn allocated_ranges(&self) -> Result<Vec<Range<u64>>, ImageError> {
        Err(ImageError)
    }
    /// Bytes of memory the file really uses.
    pub fn resident_bytes(&self) -> Result<u64, ImageError> {
        Err(ImageError)
    }
}

impl RamImage {
    /// Creates the RAM file: `len` bytes of hole, permissions `mode`, owned by
    /// `uid`/`gid`. Fails if the file exists.
    pub fn create(
        path: &Path,
        len: u64,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Result<Self, ImageError> {
        let _ = (path, len, mode, uid, gid);
        Err(ImageError)
    }
    /// Maps an existing RAM file of `len` bytes for writing.
    pub fn open(path: &Path, len: u64) -> Result<Self, ImageError> {
        let _ = (path, len);
        Err(ImageError)
    }
    /// Writes page `index`. Panics on an index out of range; check a peer's
    /// index against [`RamView::pages`] first.
    pub fn write_page(&mut self, index: u64, content: &Page) {
        let _ = (index, content);
    }
    /// Makes page `index` zero; a hole stays a hole.
    pub fn zero_page(&mut self, index: u64) -> Result<(), ImageError> {
        let _ = index;
        Err(ImageError)
    }
    /// Makes a range of pages zero and gives long runs back to the system.
    pub fn zero_pages(&mut self, pages: Range<u64>) -> Result<(), ImageError> {
        let _ = pages;
        Err(ImageError)
    }
}

impl Deref for RamImage {
    type Target = RamView;
    fn deref(&self) -> &RamView {
        &self.view
    }
}
