//! Live seeding: the first full copy, made while the guest runs.
//!
//! First everything that has storage, then rounds over what was written
//! meanwhile, until little is left. The guest must be tracked since before the
//! start. Afterwards the first checkpoint collects the rest, and the standby is
//! whole. Holes are never read nor sent: the standby's image starts as a hole.
//!
//! If it fails, the pages of the current round that were not handed on are
//! carried in the tracker. A sink that starts anew must be seeded anew.

use super::image::{ImageError, RamView};
use super::tracker::{PRECOPY_WORTH_PAGES, TrackError, Tracker};
use super::{PAGE_SIZE, Page};
use std::ops::Range;

/// Rounds after the first pass by default: two or three are enough for a guest
/// that the link can follow at all; one that dirties faster never gets there.
pub const SEED_ROUNDS: u32 = 4;

/// Pages between two reports of progress: 4 MiB, some milliseconds.
const PROGRESS_PAGES: u64 = 1024;

/// When seeding stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedLimits {
    /// Rounds of scan-and-copy after the first pass, at most.
    pub rounds_max: u32,
    /// A round that finds at most this many dirty pages is the last.
    pub small_pages: u64,
}

impl Default for SeedLimits {
    fn default() -> Self {
        Self {
            rounds_max: SEED_ROUNDS,
            // What a checkpoint copies in about 2 ms.
            small_pages: PRECOPY_WORTH_PAGES,
        }
    }
}

/// How far seeding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedProgress {
    /// 0 = first pass over all allocated memory, then the rounds.
    pub round: u32,
    /// Bytes of this round handed to the sink.
    pub bytes_done: u64,
    /// Bytes of this round in all.
    pub bytes_total: u64,
}

/// What seeding did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedOutcome {
    /// Rounds after the first pass.
    pub rounds: u32,
    /// Pages handed to the sink, repeats counted.
    pub pages_sent: u64,
    /// Dirty pages the last round found: what the first checkpoint may expect.
    pub last_dirty_pages: u64,
    /// True if the last round was small enough, false if the rounds ran out.
    pub converged: bool,
}

/// Why seeding failed; `E` is the sink's error.
#[derive(Debug, thiserror::Error)]
pub enum SeedError<E> {
    /// Tracking failed.
    #[error("seeding: {0}")]
    Track(#[from] TrackError),
    /// The RAM file could not be read.
    #[error("seeding: {0}")]
    Image(#[from] ImageError),
    /// The sink refused a page.
    #[error("seeding: cannot hand page {index} on: {source}")]
    Sink {
        /// The page.
        index: u64,
        /// The sink's error.
        source: E,
    },
}

/// What seeding needs of the primary's memory; a [`Tracker`] outside of tests.
pub trait SeedSource {
    /// The ranges that are not surely zero.
    fn allocated(&self) -> Result<Vec<Range<u64>>, ImageError>;
    /// The page as it is now; may be torn, and is dirty again then.
    fn copy_page(&self, index: u64, into: &mut Page);
    /// Arms and appends what was written since the last call; returns its pages.
    fn scan_dirty(&mut self, dirty: &mut Vec<Range<u64>>) -> Result<u64, TrackError>;
    /// Takes ranges back that were not handed on.
    fn carry(&mut self, pages: &[Range<u64>]);
}

impl SeedSource for Tracker {
    fn allocated(&self) -> Result<Vec<Range<u64>>, ImageError> {
        self.view().allocated_ranges()
    }
    fn copy_page(&self, index: u64, into: &mut Page) {
        RamView::copy_page(self.view(), index, into);
    }
    fn scan_dirty(&mut self, dirty: &mut Vec<Range<u64>>) -> Result<u64, TrackError> {
        Tracker::scan_dirty(self, dirty)
    }
    fn carry(&mut self, pages: &[Range<u64>]) {
        Tracker::carry(self, pages);
    }
}

/// Hands every page the standby needs to `sink` while the guest runs. The sink
/// may block (back-pressure); an error ends seeding. `progress` is called every
/// 4 MiB and at the end of each round. Afterwards one checkpoint makes the
/// standby whole.
pub fn seed<E>(
    source: &mut impl SeedSource,
    limits: SeedLimits,
    sink: &mut dyn FnMut(u64, &Page) -> Result<(), E>,
    progress: &mut dyn FnMut(SeedProgress),
) -> Result<SeedOutcome, SeedError<E>> {
    let first = source.allocated()?;
    let mut outcome = SeedOutcome {
        rounds: 0,
        pages_sent: hand_on(source, &first, 0, sink, progress)?,
        last_dirty_pages: 0,
        converged: false,
    };
    let mut dirty = Vec::new();
    while outcome.rounds < limits.rounds_max && !outcome.converged {
        outcome.rounds += 1;
        dirty.clear();
        outcome.last_dirty_pages = source.scan_dirty(&mut dirty)?;
        outcome.pages_sent += hand_on(source, &dirty, outcome.rounds, sink, progress)?;
        outcome.converged = outcome.last_dirty_pages <= limits.small_pages;
    }
    Ok(outcome)
}

/// One round. Returns the pages handed on.
fn hand_on<E>(
    source: &mut impl SeedSource,
    ranges: &[Range<u64>],
    round: u32,
    sink: &mut dyn FnMut(u64, &Page) -> Result<(), E>,
    progress: &mut dyn FnMut(SeedProgress),
) -> Result<u64, SeedError<E>> {
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut report = |done: u64| {
        progress(SeedProgress {
            round,
            bytes_done: done * PAGE_SIZE as u64,
            bytes_total: total * PAGE_SIZE as u64,
        });
    };
    let mut page = [0; PAGE_SIZE];
    let mut done = 0;
    for (number, range) in ranges.iter().enumerate() {
        for index in range.clone() {
            source.copy_page(index, &mut page);
            if let Err(error) = sink(index, &page) {
                source.carry(std::slice::from_ref(&(index..range.end)));
                source.carry(ranges.get(number + 1..).unwrap_or_default());
                return Err(SeedError::Sink {
                    index,
                    source: error,
                });
            }
            done += 1;
            if done % PROGRESS_PAGES == 0 && done < total {
                report(done);
            }
        }
    }
    report(done);
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// A guest whose pages are versions; it writes `writes[n]` before scan n.
    #[derive(Default)]
    struct Guest {
        memory: BTreeMap<u64, u8>,
        dirty: BTreeSet<u64>,
        carried: Vec<Range<u64>>,
        writes: Vec<Vec<u64>>,
        scans: usize,
    }

    impl Guest {
        fn write(&mut self, index: u64) {
            *self.memory.entry(index).or_default() += 1;
            self.dirty.insert(index);
        }
    }

    impl SeedSource for Guest {
        fn allocated(&self) -> Result<Vec<Range<u64>>, ImageError> {
            Ok(self.memory.keys().map(|index| *index..index + 1).collect())
        }
        fn copy_page(&self, index: u64, into: &mut Page) {
            into.fill(self.memory.get(&index).copied().unwrap_or(0));
        }
        fn scan_dirty(&mut self, dirty: &mut Vec<Range<u64>>) -> Result<u64, TrackError> {
            for index in self.writes.get(self.scans).cloned().unwrap_or_default() {
                self.write(index);
            }
            self.scans += 1;
            let found = std::mem::take(&mut self.dirty);
            dirty.extend(found.iter().map(|index| *index..index + 1));
            Ok(found.len() as u64)
        }
        fn carry(&mut self, pages: &[Range<u64>]) {
            self.carried.extend_from_slice(pages);
        }
    }

    fn guest(pages: u64, writes: &[&[u64]]) -> Guest {
        let mut guest = Guest {
            writes: writes.iter().map(|pages| pages.to_vec()).collect(),
            ..Guest::default()
        };
        (0..pages).for_each(|index| guest.write(index * 3));
        guest.dirty.clear();
        guest
    }

    const LIMITS: SeedLimits = SeedLimits {
        rounds_max: 5,
        small_pages: 2,
    };

    #[test]
    fn the_copy_is_whole_when_the_guest_rests() {
        let mut guest = guest(3000, &[&[0, 3, 6, 9, 10_000], &[3, 6]]);
        let (mut copy, mut reports) = (BTreeMap::new(), Vec::new());
        let outcome = seed::<()>(
            &mut guest,
            LIMITS,
            &mut |index, page| {
                copy.insert(index, page[0]);
                Ok(())
            },
            &mut |report| reports.push(report),
        )
        .expect("seeded");
        assert_eq!(copy, guest.memory);
        let expected = SeedOutcome {
            rounds: 2,
            pages_sent: 3007,
            last_dirty_pages: 2,
            converged: true,
        };
        assert_eq!(outcome, expected);
        let bytes_total = 3000 * 4096;
        let done: Vec<u64> = reports.iter().map(|r| r.bytes_done / 4096).collect();
        assert_eq!(done, [1024, 2048, 3000, 5, 2]);
        assert!(
            reports[..3]
                .iter()
                .all(|r| r.bytes_total == bytes_total && r.round == 0)
        );
    }

    #[test]
    fn rounds_run_out_under_a_busy_guest() {
        let busy: &[u64] = &[0, 3, 6];
        let mut guest = guest(3, &[busy; 9]);
        let outcome = seed::<()>(&mut guest, LIMITS, &mut |_, _| Ok(()), &mut |_| ());
        let outcome = outcome.expect("seeded");
        assert!(!outcome.converged);
        assert_eq!((outcome.rounds, outcome.last_dirty_pages), (5, 3));
    }

    #[test]
    fn what_the_sink_refuses_is_carried() {
        let mut guest = guest(2, &[&[30, 33, 36]]);
        let mut sent = 0;
        let outcome = seed(
            &mut guest,
            LIMITS,
            &mut |_, _| {
                sent += 1;
                if sent == 4 { Err("link down") } else { Ok(()) }
            },
            &mut |_| (),
        );
        assert!(matches!(
            outcome,
            Err(SeedError::Sink {
                index: 33,
                source: "link down"
            })
        ));
        let carried: Vec<u64> = guest.carried.into_iter().flatten().collect();
        assert_eq!(carried, [33, 36]);
    }
}
