//! The lab's watchdog: a process outside of the host that kills the host.
//!
//! It speaks the device's protocol over a unix socket: connecting arms, a pet keeps alive,
//! `V` disarms, a connection that ends without `V` leaves it counting and nobody else can
//! take over. It owns a timer of `CLOCK_BOOTTIME` and a pidfd of the host's first process,
//! so that it can never kill a process that got the same number later.
//!
//! ```text
//!            connect               expiry
//!   [idle] ----------> [armed] ----------------> SIGKILL to the host: Ended::Fired
//!      ^------- V --------|  ^-| pet: expiry = permitted + timeout
//! ```
//!
//! Frames from the petter: kind (`P`, `V`), then 8 bytes: the instant of the permission,
//! nanoseconds, little-endian. The answer to each, and to a connection: `A` for taken and
//! 8 bytes: the timeout in nanoseconds; to `V` it is `D`, so that no late answer to a pet is
//! taken for it. A connection that is not taken is closed.

use super::{BootNs, Watchdog, WatchdogError, check_timeout};
use crate::fence::agent::pidfd_open;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::Pid;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Kind and instant.
const FRAME_BYTES: usize = 9;
/// A supervisor that does not answer a pet in this time is not there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Why the supervisor has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nobody petted in time: the host is killed.
    Fired,
    /// The host's first process ended by itself.
    HostGone,
}

/// The supervisor of one host.
pub struct Supervisor {
    on: String,
    listener: UnixListener,
    host: OwnedFd,
    timer: TimerFd,
    timeout: Duration,
    petter: Option<Petting>,
    armed: Option<BootNs>,
}

struct Petting {
    stream: UnixStream,
    frame: Vec<u8>,
}

impl Supervisor {
    /// Listen at `socket`; at expiry kill `host`, the first process of a pid namespace.
    ///
    /// # Errors
    /// [`WatchdogError`] if the socket exists, there is no such process, or the timeout is
    /// out of bounds.
    pub fn new(socket: &Path, host: Pid, timeout: Duration) -> Result<Self, WatchdogError> {
        let on = socket.display().to_string();
        check_timeout(&on, timeout)?;
        if host.as_raw() <= 1 {
            return Err(WatchdogError::Refused {
                on,
                why: format!("process {host} is this machine's own; name a lab host's init"),
            });
        }
        let host = pidfd_open(host).map_err(io_error(&on, "finding the process to kill"))?;
        let listener = UnixListener::bind(socket)
            .and_then(|l| l.set_nonblocking(true).map(|()| l))
            .map_err(io_error(&on, "listening"))?;
        let timer = TimerFd::new(
            ClockId::CLOCK_BOOTTIME,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )
        .map_err(|e| io_error(&on, "making a timer")(e.into()))?;
        Ok(Self {
            on,
            listener,
            host,
            timer,
            timeout,
            petter: None,
            armed: None,
        })
    }

    /// Serve until the host is dead, by us or by itself.
    ///
    /// # Errors
    /// [`WatchdogError`] if the kernel fails us. The host is killed then if it was armed:
    /// a watchdog that cannot watch must not let it live.
    pub fn run(mut self) -> Result<Ended, WatchdogError> {
        let ended = self.serve();
        if ended.is_err() && self.armed.is_some() {
            self.kill()?;
        }
        ended
    }

    fn serve(&mut self) -> Result<Ended, WatchdogError> {
        loop {
            let mut watched = vec![
                PollFd::new(self.host.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.timer.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            if let Some(petter) = &self.petter {
                watched.push(PollFd::new(petter.stream.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut watched, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(io_error(&self.on, "waiting")(e.into())),
            }
            let ready = |i: usize| watched.get(i).and_then(PollFd::any).unwrap_or(false);
            let (gone, called, spoke) = (ready(0), ready(2), ready(3));
            if gone {
                return Ok(Ended::HostGone);
            }
            // Before any pet is looked at: one that waits in the socket is too late.
            if self.armed.is_some_and(|expiry| BootNs::now() >= expiry) {
                self.kill()?;
                return Ok(Ended::Fired);
            }
            if spoke {
                self.hear()?;
            }
            if called {
                self.meet()?;
            }
        }
    }

    fn meet(&mut self) -> Result<(), WatchdogError> {
        let Ok((stream, _)) = self.listener.accept() else {
            return Ok(()); // it has gone again
        };
        // Armed with a petter, or by one that went without a farewell: nobody takes over.
        if self.armed.is_some() || stream.set_nonblocking(true).is_err() {
            return Ok(());
        }
        self.count_from(BootNs::now())?;
        let mut petter = Petting {
            stream,
            frame: Vec::new(),
        };
        if self.answer(&mut petter) {
            self.petter = Some(petter);
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<(), WatchdogError> {
        let Some(mut petter) = self.petter.take() else {
            return Ok(());
        };
        let mut byte = [0; FRAME_BYTES];
        let room = FRAME_BYTES - petter.frame.len();
        match petter.stream.read(&mut byte[..room]) {
            Ok(0) => return Ok(()), // gone without a farewell: goes on counting
            Ok(n) => petter.frame.extend_from_slice(&byte[..n]),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => return Ok(()),
        }
        if petter.frame.len() < FRAME_BYTES {
            self.petter = Some(petter);
            return Ok(());
        }
        let mut ns = [0; 8];
        ns.copy_from_slice(&petter.frame[1..]);
        let (kind, permitted) = (petter.frame[0], BootNs(u64::from_le_bytes(ns)));
        petter.frame.clear();
        match kind {
            b'P' => {
                // A permission from the future would be one for longer than the timeout.
                self.count_from(permitted.min(BootNs::now()))?;
                if self.answer(&mut petter) {
                    self.petter = Some(petter);
                }
            }
            b'V' => {
                self.timer
                    .unset()
                    .map_err(|e| io_error(&self.on, "stopping the timer")(e.into()))?;
                self.armed = None;
                // If it is not read, the petter only does not know; it is disarmed.
                let _ = petter.stream.write_all(&frame(b'D', 0));
            }
            // Not one of ours; as if it had gone.
            _ => {}
        }
        Ok(())
    }

    fn answer(&self, petter: &mut Petting) -> bool {
        let nanos = u64::try_from(self.timeout.as_nanos()).unwrap_or(u64::MAX);
        // A petter that does not read its answers fills its socket and loses it.
        petter.stream.write_all(&frame(b'A', nanos)).is_ok()
    }

    fn count_from(&mut self, permitted: BootNs) -> Result<(), WatchdogError> {
        let expiry = permitted.after(self.timeout);
        // An older permission never shortens what a newer one gave.
        let expiry = self.armed.map_or(expiry, |before| before.max(expiry));
        self.armed = Some(expiry);
        let at = TimeSpec::from_duration(Duration::from_nanos(expiry.0));
        self.timer
            .set(
                Expiration::OneShot(at),
                TimerSetTimeFlags::TFD_TIMER_ABSTIME,
            )
            .map_err(|e| io_error(&self.on, "setting the timer")(e.into()))
    }

    fn kill(&self) -> Result<(), WatchdogError> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        let (fd, signal) = (self.host.as_raw_fd(), libc::SIGKILL);
        // SAFETY: the pidfd is ours; without siginfo the kernel reads no memory of ours.
        let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, no_info, 0) };
        let error = io::Error::last_os_error();
        if done == 0 || error.raw_os_error() == Some(libc::ESRCH) {
            Ok(())
        } else {
            Err(io_error(&self.on, "killing the host")(error))
        }
    }
}

fn frame(kind: u8, value: u64) -> [u8; FRAME_BYTES] {
    let mut bytes = [kind; FRAME_BYTES];
    bytes[1..].copy_from_slice(&value.to_le_bytes());
    bytes
}

fn io_error(on: &str, step: &'static str) -> impl FnOnce(io::Error) -> WatchdogError {
    let on = on.to_owned();
    move |source| WatchdogError::Io { on, step, source }
}

/// The petter's side of a [`Supervisor`]: armed from its making on.
#[derive(Debug)]
pub struct Remote {
    stream: UnixStream,
    on: String,
    timeout: Duration,
}

impl Remote {
    /// Connect, and so arm, the supervisor at `socket`.
    ///
    /// # Errors
    /// [`WatchdogError`] if there is none, or it is armed already.
    pub fn arm(socket: &Path) -> Result<Self, WatchdogError> {
        let on = socket.display().to_string();
        let stream = UnixStream::connect(socket)
            .and_then(|s| {
                s.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                s.set_write_timeout(Some(ANSWER_TIMEOUT))?;
                Ok(s)
            })
            .map_err(io_error(&on, "connecting"))?;
        let mut remote = Self {
            stream,
            on,
            timeout: Duration::ZERO,
        };
        remote.timeout = remote.heard("arming (is it armed already?)")?;
        check_timeout(&remote.on, remote.timeout)?;
        Ok(remote)
    }

    fn heard(&mut self, step: &'static str) -> Result<Duration, WatchdogError> {
        match self.answer(step)? {
            (b'A', ns) => Ok(Duration::from_nanos(ns)),
            _ => Err(io_error(&self.on, step)(io::Error::other(
                "an answer that is none",
            ))),
        }
    }

    fn answer(&mut self, step: &'static str) -> Result<(u8, u64), WatchdogError> {
        let mut bytes = [0; FRAME_BYTES];
        self.stream
            .read_exact(&mut bytes)
            .map_err(io_error(&self.on, step))?;
        let mut ns = [0; 8];
        ns.copy_from_slice(&bytes[1..]);
        Ok((bytes[0], u64::from_le_bytes(ns)))
    }

    fn say(&mut self, kind: u8, at: BootNs, step: &'static str) -> Result<(), WatchdogError> {
        self.stream
            .write_all(&frame(kind, at.0))
            .map_err(io_error(&self.on, step))
    }
}

impl Watchdog for Remote {
    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn pet(&mut self, permitted: BootNs) -> Result<(), WatchdogError> {
        self.say(b'P', permitted, "petting")?;
        self.heard("petting").map(|_| ())
    }

    fn disarm(mut self: Box<Self>) -> Result<(), WatchdogError> {
        let step = "magic close";
        self.say(b'V', BootNs::now(), step)?;
        // Ends: each answer is one to a pet, or an error when no more come.
        while self.answer(step)?.0 != b'D' {}
        Ok(())
    }
}
