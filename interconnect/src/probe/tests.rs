//! Tests of a pair over real QUIC on loopback.

use super::wire::Talk;
use super::*;
use crate::frame::FrameKind;
use crate::identity::Identity;
use crate::link::{Interconnect, LinkAddr, LinkEvent, LinkSettings, PairConfig, SendError};
use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;

/// Only something broken gets here.
const PATIENCE: Duration = Duration::from_secs(30);
const SHORT: Settings = Settings {
    time: Duration::from_millis(200),
    share: Share::Full,
};

fn free_addr() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

struct Side {
    interconnect: Interconnect,
    up: Receiver<()>,
    tester: Arc<Mutex<Option<Arc<Tester>>>>,
}

/// A side whose events are handed on as a product does; `serves` says whether it answers.
fn side(config: PairConfig, runtime: &Runtime, serves: bool) -> Side {
    let (interconnect, mut events) = Interconnect::start(config, runtime.handle().clone()).unwrap();
    let responder = Responder::new(interconnect.clone(), runtime.handle().clone());
    let tester: Arc<Mutex<Option<Arc<Tester>>>> = Arc::default();
    let (told, up) = channel();
    let (answers, mine) = (responder, Arc::clone(&tester));
    runtime.spawn(async move {
        while let Some(event) = events.recv().await {
            match event {
                LinkEvent::Up { .. } => told.send(()).unwrap_or_default(),
                LinkEvent::EpochLane { vm, rx, .. } if vm == PROBE_VM && serves => {
                    answers.lane(rx);
                }
                LinkEvent::Control { frame, .. } if frame.kind == FrameKind::ProbeAck => {
                    let talk = Talk::parse(&frame.payload).unwrap();
                    if serves {
                        answers.asked(&talk);
                    }
                    if let Some(tester) = mine.lock().unwrap().as_ref() {
                        tester.answered(talk);
                    }
                }
                _ => {}
            }
        }
    });
    Side {
        interconnect,
        up,
        tester,
    }
}

fn pair(runtime: &Runtime, serves: bool) -> (Side, Side) {
    let identities = [(); 2].map(|()| Arc::new(Identity::generate().unwrap()));
    let addrs = [free_addr(), free_addr()];
    let config = |i: usize| PairConfig {
        identity: Arc::clone(&identities[i]),
        me: format!("host{i}"),
        peer: format!("host{}", 1 - i),
        peer_fingerprint: identities[1 - i].fingerprint(),
        links: vec![LinkAddr {
            local: addrs[i],
            peer: addrs[1 - i],
        }],
        settings: LinkSettings::default(),
        on_ack: None,
    };
    let sides = (
        side(config(0), runtime, true),
        side(config(1), runtime, serves),
    );
    sides.0.up.recv_timeout(PATIENCE).unwrap();
    sides.1.up.recv_timeout(PATIENCE).unwrap();
    sides
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

impl Side {
    fn test(
        &self,
        settings: Settings,
        progress: impl FnMut(Step, u64),
    ) -> Result<Measured, TestError> {
        let tester = Tester::new(settings).unwrap();
        *self.tester.lock().unwrap() = Some(Arc::clone(&tester));
        tester.run(&self.interconnect, progress)
    }
}

#[test]
fn a_pair_is_measured_in_full_and_in_bursts() {
    let runtime = runtime();
    let (a, _b) = pair(&runtime, true);
    for share in [Share::Full, Share::Bursts] {
        let mut steps = Vec::new();
        let mut done = 0;
        let measured = a
            .test(Settings { share, ..SHORT }, |step, permille| {
                assert!(permille >= done && permille <= 1000);
                done = permille;
                if steps.last() != Some(&step) {
                    steps.push(step);
                }
            })
            .unwrap();
        assert_eq!(
            steps,
            [
                Step::RoundTrips,
                Step::Goodput,
                Step::SmallEpochs,
                Step::LargeEpochs
            ]
        );
        let path = &measured.together;
        assert!(path.goodput_bytes_per_s > 0, "{measured:?}");
        for samples in [&path.rtt_us, &path.small_epoch_us, &path.large_epoch_us] {
            assert!(!samples.is_empty() && samples.iter().all(|us| *us > 0));
        }
        assert_eq!(measured.links.len(), 1);
        let link = &measured.links[0];
        assert!(
            link.sent_packets > 0 && link.sent_bytes_per_s > 0,
            "{link:?}"
        );
        // All that was acknowledged was really sent.
        assert!(link.last.sent_bytes > 4_096_000);
    }
}

#[test]
fn one_test_at_a_time_is_served() {
    let runtime = runtime();
    let (a, _b) = pair(&runtime, true);
    let held = a
        .interconnect
        .open_epoch_lane(PROBE_VM, crate::ids::Generation(1))
        .unwrap();
    // The partner serves the first lane it sees; this piece makes sure that it saw it.
    let frame = |talk: wire::Piece| Frame {
        kind: FrameKind::Probe,
        payload: talk.to_bytes(100, &[]),
        ..answer_frame(&Talk::Ping {
            test: wire::TestId(1),
            question: 1,
        })
    };
    let piece = wire::Piece {
        test: wire::TestId(1),
        question: Some(1),
    };
    held.send_blocking(frame(piece)).unwrap();
    let refused = loop {
        match a.test(SHORT, |_, _| ()) {
            Err(TestError::Refused(reason)) => break reason,
            // It overtook the lane that is held.
            Ok(_) => {}
            Err(other) => panic!("{other}"),
        }
    };
    assert!(refused.contains("another test"), "{refused}");
    drop(held);
    // The place is free again once the partner has seen the lane's end.
    let end = std::time::Instant::now() + PATIENCE;
    while let Err(error) = a.test(SHORT, |_, _| ()) {
        assert!(matches!(error, TestError::Refused(_)), "{error}");
        assert!(std::time::Instant::now() < end, "{error}");
    }
}

#[test]
fn a_test_ends_when_told_and_when_the_partner_goes() {
    let runtime = runtime();
    let (a, b) = pair(&runtime, true);
    let long = Settings {
        time: TEST_TIME_MAX,
        ..SHORT
    };
    let tester = Arc::clone(&a.tester);
    let cancelled = a.test(long, |_, _| {
        if let Some(tester) = tester.lock().unwrap().as_ref() {
            tester.cancel();
        }
    });
    assert!(matches!(cancelled, Err(TestError::Cancelled)));
    // The partner may still be about to see the end of the lane that was given up.
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let gone = a.test(long, |step, _| {
            if step == Step::Goodput
                && let Some(session) = b.interconnect.session()
            {
                b.interconnect.drop_session(session, "the partner goes");
            }
        });
        match gone {
            Err(TestError::Refused(_)) if std::time::Instant::now() < end => {}
            Err(TestError::Send(SendError::LaneGone | SendError::Down { .. })) => break,
            other => panic!("{other:?}"),
        }
    }
}
