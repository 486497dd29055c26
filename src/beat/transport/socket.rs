//! Opening a network's socket.

use super::Network;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use std::ffi::OsString;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Room for what arrives while the thread cannot run, in bytes as the kernel counts them: a
/// packet of the largest size comes in three fragments and counts for about 8 KiB, 63 hosts send
/// one each in a period; this is two periods. The kernel's default of 208 KiB holds 26.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;

/// A socket bound to the network's address, and to its device if one is given.
pub(super) fn open(network: &Network) -> io::Result<UdpSocket> {
    let family = if network.local.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Datagram, flags, None)?;
    if let Some(device) = &network.device {
        setsockopt(&fd, sockopt::BindToDevice, &OsString::from(device))?;
    }
    // Beyond the limit of net.core.rmem_max with CAP_NET_ADMIN, up to it without.
    if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).is_err() {
        setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(network.local))?;
    Ok(UdpSocket::from(fd))
}
