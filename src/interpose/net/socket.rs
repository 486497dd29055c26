//! The datagram sockets between a port and QEMU.

use super::config::NetError;
use crate::interpose::disk::Owner;
use nix::sys::socket::{setsockopt, sockopt};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Socket buffers asked for: a burst of a thousand full frames with their kernel overhead.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Bind the port's socket, replacing one left behind by a dead daemon.
pub(super) fn bind(path: &Path, owner: Option<Owner>) -> Result<UnixDatagram, NetError> {
    let step = |doing, source| NetError::Step {
        doing,
        path: path.to_owned(),
        source,
    };
    if let Ok(there) = std::fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            return Err(NetError::NotASocket {
                path: path.to_owned(),
            });
        }
        let probe = UnixDatagram::unbound().map_err(|e| step("make a socket", e))?;
        if probe.connect(path).is_ok() {
            return Err(NetError::InUse {
                path: path.to_owned(),
            });
        }
        std::fs::remove_file(path).map_err(|e| step("replace what is there", e))?;
    }
    let socket = UnixDatagram::bind(path).map_err(|e| step("bind", e))?;
    if let Some(Owner { uid, gid }) = owner {
        std::os::unix::fs::chown(path, Some(uid), Some(gid))
            .map_err(|e| step("change the owner", e))?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| step("set the mode", e))?;
    raise_buffers(&socket);
    Ok(socket)
}

/// Ask for large buffers; without the privilege the port works, with more drops under bursts.
pub(super) fn raise_buffers(socket: &UnixDatagram) {
    let receive = setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES);
    let send = setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES);
    if let Err(error) = receive.and(send) {
        tracing::info!(%error, "socket buffers stay at their default: needs CAP_NET_ADMIN");
    }
}
