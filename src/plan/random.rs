//! Random pools from a seed, for tests, benches and `pollux plan random`.

use super::model::{
    Bytes, Group, Host, HostState, Pool, Priority, Protection, Rule, Seconds, Vcpus, Vm,
};
use crate::pool::HostName;

/// Sizes of VMs in GiB: many small ones, few large ones.
pub const SIZES_GIB: [u64; 16] = [1, 2, 3, 3, 4, 5, 6, 6, 7, 9, 10, 12, 14, 20, 24, 28];

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Random {
    /// Number of hosts, at most 64.
    pub hosts: u8,
    /// Memory of each; none: as much as `used_permille` needs for `vms`.
    pub memory_gib: Option<u64>,
    /// Number of VMs; none: as many as `used_permille` allows.
    pub vms: Option<u16>,
    /// How much of all memory the VMs take.
    pub used_permille: u64,
    /// Failures to survive.
    pub tolerate: u32,
    /// Racks, mirrored and reserved VMs, classes, groups, vCPUs, restrictions.
    pub mixed: bool,
    /// Decides everything else.
    pub seed: u64,
}

/// `SplitMix64` (Steele, Lea, Flood 2014).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Make it. Each VM is placed on the host with the most memory free (balanced).
#[must_use]
pub fn pool(what: &Random) -> Pool {
    let mut chance = Chance(what.seed);
    let hosts = u64::from(what.hosts.clamp(1, 64));
    let mut sizes = Vec::new();
    match (what.vms, what.memory_gib) {
        (Some(vms), _) => {
            for _ in 0..vms {
                sizes.push(SIZES_GIB[usize::try_from(chance.below(16)).unwrap_or(0)]);
            }
        }
        (None, memory) => {
            let most = hosts * memory.unwrap_or(64) * what.used_permille / 1_000;
            let mut sum = 0;
            loop {
                let size = SIZES_GIB[usize::try_from(chance.below(16)).unwrap_or(0)];
                if sum + size > most || sizes.len() == super::model::VMS_MAX {
                    break;
                }
                sum += size;
                sizes.push(size);
            }
        }
    }
    let memory = what.memory_gib.unwrap_or_else(|| {
        let sum: u64 = sizes.iter().sum();
        if what.vms.is_none() {
            64
        } else {
            (sum * 1_000).div_ceil(what.used_permille.max(1) * hosts)
        }
    });
    let mut free = vec![memory; usize::try_from(hosts).unwrap_or(64)];
    let mut vms = Vec::new();
    for (n, size) in sizes.into_iter().enumerate() {
        let most = (0..free.len()).max_by_key(|host| (free[*host], std::cmp::Reverse(*host)));
        let Some(host) = most.filter(|host| free[*host] >= size) else {
            continue;
        };
        free[host] -= size;
        vms.push(Vm {
            name: format!("vm-{n}"),
            memory: Bytes::gib(size),
            host: Some(name(host)),
            ..Vm::default()
        });
    }
    let mut pool = Pool {
        tolerate: what.tolerate,
        hosts: (0..free.len())
            .map(|n| Host {
                name: name(n),
                memory: Bytes::gib(memory),
                overhead: Bytes(0),
                hugepages: Bytes(0),
                vcpus: None,
                state: HostState::Live,
                domain: None,
                devices: std::collections::BTreeMap::new(),
            })
            .collect(),
        vms,
        ..Pool::default()
    };
    if what.mixed {
        mix(&mut pool, &mut free, &mut chance);
    }
    pool
}

fn name(host: usize) -> HostName {
    HostName::new(format!("host-{host}")).expect("a valid name")
}

fn mix(pool: &mut Pool, free: &mut [u64], chance: &mut Chance) {
    let hosts = pool.hosts.len();
    let pick = |chance: &mut Chance, n: usize| usize::try_from(chance.below(n as u64)).unwrap_or(0);
    for (n, host) in pool.hosts.iter_mut().enumerate() {
        host.domain = Some(format!("rack-{}", n % hosts.div_ceil(2).max(2)));
        host.vcpus = Some(Vcpus(96));
    }
    for vm in &mut pool.vms {
        vm.vcpus = Vcpus(1 + u32::try_from(chance.below(4)).unwrap_or(0));
        vm.order = u32::try_from(chance.below(3)).unwrap_or(0);
        vm.delay_s = Seconds(u32::try_from(chance.below(3)).unwrap_or(0) * 10);
        vm.min_memory = chance.one_in(3).then_some(Bytes(vm.memory.0 / 2));
        if chance.one_in(5) {
            vm.priority = Priority::BestEffort;
        }
        if chance.one_in(12) {
            vm.protection = Protection::None;
        } else if chance.one_in(3) {
            let size = vm.memory.0 >> 30;
            let standby = pick(chance, hosts);
            if vm.host.as_ref() != Some(&name(standby)) && free[standby] >= size {
                free[standby] -= size;
                vm.standby = Some(name(standby));
                vm.protection = if chance.one_in(2) {
                    Protection::Reserved
                } else {
                    Protection::Mirrored
                };
            }
        }
        if chance.one_in(6) {
            let mut reach: Vec<HostName> = vm.host.iter().chain(&vm.standby).cloned().collect();
            for host in 0..hosts {
                if chance.one_in(2) && !reach.contains(&name(host)) {
                    reach.push(name(host));
                }
            }
            vm.hosts = Some(reach);
        }
    }
    for n in 0..pool.vms.len() / 8 {
        let (a, b) = (pick(chance, pool.vms.len()), pick(chance, pool.vms.len()));
        if a == b {
            continue;
        }
        let vms = vec![pool.vms[a].name.clone(), pool.vms[b].name.clone()];
        let linked = |vm: &String| {
            let of = pool.groups.iter().filter(|g| g.rule == Rule::Together);
            of.flat_map(|g| &g.vms).any(|other| other == vm)
        };
        let together = pool.vms[a].host == pool.vms[b].host && !vms.iter().any(linked);
        pool.groups.push(Group {
            name: format!("group-{n}"),
            rule: if together {
                Rule::Together
            } else {
                Rule::Apart
            },
            vms,
        });
    }
    // A pair that is together by one group is not apart by another.
    let together: Vec<Vec<String>> = (pool.groups.iter())
        .filter(|g| g.rule == Rule::Together)
        .map(|g| g.vms.clone())
        .collect();
    pool.groups.retain(|g| {
        g.rule == Rule::Together
            || !together
                .iter()
                .any(|t| g.vms.iter().all(|vm| t.contains(vm)))
    });
}
