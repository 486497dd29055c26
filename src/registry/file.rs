//! The registry as one locked file on storage that every host of the pool reaches.
//!
//! Every call takes an exclusive lock on `registry.lock` (with a deadline, never for
//! ever), reads `registry` whole, and for a won write puts the new contents down as
//! `registry.partial`, fsyncs it, renames it and fsyncs the directory. A crash at any
//! step leaves the old or the new contents, and the lock dies with its process.
//!
//! Must never answer from memory, and never take a damaged file for an empty one: a file
//! that was there once is only missing if somebody removed it, and its version numbers
//! with it. It needs a file system whose locks and renames hold across hosts (NFS 4,
//! OCFS2, GFS2, CephFS); a host that freezes with the lock held stops the others until it
//! is gone, who then get [`RegistryError::NotDone`].

use super::format::{self, Entries, FILE_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use super::{CasOutcome, Listing, Registry, RegistryError, Versioned};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a call waits for the lock by default: a write takes a few fsyncs, so this is
/// room for every host of a small pool to go first, and shorter than an operator's patience.
pub const LOCK_WAIT: Duration = Duration::from_millis(1000);

/// Between two looks at the lock; a held lock is freed within a few ms.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// How a [`FileRegistry`] behaves.
#[derive(Clone, Debug)]
pub struct FileRegistryOptions {
    /// How long a call waits for the lock.
    pub lock_wait: Duration,
}

impl Default for FileRegistryOptions {
    fn default() -> Self {
        Self {
            lock_wait: LOCK_WAIT,
        }
    }
}

/// Steps of a write, so that tests can stop after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Partial,
    Synced,
    Renamed,
    DirSynced,
}

/// A registry on a shared directory; see the module.
#[derive(Debug)]
pub struct FileRegistry {
    dir: PathBuf,
    options: FileRegistryOptions,
    /// Tests: fail right after this step, leaving everything as a crash would.
    fail_after: Option<Step>,
}

impl FileRegistry {
    /// The registry in `dir`, which must exist; files are made on first use.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, options: FileRegistryOptions) -> Self {
        Self {
            dir: dir.into(),
            options,
            fail_after: None,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self) -> PathBuf {
        self.dir.join("registry")
    }

    fn not_done(&self, what: &str, why: impl ToString) -> RegistryError {
        RegistryError::NotDone {
            place: self.path().display().to_string(),
            what: what.to_owned(),
            why: why.to_string(),
        }
    }

    fn lock(&self, what: &str) -> Result<Flock<File>, RegistryError> {
        let path = self.dir.join("registry.lock");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| self.not_done(what, format!("cannot open {}: {e}", path.display())))?;
        let deadline = Instant::now() + self.options.lock_wait;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => {
                    file = back
                }
                Err((_, e)) => {
                    return Err(self.not_done(what, format!("cannot lock {}: {e}", path.display())));
                }
            }
            if Instant::now() >= deadline {
                let wait = self.options.lock_wait;
                return Err(self.not_done(
                    what,
                    format!(
                        "{} was locked by another host for {wait:?}; find the one that hangs",
                        path.display()
                    ),
                ));
            }
            std::thread::sleep(LOCK_POLL);
        }
    }

    fn load(&self, what: &str) -> Result<Entries, RegistryError> {
        let file = match File::open(self.path()) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Entries::new()),
            Err(e) => return Err(self.not_done(what, format!("cannot open it: {e}"))),
        };
        let cap = u64::try_from(FILE_BYTES_MAX)
            .unwrap_or(u64::MAX)
            .saturating_add(1);
        let mut bytes = Vec::new();
        file.take(cap)
            .read_to_end(&mut bytes)
            .map_err(|e| self.not_done(what, format!("cannot read it: {e}")))?;
        format::decode(&bytes).map_err(|e| {
            self.not_done(
                what,
                format!("the file is damaged: {e}; restore it, or remove it if no VM runs"),
            )
        })
    }

    fn reached(&self, step: Step) -> io::Result<()> {
        if self.fail_after == Some(step) {
            return Err(io::Error::other("stopped by a test"));
        }
        Ok(())
    }

    /// Put the partial file down, durable. Nothing anybody reads is touched.
    fn store_partial(&self, partial: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(partial)?;
        file.write_all(bytes)?;
        self.reached(Step::Partial)?;
        file.sync_all()?;
        self.reached(Step::Synced)
    }

    /// From the rename on, the outcome of an error is unknown.
    fn publish(&self, partial: &Path) -> io::Result<()> {
        fs::rename(partial, self.path())?;
        self.reached(Step::Renamed)?;
        File::open(&self.dir)?.sync_all()?;
        self.reached(Step::DirSynced)
    }
}

impl Registry for FileRegistry {
    fn read(&mut self, key: &str) -> Result<Option<Versioned<Vec<u8>>>, RegistryError> {
        let what = format!("read of {key}");
        let _lock = self.lock(&what)?;
        Ok(self.load(&what)?.remove(key))
    }

    fn compare_and_set(
        &mut self,
        key: &str,
        expected: Option<u64>,
        value: &[u8],
    ) -> Result<CasOutcome, RegistryError> {
        let what = format!("compare-and-set of {key}");
        if key.is_empty() || key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
            let why =
                format!("keys have 1 to {KEY_BYTES_MAX} bytes, values at most {VALUE_BYTES_MAX}");
            return Err(self.not_done(&what, why));
        }
        let _lock = self.lock(&what)?;
        let mut entries = self.load(&what)?;
        let found = entries.get(key);
        if found.map(|entry| entry.version) != expected {
            return Ok(CasOutcome::Lost(found.cloned()));
        }
        let version = expected.unwrap_or(0) + 1;
        entries.insert(
            key.to_owned(),
            Versioned {
                version,
                value: value.to_vec(),
            },
        );
        let bytes = format::encode(&entries).map_err(|e| self.not_done(&what, e))?;
        let partial = self.dir.join("registry.partial");
        self.store_partial(&partial, &bytes).map_err(|e| {
            self.not_done(&what, format!("cannot write {}: {e}", partial.display()))
        })?;
        self.publish(&partial).map_err(|e| RegistryError::Unknown {
            place: self.path().display().to_string(),
            what,
            why: e.to_string(),
        })?;
        Ok(CasOutcome::Won { version })
    }

    fn list(&mut self, prefix: &str) -> Result<Listing, RegistryError> {
        let what = format!("list of {prefix}");
        let _lock = self.lock(&what)?;
        let entries = self.load(&what)?;
        Ok(entries
            .into_iter()
            .filter(|(key, _)| key.starts_with(prefix))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> FileRegistry {
        FileRegistry::new(
            dir,
            FileRegistryOptions {
                lock_wait: Duration::from_secs(60),
            },
        )
    }

    struct SharedDir(tempfile::TempDir);

    impl SharedDir {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
    }

    impl crate::registry::suite::Store for SharedDir {
        fn open(&self) -> Box<dyn Registry> {
            Box::new(open(self.0.path()))
        }
    }

    crate::registry::suite::registry_suite!(SharedDir::new());

    #[test]
    fn a_crash_after_any_step_leaves_the_old_or_the_new() {
        for step in [Step::Partial, Step::Synced, Step::Renamed, Step::DirSynced] {
            let dir = tempfile::tempdir().unwrap();
            let mut registry = open(dir.path());
            registry.compare_and_set("k", None, b"old").unwrap();
            registry.fail_after = Some(step);
            let error = registry.compare_and_set("k", Some(1), b"new").unwrap_err();
            let after = open(dir.path()).read("k").unwrap().unwrap();
            match error {
                RegistryError::NotDone { .. } => assert_eq!(after.value, b"old", "{step:?}"),
                RegistryError::Unknown { .. } => assert_eq!(after.value, b"new", "{step:?}"),
            }
            let version = after.version;
            let next = open(dir.path())
                .compare_and_set("k", Some(version), b"go on")
                .unwrap();
            assert_eq!(
                next,
                CasOutcome::Won {
                    version: version + 1
                }
            );
        }
    }

    #[test]
    fn a_damaged_file_is_named_and_never_taken_for_empty() {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = open(dir.path());
        registry.compare_and_set("k", None, b"v").unwrap();
        let mut bytes = fs::read(registry.path()).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(registry.path(), bytes).unwrap();
        let error = registry
            .compare_and_set("k", None, b"w")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("damaged") && error.contains("checksum"),
            "{error}"
        );
    }

    #[test]
    fn a_held_lock_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let holder = open(dir.path());
        let lock = holder.lock("test").unwrap();
        let mut hurried = FileRegistry::new(
            dir.path(),
            FileRegistryOptions {
                lock_wait: Duration::ZERO,
            },
        );
        let error = hurried.read("k").unwrap_err();
        assert!(
            matches!(error, RegistryError::NotDone { .. }) && error.to_string().contains("locked")
        );
        drop(lock);
        assert_eq!(hurried.read("k").unwrap(), None);
    }
}
