//! The set of pages that are dirty though the kernel no longer says so.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One bit per page of the guest. Scan threads use it at the same time, each on
/// pages of its own, so no ordering beyond the single word is needed.
#[derive(Debug)]
pub(super) struct Carried {
    words: Vec<AtomicU64>,
    /// False means: surely empty.
    any: AtomicBool,
}

impl Carried {
    pub(super) fn new(pages: usize) -> Self {
        Self {
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            any: AtomicBool::new(false),
        }
    }

    /// Adds a page; one beyond the guest is ignored.
    pub(super) fn add(&self, page: usize) {
        if let Some(word) = self.words.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            self.any.store(true, Ordering::Relaxed);
        }
    }

    /// Notes that everything was taken, if that is so.
    pub(super) fn settle(&mut self) {
        if *self.any.get_mut() {
            *self.any.get_mut() = self.words.iter_mut().any(|word| *word.get_mut() != 0);
        }
    }

    /// Pages in the set.
    pub(super) fn len(&self) -> u64 {
        if !self.any.load(Ordering::Relaxed) {
            return 0;
        }
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words.iter().map(ones).sum()
    }

    /// Removes the pages of `pages` from the set and hands each to `take`.
    pub(super) fn take(&self, pages: Range<usize>, mut take: impl FnMut(usize)) {
        if !self.any.load(Ordering::Relaxed) || pages.is_empty() {
            return;
        }
        for number in pages.start / 64..pages.end.div_ceil(64) {
            let Some(word) = self.words.get(number) else {
                return;
            };
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let first = number * 64;
            let from = pages.start.saturating_sub(first);
            let to = (pages.end - first).min(64);
            let mask = u64::MAX >> (64 - (to - from)) << from;
            let mut bits = word.fetch_and(!mask, Ordering::Relaxed) & mask;
            while bits != 0 {
                take(first + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_exactly_the_asked_range_once() {
        let mut carried = Carried::new(300);
        let all = [0, 1, 63, 64, 65, 127, 128, 200, 299];
        for page in all {
            carried.add(page);
        }
        carried.add(100_000);
        assert_eq!(carried.len(), 9);
        let mut taken = Vec::new();
        carried.take(1..128, |page| taken.push(page));
        assert_eq!(taken, [1, 63, 64, 65, 127]);
        carried.take(1..128, |page| panic!("{page} twice"));
        carried.take(5..5, |page| panic!("{page} of nothing"));
        carried.settle();
        taken.clear();
        carried.take(0..300, |page| taken.push(page));
        assert_eq!(taken, [0, 128, 200, 299]);
        carried.settle();
        assert_eq!((carried.len(), carried.any.into_inner()), (0, false));
    }
}
