//! Every scenario file with a few seeds.

use super::run_seeds;
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
            let seeds = if case.hosts.1 > 16 { 1 } else { 3 };
            let summary = run_seeds(case, 1, seeds, |_| ());
            assert!(summary.is_good(), "{file}: {summary:#?}");
            cases += 1;
        }
    }
    assert!(cases > 10, "{cases}");
}
