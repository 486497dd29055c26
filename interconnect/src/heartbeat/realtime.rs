//! Real-time priority and locked memory for the heartbeat thread, and for any other thread
//! that must run in time.
//!
//! A host busy with guests must not be taken for a dead one: the thread must run
//! within milliseconds whatever the guests do, and must not wait for a page to come
//! back from a disk that may be the very thing that fails.

use std::fs;
use std::io;

/// `SCHED_FIFO` priority: above everything ordinary; below the kernel's interrupt
/// threads (50), which must deliver the packets this thread waits for.
const PRIORITY: libc::c_int = 20;
/// Stack that is locked, in bytes; the loop uses a few KiB.
const STACK_LOCKED_BYTES: usize = 64 << 10;
/// Stack of the thread: what is locked lies within it, wherever it begins.
pub const STACK_BYTES: usize = 512 << 10;
const _: () = assert!(STACK_LOCKED_BYTES * 2 <= STACK_BYTES);

/// Give the calling thread real-time priority.
///
/// # Errors
/// The kernel's: the process may not.
pub fn raise_priority() -> io::Result<()> {
    let param = libc::sched_param {
        sched_priority: PRIORITY,
    };
    // A child of this thread must not inherit the priority.
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: thread 0 is the caller; `param` is a valid sched_param that the kernel
    // only reads.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const param) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lock the program's code and constants and the calling thread's stack. Not
/// `mlockall`: this process maps guests' memory, which must not be pinned. The few
/// heap words the loop uses are touched each period, so reclaim never sees them cold.
///
/// # Errors
/// The kernel's: the limit of locked memory, mostly.
pub fn lock_memory() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    for line in maps.lines() {
        if let Some((start, length)) = code_range(line) {
            lock(start, length)?;
        }
    }
    let here = 0u8;
    let top = (&raw const here).addr();
    lock(top - STACK_LOCKED_BYTES, STACK_LOCKED_BYTES)
}

/// Address and length of a line of /proc/PID/maps (proc(5)) that maps a program's or
/// a shared library's code or constants.
fn code_range(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let (inode, path) = (fields.nth(2)?, fields.next()?);
    // Private file mappings without write permission; r-xp and r--p. A guest's RAM
    // is shared and writable; other private read-only files are the loader's.
    let is_code = matches!(permissions, "r-xp" | "r--p") && inode != "0" && path.starts_with('/');
    let (start, end) = range.split_once('-')?;
    let (start, end) = (
        usize::from_str_radix(start, 16).ok()?,
        usize::from_str_radix(end, 16).ok()?,
    );
    is_code.then_some((start, end.checked_sub(start)?))
}

fn lock(start: usize, length: usize) -> io::Result<()> {
    // SAFETY: mlock only reads the range's page tables; it changes no content, and a
    // range that is not mapped (any more) is an error (mlock(2)).
    if unsafe { libc::mlock(std::ptr::without_provenance(start), length) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_and_constants_are_locked() {
        let code = "7f0000001000-7f0000003000 r-xp 00001000 08:01 42  /usr/bin/pollux";
        assert_eq!(code_range(code), Some((0x7f00_0000_1000, 0x2000)));
        for other in [
            "7f0000001000-7f0000003000 rw-s 00001000 00:19 42  /dev/shm/pollux/ram",
            "7f0000001000-7f0000003000 rw-p 00001000 08:01 42  /usr/bin/pollux",
            "7f0000001000-7f0000003000 r-xp 00000000 00:00 0  [vdso]",
            "7f0000001000-7f0000003000 ---p 00000000 00:00 0",
            "nonsense",
            "",
        ] {
            assert_eq!(code_range(other), None, "{other}");
        }
    }
}
