//! Several links: what dies, stalls, flaps or comes back costs nothing but repeats.

use super::relay::{Behaviour, Relay};
use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Two sides with a relay in each link.
pub(super) struct Cabled {
    pub(super) one: Running,
    pub(super) two: Running,
    pub(super) relays: Vec<Relay>,
    /// Keeps the relays going; dropped last.
    _cables: Runtime,
    _runtime: Runtime,
}

impl Cabled {
    pub(super) fn all_up(&mut self) {
        let all: Vec<usize> = (0..self.relays.len()).collect();
        self.one.links_up(&all);
        self.two.links_up(&all);
    }
}

/// The first side dials, through the relays.
pub(super) fn cabled(links: usize) -> Cabled {
    cabled_with(links, |_| {})
}

pub(super) fn cabled_with(links: usize, change: impl Fn(&mut PairConfig)) -> Cabled {
    let (runtime, cables) = (runtime(), runtime());
    let (a, b) = sides(links);
    let (mut config_a, mut config_b) = (a.config(&b), b.config(&a));
    let relays: Vec<Relay> = b
        .links
        .iter()
        .map(|addr| Relay::new(*addr, &cables))
        .collect();
    for (link, relay) in config_a.links.iter_mut().zip(&relays) {
        link.peer = relay.addr;
    }
    change(&mut config_a);
    change(&mut config_b);
    Cabled {
        one: start(config_a, &runtime),
        two: start(config_b, &runtime),
        relays,
        _cables: cables,
        _runtime: runtime,
    }
}

/// Send `count` epochs of several frames, calling `during` after each; the other side
/// checks that each frame comes once and in order, and acknowledges each epoch.
pub(super) fn stream(
    cabled: &mut Cabled,
    count: u64,
    bytes: usize,
    mut during: impl FnMut(u64, &Cabled),
) {
    let lane = cabled
        .one
        .interconnect
        .open_epoch_lane(VM, Generation(1))
        .unwrap();
    let mut rx = cabled.two.lane();
    let answers = cabled.two.interconnect.clone();
    let standby = std::thread::spawn(move || {
        for epoch in 0..count {
            for (n, kind) in [
                (0, FrameKind::Pages),
                (1, FrameKind::Pages),
                (2, FrameKind::EpochEnd),
            ] {
                let frame = rx.blocking_recv().expect("the lane goes on");
                assert_eq!((frame.epoch, frame.kind), (Epoch(epoch), kind));
                if n < 2 {
                    assert!(frame.payload == noise(epoch * 2 + n, bytes));
                }
            }
            let ack = Frame::empty(FrameKind::EpochAck, VM, Generation(1), Epoch(epoch));
            answers.control(ack).unwrap();
        }
        assert_eq!(rx.blocking_recv(), None);
    });
    let mut acked = 0;
    for epoch in 0..count {
        for n in 0..2 {
            lane.send_blocking(frame(FrameKind::Pages, epoch, noise(epoch * 2 + n, bytes)))
                .unwrap();
        }
        lane.send_blocking(frame(FrameKind::EpochEnd, epoch, vec![]))
            .unwrap();
        during(epoch, cabled);
        // As the product: the next epoch is on its way while one waits for its word.
        while acked < epoch {
            assert_eq!(cabled.one.control_frame().epoch, Epoch(acked));
            acked += 1;
        }
    }
    drop(lane);
    while acked < count {
        assert_eq!(cabled.one.control_frame().epoch, Epoch(acked));
        acked += 1;
    }
    standby.join().unwrap();
}

#[test]
fn both_links_carry_a_lane_and_every_frame_comes_once() {
    let mut cabled = cabled(2);
    cabled.all_up();
    // Slow enough that one link alone cannot be the better choice all the time.
    for relay in &cabled.relays {
        relay.behave(Behaviour {
            bytes_per_s: 20_000_000,
            ..Behaviour::default()
        });
    }
    stream(&mut cabled, 30, 300_000, |_, _| {});
    let stats = cabled.one.interconnect.stats();
    for link in &stats.links {
        assert!(link.sent_bytes > 3_000_000, "{stats:#?}");
    }
    assert_eq!((stats.version, stats.session), (2, Some(SessionId(1))));
}

#[test]
fn a_link_that_dies_among_epochs_costs_only_repeats() {
    let mut cabled = cabled(2);
    cabled.all_up();
    stream(&mut cabled, 40, 300_000, |epoch, cabled| {
        cabled.relays[1].swallow(epoch >= 10);
    });
    cabled.one.links_up(&[0]);
    assert_eq!(cabled.one.interconnect.session(), Some(SessionId(1)));
    cabled.relays[1].swallow(false);
    cabled.one.links_up(&[0, 1]);
    stream(&mut cabled, 10, 300_000, |_, _| {});
}

#[test]
fn both_links_die_and_the_session_goes_on_when_one_comes_back() {
    let keep = |config: &mut PairConfig| config.settings.session_keep = PATIENCE;
    let mut cabled = cabled_with(2, keep);
    cabled.all_up();
    let healed = AtomicBool::new(false);
    std::thread::scope(|_| {
        stream(&mut cabled, 20, 300_000, |epoch, cabled| {
            if epoch == 7 {
                cabled.relays.iter().for_each(|relay| relay.swallow(true));
                // Until nothing stands any more.
                while cabled
                    .one
                    .interconnect
                    .stats()
                    .links
                    .iter()
                    .any(|link| link.state != LinkState::Down)
                {
                    std::thread::yield_now();
                }
                cabled.relays[1].swallow(false);
                healed.store(true, Ordering::Relaxed);
            }
        });
    });
    assert!(healed.load(Ordering::Relaxed));
    assert_eq!(cabled.one.interconnect.session(), Some(SessionId(1)));
    assert_eq!(cabled.two.interconnect.session(), Some(SessionId(1)));
}

#[test]
fn a_session_without_links_for_too_long_is_over_and_a_new_one_is_made() {
    let keep = |config: &mut PairConfig| {
        config.settings.session_keep = Duration::from_millis(50);
    };
    let mut cabled = cabled_with(2, keep);
    cabled.one.up();
    cabled.two.up();
    cabled.relays.iter().for_each(|relay| relay.swallow(true));
    let (session, reason) = cabled.one.down();
    assert_eq!(session, SessionId(1));
    assert!(reason.contains("no link for 50 ms"), "{reason}");
    cabled.two.down();
    cabled.relays.iter().for_each(|relay| relay.swallow(false));
    assert_eq!(cabled.one.up().0, SessionId(2));
    cabled.two.up();
    stream(&mut cabled, 3, 100_000, |_, _| {});
}

#[test]
fn a_link_that_swallows_everything_without_an_error_is_left_aside_and_taken_back() {
    // QUIC does not give it up within this test: the lanes notice by themselves.
    let patient = |config: &mut PairConfig| config.settings.idle_timeout = 2 * PATIENCE;
    let mut cabled = cabled_with(2, patient);
    cabled.all_up();
    stream(&mut cabled, 40, 300_000, |epoch, cabled| {
        cabled.relays[0].swallow(epoch >= 5);
    });
    let stats = cabled.one.interconnect.stats();
    assert_eq!(stats.links[0].flaps, 0, "{stats:#?}");
    let resent: u64 = stats.links.iter().map(|link| link.resent_bytes).sum();
    assert!(resent > 0, "{stats:#?}");
    cabled.relays[0].swallow(false);
    stream(&mut cabled, 10, 300_000, |_, _| {});
    while cabled.one.interconnect.stats().links[0].state != LinkState::Up {
        stream(&mut cabled, 1, 100_000, |_, _| {});
    }
}

#[test]
fn a_link_that_flaps_costs_no_order() {
    let mut cabled = cabled(2);
    cabled.all_up();
    stream(&mut cabled, 60, 100_000, |epoch, cabled| {
        if epoch % 5 == 0 {
            // Once swallowed, once cut with word of it.
            match epoch % 3 {
                0 => cabled.relays[1].swallow(true),
                1 => cabled.two.interconnect.redial(1),
                _ => cabled.relays[1].swallow(false),
            }
        }
    });
    cabled.relays[1].swallow(false);
    cabled.one.links_up(&[0, 1]);
    assert_eq!(cabled.one.interconnect.session(), Some(SessionId(1)));
}

#[test]
fn links_of_different_packet_sizes_and_speeds_carry_one_lane() {
    let mut cabled = cabled(2);
    cabled.relays[1].behave(Behaviour {
        bytes_max: 1500,
        bytes_per_s: 10_000_000,
        delay: Duration::from_millis(2),
        ..Behaviour::default()
    });
    cabled.relays[0].behave(Behaviour {
        bytes_per_s: 40_000_000,
        lose_one_in: 200,
        ..Behaviour::default()
    });
    cabled.all_up();
    stream(&mut cabled, 40, 300_000, |_, _| {});
    let stats = cabled.one.interconnect.stats();
    assert!(stats.links[1].mtu_bytes <= 1500, "{stats:#?}");
    assert!(stats.links[1].sent_bytes > 500_000, "{stats:#?}");
}

#[test]
fn control_frames_go_on_every_link_and_come_once() {
    let mut cabled = cabled(3);
    cabled.all_up();
    let control = |n: u64| {
        let bytes = if n.is_multiple_of(100) { 200_000 } else { 40 };
        frame(FrameKind::Control, n, noise(n, bytes))
    };
    for n in 0..500 {
        while let Err(error) = cabled.one.interconnect.control(control(n)) {
            assert!(matches!(error, SendError::Full { .. }), "{error}");
            std::thread::yield_now();
        }
        if n == 250 {
            cabled.relays[0].swallow(true);
        }
    }
    for n in 0..500 {
        assert!(cabled.two.control_frame() == control(n));
    }
    let lanes = cabled.two.interconnect.stats().lanes;
    let incoming = lanes
        .iter()
        .find(|lane| lane.kind == LaneKind::Control && !lane.outgoing)
        .unwrap();
    assert_eq!(incoming.frames, 500);
    assert!(incoming.repeated_bytes > 1000, "{incoming:?}");
}
