//! QUIC for a private link: every setting that differs from the library's default,
//! with its reason. The defaults suit the internet: 333 ms initial round trip, 30 s
//! idle time, 1,200-byte packets, windows for 100 Mbit/s.

use super::config::{LinkSettings, PairConfig, StartError};
use super::congestion::{PrivateLinkConfig, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// Socket buffers, in bytes: twice the congestion window, because the kernel counts
/// its own overhead (up to as much again for each packet) into it.
const SOCKET_BUFFER_BYTES: usize = 16 << 20;
/// What one stream may have on its way and unread, in bytes: at 10 Gbit/s 13 ms,
/// so that a standby that applies an epoch does not stall the next. With one lane
/// for each VM this also is what one VM can make the receiver hold in QUIC.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// What all streams of a session may have unread, in bytes: the bound on the memory
/// a partner can take here, whatever it does.
const CONNECTION_WINDOW_BYTES: u32 = 128 << 20;
/// What this side holds unacknowledged, in bytes: two congestion windows; more
/// only hides back-pressure from the lanes' own queues.
const SEND_WINDOW_BYTES: u64 = 16 << 20;
/// Lanes a partner may have open: two for each of many VMs.
const LANES_MAX: u32 = 256;
/// Round-trip time assumed before the first measurement. A cable between two hosts
/// takes 50 to 200 µs; 2 ms leave room for a busy scheduler and still repeat a lost
/// first packet after 6 ms instead of a second.
const INITIAL_RTT: Duration = Duration::from_millis(2);
/// First packet size, in bytes: fits 1,500-byte Ethernet with IPv6 headers.
const INITIAL_MTU_BYTES: u16 = 1452;
/// Pause before larger packets are tried again after losses that looked like a
/// limit of the path; a cable has the same limit always.
const MTU_RETRY: Duration = Duration::from_secs(1);
/// Packets the receiver may get without acknowledging. Two is fair on the internet;
/// here each acknowledgement is only work on both sides. A lost packet is reported at
/// once regardless (it arrives out of order).
const ACK_AFTER_PACKETS: u32 = 10;
/// How long the receiver may hold back an acknowledgement. The default of 25 ms is
/// part of the sender's timer for a lost last packet, and the last packet of an
/// epoch is the one that is waited for.
const ACK_DELAY_MAX: Duration = Duration::from_millis(1);
/// Signs of life within one idle time.
const KEEP_ALIVES_PER_IDLE: u32 = 5;

const _: () = assert!(SOCKET_BUFFER_BYTES as u64 >= 2 * WINDOW_BYTES_MAX);
const _: () = assert!(STREAM_WINDOW_BYTES <= CONNECTION_WINDOW_BYTES);

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

/// The congestion window that suits this host's socket buffer. The one that matters
/// is the partner's, which is set up alike.
fn window_for(socket: &UdpSocket) -> u64 {
    let buffer = getsockopt(socket, sockopt::RcvBuf).unwrap_or(0) as u64;
    (buffer / 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
}

fn transport(settings: &LinkSettings, window_max: u64) -> TransportConfig {
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_AFTER_PACKETS))
        .max_ack_delay(Some(ACK_DELAY_MAX));
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(settings.mtu_bytes_max)
        .black_hole_cooldown(MTU_RETRY);
    let mtu_bytes = INITIAL_MTU_BYTES.min(settings.mtu_bytes_max).max(1200);
    let idle = IdleTimeout::try_from(settings.idle_timeout)
        .unwrap_or_else(|_| VarInt::from_u32(1500).into());
    let mut transport = TransportConfig::default();
    transport
        .initial_rtt(INITIAL_RTT)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(settings.idle_timeout / KEEP_ALIVES_PER_IDLE))
        .initial_mtu(mtu_bytes)
        // A burst of losses looks to QUIC like a router that swallows big packets,
        // and it goes down to the smallest size. There is no router here.
        .min_mtu(mtu_bytes)
        .mtu_discovery_config(Some(mtu))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_uni_streams(VarInt::from_u32(LANES_MAX))
        // The control lane, opened once by the side that dials.
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .ack_frequency_config(Some(acks))
        // Nothing on the way may look at the spin bit, and there is nothing on the way.
        .allow_spin(false)
        // Datagrams are not used: no buffer for them.
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(PrivateLinkConfig { window_max }));
    transport
}

/// An endpoint on one link that can dial and accept. Call inside a tokio runtime.
pub(super) fn endpoint(
    config: &PairConfig,
    link: usize,
) -> Result<(quinn::Endpoint, quinn::ClientConfig), StartError> {
    let tls = |reason: String| StartError::Tls {
        peer: config.peer.clone(),
        reason,
    };
    let addr = config.links[link].local;
    let socket = bind(link, addr)?;
    let transport = Arc::new(transport(&config.settings, window_for(&socket)));

    // A host that restarted answers packets of its former life with a stateless
    // reset, so that the partner redials at once and not after the idle time. For
    // that, reset tokens and connection ids must come from secrets that survive.
    let mut endpoint_config = EndpointConfig::new(Arc::new(
        config.identity.secret("pollux quic stateless reset"),
    ));
    let tag = ring::hmac::sign(&config.identity.secret("pollux quic connection ids"), &[]);
    let mut id_key = [0; 8];
    id_key.copy_from_slice(&tag.as_ref()[..8]);
    let id_key = u64::from_le_bytes(id_key);
    endpoint_config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    endpoint_config
        .max_udp_payload_size(config.settings.mtu_bytes_max.max(INITIAL_MTU_BYTES))
        .map_err(|error| tls(error.to_string()))?;

    let client = config
        .identity
        .client_config(config.peer_fingerprint)
        .map_err(|e| tls(e.to_string()))?;
    let client = QuicClientConfig::try_from(client).map_err(|e| tls(e.to_string()))?;
    let mut client = quinn::ClientConfig::new(Arc::new(client));
    client.transport_config(Arc::clone(&transport));

    let server = config
        .identity
        .server_config(config.peer_fingerprint)
        .map_err(|e| tls(e.to_string()))?;
    let server = QuicServerConfig::try_from(server).map_err(|e| tls(e.to_string()))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    // A link is a cable: the partner's address on it does not change.
    server.transport_config(transport).migration(false);

    quinn::Endpoint::new(
        endpoint_config,
        Some(server),
        socket,
        Arc::new(quinn::TokioRuntime),
    )
    .map(|endpoint| (endpoint, client))
    .map_err(|source| StartError::Bind { link, addr, source })
}
