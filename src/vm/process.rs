//! The QEMU process: start it without privileges, watch it, end it.
//!
//! Must never: leave a QEMU behind when the daemon is gone. A child asks the
//! kernel for `SIGKILL` on its parent's death, and the kernel means the parent
//! *thread* (prctl(2), `PR_SET_PDEATHSIG`), so every QEMU is started by one thread
//! that lives as long as the process ([`spawner`]).
//!
//! Invariant: a [`Qemu`] that is dropped is dead and reaped.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How to start a QEMU.
#[derive(Clone, Debug)]
pub struct SpawnOpts {
    /// User to run as; 0 leaves the daemon's own.
    pub uid: u32,
    /// Group to run as.
    pub gid: u32,
    /// Further groups, for example the one that owns /dev/kvm.
    pub groups: Vec<u32>,
    /// File that gets standard output and error; appended to.
    pub log: PathBuf,
    /// Working directory.
    pub cwd: PathBuf,
}

/// Why a QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The command has no program.
    #[error("cannot start QEMU: the command line is empty")]
    EmptyCommand,
    /// The log cannot be opened.
    #[error("cannot open QEMU's log {}: {source}", path.display())]
    Log {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The program is not there.
    #[error("{} is not installed: install the package qemu-system-x86 (apt-get install qemu-system-x86)", program.display())]
    Missing {
        /// The program.
        program: PathBuf,
    },
    /// fork, one of the steps to lower privileges, or exec failed.
    #[error("cannot start {} as uid {uid}, gid {gid}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// User it should run as.
        uid: u32,
        /// Group it should run as.
        gid: u32,
        /// What the system said.
        source: io::Error,
    },
    /// No pidfd for the child.
    #[error("cannot watch QEMU (pid {pid}): {source}")]
    Pidfd {
        /// The child.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
}

/// How a QEMU ended. [`Exit`] says it in words, with the tail of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitHow {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
    /// Somebody else reaped it; how it ended is not known.
    Unknown,
}

/// A QEMU that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its process id, which may be another's by now.
    pub pid: u32,
    /// How it ended.
    pub how: ExitHow,
    /// The last lines of its log.
    pub log_tail: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU (pid {}) ", self.pid)?;
        match self.how {
            ExitHow::Status(0) => f.write_str("ended normally")?,
            ExitHow::Status(status) => write!(f, "ended with status {status}")?,
            ExitHow::Signal(number) => match Signal::try_from(number) {
                Ok(signal) => write!(f, "was killed by {}", signal.as_str())?,
                Err(_) => write!(f, "was killed by signal {number}")?,
            },
            ExitHow::Unknown => f.write_str("is gone")?,
        }
        if self.log_tail.is_empty() {
            f.write_str("; it said nothing")
        } else {
            write!(f, "; it said last: {}", self.log_tail)
        }
    }
}

/// A QEMU that was started here. Its drop kills and reaps it.
#[derive(Debug)]
pub struct Qemu {
    pid: u32,
    pidfd: OwnedFd,
    log: PathBuf,
    /// Where this QEMU's own lines begin in the log.
    log_from: u64,
    exit: Mutex<Option<Exit>>,
}

/// How much of a log's end goes into an error: a handful of QEMU's lines.
const LOG_TAIL_BYTES_MAX: u64 = 2048;

impl Qemu {
    /// Start `cmd` (see [`super::argv::command_line`]) in a session of its own,
    /// without privileges, core dumps or open files of the daemon.
    ///
    /// Returns once exec has happened; QEMU may still end over its arguments.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn spawn(cmd: &[OsString], opts: SpawnOpts) -> Result<Self, SpawnError> {
        let (answer, wait) = channel();
        let cmd = cmd.to_vec();
        let job = Box::new(move || {
            // Nobody waits any more only if the caller's thread was killed with the process.
            let _ = answer.send(start(&cmd, &opts));
        });
        spawner().send(job).expect("the spawner never ends");
        wait.recv().expect("the spawner answers every job")
    }

    /// Its process id. Valid as long as this value lives and it was not waited for.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable once QEMU has ended (pidfd_open(2)).
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kill it at once (`SIGKILL`). Harmless if it is dead.
    pub fn kill(&self) {
        // SAFETY: plain integers and a null siginfo; the pidfd is open and names this child
        // alone, so no other process can be hit.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    /// Wait for its end, at most `timeout` if one is given. `None`: still running.
    /// May be called from several threads and again after the end.
    #[must_use]
    pub fn wait_exit(&self, timeout: Option<Duration>) -> Option<Exit> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = match deadline {
                None => PollTimeout::NONE,
                // Rounded up, so that a poll never returns early and spins.
                Some(at) => {
                    let ms = at
                        .saturating_duration_since(Instant::now())
                        .as_micros()
                        .div_ceil(1000);
                    PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
                }
            };
            match poll(
                &mut [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)],
                left,
            ) {
                Ok(0) if deadline.is_some_and(|at| Instant::now() >= at) => return None,
                Ok(0) | Err(Errno::EINTR) => {}
                // An error of poll here means a bad descriptor: the child cannot be running.
                Ok(_) | Err(_) => return Some(self.reap()),
            }
        }
    }

    fn reap(&self) -> Exit {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(exit) = exit.as_ref() {
            return exit.clone();
        }
        let how = match waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED) {
            Ok(WaitStatus::Exited(_, status)) => ExitHow::Status(status),
            Ok(WaitStatus::Signaled(_, signal, _)) => ExitHow::Signal(signal as i32),
            _ => ExitHow::Unknown,
        };
        let done = Exit {
            pid: self.pid,
            how,
            log_tail: log_tail(&self.log, self.log_from),
        };
        *exit = Some(done.clone());
        done
    }

    /// The last lines this QEMU wrote to its log, newest last.
    #[must_use]
    pub fn log_tail(&self) -> String {
        log_tail(&self.log, self.log_from)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
        let _ = self.wait_exit(None);
    }
}

/// The end of `path`, from `from` on, as text fit for one message.
fn log_tail(path: &Path, from: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(
            from.max(end.saturating_sub(LOG_TAIL_BYTES_MAX)),
        ))?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL_BYTES_MAX).read_to_end(&mut tail)?;
        Ok(tail)
    };
    // A log that cannot be read any more must not hide how QEMU ended.
    let tail = read().unwrap_or_default();
    String::from_utf8_lossy(&tail).trim().replace('\n', " | ")
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that starts every QEMU. It ends with the process and not before:
/// its end would kill them all.
fn spawner() -> Sender<Job> {
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    SPAWNER
        .get_or_init(|| {
            let (send, jobs) = channel::<Job>();
            std::thread::Builder::new()
                .name("qemu-spawner".to_owned())
                .spawn(move || jobs.into_iter().for_each(|job| job()))
                .expect("a thread can be started");
            // The sender in the static keeps the channel, and so the thread, alive.
            Mutex::new(send)
        })
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

/// Runs on the spawner thread.
fn start(cmd: &[OsString], opts: &SpawnOpts) -> Result<Qemu, SpawnError> {
    let (program, args) = cmd.split_first().ok_or(SpawnError::EmptyCommand)?;
    let log_error = |source| SpawnError::Log {
        path: opts.log.clone(),
        source,
    };
    let log = File::options()
        .create(true)
        .append(true)
        .open(&opts.log)
        .map_err(log_error)?;
    let log_from = log.metadata().map_err(log_error)?.len();
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir(&opts.cwd)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(log_error)?)
        .stderr(log);
    let (uid, gid) = (opts.uid, opts.gid);
    let groups = opts.groups.clone();
    // SAFETY: getpid has no preconditions.
    let daemon = unsafe { libc::getpid() };
    // SAFETY: the closure makes system calls only; it takes no lock and allocates nothing,
    // which is what a child of a threaded process may do between fork and exec.
    unsafe {
        command.pre_exec(move || become_unprivileged(uid, gid, &groups, daemon));
    }
    let child = command.spawn().map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound {
            SpawnError::Missing {
                program: program.into(),
            }
        } else {
            SpawnError::Start {
                program: program.into(),
                uid,
                gid,
                source,
            }
        }
    })?;
    let pid = child.id();
    match pidfd_open(pid) {
        Ok(pidfd) => Ok(Qemu {
            pid,
            pidfd,
            log: opts.log.clone(),
            log_from,
            exit: Mutex::new(None),
        }),
        Err(source) => {
            let mut child = child;
            let _ = child.kill();
            let _ = child.wait();
            Err(SpawnError::Pidfd { pid, source })
        }
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers. The child is not reaped yet, so the pid is still its own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Largest file QEMU may write: its log, the console's and the saved device state
/// (under 5 MB, QEMU.md section 5, plus video memory). Guest RAM is mapped, not written,
/// and disks are pollux's, so neither counts.
pub const FILE_BYTES_MAX: u64 = 64 << 20;

/// Between fork and exec: own session, no core, no privileges, dies with the daemon.
fn become_unprivileged(uid: u32, gid: u32, groups: &[u32], daemon: i32) -> io::Result<()> {
    let check = |result: libc::c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let file_max = libc::rlimit {
        rlim_cur: FILE_BYTES_MAX,
        rlim_max: FILE_BYTES_MAX,
    };
    // SAFETY: `no_core`, `file_max` and `groups` live through their calls; the length of `groups` is
    // given with it; the rest takes integers. All are async-signal-safe.
    unsafe {
        check(libc::setsid())?;
        // A core dump would hold the guest's whole RAM.
        check(libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core))?;
        // The console and QEMU's messages go to files in memory; a guest that prints without
        // end must not fill them. Over the limit a write fails with EFBIG, it does not kill.
        check(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const file_max))?;
        if libc::signal(libc::SIGXFSZ, libc::SIG_IGN) == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        // Nothing of the daemon stays open after exec; the flag leaves the pipe by which
        // a failing exec is reported to work until then.
        check(libc::close_range(
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
        ))?;
        if uid != 0 {
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setresgid(gid, gid, gid))?;
            check(libc::setresuid(uid, uid, uid))?;
        }
        // After the change of uid, which clears it (prctl(2)).
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        // If the daemon died before the line above, no signal will come.
        if libc::getppid() != daemon {
            return Err(io::Error::from_raw_os_error(libc::EOWNERDEAD));
        }
    }
    Ok(())
}
