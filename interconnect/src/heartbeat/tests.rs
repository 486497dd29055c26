//! Two heartbeats over loopback.

use super::*;
use std::sync::mpsc;

/// Long: the machine may be busy; what is waited for comes by itself.
const PATIENCE: Duration = Duration::from_secs(20);

/// Addresses nobody else has: bound and given back.
fn ports() -> (SocketAddr, SocketAddr) {
    let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
    let (a, b) = (bind(), bind());
    (a.local_addr().unwrap(), b.local_addr().unwrap())
}

fn start(local: SocketAddr, peer: SocketAddr) -> (Heartbeat, mpsc::Receiver<Verdict>) {
    let (tx, rx) = mpsc::channel();
    let heartbeat = Heartbeat::start(HeartbeatConfig {
        me: "a".to_owned(),
        peer: "b".to_owned(),
        links: vec![HeartbeatLink { local, peer }],
        period: PERIOD_DEFAULT,
        detection: DETECTION_DEFAULT,
        on_verdict: Box::new(move |verdict, _age| tx.send(verdict).unwrap_or_default()),
    })
    .unwrap();
    (heartbeat, rx)
}

fn wait_for(verdicts: &mpsc::Receiver<Verdict>, wanted: Verdict) {
    while verdicts.recv_timeout(PATIENCE).unwrap() != wanted {}
}

fn keys(n: u8) -> (HeartbeatKey, HeartbeatKey) {
    let (a, b) = ([n; 32], [n ^ 0xff; 32]);
    (
        HeartbeatKey {
            send: a,
            receive: b,
        },
        HeartbeatKey {
            send: b,
            receive: a,
        },
    )
}

#[test]
fn a_partner_is_alive_while_it_beats_and_lost_when_it_stops() {
    let (at_a, at_b) = ports();
    let (a, verdicts) = start(at_a, at_b);
    let (b, _) = start(at_b, at_a);
    assert_eq!(a.last_heard(), None);
    let (key_a, key_b) = keys(1);
    a.set_key(key_a);
    b.set_key(key_b);
    wait_for(&verdicts, Verdict::Alive);
    assert!(a.last_heard().is_some());
    let incarnation = a.peer_incarnation().unwrap();
    drop(b);
    wait_for(&verdicts, Verdict::Lost);
    assert_eq!(a.peer_incarnation(), Some(incarnation));

    // It comes back with a new session, as another incarnation.
    let (b, _) = start(at_b, at_a);
    let (key_a, key_b) = keys(2);
    a.set_key(key_a);
    b.set_key(key_b);
    wait_for(&verdicts, Verdict::Alive);
    assert_ne!(a.peer_incarnation(), Some(incarnation));
}

#[test]
fn a_stranger_is_not_heard() {
    let (at_a, at_b) = ports();
    let (a, _) = start(at_a, at_b);
    a.set_key(keys(1).0);
    let stranger = UdpSocket::bind(at_b).unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut datagram = [0; 100];
    let (length, _) = stranger.recv_from(&mut datagram).unwrap();
    // Its own heartbeat sent back, and garbage of several sizes.
    stranger.send_to(&datagram[..length], at_a).unwrap();
    for size in [0, 1, packet::PACKET_BYTES, 1000] {
        stranger.send_to(&vec![0x55; size], at_a).unwrap();
    }
    while a.status().refused < 5 {
        stranger.recv_from(&mut datagram).unwrap();
    }
    assert_eq!((a.status().heard, a.last_heard()), (0, None));
    assert!(matches!(
        a.verdict(),
        Verdict::Unknown | Verdict::SelfStalled { .. }
    ));
}

#[test]
fn a_configuration_without_sense_is_refused() {
    let config = |links, period, detection| HeartbeatConfig {
        me: "a".to_owned(),
        peer: "b".to_owned(),
        links: vec![
            HeartbeatLink {
                local: "127.0.0.1:0".parse().unwrap(),
                peer: "127.0.0.1:9".parse().unwrap()
            };
            links
        ],
        period,
        detection,
        on_verdict: Box::new(|_, _| ()),
    };
    let ms = Duration::from_millis;
    for bad in [
        config(0, ms(10), ms(100)),
        config(9, ms(10), ms(100)),
        config(1, ms(0), ms(100)),
        config(1, ms(50), ms(100)),
    ] {
        assert!(matches!(
            Heartbeat::start(bad),
            Err(HeartbeatError::Config(_))
        ));
    }
}

#[test]
fn stopped_heartbeats_free_their_address_whoever_still_holds_them() {
    let (at_a, at_b) = ports();
    let (a, _) = start(at_a, at_b);
    let held = Arc::new(a);
    Arc::clone(&held).stop();
    UdpSocket::bind(at_a).unwrap();
    // Twice is as good as once.
    held.stop();
}
