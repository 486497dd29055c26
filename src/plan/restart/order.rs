//! When each start happens: classes, dependencies, delays, batches.

use super::{STARTS_PER_HOST, Start};
use crate::plan::layout::{HostSet, Layout, has};
use crate::plan::model::{Pool, Priority, Protection, Seconds};
use std::collections::{BTreeMap, BTreeSet};

/// What orders starts that do not wait for each other: class, largest first, name.
type Rank<'a> = (Priority, u32, std::cmp::Reverse<u64>, &'a str);

/// The starts of what was placed, and of reserved VMs on their reservations.
pub(super) fn starts(
    pool: &Pool,
    layout: &Layout,
    failed: HostSet,
    placed: &[(u32, u8)],
) -> Vec<Start> {
    let dead = layout.dead(failed);
    // Place in the pool's list -> host, and whether memory was reserved for it there.
    let mut to: BTreeMap<usize, (u8, bool)> = (placed.iter())
        .map(|(at, host)| (layout.running[*at as usize].vm, (*host, false)))
        .collect();
    for vm in &layout.running {
        let reserved = pool.vms[vm.vm].protection == Protection::Reserved;
        if let Some(host) = Layout::stays(vm, dead)
            && reserved
            && has(dead, vm.host)
        {
            to.insert(vm.vm, (host, true));
        }
    }
    let place: BTreeMap<&str, usize> = (to.keys())
        .map(|vm| (pool.vms[*vm].name.as_str(), *vm))
        .collect();
    let offsets = offsets(pool, to.keys().copied());
    let mut waits: BTreeMap<usize, usize> = BTreeMap::new();
    let mut unblocks: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut ready: BTreeSet<(Rank<'_>, usize)> = BTreeSet::new();
    for vm in to.keys().copied() {
        let before = pool.vms[vm].after.iter();
        let before: BTreeSet<usize> = before
            .filter_map(|name| place.get(name.as_str()).copied())
            .collect();
        waits.insert(vm, before.len());
        if before.is_empty() {
            ready.insert((rank(pool, vm), vm));
        }
        for other in before {
            unblocks.entry(other).or_default().push(vm);
        }
    }
    let per_host = pool
        .policy
        .starts_per_host
        .unwrap_or(STARTS_PER_HOST)
        .max(1);
    let mut earliest: BTreeMap<usize, u32> = BTreeMap::new();
    let mut on_host: BTreeMap<u8, u32> = BTreeMap::new();
    let mut out = Vec::new();
    // Dependencies have no circles (the model is checked), so everything becomes ready.
    while let Some((_, vm)) = ready.pop_first() {
        let spec = &pool.vms[vm];
        let (host, reserved) = to[&vm];
        let class = offsets[&(spec.priority, spec.order)];
        let after_s = class.max(earliest.get(&vm).copied().unwrap_or(0));
        let count = on_host.entry(host).or_default();
        let batch = *count / per_host + 1;
        *count += 1;
        out.push(Start {
            vm: spec.name.clone(),
            host: layout.hosts[usize::from(host)].clone(),
            reserved,
            priority: spec.priority,
            order: spec.order,
            after_s: Seconds(after_s),
            batch,
            after: (spec.after.iter())
                .filter(|name| place.contains_key(name.as_str()))
                .cloned()
                .collect(),
        });
        for next in unblocks.remove(&vm).unwrap_or_default() {
            let at = earliest.entry(next).or_default();
            *at = (*at).max(after_s.saturating_add(spec.delay_s.0));
            if let Some(waits) = waits.get_mut(&next) {
                *waits -= 1;
                if *waits == 0 {
                    ready.insert((rank(pool, next), next));
                }
            }
        }
    }
    out
}

fn rank(pool: &Pool, vm: usize) -> Rank<'_> {
    let vm = &pool.vms[vm];
    (
        vm.priority,
        vm.order,
        std::cmp::Reverse(vm.memory.0),
        &vm.name,
    )
}

/// Seconds after which the VMs of each class start: the delays of all classes before it.
fn offsets(pool: &Pool, vms: impl Iterator<Item = usize>) -> BTreeMap<(Priority, u32), u32> {
    let mut delays: BTreeMap<(Priority, u32), u32> = BTreeMap::new();
    for vm in vms {
        let vm = &pool.vms[vm];
        let delay = delays.entry((vm.priority, vm.order)).or_default();
        *delay = (*delay).max(vm.delay_s.0);
    }
    let mut sum = 0_u32;
    for delay in delays.values_mut() {
        let own = *delay;
        *delay = sum;
        sum = sum.saturating_add(own);
    }
    delays
}
