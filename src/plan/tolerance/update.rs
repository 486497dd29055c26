//! What has to be looked at again after a change.
//!
//! A set of failures keeps its placement if the same VMs are lost with it and every host still
//! has the room that the placement took. Free room does not depend on the set, so one number per
//! set and host tells.

use super::{Checker, Outcome, Runner};
use crate::plan::layout::{HostSet, Layout, Scope, Vector, members};
use crate::plan::model::Pool;
use crate::plan::pack::{self, Problem, Scratch, Verdict};
use std::collections::BTreeMap;

/// No host, and no place.
const NONE: u8 = u8::MAX;

/// What differs between two layouts of the same shape.
struct Change {
    /// Hosts whose list of VMs differs: what is lost with them does.
    lists: HostSet,
    /// Hosts with more or less room: (host, before, now).
    rooms: Vec<(usize, Vector, Vector)>,
    /// Per VM of the new layout: its place in the old one.
    before: Vec<Option<u32>>,
}

impl Checker {
    /// Take the pool as it is now, and look again only at what the change touches.
    pub fn update(&mut self, pool: &Pool) -> &Outcome {
        self.update_on(&super::InOrder, pool)
    }

    /// As [`Checker::update`]; if all has to be proven anew, on a runner.
    pub fn update_on(&mut self, runner: &dyn Runner, pool: &Pool) -> &Outcome {
        let new = Layout::new(pool, self.scope);
        let change = if self.outcome == Outcome::Survives && !self.left.is_empty() {
            difference(&self.layout, &new)
        } else {
            None
        };
        let old = std::mem::replace(&mut self.layout, new);
        match change {
            Some(change) => self.apply(&old, &change),
            None => self.prove(runner),
        }
        &self.outcome
    }

    fn apply(&mut self, old: &Layout, change: &Change) {
        self.looked = 0;
        let mut kit = Kit {
            problem: Problem::default(),
            scratch: Scratch::default(),
            at: vec![NONE; old.running.len()],
            row: Vec::new(),
            places: Vec::new(),
        };
        let dims = self.layout.dims.len();
        for set in 0..self.sets.len() {
            let dead = self.layout.dead(self.sets[set]);
            let touched = dead & change.lists != 0;
            let mut short: HostSet = 0;
            if !touched {
                let base = set * self.stride();
                for (host, before, now) in &change.rooms {
                    let row = &mut self.left[base + host * dims..][..dims];
                    if dead >> host & 1 == 1 {
                        // What is left on a dead host is of no use, and is kept exact.
                        row.copy_from_slice(&now[..dims]);
                        continue;
                    }
                    for k in 0..dims {
                        // Below zero it wraps around, and comes back when the set is mended.
                        row[k] = row[k].wrapping_add(now[k]).wrapping_sub(before[k]);
                        if row[k] > now[k] {
                            short |= 1 << host;
                        }
                    }
                }
            }
            if !touched && short == 0 {
                continue;
            }
            self.looked += 1;
            if !self.layout.constrained {
                let done = if touched {
                    self.carry_over(set, old, change, &mut kit)
                } else {
                    self.relieve(set, short)
                };
                if done {
                    continue;
                }
            }
            if let Some(outcome) = self.place_again(set, old, change, &mut kit) {
                self.outcome = outcome;
                self.places.clear();
                self.left.clear();
                return;
            }
        }
    }

    /// A set whose lost VMs changed: those that stay lost keep their places, new ones go to where
    /// the most is left. False if that does not fit as it is; places and rest are then as before.
    fn carry_over(&mut self, set: usize, old: &Layout, change: &Change, kit: &mut Kit) -> bool {
        let dims = self.layout.dims.len();
        let dead = self.layout.dead(self.sets[set]);
        for (at, host) in old.lost(dead).zip(&self.places[set]) {
            kit.at[at as usize] = *host;
        }
        kit.row.clear();
        for free in &self.layout.free {
            kit.row.extend_from_slice(&free[..dims]);
        }
        kit.places.clear();
        let mut fits = true;
        for at in self.layout.lost(dead) {
            let host = change.before[at as usize].map_or(NONE, |old| kit.at[old as usize]);
            kit.places.push(host);
            if host != NONE {
                fits &= take(
                    &mut kit.row,
                    dims,
                    host,
                    &self.layout.running[at as usize].need,
                );
            }
        }
        for at in old.lost(dead) {
            kit.at[at as usize] = NONE;
        }
        for (slot, at) in self.layout.lost(dead).enumerate() {
            if !fits {
                return false;
            }
            if kit.places[slot] == NONE {
                let need = &self.layout.running[at as usize].need;
                let to = members(self.layout.targets & !dead)
                    .filter(|to| (0..dims).all(|k| kit.row[to * dims + k] >= need[k]))
                    .max_by_key(|to| kit.row[to * dims]);
                let Some(to) = to.and_then(|to| u8::try_from(to).ok()) else {
                    return false;
                };
                kit.places[slot] = to;
                fits = take(&mut kit.row, dims, to, need);
            }
        }
        if fits {
            let range = self.range(set);
            self.left[range].copy_from_slice(&kit.row);
            self.places[set] = kit.places.as_slice().into();
        }
        fits
    }

    /// Move VMs off the hosts that are short in a set, to others with room.
    fn relieve(&mut self, set: usize, mut short: HostSet) -> bool {
        let dims = self.layout.dims.len();
        let dead = self.layout.dead(self.sets[set]);
        let range = self.range(set);
        let (layout, row) = (&self.layout, &mut self.left[range]);
        let places = &mut self.places[set];
        // A few moves, or it is packed anew.
        for _ in 0..8 {
            let Some(from) = members(short).next() else {
                return true;
            };
            let mut best: Option<(u64, usize, usize, &Vector)> = None;
            for (slot, at) in layout.lost(dead).enumerate() {
                if usize::from(places[slot]) != from {
                    continue;
                }
                // The smallest that is enough, or else the largest that has somewhere to go.
                let need = &layout.running[at as usize].need;
                let enough = (0..dims)
                    .all(|k| row[from * dims + k].wrapping_add(need[k]) <= layout.free[from][k]);
                let score = if enough { need[0] } else { u64::MAX - need[0] };
                if best.is_some_and(|(least, ..)| score >= least) {
                    continue;
                }
                let to = members(layout.targets & !dead & !short)
                    .filter(|to| (0..dims).all(|k| row[to * dims + k] >= need[k]))
                    .max_by_key(|to| row[to * dims]);
                if let Some(to) = to {
                    best = Some((score, slot, to, need));
                }
            }
            let Some((_, slot, to, need)) = best else {
                return false;
            };
            for k in 0..dims {
                row[to * dims + k] -= need[k];
                row[from * dims + k] = row[from * dims + k].wrapping_add(need[k]);
            }
            places[slot] = u8::try_from(to).unwrap_or(NONE);
            if (0..dims).all(|k| row[from * dims + k] <= layout.free[from][k]) {
                short &= !(1 << from);
            }
        }
        short == 0
    }

    /// Place a set anew, beginning with where its VMs were. The outcome if it has no placement.
    fn place_again(
        &mut self,
        set: usize,
        old: &Layout,
        change: &Change,
        kit: &mut Kit,
    ) -> Option<Outcome> {
        let failed = self.sets[set];
        let dead = self.layout.dead(failed);
        for (at, host) in old.lost(dead).zip(&self.places[set]) {
            kit.at[at as usize] = *host;
        }
        let hints: Vec<u8> = (self.layout.lost(dead))
            .map(|at| change.before[at as usize].map_or(NONE, |old| kit.at[old as usize]))
            .collect();
        for at in old.lost(dead) {
            kit.at[at as usize] = NONE;
        }
        self.layout.problem(failed, &mut kit.problem);
        let places = match pack::again(&kit.problem, &mut kit.scratch, &hints) {
            Some(places) => places,
            None => match pack::solve(&kit.problem, &mut kit.scratch, self.budget.steps_per_set) {
                Verdict::Fits(places) => places,
                Verdict::Refused(bound) => return Some(self.overcommitted(failed, bound)),
                Verdict::Open => {
                    return Some(Outcome::Unknown {
                        failed: Some(failed),
                        sets: 1,
                    });
                }
            },
        };
        self.places[set] = places;
        let dims = self.layout.dims.len();
        let range = self.range(set);
        let row = &mut self.left[range];
        for (to, free) in row.chunks_mut(dims).zip(&self.layout.free) {
            to.copy_from_slice(&free[..dims]);
        }
        self.spend(set);
        None
    }
}

/// Take a need off what is left on a host; false if it was not there.
fn take(row: &mut [u64], dims: usize, host: u8, need: &Vector) -> bool {
    let left = &mut row[usize::from(host) * dims..][..dims];
    let mut fits = true;
    for (left, need) in left.iter_mut().zip(need) {
        fits &= *left >= *need;
        *left = left.wrapping_sub(*need);
    }
    fits
}

struct Kit {
    problem: Problem,
    scratch: Scratch,
    /// Per VM of the old layout: where it was placed.
    at: Vec<u8>,
    row: Vec<u64>,
    places: Vec<u8>,
}

/// The difference; none if the shape differs and all has to be proven anew.
fn difference(old: &Layout, new: &Layout) -> Option<Change> {
    let same = old.hosts == new.hosts
        && old.targets == new.targets
        && old.failed == new.failed
        && old.dims == new.dims
        && old.units == new.units
        && old.uneven == new.uneven
        && old.constrained == new.constrained;
    if !same || !same_groups(old, new) {
        return None;
    }
    let names: BTreeMap<&str, u32> = (old.running.iter())
        .zip(0_u32..)
        .map(|(vm, at)| (vm.name.as_str(), at))
        .collect();
    let before: Vec<Option<u32>> = (new.running.iter())
        .map(|vm| names.get(vm.name.as_str()).copied())
        .collect();
    let mut lists = 0;
    for (host, (a, b)) in old.lists.iter().zip(&new.lists).enumerate() {
        let same = a.len() == b.len()
            && a.iter().zip(b).all(|(a, b)| {
                let (x, y) = (&old.running[*a as usize], &new.running[*b as usize]);
                before[*b as usize] == Some(*a)
                    && x.need == y.need
                    && x.standby == y.standby
                    && x.allowed == y.allowed
            });
        if !same {
            lists |= 1 << host;
        }
    }
    let rooms = (old.free.iter().zip(&new.free).enumerate())
        .filter(|(_, (a, b))| a != b)
        .map(|(host, (a, b))| (host, *a, *b))
        .collect();
    Some(Change {
        lists,
        rooms,
        before,
    })
}

/// Whether the same VMs are bound to each other, at the same places.
fn same_groups(old: &Layout, new: &Layout) -> bool {
    let of = |layout: &Layout, list: &[u32]| -> Vec<(String, u8, Option<u8>)> {
        list.iter()
            .map(|at| &layout.running[*at as usize])
            .map(|vm| (vm.name.clone(), vm.host, vm.standby))
            .collect()
    };
    let kinds = |layout: &Layout| -> Vec<(String, Option<usize>, Vec<usize>)> {
        (layout.running.iter())
            .filter(|vm| vm.together.is_some() || !vm.apart.is_empty())
            .map(|vm| (vm.name.clone(), vm.together, vm.apart.clone()))
            .collect()
    };
    old.groups.len() == new.groups.len()
        && (old.groups.iter().zip(&new.groups)).all(|(a, b)| of(old, a) == of(new, b))
        && kinds(old) == kinds(new)
}

impl Checker {
    /// For which VMs it must hold.
    #[must_use]
    pub const fn scope(&self) -> Scope {
        self.scope
    }
}
