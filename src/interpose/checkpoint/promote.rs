//! The standby QEMU: waits for state, loads it, becomes the running VM.
//!
//! ```text
//!  prepare                promote
//!  inmigrate -----------> loading -----> paused --(hook)--> running
//!                            |
//!                            +--> QEMU exits: PromoteError::Died, start another standby
//! ```
//!
//! The stream goes over a socket pair whose one end QEMU gets through its monitor when
//! the standby starts, so that at promotion there is nothing left to connect and the
//! sandbox has nothing to allow.

use super::HookError;
use super::blocks::set_ignore_shared;
use super::stream::{HEADER_BYTES, SECTION_TYPE, StreamError, at_timer_body, device_sections_at};
use crate::vm::qmp::{COMMAND_DEADLINE, Qmp, QmpError};
use serde_json::{Value, json};
use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a standby may take to load. 5 to 7 ms measured for 34 KB; 4.6 MB of blocks and
/// a host busy with other promotions still fit many times over.
const LOAD_DEADLINE: Duration = Duration::from_secs(20);

/// Name of the stream's descriptor inside QEMU.
const FD_NAME: &str = "pollux-incoming";

/// Why a standby could not become the running VM. RAM, state and disk are untouched by
/// the failure of the load: keep them, so that another standby can be started with them.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    /// QEMU's monitor, before anything was loaded or at `cont`.
    #[error("promotion, {step}: {source}")]
    Qmp {
        /// What was under way.
        step: &'static str,
        /// What the monitor met.
        source: QmpError,
    },
    /// The prefix or the state is not a stream that may be fed.
    #[error("promotion: {what}: {source}")]
    Stream {
        /// Which of the two.
        what: &'static str,
        /// What is wrong with it.
        source: StreamError,
    },
    /// The standby ended while it loaded.
    #[error("promotion: the standby QEMU exited while loading: {}", if stderr_tail.is_empty() {
        "it left no message"
    } else {
        stderr_tail
    })]
    Died {
        /// The last it wrote to its standard error.
        stderr_tail: String,
    },
    /// It neither loaded nor died.
    #[error("promotion: the standby QEMU is still `{status}` after {waited_ms} ms of loading")]
    Stuck {
        /// Its run state.
        status: String,
        /// How long it was waited for.
        waited_ms: u128,
    },
    /// Feeding the stream failed, though the standby lives.
    #[error("promotion: feeding the state to the standby: {0}")]
    Feed(io::Error),
    /// The caller's hook said no; the standby holds the loaded VM, stopped.
    #[error("promotion: {0}; the standby is loaded and stands still")]
    Hook(HookError),
}

/// Durations of one promotion, µs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PromoteTimings {
    /// Writing prefix and state into the standby.
    pub feed_us: u64,
    /// From then until it had loaded them.
    pub load_us: u64,
    /// The caller's hook.
    pub hook_us: u64,
    /// `cont` until QEMU reported RESUME.
    pub cont_us: u64,
    /// All of it.
    pub total_us: u64,
}

/// Reads the end of the standby's standard error, for the error message.
pub type StderrTail = Box<dyn Fn() -> String + Send>;

/// A standby QEMU (`-S -incoming defer`) that waits for state.
pub struct Incoming {
    qmp: Qmp,
    stream: UnixStream,
    stderr_tail: Option<StderrTail>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("qmp", &self.qmp)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    /// Makes a QEMU that was started with `-S -incoming defer` wait on a connection that is
    /// already there. Takes the monitor; [`Self::promote`] gives it back.
    ///
    /// # Errors
    /// [`PromoteError::Qmp`]; as a rule QEMU was not started with `-incoming defer`.
    pub fn prepare(mut qmp: Qmp) -> Result<Self, PromoteError> {
        let error = |step| move |source| PromoteError::Qmp { step, source };
        let (ours, theirs) = UnixStream::pair().map_err(PromoteError::Feed)?;
        set_ignore_shared(&mut qmp, true).map_err(error("capability x-ignore-shared"))?;
        qmp.send_fd(FD_NAME, theirs.as_fd())
            .map_err(error("handing over the stream"))?;
        qmp.execute(
            "migrate-incoming",
            json!({ "uri": format!("fd:{FD_NAME}") }),
        )
        .map_err(error("migrate-incoming"))?;
        Ok(Self {
            qmp,
            stream: ours,
            stderr_tail: None,
        })
    }

    /// Where to find the standby's last words if it dies.
    #[must_use]
    pub fn with_stderr_tail(mut self, tail: StderrTail) -> Self {
        self.stderr_tail = Some(tail);
        self
    }

    /// The standby's monitor, for events and queries while it waits.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Feeds `prefix` (from [`super::capture_blocks_prefix`]) and `device_state` (as saved,
    /// with its header), waits until they are loaded, runs `hook`, and lets the guest run.
    /// The RAM file must hold the memory of the same checkpoint.
    ///
    /// # Errors
    /// See [`PromoteError`]; unless it is `Hook`, this QEMU is lost and may be ended.
    pub fn promote(
        mut self,
        prefix: &[u8],
        device_state: &[u8],
        hook: &mut dyn FnMut() -> Result<(), HookError>,
    ) -> Result<(Qmp, PromoteTimings), PromoteError> {
        let begun = Instant::now();
        check(prefix, device_state)?;
        let fed = self.feed(&[prefix, &device_state[HEADER_BYTES..]]);
        let feed_us = micros(begun);
        let mark = Instant::now();
        self.await_loaded(fed)?;
        let load_us = micros(mark);

        let error = |step| move |source| PromoteError::Qmp { step, source };
        let mark = Instant::now();
        hook().map_err(PromoteError::Hook)?;
        let hook_us = micros(mark);
        let mark = Instant::now();
        self.let_run().map_err(error("cont"))?;
        let timings = PromoteTimings {
            feed_us,
            load_us,
            hook_us,
            cont_us: micros(mark),
            total_us: micros(begun),
        };
        Ok((self.qmp, timings))
    }

    /// The guest runs once QEMU says RESUME (0.1 ms); the answer to `cont` came up to 30 ms
    /// later, with the first vCPU busy translating under QEMU's lock.
    fn let_run(&mut self) -> Result<(), QmpError> {
        self.qmp.arm("cont", Value::Null)?;
        self.qmp.fire()?;
        self.qmp.complete_at_event("RESUME", COMMAND_DEADLINE)
    }

    fn feed(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(LOAD_DEADLINE))?;
        for part in parts {
            self.stream.write_all(part)?;
        }
        self.stream.shutdown(std::net::Shutdown::Write)
    }

    /// Waits until the run state is no longer `inmigrate`.
    fn await_loaded(&mut self, fed: io::Result<()>) -> Result<(), PromoteError> {
        let begun = Instant::now();
        loop {
            let answer = match self.qmp.execute("query-status", Value::Null) {
                Ok(answer) => answer,
                Err(error) if error.is_fatal() => return Err(self.died()),
                Err(source) => {
                    let step = "waiting until the state is loaded";
                    return Err(PromoteError::Qmp { step, source });
                }
            };
            let status = answer.get("status").and_then(Value::as_str).unwrap_or("");
            match (status, &fed) {
                ("inmigrate", _) if begun.elapsed() > LOAD_DEADLINE => {
                    return Err(PromoteError::Stuck {
                        status: status.to_owned(),
                        waited_ms: begun.elapsed().as_millis(),
                    });
                }
                ("inmigrate", _) => std::thread::yield_now(),
                // Not waiting any more, though it did not get everything: not our doing.
                (_, Err(error)) => return Err(PromoteError::Feed(copy(error))),
                _ => return Ok(()),
            }
        }
    }

    fn died(&self) -> PromoteError {
        let stderr_tail = self
            .stderr_tail
            .as_ref()
            .map_or_else(String::new, |tail| tail());
        PromoteError::Died { stderr_tail }
    }
}

/// Both must be what they claim to be before a standby is spent on them.
fn check(prefix: &[u8], device_state: &[u8]) -> Result<(), PromoteError> {
    let error = |what| move |source| PromoteError::Stream { what, source };
    match device_sections_at(prefix) {
        // A prefix ends exactly where the first device section would begin.
        Err(StreamError::Truncated { what, .. }) if what == SECTION_TYPE => {}
        Err(source) => return Err(error("prefix of RAM blocks")(source)),
        Ok(_) => {
            let what = "prefix of RAM blocks";
            let source = StreamError::WrongSection {
                name: "timer".to_owned(),
                expected: "ram",
                at: prefix.len(),
            };
            return Err(error(what)(source));
        }
    }
    at_timer_body(device_state)
        .map(drop)
        .map_err(error("device state"))
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
