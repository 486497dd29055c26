//! If not all fit: the most important that do.
//!
//! Class by class (priority, then order): as many VMs of a class as fit beside those of the
//! classes before it. In one dimension without restrictions that is exact, because the smallest
//! ones fit wherever any as many do; otherwise the choice cannot be extended by any single VM,
//! which [`Chosen::exact`] says.
//!
//! Must never: leave a VM of a class for one of a later class.

use super::layout::{HostSet, Layout};
use super::model::Priority;
use super::pack::{self, Piece, Problem, Scratch, Verdict};
use std::collections::BTreeMap;

/// What was chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Where which VM (place in `running`) restarts.
    pub placed: Vec<(u32, u8)>,
    /// The VMs that fit nowhere.
    pub left_over: Vec<u32>,
    /// Whether no other choice has more of any class with as many of those before it.
    pub exact: bool,
}

/// Steps of the exact search per question; there are about as many questions as VMs.
const STEPS: u64 = 5_000;

/// Choose among what is lost with `failed`.
#[must_use]
pub fn choose(layout: &Layout, failed: HostSet) -> Chosen {
    choose_beside(layout, failed, &|_| None)
}

/// As [`choose`], where the host of some VMs is given already.
#[must_use]
pub fn choose_beside(
    layout: &Layout,
    failed: HostSet,
    given: &dyn Fn(u32) -> Option<u8>,
) -> Chosen {
    let mut problem = Problem::default();
    layout.problem(failed, &mut problem);
    let lost: Vec<u32> = layout.lost(layout.dead(failed)).collect();
    for piece in &mut problem.pieces {
        let host = lost.get(piece.slot as usize).and_then(|at| given(*at));
        let bin = host.and_then(|host| problem.bins.iter().position(|b| *b == host));
        if let Some(bin) = bin {
            problem.plain = false;
            piece.fits &= 1 << bin;
        }
    }
    // Several that go together count as the most important of them.
    let mut class_of: Vec<(Priority, u32)> = lost
        .iter()
        .map(|at| layout.running[*at as usize].class)
        .collect();
    for (leader, follower) in &problem.joined {
        let both = class_of[*leader as usize].min(class_of[*follower as usize]);
        class_of[*leader as usize] = both;
    }
    let mut classes: BTreeMap<(Priority, u32), Vec<Piece>> = BTreeMap::new();
    for piece in std::mem::take(&mut problem.pieces) {
        let class = class_of[piece.slot as usize];
        classes.entry(class).or_default().push(piece);
    }
    let mut ask = Ask {
        problem,
        scratch: Scratch::default(),
        exact: true,
    };
    let mut kept: Vec<Piece> = Vec::new();
    let mut hosts: Box<[u8]> = vec![0; lost.len()].into();
    let mut out: Vec<u32> = Vec::new();
    for (_, mut class) in classes {
        class.sort_by(|a, b| {
            let size = |piece: &Piece| ask.problem.size(&piece.need);
            size(a).total_cmp(&size(b)).then(a.slot.cmp(&b.slot))
        });
        let taken = ask.most(&mut kept, &class, &mut hosts);
        for (piece, taken) in class.iter().zip(taken) {
            if !taken {
                out.push(piece.slot);
            }
        }
    }
    for (leader, follower) in &ask.problem.joined {
        if out.contains(leader) {
            out.push(*follower);
        }
    }
    out.sort_unstable();
    let mut chosen = Chosen {
        exact: ask.exact,
        ..Chosen::default()
    };
    for (slot, at) in (0_u32..).zip(lost) {
        if out.binary_search(&slot).is_ok() {
            chosen.left_over.push(at);
        } else {
            chosen.placed.push((at, hosts[slot as usize]));
        }
    }
    chosen
}

struct Ask {
    problem: Problem,
    scratch: Scratch,
    exact: bool,
}

impl Ask {
    fn fits(&mut self, pieces: Vec<Piece>) -> Option<Box<[u8]>> {
        self.problem.pieces = pieces;
        self.problem.sort();
        match pack::solve(&self.problem, &mut self.scratch, STEPS) {
            Verdict::Fits(hosts) => Some(hosts),
            Verdict::Refused(_) => None,
            Verdict::Open => {
                self.exact = false;
                None
            }
        }
    }

    /// Add as many of `class` (smallest first) to `kept` as fit; tells which.
    fn most(&mut self, kept: &mut Vec<Piece>, class: &[Piece], hosts: &mut Box<[u8]>) -> Vec<bool> {
        let with = |kept: &[Piece], more: &[Piece]| [kept, more].concat();
        if let Some(all) = self.fits(with(kept, class)) {
            *hosts = all;
            kept.extend_from_slice(class);
            return vec![true; class.len()];
        }
        // The largest number of the smallest ones; fewer of them fit if more do.
        let (mut yes, mut no) = (0, class.len());
        while no - yes > 1 {
            let middle = yes.midpoint(no);
            match self.fits(with(kept, &class[..middle])) {
                Some(found) => {
                    *hosts = found;
                    yes = middle;
                }
                None => no = middle,
            }
        }
        let mut taken = vec![false; class.len()];
        taken[..yes].fill(true);
        kept.extend_from_slice(&class[..yes]);
        if self.problem.plain && self.problem.dims == 1 {
            return taken;
        }
        self.exact = false;
        for n in yes..class.len() {
            if let Some(found) = self.fits(with(kept, &class[n..=n])) {
                *hosts = found;
                kept.push(class[n].clone());
                taken[n] = true;
            }
        }
        taken
    }
}
