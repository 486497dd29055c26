//! Which sets of failures are to be survived, the tightest first.
//!
//! Must never: leave one out. Sets of exactly r failures suffice: a placement for a set is one
//! for each of its subsets, because those lose no other VMs, and a VM that restarted on a
//! survivor of the larger set has a survivor there too. Only VMs that belong together break
//! this ([`Layout::uneven`]); then all sizes up to r are listed.

use super::layout::{DIMS_MAX, HostSet, Layout, members};

/// Most sets that are listed: 64 hosts with r = 4 are 635,376.
pub const SETS_MAX: u64 = 700_000;

/// How many sets there are for `r` failures.
#[must_use]
pub fn count(layout: &Layout, r: u32) -> u64 {
    sizes(layout, r)
        .map(|size| choose(layout.units.len() as u64, u64::from(size)))
        .fold(0, u64::saturating_add)
}

fn sizes(layout: &Layout, r: u32) -> std::ops::RangeInclusive<u32> {
    let most = r.min(u32::try_from(layout.units.len()).unwrap_or(u32::MAX));
    let least = if layout.uneven { most.min(1) } else { most };
    least..=most
}

fn choose(n: u64, k: u64) -> u64 {
    (0..k).fold(1_u64, |c, i| c.saturating_mul(n - i) / (i + 1))
}

/// All sets that have to be survived, as the hosts that fail.
#[must_use]
pub fn list(layout: &Layout, r: u32) -> Vec<HostSet> {
    let mut out = Vec::new();
    for size in sizes(layout, r) {
        combine(layout, size as usize, 0, 0, &mut out);
    }
    out
}

fn combine(layout: &Layout, left: usize, from: usize, set: HostSet, out: &mut Vec<HostSet>) {
    if left == 0 {
        out.push(set);
        return;
    }
    for unit in from..=layout.units.len() - left {
        combine(
            layout,
            left - 1,
            unit + 1,
            set | layout.units[unit].hosts,
            out,
        );
    }
}

/// What would be left of the scarcest resource, as a share of all that is free in the pool;
/// negative if the lost VMs need more than the survivors have.
#[must_use]
pub fn slack(layout: &Layout, failed: HostSet) -> f64 {
    let dead = layout.dead(failed);
    let mut have = [0_u64; DIMS_MAX];
    for host in members(layout.targets & !dead) {
        for (have, free) in have.iter_mut().zip(layout.free[host]) {
            *have += free;
        }
    }
    let mut need = [0_u64; DIMS_MAX];
    for at in layout.lost(dead) {
        for (sum, need) in need.iter_mut().zip(layout.running[at as usize].need) {
            *sum += need;
        }
    }
    (0..layout.dims.len())
        .map(|k| (have[k] as f64 - need[k] as f64) * layout.weight[k])
        .fold(f64::INFINITY, f64::min)
}

/// The set of r failures that takes most: those units whose loss costs most, one by one.
#[must_use]
pub fn heaviest(layout: &Layout, r: u32) -> HostSet {
    let mut order: Vec<(f64, HostSet)> = (layout.units.iter())
        .map(|unit| (slack(layout, unit.hosts), unit.hosts))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    (order.iter().take(r as usize)).fold(0, |set, (_, hosts)| set | hosts)
}
