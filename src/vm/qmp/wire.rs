//! The monitor's socket: bytes out, messages in, never a wait without a deadline.

use super::lines::READ_BYTES;
use super::{EVENTS_MAX, LINE_BYTES_MAX, Qmp, QmpError, QmpEvent};
use serde_json::Value;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;
use std::time::Instant;

/// Bytes of an unreadable line that go into the error.
const EXCERPT_BYTES: usize = 80;

impl Qmp {
    pub(super) fn send(
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
    pub(super) fn answer(
        &mut self,
        command: &str,
        id: u64,
        within: Duration,
        end: Instant,
    ) -> Result<Value, QmpError> {
        loop {
            let message = self.next_message(command, within, end)?;
            // QEMU leaves the id out only if it could not read the command.
            match message.get("id").and_then(Value::as_u64) {
                Some(other) if other != id => continue,
                _ => {}
            }
            return self.verdict(command, message);
        }
    }

    /// What an answer says.
    fn verdict(&mut self, command: &str, mut message: Value) -> Result<Value, QmpError> {
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
        Err(self.garbage(command, message.to_string().as_bytes()))
    }

    /// Waits for an event or the answer with this id, whichever comes first. An answer that
    /// comes later is dropped like that of any command given up. The event stays queued.
    pub(super) fn answer_or_event(
        &mut self,
        command: &str,
        id: u64,
        event: &str,
        within: Duration,
    ) -> Result<(), QmpError> {
        let end = Instant::now() + within;
        loop {
            let held = self.next_held(command)?;
            if self.events.iter().any(|queued| queued.name == event) {
                return Ok(());
            }
            match held {
                Some(message) if message.get("id").and_then(Value::as_u64) == Some(id) => {
                    return self.verdict(command, message).map(drop);
                }
                Some(_) => continue,
                None => {}
            }
            if !self.receive(command)? {
                self.wait(command, libc::POLLIN, within, end)?;
            }
        }
    }

    /// The next message that is not an event.
    pub(super) fn next_message(
        &mut self,
        command: &str,
        within: Duration,
        end: Instant,
    ) -> Result<Value, QmpError> {
        loop {
            if let Some(message) = self.next_held(command)? {
                return Ok(message);
            }
            if !self.receive(command)? {
                self.wait(command, libc::POLLIN, within, end)?;
            }
        }
    }

    /// Takes in all that has arrived; what is not an event is an answer nobody waits for.
    pub(super) fn take_in(&mut self, command: &str) -> Result<(), QmpError> {
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
    pub(super) fn wait(
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

    pub(super) fn garbage(&mut self, command: &str, line: &[u8]) -> QmpError {
        self.dead = true;
        let head = &line[..line.len().min(EXCERPT_BYTES)];
        QmpError::Garbage {
            command: command.to_owned(),
            excerpt: String::from_utf8_lossy(head).into_owned(),
        }
    }
}

pub(super) fn io_error(command: &str, source: io::Error) -> QmpError {
    let command = command.to_owned();
    QmpError::Io { command, source }
}
