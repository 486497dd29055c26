//! Pairs over real QUIC on loopback.

mod hostile;
mod io;
mod keys;
mod links;
mod recorded;
mod relay;
mod versions;

use super::*;
use crate::codec::tests::noise;
use crate::frame::FrameKind;
use crate::identity::{Fingerprint, Identity};
use crate::ids::Epoch;
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Long: the machine may be busy; what is waited for comes by itself.
const PATIENCE: Duration = Duration::from_secs(30);
const VM: VmId = VmId([5; 16]);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// An address nobody else has: bound and given back.
fn free_addr() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

struct Side {
    identity: Arc<Identity>,
    name: &'static str,
    links: Vec<SocketAddr>,
}

impl Side {
    fn new(name: &'static str, links: usize) -> Self {
        Self {
            identity: Arc::new(Identity::generate().unwrap()),
            name,
            links: (0..links).map(|_| free_addr()).collect(),
        }
    }

    fn config(&self, peer: &Side) -> PairConfig {
        PairConfig {
            identity: Arc::clone(&self.identity),
            me: self.name.to_owned(),
            peer: peer.name.to_owned(),
            peer_fingerprint: peer.identity.fingerprint(),
            links: self
                .links
                .iter()
                .zip(&peer.links)
                .map(|(local, peer)| LinkAddr {
                    local: *local,
                    peer: *peer,
                })
                .collect(),
            settings: LinkSettings::default(),
            on_ack: None,
        }
    }
}

/// A bare QUIC endpoint with a side's identity.
struct Raw {
    endpoint: quinn::Endpoint,
    client: quinn::ClientConfig,
}

impl Raw {
    async fn connect(&self, to: SocketAddr) -> quinn::Connection {
        self.endpoint
            .connect_with(self.client.clone(), to, "pollux")
            .unwrap()
            .await
            .unwrap()
    }
}

impl Side {
    /// On the side's first link.
    fn raw_endpoint(&self, peer: &Side, runtime: &Runtime) -> Raw {
        let _entered = runtime.enter();
        let config = self.config(peer);
        let keys = Keys {
            identity: Arc::clone(&self.identity),
            pins: vec![peer.identity.fingerprint()],
        };
        let (endpoint, transport) =
            transport::endpoint(&config, &keys, 0, watch::Sender::new(())).unwrap();
        let client = keys.client(&transport).unwrap();
        Raw { endpoint, client }
    }
}

/// Two sides; the first dials.
fn sides(links: usize) -> (Side, Side) {
    let (a, b) = (Side::new("castor", links), Side::new("pollux", links));
    if a.identity.fingerprint() < b.identity.fingerprint() {
        (a, b)
    } else {
        (b, a)
    }
}

struct Running {
    interconnect: Interconnect,
    events: mpsc::Receiver<LinkEvent>,
    runtime: tokio::runtime::Handle,
    fingerprint: Fingerprint,
    /// The links of the session that stand, as the events told so far.
    standing: BTreeSet<usize>,
}

fn start(config: PairConfig, runtime: &Runtime) -> Running {
    let fingerprint = config.identity.fingerprint();
    let (interconnect, events) = Interconnect::start(config, runtime.handle().clone()).unwrap();
    Running {
        interconnect,
        events,
        runtime: runtime.handle().clone(),
        fingerprint,
        standing: BTreeSet::new(),
    }
}

impl Running {
    /// The next event, whatever it is. Links come and go only within a session.
    fn any(&mut self) -> LinkEvent {
        let event = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, self.events.recv()).await })
            .expect("an event in time")
            .expect("events go on");
        match &event {
            LinkEvent::LinkUp { link, .. } => assert!(self.standing.insert(*link)),
            LinkEvent::LinkDown { link, .. } => assert!(self.standing.remove(link)),
            LinkEvent::Up { .. } | LinkEvent::Down { .. } => assert!(self.standing.is_empty()),
            _ => {}
        }
        event
    }

    /// Wait until just these links stand, within the session.
    fn links_up(&mut self, want: &[usize]) {
        let want: BTreeSet<usize> = want.iter().copied().collect();
        while self.standing != want {
            if let LinkEvent::Down { reason, .. } = self.any() {
                panic!("session down: {reason}");
            }
        }
    }

    /// The next event about more than a single link.
    fn next(&mut self) -> LinkEvent {
        loop {
            match self.any() {
                LinkEvent::LinkUp { .. } | LinkEvent::LinkDown { .. } => {}
                event => return event,
            }
        }
    }

    fn control_frame(&mut self) -> Frame {
        loop {
            if let LinkEvent::Control { frame, .. } = self.next() {
                return frame;
            }
        }
    }

    fn up(&mut self) -> (SessionId, Hello) {
        loop {
            if let LinkEvent::Up { session, peer, .. } = self.next() {
                return (session, peer);
            }
        }
    }

    fn down(&mut self) -> (SessionId, String) {
        loop {
            if let LinkEvent::Down { session, reason } = self.next() {
                return (session, reason);
            }
        }
    }

    fn refused(&mut self) -> String {
        match self.next() {
            LinkEvent::Refused { reason } => reason,
            other => panic!("{other:?}"),
        }
    }

    fn lane(&mut self) -> mpsc::Receiver<Frame> {
        self.lane_of(VM)
    }

    fn lane_of(&mut self, of: VmId) -> mpsc::Receiver<Frame> {
        loop {
            match self.next() {
                LinkEvent::EpochLane { rx, vm, .. } if vm == of => return rx,
                _ => {}
            }
        }
    }
}

fn frame(kind: FrameKind, epoch: u64, payload: Vec<u8>) -> Frame {
    Frame {
        kind,
        vm: VM,
        generation: Generation(1),
        epoch: Epoch(epoch),
        payload: payload.into(),
    }
}

#[test]
fn frames_cross_in_both_directions_and_in_order() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let (mut one, mut two) = (start(a.config(&b), &runtime), start(b.config(&a), &runtime));
    assert_eq!(one.up().1.host, b.name);
    assert_eq!(two.up().1.host, a.name);
    assert_eq!(one.interconnect.session(), Some(SessionId(1)));

    let lane = one.interconnect.open_epoch_lane(VM, Generation(1)).unwrap();
    let sent: Vec<Frame> = (0..20)
        .map(|n| {
            frame(
                FrameKind::Pages,
                n,
                noise(n, 1 + 300_000 * usize::from(n.to_le_bytes()[0] % 4)),
            )
        })
        .collect();
    let sender = std::thread::spawn({
        let sent = sent.clone();
        move || {
            sent.into_iter()
                .for_each(|frame| lane.send_blocking(frame).unwrap())
        }
    });
    let mut rx = two.lane();
    for frame in &sent {
        let got = rx.blocking_recv().expect("frame");
        assert!(got == *frame);
        let ack = Frame::empty(FrameKind::EpochAck, VM, Generation(1), got.epoch);
        two.interconnect.control(ack).unwrap();
    }
    sender.join().unwrap();
    assert_eq!(rx.blocking_recv(), None, "the lane ends when it is dropped");
    for n in 0..20 {
        match one.next() {
            LinkEvent::Control { frame, .. } => {
                assert_eq!((frame.kind, frame.epoch), (FrameKind::EpochAck, Epoch(n)));
            }
            other => panic!("{other:?}"),
        }
    }
    let stats = one.interconnect.stats().links.remove(0);
    assert!(
        stats.sent_bytes > 4_000_000 && stats.rtt > Duration::ZERO,
        "{stats:?}"
    );
    assert_eq!(stats.path, Some((a.links[0], b.links[0])));
}

#[test]
fn acknowledgements_can_go_straight_to_their_taker() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let (tx, rx) = std::sync::mpsc::channel();
    let config = PairConfig {
        on_ack: Some(Arc::new(move |frame| drop(tx.send(frame)))),
        ..a.config(&b)
    };
    let (mut one, mut two) = (start(config, &runtime), start(b.config(&a), &runtime));
    one.up();
    two.up();
    let ack = Frame::empty(FrameKind::EpochAck, VM, Generation(1), Epoch(7));
    two.interconnect.control(ack.clone()).unwrap();
    assert_eq!(rx.recv_timeout(PATIENCE), Ok(ack));
}

#[test]
fn a_wrong_identity_is_refused_naming_both_fingerprints() {
    // Whichever side has the wrong pin, both say so, also if by that pin both dial or none.
    for (dialler_is_wrong, roles_stay) in
        [(true, true), (false, true), (true, false), (false, false)]
    {
        let runtime = runtime();
        let (a, b) = sides(1);
        let other: Fingerprint = loop {
            let other = Identity::generate().unwrap().fingerprint();
            let (a, b) = (a.identity.fingerprint(), b.identity.fingerprint());
            let stay = if dialler_is_wrong {
                other > a
            } else {
                other < b
            };
            if stay == roles_stay {
                break other;
            }
        };
        let (mut config_a, mut config_b) = (a.config(&b), b.config(&a));
        let presented = if dialler_is_wrong {
            config_a.peer_fingerprint = other;
            b.identity.fingerprint()
        } else {
            config_b.peer_fingerprint = other;
            a.identity.fingerprint()
        };
        let (mut one, mut two) = (start(config_a, &runtime), start(config_b, &runtime));
        for reason in [one.refused(), two.refused()] {
            for fingerprint in [other, presented] {
                assert!(reason.contains(&fingerprint.to_string()), "{reason}");
            }
        }
        assert_eq!(one.interconnect.session(), None);
        let ack = Frame::empty(FrameKind::EpochAck, VM, Generation(1), Epoch(7));
        assert!(matches!(
            one.interconnect.control(ack),
            Err(SendError::Down { .. })
        ));
    }
}

#[test]
fn a_peer_with_another_name_is_refused() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let config = PairConfig {
        me: "stranger".to_owned(),
        ..a.config(&b)
    };
    let (mut one, mut two) = (start(config, &runtime), start(b.config(&a), &runtime));
    for reason in [one.refused(), two.refused()] {
        assert!(
            reason.contains("stranger") && reason.contains(a.name),
            "{reason}"
        );
    }
}

#[test]
fn a_restarted_peer_is_connected_again() {
    // Once the side that dials restarts, once the side that accepts.
    for dialler_restarts in [true, false] {
        let (a, b) = sides(1);
        let (stays, restarts) = if dialler_restarts { (&b, &a) } else { (&a, &b) };
        let runtime_stays = runtime();
        let mut one = start(stays.config(restarts), &runtime_stays);
        {
            let runtime = runtime();
            let mut two = start(restarts.config(stays), &runtime);
            two.up();
            one.up();
            let lane = one.interconnect.open_epoch_lane(VM, Generation(1)).unwrap();
            // Killed: no close is sent.
            runtime.shutdown_background();
            assert_eq!(one.down().0, SessionId(1));
            while lane.send_blocking(frame(FrameKind::Pages, 1, vec![1; 1000]))
                != Err(SendError::LaneGone)
            {}
            assert!(!lane.is_open());
        }
        let runtime = runtime();
        let mut two = start(restarts.config(stays), &runtime);
        two.up();
        assert_eq!(one.up().0, SessionId(2));
        let lane = one.interconnect.open_epoch_lane(VM, Generation(1)).unwrap();
        lane.send_blocking(frame(FrameKind::Pages, 1, vec![1; 1000]))
            .unwrap();
        assert!(two.lane().blocking_recv().is_some());
    }
}

#[test]
fn a_dead_first_link_is_passed_over() {
    let runtime = runtime();
    let (mut a, b) = sides(2);
    let config_b = b.config(&a);
    // The dialler's first link leads to a socket that never answers.
    let hole = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut config_a = a.config(&b);
    config_a.links[0].peer = hole.local_addr().unwrap();
    a.links.remove(0);
    let (mut one, mut two) = (start(config_a, &runtime), start(config_b, &runtime));
    one.links_up(&[1]);
    two.links_up(&[1]);
    for side in [&one, &two] {
        let states: Vec<_> = side
            .interconnect
            .stats()
            .links
            .iter()
            .map(|l| l.state)
            .collect();
        assert_eq!(states, [LinkState::Down, LinkState::Up]);
    }
}

#[test]
fn bulk_goes_in_the_largest_packets_and_none_vanish() {
    // Loopback takes any size, so packets are as large as the settings allow. A burst
    // too large for the kernel would vanish, and packets become small after a few.
    let runtime = runtime();
    let (a, b) = sides(1);
    let (mut one, mut two) = (start(a.config(&b), &runtime), start(b.config(&a), &runtime));
    one.up();
    two.up();
    let lane = one.interconnect.open_epoch_lane(VM, Generation(1)).unwrap();
    let mut rx = two.lane();
    let payload = bytes::Bytes::from(noise(1, 1 << 20));
    for epoch in 0..32 {
        let frame = Frame {
            payload: payload.clone(),
            ..frame(FrameKind::Pages, epoch, vec![])
        };
        lane.send_blocking(frame).unwrap();
        // One at a time: what is tried is the size of bursts, not this machine's buffers.
        let came = rx.blocking_recv().unwrap();
        assert_eq!((came.epoch, came.payload), (Epoch(epoch), payload.clone()));
    }
    let stats = one.interconnect.stats().links.remove(0);
    assert_eq!(stats.mtu_bytes, LinkSettings::default().mtu_bytes_max);
    assert_eq!(stats.black_holes, 0, "{stats:?}");
}

#[test]
fn a_standby_that_does_not_read_stops_the_sender_at_its_bounds() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let mut config = a.config(&b);
    config.settings.lane_queue_bytes = 1 << 20;
    let (mut one, mut two) = (start(config, &runtime), start(b.config(&a), &runtime));
    one.up();
    two.up();
    let lane = one.interconnect.open_epoch_lane(VM, Generation(1)).unwrap();
    let rx = two.lane();
    let payload = bytes::Bytes::from(noise(1, 1 << 20));
    let mut sent = 0u64;
    let mut round_trip = || {
        let ping = || frame(FrameKind::Control, 0, b"{}".to_vec());
        one.interconnect.control(ping()).unwrap();
        assert!(matches!(two.next(), LinkEvent::Control { .. }));
        two.interconnect.control(ping()).unwrap();
        assert!(matches!(one.next(), LinkEvent::Control { .. }));
    };
    // The windows fill up; then the queue stays full however often the connection turns.
    // The control lane is not behind it.
    let mut full = 0;
    while full < 200 {
        let frame = Frame {
            payload: payload.clone(),
            ..frame(FrameKind::Pages, sent, vec![])
        };
        match lane.try_send(frame) {
            Ok(()) => (sent, full) = (sent + 1, 0),
            Err(SendError::Full { queued_bytes, .. }) => {
                assert!(queued_bytes <= (2 << 20) + 1000);
                full += 1;
                round_trip();
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(
        sent < 64,
        "{sent} MiB taken by a partner that reads nothing"
    );
    // The reader going away ends the lane, not the session.
    drop(rx);
    let probe = || Frame {
        payload: payload.clone(),
        ..frame(FrameKind::Pages, 0, vec![])
    };
    while lane.send_blocking(probe()) != Err(SendError::LaneGone) {}
    assert_eq!(one.interconnect.session(), Some(SessionId(1)));
}

#[test]
fn frames_on_the_wrong_lane_or_too_big_are_refused_at_the_sender() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let (mut one, mut two) = (start(a.config(&b), &runtime), start(b.config(&a), &runtime));
    one.up();
    two.up();
    let control = &one.interconnect;
    assert_eq!(
        control.control(frame(FrameKind::Pages, 0, vec![])),
        Err(SendError::Kind(FrameKind::Pages))
    );
    assert!(matches!(
        control.control(frame(FrameKind::EpochAck, 0, vec![1])),
        Err(SendError::Frame(_))
    ));
    let lane = control.open_epoch_lane(VM, Generation(1)).unwrap();
    assert_eq!(
        lane.try_send(frame(FrameKind::Control, 0, vec![])),
        Err(SendError::Kind(FrameKind::Control))
    );
    let big = vec![0; crate::frame::PAYLOAD_BYTES_MAX + 1];
    assert!(matches!(
        lane.send_blocking(frame(FrameKind::Pages, 0, big)),
        Err(SendError::Frame(_))
    ));
}

#[test]
fn a_dropped_session_is_made_anew_and_a_closed_side_says_so() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let (mut one, mut two) = (start(a.config(&b), &runtime), start(b.config(&a), &runtime));
    let (first, _) = one.up();
    two.up();
    one.interconnect
        .drop_session(first, "the standby sent nonsense");
    assert_eq!(one.down().1, "the standby sent nonsense");
    let (_, reason) = two.down();
    assert!(reason.contains("nonsense"), "{reason}");
    let (second, _) = one.up();
    two.up();
    one.interconnect
        .drop_session(first, "an old session is not the new one");
    assert_eq!(one.interconnect.session(), Some(second));
    drop(one.interconnect);
    let (_, reason) = two.down();
    assert!(reason.contains("the partner stops"), "{reason}");
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let start = |config| Interconnect::start(config, runtime.handle().clone()).map(|_| ());
    let mut none = a.config(&b);
    none.links.clear();
    assert!(matches!(start(none), Err(StartError::NoLink { .. })));
    let mut own = a.config(&b);
    own.peer_fingerprint = a.identity.fingerprint();
    assert!(matches!(start(own), Err(StartError::OwnFingerprint { .. })));
    let taken = UdpSocket::bind(a.links[0]).unwrap();
    assert!(matches!(
        start(a.config(&b)),
        Err(StartError::Bind { link: 0, .. })
    ));
    drop(taken);
}

#[test]
fn a_closed_interconnect_frees_its_addresses_whoever_still_holds_it() {
    let runtime = runtime();
    let (a, b) = sides(2);
    // Once with a session, once while the partner refuses and dialling goes on.
    for refused in [false, true] {
        let mut one_config = a.config(&b);
        if refused {
            one_config.peer_fingerprint = Side::new("other", 0).identity.fingerprint();
        }
        let mut one = start(one_config, &runtime);
        let two = start(b.config(&a), &runtime);
        let lane = if refused {
            let told = one.next();
            assert!(matches!(told, LinkEvent::Refused { .. }), "{told:?}");
            None
        } else {
            one.up();
            one.links_up(&[0, 1]);
            let lane = one
                .interconnect
                .open_epoch_lane(VmId([7; 16]), Generation(1));
            Some(lane.unwrap())
        };
        for running in [&one, &two] {
            let clone = running.interconnect.clone();
            runtime.block_on(async {
                tokio::time::timeout(PATIENCE, clone.close())
                    .await
                    .expect("closed in time");
            });
        }
        for link in a.links.iter().chain(&b.links) {
            UdpSocket::bind(link).unwrap();
        }
        drop(lane);
    }
}
