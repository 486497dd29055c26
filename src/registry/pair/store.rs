//! The file that a host's copy is in: written beside, fsynced, renamed, the folder fsynced, so
//! that a crash leaves the old copy or the new one.

use super::copy::{BadCopy, COPY_BYTES_MAX, OwnCopy, Owner, Side, Standing, decode, encode};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const FILE: &str = "registry.pair";
const PARTIAL: &str = "registry.pair.partial";
const LOCK: &str = "registry.pair.lock";

/// Why a copy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was wanted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{0} is locked: another daemon of this host runs")]
    Locked(PathBuf),
    /// There is none.
    #[error("{0} holds no copy of a pair's registry")]
    None(PathBuf),
    /// It is not what was written.
    #[error(
        "{path} is damaged: {bad}; if the partner is well, remove this file, and it is copied anew from there (docs/registry.md)"
    )]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        bad: BadCopy,
    },
}

/// The file, and the lock on it.
pub(super) struct Store {
    dir: PathBuf,
    owner: Owner,
    _lock: Flock<File>,
    /// The next store fails, before or after the file is in its place.
    #[cfg(test)]
    pub(super) fails: Option<bool>,
}

fn io_error<'p>(what: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> StoreError + 'p {
    move |source| StoreError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

impl Store {
    /// Take it up; no other process can until this one ends.
    pub(super) fn open(dir: &Path, owner: Owner) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(io_error("make", dir))?;
        let path = dir.join(LOCK);
        let file = File::create(&path).map_err(io_error("open", &path))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(StoreError::Locked(path)),
            Err((_, e)) => return Err(io_error("lock", &path)(e.into())),
        };
        Ok(Self {
            dir: dir.to_owned(),
            owner,
            _lock: lock,
            #[cfg(test)]
            fails: None,
        })
    }

    /// The copy; a new one if there is none.
    pub(super) fn load(&self) -> Result<OwnCopy, StoreError> {
        let path = self.dir.join(FILE);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(OwnCopy::new()),
            Err(e) => return Err(io_error("open", &path)(e)),
        };
        let mut bytes = Vec::new();
        let most = u64::try_from(COPY_BYTES_MAX + 1).unwrap_or(u64::MAX);
        Read::by_ref(&mut file)
            .take(most)
            .read_to_end(&mut bytes)
            .map_err(io_error("read", &path))?;
        let copy = decode(self.owner, &bytes).map_err(|bad| StoreError::Bad {
            path: path.clone(),
            bad,
        })?;
        // Of a store that failed after its rename it is not known whether the rename is durable.
        file.sync_all().map_err(io_error("sync", &path))?;
        self.sync_folder()?;
        Ok(copy)
    }

    /// Make this the copy. After an error the old or the new one is.
    pub(super) fn store(&mut self, copy: &OwnCopy) -> Result<(), StoreError> {
        let path = self.dir.join(FILE);
        let partial = self.dir.join(PARTIAL);
        let bytes = encode(self.owner, copy).map_err(|bad| StoreError::Bad {
            path: path.clone(),
            bad,
        })?;
        let mut file = File::create(&partial).map_err(io_error("make", &partial))?;
        file.write_all(&bytes)
            .and_then(|()| file.sync_all())
            .map_err(io_error("write", &partial))?;
        #[cfg(test)]
        if self.fails == Some(false) {
            self.fails = None;
            return Err(io_error("rename", &partial)(io::Error::other("a test")));
        }
        fs::rename(&partial, &path).map_err(io_error("rename", &partial))?;
        #[cfg(test)]
        if self.fails == Some(true) {
            self.fails = None;
            return Err(io_error("sync", &self.dir)(io::Error::other("a test")));
        }
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<(), StoreError> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(io_error("sync", &self.dir))
    }
}

/// Make the copy in `dir` stand alone, on the word of somebody who knows that the other host's
/// counts no more. The number of changes in it.
///
/// # Errors
/// [`StoreError`]: nothing has been done, or what a read of the file says.
pub fn declare_alone(dir: &Path, pool: [u8; 16]) -> Result<u64, StoreError> {
    let none = || StoreError::None(dir.to_owned());
    if !dir.join(FILE).exists() {
        return Err(none());
    }
    let mut store = Store::open(
        dir,
        Owner {
            pool,
            side: Side::Lower,
        },
    )?;
    let mut copy = match store.load() {
        Err(StoreError::Bad {
            bad: BadCopy::Side, ..
        }) => {
            store.owner.side = Side::Higher;
            store.load()?
        }
        loaded => loaded?,
    };
    if copy.standing == Standing::New {
        return Err(none());
    }
    if let Some(change) = copy.prepared.take() {
        copy.apply(&change);
    }
    copy.standing = Standing::Alone;
    copy.epoch.0 += 1;
    store.store(&copy)?;
    Ok(copy.seq.0)
}

#[cfg(test)]
mod tests {
    use super::super::copy::Epoch;
    use super::*;

    const OWNER: Owner = Owner {
        pool: [1; 16],
        side: Side::Lower,
    };

    fn copy(epoch: u64) -> OwnCopy {
        OwnCopy {
            standing: Standing::Paired,
            epoch: Epoch(epoch),
            ..OwnCopy::new()
        }
    }

    #[test]
    fn a_store_that_fails_leaves_the_old_copy_or_the_new() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), OWNER).unwrap();
        assert_eq!(store.load().unwrap(), OwnCopy::new());
        store.store(&copy(1)).unwrap();
        store.fails = Some(false);
        store.store(&copy(2)).unwrap_err();
        assert_eq!(store.load().unwrap(), copy(1));
        store.fails = Some(true);
        store.store(&copy(3)).unwrap_err();
        assert_eq!(store.load().unwrap(), copy(3));
    }

    #[test]
    fn a_damaged_copy_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), OWNER).unwrap();
        store.store(&copy(1)).unwrap();
        let path = dir.path().join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        let told = store.load().unwrap_err().to_string();
        assert!(
            told.contains("is damaged") && told.contains("copied anew"),
            "{told}"
        );
    }

    #[test]
    fn two_daemons_do_not_share_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let _one = Store::open(dir.path(), OWNER).unwrap();
        let two = Store::open(dir.path(), OWNER).err().unwrap();
        assert!(matches!(two, StoreError::Locked(_)), "{two}");
    }
}
