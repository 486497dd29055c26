//! Kernel structures that libc lacks: userfaultfd and PAGEMAP_SCAN.
//!
//! Source: include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h of
//! Linux 6.7; meaning: Documentation/admin-guide/mm/userfaultfd.rst and
//! pagemap.rst. All lengths and addresses are bytes, all fields little structs
//! of u64, so there is no padding.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

/// `_IOC(direction, type, number, size)` of include/uapi/asm-generic/ioctl.h.
const fn ioc(direction: u64, kind: u8, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | (kind as u64) << 8 | number
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const UFFDIO: u8 = 0xAA;
const UFFD_API: u64 = 0xAA;
const UFFDIO_API: u64 = ioc(READ_WRITE, UFFDIO, 0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = ioc(READ_WRITE, UFFDIO, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = ioc(READ, UFFDIO, 0x01, size_of::<UffdioRange>());
const UFFDIO_WRITEPROTECT: u64 = ioc(READ_WRITE, UFFDIO, 0x06, size_of::<UffdioWriteprotect>());
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const PAGEMAP_SCAN: u64 = ioc(READ_WRITE, b'f', 16, size_of::<PmScanArg>());
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WPALLOWED: u64 = 1 << 0;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
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

/// A run of pages that `PAGEMAP_SCAN` reports (`struct page_region`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PageRegion {
    /// First address.
    pub(super) start: u64,
    /// Address behind the last.
    pub(super) end: u64,
    categories: u64,
}

fn range(addresses: &Range<u64>) -> UffdioRange {
    UffdioRange {
        start: addresses.start,
        len: addresses.end - addresses.start,
    }
}

/// ioctl(2) on `fd` with a structure the request reads and may write.
fn ioctl<T>(fd: impl AsFd, request: u64, argument: &mut T) -> io::Result<i32> {
    // SAFETY: each constant above encodes the size of the structure its one
    // caller passes, so the kernel stays inside `argument`; addresses within
    // the structure are either another process's (never dereferenced for us)
    // or the vector of `pagemap_scan`, live with the length given beside it.
    let result = unsafe {
        libc::ioctl(
            fd.as_fd().as_raw_fd(),
            request,
            std::ptr::from_mut(argument),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Handshake: asynchronous write protection of shared memory, unpopulated pages
/// included. Once per userfaultfd.
pub(crate) fn enable_async_wp(uffd: impl AsFd) -> io::Result<()> {
    let mut api = UffdioApi {
        api: UFFD_API,
        features: FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC,
        ioctls: 0,
    };
    ioctl(uffd, UFFDIO_API, &mut api).map(drop)
}

/// Registers addresses of the userfaultfd's process for write protection.
pub(super) fn register_wp(uffd: impl AsFd, addresses: &Range<u64>) -> io::Result<()> {
    let mut register = UffdioRegister {
        range: range(addresses),
        mode: UFFDIO_REGISTER_MODE_WP,
        ioctls: 0,
    };
    ioctl(uffd, UFFDIO_REGISTER, &mut register).map(drop)
}

/// Undoes [`register_wp`], and with it all protection.
pub(super) fn unregister(uffd: impl AsFd, addresses: &Range<u64>) -> io::Result<()> {
    ioctl(uffd, UFFDIO_UNREGISTER, &mut range(addresses)).map(drop)
}

/// Write-protects every page: from now on writes are noted.
pub(super) fn write_protect(uffd: impl AsFd, addresses: &Range<u64>) -> io::Result<()> {
    let mut protect = UffdioWriteprotect {
        range: range(addresses),
        mode: UFFDIO_WRITEPROTECT_MODE_WP,
    };
    ioctl(uffd, UFFDIO_WRITEPROTECT, &mut protect).map(drop)
}

/// Reports written pages of `addresses` into `found`, with `rearm` arming
/// exactly those again. Returns how many regions were filled and the address
/// where the walk ended (short of the end if `found` was full).
///
/// Asking for `PAGE_IS_WRITTEN` alone takes the kernel's fast path.
pub(super) fn pagemap_scan(
    pagemap: impl AsFd,
    addresses: Range<u64>,
    rearm: bool,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let arm = if rearm { PM_SCAN_WP_MATCHING } else { 0 };
    let flags = PM_SCAN_CHECK_WPASYNC | arm;
    scan(pagemap, addresses, flags, PAGE_IS_WRITTEN, found)
}

/// True if the page at `address` is mapped and under asynchronous write protection.
pub(crate) fn is_tracked(pagemap: impl AsFd, address: u64) -> io::Result<bool> {
    let mut found = [PageRegion::default()];
    let page = address..address + super::PAGE_SIZE as u64;
    let (filled, _) = scan(pagemap, page, 0, PAGE_IS_WPALLOWED, &mut found)?;
    Ok(filled == 1)
}

fn scan(
    pagemap: impl AsFd,
    addresses: Range<u64>,
    flags: u64,
    category: u64,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags,
        start: addresses.start,
        end: addresses.end,
        walk_end: 0,
        vec: found.as_mut_ptr().expose_provenance() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: category,
        category_anyof_mask: 0,
        return_mask: category,
    };
    let filled = ioctl(pagemap, PAGEMAP_SCAN, &mut arg)?;
    Ok((usize::try_from(filled).unwrap_or(0), arg.walk_end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_the_kernels() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xc018_aa06);
        assert_eq!(PAGEMAP_SCAN, 0xc060_6610);
    }
}
