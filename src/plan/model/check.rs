//! What has to hold of a pool before it is planned. Each fault names its entry and what to do.

use super::{
    Bytes, COUNT_MAX, DEVICE_KINDS_MAX, GROUPS_MAX, HOSTS_MAX, Host, HostState, MEMORY_MAX, Pool,
    Rule, VMS_MAX, Vm,
};
use crate::pool::HostName;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// One thing that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The entry: ``vm `db` ``.
    pub entry: String,
    /// What is wrong, and what to do.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.entry, self.what)
    }
}

struct Check<'a> {
    pool: &'a Pool,
    hosts: BTreeMap<&'a str, &'a Host>,
    vms: BTreeMap<&'a str, usize>,
    faults: Vec<Fault>,
}

pub(super) fn faults(pool: &Pool) -> Vec<Fault> {
    let mut check = Check {
        pool,
        hosts: BTreeMap::new(),
        vms: BTreeMap::new(),
        faults: Vec::new(),
    };
    check.sizes();
    if check.faults.is_empty() {
        check.hosts();
        for (index, vm) in pool.vms.iter().enumerate() {
            check.vm_name(index, vm);
        }
        for vm in &pool.vms {
            check.vm(vm);
        }
        check.groups();
        check.cycles();
    }
    check.faults
}

impl<'a> Check<'a> {
    fn say(&mut self, entry: impl fmt::Display, what: impl Into<String>) {
        self.faults.push(Fault {
            entry: entry.to_string(),
            what: what.into(),
        });
    }

    fn sizes(&mut self) {
        let pool = self.pool;
        if pool.hosts.is_empty() {
            self.say("pool", "it has no hosts; add a [[host]] for each");
        }
        for (what, count, most) in [
            ("hosts", pool.hosts.len(), HOSTS_MAX),
            ("VMs", pool.vms.len(), VMS_MAX),
            ("groups", pool.groups.len(), GROUPS_MAX),
        ] {
            if count > most {
                self.say(
                    "pool",
                    format!("{count} {what} are more than the {most} that are planned for; split it into several pools"),
                );
            }
        }
        let kinds: BTreeSet<&String> = pool
            .hosts
            .iter()
            .flat_map(|host| host.devices.keys())
            .collect();
        if kinds.len() > DEVICE_KINDS_MAX {
            self.say(
                "pool",
                format!(
                    "{} kinds of devices are more than the {DEVICE_KINDS_MAX} that are planned for; name those alike that can stand in for each other",
                    kinds.len()
                ),
            );
        }
        if pool.policy.starts_per_host == Some(0) {
            self.say(
                "policy",
                "starts_per_host = 0 would start nothing; use 1 or more",
            );
        }
    }

    fn hosts(&mut self) {
        let pool = self.pool;
        for host in &pool.hosts {
            let entry = format!("host `{}`", host.name);
            if self.hosts.insert(host.name.as_str(), host).is_some() {
                self.say(
                    &entry,
                    "there is another host of this name; names are unique",
                );
            }
            if host.memory > MEMORY_MAX {
                self.say(
                    &entry,
                    format!(
                        "memory = {} is more than {MEMORY_MAX}; correct it",
                        host.memory
                    ),
                );
            }
            let taken = host.overhead.0.saturating_add(host.hugepages.0);
            if taken > host.memory.0 {
                self.say(
                    &entry,
                    format!(
                        "overhead and hugepages take {} of {} of memory; correct one of the three",
                        Bytes(taken),
                        host.memory
                    ),
                );
            }
            if host.vcpus.is_some_and(|vcpus| vcpus.0 > COUNT_MAX) {
                self.say(
                    &entry,
                    format!(
                        "vcpus is more than {COUNT_MAX}; leave it out if there is to be no limit"
                    ),
                );
            }
            for (kind, count) in &host.devices {
                if *count > COUNT_MAX {
                    self.say(
                        &entry,
                        format!("{count} devices of kind `{kind}` are more than {COUNT_MAX}"),
                    );
                }
            }
        }
    }

    fn vm_name(&mut self, index: usize, vm: &'a Vm) {
        let entry = format!("vm `{}`", vm.name);
        let label = HostName::new(vm.name.as_str()).is_ok();
        if !label {
            self.say(
                &entry,
                "its name is not valid: use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'",
            );
        }
        if self.vms.insert(vm.name.as_str(), index).is_some() {
            self.say(&entry, "there is another VM of this name; names are unique");
        }
    }

    fn known(&mut self, entry: &str, key: &str, host: &HostName) -> Option<&'a Host> {
        let found = self.hosts.get(host.as_str()).copied();
        if found.is_none() {
            self.say(
                entry,
                format!("{key} names the host `{host}`, which the pool does not have; correct it, or add a [[host]]"),
            );
        }
        found
    }

    fn vm(&mut self, vm: &'a Vm) {
        let entry = format!("vm `{}`", vm.name);
        if vm.memory.0 == 0 || vm.memory > MEMORY_MAX {
            self.say(
                &entry,
                format!("memory = {} is not between 1 B and {MEMORY_MAX}", vm.memory),
            );
        }
        if vm.min_memory.is_some_and(|min| min > vm.memory) {
            self.say(&entry, "min_memory is more than memory; swap or drop it");
        }
        if vm.vcpus.0 > COUNT_MAX {
            self.say(&entry, format!("vcpus is more than {COUNT_MAX}"));
        }
        if let Some(host) = &vm.host {
            self.known(&entry, "host", host);
        }
        for host in vm.hosts.iter().flatten() {
            self.known(&entry, "hosts", host);
        }
        if vm.hosts.as_ref().is_some_and(Vec::is_empty) {
            self.say(
                &entry,
                "hosts is empty, it could run nowhere; name hosts, or leave it out for all",
            );
        }
        self.standby(&entry, vm);
        for (kind, count) in &vm.devices {
            if !self
                .pool
                .hosts
                .iter()
                .any(|host| host.devices.contains_key(kind))
            {
                self.say(
                    &entry,
                    format!("it needs a device of kind `{kind}`, which no host has; add it to a host's devices"),
                );
            }
            if *count > COUNT_MAX {
                self.say(
                    &entry,
                    format!("{count} devices of kind `{kind}` are more than {COUNT_MAX}"),
                );
            }
        }
        for other in &vm.after {
            if other == &vm.name {
                self.say(&entry, "it is to start after itself; take that out");
            } else if !self.vms.contains_key(other.as_str()) {
                self.say(
                    &entry,
                    format!("it is to start after `{other}`, which the pool does not have; correct or remove it"),
                );
            }
        }
    }

    fn standby(&mut self, entry: &str, vm: &'a Vm) {
        let Some(standby) = &vm.standby else { return };
        self.known(entry, "standby", standby);
        if !vm.protection.has_standby() {
            self.say(
                entry,
                format!(
                    "it has a standby on `{standby}`, but protection = \"{}\" has none; use \"reserved\" or \"mirrored\", or take the standby out",
                    vm.protection.word()
                ),
            );
        }
        match &vm.host {
            None => self.say(
                entry,
                "it has a standby and does not run; give its host, or take the standby out",
            ),
            Some(host) if host == standby => self.say(
                entry,
                format!("it runs and has its standby on `{host}`; one failure would take both: choose another host for one side"),
            ),
            Some(_) => {}
        }
    }

    fn groups(&mut self) {
        let pool = self.pool;
        let mut names = BTreeSet::new();
        let mut together: BTreeMap<&str, &str> = BTreeMap::new();
        for group in &pool.groups {
            let entry = format!("group `{}`", group.name);
            if !names.insert(&group.name) {
                self.say(
                    &entry,
                    "there is another group of this name; names are unique",
                );
            }
            let mut seen = BTreeSet::new();
            for vm in &group.vms {
                if !self.vms.contains_key(vm.as_str()) {
                    self.say(
                        &entry,
                        format!("it names the VM `{vm}`, which the pool does not have; correct or remove it"),
                    );
                }
                if !seen.insert(vm) {
                    self.say(&entry, format!("it names the VM `{vm}` twice"));
                }
                if group.rule == Rule::Together
                    && let Some(other) = together.insert(vm, &group.name)
                {
                    self.say(
                        &entry,
                        format!("the VM `{vm}` is already together with those of group `{other}`; make one group of both"),
                    );
                }
            }
        }
        for group in pool.groups.iter().filter(|group| group.rule == Rule::Apart) {
            let mut with: BTreeMap<&str, &String> = BTreeMap::new();
            for vm in &group.vms {
                let Some(name) = together.get(vm.as_str()) else {
                    continue;
                };
                if let Some(other) = with.insert(name, vm) {
                    self.say(
                        format!("group `{}`", group.name),
                        format!("`{vm}` and `{other}` are to be apart, and together by group `{name}`; drop one of the two"),
                    );
                }
            }
        }
    }

    /// Dependencies without a start (Kahn's algorithm; what is left over is on or behind a cycle).
    fn cycles(&mut self) {
        let vms = &self.pool.vms;
        let mut waits: Vec<usize> = vec![0; vms.len()];
        let mut unblocks: Vec<Vec<usize>> = vec![Vec::new(); vms.len()];
        for (index, vm) in vms.iter().enumerate() {
            for other in &vm.after {
                if let Some(&other) = self.vms.get(other.as_str()) {
                    waits[index] += 1;
                    unblocks[other].push(index);
                }
            }
        }
        let mut ready: Vec<usize> = (0..vms.len()).filter(|vm| waits[*vm] == 0).collect();
        let mut done = 0;
        while let Some(vm) = ready.pop() {
            done += 1;
            for &next in &unblocks[vm] {
                waits[next] -= 1;
                if waits[next] == 0 {
                    ready.push(next);
                }
            }
        }
        if done < vms.len()
            && let Some(first) = (0..vms.len()).find(|vm| waits[*vm] > 0)
        {
            let stuck: Vec<&str> = (0..vms.len())
                .filter(|vm| waits[*vm] > 0)
                .map(|vm| vms[vm].name.as_str())
                .take(6)
                .collect();
            self.say(
                format!("vm `{}`", vms[first].name),
                format!(
                    "what must start first goes in a circle ({}); remove one `after`",
                    stuck.join(", ")
                ),
            );
        }
    }
}

pub(super) fn remarks(pool: &Pool) -> Vec<String> {
    let mut out = Vec::new();
    let hosts: BTreeMap<&str, &Host> = pool.hosts.iter().map(|h| (h.name.as_str(), h)).collect();
    let mut used: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for vm in &pool.vms {
        for host in [vm.host.as_ref(), vm.standby.as_ref()]
            .into_iter()
            .flatten()
        {
            let (plain, huge) = used.entry(host.as_str()).or_default();
            *(if vm.hugepages { huge } else { plain }) += vm.memory.0;
        }
        if let (Some(host), Some(allowed)) = (&vm.host, &vm.hosts)
            && !allowed.contains(host)
        {
            out.push(format!(
                "`{}` runs on `{host}`, which is not among its hosts",
                vm.name
            ));
        }
        if let (Some(a), Some(b)) = (&vm.host, &vm.standby)
            && let (Some(a), Some(b)) = (hosts.get(a.as_str()), hosts.get(b.as_str()))
            && a.domain.is_some()
            && a.domain == b.domain
        {
            out.push(format!(
                "both sides of `{}` are in the failure domain `{}` (`{}` and `{}`): one failure takes both; move its standby",
                vm.name,
                a.domain.as_deref().unwrap_or_default(),
                a.name,
                b.name
            ));
        }
        if vm.protection.has_standby() && vm.host.is_some() && vm.standby.is_none() {
            out.push(format!(
                "`{}` is {} and has no standby now; it counts as one that restarts anywhere",
                vm.name,
                vm.protection.word()
            ));
        }
    }
    for host in &pool.hosts {
        let (plain, huge) = used.get(host.name.as_str()).copied().unwrap_or_default();
        let room = host
            .memory
            .0
            .saturating_sub(host.overhead.0)
            .saturating_sub(host.hugepages.0);
        if plain > room && host.state != HostState::Failed {
            out.push(format!(
                "`{}` has given {} to VMs and standbys, of {} that are for them",
                host.name,
                Bytes(plain),
                Bytes(room)
            ));
        }
        if huge > host.hugepages.0 && host.state != HostState::Failed {
            out.push(format!(
                "`{}` has given {} of huge pages, of {}",
                host.name,
                Bytes(huge),
                host.hugepages
            ));
        }
    }
    out
}
