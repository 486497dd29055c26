//! VMs of hosts that are proved dead run again elsewhere; a host that came back runs its own again.
//!
//! ```text
//!  coordinator: "its VMs may restart" --> records, specs --> pool state, read after them
//!                                              '--> plan (compare-and-set) --> registry
//!  every member: plan --> orders for me --> claim of the record at the ordered version --> start
//!                records of mine that do not run here --> claim --> start
//! ```
//!
//! # Why nothing runs twice
//! A record at version v was read before a read of the pool state began that showed its owner
//! dead in its newest life. A later life of the owner writes records only after it has joined,
//! and it had not; so v was written in a life that is proved to run nothing. The order names v,
//! and whoever carries it out writes the record at v or not at all: the same holds of the owner
//! itself once it is back, and of two orders for one VM.
//!
//! Must never: start a VM by an order without that compare-and-set, or read the record after the
//! pool state.

use super::Gate;
use super::showing::Shown;
use crate::api::pool::RestartView;
use crate::daemon::Host;
use crate::daemon::claims::Claims;
use crate::ha::restart::{Candidate, Order, PLAN_KEY, Plan, Target, place};
use crate::ha::state::{PoolState, Proof, STATE_KEY, Standing};
use crate::mirror::VmRecord;
use crate::pool::spec::{Protection, VmSpec};
use crate::pool::{HostId, HostName, VmId};
use crate::registry::{CasOutcome, Registry, Versioned};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Between two looks at the plan.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Looks between two looks for own VMs that should run.
const OWN_EVERY: u32 = 5;
/// First and longest wait before a VM that did not start is tried again.
const RETRY_MIN: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// The way to the thread; it ends when this is dropped.
pub(super) struct Restarts(Sender<()>);

/// What the thread needs.
pub(super) struct Setup {
    pub(super) me: HostName,
    pub(super) id: HostId,
    pub(super) claims: Claims,
    pub(super) gate: Gate,
    pub(super) vms: Weak<Host>,
    pub(super) shown: Arc<Shown>,
}

/// What a host tells of itself for the placing of VMs. JSON under `host/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HostFacts {
    name: HostName,
    /// Bytes of memory for VMs.
    memory: u64,
}

/// Where the specs of VMs that may be restarted are, by uuid; empty: the VM was deleted.
pub(in crate::daemon) fn spec_key(vm: VmId) -> String {
    format!("spec/{vm}")
}

fn facts_key(host: HostId) -> String {
    format!("host/{}", host.0)
}

impl Restarts {
    /// Start the thread.
    ///
    /// # Errors
    /// If there is none to be had.
    pub(super) fn start(setup: Setup) -> std::io::Result<Self> {
        let (tell, told) = channel();
        std::thread::Builder::new()
            .name("pool-restarts".into())
            .spawn(move || Runner::new(setup).run(&told))?;
        Ok(Self(tell))
    }

    /// The VMs of some host may be restarted elsewhere: look now.
    pub(super) fn may_restart(&self) {
        let _ = self.0.send(());
    }
}

struct Runner {
    setup: Setup,
    /// VMs of some host may be restarted, and are not all ordered yet.
    told: bool,
    /// When each order was first seen here.
    seen: BTreeMap<u64, Instant>,
    /// VMs that did not start: when they are tried again, and the wait after that.
    retry: BTreeMap<VmId, (Instant, Duration)>,
    facts_told: bool,
    looks: u32,
}

/// All that a plan rests on, read in this order.
struct Found {
    plan: Option<Versioned<Plan>>,
    records: BTreeMap<VmId, Versioned<VmRecord>>,
    specs: BTreeMap<VmId, VmSpec>,
    facts: BTreeMap<HostName, HostFacts>,
    state: PoolState,
}

impl Runner {
    fn new(setup: Setup) -> Self {
        Self {
            setup,
            told: false,
            seen: BTreeMap::new(),
            retry: BTreeMap::new(),
            facts_told: false,
            looks: 0,
        }
    }

    fn run(mut self, told: &Receiver<()>) {
        loop {
            match told.recv_timeout(LOOK_EVERY) {
                Ok(()) => {
                    self.told = true;
                    while told.try_recv().is_ok() {}
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // One that is no member starts nothing and decides nothing.
            if self.setup.gate.permit().is_ok()
                && let Err(reason) = self.look()
            {
                tracing::debug!("restarts: {reason}");
            }
        }
    }

    /// With the registry, on its thread.
    fn registry<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn Registry) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (tell, told) = sync_channel(1);
        self.setup.claims.work(move |registry| {
            let _ = tell.send(registry.and_then(work));
        });
        told.recv()
            .map_err(|_| "the registry thread has ended".to_owned())?
    }

    fn look(&mut self) -> Result<(), String> {
        if !self.facts_told {
            self.tell_facts()?;
        }
        if std::mem::take(&mut self.told) || self.looks.is_multiple_of(OWN_EVERY) {
            // Until it is done it is to be done again.
            self.told = true;
            self.order()?;
            self.told = false;
        }
        let plan = self
            .registry(read_plan)?
            .map(|plan| plan.value)
            .unwrap_or_default();
        self.carry_out(&plan);
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(OWN_EVERY) {
            self.start_own()?;
        }
        self.show(&plan);
        Ok(())
    }

    fn tell_facts(&mut self) -> Result<(), String> {
        let facts = HostFacts {
            name: self.setup.me.clone(),
            memory: memory_for_vms(),
        };
        let bytes = serde_json::to_vec(&facts).map_err(|e| e.to_string())?;
        let key = facts_key(self.setup.id);
        self.registry(move |registry| put(registry, &key, &bytes))?;
        self.facts_told = true;
        Ok(())
    }

    /// Order the VMs of dead hosts to be started, if this host coordinates: those that are not
    /// ordered yet, and those whose order went to a host that is no member any more or nowhere.
    fn order(&mut self) -> Result<(), String> {
        let found = self.registry(find)?;
        let leads = found.state.coordinator.map(|coordinator| coordinator.host);
        if leads != Some(self.setup.id) {
            return Ok(());
        }
        let plan = planned(&found);
        let before = found.plan.as_ref().map(|plan| &plan.value);
        if before != Some(&plan) && !(before.is_none() && plan.orders.is_empty()) {
            for order in plan.orders.iter().filter(|order| order.to.is_none()) {
                let told = |known: &Order| known.vm == order.vm && known.to.is_none();
                if before.is_none_or(|before| !before.orders.iter().any(told)) {
                    let text = format!("VM `{}` stays down: {}", order.name, order.cause);
                    tracing::error!("{text}");
                    self.setup.shown.alert(text);
                }
            }
            let bytes = plan.to_bytes();
            let expected = found.plan.map(|plan| plan.version);
            let won = self.registry(move |registry| {
                registry
                    .compare_and_set(PLAN_KEY, expected, &bytes)
                    .map_err(|e| e.to_string())
            })?;
            if !matches!(won, CasOutcome::Won { .. }) {
                return Err("another was faster; tried again".into());
            }
        }
        Ok(())
    }

    /// Start what this host is ordered to.
    fn carry_out(&mut self, plan: &Plan) {
        let now = Instant::now();
        self.seen
            .retain(|number, _| plan.orders.iter().any(|order| order.number == *number));
        for order in &plan.orders {
            let seen = *self.seen.entry(order.number).or_insert(now);
            let waits = Duration::from_secs(order.after_s.into());
            let mine = order.to.as_ref() == Some(&self.setup.me);
            if !mine || now.duration_since(seen) < waits {
                continue;
            }
            let Some(vm) = vm_of(&order.vm) else {
                continue;
            };
            self.try_start(vm, Some(order.version), &order.cause);
        }
    }

    /// Start what this host ran in an earlier life, or what ended here without its owner's word.
    fn start_own(&mut self) -> Result<(), String> {
        let records = self.registry(|registry| records(registry))?;
        for (vm, record) in records {
            if record.value.running && record.value.owner == self.setup.me {
                let cause = "it is this host's, is meant to run and does not";
                self.try_start(vm, Some(record.version), cause);
            }
        }
        Ok(())
    }

    fn try_start(&mut self, vm: VmId, version: Option<u64>, cause: &str) {
        let Some(host) = self.setup.vms.upgrade() else {
            return;
        };
        if host.has_worker(vm) {
            self.retry.remove(&vm);
            return;
        }
        if let Some((at, _)) = self.retry.get(&vm)
            && Instant::now() < *at
        {
            return;
        }
        let started = self
            .registry(move |registry| start_facts(registry, vm))
            .and_then(|(record, spec)| {
                let (Some(record), Some(spec)) = (record, spec) else {
                    return Ok(false);
                };
                if version.is_some_and(|version| version != record.version)
                    || !record.value.running
                    || spec.protection != Protection::Restart
                {
                    return Ok(false);
                }
                tracing::warn!(vm = %spec.name, "starting it here: {cause}");
                host.vm_restart(spec, record, cause).map(|()| true)
            });
        match started {
            Ok(true) => {
                self.retry.remove(&vm);
            }
            // Somebody else has it, or it is not meant to run.
            Ok(false) => {}
            Err(reason) => {
                let wait = self
                    .retry
                    .get(&vm)
                    .map_or(RETRY_MIN, |(_, wait)| (*wait * 2).min(RETRY_MAX));
                self.retry.insert(vm, (Instant::now() + wait, wait));
                let text =
                    format!("VM {vm} was not started here: {reason}; tried again in {wait:?}");
                tracing::error!("{text}");
                self.setup.shown.alert(text);
            }
        }
    }

    fn show(&self, plan: &Plan) {
        let view = |order: &Order| {
            let here = order.to.as_ref() == Some(&self.setup.me);
            let runs = here
                && vm_of(&order.vm).is_some_and(|vm| {
                    let host = self.setup.vms.upgrade();
                    host.is_some_and(|host| host.has_worker(vm))
                });
            RestartView {
                vm: order.name.clone(),
                uuid: order.vm.clone(),
                from: order.from.to_string(),
                to: order.to.as_ref().map(ToString::to_string),
                state: match order.to {
                    None => "left",
                    Some(_) if runs => "runs",
                    Some(_) => "ordered",
                }
                .into(),
                cause: order.cause.clone(),
            }
        };
        self.setup
            .shown
            .restarts(plan.orders.iter().map(view).collect());
    }
}

fn vm_of(uuid: &str) -> Option<VmId> {
    let uuid = uuid::Uuid::parse_str(uuid).ok()?;
    Some(VmId(uuid.into_bytes()))
}

/// The plan that follows from what was found: the same as before, if nothing new does.
fn planned(found: &Found) -> Plan {
    let before = found.plan.as_ref().map(|plan| &plan.value);
    let before = before.cloned().unwrap_or_default();
    let mut plan = before.clone();
    let targets = targets(found);
    // Two orders for one version of a record: one of them starts the VM.
    plan.forget_open(
        |order| is_void(order, &found.records),
        |to| targets.iter().any(|target| target.host == *to),
    );
    plan.forget(|order| is_void(order, &found.records));
    for member in found.state.members.values() {
        let proof = match member.standing {
            Standing::Dead(proof) => proof,
            Standing::Away => Proof::Farewell,
            Standing::In | Standing::Ousted => continue,
        };
        let vms = candidates(found, &member.name, &plan);
        place(&mut plan, &member.name, &proof.to_string(), vms, &targets);
    }
    plan.settle(&before);
    plan
}

/// Whether the VM's record has moved on since.
fn is_void(order: &Order, records: &BTreeMap<VmId, Versioned<VmRecord>>) -> bool {
    let record = vm_of(&order.vm).and_then(|vm| records.get(&vm));
    record.is_none_or(|record| record.version != order.version)
}

/// VMs of the dead `host` that are to run, and are not ordered to already.
fn candidates(found: &Found, host: &HostName, plan: &Plan) -> Vec<Candidate> {
    let of_host = found
        .records
        .iter()
        .filter(|(_, record)| record.value.owner == *host && record.value.running);
    of_host
        .filter_map(|(vm, record)| {
            let spec = found.specs.get(vm)?;
            (spec.protection == Protection::Restart && !plan.has(*vm, record.version)).then(|| {
                Candidate {
                    vm: *vm,
                    name: spec.name.to_string(),
                    memory: spec.memory.get(),
                    priority: spec.restart.priority,
                    order: spec.restart.order,
                    delay_s: spec.restart.delay_s,
                    version: record.version,
                }
            })
        })
        .collect()
}

/// Members that have told how much memory they have, and what of it is taken.
fn targets(found: &Found) -> Vec<Target> {
    let members = found.state.members_in();
    members
        .filter_map(|(_, member)| {
            let facts = found.facts.get(&member.name)?;
            let on_it = found.records.iter().filter(|(_, record)| {
                let record = &record.value;
                record.running
                    && (record.owner == member.name
                        || record.standby.as_ref() == Some(&member.name))
            });
            let used = on_it
                .filter_map(|(vm, _)| found.specs.get(vm))
                .map(|spec| spec.memory.get());
            Some(Target {
                host: member.name.clone(),
                memory: facts.memory,
                used: used.sum(),
            })
        })
        .collect()
}

/// The record first, the state last: see the module.
fn find(registry: &mut dyn Registry) -> Result<Found, String> {
    let plan = read_plan(registry)?;
    let records = records(registry)?;
    let listed = registry.list("spec/").map_err(|e| e.to_string())?;
    let specs = listed
        .into_iter()
        .filter_map(|(_, value)| spec_of(&value.value))
        .map(|spec| (spec.uuid, spec))
        .collect();
    let listed = registry.list("host/").map_err(|e| e.to_string())?;
    let facts = listed
        .into_iter()
        .filter_map(|(_, value)| serde_json::from_slice::<HostFacts>(&value.value).ok())
        .map(|facts| (facts.name.clone(), facts))
        .collect();
    let state = registry
        .read(STATE_KEY)
        .map_err(|e| e.to_string())?
        .ok_or("the pool has no state")?;
    let state = PoolState::from_bytes(&state.value).map_err(|e| e.to_string())?;
    Ok(Found {
        plan,
        records,
        specs,
        facts,
        state,
    })
}

fn read_plan(registry: &mut dyn Registry) -> Result<Option<Versioned<Plan>>, String> {
    let found = registry.read(PLAN_KEY).map_err(|e| e.to_string())?;
    found
        .map(|Versioned { version, value }| {
            Plan::from_bytes(&value).map(|value| Versioned { version, value })
        })
        .transpose()
}

fn records(registry: &mut dyn Registry) -> Result<BTreeMap<VmId, Versioned<VmRecord>>, String> {
    let listed = registry.list("vm/").map_err(|e| e.to_string())?;
    Ok(listed
        .into_iter()
        .filter_map(|(key, Versioned { version, value })| {
            let vm = vm_of(key.strip_prefix("vm/")?)?;
            match VmRecord::from_bytes(&value) {
                Ok(value) => Some((vm, Versioned { version, value })),
                Err(e) => {
                    tracing::error!(%vm, "{e}; it is left alone");
                    None
                }
            }
        })
        .collect())
}

fn spec_of(value: &[u8]) -> Option<VmSpec> {
    let text = std::str::from_utf8(value)
        .ok()
        .filter(|text| !text.is_empty())?;
    match VmSpec::parse(text, "the registry") {
        Ok(spec) => Some(spec),
        Err(e) => {
            tracing::error!("a VM's spec in the registry is left alone: {e}");
            None
        }
    }
}

type StartFacts = (Option<Versioned<VmRecord>>, Option<VmSpec>);

fn start_facts(registry: &mut dyn Registry, vm: VmId) -> Result<StartFacts, String> {
    let record = registry
        .read(&crate::mirror::record_key(vm))
        .map_err(|e| e.to_string())?
        .map(|Versioned { version, value }| {
            VmRecord::from_bytes(&value)
                .map(|value| Versioned { version, value })
                .map_err(|e| e.to_string())
        })
        .transpose()?;
    let spec = registry.read(&spec_key(vm)).map_err(|e| e.to_string())?;
    Ok((record, spec.and_then(|spec| spec_of(&spec.value))))
}

/// Write a value that only this host writes, if it is not there already.
///
/// # Errors
/// Why it is not.
pub(in crate::daemon) fn put(
    registry: &mut dyn Registry,
    key: &str,
    value: &[u8],
) -> Result<(), String> {
    let found = registry.read(key).map_err(|e| e.to_string())?;
    if found.as_ref().is_some_and(|found| found.value == value) {
        return Ok(());
    }
    match registry.compare_and_set(key, found.map(|found| found.version), value) {
        Ok(CasOutcome::Won { .. }) => Ok(()),
        Ok(CasOutcome::Lost(_)) => Err(format!("{key} was changed at the same moment; try again")),
        Err(e) => Err(e.to_string()),
    }
}

/// Memory of this host that VMs may have: all but an eighth, at most 4 GiB, for the host itself.
fn memory_for_vms() -> u64 {
    const HOST_MAX: u64 = 4 << 30;
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .unwrap_or(0);
    let all = kib << 10;
    all - (all / 8).min(HOST_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::state::Member;
    use crate::pool::{Generation, Incarnation};

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    /// Host `a` is dead and ran one VM of 4 GiB; `b` has `gib` for it.
    fn found(plan: Option<Plan>, gib: u64) -> Found {
        let spec = "name = \"v\"\nuuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"\nmemory = \"4 GiB\"\nvcpus = 1\nkernel = \"/k\"\nprotection = \"restart\"\n[[disk]]\nname = \"root\"\npath = \"/shared/v.raw\"\nsize = \"1 GiB\"\nkind = \"shared\"\n";
        let spec = VmSpec::parse(spec, "test").unwrap();
        let record = VmRecord {
            generation: Generation(1),
            owner: host("a"),
            standby: None,
            running: true,
        };
        let member = |name: &str, standing| Member {
            name: host(name),
            incarnation: Incarnation(1),
            standing,
            former: None,
            watchdog: None,
            unbound: None,
        };
        let facts = HostFacts {
            name: host("b"),
            memory: gib << 30,
        };
        Found {
            plan: plan.map(|value| Versioned { version: 1, value }),
            records: [(
                spec.uuid,
                Versioned {
                    version: 3,
                    value: record,
                },
            )]
            .into(),
            specs: [(spec.uuid, spec)].into(),
            facts: [(host("b"), facts)].into(),
            state: PoolState {
                members: [
                    (HostId(0), member("a", Standing::Dead(Proof::PowerOff))),
                    (HostId(1), member("b", Standing::In)),
                ]
                .into(),
                ..PoolState::default()
            },
        }
    }

    #[test]
    fn a_vm_that_fits_nowhere_changes_the_plan_once_and_again_when_it_fits() {
        let left = planned(&found(None, 2));
        assert_eq!((left.orders.len(), left.orders[0].to.as_ref()), (1, None));
        assert_eq!(planned(&found(Some(left.clone()), 2)), left, "nothing new");
        let placed = planned(&found(Some(left.clone()), 8));
        assert_eq!(placed.orders[0].to, Some(host("b")));
        assert!(placed.orders[0].number > left.orders[0].number);
        assert_eq!(planned(&found(Some(placed.clone()), 8)), placed);
    }
}
