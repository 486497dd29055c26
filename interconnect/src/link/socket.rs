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
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::cell::Cell;
use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::sync::watch;

/// Socket buffers, in bytes: twice what is ever on its way, because the kernel counts
/// its own overhead (up to as much again for each packet) into it.
pub(super) const SOCKET_BUFFER_BYTES: usize = 16 << 20;
/// Most bytes of one send, whatever number of packets it is cut into: an IPv4 datagram
/// of 65,535 bytes less its headers, rounded down.
const SEND_BYTES_MAX: usize = 65_000;
/// Most bytes that one received message may hold: what the other side sent at once, put
/// together again (UDP_GRO, udp(7)).
const MESSAGE_BYTES_MAX: usize = 1 << 16;
/// Messages taken from the kernel at a time: 128 KiB, which stay in the core's own cache
/// until they are decrypted. Measured with jumbo frames: 3.2 GB/s, 2.8 with 8, 2.5 with 32.
const MESSAGES_MAX: usize = 2;
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

/// A socket for QUIC whose bursts fit a datagram, which keeps `open` as long as it is bound.
/// Call inside a tokio runtime.
///
/// # Errors
/// Of the system calls that set it up.
pub(super) fn for_quic(
    socket: UdpSocket,
    mtu_bytes_max: u16,
    receive_bytes_max: u16,
    open: watch::Sender<()>,
) -> std::io::Result<Arc<BurstSocket>> {
    Ok(Arc::new(BurstSocket {
        inner: TokioRuntime.wrap_udp_socket(socket)?,
        packets_max: packets_in_a_send(mtu_bytes_max),
        receive_segments: MESSAGE_BYTES_MAX.div_ceil(usize::from(receive_bytes_max.max(1))),
        burst: Mutex::default(),
        open,
    }))
}

/// Packets that leave with one send.
#[derive(Debug, Default)]
struct Burst {
    bytes: Vec<u8>,
    /// Size of every packet but the last.
    segment_bytes: usize,
    /// The last one is shorter: nothing can follow it.
    ended: bool,
    /// To whom, with which mark, from which address.
    way: Option<(SocketAddr, Option<EcnCodepoint>, Option<IpAddr>)>,
}

/// How a burst went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Released {
    /// Nothing is held any more.
    Sent,
    /// The socket has no room: try again when it is writable.
    Blocked,
}

impl Burst {
    fn way(transmit: &Transmit<'_>) -> (SocketAddr, Option<EcnCodepoint>, Option<IpAddr>) {
        (transmit.destination, transmit.ecn, transmit.src_ip)
    }

    fn has_room_for(&self, packets: usize, packets_max: usize) -> bool {
        let bytes = self.bytes.len() + packets * self.segment_bytes;
        !self.bytes.is_empty()
            && !self.ended
            && bytes <= SEND_BYTES_MAX
            && bytes.div_ceil(self.segment_bytes.max(1)) <= packets_max
    }

    /// Whether `transmit` can leave together with what is here.
    fn takes(&self, transmit: &Transmit<'_>, packets_max: usize) -> bool {
        let bytes = transmit.contents.len();
        // A single packet (no segment size) may only end a burst.
        let fits = match transmit.segment_size {
            Some(segment) => segment == self.segment_bytes,
            None => bytes <= self.segment_bytes,
        };
        let packets = bytes.div_ceil(self.segment_bytes.max(1));
        fits && self.way == Some(Self::way(transmit)) && self.has_room_for(packets, packets_max)
    }

    fn take(&mut self, transmit: &Transmit<'_>) {
        if self.bytes.is_empty() {
            self.way = Some(Self::way(transmit));
            self.segment_bytes = transmit.segment_size.unwrap_or(transmit.contents.len());
        }
        self.bytes.extend_from_slice(transmit.contents);
        self.ended = !self.bytes.len().is_multiple_of(self.segment_bytes.max(1));
    }

    fn clear(&mut self) {
        // Keeps its memory for the next one: at most SEND_BYTES_MAX.
        self.bytes.clear();
        self.ended = false;
    }
}

thread_local! {
    /// The socket whose packets the driver that this thread polls lets gather.
    static HOLDING: Cell<*const BurstSocket> = const { Cell::new(std::ptr::null()) };
}

/// While it lives, packets sent from this thread gather.
#[derive(Debug)]
pub(super) struct Hold(());

impl Drop for Hold {
    fn drop(&mut self) {
        HOLDING.set(std::ptr::null());
    }
}

/// Hands packets on in bursts that fit a datagram, and gathers them while held.
#[derive(Debug)]
pub(super) struct BurstSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Packets of one send.
    packets_max: usize,
    /// Packets of one message, as the library sizes its buffers by.
    receive_segments: usize,
    burst: Mutex<Burst>,
    /// The last field, so dropped after the socket.
    open: watch::Sender<()>,
}

impl BurstSocket {
    /// Packets sent from this thread gather until [`Self::release`], which must follow.
    pub(super) fn hold(&self) -> Hold {
        HOLDING.set(std::ptr::from_ref(self));
        Hold(())
    }

    fn burst(&self) -> MutexGuard<'_, Burst> {
        // After a panic a burst may be cut short: as good as lost on the way.
        self.burst.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn burst_packets_max(&self) -> usize {
        // 1 when the kernel turned out not to cut sends.
        self.inner.max_transmit_segments().min(self.packets_max)
    }

    /// Whether a burst waits that could take more.
    pub(super) fn has_room(&self) -> bool {
        self.burst().has_room_for(1, self.burst_packets_max())
    }

    /// Sends what gathered.
    pub(super) fn release(&self) -> Released {
        match self.send_burst(&mut self.burst()) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Released::Blocked,
            // Other errors are the library's to log (quinn-udp does); the packets are lost.
            _ => Released::Sent,
        }
    }

    fn send_burst(&self, burst: &mut Burst) -> std::io::Result<()> {
        let Some((destination, ecn, src_ip)) = burst.way.filter(|_| !burst.bytes.is_empty()) else {
            return Ok(());
        };
        let several = burst.bytes.len() > burst.segment_bytes;
        let result = self.inner.try_send(&Transmit {
            destination,
            ecn,
            contents: &burst.bytes,
            segment_size: several.then_some(burst.segment_bytes),
            src_ip,
        });
        if !matches!(&result, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock) {
            burst.clear();
        }
        result
    }
}

/// Waits until a socket is writable, and so keeps it open like the socket itself.
#[derive(Debug)]
struct Poller {
    inner: Pin<Box<dyn UdpPoller>>,
    /// The last field, so dropped after the socket.
    _open: watch::Sender<()>,
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.inner.as_mut().poll_writable(cx)
    }
}

impl AsyncUdpSocket for BurstSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller {
            inner: Arc::clone(&self.inner).create_io_poller(),
            _open: self.open.clone(),
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> std::io::Result<()> {
        if !std::ptr::eq(HOLDING.get(), self) {
            return self.inner.try_send(transmit);
        }
        let mut burst = self.burst();
        let packets_max = self.burst_packets_max();
        if burst.takes(transmit, packets_max) {
            burst.take(transmit);
            return Ok(());
        }
        self.send_burst(&mut burst)?;
        // Copying pays if at least one more of its like may join it. A single packet may be
        // a probe of the path, and nothing should share its fate.
        let packets = transmit
            .segment_size
            .map_or(1, |segment| transmit.contents.len() / segment.max(1));
        let joined = 2 * transmit.contents.len() <= SEND_BYTES_MAX && 2 * packets <= packets_max;
        if transmit.segment_size.is_none() || !joined {
            return self.inner.try_send(transmit);
        }
        burst.take(transmit);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<std::io::Result<usize>> {
        let count = bufs.len().min(MESSAGES_MAX);
        self.inner.poll_recv(cx, &mut bufs[..count], meta)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.burst_packets_max()
    }

    fn max_receive_segments(&self) -> usize {
        if self.inner.max_receive_segments() > 1 {
            self.receive_segments
        } else {
            1
        }
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
        let runtime = runtime();
        let _entered = runtime.enter();
        for mtu in [1200, 1452, 1472, 4000, 6551, 8972, 16_000, 65_000] {
            let socket = bind(0, "127.0.0.1:0".parse().unwrap()).unwrap();
            let socket = for_quic(socket, mtu, mtu, watch::Sender::new(())).unwrap();
            let packets = socket.max_transmit_segments();
            assert!(packets >= 1);
            assert!(packets * usize::from(mtu) <= 65_507, "{packets} of {mtu}");
        }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    /// `count` packets of `bytes`, each filled with its number from `first` on.
    fn packets(first: u8, count: u8, bytes: usize) -> Vec<u8> {
        let packet = |n| std::iter::repeat_n(first + n, bytes);
        (0..count).flat_map(packet).collect()
    }

    fn transmit(to: SocketAddr, contents: &[u8], segment_size: Option<usize>) -> Transmit<'_> {
        Transmit {
            destination: to,
            ecn: None,
            contents,
            segment_size,
            src_ip: None,
        }
    }

    /// First byte and size of each packet that came.
    fn received(receiver: &UdpSocket, count: usize) -> Vec<(u8, usize)> {
        receiver
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        let mut buffer = [0; 2000];
        (0..count)
            .map(|_| {
                let bytes = receiver.recv(&mut buffer).unwrap();
                assert!(buffer[..bytes].iter().all(|byte| *byte == buffer[0]));
                (buffer[0], bytes)
            })
            .collect()
    }

    #[test]
    fn held_packets_gather_and_leave_whole_and_in_order() {
        let runtime = runtime();
        let _entered = runtime.enter();
        // With a buffer that holds all of it.
        let receiver = bind(0, "127.0.0.1:0".parse().unwrap()).unwrap();
        let to = receiver.local_addr().unwrap();
        let socket = bind(0, "127.0.0.1:0".parse().unwrap()).unwrap();
        let socket = for_quic(socket, 1000, 1000, watch::Sender::new(())).unwrap();
        // The first send of a tokio socket has to learn that it is writable.
        runtime.block_on(async {
            let mut writable = Arc::clone(&socket).create_io_poller();
            std::future::poll_fn(|cx| writable.as_mut().poll_writable(cx))
                .await
                .unwrap();
        });
        let held = socket.hold();
        assert!(!socket.has_room());
        let send = |contents: &[u8], segment| socket.try_send(&transmit(to, contents, segment));
        send(&packets(0, 10, 1000), Some(1000)).unwrap();
        assert!(socket.has_room());
        receiver.set_nonblocking(true).unwrap();
        assert!(receiver.recv(&mut [0; 10]).is_err(), "left too early");
        receiver.set_nonblocking(false).unwrap();
        // One that is larger sends them off and goes by itself.
        send(&[10; 1200], None).unwrap();
        assert!(!socket.has_room());
        send(&packets(11, 10, 1000), Some(1000)).unwrap();
        send(&packets(21, 10, 1000), Some(1000)).unwrap();
        // A last one, shorter, ends the burst.
        send(&[31; 300], None).unwrap();
        assert!(!socket.has_room());
        // Too much for one send: the first burst leaves, the second waits.
        send(&packets(32, 30, 1000), Some(1000)).unwrap();
        send(&packets(62, 30, 1000), Some(1000)).unwrap();
        send(&packets(92, 30, 1000), Some(1000)).unwrap();
        drop(held);
        assert_eq!(socket.release(), Released::Sent);
        // Not held: at once.
        send(&[122; 10], None).unwrap();
        let came = received(&receiver, 123);
        let numbers: Vec<u8> = came.iter().map(|packet| packet.0).collect();
        assert_eq!(numbers, (0..123).collect::<Vec<u8>>());
        for (number, bytes) in came {
            let expected = match number {
                10 => 1200,
                31 => 300,
                122 => 10,
                _ => 1000,
            };
            assert_eq!(bytes, expected, "packet {number}");
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
