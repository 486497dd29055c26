//! Many seeds hold, and each bug put back on purpose is found.
//!
//! `POLLUX_SEEDS` sets how many seeds, `POLLUX_SEED` replays one.

use super::{Report, run};
use crate::mirror::sabotage::{Bug, with_bug};

/// Some hundreds; `make soak` asks for 10,000.
const SEEDS_DEFAULT: u64 = 300;

/// Within so many seeds every bug must show.
const SEEDS_TO_FIND_A_BUG: u64 = 2000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

#[test]
fn the_invariants_hold_for_every_seed() {
    if let Some(seed) = number("POLLUX_SEED") {
        let report = run(seed).unwrap_or_else(|violation| panic!("{violation}"));
        println!("{report:?}");
        return;
    }
    let seeds = number("POLLUX_SEEDS").unwrap_or(SEEDS_DEFAULT);
    let mut all = Report::default();
    for seed in 0..seeds {
        let one = run(seed).unwrap_or_else(|violation| panic!("{violation}"));
        all.events += one.events;
        all.cuts += one.cuts;
        all.promotions += one.promotions;
        all.solos += one.solos;
        all.holds += one.holds;
        all.answers += one.answers;
        all.faults += one.faults;
        all.restarts += one.restarts;
    }
    println!("{seeds} seeds: {all:?}");
    assert!(
        all.promotions > seeds / 2
            && all.solos > seeds / 2
            && all.holds > seeds
            && all.cuts > 50 * seeds,
        "{all:?}"
    );
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..5 {
        assert_eq!(run(seed), run(seed));
    }
}

#[test]
fn every_bug_put_back_is_found() {
    let found: Vec<(Bug, Option<(u64, &str)>)> = [
        Bug::ReleaseBeforeAck,
        Bug::AckBeforeWhole,
        Bug::PromoteWithoutClaim,
        Bug::SoloWithoutClaim,
        Bug::GenerationNotCompared,
        Bug::StaleAckAccepted,
        Bug::PromoteBeforeApply,
        Bug::DismissBeforeCommit,
        Bug::UnknownIsWon,
        Bug::ReleaseBeforeConfirm,
        Bug::NeverHeldBack,
    ]
    .into_iter()
    .map(|bug| {
        let hit = (0..SEEDS_TO_FIND_A_BUG).find_map(|seed| {
            with_bug(bug, || run(seed))
                .err()
                .map(|violation| (seed, violation.invariant))
        });
        (bug, hit)
    })
    .collect();
    println!("{found:?}");
    assert!(found.iter().all(|(_, hit)| hit.is_some()), "{found:?}");
}
