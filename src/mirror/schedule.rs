//! When to cut. Pure.
//!
//! A cut starts when output waits, so that added latency is a few ms and not a fixed
//! interval; back-to-back cuts, though, starve a guest that needs its CPU. So each cut
//! is paid for: it costs the CPU time the guest *wanted* and did not get, and the guest
//! earns credit at the overhead ceiling. A guest that idles between requests wants
//! nothing while it stands still: its cuts are almost free and follow each other with no
//! gap. A guest that is CPU-bound pays full price and is cut every pause/ceiling. A guest
//! that serves many clients is in between: it is left alone while it works its queue off,
//! and cut the moment it has nothing left to do, for then the next requests only come
//! once its answers are out.
//!
//! Must never starve the guest ([`RUN_MIN`]), nor let an epoch grow without end
//! ([`Policy::interval_ceiling`]).

use super::Micros;
use crate::pool::spec::Overload;

/// The guest runs at least this long between two cuts, whatever waits: less than the
/// 0.8 ms that a pause spends on stop and cont alone (QEMU.md section 4), long enough for
/// a request to be read, worked on and answered.
pub const RUN_MIN: Micros = Micros(500);

/// What each dirtied page costs the guest in write-protect faults, in nanoseconds
/// (0.9 to 1.4 µs measured, QEMU.md section 3).
pub const PAGE_FAULT_NS: u64 = 1200;

/// Credit saved up at most, as time at the ceiling: an idle guest may answer a burst of
/// this length at lowest latency before the ceiling bites; longer would let a
/// many-client load alternate between starved and free.
pub const CREDIT_WINDOW: Micros = Micros::from_millis(50);

/// Longest debt, likewise: one bad pause (a host busy elsewhere) must not stop the cuts for long.
pub const DEBT_WINDOW: Micros = Micros::from_millis(200);

/// What an operator may set, live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Shortest time the guest runs between cuts, unless a buffer nears its limit. Zero: what
    /// a cut costs already spaces cuts by the ceiling below.
    pub gap_min: Micros,
    /// Longest time between cuts while nothing waits and the ceiling allows. 50 ms:
    /// twenty cuts a second cost an idle guest 4 % at 2 ms, and the lag stays near 55 ms.
    pub interval_max: Micros,
    /// Longest time between cuts whatever the ceiling says.
    pub interval_ceiling: Micros,
    /// Share of the guest's wanted CPU that cuts may cost. 250: a CPU-bound guest keeps
    /// 75 % and so more than the promised 70 % with some left for what the pauses do not show.
    pub overhead_permille: u16,
    /// What becomes of a guest that dirties more than the links carry.
    pub overload: Overload,
    /// Output never waits longer than this for its cut to begin, whatever the ceiling says.
    pub latency_target: Option<Micros>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            gap_min: Micros::ZERO,
            interval_max: Micros::from_millis(50),
            interval_ceiling: Micros::from_millis(250),
            overhead_permille: 250,
            overload: Overload::Throttle,
            latency_target: None,
        }
    }
}

/// The schedule of one mirrored VM.
#[derive(Clone, Debug)]
pub struct Schedule {
    policy: Policy,
    /// When the guest last began to run.
    resumed_at: Micros,
    /// Since when it has run without being held back.
    runs_since: Micros,
    /// Since when output of the running epoch waits.
    output_since: Option<Micros>,
    pressure: bool,
    /// Wanted CPU of the guest, per mille.
    busy_permille: u16,
    /// Core time a cut takes from the guest besides its pause.
    crowding: Micros,
    /// All vCPUs have been seen waiting since output waits.
    idle: bool,
    /// Until when a cut would only wait behind what is on the lane.
    link_free_at: Micros,
    /// By when the epoch is as large as the links carry.
    cut_by: Option<Micros>,
    /// Credit in ns of lost CPU; negative is debt.
    credit_ns: i64,
    credited_at: Micros,
}

/// Nanoseconds of credit that `time` at `permille` earns.
fn earned_ns(time: Micros, permille: u16) -> i64 {
    // 1 µs at 1 ‰ is 1 ns.
    i64::try_from(time.0.saturating_mul(u64::from(permille))).unwrap_or(i64::MAX)
}

impl Schedule {
    /// A schedule whose guest runs since `now`. Until told otherwise the guest counts as busy.
    #[must_use]
    pub const fn new(policy: Policy, now: Micros) -> Self {
        Self {
            policy,
            resumed_at: now,
            runs_since: now,
            output_since: None,
            pressure: false,
            busy_permille: 1000,
            crowding: Micros::ZERO,
            idle: false,
            link_free_at: Micros::ZERO,
            cut_by: None,
            credit_ns: 0,
            credited_at: now,
        }
    }

    /// Change the policy; it holds from the next cut on.
    pub const fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// Output of the running epoch waits.
    pub fn output_waiting(&mut self, now: Micros) {
        self.output_since.get_or_insert(now);
    }

    /// A buffer nears its limit: cut as soon as may be.
    pub const fn pressure(&mut self) {
        self.pressure = true;
    }

    /// How the links stand: until when a cut would only wait behind what is on the lane
    /// already, and by when the running epoch is as large as they carry.
    pub const fn links(&mut self, free_at: Micros, cut_by: Option<Micros>) {
        self.link_free_at = free_at;
        self.cut_by = cut_by;
    }

    /// The guest was held back and runs again since `now`.
    pub fn let_go(&mut self, now: Micros) {
        self.runs_since = now;
    }

    /// What the busiest vCPU wanted per mille of the time it was allowed to run, and how
    /// long each cut's work made it wait for a core.
    pub fn guest_busy(&mut self, permille: u16, crowding: Micros) {
        self.busy_permille = permille.min(1000);
        self.crowding = crowding;
    }

    /// No vCPU has anything to do at this moment: if output waits, a cut costs nothing now.
    pub const fn guest_idle(&mut self) {
        self.idle = self.output_since.is_some();
    }

    /// Whether output waits for credit at `now`, so that [`Self::guest_idle`] would help.
    #[must_use]
    pub fn awaits_idle(&self, now: Micros) -> bool {
        self.output_since.is_some() && now < self.next_cut() && self.runs_since + RUN_MIN <= now
    }

    /// A cut has been asked for: what waits, waits for it, and later output for the next.
    pub const fn cut_begun(&mut self) {
        self.output_since = None;
        self.pressure = false;
    }

    /// The cut is done, the guest runs again since `now`.
    pub fn cut_done(&mut self, now: Micros, pause: Micros, pages: u64) {
        self.accrue(now);
        let lost = match self.idle {
            true => 0,
            false => {
                earned_ns(pause, self.busy_permille).saturating_add(earned_ns(self.crowding, 1000))
            }
        };
        self.idle = false;
        let faults = i64::try_from(pages.saturating_mul(PAGE_FAULT_NS)).unwrap_or(i64::MAX);
        let floor = -earned_ns(DEBT_WINDOW, self.policy.overhead_permille);
        self.credit_ns = self
            .credit_ns
            .saturating_sub(lost)
            .saturating_sub(faults)
            .max(floor);
        self.resumed_at = now;
        self.runs_since = now;
    }

    /// The cut failed and the guest runs again since `now`; what waited still waits.
    pub fn cut_failed(&mut self, now: Micros) {
        self.output_since.get_or_insert(now);
        self.idle = false;
        self.resumed_at = now;
        self.runs_since = now;
    }

    /// When the next cut may and should begin, as far as is known now. May be past.
    #[must_use]
    pub fn next_cut(&self) -> Micros {
        let least = self.runs_since + RUN_MIN;
        if self.pressure {
            return least;
        }
        let at = self.wanted_cut();
        self.cut_by.map_or(at, |by| at.min(by.max(least)))
    }

    /// The next cut, were the links no limit to the size of an epoch.
    fn wanted_cut(&self) -> Micros {
        let gap = (self.resumed_at + self.policy.gap_min).max(self.runs_since + RUN_MIN);
        let free = self
            .link_free_at
            .min(self.resumed_at + self.policy.interval_ceiling);
        let earliest = gap.max(free);
        if self.idle {
            return earliest;
        }
        let idle = self.resumed_at + self.policy.interval_max;
        let wanted = self.output_since.map_or(idle, |since| since.min(idle));
        let mut limit = self.resumed_at + self.policy.interval_ceiling;
        if let (Some(since), Some(target)) = (self.output_since, self.policy.latency_target) {
            limit = limit.min(since + target);
        }
        wanted.max(self.affordable_at()).min(limit).max(earliest)
    }

    /// When the debt will be paid.
    fn affordable_at(&self) -> Micros {
        let Ok(debt) = u64::try_from(-self.credit_ns) else {
            return Micros::ZERO;
        };
        let rate = u64::from(self.policy.overhead_permille.max(1));
        self.credited_at + Micros(debt.div_ceil(rate))
    }

    /// What the times of later cuts depend on, for [`super::model`], whose cuts cost nothing:
    /// no debt is ever made, so credit is left out.
    #[cfg(test)]
    pub(super) fn view(&self, now: Micros, into: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        let Self {
            policy,
            resumed_at,
            runs_since,
            output_since,
            pressure,
            busy_permille: _,
            crowding: _,
            idle,
            link_free_at,
            cut_by,
            credit_ns: _,
            credited_at: _,
        } = self;
        let long = policy.interval_ceiling;
        (
            now.since(*resumed_at).min(long),
            now.since(*runs_since).min(long),
        )
            .hash(into);
        output_since.map(|at| now.since(at).min(long)).hash(into);
        (*pressure, *idle, link_free_at.since(now)).hash(into);
        cut_by.map(|at| at.since(now)).hash(into);
    }

    fn accrue(&mut self, now: Micros) {
        let rate = self.policy.overhead_permille;
        let cap = earned_ns(CREDIT_WINDOW, rate);
        let earned = earned_ns(now.since(self.credited_at), rate);
        self.credit_ns = self.credit_ns.saturating_add(earned).min(cap);
        self.credited_at = self.credited_at.max(now);
    }
}

const _: () = assert!(RUN_MIN.0 < CREDIT_WINDOW.0 && CREDIT_WINDOW.0 < DEBT_WINDOW.0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_holds_output_and_idle_cuts_back_but_not_pressure() {
        let policy = Policy {
            gap_min: Micros::from_millis(8),
            ..Policy::default()
        };
        let mut schedule = Schedule::new(policy, Micros::ZERO);
        schedule.output_waiting(Micros::from_millis(1));
        assert_eq!(schedule.next_cut(), Micros::from_millis(8));
        schedule.pressure();
        assert_eq!(schedule.next_cut(), RUN_MIN);
    }

    /// Pause of a small guest (QEMU.md section 1: 2.6 ms with the fattest devices) and commit.
    const PAUSE: Micros = Micros(2000);
    const COMMIT: Micros = Micros(1000);
    const SECOND: u64 = 1_000_000;

    struct Outcome {
        cuts: u64,
        paused: u64,
        /// From output to its commit, worst and sum.
        worst: u64,
        sum: u64,
        answers: u64,
    }

    /// One simulated second of a guest: `output(t)` tells whether one appears in µs `t`.
    fn run(policy: Policy, busy: u16, pages: u64, mut output: impl FnMut(u64) -> bool) -> Outcome {
        let mut schedule = Schedule::new(policy, Micros::ZERO);
        let mut out = Outcome {
            cuts: 0,
            paused: 0,
            worst: 0,
            sum: 0,
            answers: 0,
        };
        let mut waiting: Vec<u64> = Vec::new();
        let (mut t, mut committed_at) = (0u64, 0u64);
        while t < SECOND {
            if output(t) {
                schedule.output_waiting(Micros(t));
                waiting.push(t);
            }
            if t >= committed_at && schedule.next_cut() <= Micros(t) {
                schedule.cut_begun();
                t += PAUSE.0;
                schedule.guest_busy(busy, Micros::ZERO);
                schedule.cut_done(Micros(t), PAUSE, pages);
                committed_at = t + COMMIT.0;
                out.cuts += 1;
                out.paused += PAUSE.0;
                for since in waiting.drain(..) {
                    out.answers += 1;
                    out.sum += committed_at - since;
                    out.worst = out.worst.max(committed_at - since);
                }
            }
            t += 50;
        }
        out
    }

    #[test]
    fn an_idle_guest_answering_one_client_is_cut_at_once() {
        // One request every 5 ms, 5 % busy: pause + commit, and no gap on top.
        let out = run(Policy::default(), 50, 60, |t| t % 5000 == 0 && t > 0);
        assert!(out.answers > 150, "{}", out.answers);
        assert!(
            out.sum / out.answers <= 3300,
            "mean {}",
            out.sum / out.answers
        );
        assert!(out.worst <= 4000, "worst {}", out.worst);
    }

    #[test]
    fn saturated_output_keeps_most_of_its_cpu() {
        let out = run(Policy::default(), 1000, 300, |t| t % 100 == 0);
        assert!(out.paused <= SECOND * 26 / 100, "paused {}", out.paused);
        assert!(
            out.cuts >= 50,
            "and is not left waiting either: {} cuts",
            out.cuts
        );
    }

    #[test]
    fn a_cpu_bound_guest_without_output_is_cut_at_the_interval() {
        let out = run(Policy::default(), 1000, 1000, |_| false);
        assert!((15..=20).contains(&out.cuts), "{} cuts", out.cuts);
    }

    #[test]
    fn a_flat_out_writer_is_stretched_but_not_for_ever() {
        let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
        schedule.cut_done(Micros(100_000), Micros(60_000), 200_000);
        let next = schedule.next_cut();
        assert!(
            next > Micros(150_000) && next <= Micros(350_000),
            "{next:?}"
        );
    }

    #[test]
    fn the_latency_target_beats_the_ceiling() {
        let policy = Policy {
            latency_target: Some(Micros(1000)),
            ..Policy::default()
        };
        let free = run(policy, 1000, 300, |t| t % 100 == 0);
        let held = run(Policy::default(), 1000, 300, |t| t % 100 == 0);
        assert!(
            free.cuts > 2 * held.cuts,
            "{} against {}",
            free.cuts,
            held.cuts
        );
        assert!(free.worst <= 6500, "{}", free.worst);
    }

    #[test]
    fn pressure_cuts_as_soon_as_the_guest_has_run_at_all() {
        let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
        schedule.cut_done(Micros(10_000), Micros(5000), 5000);
        schedule.pressure();
        assert_eq!(schedule.next_cut(), Micros(10_000) + RUN_MIN);
    }

    #[test]
    fn a_guest_in_debt_is_cut_the_moment_it_has_nothing_to_do() {
        let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
        let resumed = Micros(10_000);
        schedule.cut_done(resumed, Micros(20_000), 0);
        let soon = resumed + RUN_MIN;
        // Idle without output is no reason for a cut.
        schedule.guest_idle();
        assert!(!schedule.awaits_idle(soon) && schedule.next_cut() > soon);
        schedule.output_waiting(resumed);
        assert!(schedule.awaits_idle(soon) && schedule.next_cut() > soon);
        schedule.guest_idle();
        assert_eq!(schedule.next_cut(), soon);
        // It was free, and it counts once.
        schedule.cut_begun();
        let debt = schedule.affordable_at();
        schedule.cut_done(Micros(12_000), Micros(1000), 0);
        assert_eq!(schedule.affordable_at(), debt);
        schedule.output_waiting(Micros(12_000));
        assert!(schedule.next_cut() > Micros(12_000) + RUN_MIN);
    }

    #[test]
    fn a_guest_that_is_kept_from_its_core_pays_for_that_too() {
        let next = |crowding| {
            let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
            schedule.guest_busy(1000, crowding);
            schedule.cut_done(Micros(100), Micros(1000), 0);
            schedule.output_waiting(Micros(100));
            schedule.next_cut()
        };
        let (alone, crowded) = (next(Micros::ZERO), next(Micros(2000)));
        assert!(
            crowded >= alone + Micros(2000 * 4 - 100),
            "{alone:?} {crowded:?}"
        );
    }

    #[test]
    fn a_lane_that_is_behind_puts_off_the_cut_and_slow_links_bring_it_forward() {
        let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
        schedule.guest_busy(0, Micros::ZERO);
        schedule.output_waiting(Micros(100));
        assert_eq!(schedule.next_cut(), RUN_MIN);
        // What waits there would leave first; this epoch may as well grow meanwhile.
        schedule.links(Micros(30_000), None);
        assert_eq!(schedule.next_cut(), Micros(30_000));
        schedule.guest_idle();
        assert_eq!(schedule.next_cut(), Micros(30_000));
        // Not without end, and not against a buffer that fills up.
        schedule.links(Micros::MAX, None);
        assert_eq!(schedule.next_cut(), Policy::default().interval_ceiling);
        schedule.links(Micros(30_000), Some(Micros(7_000)));
        assert_eq!(schedule.next_cut(), Micros(7_000));
        schedule.links(Micros(30_000), Some(Micros::ZERO));
        assert_eq!(schedule.next_cut(), RUN_MIN);
        schedule.links(Micros(30_000), None);
        schedule.pressure();
        assert_eq!(schedule.next_cut(), RUN_MIN);
        // Without output the interval ends as ever.
        let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
        schedule.links(Micros(30_000), None);
        assert_eq!(schedule.next_cut(), Policy::default().interval_max);
        schedule.links(Micros(80_000), None);
        assert_eq!(schedule.next_cut(), Micros(80_000));
        // A guest that was held back runs all the same before it is cut.
        schedule.let_go(Micros(90_000));
        schedule.links(Micros::ZERO, Some(Micros(20_000)));
        assert_eq!(schedule.next_cut(), Micros(90_000) + RUN_MIN);
    }

    #[test]
    fn output_of_a_failed_cut_still_waits() {
        let mut schedule = Schedule::new(Policy::default(), Micros::ZERO);
        schedule.guest_busy(0, Micros::ZERO);
        schedule.output_waiting(Micros(1000));
        schedule.cut_begun();
        schedule.cut_failed(Micros(3000));
        assert!(schedule.next_cut() <= Micros(3000) + RUN_MIN);
    }
}
