//! How much of the links a lane uses. Virtual time: the figures are exact.

use super::net::World;
use crate::lane::{LaneClass, Micros};

const MB: u64 = 1_000_000;
const SECONDS: Micros = Micros(60_000_000);

/// Bytes a second of one long transfer, the links measured first.
fn goodput(wires: &[(u64, u64)], bytes: u64) -> u64 {
    let mut world = World::new(1, wires);
    let lane = world.open(LaneClass::Epoch);
    world.carry(lane, 16 << 20, SECONDS);
    let took = world.carry(lane, bytes, SECONDS);
    assert_eq!(world.suspects, [], "nothing was wrong with any link");
    assert_eq!(world.again(), 0);
    u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(took.0)).unwrap()
}

#[test]
fn one_link_is_used_nearly_whole() {
    for (capacity, delay) in [(100 * MB, 100), (1_000 * MB, 50), (1_000 * MB, 1_000)] {
        let got = goodput(&[(capacity, delay)], 128 << 20);
        assert!(got * 100 >= capacity * 97, "{got} of {capacity}");
    }
}

#[test]
fn two_equal_links_carry_nearly_twice_one() {
    for (capacity, delay) in [(100 * MB, 100), (1_000 * MB, 50), (300 * MB, 2_000)] {
        let one = goodput(&[(capacity, delay)], 128 << 20);
        let two = goodput(&[(capacity, delay); 2], 128 << 20);
        assert!(two * 10 >= one * 19, "{two} against {one}");
    }
}

#[test]
fn a_link_of_a_tenth_adds_its_tenth() {
    for (fast, slow) in [
        ((1_000 * MB, 50), (100 * MB, 50)),
        ((100 * MB, 50), (10 * MB, 500)),
    ] {
        let sum = fast.0 + slow.0;
        let both = goodput(&[fast, slow], 128 << 20);
        assert!(both * 10 >= sum * 9, "{both} of {sum}");
    }
}

#[test]
fn four_links_of_different_kinds_add_up() {
    let wires = [
        (1_000 * MB, 50),
        (500 * MB, 300),
        (100 * MB, 50),
        (100 * MB, 5_000),
    ];
    let sum: u64 = wires.iter().map(|wire| wire.0).sum();
    let got = goodput(&wires, 256 << 20);
    assert!(got * 10 >= sum * 9, "{got} of {sum}");
}

#[test]
fn an_epochs_tail_does_not_sit_on_a_slow_link() {
    for bytes in [20_000_u64, 100_000, 1 << 20, 4 << 20] {
        let fast = (1_000 * MB, 50);
        let mut alone = World::new(1, &[fast]);
        let mut both = World::new(1, &[fast, (10 * MB, 10_000)]);
        let (mut took_alone, mut took_both) = (0, 0);
        for (world, took) in [(&mut alone, &mut took_alone), (&mut both, &mut took_both)] {
            let lane = world.open(LaneClass::Epoch);
            world.carry(lane, 16 << 20, SECONDS);
            for _ in 0..20 {
                *took += world.carry(lane, bytes, SECONDS).0;
            }
        }
        assert!(
            took_both * 100 <= took_alone * 102,
            "{took_both} against {took_alone} for {bytes} bytes"
        );
    }
}

#[test]
fn wrong_figures_cost_little() {
    for seed in 0..8 {
        let mut world = World::new(seed, &[(1_000 * MB, 50), (300 * MB, 200)]);
        world.measure_error = 30;
        let lane = world.open(LaneClass::Epoch);
        world.carry(lane, 16 << 20, SECONDS);
        let took = world.carry(lane, 128 << 20, SECONDS);
        let got = (128 << 20) * 1_000_000 / took.0;
        assert!(got * 10 >= 1_300 * MB * 8, "{got}");
    }
}

#[test]
fn io_takes_the_quickest_link_whatever_bulk_is_under_way() {
    let mut world = World::new(1, &[(100 * MB, 3_000), (100 * MB, 100)]);
    let bulk = world.open(LaneClass::Epoch);
    let io = world.open(LaneClass::Io);
    world.carry(bulk, 8 << 20, SECONDS);
    // Both are busy, the quicker one more so.
    for _ in 0..8 {
        world.push(bulk, 1 << 20);
    }
    world.run(SECONDS, |_| true);
    let given = |world: &World| [world.wires[0].given, world.wires[1].given];
    let before = given(&world);
    world.push(io, 60_000);
    world.run(SECONDS, |_| true);
    assert_eq!(given(&world), [before[0], before[1] + 60_000]);
}
