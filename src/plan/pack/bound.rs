//! Cheap refusals: numbers that no placement can reach, in words an operator can check.
//!
//! Each is applied to all pieces and, where VMs are bound to some hosts, to those that have
//! nowhere else to go. In one dimension at a time a bin of size c that holds pieces x1, x2, …
//! has x1 + x2 + … <= c, and therefore for every superadditive f also f(x1) + f(x2) + … <= f(c)
//! (dual feasible functions; Clautiaux, Alves, Valerio de Carvalho, "A survey of dual-feasible
//! and superadditive functions", 2010). Used are floor(x / t), ceil(x / t) - 1, the number of
//! pieces of at least t, and the largest sum of pieces of at least t that stays within c.

use super::Problem;
use crate::plan::layout::DIMS_MAX;

/// Why a problem has no placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// All bins together have less than is needed.
    Sum {
        /// Place of the dimension.
        dim: usize,
        /// Needed.
        need: u64,
        /// Free.
        have: u64,
        /// Hosts it is about.
        hosts: u64,
    },
    /// One piece fits nowhere.
    Single {
        /// Its slot.
        slot: u32,
    },
    /// There are more pieces of a size than places for them.
    Count {
        /// Place of the dimension.
        dim: usize,
        /// Pieces of at least this.
        least: u64,
        /// So many there are.
        pieces: u64,
        /// So many have room.
        places: u64,
        /// Hosts it is about.
        hosts: u64,
    },
    /// What is free lies in gaps that the pieces cannot fill.
    Gaps {
        /// Place of the dimension.
        dim: usize,
        /// Pieces of at least this.
        least: u64,
        /// They need.
        need: u64,
        /// What they can fill.
        usable: u64,
        /// Hosts it is about.
        hosts: u64,
    },
    /// Counted in whole steps, there is less than is needed.
    Steps {
        /// Place of the dimension.
        dim: usize,
        /// Size of a step.
        step: u64,
        /// Whether a step that is just filled counts as none.
        strict: bool,
        /// Needed.
        need: u64,
        /// Free.
        have: u64,
        /// Hosts it is about.
        hosts: u64,
    },
    /// All placements were tried.
    Search {
        /// How many partial ones that took.
        steps: u64,
    },
}

/// Restrictions to sets of bins that are looked at; each VM's own come first.
const MASKS_MAX: usize = 256;
/// Largest bin, counted in the greatest common divisor of the pieces, for which sums are tabled.
pub(super) const REACH_UNITS_MAX: u64 = 1 << 17;

/// A bound that shows that there is no placement; none if the cheap ones show nothing.
#[must_use]
pub fn refuse(problem: &Problem) -> Option<Bound> {
    for piece in &problem.pieces {
        let mut bins = crate::plan::layout::members(piece.fits);
        if !bins.any(|bin| problem.has_room(bin, &piece.need)) {
            return Some(Bound::Single { slot: piece.slot });
        }
    }
    let all = (0..problem.bins.len()).fold(0_u64, |set, bin| set | 1 << bin);
    let mut masks = vec![all];
    if !problem.plain {
        for piece in &problem.pieces {
            if masks.len() < MASKS_MAX && !masks.contains(&piece.fits) {
                masks.push(piece.fits);
            }
        }
        // Two restrictions together can be violated where neither is.
        for a in 1..masks.len() {
            for b in 1..a {
                let both = masks[a] | masks[b];
                if masks.len() < MASKS_MAX && !masks.contains(&both) {
                    masks.push(both);
                }
            }
        }
    }
    masks
        .iter()
        .find_map(|mask| (0..problem.dims).find_map(|dim| one(problem, *mask, dim)))
}

/// One dimension, and only the pieces that cannot leave `mask`.
fn one(problem: &Problem, mask: u64, dim: usize) -> Option<Bound> {
    let mut needs: Vec<u64> = problem
        .pieces
        .iter()
        .filter(|piece| piece.fits & !mask == 0 && piece.need[dim] > 0)
        .map(|piece| piece.need[dim])
        .collect();
    if needs.is_empty() {
        return None;
    }
    needs.sort_unstable_by(|a, b| b.cmp(a));
    let need: u64 = needs.iter().sum();
    let rooms: Vec<u64> = crate::plan::layout::members(mask)
        .map(|bin| problem.room[bin][dim].min(need))
        .collect();
    let hosts =
        crate::plan::layout::members(mask).fold(0, |set: u64, bin| set | 1 << problem.bins[bin]);
    let have: u64 = crate::plan::layout::members(mask)
        .map(|bin| problem.room[bin][dim])
        .sum();
    if need > have {
        return Some(Bound::Sum {
            dim,
            need,
            have,
            hosts,
        });
    }
    count(dim, hosts, &needs, &rooms)
        .or_else(|| steps(dim, hosts, &needs, &rooms))
        .or_else(|| gaps(dim, hosts, &needs, &rooms))
}

/// Per threshold: each bin takes at most as many as the smallest of them would.
fn count(dim: usize, hosts: u64, needs: &[u64], rooms: &[u64]) -> Option<Bound> {
    for last in 0..needs.len() {
        let least = needs[last];
        if needs.get(last + 1) == Some(&least) {
            continue;
        }
        let mut places = 0;
        for room in rooms {
            let mut left = *room;
            for need in needs[..=last].iter().rev() {
                if *need > left {
                    break;
                }
                left -= need;
                places += 1;
            }
        }
        let pieces = last as u64 + 1;
        if places < pieces {
            return Some(Bound::Count {
                dim,
                least,
                pieces,
                places,
                hosts,
            });
        }
    }
    None
}

fn steps(dim: usize, hosts: u64, needs: &[u64], rooms: &[u64]) -> Option<Bound> {
    let mut sizes = needs.to_vec();
    sizes.dedup();
    for step in sizes {
        for strict in [false, true] {
            let f = |x: u64| {
                if strict {
                    x.div_ceil(step).saturating_sub(1)
                } else {
                    x / step
                }
            };
            let need: u64 = needs.iter().map(|x| f(*x)).sum();
            let have: u64 = rooms.iter().map(|c| f(*c)).sum();
            if need > have {
                return Some(Bound::Steps {
                    dim,
                    step,
                    strict,
                    need,
                    have,
                    hosts,
                });
            }
        }
    }
    None
}

fn gaps(dim: usize, hosts: u64, needs: &[u64], rooms: &[u64]) -> Option<Bound> {
    let unit = needs.iter().fold(0, |a, b| gcd(a, *b));
    let largest = rooms.iter().max()? / unit;
    if largest > REACH_UNITS_MAX {
        return None;
    }
    let mut reach = Reach::new(largest);
    let mut need = 0;
    for (n, size) in needs.iter().enumerate() {
        reach.add(size / unit);
        need += size;
        if needs.get(n + 1) == Some(size) {
            continue;
        }
        let usable: u64 = rooms.iter().map(|c| reach.below(c / unit) * unit).sum();
        if usable < need {
            return Some(Bound::Gaps {
                dim,
                least: *size,
                need,
                usable,
                hosts,
            });
        }
    }
    None
}

/// Greatest common divisor; `gcd(0, b) = b`.
pub(super) const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while a != 0 {
        (a, b) = (b % a, a);
    }
    b
}

/// Which sums some pieces can have, up to a limit: one bit per sum.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    bits: Vec<u64>,
    limit: u64,
}

impl Reach {
    pub(super) fn new(limit: u64) -> Self {
        let words = usize::try_from(limit / 64 + 1).unwrap_or(usize::MAX);
        let mut bits = vec![0; words];
        bits[0] = 1;
        Self { bits, limit }
    }

    /// One more piece.
    pub(super) fn add(&mut self, size: u64) {
        if size == 0 || size > self.limit {
            return;
        }
        let words = usize::try_from(size / 64).unwrap_or(usize::MAX);
        let shift = size % 64;
        for to in (words..self.bits.len()).rev() {
            let from = to - words;
            let mut moved = self.bits[from] << shift;
            if shift > 0 && from > 0 {
                moved |= self.bits[from - 1] >> (64 - shift);
            }
            self.bits[to] |= moved;
        }
    }

    /// The largest sum that is no more than `most`.
    pub(super) fn below(&self, most: u64) -> u64 {
        let most = most.min(self.limit);
        let mut word = usize::try_from(most / 64).unwrap_or(usize::MAX);
        let mut bits = self.bits[word] & (u64::MAX >> (63 - most % 64));
        while bits == 0 {
            // Sum 0 is always there.
            word -= 1;
            bits = self.bits[word];
        }
        word as u64 * 64 + 63 - u64::from(bits.leading_zeros())
    }
}

const _: () = assert!(DIMS_MAX <= 8);
