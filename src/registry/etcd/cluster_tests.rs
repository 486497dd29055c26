//! Three members of etcd, the leader of which loses power.

use super::testbed::{Cluster, PATIENCE, until};
use super::{
    CasOutcome, EtcdChange, EtcdOptions, EtcdRegistry, Registry, RegistryError, Revision, Space,
    Versioned,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Writers that compete for one key.
const WRITERS: u64 = 3;

/// What the cluster was doing, for the judgement of unknown outcomes. Even: all was well.
const WHOLE: u32 = 0;
const LEADER_KILLED: u32 = 1;
const TWO_OF_THREE: u32 = 2;
const COMING_BACK: u32 = 3;
const WHOLE_AGAIN: u32 = 4;

/// How to reach the members, whether they run or not.
struct Ways {
    options: EtcdOptions,
    handle: tokio::runtime::Handle,
}

impl Ways {
    fn of(cluster: &Cluster) -> Self {
        Self {
            options: cluster.options(&[0, 1, 2]),
            handle: cluster.runtime.handle().clone(),
        }
    }

    fn open_at(&self, members: &[usize]) -> EtcdRegistry {
        let urls = members.iter().map(|n| self.options.endpoints[*n].clone());
        let options = EtcdOptions {
            endpoints: urls.collect(),
            ..self.options.clone()
        };
        EtcdRegistry::new(&options, self.handle.clone()).unwrap()
    }
}

struct Attempt {
    /// No two attempts write the same.
    value: Vec<u8>,
    outcome: Result<u64, Unknown>,
}

/// The phases in which an attempt with an unknown outcome began and ended, and what was said.
struct Unknown {
    began: u32,
    ended: u32,
    why: String,
}

/// What all threads of the test look at.
struct Watched {
    phase: AtomicU32,
    stop: AtomicBool,
    /// The highest version known to be won.
    won: AtomicU64,
}

/// Compare and set "k" again and again until told to stop.
fn write(ways: &Ways, writer: u64, watched: &Watched) -> Vec<Attempt> {
    // Each begins with another member, so that one is connected to the leader.
    let first = usize::try_from(writer).unwrap();
    let members = [first % 3, (first + 1) % 3, (first + 2) % 3];
    let mut registry = ways.open_at(&members);
    let mut attempts = Vec::new();
    let mut n: u64 = 0;
    let mut expected = None;
    while !watched.stop.load(Ordering::SeqCst) {
        n += 1;
        let value = format!("{writer}/{n}").into_bytes();
        let began = watched.phase.load(Ordering::SeqCst);
        let outcome = registry.compare_and_set("k", expected, &value);
        let ended = watched.phase.load(Ordering::SeqCst);
        match outcome {
            Ok(CasOutcome::Won { version }) => {
                watched.won.fetch_max(version, Ordering::SeqCst);
                expected = Some(version);
                let outcome = Ok(version);
                attempts.push(Attempt { value, outcome });
            }
            Ok(CasOutcome::Lost(found)) => expected = found.map(|found| found.version),
            Err(RegistryError::NotDone { .. }) => {}
            Err(e @ RegistryError::Unknown { .. }) => {
                let why = e.to_string();
                let outcome = Err(Unknown { began, ended, why });
                attempts.push(Attempt { value, outcome });
            }
        }
    }
    attempts
}

/// Read "k" again and again; every version seen with its value.
fn read(ways: &Ways, watched: &Watched) -> BTreeMap<u64, Vec<u8>> {
    let mut registry = ways.open_at(&[0, 1, 2]);
    let mut seen = BTreeMap::new();
    while !watched.stop.load(Ordering::SeqCst) {
        let won = watched.won.load(Ordering::SeqCst);
        let Ok(found) = registry.read("k") else {
            continue; // No answer is no wrong answer.
        };
        let Versioned { version, value } = found.unwrap_or(Versioned {
            version: 0,
            value: Vec::new(),
        });
        assert!(version >= won, "read {version} after {won} was won");
        if let Some((last, _)) = seen.last_key_value() {
            assert!(version >= *last, "read {version} after {last}");
        }
        let before = seen.insert(version, value.clone());
        assert!(
            before.is_none_or(|before| before == value),
            "{version} changed"
        );
    }
    seen
}

#[test]
fn nothing_is_lost_or_won_twice_when_the_leader_dies_and_comes_back() {
    let mut cluster = Cluster::start(3);
    let watched = Watched {
        phase: AtomicU32::new(WHOLE),
        stop: AtomicBool::new(false),
        won: AtomicU64::new(0),
    };
    let progress = |by: u64| {
        let from = watched.won.load(Ordering::SeqCst);
        until("progress", || {
            (watched.won.load(Ordering::SeqCst) >= from + by).then_some(())
        });
    };
    let phase = |phase| watched.phase.store(phase, Ordering::SeqCst);
    // Terms at the beginning and the end of the quiet phases: an election in between that
    // nobody asked for makes outcomes unknown too.
    let mut quiet = BTreeSet::new();
    let (leader, term) = cluster.leader();

    // The threads borrow the cluster's addresses only; its members change under them.
    let ways = Ways::of(&cluster);
    let (attempts, seen) = std::thread::scope(|scope| {
        // A failed assertion here must end the threads, or nobody would ever hear of it.
        let _stop = StopOnDrop(&watched.stop);
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let (ways, watched) = (&ways, &watched);
                scope.spawn(move || write(ways, n, watched))
            })
            .collect();
        let reader = scope.spawn(|| read(&ways, &watched));
        progress(50);
        if cluster.leader().1 == term {
            quiet.insert(WHOLE);
        }

        phase(LEADER_KILLED);
        cluster.kill(leader);
        let (other, term) = cluster.leader();
        assert_ne!(other, leader);
        phase(TWO_OF_THREE);
        progress(50);
        if cluster.leader().1 == term {
            quiet.insert(TWO_OF_THREE);
        }

        phase(COMING_BACK);
        cluster.run(leader);
        cluster.wait_ready(leader);
        let (_, term) = cluster.leader();
        phase(WHOLE_AGAIN);
        progress(50);
        if cluster.leader().1 == term {
            quiet.insert(WHOLE_AGAIN);
        }
        watched.stop.store(true, Ordering::SeqCst);
        let attempts: Vec<_> = writers
            .into_iter()
            .flat_map(|w| w.join().unwrap())
            .collect();
        (attempts, reader.join().unwrap())
    });

    let mut winners = BTreeMap::new();
    let mut unknown = BTreeSet::new();
    for Attempt { value, outcome } in attempts {
        match outcome {
            Ok(version) => {
                let other = winners.insert(version, value);
                assert!(other.is_none(), "version {version} was won twice");
            }
            Err(Unknown { began, ended, why }) => {
                let all_was_well = began == ended && quiet.contains(&began);
                assert!(!all_was_well, "in phase {began}: {why}");
                unknown.insert(value);
            }
        }
    }
    // The whole history, from the member that was away.
    let mut back = cluster.open_at(&[leader]);
    let end = back.read("k").unwrap().unwrap();
    let mut history = BTreeMap::new();
    let mut watch = back.watch_from(Space::Keys, "k", Revision(1));
    while !history.contains_key(&end.version) {
        for event in watch.next(PATIENCE).unwrap() {
            let EtcdChange::Put(entry) = event.change else {
                panic!("{event:?}");
            };
            history.insert(entry.version, entry.value);
        }
    }
    assert_eq!(history.len() as u64, end.version, "a version is missing");
    for (version, value) in &winners {
        assert_eq!(history.get(version), Some(value), "{version} was lost");
    }
    for (version, value) in &history {
        assert!(
            winners.contains_key(version) || unknown.contains(value),
            "nobody wrote version {version}"
        );
    }
    for (version, value) in seen.iter().filter(|(version, _)| **version > 0) {
        assert_eq!(history.get(version), Some(value), "{version} was never so");
    }
    println!(
        "{} won, {} unknown, {} versions, {} of them read, quiet phases {quiet:?}",
        winners.len(),
        unknown.len(),
        history.len(),
        seen.len()
    );
}

#[test]
fn a_watch_goes_on_over_a_change_of_leader() {
    let mut cluster = Cluster::start(3);
    let (leader, _) = cluster.leader();
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    let mut writer = cluster.open_at(&others);
    // The watch begins with the member that will die.
    let mut watch =
        cluster
            .open_at(&[leader, others[0], others[1]])
            .watch_from(Space::Keys, "k", Revision(1));
    let mut told = Vec::new();
    let mut version = 0;
    for round in 0..2 {
        for _ in 0..10 {
            let expected = Some(version).filter(|v| *v > 0);
            // Elections make outcomes unknown; the value is the version, so reading tells.
            let value = (version + 1).to_string();
            until("a won write", || {
                match writer.compare_and_set("k", expected, value.as_bytes()) {
                    Ok(CasOutcome::Won { .. }) => Some(()),
                    Ok(CasOutcome::Lost(found)) => {
                        assert_eq!(found.unwrap().version, version + 1);
                        Some(())
                    }
                    Err(_) => None,
                }
            });
            version += 1;
        }
        while told.last() != Some(&version) {
            for event in watch.next(PATIENCE).unwrap() {
                let EtcdChange::Put(entry) = event.change else {
                    panic!("{event:?}");
                };
                assert_eq!(entry.value, entry.version.to_string().into_bytes());
                told.push(entry.version);
            }
        }
        if round == 0 {
            cluster.kill(leader);
        }
    }
    assert_eq!(told, (1..=20).collect::<Vec<_>>());
}

#[test]
fn without_a_majority_nothing_is_answered_and_nothing_done() {
    let mut cluster = Cluster::start(3);
    let mut options = cluster.options(&[0, 1, 2]);
    let mut registry = cluster.open_with(&options);
    registry.compare_and_set("k", None, b"v").unwrap();
    let mut watch = cluster
        .open_at(&[0])
        .watch_from(Space::Keys, "", Revision(1));
    assert_eq!(watch.next(PATIENCE).unwrap().len(), 1);
    cluster.kill(1);
    cluster.kill(2);
    until("the loss of the leader", || {
        cluster.status(0).filter(|status| status.leader == 0)
    });
    options.deadline = Duration::from_secs(1);
    let mut hurried = cluster.open_with(&options);
    // On a busy machine a refusal may come after the deadline; then it is not known.
    until("a refusal", || {
        let error = hurried.compare_and_set("k", Some(1), b"w").unwrap_err();
        let known = matches!(error, RegistryError::NotDone { .. });
        (known && error.to_string().contains("no leader")).then_some(())
    });
    until("a refusal", || {
        let error = hurried.read("k").unwrap_err();
        assert!(matches!(error, RegistryError::NotDone { .. }), "{error}");
        error.to_string().contains("no leader").then_some(())
    });
    // A stream of a member without a leader tells nothing and says so.
    until("the end of the stream", || {
        watch.next(Duration::from_millis(500)).err()
    });
    cluster.run(1);
    cluster.wait_ready(1);
    assert_eq!(
        registry.compare_and_set("k", Some(1), b"w").unwrap(),
        CasOutcome::Won { version: 2 }
    );
    assert_eq!(
        until("the next change", || watch.next(PATIENCE).ok()).len(),
        1
    );
}

/// Sets its flag when it goes, also by a panic.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
