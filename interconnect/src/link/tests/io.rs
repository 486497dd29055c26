//! I/O lanes: both ways, before bulk, with deadlines.

use super::links::{cabled, cabled_with};
use super::relay::Behaviour;
use super::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

fn later() -> Instant {
    Instant::now() + PATIENCE
}

fn io_lane(side: &mut Running) -> IoLane {
    loop {
        if let LinkEvent::IoLane {
            vm: VM,
            generation: Generation(1),
            lane,
            ..
        } = side.next()
        {
            return lane;
        }
    }
}

#[test]
fn requests_and_replies_cross_in_order_until_one_side_ends_it() {
    let mut cabled = cabled(2);
    cabled.all_up();
    let mut near = cabled
        .one
        .interconnect
        .open_io_lane(VM, Generation(1))
        .unwrap();
    let mut far = io_lane(&mut cabled.two);
    for n in 0..50 {
        let request = frame(FrameKind::IoRequest, n, noise(n, 10_000));
        assert_eq!(near.send(request, later()), Ok(IoTicket(n)));
    }
    for n in 0..50 {
        let request = frame(FrameKind::IoRequest, n, noise(n, 10_000));
        assert_eq!(far.blocking_recv(), Some(IoEvent::Frame(request)));
        far.send(frame(FrameKind::IoReply, n, vec![]), later())
            .unwrap();
    }
    for n in 0..50 {
        let reply = frame(FrameKind::IoReply, n, vec![]);
        assert_eq!(near.blocking_recv(), Some(IoEvent::Frame(reply)));
    }
    assert_eq!(
        near.send(frame(FrameKind::Pages, 0, vec![]), later()),
        Err(SendError::Kind(FrameKind::Pages))
    );
    drop(near);
    assert_eq!(far.blocking_recv(), None);
    while far
        .send(frame(FrameKind::IoReply, 0, vec![]), later())
        .is_ok()
    {}
}

#[test]
fn a_frame_past_its_deadline_is_dropped_whole_and_told_of() {
    let mut cabled = cabled(1);
    cabled.all_up();
    let mut near = cabled
        .one
        .interconnect
        .open_io_lane(VM, Generation(1))
        .unwrap();
    let request = |n| frame(FrameKind::IoRequest, n, vec![7; 100]);
    near.send(request(0), later()).unwrap();
    let mut far = io_lane(&mut cabled.two);
    let past = Instant::now();
    assert_eq!(near.send(request(1), past), Ok(IoTicket(1)));
    assert_eq!(near.blocking_recv(), Some(IoEvent::Expired(IoTicket(1))));
    near.send(request(2), later()).unwrap();
    for n in [0, 2] {
        assert_eq!(far.blocking_recv(), Some(IoEvent::Frame(request(n))));
    }
    let stats = cabled.one.interconnect.stats();
    let lane = stats.lanes.iter().find(|lane| lane.kind == LaneKind::Io);
    assert_eq!(lane.map(|lane| lane.expired_frames), Some(1));
}

#[test]
fn io_and_control_overtake_bulk_that_was_queued_before_them() {
    const BULK: u64 = 24;
    let queue = |config: &mut PairConfig| config.settings.lane_queue_bytes = 64 << 20;
    let mut cabled = cabled_with(2, queue);
    for relay in &cabled.relays {
        relay.behave(Behaviour {
            bytes_per_s: 20_000_000,
            ..Behaviour::default()
        });
    }
    cabled.all_up();
    let near = cabled
        .one
        .interconnect
        .open_io_lane(VM, Generation(1))
        .unwrap();
    let mut far = io_lane(&mut cabled.two);
    let lane = cabled
        .one
        .interconnect
        .open_epoch_lane(VM, Generation(1))
        .unwrap();
    let mut rx = cabled.two.lane();
    let come = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&come);
    let reader = std::thread::spawn(move || {
        while rx.blocking_recv().is_some() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    let payload = bytes::Bytes::from(noise(1, 1 << 20));
    for n in 0..BULK {
        let frame = Frame {
            payload: payload.clone(),
            ..frame(FrameKind::Pages, n, vec![])
        };
        lane.try_send(frame).unwrap();
    }
    // The links are full, and most of it waits.
    while come.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let pressure = lane.pressure();
    assert!(pressure.queued_bytes + pressure.unacked_bytes > 8 << 20);
    let request = frame(FrameKind::IoRequest, 1, vec![1; 4096]);
    near.send(request.clone(), later()).unwrap();
    assert_eq!(far.blocking_recv(), Some(IoEvent::Frame(request)));
    let at_io = come.load(Ordering::SeqCst);
    let ping = frame(FrameKind::Control, 1, b"{}".to_vec());
    cabled.one.interconnect.control(ping.clone()).unwrap();
    assert_eq!(cabled.two.control_frame(), ping);
    let at_control = come.load(Ordering::SeqCst);
    assert!(
        at_io <= BULK - 4 && at_control <= BULK - 4,
        "behind {at_io} and {at_control} of {BULK} MiB"
    );
    drop(lane);
    reader.join().unwrap();
    assert_eq!(come.load(Ordering::SeqCst), BULK);
}
