//! The receiving side by itself: any order, overlaps, floods of crumbs, two ends.

use super::net::index;
use crate::lane::receive::{LaneReceiver, ReceiveError};
use crate::lane::wire::Piece;
use crate::lane::{ACK_BYTES, ACK_DELAY, LANE_WINDOW_BYTES_MIN, LaneId, Micros};
use bytes::Bytes;
use proptest::prelude::*;

const NOW: Micros = Micros(7_000_000);
const LANE: LaneId = LaneId(3);

fn receiver() -> LaneReceiver {
    let mut receiver = LaneReceiver::new(LANE, LANE_WINDOW_BYTES_MIN);
    receiver.link_up(index(0));
    receiver.link_up(index(1));
    receiver
}

fn content(offset: u64, bytes: usize) -> Bytes {
    (offset..offset + bytes as u64)
        .map(|at| (at % 251).to_le_bytes()[0])
        .collect()
}

fn piece(offset: u64, bytes: usize) -> Piece {
    Piece {
        offset,
        bytes: content(offset, bytes),
        fin: false,
        frame_end: false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Against the plainest model there is: a bit for each byte.
    #[test]
    fn any_pieces_in_any_order_come_out_once_in_order(
        pieces in prop::collection::vec((0u64..4000, 1usize..1500, any::<bool>()), 1..60),
    ) {
        let mut receiver = receiver();
        let (mut have, mut out) = (vec![false; 8000], 0u64);
        let mut told = 0;
        for (offset, bytes, take) in pieces {
            receiver.insert(index(0), piece(offset, bytes), NOW).unwrap();
            told += bytes as u64;
            for at in offset..offset + bytes as u64 {
                have[usize::try_from(at).unwrap()] = true;
            }
            let in_order = have.iter().position(|have| !have).unwrap() as u64;
            let held = have.iter().filter(|have| **have).count() as u64 - out;
            prop_assert_eq!(receiver.held_bytes(), held);
            if take {
                while let Some(bytes) = receiver.pop(NOW) {
                    prop_assert_eq!(&bytes, &content(out, bytes.len()));
                    out += bytes.len() as u64;
                }
                prop_assert_eq!(out, in_order);
            }
        }
        let held = have.iter().filter(|have| **have).count() as u64;
        prop_assert_eq!(receiver.repeated_bytes(), told - held);
    }
}

#[test]
fn beyond_the_window_is_refused_and_taking_moves_it() {
    let mut receiver = receiver();
    let window = LANE_WINDOW_BYTES_MIN;
    receiver.insert(index(0), piece(0, 10), NOW).unwrap();
    receiver
        .insert(index(0), piece(window - 10, 10), NOW)
        .unwrap();
    assert_eq!(
        receiver.insert(index(0), piece(window - 9, 10), NOW),
        Err(ReceiveError::Window {
            lane: LANE,
            end: window + 1,
            allowed: window
        })
    );
    receiver.pop(NOW).unwrap();
    receiver.insert(index(0), piece(window, 10), NOW).unwrap();
    let endless = Piece {
        offset: u64::MAX,
        ..piece(0, 10)
    };
    assert!(receiver.insert(index(0), endless, NOW).is_err());
}

#[test]
fn two_ends_or_bytes_beyond_the_end_are_refused() {
    let end = |offset, bytes| Piece {
        fin: true,
        ..piece(offset, bytes)
    };
    let mut one = receiver();
    one.insert(index(0), end(10, 10), NOW).unwrap();
    one.insert(index(1), end(10, 10), NOW).unwrap();
    one.insert(index(1), end(20, 0), NOW).unwrap();
    assert!(one.insert(index(1), end(10, 9), NOW).is_err());
    assert!(one.insert(index(1), piece(15, 6), NOW).is_err());
    let mut other = receiver();
    other.insert(index(0), piece(10, 11), NOW).unwrap();
    assert_eq!(
        other.insert(index(0), end(10, 10), NOW),
        Err(ReceiveError::End {
            lane: LANE,
            end: 21,
            other: 20
        })
    );
}

#[test]
fn an_empty_lane_ends_too() {
    let mut receiver = receiver();
    assert!(!receiver.is_finished());
    let end = Piece {
        fin: true,
        ..piece(0, 0)
    };
    receiver.insert(index(0), end, NOW).unwrap();
    assert!(receiver.is_finished());
    let ack = receiver.next_ack(index(0), NOW).unwrap();
    assert_eq!((ack.delivered, ack.received), (1, 1));
}

#[test]
fn crumbs_are_gathered_and_too_many_parts_refused() {
    let mut crumbs = receiver();
    for at in 1..100_000 {
        crumbs.insert(index(0), piece(at, 1), NOW).unwrap();
    }
    crumbs.insert(index(0), piece(0, 1), NOW).unwrap();
    let chunks = std::iter::from_fn(|| crumbs.pop(NOW)).count();
    assert!(chunks <= 10, "{chunks}");

    let mut gaps = receiver();
    let refused = (1..100_000).find(|at| gaps.insert(index(0), piece(2 * at, 1), NOW).is_err());
    assert_eq!(refused, Some(2049));
}

#[test]
fn acknowledgements_come_by_bytes_by_time_and_at_a_frames_end() {
    let mut receiver = receiver();
    // By time.
    receiver.insert(index(0), piece(0, 5000), NOW).unwrap();
    assert_eq!(receiver.next_ack(index(0), NOW), None);
    assert_eq!(receiver.next_wakeup(), Some(NOW.plus(ACK_DELAY)));
    let late = NOW.plus(ACK_DELAY);
    let ack = receiver.next_ack(index(0), late).unwrap();
    assert_eq!((ack.delivered, ack.received), (0, 5000));
    assert_eq!(receiver.next_ack(index(0), late), None, "once");
    let other = receiver.next_ack(index(1), late).unwrap();
    assert_eq!((other.delivered, other.received), (0, 0), "each its own");
    assert_eq!(receiver.next_wakeup(), None);
    // By what was taken, at the latest by time.
    receiver.pop(NOW).unwrap();
    assert!(!receiver.ack_due(index(0)));
    // By bytes, though none is in order.
    let half = usize::try_from(ACK_BYTES).unwrap() / 2;
    receiver.insert(index(0), piece(6000, half), NOW).unwrap();
    assert!(!receiver.ack_due(index(0)));
    receiver
        .insert(index(1), piece(400_000, half), NOW)
        .unwrap();
    assert!(receiver.ack_due(index(0)) && receiver.ack_due(index(1)));
    let ack = receiver.next_ack(index(1), NOW).unwrap();
    assert_eq!((ack.delivered, ack.received), (5000, half as u64));
    receiver.next_ack(index(0), NOW).unwrap();
    // At a frame's end: when it comes, and when it is taken.
    let end = Piece {
        frame_end: true,
        ..piece(5000, 1000)
    };
    receiver.insert(index(0), end, NOW).unwrap();
    assert!(receiver.next_ack(index(0), NOW).is_some());
    while receiver.pop(NOW).is_some() {}
    assert!(receiver.next_ack(index(0), NOW).unwrap().delivered >= 6000);
}

#[test]
fn a_new_connection_is_told_at_once_and_counts_from_nothing() {
    let mut receiver = receiver();
    receiver.insert(index(0), piece(0, 2000), NOW).unwrap();
    receiver.pop(NOW).unwrap();
    receiver.link_down(index(0));
    assert!(!receiver.ack_due(index(0)));
    receiver.link_up(index(0));
    let ack = receiver.next_ack(index(0), NOW).unwrap();
    assert_eq!((ack.delivered, ack.received), (2000, 0));
}
