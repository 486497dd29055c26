//! Single private links in a drill: what is done to them, what was seen, what it means.
//! Pure.
//!
//! The failure of one link of several is none to the guest: the VM stays where it is and
//! mirrored in the same generation (a new attempt to mirror would have a new one), and its
//! clients notice a delay of some epochs at most.

use super::checks::silent_since;
use super::env::{EventView, LinkHarm, Quantiles, VmView};
use super::log::ClientLog;
use super::report::RunFacts;
use super::stats::{Rng, micros};
use super::{DrillKind, MonotonicNs};
use serde::Serialize;
use std::time::Duration;

/// How many states and events are named in a failure.
const NAMED_MAX: usize = 8;

/// What is done to a link in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkPlan {
    /// Which link, from 0.
    pub link: u8,
    /// What.
    pub harm: LinkHarm,
    /// For how long.
    pub length: Duration,
    /// After the moment of the run, or after the link before it is back.
    pub after: Duration,
}

impl LinkPlan {
    /// One link of `links`, cut in one of the ways.
    fn cut(links: u8, rng: &mut Rng, length: (Duration, Duration)) -> Self {
        let pick = |rng: &mut Rng, of: u64| u8::try_from(rng.next_u64() % of.max(1)).unwrap_or(0);
        Self {
            link: pick(rng, links.into()),
            harm: match pick(rng, 2) {
                0 => LinkHarm::Silent,
                _ => LinkHarm::Unplugged,
            },
            length: rng.duration(length.0, length.1),
            after: Duration::ZERO,
        }
    }

    /// What one run of this kind does, by the seed: one link, or one and then another.
    #[must_use]
    pub fn of_run(
        kind: DrillKind,
        links: u8,
        rng: &mut Rng,
        length: (Duration, Duration),
    ) -> Vec<Self> {
        let first = Self::cut(links, rng, length);
        match kind {
            DrillKind::SlowLink => vec![Self {
                harm: LinkHarm::Slow,
                ..first
            }],
            DrillKind::CutOneLink if rng.next_u64().is_multiple_of(2) => {
                let other = Self::cut(links.saturating_sub(1), rng, length);
                let link = (first.link + 1 + other.link) % links.max(1);
                let after = rng.duration(Duration::ZERO, length.1);
                vec![
                    first,
                    Self {
                        link,
                        after,
                        ..other
                    },
                ]
            }
            _ => vec![first],
        }
    }

    /// A cut at a random moment of `calm`, for a failure that is to meet a pair with a
    /// link less; it lasts until the repair.
    #[must_use]
    pub fn before_failure(links: u8, rng: &mut Rng, calm: Duration) -> Self {
        Self {
            after: rng.duration(Duration::ZERO, calm),
            ..Self::cut(links, rng, (Duration::ZERO, Duration::ZERO))
        }
    }
}

/// What was seen of a link's harm.
#[derive(Clone, Debug)]
pub struct LinkFacts {
    /// What was done.
    pub plan: LinkPlan,
    /// It took effect.
    pub from_ns: MonotonicNs,
    /// It was undone.
    pub healed_ns: MonotonicNs,
    /// Both hosts said that the link carries again; none if they did not in time.
    pub back_ns: Option<MonotonicNs>,
    /// Whether the hosts told of single links at all.
    pub told: bool,
    /// Replication lag seen from the harm until the link was back, microseconds.
    pub lag_us: Vec<u64>,
    /// Resume to commit as the primary told it, just before and at the end.
    pub commit: (Quantiles, Quantiles),
    /// States other than mirrored that were seen.
    pub strayed: Vec<String>,
}

/// A link's harm, measured.
#[derive(Clone, Debug, Serialize)]
pub struct LinkReport {
    /// Which link, from 0.
    pub link: u8,
    /// What was done to it.
    pub harm: LinkHarm,
    /// For how long.
    pub harmed_us: u64,
    /// From its repair until both hosts said that it carries again.
    pub back_us: Option<u64>,
    /// Replication lag from the harm until the link was back.
    pub lag: Quantiles,
    /// Resume to commit before: half of the epochs were faster.
    pub epoch_usual_us: u64,
    /// Resume to commit of the slowest epoch while the link was harmed; none if one before
    /// was slower yet.
    pub epoch_worst_us: Option<u64>,
}

impl LinkFacts {
    /// Measured.
    #[must_use]
    pub fn report(&self) -> LinkReport {
        let (before, after) = self.commit;
        LinkReport {
            link: self.plan.link,
            harm: self.plan.harm,
            harmed_us: micros(self.healed_ns.since(self.from_ns)),
            back_us: self.back_ns.map(|at| micros(at.since(self.healed_ns))),
            lag: super::stats::quantiles(self.lag_us.clone()),
            epoch_usual_us: before.p50_us,
            epoch_worst_us: (after.max_us > before.max_us).then_some(after.max_us),
        }
    }

    /// What became of the link itself.
    fn failure(&self) -> Option<String> {
        let link = self.plan.link;
        if !self.told {
            Some("the hosts do not tell how single links stand".into())
        } else if self.back_ns.is_none() {
            Some(format!("link {link} was not taken back after its repair"))
        } else {
            None
        }
    }
}

/// Why a run in which the VM should have stayed mirrored is not good; empty if it is.
#[must_use]
pub fn judge(facts: &RunFacts, log: &ClientLog) -> Vec<String> {
    let mut failures = facts.trouble.clone();
    let Some(after) = &facts.after else {
        failures.push("no host tells about the VM".into());
        return failures;
    };
    let before = &facts.before;
    if after.host != before.host {
        failures.push(format!(
            "the VM moved from host `{}` to `{}`",
            before.host, after.host
        ));
    }
    let mut strayed: Vec<&str> = Vec::new();
    for state in facts.links.iter().flat_map(|l| &l.strayed) {
        if !strayed.contains(&state.as_str()) {
            strayed.push(state);
        }
    }
    let anew = after.generation != before.generation;
    if anew || !strayed.is_empty() || !after.mirrored {
        let how = if anew {
            format!(
                "mirrored anew, generation {} before and {} after",
                before.generation, after.generation
            )
        } else {
            format!("generation {} throughout", before.generation)
        };
        failures.push(format!(
            "the VM did not stay mirrored: {how}; seen {}; what happened: {}",
            listed(strayed.into_iter()),
            listed(since(after, facts.injected_ns).map(|e| e.text.as_str())),
        ));
    }
    failures.extend(facts.links.iter().filter_map(LinkFacts::failure));
    let healed = facts
        .links
        .last()
        .map_or(facts.injected_ns, |l| l.healed_ns);
    let silent = silent_since(&log.answers, log.clients, healed);
    if silent > 0 {
        failures.push(format!(
            "{silent} of {} clients got no answer after the repair",
            log.clients
        ));
    }
    failures
}

/// What happened to the VM from then on.
fn since(view: &VmView, from: MonotonicNs) -> impl Iterator<Item = &EventView> {
    view.events.iter().filter(move |e| e.at_ns >= from)
}

fn listed<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let words: Vec<&str> = words.collect();
    match words.len() {
        0 => "nothing".into(),
        n if n > NAMED_MAX => format!(
            "{}, and {} more",
            words[..NAMED_MAX].join(", "),
            n - NAMED_MAX
        ),
        _ => words.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_decides_which_link_how_and_how_long() {
        let length = (Duration::from_millis(100), Duration::from_millis(900));
        let of = |kind, links, seed| LinkPlan::of_run(kind, links, &mut Rng::new(seed), length);
        let mut seen = BTreeSet::new();
        let mut doubles = 0;
        for seed in 0..200 {
            let plans = of(DrillKind::CutOneLink, 3, seed);
            assert_eq!(plans, of(DrillKind::CutOneLink, 3, seed));
            for plan in &plans {
                assert!(plan.link < 3 && (length.0..length.1).contains(&plan.length));
                seen.insert((plan.link, plan.harm == LinkHarm::Silent));
            }
            if let [first, second] = plans[..] {
                doubles += 1;
                assert_ne!(first.link, second.link);
            }
            let slow = of(DrillKind::SlowLink, 2, seed);
            assert!(slow.len() == 1 && slow[0].harm == LinkHarm::Slow);
        }
        assert_eq!(seen.len(), 6, "every link, both ways");
        assert!((60..140).contains(&doubles), "{doubles}");
        let calm = Duration::from_millis(50);
        let before = LinkPlan::before_failure(2, &mut Rng::new(3), calm);
        assert!(before.after < calm && before.harm != LinkHarm::Slow);
    }

    #[test]
    fn long_lists_are_cut_short() {
        assert_eq!(listed([].into_iter()), "nothing");
        assert_eq!(listed(["solo"].into_iter()), "solo");
        let many: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        assert!(listed(many.iter().map(String::as_str)).ends_with("7, and 12 more"));
    }
}
