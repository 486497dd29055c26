//! The last resort: which running VMs give way so that those that must restart fit.
//!
//! Shrinking is tried alone before stopping. On each host no more than the restarts there need,
//! best-effort VMs first, the largest gains first: few VMs are touched.

use super::{Measure, lacks};
use crate::plan::choose::{Chosen, choose};
use crate::plan::layout::{DIMS_MAX, Dim, HostSet, Layout, Vector, has, members};
use crate::plan::model::{Pool, Priority};

/// What one VM can give.
struct Gain {
    at: usize,
    stop: bool,
    gain: Vector,
}

/// A better choice than `plain`, with what it takes; `plain` if nothing helps or is allowed.
pub(super) fn last_resort(
    pool: &Pool,
    layout: &Layout,
    failed: HostSet,
    plain: Chosen,
) -> (Chosen, Vec<Measure>) {
    let mut best = (plain, Vec::new());
    for stop in [false, true] {
        let allowed = pool.policy.shrink || stop;
        if !allowed || (stop && !pool.policy.stop_best_effort) {
            continue;
        }
        let gains = gains(pool, layout, failed, stop);
        let mut roomy = layout.clone();
        for gain in &gains {
            let host = usize::from(layout.running[gain.at].host);
            for (free, gain) in roomy.free[host].iter_mut().zip(gain.gain) {
                *free += gain;
            }
        }
        // Only for those that must restart: nobody gives way to a best-effort VM.
        for list in &mut roomy.lists {
            list.retain(|at| layout.running[*at as usize].class.0 == Priority::Always);
        }
        let forced = choose(&roomy, failed);
        let fewer = forced.left_over.len()
            < (best.0.left_over.iter())
                .filter(|at| layout.running[**at as usize].class.0 == Priority::Always)
                .count();
        if !fewer {
            continue;
        }
        let done = fewest(pool, layout, &gains, &forced);
        let enough = !lacks(layout, &forced);
        let mut chosen = forced;
        leave_best_effort(layout, failed, &mut chosen);
        best = (chosen, done);
        if enough {
            break;
        }
    }
    best
}

/// Best-effort VMs are left down where others had to give way.
fn leave_best_effort(layout: &Layout, failed: HostSet, chosen: &mut Chosen) {
    for at in layout.lost(layout.dead(failed)) {
        if layout.running[at as usize].class.0 == Priority::BestEffort {
            chosen.left_over.push(at);
        }
    }
}

fn gains(pool: &Pool, layout: &Layout, failed: HostSet, stop: bool) -> Vec<Gain> {
    let alive = layout.targets & !layout.dead(failed);
    let mut out = Vec::new();
    for (at, vm) in layout.running.iter().enumerate() {
        if !has(alive, vm.host) {
            continue;
        }
        let spec = &pool.vms[vm.vm];
        if stop && spec.priority == Priority::BestEffort {
            out.push(Gain {
                at,
                stop: true,
                gain: vm.need,
            });
            continue;
        }
        let less = spec.min_memory.map_or(0, |min| spec.memory.0 - min.0);
        if pool.policy.shrink && less > 0 {
            let mut gain = [0; DIMS_MAX];
            for (k, dim) in layout.dims.iter().enumerate() {
                let memory = matches!(dim, Dim::Memory | Dim::Hugepages);
                if memory && vm.need[k] > 0 {
                    gain[k] = less;
                }
            }
            out.push(Gain {
                at,
                stop: false,
                gain,
            });
        }
    }
    // Shrinks before stops, best-effort before the others, the largest gain first.
    out.sort_by_key(|gain| {
        let vm = &layout.running[gain.at];
        (
            gain.stop,
            std::cmp::Reverse(vm.class.0),
            std::cmp::Reverse(gain.gain[0]),
            vm.vm,
        )
    });
    out
}

fn fewest(pool: &Pool, layout: &Layout, gains: &[Gain], chosen: &Chosen) -> Vec<Measure> {
    let mut out = Vec::new();
    for host in members(layout.targets) {
        let mut short = [0_u64; DIMS_MAX];
        for (at, to) in &chosen.placed {
            if usize::from(*to) == host {
                for (short, need) in short.iter_mut().zip(layout.running[*at as usize].need) {
                    *short += need;
                }
            }
        }
        for (short, free) in short.iter_mut().zip(layout.free[host]) {
            *short = short.saturating_sub(free);
        }
        let here = |gain: &&Gain| usize::from(layout.running[gain.at].host) == host;
        let mut taken: Vec<&Gain> = Vec::new();
        for gain in gains.iter().filter(here) {
            if short.iter().all(|short| *short == 0) {
                break;
            }
            if short.iter().zip(gain.gain).any(|(s, g)| *s > 0 && g > 0) {
                for (short, gain) in short.iter_mut().zip(gain.gain) {
                    *short = short.saturating_sub(gain);
                }
                taken.push(gain);
            }
        }
        for gain in taken {
            let vm = &layout.running[gain.at];
            out.push(Measure {
                vm: vm.name.clone(),
                host: layout.hosts[host].clone(),
                shrink_to: pool.vms[vm.vm].min_memory.filter(|_| !gain.stop),
            });
        }
    }
    out
}
