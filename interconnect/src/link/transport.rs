//! QUIC for a private link: every setting that differs from the library's default,
//! with its reason. The defaults suit the internet: 333 ms initial round trip, 30 s
//! idle time, 1,200-byte packets, windows for 100 Mbit/s.

use super::config::{LinkAddr, LinkSettings, PairConfig, StartError};
use super::congestion::{PrivateLinkConfig, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN};
use super::drivers::Drivers;
use super::keys::Keys;
use super::socket::{self, SOCKET_BUFFER_BYTES};
use quinn::{
    AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What one stream may have on its way and unread, in bytes: at 10 Gbit/s 13 ms,
/// so that a standby that applies an epoch does not stall the next. With one lane
/// for each VM this also is what one VM can make the receiver hold in QUIC.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// What all streams of a session may have unread, in bytes: the bound on the memory
/// a partner can take here, whatever it does.
const CONNECTION_WINDOW_BYTES: u32 = 128 << 20;
/// What QUIC takes from a stream beyond what may be on its way, in bytes.
const SEND_AHEAD_BYTES: u32 = 1 << 20;
/// Lanes a partner may have open: two for each of many VMs.
const LANES_MAX: u32 = 256;
/// Round-trip time assumed before the first measurement. A cable between two hosts
/// takes 50 to 200 µs; 2 ms leave room for a busy scheduler and still repeat a lost
/// first packet after 6 ms instead of a second.
const INITIAL_RTT: Duration = Duration::from_millis(2);
/// Packet size that every path takes, in bytes: fits 1,500-byte Ethernet with IPv6
/// headers. Used when the route does not tell, and after losses that look like a
/// limit of the path (a switch set to smaller frames than the hosts).
const SAFE_MTU_BYTES: u16 = 1452;
/// Least that QUIC allows (RFC 9000, 14.1).
const MTU_BYTES_MIN: u16 = 1200;
/// Pause before larger packets are tried again after losses that looked like a limit
/// of the path. A cable has the same limit always, and a try costs single packets only.
const MTU_RETRY: Duration = Duration::from_secs(10);
/// Bytes the receiver may get without acknowledging. Two packets are fair on the internet;
/// here each acknowledgement is only work on both sides: a tenth of all with ten packets of
/// 1,472 bytes. A lost packet is reported at once regardless (the next arrives out of order).
/// 2 ms of 1 Gbit/s, so that slower links go by [`ACK_DELAY_MAX`] and none by more than the
/// queue that the congestion controller keeps.
const ACK_AFTER_BYTES: u32 = 256 << 10;
/// How long the receiver may hold back an acknowledgement. The default of 25 ms is
/// part of the sender's timer for a lost last packet, and the last packet of an
/// epoch is the one that is waited for.
const ACK_DELAY_MAX: Duration = Duration::from_millis(1);
/// Signs of life within one idle time.
const KEEP_ALIVES_PER_IDLE: u32 = 5;

const _: () = assert!(SOCKET_BUFFER_BYTES as u64 >= 2 * WINDOW_BYTES_MAX);
const _: () = assert!(STREAM_WINDOW_BYTES <= CONNECTION_WINDOW_BYTES);
const _: () = assert!(WINDOW_BYTES_MAX <= STREAM_WINDOW_BYTES as u64);
const _: () = assert!(MTU_BYTES_MIN <= SAFE_MTU_BYTES);

/// The congestion window that suits this host's socket buffer. The one that matters
/// is the partner's, which is set up alike.
fn window_for(socket: &UdpSocket) -> u64 {
    (socket::receive_buffer_bytes(socket) / 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
}

/// Sizes of packets on a link, in bytes of UDP payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PacketBytes {
    /// Never larger.
    max: u16,
    /// The first ones; what the route takes is used at once, not searched for.
    initial: u16,
    /// After losses that look like a limit of the path, until the search is done.
    min: u16,
}

impl PacketBytes {
    /// For a link whose route takes `route` (if known), with the operator's limit.
    fn choose(limit: u16, route: Option<u16>) -> Self {
        let max = limit.min(route.unwrap_or(u16::MAX)).max(MTU_BYTES_MIN);
        let min = SAFE_MTU_BYTES.min(max);
        Self {
            max,
            initial: if route.is_some() { max } else { min },
            min,
        }
    }
}

fn transport(settings: &LinkSettings, packets: PacketBytes, window_max: u64) -> TransportConfig {
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_AFTER_BYTES / u32::from(packets.max)))
        .max_ack_delay(Some(ACK_DELAY_MAX));
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(packets.max).black_hole_cooldown(MTU_RETRY);
    let idle = IdleTimeout::try_from(settings.idle_timeout)
        .unwrap_or_else(|_| VarInt::from_u32(1500).into());
    let mut transport = TransportConfig::default();
    transport
        .initial_rtt(INITIAL_RTT)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(settings.idle_timeout / KEEP_ALIVES_PER_IDLE))
        .initial_mtu(packets.initial)
        .min_mtu(packets.min)
        .mtu_discovery_config(Some(mtu))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        // Beyond the congestion window, so that it is always that one which holds the
        // sender: it cannot tell a path that got slower from a sender with little to send.
        .send_window(window_max + u64::from(SEND_AHEAD_BYTES))
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

/// An endpoint on one link that can dial and accept, and how its connections are set up; its
/// socket keeps `open` until it is closed. Call inside a tokio runtime.
pub(super) fn endpoint(
    config: &PairConfig,
    keys: &Keys,
    link: usize,
    open: watch::Sender<()>,
) -> Result<(quinn::Endpoint, Arc<TransportConfig>), StartError> {
    let tls = |reason: String| StartError::Tls {
        peer: config.peer.clone(),
        reason,
    };
    let LinkAddr { local: addr, peer } = config.links[link];
    let socket = socket::bind(link, addr)?;
    let route = socket::route_payload_bytes(addr, peer);
    let packets = PacketBytes::choose(config.settings.mtu_bytes_max, route);
    let window_max = window_for(&socket);
    tracing::debug!(link, %addr, ?route, ?packets, window_max, "link bound");
    let transport = Arc::new(transport(&config.settings, packets, window_max));

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
    let receive_bytes_max = config.settings.mtu_bytes_max.max(SAFE_MTU_BYTES);
    endpoint_config
        .max_udp_payload_size(receive_bytes_max)
        .map_err(|error| tls(error.to_string()))?;

    let server = keys.server(&transport).map_err(tls)?;
    socket::for_quic(socket, packets.max, receive_bytes_max, open)
        .and_then(|socket| {
            quinn::Endpoint::new_with_abstract_socket(
                endpoint_config,
                Some(server),
                Arc::clone(&socket) as _,
                Arc::new(Drivers::new(socket)),
            )
        })
        .map(|endpoint| (endpoint, transport))
        .map_err(|source| StartError::Bind { link, addr, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_start_at_what_the_route_takes_and_fall_back_to_what_all_take() {
        let bytes = |max, initial, min| PacketBytes { max, initial, min };
        assert_eq!(
            PacketBytes::choose(8972, Some(8972)),
            bytes(8972, 8972, 1452)
        );
        assert_eq!(
            PacketBytes::choose(8972, Some(65_507)),
            bytes(8972, 8972, 1452)
        );
        assert_eq!(
            PacketBytes::choose(8972, Some(1472)),
            bytes(1472, 1472, 1452)
        );
        assert_eq!(
            PacketBytes::choose(8972, Some(1352)),
            bytes(1352, 1352, 1352)
        );
        // Not known: search from what all take.
        assert_eq!(PacketBytes::choose(8972, None), bytes(8972, 1452, 1452));
        assert_eq!(PacketBytes::choose(0, None), bytes(1200, 1200, 1200));
    }
}
