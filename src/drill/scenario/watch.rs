//! What the daemons of a lab say of their pool, and when it was seen first.

use super::Outcome;
use crate::api::client::{Client, block};
use crate::api::pool::{DecisionView, PoolStatus};
use crate::lab::{HostPower, Lab, LabPlan};
use crate::pool::HostName;
use crate::sim::scenario::{Case, Expect, ProofKind, Who};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks at a daemon.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A frozen daemon answers nothing.
const ANSWER: Duration = Duration::from_secs(1);

/// Everything seen.
#[derive(Default)]
pub(super) struct Seen {
    hosts: BTreeMap<HostName, Option<PoolStatus>>,
    /// Lives at the beginning.
    lives: BTreeMap<HostName, u64>,
    /// By number.
    decisions: BTreeMap<u64, (Instant, DecisionView)>,
    coordinators: Vec<(Instant, HostName)>,
    off: Vec<(Instant, HostName)>,
    expected_off: BTreeSet<HostName>,
    counting: bool,
}

/// Looks until it is dropped.
pub(super) struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seen {
    fn take_in(&mut self, host: &HostName, status: Option<PoolStatus>) {
        if let Some(status) = &status
            && self.counting
        {
            let now = Instant::now();
            for decision in &status.decisions {
                self.decisions
                    .entry(decision.number)
                    .or_insert_with(|| (now, decision.clone()));
            }
            if let Some(coordinator) = &status.coordinator
                && self.coordinators.last().map(|(_, known)| known) != Some(coordinator)
                && status.phase == "member"
            {
                self.coordinators.push((now, coordinator.clone()));
            }
        }
        self.hosts.insert(host.clone(), status);
    }

    /// Whether every host is a member, sees all others as members that vote, and may judge them.
    pub(super) fn all_judge(&self) -> bool {
        self.hosts.values().all(|status| {
            status.as_ref().is_some_and(|status| {
                status.judges
                    && status
                        .hosts
                        .iter()
                        .all(|host| host.standing == "in" && host.votes)
            })
        })
    }
}

impl Watch {
    /// Begin to look at all hosts of a lab.
    pub(super) fn start(lab: &Lab) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for net in &lab.plan().hosts {
            lock(&seen).hosts.insert(net.name.clone(), None);
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            let (client, host) = (Client::new(&net.api_socket), net.name.clone());
            threads.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let asked = async {
                        let answer = client.get::<PoolStatus>("/v1/pool");
                        tokio::time::timeout(ANSWER, answer).await
                    };
                    let status = block(asked).ok().and_then(Result::ok);
                    lock(&seen).take_in(&host, status);
                    std::thread::sleep(LOOK_EVERY);
                }
            }));
        }
        threads.push(watch_power(lab.plan(), &seen, &stop));
        Self {
            seen,
            stop,
            threads,
        }
    }

    /// Look until it is so.
    ///
    /// # Errors
    /// What each host said last.
    pub(super) fn wait(&self, within: Duration, so: impl Fn(&Seen) -> bool) -> Result<(), String> {
        let end = Instant::now() + within;
        loop {
            let seen = lock(&self.seen);
            if so(&seen) {
                return Ok(());
            }
            if Instant::now() >= end {
                let said = seen.hosts.iter().map(|(host, status)| {
                    let phase = status.as_ref().map_or("no answer", |s| s.phase.as_str());
                    let listens = status.as_ref().is_some_and(|s| !s.judges);
                    let yet = if listens { ", still listening" } else { "" };
                    format!("{host}: {phase}{yet}")
                });
                return Err(said.collect::<Vec<_>>().join(", "));
            }
            drop(seen);
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Who coordinates, and the first other host.
    pub(super) fn roles(&self) -> (HostName, HostName) {
        let seen = lock(&self.seen);
        let mut names = seen.hosts.keys();
        let coordinator = seen
            .hosts
            .values()
            .flatten()
            .find_map(|status| status.coordinator.clone());
        let first = names.next().cloned();
        let coordinator = coordinator.or(first);
        let another = seen
            .hosts
            .keys()
            .find(|name| Some(*name) != coordinator.as_ref());
        let another = another.cloned();
        // A lab has at least one host.
        match (coordinator, another) {
            (Some(coordinator), Some(another)) => (coordinator, another),
            (Some(only), None) | (None, Some(only)) => (only.clone(), only),
            (None, None) => unreachable!("a lab without hosts"),
        }
    }

    /// What is seen from now on counts.
    pub(super) fn begin(&self) {
        let mut seen = lock(&self.seen);
        let known: Vec<u64> = seen
            .hosts
            .values()
            .flatten()
            .flat_map(|status| status.decisions.iter().map(|decision| decision.number))
            .collect();
        let lives = seen
            .hosts
            .iter()
            .filter_map(|(host, status)| Some((host.clone(), status.as_ref()?.incarnation)));
        seen.lives = lives.collect();
        seen.counting = true;
        // Those of before are known, and count for nothing.
        let before = Instant::now() - Duration::from_secs(1);
        let old = DecisionView {
            number: 0,
            by: String::new(),
            about: String::new(),
            what: String::new(),
            cause: String::new(),
        };
        for number in known {
            seen.decisions.insert(number, (before, old.clone()));
        }
    }

    /// Its power goes on purpose.
    pub(super) fn expects_off(&self, host: &HostName) {
        lock(&self.seen).expected_off.insert(host.clone());
    }

    /// Judge a case whose events began at `first` and ended at `last`.
    pub(super) fn judge(
        &self,
        case: &Case,
        who: &dyn Fn(Who) -> Vec<HostName>,
        first: Instant,
        last: Instant,
    ) -> Outcome {
        let seen = lock(&self.seen);
        let judge = Judge {
            seen: &seen,
            who,
            case,
            first,
            last,
        };
        let unmet = case.expect.iter().filter_map(|(expect, sentence)| {
            let instead = judge.one(*expect).err()?;
            Some(format!("\"{sentence}\": {instead}"))
        });
        let ms = |at: Instant| {
            u64::try_from(at.saturating_duration_since(last).as_millis()).unwrap_or(u64::MAX)
        };
        let first_of = |what: &[&str]| {
            seen.decisions
                .values()
                .find(|(_, decision)| what.contains(&decision.what.as_str()))
                .map(|(at, _)| ms(*at))
        };
        Outcome {
            case: case.name.clone(),
            unmet: unmet.collect(),
            given_up_ms: first_of(&["ousted"]),
            may_restart_ms: first_of(&["dead", "away"]),
            resets: seen.off.len() as u64,
            decisions: seen
                .decisions
                .values()
                .filter(|(_, decision)| !decision.what.is_empty())
                .map(|(at, d)| {
                    let s = at.saturating_duration_since(first).as_secs_f64();
                    format!(
                        "{s:.1} s: {} decided: {} {}: {}",
                        d.by, d.about, d.what, d.cause
                    )
                })
                .collect(),
            xenserver: case.xenserver.clone(),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A panic in it was told by itself.
            let _ = thread.join();
        }
    }
}

/// A host that loses power though nobody cut it was reset.
fn watch_power(plan: &LabPlan, seen: &Arc<Mutex<Seen>>, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (dir, seen, stop) = (plan.dir.clone(), Arc::clone(seen), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut was_off: BTreeSet<HostName> = BTreeSet::new();
        while !stop.load(Ordering::Acquire) {
            if let Ok(status) = Lab::open_at(&dir).and_then(|lab| lab.status()) {
                let mut seen = lock(&seen);
                for host in status.hosts {
                    if host.power != HostPower::Off {
                        was_off.remove(&host.name);
                    } else if was_off.insert(host.name.clone())
                        && !seen.expected_off.contains(&host.name)
                    {
                        seen.off.push((Instant::now(), host.name));
                    }
                }
            }
            std::thread::sleep(LOOK_EVERY);
        }
    })
}

struct Judge<'a> {
    seen: &'a Seen,
    who: &'a dyn Fn(Who) -> Vec<HostName>,
    case: &'a Case,
    first: Instant,
    last: Instant,
}

impl Judge<'_> {
    fn decided(&self, host: &HostName, what: &[&str]) -> Option<&(Instant, DecisionView)> {
        self.seen.decisions.values().find(|(_, decision)| {
            decision.about == host.as_str() && what.contains(&decision.what.as_str())
        })
    }

    fn within(&self, what: &str, at: Option<Instant>, limit_ms: u64) -> Result<(), String> {
        let took = at.map(|at| at.saturating_duration_since(self.last).as_millis());
        match took {
            Some(took) if took <= u128::from(limit_ms) => Ok(()),
            Some(took) => Err(format!("{what} only after {took} ms")),
            None => Err(format!("{what} never")),
        }
    }

    fn each(
        &self,
        who: Who,
        check: impl Fn(&HostName) -> Result<(), String>,
    ) -> Result<(), String> {
        (self.who)(who).iter().try_for_each(check)
    }

    fn reset(&self, of: impl Fn(&HostName) -> bool) -> Result<(), String> {
        let found = self.seen.off.iter().find(|(_, host)| of(host));
        found.map_or(Ok(()), |(at, host)| {
            let s = at.saturating_duration_since(self.first).as_secs_f64();
            Err(format!("{host} lost power {s:.1} s after the first event"))
        })
    }

    fn status(&self, host: &HostName) -> Option<&PoolStatus> {
        self.seen.hosts.get(host).and_then(Option::as_ref)
    }

    fn one(&self, expect: Expect) -> Result<(), String> {
        match expect {
            Expect::MayRestart(who, limit) => self.each(who, |host| {
                let at = self.decided(host, &["dead", "away"]);
                self.within(
                    &format!("those of {host} might"),
                    at.map(|(at, _)| *at),
                    limit.0,
                )
            }),
            Expect::NoRestart(who) => {
                self.each(who, |host| match self.decided(host, &["dead", "away"]) {
                    None => Ok(()),
                    Some((_, decision)) => Err(format!("they might: {}", decision.cause)),
                })
            }
            Expect::NobodyResets => self.reset(|_| true),
            Expect::NobodyElseResets => {
                let named: Vec<HostName> = self
                    .case
                    .events
                    .iter()
                    .flat_map(|(_, event, _)| event.about())
                    .filter(|who| *who != Who::All)
                    .flat_map(|who| (self.who)(who))
                    .collect();
                self.reset(|host| !named.contains(host))
            }
            Expect::Resets(who, limit) => self.each(who, |host| {
                let at = self.seen.off.iter().find(|(_, off)| off == host);
                self.within("it was", at.map(|(at, _)| *at), limit.0)
            }),
            Expect::Stays(who) => self.each(who, |host| {
                let status = self.status(host);
                let same = status.is_some_and(|status| {
                    status.phase == "member"
                        && self.seen.lives.get(host) == Some(&status.incarnation)
                });
                let given_up = self.decided(host, &["ousted", "dead", "away"]);
                if same && given_up.is_none() {
                    return Ok(());
                }
                let phase = status.map_or("without an answer", |status| status.phase.as_str());
                let why = given_up.map_or(String::new(), |(_, d)| format!(", {}", d.cause));
                Err(format!("{host} did not: it is {phase}{why}"))
            }),
            Expect::GivenUp(who, limit) => self.each(who, |host| {
                let at = self.decided(host, &["ousted"]);
                self.within("it was", at.map(|(at, _)| *at), limit.0)
            }),
            Expect::AnotherCoordinates(limit) => {
                let before = (self.who)(Who::Coordinator);
                let at = self
                    .seen
                    .coordinators
                    .iter()
                    .find(|(_, host)| !before.contains(host));
                self.within("another did", at.map(|(at, _)| *at), limit.0)
            }
            Expect::AllMembers(_) => self.each(Who::All, |host| {
                let phase = self.status(host).map_or("no answer", |s| s.phase.as_str());
                if phase == "member" {
                    Ok(())
                } else {
                    Err(format!("{host}: {phase}"))
                }
            }),
            Expect::Proved(who, kind) => self.each(who, |host| {
                let cause = self.decided(host, &["dead", "away"]);
                let cause = cause.map_or("nothing", |(_, decision)| decision.cause.as_str());
                let words = match kind {
                    ProofKind::Watchdog => "its watchdog",
                    ProofKind::Power => "power is off",
                    ProofKind::Farewell => "farewell",
                };
                if cause.contains(words) {
                    Ok(())
                } else {
                    Err(format!("by {cause}"))
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_whose_members_still_listen_is_not_ready_for_faults() {
        let status = |phase: &str, judges: bool| -> PoolStatus {
            let text = format!(
                r#"{{"host":"a","id":0,"incarnation":1,"phase":"{phase}","judges":{judges},
                "watchdog":{{"state":"petting"}},"term":1,"decisions":[],"restarts":[],"alerts":[],
                "age_ms":0,"hosts":[{{"name":"a","id":0,"standing":"in","votes":true,"is_self":true,"paths":[]}}]}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let (a, b) = (HostName::new("a").unwrap(), HostName::new("b").unwrap());
        let mut seen = Seen::default();
        seen.take_in(&a, Some(status("member", true)));
        assert!(seen.all_judge());
        seen.take_in(&b, None);
        assert!(!seen.all_judge(), "one that does not answer");
        seen.take_in(&b, Some(status("member", false)));
        assert!(!seen.all_judge(), "one that still listens");
        seen.take_in(&b, Some(status("member", true)));
        assert!(seen.all_judge());
    }
}
