//! The buffer that holds an epoch's pages between the pause and the wire.
//!
//! Each page of the guest is held at most once, and always in its newest
//! version: a page put again replaces the old copy in place. Address space for
//! the limit is reserved at once, storage only as far as needed: 16 MiB at
//! first, then at each [`Staging::clear`] twice what the last epoch used, so
//! that in the steady state the pause allocates nothing.
//!
//! # A dropped epoch
//!
//! The kernel forgets that a page was written once it is in the staging. So an
//! epoch that is not handed on must not be cleared away. Three ways are right:
//! - leave the staging as it is and collect the next epoch into it;
//! - [`super::Tracker::give_back`]: the tracker notes the pages, the next
//!   collection copies them again (best when memory is short);
//! - [`Staging::merge_into_next`], if the next epoch was already collected into
//!   another staging.

use super::region::Region;
use super::{PAGE_SIZE, Page};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Pages given storage at the start: 16 MiB, some 16 ms of a guest writing flat
/// out at 0.25 pages per microsecond, more than a usual epoch.
pub const STAGING_INITIAL_PAGES: u64 = 4096;

/// The default limit is this part of the guest's RAM: an epoch that rewrites
/// more is better served by seeding anew ...
pub const STAGING_RAM_PART: u64 = 4;

/// ... but never below 64 MiB, so that a small guest's boot fits.
pub const STAGING_LIMIT_PAGES_MIN: u64 = 16 * 1024;

/// Room ahead: storage for this many times the last epoch.
const ROOM_AHEAD: usize = 2;

/// Why a page could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// The buffer itself could not be made.
    #[error(
        "cannot reserve a staging buffer of {limit_pages} pages for a guest of {ram_pages}: {source}"
    )]
    Reserve {
        /// Pages of the guest.
        ram_pages: u64,
        /// Pages wanted.
        limit_pages: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// It holds as many pages as it may.
    #[error("staging is full: it holds {limit_pages} pages; raise its limit, or seed anew")]
    Full {
        /// The limit.
        limit_pages: u64,
    },
    /// The index is not a page of this guest.
    #[error("page {index} is outside of a guest of {ram_pages} pages")]
    OutOfRange {
        /// The page.
        index: u64,
        /// Pages of the guest.
        ram_pages: u64,
    },
}

/// A bounded, reusable buffer of pages; at most one copy of each, the newest.
#[derive(Debug)]
pub struct Staging {
    /// `limit` pages; slot i holds the i-th page that arrived.
    data: Region,
    /// For each slot the page's index, u64.
    order: Region,
    /// For each page of the guest its slot + 1, or 0 for none, u32.
    slots: Region,
    ram_pages: usize,
    limit: usize,
    /// Slots that have storage.
    populated: usize,
    /// Slots given out; above `limit` only within one [`Putter`]'s life.
    len: AtomicUsize,
}

/// The limit to use for a guest of `ram_pages` pages if nothing else is asked.
pub fn default_limit(ram_pages: u64) -> u64 {
    (ram_pages / STAGING_RAM_PART)
        .max(STAGING_LIMIT_PAGES_MIN)
        .min(ram_pages)
}

impl Staging {
    /// A buffer for a guest of `ram_pages` pages that holds at most
    /// `limit_pages` of them ([`default_limit`] is a fair choice).
    pub fn new(ram_pages: u64, limit_pages: u64) -> Result<Self, StagingError> {
        let reserve = |source| StagingError::Reserve {
            ram_pages,
            limit_pages,
            source,
        };
        let invalid = || reserve(std::io::Error::from_raw_os_error(libc::EINVAL));
        // Slots are counted in u32 with 0 for "none".
        let fits = |pages: u64| u32::try_from(pages).ok().filter(|n| *n < u32::MAX);
        let limit = fits(limit_pages.min(ram_pages)).ok_or_else(invalid)? as usize;
        let ram = usize::try_from(ram_pages).map_err(|_| invalid())?;
        if limit == 0 {
            return Err(invalid());
        }
        let bytes = |n: usize, size: usize| n.checked_mul(size).ok_or_else(invalid);
        let mut staging = Self {
            data: Region::anonymous(bytes(limit, PAGE_SIZE)?).map_err(reserve)?,
            order: Region::anonymous(bytes(limit, size_of::<u64>())?).map_err(reserve)?,
            slots: Region::anonymous(bytes(ram, size_of::<u32>())?).map_err(reserve)?,
            ram_pages: ram,
            limit,
            populated: 0,
            len: AtomicUsize::new(0),
        };
        // Huge pages save most of the copying's TLB misses; without them it works.
        let _ = staging
            .data
            .advise(0, staging.data.len(), libc::MADV_HUGEPAGE);
        // Four bytes per 4 KiB page; touched at random, so all of it now.
        let populate = libc::MADV_POPULATE_WRITE;
        let _ = staging.slots.advise(0, staging.slots.len(), populate);
        staging.populate(usize::try_from(STAGING_INITIAL_PAGES).unwrap_or(0));
        Ok(staging)
    }

    /// Gives the first `slots` slots storage. Without it (a kernel before 5.14,
    /// memory short) the pages get theirs when they are touched.
    fn populate(&mut self, slots: usize) {
        let slots = slots.min(self.limit);
        let Some(more) = slots.checked_sub(self.populated).filter(|n| *n > 0) else {
            return;
        };
        let populate = libc::MADV_POPULATE_WRITE;
        let from = self.populated * PAGE_SIZE;
        let _ = self.data.advise(from, more * PAGE_SIZE, populate);
        let _ = self.order.advise(0, slots * size_of::<u64>(), populate);
        self.populated = slots;
    }

    /// Pages held.
    pub fn len_pages(&self) -> u64 {
        self.slots_used() as u64
    }

    /// True if it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.slots_used() == 0
    }

    /// The most pages it can hold.
    pub fn limit_pages(&self) -> u64 {
        self.limit as u64
    }

    /// Pages of the guest it is made for.
    pub fn ram_pages(&self) -> u64 {
        self.ram_pages as u64
    }

    fn slots_used(&self) -> usize {
        self.len.load(Ordering::Relaxed).min(self.limit)
    }

    /// The slot of page `index` + 1, 0 for none.
    fn slot_of(&self, index: usize) -> &AtomicU32 {
        let size = size_of::<u32>();
        let at = self.slots.at(index * size, size).cast();
        // SAFETY: in bounds (checked by `at`), aligned (the region is), only
        // ever accessed as this atomic, and alive as long as `self`.
        unsafe { AtomicU32::from_ptr(at) }
    }

    /// The page index held in `slot`.
    fn index_in(&self, slot: usize) -> &AtomicU64 {
        let size = size_of::<u64>();
        let at = self.order.at(slot * size, size).cast();
        // SAFETY: as in `slot_of`.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// The content of a slot below `slots_used`.
    fn content(&self, slot: usize) -> &Page {
        let at = self.data.at(slot * PAGE_SIZE, PAGE_SIZE);
        // SAFETY: in bounds; written only through `&mut self` or a `Putter`,
        // which borrows mutably, so nobody writes while this borrow lives.
        unsafe { &*at.cast::<Page>() }
    }

    /// Puts one page, replacing an older copy.
    pub fn put(&mut self, index: u64, content: &Page) -> Result<(), StagingError> {
        let known = usize::try_from(index)
            .ok()
            .filter(|index| *index < self.ram_pages);
        let (limit_pages, ram_pages) = (self.limit_pages(), self.ram_pages());
        let Some(index) = known else {
            return Err(StagingError::OutOfRange { index, ram_pages });
        };
        // SAFETY: one thread only, as the borrow is exclusive; `content` is a page.
        let done = unsafe { self.putter().put(index, content.as_ptr()) };
        self.settle();
        if done {
            Ok(())
        } else {
            Err(StagingError::Full { limit_pages })
        }
    }

    /// For the scan threads: puts pages through a shared reference. Call
    /// [`Self::settle`] when they are done.
    pub(super) fn putter(&mut self) -> Putter<'_> {
        Putter { staging: self }
    }

    /// After a [`Putter`]: the count of slots is what is really held.
    pub(super) fn settle(&mut self) {
        let used = self.slots_used();
        *self.len.get_mut() = used;
    }

    /// The held copy of page `index`.
    pub fn get(&self, index: u64) -> Option<&Page> {
        let index = usize::try_from(index).ok()?;
        if index >= self.ram_pages {
            return None;
        }
        let slot = self.slot_of(index).load(Ordering::Relaxed);
        let slot = usize::try_from(slot).ok()?.checked_sub(1)?;
        Some(self.content(slot))
    }

    /// All pages as (index, content), in order of first arrival: nearly, but
    /// not always, in order of index.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        (0..self.slots_used()).map(|slot| {
            let index = self.index_in(slot).load(Ordering::Relaxed);
            (index, self.content(slot))
        })
    }

    /// Forgets all pages (they were handed on, see "A dropped epoch") and makes
    /// room ahead for the next epoch. Call it outside the pause.
    pub fn clear(&mut self) {
        let used = self.slots_used();
        self.forget_from(0);
        self.populate(used.saturating_mul(ROOM_AHEAD));
    }

    fn forget_from(&mut self, first: usize) {
        for slot in first..self.slots_used() {
            let index = self.index_in(slot).load(Ordering::Relaxed);
            if let Ok(index) = usize::try_from(index) {
                self.slot_of(index).store(0, Ordering::Relaxed);
            }
        }
        *self.len.get_mut() = first;
    }

    /// Moves every page that `next` lacks into `next`, which is newer; then
    /// `self` is empty. For an epoch that was dropped while the next one was
    /// already collected. If `next` gets full, both keep what they hold and
    /// nothing is lost: ask [`super::Tracker::give_back`] for both.
    pub fn merge_into_next(&mut self, next: &mut Staging) -> Result<(), StagingError> {
        for (index, content) in self.iter() {
            if next.get(index).is_none() {
                next.put(index, content)?;
            }
        }
        self.clear();
        Ok(())
    }

    /// Gives storage beyond the initial size back to the system, if the staging
    /// is empty. For a quiet time after a burst.
    pub fn trim(&mut self) {
        let keep = usize::try_from(STAGING_INITIAL_PAGES)
            .unwrap_or(0)
            .min(self.limit);
        if !self.is_empty() || self.populated <= keep {
            return;
        }
        let from = keep * PAGE_SIZE;
        let len = self.data.len() - from;
        if self.data.advise(from, len, libc::MADV_DONTNEED).is_ok() {
            self.populated = keep;
        }
    }
}

/// Puts pages from several threads at once; see [`Staging::putter`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Putter<'a> {
    staging: &'a Staging,
}

impl Putter<'_> {
    /// Copies the page at `source` as page `index`; false if the staging is full.
    /// Panics if the guest has no such page.
    ///
    /// # Safety
    /// `source` must be readable for a page (it may change while it is read),
    /// no two threads may put the same index at the same time, and nobody may
    /// read the staging until all are done.
    pub(super) unsafe fn put(&self, index: usize, source: *const u8) -> bool {
        let staging = self.staging;
        let known = staging.slot_of(index);
        let slot = match known.load(Ordering::Relaxed) {
            0 => {
                let slot = staging.len.fetch_add(1, Ordering::Relaxed);
                if slot >= staging.limit {
                    return false;
                }
                staging
                    .index_in(slot)
                    .store(index as u64, Ordering::Relaxed);
                // Below the limit, which is below u32::MAX.
                known.store(u32::try_from(slot + 1).unwrap_or(0), Ordering::Relaxed);
                slot
            }
            held => held as usize - 1,
        };
        let target = staging.data.at(slot * PAGE_SIZE, PAGE_SIZE);
        // SAFETY: both are a page long and apart; the slot is this thread's alone
        // by the caller's promise, or by `fetch_add` having given it out.
        unsafe { std::ptr::copy_nonoverlapping(source, target, PAGE_SIZE) };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn filled(byte: u8) -> Page {
        [byte; PAGE_SIZE]
    }

    fn held(staging: &Staging) -> BTreeMap<u64, u8> {
        staging
            .iter()
            .map(|(index, page)| (index, page[17]))
            .collect()
    }

    #[test]
    fn keeps_one_copy_of_each_page_the_newest() {
        let mut staging = Staging::new(100, 10).expect("made");
        for (index, byte) in [(7, 1), (99, 2), (7, 3), (0, 4)] {
            staging.put(index, &filled(byte)).expect("room");
        }
        assert_eq!(held(&staging), BTreeMap::from([(0, 4), (7, 3), (99, 2)]));
        assert_eq!(staging.len_pages(), 3);
        assert_eq!(staging.get(7), Some(&filled(3)));
        assert_eq!((staging.get(8), staging.get(100)), (None, None));
    }

    #[test]
    fn a_full_staging_refuses_new_pages_and_still_renews_old_ones() {
        let mut staging = Staging::new(100, 2).expect("made");
        staging.put(1, &filled(1)).expect("room");
        staging.put(2, &filled(1)).expect("room");
        let refused = staging.put(3, &filled(1));
        assert!(matches!(
            refused,
            Err(StagingError::Full { limit_pages: 2 })
        ));
        staging.put(2, &filled(9)).expect("held already");
        assert_eq!(held(&staging), BTreeMap::from([(1, 1), (2, 9)]));
        staging.clear();
        staging.put(3, &filled(1)).expect("room again");
        assert_eq!(held(&staging), BTreeMap::from([(3, 1)]));
    }

    #[test]
    fn an_index_from_outside_is_refused() {
        let mut staging = Staging::new(4, 4).expect("made");
        for index in [4, u64::MAX] {
            let refused = staging.put(index, &filled(0));
            assert!(matches!(refused, Err(StagingError::OutOfRange { .. })));
        }
        assert!(Staging::new(u64::MAX, u64::MAX).is_err());
        assert!(Staging::new(0, 0).is_err());
    }

    #[test]
    fn a_dropped_epoch_goes_under_the_next() {
        let mut dropped = Staging::new(100, 10).expect("made");
        let mut next = Staging::new(100, 3).expect("made");
        dropped.put(1, &filled(1)).expect("room");
        dropped.put(2, &filled(1)).expect("room");
        next.put(2, &filled(2)).expect("room");
        dropped.merge_into_next(&mut next).expect("fits");
        assert!(dropped.is_empty());
        assert_eq!(held(&next), BTreeMap::from([(1, 1), (2, 2)]));

        dropped.put(5, &filled(5)).expect("room");
        dropped.put(6, &filled(6)).expect("room");
        assert!(dropped.merge_into_next(&mut next).is_err());
        assert_eq!(held(&dropped), BTreeMap::from([(5, 5), (6, 6)]));
    }

    #[test]
    fn room_ahead_follows_the_last_epoch_and_is_trimmed() {
        let pages = STAGING_INITIAL_PAGES * 4;
        let initial = usize::try_from(STAGING_INITIAL_PAGES).expect("small");
        let mut staging = Staging::new(pages, pages).expect("made");
        assert_eq!(staging.populated, initial);
        for index in 0..STAGING_INITIAL_PAGES {
            staging.put(index, &filled(1)).expect("room");
        }
        staging.trim();
        assert_eq!(staging.len_pages(), STAGING_INITIAL_PAGES);
        staging.clear();
        assert_eq!(staging.populated, initial * 2);
        staging.trim();
        assert_eq!(staging.populated, initial);
    }
}
