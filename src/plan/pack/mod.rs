//! One set of failures: do the lost VMs fit on the survivors, and where? Exact.
//!
//! Cheap accepts first ([`greedy`]), then cheap refusals ([`bound`]), then accepts that take longer
//! ([`fill`], [`mend`]), and only for what is still open the [`exact`] search.
//!
//! Must never: return a placement that breaks a room, or refuse what has one. Accepts are
//! checked by construction; refusals are theorems whose numbers are in [`Bound`].

pub mod bound;
pub mod exact;
pub mod fill;
pub mod greedy;
pub mod mend;

pub use bound::Bound;
pub use greedy::Scratch;

use super::layout::{DIMS_MAX, Vector};

/// A VM that must restart, or several that go to one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What it takes.
    pub need: Vector,
    /// Bins it may go to.
    pub fits: u64,
    /// Its place in the answer; that of the first for several.
    pub slot: u32,
}

/// Pieces and the bins they are to go to.
#[derive(Clone, Debug, Default)]
pub struct Problem {
    /// How many dimensions are in use.
    pub dims: usize,
    /// What one unit of each dimension counts when they are added up.
    pub weight: [f64; DIMS_MAX],
    /// The host of each bin.
    pub bins: Vec<u8>,
    /// What each bin has free.
    pub room: Vec<Vector>,
    /// The pieces, hardest first.
    pub pieces: Vec<Piece>,
    /// How many VMs the answer has.
    pub slots: u32,
    /// (leader, follower): slots that go to one bin.
    pub joined: Vec<(u32, u32)>,
    /// Pairs of slots that must not share a bin, in both directions, sorted.
    pub rivals: Vec<(u32, u32)>,
    /// Whether every piece may go to every bin, with any other.
    pub plain: bool,
}

/// What is known of a problem.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// A host for each slot.
    Fits(Box<[u8]>),
    /// There is no placement.
    Refused(Bound),
    /// The budget is spent.
    Open,
}

impl Problem {
    /// Bring the pieces into the order of the search: few choices first, then large first.
    pub fn sort(&mut self) {
        if self.plain && self.dims == 1 {
            self.pieces
                .sort_unstable_by_key(|piece| (std::cmp::Reverse(piece.need[0]), piece.slot));
            return;
        }
        let size = |piece: &Piece| self.size(&piece.need);
        let mut order: Vec<(u32, f64, usize)> = (self.pieces.iter().enumerate())
            .map(|(n, piece)| {
                let choices = (0..self.bins.len())
                    .filter(|bin| piece.fits >> bin & 1 == 1 && self.has_room(*bin, &piece.need));
                let choices = u32::try_from(choices.count()).unwrap_or(u32::MAX);
                (choices, size(piece), n)
            })
            .collect();
        order.sort_unstable_by(|a, b| {
            (a.0.cmp(&b.0))
                .then(b.1.total_cmp(&a.1))
                .then(a.2.cmp(&b.2))
        });
        let pieces = order
            .into_iter()
            .map(|(_, _, n)| self.pieces[n].clone())
            .collect();
        self.pieces = pieces;
    }

    /// All dimensions of a need in one number.
    #[must_use]
    pub fn size(&self, need: &Vector) -> f64 {
        (0..self.dims)
            .map(|k| need[k] as f64 * self.weight[k])
            .sum()
    }

    fn has_room(&self, bin: usize, need: &Vector) -> bool {
        (0..self.dims).all(|k| self.room[bin][k] >= need[k])
    }

    /// The slots that must not share a bin with this one.
    pub(super) fn rivals_of(&self, slot: u32) -> impl Iterator<Item = u32> {
        let from = self.rivals.partition_point(|(a, _)| *a < slot);
        self.rivals[from..]
            .iter()
            .take_while(move |(a, _)| *a == slot)
            .map(|(_, b)| *b)
    }

    /// The bin of each piece as a host for each slot.
    pub(super) fn answer(&self, bin_of: &[u8]) -> Box<[u8]> {
        let mut hosts = vec![0; self.slots as usize];
        for (piece, bin) in self.pieces.iter().zip(bin_of) {
            hosts[piece.slot as usize] = self.bins[usize::from(*bin)];
        }
        for (leader, follower) in &self.joined {
            hosts[*follower as usize] = hosts[*leader as usize];
        }
        hosts.into()
    }
}

/// Try the cheap accepts.
pub fn quick(problem: &Problem, scratch: &mut Scratch) -> Option<Box<[u8]>> {
    greedy::any(problem, scratch).then(|| problem.answer(&scratch.bin_of))
}

/// Decide a problem that the cheap accepts did not; `steps` bounds the exact search.
pub fn decide(problem: &Problem, scratch: &mut Scratch, steps: u64) -> Verdict {
    if let Some(bound) = bound::refuse(problem) {
        return Verdict::Refused(bound);
    }
    if fill::fill(problem, scratch) || mend::mend(problem, scratch, mend::rounds(problem)) {
        return Verdict::Fits(problem.answer(&scratch.bin_of));
    }
    match exact::search(problem, steps) {
        exact::Found::Placed(bin_of) => Verdict::Fits(problem.answer(&bin_of)),
        exact::Found::None { steps } => Verdict::Refused(Bound::Search { steps }),
        exact::Found::Open => Verdict::Open,
    }
}

/// Place anew what was placed before: `hints` has the host of each slot that has one. What does
/// not fit any more, and what is new, is placed by repair.
pub fn again(problem: &Problem, scratch: &mut Scratch, hints: &[u8]) -> Option<Box<[u8]>> {
    scratch.reset(problem);
    let mut left = Vec::new();
    for (n, piece) in problem.pieces.iter().enumerate() {
        let bin = problem
            .bins
            .iter()
            .position(|host| hints.get(piece.slot as usize) == Some(host));
        match bin {
            Some(bin) if scratch.takes(problem, n, bin) => {
                scratch.put(problem, n, u8::try_from(bin).unwrap_or(u8::MAX));
            }
            _ => left.push(n),
        }
    }
    // Few: where much has to be moved, packing anew is quicker.
    let rounds = 16 + left.len() as u64 * 4;
    mend::continue_from(problem, scratch, left, rounds).then(|| problem.answer(&scratch.bin_of))
}

/// All of it.
pub fn solve(problem: &Problem, scratch: &mut Scratch, steps: u64) -> Verdict {
    match quick(problem, scratch) {
        Some(hosts) => Verdict::Fits(hosts),
        None => decide(problem, scratch, steps),
    }
}

#[cfg(test)]
pub(crate) mod tests;
