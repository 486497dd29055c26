//! Checks a certificate against the pool. Small, plain, and written apart: of the planner it
//! uses the model and the certificate's form, nothing else.
//!
//! It lists the sets of failures itself, so that none can be left out, and for each counts from
//! the pool who is lost, and what every host would hold.

use super::certificate::{Certificate, SetProof};
use super::model::{Fails, Host, HostState, Pool, Priority, Protection, Rule, Vm};
use std::collections::{BTreeMap, BTreeSet};

/// Amounts of each resource, in the order of [`Facts::resources`].
type Amounts = Vec<u64>;

/// Set of hosts by their place in the pool, which has at most 64.
type Hosts = u64;
const _: () = assert!(super::model::HOSTS_MAX <= 64);

/// What a VM takes of a resource.
fn takes(vm: &Vm, what: &str) -> u64 {
    match what {
        "memory" if !vm.hugepages => vm.memory.0,
        "hugepages" if vm.hugepages => vm.memory.0,
        "memory" | "hugepages" => 0,
        "vcpus" => u64::from(vm.vcpus.0),
        device => device
            .strip_prefix("device ")
            .and_then(|kind| vm.devices.get(kind))
            .map_or(0, |n| u64::from(*n)),
    }
}

/// What a host has of a resource; none: as much as is asked for.
fn has(host: &Host, what: &str) -> Option<u64> {
    match what {
        "memory" => Some(host.memory.0 - host.overhead.0 - host.hugepages.0),
        "hugepages" => Some(host.hugepages.0),
        "vcpus" => host.vcpus.map(|n| u64::from(n.0)),
        device => Some(
            device
                .strip_prefix("device ")
                .and_then(|kind| host.devices.get(kind))
                .map_or(0, |n| u64::from(*n)),
        ),
    }
}

/// A VM that runs.
struct Runs<'a> {
    vm: &'a Vm,
    host: usize,
    standby: Option<usize>,
    takes: Amounts,
    groups: Vec<usize>,
}

struct Facts<'a> {
    pool: &'a Pool,
    resources: Vec<String>,
    vms: Vec<Runs<'a>>,
    /// Per host: what is on it now, standbys and reservations included.
    used: Vec<Amounts>,
    /// Place in `vms` of each VM that runs.
    place: BTreeMap<&'a str, usize>,
}

fn facts(pool: &Pool) -> Facts<'_> {
    let host = |name: &crate::pool::HostName| pool.hosts.iter().position(|h| &h.name == name);
    let kinds: BTreeSet<&String> = pool.hosts.iter().flat_map(|h| h.devices.keys()).collect();
    let resources: Vec<String> = (["memory", "hugepages", "vcpus"].map(str::to_owned))
        .into_iter()
        .chain(kinds.into_iter().map(|kind| format!("device {kind}")))
        .collect();
    let mut vms = Vec::new();
    let mut place = BTreeMap::new();
    let mut used = vec![vec![0; resources.len()]; pool.hosts.len()];
    for vm in &pool.vms {
        let Some(at) = vm.host.as_ref().and_then(host) else {
            continue;
        };
        let standby = vm.standby.as_ref().and_then(host);
        let takes: Amounts = resources.iter().map(|what| takes(vm, what)).collect();
        for holder in std::iter::once(at).chain(standby) {
            for (used, takes) in used[holder].iter_mut().zip(&takes) {
                *used += takes;
            }
        }
        place.insert(vm.name.as_str(), vms.len());
        vms.push(Runs {
            vm,
            host: at,
            standby,
            takes,
            groups: Vec::new(),
        });
    }
    for (number, group) in pool.groups.iter().enumerate() {
        for vm in group.vms.iter().filter_map(|name| place.get(name.as_str())) {
            vms[*vm].groups.push(number);
        }
    }
    Facts {
        pool,
        resources,
        vms,
        used,
        place,
    }
}

/// Check a certificate; the first thing that is wrong with it.
///
/// # Errors
/// One sentence that names the set of failures and the VM or host.
pub fn verify(pool: &Pool, certificate: &Certificate) -> Result<(), String> {
    let facts = facts(pool);
    if certificate.fails != pool.fails {
        return Err("the certificate is about other failures than the pool".into());
    }
    // What the certificate's numbers are in the pool.
    let hosts: Vec<Option<usize>> = (certificate.hosts.iter())
        .map(|name| pool.hosts.iter().position(|host| &host.name == name))
        .collect();
    let vms: Vec<Option<usize>> = (certificate.vms.iter())
        .map(|name| facts.place.get(name.as_str()).copied())
        .collect();
    let mut proofs: BTreeMap<Hosts, &SetProof> = BTreeMap::new();
    for proof in &certificate.sets {
        let mut failed = 0;
        for at in &proof.failed {
            let host = hosts.get(usize::from(*at)).copied().flatten();
            failed |= 1 << host.ok_or("a set names a host that the pool does not have")?;
        }
        proofs.insert(failed, proof);
    }
    for failed in sets(pool, certificate.tolerate) {
        let name = || {
            let names = pool.hosts.iter().enumerate();
            let failed = names.filter(|(place, _)| failed >> place & 1 == 1);
            failed
                .map(|(_, host)| host.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let proof = proofs
            .get(&failed)
            .ok_or_else(|| format!("the failure of {} is left out", name()))?;
        let mut restarts = vec![None; facts.vms.len()];
        for (vm, host) in &proof.restarts {
            let vm = vms.get(usize::from(*vm)).copied().flatten();
            let host = hosts.get(usize::from(*host)).copied().flatten();
            let (Some(vm), Some(host)) = (vm, host) else {
                return Err("a restart is of a VM or host that the pool does not have".into());
            };
            if restarts[vm].replace(host).is_some() {
                return Err(format!("`{}` restarts twice", facts.vms[vm].vm.name));
            }
        }
        facts
            .one(failed, &restarts, certificate.best_effort)
            .map_err(|what| format!("if {} fail: {what}", name()))?;
    }
    Ok(())
}

/// Every set of so many failures. Where VMs belong together, smaller sets as well: a member that
/// goes on somewhere forces the others to follow it, which a larger failure might not.
fn sets(pool: &Pool, tolerate: u32) -> Vec<Hosts> {
    let mut units: BTreeMap<(bool, &str), Hosts> = BTreeMap::new();
    for (place, host) in pool.hosts.iter().enumerate() {
        if host.state == HostState::Failed {
            continue;
        }
        let domain = host
            .domain
            .as_deref()
            .filter(|_| pool.fails == Fails::Domain);
        let key = domain.map_or((false, host.name.as_str()), |domain| (true, domain));
        *units.entry(key).or_default() |= 1 << place;
    }
    let units: Vec<Hosts> = units.into_values().collect();
    let together = pool.groups.iter().any(|group| group.rule == Rule::Together);
    let most = (tolerate as usize).min(units.len());
    let least = if together { most.min(1) } else { most };
    let mut all: Vec<(usize, usize, Hosts)> = vec![(0, 0, 0)];
    let mut out = Vec::new();
    while let Some((size, from, set)) = all.pop() {
        if size >= least {
            out.push(set);
        }
        if size < most {
            for (n, unit) in units.iter().enumerate().skip(from) {
                all.push((size + 1, n + 1, set | unit));
            }
        }
    }
    out
}

impl Facts<'_> {
    /// One set of failures, and where each VM restarts.
    fn one(&self, failed: Hosts, restarts: &[Option<usize>], all: bool) -> Result<(), String> {
        let dead = |host: usize| {
            failed >> host & 1 == 1 || self.pool.hosts[host].state == HostState::Failed
        };
        let mut holds = self.used.clone();
        let mut came = vec![vec![false; self.resources.len()]; holds.len()];
        // Where each VM is afterwards.
        let mut at: Vec<Option<usize>> = vec![None; self.vms.len()];
        for (n, runs) in self.vms.iter().enumerate() {
            let name = &runs.vm.name;
            let goes_on = std::iter::once(runs.host).chain(runs.standby);
            at[n] = goes_on.into_iter().find(|host| !dead(*host));
            let wanted = at[n].is_none()
                && runs.vm.protection != Protection::None
                && (all || runs.vm.priority == Priority::Always);
            let target = match (wanted, restarts[n]) {
                (true, Some(target)) => target,
                (true, None) => return Err(format!("`{name}` restarts nowhere")),
                (false, Some(_)) => return Err(format!("`{name}` restarts and is not lost")),
                (false, None) => continue,
            };
            let host = &self.pool.hosts[target];
            if dead(target) || host.state != HostState::Live {
                return Err(format!("`{}` takes no restarts", host.name));
            }
            let allowed = runs.vm.hosts.as_ref();
            if allowed.is_some_and(|hosts| !hosts.contains(&host.name)) {
                return Err(format!("`{name}` may not run on `{}`", host.name));
            }
            at[n] = Some(target);
            for (k, amount) in runs.takes.iter().enumerate() {
                holds[target][k] += amount;
                came[target][k] |= *amount > 0;
            }
        }
        for (place, host) in self.pool.hosts.iter().enumerate() {
            for (k, what) in self.resources.iter().enumerate() {
                // A host that has given away more than it has is only wrong to give more.
                if came[place][k] && has(host, what).is_some_and(|has| holds[place][k] > has) {
                    return Err(format!(
                        "`{}` would hold {} of {what}, more than it has",
                        host.name, holds[place][k]
                    ));
                }
            }
        }
        self.groups(restarts, &at)
    }

    fn groups(&self, restarts: &[Option<usize>], at: &[Option<usize>]) -> Result<(), String> {
        for (n, runs) in self.vms.iter().enumerate() {
            let Some(host) = restarts[n] else { continue };
            for number in &runs.groups {
                let group = &self.pool.groups[*number];
                let others = (group.vms.iter())
                    .filter_map(|name| self.place.get(name.as_str()).copied())
                    .filter(|other| *other != n);
                // The others that are somewhere: whether they restarted, and where they are.
                let mut places =
                    others.filter_map(|other| Some((restarts[other].is_some(), at[other]?)));
                let holds = match group.rule {
                    Rule::Apart => places.all(|(_, place)| place != host),
                    Rule::Together => {
                        let (moved, stayed): (Vec<_>, Vec<_>) =
                            places.partition(|(restarted, _)| *restarted);
                        moved.iter().all(|(_, place)| *place == host)
                            && (stayed.is_empty() || stayed.iter().any(|(_, place)| *place == host))
                    }
                };
                if !holds {
                    return Err(format!(
                        "`{}` on `{}` breaks the group `{}`",
                        runs.vm.name, self.pool.hosts[host].name, group.name
                    ));
                }
            }
        }
        Ok(())
    }
}
