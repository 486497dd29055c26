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
//! It waits in poll(2) and does not spin: on two busy cores spinning for the answer took
//! the CPU from the QEMU that was to give it and made the median pause 1.3 to 5 times as long.
//!
//! It must never mix the answer of one command with another (every command carries an
//! id), never wait without a deadline, never hold more than [`LINE_BYTES_MAX`] of an
//! unfinished line or [`EVENTS_MAX`] events.

mod error;
mod lines;
#[cfg(test)]
mod tests;
mod wire;

pub use error::QmpError;

use lines::LineBuffer;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use wire::io_error;

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

    /// As [`Self::complete`], but content with the event `event`, if that comes before the
    /// answer: QEMU reports what it has done at once, while its answer waits for its lock,
    /// which a guest just started holds for long.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn complete_at_event(&mut self, event: &str, within: Duration) -> Result<(), QmpError> {
        let Some(armed) = self.armed.take_if(|armed| armed.fired_at.is_some()) else {
            return Err(QmpError::OutOfTurn {
                command: "(complete)".to_owned(),
                why: "no typed-ahead command has been fired",
            });
        };
        self.answer_or_event(&armed.name, armed.id, event, within)
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
}
