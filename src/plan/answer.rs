//! Answers in words that an operator understands, and as data for scripts.
//!
//! Must never: speak of dimensions, pieces or bins.

use super::layout::{Dim, HostSet, Layout, members};
use super::model::{Bytes, Priority};
use super::pack::Bound;
use super::tolerance::{Checker, Failure, Outcome};
use serde::Serialize;

/// The answer's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// Every set of failures is survived.
    Survives,
    /// One is not.
    Overcommitted,
    /// Undecided.
    Unknown,
}

/// The answer to question 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// In one word.
    pub answer: Word,
    /// For so many failures.
    pub tolerate: u32,
    /// How many sets of failures there are.
    pub sets: usize,
    /// The set that leaves least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tightest: Option<Tightest>,
    /// A set that is not survived.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failing: Option<Failing>,
    /// What is undecided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undecided: Option<String>,
}

/// The set that leaves least.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tightest {
    /// What fails.
    pub failed: Vec<String>,
    /// Share of all that is free now that is left afterwards, of what is scarcest.
    pub spare_percent: f64,
}

/// A set that is not survived.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Failing {
    /// What fails.
    pub failed: Vec<String>,
    /// How many VMs are to be restarted then.
    pub lost: usize,
    /// Why they do not all fit.
    pub because: String,
    /// Which do not.
    pub left_over: Vec<Down>,
    /// Whether no choice leaves fewer.
    pub fewest: bool,
}

/// A VM that stays down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Down {
    /// Its name.
    pub vm: String,
    /// Its memory, or huge pages.
    pub memory: Bytes,
    /// Whether it may be left down.
    pub priority: Priority,
    /// Where it ran.
    pub host: String,
}

/// The names of what fails: hosts, or domains.
#[must_use]
pub fn names(layout: &Layout, failed: HostSet) -> Vec<String> {
    (layout.units.iter())
        .filter(|unit| unit.hosts & failed != 0)
        .map(|unit| unit.name.clone())
        .collect()
}

/// `a`, `a and b`, `a, b and c`.
#[must_use]
pub fn list(names: &[String]) -> String {
    match names {
        [] => "nothing".into(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// `a fails`, `a and b fail`.
#[must_use]
pub fn fail(names: &[String]) -> String {
    match names {
        [] => "no more hosts fail".into(),
        [one] => format!("{one} fails"),
        more => format!("{} fail", list(more)),
    }
}

/// A VM of a layout as one that stays down.
#[must_use]
pub fn down(layout: &Layout, at: u32) -> Down {
    let vm = &layout.running[at as usize];
    let memory = (layout.dims.iter().zip(vm.need))
        .filter(|(dim, _)| matches!(dim, Dim::Memory | Dim::Hugepages))
        .map(|(_, need)| need)
        .max()
        .unwrap_or(0);
    Down {
        vm: vm.name.clone(),
        memory: Bytes(memory),
        priority: vm.class.0,
        host: layout.hosts[usize::from(vm.host)].to_string(),
    }
}

fn amount(dim: &Dim, n: u64) -> String {
    match dim {
        Dim::Memory => format!("{} of memory", Bytes(n)),
        Dim::Hugepages => format!("{} of huge pages", Bytes(n)),
        Dim::Vcpus => format!("{n} vCPUs"),
        Dim::Device(kind) => format!("{n} devices of kind `{kind}`"),
    }
}

/// Why the lost VMs do not fit.
#[must_use]
pub fn because(layout: &Layout, failure: &Failure) -> String {
    let alive = layout.targets & !layout.dead(failure.failed);
    let who = |hosts: HostSet| {
        if hosts == alive {
            "the hosts that are left".to_owned()
        } else {
            let names: Vec<String> = members(hosts)
                .map(|host| layout.hosts[host].to_string())
                .collect();
            format!("{}, where alone they may run,", list(&names))
        }
    };
    let which = |hosts: HostSet| {
        if hosts == alive {
            "the lost VMs"
        } else {
            "some of the lost VMs"
        }
    };
    let dim = |dim: usize| &layout.dims[dim];
    match &failure.bound {
        Bound::Sum {
            dim: d,
            need,
            have,
            hosts,
        } => format!(
            "{} need {}, and {} have {} free: {} too little",
            which(*hosts),
            amount(dim(*d), *need),
            who(*hosts),
            amount(dim(*d), *have),
            amount(dim(*d), need - have)
        ),
        Bound::Single { .. } => single(layout, failure, alive),
        Bound::Count {
            dim: d,
            least,
            pieces,
            places,
            hosts,
        } => format!(
            "{pieces} of the lost VMs take {} or more each, and {} have room for only {places} of that size: what is free is scattered",
            amount(dim(*d), *least),
            who(*hosts)
        ),
        Bound::Gaps {
            dim: d,
            need,
            usable,
            hosts,
            ..
        } => format!(
            "{} need {}; what is free on {} lies in pieces of which VMs of these sizes can fill {} at most",
            which(*hosts),
            amount(dim(*d), *need),
            who(*hosts),
            amount(dim(*d), *usable)
        ),
        Bound::Steps {
            dim: d,
            step,
            strict,
            need,
            have,
            hosts,
        } => {
            let step = amount(dim(*d), *step);
            let counted = if *strict {
                format!("begun steps of {step}, without the last,")
            } else {
                format!("whole steps of {step}")
            };
            format!(
                "counted in {counted} {} need {need} and {} have {have}: what is free is scattered",
                which(*hosts),
                who(*hosts)
            )
        }
        Bound::Search { steps } => format!(
            "enough is free in all, but scattered so that they do not fit: there is no placement ({steps} steps of the search ruled out all)"
        ),
    }
}

fn single(layout: &Layout, failure: &Failure, alive: HostSet) -> String {
    let Some(vm) = failure.single.map(|at| &layout.running[at as usize]) else {
        return "one of the lost VMs fits on no host that is left".into();
    };
    let open = alive & vm.allowed;
    if open == 0 {
        return format!(
            "`{}` may run on none of the hosts that are left: its disks, networks or group bind it to others",
            vm.name
        );
    }
    for (k, dim) in layout.dims.iter().enumerate() {
        let most = members(open)
            .map(|host| layout.free[host][k])
            .max()
            .unwrap_or(0);
        if vm.need[k] > most {
            return format!(
                "`{}` needs {}, and no host that is left {}has more than {} free",
                vm.name,
                amount(dim, vm.need[k]),
                if open == alive {
                    ""
                } else {
                    "and that it may run on "
                },
                amount(dim, most)
            );
        }
    }
    if vm.together.is_some() {
        return format!(
            "`{}` and the VMs it belongs together with do not fit on any one host that is left",
            vm.name
        );
    }
    format!(
        "`{}` fits on none of the hosts that are left, or the VMs it has to be apart from run there",
        vm.name
    )
}

/// A set that is not survived, in words.
#[must_use]
pub fn failing(layout: &Layout, failure: &Failure) -> Failing {
    Failing {
        failed: names(layout, failure.failed),
        lost: failure.chosen.placed.len() + failure.chosen.left_over.len(),
        because: because(layout, failure),
        left_over: (failure.chosen.left_over.iter())
            .map(|at| down(layout, *at))
            .collect(),
        fewest: failure.chosen.exact,
    }
}

impl Answer {
    /// What a checker found.
    #[must_use]
    pub fn of(checker: &Checker) -> Self {
        let layout = checker.layout();
        let mut answer = Self {
            answer: Word::Survives,
            tolerate: checker.failures(),
            sets: checker.sets().len(),
            tightest: checker.tightest().map(|(failed, spare)| Tightest {
                failed: names(layout, failed),
                spare_percent: (spare * 1_000.0).round() / 10.0,
            }),
            failing: None,
            undecided: None,
        };
        match checker.outcome() {
            Outcome::Survives => {}
            Outcome::Overcommitted(failure) => {
                answer.answer = Word::Overcommitted;
                answer.failing = Some(failing(layout, failure));
            }
            Outcome::Unknown { failed, sets } => {
                answer.answer = Word::Unknown;
                answer.undecided = Some(match failed {
                    Some(failed) => format!(
                        "the failure of {} could not be decided within the budget, nor {} more",
                        list(&names(layout, *failed)),
                        sets.saturating_sub(1)
                    ),
                    None => format!(
                        "there are {sets} sets of {} failures, more than are gone through",
                        checker.failures()
                    ),
                });
            }
        }
        answer
    }

    /// The answer in one or two sentences.
    #[must_use]
    pub fn sentence(&self) -> String {
        match (&self.failing, &self.undecided) {
            (Some(failing), _) => format!(
                "if {}, {} of the {} VMs that are lost {} down: {}",
                fail(&failing.failed),
                failing.left_over.len(),
                failing.lost,
                if failing.left_over.len() == 1 {
                    "stays"
                } else {
                    "stay"
                },
                failing.because
            ),
            (None, Some(undecided)) => undecided.clone(),
            (None, None) => format!("all {} sets of failures are survived", self.sets),
        }
    }
}
