//! What every registry must do, as tests that each implementation runs on a store of its own.
//!
//! An implementation says how a fresh store is made, and gets one test for each promise:
//!
//! ```ignore
//! crate::registry::suite::registry_suite!(MyStore::new());
//! ```

use super::{CasOutcome, KEY_BYTES_MAX, Registry, RegistryError, Seen, VALUE_BYTES_MAX, Versioned};
use std::time::Duration;

/// A fresh, empty store. What it needs (a folder, a process) goes with it.
pub(super) trait Store: Sync {
    /// Another handle on the same store, as another host would have.
    fn open(&self) -> Box<dyn Registry>;
}

/// One test for each promise, on a new store each.
macro_rules! registry_suite {
    ($store:expr) => {
        mod suite {
            use super::*;
            use $crate::registry::suite;

            #[test]
            fn a_key_is_created_once_and_raised_by_one() {
                suite::a_key_is_created_once_and_raised_by_one(&$store);
            }

            #[test]
            fn an_impossible_version_never_wins() {
                suite::an_impossible_version_never_wins(&$store);
            }

            #[test]
            fn no_update_is_lost_between_writers() {
                suite::no_update_is_lost_between_writers(&$store);
            }

            #[test]
            fn keys_and_values_fit_up_to_their_limits_and_no_further() {
                suite::keys_and_values_fit_up_to_their_limits_and_no_further(&$store);
            }

            #[test]
            fn a_listing_is_the_prefix_in_byte_order_and_nothing_else() {
                suite::a_listing_is_the_prefix_in_byte_order_and_nothing_else(&$store);
            }

            #[test]
            fn a_watch_tells_each_change_once_and_the_newest_value() {
                suite::a_watch_tells_each_change_once_and_the_newest_value(&$store);
            }

            #[test]
            fn a_watcher_wakes_for_a_change_made_elsewhere() {
                suite::a_watcher_wakes_for_a_change_made_elsewhere(&$store);
            }
        }
    };
}
pub(super) use registry_suite;

fn at(version: u64, value: &[u8]) -> Versioned<Vec<u8>> {
    Versioned {
        version,
        value: value.to_vec(),
    }
}

fn won(version: u64) -> CasOutcome {
    CasOutcome::Won { version }
}

pub(super) fn a_key_is_created_once_and_raised_by_one(store: &dyn Store) {
    let mut registry = store.open();
    let mut cas = |key, expected, value: &[u8]| {
        registry
            .compare_and_set(key, expected, value)
            .unwrap_or_else(|e| panic!("{e}"))
    };
    assert_eq!(store.open().read("vm/1").unwrap(), None);
    assert_eq!(cas("vm/1", Some(1), b"x"), CasOutcome::Lost(None));
    assert_eq!(cas("vm/1", None, b"a"), won(1));
    assert_eq!(cas("vm/1", None, b"b"), CasOutcome::Lost(Some(at(1, b"a"))));
    assert_eq!(cas("vm/1", Some(1), b"b"), won(2));
    assert_eq!(
        cas("vm/1", Some(1), b"c"),
        CasOutcome::Lost(Some(at(2, b"b")))
    );
    assert_eq!(
        cas("vm/1", Some(3), b"c"),
        CasOutcome::Lost(Some(at(2, b"b")))
    );
    // The same value again is a write like any other.
    assert_eq!(cas("vm/1", Some(2), b"b"), won(3));
    assert_eq!(cas("host/1", None, b"h"), won(1));
    assert_eq!(store.open().read("vm/1").unwrap(), Some(at(3, b"b")));
    assert_eq!(
        store.open().list("vm/").unwrap(),
        [("vm/1".to_owned(), at(3, b"b"))]
    );
}

pub(super) fn an_impossible_version_never_wins(store: &dyn Store) {
    let mut registry = store.open();
    for version in [0, 1 << 63, u64::MAX] {
        let lost = registry.compare_and_set("k", Some(version), b"x").unwrap();
        assert_eq!(lost, CasOutcome::Lost(None), "{version}");
    }
    registry.compare_and_set("k", None, b"v").unwrap();
    for version in [0, 1 << 63, u64::MAX] {
        let lost = registry.compare_and_set("k", Some(version), b"x").unwrap();
        assert_eq!(lost, CasOutcome::Lost(Some(at(1, b"v"))), "{version}");
    }
}

pub(super) fn no_update_is_lost_between_writers(store: &dyn Store) {
    const WRITERS: u64 = 6;
    const EACH: u64 = 20;
    std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            scope.spawn(|| {
                let mut registry = store.open();
                for _ in 0..EACH {
                    loop {
                        let old = registry.read("n").unwrap();
                        let n = old
                            .as_ref()
                            .map_or(0, |v| u64::from_le_bytes(v.value[..].try_into().unwrap()));
                        let version = old.map(|v| v.version);
                        let bytes = (n + 1).to_le_bytes();
                        if let CasOutcome::Won { .. } =
                            registry.compare_and_set("n", version, &bytes).unwrap()
                        {
                            break;
                        }
                    }
                }
            });
        }
    });
    let end = store.open().read("n").unwrap().unwrap();
    assert_eq!(end.value, (WRITERS * EACH).to_le_bytes());
    assert_eq!(end.version, WRITERS * EACH);
}

pub(super) fn keys_and_values_fit_up_to_their_limits_and_no_further(store: &dyn Store) {
    let mut registry = store.open();
    let key = "k".repeat(KEY_BYTES_MAX);
    let every_byte: Vec<u8> = (0..=255).cycle().take(VALUE_BYTES_MAX).collect();
    assert_eq!(
        registry.compare_and_set(&key, None, &every_byte).unwrap(),
        won(1)
    );
    assert_eq!(registry.read(&key).unwrap(), Some(at(1, &every_byte)));
    assert_eq!(
        registry.compare_and_set("empty", None, b"").unwrap(),
        won(1)
    );
    assert_eq!(registry.read("empty").unwrap(), Some(at(1, b"")));
    let long_value = vec![0; VALUE_BYTES_MAX + 1];
    let long_key = "k".repeat(KEY_BYTES_MAX + 1);
    for (key, value) in [
        ("", &b"v"[..]),
        (&long_key, &b"v"[..]),
        ("k", &long_value[..]),
    ] {
        let error = registry.compare_and_set(key, None, value).unwrap_err();
        assert!(matches!(error, RegistryError::NotDone { .. }), "{error}");
        assert_eq!(registry.read(key).unwrap(), None);
    }
    assert_eq!(registry.list("").unwrap().len(), 2);
}

pub(super) fn a_listing_is_the_prefix_in_byte_order_and_nothing_else(store: &dyn Store) {
    let mut registry = store.open();
    assert_eq!(registry.list("").unwrap(), []);
    for key in ["vm/b", "vm/a", "vm0", "vm", "vm/ä", "vn", "vm/a/1"] {
        registry.compare_and_set(key, None, key.as_bytes()).unwrap();
    }
    let keys = |listing: super::Listing| -> Vec<String> {
        for (key, entry) in &listing {
            assert_eq!(*entry, at(1, key.as_bytes()));
        }
        listing.into_iter().map(|(key, _)| key).collect()
    };
    let mut registry = store.open();
    assert_eq!(
        keys(registry.list("vm/").unwrap()),
        ["vm/a", "vm/a/1", "vm/b", "vm/ä"]
    );
    assert_eq!(
        keys(registry.list("").unwrap()),
        ["vm", "vm/a", "vm/a/1", "vm/b", "vm/ä", "vm0", "vn"]
    );
    assert_eq!(keys(registry.list("x").unwrap()), [""; 0]);
}

pub(super) fn a_watch_tells_each_change_once_and_the_newest_value(store: &dyn Store) {
    // Long enough for any change to arrive; a watch with news returns at once.
    const LONG: Duration = Duration::from_secs(60);
    let mut registry = store.open();
    registry.compare_and_set("vm/1", None, b"a").unwrap();
    let mut watcher = store.open();
    let mut seen = Seen::default();
    let mut told = |wait| watcher.watch("vm/", &mut seen, wait).unwrap();
    assert_eq!(told(LONG), [("vm/1".to_owned(), at(1, b"a"))]);
    registry.compare_and_set("host/1", None, b"h").unwrap();
    assert_eq!(told(Duration::ZERO), []);
    registry.compare_and_set("vm/1", Some(1), b"b").unwrap();
    registry.compare_and_set("vm/1", Some(2), b"c").unwrap();
    registry.compare_and_set("vm/0", None, b"z").unwrap();
    // They may come in more than one batch, but never twice and never old after new.
    let mut last = std::collections::BTreeMap::new();
    while last.get("vm/1") != Some(&at(3, b"c")) || last.len() < 2 {
        for (key, entry) in told(LONG) {
            let before = last.insert(key.clone(), entry.clone());
            assert!(before.is_none_or(|b| b.version < entry.version), "{key}");
        }
    }
    assert_eq!(last.get("vm/0"), Some(&at(1, b"z")));
    assert_eq!(told(Duration::ZERO), []);
    // What was told by looking is not told again by what the registry tells.
    registry.compare_and_set("vm/0", Some(1), b"y").unwrap();
    assert_eq!(told(Duration::ZERO), [("vm/0".to_owned(), at(2, b"y"))]);
    registry.compare_and_set("vm/2", None, b"n").unwrap();
    assert_eq!(told(LONG), [("vm/2".to_owned(), at(1, b"n"))]);
    assert_eq!(seen.version("vm/1"), Some(3));
    assert_eq!(seen.version("host/1"), None);
}

pub(super) fn a_watcher_wakes_for_a_change_made_elsewhere(store: &dyn Store) {
    std::thread::scope(|scope| {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let watcher = scope.spawn(move || {
            let mut watcher = store.open();
            let mut seen = Seen::default();
            assert_eq!(watcher.watch("vm/", &mut seen, Duration::ZERO).unwrap(), []);
            ready.send(()).unwrap();
            watcher.watch("vm/", &mut seen, Duration::from_secs(60))
        });
        is_ready.recv().unwrap();
        let mut registry = store.open();
        registry.compare_and_set("vm/7", None, b"new").unwrap();
        assert_eq!(
            watcher.join().unwrap().unwrap(),
            [("vm/7".to_owned(), at(1, b"new"))]
        );
    });
}
