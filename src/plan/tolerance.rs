//! Question 1: is every set of r failures survived?
//!
//! [`Checker`] proves it once for all sets and keeps the proof: per set, where each lost VM goes,
//! and what is then left on each host. After a small change ([`Checker::update`]) only those sets
//! are looked at again whose lost VMs changed, or that had counted on room that is gone.
//!
//! Must never: answer `survives` unless every listed set has a placement in hand.

use super::choose::{self, Chosen};
use super::layout::{HostSet, Layout, Scope};
use super::model::Pool;
use super::pack::{self, Bound, Problem, Scratch, Verdict};
use super::sets;
use std::ops::Range;

mod update;

/// Steps of the exact search per set in the first round, where any set may still be the bad one.
const FIRST_STEPS: u64 = 2_000;
/// Numbers that are kept of what is placed where: 64 MiB. Beyond, an update proves all anew.
const LOAD_MAX: usize = 8 << 20;

/// How much may be spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Steps of the exact search per set.
    pub steps_per_set: u64,
    /// And for all sets together.
    pub steps: u64,
}

impl Default for Budget {
    /// About ten seconds of one core at worst.
    fn default() -> Self {
        Self {
            steps_per_set: 2_000_000,
            steps: 6_000_000,
        }
    }
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Every set has a placement.
    Survives,
    /// One set has none.
    Overcommitted(Box<Failure>),
    /// The budget was spent on the first of `sets` undecided ones; or there are more sets than
    /// are listed, then there is none.
    Unknown {
        /// The tightest set that is undecided.
        failed: Option<HostSet>,
        /// How many are.
        sets: u64,
    },
}

/// A set that is not survived.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The hosts that fail.
    pub failed: HostSet,
    /// Why there is no placement.
    pub bound: Bound,
    /// The VM (place in `running`) that a bound of a single one is about.
    pub single: Option<u32>,
    /// What can be restarted at most, and what is left over.
    pub chosen: Chosen,
}

/// The part of the first pass over one range of sets.
pub struct Part {
    places: Vec<Option<Box<[u8]>>>,
}

/// Runs the parts of the first pass: one after the other here, on threads in a shell.
pub trait Runner {
    /// How many parts to make.
    fn parts(&self) -> usize;
    /// Run `job` for each number below `parts`; the results in order.
    fn run(&self, parts: usize, job: &(dyn Fn(usize) -> Part + Sync)) -> Vec<Part>;
}

/// One after the other.
pub struct InOrder;
impl Runner for InOrder {
    fn parts(&self) -> usize {
        1
    }
    fn run(&self, parts: usize, job: &(dyn Fn(usize) -> Part + Sync)) -> Vec<Part> {
        (0..parts).map(job).collect()
    }
}

/// A pool, the answer about it, and the proof.
pub struct Checker {
    r: u32,
    scope: Scope,
    budget: Budget,
    layout: Layout,
    sets: Vec<HostSet>,
    places: Vec<Box<[u8]>>,
    /// Per set, host and dimension: what its placement puts there.
    load: Vec<u64>,
    /// Per host and dimension: no set puts more there.
    load_most: Vec<u64>,
    outcome: Outcome,
    /// Sets that were looked at in the newest proof or update.
    looked: usize,
    tightest: Option<(HostSet, f64)>,
}

impl Checker {
    /// Prove it for `r` failures of what the pool says fails at once.
    #[must_use]
    pub fn new(pool: &Pool, r: u32, scope: Scope, budget: Budget) -> Self {
        Self::new_on(&InOrder, pool, r, scope, budget)
    }

    /// As [`Checker::new`], the first pass on a runner.
    #[must_use]
    pub fn new_on(runner: &dyn Runner, pool: &Pool, r: u32, scope: Scope, budget: Budget) -> Self {
        let mut checker = Self {
            r,
            scope,
            budget,
            layout: Layout::new(pool, scope),
            sets: Vec::new(),
            places: Vec::new(),
            load: Vec::new(),
            load_most: Vec::new(),
            outcome: Outcome::Survives,
            looked: 0,
            tightest: None,
        };
        checker.prove(runner);
        checker
    }

    /// The answer.
    #[must_use]
    pub const fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// The pool in numbers.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// For how many failures.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.r
    }

    /// The sets that were to be survived.
    #[must_use]
    pub fn sets(&self) -> &[HostSet] {
        &self.sets
    }

    /// How many of them the newest proof or update had to look at.
    #[must_use]
    pub const fn looked(&self) -> usize {
        self.looked
    }

    /// The set with the least to spare, and what that is as a share of all that is free.
    #[must_use]
    pub const fn tightest(&self) -> Option<(HostSet, f64)> {
        self.tightest
    }

    /// Where each VM goes that is lost if exactly the hosts of `failed` fail, by the proof: by that
    /// of the set itself, or of a larger one.
    #[must_use]
    pub fn placement(&self, failed: HostSet) -> Option<Vec<(u32, u8)>> {
        if self.outcome != Outcome::Survives {
            return None;
        }
        let exact = self.sets.iter().position(|set| *set == failed);
        let larger = || {
            let covers = |set: &HostSet| set & failed == failed;
            (self.sets.iter().position(covers)).filter(|_| !self.layout.uneven)
        };
        let at = exact.or_else(larger)?;
        let dead = self.layout.dead(failed);
        let mut pairs = self.pairs(at);
        pairs.retain(|(vm, _)| Layout::is_lost(&self.layout.running[*vm as usize], dead));
        Some(pairs)
    }

    /// The VMs and hosts of the placement of one set.
    pub(super) fn pairs(&self, set: usize) -> Vec<(u32, u8)> {
        let dead = self.layout.dead(self.sets[set]);
        let lost = self.layout.lost(dead);
        lost.zip(self.places[set].iter().copied()).collect()
    }

    fn prove(&mut self, runner: &dyn Runner) {
        self.places.clear();
        self.load.clear();
        self.sets.clear();
        self.tightest = None;
        let count = sets::count(&self.layout, self.r);
        if count > sets::SETS_MAX {
            self.looked = 1;
            let worst = sets::heaviest(&self.layout, self.r);
            let slack = sets::slack(&self.layout, worst);
            if slack < 0.0
                && let refused @ Outcome::Overcommitted(_) = self.refused_by_sum(worst)
            {
                self.tightest = Some((worst, slack));
                self.outcome = refused;
                return;
            }
            self.outcome = Outcome::Unknown {
                failed: None,
                sets: count,
            };
            return;
        }
        self.sets = sets::list(&self.layout, self.r);
        self.looked = self.sets.len();
        self.find_tightest();
        self.outcome = match self.tightest {
            Some((failed, slack)) if slack < 0.0 => self.refused_by_sum(failed),
            _ => self.place_all(runner),
        };
        if self.outcome == Outcome::Survives {
            self.keep_loads();
        } else {
            self.places.clear();
        }
    }

    fn find_tightest(&mut self) {
        self.tightest = (self.sets.iter())
            .map(|set| (*set, sets::slack(&self.layout, *set)))
            .min_by(|a, b| a.1.total_cmp(&b.1));
    }

    fn refused_by_sum(&self, failed: HostSet) -> Outcome {
        let mut problem = Problem::default();
        self.layout.problem(failed, &mut problem);
        match pack::bound::refuse(&problem) {
            Some(bound) => self.overcommitted(failed, bound),
            // The share is a float; where it is that close the search decides.
            None => self.decide(&[failed], self.budget).1,
        }
    }

    fn overcommitted(&self, failed: HostSet, bound: Bound) -> Outcome {
        let single = match bound {
            Bound::Single { slot } => self
                .layout
                .lost(self.layout.dead(failed))
                .nth(slot as usize),
            _ => None,
        };
        Outcome::Overcommitted(Box::new(Failure {
            failed,
            bound,
            single,
            chosen: choose::choose(&self.layout, failed),
        }))
    }

    /// The cheap accepts for all, then a decision for those that are left.
    fn place_all(&mut self, runner: &dyn Runner) -> Outcome {
        let parts = runner.parts().clamp(1, self.sets.len().max(1));
        let (layout, sets) = (&self.layout, &self.sets);
        let job = |part: usize| {
            let from = sets.len() * part / parts;
            let to = sets.len() * (part + 1) / parts;
            first_pass(layout, &sets[from..to])
        };
        let places: Vec<Option<Box<[u8]>>> = runner
            .run(parts, &job)
            .into_iter()
            .flat_map(|part| part.places)
            .collect();
        if places.len() != self.sets.len() {
            // A runner that lost a part has proven nothing.
            return Outcome::Unknown {
                failed: None,
                sets: self.sets.len() as u64,
            };
        }
        let open: Vec<HostSet> = (places.iter().zip(&self.sets))
            .filter(|(place, _)| place.is_none())
            .map(|(_, set)| *set)
            .collect();
        let (decided, outcome) = self.decide(&open, self.budget);
        if outcome == Outcome::Survives {
            let mut decided = decided.into_iter();
            self.places = places
                .into_iter()
                .filter_map(|place| place.or_else(|| decided.next()))
                .collect();
            if self.places.len() != self.sets.len() {
                return Outcome::Unknown {
                    failed: None,
                    sets: 0,
                };
            }
        }
        outcome
    }

    /// Decide these sets, the tightest first: a little for each, then the rest of the budget for
    /// those that are still open. Placements are in the order of `open` if all have one.
    fn decide(&self, open: &[HostSet], budget: Budget) -> (Vec<Box<[u8]>>, Outcome) {
        let mut order: Vec<usize> = (0..open.len()).collect();
        let slack: Vec<f64> = (open.iter())
            .map(|set| sets::slack(&self.layout, *set))
            .collect();
        order.sort_by(|a, b| slack[*a].total_cmp(&slack[*b]));
        let mut places: Vec<Option<Box<[u8]>>> = vec![None; open.len()];
        let (mut problem, mut scratch) = (Problem::default(), Scratch::default());
        let mut rounds = vec![FIRST_STEPS.min(budget.steps_per_set)];
        if budget.steps_per_set > FIRST_STEPS {
            rounds.push(budget.steps_per_set);
        }
        let mut steps = budget.steps;
        for (round, limit) in rounds.into_iter().enumerate() {
            let mut still = Vec::new();
            for n in order {
                self.layout.problem(open[n], &mut problem);
                let limit = if round == 0 { limit } else { limit.min(steps) };
                match pack::decide(&problem, &mut scratch, limit) {
                    Verdict::Fits(hosts) => places[n] = Some(hosts),
                    Verdict::Refused(bound) => {
                        return (Vec::new(), self.overcommitted(open[n], bound));
                    }
                    Verdict::Open => {
                        still.push(n);
                        if round > 0 {
                            steps = steps.saturating_sub(limit);
                        }
                    }
                }
            }
            order = still;
        }
        match order.first() {
            None => (places.into_iter().flatten().collect(), Outcome::Survives),
            Some(first) => (
                Vec::new(),
                Outcome::Unknown {
                    failed: Some(open[*first]),
                    sets: order.len() as u64,
                },
            ),
        }
    }

    /// Numbers per set in `load`.
    fn stride(&self) -> usize {
        self.layout.hosts.len() * self.layout.dims.len()
    }

    fn range(&self, set: usize) -> Range<usize> {
        set * self.stride()..(set + 1) * self.stride()
    }

    fn keep_loads(&mut self) {
        let numbers = self.sets.len() * self.stride();
        self.load.clear();
        self.load_most = vec![0; self.stride()];
        if numbers > LOAD_MAX {
            return;
        }
        self.load.resize(numbers, 0);
        for set in 0..self.sets.len() {
            self.count_load(set);
        }
    }

    /// Count what the placement of a set puts where.
    fn count_load(&mut self, set: usize) {
        let dims = self.layout.dims.len();
        let range = self.range(set);
        let dead = self.layout.dead(self.sets[set]);
        let row = &mut self.load[range];
        row.fill(0);
        for (at, host) in self.layout.lost(dead).zip(&self.places[set]) {
            let need = &self.layout.running[at as usize].need;
            for k in 0..dims {
                row[usize::from(*host) * dims + k] += need[k];
            }
        }
        for (most, load) in self.load_most.iter_mut().zip(row) {
            *most = (*most).max(*load);
        }
    }
}

fn first_pass(layout: &Layout, sets: &[HostSet]) -> Part {
    let (mut problem, mut scratch) = (Problem::default(), Scratch::default());
    let places = sets
        .iter()
        .map(|set| {
            layout.problem(*set, &mut problem);
            pack::quick(&problem, &mut scratch)
        })
        .collect();
    Part { places }
}

#[cfg(test)]
mod tests;
