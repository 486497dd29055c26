//! Client of QEMU's monitor protocol (QEMU docs/interop/qmp-spec.txt) over a unix socket.
//!
//! One [`Qmp`] is one monitor. It is blocking with a deadline on every call, has no
//! thread of its own, and keeps the events that arrive meanwhile in a bounded queue.
//!
//! QEMU 7.2 reads a monitor one byte per turn of its loop, so the length of a command
//! is latency. A command can therefore be typed ahead: [`Qmp::arm`] sends all of it but
//! the closing brace, [`Qmp::fire`] sends that one byte, [`Qmp::complete`] takes the answer.
//!
//! ```text
//!          arm            fire            complete
//!  idle ---------> armed ---------> fired ---------> idle
//!    ^ \                |
//!    |  execute         | disarm
//!    +--/<--------------+
//! ```
//!
//! It must never mix the answer of one command with another (every command carries an
//! id), never wait without a deadline, never hold more than [`LINE_BYTES_MAX`] of an
//! unfinished line or [`EVENTS_MAX`] events.

mod error;
mod lines;
#[cfg(test)]
mod tests;

pub use error::QmpError;

use lines::{LineBuffer, READ_BYTES};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long [`Qmp::execute`] waits. The slowest ordinary command is `stop` behind a disk
/// that flushes; a storage path is given up long before this.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// Longest line taken. The longest a healthy QEMU sends is the answer to
/// `query-qmp-schema`, about 200 KB in 7.2 and growing with each release.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Events kept for [`Qmp::poll_event`]; beyond it the oldest is dropped and counted.
/// A checkpoint makes two (STOP, RESUME), so this is the news of many of them.
pub const EVENTS_MAX: usize = 256;

/// Pause between two attempts to connect while QEMU is still starting.
const CONNECT_RETRY: Duration = Duration::from_millis(2);

/// Bytes of an unreadable line that go into the error.
const EXCERPT_BYTES: usize = 80;

/// Something QEMU reported by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// QEMU's name of it, such as `RESET` or `SHUTDOWN`.
    pub name: String,
    /// Its data; `Null` if it has none.
    pub data: Value,
    /// QEMU's wall clock when it happened, µs since 1970; 0 if not given.
    pub at_us: u64,
}

/// A command typed ahead of time.
#[derive(Debug)]
struct Armed {
    name: String,
    id: u64,
    fired_at: Option<Instant>,
}

/// One connection to one monitor. See the module's page.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    lines: LineBuffer,
    events: VecDeque<QmpEvent>,
    events_dropped: u64,
    last_id: u64,
    armed: Option<Armed>,
    dead: bool,
    /// Spin this long on the socket before sleeping in poll(2).
    spin: Duration,
}

impl Qmp {
    /// Connects to the monitor at `path`, takes its greeting and negotiates capabilities
    /// (none). Tries again while the socket is not there yet, until `within` has passed.
    ///
    /// # Errors
    /// [`QmpError::Connect`] if nobody listens; otherwise what went wrong in the greeting.
    pub fn connect(path: &Path, within: Duration) -> Result<Self, QmpError> {
        let end = Instant::now() + within;
        let socket = loop {
            match UnixStream::connect(path) {
                Ok(socket) => break socket,
                Err(source) => {
                    let starting = matches!(
                        source.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    );
                    if !starting || Instant::now() + CONNECT_RETRY >= end {
                        let path = path.to_owned();
                        return Err(QmpError::Connect { path, source });
                    }
                    std::thread::sleep(CONNECT_RETRY);
                }
            }
        };
        Self::over(socket, end.saturating_duration_since(Instant::now()))
    }

    /// The same over a socket that is already connected.
    ///
    /// # Errors
    /// What went wrong in the greeting.
    pub fn over(socket: UnixStream, within: Duration) -> Result<Self, QmpError> {
        let end = Instant::now() + within;
        socket
            .set_nonblocking(true)
            .map_err(|source| io_error("(greeting)", source))?;
        let mut qmp = Self {
            socket,
            lines: LineBuffer::default(),
            events: VecDeque::new(),
            events_dropped: 0,
            last_id: 0,
            armed: None,
            dead: false,
            spin: Duration::ZERO,
        };
        let greeting = qmp.next_message("(greeting)", within, end)?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.garbage("(greeting)", greeting.to_string().as_bytes()));
        }
        let left = end.saturating_duration_since(Instant::now());
        qmp.execute_within("qmp_capabilities", Value::Null, left)?;
        Ok(qmp)
    }

    /// Runs one command and returns what QEMU returns, waiting at most
    /// [`COMMAND_DEADLINE`]. `args` is an object, or `Null` for none.
    ///
    /// # Errors
    /// See [`QmpError`]; each carries the command's name.
    pub fn execute(&mut self, command: &str, args: Value) -> Result<Value, QmpError> {
        self.execute_within(command, args, COMMAND_DEADLINE)
    }

    /// [`Self::execute`] with a deadline of its own.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn execute_within(
        &mut self,
        command: &str,
        args: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        self.expect_idle(command)?;
        let (id, text) = self.message(command, args);
        let end = Instant::now() + within;
        self.send(command, text.as_bytes(), None, within, end)?;
        self.answer(command, id, within, end)
    }

    /// Hands QEMU a descriptor under `name` (`getfd`), for later use as `fd:name`.
    /// QEMU gets its own copy.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn send_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        const COMMAND: &str = "getfd";
        self.expect_idle(COMMAND)?;
        let (id, text) = self.message(COMMAND, json!({ "fdname": name }));
        let within = COMMAND_DEADLINE;
        let end = Instant::now() + within;
        self.send(COMMAND, text.as_bytes(), Some(fd), within, end)?;
        self.answer(COMMAND, id, within, end).map(drop)
    }

    /// Types `command` ahead: sends all of it but the closing brace.
    ///
    /// # Errors
    /// [`QmpError::OutOfTurn`] if one is typed already.
    pub fn arm(&mut self, command: &str, args: Value) -> Result<(), QmpError> {
        self.expect_idle(command)?;
        let (id, text) = self.message(command, args);
        let end = Instant::now() + COMMAND_DEADLINE;
        let ahead = &text.as_bytes()[..text.len() - 1];
        self.send(command, ahead, None, COMMAND_DEADLINE, end)?;
        self.armed = Some(Armed {
            name: command.to_owned(),
            id,
            fired_at: None,
        });
        Ok(())
    }

    /// Whether a command is typed ahead and waits for [`Self::fire`].
    #[must_use]
    pub fn is_armed(&self) -> bool {
        matches!(&self.armed, Some(armed) if armed.fired_at.is_none())
    }

    /// Sends the last byte of the armed command. Does not wait for the answer.
    ///
    /// # Errors
    /// [`QmpError::OutOfTurn`] if none is armed, or what the socket met.
    pub fn fire(&mut self) -> Result<(), QmpError> {
        let Some(armed) = self.armed.take_if(|armed| armed.fired_at.is_none()) else {
            return Err(QmpError::OutOfTurn {
                command: "(fire)".to_owned(),
                why: "no command is typed ahead",
            });
        };
        let end = Instant::now() + COMMAND_DEADLINE;
        self.send(&armed.name, b"}", None, COMMAND_DEADLINE, end)?;
        self.armed = Some(Armed {
            fired_at: Some(Instant::now()),
            ..armed
        });
        Ok(())
    }

    /// Waits for the answer of the fired command. Whatever happens, the monitor is idle
    /// afterwards.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn complete(&mut self, within: Duration) -> Result<Value, QmpError> {
        let Some(armed) = self.armed.take_if(|armed| armed.fired_at.is_some()) else {
            return Err(QmpError::OutOfTurn {
                command: "(complete)".to_owned(),
                why: "no typed-ahead command has been fired",
            });
        };
        self.answer(&armed.name, armed.id, within, Instant::now() + within)
    }

    /// Takes back a command that was typed but not fired. QEMU's lexer gives up a
    /// half-typed message at a byte that cannot occur in UTF-8 and answers with an error
    /// (QEMU qobject/json-lexer.c).
    ///
    /// # Errors
    /// See [`QmpError`]. Nothing happens if no command is armed.
    pub fn disarm(&mut self) -> Result<(), QmpError> {
        let Some(armed) = self.armed.take_if(|armed| armed.fired_at.is_none()) else {
            return Ok(());
        };
        let end = Instant::now() + COMMAND_DEADLINE;
        self.send(&armed.name, b"\xff\n", None, COMMAND_DEADLINE, end)?;
        match self.answer(&armed.name, armed.id, COMMAND_DEADLINE, end) {
            Err(QmpError::Refused { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The oldest event not yet taken. Reads what has arrived, never waits.
    ///
    /// # Errors
    /// If the connection is lost; events that came before it are handed out first.
    pub fn poll_event(&mut self) -> Result<Option<QmpEvent>, QmpError> {
        let mut taken = Ok(());
        if self.events.is_empty() {
            taken = self.take_in("(events)");
        }
        match self.events.pop_front() {
            Some(event) => Ok(Some(event)),
            None => taken.map(|()| None),
        }
    }

    /// Waits for an event called `name` and returns it; other events stay queued.
    ///
    /// # Errors
    /// [`QmpError::Timeout`] or the loss of the connection.
    pub fn wait_event(&mut self, name: &str, within: Duration) -> Result<QmpEvent, QmpError> {
        let end = Instant::now() + within;
        loop {
            let taken = self.take_in(name);
            if let Some(at) = self.events.iter().position(|event| event.name == name)
                && let Some(event) = self.events.remove(at)
            {
                return Ok(event);
            }
            taken?;
            self.wait(name, libc::POLLIN, within, end)?;
        }
    }

    /// Events lost because nobody took them ([`EVENTS_MAX`]).
    #[must_use]
    pub fn events_dropped(&self) -> u64 {
        self.events_dropped
    }

    /// Descriptor to poll for events. Read only through this client.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Spins this long for an answer before sleeping. Zero, the default, sleeps at once.
    pub fn set_spin(&mut self, spin: Duration) {
        self.spin = spin;
    }

    fn expect_idle(&self, command: &str) -> Result<(), QmpError> {
        let command = command.to_owned();
        if self.dead {
            return Err(QmpError::Closed { command });
        }
        match &self.armed {
            None => Ok(()),
            Some(_) => Err(QmpError::OutOfTurn {
                command,
                why: "another command is typed ahead on this monitor; fire or disarm it first",
            }),
        }
    }

    /// Id and text of a command. The text ends in the brace that makes QEMU run it.
    fn message(&mut self, command: &str, args: Value) -> (u64, String) {
        self.last_id += 1;
        let id = self.last_id;
        let message = match args {
            Value::Null => json!({ "execute": command, "id": id }),
            args => json!({ "execute": command, "arguments": args, "id": id }),
        };
        (id, message.to_string())
    }

    fn send(
        &mut self,
        command: &str,
        mut bytes: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        within: Duration,
        end: Instant,
    ) -> Result<(), QmpError> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        if self.dead {
            let command = command.to_owned();
            return Err(QmpError::Closed { command });
        }
        while !bytes.is_empty() {
            let raw = fd.map(|fd| [fd.as_raw_fd()]);
            let control = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
            let sent = sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(bytes)],
                control.as_slice(),
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            );
            match sent {
                Ok(n) => {
                    bytes = &bytes[n..];
                    fd = None;
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => self.wait(command, libc::POLLOUT, within, end)?,
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => {
                    return Err(self.closed(command));
                }
                Err(errno) => {
                    self.dead = true;
                    return Err(io_error(command, errno.into()));
                }
            }
        }
        Ok(())
    }

    /// Waits for the answer with this id. Answers to commands given up before are dropped.
    fn answer(
        &mut self,
        command: &str,
        id: u64,
        within: Duration,
        end: Instant,
    ) -> Result<Value, QmpError> {
        loop {
            let mut message = self.next_message(command, within, end)?;
            // QEMU leaves the id out only if it could not read the command.
            match message.get("id").and_then(Value::as_u64) {
                Some(other) if other != id => continue,
                _ => {}
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            let text = |key: &str| -> String {
                let error = message.get("error").and_then(|error| error.get(key));
                error.and_then(Value::as_str).unwrap_or("").to_owned()
            };
            if message.get("error").is_some() {
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    class: text("class"),
                    desc: text("desc"),
                });
            }
            return Err(self.garbage(command, message.to_string().as_bytes()));
        }
    }

    /// The next message that is not an event.
    fn next_message(
        &mut self,
        command: &str,
        within: Duration,
        end: Instant,
    ) -> Result<Value, QmpError> {
        let spin_end = Instant::now() + self.spin;
        loop {
            if let Some(message) = self.next_held(command)? {
                return Ok(message);
            }
            if !self.receive(command)? {
                if Instant::now() < spin_end {
                    std::hint::spin_loop();
                } else {
                    self.wait(command, libc::POLLIN, within, end)?;
                }
            }
        }
    }

    /// Takes in all that has arrived; what is not an event is an answer nobody waits for.
    fn take_in(&mut self, command: &str) -> Result<(), QmpError> {
        loop {
            while self.next_held(command)?.is_some() {}
            if !self.receive(command)? {
                return Ok(());
            }
        }
    }

    /// The next non-event among the lines held; events go to their queue.
    fn next_held(&mut self, command: &str) -> Result<Option<Value>, QmpError> {
        while let Some(line) = self.lines.next_line() {
            if line.is_empty() {
                continue;
            }
            let Ok(mut message @ Value::Object(_)) = serde_json::from_slice::<Value>(line) else {
                let line = line.to_vec();
                return Err(self.garbage(command, &line));
            };
            let Some(name) = message.get("event").and_then(Value::as_str) else {
                return Ok(Some(message));
            };
            let name = name.to_owned();
            let stamp = |key: &str| -> u64 {
                let field = message.get("timestamp").and_then(|stamp| stamp.get(key));
                field.and_then(Value::as_u64).unwrap_or(0)
            };
            let at_us = stamp("seconds")
                .saturating_mul(1_000_000)
                .saturating_add(stamp("microseconds"));
            let data = message.get_mut("data").map_or(Value::Null, Value::take);
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
                self.events_dropped += 1;
            }
            self.events.push_back(QmpEvent { name, data, at_us });
        }
        if self.lines.partial_len() > LINE_BYTES_MAX {
            self.dead = true;
            return Err(QmpError::LineTooLong {
                command: command.to_owned(),
                limit_bytes: LINE_BYTES_MAX,
            });
        }
        Ok(None)
    }

    /// Reads once. False if nothing is there.
    fn receive(&mut self, command: &str) -> Result<bool, QmpError> {
        let mut chunk = [0u8; READ_BYTES];
        loop {
            if self.dead {
                return Err(self.closed(command));
            }
            match (&self.socket).read(&mut chunk) {
                Ok(0) => return Err(self.closed(command)),
                Ok(n) => {
                    self.lines.push(&chunk[..n]);
                    return Ok(true);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(false),
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Err(self.closed(command)),
                    _ => {
                        self.dead = true;
                        return Err(io_error(command, error));
                    }
                },
            }
        }
    }

    /// Sleeps until the socket is ready for `events` or the deadline has passed.
    fn wait(
        &self,
        command: &str,
        events: libc::c_short,
        within: Duration,
        end: Instant,
    ) -> Result<(), QmpError> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(QmpError::Timeout {
                command: command.to_owned(),
                waited_ms: within.as_millis(),
            });
        }
        let flags = PollFlags::from_bits_truncate(events);
        let mut fds = [PollFd::new(self.socket.as_fd(), flags)];
        // One more than the rounded-down rest, so that the last wait is no busy loop.
        let millis = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(errno) => Err(io_error(command, errno.into())),
        }
    }

    fn closed(&mut self, command: &str) -> QmpError {
        self.dead = true;
        let command = command.to_owned();
        QmpError::Closed { command }
    }

    fn garbage(&mut self, command: &str, line: &[u8]) -> QmpError {
        self.dead = true;
        let head = &line[..line.len().min(EXCERPT_BYTES)];
        QmpError::Garbage {
            command: command.to_owned(),
            excerpt: String::from_utf8_lossy(head).into_owned(),
        }
    }
}

fn io_error(command: &str, source: io::Error) -> QmpError {
    let command = command.to_owned();
    QmpError::Io { command, source }
}
