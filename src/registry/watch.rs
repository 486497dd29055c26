//! Watching a prefix: what a watcher has seen, and the watch that every registry can do.
//!
//! A watch tells *that* keys changed and what they hold now. It does not tell every value a
//! key had in between, and it may tell late, so nothing is decided by it: whoever acts on a
//! change compares and sets.
//!
//! Invariant: a change is told once to one [`Seen`], and none is left out for ever.

use super::{Listing, Registry, RegistryError};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Between two listings of a watch by polling. A listing reads the whole registry; ten a
/// second from each host of a small pool are no load, and nobody waits for a watch to decide.
pub const WATCH_POLL: Duration = Duration::from_millis(100);

/// What a watcher of one prefix has been told. Begin with `Seen::default()`, which has seen
/// nothing: the first watch then tells all keys there are. Use it with one prefix and one
/// registry only.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The version told last, by key.
    versions: BTreeMap<String, u64>,
    /// A registry with revisions: everything up to this one has been told.
    pub(super) revision: Option<u64>,
    /// A registry that is told of changes: when it last looked for itself.
    pub(super) listed: Option<Instant>,
}

impl Seen {
    /// The version of `key` that was told last.
    #[must_use]
    pub fn version(&self, key: &str) -> Option<u64> {
        self.versions.get(key).copied()
    }

    /// The part of `listing` that was not told yet; from now on it was.
    pub(super) fn news(&mut self, mut listing: Listing) -> Listing {
        listing.retain(|(key, entry)| {
            self.versions.insert(key.clone(), entry.version) != Some(entry.version)
        });
        listing
    }

    /// Whether `key` at `version` is later than what was told; from now on it was told.
    pub(super) fn is_news(&mut self, key: &str, version: u64) -> bool {
        if self.version(key) >= Some(version) {
            return false;
        }
        self.versions.insert(key.to_owned(), version);
        true
    }
}

/// Watch by listing again and again.
pub(super) fn by_polling<R: Registry + ?Sized>(
    registry: &mut R,
    prefix: &str,
    seen: &mut Seen,
    wait: Duration,
) -> Result<Listing, RegistryError> {
    let until = Instant::now() + wait;
    loop {
        let news = seen.news(registry.list(prefix)?);
        let left = until.saturating_duration_since(Instant::now());
        if !news.is_empty() || left.is_zero() {
            return Ok(news);
        }
        std::thread::sleep(left.min(WATCH_POLL));
    }
}
