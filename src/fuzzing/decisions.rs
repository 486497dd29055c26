//! What hosts report, what the pool has decided, and where VMs are to run again.

use crate::ha::machine::{Action, Config, Input, Local, Machine};
use crate::ha::report::{Path, REPORT_BYTES_MAX, Report};
use crate::ha::restart::{Candidate, ORDERS_MAX, Plan, Target, place};
use crate::ha::state::{
    CAUSE_BYTES_MAX, DECISIONS_MAX, Member, PoolState, STATE_BYTES_MAX, Standing,
};
use crate::ha::time::Millis;
use crate::ha::timing::Timing;
use crate::pool::spec::RestartPriority;
use crate::pool::{HostId, HostName, Incarnation, POOL_HOSTS_MAX, VmId};
use crate::registry::Versioned;
use std::collections::BTreeMap;

/// Periods that a machine listens before a report comes, and after.
const TICKS: u64 = 12;

pub(super) fn name(n: u8) -> HostName {
    HostName::new(format!("h{n}")).expect("a name")
}

/// A report, and what a member of the pool makes of it.
pub(super) fn report(data: &[u8]) {
    let Ok(report) = Report::decode(data) else {
        return;
    };
    let again = report.encode();
    assert!(again.len() <= REPORT_BYTES_MAX);
    assert_eq!(Report::decode(&again).as_ref(), Ok(&report));
    // The same bytes, but hosts and paths are in order now.
    let counted = |bytes: &[u8]| {
        bytes.iter().fold(BTreeMap::new(), |mut counts, byte| {
            *counts.entry(*byte).or_insert(0) += 1;
            counts
        })
    };
    assert_eq!(counted(&again), counted(data));
    listen(&report);
}

/// A member hears it, over and over, and judges and reports by it.
fn listen(report: &Report) {
    let timing = Timing::DEFAULT;
    let config = Config {
        me: HostId(0),
        name: name(0),
        incarnation: Incarnation(1),
        timing,
        watchdog: Some(timing.watchdog),
        power_fencing: true,
        promised: None,
    };
    let members = (0..3).map(|n| {
        let member = Member {
            name: name(n),
            incarnation: if HostId(n) == report.host {
                report.incarnation
            } else {
                Incarnation(1)
            },
            standing: Standing::In,
            former: None,
            watchdog: Some(timing.watchdog),
            unbound: None,
        };
        (HostId(n), member)
    });
    let mut state = Versioned {
        version: 1,
        value: PoolState {
            members: members.collect(),
            ..PoolState::default()
        },
    };
    state.value.admit(|_, _| true);
    let mut machine = Machine::new(config, Millis(0));
    for tick in 1..=2 * TICKS {
        let now = Millis(tick * timing.period.0);
        let mut inputs = vec![Input::Local(Local::default())];
        if tick > TICKS / 2 {
            let path = Path::Network(0);
            let report = report.clone();
            inputs.push(Input::Heard { path, report });
        }
        inputs.push(Input::Tick);
        while let Some(input) = inputs.pop() {
            for action in machine.handle(now, input) {
                match action {
                    Action::Publish(report) => {
                        let bytes = report.encode();
                        assert!(bytes.len() <= REPORT_BYTES_MAX);
                        assert!(Report::decode(&bytes).is_ok(), "{report:?}");
                    }
                    Action::Read => inputs.push(Input::Read(Ok(Some(state.clone())))),
                    Action::Write {
                        expected,
                        state: next,
                    } => {
                        assert_eq!(expected, Some(state.version));
                        let bytes = next.to_bytes();
                        assert!(PoolState::from_bytes(&bytes).is_ok());
                        let version = state.version + 1;
                        state = Versioned {
                            version,
                            value: next,
                        };
                        let outcome = crate::ha::machine::WriteOutcome::Won { version };
                        inputs.push(Input::Written(outcome));
                    }
                    Action::Fence { host, incarnation } => inputs.push(Input::Fenced {
                        host,
                        incarnation,
                        confirmed: true,
                    }),
                    Action::StopVms { .. } => inputs.push(Input::Stopped),
                    Action::Over => return,
                    Action::Remember(_) => inputs.push(Input::Remembered(true)),
                    Action::Forget
                    | Action::PetUntil(_)
                    | Action::MayRestart { .. }
                    | Action::Alert(_) => {}
                }
            }
        }
    }
}

/// The pool state: read, changed by one more decision, written.
pub(super) fn state(data: &[u8]) {
    let Ok(mut state) = PoolState::from_bytes(data) else {
        return;
    };
    assert_eq!(
        PoolState::from_bytes(&state.to_bytes()).ok().as_ref(),
        Some(&state)
    );
    for n in 0..u8::try_from(POOL_HOSTS_MAX).unwrap_or(u8::MAX) {
        let host = HostId(n);
        assert!(!state.name(host).is_empty());
        state.become_standing(host, Standing::Ousted);
    }
    state.decide(HostId(0), HostId(1), "ousted", &"ä".repeat(CAUSE_BYTES_MAX));
    assert!((1..=DECISIONS_MAX).contains(&state.decisions.len()));
    let bytes = state.to_bytes();
    if bytes.len() <= STATE_BYTES_MAX {
        assert_eq!(PoolState::from_bytes(&bytes).ok(), Some(state));
    }
}

/// The plan of restarts: read, with one more VM placed and what is done forgotten, written.
pub(super) fn plan(data: &[u8]) {
    let Ok(mut plan) = Plan::from_bytes(data) else {
        return;
    };
    assert_eq!(Plan::from_bytes(&plan.to_bytes()).as_ref(), Ok(&plan));
    assert!(plan.orders.len() <= ORDERS_MAX);
    let vm = Candidate {
        vm: VmId(*b"the fuzzed guest"),
        name: "v".into(),
        memory: 1 << 30,
        priority: RestartPriority::Always,
        order: u32::MAX,
        delay_s: u32::MAX,
        version: u64::MAX,
    };
    let target = Target {
        host: name(1),
        memory: u64::MAX,
        used: 1,
    };
    let before = plan.orders.len();
    let known = plan.has(vm.vm, vm.version);
    if place(&mut plan, &name(0), "x", vec![vm.clone()], &[target]) {
        assert!(plan.orders.len() == before + 1 && plan.has(vm.vm, vm.version));
        assert_eq!(Plan::from_bytes(&plan.to_bytes()).as_ref(), Ok(&plan));
    } else {
        assert!(before == ORDERS_MAX && plan.has(vm.vm, vm.version) == known);
    }
    plan.forget_open(|order| order.number % 2 == 0, |to| *to == name(1));
    plan.forget(|order| order.number % 2 == 0);
    assert!(plan.orders.len() <= before + 1);
    assert_eq!(Plan::from_bytes(&plan.to_bytes()), Ok(plan));
}
