//! Who takes a segment, what is overdue, and what becomes of links in trouble.

use super::net::index;
use crate::lane::links::{LinkMeasure, Links};
use crate::lane::stripe::*;
use crate::lane::{LINKS_MAX, LaneClass, Micros};
use proptest::prelude::*;

const SEGMENT: u64 = 64 << 10;
const GB: u64 = 1_000_000_000;

fn views(of: &[LinkView]) -> LinkViews {
    let mut views = LinkViews::default();
    views[..of.len()].copy_from_slice(of);
    views
}

fn up(capacity: u64, rtt: u64, in_flight: u64) -> LinkView {
    LinkView {
        health: LinkHealth::Up,
        capacity: Some(capacity),
        rtt: Micros(rtt),
        rtt_min: Micros(rtt),
        in_flight,
    }
}

fn who(views: &LinkViews, segment: u64, backlog: u64) -> Vec<usize> {
    (0..LINKS_MAX)
        .filter(|at| takes(index(*at), views, segment, backlog))
        .collect()
}

#[test]
fn equal_links_take_turns() {
    assert_eq!(who(&views(&[up(GB, 100, 0); 2]), SEGMENT, SEGMENT), [0, 1]);
    let views = views(&[up(GB, 100, SEGMENT), up(GB, 100, 0)]);
    assert_eq!(who(&views, SEGMENT, SEGMENT), [1]);
    assert_eq!(who(&views, SEGMENT, 64 * SEGMENT), [0, 1]);
}

#[test]
fn a_slow_link_takes_from_a_long_queue_and_leaves_its_end() {
    let views = views(&[up(GB, 100, 0), up(GB / 10, 100, 0)]);
    assert_eq!(who(&views, SEGMENT, 20 * SEGMENT), [0, 1]);
    assert_eq!(who(&views, SEGMENT, 9 * SEGMENT), [0]);
}

#[test]
fn several_others_share_what_waits() {
    // Two fast ones complete twenty segments in the time the slow one takes for ten.
    let views = views(&[up(GB, 0, 0), up(GB, 0, 0), up(GB / 10, 0, 0)]);
    assert_eq!(who(&views, SEGMENT, 19 * SEGMENT), [0, 1]);
    assert_eq!(who(&views, SEGMENT, 20 * SEGMENT), [0, 1, 2]);
    // The second is far away and helps only afterwards.
    let far = super::decisions::views(&[up(GB, 0, 0), up(GB, 40_000, 0), up(GB / 10, 0, 0)]);
    assert_eq!(who(&far, SEGMENT, 10 * SEGMENT), [0, 2]);
}

#[test]
fn several_others_are_no_quicker_with_one_segment_than_the_quickest_of_them() {
    // Found by the network of virtual time: nobody took it.
    let views = views(&[
        up(57_600_000, 8_830, 0),
        up(901_600_000, 8_572, 0),
        up(17_000_000, 4_138, 0),
        up(23_920_000, 3_646, 0),
    ]);
    assert_eq!(who(&views, SEGMENT, SEGMENT), [1]);
}

proptest! {
    #[test]
    fn whatever_waits_some_free_link_takes_it(
        links in prop::collection::vec((0..3 * GB, 0..50_000_u64, any::<bool>()), 1..LINKS_MAX),
        segment in 1..=SEGMENT, more in 0..100 * SEGMENT,
    ) {
        let all: Vec<_> = links
            .iter()
            .map(|(capacity, rtt, measured)| LinkView {
                capacity: measured.then_some(*capacity),
                ..up(0, *rtt, 0)
            })
            .collect();
        prop_assert!(!who(&views(&all), segment, segment + more).is_empty());
    }
}

#[test]
fn no_link_has_more_on_its_way_than_its_wire_holds() {
    let full = in_flight_max(&up(GB, 100, 0));
    assert_eq!(full, 1000 * (100 + QUEUE_DELAY.0));
    let other = up(GB / 1000, 100, 0);
    let takes = |in_flight| who(&views(&[up(GB, 100, in_flight), other]), SEGMENT, GB).contains(&0);
    assert!(!takes(full) && takes(full - SEGMENT));
    // Where there is no choice, QUIC's windows are bound enough.
    assert_eq!(who(&views(&[up(GB, 100, full)]), SEGMENT, GB), [0]);
    // A figure that is far too low can still grow.
    assert_eq!(in_flight_max(&up(1, 100, 0)), IN_FLIGHT_MIN);
    // One that is nonsense neither panics nor overflows.
    assert_eq!(in_flight_max(&up(u64::MAX, u64::MAX, 0)), u64::MAX);
    let nonsense = views(&[up(u64::MAX, u64::MAX, u64::MAX - SEGMENT), up(0, 0, 0)]);
    let _ = who(&nonsense, SEGMENT, u64::MAX);
    let _ = overdue_after(&nonsense[0]);
}

#[test]
fn an_unmeasured_link_is_tried_with_little() {
    let new = LinkView {
        capacity: None,
        ..up(0, 100, 0)
    };
    let mut views = views(&[up(GB, 100, 0), new]);
    assert_eq!(
        who(&views, SEGMENT, SEGMENT),
        [0],
        "not with an epoch's end"
    );
    assert_eq!(who(&views, SEGMENT, 4 * SEGMENT), [0, 1]);
    views[1].in_flight = IN_FLIGHT_UNMEASURED;
    assert_eq!(who(&views, SEGMENT, GB), [0]);
    // Alone it is used at once, to the last byte.
    views[0] = LinkView::default();
    views[1].in_flight = 0;
    assert_eq!(who(&views, SEGMENT, SEGMENT), [1]);
}

#[test]
fn suspects_are_used_when_nothing_else_stands() {
    let suspect = LinkView {
        health: LinkHealth::Suspect,
        ..up(GB, 100, 0)
    };
    let mut views = views(&[suspect, up(GB / 100, 9_000, 0)]);
    assert_eq!(who(&views, SEGMENT, GB), [1]);
    views[1] = LinkView::default();
    assert_eq!(who(&views, SEGMENT, GB), [0]);
    views[0] = LinkView::default();
    assert_eq!(who(&views, SEGMENT, GB), [0_usize; 0]);
}

#[test]
fn overdue_is_four_times_the_expected_and_never_hasty() {
    assert_eq!(overdue_after(&up(GB, 100, SEGMENT)), OVERDUE_MIN);
    // 50 ms to send, 10 ms there and back, 2 ms for the acknowledgement.
    let slow = up(10_000_000, 10_000, 500_000);
    assert_eq!(overdue_after(&slow), Micros(4 * 62_000));
    // A path that has become longer is not overdue for that.
    let mut longer = up(GB, 100, SEGMENT);
    longer.rtt = Micros(30_000);
    assert_eq!(overdue_after(&longer), Micros(4 * 32_000));
}

#[test]
fn a_suspect_link_is_well_when_what_was_late_has_come() {
    let (mut links, link, now) = (Links::new(), index(0), Micros(20_000_000));
    links.up(link, now);
    links.sent(link, LaneClass::Epoch, 100);
    links.sent(link, LaneClass::Io, 10);
    assert!(links.suspect(link, now));
    assert!(!links.suspect(link, now), "no news");
    // As the only link it goes on being used.
    links.sent(link, LaneClass::Epoch, 1000);
    links.returned(link, LaneClass::Epoch, 100, now);
    assert_eq!(links.health(link, now), LinkHealth::Suspect);
    links.returned(link, LaneClass::Io, 10, now);
    assert_eq!(
        links.health(link, now),
        LinkHealth::Up,
        "one trouble is free"
    );
    assert_eq!(links.in_flight(link), 1000);
}

#[test]
fn trouble_upon_trouble_holds_a_link_back_until_forgotten() {
    let (mut links, link) = (Links::new(), index(2));
    let mut now = Micros(20_000_000);
    let mut held = Vec::new();
    for _ in 0..9 {
        links.up(link, now);
        let from = now;
        while links.health(link, now) == LinkHealth::Suspect {
            now = links.next_wakeup(now).unwrap();
        }
        held.push(now.since(from).0 / 1000);
        assert_eq!(links.next_wakeup(now), None);
        links.down(link, now);
        links.down(link, now);
    }
    assert_eq!(held, [0, 0, 100, 200, 400, 800, 1600, 3200, 5000]);
    now = now.plus(Micros(10_000_000));
    links.up(link, now);
    assert_eq!(links.health(link, now), LinkHealth::Up);
}

#[test]
fn the_capacity_of_the_pair_is_known_if_that_of_every_link_that_is_up_is() {
    let (mut links, now) = (Links::new(), Micros(20_000_000));
    assert_eq!(links.capacity(now), None);
    let mut measured = |at, capacity, saturated| {
        links.up(index(at), now);
        let measure = LinkMeasure {
            capacity,
            saturated,
            ..LinkMeasure::default()
        };
        links.measured(index(at), measure);
        links.capacity(now)
    };
    assert_eq!(measured(0, Some(5), true), Some(5));
    assert_eq!(measured(1, Some(7), true), Some(12));
    assert_eq!(measured(1, Some(7), false), None, "that much at least");
    assert_eq!(measured(1, None, false), None);
    links.down(index(1), now);
    assert_eq!(links.capacity(now), Some(5), "those that are up");
    // A link that does not exist is nobody's trouble.
    links.up(crate::lane::LinkIndex(200), now);
    assert_eq!(
        links.health(crate::lane::LinkIndex(200), now),
        LinkHealth::Down
    );
}

#[test]
fn segments_are_large_where_that_harms_nobody() {
    let fine = crate::lane::SEGMENT_BYTES as u64;
    let large = crate::lane::SEGMENT_BYTES_MAX as u64;
    let of = |views: &[LinkView]| segment_bytes(index(0), &self::views(views));
    assert_eq!(of(&[up(GB / 8, 100, 0)]), large, "alone");
    assert_eq!(of(&[up(GB / 8, 100, 0), up(GB, 100, 0)]), fine, "1 Gbit/s");
    assert_eq!(of(&[up(GB, 100, 0), up(GB, 100, 0)]), 100_000);
    assert_eq!(of(&[up(u64::MAX, 100, 0), up(GB, 100, 0)]), large);
    let unmeasured = LinkView {
        capacity: None,
        ..up(0, 100, 0)
    };
    assert_eq!(of(&[unmeasured, up(GB, 100, 0)]), fine);
    let dead = LinkView::default();
    assert_eq!(of(&[up(GB / 8, 100, 0), dead]), large, "the other is down");
}
