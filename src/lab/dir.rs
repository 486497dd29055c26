//! A lab's directory: whose it is, whether that one lives, and how it is emptied.
//!
//! The keeper holds an exclusive flock(2) on `lock` as long as it lives; the kernel
//! drops it with the keeper, however that dies. So: locked = alive, not locked = stale.
//! Only a directory with our marker file is ever emptied.

use super::LabError;
use super::spec::LabPlan;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

const LOCK_FILE: &str = "lock";
const PLAN_FILE: &str = "lab.json";
/// Between two looks at the lock of a keeper that was told to end.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// What `take_down` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenDown {
    /// A living lab; it is gone now.
    WasUp,
    /// The remains of a crashed one; they are removed.
    WasStale,
    /// Nothing.
    WasNotThere,
}

/// What is in a lab's directory.
pub(super) enum Found {
    Nothing,
    /// Its keeper lives.
    Alive,
    /// No keeper; the lock is now ours.
    Stale(File),
}

/// Look at the directory without changing it.
pub(super) fn look(dir: &Path) -> Result<Found, LabError> {
    loop {
        let path = dir.join(LOCK_FILE);
        let lock = match File::options().read(true).write(true).open(&path) {
            Ok(lock) => lock,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return match fs::read_dir(dir) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
                    Err(e) => Err(LabError::io(format!("reading {}", dir.display()))(e)),
                    Ok(mut entries) => match entries.next() {
                        None => Ok(Found::Nothing),
                        Some(_) => Err(LabError::ForeignDir {
                            dir: dir.to_owned(),
                        }),
                    },
                };
            }
            Err(e) => return Err(LabError::io(format!("opening {}", path.display()))(e)),
        };
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(Found::Alive),
            Err(TryLockError::Error(e)) => {
                return Err(LabError::io(format!("locking {}", path.display()))(e));
            }
            // Another one may have removed the directory between open and lock.
            Ok(()) if still_there(&lock, &path) => return Ok(Found::Stale(lock)),
            Ok(()) => {}
        }
    }
}

fn still_there(lock: &File, path: &Path) -> bool {
    match (lock.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => ours.ino() == there.ino() && ours.dev() == there.dev(),
        _ => false,
    }
}

/// Make the directory ours: empty, locked, with the hosts' directories in it.
pub(super) fn claim(plan: &LabPlan) -> Result<File, LabError> {
    let dir = &plan.dir;
    let lock = loop {
        match look(dir)? {
            Found::Alive => {
                return Err(LabError::NameTaken {
                    name: plan.name.clone(),
                    dir: dir.clone(),
                });
            }
            Found::Stale(lock) => {
                empty(dir, true)?;
                break lock;
            }
            Found::Nothing => {
                fs::create_dir_all(dir)
                    .map_err(LabError::io(format!("making {}", dir.display())))?;
                let path = dir.join(LOCK_FILE);
                // Whoever makes the file first goes on; the other one looks again.
                match File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(&path)
                {
                    Ok(lock) if lock.try_lock().is_ok() && still_there(&lock, &path) => break lock,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(LabError::io(format!("making {}", path.display()))(e)),
                }
            }
        }
    };
    write_plan(plan)?;
    for host in &plan.hosts {
        for path in [&host.state_dir, &host.run_dir, &host.shared_dir] {
            fs::create_dir_all(path).map_err(LabError::io(format!("making {}", path.display())))?;
        }
    }
    Ok(lock)
}

fn write_plan(plan: &LabPlan) -> Result<(), LabError> {
    let path = plan.dir.join(PLAN_FILE);
    let text = serde_json::to_vec_pretty(plan).map_err(|e| LabError::Io {
        what: format!("writing {}", path.display()),
        source: e.into(),
    })?;
    fs::write(&path, text).map_err(LabError::io(format!("writing {}", path.display())))
}

/// The plan of the lab in this directory.
pub(super) fn read_plan(dir: &Path) -> Result<LabPlan, LabError> {
    let path = dir.join(PLAN_FILE);
    let text = fs::read(&path).map_err(LabError::io(format!("reading {}", path.display())))?;
    serde_json::from_slice(&text).map_err(|e| LabError::Io {
        what: format!("reading {}", path.display()),
        source: e.into(),
    })
}

/// Remove everything in a lab's directory, and the directory unless `keep_lock`. The
/// caller holds the lock. The lock file goes last, so a half-emptied one is still stale.
pub(super) fn empty(dir: &Path, keep_lock: bool) -> Result<(), LabError> {
    let entries = fs::read_dir(dir).map_err(LabError::io(format!("reading {}", dir.display())))?;
    for entry in entries {
        let entry = entry.map_err(LabError::io(format!("reading {}", dir.display())))?;
        if entry.file_name() == LOCK_FILE {
            continue;
        }
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        let removed = if is_dir {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(LabError::io(format!("removing {}", path.display()))(e));
            }
            _ => {}
        }
    }
    if keep_lock {
        return Ok(());
    }
    for removed in [fs::remove_file(dir.join(LOCK_FILE)), fs::remove_dir(dir)] {
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(LabError::io(format!("removing {}", dir.display()))(e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Wait until no keeper holds the directory. True once it is free (or gone).
pub(super) fn wait_released(dir: &Path, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        match look(dir) {
            Ok(Found::Alive) if Instant::now() < end => std::thread::sleep(LOCK_POLL),
            Ok(Found::Alive) => return false,
            _ => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::LabSpec;

    fn plan(dir: &Path) -> LabPlan {
        let mut spec = LabSpec::new("t", Box::new(|_, _| String::new())).unwrap();
        spec.dir = dir.join("lab");
        spec.plan().unwrap()
    }

    #[test]
    fn a_held_lab_is_taken_and_a_dropped_one_is_stale() {
        let tmp = tempfile::tempdir().unwrap();
        let plan = plan(tmp.path());
        let lock = claim(&plan).unwrap();
        fs::write(plan.hosts[0].state_dir.join("disk"), "old").unwrap();
        assert!(matches!(claim(&plan), Err(LabError::NameTaken { .. })));
        drop(lock);
        let _again = claim(&plan).unwrap();
        assert!(
            !plan.hosts[0].state_dir.join("disk").exists(),
            "remains of the crashed lab"
        );
        assert_eq!(read_plan(&plan.dir).unwrap().hosts, plan.hosts);
    }

    #[test]
    fn a_directory_of_others_is_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let plan = plan(tmp.path());
        fs::create_dir(&plan.dir).unwrap();
        fs::write(plan.dir.join("thesis.txt"), "years").unwrap();
        assert!(matches!(claim(&plan), Err(LabError::ForeignDir { .. })));
        assert!(plan.dir.join("thesis.txt").exists());
    }
}
