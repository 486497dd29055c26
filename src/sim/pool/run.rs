//! One case, for one seed or for many.

use super::judge::{Seen, Times, judge};
use super::world::{Item, World};
use super::{FORMING_MS, LIVENESS_MS, Violation};
use crate::ha::state::Standing;
use crate::sim::scenario::{Case, Expect};
use serde::Serialize;

/// What was begun against a host ends within this: a watchdog, a fence agent, a turn or two.
const ENDS_MS: u64 = 30_000;

/// What one run did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Events handled.
    pub events: u64,
    /// Hosts of the pool.
    pub hosts: usize,
    /// Virtual time, milliseconds.
    pub virtual_ms: u64,
    /// What came of the expectations.
    pub seen: Seen,
    /// What happened, line by line, if asked for.
    pub trace: Vec<String>,
}

/// Run one case with one seed.
///
/// # Errors
/// The first [`Violation`], and what had happened until then.
pub fn run_case(case: &Case, seed: u64, trace: bool) -> Result<Report, (Violation, Vec<String>)> {
    let mut world = World::new(case, seed);
    world.tracing = trace;
    if !world.run_until(FORMING_MS, World::all_members) {
        world.violate(
            "forming",
            format!("no pool of all hosts after {FORMING_MS} ms"),
        );
    }
    // Long enough to judge others.
    let settled = world.now + 5_000;
    world.run_until(settled, |_| false);
    let (first, last) = happen(&mut world, case);
    if case.random.is_some() {
        liveness(&mut world, last);
    }
    if world.violation.is_none() {
        ends(&mut world);
    }
    if let Some(violation) = world.violation {
        return Err((violation, world.log.trace));
    }
    Ok(Report {
        events: world.events,
        hosts: world.hosts.len(),
        virtual_ms: world.now,
        seen: judge(&world, case, first, last),
        trace: world.log.trace,
    })
}

/// Let the events happen; when the first and the last did.
fn happen(world: &mut World, case: &Case) -> (u64, u64) {
    let base = world.now;
    world.formed_at = base;
    world.settle_roles();
    // A stall is about every host.
    for host in &mut world.hosts {
        host.touched = false;
    }
    world.single_fault = case.events.len() == 1 && case.random.is_none() && world.hosts.len() > 1;
    world.faults = case.events.iter().map(|(_, event, _)| *event).collect();
    for (index, (at, ..)) in case.events.iter().enumerate() {
        world.push(base + at.0, Item::Fault(index));
    }
    let first = case.events.first().map_or(base, |(at, ..)| base + at.0);
    let mut last = case.events.last().map_or(base, |(at, ..)| base + at.0);
    world.run_until(last, |_| false);
    if let Some(random) = case.random {
        world.random_faults(random);
        last = last.max(world.now);
    }
    // All have to be members at the end of the time that they were given.
    let all = case.expect.iter().find_map(|(expect, _)| match expect {
        Expect::AllMembers(limit) => Some(limit.0),
        _ => None,
    });
    world.run_until(last + all.unwrap_or(case.run.0), |_| false);
    (first, last)
}

/// All faults are over: everybody has to be a member again, and to stay so.
fn liveness(world: &mut World, last: u64) {
    let end = last.max(world.now) + LIVENESS_MS;
    while !world.all_members() && world.violation.is_none() && world.now < end {
        world.power_all();
        let step = world.now + 1_000;
        world.run_until(step, World::all_members);
    }
    if !world.all_members() {
        let not: Vec<String> = (0..world.hosts.len())
            .filter(|n| !world.hosts[*n].is_member())
            .map(|n| {
                let phase = world.hosts[n].machine.as_ref().map(|m| m.phase().clone());
                format!("{}: {phase:?}", super::host::name(n))
            })
            .collect();
        world.violate(
            "ends",
            format!(
                "{LIVENESS_MS} ms after all faults {} are no members",
                not.join(", ")
            ),
        );
    }
    let calm = world.now + 15_000;
    world.run_until(calm, |_| false);
    if !world.all_members() {
        world.violate(
            "ends",
            "a member was lost after all faults were over".into(),
        );
    }
}

/// Whoever was given up is proved dead, if anything can prove it.
fn ends(world: &mut World) {
    let reached = world
        .hosts
        .iter()
        .any(|host| host.is_member() && (host.etcd && host.disks.iter().all(|works| *works)));
    let Some(state) = world.state() else {
        return;
    };
    let open: Vec<String> = state
        .members
        .values()
        .filter(|member| {
            member.standing == Standing::Ousted && world.has_proofs(member.unbound.is_some())
        })
        .map(|member| member.name.to_string())
        .collect();
    let newest = world
        .log
        .given_up
        .iter()
        .map(|(at, ..)| *at)
        .max()
        .unwrap_or(0);
    if reached && !open.is_empty() && world.now > newest + ENDS_MS {
        let what = format!("{} were given up, and nothing came of it", open.join(", "));
        world.violate("ends", what);
    }
}

/// What many seeds of one case did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// The case.
    pub case: String,
    /// Runs.
    pub seeds: u64,
    /// Virtual hours of hosts.
    pub host_hours: f64,
    /// Events handled.
    pub events: u64,
    /// Runs in which an expectation was not met, the first few with their seeds.
    pub unmet: Vec<(u64, String)>,
    /// The first violation.
    pub violation: Option<String>,
    /// The seed that replays the first failure.
    pub failed_seed: Option<u64>,
    /// Times until a host was given up: median and longest.
    pub decided_ms: Option<(u64, u64)>,
    /// Times until VMs might be restarted: median and longest.
    pub may_restart_ms: Option<(u64, u64)>,
    /// Watchdogs that fired, in all runs.
    pub resets: u64,
    /// What XenServer's daemon was measured to do.
    pub xenserver: Option<String>,
}

impl Summary {
    /// Whether all went as expected.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.violation.is_none() && self.unmet.is_empty()
    }
}

/// Failures that are told one by one.
const UNMET_MAX: usize = 5;

fn middle_and_most(mut times: Vec<u64>) -> Option<(u64, u64)> {
    times.sort_unstable();
    let most = *times.last()?;
    Some((times[times.len() / 2], most))
}

/// Run a case with `seeds` seeds from `first` on; `progress` hears of each.
pub fn run_seeds(case: &Case, first: u64, seeds: u64, mut progress: impl FnMut(u64)) -> Summary {
    let all = (first..first.saturating_add(seeds)).map(|seed| {
        progress(seed - first);
        let outcome = run_case(case, seed, false);
        (seed, outcome.map_err(|(violation, _)| violation))
    });
    Summary::of(case, all)
}

impl Summary {
    /// Of these runs, in the order of their seeds; no more are looked at after a violation.
    pub fn of(
        case: &Case,
        runs: impl IntoIterator<Item = (u64, Result<Report, Violation>)>,
    ) -> Self {
        let mut summary = Self {
            case: case.name.clone(),
            xenserver: case.xenserver.clone(),
            ..Self::default()
        };
        let mut all: Vec<Times> = Vec::new();
        for (seed, outcome) in runs {
            summary.seeds += 1;
            let report = match outcome {
                Ok(report) => report,
                Err(violation) => {
                    summary.failed_seed.get_or_insert(seed);
                    summary.violation = Some(violation.to_string());
                    break;
                }
            };
            let hours = report.virtual_ms as f64 / 3_600_000.0;
            summary.host_hours += hours * report.hosts as f64;
            summary.events += report.events;
            summary.resets += report.seen.times.resets;
            all.push(report.seen.times);
            for unmet in report.seen.unmet {
                summary.failed_seed.get_or_insert(seed);
                if summary.unmet.len() < UNMET_MAX {
                    summary.unmet.push((seed, unmet));
                }
            }
        }
        let times = |of: fn(&Times) -> Option<u64>| all.iter().filter_map(of).collect();
        summary.decided_ms = middle_and_most(times(|times| times.decided_ms));
        summary.may_restart_ms = middle_and_most(times(|times| times.may_restart_ms));
        summary
    }
}
