//! The registry's promises on real files: versions, races, interruptions.

use super::super::device::hook::{self, Op, Then};
use super::super::{OpenError, Statefile, StatefileOptions};
use super::{PATIENT, POOL, Set, kinds};
use crate::registry::{CasOutcome, Registry, RegistryError, Versioned};
use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

fn versioned(version: u64, value: &[u8]) -> Versioned<Vec<u8>> {
    Versioned {
        version,
        value: value.to_vec(),
    }
}

#[test]
fn a_key_is_created_once_raised_by_one_and_seen_by_every_host() {
    for disks in [1, 3] {
        let set = Set::new(disks);
        let (mut a, mut b) = (set.open(0), set.open(1));
        assert_eq!(a.read("vm/1").unwrap(), None);
        let lost = a.compare_and_set("vm/1", Some(1), b"x").unwrap();
        assert_eq!(lost, CasOutcome::Lost(None));
        let won = a.compare_and_set("vm/1", None, b"a").unwrap();
        assert_eq!(won, CasOutcome::Won { version: 1 });
        assert_eq!(b.read("vm/1").unwrap(), Some(versioned(1, b"a")));
        let lost = b.compare_and_set("vm/1", None, b"b").unwrap();
        assert_eq!(lost, CasOutcome::Lost(Some(versioned(1, b"a"))));
        let won = b.compare_and_set("vm/1", Some(1), b"b").unwrap();
        assert_eq!(won, CasOutcome::Won { version: 2 });
        b.compare_and_set("host/1", None, b"h").unwrap();
        let listed = a.list("vm/").unwrap();
        assert_eq!(listed, [("vm/1".to_owned(), versioned(2, b"b"))]);
        assert_eq!(kinds(&a), vec![None; usize::from(disks)]);
    }
}

#[test]
fn a_restarted_host_finds_what_it_wrote_and_goes_on() {
    let set = Set::new(3);
    for n in 0..5 {
        let mut host = set.open(2);
        let expected = Some(n).filter(|n| *n > 0);
        let won = host.compare_and_set("k", expected, &n.to_le_bytes());
        assert_eq!(won.unwrap(), CasOutcome::Won { version: n + 1 });
    }
    assert_eq!(set.open(0).read("k").unwrap().unwrap().version, 5);
}

/// Raise the counter `each` times; what this host's wins wrote.
fn count(host: &mut Statefile, each: u64) -> Vec<u64> {
    let mut won = Vec::new();
    while (won.len() as u64) < each {
        let old = host.read("n").unwrap();
        let n = old
            .as_ref()
            .map_or(0, |v| u64::from_le_bytes(v.value[..8].try_into().unwrap()));
        // The same bytes from every host: a win may not be told by what is there.
        let bytes = (n + 1).to_le_bytes();
        match host.compare_and_set("n", old.map(|v| v.version), &bytes) {
            Ok(CasOutcome::Won { version }) => {
                assert_eq!(version, n + 1);
                won.push(version);
            }
            Ok(CasOutcome::Lost(found)) => assert!(found.unwrap().version > n),
            Err(e) => panic!("{e}"),
        }
    }
    won
}

#[test]
fn hosts_that_race_lose_no_win_and_share_none() {
    const EACH: u64 = 15;
    for disks in [1, 3] {
        let set = Set::new(disks);
        let won: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let hosts: Vec<_> = (0..4)
                .map(|slot| {
                    let set = &set;
                    scope.spawn(move || count(&mut set.open(slot), EACH))
                })
                .collect();
            hosts.into_iter().map(|h| h.join().unwrap()).collect()
        });
        let all: HashSet<u64> = won.iter().flatten().copied().collect();
        assert_eq!(all, (1..=4 * EACH).collect(), "every version was won once");
        let end = set.open(0).read("n").unwrap().unwrap();
        assert_eq!(end, versioned(4 * EACH, &(4 * EACH).to_le_bytes()));
    }
}

/// One of the processes of the next test; does nothing when run by itself.
#[test]
fn process_that_races() {
    let (Ok(disks), Ok(slot)) = (
        std::env::var("STATEFILE_DISKS"),
        std::env::var("STATEFILE_SLOT"),
    ) else {
        return;
    };
    let slot: u16 = slot.parse().unwrap();
    let mut host = Statefile::open(StatefileOptions {
        disks: disks.split(',').map(PathBuf::from).collect(),
        pool: Some(POOL),
        slot: super::HostSlot(slot),
        name: format!("host{slot}"),
        take_slot: false,
        call_wait: PATIENT,
    })
    .unwrap();
    println!("won {:?}", count(&mut host, 10));
}

#[test]
fn processes_that_race_lose_no_win() {
    let set = Set::new(3);
    let paths: Vec<String> = set.disks.iter().map(|d| d.display().to_string()).collect();
    let children: Vec<_> = (0..3)
        .map(|slot: u16| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--nocapture"])
                .arg("registry::statefile::tests::registry::process_that_races")
                .env("STATEFILE_DISKS", paths.join(","))
                .env("STATEFILE_SLOT", slot.to_string())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("won ["), "{text}");
    }
    assert_eq!(set.open(3).read("n").unwrap().unwrap().version, 30);
}

/// A power cut: from the `n`th operation on, none gets through, on any disk.
fn cut_after(set: &Set, n: usize) -> Arc<AtomicUsize> {
    let done = Arc::new(AtomicUsize::new(0));
    for disk in &set.disks {
        let done = done.clone();
        hook::set(disk, move |_| {
            if done.fetch_add(1, Ordering::SeqCst) < n {
                Ok(Then::Go)
            } else {
                Err(io::Error::other("power cut by a test"))
            }
        });
    }
    done
}

#[test]
fn a_cut_after_any_operation_leaves_the_old_or_the_new_and_the_error_says_which() {
    for disks in [1, 3] {
        let mut seen = [0; 3];
        for n in 0..60 {
            let set = Set::new(disks);
            let mut host = set.open(0);
            host.compare_and_set("k", None, b"old").unwrap();
            let done = cut_after(&set, n);
            let result = host.compare_and_set("k", Some(1), b"new");
            let all_done = done.load(Ordering::SeqCst) <= n;
            host.shell.settle();
            drop(host);
            set.disks.iter().for_each(|disk| hook::clear(disk));
            // First another host, so that it is not the one that finishes its own work.
            let after = set.open(1).read("k").unwrap().unwrap();
            match &result {
                Ok(won) => {
                    assert_eq!(*won, CasOutcome::Won { version: 2 });
                    assert_eq!(after, versioned(2, b"new"), "after {n}");
                    seen[0] += 1;
                }
                Err(RegistryError::NotDone { .. }) => {
                    assert_eq!(after, versioned(1, b"old"), "after {n}: {result:?}");
                    seen[1] += 1;
                }
                Err(RegistryError::Unknown { .. }) => seen[2] += 1,
            }
            // The host's own read settles it for all; what others read before did not.
            let mut again = set.open(0);
            let settled = again.read("k").unwrap().unwrap();
            if !matches!(result, Err(RegistryError::Unknown { .. })) || after.version == 2 {
                assert_eq!(settled, after, "after {n}");
            }
            let after = set.open(1).read("k").unwrap().unwrap();
            assert_eq!(after, settled, "after {n}");
            let next = again.compare_and_set("k", Some(after.version), b"on");
            assert!(matches!(next.unwrap(), CasOutcome::Won { .. }));
            if all_done {
                break;
            }
        }
        assert!(seen.iter().all(|n| *n > 0), "{disks} disks: {seen:?}");
    }
}

/// Holds up every operation of a disk until it is opened.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

#[test]
fn a_hung_disk_of_three_holds_up_nobody_and_catches_up() {
    let set = Set::new(3);
    let mut host = set.open(0);
    host.compare_and_set("k", None, b"1").unwrap();
    let gate = Arc::new(Gate::default());
    let hung = gate.clone();
    hook::set(&set.disks[1], move |_| {
        hung.pass();
        Ok(Then::Go)
    });
    // With the patience of these tests each call would end long after the test did.
    let began = Instant::now();
    for version in 1..6 {
        let won = host.compare_and_set("k", Some(version), b"x").unwrap();
        assert_eq!(
            won,
            CasOutcome::Won {
                version: version + 1
            }
        );
    }
    assert!(began.elapsed() < PATIENT, "it waited for the hung disk");
    gate.open();
    host.shell.settle();
    // Now another one goes: what the first missed is put there first.
    hook::set(&set.disks[2], |_| Err(io::Error::other("gone")));
    let won = host.compare_and_set("k", Some(6), b"y").unwrap();
    assert_eq!(won, CasOutcome::Won { version: 7 });
    host.shell.settle();
    assert_eq!(kinds(&host), [None, None, Some("io")]);
    let mut other = set.open(1);
    assert_eq!(other.read("k").unwrap(), Some(versioned(7, b"y")));
}

#[test]
fn two_hung_disks_of_three_end_a_call_at_its_deadline() {
    let set = Set::new(3);
    let mut options = set.options(0);
    options.call_wait = Duration::from_millis(500);
    let mut host = Statefile::open(options).unwrap();
    let gate = Arc::new(Gate::default());
    for disk in &set.disks[1..] {
        let gate = gate.clone();
        hook::set(disk, move |_| {
            gate.pass();
            Ok(Then::Go)
        });
    }
    for result in [
        host.read("k").map(|_| ()),
        host.compare_and_set("k", None, b"v").map(|_| ()),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, RegistryError::NotDone { .. }), "{error}");
        assert!(error.to_string().contains("has not answered"), "{error}");
    }
    gate.open();
    drop(host);
    assert_eq!(set.open(0).read("k").unwrap(), None);
}

#[test]
fn a_disk_that_loses_writes_is_left_out() {
    let set = Set::new(3);
    let mut host = set.open(0);
    hook::set(&set.disks[0], |op| match op {
        Op::Write(_) => Ok(Then::Lose),
        Op::Read => Ok(Then::Go),
    });
    for version in 0..3 {
        let expected = Some(version).filter(|v| *v > 0);
        host.compare_and_set("k", expected, b"v").unwrap();
    }
    host.shell.settle();
    hook::clear(&set.disks[0]);
    // The other two have it all.
    std::fs::remove_file(&set.disks[0]).unwrap();
    assert_eq!(set.open(1).read("k").unwrap().unwrap().version, 3);
}

#[test]
fn a_second_process_in_the_same_slot_is_noticed() {
    let set = Set::new(1);
    let mut first = set.open(0);
    first.compare_and_set("k", None, b"1").unwrap();
    let second = set.open(0);
    first.compare_and_set("k", Some(1), b"2").unwrap();
    // The first has written; the second writes before that is read back.
    let second = Mutex::new((second, false));
    hook::set(&set.disks[0], move |op| {
        if let Ok(mut second) = second.try_lock() {
            let written = std::mem::replace(&mut second.1, op != Op::Read);
            if op == Op::Read && written {
                // It may notice it first; what counts is that it has written.
                let _ = second.0.compare_and_set("other", None, b"x");
            }
        }
        Ok(Then::Go)
    });
    let error = first.compare_and_set("k", Some(2), b"3").unwrap_err();
    assert!(error.to_string().contains("host slot 0"), "{error}");
    assert!(matches!(error, RegistryError::NotDone { .. }), "{error}");
}

#[test]
fn a_slot_of_another_host_is_only_taken_on_request() {
    let set = Set::new(1);
    set.open(0).compare_and_set("k", None, b"v").unwrap();
    let mut options = set.options(0);
    options.name = "newcomer".to_owned();
    let refused = Statefile::open(options.clone());
    assert!(matches!(refused, Err(OpenError::SlotOf { other, .. }) if other == "host0"));
    options.take_slot = true;
    let mut host = Statefile::open(options).unwrap();
    assert_eq!(host.read("k").unwrap().unwrap().version, 1);
}

/// Let host 1 write `key` once host 0 has written `blocks` blocks and is about to read them.
fn interrupt(set: &Set, blocks: usize, key: &'static str) -> CasOutcome {
    let mut first = set.open(0);
    let second = Mutex::new((set.open(1), 0));
    let own_block = super::GEOMETRY.block_at(super::HostSlot(0));
    hook::set(&set.disks[0], move |op| {
        if let Ok(mut second) = second.try_lock() {
            second.1 += usize::from(op == Op::Write(own_block));
            if op == Op::Read && second.1 == blocks {
                second.1 += 1;
                let won = second.0.compare_and_set(key, None, b"second").unwrap();
                assert_eq!(won, CasOutcome::Won { version: 1 });
            }
        }
        Ok(Then::Go)
    });
    let outcome = first.compare_and_set("k", None, b"first").unwrap();
    hook::clear(&set.disks[0]);
    outcome
}

#[test]
fn a_host_that_was_overtaken_knows_whether_it_won() {
    // In phase 2: the other finishes the proposal, builds upon it, and the first learns so.
    let set = Set::new(1);
    assert_eq!(interrupt(&set, 2, "other"), CasOutcome::Won { version: 1 });
    assert_eq!(set.open(2).list("").unwrap().len(), 2);
    // In phase 1: nobody knows of the proposal. Another key does not matter, the same does.
    let set = Set::new(1);
    assert_eq!(interrupt(&set, 1, "other"), CasOutcome::Won { version: 1 });
    assert_eq!(set.open(2).list("").unwrap().len(), 2);
    let set = Set::new(1);
    let lost = CasOutcome::Lost(Some(versioned(1, b"second")));
    assert_eq!(interrupt(&set, 1, "k"), lost);
}

#[test]
fn too_large_a_document_is_refused_and_changes_nothing() {
    let set = Set::new(1);
    let mut host = set.open(0);
    host.compare_and_set("a", None, &[1; 40_000]).unwrap();
    let error = host.compare_and_set("b", None, &[2; 40_000]).unwrap_err();
    assert!(
        error.to_string().contains("value slot has 65536"),
        "{error}"
    );
    assert!(matches!(error, RegistryError::NotDone { .. }));
    assert_eq!(host.list("").unwrap().len(), 1);
}

/// Latencies of a change and of a read, for docs/promises.md; run by name, alone.
#[test]
#[ignore = "measures"]
fn measure_latency() {
    let dir = std::env::var("STATEFILE_BENCH_DIR").unwrap_or_else(|_| "/tmp".to_owned());
    for disks in [1, 3] {
        let dir = tempfile::tempdir_in(&dir).unwrap();
        let paths: Vec<PathBuf> = (0..disks).map(|n| dir.path().join(n.to_string())).collect();
        let geometry = super::Geometry {
            disks,
            slots: 16,
            slot_bytes: 1 << 20,
        };
        super::format(&paths, geometry, POOL, false).unwrap();
        let mut options = Set::new(1).options(0);
        options.disks = paths;
        let mut host = Statefile::open(options).unwrap();
        for n in 0..200 {
            host.compare_and_set(&format!("vm/{n}"), None, &[7; 200])
                .unwrap();
        }
        let mut took = [Vec::new(), Vec::new()];
        for version in 0..500_u64 {
            let expected = Some(version).filter(|v| *v > 0);
            let began = Instant::now();
            host.compare_and_set("k", expected, b"claim").unwrap();
            took[0].push(began.elapsed());
            let began = Instant::now();
            host.read("k").unwrap();
            took[1].push(began.elapsed());
        }
        for (what, took) in ["compare-and-set", "read"].iter().zip(&mut took) {
            took.sort();
            let at = |p: usize| took[took.len() * p / 1000];
            println!(
                "{disks} disk(s) {what}: p50 {:?} p90 {:?} p99 {:?} max {:?}",
                at(500),
                at(900),
                at(990),
                took[took.len() - 1]
            );
        }
    }
}
