//! Two and three hosts, their packets carried by hand.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const NET: NetworkIndex = NetworkIndex(0);

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn addr(name: &str, network: u8) -> SocketAddr {
    let last = name.as_bytes()[0];
    SocketAddr::from(([10, 0, network, last], 7445))
}

fn addrs(name: &str) -> Addrs {
    let mut addrs = [None; NETWORKS_MAX];
    addrs[0] = Some(addr(name, 0));
    addrs[1] = Some(addr(name, 1));
    addrs
}

fn gate(me: &str, life: u64, keys: &PoolKeys) -> Gate {
    let mut gate = Gate::new(host(me), Incarnation(life), keys);
    gate.set_peers(["a", "b", "c"].map(|name| (host(name), addrs(name))));
    gate
}

fn sealed(from: &Gate, to: &Gate, network: u8, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let network = NetworkIndex(network);
    assert!(from.seal(&to.me, network, Sequence(sequence), payload, &mut out));
    out
}

fn carry(from: &str, to: &mut Gate, network: u8, packet: &[u8]) -> Result<Vec<u8>, Reason> {
    to.accept(NetworkIndex(network), addr(from, network), packet)
        .map(|accepted| accepted.payload.to_vec())
        .map_err(|refused| refused.reason)
}

/// Until each knows the other's life.
fn meet(a: &mut Gate, b: &mut Gate) {
    let names = (a.me.to_string(), b.me.to_string());
    for _ in 0..2 {
        let packet = sealed(a, b, 0, 1, b"");
        let _ = carry(&names.0, b, 0, &packet);
        let packet = sealed(b, a, 0, 1, b"");
        let _ = carry(&names.1, a, 0, &packet);
    }
}

fn pair(keys: &PoolKeys) -> (Gate, Gate) {
    let (mut a, mut b) = (gate("a", 10, keys), gate("b", 20, keys));
    meet(&mut a, &mut b);
    (a, b)
}

#[test]
fn two_hosts_hear_each_other_after_one_exchange() {
    let keys = PoolKeys::create().unwrap();
    let (mut a, mut b) = (gate("a", 10, &keys), gate("b", 20, &keys));
    let first = b
        .accept(NET, addr("a", 0), &sealed(&a, &b, 0, 1, b"x"))
        .unwrap_err();
    assert_eq!((first.reason, first.learned), (Reason::Unproven, true));
    // b answers with a's life in it: a hears it, and answers with b's.
    let answer = sealed(&b, &a, 0, 1, b"y");
    let heard = a.accept(NET, addr("b", 0), &answer).unwrap();
    assert_eq!((heard.payload, heard.learned), (&b"y"[..], true));
    let packet = sealed(&a, &b, 0, 2, b"z");
    let heard = b.accept(NET, addr("a", 0), &packet).unwrap();
    assert_eq!(
        (heard.incarnation, heard.sequence),
        (Incarnation(10), Sequence(2))
    );
    assert_eq!((heard.echo, heard.learned), (Sequence(1), false));
}

#[test]
fn of_packets_that_overtake_each_other_only_rising_ones_count_on_each_path() {
    let keys = PoolKeys::create().unwrap();
    let (a, mut b) = pair(&keys);
    let packets: Vec<_> = (0..8).map(|n| sealed(&a, &b, 0, n, &[7])).collect();
    assert_eq!(carry("a", &mut b, 0, &packets[5]), Ok(vec![7]));
    for late in [5, 4, 2, 1, 0] {
        assert_eq!(
            carry("a", &mut b, 0, &packets[late]),
            Err(Reason::Replayed),
            "{late}"
        );
    }
    assert_eq!(carry("a", &mut b, 0, &packets[7]), Ok(vec![7]));
    assert_eq!(carry("a", &mut b, 0, &packets[6]), Err(Reason::Replayed));
    // Another path has its own order.
    let other = sealed(&a, &b, 1, 3, &[8]);
    assert_eq!(carry("a", &mut b, 1, &other), Ok(vec![8]));
    assert_eq!(carry("a", &mut b, 1, &other), Err(Reason::Replayed));
}

#[test]
fn a_packet_counts_on_its_own_path_for_its_recipient_from_its_sender_alone() {
    let keys = PoolKeys::create().unwrap();
    // All three lives with the same number.
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|name| gate(name, 20, &keys));
    meet(&mut a, &mut b);
    meet(&mut a, &mut c);
    let packet = sealed(&a, &b, 0, 9, b"x");
    assert_eq!(carry("a", &mut b, 1, &packet), Err(Reason::WrongNetwork));
    assert_eq!(carry("a", &mut c, 0, &packet), Err(Reason::NotForMe));
    assert_eq!(
        carry("b", &mut a, 0, &packet),
        Err(Reason::NotForMe),
        "reflected"
    );
    assert_eq!(carry("c", &mut b, 0, &packet), Err(Reason::WrongAddress));
    let mut elsewhere = addr("a", 0);
    elsewhere.set_port(1);
    let refused = b.accept(NET, elsewhere, &packet).unwrap_err();
    assert_eq!(refused.reason, Reason::WrongAddress);
    // The same with the plain fields made to fit: the MAC knows better.
    let forged = |at: usize, value: &[u8]| {
        let mut forged = packet.clone();
        forged[at..at + value.len()].copy_from_slice(value);
        forged
    };
    assert_eq!(carry("a", &mut b, 1, &forged(5, &[1])), Err(Reason::BadMac));
    assert_eq!(
        carry("a", &mut c, 0, &forged(129, b"c")),
        Err(Reason::BadMac)
    );
    assert_eq!(
        carry("c", &mut b, 0, &forged(65, b"c")),
        Err(Reason::BadMac)
    );
    let mut reflected = forged(65, b"b");
    reflected[129] = b'a';
    assert_eq!(carry("b", &mut a, 0, &reflected), Err(Reason::BadMac));
    assert_eq!(carry("a", &mut b, 0, &packet), Ok(b"x".to_vec()));
    // A host that leaves is not heard, and when it comes back its packets of before are not new.
    b.set_peers([(host("c"), addrs("c"))]);
    let later = sealed(&a, &b, 0, 10, b"x");
    assert_eq!(carry("a", &mut b, 0, &later), Err(Reason::UnknownSender));
    b.set_peers([(host("a"), addrs("a"))]);
    assert_eq!(carry("a", &mut b, 0, &packet), Err(Reason::Replayed));
    assert_eq!(carry("a", &mut b, 0, &later), Ok(b"x".to_vec()));
}

#[test]
fn a_host_that_restarts_is_heard_again_and_its_life_before_is_not() {
    let keys = PoolKeys::create().unwrap();
    let (a, mut b) = pair(&keys);
    let held_back = sealed(&a, &b, 0, 99, b"old");
    let mut a = gate("a", 11, &keys);
    meet(&mut a, &mut b);
    let packet = sealed(&a, &b, 0, 2, b"new");
    assert_eq!(carry("a", &mut b, 0, &packet), Ok(b"new".to_vec()));
    assert_eq!(
        carry("a", &mut b, 0, &held_back),
        Err(Reason::OldIncarnation)
    );
    // With its number set back it is not heard: a life that is over cannot come again.
    let mut behind = gate("a", 9, &keys);
    meet(&mut behind, &mut b);
    let packet = sealed(&behind, &b, 0, 100, b"new");
    assert_eq!(carry("a", &mut b, 0, &packet), Err(Reason::OldIncarnation));
}

#[test]
fn the_first_packet_of_a_new_life_ends_the_one_before_though_it_is_not_heard() {
    let keys = PoolKeys::create().unwrap();
    let (a, mut b) = pair(&keys);
    let held_back = sealed(&a, &b, 0, 99, b"old");
    let reborn = gate("a", 11, &keys);
    let hello = sealed(&reborn, &b, 0, 1, b"");
    assert_eq!(carry("a", &mut b, 0, &hello), Err(Reason::Unproven));
    assert_eq!(
        carry("a", &mut b, 0, &held_back),
        Err(Reason::OldIncarnation)
    );
}

#[test]
fn a_host_that_restarts_does_not_hear_recordings_of_any_life_before() {
    let keys = PoolKeys::create().unwrap();
    let mut recorded = Vec::new();
    let mut b = gate("b", 20, &keys);
    for life in [10, 11, 12] {
        let mut a = gate("a", life, &keys);
        meet(&mut a, &mut b);
        for sequence in 2..6 {
            let packet = sealed(&a, &b, 0, sequence, b"recorded");
            assert!(carry("a", &mut b, 0, &packet).is_ok());
            recorded.push(packet);
        }
        recorded.push(sealed(&a, &b, 0, 1_000, b"held back"));
    }
    // a is dead now. b restarts with no memory of anybody; the recording is played to it in
    // all orders, again and again, and it even answers.
    let mut b = gate("b", 21, &keys);
    for round in 0..3 {
        for at in 0..recorded.len() {
            let at = if round == 1 {
                recorded.len() - 1 - at
            } else {
                at
            };
            let refused = carry("a", &mut b, 0, &recorded[at]).unwrap_err();
            assert!(matches!(refused, Reason::Unproven | Reason::OldIncarnation));
        }
    }
    // The real one is heard at once.
    let mut a = gate("a", 13, &keys);
    meet(&mut a, &mut b);
    let packet = sealed(&a, &b, 0, 2, b"alive");
    assert_eq!(carry("a", &mut b, 0, &packet), Ok(b"alive".to_vec()));
}

#[test]
fn hosts_one_step_of_a_key_change_apart_hear_each_other_and_further_apart_do_not() {
    let first = PoolKeys::create().unwrap();
    let mut steps = vec![first.clone()];
    let mut keys = first;
    keys.begin().unwrap();
    steps.push(keys.clone());
    keys.switch().unwrap();
    steps.push(keys.clone());
    keys.finish().unwrap();
    steps.push(keys);
    for (at, of_a) in steps.iter().enumerate() {
        for (bt, of_b) in steps.iter().enumerate() {
            let (mut a, mut b) = pair(&steps[0]);
            a.set_keys(of_a);
            b.set_keys(of_b);
            let (to_b, to_a) = (sealed(&a, &b, 0, 5, b"x"), sealed(&b, &a, 0, 5, b"x"));
            let (to_b, to_a) = (carry("a", &mut b, 0, &to_b), carry("b", &mut a, 0, &to_a));
            if at.abs_diff(bt) <= 1 {
                assert_eq!((to_b.is_ok(), to_a.is_ok()), (true, true), "{at} {bt}");
            } else {
                let unheard = [to_b, to_a].contains(&Err(Reason::UnknownKey));
                assert!(unheard, "{at} {bt}");
            }
        }
    }
    // Each host walks through all steps in turn, and all are heard all the while.
    let (mut a, mut b) = pair(&steps[0]);
    let mut sequence = 5;
    for step in &steps {
        for who in 0..2 {
            if who == 0 { &mut a } else { &mut b }.set_keys(step);
            sequence += 1;
            let packet = sealed(&a, &b, 0, sequence, b"x");
            let heard = b.accept(NET, addr("a", 0), &packet).unwrap();
            assert!(heard.key_newest >= step.present());
            let packet = sealed(&b, &a, 0, sequence, b"x");
            assert!(carry("b", &mut a, 0, &packet).is_ok());
        }
    }
}

#[test]
fn a_wrong_key_and_a_foreign_pool_are_told_apart() {
    let keys = PoolKeys::create().unwrap();
    let (_, mut b) = pair(&keys);
    let mut foreign = gate("a", 10, &PoolKeys::create().unwrap());
    meet(&mut foreign, &mut b);
    let packet = sealed(&foreign, &b, 0, 9, b"x");
    assert_eq!(carry("a", &mut b, 0, &packet), Err(Reason::ForeignPool));
    // The same pool's name, another secret: one who has seen packets, but not the key.
    let line = PoolKeys::create().unwrap().to_line();
    let mut fields: Vec<_> = line.split('.').map(str::to_owned).collect();
    fields[1] = keys.pool().to_string();
    let body = fields[..fields.len() - 1].join(".");
    let line = format!("{body}.{:08x}", crc32fast::hash(body.as_bytes()));
    let thief = gate("a", 10, &line.parse().unwrap());
    let packet = sealed(&thief, &b, 0, 9, b"x");
    assert_eq!(carry("a", &mut b, 0, &packet), Err(Reason::BadMac));
}

#[test]
fn every_bit_and_every_byte_of_a_packet_counts() {
    let keys = PoolKeys::create().unwrap();
    let (a, mut b) = pair(&keys);
    let packet = sealed(&a, &b, 0, 9, &[0x5a; PAYLOAD_BYTES_MAX]);
    assert_eq!(packet.len(), packet::PACKET_BYTES_MAX);
    for bit in 0..packet.len() * 8 {
        // All of the ends, some of the middle: each takes a MAC over 4 KiB.
        if bit % 37 != 0 && (1_600..31_900).contains(&bit) {
            continue;
        }
        let mut flipped = packet.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(carry("a", &mut b, 0, &flipped).is_err(), "bit {bit}");
    }
    for length in 0..packet.len() {
        assert!(
            carry("a", &mut b, 0, &packet[..length]).is_err(),
            "{length} bytes"
        );
    }
    let mut longer = packet.clone();
    longer.push(0);
    assert_eq!(carry("a", &mut b, 0, &longer), Err(Reason::Malformed));
    assert!(carry("a", &mut b, 0, &packet).is_ok());
    let mut out = Vec::new();
    let too_long = [0; PAYLOAD_BYTES_MAX + 1];
    assert!(!a.seal(&b.me, NET, Sequence(10), &too_long, &mut out));
}

/// One step of a network that belongs to an enemy without the key.
#[derive(Clone, Debug)]
enum Step {
    /// `a` sends on a path; the packet is kept by the enemy.
    Send { path: u8 },
    /// The enemy delivers something it kept, perhaps damaged, on some path.
    Deliver {
        which: usize,
        path: u8,
        damage: Option<(usize, u8)>,
    },
    /// `b` sends; what it sends is delivered.
    Answer,
    /// A host restarts.
    Restart { a: bool },
    /// Bytes of any content.
    Noise { bytes: Vec<u8> },
}

fn step() -> impl Strategy<Value = Step> {
    let damage = proptest::option::weighted(0.3, (0..300_usize, 1..=255_u8));
    prop_oneof![
        4 => (0..2_u8).prop_map(|path| Step::Send { path }),
        8 => (any::<usize>(), 0..2_u8, damage)
            .prop_map(|(which, path, damage)| Step::Deliver { which, path, damage }),
        3 => Just(Step::Answer),
        1 => any::<bool>().prop_map(|a| Step::Restart { a }),
        1 => proptest::collection::vec(any::<u8>(), 0..300).prop_map(|bytes| Step::Noise { bytes }),
    ]
}

proptest! {
    /// Whatever the enemy does, a packet is heard at most once, as it was sent, on the path it
    /// was sent on, by the life it was sent to, and never after a newer one or a newer life.
    #[test]
    fn an_enemy_that_owns_the_network_cannot_make_anything_heard_twice(
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let keys = PoolKeys::create().unwrap();
        let mut lives = (10, 20);
        let (mut a, mut b) = (gate("a", lives.0, &keys), gate("b", lives.1, &keys));
        // Packet, a's life, b's life when it was sent, path, sequence.
        let mut kept: Vec<(Vec<u8>, u64, u64, u8, u64)> = Vec::new();
        let mut heard = BTreeSet::new();
        let mut newest = [(0, 0); 2];
        let mut sequence = 0;
        for step in steps {
            match step {
                Step::Send { path } => {
                    sequence += 1;
                    let packet = sealed(&a, &b, path, sequence, &sequence.to_le_bytes());
                    kept.push((packet, lives.0, lives.1, path, sequence));
                }
                Step::Deliver { which, path, damage } => {
                    if kept.is_empty() {
                        continue;
                    }
                    let which = which % kept.len();
                    let (packet, life_a, life_b, sent_on, number) = &kept[which];
                    let mut bytes = packet.clone();
                    let length = bytes.len();
                    if let Some((at, flip)) = damage {
                        bytes[at % length] ^= flip;
                    }
                    if let Ok(payload) = carry("a", &mut b, path, &bytes) {
                        prop_assert!(damage.is_none());
                        prop_assert_eq!(payload, number.to_le_bytes());
                        prop_assert_eq!((*sent_on, *life_b), (path, lives.1));
                        prop_assert!(heard.insert(which));
                        let newest = &mut newest[usize::from(path)];
                        prop_assert!((*life_a, *number) > *newest);
                        *newest = (*life_a, *number);
                    }
                }
                Step::Answer => {
                    sequence += 1;
                    let packet = sealed(&b, &a, 0, sequence, b"");
                    let _ = carry("b", &mut a, 0, &packet);
                }
                Step::Restart { a: true } => {
                    lives.0 += 1;
                    a = gate("a", lives.0, &keys);
                }
                Step::Restart { a: false } => {
                    lives.1 += 1;
                    b = gate("b", lives.1, &keys);
                    newest = [(0, 0); 2];
                }
                Step::Noise { bytes } => prop_assert!(carry("a", &mut b, 0, &bytes).is_err()),
            }
        }
        // Left alone, they hear each other.
        meet(&mut a, &mut b);
        let packet = sealed(&a, &b, 0, sequence + 2, b"end");
        prop_assert!(carry("a", &mut b, 0, &packet).is_ok());
    }
}
