//! Whether what was expected has come, by the log of what happened.

use super::world::World;
use crate::ha::state::{Proof, Standing};
use crate::sim::scenario::{Case, Expect, ProofKind, Who, host_name};
use serde::Serialize;

/// Times of one run, counted from the last event, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Times {
    /// Until the first host was given up.
    pub decided_ms: Option<u64>,
    /// Until the first VMs might be restarted.
    pub may_restart_ms: Option<u64>,
    /// Watchdogs that fired.
    pub resets: u64,
}

/// What came of the expectations of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Sentences that did not come true, and what was seen instead.
    pub unmet: Vec<String>,
    /// The times.
    pub times: Times,
}

/// Hosts that no event names.
fn others(world: &World, case: &Case) -> Vec<usize> {
    let named: Vec<usize> = case
        .events
        .iter()
        .flat_map(|(_, event, _)| event.about())
        .filter(|who| *who != Who::All)
        .flat_map(|who| world.who(who))
        .collect();
    (0..world.hosts.len())
        .filter(|n| !named.contains(n))
        .collect()
}

/// Judge a run that began its first event at `first` and its last at `last`.
pub(super) fn judge(world: &World, case: &Case, first: u64, last: u64) -> Seen {
    let since = |at: u64| at.saturating_sub(last);
    let log = &world.log;
    let mut seen = Seen {
        unmet: Vec::new(),
        times: Times {
            decided_ms: log
                .given_up
                .iter()
                .find(|(at, ..)| *at >= first)
                .map(|(at, ..)| since(*at)),
            may_restart_ms: log
                .may_restart
                .iter()
                .find(|(at, ..)| *at >= first)
                .map(|(at, ..)| since(*at)),
            resets: log.resets.iter().filter(|(at, _)| *at >= first).count() as u64,
        },
    };
    for (expect, sentence) in &case.expect {
        if let Err(instead) = one(world, case, first, last, *expect) {
            seen.unmet.push(format!("\"{sentence}\": {instead}"));
        }
    }
    seen
}

fn within(what: &str, at: Option<u64>, last: u64, limit: u64) -> Result<(), String> {
    match at {
        Some(at) if at.saturating_sub(last) <= limit => Ok(()),
        Some(at) => Err(format!("{what} only after {} ms", at - last)),
        None => Err(format!("{what} never")),
    }
}

fn one(world: &World, case: &Case, first: u64, last: u64, expect: Expect) -> Result<(), String> {
    let log = &world.log;
    let each = |who: Who, check: &dyn Fn(usize) -> Result<(), String>| {
        world.who(who).into_iter().try_for_each(check)
    };
    let resets = |of: &[usize]| {
        let found = log
            .resets
            .iter()
            .find(|(at, n)| *at >= first && of.contains(n));
        match found {
            Some((at, n)) => Err(format!(
                "{} was reset, {} ms after the first event",
                host_name(*n),
                at - first
            )),
            None => Ok(()),
        }
    };
    match expect {
        Expect::MayRestart(who, limit) => each(who, &|n| {
            let at = log
                .may_restart
                .iter()
                .find(|(at, host, ..)| *at >= first && *host == n);
            let what = format!("those of {} might", host_name(n));
            within(&what, at.map(|(at, ..)| *at), last, limit.0)
        }),
        Expect::NoRestart(who) => each(who, &|n| match log
            .may_restart
            .iter()
            .find(|(at, host, ..)| *at >= first && *host == n)
        {
            Some((at, ..)) => Err(format!("they might, after {} ms", at.saturating_sub(last))),
            None => Ok(()),
        }),
        Expect::NobodyResets => resets(&(0..world.hosts.len()).collect::<Vec<_>>()),
        Expect::NobodyElseResets => resets(&others(world, case)),
        Expect::Resets(who, limit) => each(who, &|n| {
            let at = log
                .resets
                .iter()
                .find(|(at, host)| *at >= first && *host == n);
            within("it was", at.map(|(at, _)| *at), last, limit.0)
        }),
        Expect::Stays(who) => each(who, &|n| {
            let life = &world.hosts[n];
            let lost = log
                .given_up
                .iter()
                .any(|(at, host, _)| *at >= first && *host == n)
                || log
                    .resets
                    .iter()
                    .any(|(at, host)| *at >= first && *host == n);
            let is_in = world.state().is_some_and(|state| {
                state
                    .members
                    .values()
                    .nth(n)
                    .is_some_and(|m| m.standing == Standing::In)
            });
            if lost || !life.is_member() || !is_in {
                let now = life.machine.as_ref().map(|machine| machine.phase().clone());
                return Err(format!("{} did not: it is {now:?}", host_name(n)));
            }
            Ok(())
        }),
        Expect::GivenUp(who, limit) => each(who, &|n| {
            let at = log
                .given_up
                .iter()
                .find(|(at, host, _)| *at >= first && *host == n);
            within("it was", at.map(|(at, ..)| *at), last, limit.0)
        }),
        Expect::AnotherCoordinates(limit) => {
            let before = world.roles.map(|(coordinator, _)| coordinator);
            let at = log
                .coordinators
                .iter()
                .find(|(at, host)| *at >= first && Some(*host) != before);
            within("another did", at.map(|(at, _)| *at), last, limit.0)
        }
        // The run has just ended, after this time.
        Expect::AllMembers(_) => {
            if world.all_members() {
                Ok(())
            } else {
                let not: Vec<_> = (0..world.hosts.len())
                    .filter(|n| !world.hosts[*n].is_member())
                    .map(host_name)
                    .collect();
                Err(format!("{} are not", not.join(", ")))
            }
        }
        Expect::Proved(who, kind) => each(who, &|n| {
            let proof = log
                .proved
                .iter()
                .find(|(at, host, _)| *at >= first && *host == n)
                .map(|(_, _, proof)| *proof);
            let is = match proof {
                Some(Proof::WatchdogBound { .. }) => Some(ProofKind::Watchdog),
                Some(Proof::PowerOff) => Some(ProofKind::Power),
                Some(Proof::Farewell) => Some(ProofKind::Farewell),
                Some(Proof::Declared | Proof::LeaseRevoked) | None => None,
            };
            if is == Some(kind) {
                Ok(())
            } else {
                Err(format!("it was by {proof:?}"))
            }
        }),
    }
}
