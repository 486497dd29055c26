//! skeleton
use super::{CodecError, CompressMode};
use bytes::{Bytes, BytesMut};
/// Size of a page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];
/// Most pages in one batch: 1 MiB of content, so that sending overlaps encoding.
pub const BATCH_PAGES_MAX: usize = 256;
/// Content of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageContent<'a> {
    /// All bytes are zero.
    Zero,
    /// These bytes.
    Raw(&'a Page),
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
/// Encoder of page batches; holds the compression context, so keep it.
pub struct PageEncoder {}
impl PageEncoder {
    /// An encoder.
    #[must_use]
    pub fn new(_mode: CompressMode) -> Self {
        unimplemented!()
    }
    /// Append one batch of at most [`BATCH_PAGES_MAX`] pages (page index, content)
    /// taken from the front of `pages` to `out`; `None` if `pages` was empty.
    ///
    /// # Errors
    /// [`CodecError::TooBig`] for an index of 2^56 or above.
    pub fn encode<'a>(
        &mut self,
        _pages: &mut impl Iterator<Item = (u64, &'a Page)>,
        _out: &mut BytesMut,
    ) -> Result<Option<BatchStats>, CodecError> {
        unimplemented!()
    }
}
/// Decode a batch, calling `apply(page index, content)` for each page in order.
///
/// # Errors
/// [`CodecError`]; pages before the fault were handed up already.
pub fn decode_pages(
    _batch: &Bytes,
    _guest_pages: u64,
    _apply: impl FnMut(u64, PageContent<'_>),
) -> Result<(), CodecError> {
    unimplemented!()
}
