//! Repair: place what is left over by pushing others aside. Finds most of what greedy passes
//! miss; proves nothing.
//!
//! The largest piece that is left goes where the least has to be pushed out for it, never back
//! to where it was just pushed from; what was pushed out goes to the fullest bin that takes it,
//! or is left over next (ejection chains with a short tabu). Chance comes from a fixed seed: the
//! same problem has the same answer.

use super::Problem;
use super::greedy::{NOWHERE, Scratch};
use crate::plan::layout::members;

/// Rounds for which a piece stays where it was just put.
const TABU_ROUNDS: u64 = 6;

/// How many rounds are worth it before the exact search is asked.
pub(super) fn rounds(problem: &Problem) -> u64 {
    40 * problem.pieces.len() as u64 + 200
}

/// A source of chance with a fixed seed.
pub(super) struct Chance(u64);
impl Chance {
    pub(super) const fn new() -> Self {
        Self(0x5eed)
    }

    /// A number below `n`.
    pub(super) fn below(&mut self, n: u64) -> usize {
        usize::try_from(self.next() % n.max(1)).unwrap_or(0)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Whether everything was placed; it is then in `scratch.bin_of`.
pub(super) fn mend(problem: &Problem, scratch: &mut Scratch, rounds: u64) -> bool {
    let mut left: Vec<usize> = Vec::new();
    scratch.reset(problem);
    for piece in 0..problem.pieces.len() {
        match scratch.fullest(problem, piece) {
            Some(bin) => scratch.put(problem, piece, bin),
            None => left.push(piece),
        }
    }
    continue_from(problem, scratch, left, rounds)
}

/// As [`mend`], from what `scratch` holds, with `left` to be placed.
pub(super) fn continue_from(
    problem: &Problem,
    scratch: &mut Scratch,
    mut left: Vec<usize>,
    rounds: u64,
) -> bool {
    if problem.bins.is_empty() {
        return left.is_empty();
    }
    let mut chance = Chance::new();
    let mut still_until = vec![0_u64; problem.pieces.len()];
    for round in 1..=rounds {
        // The pieces are sorted hardest first.
        let Some(at) = (0..left.len()).min_by_key(|n| left[*n]) else {
            return true;
        };
        let piece = left.swap_remove(at);
        if let Some(bin) = scratch.fullest(problem, piece) {
            scratch.put(problem, piece, bin);
            continue;
        }
        let mut best: Option<(f64, u64, u8, Vec<usize>)> = None;
        for bin in members(problem.pieces[piece].fits) {
            let bin = u8::try_from(bin).unwrap_or(NOWHERE);
            let Some(out) = push_out(problem, scratch, piece, bin, &still_until, round) else {
                continue;
            };
            let cost: f64 = out
                .iter()
                .map(|n| problem.size(&problem.pieces[*n].need))
                .sum();
            let tie = chance.next();
            if best
                .as_ref()
                .is_none_or(|(least, luck, ..)| (cost, tie) < (*least, *luck))
            {
                best = Some((cost, tie, bin, out));
            }
        }
        let Some((_, _, bin, out)) = best else {
            left.push(piece);
            // Everything is still: let time pass.
            still_until.iter_mut().for_each(|until| *until = 0);
            continue;
        };
        for other in &out {
            scratch.take(problem, *other);
        }
        scratch.put(problem, piece, bin);
        still_until[piece] = round + TABU_ROUNDS + chance.next() % 4;
        left.extend(out);
    }
    left.is_empty()
}

/// What has to leave `bin` so that `piece` fits: its rivals, and then one piece that is just
/// enough, or the largest ones until it is.
fn push_out(
    problem: &Problem,
    scratch: &Scratch,
    piece: usize,
    bin: u8,
    still_until: &[u64],
    round: u64,
) -> Option<Vec<usize>> {
    let need = &problem.pieces[piece].need;
    let total = &problem.room[usize::from(bin)];
    if (0..problem.dims).any(|k| total[k] < need[k]) {
        return None;
    }
    let mut room = scratch.room[usize::from(bin)];
    let mut out = Vec::new();
    let mut inside: Vec<usize> = Vec::new();
    for (other, until) in still_until.iter().enumerate() {
        if scratch.bin_of[other] != bin {
            continue;
        }
        let slot = problem.pieces[other].slot;
        let rival = !problem.rivals.is_empty()
            && problem
                .rivals_of(problem.pieces[piece].slot)
                .any(|r| r == slot);
        if rival {
            for (room, need) in room.iter_mut().zip(problem.pieces[other].need) {
                *room += need;
            }
            out.push(other);
        } else if *until < round {
            inside.push(other);
        }
    }
    let enough = |room: &[u64]| (0..problem.dims).all(|k| room[k] >= need[k]);
    if enough(&room) {
        return Some(out);
    }
    // The smallest single one that is enough: pieces are sorted, so look from the end.
    let single = inside.iter().rev().find(|other| {
        let other = &problem.pieces[**other].need;
        (0..problem.dims).all(|k| room[k] + other[k] >= need[k])
    });
    if let Some(single) = single {
        out.push(*single);
        return Some(out);
    }
    for other in inside {
        for (room, need) in room.iter_mut().zip(problem.pieces[other].need) {
            *room += need;
        }
        out.push(other);
        if enough(&room) {
            return Some(out);
        }
    }
    None
}
