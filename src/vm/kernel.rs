//! What this host's kernel can: are we root, does it track writes to memory?
//!
//! Must never: take a version number as proof of what can be tried. Each thing is
//! tried on this very process.

use crate::interpose::memory::PAGE_SIZE;
use crate::interpose::memory::uapi::{enable_async_wp, is_tracked};
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

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
    enable_async_wp(&fd).map_err(|why| HostError::NoWriteTracking { why })
}

fn try_pagemap_scan() -> io::Result<()> {
    let page = Box::new([1_u8; PAGE_SIZE]);
    let pagemap = File::open("/proc/self/pagemap")?;
    // Where a page lies does not matter, and looking at one changes nothing.
    is_tracked(
        &pagemap,
        page.as_ptr().expose_provenance() as u64 & !(PAGE_SIZE as u64 - 1),
    )
    .map(drop)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests of the tracker need such a host anyway.
    #[test]
    fn this_kernel_tracks_writes() {
        try_pagemap_scan().unwrap();
        enable_async_wp(open_userfaultfd().unwrap()).unwrap();
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
