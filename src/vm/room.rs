//! Room for a VM: its run directory, its RAM file, and memory enough for both.
//!
//! Must never: let a VM start that the host cannot hold. A tmpfs that runs full
//! kills the guest with `SIGBUS` in the middle of its work, so the room is
//! checked before.

use nix::sys::statvfs::statvfs;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use super::argv::VmPaths;
use crate::pool::spec::SizeBytes;

/// Why there is no room for a VM's memory.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// The RAM directory cannot be asked.
    #[error("cannot ask {} for its free space: {source}", dir.display())]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The RAM directory is not in memory.
    #[error("{} is not a tmpfs: guest memory must not lie on a disk; use a directory below /dev/shm, or mount a tmpfs there", dir.display())]
    NotTmpfs {
        /// The directory.
        dir: PathBuf,
    },
    /// The tmpfs is too small.
    #[error(
        "{} has {} free, the VM needs {}: {} are missing; stop another VM, give the VM less memory, \
         or enlarge the tmpfs (mount -o remount,size=…)",
        dir.display(), SizeBytes(*free), SizeBytes(*need), SizeBytes(need - free)
    )]
    Tmpfs {
        /// The directory.
        dir: PathBuf,
        /// Free bytes.
        free: u64,
        /// Bytes the VM needs.
        need: u64,
    },
    /// The host has not enough memory.
    #[error(
        "the host has {} of memory available, the VM needs {} (its memory and {} beside it): {} are \
         missing; stop another VM or give the VM less memory",
        SizeBytes(*free), SizeBytes(*need), SizeBytes(MEMORY_BESIDE_GUEST), SizeBytes(need - free)
    )]
    Memory {
        /// Bytes available.
        free: u64,
        /// Bytes the VM needs, with [`MEMORY_BESIDE_GUEST`].
        need: u64,
    },
    /// /proc/meminfo does not say what is available.
    #[error("cannot read MemAvailable from /proc/meminfo: {0}")]
    Meminfo(String),
}

/// Memory kept free beside the guest's RAM: QEMU itself (some 60 MB under TCG)
/// and the staging of the first epochs.
pub const MEMORY_BESIDE_GUEST: u64 = 128 << 20;

/// Is there room for `bytes` of guest RAM, in the tmpfs at `ram_dir` and in the host?
///
/// # Errors
/// [`RoomError`] says how much is missing and what to do.
pub fn check_memory_room(ram_dir: &Path, bytes: u64) -> Result<(), RoomError> {
    let dir_error = |source: nix::errno::Errno| RoomError::Dir {
        dir: ram_dir.to_owned(),
        source: source.into(),
    };
    let kind = nix::sys::statfs::statfs(ram_dir).map_err(dir_error)?;
    if kind.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC {
        return Err(RoomError::NotTmpfs {
            dir: ram_dir.to_owned(),
        });
    }
    let space = statvfs(ram_dir).map_err(dir_error)?;
    // A tmpfs mounted with size=0 has no limit of its own and reports no blocks at all.
    if space.blocks() != 0 {
        let free = space
            .blocks_available()
            .saturating_mul(space.fragment_size());
        if free < bytes {
            return Err(RoomError::Tmpfs {
                dir: ram_dir.to_owned(),
                free,
                need: bytes,
            });
        }
    }
    let meminfo =
        fs::read_to_string("/proc/meminfo").map_err(|e| RoomError::Meminfo(e.to_string()))?;
    check_available(&meminfo, bytes)
}

/// Does `meminfo` (/proc/meminfo) leave room for `bytes` and what is beside them?
fn check_available(meminfo: &str, bytes: u64) -> Result<(), RoomError> {
    let free =
        mem_available(meminfo).ok_or_else(|| RoomError::Meminfo("no such line".to_owned()))?;
    let need = bytes.saturating_add(MEMORY_BESIDE_GUEST);
    if free < need {
        return Err(RoomError::Memory { free, need });
    }
    Ok(())
}

/// `MemAvailable` of a /proc/meminfo, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A step of making a VM's place that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {}: {source}{}", path.display(), hint(source))]
pub struct PlaceError {
    /// What was tried, as "create the directory".
    pub step: &'static str,
    /// On what.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; check the path in the VM's spec",
        io::ErrorKind::PermissionDenied => "; pollux must run as root",
        _ => "",
    }
}

/// Turns an `io::Error` into a [`PlaceError`].
fn at<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> PlaceError + 'a {
    move |source| PlaceError {
        step,
        path: path.to_owned(),
        source,
    }
}

/// Create `dir` for the sockets of one VM: owned by QEMU's `uid` and `gid`, closed
/// to everybody else. Both QEMU and pollux (root) make sockets in it. An existing
/// directory is kept and put right.
///
/// # Errors
/// [`PlaceError`].
pub fn prepare_run_dir(dir: &Path, uid: u32, gid: u32) -> Result<(), PlaceError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(at("create the directory", dir))?;
    give(dir, uid, gid, 0o770)
}

/// Hand `path` (a socket pollux listens on, or a file) to QEMU's `uid` and `gid`.
///
/// # Errors
/// [`PlaceError`].
pub fn give(path: &Path, uid: u32, gid: u32, mode: u32) -> Result<(), PlaceError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(at("set the mode of", path))?;
    std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(at("set the owner of", path))
}

/// Create the sparse RAM file of `bytes` at `path`, owned by `uid` and `gid`.
/// Replaces an old one: what an earlier guest left must not be read by this one.
///
/// # Errors
/// [`PlaceError`].
pub fn create_ram_file(path: &Path, bytes: u64, uid: u32, gid: u32) -> Result<File, PlaceError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(at("remove the old", path)(e));
        }
        _ => {}
    }
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(at("create the RAM file", path))?;
    file.set_len(bytes).map_err(at("size the RAM file", path))?;
    fchown(&file, Some(uid), Some(gid)).map_err(at("set the owner of", path))?;
    Ok(file)
}

/// Copy kernel, initial RAM disk and firmware into the run directory, readable by
/// QEMU's `uid` (the originals often lie below a directory only root may enter),
/// and point `paths` at the copies. QEMU reads them only while it starts: they may
/// be removed after.
///
/// # Errors
/// [`PlaceError`].
pub fn stage_boot_files(paths: &mut VmPaths, uid: u32, gid: u32) -> Result<(), PlaceError> {
    let VmPaths {
        run_dir,
        kernel,
        initrd,
        firmware,
        ..
    } = paths;
    for (file, name) in [
        (kernel, "kernel"),
        (initrd, "initrd"),
        (firmware, "firmware"),
    ] {
        let Some(from) = file else { continue };
        let to = run_dir.join(name);
        if *from == to {
            continue;
        }
        let mut source = File::open(&*from).map_err(at("open the boot file", from))?;
        let mut copy = File::create(&to).map_err(at("create", &to))?;
        io::copy(&mut source, &mut copy).map_err(at("copy the boot file", from))?;
        give(&to, uid, gid, 0o400)?;
        *from = to;
    }
    Ok(())
}

/// The group that owns /dev/kvm, for [`super::process::SpawnOpts::groups`].
#[must_use]
pub fn kvm_group() -> Option<u32> {
    fs::metadata("/dev/kvm").ok().map(|meta| meta.gid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_available_says_how_much_is_missing() {
        let meminfo = "MemTotal:  4194304 kB\nMemAvailable:   1048576 kB\nBuffers: 1 kB\n";
        assert!(check_available(meminfo, (1 << 30) - MEMORY_BESIDE_GUEST).is_ok());
        assert_eq!(
            check_available(meminfo, 1 << 30).unwrap_err().to_string(),
            "the host has 1 GiB of memory available, the VM needs 1152 MiB (its memory and 128 MiB beside \
             it): 128 MiB are missing; stop another VM or give the VM less memory"
        );
        assert!(matches!(
            check_available("MemFree: 1 kB", 1),
            Err(RoomError::Meminfo(_))
        ));
    }

    #[test]
    fn an_old_ram_file_is_not_handed_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        fs::write(&path, "of the guest before").unwrap();
        let file = create_ram_file(&path, 1 << 20, 0, 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![0; 1 << 20]);
        let meta = file.metadata().unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.blocks()), (0o600, 0));
    }
}
