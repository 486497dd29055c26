//! Several links: what dies, stalls, flaps or comes back costs nothing but repeats.

use super::relay::{Behaviour, Relay};
use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Two sides with a relay in each link.
struct Cabled {
    one: Running,
    two: Running,
    relays: Vec<Relay>,
    /// Keeps the relays going; dropped last.
    _cables: Runtime,
    runtime: Runtime,
}

/// The first side dials, through the relays.
fn cabled(links: usize) -> Cabled {
    cabled_with(links, |_| {})
}

fn cabled_with(links: usize, change: impl Fn(&mut PairConfig)) -> Cabled {
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
        runtime,
    }
}

/// Send `count` epochs of several frames, calling `during` after each; the other side
/// checks that each frame comes once and in order, and acknowledges each epoch.
fn stream(cabled: &mut Cabled, count: u64, bytes: usize, mut during: impl FnMut(u64, &Cabled)) {
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
    cabled.one.links_up(&[0, 1]);
    cabled.two.links_up(&[0, 1]);
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
    cabled.one.links_up(&[0, 1]);
    cabled.two.links_up(&[0, 1]);
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
    cabled.one.links_up(&[0, 1]);
    cabled.two.links_up(&[0, 1]);
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
    drop(cabled.runtime);
}
