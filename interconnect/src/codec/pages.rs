//! Batches of guest pages: the layouts, and their decoder. The encoder is in
//! [`super::encoder`].
//!
//! All integers are little-endian. Layout 0, all that protocol version 1 knows:
//!
//! ```text
//! u16  count             1 ..= BATCH_PAGES_MAX
//! u16  layout            0
//! u32  packed bytes      length of the zstd frame, 0 without one
//! u64  × count           page index << 8 | class
//! ...  zstd frame        the pages of class 3, one after the other
//! ...  raw pages         the pages of class 2, one after the other
//! ```
//!
//! Layout 2, since protocol version 2:
//!
//! ```text
//! u16  count             1 ..= BATCH_PAGES_MAX
//! u16  layout            2
//! u8   packing           0 invalid, 1 plain, 2 zstd, 3 lz4
//! u8   reserved, zero
//! u16  raw pages         of class 2
//! u32  table bytes
//! u32  body bytes        before packing
//! ...  raw pages         the pages of class 2, one after the other
//! ...  table             for each page, in order:
//!        varint          step << 3 | class
//!        class 4 only:   varint patch bytes, u64 XXH3-64 of the page that must come out
//! ...  body, packed      for each page of class 3 or 4, in order: the page, or its patch
//! ```
//!
//! Classes: 0 invalid, 1 zero, 2 raw, 3 packed, 4 patch ([`super::patch`]). A step is the
//! page's index less that of the page before it (less 0 for the first), modulo 2^64, in
//! zigzag (0, -1, 1, -2, … are 0, 1, 2, 3, …); a varint has 7 bits a byte, low ones first,
//! the top bit set in all but the last.
//!
//! Packing the compressible pages and the patches of a batch together costs one call and
//! lets pages that resemble each other (page tables, slabs) share their words; a page that
//! does not look compressible stays out of it and is neither compressed nor copied on the
//! receiving side. Dirty pages whose content did not change are not in a batch at all: the
//! standby has nothing to do for them, and an index sent for nothing would still be bytes,
//! a table entry and an allocation there.

use super::buffers::{Buffers, Lent, Reusable};
use super::cursor::{Cursor, cap};
use super::pack::{Packing, unpack};
use super::patch::PATCH_BYTES_MAX;
use super::{CodecError, PagePatch};
use bytes::Bytes;

/// Size of a page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];
/// Most pages in one batch: 1 MiB of content, so that sending the first batch
/// overlaps with encoding the second.
pub const BATCH_PAGES_MAX: usize = 256;
/// Page indices are below this, so that index and class share a word: 2^56 pages.
pub const PAGE_INDEX_END: u64 = 1 << 56;

pub(super) const LAYOUT_V1: u16 = 0;
pub(super) const LAYOUT_V2: u16 = 2;
pub(super) const HEAD_V1_BYTES: usize = 8;
pub(super) const HEAD_V2_BYTES: usize = 16;
pub(super) const ENTRY_V1_BYTES: usize = 8;
/// Longest entry of a layout-2 table: a step of 57 bits and a class, the patch's length, its
/// check.
pub(super) const ENTRY_V2_BYTES_MAX: usize = 9 + 2 + 8;
pub(super) const CLASS_ZERO: u8 = 1;
pub(super) const CLASS_RAW: u8 = 2;
pub(super) const CLASS_PACKED: u8 = 3;
pub(super) const CLASS_PATCH: u8 = 4;
pub(super) const CLASS_BITS: u32 = 3;

/// Largest batch, in bytes.
pub const BATCH_BYTES_MAX: usize =
    HEAD_V2_BYTES + BATCH_PAGES_MAX * (ENTRY_V2_BYTES_MAX + PAGE_BYTES);
const _: () = assert!(BATCH_BYTES_MAX <= crate::frame::PAYLOAD_BYTES_MAX);
const _: () = assert!(BATCH_PAGES_MAX <= u16::MAX as usize);
const _: () = assert!(PATCH_BYTES_MAX < 1 << 14, "its varint has two bytes");
const _: () = assert!(HEAD_V1_BYTES < HEAD_V2_BYTES && ENTRY_V1_BYTES < ENTRY_V2_BYTES_MAX);

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

/// Where an entry's content lies.
#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    /// A page in the payload, from this byte on.
    Raw(u32),
    /// A page in the body, from this byte on.
    Packed(u32),
    /// A patch in the body: first byte, length, what must come out.
    Patch(u32, u16, u64),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    index: u64,
    content: Content,
}

/// What decoding a batch needs, used again and again.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    entries: Vec<Entry>,
    body: Vec<u8>,
}

impl Reusable for Unpacked {
    fn kept_bytes(&self) -> usize {
        self.body.capacity() + self.entries.capacity() * size_of::<Entry>()
    }
}

/// Buffers of a decoder; clones share them.
#[derive(Debug, Clone, Default)]
pub struct DecodeBuffers(pub(crate) Buffers<Unpacked>);

/// A decoded batch; raw pages and plain bodies stay where they were received.
#[derive(Debug)]
pub struct PageBatch {
    unpacked: Lent<Unpacked>,
    /// Bytes of the body in `unpacked`; 0 if it lies in the payload.
    body_bytes: usize,
    payload: Bytes,
    /// Where in the payload a plain body begins.
    plain_body: Option<usize>,
    has_raw: bool,
}

/// One number of a table: at most ten bytes, and none more than it needs.
fn varint(table: &mut Cursor<'_>) -> Result<u64, CodecError> {
    let mut value = 0u64;
    for at in 0..10 {
        let byte = table.u8()?;
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * at;
        if shift == 63 && bits > 1 || at > 0 && byte == 0 {
            break;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(CodecError::Unknown {
        what: "number in a page table",
        value,
    })
}

fn unzigzag(value: u64) -> u64 {
    (value >> 1) ^ (value & 1).wrapping_neg()
}

fn offset(at: usize) -> u32 {
    // Payload and body are far below 4 GiB.
    u32::try_from(at).unwrap_or(u32::MAX)
}

impl PageBatch {
    /// Decode and check a whole batch of a guest of `guest_pages` pages.
    ///
    /// # Errors
    /// [`CodecError`]; nothing of the batch may be used then.
    pub fn decode(
        batch: &Bytes,
        guest_pages: u64,
        buffers: &DecodeBuffers,
    ) -> Result<Self, CodecError> {
        let mut cursor = Cursor::new(batch, "page batch");
        let count = usize::from(cursor.u16()?);
        cap("pages in a batch", count, BATCH_PAGES_MAX)?;
        let mut decoded = Self {
            unpacked: buffers.0.take(),
            body_bytes: 0,
            payload: batch.clone(),
            plain_body: None,
            has_raw: false,
        };
        decoded.unpacked.entries.clear();
        match cursor.u16()? {
            LAYOUT_V1 => decoded.take_v1(cursor, count, guest_pages)?,
            LAYOUT_V2 => decoded.take_v2(cursor, count, guest_pages)?,
            value => {
                return Err(CodecError::Unknown {
                    what: "layout of a page batch",
                    value: u64::from(value),
                });
            }
        }
        Ok(decoded)
    }

    fn push(&mut self, index: u64, guest_pages: u64, content: Content) -> Result<(), CodecError> {
        if index >= guest_pages {
            return Err(CodecError::PageIndex { index, guest_pages });
        }
        self.unpacked.entries.push(Entry { index, content });
        Ok(())
    }

    fn take_v1(
        &mut self,
        mut cursor: Cursor<'_>,
        count: usize,
        guest_pages: u64,
    ) -> Result<(), CodecError> {
        let packed_bytes = cursor.u32()? as usize;
        let mut table = Cursor::new(
            cursor.take(count * ENTRY_V1_BYTES)?,
            "page table of a batch",
        );
        let packed = cursor.take(packed_bytes)?;
        let raw_start = self.payload.len() - cursor.remaining();
        let (mut packed_at, mut raw_at) = (0, raw_start);
        for _ in 0..count {
            let entry = table.u64()?;
            let content = match entry.to_le_bytes()[0] {
                CLASS_ZERO => Content::Zero,
                CLASS_RAW => {
                    raw_at += PAGE_BYTES;
                    Content::Raw(offset(raw_at - PAGE_BYTES))
                }
                CLASS_PACKED => {
                    packed_at += PAGE_BYTES;
                    Content::Packed(offset(packed_at - PAGE_BYTES))
                }
                value => return Err(unknown_class(value)),
            };
            self.push(entry >> 8, guest_pages, content)?;
        }
        self.has_raw = raw_at > raw_start;
        cursor.take(raw_at - raw_start)?;
        cursor.end()?;
        if packed_at > 0 || packed_bytes > 0 {
            self.unpack(Packing::Zstd, packed, packed_at)?;
        }
        Ok(())
    }

    fn take_v2(
        &mut self,
        mut cursor: Cursor<'_>,
        count: usize,
        guest_pages: u64,
    ) -> Result<(), CodecError> {
        let packing = Packing::from_wire("packing of a page batch", cursor.u8()?)?;
        let reserved = cursor.u8()?;
        cursor.reserved(u64::from(reserved))?;
        let raw_pages = usize::from(cursor.u16()?);
        cap("raw pages in a batch", raw_pages, count)?;
        let table_bytes = cursor.u32()? as usize;
        let body_bytes = cursor.u32()? as usize;
        cap("body of a page batch", body_bytes, count * PAGE_BYTES)?;
        let raw_start = self.payload.len() - cursor.remaining();
        cursor.take(raw_pages * PAGE_BYTES)?;
        let mut table = Cursor::new(cursor.take(table_bytes)?, "page table of a batch");
        let body_start = self.payload.len() - cursor.remaining();
        let body = cursor.take(cursor.remaining())?;
        let (mut index, mut raw_at, mut body_at) = (0u64, raw_start, 0usize);
        for _ in 0..count {
            let word = varint(&mut table)?;
            index = index.wrapping_add(unzigzag(word >> CLASS_BITS));
            let content = match word.to_le_bytes()[0] & ((1 << CLASS_BITS) - 1) {
                CLASS_ZERO => Content::Zero,
                CLASS_RAW => {
                    raw_at += PAGE_BYTES;
                    Content::Raw(offset(raw_at - PAGE_BYTES))
                }
                CLASS_PACKED => {
                    body_at += PAGE_BYTES;
                    Content::Packed(offset(body_at - PAGE_BYTES))
                }
                CLASS_PATCH => {
                    let bytes = usize::try_from(varint(&mut table)?).unwrap_or(usize::MAX);
                    cap("page patch", bytes, PATCH_BYTES_MAX)?;
                    let check = table.u64()?;
                    body_at += bytes;
                    let bytes = u16::try_from(bytes).unwrap_or(u16::MAX);
                    Content::Patch(offset(body_at - usize::from(bytes)), bytes, check)
                }
                value => return Err(unknown_class(value)),
            };
            self.push(index, guest_pages, content)?;
        }
        table.end()?;
        for (what, found, stated) in [
            (
                "raw pages of a batch",
                raw_at - raw_start,
                raw_pages * PAGE_BYTES,
            ),
            ("body of a page batch", body_at, body_bytes),
        ] {
            if found != stated {
                return Err(CodecError::Length {
                    what,
                    have: stated as u64,
                    need: found as u64,
                });
            }
        }
        self.has_raw = raw_pages > 0;
        if packing == Packing::Plain {
            if body.len() != body_bytes {
                return Err(CodecError::Length {
                    what: "plain body of a page batch",
                    have: body.len() as u64,
                    need: body_bytes as u64,
                });
            }
            self.plain_body = Some(body_start);
            Ok(())
        } else {
            self.unpack(packing, body, body_bytes)
        }
    }

    fn unpack(
        &mut self,
        packing: Packing,
        packed: &[u8],
        body_bytes: usize,
    ) -> Result<(), CodecError> {
        self.body_bytes = body_bytes;
        unpack(
            packing,
            packed,
            body_bytes,
            "packed pages",
            &mut self.unpacked.body,
        )
    }

    /// The pages (page index, content) in the order they were given to the encoder.
    pub fn pages(&self) -> impl Iterator<Item = (u64, PageContent<'_>)> {
        let body = match self.plain_body {
            Some(start) => self.payload.get(start..),
            None => self.unpacked.body.get(..self.body_bytes),
        }
        .unwrap_or_default();
        // `decode` counted the entries against both parts; should that ever be broken, the
        // expectations below stop here and not in the guest's memory.
        self.unpacked.entries.iter().map(move |entry| {
            let content = match entry.content {
                Content::Zero => PageContent::Zero,
                Content::Raw(at) => PageContent::Raw(page_at(&self.payload, at)),
                Content::Packed(at) => PageContent::Raw(page_at(body, at)),
                Content::Patch(at, bytes, check) => PageContent::Patch(PagePatch {
                    bytes: body
                        .get(at as usize..at as usize + usize::from(bytes))
                        .expect("decode counted the bytes of the patches"),
                    check,
                }),
            };
            (entry.index, content)
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.unpacked.entries.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.unpacked.entries.is_empty()
    }

    /// Bytes of memory it holds; raw pages keep the whole payload they came in.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let payload = if self.has_raw || self.plain_body.is_some() {
            self.payload.len()
        } else {
            0
        };
        (self.len() * size_of::<Entry>() + self.body_bytes + payload) as u64
    }
}

fn unknown_class(value: u8) -> CodecError {
    CodecError::Unknown {
        what: "page class",
        value: u64::from(value),
    }
}

/// The page at byte `at`, which `decode` found to be there.
fn page_at(bytes: &[u8], at: u32) -> &Page {
    bytes
        .get(at as usize..)
        .and_then(<[u8]>::first_chunk)
        .expect("decode counted the pages of each class")
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
    for (index, content) in
        PageBatch::decode(batch, guest_pages, &DecodeBuffers::default())?.pages()
    {
        apply(index, content);
    }
    Ok(())
}
