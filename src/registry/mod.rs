//! The one linearizable store: versioned keys with compare-and-set.
//!
//! All that decides lives here: who runs which VM and under which generation.
//! A registry must never answer from a cache, never block for ever, and never
//! call an unknown outcome known: a write that may or may not have happened is
//! [`RegistryError::Unknown`], and its caller finds out by reading.
//!
//! Invariant: per key, versions rise by one with each won compare-and-set, and of
//! several callers that expect the same version at most one wins.

use serde::{Deserialize, Serialize};
use std::time::Duration;

pub mod etcd;
mod file;
mod format;
pub mod pair;
pub mod statefile;
#[cfg(test)]
mod suite;
mod watch;

pub use etcd::{EtcdOptions, EtcdRegistry};
pub use file::{FileRegistry, FileRegistryOptions};
pub use format::{BadRegistryFile, ENTRIES_MAX, FILE_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX};
pub use watch::{Seen, WATCH_POLL};

/// A value and how many times its key has been written (1 = just created).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Versioned<T> {
    /// Number of won writes of this key, at least 1.
    pub version: u64,
    /// What the last of them wrote.
    pub value: T,
}

/// Keys with their values, in byte order of the keys.
pub type Listing = Vec<(String, Versioned<Vec<u8>>)>;

/// How a compare-and-set ended, where that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasOutcome {
    /// The value is written and durable.
    Won {
        /// The key's version now.
        version: u64,
    },
    /// The key was not at the expected version; nothing was written. Holds what is there.
    Lost(Option<Versioned<Vec<u8>>>),
}

/// Why the registry gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Nothing was written, and nothing will be.
    #[error("registry {place}: {what} did not happen: {why}")]
    NotDone {
        /// Which registry (a path or an address).
        place: String,
        /// The operation and its key.
        what: String,
        /// What failed and what to do about it.
        why: String,
    },
    /// The write may have happened, or may yet happen: read to find out. Only the caller's own
    /// next read settles it; one of another host may still show the value before. What rules
    /// the write out for all is the key at a later version.
    #[error(
        "registry {place}: it is not known whether {what} happened: {why}; read the key to find out"
    )]
    Unknown {
        /// Which registry (a path or an address).
        place: String,
        /// The operation and its key.
        what: String,
        /// What failed and what to do about it.
        why: String,
    },
}

/// A linearizable store of versioned keys. Every call returns within a bound.
pub trait Registry: Send {
    /// The key's newest value, or `None` if it was never written.
    ///
    /// # Errors
    /// [`RegistryError::NotDone`] if no answer could be had in time.
    fn read(&mut self, key: &str) -> Result<Option<Versioned<Vec<u8>>>, RegistryError>;

    /// Write `value` if the key is at version `expected` (`None`: if it was never written).
    ///
    /// # Errors
    /// [`RegistryError::NotDone`] if nothing was written, [`RegistryError::Unknown`] if
    /// it may have been.
    fn compare_and_set(
        &mut self,
        key: &str,
        expected: Option<u64>,
        value: &[u8],
    ) -> Result<CasOutcome, RegistryError>;

    /// All keys that begin with `prefix`, in byte order, with their values.
    ///
    /// # Errors
    /// [`RegistryError::NotDone`] if no answer could be had in time.
    fn list(&mut self, prefix: &str) -> Result<Listing, RegistryError>;

    /// Wait until a key that begins with `prefix` is at another version than `seen`, at most
    /// `wait` and one call longer, and return the keys that are, with their newest values,
    /// in byte order; none if nothing changed. A key that was written three times meanwhile is
    /// told once. It may be told late: act on it by compare-and-set alone.
    ///
    /// A registry that cannot tell of changes polls, every [`WATCH_POLL`].
    ///
    /// # Errors
    /// [`RegistryError::NotDone`] if the registry could not be watched. `seen` is still good:
    /// the next watch tells what this one did not.
    fn watch(
        &mut self,
        prefix: &str,
        seen: &mut Seen,
        wait: Duration,
    ) -> Result<Listing, RegistryError> {
        watch::by_polling(self, prefix, seen, wait)
    }

    /// This host's daemon ends, and nothing is asked through this handle any more: tell those
    /// who would otherwise have to find out. Takes a bounded time.
    fn leave(&mut self) {}
}
