//! Question 4: what if? A change is applied to a copy of the pool, and both are asked question 1.
//! Used as admission control: what would make a safe pool overcommitted is refused, with the
//! reason, or warned of if the policy allows overcommitment.
//!
//! Must never: change the pool it is given, or let a change through because the answer is unknown.

use super::answer::{Answer, Word, list};
use super::choose::choose;
use super::layout::{Layout, Scope};
use super::model::{Bytes, Host, HostState, Pool, Protection, Vm};
use super::tolerance::{Budget, Checker, Runner};
use crate::pool::HostName;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Something that might be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Start a VM: one of the pool that does not run, or a new one. Without a host, on the one that
    /// keeps the pool safe, the roomiest first.
    Start(Box<Vm>),
    /// Stop a VM.
    Stop(String),
    /// Give a VM another size.
    Resize(String, Bytes),
    /// Protect a VM otherwise; the standby is chosen if none is given and one is needed.
    Protect(String, Protection, Option<HostName>),
    /// Move a VM while it runs.
    Move(String, HostName),
    /// Take a host into maintenance: what runs there moves away first.
    Maintenance(HostName),
    /// A host joins, or comes back.
    Add(Box<Host>),
}

/// Whether it may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Admission {
    /// Yes.
    Admitted,
    /// Yes, but it makes the pool overcommitted, which the policy allows.
    Warned,
    /// No.
    Refused,
}

/// What a change would do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WhatIf {
    /// Whether it may be done.
    pub admission: Admission,
    /// Why, in a sentence or two.
    pub reason: String,
    /// What it does beyond what was asked: hosts that were chosen, moves that come first.
    pub details: Vec<String>,
    /// The answer now.
    pub before: Answer,
    /// The answer then; none if it cannot be done at all.
    pub after: Option<Answer>,
}

/// A pool after a change, and what the change does beyond what was asked.
type Changed = (Pool, Vec<String>);

/// Judge a change. The checker holds the pool as it is, and is as before afterwards.
pub fn judge(runner: &dyn Runner, checker: &mut Checker, pool: &Pool, change: &Change) -> WhatIf {
    let before = Answer::of(checker);
    let options = match options(pool, change) {
        Ok(options) => options,
        Err(why) => {
            return WhatIf {
                admission: Admission::Refused,
                reason: why,
                details: Vec::new(),
                before,
                after: None,
            };
        }
    };
    // The first that is survived, or else the first.
    let mut best: Option<(Answer, Vec<String>)> = None;
    for (then, details) in options {
        checker.update_on(runner, &then);
        let after = Answer::of(checker);
        let good = after.answer == Word::Survives;
        if best.is_none() || good {
            best = Some((after, details));
        }
        if good {
            break;
        }
    }
    checker.update_on(runner, pool);
    let Some((after, details)) = best else {
        return WhatIf {
            admission: Admission::Refused,
            reason: "no live host can take it".into(),
            details: Vec::new(),
            before,
            after: None,
        };
    };
    let relieves = matches!(change, Change::Stop(_) | Change::Add(_));
    let (admission, reason) = verdict(&before, &after, relieves, pool.policy.allow_overcommit);
    WhatIf {
        admission,
        reason,
        details,
        before,
        after: Some(after),
    }
}

fn verdict(before: &Answer, after: &Answer, relieves: bool, allow: bool) -> (Admission, String) {
    let failures = match after.tolerate {
        1 => "one failure".to_owned(),
        n => format!("any {n} failures"),
    };
    match (before.answer, after.answer) {
        (Word::Survives, Word::Survives) => (
            Admission::Admitted,
            format!("{failures} would still be survived"),
        ),
        (_, Word::Survives) => (
            Admission::Admitted,
            format!("{failures} would be survived again"),
        ),
        (Word::Survives, _) if allow => (
            Admission::Warned,
            format!(
                "{failures} would not be survived any more: {}; policy.allow_overcommit lets it pass",
                after.sentence()
            ),
        ),
        (Word::Survives, _) => (
            Admission::Refused,
            format!(
                "{failures} would not be survived any more: {}",
                after.sentence()
            ),
        ),
        _ if relieves => (
            Admission::Admitted,
            format!("it makes nothing worse; still, {}", after.sentence()),
        ),
        _ if allow => (
            Admission::Warned,
            format!("the pool stays overcommitted: {}", after.sentence()),
        ),
        _ => (
            Admission::Refused,
            format!(
                "the pool is overcommitted already, and stays so: {}",
                after.sentence()
            ),
        ),
    }
}

/// What the change could make of the pool, the best first.
fn options(pool: &Pool, change: &Change) -> Result<Vec<Changed>, String> {
    let options = match change {
        Change::Start(vm) => start(pool, vm)?,
        Change::Stop(name) => one(pool, name, |vm| {
            vm.host = None;
            vm.standby = None;
            Ok(())
        })?,
        Change::Resize(name, memory) => one(pool, name, |vm| {
            vm.memory = *memory;
            vm.min_memory = vm.min_memory.map(|min| min.min(*memory));
            Ok(())
        })?,
        Change::Move(name, to) => one(pool, name, |vm| {
            if vm.host.is_none() {
                return Err(format!("`{name}` does not run; start it on `{to}` instead"));
            }
            vm.host = Some(to.clone());
            Ok(())
        })?,
        Change::Protect(name, protection, standby) => protect(pool, name, *protection, standby)?,
        Change::Maintenance(host) => vec![maintenance(pool, host)?],
        Change::Add(host) => {
            let mut then = pool.clone();
            then.hosts.retain(|other| other.name != host.name);
            then.hosts.push((**host).clone());
            vec![(then, Vec::new())]
        }
    };
    if let Some((then, _)) = options.first()
        && let [first, ..] = then.check().as_slice()
    {
        return Err(first.to_string());
    }
    let fits: Vec<Changed> = (options.iter())
        .filter(|(then, _)| overfull(pool, then).is_none())
        .cloned()
        .collect();
    match options.first() {
        Some((then, _)) if fits.is_empty() => Err(overfull(pool, then).unwrap_or_default()),
        _ => Ok(fits),
    }
}

/// A host that would have to hold more than it has, and did not before.
fn overfull(before: &Pool, after: &Pool) -> Option<String> {
    let old = room(before);
    for row in room(after) {
        let was = (old.iter()).find(|old| old.host == row.host && old.what == row.what);
        if row.used > row.has && was.is_none_or(|was| row.used > was.used) {
            let say = |n: u64| match row.in_bytes {
                true => Bytes(n).to_string(),
                false => n.to_string(),
            };
            return Some(format!(
                "`{}` does not have room for it: it would hold {} of {}, of {}",
                row.host,
                say(row.used),
                row.what,
                say(row.has)
            ));
        }
    }
    None
}

/// What one host holds of one thing, with what it keeps for others.
struct Held<'a> {
    host: &'a HostName,
    what: &'a str,
    in_bytes: bool,
    used: u64,
    has: u64,
}

/// Per host that has not failed: memory, huge pages, vCPUs where they are limited, devices.
fn room(pool: &Pool) -> Vec<Held<'_>> {
    let kinds: BTreeSet<&String> = pool.vms.iter().flat_map(|vm| vm.devices.keys()).collect();
    let mut out = Vec::new();
    for host in pool.hosts.iter().filter(|h| h.state != HostState::Failed) {
        let held = |of: &dyn Fn(&Vm) -> u64| -> u64 {
            let here = |side: &Option<HostName>| side.as_ref() == Some(&host.name);
            let vms = pool.vms.iter();
            vms.filter(|vm| here(&vm.host) || here(&vm.standby))
                .map(of)
                .sum()
        };
        let memory = |huge: bool| held(&|vm| if vm.hugepages == huge { vm.memory.0 } else { 0 });
        let row = |what, in_bytes, used, has| Held {
            host: &host.name,
            what,
            in_bytes,
            used,
            has,
        };
        let own = host.memory.0 - host.overhead.0 - host.hugepages.0;
        out.push(row("memory", true, memory(false), own));
        out.push(row("huge pages", true, memory(true), host.hugepages.0));
        if let Some(has) = host.vcpus {
            let used = held(&|vm| vm.vcpus.0.into());
            out.push(row("vCPUs", false, used, has.0.into()));
        }
        for kind in &kinds {
            let of = |devices: &BTreeMap<String, u32>| {
                u64::from(devices.get(*kind).copied().unwrap_or_default())
            };
            let used = held(&|vm| of(&vm.devices));
            out.push(row(kind, false, used, of(&host.devices)));
        }
    }
    out
}

fn one(
    pool: &Pool,
    name: &str,
    edit: impl Fn(&mut Vm) -> Result<(), String>,
) -> Result<Vec<Changed>, String> {
    let mut then = pool.clone();
    edit(find(&mut then, name)?)?;
    Ok(vec![(then, Vec::new())])
}

fn find<'a>(pool: &'a mut Pool, name: &str) -> Result<&'a mut Vm, String> {
    (pool.vms.iter_mut())
        .find(|vm| vm.name == name)
        .ok_or_else(|| format!("the pool has no VM `{name}`; `pollux plan explain` lists them"))
}

/// Live hosts, the roomiest first.
fn roomiest(pool: &Pool) -> Vec<HostName> {
    let layout = Layout::new(pool, Scope::Always);
    let mut hosts: Vec<usize> = super::layout::members(layout.targets).collect();
    hosts.sort_by_key(|host| std::cmp::Reverse(layout.free[*host][0]));
    hosts
        .into_iter()
        .map(|host| pool.hosts[host].name.clone())
        .collect()
}

fn start(pool: &Pool, vm: &Vm) -> Result<Vec<Changed>, String> {
    let known = pool.vms.iter().position(|other| other.name == vm.name);
    let with = |host: &HostName| {
        let mut then = pool.clone();
        match known {
            Some(at) => then.vms[at].host = Some(host.clone()),
            None => then.vms.push(Vm {
                host: Some(host.clone()),
                ..vm.clone()
            }),
        }
        then
    };
    if let Some(host) = known.and_then(|at| pool.vms[at].host.as_ref()) {
        return Err(format!("`{}` runs already, on `{host}`", vm.name));
    }
    if let Some(host) = &vm.host {
        return Ok(vec![(with(host), Vec::new())]);
    }
    let allowed = known.map_or(&vm.hosts, |at| &pool.vms[at].hosts);
    let may = |host: &HostName| allowed.as_ref().is_none_or(|hosts| hosts.contains(host));
    Ok((roomiest(pool).iter())
        .filter(|host| may(host))
        .map(|host| (with(host), vec![format!("it is started on `{host}`")]))
        .collect())
}

fn protect(
    pool: &Pool,
    name: &str,
    protection: Protection,
    standby: &Option<HostName>,
) -> Result<Vec<Changed>, String> {
    let mut base = pool.clone();
    let vm = find(&mut base, name)?;
    vm.protection = protection;
    vm.standby = standby.clone().or_else(|| vm.standby.take());
    if !protection.has_standby() {
        vm.standby = None;
    }
    if !protection.has_standby() || vm.standby.is_some() || vm.host.is_none() {
        return Ok(vec![(base, Vec::new())]);
    }
    let vm = vm.clone();
    let domain = |name: &HostName| pool.host(name.as_str()).and_then(|h| h.domain.as_ref());
    let own = vm.host.as_ref().and_then(domain);
    let mut out = Vec::new();
    for host in roomiest(pool) {
        let same = own.is_some() && domain(&host) == own;
        let allowed = vm.hosts.as_ref().is_none_or(|hosts| hosts.contains(&host));
        if vm.host.as_ref() == Some(&host) || same || !allowed {
            continue;
        }
        let mut then = base.clone();
        find(&mut then, name)?.standby = Some(host.clone());
        out.push((then, vec![format!("its standby goes to `{host}`")]));
    }
    if out.is_empty() {
        return Err(format!(
            "no live host of another failure domain can hold the standby of `{name}`"
        ));
    }
    Ok(out)
}

/// Everything moves off a host before it is taken out.
fn maintenance(pool: &Pool, host: &HostName) -> Result<Changed, String> {
    let Some(place) = pool.hosts.iter().position(|other| other.name == *host) else {
        return Err(format!("the pool has no host `{host}`"));
    };
    let mut then = pool.clone();
    then.hosts[place].state = HostState::Maintenance;
    let mut details = Vec::new();
    // Roles swap where a standby is: nothing has to be moved for it.
    for vm in &mut then.vms {
        if vm.host.as_ref() == Some(host)
            && vm.protection == Protection::Mirrored
            && let Some(standby) = vm.standby.take()
        {
            details.push(format!("`{}` switches over to `{standby}`", vm.name));
            vm.host = Some(standby);
        } else if vm.standby.as_ref() == Some(host) {
            details.push(format!("`{}` loses its standby on `{host}`", vm.name));
            vm.standby = None;
        } else if vm.host.as_ref() == Some(host)
            && let Some(partner) = vm.standby.take()
        {
            details.push(format!(
                "`{}` moves to its reservation on `{partner}`",
                vm.name
            ));
            vm.host = Some(partner);
        }
    }
    // All that still runs there is to be placed: as if it were lost and had to restart.
    let mut as_lost = then.clone();
    for vm in &mut as_lost.vms {
        if vm.host.as_ref() == Some(host) && vm.protection == Protection::None {
            vm.protection = Protection::Restart;
        }
    }
    let layout = Layout::new(&as_lost, Scope::All);
    let chosen = choose(&layout, 1 << place);
    let here = |at: &u32| usize::from(layout.running[*at as usize].host) == place;
    let stuck: Vec<String> = (chosen.left_over.iter().filter(|at| here(at)))
        .map(|at| format!("`{}`", layout.running[*at as usize].name))
        .collect();
    if !stuck.is_empty() {
        return Err(format!(
            "`{host}` cannot be emptied: there is no room elsewhere for {}",
            list(&stuck)
        ));
    }
    for (at, to) in chosen.placed.iter().filter(|(at, _)| here(at)) {
        let (vm, to) = (
            &layout.running[*at as usize],
            &layout.hosts[usize::from(*to)],
        );
        then.vms[vm.vm].host = Some(to.clone());
        details.push(format!("`{}` moves to `{to}`", vm.name));
    }
    Ok((then, details))
}

/// A checker for a pool as it says.
#[must_use]
pub fn checker(runner: &dyn Runner, pool: &Pool, budget: Budget) -> Checker {
    Checker::new_on(runner, pool, pool.tolerate, Scope::Always, budget)
}

#[cfg(test)]
mod tests;
