//! Links that die, flap, stall and slow down: everything comes once, in order, whole, and
//! costs no more than it must.

use super::net::{Fault, World};
use crate::lane::stripe::{LinkHealth, OVERDUE_FACTOR, OVERDUE_MIN, QUEUE_DELAY};
use crate::lane::{ACK_DELAY, LANE_WINDOW_BYTES_MIN, LaneClass, Micros};
use proptest::prelude::*;

const MB: u64 = 1_000_000;
const SECONDS: Micros = Micros(120_000_000);
const LEARN: Micros = Micros(1_500_000);

fn ms(ms: u64) -> Micros {
    Micros(ms * 1000)
}

/// One run: random links, lanes, loads and faults, all from the seed; then the faults end
/// and everything must come. The world checks what goes twice.
fn storm(seed: u64) {
    let mut world = World::new(seed, &[]);
    let count = world.random.between(1, 4);
    let wires: Vec<_> = (0..count)
        .map(|_| {
            let mega = world.random.between(1, 100);
            (mega * 10 * MB, world.random.between(10, 5_000))
        })
        .collect();
    let random = std::mem::replace(&mut world.random, super::net::Random(0));
    world = World::new(seed, &wires);
    world.random = random;
    world.measure_error = world.random.below(40);
    if world.random.below(2) == 0 {
        world.window = LANE_WINDOW_BYTES_MIN;
    }
    let classes = [
        LaneClass::Control,
        LaneClass::Epoch,
        LaneClass::Io,
        LaneClass::Epoch,
    ];
    let lanes: Vec<_> = classes
        .iter()
        .take(usize::try_from(world.random.between(1, 4)).unwrap())
        .map(|class| (world.open(*class), *class))
        .collect();
    for _ in 0..world.random.below(12) {
        let wire = usize::try_from(world.random.below(count)).unwrap();
        let after = Micros(world.random.below(400_000));
        let fault = match world.random.below(4) {
            0 => Fault::Stall(Micros(world.random.below(200_000))),
            1 => Fault::Capacity(world.random.between(1, 100) * MB),
            _ => Fault::Cut(
                Micros(world.random.below(200_000)),
                Some(Micros(world.random.below(300_000))),
            ),
        };
        world.fault(after, wire, fault);
    }
    for _ in 0..world.random.between(1, 40) {
        for (lane, class) in &lanes {
            let max = match class {
                LaneClass::Control => 2_000,
                LaneClass::Epoch => 1 << 20,
                LaneClass::Io => 100_000,
            };
            let bytes = world.random.between(1, max);
            world.push(*lane, bytes);
            if world.random.below(10) == 0 {
                world.lanes[*lane].reads_from = world.now.plus(Micros(world.random.below(50_000)));
            }
        }
        let until = world.now.plus(Micros(world.random.below(30_000)));
        world.lanes[0].reads_from = world.lanes[0].reads_from.max(until);
        world.run(SECONDS, |world| world.now >= until);
    }
    for (lane, _) in &lanes {
        world.lanes[*lane].sender.finish();
    }
    world.run(SECONDS, |world| {
        world
            .lanes
            .iter()
            .all(|lane| lane.finished && lane.sender.is_done())
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn everything_comes_once_in_order_whole(seed in any::<u64>()) {
        storm(seed);
    }
}

#[test]
fn a_dead_link_costs_what_was_on_its_way_and_an_epoch_the_overdue_time() {
    let wires = [(1_000 * MB, 100); 2];
    let epoch = 8 << 20;
    let expected = QUEUE_DELAY.plus(Micros(200)).plus(ACK_DELAY);
    let overdue = OVERDUE_MIN.0.max(OVERDUE_FACTOR * expected.0);
    let mut usual = 0;
    for cut_after in [0, 1_000, 2_000, 3_500] {
        let mut world = World::new(3, &wires);
        let lane = world.open(LaneClass::Epoch);
        world.carry(lane, 16 << 20, SECONDS);
        for _ in 0..5 {
            usual = usual.max(world.carry(lane, epoch, SECONDS).0);
        }
        assert_eq!(world.again(), 0);
        world.fault(Micros(cut_after), 1, Fault::Cut(LEARN, None));
        let took = world.carry(lane, epoch, SECONDS).0;
        // With one link left, what is left of the epoch takes twice as long.
        let late = took.saturating_sub(2 * usual);
        assert!(
            late <= overdue + ms(5).0,
            "late by {late} us, cut after {cut_after} us, usual {usual} us, {:?}",
            world.suspects
        );
        assert!(world.again() <= world.may_repeat);
        assert_eq!(world.suspects.len(), 1);
        // QUIC's word comes later and costs nothing more.
        let again = world.again();
        let next = world.carry(lane, epoch, SECONDS).0;
        assert!(next <= 2 * usual + ms(1).0, "{next} against {usual}");
        world.run(SECONDS, |world| {
            world.links.health(super::net::index(1), world.now) == LinkHealth::Down
        });
        assert_eq!(world.again(), again);
    }
}

#[test]
fn all_links_go_and_one_comes_back() {
    let mut world = World::new(5, &[(100 * MB, 100), (100 * MB, 100)]);
    let lane = world.open(LaneClass::Epoch);
    world.carry(lane, 4 << 20, SECONDS);
    world.fault(ms(10), 0, Fault::Cut(ms(100), None));
    world.fault(ms(10), 1, Fault::Cut(ms(100), Some(ms(700))));
    world.carry(lane, 32 << 20, SECONDS);
    assert!(world.again() > 0);
    assert!(world.again() <= world.may_repeat);
}

#[test]
fn a_link_that_was_slow_once_is_taken_back() {
    let mut world = World::new(5, &[(100 * MB, 100), (100 * MB, 100)]);
    let lane = world.open(LaneClass::Epoch);
    world.carry(lane, 16 << 20, SECONDS);
    world.fault(ms(10), 1, Fault::Stall(ms(200)));
    world.carry(lane, 16 << 20, SECONDS);
    assert_eq!(world.suspects.len(), 1, "{:?}", world.suspects);
    world.run(SECONDS, |world| {
        world.links.health(super::net::index(1), world.now) == LinkHealth::Up
    });
    let before = world.wires[1].given;
    world.carry(lane, 16 << 20, SECONDS);
    assert!(world.wires[1].given - before > 7 << 20);
}

#[test]
fn a_link_that_crawls_gets_little_and_holds_nothing_up() {
    let mut world = World::new(5, &[(100 * MB, 100), (100 * MB, 100)]);
    let lane = world.open(LaneClass::Epoch);
    world.carry(lane, 16 << 20, SECONDS);
    world.fault(ms(10), 1, Fault::Capacity(MB));
    // 160 ms at the capacity of one.
    let took = world.carry(lane, 16 << 20, SECONDS);
    assert!(took <= ms(160 + 60), "{took:?}");
}

#[test]
fn a_flapping_link_is_held_back_longer_each_time() {
    let mut world = World::new(5, &[(100 * MB, 100), (100 * MB, 100)]);
    let lane = world.open(LaneClass::Epoch);
    for flap in 0..20 {
        world.fault(ms(300 * flap), 1, Fault::Cut(ms(50), Some(ms(50))));
    }
    for _ in 0..60 {
        world.carry(lane, 1 << 20, SECONDS);
        let until = world.now.plus(ms(90));
        world.fault(ms(90), 0, Fault::Capacity(100 * MB));
        world.run(SECONDS, |world| world.now >= until);
    }
    // Held back, it is hardly ever given anything to lose.
    assert!(world.suspects.len() <= 4, "{:?}", world.suspects);
    // Left alone, its name is cleared.
    let until = world.now.plus(Micros(20_000_000));
    world.fault(Micros(20_000_000), 0, Fault::Capacity(100 * MB));
    world.run(SECONDS, |world| world.now >= until);
    let before = world.wires[1].given;
    world.carry(lane, 16 << 20, SECONDS);
    assert!(world.wires[1].given - before > 6 << 20);
}

#[test]
fn control_comes_by_the_first_link_that_brings_it() {
    let mut world = World::new(5, &[(100 * MB, 100), (100 * MB, 5_000)]);
    let lane = world.open(LaneClass::Control);
    world.fault(ms(1), 0, Fault::Stall(ms(500)));
    let until = world.now.plus(ms(2));
    world.fault(ms(2), 1, Fault::Capacity(100 * MB));
    world.run(SECONDS, |world| world.now >= until);
    let took = world.carry(lane, 1_000, SECONDS);
    assert!(took < ms(6), "{took:?}");
}
