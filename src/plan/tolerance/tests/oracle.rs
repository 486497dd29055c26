//! The truth about a small pool: every set of up to r failures, and every placement, tried.
//! Written from the pool alone; shares nothing with the planner or the verifier.

use crate::plan::model::{Fails, HostState, Pool, Priority, Protection, Rule, Vm};

struct World<'a> {
    pool: &'a Pool,
    dead: Vec<bool>,
    /// Per VM: where it is; none: down, or not placed yet.
    at: Vec<Option<usize>>,
    lost: Vec<usize>,
}

fn index(pool: &Pool, name: &crate::pool::HostName) -> usize {
    pool.hosts.iter().position(|h| &h.name == name).unwrap()
}

pub(super) fn survives(pool: &Pool, r: u32) -> bool {
    let n = pool.hosts.len();
    let unit = |host: usize| match (&pool.fails, &pool.hosts[host].domain) {
        (Fails::Domain, Some(domain)) => format!("domain {domain}"),
        _ => format!("host {}", pool.hosts[host].name),
    };
    (0..1_u32 << n).all(|bits| {
        let fails = |host: usize| bits >> host & 1 == 1;
        let live = |host: usize| pool.hosts[host].state != HostState::Failed;
        // Whole units, none of them dead already, and no more than r.
        let whole = (0..n).all(|a| {
            (0..n).all(|b| !live(a) || !live(b) || unit(a) != unit(b) || fails(a) == fails(b))
                && (live(a) || !fails(a))
        });
        let mut units: Vec<String> = (0..n).filter(|h| fails(*h)).map(unit).collect();
        units.sort();
        units.dedup();
        if !whole || units.len() > r as usize {
            return true;
        }
        World::new(pool, |host| fails(host) || !live(host)).can_place(0)
    })
}

impl<'a> World<'a> {
    fn new(pool: &'a Pool, dead: impl Fn(usize) -> bool) -> Self {
        let dead: Vec<bool> = (0..pool.hosts.len()).map(dead).collect();
        let mut world = Self {
            pool,
            at: vec![None; pool.vms.len()],
            lost: Vec::new(),
            dead,
        };
        for (n, vm) in pool.vms.iter().enumerate() {
            let Some(host) = &vm.host else { continue };
            let sides = [Some(host), vm.standby.as_ref()];
            let alive = sides
                .into_iter()
                .flatten()
                .map(|h| index(pool, h))
                .find(|h| !world.dead[*h]);
            match alive {
                Some(host) => world.at[n] = Some(host),
                None if vm.protection != Protection::None && vm.priority == Priority::Always => {
                    world.lost.push(n);
                }
                None => {}
            }
        }
        world
    }

    fn used(&self, host: usize, amount: impl Fn(&Vm) -> u64) -> u64 {
        let name = &self.pool.hosts[host].name;
        let mut sum = 0;
        for (n, vm) in self.pool.vms.iter().enumerate() {
            let here = vm.host.as_ref() == Some(name) || vm.standby.as_ref() == Some(name);
            let came = self.lost.contains(&n) && self.at[n] == Some(host);
            sum += amount(vm) * (u64::from(here) + u64::from(came));
        }
        sum
    }

    /// Whether `vm`, just put on `host`, may be there.
    fn holds(&self, n: usize, host: usize) -> bool {
        let (vm, h) = (&self.pool.vms[n], &self.pool.hosts[host]);
        if self.dead[host] || h.state != HostState::Live {
            return false;
        }
        if vm
            .hosts
            .as_ref()
            .is_some_and(|hosts| !hosts.contains(&h.name))
        {
            return false;
        }
        let plain = |vm: &Vm| if vm.hugepages { 0 } else { vm.memory.0 };
        if !vm.hugepages && self.used(host, plain) > h.memory.0 - h.overhead.0 - h.hugepages.0 {
            return false;
        }
        if vm.hugepages && self.used(host, |vm| vm.memory.0 - plain(vm)) > h.hugepages.0 {
            return false;
        }
        if h.vcpus.is_some_and(|most| {
            vm.vcpus.0 > 0 && self.used(host, |vm| vm.vcpus.0.into()) > most.0.into()
        }) {
            return false;
        }
        vm.devices.iter().all(|(kind, count)| {
            let of = |vm: &Vm| vm.devices.get(kind).copied().unwrap_or(0).into();
            *count == 0 || self.used(host, of) <= h.devices.get(kind).copied().unwrap_or(0).into()
        })
    }

    fn groups_hold(&self) -> bool {
        self.pool.groups.iter().all(|group| {
            let members: Vec<usize> = (group.vms.iter())
                .map(|name| {
                    self.pool
                        .vms
                        .iter()
                        .position(|vm| &vm.name == name)
                        .unwrap()
                })
                .collect();
            let came: Vec<usize> = members
                .iter()
                .copied()
                .filter(|n| self.lost.contains(n))
                .collect();
            let stayed: Vec<usize> = members
                .iter()
                .copied()
                .filter(|n| !came.contains(n))
                .filter_map(|n| self.at[n])
                .collect();
            came.iter().all(|n| {
                let here = self.at[*n].unwrap();
                match group.rule {
                    Rule::Apart => {
                        !stayed.contains(&here)
                            && came.iter().all(|m| m == n || self.at[*m] != Some(here))
                    }
                    Rule::Together => {
                        (stayed.is_empty() || stayed.contains(&here))
                            && came.iter().all(|m| self.at[*m] == Some(here))
                    }
                }
            })
        })
    }

    fn can_place(&mut self, next: usize) -> bool {
        let Some(&vm) = self.lost.get(next) else {
            return self.groups_hold();
        };
        for host in 0..self.pool.hosts.len() {
            self.at[vm] = Some(host);
            if self.holds(vm, host) && self.can_place(next + 1) {
                return true;
            }
            self.at[vm] = None;
        }
        false
    }
}

/// The same for pools of plain VMs, by a table over all subsets of the lost VMs: filling the bins
/// one after the other, how far along is one at best with exactly these placed? Nothing is
/// searched, so it cannot share a mistake with a search.
pub(super) fn survives_by_table(pool: &Pool, r: u32) -> bool {
    let n = pool.hosts.len();
    (0..1_u32 << n)
        .filter(|bits| bits.count_ones() == r)
        .all(|bits| {
            let fails = |host: usize| bits >> host & 1 == 1;
            let runs = |vm: &&Vm, host: usize| vm.host.as_ref() == Some(&pool.hosts[host].name);
            let rooms: Vec<u64> = (0..n)
                .filter(|host| !fails(*host))
                .map(|host| {
                    let here = pool.vms.iter().filter(|vm| runs(vm, host));
                    pool.hosts[host].memory.0 - here.map(|vm| vm.memory.0).sum::<u64>()
                })
                .collect();
            let lost: Vec<u64> = (pool.vms.iter())
                .filter(|vm| (0..n).any(|host| fails(host) && runs(vm, host)))
                .map(|vm| vm.memory.0)
                .collect();
            fits_by_table(&rooms, &lost)
        })
}

fn fits_by_table(rooms: &[u64], needs: &[u64]) -> bool {
    // Per subset: (bin, what is left in it), the earliest bin and then the most left.
    let mut best: Vec<Option<(usize, u64)>> = vec![None; 1 << needs.len()];
    best[0] = rooms.first().map(|room| (0, *room));
    for set in 0..best.len() {
        let Some((bin, left)) = best[set] else {
            continue;
        };
        for (n, need) in needs.iter().enumerate() {
            if set >> n & 1 == 1 {
                continue;
            }
            let here = (left >= *need).then(|| (bin, left - need));
            let next = (bin + 1..rooms.len())
                .find(|later| rooms[*later] >= *need)
                .map(|later| (later, rooms[later] - need));
            let (Some(new), at) = (here.or(next), set | 1 << n) else {
                continue;
            };
            let better =
                best[at].is_none_or(|(bin, left)| new.0 < bin || (new.0 == bin && new.1 > left));
            if better {
                best[at] = Some(new);
            }
        }
    }
    needs.is_empty() || best.last().is_some_and(Option::is_some)
}
