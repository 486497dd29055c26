//! The search that decides what neither accepts nor refusals could.
//!
//! Depth first over the pieces, hardest first, each into the fullest bin first. Must never skip a
//! branch that could hold the only placement:
//!
//! - *room*: each room counts only as far as the pieces still to be placed can fill it exactly
//!   (their subset sums); what they cannot fill is worth nothing. If the rest needs more than
//!   all bins are worth, the branch is dead.
//! - *symmetry*: of bins that are worth the same and bound alike, one is tried.
//! - *dominance*, in one dimension where all bins are alike but for their room: a piece that
//!   fills a bin goes there, and where a bin takes at most one more piece, the largest goes there;
//!   any other placement can be turned into such a one by swapping.
//! - *memory*: a state (piece, worth of all bins) that failed is not searched again.

use super::Problem;
use super::bound::{REACH_UNITS_MAX, Reach, gcd};
use super::greedy::NOWHERE;
use crate::plan::layout::{DIMS_MAX, members};
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, DefaultHasher};

/// States that are remembered at most.
const MEMORY_MAX: usize = 1 << 17;
/// Tables of subset sums at most, in words: 64 MiB.
const TABLE_WORDS_MAX: u64 = 8 << 20;

/// What the search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The bin of each piece.
    Placed(Vec<u8>),
    /// There is no placement.
    None {
        /// Partial placements that were tried.
        steps: u64,
    },
    /// The budget is spent.
    Open,
}

/// What a bin is worth, per dimension, in units.
type Worth = [u64; DIMS_MAX];

struct Search<'a> {
    problem: &'a Problem,
    need: Vec<Worth>,
    room: Vec<Worth>,
    /// Bins bound alike have the same class.
    class: Vec<u8>,
    bin_of: Vec<u8>,
    slot_bin: Vec<u8>,
    /// Per piece and dimension: sums of it and those after it; none where they are too many.
    reach: Vec<Vec<Option<Reach>>>,
    /// Per piece: what it and those after it need.
    rest: Vec<Worth>,
    /// Per piece: the two smallest needs in the first dimension of it and those after it.
    two_smallest: Vec<u64>,
    failed: HashSet<Box<[u64]>, BuildHasherDefault<DefaultHasher>>,
    steps: u64,
}

struct Frame {
    key: Option<Box<[u64]>>,
    choices: Vec<u8>,
    next: usize,
}

/// Decide; at most `budget` partial placements are looked at.
#[must_use]
pub fn search(problem: &Problem, budget: u64) -> Found {
    if problem.pieces.is_empty() {
        return Found::Placed(Vec::new());
    }
    let mut search = Search::new(problem);
    let mut frames: Vec<Frame> = Vec::with_capacity(problem.pieces.len());
    match search.enter(0) {
        Some(frame) => frames.push(frame),
        None => return Found::None { steps: 1 },
    }
    while let Some(depth) = frames.len().checked_sub(1) {
        let frame = &mut frames[depth];
        if search.bin_of[depth] != NOWHERE {
            search.take(depth);
        }
        let Some(&bin) = frame.choices.get(frame.next) else {
            if let Some(frame) = frames.pop()
                && let Some(key) = frame.key
                && search.failed.len() < MEMORY_MAX
            {
                search.failed.insert(key);
            }
            continue;
        };
        frame.next += 1;
        search.put(depth, bin);
        if depth + 1 == problem.pieces.len() {
            return Found::Placed(search.bin_of);
        }
        search.steps += 1;
        if search.steps > budget {
            return Found::Open;
        }
        if let Some(frame) = search.enter(depth + 1) {
            frames.push(frame);
        }
    }
    Found::None {
        steps: search.steps,
    }
}

impl<'a> Search<'a> {
    fn new(problem: &'a Problem) -> Self {
        let (pieces, dims) = (problem.pieces.len(), problem.dims);
        let mut unit = [0; DIMS_MAX];
        let mut total: Worth = [0; DIMS_MAX];
        for piece in &problem.pieces {
            for k in 0..dims {
                unit[k] = gcd(unit[k], piece.need[k]);
                total[k] += piece.need[k];
            }
        }
        let scale = |v: &Worth, most: &Worth| {
            let mut out = [0; DIMS_MAX];
            for k in 0..dims {
                out[k] = v[k].min(most[k]) / unit[k].max(1);
            }
            out
        };
        let room: Vec<Worth> = (problem.room.iter())
            .map(|room| scale(room, &total))
            .collect();
        let need: Vec<Worth> = (problem.pieces.iter())
            .map(|piece| scale(&piece.need, &total))
            .collect();
        let mut search = Self {
            problem,
            class: classes(problem),
            bin_of: vec![NOWHERE; pieces],
            slot_bin: vec![NOWHERE; problem.slots as usize],
            reach: vec![vec![None; dims]; pieces],
            rest: vec![[0; DIMS_MAX]; pieces],
            two_smallest: vec![u64::MAX; pieces],
            failed: HashSet::default(),
            steps: 0,
            need,
            room,
        };
        search.tables();
        search
    }

    fn tables(&mut self) {
        let pieces = self.need.len();
        let mut rest: Worth = [0; DIMS_MAX];
        for n in (0..pieces).rev() {
            for (rest, need) in rest.iter_mut().zip(self.need[n]) {
                *rest += need;
            }
            self.rest[n] = rest;
        }
        for k in 0..self.problem.dims {
            let limit = self.room.iter().map(|room| room[k]).max().unwrap_or(0);
            if limit > REACH_UNITS_MAX || (limit / 64 + 1) * pieces as u64 > TABLE_WORDS_MAX {
                continue;
            }
            let mut reach = Reach::new(limit);
            for n in (0..pieces).rev() {
                reach.add(self.need[n][k]);
                self.reach[n][k] = Some(reach.clone());
            }
        }
        let (mut least, mut second) = (u64::MAX, u64::MAX);
        for n in (0..pieces).rev() {
            let need = self.need[n][0];
            if need < least {
                (least, second) = (need, least);
            } else {
                second = second.min(need);
            }
            self.two_smallest[n] = least.saturating_add(second);
        }
    }

    fn put(&mut self, piece: usize, bin: u8) {
        for (room, need) in self.room[usize::from(bin)].iter_mut().zip(self.need[piece]) {
            *room -= need;
        }
        self.bin_of[piece] = bin;
        self.slot_bin[self.problem.pieces[piece].slot as usize] = bin;
    }

    fn take(&mut self, piece: usize) {
        let bin = usize::from(self.bin_of[piece]);
        for (room, need) in self.room[bin].iter_mut().zip(self.need[piece]) {
            *room += need;
        }
        self.bin_of[piece] = NOWHERE;
        self.slot_bin[self.problem.pieces[piece].slot as usize] = NOWHERE;
    }

    fn open(&self, piece: usize) -> u64 {
        let piece = &self.problem.pieces[piece];
        let mut fits = piece.fits;
        if !self.problem.rivals.is_empty() {
            for rival in self.problem.rivals_of(piece.slot) {
                let bin = self.slot_bin[rival as usize];
                if bin != NOWHERE {
                    fits &= !(1 << bin);
                }
            }
        }
        fits
    }

    fn has_room(&self, bin: usize, piece: usize) -> bool {
        (0..self.problem.dims).all(|k| self.room[bin][k] >= self.need[piece][k])
    }

    /// What each bin is worth to `piece` and those after it.
    fn worth(&self, piece: usize) -> Vec<Worth> {
        let reach = &self.reach[piece];
        (self.room.iter())
            .map(|room| {
                let mut worth = *room;
                for (worth, reach) in worth.iter_mut().zip(reach) {
                    if let Some(reach) = reach {
                        *worth = reach.below(*worth);
                    }
                }
                worth
            })
            .collect()
    }

    /// The choices of `piece`; none if the branch is dead.
    fn enter(&mut self, piece: usize) -> Option<Frame> {
        let (problem, bins) = (self.problem, self.room.len());
        let worth = self.worth(piece);
        for k in 0..problem.dims {
            let all: u64 = worth.iter().map(|worth| worth[k]).sum();
            if all < self.rest[piece][k] {
                return None;
            }
        }
        let simple = problem.plain && problem.dims == 1;
        if !simple {
            for later in piece..self.need.len() {
                if !members(self.open(later)).any(|bin| self.has_room(bin, later)) {
                    return None;
                }
            }
        }
        let key = self.key(piece, &worth);
        if let Some(key) = &key
            && self.failed.contains(key)
        {
            return None;
        }
        let mut choices: Vec<(f64, u8)> = Vec::with_capacity(bins);
        for bin in members(self.open(piece)) {
            if !self.has_room(bin, piece) {
                continue;
            }
            let name = u8::try_from(bin).unwrap_or(NOWHERE);
            if simple
                && (worth[bin][0] == self.need[piece][0]
                    || worth[bin][0] < self.two_smallest[piece])
            {
                choices = vec![(0.0, name)];
                break;
            }
            let same = choices.iter().any(|(_, other)| {
                let other = usize::from(*other);
                self.class[other] == self.class[bin] && worth[other] == worth[bin]
            });
            if !same {
                let left: f64 = (0..problem.dims)
                    .map(|k| worth[bin][k] as f64 / self.rest[0][k].max(1) as f64)
                    .sum();
                choices.push((left, name));
            }
        }
        choices.sort_by(|a, b| a.0.total_cmp(&b.0));
        Some(Frame {
            key,
            choices: choices.into_iter().map(|(_, bin)| bin).collect(),
            next: 0,
        })
    }

    /// What decides whether `piece` and those after it can be placed.
    fn key(&self, piece: usize, worth: &[Worth]) -> Option<Box<[u64]>> {
        if self.failed.len() >= MEMORY_MAX {
            return None;
        }
        let dims = self.problem.dims;
        if !self.problem.rivals.is_empty() {
            // Which bins are closed to whom depends on who is where.
            let mut key = vec![piece as u64];
            for worth in worth {
                key.extend_from_slice(&worth[..dims]);
            }
            for (n, bin) in self.bin_of[..piece].iter().enumerate() {
                let slot = self.problem.pieces[n].slot;
                if self.problem.rivals_of(slot).next().is_some() {
                    key.push(u64::from(*bin));
                }
            }
            return Some(key.into());
        }
        let mut bins: Vec<(u8, &[u64])> = (self.class.iter())
            .zip(worth)
            .map(|(class, worth)| (*class, &worth[..dims]))
            .collect();
        bins.sort_unstable();
        let mut key = Vec::with_capacity(1 + bins.len() * dims);
        key.push(piece as u64);
        // The number of bins of each class never changes, so classes need not be written.
        for (_, worth) in bins {
            key.extend_from_slice(worth);
        }
        Some(key.into())
    }
}

/// Bins that the same pieces may go to have the same class; with rivals each is its own.
fn classes(problem: &Problem) -> Vec<u8> {
    let bins = problem.bins.len();
    let column = |bin: usize| {
        problem
            .pieces
            .iter()
            .map(move |piece| piece.fits >> bin & 1)
    };
    let mut class: Vec<u8> = Vec::with_capacity(bins);
    for bin in 0..bins {
        let twin = (0..bin)
            .filter(|_| problem.rivals.is_empty())
            .find(|other| problem.plain || column(*other).eq(column(bin)));
        class.push(match twin {
            Some(twin) => class[twin],
            None => u8::try_from(bin).unwrap_or(u8::MAX),
        });
    }
    class
}
