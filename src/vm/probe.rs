//! What this host can: its QEMU, its machine types, its kernel.
//!
//! Every answer that is "no" says what to install or change. The accelerator is
//! found out in [`super::accel`].
//!
//! Must never: take a version number as proof of what can be tried.

use crate::pool::spec::{Machine, MachineFamily, VmSpec, version_key};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;

/// Version of a QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QemuVersion {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Micro number.
    pub micro: u32,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Oldest QEMU pollux runs: the one everything was measured on, and the first
/// with `-netdev dgram` (QEMU 7.2's release notes).
pub const QEMU_MIN: QemuVersion = QemuVersion {
    major: 7,
    minor: 2,
    micro: 0,
};

/// The QEMU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuBinary {
    /// The program.
    pub program: PathBuf,
    /// Its version.
    pub version: QemuVersion,
    /// Names of the machine types it has, aliases included.
    pub machines: Vec<String>,
}

/// Why this host's QEMU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// It is not there.
    #[error("{} is not installed: install the package qemu-system-x86 (apt-get install qemu-system-x86)", program.display())]
    Missing {
        /// The program.
        program: PathBuf,
    },
    /// It cannot be run.
    #[error("cannot run {} {argument}: {why}; install the package qemu-system-x86 again", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What it was asked.
        argument: &'static str,
        /// What went wrong.
        why: String,
    },
    /// It does not say its version.
    #[error("{} is not QEMU: it says {said:?}; install the package qemu-system-x86", program.display())]
    NotQemu {
        /// The program.
        program: PathBuf,
        /// Its first line.
        said: String,
    },
    /// It is too old.
    #[error("{} is QEMU {version}; pollux needs {QEMU_MIN} or later: upgrade the package qemu-system-x86", program.display())]
    TooOld {
        /// The program.
        program: PathBuf,
        /// Its version.
        version: QemuVersion,
    },
}

/// Look at the QEMU called `program` (see [`super::argv::QEMU`]): its version and
/// machine types.
///
/// # Errors
/// [`QemuError`].
pub fn find_qemu(program: &str) -> Result<QemuBinary, QemuError> {
    let said = ask(program, "--version")?;
    let version = parse_version(&said).ok_or_else(|| QemuError::NotQemu {
        program: program.into(),
        said: said.lines().next().unwrap_or_default().to_owned(),
    })?;
    if version < QEMU_MIN {
        return Err(QemuError::TooOld {
            program: program.into(),
            version,
        });
    }
    let list = Command::new(program).args(["-machine", "help"]).output();
    let list = output(program, "-machine help", list)?;
    Ok(QemuBinary {
        program: program.into(),
        version,
        machines: parse_machines(&list),
    })
}

fn ask(program: &str, argument: &'static str) -> Result<String, QemuError> {
    output(
        program,
        argument,
        Command::new(program).arg(argument).output(),
    )
}

fn output(
    program: &str,
    argument: &'static str,
    output: io::Result<std::process::Output>,
) -> Result<String, QemuError> {
    let failed = |why| QemuError::Run {
        program: program.into(),
        argument,
        why,
    };
    match output {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(QemuError::Missing {
            program: program.into(),
        }),
        Err(e) => Err(failed(e.to_string())),
        Ok(out) if !out.status.success() => Err(failed(format!(
            "{}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        ))),
        Ok(out) => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
    }
}

/// `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(said: &str) -> Option<QemuVersion> {
    let rest = said.strip_prefix("QEMU emulator version ")?;
    let number = rest.split([' ', '\n', '(']).next()?;
    // A development build is 9.0.50-something.
    let number = number.split('-').next()?;
    let (major, minor, micro) = version_key(number)?;
    Some(QemuVersion {
        major,
        minor,
        micro,
    })
}

/// Names in the list of `-machine help`: the first word of every line but the title.
fn parse_machines(list: &str) -> Vec<String> {
    list.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// No machine type that both hosts have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// The one asked for is missing on one side.
    #[error(
        "machine type {name} is missing in the QEMU of {side}: use another `machine`, or one that both have: {common}"
    )]
    Missing {
        /// The type asked for.
        name: String,
        /// "this host" or "the partner".
        side: &'static str,
        /// What both have, newest first.
        common: String,
    },
    /// The family has no type in common.
    #[error(
        "the QEMUs of this host and the partner have no {family} machine type in common: use another `machine`, or bring both to the same QEMU"
    )]
    NoneInCommon {
        /// The family, as its alias.
        family: &'static str,
    },
}

/// The versioned machine type both sides name: the one the spec asks for, or the
/// newest of its family that both lists hold (so, of the older QEMU). For a VM
/// that is not mirrored, give the same list twice. Pure.
///
/// A microvm has no versions in QEMU: its type is `microvm` everywhere.
///
/// # Errors
/// [`MachineError`].
pub fn common_machine(
    spec: &VmSpec,
    ours: &[String],
    theirs: &[String],
) -> Result<String, MachineError> {
    let family = spec.machine_family();
    let common = common_types(family, ours, theirs);
    let wanted = match &spec.machine {
        Machine::Versioned { name, .. } => name.as_str(),
        _ => {
            let none = MachineError::NoneInCommon {
                family: family.alias(),
            };
            return common.into_iter().next().ok_or(none);
        }
    };
    for (list, side) in [(ours, "this host"), (theirs, "the partner")] {
        if !list.iter().any(|name| name == wanted) {
            return Err(MachineError::Missing {
                name: wanted.to_owned(),
                side,
                common: common.join(", "),
            });
        }
    }
    Ok(wanted.to_owned())
}

/// Types of a family in both lists, newest first.
fn common_types(family: MachineFamily, ours: &[String], theirs: &[String]) -> Vec<String> {
    let Some(prefix) = family.version_prefix() else {
        let alias = family.alias().to_owned();
        let both = ours.contains(&alias) && theirs.contains(&alias);
        return if both { vec![alias] } else { vec![] };
    };
    let age = |name: &str| name.strip_prefix(prefix).and_then(version_key);
    let mut common: Vec<String> = ours
        .iter()
        .filter(|name| age(name).is_some() && theirs.contains(name))
        .cloned()
        .collect();
    common.sort_by_key(|name| std::cmp::Reverse(age(name)));
    common
}

/// Why this host cannot mirror a VM.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Not root.
    #[error(
        "pollux runs as user {uid}; it must run as root: start it with sudo or as a system service"
    )]
    NotRoot {
        /// Effective user id.
        uid: u32,
    },
    /// No `PAGEMAP_SCAN`.
    #[error(
        "the kernel has no PAGEMAP_SCAN ({why}), with which dirty memory is found: boot Linux 6.7 or later"
    )]
    NoPagemapScan {
        /// What the kernel said.
        why: io::Error,
    },
    /// No userfaultfd at all.
    #[error(
        "the kernel gives no userfaultfd ({why}), with which dirty memory is tracked: boot a kernel built with CONFIG_USERFAULTFD, Linux 6.7 or later"
    )]
    NoUserfaultfd {
        /// What the kernel said.
        why: io::Error,
    },
    /// A userfaultfd that cannot track writes.
    #[error(
        "the kernel's userfaultfd has no asynchronous write tracking (WP_ASYNC; {why}): boot Linux 6.7 or later"
    )]
    NoWriteTracking {
        /// What the kernel said.
        why: io::Error,
    },
}

/// Can this host mirror VMs: are we root, and does the kernel track writes? Tries
/// each thing on this very process.
///
/// # Errors
/// [`HostError`], the first thing missing.
pub fn check_host() -> Result<(), HostError> {
    // SAFETY: no preconditions.
    let uid = unsafe { libc::geteuid() };
    if uid != 0 {
        return Err(HostError::NotRoot { uid });
    }
    try_pagemap_scan().map_err(|why| HostError::NoPagemapScan { why })?;
    let fd = open_userfaultfd().map_err(|why| HostError::NoUserfaultfd { why })?;
    try_write_tracking(&fd).map_err(|why| HostError::NoWriteTracking { why })
}

/// `struct pm_scan_arg` (Linux include/uapi/linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` (the same header).
#[repr(C)]
#[derive(Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const _: () = assert!(size_of::<PmScanArg>() == 0x60);
const PAGE_IS_PRESENT: u64 = 1 << 3;

fn try_pagemap_scan() -> io::Result<()> {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let page = Box::new(Page([1; 4096]));
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut region = PageRegion::default();
    let start = page.0.as_ptr() as u64;
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start,
        end: start + 4096,
        vec: (&raw mut region) as u64,
        vec_len: 1,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT,
        ..PmScanArg::default()
    };
    // SAFETY: `arg` has the layout and size the request encodes; `vec` points to one region
    // that outlives the call; the scanned page is only looked at.
    let result = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn open_userfaultfd() -> io::Result<OwnedFd> {
    /// `UFFD_USER_MODE_ONLY` (Linux include/uapi/linux/userfaultfd.h).
    const USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: integers only.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_userfaultfd,
            libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn try_write_tracking(fd: &OwnedFd) -> io::Result<()> {
    /// `struct uffdio_api` (Linux include/uapi/linux/userfaultfd.h).
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    /// `_IOWR(0xAA, 0x3f, struct uffdio_api)`.
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    const WP_UNPOPULATED: u64 = 1 << 13;
    const WP_ASYNC: u64 = 1 << 15;
    let mut api = Api {
        api: 0xaa,
        features: WP_ASYNC | WP_HUGETLBFS_SHMEM | WP_UNPOPULATED,
        ioctls: 0,
    };
    // SAFETY: `api` has the layout and size the request encodes and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(machine: &str) -> VmSpec {
        VmSpec::parse(
            &format!(
                "name = \"a\"\nuuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"\nmemory = \"64 \
                 MiB\"\nkernel = \"/k\"\nmachine = \"{machine}\""
            ),
            "-",
        )
        .unwrap()
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn versions_are_read_as_distributions_print_them() {
        let version = |text| parse_version(text).map(|version| version.to_string());
        assert_eq!(
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright").as_deref(),
            Some("7.2.22")
        );
        assert_eq!(
            version("QEMU emulator version 10.0.13\n").as_deref(),
            Some("10.0.13")
        );
        assert_eq!(
            version("QEMU emulator version 9.0.50-v9-dirty\n").as_deref(),
            Some("9.0.50")
        );
        assert_eq!(version("bash 5"), None);
        assert_eq!(version("QEMU emulator version x"), None);
        assert!(parse_version("QEMU emulator version 7.1.9").unwrap() < QEMU_MIN);
        assert!(parse_version("QEMU emulator version 10.0.0").unwrap() > QEMU_MIN);
    }

    #[test]
    fn the_machine_type_is_the_newest_both_have() {
        let old = names(&["microvm", "pc", "q35", "pc-q35-7.2", "pc-q35-6.2"]);
        let new = names(&[
            "microvm",
            "q35",
            "pc-q35-10.0",
            "pc-q35-7.2",
            "pc-q35-6.2",
            "pc-i440fx-10.0",
        ]);
        let both = |machine| common_machine(&spec(machine), &new, &old);
        assert_eq!(both("q35").unwrap(), "pc-q35-7.2");
        assert_eq!(both("microvm").unwrap(), "microvm");
        assert_eq!(both("pc-q35-6.2").unwrap(), "pc-q35-6.2");
        assert_eq!(
            common_machine(&spec("q35"), &new, &new).unwrap(),
            "pc-q35-10.0"
        );
        assert_eq!(
            both("pc-q35-10.0").unwrap_err().to_string(),
            "machine type pc-q35-10.0 is missing in the QEMU of the partner: use another `machine`, or \
             one that both have: pc-q35-7.2, pc-q35-6.2"
        );
        assert_eq!(
            both("pc").unwrap_err().to_string(),
            "the QEMUs of this host and the partner have no pc machine type in common: use another \
             `machine`, or bring both to the same QEMU"
        );
    }

    #[test]
    fn a_missing_an_old_and_a_strange_qemu_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path.display().to_string()
        };
        let missing = dir.path().join("none").display().to_string();
        assert_eq!(
            find_qemu(&missing).unwrap_err().to_string(),
            format!(
                "{missing} is not installed: install the package qemu-system-x86 (apt-get install \
                 qemu-system-x86)"
            )
        );
        let old = script("old", "echo 'QEMU emulator version 6.2.0 (x)'");
        assert_eq!(
            find_qemu(&old).unwrap_err().to_string(),
            format!(
                "{old} is QEMU 6.2.0; pollux needs 7.2.0 or later: upgrade the package qemu-system-x86"
            )
        );
        let strange = script("strange", "echo hello");
        assert!(
            find_qemu(&strange)
                .unwrap_err()
                .to_string()
                .contains("is not QEMU: it says \"hello\"")
        );
        let broken = script("broken", "echo bad library >&2; exit 127");
        assert!(
            find_qemu(&broken)
                .unwrap_err()
                .to_string()
                .contains("bad library")
        );
    }

    #[test]
    fn a_host_without_the_ioctl_says_what_to_boot() {
        let why = || io::Error::from_raw_os_error(libc::ENOTTY);
        assert_eq!(
            HostError::NoPagemapScan { why: why() }.to_string(),
            "the kernel has no PAGEMAP_SCAN (Inappropriate ioctl for device (os error 25)), with which \
             dirty memory is found: boot Linux 6.7 or later"
        );
    }
}
