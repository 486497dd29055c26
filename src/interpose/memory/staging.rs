//! The buffer that holds an epoch's pages.
use super::Page;

/// Why a page could not be staged.
#[derive(Debug, thiserror::Error)]
#[error("pending")]
pub struct StagingError;

/// A bounded, reusable buffer of pages; at most one copy of each page, the newest.
#[derive(Debug)]
pub struct Staging;

impl Staging {
    /// A buffer for a guest of `ram_pages` pages that holds at most
    /// `limit_pages` of them.
    pub fn new(ram_pages: u64, limit_pages: u64) -> Result<Self, StagingError> {
        let _ = (ram_pages, limit_pages);
        Err(StagingError)
    }
    /// Pages held.
    pub fn len_pages(&self) -> u64 {
        0
    }
    /// True if it holds nothing.
    pub fn is_empty(&self) -> bool {
        true
    }
    /// The most pages it can hold.
    pub fn limit_pages(&self) -> u64 {
        0
    }
    /// Puts one page, replacing an older copy.
    pub fn put(&mut self, index: u64, content: &Page) -> Result<(), StagingError> {
        let _ = (index, content);
        Err(StagingError)
    }
    /// The held copy of page `index`.
    pub fn get(&self, index: u64) -> Option<&Page> {
        let _ = index;
        None
    }
    /// All pages as (index, content), in order of first arrival.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        std::iter::empty()
    }
    /// Forgets all pages (they were handed on) and makes room ahead for the
    /// next epoch. Call it outside the pause.
    pub fn clear(&mut self) {}
    /// Moves every page that `next` lacks into `next`; afterwards `self` is
    /// empty. For an epoch that was dropped while the next one was already
    /// being collected. If `next` is full `self` keeps what did not fit.
    pub fn merge_into_next(&mut self, next: &mut Staging) -> Result<(), StagingError> {
        let _ = next;
        Err(StagingError)
    }
    /// Gives memory beyond the initial size back to the system.
    pub fn trim(&mut self) {}
}
