//! Leases and watches on one etcd.

use super::testbed::{Cluster, PATIENCE, until};
use super::tests::{SHORT, assert_not_done};
use super::{
    EtcdChange, EtcdEvent, Held, Holding, Registry, Revision, Seen, Space, VALUE_BYTES_MAX,
    Versioned, WatchEnd,
};
use std::time::Duration;

#[test]
fn a_lease_ends_with_its_keys_and_a_kept_one_does_not() {
    let cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    let lost = registry.grant_lease(Duration::from_secs(1)).unwrap();
    let kept = registry.grant_lease(Duration::from_millis(900)).unwrap();
    assert!(lost.ttl >= Duration::from_secs(1) && lost.id != kept.id);
    assert_eq!(
        registry.hold("host/a", b"a", lost.id).unwrap(),
        Holding::Won
    );
    assert_eq!(
        registry.hold("host/b", b"b", kept.id).unwrap(),
        Holding::Won
    );
    let taken = Holding::Taken(Held {
        value: b"a".to_vec(),
        lease: Some(lost.id),
    });
    assert_eq!(registry.hold("host/a", b"x", kept.id).unwrap(), taken);
    assert_eq!(registry.list_held("host/").unwrap().len(), 2);
    // They are no keys of the registry.
    assert_eq!(registry.list("").unwrap(), []);

    let mut watch = registry.watch_from(Space::Leased, "host/", registry.newest());
    let gone = until("the end of a lease", || {
        assert!(registry.keep_lease(kept.id).unwrap().is_some());
        let events = watch.next(Duration::from_millis(100)).unwrap();
        events.into_iter().find(|e| e.change == EtcdChange::Deleted)
    });
    assert_eq!(gone.key, "host/a");
    assert_eq!(registry.keep_lease(lost.id).unwrap(), None);
    assert_eq!(registry.read_held("host/a").unwrap(), None);
    assert_not_done(registry.hold("host/a", b"a", lost.id), "lease not found");
    assert!(registry.read_held("host/b").unwrap().is_some());
    assert!(registry.revoke_lease(kept.id).unwrap());
    assert!(!registry.revoke_lease(kept.id).unwrap());
    assert_eq!(registry.read_held("host/b").unwrap(), None);
    assert_not_done(registry.grant_lease(Duration::ZERO), "a lease lasts");
}

#[test]
fn a_watch_tells_every_change_from_a_revision_on() {
    let cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    registry.compare_and_set("vm/1", None, b"a").unwrap();
    let from = registry.newest();
    registry.compare_and_set("other", None, b"o").unwrap();
    registry.compare_and_set("vm/1", Some(1), b"b").unwrap();
    registry.compare_and_set("vm/2", None, b"c").unwrap();
    let mut watch = registry.watch_from(Space::Keys, "vm/", from);
    let mut told = Vec::new();
    while told.len() < 3 {
        told.extend(watch.next(PATIENCE).unwrap());
    }
    let event = |key: &str, version, value: &[u8], after: u64| EtcdEvent {
        key: key.into(),
        change: EtcdChange::Put(Versioned {
            version,
            value: value.to_vec(),
        }),
        revision: Revision(from.0 + after),
    };
    let all = [
        event("vm/1", 1, b"a", 0),
        event("vm/1", 2, b"b", 2),
        event("vm/2", 1, b"c", 3),
    ];
    assert_eq!(told, all);
    assert_eq!(watch.resume(), Revision(from.0 + 4));
    assert_eq!(watch.next(SHORT).unwrap(), []);
}

#[test]
fn a_watch_of_forgotten_history_says_so_and_one_of_the_registry_lists() {
    let cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    let mut seen = Seen::default();
    registry.watch("", &mut seen, Duration::ZERO).unwrap();
    registry.compare_and_set("k", None, b"a").unwrap();
    assert_eq!(registry.watch("", &mut seen, PATIENCE).unwrap().len(), 1);
    for version in 1..=5 {
        registry.compare_and_set("k", Some(version), b"b").unwrap();
    }
    let newest = registry.newest();
    cluster.compact(newest.0);
    let mut watch = registry.watch_from(Space::Keys, "", Revision(2));
    for _ in 0..2 {
        let end = watch.next(PATIENCE).unwrap_err();
        let WatchEnd::Compacted { asked, oldest } = end else {
            panic!("{end}");
        };
        assert_eq!((asked, oldest), (Revision(2), newest));
    }
    let mut other = cluster.registry();
    let news = other.watch("", &mut seen, PATIENCE).unwrap();
    assert_eq!(news.len(), 1);
    assert_eq!(news[0].1.version, 6);
}

#[test]
fn a_large_batch_comes_whole_though_etcd_sends_it_in_pieces() {
    const WRITES: u64 = 40; // 2.5 MiB, more than a request may have
    let cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    let big = vec![1; VALUE_BYTES_MAX];
    for version in 0..WRITES {
        let expected = Some(version).filter(|v| *v > 0);
        registry.compare_and_set("k", expected, &big).unwrap();
    }
    let mut watch = registry.watch_from(Space::Keys, "", Revision(1));
    let mut versions = Vec::new();
    while versions.len() < 40 {
        for event in watch.next(PATIENCE).unwrap() {
            let EtcdChange::Put(entry) = event.change else {
                panic!("{event:?}");
            };
            assert_eq!(entry.value, big);
            versions.push(entry.version);
        }
    }
    assert_eq!(versions, (1..=WRITES).collect::<Vec<_>>());
}
