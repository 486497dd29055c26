//! Stops all VMs of this host, each by its isolation response.
//!
//! Closes the gate first. Says that all is stopped only when no start is under way and no worker
//! is left; whatever does not end is left to the watchdog. It does not ask the registry: the
//! records go on to say that the VMs are meant to run, so that others may start them.

use super::super::Host;
use super::super::worker::{Routes, WorkerEvent};
use super::gate::Gate;
use crate::fence::isolation::{Act, IsolatedVm, Step, plan};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Between two looks whether all are gone.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How the VMs are to end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// The host has lost its membership: every VM by its isolation response.
    Isolated {
        /// Until the watchdog fires.
        left: Duration,
    },
    /// The daemon was told to end: mirrored VMs go on at their standbys, VMs that others restart
    /// are stopped as if isolated, all others are powered off.
    Leaving,
}

/// A VM that is to end.
pub(in crate::daemon) struct Ending {
    pub(in crate::daemon) isolated: IsolatedVm,
    /// Others start it again once this host is gone.
    pub(in crate::daemon) restarts: bool,
}

/// Stop everything; returns when nothing runs. A VM that is to be left running while the host
/// may yet be reset keeps it from returning: then nothing is disarmed, and nothing said.
pub(super) fn stop_all(host: &Host, gate: &Gate, why: &str, manner: Manner) {
    gate.close(format!("all VMs of this host are being stopped: {why}"));
    let begun = Instant::now();
    let routes = host.routes();
    let mut seen = BTreeSet::new();
    let mut steps: Vec<Step> = Vec::new();
    while !(gate.is_idle() && routes.is_empty()) {
        // At the first look all that run; later, what came up through the gate before it closed.
        let new: Vec<Ending> = host
            .endings()
            .into_iter()
            .filter(|ending| seen.insert(ending.isolated.vm))
            .collect();
        for mut step in begin(routes, new, manner) {
            step.after += begun.elapsed();
            steps.push(step);
        }
        steps.retain(|step| {
            let due = begun.elapsed() >= step.after;
            if due {
                let event = WorkerEvent::Isolate {
                    reason: why.to_owned(),
                    gently: step.act == Act::Shutdown,
                };
                let _ = routes.send(step.vm, event);
            }
            !due
        });
        std::thread::sleep(LOOK_EVERY);
    }
}

fn begin(routes: &Routes, endings: Vec<Ending>, manner: Manner) -> Vec<Step> {
    let isolated = |endings: Vec<Ending>| -> Vec<IsolatedVm> {
        endings.into_iter().map(|ending| ending.isolated).collect()
    };
    match manner {
        Manner::Isolated { left } => plan(&isolated(endings), left),
        Manner::Leaving => {
            let (restarted, ended): (Vec<_>, Vec<_>) =
                endings.into_iter().partition(|ending| ending.restarts);
            for vm in isolated(ended) {
                let _ = routes.send(vm.vm, WorkerEvent::DaemonEnds);
            }
            plan(&isolated(restarted), super::LEAVE_DEADLINE)
        }
    }
}
