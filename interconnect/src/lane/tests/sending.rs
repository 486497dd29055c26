//! The sending side by itself: deadlines, the window, the end, acknowledgements that lie.

use super::net::index;
use crate::lane::links::Links;
use crate::lane::send::{AckError, FrameNumber, LaneSender, PushError};
use crate::lane::stripe::LinkHealth;
use crate::lane::wire::LaneAck;
use crate::lane::{
    LANE_SEGMENTS_MAX, LANE_WINDOW_BYTES_MIN, LaneClass, LaneId, Micros, SEGMENT_BYTES,
    SEGMENT_BYTES_MAX,
};
use bytes::Bytes;

const NOW: Micros = Micros(50_000_000);
const MIB: usize = 1 << 20;

fn lane(class: LaneClass, links: usize) -> (LaneSender, Links) {
    let mut sender = LaneSender::new(class, 4 << 20, LANE_WINDOW_BYTES_MIN);
    let mut all = Links::new();
    for at in 0..links {
        all.up(index(at), NOW);
        sender.link_up(index(at));
    }
    (sender, all)
}

fn push(sender: &mut LaneSender, bytes: usize, deadline: Option<u64>) -> FrameNumber {
    let payload = Bytes::from(vec![1; bytes]);
    let deadline = deadline.map(|at| NOW.plus(Micros(at)));
    sender.push(Bytes::new(), payload, deadline).unwrap()
}

fn ack(delivered: u64, received: u64) -> LaneAck {
    LaneAck {
        lane: LaneId(1),
        delivered,
        received,
    }
}

#[test]
fn a_frame_whose_deadline_passed_is_dropped_whole_or_not_at_all() {
    let (mut sender, mut links) = lane(LaneClass::Io, 1);
    let begun = push(&mut sender, 3 * SEGMENT_BYTES_MAX / 2, Some(10));
    let late = push(&mut sender, 100, Some(20));
    let forever = push(&mut sender, 7, None);
    let first = sender.next(index(0), &mut links, NOW).unwrap();
    assert_eq!(first.header.bytes as usize, SEGMENT_BYTES_MAX);
    assert!(!first.header.frame_end);
    assert!(sender.is_handed_out(begun) && !sender.is_handed_out(late));
    assert_eq!(
        sender.next_wakeup(&links),
        Some(NOW.plus(Micros(10))),
        "looked at, though it has begun"
    );
    let then = NOW.plus(Micros(20));
    sender.tick(&mut links, then);
    assert_eq!(sender.expired(), [late]);
    assert_eq!(sender.expired(), []);
    let rest = sender.next(index(0), &mut links, then).unwrap();
    assert_eq!(rest.header.offset, SEGMENT_BYTES_MAX as u64);
    assert_eq!(
        rest.header.bytes as usize,
        SEGMENT_BYTES_MAX / 2 + 7,
        "no gap where the frame was"
    );
    assert!(rest.header.frame_end && sender.is_handed_out(forever));
    assert_eq!((sender.queued_bytes(), sender.expired_frames()), (0, 1));
}

#[test]
fn with_no_link_frames_expire_and_the_queue_is_bounded() {
    let (mut sender, mut links) = lane(LaneClass::Io, 0);
    let numbers: Vec<_> = (0..4).map(|_| push(&mut sender, MIB, Some(5))).collect();
    assert_eq!(
        sender.push(Bytes::new(), Bytes::from_static(b"x"), None),
        Err(PushError::Full {
            queued_bytes: 4 << 20
        })
    );
    assert_eq!(sender.next(index(0), &mut links, NOW), None);
    sender.tick(&mut links, NOW.plus(Micros(5)));
    assert_eq!(sender.expired(), numbers);
    assert_eq!(sender.queued_bytes(), 0);
    assert_eq!(sender.next_wakeup(&links), None);
}

#[test]
fn no_more_is_handed_out_than_the_window_and_the_table_hold() {
    let (mut sender, mut links) = lane(LaneClass::Control, 1);
    push(&mut sender, 2 * MIB, None);
    let mut handed = 0;
    while let Some(segment) = sender.next(index(0), &mut links, NOW) {
        handed += u64::from(segment.header.bytes);
    }
    assert_eq!(handed, LANE_WINDOW_BYTES_MIN);
    sender
        .acked(index(0), ack(SEGMENT_BYTES as u64, 0), &mut links, NOW)
        .unwrap();
    assert!(sender.next(index(0), &mut links, NOW).is_some());
    assert!(sender.next(index(0), &mut links, NOW).is_none());

    let (mut sender, mut links) = lane(LaneClass::Control, 1);
    for _ in 0..LANE_SEGMENTS_MAX {
        push(&mut sender, 1, None);
        assert!(sender.next(index(0), &mut links, NOW).is_some());
    }
    push(&mut sender, 1, None);
    assert!(sender.next(index(0), &mut links, NOW).is_none());
}

#[test]
fn the_end_goes_with_the_last_bytes_or_alone_and_is_acknowledged() {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 1);
    push(&mut sender, 10, None);
    sender.finish();
    let last = sender.next(index(0), &mut links, NOW).unwrap();
    assert!(last.header.fin && last.header.bytes == 10);
    assert_eq!(
        sender.push(Bytes::new(), Bytes::new(), None),
        Err(PushError::Finished)
    );
    sender
        .acked(index(0), ack(10, 10), &mut links, NOW)
        .unwrap();
    assert!(!sender.is_done(), "the end itself is not acknowledged");
    sender
        .acked(index(0), ack(11, 11), &mut links, NOW)
        .unwrap();
    assert!(sender.is_done());
    assert_eq!(links.in_flight(index(0)), 0);

    let (mut sender, mut links) = lane(LaneClass::Epoch, 1);
    push(&mut sender, 10, None);
    assert!(sender.next(index(0), &mut links, NOW).is_some());
    sender.finish();
    let end = sender.next(index(0), &mut links, NOW).unwrap();
    assert_eq!(
        (end.header.offset, end.header.bytes, end.header.fin),
        (10, 0, true)
    );
    assert!(sender.next(index(0), &mut links, NOW).is_none());
}

#[test]
fn a_partner_that_claims_what_it_was_not_sent_is_found_out() {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 2);
    push(&mut sender, 1000, None);
    sender.next(index(0), &mut links, NOW).unwrap();
    assert_eq!(
        sender.acked(index(0), ack(1001, 0), &mut links, NOW),
        Err(AckError::Delivered {
            delivered: 1001,
            sent: 1000
        })
    );
    assert_eq!(
        sender.acked(index(1), ack(0, 1), &mut links, NOW),
        Err(AckError::Received {
            link: index(1),
            received: 1,
            sent: 0
        })
    );
    // An older one than before changes nothing.
    sender
        .acked(index(0), ack(1000, 1000), &mut links, NOW)
        .unwrap();
    sender.acked(index(0), ack(3, 3), &mut links, NOW).unwrap();
    assert_eq!(sender.unacked_bytes(), 0);
}

#[test]
fn an_abandoned_lane_leaves_nothing_on_the_links() {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 1);
    push(&mut sender, 1000, None);
    sender.next(index(0), &mut links, NOW).unwrap();
    sender.abandon(&mut links, NOW);
    assert!(sender.is_done());
    assert_eq!(links.in_flight(index(0)), 0);
    assert_eq!(sender.next(index(0), &mut links, NOW), None);
    assert_eq!(sender.next_wakeup(&links), None);
    // What was on its way to the partner when it gave up is no lie.
    let late = ack(1000, 1000);
    sender.acked(index(0), late, &mut links, NOW).unwrap();
}

#[test]
fn what_was_received_elsewhere_is_not_sent_again_though_an_earlier_part_is_missing() {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 2);
    push(&mut sender, 2 * SEGMENT_BYTES, None);
    let size = SEGMENT_BYTES as u64;
    let lost = sender.next(index(0), &mut links, NOW).unwrap();
    sender.next(index(1), &mut links, NOW).unwrap();
    // The second has come over link 1, then both links go and 1 comes back.
    sender
        .acked(index(1), ack(0, size), &mut links, NOW)
        .unwrap();
    for at in [0, 1] {
        links.down(index(at), NOW);
        sender.link_down(index(at));
    }
    links.up(index(1), NOW);
    sender.link_up(index(1));
    let again = sender.next(index(1), &mut links, NOW).unwrap();
    assert!(again.again && again.header == lost.header);
    assert_eq!(sender.next(index(1), &mut links, NOW), None);
    assert_eq!(sender.repeated_bytes(), size);
}

/// Three segments on link 0, which is then suspect; link 1 comes up.
fn three_on_a_suspect() -> (LaneSender, Links) {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 1);
    push(&mut sender, 3 * SEGMENT_BYTES_MAX, None);
    while sender.next(index(0), &mut links, NOW).is_some() {}
    let late = sender.next_wakeup(&links).unwrap();
    assert_eq!(sender.tick(&mut links, late), [index(0)]);
    links.up(index(1), NOW);
    sender.link_up(index(1));
    (sender, links)
}

#[test]
fn an_overdue_link_is_told_once_and_its_segments_go_over_another_one() {
    let (mut sender, mut links) = three_on_a_suspect();
    assert_eq!(sender.next_wakeup(&links), None, "until something is known");
    for offset in 0..3 {
        let copy = sender.next(index(1), &mut links, NOW).unwrap();
        assert!(copy.again);
        assert_eq!(copy.header.offset, offset * SEGMENT_BYTES_MAX as u64);
    }
    assert_eq!(sender.next(index(1), &mut links, NOW), None);
    assert_eq!(sender.repeated_bytes(), 3 * SEGMENT_BYTES_MAX as u64);
}

#[test]
fn a_suspect_link_that_asks_takes_nothing_from_the_one_that_is_well() {
    let (mut sender, mut links) = three_on_a_suspect();
    for offset in 0..3 {
        assert_eq!(sender.next(index(0), &mut links, NOW), None);
        let copy = sender.next(index(1), &mut links, NOW).unwrap();
        assert!(copy.again);
        assert_eq!(copy.header.offset, offset * SEGMENT_BYTES_MAX as u64);
    }
}

#[test]
fn what_arrives_after_all_goes_out_no_more() {
    let (mut sender, mut links) = three_on_a_suspect();
    sender.next(index(1), &mut links, NOW).unwrap();
    // The first is missing still, the second has come.
    let two = ack(0, 2 * SEGMENT_BYTES_MAX as u64);
    sender.acked(index(0), two, &mut links, NOW).unwrap();
    let third = sender.next(index(1), &mut links, NOW).unwrap();
    assert_eq!(third.header.offset, 2 * SEGMENT_BYTES_MAX as u64);
    assert_eq!(sender.next(index(1), &mut links, NOW), None);
}

#[test]
fn a_copy_lost_with_its_link_goes_again_though_a_suspect_one_has_it_too() {
    let (mut sender, mut links) = three_on_a_suspect();
    while sender.next(index(1), &mut links, NOW).is_some() {}
    links.down(index(1), NOW);
    sender.link_down(index(1));
    links.up(index(1), NOW);
    sender.link_up(index(1));
    let copy = sender.next(index(1), &mut links, NOW).unwrap();
    assert!(copy.again && copy.header.offset == 0);
}

#[test]
fn a_link_held_back_is_used_at_once_if_it_is_the_only_one() {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 1);
    push(&mut sender, 3 * SEGMENT_BYTES_MAX, None);
    for _ in 0..3 {
        assert!(sender.next(index(0), &mut links, NOW).is_some());
        links.down(index(0), NOW);
        sender.link_down(index(0));
        links.up(index(0), NOW);
        sender.link_up(index(0));
    }
    assert_eq!(links.health(index(0), NOW), LinkHealth::Suspect);
    let mut offsets = Vec::new();
    while let Some(segment) = sender.next(index(0), &mut links, NOW) {
        offsets.push(segment.header.offset / SEGMENT_BYTES_MAX as u64);
    }
    assert_eq!(offsets, [0, 1, 2]);

    // Another comes up: copies are due. Then the first is no longer held back.
    links.up(index(1), NOW);
    sender.link_up(index(1));
    let copy = sender.next(index(1), &mut links, NOW).unwrap();
    assert!(copy.again && copy.header.offset == 0);
    let later = links.next_wakeup(NOW).unwrap();
    assert_eq!(sender.next(index(1), &mut links, later), None);
}

#[test]
fn a_lane_that_is_done_leaves_nothing_on_links_that_have_not_said_so_yet() {
    let (mut sender, mut links) = lane(LaneClass::Epoch, 2);
    push(&mut sender, 2 * SEGMENT_BYTES, None);
    sender.finish();
    for at in [0, 1] {
        sender.next(index(at), &mut links, NOW).unwrap();
    }
    let all = ack(2 * SEGMENT_BYTES as u64 + 1, SEGMENT_BYTES as u64);
    sender.acked(index(0), all, &mut links, NOW).unwrap();
    assert!(sender.is_done());
    // Whoever forgets the lane now must not leave the other link full for ever.
    assert_eq!(links.in_flight(index(1)), 0);
    // Its own word comes later.
    sender.acked(index(1), all, &mut links, NOW).unwrap();
}
