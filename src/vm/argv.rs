//! QEMU's command line, from a spec. Pure.
//!
//! Invariant: primary and standby get the same line apart from paths and
//! `-S -incoming defer` (QEMU.md section 2).

use crate::pool::spec::VmSpec;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The accelerator in use on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accel {
    /// The kernel's.
    Kvm,
    /// QEMU's own, one thread a vCPU.
    Tcg,
}

/// Which side of a mirrored VM the QEMU is started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Runs at once.
    Primary,
    /// Waits, stopped, for `migrate-incoming`.
    Standby,
}

/// The QMP sockets of one QEMU. Several, because a command typed ahead on a
/// monitor blocks it for everything else (QEMU.md section 4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpPaths {
    /// Queries and everything that is not urgent.
    pub control: PathBuf,
    /// `stop` and `cont`.
    pub run: PathBuf,
    /// `xen-save-devices-state`.
    pub save: PathBuf,
    /// For people and drills.
    pub spare: PathBuf,
}

/// The two ends of one NIC's datagram link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicPaths {
    /// The socket the egress gate binds; QEMU sends to it.
    pub gate: PathBuf,
    /// The socket QEMU binds; the egress gate sends to it.
    pub qemu: PathBuf,
}

/// Every path in one VM's life on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths {
    /// Folder of all sockets below, owned by QEMU's uid.
    pub run_dir: PathBuf,
    /// The guest's RAM, on a tmpfs.
    pub ram_file: PathBuf,
    /// QMP sockets; QEMU listens.
    pub qmp: QmpPaths,
    /// One NBD socket a disk, in the spec's order; pollux listens.
    pub nbd: Vec<PathBuf>,
    /// One link a NIC, in the spec's order.
    pub nics: Vec<NicPaths>,
    /// Serial console; QEMU listens.
    pub console: PathBuf,
    /// What the console has said.
    pub console_log: PathBuf,
    /// Where QEMU saves the device state of a checkpoint.
    pub state_file: PathBuf,
    /// Where a standby listens for its device state at promotion.
    pub incoming: PathBuf,
    /// QEMU's own output.
    pub qemu_log: PathBuf,
    /// Kernel to load: the spec's, or a copy of it that QEMU's uid can read.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk, likewise.
    pub initrd: Option<PathBuf>,
    /// Firmware image, likewise.
    pub firmware: Option<PathBuf>,
}

/// The command line of one QEMU; the first item is the program's name.
#[must_use]
pub fn command_line(
    spec: &VmSpec,
    machine_versioned: &str,
    side: Side,
    paths: &VmPaths,
    accel: Accel,
) -> Vec<OsString> {
    let _ = (spec, machine_versioned, side, paths, accel);
    Vec::new()
}

impl VmPaths {
    /// The usual layout: everything in `run_dir` (one folder a VM, on a tmpfs), the
    /// RAM file in `ram_dir`.
    ///
    /// # Errors
    /// [`PathTooLong`] if a socket path does not fit into a socket address.
    pub fn new(spec: &VmSpec, run_dir: &Path, ram_dir: &Path) -> Result<Self, PathTooLong> {
        let _ = (spec, ram_dir);
        Err(PathTooLong { path: run_dir.to_owned(), bytes: 0 })
    }
}

/// A socket path that does not fit into a socket address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the socket path {} has {bytes} bytes, {SOCKET_PATH_BYTES_MAX} are possible: use a shorter run directory", path.display())]
pub struct PathTooLong {
    /// The path.
    pub path: PathBuf,
    /// Its length.
    pub bytes: usize,
}

/// Longest path of a unix socket (Linux `sockaddr_un.sun_path` less the final NUL).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
