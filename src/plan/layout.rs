//! A pool in numbers: what each host has free, which VMs must restart with it, what fails at once.
//!
//! Must never: count a reservation as free, or a VM that goes on at its standby as lost.
//!
//! Free is what a host has for VMs less all it runs and all it reserves. A reservation is usable
//! by its VM only, so free is the same whatever else fails.

use super::model::{Fails, HostState, Pool, Priority, Protection, Rule};
use super::pack::{Piece, Problem};
use crate::pool::HostName;
use std::collections::{BTreeMap, BTreeSet};

/// Dimensions at most: memory, huge pages, vCPUs and the kinds of devices.
pub const DIMS_MAX: usize = 3 + super::model::DEVICE_KINDS_MAX;
/// One number per dimension; those that are not in use are 0.
pub type Vector = [u64; DIMS_MAX];
/// Set of hosts by their place in the pool.
pub type HostSet = u64;

/// What stands for "no limit"; 64 of them are far from overflowing.
const UNLIMITED: u64 = 1 << 40;

/// What is scarce.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dim {
    /// Bytes of ordinary memory.
    Memory,
    /// Bytes of huge pages.
    Hugepages,
    /// Virtual CPUs.
    Vcpus,
    /// Devices of a kind.
    Device(String),
}

/// Which VMs must restart for the answer to be `survives`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Scope {
    /// Those of priority `always`.
    #[default]
    Always,
    /// Those of `best-effort` as well.
    All,
}

/// One VM that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Running {
    /// Its place in the pool's list.
    pub vm: usize,
    /// Its name.
    pub name: String,
    /// Lower ones matter more: priority, then order.
    pub class: (Priority, u32),
    /// What it takes.
    pub need: Vector,
    /// Where it runs.
    pub host: u8,
    /// Where its standby or reservation is.
    pub standby: Option<u8>,
    /// Where it may run.
    pub allowed: HostSet,
    /// Whether it must restart.
    pub hard: bool,
    /// Its `together` group.
    pub together: Option<usize>,
    /// Its `apart` groups.
    pub apart: Vec<usize>,
}

/// What fails at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Host or failure domain.
    pub name: String,
    /// Its hosts.
    pub hosts: HostSet,
}

/// A pool in numbers.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Names of the hosts.
    pub hosts: Vec<HostName>,
    /// Hosts that take restarts.
    pub targets: HostSet,
    /// Hosts that are dead already.
    pub failed: HostSet,
    /// What is scarce. Memory comes first.
    pub dims: Vec<Dim>,
    /// Free on each host, per dimension.
    pub free: Vec<Vector>,
    /// Size of one unit of each dimension when dimensions are added up: 1 is all there is free.
    pub weight: [f64; DIMS_MAX],
    /// Every VM that runs.
    pub running: Vec<Running>,
    /// Per host: the VMs (places in `running`) that may have to restart with it, largest first.
    pub lists: Vec<Vec<u32>>,
    /// What may fail.
    pub units: Vec<Unit>,
    /// Members of each group that run (places in `running`).
    pub groups: Vec<Vec<u32>>,
    /// Whether any VM is bound to some hosts or to others.
    pub constrained: bool,
    /// Whether a smaller set of failures could be worse than a larger one: only VMs that belong
    /// together make it so, where a member goes on and the rest have to follow it.
    pub uneven: bool,
}

/// The hosts of a set, ascending.
pub fn members(set: HostSet) -> impl Iterator<Item = usize> {
    let mut rest = set;
    std::iter::from_fn(move || {
        let host = rest.trailing_zeros() as usize;
        (rest != 0).then(|| {
            rest &= rest - 1;
            host
        })
    })
}

/// Whether a set holds a host.
#[must_use]
pub const fn has(set: HostSet, host: u8) -> bool {
    set >> host & 1 == 1
}

fn all_dims(pool: &Pool) -> Vec<Dim> {
    let kinds: BTreeSet<&String> = pool.hosts.iter().flat_map(|h| h.devices.keys()).collect();
    [Dim::Memory, Dim::Hugepages, Dim::Vcpus]
        .into_iter()
        .chain(kinds.into_iter().map(|kind| Dim::Device(kind.clone())))
        .collect()
}

impl Layout {
    /// The numbers of a pool that [`Pool::check`] has no fault with.
    #[must_use]
    pub fn new(pool: &Pool, scope: Scope) -> Self {
        let place: BTreeMap<&str, u8> = pool
            .hosts
            .iter()
            .zip(0_u8..)
            .map(|(host, place)| (host.name.as_str(), place))
            .collect();
        let dims = all_dims(pool);
        let mut free: Vec<Vector> = pool
            .hosts
            .iter()
            .map(|host| {
                let mut room = [0; DIMS_MAX];
                for (k, dim) in dims.iter().enumerate() {
                    room[k] = match dim {
                        Dim::Memory => host
                            .memory
                            .0
                            .saturating_sub(host.overhead.0)
                            .saturating_sub(host.hugepages.0),
                        Dim::Hugepages => host.hugepages.0,
                        Dim::Vcpus => host.vcpus.map_or(UNLIMITED, |n| u64::from(n.0)),
                        Dim::Device(kind) => {
                            u64::from(host.devices.get(kind).copied().unwrap_or_default())
                        }
                    };
                }
                room
            })
            .collect();
        let state = |wanted: HostState| {
            let is = pool.hosts.iter().enumerate();
            is.filter(|(_, host)| host.state == wanted)
                .fold(0, |set: HostSet, (place, _)| set | 1 << place)
        };
        let (targets, failed) = (state(HostState::Live), state(HostState::Failed));
        let mut running = Vec::with_capacity(pool.vms.len());
        for (index, vm) in pool.vms.iter().enumerate() {
            let Some(host) = vm.host.as_ref().map(|name| place[name.as_str()]) else {
                continue;
            };
            let mut need = [0; DIMS_MAX];
            for (k, dim) in dims.iter().enumerate() {
                need[k] = match dim {
                    Dim::Memory if !vm.hugepages => vm.memory.0,
                    Dim::Hugepages if vm.hugepages => vm.memory.0,
                    Dim::Memory | Dim::Hugepages => 0,
                    Dim::Vcpus => u64::from(vm.vcpus.0),
                    Dim::Device(kind) => {
                        u64::from(vm.devices.get(kind).copied().unwrap_or_default())
                    }
                };
            }
            let standby = vm.standby.as_ref().map(|name| place[name.as_str()]);
            for holder in std::iter::once(host).chain(standby) {
                for (room, need) in free[usize::from(holder)].iter_mut().zip(need) {
                    *room = room.saturating_sub(need);
                }
            }
            let allowed = vm.hosts.as_ref().map_or(u64::MAX, |hosts| {
                hosts
                    .iter()
                    .fold(0, |set, name| set | 1 << place[name.as_str()])
            });
            running.push(Running {
                vm: index,
                name: vm.name.clone(),
                class: (vm.priority, vm.order),
                need,
                host,
                standby,
                allowed,
                hard: vm.protection != Protection::None
                    && (scope == Scope::All || vm.priority == Priority::Always),
                together: None,
                apart: Vec::new(),
            });
        }
        let mut layout = Self {
            hosts: pool.hosts.iter().map(|host| host.name.clone()).collect(),
            targets,
            failed,
            dims,
            free,
            weight: [0.0; DIMS_MAX],
            running,
            lists: vec![Vec::new(); pool.hosts.len()],
            units: units(pool, failed),
            groups: Vec::new(),
            constrained: false,
            uneven: false,
        };
        layout.groups(pool);
        layout.keep_scarce();
        layout.weigh();
        layout.list();
        layout.constrained = !layout.groups.is_empty()
            || layout
                .running
                .iter()
                .any(|vm| vm.hard && vm.allowed & layout.targets != layout.targets);
        layout
    }

    fn groups(&mut self, pool: &Pool) {
        if pool.groups.is_empty() {
            return;
        }
        let runs: BTreeMap<&str, usize> = (self.running.iter().enumerate())
            .map(|(at, vm)| (pool.vms[vm.vm].name.as_str(), at))
            .collect();
        for group in &pool.groups {
            let number = self.groups.len();
            let mut list = Vec::new();
            for at in group.vms.iter().filter_map(|name| runs.get(name.as_str())) {
                match group.rule {
                    Rule::Together => self.running[*at].together = Some(number),
                    Rule::Apart => self.running[*at].apart.push(number),
                }
                list.push(u32::try_from(*at).unwrap_or(u32::MAX));
            }
            self.uneven |= group.rule == Rule::Together && list.len() > 1;
            self.groups.push(list);
        }
    }

    /// Keep memory, and of the rest what could run short on some host.
    fn keep_scarce(&mut self) {
        let mut total = [0_u64; DIMS_MAX];
        for vm in self.running.iter().filter(|vm| vm.hard) {
            for (total, need) in total.iter_mut().zip(vm.need) {
                *total = total.saturating_add(need);
            }
        }
        let keep: Vec<usize> = (0..self.dims.len())
            .filter(|k| {
                *k == 0 || members(self.targets).any(|host| self.free[host][*k] < total[*k])
            })
            .collect();
        let pick = |from: &Vector| {
            let mut to = [0; DIMS_MAX];
            for (to, k) in to.iter_mut().zip(&keep) {
                *to = from[*k];
            }
            to
        };
        for vm in &mut self.running {
            vm.need = pick(&vm.need);
        }
        for free in &mut self.free {
            *free = pick(free);
        }
        self.dims = keep.iter().map(|k| self.dims[*k].clone()).collect();
    }

    fn weigh(&mut self) {
        for k in 0..self.dims.len() {
            let all: u64 = members(self.targets).map(|host| self.free[host][k]).sum();
            self.weight[k] = 1.0 / (all.max(1) as f64);
        }
    }

    fn list(&mut self) {
        for (at, vm) in (0_u32..).zip(&self.running) {
            if vm.hard {
                self.lists[usize::from(vm.host)].push(at);
            }
        }
        for list in &mut self.lists {
            // Stable, and by need alone: the order of equal ones is that of the pool.
            list.sort_by(|a, b| {
                let (a, b) = (&self.running[*a as usize], &self.running[*b as usize]);
                b.need.cmp(&a.need)
            });
        }
    }

    /// Everything that is dead when the hosts of `failed` are.
    #[must_use]
    pub const fn dead(&self, failed: HostSet) -> HostSet {
        failed | self.failed
    }

    /// Whether a VM has nowhere to go on once `dead` are dead.
    #[must_use]
    pub fn is_lost(vm: &Running, dead: HostSet) -> bool {
        has(dead, vm.host) && vm.standby.is_none_or(|standby| has(dead, standby))
    }

    /// Where a VM goes on by itself once `dead` are dead: where it is, or at its standby.
    #[must_use]
    pub fn stays(vm: &Running, dead: HostSet) -> Option<u8> {
        if has(dead, vm.host) {
            vm.standby.filter(|standby| !has(dead, *standby))
        } else {
            Some(vm.host)
        }
    }

    /// The VMs that must restart once `dead` are dead, in the order in which placements list them.
    pub fn lost(&self, dead: HostSet) -> impl Iterator<Item = u32> {
        members(dead)
            .flat_map(|host| &self.lists[host])
            .copied()
            .filter(move |at| Self::is_lost(&self.running[*at as usize], dead))
    }

    /// The packing problem of one set of failures, into `problem`.
    pub fn problem(&self, failed: HostSet, problem: &mut Problem) {
        let dead = self.dead(failed);
        problem.dims = self.dims.len();
        problem.weight = self.weight;
        problem.bins.clear();
        problem.room.clear();
        for host in members(self.targets & !dead) {
            // Hosts are at most 64.
            problem.bins.push(u8::try_from(host).unwrap_or(u8::MAX));
            problem.room.push(self.free[host]);
        }
        problem.pieces.clear();
        problem.slots = 0;
        problem.rivals.clear();
        let everywhere = everywhere(problem.bins.len());
        if !self.constrained {
            for (slot, at) in (0_u32..).zip(self.lost(dead)) {
                problem.pieces.push(Piece {
                    need: self.running[at as usize].need,
                    fits: everywhere,
                    slot,
                });
                problem.slots = slot + 1;
            }
            problem.joined.clear();
            problem.plain = true;
            problem.sort();
            return;
        }
        self.constrained_problem(dead, problem);
    }

    fn constrained_problem(&self, dead: HostSet, problem: &mut Problem) {
        problem.joined.clear();
        let mut leader: BTreeMap<usize, usize> = BTreeMap::new();
        let mut apart: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        // Allowed by host first, translated to bins at the end.
        for (slot, at) in (0_u32..).zip(self.lost(dead)) {
            problem.slots = slot + 1;
            let vm = &self.running[at as usize];
            let mut allowed = vm.allowed & self.targets & !dead;
            if let Some(group) = vm.together {
                let stays = self.group_hosts(group, dead);
                if stays != 0 {
                    allowed &= stays;
                }
            }
            for group in &vm.apart {
                allowed &= !self.group_hosts(*group, dead);
            }
            let piece = match vm.together.and_then(|group| leader.get(&group).copied()) {
                Some(piece) => {
                    let lead = &mut problem.pieces[piece];
                    lead.fits &= allowed;
                    for (sum, need) in lead.need.iter_mut().zip(vm.need) {
                        *sum += need;
                    }
                    problem.joined.push((lead.slot, slot));
                    piece
                }
                None => {
                    problem.pieces.push(Piece {
                        need: vm.need,
                        fits: allowed,
                        slot,
                    });
                    let piece = problem.pieces.len() - 1;
                    if let Some(group) = vm.together {
                        leader.insert(group, piece);
                    }
                    piece
                }
            };
            let lead = problem.pieces[piece].slot;
            for group in &vm.apart {
                apart.entry(*group).or_default().push(lead);
            }
        }
        let everywhere = everywhere(problem.bins.len());
        problem.plain = true;
        for piece in &mut problem.pieces {
            let allowed = piece.fits;
            piece.fits = 0;
            for (bin, host) in problem.bins.iter().enumerate() {
                piece.fits |= u64::from(has(allowed, *host)) << bin;
            }
            problem.plain &= piece.fits == everywhere;
        }
        for group in apart.values() {
            for (n, a) in group.iter().enumerate() {
                for b in &group[n + 1..] {
                    problem.rivals.push((*a, *b));
                    problem.rivals.push((*b, *a));
                }
            }
        }
        problem.rivals.sort_unstable();
        problem.rivals.dedup();
        problem.plain &= problem.rivals.is_empty();
        problem.sort();
    }

    /// Where members of a group go on by themselves.
    fn group_hosts(&self, group: usize, dead: HostSet) -> HostSet {
        self.groups[group]
            .iter()
            .filter_map(|at| Self::stays(&self.running[*at as usize], dead))
            .fold(0, |set, host| set | 1 << host)
    }
}

/// All of so many bins.
const fn everywhere(bins: usize) -> u64 {
    match bins {
        0 => 0,
        1..64 => (1 << bins) - 1,
        _ => u64::MAX,
    }
}

fn units(pool: &Pool, failed: HostSet) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut domains: BTreeMap<&str, usize> = BTreeMap::new();
    for (place, host) in pool.hosts.iter().enumerate() {
        let hosts = 1 << place;
        if failed & hosts != 0 {
            continue;
        }
        let domain = host
            .domain
            .as_deref()
            .filter(|_| pool.fails == Fails::Domain);
        if let Some(domain) = domain {
            let at = *domains.entry(domain).or_insert(units.len());
            if at < units.len() {
                units[at].hosts |= hosts;
                continue;
            }
        }
        units.push(Unit {
            name: domain.map_or_else(|| host.name.to_string(), str::to_owned),
            hosts,
        });
    }
    units
}
