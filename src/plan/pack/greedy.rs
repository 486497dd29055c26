//! Cheap accepts: a few packings of one pass each.
//!
//! Worst fit first, not because it succeeds more often (it does not) but because it spreads:
//! what it accepts stays valid when a host's room shrinks a little. Best fit decreasing follows,
//! in the orders by sum, by largest dimension and by each dimension.

use super::Problem;
use crate::plan::layout::Vector;

/// No bin.
pub(super) const NOWHERE: u8 = u8::MAX;

/// Memory that is kept from one problem to the next.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Bin of each piece.
    pub bin_of: Vec<u8>,
    pub(super) room: Vec<Vector>,
    pub(super) slot_bin: Vec<u8>,
    order: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    Worst,
    Best,
}

/// Whether one of the packings places everything; it is then in `scratch.bin_of`.
pub(super) fn any(problem: &Problem, scratch: &mut Scratch) -> bool {
    if problem.pieces.is_empty() {
        scratch.bin_of.clear();
        return true;
    }
    if problem.bins.is_empty() {
        return false;
    }
    scratch.order.clear();
    scratch
        .order
        .extend(0..u32::try_from(problem.pieces.len()).unwrap_or(u32::MAX));
    if problem.plain && problem.dims == 1 {
        return flat(problem, scratch, Rule::Worst) || flat(problem, scratch, Rule::Best);
    }
    if pack(problem, scratch, Rule::Worst) || pack(problem, scratch, Rule::Best) {
        return true;
    }
    for k in 0..problem.dims {
        if problem.dims > 1 {
            let key = |n: &u32| std::cmp::Reverse(problem.pieces[*n as usize].need[k]);
            scratch.order.sort_by_key(key);
            if pack(problem, scratch, Rule::Best) {
                return true;
            }
        }
    }
    if problem.dims > 1 {
        let largest = |n: u32| {
            let need = &problem.pieces[n as usize].need;
            (0..problem.dims)
                .map(|k| need[k] as f64 * problem.weight[k])
                .fold(0.0, f64::max)
        };
        scratch
            .order
            .sort_by(|a, b| largest(*b).total_cmp(&largest(*a)));
        return pack(problem, scratch, Rule::Best);
    }
    false
}

/// One dimension, no bounds but room: the loop that runs for nearly every set.
fn flat(problem: &Problem, scratch: &mut Scratch, rule: Rule) -> bool {
    let mut room = [0_u64; 64];
    let bins = problem.bins.len();
    for (to, from) in room.iter_mut().zip(&problem.room) {
        *to = from[0];
    }
    let room = &mut room[..bins];
    scratch.bin_of.clear();
    for piece in &problem.pieces {
        let need = piece.need[0];
        let mut best = usize::MAX;
        let mut score = match rule {
            Rule::Worst => 0,
            Rule::Best => u64::MAX,
        };
        for (bin, &have) in room.iter().enumerate() {
            let better = match rule {
                Rule::Worst => have >= need && (have > score || best == usize::MAX),
                Rule::Best => have >= need && have < score,
            };
            if better {
                score = have;
                best = bin;
            }
        }
        if best == usize::MAX {
            return false;
        }
        room[best] -= need;
        scratch.bin_of.push(u8::try_from(best).unwrap_or(NOWHERE));
    }
    true
}

fn pack(problem: &Problem, scratch: &mut Scratch, rule: Rule) -> bool {
    scratch.reset(problem);
    for n in 0..scratch.order.len() {
        let piece = scratch.order[n] as usize;
        let Some(bin) = scratch.choose(problem, piece, rule) else {
            return false;
        };
        scratch.put(problem, piece, bin);
    }
    true
}

impl Scratch {
    /// Nothing is placed.
    pub(super) fn reset(&mut self, problem: &Problem) {
        self.room.clear();
        self.room.extend_from_slice(&problem.room);
        self.bin_of.clear();
        self.bin_of.resize(problem.pieces.len(), NOWHERE);
        self.slot_bin.clear();
        self.slot_bin.resize(problem.slots as usize, NOWHERE);
    }

    /// The bins a piece may go to now, room left aside.
    pub(super) fn open(&self, problem: &Problem, piece: usize) -> u64 {
        let piece = &problem.pieces[piece];
        let mut fits = piece.fits;
        if !problem.rivals.is_empty() {
            for rival in problem.rivals_of(piece.slot) {
                let bin = self.slot_bin[rival as usize];
                if bin != NOWHERE {
                    fits &= !(1 << bin);
                }
            }
        }
        fits
    }

    /// Whether a piece may go to a bin, and has room there.
    pub(super) fn takes(&self, problem: &Problem, piece: usize, bin: usize) -> bool {
        let need = &problem.pieces[piece].need;
        self.open(problem, piece) >> bin & 1 == 1
            && (0..problem.dims).all(|k| self.room[bin][k] >= need[k])
    }

    /// The fullest bin that takes a piece.
    pub(super) fn fullest(&self, problem: &Problem, piece: usize) -> Option<u8> {
        self.choose(problem, piece, Rule::Best)
    }

    fn choose(&self, problem: &Problem, piece: usize, rule: Rule) -> Option<u8> {
        let need = &problem.pieces[piece].need;
        let mut best: Option<(u8, f64)> = None;
        for bin in super::super::layout::members(self.open(problem, piece)) {
            let room = &self.room[bin];
            if (0..problem.dims).any(|k| room[k] < need[k]) {
                continue;
            }
            let left: f64 = (0..problem.dims)
                .map(|k| (room[k] - need[k]) as f64 * problem.weight[k])
                .sum();
            let better = best.is_none_or(|(_, score)| match rule {
                Rule::Worst => left > score,
                Rule::Best => left < score,
            });
            if better {
                best = Some((u8::try_from(bin).unwrap_or(NOWHERE), left));
            }
        }
        best.map(|(bin, _)| bin)
    }

    pub(super) fn put(&mut self, problem: &Problem, piece: usize, bin: u8) {
        let (slot, need) = (problem.pieces[piece].slot, &problem.pieces[piece].need);
        for (room, need) in self.room[usize::from(bin)].iter_mut().zip(need) {
            *room -= need;
        }
        self.bin_of[piece] = bin;
        self.slot_bin[slot as usize] = bin;
    }

    pub(super) fn take(&mut self, problem: &Problem, piece: usize) {
        let bin = self.bin_of[piece];
        let (slot, need) = (problem.pieces[piece].slot, &problem.pieces[piece].need);
        for (room, need) in self.room[usize::from(bin)].iter_mut().zip(need) {
            *room += need;
        }
        self.bin_of[piece] = NOWHERE;
        self.slot_bin[slot as usize] = NOWHERE;
    }
}
