//! RAM blocks outside the shared RAM file: firmware, option ROMs, ACPI tables, VGA memory.
//!
//! A standby skips the reset that would fill them, so it must be given them, or the guest
//! dies at its first reboot after a failover. They are taken once, at seeding, by a
//! migration that leaves the shared memory out (`x-ignore-shared`) and is cut off before
//! the first device section: header and RAM sections form the prefix that promotion puts
//! in front of a device state.

use super::stream::{StreamError, device_sections_at};
use crate::vm::qmp::{Qmp, QmpError};
use bytes::Bytes;
use serde_json::{Value, json};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Largest prefix taken. Measured 30 KB to 4.6 MB; a display device may bring 16 MiB of
/// its own, OVMF another 4 MiB.
pub const PREFIX_BYTES_MAX: usize = 64 << 20;

/// Largest device part read past the prefix and thrown away; as for a cut.
const REST_BYTES_MAX: usize = 64 << 20;

/// How long QEMU may take to write all of it (10 to 20 ms measured) and settle.
const DEADLINE: Duration = Duration::from_secs(20);

/// How long the socket may be silent in between before the migration's state is asked.
const SILENCE: Duration = Duration::from_millis(200);

/// Name of the stream's descriptor inside QEMU.
const FD_NAME: &str = "pollux-blocks";

/// Why the blocks could not be taken. The guest is still stopped.
#[derive(Debug, thiserror::Error)]
pub enum BlocksError {
    /// QEMU's monitor.
    #[error("RAM blocks outside the shared file: {0}")]
    Qmp(#[from] QmpError),
    /// The socket pair.
    #[error("RAM blocks outside the shared file: reading the stream: {0}")]
    Io(#[from] io::Error),
    /// The stream could not be taken apart.
    #[error("RAM blocks outside the shared file: {0}")]
    Stream(#[from] StreamError),
    /// Too much of it.
    #[error(
        "RAM blocks outside the shared file: more than {limit_bytes} bytes; \
         is all of the VM's memory in one shared file?"
    )]
    TooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// QEMU's migration ended badly.
    #[error("RAM blocks outside the shared file: QEMU's migration is `{status}`: {why}")]
    Migration {
        /// QEMU's status word.
        status: String,
        /// QEMU's reason, if it gave one.
        why: String,
    },
}

/// Takes the stream's header and every RAM block outside the shared file. The guest must
/// be stopped, and is afterwards: in run state `postmigrate` with its block nodes
/// inactive, from which device states can be saved and `cont` goes on.
///
/// # Errors
/// See [`BlocksError`]; the capability is taken back in any case.
pub fn capture_blocks_prefix(qmp: &mut Qmp) -> Result<Bytes, BlocksError> {
    set_ignore_shared(qmp, true)?;
    let taken = migrate(qmp);
    let cleared = set_ignore_shared(qmp, false);
    let prefix = taken?;
    cleared?;
    Ok(prefix)
}

/// Sets the capability that leaves shared memory out of the stream, on either side.
pub(super) fn set_ignore_shared(qmp: &mut Qmp, state: bool) -> Result<(), QmpError> {
    let capability = json!({ "capability": "x-ignore-shared", "state": state });
    let args = json!({ "capabilities": [capability] });
    qmp.execute("migrate-set-capabilities", args).map(drop)
}

fn migrate(qmp: &mut Qmp) -> Result<Bytes, BlocksError> {
    let (ours, theirs) = UnixStream::pair()?;
    qmp.send_fd(FD_NAME, theirs.as_fd())?;
    drop(theirs);
    let started = qmp.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") }));
    if let Err(error) = started {
        // A refused migration leaves the descriptor with QEMU.
        let _ = qmp.execute("closefd", json!({ "fdname": FD_NAME }));
        return Err(error.into());
    }
    let end = Instant::now() + DEADLINE;
    let stream = read_all(ours, end)?;
    let settled = settle(qmp, end);
    let at = device_sections_at(&stream);
    settled?;
    let at = at?;
    if at > PREFIX_BYTES_MAX {
        let limit_bytes = PREFIX_BYTES_MAX;
        return Err(BlocksError::TooLarge { limit_bytes });
    }
    Ok(Bytes::copy_from_slice(&stream[..at]))
}

/// Reads to the end. All of it: a stream cut short is a failed migration to QEMU.
fn read_all(mut stream: UnixStream, end: Instant) -> Result<Vec<u8>, BlocksError> {
    const LIMIT: usize = PREFIX_BYTES_MAX + REST_BYTES_MAX;
    let mut all = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    stream.set_read_timeout(Some(SILENCE))?;
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(all),
            Ok(n) if all.len() + n > LIMIT => {
                let limit_bytes = LIMIT;
                return Err(BlocksError::TooLarge { limit_bytes });
            }
            Ok(n) => all.extend_from_slice(&chunk[..n]),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock if Instant::now() < end => {}
                _ => return Err(error.into()),
            },
        }
    }
}

/// Waits until QEMU itself says the migration is over.
fn settle(qmp: &mut Qmp, end: Instant) -> Result<(), BlocksError> {
    loop {
        let info = qmp.execute("query-migrate", Value::Null)?;
        let text = |key: &str| {
            info.get(key)
                .and_then(Value::as_str)
                .unwrap_or("")
                .to_owned()
        };
        let status = text("status");
        match status.as_str() {
            "completed" => return Ok(()),
            "failed" | "cancelled" | "none" => {
                let why = text("error-desc");
                return Err(BlocksError::Migration { status, why });
            }
            _ if Instant::now() >= end => {
                // Give up in a defined state.
                let _ = qmp.execute("migrate_cancel", Value::Null);
                let why = format!("not finished after {} s", DEADLINE.as_secs());
                return Err(BlocksError::Migration { status, why });
            }
            _ => std::thread::yield_now(),
        }
    }
}
