//! What the primary sent last of the pages a guest dirties again and again: the bases of
//! patches.
//!
//! # Why a base is never wrong
//!
//! An entry is the page as the last epoch frame that named it said, and the standby applies
//! the epochs of one lane in their order, each entry in its order. So when the standby comes
//! to an entry, its RAM holds for that page what this cache held when the entry was encoded.
//! What would break this empties the cache: a new lane has a new one, and an epoch that was
//! begun and not ended clears it ([`Bases::clear`]). Seeding never fills it. Should all of
//! that fail, the patch's checksum refuses the outcome.
//!
//! # Which pages are worth a place
//!
//! A page dirtied again. Each place counts its hits, up to [`HEAT_MAX`]; a newcomer that finds
//! the cache full looks at the next few places in turn (a clock hand), cools each by one,
//! and takes the first that is cold. If none is, it goes without. So one pass over much
//! memory, whose pages are never seen again, cannot push out the pages that are hit in
//! every epoch, and the work for a newcomer is bounded.

use super::Page;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Most hits that count for a place: epochs it may go without one and still stay.
const HEAT_MAX: u8 = 3;
/// Places a newcomer looks at.
const LOOKS: usize = 4;
/// Pages allocated at a time: 1 MiB, so that a small working set takes little.
const CHUNK_PAGES: usize = 256;

/// Page indices are not chosen to collide: one multiplication spreads them well enough
/// (Fibonacci hashing, Knuth, TAOCP vol. 3, 6.4), where the default hash would cost more than
/// comparing half a page.
#[derive(Default)]
struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, index: u64) {
        let product = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }
}

#[derive(Clone, Copy)]
struct Place {
    index: u64,
    heat: u8,
}

/// The cache.
pub(crate) struct Bases {
    max_pages: usize,
    places: Vec<Place>,
    chunks: Vec<Box<[Page]>>,
    by_index: HashMap<u64, u32, BuildHasherDefault<IndexHasher>>,
    hand: usize,
}

impl std::fmt::Debug for Bases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Bases({} of {} pages)",
            self.places.len(),
            self.max_pages
        )
    }
}

impl Bases {
    /// An empty cache of at most `max_bytes` of pages.
    pub(crate) fn new(max_bytes: u64) -> Self {
        let pages = max_bytes / super::PAGE_BYTES as u64;
        Self {
            max_pages: usize::try_from(pages.min(u64::from(u32::MAX))).unwrap_or(usize::MAX),
            places: Vec::new(),
            chunks: Vec::new(),
            by_index: HashMap::default(),
            hand: 0,
        }
    }

    /// Forget everything; keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.places.clear();
        self.by_index.clear();
        self.hand = 0;
    }

    /// Bytes of pages held.
    pub(crate) fn bytes(&self) -> u64 {
        self.places.len() as u64 * super::PAGE_BYTES as u64
    }

    fn page_mut(&mut self, place: usize) -> &mut Page {
        &mut self.chunks[place / CHUNK_PAGES][place % CHUNK_PAGES]
    }

    /// What the standby will hold of page `index` when it comes to the next entry. Whoever
    /// asks must make it what that entry says.
    pub(crate) fn get(&mut self, index: u64) -> Option<&mut Page> {
        let place = *self.by_index.get(&index)? as usize;
        let heat = &mut self.places[place].heat;
        *heat = (*heat + 1).min(HEAT_MAX);
        Some(self.page_mut(place))
    }

    /// Keep page `index`, which has no place yet, if there is one for it.
    pub(crate) fn admit(&mut self, index: u64, page: &Page) {
        let Some(place) = self.find_place() else {
            return;
        };
        let new = Place { index, heat: 0 };
        match self.places.get_mut(place) {
            Some(old) => {
                let old = std::mem::replace(old, new);
                self.by_index.remove(&old.index);
            }
            None => self.places.push(new),
        }
        let Ok(number) = u32::try_from(place) else {
            return;
        };
        self.by_index.insert(index, number);
        *self.page_mut(place) = *page;
    }

    fn find_place(&mut self) -> Option<usize> {
        if self.places.len() < self.max_pages {
            if self.places.len() == self.chunks.len() * CHUNK_PAGES {
                let chunk = vec![[0; super::PAGE_BYTES]; CHUNK_PAGES];
                self.chunks.push(chunk.into_boxed_slice());
            }
            return Some(self.places.len());
        }
        for _ in 0..LOOKS.min(self.places.len()) {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.places.len();
            let heat = &mut self.places[at].heat;
            if *heat == 0 {
                return Some(at);
            }
            *heat -= 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::PAGE_BYTES;
    use super::*;

    fn page(byte: u8) -> Page {
        [byte; PAGE_BYTES]
    }

    /// One page of an epoch, as the encoder does it.
    fn sent(bases: &mut Bases, index: u64, content: u8) -> bool {
        if let Some(base) = bases.get(index) {
            *base = page(content);
            return true;
        }
        bases.admit(index, &page(content));
        false
    }

    #[test]
    fn what_was_sent_is_held_until_cleared() {
        let mut bases = Bases::new(1 << 20);
        for index in 0..100 {
            assert!(!sent(&mut bases, index * 7, 1));
        }
        for index in 0..100 {
            assert!(sent(&mut bases, index * 7, 2));
        }
        assert!(bases.get(14).is_some_and(|held| *held == page(2)));
        assert_eq!(bases.bytes(), 100 * 4096);
        bases.clear();
        assert!(bases.get(14).is_none());
        assert_eq!(bases.bytes(), 0);
    }

    #[test]
    fn the_limit_holds_and_no_place_is_used_twice() {
        let mut bases = Bases::new(10 * 4096);
        for round in 0..50u8 {
            for index in 0..40 {
                sent(
                    &mut bases,
                    index,
                    round.wrapping_add(u8::try_from(index).unwrap()),
                );
            }
            assert!(bases.bytes() <= 10 * 4096);
            assert_eq!(bases.by_index.len(), bases.places.len());
            // Whatever is still held is what was sent last.
            for index in 0..40u64 {
                let expected = page(round.wrapping_add(u8::try_from(index).unwrap()));
                if let Some(held) = bases.get(index) {
                    assert!(*held == expected, "page {index}");
                }
            }
        }
    }

    #[test]
    fn one_pass_over_much_memory_leaves_the_hot_pages() {
        let mut bases = Bases::new(100 * 4096);
        for _ in 0..4 {
            for index in 0..50 {
                sent(&mut bases, index, 1);
            }
        }
        let mut stranger = 1000;
        for _ in 0..20 {
            for _ in 0..30 {
                stranger += 1;
                sent(&mut bases, stranger, 1);
            }
            let kept = (0..50).filter(|index| sent(&mut bases, *index, 1)).count();
            assert!(kept >= 45, "{kept} of 50 hot pages kept");
        }
    }

    #[test]
    fn without_room_nothing_is_held() {
        let mut bases = Bases::new(4095);
        assert!(!sent(&mut bases, 1, 1) && !sent(&mut bases, 1, 1));
    }
}
