//! Damaged, stale, swapped and foreign disks: told apart, left out, and never believed.

use super::super::layout::Block;
use super::super::page::{ATOM_BYTES, PAGE_BYTES};
use super::super::paxos::HostSlot;
use super::super::{MakeError, OpenError, Severity, Statefile, format, inspect};
use super::{GEOMETRY, POOL, Set, damage, kinds};
use crate::registry::{CasOutcome, Registry};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// A set that holds a key, and a copy of its disks from before the last change.
fn used() -> (Set, Vec<Vec<u8>>) {
    let set = Set::new(3);
    let mut host = set.open(0);
    host.compare_and_set("k", None, b"1").unwrap();
    host.shell.settle();
    let copies = set.disks.iter().map(|d| fs::read(d).unwrap()).collect();
    host.compare_and_set("k", Some(1), b"2").unwrap();
    host.compare_and_set("k", Some(2), b"3").unwrap();
    host.shell.settle();
    (set, copies)
}

/// What `check` calls the disk, if it is not well.
fn checked(set: &Set, disk: usize) -> Vec<&'static str> {
    let report = inspect(&set.disks, Some(POOL));
    let found = report.problems.iter().filter(|p| {
        p.severity == Severity::Problem && p.disk.as_deref() == Some(set.disks[disk].as_path())
    });
    found.map(|p| p.kind).collect()
}

fn goes_on_without(set: &Set, disk: usize, kind: &'static str) {
    assert!(
        checked(set, disk).contains(&kind),
        "{:?}",
        checked(set, disk)
    );
    assert!(!inspect(&set.disks, Some(POOL)).is_well());
    let mut host = set.open(1);
    let found = host.read("k").unwrap().unwrap();
    assert_eq!(
        (found.version, found.value.as_slice()),
        (3, b"3".as_slice())
    );
    let won = host.compare_and_set("k", Some(3), b"4").unwrap();
    assert_eq!(won, CasOutcome::Won { version: 4 });
    host.shell.settle();
    host.read("k").unwrap();
    host.shell.settle();
    assert_eq!(kinds(&host)[disk], Some(kind), "{:?}", host.faults());
}

#[test]
fn a_well_set_is_called_well() {
    let (set, _) = used();
    let report = inspect(&set.disks, None);
    assert!(report.is_well(), "{:?}", report.problems);
    assert_eq!(report.hosts.len(), 1);
    assert_eq!(report.hosts[0].name, "host0");
    assert_eq!(report.keys[0].version, 3);
}

#[test]
fn a_corrupt_block_costs_its_disk_and_nothing_else() {
    let (set, _) = used();
    damage(&set.disks[1], GEOMETRY.block_at(HostSlot(0)) + 150);
    goes_on_without(&set, 1, "corrupt");
}

#[test]
fn a_corrupt_header_costs_its_disk_and_nothing_else() {
    let (set, _) = used();
    damage(&set.disks[2], 40);
    goes_on_without(&set, 2, "corrupt");
}

#[test]
fn a_wiped_disk_is_unformatted_and_not_an_empty_registry() {
    let (set, _) = used();
    let file = fs::File::options().write(true).open(&set.disks[0]).unwrap();
    file.write_all_at(
        &vec![0; usize::try_from(GEOMETRY.total_bytes()).unwrap()],
        0,
    )
    .unwrap();
    goes_on_without(&set, 0, "unformatted");
}

#[test]
fn a_cut_disk_has_the_wrong_size() {
    let (set, _) = used();
    let file = fs::File::options().write(true).open(&set.disks[2]).unwrap();
    file.set_len(GEOMETRY.total_bytes() - 4096).unwrap();
    goes_on_without(&set, 2, "wrong-size");
}

#[test]
fn a_missing_disk_is_an_io_fault() {
    let (set, _) = used();
    fs::remove_file(&set.disks[1]).unwrap();
    goes_on_without(&set, 1, "io");
}

#[test]
fn a_disk_of_another_pool_is_foreign_and_left_alone() {
    let (set, _) = used();
    let other = Set::of(GEOMETRY, Uuid::from_u128(5));
    fs::copy(&other.disks[1], &set.disks[1]).unwrap();
    goes_on_without(&set, 1, "foreign");
    assert_eq!(
        fs::read(&other.disks[1]).unwrap(),
        fs::read(&set.disks[1]).unwrap()
    );
}

#[test]
fn a_disk_in_the_place_of_another_is_swapped() {
    let (set, _) = used();
    fs::copy(&set.disks[2], &set.disks[1]).unwrap();
    goes_on_without(&set, 1, "swapped");
}

#[test]
fn a_disk_that_went_back_in_time_is_stale() {
    let (set, copies) = used();
    // Until the others say that this disk had acknowledged more than the copy has.
    let at = usize::try_from(GEOMETRY.block_at(HostSlot(0))).unwrap();
    let block = |image: &[u8]| Block::decode(&image[at..at + PAGE_BYTES]).unwrap().0;
    let copied = block(&copies[1]).seq;
    let mut host = set.open(0);
    let mut version = 3;
    while ![0, 2]
        .iter()
        .all(|other| block(&fs::read(&set.disks[*other]).unwrap()).acked[1] > copied)
    {
        host.compare_and_set("k", Some(version), b"x").unwrap();
        host.shell.settle();
        version += 1;
    }
    let file = fs::File::options().write(true).open(&set.disks[1]).unwrap();
    file.write_all_at(&copies[1], 0).unwrap();
    assert_eq!(checked(&set, 1), ["stale"]);
    // Its host knows what it saw acknowledged, another what the blocks say.
    let mut other = set.open(1);
    for host in [&mut host, &mut other] {
        for _ in 0..2 {
            assert_eq!(host.read("k").unwrap().unwrap().version, version);
            host.shell.settle();
        }
        assert_eq!(kinds(host)[1], Some("stale"));
    }
}

#[test]
fn without_a_majority_a_host_is_refused() {
    let (set, _) = used();
    for disk in &set.disks[..2] {
        fs::remove_file(disk).unwrap();
    }
    let Err(refused) = Statefile::open(set.options(0)) else {
        panic!("opened with one disk of three");
    };
    assert!(matches!(refused, OpenError::NoMajority(_)));
    assert!(
        refused.to_string().contains("pollux statefile replace"),
        "{refused}"
    );
}

#[test]
fn a_host_whose_own_block_is_unreadable_on_a_majority_is_refused() {
    let (set, _) = used();
    for disk in &set.disks[..2] {
        damage(disk, GEOMETRY.block_at(HostSlot(0)) + 20);
    }
    let refused = Statefile::open(set.options(0));
    assert!(matches!(refused, Err(OpenError::NoMajority(_))));
}

#[test]
fn a_block_write_cut_at_any_sector_leaves_a_registry_that_goes_on() {
    let (set, copies) = used();
    let at = usize::try_from(GEOMETRY.block_at(HostSlot(0))).unwrap();
    let new: Vec<Vec<u8>> = set.disks.iter().map(|d| fs::read(d).unwrap()).collect();
    // A disk that was written since, as a majority was.
    let disk = (0..3).find(|d| new[*d][at..] != copies[*d][at..]).unwrap();
    for cut in (ATOM_BYTES..PAGE_BYTES).step_by(ATOM_BYTES) {
        // In the middle of the write when the power went.
        let mut torn = new[disk].clone();
        torn[at + cut..at + PAGE_BYTES].copy_from_slice(&copies[disk][at + cut..at + PAGE_BYTES]);
        assert!(Block::decode(&torn[at..at + PAGE_BYTES]).unwrap().1);
        let file = fs::File::options()
            .write(true)
            .open(&set.disks[disk])
            .unwrap();
        let block = &torn[at..at + PAGE_BYTES];
        file.write_all_at(block, at as u64).unwrap();
        let report = inspect(&set.disks, Some(POOL));
        assert!(report.is_well(), "{:?}", report.problems);
        assert!(report.problems.iter().any(|p| p.kind == "torn"));
        let mut host = set.open(2);
        assert_eq!(host.read("k").unwrap().unwrap().version, 3, "cut at {cut}");
    }
}

#[test]
fn a_damaged_value_is_read_from_another_disk_and_named_by_check() {
    let (set, _) = used();
    // Which of its slots the block names does not matter.
    for slot in 0..4 {
        damage(&set.disks[0], GEOMETRY.value_at(HostSlot(0), slot) + 30);
    }
    assert!(checked(&set, 0).contains(&"value"));
    assert_eq!(set.open(1).read("k").unwrap().unwrap().version, 3);
}

#[test]
fn a_formatted_or_used_disk_is_not_formatted_without_force() {
    let (set, _) = used();
    let refused = format(&set.disks, GEOMETRY, Uuid::from_u128(6), false);
    assert!(matches!(refused, Err(MakeError::NotEmpty { .. })));
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..3).map(|n| dir.path().join(n.to_string())).collect();
    // The last one holds something: nothing is written to the others either.
    fs::write(&paths[2], [vec![0; 9000], b"data".to_vec()].concat()).unwrap();
    let refused = format(&paths, GEOMETRY, POOL, false).unwrap_err();
    assert!(refused.to_string().contains("not empty"), "{refused}");
    let still_empty = |p: &std::path::PathBuf| fs::read(p).unwrap().iter().all(|b| *b == 0);
    assert!(still_empty(&paths[0]) && still_empty(&paths[1]));
    format(&paths, GEOMETRY, POOL, true).unwrap();
    assert!(inspect(&paths, Some(POOL)).is_well());
    let twice = [paths[0].clone(), paths[0].clone(), paths[1].clone()];
    assert!(matches!(
        format(&twice, GEOMETRY, POOL, true),
        Err(MakeError::Disks(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_byte_changed_anywhere_on_one_disk_changes_no_answer(
        at in 0..GEOMETRY.total_bytes(),
        near in 0..GEOMETRY.total_bytes() / 64,
        disk in 0..3_usize,
    ) {
        for at in [at, near] {
            let (set, _) = used();
            damage(&set.disks[disk], at);
            let mut host = set.open(1);
            let found = host.read("k").unwrap().unwrap();
            prop_assert_eq!((found.version, found.value), (3, b"3".to_vec()));
            host.compare_and_set("k", Some(3), b"4").unwrap();
            prop_assert_eq!(set.open(0).read("k").unwrap().unwrap().version, 4);
        }
    }
}
