//! A thread of another process, held by ptrace(2) just long enough to run
//! system calls in it.
//!
//! # What it must never do
//!
//! Leave the thread stopped, with changed registers or with a changed signal
//! mask, whatever fails. Leave a system call it interrupted with a result the
//! program was never meant to see.
//!
//! # How the interrupted system call survives
//!
//! A thread stopped by `PTRACE_INTERRUPT` inside a system call shows one of the
//! kernel's internal results (`-ERESTARTSYS` and its relatives) in rax and the
//! call's number in orig_rax. Only the kernel's signal path turns that into a
//! restart, and it does so on the way out of a stop that happens *there*, which
//! a system-call stop is not. So the saved registers are put back at once, and
//! then a second `PTRACE_INTERRUPT` makes the thread stop in the signal path;
//! it is released from that stop. Signals are blocked meanwhile
//! (`PTRACE_SETSIGMASK`), stay pending and arrive afterwards with the original
//! registers, so that EINTR is seen exactly when a handler ran.
//!
//! Known limit: epoll_wait and a few others (signal(7), "Interruption of system
//! calls and library functions by stop signals") return EINTR after any stop. QEMU's main loop uses ppoll, and copes with EINTR.
//!
//! Runs in the helper of [`super::inject`]: no allocation, no panic.

use std::time::{Duration, Instant};

/// How long the thread may take to reach its first stop. It is there within
/// microseconds unless it sleeps uninterruptibly on dead storage.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// User code segment of a 64-bit thread (arch/x86/include/asm/segment.h, `__USER_CS`).
const USER_CS_64: u64 = 0x33;

/// `PTRACE_EVENT_STOP` in the status of a seized thread (ptrace(2)).
const EVENT_STOP: i32 = 128;

/// The stop signal of a system-call stop under `PTRACE_O_TRACESYSGOOD`.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// Signals the kernel raises for a fault of the running code. They stay
/// unblocked: forcing a blocked one would reset the program's handler.
const FAULT_SIGNALS: [i32; 6] = [
    libc::SIGSYS,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGTRAP,
    libc::SIGILL,
    libc::SIGFPE,
];

/// Signals held back and sent again afterwards. Only SIGSTOP and faults sent by
/// hand can get here, each at most a few times in a fraction of a millisecond.
const HELD_BACK_MAX: usize = 8;

/// Why the thread could not be made to run a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A system call of ours failed: its name and errno.
    Sys(&'static str, i32),
    /// The process ended meanwhile.
    Died,
    /// It did not stop in [`STOP_WAIT`].
    TooSlow,
    /// It is stopped by job control.
    JobStopped,
    /// It does not run 64-bit code.
    Not64Bit,
    /// The injected code was answered with this signal.
    Signalled(i32),
}

/// What the last wait saw.
enum Stop {
    /// Stopped in the signal path, by us.
    Trap,
    /// Stopped by job control (group-stop).
    Group,
    /// At the entry or exit of a system call.
    Syscall,
    /// About to receive this signal.
    Signal(i32),
}

/// A thread seized and stopped.
pub(super) struct Tracee {
    pid: i32,
    instruction: u64,
    saved: libc::user_regs_struct,
    mask: u64,
    held_back: [i32; HELD_BACK_MAX],
    held_back_len: usize,
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// ptrace(2) with the error named after `what`.
fn ptrace(
    what: &'static str,
    request: libc::c_uint,
    pid: i32,
    address: usize,
    data: usize,
) -> Result<(), Fault> {
    // SAFETY: the callers pass requests whose address and data are plain
    // numbers, or point to live objects of the size the request reads or writes.
    if unsafe { libc::ptrace(request, pid, address, data) } == -1 {
        return Err(match errno() {
            libc::ESRCH if request != libc::PTRACE_SEIZE => Fault::Died,
            code => Fault::Sys(what, code),
        });
    }
    Ok(())
}

/// Waits for the next stop. Expects SIGCHLD to be blocked.
fn wait(pid: i32, deadline: Option<Instant>) -> Result<Stop, Fault> {
    let status = loop {
        let mut status = 0;
        let flags = libc::__WALL | if deadline.is_some() { libc::WNOHANG } else { 0 };
        // SAFETY: `status` is a live int.
        match unsafe { libc::waitpid(pid, &raw mut status, flags) } {
            0 => sleep_until_child_changes(deadline)?,
            -1 if errno() == libc::EINTR => {}
            -1 => return Err(Fault::Sys("waitpid", errno())),
            _ => break status,
        }
    };
    if !libc::WIFSTOPPED(status) {
        return Err(Fault::Died);
    }
    Ok(match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, libc::SIGTRAP) => Stop::Trap,
        (EVENT_STOP, _) => Stop::Group,
        (_, SYSCALL_STOP) => Stop::Syscall,
        (_, signal) => Stop::Signal(signal),
    })
}

/// Sleeps until SIGCHLD or the deadline.
fn sleep_until_child_changes(deadline: Option<Instant>) -> Result<(), Fault> {
    let left = deadline.map_or(STOP_WAIT, |at| at.saturating_duration_since(Instant::now()));
    if left.is_zero() {
        return Err(Fault::TooSlow);
    }
    let timeout = libc::timespec {
        tv_sec: left.as_secs().cast_signed(),
        tv_nsec: left.subsec_nanos().into(),
    };
    // SAFETY: an all-zero sigset_t is a valid argument of sigemptyset, which
    // initialises it; set and timeout are live; no siginfo is asked for.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const timeout);
    }
    Ok(())
}

impl Tracee {
    /// Seizes and stops the main thread of `pid`. `instruction` is the address
    /// of a `syscall` instruction in it. On error the thread is untouched, or
    /// freed when the calling process ends.
    pub(super) fn stop(pid: i32, instruction: u64) -> Result<Self, Fault> {
        let options = usize::try_from(libc::PTRACE_O_TRACESYSGOOD).unwrap_or(0);
        ptrace("ptrace(SEIZE)", libc::PTRACE_SEIZE, pid, 0, options)?;
        ptrace("ptrace(INTERRUPT)", libc::PTRACE_INTERRUPT, pid, 0, 0)?;
        let deadline = Instant::now() + STOP_WAIT;
        loop {
            match wait(pid, Some(deadline))? {
                Stop::Trap => break,
                Stop::Group => return Err(Fault::JobStopped),
                // Its own signal, its own registers: pass it on.
                Stop::Signal(signal) => cont(pid, signal)?,
                Stop::Syscall => cont(pid, 0)?,
            }
        }
        let saved = registers(pid)?;
        if saved.cs != USER_CS_64 {
            return Err(Fault::Not64Bit);
        }
        let mut mask = 0u64;
        ptrace(
            "ptrace(GETSIGMASK)",
            libc::PTRACE_GETSIGMASK,
            pid,
            size_of::<u64>(),
            (&raw mut mask).addr(),
        )?;
        let tracee = Self {
            pid,
            instruction,
            saved,
            mask,
            held_back: [0; HELD_BACK_MAX],
            held_back_len: 0,
        };
        let faults = FAULT_SIGNALS.iter().fold(0u64, |set, s| set | 1 << (s - 1));
        tracee.set_mask(!faults)?;
        Ok(tracee)
    }

    /// Runs one system call and returns its raw result (negative errno).
    pub(super) fn call(&mut self, number: i64, argument: u64) -> Result<i64, Fault> {
        let mut regs = self.saved;
        regs.rip = self.instruction;
        regs.rax = number.cast_unsigned();
        regs.rdi = argument;
        // "Not in a system call": nothing is to be restarted.
        regs.orig_rax = u64::MAX;
        self.set_registers(&regs)?;
        for _entry_then_exit in 0..2 {
            self.run_to_syscall_stop()?;
        }
        Ok(registers(self.pid)?.rax.cast_signed())
    }

    fn run_to_syscall_stop(&mut self) -> Result<(), Fault> {
        loop {
            ptrace("ptrace(SYSCALL)", libc::PTRACE_SYSCALL, self.pid, 0, 0)?;
            match wait(self.pid, None)? {
                Stop::Syscall => return Ok(()),
                Stop::Trap | Stop::Group => {}
                Stop::Signal(signal) if self.sent_by_hand() => self.hold_back(signal),
                Stop::Signal(signal) => return Err(Fault::Signalled(signal)),
            }
        }
    }

    /// Puts everything back and lets the thread go.
    pub(super) fn release(mut self) -> Result<(), Fault> {
        self.set_registers(&self.saved)?;
        ptrace("ptrace(INTERRUPT)", libc::PTRACE_INTERRUPT, self.pid, 0, 0)?;
        loop {
            cont(self.pid, 0)?;
            match wait(self.pid, None)? {
                Stop::Trap | Stop::Group => break,
                Stop::Signal(signal) if self.sent_by_hand() => self.hold_back(signal),
                Stop::Signal(_) | Stop::Syscall => {}
            }
        }
        self.set_mask(self.mask)?;
        ptrace("ptrace(DETACH)", libc::PTRACE_DETACH, self.pid, 0, 0)?;
        for signal in &self.held_back[..self.held_back_len] {
            // SAFETY: plain numbers; a process that is gone is no error here.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, *signal) };
        }
        Ok(())
    }

    /// True if the signal about to arrive was sent by a process, false if the
    /// kernel raised it for what the thread just ran (`si_code` > 0, sigaction(2)).
    fn sent_by_hand(&self) -> bool {
        // SAFETY: siginfo_t is plain data for which all zeros is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let read = ptrace(
            "ptrace(GETSIGINFO)",
            libc::PTRACE_GETSIGINFO,
            self.pid,
            0,
            (&raw mut info).addr(),
        );
        read.is_err() || info.si_code <= 0
    }

    fn hold_back(&mut self, signal: i32) {
        if let Some(slot) = self.held_back.get_mut(self.held_back_len) {
            *slot = signal;
            self.held_back_len += 1;
        }
    }

    fn set_mask(&self, mask: u64) -> Result<(), Fault> {
        ptrace(
            "ptrace(SETSIGMASK)",
            libc::PTRACE_SETSIGMASK,
            self.pid,
            size_of::<u64>(),
            (&raw const mask).addr(),
        )
    }

    fn set_registers(&self, regs: &libc::user_regs_struct) -> Result<(), Fault> {
        let regs = std::ptr::from_ref(regs).addr();
        ptrace("ptrace(SETREGS)", libc::PTRACE_SETREGS, self.pid, 0, regs)
    }
}

fn registers(pid: i32) -> Result<libc::user_regs_struct, Fault> {
    // SAFETY: user_regs_struct is plain integers, all zeros is valid.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let data = (&raw mut regs).addr();
    ptrace("ptrace(GETREGS)", libc::PTRACE_GETREGS, pid, 0, data)?;
    Ok(regs)
}

fn cont(pid: i32, signal: i32) -> Result<(), Fault> {
    let signal = usize::try_from(signal).unwrap_or(0);
    ptrace("ptrace(CONT)", libc::PTRACE_CONT, pid, 0, signal)
}
