//! The UDP socket of a link: its buffers, what its path carries, and the size of one send.
//!
//! What this must never do: hand the kernel more in one send than a UDP datagram can
//! hold. QUIC hands over up to ten packets at once (UDP_SEGMENT, udp(7)); with jumbo
//! frames those are 89,720 bytes, the kernel refuses them with EMSGSIZE, and quinn-udp
//! takes that error for a lost MTU probe: every burst vanishes without a trace, the
//! connection takes the path for one that swallows big packets, returns to small ones,
//! and tries again a second later. Measured: 17 such stalls in 20 s of a mirrored VM,
//! the worst 211 ms, with all of the kernel's drop counters at zero.

use super::config::StartError;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Socket buffers, in bytes: twice what is ever on its way, because the kernel counts
/// its own overhead (up to as much again for each packet) into it.
pub(super) const SOCKET_BUFFER_BYTES: usize = 16 << 20;
/// Most bytes of one send, whatever number of packets it is cut into: an IPv4 datagram
/// of 65,535 bytes less its headers, rounded down.
const SEND_BYTES_MAX: usize = 65_000;
/// IPv4 and UDP headers.
const HEADERS_V4_BYTES: u16 = 28;
/// IPv6 and UDP headers.
const HEADERS_V6_BYTES: u16 = 48;

/// Bind the UDP socket of a link.
pub(super) fn bind(link: usize, addr: SocketAddr) -> Result<UdpSocket, StartError> {
    let socket = UdpSocket::bind(addr).map_err(|source| StartError::Bind { link, addr, source })?;
    // FORCE goes beyond net.core.rmem_max, which a distribution sets for desktops;
    // without the privilege take what the limit gives.
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_BYTES);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_BYTES);
    }
    Ok(socket)
}

/// Bytes of the receive buffer as the kernel counts them (twice what was asked for,
/// socket(7)).
pub(super) fn receive_buffer_bytes(socket: &UdpSocket) -> u64 {
    getsockopt(socket, sockopt::RcvBuf).unwrap_or(0) as u64
}

/// Largest UDP payload in bytes that this host's route to `peer` takes: the MTU of its
/// interface, or what the kernel has learnt of the path. `None` if it cannot be told
/// (no route yet, IPv6). Sends nothing.
pub(super) fn route_payload_bytes(local: SocketAddr, peer: SocketAddr) -> Option<u16> {
    let probe = UdpSocket::bind((local.ip(), 0)).ok()?;
    probe.connect(peer).ok()?;
    // IP_MTU, ip(7): of a connected socket only.
    let mtu = getsockopt(&probe, sockopt::IpMtu).ok()?;
    payload_bytes(mtu, peer)
}

fn payload_bytes(mtu: i32, peer: SocketAddr) -> Option<u16> {
    let headers = if peer.is_ipv4() {
        HEADERS_V4_BYTES
    } else {
        HEADERS_V6_BYTES
    };
    // The loopback interface has 65,536.
    let mtu = u16::try_from(mtu.clamp(0, i32::from(u16::MAX))).ok()?;
    mtu.checked_sub(headers)
}

/// Packets of at most `mtu_bytes` that fit one send.
fn packets_in_a_send(mtu_bytes: u16) -> usize {
    (SEND_BYTES_MAX / usize::from(mtu_bytes.max(1))).max(1)
}

/// A socket for QUIC whose bursts fit a datagram. Call inside a tokio runtime.
///
/// # Errors
/// Of the system calls that set it up.
pub(super) fn for_quic(
    socket: UdpSocket,
    mtu_bytes_max: u16,
) -> std::io::Result<Arc<dyn AsyncUdpSocket>> {
    Ok(Arc::new(BurstSocket {
        inner: TokioRuntime.wrap_udp_socket(socket)?,
        packets_max: packets_in_a_send(mtu_bytes_max),
    }))
}

/// Hands everything on; only bounds the burst.
#[derive(Debug)]
struct BurstSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    packets_max: usize,
}

impl AsyncUdpSocket for BurstSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> std::io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<std::io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.packets_max)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_fits_a_datagram_at_every_packet_size() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        for mtu in [1200, 1452, 1472, 4000, 6551, 8972, 16_000, 65_000] {
            let socket = bind(0, "127.0.0.1:0".parse().unwrap()).unwrap();
            let socket = for_quic(socket, mtu).unwrap();
            let packets = socket.max_transmit_segments();
            assert!(packets >= 1);
            assert!(packets * usize::from(mtu) <= 65_507, "{packets} of {mtu}");
        }
    }

    #[test]
    fn the_route_says_what_it_takes() {
        let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let peer = "127.0.0.1:9".parse().unwrap();
        // Loopback takes 65,536, more than a length field can say.
        assert!(route_payload_bytes(local, peer).unwrap() >= 1472);
        let v6 = "[::1]:9".parse().unwrap();
        assert_eq!(payload_bytes(9000, peer), Some(8972));
        assert_eq!(payload_bytes(9000, v6), Some(8952));
        assert_eq!(payload_bytes(65_536, peer), Some(65_507));
        assert_eq!(payload_bytes(20, peer), None);
        assert_eq!(payload_bytes(-1, peer), None);
    }
}
