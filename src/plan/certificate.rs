//! The proof of `survives`, as data: for every set of failures where each lost VM restarts.
//!
//! It names hosts and VMs, not numbers of the solver, so that [`super::verify`] can check it
//! against the pool alone.

use super::layout::{Scope, members};
use super::model::Fails;
use super::tolerance::{Checker, Outcome};
use crate::pool::HostName;
use serde::{Deserialize, Serialize};

/// The proof.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// For so many failures.
    pub tolerate: u32,
    /// Of this.
    pub fails: Fails,
    /// Whether VMs of priority `best-effort` are restarted as well.
    pub best_effort: bool,
    /// Hosts, in the order in which `sets` counts them.
    pub hosts: Vec<HostName>,
    /// VMs, in the order in which `sets` counts them.
    pub vms: Vec<String>,
    /// One entry per set of failures.
    pub sets: Vec<SetProof>,
}

/// One set of failures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetProof {
    /// Hosts that fail.
    pub failed: Vec<u8>,
    /// (VM, host): where each lost VM restarts.
    pub restarts: Vec<(u16, u8)>,
}

const _: () = assert!(super::model::VMS_MAX <= u16::MAX as usize);

impl Certificate {
    /// The proof that a checker holds; none unless its answer is `survives`.
    #[must_use]
    pub fn of(checker: &Checker, fails: Fails) -> Option<Self> {
        if *checker.outcome() != Outcome::Survives {
            return None;
        }
        let layout = checker.layout();
        let sets = (checker.sets().iter().enumerate())
            .map(|(set, failed)| SetProof {
                failed: members(*failed)
                    .filter_map(|host| u8::try_from(host).ok())
                    .collect(),
                restarts: (checker.pairs(set).into_iter())
                    .filter_map(|(at, host)| Some((u16::try_from(at).ok()?, host)))
                    .collect(),
            })
            .collect();
        Some(Self {
            tolerate: checker.failures(),
            fails,
            best_effort: checker.scope() == Scope::All,
            hosts: layout.hosts.clone(),
            vms: layout.running.iter().map(|vm| vm.name.clone()).collect(),
            sets,
        })
    }
}
