//! Question 3: these hosts just died. What is started where, and when?
//!
//! VMs of priority `always` go where the certificate says, if there is one for this failure;
//! else the most important of them that fit are chosen. Best-effort VMs follow in what is left,
//! then new standbys. Only if VMs of priority `always` are left over, and the policy allows it,
//! are running VMs shrunk or stopped.
//!
//! Must never: move a running VM, start one on a host that is not live, or let a best-effort VM
//! take the place of one that must restart.

use super::answer::{Down, down};
use super::choose::{Chosen, choose, choose_beside};
use super::layout::{HostSet, Layout, Scope, Vector, has, members};
use super::model::{Bytes, HostState, Pool, Priority, Seconds};
use super::tolerance::Checker;
use crate::pool::HostName;
use serde::Serialize;
use std::collections::BTreeMap;

mod measures;
mod order;

/// Starts of one host at a time, if the pool does not say.
pub const STARTS_PER_HOST: u32 = 4;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RestartPlan {
    /// The hosts that are dead.
    pub dead: Vec<HostName>,
    /// Where it comes from.
    pub by: By,
    /// Mirrored VMs that go on at their standby, at once.
    pub go_on: Vec<GoOn>,
    /// Shrinks and stops that have to come first.
    pub measures: Vec<Measure>,
    /// Starts, in order.
    pub starts: Vec<Start>,
    /// VMs that are started nowhere.
    pub left_over: Vec<Down>,
    /// Whether no choice leaves fewer of the most important ones.
    pub fewest: bool,
    /// Where pairs that lost a side are made whole again, when all else is done.
    pub standbys: Vec<NewStandby>,
}

/// Where a plan comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// The certificate has a placement for this failure.
    Certificate,
    /// It was planned now.
    Search,
}

/// A mirrored VM that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GoOn {
    /// Which.
    pub vm: String,
    /// Where its standby is.
    pub host: HostName,
}

/// Something running that has to give way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Measure {
    /// Which VM.
    pub vm: String,
    /// Where it runs.
    pub host: HostName,
    /// What it is shrunk to; none: it is stopped.
    pub shrink_to: Option<Bytes>,
}

/// One start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Start {
    /// Which VM.
    pub vm: String,
    /// Where.
    pub host: HostName,
    /// Whether memory was reserved for it there.
    pub reserved: bool,
    /// Whether it may be left down.
    pub priority: Priority,
    /// Its order within its priority.
    pub order: u32,
    /// Seconds from now at the earliest.
    pub after_s: Seconds,
    /// Of the starts of its host, the how manieth batch: a batch starts when the one before is up.
    pub batch: u32,
    /// VMs of this plan that start before it.
    pub after: Vec<String>,
}

/// A pair made whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NewStandby {
    /// Which VM.
    pub vm: String,
    /// Where its new standby or reservation goes; none: nowhere is room.
    pub host: Option<HostName>,
}

/// Where VMs run again; places in `running`.
pub(super) type Placed = Vec<(u32, u8)>;

/// Plan for the death of `dead`. A checker's certificate is used if it has the placement.
///
/// # Errors
/// A host that the pool does not have.
pub fn plan(
    pool: &Pool,
    dead: &[HostName],
    checker: Option<&Checker>,
) -> Result<RestartPlan, String> {
    let mut failed: HostSet = 0;
    for name in dead {
        let place = pool.hosts.iter().position(|host| host.name == *name);
        let place = place.ok_or_else(|| {
            let all: Vec<String> = pool.hosts.iter().map(|h| h.name.to_string()).collect();
            format!(
                "the pool has no host `{name}`; it has {}",
                super::answer::list(&all)
            )
        })?;
        failed |= 1 << place;
    }
    let all = Layout::new(pool, Scope::All);
    // By name, because the numbers of a checker's layout and of this one may differ.
    let sure = certain(checker, &all, failed & !all.failed);
    let by = if sure.is_some() {
        By::Certificate
    } else {
        By::Search
    };
    let mut measures = Vec::new();
    let chosen = match &sure {
        Some(sure) => choose_beside(&all, failed, &|at| {
            let name = all.running[at as usize].name.as_str();
            sure.get(name).copied()
        }),
        None => {
            let chosen = choose(&all, failed);
            if lacks(&all, &chosen) {
                let (forced, done) = measures::last_resort(pool, &all, failed, chosen);
                measures = done;
                forced
            } else {
                chosen
            }
        }
    };
    let gone: Vec<&str> = measures.iter().map(|m| m.vm.as_str()).collect();
    Ok(RestartPlan {
        dead: members(all.dead(failed))
            .map(|host| all.hosts[host].clone())
            .collect(),
        by,
        go_on: go_on(pool, &all, failed),
        starts: order::starts(pool, &all, failed, &chosen.placed),
        left_over: left_over(&all, &chosen),
        fewest: chosen.exact || !lacks(&all, &chosen),
        standbys: standbys(pool, &all, failed, &chosen.placed, &gone),
        measures,
    })
}

/// Whether a VM that must restart is left over.
fn lacks(layout: &Layout, chosen: &Chosen) -> bool {
    let must = |at: &u32| layout.running[*at as usize].class.0 == Priority::Always;
    chosen.left_over.iter().any(must)
}

/// Who stays down, the most important first.
fn left_over(layout: &Layout, chosen: &Chosen) -> Vec<Down> {
    let mut order = chosen.left_over.clone();
    order.sort_by_key(|at| layout.running[*at as usize].class);
    order.into_iter().map(|at| down(layout, at)).collect()
}

/// What the certificate says, by the names of VMs.
fn certain<'a>(
    checker: Option<&'a Checker>,
    all: &Layout,
    failed: HostSet,
) -> Option<BTreeMap<&'a str, u8>> {
    let checker = checker.filter(|checker| checker.layout().hosts == all.hosts)?;
    let pairs = checker.placement(failed)?;
    let running = &checker.layout().running;
    Some(
        (pairs.into_iter())
            .map(|(at, host)| (running[at as usize].name.as_str(), host))
            .collect(),
    )
}

fn go_on(pool: &Pool, layout: &Layout, failed: HostSet) -> Vec<GoOn> {
    let dead = layout.dead(failed);
    let mut out = Vec::new();
    for vm in &layout.running {
        let mirrored = pool.vms[vm.vm].protection == super::model::Protection::Mirrored;
        let stays = Layout::stays(vm, dead).filter(|_| mirrored && has(dead, vm.host));
        if let Some(host) = stays {
            out.push(GoOn {
                vm: vm.name.clone(),
                host: layout.hosts[usize::from(host)].clone(),
            });
        }
    }
    out
}

/// What is left on each host after these restarts.
pub(super) fn left_after(layout: &Layout, placed: &Placed) -> Vec<Vector> {
    let mut free = layout.free.clone();
    for (at, host) in placed {
        let need = &layout.running[*at as usize].need;
        for (free, need) in free[usize::from(*host)].iter_mut().zip(need) {
            *free = free.saturating_sub(*need);
        }
    }
    free
}

/// New standbys for pairs that lost a side, in another failure domain, the largest first.
fn standbys(
    pool: &Pool,
    layout: &Layout,
    failed: HostSet,
    placed: &Placed,
    gone: &[&str],
) -> Vec<NewStandby> {
    let dead = layout.dead(failed);
    let mut free = left_after(layout, placed);
    let mut wanting: Vec<(&super::layout::Running, u8)> = Vec::new();
    for (at, vm) in (0_u32..).zip(&layout.running) {
        let Some(standby) = vm.standby else { continue };
        let lost = has(dead, vm.host) || has(dead, standby);
        let runs = Layout::stays(vm, dead).or_else(|| {
            let place = placed.iter().find(|(other, _)| *other == at);
            place.map(|(_, host)| *host)
        });
        if let Some(runs) = runs.filter(|_| lost && !gone.contains(&vm.name.as_str())) {
            wanting.push((vm, runs));
        }
    }
    wanting.sort_by(|a, b| (a.0.class, b.0.need).cmp(&(b.0.class, a.0.need)));
    let domain = |host: usize| pool.hosts[host].domain.as_ref();
    (wanting.into_iter())
        .map(|(vm, runs)| {
            let open = layout.targets & !dead & vm.allowed & !(1 << runs);
            let host = members(open)
                .filter(|host| {
                    let theirs = domain(*host);
                    theirs.is_none() || theirs != domain(usize::from(runs))
                })
                .filter(|host| free[*host].iter().zip(vm.need).all(|(f, n)| *f >= n))
                .max_by_key(|host| (free[*host][0], std::cmp::Reverse(*host)));
            if let Some(host) = host {
                for (free, need) in free[host].iter_mut().zip(vm.need) {
                    *free -= need;
                }
            }
            NewStandby {
                vm: vm.name.clone(),
                host: host.map(|host| layout.hosts[host].clone()),
            }
        })
        .collect()
}

/// Mark hosts as dead in a pool.
#[must_use]
pub fn with_dead(pool: &Pool, dead: &[HostName]) -> Pool {
    let mut pool = pool.clone();
    for host in &mut pool.hosts {
        if dead.contains(&host.name) {
            host.state = HostState::Failed;
        }
    }
    pool
}

#[cfg(test)]
mod tests;
