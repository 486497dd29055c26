//! Fill bins to the brim, one after the other: of the pieces that are left, those that waste
//! least of this bin, the largest among them first. In one dimension. Finds placements where
//! hardly anything may be wasted, which passes that look at one piece at a time do not.
//!
//! The order of the bins is what it depends on; a few are tried, from a fixed seed.

use super::Problem;
use super::bound::{REACH_UNITS_MAX, Reach, gcd};
use super::greedy::{NOWHERE, Scratch};

/// Orders of the bins that are tried.
const ORDERS: u64 = 24;

/// Whether everything was placed; it is then in `scratch.bin_of`.
pub(super) fn fill(problem: &Problem, scratch: &mut Scratch) -> bool {
    if !problem.plain || problem.dims != 1 {
        return false;
    }
    let unit = (problem.pieces.iter()).fold(0, |a, piece| gcd(a, piece.need[0]));
    let rooms: Vec<u64> = problem
        .room
        .iter()
        .map(|room| room[0] / unit.max(1))
        .collect();
    let needs: Vec<u64> = (problem.pieces.iter())
        .map(|piece| piece.need[0] / unit.max(1))
        .collect();
    let all: u64 = needs.iter().sum();
    if rooms
        .iter()
        .any(|room| (*room).min(all) > REACH_UNITS_MAX / 16)
    {
        return false;
    }
    let mut order: Vec<usize> = (0..rooms.len()).collect();
    order.sort_by_key(|bin| rooms[*bin]);
    let mut chance = super::mend::Chance::new();
    for round in 0..ORDERS {
        if one(&rooms, &needs, &order, scratch) {
            return true;
        }
        match round {
            0 => order.reverse(),
            _ => {
                for n in (1..order.len()).rev() {
                    let other = chance.below(n as u64 + 1);
                    order.swap(n, other);
                }
            }
        }
    }
    false
}

fn one(rooms: &[u64], needs: &[u64], order: &[usize], scratch: &mut Scratch) -> bool {
    scratch.bin_of.clear();
    scratch.bin_of.resize(needs.len(), NOWHERE);
    let mut left: Vec<usize> = (0..needs.len()).collect();
    for bin in order {
        let sum: u64 = left.iter().map(|n| needs[*n]).sum();
        let mut reach = Reach::new(rooms[*bin].min(sum));
        // Per piece that is left: what it and those after it can sum up to.
        let mut after: Vec<Reach> = Vec::with_capacity(left.len() + 1);
        after.push(reach.clone());
        for n in left.iter().rev() {
            reach.add(needs[*n]);
            after.push(reach.clone());
        }
        let mut target = reach.below(rooms[*bin]);
        let mut rest = Vec::with_capacity(left.len());
        for (at, n) in left.iter().enumerate() {
            let later = &after[left.len() - at - 1];
            let without = target.checked_sub(needs[*n]);
            match without.filter(|without| later.below(*without) == *without) {
                Some(without) => {
                    target = without;
                    scratch.bin_of[*n] = u8::try_from(*bin).unwrap_or(NOWHERE);
                }
                None => rest.push(*n),
            }
        }
        left = rest;
        if left.is_empty() {
            return true;
        }
    }
    left.is_empty()
}
