//! Pages to batches, in two steps: sorting, which must see the pages in order and is one
//! thread's ([`PageEncoder`] owns the bases of patches), and packing, which is the costly part
//! and may be any thread's ([`Draft::seal`]).

use super::base::Bases;
use super::buffers::{Buffers, Lent, Reusable};
use super::pack::{Packing, looks_compressible, pack};
use super::pages::{
    BATCH_PAGES_MAX, CLASS_BITS, CLASS_PACKED, CLASS_PATCH, CLASS_RAW, CLASS_ZERO,
    ENTRY_V2_BYTES_MAX, HEAD_V2_BYTES, LAYOUT_V1, LAYOUT_V2, PAGE_INDEX_END,
};
use super::patch::{Diff, diff, page_check};
use super::{Codec, CodecChoice, CodecError, CodecVersion, EncodePolicy, PAGE_BYTES, Page};
use bytes::{BufMut, Bytes};

/// Pages kept of an epoch, on which codecs are tried once it is sent.
pub(crate) const SAMPLE_PAGES: usize = 16;

/// How the pages of a batch were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BatchStats {
    /// All-zero pages.
    pub zero: u64,
    /// Pages that are what the standby holds; not in the batch.
    pub unchanged: u64,
    /// Pages sent as patches.
    pub patched: u64,
    /// Pages sent compressed.
    pub packed: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Bytes of the patches.
    pub patch_bytes: u64,
    /// Bytes of pages and patches given to the codec.
    pub body_bytes: u64,
    /// What the codec made of them.
    pub packed_bytes: u64,
    /// Bytes of the batch.
    pub bytes: u64,
}

/// An encoded batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// For a frame; empty if no page has to be sent.
    pub payload: Bytes,
    /// What is in it.
    pub stats: BatchStats,
}

/// Buffers a draft works with.
#[derive(Debug, Default)]
pub(crate) struct DraftBuffers {
    /// Layout 0: index and class of each page.
    entries: Vec<u64>,
    /// Layout 2: the table.
    table: Vec<u8>,
    /// What is to be packed.
    body: Vec<u8>,
    packed: Vec<u8>,
}

impl Reusable for DraftBuffers {
    fn kept_bytes(&self) -> usize {
        self.table.capacity() + self.body.capacity().max(self.packed.capacity())
    }
}

/// A batch whose pages are sorted and not yet packed.
#[derive(Debug)]
pub(crate) struct Draft {
    version: CodecVersion,
    codec: Codec,
    buffers: Lent<DraftBuffers>,
    /// Room for the head of layout 2, then the raw pages.
    out: Lent<Vec<u8>>,
    /// For layout 0, which has the raw pages last.
    spare: Option<Lent<Vec<u8>>>,
    stats: BatchStats,
}

/// Encoder of page batches, good for one lane; holds buffers and the bases of patches.
#[derive(Debug)]
pub struct PageEncoder {
    policy: EncodePolicy,
    codec: Codec,
    bases: Option<Bases>,
    drafts: Buffers<DraftBuffers>,
    payloads: Buffers<Vec<u8>>,
    sample: Sample,
}

/// A few of the pages of an epoch that are neither zero nor patched.
#[derive(Debug, Default)]
struct Sample {
    pages: Vec<Page>,
    seen: usize,
    /// Every how manieth page is taken, from what the last epoch had.
    stride: usize,
}

impl Sample {
    fn look(&mut self, page: &Page) {
        if self.seen.is_multiple_of(self.stride.max(1)) && self.pages.len() < SAMPLE_PAGES {
            self.pages.push(*page);
        }
        self.seen += 1;
    }

    fn begin(&mut self) {
        self.stride = self.seen / SAMPLE_PAGES;
        self.seen = 0;
        self.pages.clear();
    }
}

/// All bytes of `page` are zero.
fn is_zero(page: &Page) -> bool {
    page.as_chunks::<64>().0.iter().all(|line| *line == [0; 64])
}

/// What a policy uses before anything is chosen.
pub(crate) fn first_codec(policy: &EncodePolicy) -> Codec {
    match (policy.codec, policy.version) {
        (CodecChoice::Raw, _) => Codec::Raw,
        (CodecChoice::Zstd, _) | (_, CodecVersion::V1) => Codec::ZstdFast,
        (CodecChoice::Auto | CodecChoice::Lz4, CodecVersion::V2) => Codec::Lz4,
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = value.to_le_bytes()[0] & 0x7f;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// A step from one index to the next, small either way.
fn zigzag(from: u64, to: u64) -> u64 {
    let step = to.wrapping_sub(from).cast_signed();
    ((step << 1) ^ (step >> 63)).cast_unsigned()
}

impl PageEncoder {
    /// An encoder that knows nothing of what the standby holds.
    #[must_use]
    pub fn new(policy: EncodePolicy) -> Self {
        let delta = policy.delta && policy.version >= CodecVersion::V2;
        Self {
            policy,
            codec: first_codec(&policy),
            bases: delta.then(|| Bases::new(policy.base_bytes_max)),
            drafts: Buffers::default(),
            payloads: Buffers::default(),
            sample: Sample::default(),
        }
    }

    /// Pack the next batches with `codec`. One that the partner does not read is not taken.
    pub fn set_codec(&mut self, codec: Codec) {
        if self.policy.version >= CodecVersion::V2 || codec != Codec::Lz4 {
            self.codec = codec;
        }
    }

    /// The codec in use.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// An epoch begins.
    pub(crate) fn begin_epoch(&mut self) {
        self.sample.begin();
    }

    /// What was encoded may not reach the standby: take nothing for known there.
    pub fn forget(&mut self) {
        if let Some(bases) = &mut self.bases {
            bases.clear();
        }
    }

    /// Bytes of pages kept as bases of patches.
    #[must_use]
    pub fn base_bytes(&self) -> u64 {
        self.bases.as_ref().map_or(0, Bases::bytes)
    }

    /// Pages of this epoch to try codecs on.
    pub(crate) fn sample(&self) -> &[Page] {
        &self.sample.pages
    }

    /// Encode one batch of at most [`BATCH_PAGES_MAX`] pages (page index, content) taken
    /// from the front of `pages`; `None` if `pages` was empty.
    ///
    /// # Errors
    /// [`CodecError::TooBig`] for an index of [`PAGE_INDEX_END`] or above; what was
    /// encoded so far must be sent all the same, or [forgotten](Self::forget).
    pub fn encode<'a>(
        &mut self,
        pages: &mut impl Iterator<Item = (u64, &'a Page)>,
    ) -> Result<Option<Batch>, CodecError> {
        Ok(self.draft(pages)?.map(Draft::seal))
    }

    /// Sort pages from the front of `pages` into a batch; `None` if there were none.
    pub(crate) fn draft<'a>(
        &mut self,
        pages: &mut impl Iterator<Item = (u64, &'a Page)>,
    ) -> Result<Option<Draft>, CodecError> {
        let mut pages = pages.take(BATCH_PAGES_MAX);
        let Some(first) = pages.next() else {
            return Ok(None);
        };
        let mut draft = Draft::new(
            self.policy.version,
            self.codec,
            self.drafts.take(),
            self.payloads.take(),
        );
        if self.policy.version == CodecVersion::V1 {
            draft.spare = Some(self.payloads.take());
        }
        let mut last = 0;
        for (index, page) in std::iter::once(first).chain(pages) {
            if index >= PAGE_INDEX_END {
                return Err(CodecError::TooBig {
                    what: "page index",
                    value: index,
                    max: PAGE_INDEX_END - 1,
                });
            }
            self.sort(&mut draft, &mut last, index, page);
        }
        draft.stats.body_bytes = draft.buffers.body.len() as u64;
        Ok(Some(draft))
    }

    fn sort(&mut self, draft: &mut Draft, last: &mut u64, index: u64, page: &Page) {
        let base = self.bases.as_mut().and_then(|bases| bases.get(index));
        if is_zero(page) {
            if let Some(base) = base {
                *base = [0; PAGE_BYTES];
            }
            draft.stats.zero += 1;
            draft.entry(last, index, CLASS_ZERO);
            return;
        }
        if let Some(base) = base {
            let body_before = draft.buffers.body.len();
            match diff(base, page, &mut draft.buffers.body) {
                Diff::Same => {
                    draft.stats.unchanged += 1;
                    return;
                }
                Diff::Patch => {
                    let bytes = draft.buffers.body.len() - body_before;
                    draft.stats.patched += 1;
                    draft.stats.patch_bytes += bytes as u64;
                    draft.entry(last, index, CLASS_PATCH);
                    put_varint(&mut draft.buffers.table, bytes as u64);
                    draft.buffers.table.put_u64_le(page_check(page));
                    return;
                }
                Diff::TooLong => *base = *page,
            }
        } else if let Some(bases) = &mut self.bases {
            bases.admit(index, page);
        }
        self.sample.look(page);
        if self.codec != Codec::Raw && looks_compressible(page) {
            draft.stats.packed += 1;
            draft.buffers.body.extend_from_slice(page);
            draft.entry(last, index, CLASS_PACKED);
        } else {
            draft.stats.raw += 1;
            draft.out.extend_from_slice(page);
            draft.entry(last, index, CLASS_RAW);
        }
    }
}

impl Draft {
    fn new(
        version: CodecVersion,
        codec: Codec,
        mut buffers: Lent<DraftBuffers>,
        mut out: Lent<Vec<u8>>,
    ) -> Self {
        buffers.entries.clear();
        buffers.table.clear();
        buffers.body.clear();
        out.clear();
        out.resize(HEAD_V2_BYTES, 0);
        Self {
            version,
            codec,
            buffers,
            out,
            spare: None,
            stats: BatchStats::default(),
        }
    }

    fn entry(&mut self, last: &mut u64, index: u64, class: u8) {
        match self.version {
            CodecVersion::V1 => self.buffers.entries.push(index << 8 | u64::from(class)),
            CodecVersion::V2 => {
                let step = zigzag(*last, index) << CLASS_BITS | u64::from(class);
                put_varint(&mut self.buffers.table, step);
                *last = index;
            }
        }
    }

    fn count(&self) -> u64 {
        let stats = &self.stats;
        stats.zero + stats.patched + stats.packed + stats.raw
    }

    /// The codec it will be packed with.
    pub(crate) fn codec(&self) -> Codec {
        self.codec
    }

    /// Pack it.
    pub(crate) fn seal(mut self) -> Batch {
        let Ok(count) = u16::try_from(self.count()) else {
            // Never: a draft has at most BATCH_PAGES_MAX pages.
            return Batch {
                payload: Bytes::new(),
                stats: self.stats,
            };
        };
        if count == 0 {
            return Batch {
                payload: Bytes::new(),
                stats: self.stats,
            };
        }
        match self.version {
            CodecVersion::V1 => self.seal_v1(count),
            CodecVersion::V2 => self.seal_v2(count),
        }
        let mut stats = self.stats;
        stats.bytes = self.out.len() as u64;
        Batch {
            payload: self.out.freeze(),
            stats,
        }
    }

    fn seal_v2(&mut self, count: u16) {
        let DraftBuffers {
            table,
            body,
            packed,
            ..
        } = &mut *self.buffers;
        debug_assert!(table.len() <= usize::from(count) * ENTRY_V2_BYTES_MAX);
        let (packing, body_out) = match pack(self.codec, body, packed) {
            Some(bytes) => (
                Packing::of(self.codec),
                packed.get(..bytes).unwrap_or_default(),
            ),
            None => (Packing::Plain, &body[..]),
        };
        self.stats.packed_bytes = body_out.len() as u64;
        self.out.reserve(table.len() + body_out.len());
        self.out.put_slice(table);
        self.out.put_slice(body_out);
        // All fit: a draft has at most BATCH_PAGES_MAX pages.
        let number = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let mut head = self.out.get_mut(..HEAD_V2_BYTES).unwrap_or_default();
        head.put_u16_le(count);
        head.put_u16_le(LAYOUT_V2);
        head.put_u8(packing as u8);
        head.put_u8(0);
        head.put_u16_le(u16::try_from(self.stats.raw).unwrap_or(u16::MAX));
        head.put_u32_le(number(table.len()));
        head.put_u32_le(number(body.len()));
    }

    fn seal_v1(&mut self, count: u16) {
        let Some(mut out) = self.spare.take() else {
            return;
        };
        let buffers = &mut *self.buffers;
        let packed = pack(self.codec, &buffers.body, &mut buffers.packed);
        if packed.is_none() {
            self.stats.raw += self.stats.packed;
            self.stats.packed = 0;
        }
        let packed = packed
            .and_then(|bytes| buffers.packed.get(..bytes))
            .unwrap_or_default();
        self.stats.packed_bytes = packed.len() as u64;
        out.clear();
        out.put_u16_le(count);
        out.put_u16_le(LAYOUT_V1);
        out.put_u32_le(u32::try_from(packed.len()).unwrap_or(u32::MAX));
        let plain = packed.is_empty();
        for entry in &buffers.entries {
            let class = entry.to_le_bytes()[0];
            let raw = class == CLASS_RAW || plain && class == CLASS_PACKED;
            let class = if raw { CLASS_RAW } else { class };
            out.put_u64_le(entry & !0xff | u64::from(class));
        }
        out.put_slice(packed);
        let raw_pages = self.out.get(HEAD_V2_BYTES..).unwrap_or_default();
        if plain {
            // Packing gained nothing: all go raw, in the order of their entries.
            let (mut bodies, mut raws) = (
                buffers.body.chunks(PAGE_BYTES),
                raw_pages.chunks(PAGE_BYTES),
            );
            for entry in &buffers.entries {
                let page = match entry.to_le_bytes()[0] {
                    CLASS_PACKED => bodies.next(),
                    CLASS_RAW => raws.next(),
                    _ => None,
                };
                out.put_slice(page.unwrap_or_default());
            }
        } else {
            out.put_slice(raw_pages);
        }
        self.out = out;
    }
}
