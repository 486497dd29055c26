//! Checks a certificate against the pool. Small, plain, and written apart: of the planner it
//! uses the model and the certificate's form, nothing else.
//!
//! It lists the sets of failures itself, so that none can be left out, and for each counts from
//! the pool who is lost, and what every host would hold.

use super::certificate::{Certificate, SetProof};
use super::model::{Fails, Host, HostState, Pool, Priority, Protection, Rule, Vm};
use std::collections::{BTreeMap, BTreeSet};

/// Resources of one host or VM by name: memory, huge pages, vCPUs, devices.
type Amounts = BTreeMap<String, u64>;

/// What a VM takes.
fn takes(vm: &Vm) -> Amounts {
    let memory = if vm.hugepages { "hugepages" } else { "memory" };
    let mut out: Amounts = BTreeMap::new();
    out.insert(memory.into(), vm.memory.0);
    out.insert("vcpus".into(), u64::from(vm.vcpus.0));
    for (kind, count) in &vm.devices {
        out.insert(format!("device {kind}"), u64::from(*count));
    }
    out.retain(|_, amount| *amount > 0);
    out
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

struct Facts<'a> {
    pool: &'a Pool,
    takes: Vec<Amounts>,
    /// Per host: what is on it now, standbys and reservations included.
    used: BTreeMap<&'a str, Amounts>,
    /// Groups of each VM.
    groups: BTreeMap<&'a str, Vec<usize>>,
}

/// Check a certificate; the first thing that is wrong with it.
///
/// # Errors
/// One sentence that names the set of failures and the VM or host.
pub fn verify(pool: &Pool, certificate: &Certificate) -> Result<(), String> {
    let mut facts = Facts {
        pool,
        takes: pool.vms.iter().map(takes).collect(),
        used: BTreeMap::new(),
        groups: BTreeMap::new(),
    };
    for (vm, takes) in pool.vms.iter().zip(&facts.takes) {
        for host in vm.host.iter().chain(&vm.standby) {
            let used = facts.used.entry(host.as_str()).or_default();
            for (what, amount) in takes {
                *used.entry(what.clone()).or_default() += amount;
            }
        }
    }
    for (number, group) in pool.groups.iter().enumerate() {
        for vm in &group.vms {
            facts.groups.entry(vm).or_default().push(number);
        }
    }
    if certificate.fails != pool.fails {
        return Err("the certificate is about other failures than the pool".into());
    }
    let mut proofs: BTreeMap<BTreeSet<&str>, &SetProof> = BTreeMap::new();
    for proof in &certificate.sets {
        let failed = (proof.failed.iter())
            .map(|at| certificate.hosts.get(usize::from(*at)).map(|h| h.as_str()))
            .collect::<Option<BTreeSet<&str>>>()
            .ok_or("a set names a host that the certificate does not list")?;
        proofs.insert(failed, proof);
    }
    for failed in sets(pool, certificate.tolerate) {
        let name = failed.iter().copied().collect::<Vec<_>>().join(", ");
        let proof = proofs
            .get(&failed)
            .ok_or_else(|| format!("the failure of {name} is left out"))?;
        facts
            .one(&failed, proof, certificate)
            .map_err(|what| format!("if {name} fail: {what}"))?;
    }
    Ok(())
}

/// Every set of so many failures. Where VMs belong together, smaller sets as well: a member that
/// goes on somewhere forces the others to follow it, which a larger failure might not.
fn sets(pool: &Pool, tolerate: u32) -> Vec<BTreeSet<&str>> {
    let mut units: BTreeMap<(bool, &str), BTreeSet<&str>> = BTreeMap::new();
    for host in pool.hosts.iter().filter(|h| h.state != HostState::Failed) {
        let domain = host
            .domain
            .as_deref()
            .filter(|_| pool.fails == Fails::Domain);
        let key = domain.map_or((false, host.name.as_str()), |domain| (true, domain));
        units.entry(key).or_default().insert(host.name.as_str());
    }
    let units: Vec<_> = units.into_values().collect();
    let together = pool.groups.iter().any(|group| group.rule == Rule::Together);
    let most = (tolerate as usize).min(units.len());
    let least = if together { most.min(1) } else { most };
    let mut all: Vec<(usize, usize, BTreeSet<&str>)> = vec![(0, 0, BTreeSet::new())];
    let mut out = Vec::new();
    while let Some((size, from, set)) = all.pop() {
        if size >= least {
            out.push(set.clone());
        }
        if size < most {
            for (n, unit) in units.iter().enumerate().skip(from) {
                all.push((size + 1, n + 1, set.union(unit).copied().collect()));
            }
        }
    }
    out
}

impl<'a> Facts<'a> {
    fn one(
        &self,
        failed: &BTreeSet<&str>,
        proof: &SetProof,
        certificate: &'a Certificate,
    ) -> Result<(), String> {
        let dead: BTreeSet<&str> = (self.pool.hosts.iter())
            .filter(|host| host.state == HostState::Failed || failed.contains(host.name.as_str()))
            .map(|host| host.name.as_str())
            .collect();
        let is_dead = |host: &Option<crate::pool::HostName>| {
            host.as_ref()
                .is_none_or(|host| dead.contains(host.as_str()))
        };
        let mut restarts: BTreeMap<&str, &str> = BTreeMap::new();
        for (vm, host) in &proof.restarts {
            let vm = certificate.vms.get(usize::from(*vm));
            let host = certificate.hosts.get(usize::from(*host));
            let (Some(vm), Some(host)) = (vm, host) else {
                return Err("it names a VM or host that the certificate does not list".into());
            };
            if restarts.insert(vm, host.as_str()).is_some() {
                return Err(format!("`{vm}` restarts twice"));
            }
        }
        let mut added: BTreeMap<&str, Amounts> = BTreeMap::new();
        // Where each VM is afterwards.
        let mut at: BTreeMap<&str, &str> = BTreeMap::new();
        let mut count = 0;
        for (vm, takes) in self.pool.vms.iter().zip(&self.takes) {
            let Some(host) = &vm.host else { continue };
            if !dead.contains(host.as_str()) {
                at.insert(&vm.name, host.as_str());
                continue;
            }
            if let Some(standby) = vm.standby.as_ref().filter(|_| !is_dead(&vm.standby)) {
                at.insert(&vm.name, standby.as_str());
                continue;
            }
            let wanted = vm.protection != Protection::None
                && (certificate.best_effort || vm.priority == Priority::Always);
            if !wanted {
                continue;
            }
            let target = *restarts
                .get(vm.name.as_str())
                .ok_or_else(|| format!("`{}` restarts nowhere", vm.name))?;
            count += 1;
            let allowed = vm.hosts.as_ref();
            if allowed.is_some_and(|hosts| hosts.iter().all(|h| h.as_str() != target)) {
                return Err(format!("`{}` may not run on `{target}`", vm.name));
            }
            at.insert(&vm.name, target);
            let added = added.entry(target).or_default();
            for (what, amount) in takes {
                *added.entry(what.clone()).or_default() += amount;
            }
        }
        if count != restarts.len() {
            return Err("a VM restarts that is not lost".into());
        }
        for (name, added) in &added {
            let host = (self.pool.hosts.iter())
                .find(|host| host.name.as_str() == *name && host.state == HostState::Live)
                .filter(|host| !dead.contains(host.name.as_str()))
                .ok_or_else(|| format!("`{name}` takes no restarts"))?;
            for (what, amount) in added {
                let used = self.used.get(name).and_then(|used| used.get(what));
                let holds = used.copied().unwrap_or_default() + amount;
                if has(host, what).is_some_and(|has| holds > has) {
                    return Err(format!(
                        "`{name}` would hold {holds} of {what}, more than it has"
                    ));
                }
            }
        }
        self.groups(&restarts, &at)
    }

    fn groups(
        &self,
        restarts: &BTreeMap<&str, &str>,
        at: &BTreeMap<&str, &str>,
    ) -> Result<(), String> {
        for (vm, host) in restarts {
            for number in self.groups.get(vm).into_iter().flatten() {
                let group = &self.pool.groups[*number];
                let others = group.vms.iter().filter(|other| other.as_str() != *vm);
                // The others that are somewhere, and whether they restarted.
                let mut places = others.filter_map(|other| {
                    let place = at.get(other.as_str())?;
                    Some((restarts.contains_key(other.as_str()), *place))
                });
                let holds = match group.rule {
                    Rule::Apart => places.all(|(_, place)| place != *host),
                    Rule::Together => {
                        let (moved, stayed): (Vec<_>, Vec<_>) =
                            places.partition(|(restarted, _)| *restarted);
                        moved.iter().all(|(_, place)| place == host)
                            && (stayed.is_empty() || stayed.iter().any(|(_, place)| place == host))
                    }
                };
                if !holds {
                    return Err(format!(
                        "`{vm}` on `{host}` breaks the group `{}`",
                        group.name
                    ));
                }
            }
        }
        Ok(())
    }
}
