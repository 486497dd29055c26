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
    /// Hosts with less room.
    shrunk: HostSet,
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
        let change = if self.outcome == Outcome::Survives && !self.load.is_empty() {
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
        // Hosts with less room than some set counts on.
        let tight: Vec<usize> = members(change.shrunk)
            .filter(|host| {
                let free = &self.layout.free[*host];
                (0..dims).any(|k| self.load_most[host * dims + k] > free[k])
            })
            .collect();
        for set in 0..self.sets.len() {
            let dead = self.layout.dead(self.sets[set]);
            let touched = dead & change.lists != 0;
            if !touched {
                let row = &self.load[self.range(set)];
                let short = (tight.iter())
                    .filter(|host| {
                        let free = &self.layout.free[**host];
                        (0..dims).any(|k| row[**host * dims + k] > free[k])
                    })
                    .fold(0, |short: HostSet, host| short | 1 << host);
                if short == 0 {
                    continue;
                }
                self.looked += 1;
                if !self.layout.constrained && self.relieve(set, short) {
                    continue;
                }
            } else {
                self.looked += 1;
                if !self.layout.constrained && self.carry_over(set, old, change, &mut kit) {
                    continue;
                }
            }
            if let Some(outcome) = self.place_again(set, old, change, &mut kit) {
                self.outcome = outcome;
                self.places.clear();
                self.load.clear();
                return;
            }
        }
    }

    /// A set whose lost VMs changed: those that stay lost keep their places, new ones go to where
    /// the most is left. False if that does not fit as it is; nothing is changed then.
    fn carry_over(&mut self, set: usize, old: &Layout, change: &Change, kit: &mut Kit) -> bool {
        let dims = self.layout.dims.len();
        let dead = self.layout.dead(self.sets[set]);
        kit.remember(old.lost(dead), &self.places[set]);
        kit.row.clear();
        kit.row.resize(self.stride(), 0);
        kit.places.clear();
        let layout = &self.layout;
        for at in layout.lost(dead) {
            let host = change.before[at as usize].map_or(NONE, |old| kit.at[old as usize]);
            kit.places.push(host);
            if host != NONE {
                let need = &layout.running[at as usize].need;
                add(&mut kit.row, dims, usize::from(host), need);
            }
        }
        kit.forget(old.lost(dead));
        for (slot, at) in layout.lost(dead).enumerate() {
            if kit.places[slot] != NONE {
                continue;
            }
            let need = &layout.running[at as usize].need;
            let Some(to) = roomiest(layout, &kit.row, layout.targets & !dead, need) else {
                return false;
            };
            kit.places[slot] = u8::try_from(to).unwrap_or(NONE);
            add(&mut kit.row, dims, to, need);
        }
        let fits = members(layout.targets & !dead).all(|host| {
            let free = &layout.free[host];
            (0..dims).all(|k| kit.row[host * dims + k] <= free[k])
        });
        if fits {
            let range = self.range(set);
            self.load[range].copy_from_slice(&kit.row);
            for (most, load) in self.load_most.iter_mut().zip(&kit.row) {
                *most = (*most).max(*load);
            }
            self.places[set] = kit.places.as_slice().into();
        }
        fits
    }

    /// Move VMs off the hosts that are short in a set, to others with room.
    fn relieve(&mut self, set: usize, mut short: HostSet) -> bool {
        let dims = self.layout.dims.len();
        let dead = self.layout.dead(self.sets[set]);
        let range = self.range(set);
        let (layout, row) = (&self.layout, &mut self.load[range]);
        let places = &mut self.places[set];
        // A few moves, or it is packed anew.
        for _ in 0..8 {
            let Some(from) = members(short).next() else {
                return true;
            };
            let free = &layout.free[from];
            let mut best: Option<(u64, usize, usize, &Vector)> = None;
            for (slot, at) in layout.lost(dead).enumerate() {
                if usize::from(places[slot]) != from {
                    continue;
                }
                // The smallest that is enough, or else the largest that has somewhere to go.
                let need = &layout.running[at as usize].need;
                let enough = (0..dims).all(|k| row[from * dims + k] <= free[k] + need[k]);
                let score = if enough { need[0] } else { u64::MAX - need[0] };
                if best.is_some_and(|(least, ..)| score >= least) {
                    continue;
                }
                let open = layout.targets & !dead & !short;
                if let Some(to) = roomiest(layout, row, open, need) {
                    best = Some((score, slot, to, need));
                }
            }
            let Some((_, slot, to, need)) = best else {
                return false;
            };
            for k in 0..dims {
                row[from * dims + k] -= need[k];
            }
            add(row, dims, to, need);
            for (most, load) in self.load_most[to * dims..][..dims]
                .iter_mut()
                .zip(&row[to * dims..])
            {
                *most = (*most).max(*load);
            }
            places[slot] = u8::try_from(to).unwrap_or(NONE);
            if (0..dims).all(|k| row[from * dims + k] <= free[k]) {
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
        kit.remember(old.lost(dead), &self.places[set]);
        let hints: Vec<u8> = (self.layout.lost(dead))
            .map(|at| change.before[at as usize].map_or(NONE, |old| kit.at[old as usize]))
            .collect();
        kit.forget(old.lost(dead));
        self.layout.problem(failed, &mut kit.problem);
        let placed = pack::quick(&kit.problem, &mut kit.scratch)
            .or_else(|| pack::again(&kit.problem, &mut kit.scratch, &hints));
        let places = match placed {
            Some(places) => places,
            None => match pack::decide(&kit.problem, &mut kit.scratch, self.budget.steps_per_set) {
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
        self.count_load(set);
        None
    }
}

/// Count a need on a host.
fn add(row: &mut [u64], dims: usize, host: usize, need: &Vector) {
    for (load, need) in row[host * dims..][..dims].iter_mut().zip(need) {
        *load += need;
    }
}

/// Of the hosts of a set, the one with the most memory left that has room for a need.
fn roomiest(layout: &Layout, row: &[u64], hosts: HostSet, need: &Vector) -> Option<usize> {
    let dims = layout.dims.len();
    members(hosts)
        .filter(|host| {
            let free = &layout.free[*host];
            (0..dims).all(|k| row[host * dims + k] + need[k] <= free[k])
        })
        .max_by_key(|host| layout.free[*host][0] - row[host * dims])
}

impl Kit {
    /// Where each VM of a set was placed.
    fn remember(&mut self, lost: impl Iterator<Item = u32>, places: &[u8]) {
        for (at, host) in lost.zip(places) {
            self.at[at as usize] = *host;
        }
    }

    fn forget(&mut self, lost: impl Iterator<Item = u32>) {
        for at in lost {
            self.at[at as usize] = NONE;
        }
    }
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
    let shrunk = (old.free.iter().zip(&new.free).enumerate())
        .filter(|(_, (a, b))| a.iter().zip(*b).any(|(a, b)| a > b))
        .fold(0, |set: HostSet, (host, _)| set | 1 << host);
    Some(Change {
        lists,
        shrunk,
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
