//! The frame of every 4 KiB block of a statefile. This module owns it:
//!
//! ```text
//! 0     magic    8 bytes, which kind of block
//! 8     u32 LE   version: 1 = first
//! 12    u32 LE   CRC-32 of bytes 16..512
//! 16    fields   (layout.rs)
//! 512   zero
//! 4088  u64 LE   stamp: the write counter, which is among the fields too
//! ```
//!
//! All that counts lies in the first 512 bytes, the least that any disk writes as one. A
//! write cut by a loss of power therefore leaves the old fields or the new ones, never a
//! mixture; the stamp at the far end tells that it was cut. The block is 4 KiB so that
//! disks with sectors of that size write it as one as well.

/// Bytes of a block: a sector of today's disks, and what direct I/O is aligned to.
pub const PAGE_BYTES: usize = 4096;
/// Bytes that every disk writes as one.
pub const ATOM_BYTES: usize = 512;

const VERSION: u32 = 1;
const FIELDS_AT: usize = 16;
const STAMP_AT: usize = PAGE_BYTES - 8;

/// What is wrong with a block, before its fields are looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPage {
    /// Fewer than its bytes.
    #[error("it has {0} bytes instead of {PAGE_BYTES}")]
    Short(usize),
    /// All zero: never formatted, or discarded since.
    #[error("it is empty (all zero)")]
    Empty,
    /// Something else is there.
    #[error("something else is there (no `{0}` at its start)")]
    Magic(&'static str),
    /// Written by another pollux.
    #[error("its format is version {0}, this pollux knows version {VERSION}")]
    Version(u32),
    /// The bytes are not those that were written.
    #[error("its checksum is {found:08x} where {said:08x} was written")]
    Crc {
        /// Of the bytes there.
        found: u32,
        /// In the block.
        said: u32,
    },
    /// Whole, and yet impossible.
    #[error("its contents make no sense: {0}")]
    Nonsense(&'static str),
}

/// Writes fields one after the other.
pub(super) struct Fields {
    page: Box<[u8; PAGE_BYTES]>,
    at: usize,
}

impl Fields {
    pub(super) fn new(magic: &'static str) -> Self {
        let mut page = Box::new([0; PAGE_BYTES]);
        page[..8].copy_from_slice(magic.as_bytes());
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        Self {
            page,
            at: FIELDS_AT,
        }
    }

    /// Fields that do not fit are a mistake in layout.rs, which its tests show.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.page[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        debug_assert!(self.at <= ATOM_BYTES, "fields end beyond the first sector");
    }

    pub(super) fn seal(mut self, stamp: u64) -> Box<[u8; PAGE_BYTES]> {
        self.page[STAMP_AT..].copy_from_slice(&stamp.to_le_bytes());
        let crc = crc32fast::hash(&self.page[FIELDS_AT..ATOM_BYTES]);
        self.page[12..16].copy_from_slice(&crc.to_le_bytes());
        self.page
    }
}

/// Reads fields one after the other, from bytes that may be anything.
pub(super) struct Reader<'a> {
    page: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Check the frame.
    pub(super) fn open(page: &'a [u8], magic: &'static str) -> Result<Self, BadPage> {
        check_magic(page, magic)?;
        let mut reader = Self { page, at: 12 };
        let said = u32::from_le_bytes(reader.array()?);
        let found = crc32fast::hash(&page[FIELDS_AT..ATOM_BYTES]);
        if found != said {
            return Err(BadPage::Crc { found, said });
        }
        if page[ATOM_BYTES..STAMP_AT].iter().any(|b| *b != 0) {
            return Err(BadPage::Nonsense("bytes that are always zero are not"));
        }
        Ok(reader)
    }

    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], BadPage> {
        let end = self.at.saturating_add(n);
        let taken = self
            .page
            .get(self.at..end)
            .filter(|_| end <= ATOM_BYTES)
            .ok_or(BadPage::Nonsense("a field ends beyond the fields"))?;
        self.at = end;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], BadPage> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u16(&mut self) -> Result<u16, BadPage> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, BadPage> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, BadPage> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The rest must be zero; whether the write that left `stamp` was cut.
    pub(super) fn close(self, stamp: u64) -> Result<bool, BadPage> {
        if self.page[self.at..ATOM_BYTES].iter().any(|b| *b != 0) {
            return Err(BadPage::Nonsense("bytes follow the fields"));
        }
        Ok(stamp_of(self.page) != stamp)
    }
}

/// Length, magic and version of a block.
pub(super) fn check_magic(page: &[u8], magic: &'static str) -> Result<(), BadPage> {
    if page.len() != PAGE_BYTES {
        return Err(BadPage::Short(page.len()));
    }
    if &page[..8] != magic.as_bytes() {
        if page.iter().all(|b| *b == 0) {
            return Err(BadPage::Empty);
        }
        return Err(BadPage::Magic(magic));
    }
    let mut version = [0; 4];
    version.copy_from_slice(&page[8..12]);
    match u32::from_le_bytes(version) {
        VERSION => Ok(()),
        other => Err(BadPage::Version(other)),
    }
}

/// The stamp at the end of a whole block.
pub(super) fn stamp_of(page: &[u8]) -> u64 {
    let mut stamp = [0; 8];
    if let Some(bytes) = page.get(STAMP_AT..PAGE_BYTES) {
        stamp.copy_from_slice(bytes);
    }
    u64::from_le_bytes(stamp)
}
