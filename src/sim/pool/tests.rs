//! Every scenario file with a few seeds.

use super::{run_case, run_seeds};
use crate::ha::sabotage::{Bug, with_bug};
use crate::sim::scenario::Scenario;

/// Scenario files by name.
pub(super) fn scenarios() -> Vec<(String, Scenario)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "toml"))
        .collect();
    files.sort();
    let read = |path: std::path::PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let scenario = Scenario::parse(&text, &path.display().to_string()).unwrap();
        (name, scenario)
    };
    files.into_iter().map(read).collect()
}

#[test]
fn every_scenario_ends_as_it_says() {
    let mut cases = 0;
    for (file, scenario) in scenarios() {
        for case in &scenario.cases {
            // Half a minute each; `make soak` runs them.
            if case.hosts.1 > 16 || case.run.0 > 600_000 {
                continue;
            }
            let summary = run_seeds(case, 1, 3, |_| ());
            assert!(summary.is_good(), "{file}: {summary:#?}");
            cases += 1;
        }
    }
    assert!(cases > 10, "{cases}");
}

/// Faults of every kind on hosts that are reset by a watchdog, or switched off by an agent.
const RANDOM: &str = "\
about = \"x\"
[[case]]
name = \"watchdog\"
hosts = [2, 5]
random = { faults = 25, within = \"120 s\" }
[[case]]
name = \"fencing\"
hosts = [2, 5]
registry = \"etcd\"
fencing = \"1 s\"
random = { faults = 25, within = \"120 s\" }
[[case]]
name = \"switch dead, stalls\"
hosts = 4
stalls = \"2500 ms\"
events = [\"5 s: cut the management network of all\"]
run = \"120 s\"
[[case]]
name = \"registry lost, one cut off with it\"
hosts = 3
events = [\"5 s: take the registry from all\", \"15 s: cut a from all\", \"19 s: give the registry back to a\"]
run = \"60 s\"
[[case]]
name = \"registry lost, then faults\"
hosts = [3, 7]
events = [\"1 s: take the registry from all\"]
random = { faults = 15, within = \"60 s\" }
";

/// The seed within a thousand that finds the bug in any of the cases.
fn found(bug: Bug) -> Option<(String, u64)> {
    let mut cases = Scenario::parse(RANDOM, "random").unwrap().cases;
    let lost = scenarios()
        .into_iter()
        .find(|(name, _)| name == "registry-lost");
    cases.extend(lost.unwrap().1.cases);
    with_bug(bug, || {
        (1..=1000).find_map(|seed| {
            cases.iter().find_map(|case| {
                let (violation, _) = run_case(case, seed, false).err()?;
                Some((violation.invariant.to_owned(), seed))
            })
        })
    })
}

#[test]
#[ignore = "some hundred seeds, minutes: make soak"]
fn rare_bugs_put_back_are_found_within_a_thousand_seeds() {
    for bug in [
        Bug::WatchdogArmedLate,
        Bug::StallUnnoticed,
        Bug::WordAfterFarewell,
    ] {
        assert!(found(bug).is_some(), "{bug:?} is not found");
    }
}

#[test]
fn every_bug_put_back_is_found_within_a_thousand_seeds() {
    let mut missed = Vec::new();
    for bug in [
        Bug::FenceUnconfirmed,
        Bug::BoundWithoutLease,
        Bug::SilenceIsDeath,
        Bug::AnybodyDecides,
        Bug::FarewellTooSoon,
        Bug::PromiseBroken,
        Bug::PromiseWithoutEnd,
        Bug::JoinerDecides,
        Bug::OutlivesTooLate,
        Bug::PromiseForgotten,
        Bug::LongLease,
    ] {
        let found = found(bug);
        eprintln!("{bug:?}: {found:?}");
        if found.is_none() {
            missed.push(bug);
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
