//! One call of a fence agent: a process without shell, arguments or our environment,
//! within a deadline. Source: `FenceAgentAPI` of the fence-agents project.
//!
//! The agent is told `key=value` lines on its standard input, so that no secret is in an
//! argument or the environment. It must never outlive its call: it leads a process group
//! of its own, and the whole group is killed when the call ends, however it ends. (What
//! an agent starts in a session of its own escapes that; no known agent does.)

use super::config::{Device, VALUE_BYTES_MAX};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of each output this much is kept and the rest read and dropped; the longest metadata
/// of Debian's agents is 40 KiB.
pub const CAPTURE_BYTES_MAX: usize = 256 << 10;
/// Of an agent's words this much goes into a reason, bytes.
pub const REASON_BYTES_MAX: usize = 300;
/// Read at a time.
const READ_BYTES: usize = 64 << 10;
/// After the agent's exit its pipes are emptied by this many reads at most: all a pipe
/// holds, and no more from a child of it that goes on writing.
const LAST_READS: usize = 4;
/// What an agent finds its own helpers in.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// What an agent is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take the power.
    Off,
    /// Give power.
    On,
    /// Say whether there is power: exit status 0 on, 2 off.
    Status,
    /// Say whether the device can be reached.
    Monitor,
    /// Describe the agent; needs no device.
    Metadata,
}

impl Action {
    /// Its name in the API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Status => "status",
            Self::Monitor => "monitor",
            Self::Metadata => "metadata",
        }
    }
}

/// A call that brought no exit status of the agent.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no such program.
    #[error("there is no agent {}; install the package fence-agents or set agents_dir", .0.display())]
    Missing(PathBuf),
    /// Something on this host failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The first line of the password file is empty, too long or not text.
    #[error("{}: its first line must be a password of 1 to {VALUE_BYTES_MAX} bytes of text", .0.display())]
    Password(PathBuf),
    /// The deadline passed; the agent and its children are killed.
    #[error("no answer to `{action}` within {limit:?}; the agent was killed")]
    Deadline {
        /// What was asked.
        action: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// A signal ended the agent.
    #[error("the agent was ended by signal {0}")]
    Signal(i32),
    /// The caller gave up; the agent and its children are killed.
    #[error("cancelled")]
    Cancelled,
}

/// What an agent answered.
#[derive(Debug)]
pub struct Answer {
    /// Exit status: 0 done (for `status`: on), 1 failed, 2 for `status`: off.
    pub code: i32,
    /// Standard output, up to [`CAPTURE_BYTES_MAX`].
    pub stdout: String,
    /// Standard error, likewise; the password, if it is in there, is blotted out.
    pub stderr: String,
}

impl Answer {
    /// The end of what it complained about, in one line.
    #[must_use]
    pub fn complaint(&self) -> String {
        let said = [&self.stderr, &self.stdout]
            .into_iter()
            .find(|s| !s.trim().is_empty());
        let line: String = said
            .map_or("", |s| s.trim())
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let mut from = line.len().saturating_sub(REASON_BYTES_MAX);
        while !line.is_char_boundary(from) {
            from += 1;
        }
        line[from..].to_owned()
    }
}

/// Ends running calls from another thread.
#[derive(Clone)]
pub struct Cancel(Arc<EventFd>);

impl Cancel {
    /// Not cancelled yet.
    ///
    /// # Errors
    /// The kernel's, if there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// End the calls that run with this, and all later ones.
    pub fn cancel(&self) {
        // It never comes near the counter's end, the one thing that can fail.
        let _ = self.0.write(1);
    }

    /// Whether it was.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let mut fd = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fd, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }
}

/// Ask the agent of `device` in `agents_dir` for `action`.
///
/// # Errors
/// [`CallError`]: no exit status, and why. It never holds a secret.
pub fn call(
    agents_dir: &Path,
    device: &Device,
    action: Action,
    cancel: &Cancel,
) -> Result<Answer, CallError> {
    let deadline = Instant::now() + device.timeout();
    let password = match (&device.password_file, action) {
        (Some(path), a) if a != Action::Metadata => Some(read_password(path)?),
        _ => None,
    };
    let program = agents_dir.join(&device.agent);
    let mut child = Command::new(&program)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map(|leader| Group {
            leader,
            ended: false,
        })
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CallError::Missing(program.clone()),
            _ => failed(format!("starting {}", program.display()))(source),
        })?;
    let mut told = format!("action={}\n", action.name());
    if action != Action::Metadata {
        for (key, value) in &device.parameters {
            told.push_str(&format!("{key}={value}\n"));
        }
    }
    if let Some(password) = &password {
        told.push_str(&format!("password={password}\n"));
    }
    // Fits into the pipe (config.rs). An agent that reads nothing is none of our errors.
    if let Some(mut stdin) = child.leader.stdin.take() {
        match stdin.write_all(told.as_bytes()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                return Err(failed("telling the agent its parameters".into())(e));
            }
            _ => {}
        }
    }
    let mut outputs = [
        Output::new(child.leader.stdout.take().map(OwnedFd::from))?,
        Output::new(child.leader.stderr.take().map(OwnedFd::from))?,
    ];
    child.wait_exit(&mut outputs, deadline, cancel, device, action)?;
    let status = child
        .end()
        .map_err(failed("waiting for the agent".into()))?;
    if let Some(signal) = status.signal() {
        return Err(CallError::Signal(signal));
    }
    let [stdout, stderr] = outputs.map(|o| o.text(password.as_deref()));
    Ok(Answer {
        code: status.code().unwrap_or(-1),
        stdout,
        stderr,
    })
}

fn failed(what: String) -> impl FnOnce(io::Error) -> CallError {
    move |source| CallError::Io { what, source }
}

fn read_password(path: &Path) -> Result<String, CallError> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|f| f.take(VALUE_BYTES_MAX as u64 + 2).read_to_end(&mut text))
        .map_err(failed(format!("reading {}", path.display())))?;
    let line = text.split(|b| *b == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match std::str::from_utf8(line) {
        Ok(s)
            if !s.is_empty() && s.len() <= VALUE_BYTES_MAX && !s.chars().any(char::is_control) =>
        {
            Ok(s.to_owned())
        }
        _ => Err(CallError::Password(path.into())),
    }
}

/// The agent's process group; dropping it kills all of it.
struct Group {
    leader: Child,
    ended: bool,
}

impl Group {
    fn wait_exit(
        &self,
        outputs: &mut [Output; 2],
        deadline: Instant,
        cancel: &Cancel,
        device: &Device,
        action: Action,
    ) -> Result<(), CallError> {
        let pidfd = pidfd_open(self.pid()).map_err(failed("watching the agent".into()))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CallError::Deadline {
                    action: action.name(),
                    limit: device.timeout(),
                });
            }
            // Rounded up, so that the last millisecond is waited for and not spun through.
            let wait =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let mut watched = vec![
                PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
                PollFd::new(cancel.0.as_fd(), PollFlags::POLLIN),
            ];
            watched.extend(outputs.iter().filter_map(Output::watched));
            match poll(&mut watched, wait) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(failed("waiting for the agent".into())(e.into())),
            }
            let ready = |index: usize| watched[index].any().unwrap_or(false);
            let (ended, cancelled) = (ready(0), ready(1));
            if cancelled {
                return Err(CallError::Cancelled);
            }
            for output in outputs.iter_mut() {
                for _ in 0..if ended { LAST_READS } else { 1 } {
                    output.read();
                }
            }
            if ended {
                return Ok(());
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.leader.id()).unwrap_or(i32::MAX))
    }

    /// Kill what is left of the group, then reap its leader: in this order the number of
    /// the group cannot have become somebody else's.
    fn end(&mut self) -> io::Result<std::process::ExitStatus> {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        self.ended = true;
        self.leader.wait()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end();
        }
    }
}

/// One output of the agent, read without waiting.
struct Output {
    pipe: Option<File>,
    kept: Vec<u8>,
}

impl Output {
    fn new(pipe: Option<OwnedFd>) -> Result<Self, CallError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        if let Some(pipe) = &pipe {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|e| failed("reading the agent's output".into())(e.into()))?;
        }
        Ok(Self {
            pipe: pipe.map(File::from),
            kept: Vec::new(),
        })
    }

    fn watched(&self) -> Option<PollFd<'_>> {
        self.pipe
            .as_ref()
            .map(|p| PollFd::new(p.as_fd(), PollFlags::POLLIN))
    }

    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut buffer = [0; READ_BYTES];
        match pipe.read(&mut buffer) {
            Ok(0) => self.pipe = None,
            Ok(n) => {
                let room = CAPTURE_BYTES_MAX - self.kept.len();
                self.kept.extend_from_slice(&buffer[..n.min(room)]);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => self.pipe = None,
        }
    }

    fn text(self, secret: Option<&str>) -> String {
        let text = String::from_utf8_lossy(&self.kept).into_owned();
        match secret {
            Some(secret) => text.replace(secret, "***"),
            None => text,
        }
    }
}

/// A descriptor of a process that is not reaped yet.
pub(super) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; the kernel makes a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
