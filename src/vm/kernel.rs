//! What this host's kernel can: are we root, does it track writes to memory?
//!
//! Must never: take a version number as proof of what can be tried. Each thing is
//! tried on this very process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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
