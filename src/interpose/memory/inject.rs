//! Makes a userfaultfd inside another process, without its help.
//!
//! A userfaultfd serves the address space of the process that made it, and QEMU
//! makes none. So its main thread is stopped for a moment ([`super::tracee`]),
//! runs `userfaultfd` from a `syscall` instruction it already has, we take the
//! descriptor with pidfd_getfd(2), it closes its own, and goes on. Closing
//! matters twice: tracking ends when our descriptor does, also when we crash,
//! and a restarted daemon can attach again.
//!
//! # Why a helper process
//!
//! The work is done by a process that shares our memory and descriptors
//! (clone(2), `CLONE_VM | CLONE_VFORK | CLONE_FILES`, as posix_spawn does it),
//! not by one of our threads. For if tracer and parent of QEMU were the same
//! process, any `wait` for QEMU in another thread would take the ptrace stops
//! for itself and believe that QEMU ended. It also means that our death in
//! mid-injection does not hurt QEMU, and that whatever fails, the end of the
//! helper frees the thread.
//!
//! # What it must never do
//!
//! Disturb the process: see [`super::tracee`]. It must not allocate or panic in
//! the helper.

use super::maps;
use super::tracee::{Fault, Tracee};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::Instant;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("memory tracking knows only the registers of x86-64");

/// Faults of user mode only (include/uapi/linux/userfaultfd.h,
/// `UFFD_USER_MODE_ONLY`): needs no privilege in QEMU. Writes by the kernel are
/// seen all the same, since asynchronous write protection needs no handler.
const UFFD_USER_MODE_ONLY: i32 = 1;

/// The `syscall` instruction.
const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// Bytes searched of one executable mapping: libc's code has about 1.5 MiB, and
/// the first hit comes within the first pages.
const SEARCH_BYTES_MAX: u64 = 4 << 20;

/// Stack of the helper: its frames are a few hundred bytes each and a dozen
/// deep; a page or two would do.
const HELPER_STACK_WORDS: usize = 64 * 1024 / size_of::<u128>();

/// Why no userfaultfd could be made in the process.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process is us.
    #[error("cannot stop process {pid}: it is this process itself")]
    Own {
        /// The process.
        pid: i32,
    },
    /// The memory map could not be read, or the process is gone.
    #[error(
        "cannot look into process {pid}: {source}; is it running, and is this daemon root (CAP_SYS_PTRACE)?"
    )]
    Look {
        /// The process.
        pid: i32,
        /// The cause.
        source: std::io::Error,
    },
    /// There is nothing to run a system call with.
    #[error("process {pid} has no syscall instruction in its vdso or libc; is it a 64-bit QEMU?")]
    NoInstruction {
        /// The process.
        pid: i32,
    },
    /// A system call of ours failed.
    #[error(
        "cannot hold process {pid}: {call}: {source}; needs root (CAP_SYS_PTRACE) and no other tracer"
    )]
    Hold {
        /// The process.
        pid: i32,
        /// The call.
        call: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The process ended meanwhile.
    #[error("process {pid} ended while its memory tracking was set up")]
    Died {
        /// The process.
        pid: i32,
    },
    /// The thread did not stop.
    #[error(
        "process {pid} did not stop within a second: its main thread hangs in the kernel, probably on dead storage"
    )]
    TooSlow {
        /// The process.
        pid: i32,
    },
    /// The process is stopped.
    #[error("process {pid} is stopped by job control; continue it (SIGCONT) first")]
    JobStopped {
        /// The process.
        pid: i32,
    },
    /// The process does not run 64-bit code.
    #[error("process {pid} does not run 64-bit code; only the x86-64 QEMU can be tracked")]
    Not64Bit {
        /// The process.
        pid: i32,
    },
    /// The injected system call was answered with a signal.
    #[error(
        "process {pid} got signal {signal} for the system call userfaultfd; its seccomp filter must allow it"
    )]
    Signalled {
        /// The process.
        pid: i32,
        /// The signal.
        signal: i32,
    },
    /// The kernel refused the userfaultfd.
    #[error(
        "userfaultfd in process {pid} failed: {source}; the kernel needs CONFIG_USERFAULTFD and QEMU's seccomp filter must allow it"
    )]
    Refused {
        /// The process.
        pid: i32,
        /// The cause.
        source: std::io::Error,
    },
}

impl InjectError {
    fn hold(pid: i32, call: &'static str) -> Self {
        let source = std::io::Error::last_os_error();
        Self::Hold { pid, call, source }
    }

    fn from_fault(pid: i32, fault: Fault) -> Self {
        match fault {
            Fault::Sys(call, errno) => Self::Hold {
                pid,
                call,
                source: std::io::Error::from_raw_os_error(errno),
            },
            Fault::Died => Self::Died { pid },
            Fault::TooSlow => Self::TooSlow { pid },
            Fault::JobStopped => Self::JobStopped { pid },
            Fault::Not64Bit => Self::Not64Bit { pid },
            Fault::Signalled(signal) => Self::Signalled { pid, signal },
        }
    }
}

/// Makes a userfaultfd that belongs to the address space of process `pid` and
/// returns our own descriptor of it; the process keeps none.
///
/// The main thread of `pid` stands still for well under a millisecond; the
/// calling thread is blocked meanwhile. Needs CAP_SYS_PTRACE.
pub fn userfaultfd_in(pid: i32) -> Result<OwnedFd, InjectError> {
    inject(pid).map(|(fd, _still_us)| fd)
}

/// [`userfaultfd_in`] and for how many microseconds the thread stood still.
pub(super) fn inject(pid: i32) -> Result<(OwnedFd, u64), InjectError> {
    if pid == std::process::id().cast_signed() {
        return Err(InjectError::Own { pid });
    }
    let instruction = find_instruction(pid)?;
    // SAFETY: plain numbers in, a new descriptor or -1 out.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = owned(pidfd).ok_or_else(|| InjectError::hold(pid, "pidfd_open"))?;
    let mut work = Work {
        pid,
        instruction,
        pidfd: pidfd.as_raw_fd(),
        outcome: Err(Fault::Died),
    };
    run_in_helper(&mut work)?;
    let done = work
        .outcome
        .map_err(|fault| InjectError::from_fault(pid, fault))?;
    match owned(done.descriptor) {
        Some(fd) => Ok((fd, done.still_us)),
        None => Err(InjectError::Refused {
            pid,
            source: std::io::Error::from_raw_os_error(done.errno),
        }),
    }
}

/// Takes a system call's result for a descriptor we own, if it is one.
fn owned(result: i64) -> Option<OwnedFd> {
    let fd = RawFd::try_from(result).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The address of a `syscall` instruction: the vdso's, which every process has,
/// else libc's or the loader's.
fn find_instruction(pid: i32) -> Result<u64, InjectError> {
    let look = |source| InjectError::Look { pid, source };
    let mut candidates: Vec<_> = maps::read(pid)
        .map_err(look)?
        .into_iter()
        .filter(|m| m.executable)
        .filter(|m| m.name == "[vdso]" || m.name.contains("/libc") || m.name.contains("/ld-"))
        .collect();
    candidates.sort_by_key(|m| m.name != "[vdso]");
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(look)?;
    for mapping in candidates {
        let bytes = (mapping.addresses.end - mapping.addresses.start).min(SEARCH_BYTES_MAX);
        let mut code = vec![0; usize::try_from(bytes).unwrap_or(0)];
        if memory
            .read_exact_at(&mut code, mapping.addresses.start)
            .is_err()
        {
            continue;
        }
        let hit = code
            .windows(SYSCALL_INSTRUCTION.len())
            .position(|two| two == SYSCALL_INSTRUCTION);
        if let Some(at) = hit {
            return Ok(mapping.addresses.start + at as u64);
        }
    }
    Err(InjectError::NoInstruction { pid })
}

/// What the helper is to do, and what came of it.
struct Work {
    pid: i32,
    instruction: u64,
    pidfd: RawFd,
    outcome: Result<Done, Fault>,
}

/// The injection went through; whether it brought a descriptor is another matter.
#[derive(Debug, Clone, Copy)]
struct Done {
    /// Our descriptor, or negative.
    descriptor: i64,
    /// Why there is none.
    errno: i32,
    still_us: u64,
}

/// Runs [`inject_now`] in a process that shares our memory and descriptors.
fn run_in_helper(work: &mut Work) -> Result<(), InjectError> {
    let pid = work.pid;
    let mut stack = vec![0u128; HELPER_STACK_WORDS];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
    // SAFETY: all-zero sets are valid to be filled. With every signal blocked no
    // handler of ours runs in the helper. CLONE_VFORK suspends this thread until
    // the helper has ended, so `stack` and `work` outlive it, are used by it
    // alone, and borrowing this thread's TLS (errno) is sound, as in vfork(2).
    // The helper neither allocates nor unwinds. Its exit signal is 0, so only
    // the waitpid with __WALL below collects it.
    let (helper, error) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let helper = libc::clone(
            helper_main,
            top.cast(),
            flags,
            std::ptr::from_mut(work).cast(),
        );
        let error = InjectError::hold(pid, "clone");
        if helper > 0 {
            while libc::waitpid(helper, std::ptr::null_mut(), libc::__WALL) == -1
                && *libc::__errno_location() == libc::EINTR
            {}
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        (helper, error)
    };
    if helper < 0 { Err(error) } else { Ok(()) }
}

extern "C" fn helper_main(work: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `run_in_helper` passes a live `Work` that nobody else touches.
    let work = unsafe { &mut *work.cast::<Work>() };
    // SAFETY: all zeros is SIG_DFL with no flags; the table of handlers is the
    // helper's own copy. A handler with SA_NOCLDSTOP would hide the stops.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGCHLD, &raw const default, std::ptr::null_mut());
    }
    work.outcome = inject_now(work);
    0
}

/// The helper's work; see the module's text.
fn inject_now(work: &Work) -> Result<Done, Fault> {
    let mut tracee = Tracee::stop(work.pid, work.instruction)?;
    let since = Instant::now();
    let made = make_and_take(&mut tracee, work);
    if let Err(fault) = tracee.release() {
        if let Ok((ours, _errno)) = made {
            drop(owned(ours));
        }
        return Err(fault);
    }
    let still_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    made.map(|(descriptor, errno)| Done {
        descriptor,
        errno,
        still_us,
    })
}

/// Returns (our descriptor or -1, errno).
fn make_and_take(tracee: &mut Tracee, work: &Work) -> Result<(i64, i32), Fault> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    let theirs = tracee.call(libc::SYS_userfaultfd, u64::from(flags.cast_unsigned()))?;
    if theirs < 0 {
        return Ok((-1, i32::try_from(-theirs).unwrap_or(0)));
    }
    // SAFETY: plain numbers in, a new descriptor or -1 out.
    let ours = unsafe { libc::syscall(libc::SYS_pidfd_getfd, work.pidfd, theirs, 0) };
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    let closed = tracee.call(libc::SYS_close, theirs.cast_unsigned());
    if let (Err(fault), true) = (closed, ours >= 0) {
        drop(owned(ours));
        return Err(fault);
    }
    Ok((ours, errno))
}
