//! Hosts on one machine: each host of a lab is a set of namespaces (network, pid,
//! mount, uts) with its own daemon, links and disks; killing the first process of
//! its pid namespace is a power cut.
//!
//! ```text
//!  creator -- launcher -- keeper = pid 1 of the lab, in `outside` (lan0 10.77.0.1, clients)
//!                            |---- init of host a = pid 1 there ---- daemon, QEMU, ...
//!                            '---- init of host b = pid 1 there ---- daemon, QEMU, ...
//! ```
//!
//! The keeper is the first process of a pid namespace that contains all others, so
//! whatever kills it, the kernel kills the whole lab with it; namespaces, links and
//! mounts are held by these processes only and go with them. No namespace has a name
//! in /run/netns and no file is made outside the lab's directory.
//!
//! Must never: touch interfaces or mounts of the machine's own namespaces; find a
//! process by a bare pid that may have been used again (namespaces are entered by
//! pidfd, a lab is alive exactly while its keeper holds a lock on its directory).
//!
//! A single-threaded program start is needed for [`keeper_main`] and [`exec_main`]:
//! the binary calls [`hidden_main`] before anything else.

mod clock;
pub mod daemons;
mod dir;
mod disk;
mod enter;
mod error;
mod handle;
mod init;
mod keeper;
mod launch;
mod net;
pub mod pool;
mod power;
mod spec;
mod wire;

pub use clock::MonotonicNs;
pub use dir::TakenDown;
pub use enter::{exec_main, in_network};
pub use error::LabError;
pub use handle::{Lab, take_down};
pub use init::host_init_main;
pub use launch::keeper_main;
pub use spec::{
    GATEWAY, HOST_BRIDGE, HOSTS_MAX, HostConfigFn, HostNet, KeepPolicy, LabId, LabPlan, LabSpec,
    OUTSIDE, PRIVATE_LINKS_MAX, Place, PrivateLink, check_name, default_dir,
};
pub use wire::{DaemonState, HostPower, HostStatus, LabStatus, LinkStatus, Process, Wiring};

use std::ffi::OsString;

/// Hidden subcommand of the keeper.
pub const KEEPER_COMMAND: &str = "lab-keeper";
/// Hidden subcommand that runs a program inside a place of a lab.
pub const EXEC_COMMAND: &str = "lab-exec";
/// Hidden subcommand that is the lab's fence agent.
pub const FENCE_COMMAND: &str = "lab-fence";

/// Runs a hidden subcommand of the lab if `args` (without the program's name) names
/// one, and gives its exit status. Call it first thing in `main`, while the process
/// has one thread.
#[must_use]
pub fn hidden_main(args: &[OsString]) -> Option<i32> {
    match args.first()?.to_str()? {
        KEEPER_COMMAND => Some(keeper_main(&args[1..])),
        EXEC_COMMAND => Some(exec_main(&args[1..])),
        FENCE_COMMAND => Some(pool::fence_main(&args[1..])),
        _ => None,
    }
}
