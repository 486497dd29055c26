//! What can go wrong on a monitor, always with the command it went wrong in.

use std::io;
use std::path::PathBuf;

/// Error of one QMP command (or of the connection itself). Every variant names the
/// command that was under way; `(greeting)` stands for the time before the first one.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No monitor answers at this path.
    #[error(
        "QMP: cannot connect to {}: {source}; check that QEMU runs and has this monitor",
        path.display()
    )]
    Connect {
        /// The monitor's unix socket.
        path: PathBuf,
        /// What the last attempt met.
        source: io::Error,
    },
    /// The socket failed.
    #[error("QMP `{command}`: the monitor's socket failed: {source}")]
    Io {
        /// The command under way.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// QEMU closed the monitor, as a rule because it has ended.
    #[error("QMP `{command}`: QEMU closed the monitor; it has exited or was killed")]
    Closed {
        /// The command under way.
        command: String,
    },
    /// No answer in time. The connection stays usable; the late answer is dropped.
    #[error("QMP `{command}`: no answer within {waited_ms} ms; QEMU hangs or waits for storage")]
    Timeout {
        /// The command under way.
        command: String,
        /// How long pollux waited.
        waited_ms: u128,
    },
    /// A line longer than [`super::LINE_BYTES_MAX`].
    #[error("QMP `{command}`: a line of more than {limit_bytes} bytes; this is no QMP monitor")]
    LineTooLong {
        /// The command under way.
        command: String,
        /// The limit.
        limit_bytes: usize,
    },
    /// A line that is no QMP message.
    #[error("QMP `{command}`: not a QMP message: {excerpt:?}; is this socket really a monitor?")]
    Garbage {
        /// The command under way.
        command: String,
        /// The first bytes of the line.
        excerpt: String,
    },
    /// QEMU understood and refused.
    #[error("QMP `{command}`: QEMU refuses: {desc} ({class})")]
    Refused {
        /// The command under way.
        command: String,
        /// QEMU's error class, as a rule `GenericError`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// The caller asked for something the monitor's state does not allow.
    #[error("QMP `{command}`: {why}")]
    OutOfTurn {
        /// The command asked for.
        command: String,
        /// What stands in the way.
        why: &'static str,
    },
}

impl QmpError {
    /// Whether the connection is lost with this error: nothing more can be sent on it.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. }
                | Self::Io { .. }
                | Self::Closed { .. }
                | Self::LineTooLong { .. }
                | Self::Garbage { .. }
        )
    }
}
