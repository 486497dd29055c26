//! What heartbeats keep across restarts, in the host's state folder: the pool's keys and the
//! number of the last incarnation; and which one promised as one of two ([`crate::ha`]).

use super::keys::{KeyError, LINE_BYTES_MAX, PoolKeys};
use super::packet::Incarnation;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// File with the keys, as one line.
const KEYS_FILE: &str = "pool.key";
/// File with the last incarnation's number.
const INCARNATION_FILE: &str = "incarnation";
/// File with the incarnation that promised as one of two.
const PROMISED_FILE: &str = "pool.promised";
/// Nobody but root reads the keys.
const MODE: u32 = 0o600;

/// A file of the state folder that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was wanted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others can read the keys.
    #[error("{}: its mode is {mode:o}, so others may have read the pool's keys: chmod 600 it, and change the key if they may have (`pollux pool key rotate`)", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Its content cannot be.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, what to do.
        reason: String,
    },
    /// There are keys already.
    #[error("{}: this host has keys of a pool already; they are not replaced", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_path_buf();
    move |source| StateError::Io { what, path, source }
}

/// At most `cap` bytes of a small file; `None` if there is none.
fn read(path: &Path, cap: usize) -> Result<Option<(String, u32)>, StateError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let mode = file.metadata().map_err(io_error("look at", path))?;
    let mut text = String::new();
    Read::by_ref(&mut file)
        .take(u64::try_from(cap).unwrap_or(u64::MAX))
        .read_to_string(&mut text)
        .map_err(io_error("read", path))?;
    Ok(Some((text, mode.permissions().mode() & 0o777)))
}

/// Write beside, fsync, rename, fsync the folder: the old text or the new, never a part.
fn put(dir: &Path, name: &str, text: &str) -> Result<(), StateError> {
    let path = dir.join(name);
    let partial = dir.join(format!("{name}.partial"));
    let write = || -> io::Result<()> {
        match fs::remove_file(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Of its own from the start, so that it never has another mode.
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(io_error("write", &path))
}

/// Where the keys are in a state folder.
#[must_use]
pub fn keys_path(state_dir: &Path) -> PathBuf {
    state_dir.join(KEYS_FILE)
}

/// The pool's keys; `None` if this host is of no pool.
///
/// # Errors
/// [`StateError`], also if others can read them.
pub fn load_keys(state_dir: &Path) -> Result<Option<PoolKeys>, StateError> {
    let path = keys_path(state_dir);
    let Some((text, mode)) = read(&path, LINE_BYTES_MAX + 1)? else {
        return Ok(None);
    };
    if mode & 0o077 != 0 {
        return Err(StateError::Open { path, mode });
    }
    let keys = text
        .parse()
        .map_err(|error: KeyError| StateError::Content {
            path,
            reason: error.to_string(),
        })?;
    Ok(Some(keys))
}

/// Keep the pool's keys.
///
/// # Errors
/// [`StateError`].
pub fn save_keys(state_dir: &Path, keys: &PoolKeys) -> Result<(), StateError> {
    put(state_dir, KEYS_FILE, &format!("{}\n", keys.to_line()))
}

/// Keep the keys of a host that had none.
///
/// # Errors
/// [`StateError::Exists`] if it had.
pub fn save_first_keys(state_dir: &Path, keys: &PoolKeys) -> Result<(), StateError> {
    let path = keys_path(state_dir);
    if path.exists() {
        return Err(StateError::Exists { path });
    }
    fs::create_dir_all(state_dir).map_err(io_error("create the folder", state_dir))?;
    save_keys(state_dir, keys)
}

/// The number of a new incarnation, on disk before it is returned. To be called once in a
/// start.
///
/// It is higher than every one before it, unless the state folder is lost or set back *and* the
/// wall clock runs behind: the others would refuse the host as an older incarnation of itself
/// until it has caught up, which is safe, and says so in their counters.
///
/// # Errors
/// [`StateError`].
pub fn next_incarnation(state_dir: &Path) -> Result<Incarnation, StateError> {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let wall_ms = wall.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0));
    incarnation_at(state_dir, wall_ms)
}

/// The incarnation that promised as one of two, if one did and none has said since that it counts
/// no more.
///
/// # Errors
/// [`StateError`].
pub fn load_promised(state_dir: &Path) -> Result<Option<Incarnation>, StateError> {
    let path = state_dir.join(PROMISED_FILE);
    let Some((text, _)) = read(&path, 32)? else {
        return Ok(None);
    };
    let number = text.trim().parse();
    number.map(|n| Some(Incarnation(n))).map_err(|_| StateError::Content {
        path,
        reason: "this is not the number of an incarnation: make certain that the other host of the pool is off or has the registry, then delete the file".into(),
    })
}

/// Keep that `promised` promised as one of two, or that none did; on disk when it returns.
///
/// # Errors
/// [`StateError`].
pub fn save_promised(state_dir: &Path, promised: Option<Incarnation>) -> Result<(), StateError> {
    if let Some(Incarnation(number)) = promised {
        return put(state_dir, PROMISED_FILE, &format!("{number}\n"));
    }
    let path = state_dir.join(PROMISED_FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", &path)(error))
        }
        _ => Ok(()),
    }
}

fn incarnation_at(state_dir: &Path, wall_ms: u64) -> Result<Incarnation, StateError> {
    let path = state_dir.join(INCARNATION_FILE);
    let content = |reason: &str| StateError::Content {
        path: path.clone(),
        reason: reason.to_owned(),
    };
    let last: u64 = match read(&path, 32)? {
        None => 0,
        Some((text, _)) => text.trim().parse().map_err(|_| {
            content("this is not the number of an incarnation: delete the file, then the clock counts, and check that it is right")
        })?,
    };
    let next = last.checked_add(1).ok_or_else(|| {
        content("there is no higher incarnation: delete the file on all hosts while none runs")
    })?;
    let next = next.max(wall_ms);
    put(state_dir, INCARNATION_FILE, &format!("{next}\n"))?;
    Ok(Incarnation(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_kept_for_nobody_else_and_not_replaced_by_a_first() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load_keys(dir.path()).unwrap().is_none());
        let keys = PoolKeys::create().unwrap();
        // What a crash left behind has neither say in the mode nor in the content.
        fs::write(dir.path().join("pool.key.partial"), "left").unwrap();
        save_first_keys(dir.path(), &keys).unwrap();
        let path = keys_path(dir.path());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(load_keys(dir.path()).unwrap(), Some(keys.clone()));
        let other = PoolKeys::create().unwrap();
        let error = save_first_keys(dir.path(), &other).unwrap_err();
        assert!(matches!(error, StateError::Exists { .. }));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = load_keys(dir.path()).unwrap_err();
        assert!(
            matches!(error, StateError::Open { mode: 0o640, .. }),
            "{error}"
        );
        save_keys(dir.path(), &keys).unwrap();
        fs::write(&path, keys.to_line().replace("-pool-", "-pond-")).unwrap();
        assert!(matches!(
            load_keys(dir.path()),
            Err(StateError::Content { .. })
        ));
    }

    #[test]
    fn which_incarnation_promised_is_kept_until_it_counts_no_more() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load_promised(dir.path()).unwrap(), None);
        save_promised(dir.path(), None).unwrap();
        for life in [Incarnation(7), Incarnation(u64::MAX)] {
            save_promised(dir.path(), Some(life)).unwrap();
            assert_eq!(load_promised(dir.path()).unwrap(), Some(life));
        }
        save_promised(dir.path(), None).unwrap();
        assert_eq!(load_promised(dir.path()).unwrap(), None);
        fs::write(dir.path().join(PROMISED_FILE), "soon").unwrap();
        let told = load_promised(dir.path()).unwrap_err().to_string();
        assert!(
            told.contains("pool.promised") && told.contains("off"),
            "{told}"
        );
    }

    #[test]
    fn an_incarnation_is_higher_than_every_one_before_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = Incarnation(0);
        for wall_ms in [1_000, 1_000, 5_000, 3, 0, 5_001] {
            let next = incarnation_at(dir.path(), wall_ms).unwrap();
            assert!(next > last && next.0 >= wall_ms);
            let kept = fs::read_to_string(dir.path().join(INCARNATION_FILE)).unwrap();
            assert_eq!(kept, format!("{}\n", next.0), "kept before it is used");
            last = next;
        }
        // The folder is lost: the clock carries on.
        fs::remove_file(dir.path().join(INCARNATION_FILE)).unwrap();
        assert!(incarnation_at(dir.path(), 9_000).unwrap() > last);
        fs::write(dir.path().join(INCARNATION_FILE), "many").unwrap();
        assert!(incarnation_at(dir.path(), 9_000).is_err());
        fs::write(dir.path().join(INCARNATION_FILE), u64::MAX.to_string()).unwrap();
        assert!(incarnation_at(dir.path(), 9_000).is_err());
    }
}
