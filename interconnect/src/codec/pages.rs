//! Batches of guest pages.
//!
//! All integers are little-endian:
//!
//! ```text
//! u16  count             1 ..= BATCH_PAGES_MAX
//! u16  reserved, zero
//! u32  packed bytes      length of the zstd frame, 0 without one
//! u64  × count           page index << 8 | class
//! ...  zstd frame        the pages of class 3, one after the other
//! ...  raw pages         the pages of class 2, one after the other
//! ```
//!
//! Classes: 0 invalid, 1 zero, 2 raw, 3 packed. Packing the compressible pages of
//! a batch together costs one zstd call and lets pages that resemble each other
//! (page tables, slabs) share it; a page that does not look compressible stays out
//! of it and is neither compressed nor copied on the receiving side.
//! Class 4 is kept for deltas against the page's last sent content.

use super::cursor::{Cursor, cap};
use super::{CodecChoice, CodecError, EncodePolicy, PagePatch, pack};
use bytes::{BufMut, Bytes, BytesMut};

/// Size of a page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];
/// Most pages in one batch: 1 MiB of content, so that sending the first batch
/// overlaps with encoding the second.
pub const BATCH_PAGES_MAX: usize = 256;
/// Page indices are below this, so that index and class share a word: 2^56 pages.
pub const PAGE_INDEX_END: u64 = 1 << 56;

const HEAD_BYTES: usize = 8;
const ENTRY_BYTES: usize = 8;
const CLASS_ZERO: u64 = 1;
const CLASS_RAW: u64 = 2;
const CLASS_PACKED: u64 = 3;

/// Largest batch, in bytes.
pub const BATCH_BYTES_MAX: usize = HEAD_BYTES + BATCH_PAGES_MAX * (ENTRY_BYTES + PAGE_BYTES);
const _: () = assert!(BATCH_BYTES_MAX <= crate::frame::PAYLOAD_BYTES_MAX);
const _: () = assert!(BATCH_PAGES_MAX <= u16::MAX as usize);

/// Content of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageContent<'a> {
    /// All bytes are zero.
    Zero,
    /// These bytes.
    Raw(&'a Page),
    /// The content the page has by now, changed by this. Good only in order, see
    /// [`PagePatch`].
    Patch(PagePatch<'a>),
}

/// How the pages of a batch were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BatchStats {
    /// All-zero pages.
    pub zero: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Pages sent compressed.
    pub packed: u64,
    /// Bytes of the batch.
    pub bytes: u64,
}

/// Encoder of page batches; holds its buffers, so keep it.
#[derive(Debug)]
pub struct PageEncoder {
    policy: EncodePolicy,
    /// Index and class of each page of the batch.
    entries: Vec<u64>,
    /// Content of the pages to pack.
    plain: Vec<u8>,
    packed: Vec<u8>,
    raw: Vec<u8>,
}

fn is_zero(page: &Page) -> bool {
    page.chunks_exact(64)
        .all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}

impl PageEncoder {
    /// An encoder.
    #[must_use]
    pub fn new(policy: EncodePolicy) -> Self {
        Self {
            policy,
            entries: Vec::new(),
            plain: Vec::new(),
            packed: Vec::new(),
            raw: Vec::new(),
        }
    }

    /// Append one batch of at most [`BATCH_PAGES_MAX`] pages (page index, content)
    /// taken from the front of `pages` to `out`; `None` if `pages` was empty.
    ///
    /// # Errors
    /// [`CodecError::TooBig`] for an index of [`PAGE_INDEX_END`] or above.
    pub fn encode<'a>(
        &mut self,
        pages: &mut impl Iterator<Item = (u64, &'a Page)>,
        out: &mut BytesMut,
    ) -> Result<Option<BatchStats>, CodecError> {
        self.entries.clear();
        self.plain.clear();
        self.raw.clear();
        let mut stats = BatchStats::default();
        for (index, page) in pages.take(BATCH_PAGES_MAX) {
            if index >= PAGE_INDEX_END {
                return Err(CodecError::TooBig {
                    what: "page index",
                    value: index,
                    max: PAGE_INDEX_END - 1,
                });
            }
            let class = if is_zero(page) {
                stats.zero += 1;
                CLASS_ZERO
            } else if self.policy.codec != CodecChoice::Raw && pack::looks_compressible(page) {
                stats.packed += 1;
                self.plain.extend_from_slice(page);
                CLASS_PACKED
            } else {
                stats.raw += 1;
                self.raw.extend_from_slice(page);
                CLASS_RAW
            };
            self.entries.push(index << 8 | class);
        }
        if self.entries.is_empty() {
            return Ok(None);
        }
        self.packed.clear();
        if !self.plain.is_empty() && !pack::compress(&self.plain, &mut self.packed) {
            self.unpack_all(&mut stats);
        }
        let before = out.len();
        out.reserve(
            HEAD_BYTES + self.entries.len() * ENTRY_BYTES + self.packed.len() + self.raw.len(),
        );
        // Both fit: the batch has at most BATCH_PAGES_MAX pages.
        out.put_u16_le(u16::try_from(self.entries.len()).unwrap_or(u16::MAX));
        out.put_u16_le(0);
        out.put_u32_le(u32::try_from(self.packed.len()).unwrap_or(u32::MAX));
        for entry in &self.entries {
            out.put_u64_le(*entry);
        }
        out.put_slice(&self.packed);
        out.put_slice(&self.raw);
        stats.bytes = (out.len() - before) as u64;
        Ok(Some(stats))
    }

    /// Compression gained nothing: send the packed pages raw, in entry order.
    fn unpack_all(&mut self, stats: &mut BatchStats) {
        let mut merged = Vec::with_capacity(self.plain.len() + self.raw.len());
        let (mut plain, mut raw) = (self.plain.chunks(PAGE_BYTES), self.raw.chunks(PAGE_BYTES));
        for entry in &mut self.entries {
            let page = match *entry & 0xff {
                CLASS_PACKED => plain.next(),
                CLASS_RAW => raw.next(),
                _ => None,
            };
            if let Some(page) = page {
                merged.extend_from_slice(page);
                *entry = *entry & !0xff | CLASS_RAW;
            }
        }
        self.raw = merged;
        self.packed.clear();
        stats.raw += stats.packed;
        stats.packed = 0;
    }
}

/// A decoded batch; raw pages stay where they were received.
#[derive(Debug, Clone)]
pub struct PageBatch {
    /// Index and class, checked.
    entries: Vec<u64>,
    unpacked: Vec<u8>,
    raw: Bytes,
    payload_bytes: usize,
}

impl PageBatch {
    /// Decode and check a whole batch of a guest of `guest_pages` pages.
    ///
    /// # Errors
    /// [`CodecError`]; nothing of the batch may be used then.
    pub fn decode(batch: &Bytes, guest_pages: u64) -> Result<Self, CodecError> {
        let mut cursor = Cursor::new(batch, "page batch");
        let count = usize::from(cursor.u16()?);
        cap("pages in a batch", count, BATCH_PAGES_MAX)?;
        let reserved = cursor.u16()?;
        cursor.reserved(u64::from(reserved))?;
        let packed_bytes = cursor.u32()? as usize;
        let mut table = Cursor::new(cursor.take(count * ENTRY_BYTES)?, "page table of a batch");
        let mut entries = Vec::with_capacity(count);
        let (mut packed_pages, mut raw_pages) = (0, 0);
        for _ in 0..count {
            let entry = table.u64()?;
            match entry & 0xff {
                CLASS_ZERO => {}
                CLASS_RAW => raw_pages += 1,
                CLASS_PACKED => packed_pages += 1,
                value => {
                    return Err(CodecError::Unknown {
                        what: "page class",
                        value,
                    });
                }
            }
            let index = entry >> 8;
            if index >= guest_pages {
                return Err(CodecError::PageIndex { index, guest_pages });
            }
            entries.push(entry);
        }
        let packed = cursor.take(packed_bytes)?;
        let raw_start = batch.len() - cursor.remaining();
        cursor.take(raw_pages * PAGE_BYTES)?;
        cursor.end()?;
        let unpacked = match (packed_pages, packed_bytes) {
            (0, 0) => Vec::new(),
            _ => pack::decompress(packed, packed_pages * PAGE_BYTES, "packed pages")?,
        };
        Ok(Self {
            entries,
            unpacked,
            raw: batch.slice(raw_start..),
            payload_bytes: batch.len(),
        })
    }

    /// The pages (page index, content) in the order they were given to the encoder.
    pub fn pages(&self) -> impl Iterator<Item = (u64, PageContent<'_>)> {
        let (mut unpacked, mut raw) = (
            self.unpacked.as_chunks::<PAGE_BYTES>().0.iter(),
            self.raw.as_chunks::<PAGE_BYTES>().0.iter(),
        );
        self.entries.iter().map(move |entry| {
            // `decode` counted the classes against both parts; should that ever
            // be broken, stop here and not in the guest's memory.
            let page = match entry & 0xff {
                CLASS_ZERO => return (entry >> 8, PageContent::Zero),
                CLASS_RAW => raw.next(),
                _ => unpacked.next(),
            };
            (
                entry >> 8,
                PageContent::Raw(page.expect("decode counted the pages of each class")),
            )
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of memory it holds; raw pages keep the whole payload they came in.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let payload = if self.raw.is_empty() {
            0
        } else {
            self.payload_bytes
        };
        (self.entries.len() * ENTRY_BYTES + self.unpacked.len() + payload) as u64
    }
}

/// Decode a batch, calling `apply(page index, content)` for each page in order.
///
/// # Errors
/// [`CodecError`]; `apply` was not called then.
pub fn decode_pages(
    batch: &Bytes,
    guest_pages: u64,
    mut apply: impl FnMut(u64, PageContent<'_>),
) -> Result<(), CodecError> {
    for (index, content) in PageBatch::decode(batch, guest_pages)?.pages() {
        apply(index, content);
    }
    Ok(())
}
