//! Memory mappings of our own; the one place that calls mmap(2) here.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// A mapping, unmapped on drop. Its memory may be shared with other processes
/// that write it at any time, so it is handed out as raw pointers only.
#[derive(Debug)]
pub(super) struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the region is plain memory that belongs to the process, not to a
// thread; whoever reads or writes through its pointers answers for races.
unsafe impl Send for Region {}
// SAFETY: as above; no method of a shared `Region` touches its memory.
unsafe impl Sync for Region {}

impl Region {
    /// Zeroed private memory, given storage page by page as it is touched.
    pub(super) fn anonymous(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    /// The first `len` bytes of `file`, shared with everyone who maps it.
    pub(super) fn of_file(file: &File, len: usize, writable: bool) -> io::Result<Self> {
        let write = if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        Self::map(len, libc::PROT_READ | write, flags, file.as_raw_fd())
    }

    fn map(len: usize, protection: i32, flags: i32, fd: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice harms
        // nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { start, len })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The address `offset` bytes in. Panics if `size` bytes there are not
    /// inside the region.
    pub(super) fn at(&self, offset: usize, size: usize) -> *mut u8 {
        let end = offset.checked_add(size);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{size} bytes at {offset} are outside of a mapping of {} bytes",
            self.len
        );
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// madvise(2) on a part of the region; `offset` must be page-aligned.
    pub(super) fn advise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        let start = self.at(offset, len);
        // SAFETY: the range is ours. The one advice that changes contents,
        // MADV_DONTNEED, is given only by owners with exclusive access.
        if unsafe { libc::madvise(start.cast(), len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; no reference outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
