//! An overcommitted pool: the fewest live moves, or protections changed, that make it safe again.
//!
//! Candidates are first held against the sets that are known not to be survived, which is quick;
//! what passes is proven for all sets, or adds the set that it fails on. One step is tried
//! exhaustively within the budget; with more steps the search is greedy, and says so.
//!
//! Must never: advise what does not make the pool safe.

use super::answer::down;
use super::layout::{HostSet, Layout, Running, Scope, members};
use super::model::{Bytes, Pool, Priority, Protection};
use super::pack::{self, Bound, Problem, Scratch, Verdict};
use super::tolerance::{Budget, Checker, Failure, InOrder, Outcome};
use crate::pool::HostName;
use serde::Serialize;

/// Steps of an advice at most.
const STEPS_MAX: usize = 24;
/// Moves that are tried for each step at most.
const MOVES_MAX: usize = 3_000;
/// Whole proofs that are asked for at most.
const PROOFS_MAX: usize = 40;
/// Steps of the exact search per candidate and set.
const SEARCH_STEPS: u64 = 2_000;

/// What could be done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Advice {
    /// Steps that together make the pool safe; empty if none were found.
    pub steps: Vec<Step>,
    /// Whether fewer steps of this kind cannot do it.
    pub fewest: bool,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Step {
    /// Move a VM while it runs.
    Move {
        /// Which.
        vm: String,
        /// Its memory.
        memory: Bytes,
        /// From where.
        from: HostName,
        /// To where.
        to: HostName,
    },
    /// Let go of a standby or reservation: the VM restarts anywhere instead.
    Restart {
        /// Which.
        vm: String,
        /// Its memory, which its partner gets back.
        memory: Bytes,
    },
    /// Stop a VM.
    Stop {
        /// Which.
        vm: String,
        /// Its memory.
        memory: Bytes,
    },
    /// Let a VM be left down if there is no room.
    BestEffort {
        /// Which.
        vm: String,
        /// Its memory.
        memory: Bytes,
    },
}

impl Step {
    /// Do it.
    pub fn apply(&self, pool: &mut Pool) {
        let name = match self {
            Self::Move { vm, .. }
            | Self::Restart { vm, .. }
            | Self::Stop { vm, .. }
            | Self::BestEffort { vm, .. } => vm,
        };
        let Some(vm) = pool.vms.iter_mut().find(|vm| vm.name == *name) else {
            return;
        };
        match self {
            Self::Move { to, .. } => vm.host = Some(to.clone()),
            Self::Restart { .. } => {
                vm.protection = Protection::Restart;
                vm.standby = None;
            }
            Self::Stop { .. } => {
                vm.host = None;
                vm.standby = None;
            }
            Self::BestEffort { .. } => vm.priority = Priority::BestEffort,
        }
    }
}

/// What could be done, by kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ways {
    /// Live moves.
    pub moves: Advice,
    /// Changed protections.
    pub protections: Advice,
    /// VMs stopped.
    pub stops: Advice,
}

/// Advice for a pool that `checker` found overcommitted.
#[must_use]
pub fn advise(pool: &Pool, checker: &Checker) -> Ways {
    let mut search = Search {
        r: checker.failures(),
        known: Vec::new(),
        proofs: 0,
        skipped: false,
    };
    let Outcome::Overcommitted(failure) = checker.outcome() else {
        let none = || Advice {
            steps: Vec::new(),
            fewest: true,
        };
        return Ways {
            moves: none(),
            protections: none(),
            stops: none(),
        };
    };
    search.known.push(failure.failed);
    Ways {
        moves: search.find(pool, failure, &moves),
        protections: search.find(pool, failure, &protections),
        stops: search.find(pool, failure, &stops),
    }
}

struct Search {
    r: u32,
    /// Sets of failures that some candidate was not enough for.
    known: Vec<HostSet>,
    proofs: usize,
    /// Whether some candidate was not decided, or not looked at.
    skipped: bool,
}

/// The candidates for the next step, the most promising first.
type Candidates<'a> = &'a dyn Fn(&Pool, &Layout, &Failure) -> Vec<Step>;

impl Search {
    fn find(&mut self, pool: &Pool, failure: &Failure, candidates: Candidates<'_>) -> Advice {
        self.proofs = 0;
        self.skipped = false;
        let mut steps: Vec<Step> = Vec::new();
        let mut now = pool.clone();
        let mut failure = failure.clone();
        while steps.len() < STEPS_MAX {
            let layout = Layout::new(&now, Scope::Always);
            let all = candidates(&now, &layout, &failure);
            if steps.len() < 2 {
                self.skipped |= all.len() >= MOVES_MAX;
            }
            // One that is enough by itself, or else the one that leaves the least undone.
            let mut best: Option<(u64, Step)> = None;
            for step in all {
                let mut then = now.clone();
                step.apply(&mut then);
                let undone = self.undone(&then);
                self.skipped |= undone == 0 && self.proofs >= PROOFS_MAX;
                if undone == 0 && self.proofs < PROOFS_MAX {
                    self.proofs += 1;
                    let checker = Checker::new(&then, self.r, Scope::Always, Budget::default());
                    match checker.outcome() {
                        Outcome::Survives => {
                            steps.push(step);
                            let one = steps.len() == 1;
                            return Advice {
                                fewest: one || (steps.len() == 2 && !self.skipped),
                                steps: self.needed(pool, steps),
                            };
                        }
                        Outcome::Overcommitted(other) => self.known.push(other.failed),
                        Outcome::Unknown { .. } => self.skipped = true,
                    }
                }
                let undone = undone.max(u64::from(self.undone(&then) > 0));
                if best.as_ref().is_none_or(|(least, _)| undone < *least) {
                    best = Some((undone, step));
                }
            }
            let Some((undone, step)) = best else { break };
            let before = self.undone(&now);
            if undone >= before {
                break;
            }
            step.apply(&mut now);
            steps.push(step);
            let checker = Checker::new(&now, self.r, Scope::Always, Budget::default());
            match checker.outcome() {
                Outcome::Overcommitted(other) => {
                    self.known.push(other.failed);
                    failure = (**other).clone();
                }
                _ => break,
            }
        }
        Advice {
            steps: Vec::new(),
            fewest: false,
        }
    }

    /// What the known sets still lack, in bytes and whole VMs: 0 if all are survived.
    fn undone(&mut self, pool: &Pool) -> u64 {
        let layout = Layout::new(pool, Scope::Always);
        let (mut problem, mut scratch) = (Problem::default(), Scratch::default());
        let mut sum = 0;
        for failed in &self.known {
            layout.problem(*failed, &mut problem);
            sum += match pack::solve(&problem, &mut scratch, SEARCH_STEPS) {
                Verdict::Fits(_) => 0,
                Verdict::Refused(Bound::Sum { need, have, .. }) => need - have,
                open => {
                    self.skipped |= open == Verdict::Open;
                    let chosen = super::choose::choose(&layout, *failed);
                    (chosen.left_over.iter())
                        .map(|at| down(&layout, *at).memory.0)
                        .sum::<u64>()
                        .max(1)
                }
            };
        }
        sum
    }

    /// Only the steps without which it does not hold.
    fn needed(&mut self, pool: &Pool, mut steps: Vec<Step>) -> Vec<Step> {
        let mut at = 0;
        while steps.len() > 1 && at < steps.len() {
            let mut fewer = steps.clone();
            fewer.remove(at);
            let mut then = pool.clone();
            for step in &fewer {
                step.apply(&mut then);
            }
            let holds = self.undone(&then) == 0
                && *Checker::new_on(&InOrder, &then, self.r, Scope::Always, Budget::default())
                    .outcome()
                    == Outcome::Survives;
            if holds {
                steps = fewer;
            } else {
                at += 1;
            }
        }
        steps
    }
}

fn moves(pool: &Pool, layout: &Layout, failure: &Failure) -> Vec<Step> {
    // If all that runs must restart, a move takes as much room from the survivors as need from
    // the lost: it cannot mend a sum over all of them.
    let alive = layout.targets & !layout.dead(failure.failed);
    let total = matches!(failure.bound, Bound::Sum { hosts, .. } if hosts == alive);
    if total
        && layout
            .running
            .iter()
            .all(|vm| vm.hard && vm.standby.is_none())
    {
        return Vec::new();
    }
    let dead = layout.dead(failure.failed);
    let lost = |vm: &Running| Layout::is_lost(vm, dead);
    let mut order: Vec<&Running> = (layout.running.iter())
        .filter(|vm| layout.failed >> vm.host & 1 == 0)
        .collect();
    // Those that are lost, the largest first; then the others.
    order.sort_by_key(|vm| (!lost(vm), std::cmp::Reverse(vm.need[0]), vm.vm));
    let mut out = Vec::new();
    for vm in order {
        for to in members(layout.targets & vm.allowed) {
            let room = layout.free[to].iter().zip(vm.need).all(|(f, n)| *f >= n);
            let other = to != usize::from(vm.host) && Some(to) != vm.standby.map(usize::from);
            if room && other && out.len() < MOVES_MAX {
                let spec = &pool.vms[vm.vm];
                out.push(Step::Move {
                    vm: vm.name.clone(),
                    memory: spec.memory,
                    from: layout.hosts[usize::from(vm.host)].clone(),
                    to: layout.hosts[to].clone(),
                });
            }
        }
    }
    out
}

fn protections(pool: &Pool, layout: &Layout, failure: &Failure) -> Vec<Step> {
    let dead = layout.dead(failure.failed);
    let mut out = Vec::new();
    // The smallest first: of changes that are enough, the one that takes least.
    let mut order: Vec<&Running> = layout.running.iter().collect();
    order.sort_by_key(|vm| (vm.need[0], std::cmp::Reverse(vm.class), vm.vm));
    for vm in order {
        let spec = &pool.vms[vm.vm];
        if vm.standby.is_some() {
            out.push(Step::Restart {
                vm: vm.name.clone(),
                memory: spec.memory,
            });
        }
        if vm.hard && Layout::is_lost(vm, dead) {
            out.push(Step::BestEffort {
                vm: vm.name.clone(),
                memory: spec.memory,
            });
        }
    }
    out.truncate(MOVES_MAX);
    out
}

fn stops(pool: &Pool, layout: &Layout, _: &Failure) -> Vec<Step> {
    let mut order: Vec<&Running> = layout.running.iter().collect();
    // The least important first, then the smallest.
    order.sort_by_key(|vm| (std::cmp::Reverse(vm.class), vm.need[0], vm.vm));
    (order.into_iter().take(MOVES_MAX))
        .map(|vm| Step::Stop {
            vm: vm.name.clone(),
            memory: pool.vms[vm.vm].memory,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(text: &str) -> Pool {
        let hosts = ["a", "b", "c"]
            .map(|name| format!("[[host]]\nname = \"{name}\"\nmemory = \"16 GiB\"\n"))
            .concat();
        Pool::parse(&format!("{hosts}{text}"), "p").unwrap()
    }

    fn vm(name: &str, gib: u64, host: &str) -> String {
        format!("[[vm]]\nname = \"{name}\"\nmemory = \"{gib} GiB\"\nhost = \"{host}\"\n")
    }

    fn advised(pool: &Pool) -> Ways {
        let checker = Checker::new(pool, 1, Scope::Always, Budget::default());
        assert!(matches!(checker.outcome(), Outcome::Overcommitted(_)));
        let both = advise(pool, &checker);
        for advice in [&both.moves, &both.protections, &both.stops] {
            if advice.steps.is_empty() {
                continue;
            }
            let mut then = pool.clone();
            for step in &advice.steps {
                step.apply(&mut then);
            }
            let checker = Checker::new(&then, 1, Scope::Always, Budget::default());
            assert_eq!(*checker.outcome(), Outcome::Survives, "{advice:?}");
        }
        both
    }

    #[test]
    fn one_move_mends_what_is_scattered() {
        // 8 are free on a, 5 on b, 5 on c: the 6 of a fits on neither.
        let pool = pool(
            &[
                vm("six", 6, "a"),
                vm("two", 2, "a"),
                vm("b1", 4, "b"),
                vm("b2", 4, "b"),
                vm("b3", 3, "b"),
                vm("c1", 4, "c"),
                vm("c2", 4, "c"),
                vm("c3", 3, "c"),
            ]
            .concat(),
        );
        let ways = advised(&pool);
        assert_eq!(ways.moves.steps.len(), 1);
        assert!(ways.moves.fewest);
        let protections = ways.protections;
        assert_eq!(protections.steps.len(), 1);
    }

    #[test]
    fn what_is_too_much_in_all_is_not_mended_by_moves() {
        let pool = pool(&[vm("a1", 12, "a"), vm("b1", 12, "b"), vm("c1", 12, "c")].concat());
        let ways = advised(&pool);
        assert!(ways.moves.steps.is_empty());
        let protections = ways.protections;
        // Each host's failure needs its VM to be let go.
        assert_eq!(protections.steps.len(), 3);
    }

    #[test]
    fn a_reservation_is_let_go_where_that_is_enough() {
        let text = [vm("a1", 8, "a"), vm("b1", 5, "b"), vm("c1", 4, "c")].concat();
        let mut pool = pool(&text);
        for (at, standby) in [(0, "b"), (1, "c")] {
            pool.vms[at].protection = Protection::Mirrored;
            pool.vms[at].standby = HostName::new(standby).ok();
        }
        pool.vms.push(crate::plan::model::Vm {
            name: "c2".into(),
            memory: Bytes::gib(7),
            host: HostName::new("c").ok(),
            ..Default::default()
        });
        let protections = advised(&pool).protections;
        assert_eq!(protections.steps.len(), 1, "{protections:?}");
    }
}
