//! Where the VMs of a dead host are started again. Pure.
//!
//! VMs go in the order of their priority, then of their `order`, then the largest first, each to
//! the host with the most free memory; one that fits nowhere is left, with the reason. A VM of a
//! higher order starts when the delays of all lower ones are over, counted from when the plan
//! is seen.
//!
//! Must never: place a VM on a host that is no member, or on more memory than there is.

use crate::pool::spec::RestartPriority;
use crate::pool::{HostName, VmId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The registry's key of [`Plan`].
pub const PLAN_KEY: &str = "pool/restarts";
/// Most orders that are kept; further VMs wait until some of these are done.
pub const ORDERS_MAX: usize = 128;
/// Of orders that are done, the newest this many are kept for `pollux why`.
const DONE_MAX: usize = 64;
/// Highest number of an order: it can be followed by others for ever.
const NUMBER_MAX: u64 = 1 << 56;

/// A VM that is to run again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Bytes of memory it takes.
    pub memory: u64,
    /// Its class.
    pub priority: RestartPriority,
    /// Lower ones first.
    pub order: u32,
    /// Seconds until VMs of a higher order follow.
    pub delay_s: u32,
    /// Version of its record that its dead host wrote last.
    pub version: u64,
}

/// A host that VMs can be started on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Which.
    pub host: HostName,
    /// Bytes of memory for VMs.
    pub memory: u64,
    /// Of these, taken by VMs and standbys.
    pub used: u64,
}

/// One VM's order to be started again, or why it is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Rises by one with each order of the pool.
    pub number: u64,
    /// Which VM.
    pub vm: String,
    /// Its name.
    pub name: String,
    /// Who ran it.
    pub from: HostName,
    /// Where it is to run; `None`: nowhere.
    pub to: Option<HostName>,
    /// Version of its record that this is about. At any other, the order is void.
    pub version: u64,
    /// Seconds to wait from when the order is first seen.
    pub after_s: u32,
    /// Who decided, and why so.
    pub cause: String,
}

impl Order {
    /// Whether both say the same, but for their numbers.
    fn says(&self, other: &Self) -> bool {
        let number = other.number;
        *other
            == Self {
                number,
                ..self.clone()
            }
    }
}

/// The newest orders, oldest first. JSON in the registry under [`PLAN_KEY`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Number of the next order.
    pub next: u64,
    /// The orders.
    pub orders: Vec<Order>,
}

/// Place `vms` of the dead host `from` on `targets`; as many orders as `plan` has room for.
/// `why` is how its death is known. Returns whether all were placed or left with a reason.
pub fn place(
    plan: &mut Plan,
    from: &HostName,
    why: &str,
    mut vms: Vec<Candidate>,
    targets: &[Target],
) -> bool {
    vms.sort_by(|a, b| {
        let key = |vm: &Candidate| (vm.priority, vm.order, std::cmp::Reverse(vm.memory));
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    let starts = starts(&vms);
    let mut free: BTreeMap<&HostName, u64> = targets
        .iter()
        .map(|target| (&target.host, target.memory.saturating_sub(target.used)))
        .collect();
    for (vm, after_s) in vms.into_iter().zip(starts) {
        if plan.orders.len() >= ORDERS_MAX {
            return false;
        }
        // The first by name of those with the most.
        let best = free
            .iter_mut()
            .rev()
            .max_by_key(|(_, free)| **free)
            .filter(|(_, free)| **free >= vm.memory);
        let (to, reason) = match best {
            Some((host, free)) => {
                let reason = format!(
                    "of the hosts that are left {host} has the most free memory, {}",
                    mib(*free)
                );
                *free -= vm.memory;
                (Some((*host).clone()), reason)
            }
            None => {
                let most = free.values().max().copied().unwrap_or(0);
                let reason = format!(
                    "it needs {} and no host that is left has more than {} free",
                    mib(vm.memory),
                    mib(most)
                );
                (None, reason)
            }
        };
        plan.orders.push(Order {
            number: plan.next,
            vm: vm.vm.to_string(),
            name: vm.name,
            from: from.clone(),
            to,
            version: vm.version,
            after_s,
            cause: format!("{from} is dead: {why}; {reason}"),
        });
        plan.next += 1;
    }
    true
}

/// Seconds after which each of the sorted `vms` starts.
fn starts(vms: &[Candidate]) -> Vec<u32> {
    let mut delays: BTreeMap<(RestartPriority, u32), u32> = BTreeMap::new();
    for vm in vms {
        let delay = delays.entry((vm.priority, vm.order)).or_default();
        *delay = (*delay).max(vm.delay_s);
    }
    let before = |vm: &Candidate| {
        let lower = delays.range(..(vm.priority, vm.order));
        lower.map(|(_, delay)| *delay).fold(0, u32::saturating_add)
    };
    vms.iter().map(before).collect()
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

impl Plan {
    /// Read it from the registry's bytes.
    ///
    /// # Errors
    /// Why they are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let plan: Self = serde_json::from_slice(bytes).map_err(|e| {
            format!("the pool's restarts cannot be read: {e}; the value is damaged or was written by a newer pollux")
        })?;
        if plan.orders.len() > ORDERS_MAX || plan.next > NUMBER_MAX {
            return Err(format!(
                "the pool's restarts cannot be: {} orders, the next is number {}; the value is damaged",
                plan.orders.len(),
                plan.next
            ));
        }
        Ok(plan)
    }

    /// The registry's bytes of it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Plain data with string keys: cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Forget the oldest orders that are `done`, but for the newest some.
    pub fn forget(&mut self, done: impl Fn(&Order) -> bool) {
        let mut extra = self
            .orders
            .iter()
            .filter(|order| done(order))
            .count()
            .saturating_sub(DONE_MAX);
        self.orders.retain(|order| {
            let forget = extra > 0 && done(order);
            extra -= usize::from(forget);
            !forget
        });
    }

    /// Forget orders that are open (not `done`) and went nowhere, or to a host that is not `there`
    /// any more: their VMs are to be placed anew.
    pub fn forget_open(
        &mut self,
        done: impl Fn(&Order) -> bool,
        there: impl Fn(&HostName) -> bool,
    ) {
        let stays = |order: &Order| order.to.as_ref().is_some_and(&there);
        self.orders.retain(|order| done(order) || stays(order));
    }

    /// Orders that say but for their number what one of `before` said are that one: what was
    /// decided anew and not changed needs not to be written.
    pub fn settle(&mut self, before: &Self) {
        for order in &mut self.orders {
            let known = before.orders.iter().find(|known| order.says(known));
            order.number = known.map_or(order.number, |known| known.number);
        }
        self.orders.sort_by_key(|order| order.number);
        let newest = self.orders.last().map_or(0, |order| order.number + 1);
        self.next = before.next.max(newest);
    }

    /// Whether there is an order for this version of a VM's record already.
    #[must_use]
    pub fn has(&self, vm: VmId, version: u64) -> bool {
        let vm = vm.to_string();
        self.orders
            .iter()
            .any(|order| order.vm == vm && order.version == version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    fn vm(n: u8, gib: u64, order: u32, delay_s: u32) -> Candidate {
        Candidate {
            vm: VmId([n; 16]),
            name: format!("v{n}"),
            memory: gib << 30,
            priority: RestartPriority::Always,
            order,
            delay_s,
            version: 7,
        }
    }

    fn target(name: &str, gib: u64, used: u64) -> Target {
        Target {
            host: host(name),
            memory: gib << 30,
            used: used << 30,
        }
    }

    fn placed(vms: Vec<Candidate>, targets: &[Target]) -> Vec<(String, Option<String>, u32)> {
        let mut plan = Plan::default();
        assert!(place(
            &mut plan,
            &host("a"),
            "its power is off",
            vms,
            targets
        ));
        let show = |order: &Order| {
            let to = order.to.as_ref().map(ToString::to_string);
            (order.name.clone(), to, order.after_s)
        };
        plan.orders.iter().map(show).collect()
    }

    #[test]
    fn each_goes_where_most_is_free_and_what_fits_nowhere_is_left_with_the_reason() {
        let vms = vec![vm(1, 2, 0, 0), vm(2, 3, 0, 0), vm(3, 3, 0, 0)];
        let targets = [target("b", 8, 4), target("c", 8, 3)];
        let to = |host: &str| Some(host.to_owned());
        assert_eq!(
            placed(vms, &targets),
            [
                ("v2".into(), to("c"), 0),
                ("v3".into(), to("b"), 0),
                ("v1".into(), to("c"), 0),
            ]
        );
        let mut plan = Plan::default();
        place(
            &mut plan,
            &host("a"),
            "x",
            vec![vm(1, 5, 0, 0)],
            &targets[..1],
        );
        assert_eq!(plan.orders[0].to, None);
        let cause = &plan.orders[0].cause;
        assert!(
            cause.contains("needs 5120 MiB") && cause.contains("4096 MiB free"),
            "{cause}"
        );
    }

    #[test]
    fn best_effort_waits_for_all_others_and_delays_add_up_over_orders() {
        let mut last = vm(4, 1, 0, 0);
        last.priority = RestartPriority::BestEffort;
        let vms = vec![last, vm(3, 1, 2, 0), vm(1, 1, 0, 10), vm(2, 1, 1, 5)];
        let targets = [target("b", 64, 0)];
        let placed = placed(vms, &targets);
        let starts: Vec<_> = placed
            .iter()
            .map(|(name, _, after)| (name.as_str(), *after))
            .collect();
        assert_eq!(starts, [("v1", 0), ("v2", 10), ("v3", 15), ("v4", 15)]);
    }

    #[test]
    fn what_is_decided_anew_and_comes_out_the_same_leaves_the_plan_as_it_was() {
        let anew = |before: &Plan, gib: u64| {
            let mut plan = before.clone();
            plan.forget_open(|_| false, |to| *to == host("b"));
            let left = (0..4).map(|n| vm(n, u64::from(n) + 1, 0, 0));
            let left = left.filter(|vm| !plan.has(vm.vm, vm.version)).collect();
            let targets = [target("b", gib, 0)];
            place(&mut plan, &host("a"), "its power is off", left, &targets);
            plan.settle(before);
            plan
        };
        // Nothing fits at first.
        let first = anew(&Plan::default(), 0);
        assert_eq!((first.orders.len(), first.next), (4, 4));
        assert_eq!(anew(&first, 0), first);
        // The smallest fits now: its order is a new one, and the others have a new reason.
        let second = anew(&first, 1);
        let open = |plan: &Plan| plan.orders.iter().filter(|o| o.to.is_none()).count();
        assert_eq!((open(&first), open(&second)), (4, 3));
        assert!(second.next > first.next && second.orders.is_sorted_by_key(|o| o.number));
    }

    #[test]
    fn a_full_plan_takes_no_more_and_forgets_what_is_done() {
        let vms: Vec<_> = (0..200).map(|n| vm(n, 1, 0, 0)).collect();
        let targets = [target("b", 1000, 0)];
        let mut plan = Plan::default();
        assert!(!place(&mut plan, &host("a"), "x", vms, &targets));
        assert_eq!(plan.orders.len(), ORDERS_MAX);
        assert!(plan.has(VmId([0; 16]), 7) && !plan.has(VmId([0; 16]), 8));
        plan.forget(|order| order.number < 100);
        assert_eq!(plan.orders.len(), 28 + 64);
        assert_eq!(plan.orders[0].number, 36);
        // One that went to a host that is gone is placed anew; what is done is kept.
        let mut gone = plan.clone();
        gone.forget_open(|order| order.number < 100, |_| false);
        assert_eq!(gone.orders.len(), 64);
        gone.forget_open(|_| false, |to| *to == host("b"));
        assert_eq!(gone.orders.len(), 64);
        let bytes = plan.to_bytes();
        assert!(bytes.len() < 64 << 10, "{}", bytes.len());
        assert_eq!(Plan::from_bytes(&bytes).as_ref(), Ok(&plan));
        plan.next = u64::MAX;
        let told = Plan::from_bytes(&plan.to_bytes()).unwrap_err();
        assert!(
            told.contains("next is number 18446744073709551615"),
            "{told}"
        );
        plan.next = 200;
        plan.orders = vec![plan.orders[0].clone(); ORDERS_MAX + 1];
        assert!(Plan::from_bytes(&plan.to_bytes()).is_err());
    }
}
