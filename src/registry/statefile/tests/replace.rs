//! A broken disk makes room for a new one while the hosts go on.

use super::super::{MakeError, inspect, replace};
use super::{POOL, Set, kinds};
use crate::registry::{CasOutcome, Registry};
use std::fs;

#[test]
fn a_replaced_disk_carries_the_registry_when_another_one_goes() {
    let set = Set::new(3);
    let (mut a, mut b) = (set.open(0), set.open(1));
    a.compare_and_set("k", None, b"1").unwrap();
    b.compare_and_set("k", Some(1), b"2").unwrap();
    fs::remove_file(&set.disks[2]).unwrap();
    a.compare_and_set("k", Some(2), b"3").unwrap();
    a.shell.settle();
    let header = replace(&set.disks[..2], 2, &set.disks[2], false).unwrap();
    assert_eq!((header.set, header.disk, header.pool), (2, 2, POOL));
    let report = inspect(&set.disks, Some(POOL));
    assert!(report.is_well(), "{:?}", report.problems);
    // Hosts that were there all along follow, without being started again.
    let won = b.compare_and_set("k", Some(3), b"4").unwrap();
    assert_eq!(won, CasOutcome::Won { version: 4 });
    fs::remove_file(&set.disks[0]).unwrap();
    assert_eq!(a.read("k").unwrap().unwrap().version, 4);
    let won = a.compare_and_set("k", Some(4), b"5").unwrap();
    assert_eq!(won, CasOutcome::Won { version: 5 });
    assert_eq!(set.open(3).read("k").unwrap().unwrap().version, 5);
}

#[test]
fn what_only_the_replaced_disk_and_one_other_had_decided_is_kept() {
    for broken in 0..3 {
        for behind in (0..3).filter(|d| *d != broken) {
            let set = Set::new(3);
            let mut host = set.open(0);
            host.compare_and_set("k", None, b"1").unwrap();
            host.shell.settle();
            let away = set.disks[behind].with_extension("away");
            fs::rename(&set.disks[behind], &away).unwrap();
            host.compare_and_set("k", Some(1), b"2").unwrap();
            host.shell.settle();
            fs::rename(&away, &set.disks[behind]).unwrap();
            fs::remove_file(&set.disks[broken]).unwrap();
            let others: Vec<_> = (0..3)
                .filter(|d| *d != broken)
                .map(|d| set.disks[d].clone())
                .collect();
            let index = u16::try_from(broken).unwrap();
            replace(&others, index, &set.disks[broken], false).unwrap();
            // Now the only other disk that knew of it goes.
            let knew = (0..3).find(|d| *d != broken && *d != behind).unwrap();
            fs::remove_file(&set.disks[knew]).unwrap();
            let found = set.open(1).read("k").unwrap().unwrap();
            assert_eq!(found.version, 2, "broken {broken}, behind {behind}");
        }
    }
}

#[test]
fn a_host_that_still_has_the_old_disk_cannot_decide_with_it() {
    let set = Set::new(3);
    let mut host = set.open(0);
    host.compare_and_set("k", None, b"1").unwrap();
    // Another path to the new disk; this host keeps the old one.
    let new = set.disks[2].with_extension("new");
    replace(&set.disks[..2], 2, &new, false).unwrap();
    let mut knows = set.options(1);
    knows.disks[2] = new;
    let mut other = super::Statefile::open(knows).unwrap();
    let won = other.compare_and_set("k", Some(1), b"2").unwrap();
    assert_eq!(won, CasOutcome::Won { version: 2 });
    let lost = host.compare_and_set("k", Some(1), b"x").unwrap();
    assert!(matches!(lost, CasOutcome::Lost(Some(v)) if v.version == 2));
    host.read("k").unwrap();
    host.shell.settle();
    assert_eq!(kinds(&host)[2], Some("old-set"));
    // With only the old disk and one more it has no majority of the set that counts.
    fs::remove_file(&set.disks[0]).unwrap();
    let error = host.compare_and_set("k", Some(2), b"y").unwrap_err();
    assert!(error.to_string().contains("generation"), "{error}");
}

#[test]
fn a_replacement_that_was_cut_short_stops_the_set_and_is_completed_by_another() {
    let set = Set::new(3);
    let mut host = set.open(0);
    host.compare_and_set("k", None, b"1").unwrap();
    fs::remove_file(&set.disks[2]).unwrap();
    // The second header cannot be raised: the first one is by then.
    super::hook::set(&set.disks[1], |op| match op {
        super::hook::Op::Write(0) => Err(std::io::Error::other("cut by a test")),
        _ => Ok(super::hook::Then::Go),
    });
    assert!(replace(&set.disks[..2], 2, &set.disks[2], false).is_err());
    assert!(host.read("k").is_err(), "one disk of each generation");
    assert!(!inspect(&set.disks, Some(POOL)).is_well());
    super::hook::clear(&set.disks[1]);
    replace(&set.disks[..2], 2, &set.disks[2], false).unwrap();
    assert_eq!(host.read("k").unwrap().unwrap().version, 1);
    assert!(inspect(&set.disks, Some(POOL)).is_well());
}

#[test]
fn a_replacement_with_too_little_knowledge_is_refused_and_changes_nothing() {
    let set = Set::new(3);
    let mut host = set.open(0);
    host.compare_and_set("k", None, b"1").unwrap();
    host.shell.settle();
    let before: Vec<_> = set.disks.iter().map(|d| fs::read(d).unwrap()).collect();
    let new = set.disks[2].with_extension("new");
    let refused = |others: &[_], index, new: &std::path::Path| {
        replace(others, index, new, false).unwrap_err()
    };
    for error in [
        refused(&set.disks[..1], 2, &new),
        refused(&set.disks[..2], 1, &new),
        refused(&set.disks[..2], 3, &new),
        refused(&[set.disks[0].clone(), set.disks[0].clone()], 2, &new),
    ] {
        assert!(matches!(error, MakeError::Disks(_)), "{error}");
    }
    let error = refused(&set.disks[..2], 2, &set.disks[2]);
    assert!(matches!(error, MakeError::NotEmpty { .. }), "{error}");
    let after: Vec<_> = set.disks.iter().map(|d| fs::read(d).unwrap()).collect();
    assert!(before == after);
    let one = Set::new(1);
    let error = replace(&one.disks, 0, &new, false).unwrap_err();
    assert!(error.to_string().contains("one disk"), "{error}");
}
