//! Hosts on loopback addresses, and in a network namespace where addresses come and go.

use super::*;
use crate::beat::Reason;
use crate::beat::namespace::{in_namespace, ip};
use std::net::UdpSocket;
use std::sync::atomic::AtomicU8;
use std::time::Instant;

/// Long: the machine may be busy; what is waited for comes by itself.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a test waits before it publishes anew; well within what counts as stale.
const STEP: Duration = Duration::from_millis(20);

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn net(index: u8) -> NetworkIndex {
    NetworkIndex(index)
}

/// Addresses that no other test has, of this process or another: below the ports the kernel
/// gives away.
fn spot(plan: u8, host: u8, network: u8) -> SocketAddr {
    let [low, high, ..] = std::process::id().to_le_bytes();
    let port = 20_000 + u16::from(high & 31) * 256 + u16::from(network);
    SocketAddr::from(([127, 20 + plan, low, host + 1], port))
}

/// Take an address that was just freed. Another test may be starting a process, which holds copies
/// of all sockets until it has become its program.
fn bind(address: SocketAddr) -> UdpSocket {
    let begun = Instant::now();
    loop {
        match UdpSocket::bind(address) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && begun.elapsed() < PATIENCE => {
                std::thread::yield_now();
            }
            bound => return bound.unwrap(),
        }
    }
}

/// Where the hosts of a test are, each on every network.
struct Plan {
    keys: PoolKeys,
    hosts: Vec<Peer>,
}

impl Plan {
    /// Hosts a, b, .. on so many networks: each has one address, and a port for each network.
    fn new(hosts: u8, networks: u8) -> Self {
        static PLANS: AtomicU8 = AtomicU8::new(0);
        let plan = PLANS.fetch_add(1, Ordering::Relaxed);
        let peer = |n: u8| Peer {
            name: host(&char::from(b'a' + n).to_string()),
            addrs: (0..networks)
                .map(|at| (net(at), spot(plan, n, at)))
                .collect(),
        };
        Self {
            keys: PoolKeys::create().unwrap(),
            hosts: (0..hosts).map(peer).collect(),
        }
    }

    fn addr(&self, at: usize, network: u8) -> SocketAddr {
        self.hosts[at].addrs[&net(network)]
    }

    fn networks(&self, at: usize) -> Vec<Network> {
        let network = |(index, local): (&NetworkIndex, &SocketAddr)| Network {
            index: *index,
            local: *local,
            device: None,
        };
        self.hosts[at].addrs.iter().map(network).collect()
    }

    fn config(&self, at: usize, incarnation: u64) -> TransportConfig {
        TransportConfig {
            me: self.hosts[at].name.clone(),
            incarnation: Incarnation(incarnation),
            keys: self.keys.clone(),
            networks: self.networks(at),
            peers: self.hosts.clone(),
            period: PERIOD_MIN,
        }
    }

    fn start(&self, at: usize, incarnation: u64) -> Node {
        Node::new(self.config(at, incarnation))
    }
}

struct Node {
    transport: Transport,
    inbox: Inbox,
    payload: Vec<u8>,
    received: Vec<Received>,
    events: Vec<Event>,
}

impl Node {
    fn new(config: TransportConfig) -> Self {
        let payload = config.me.to_string().into_bytes();
        let (transport, inbox) = Transport::start(config).unwrap();
        Self {
            transport,
            inbox,
            payload,
            received: Vec::new(),
            events: Vec::new(),
        }
    }

    fn take(&mut self, patience: Duration) {
        let batch = self.inbox.wait(patience).unwrap();
        self.received.extend(batch.received);
        self.events.extend(batch.events);
    }

    /// All but those that only say that this test was too slow to publish in time.
    fn told(&self) -> Vec<Event> {
        let slow = |event: &&Event| !matches!(event, Event::ReportStale | Event::ReportFresh);
        self.events.iter().filter(slow).cloned().collect()
    }

    fn heard(&self, from: &str, network: u8) -> bool {
        let fits = |r: &Received| r.sender.as_str() == from && r.network == net(network);
        self.received.iter().any(fits)
    }

    fn path(&self, peer: &str, network: u8) -> PathStatus {
        let status = self.transport.status().paths;
        let fits = |p: &PathStatus| p.peer.as_str() == peer && p.network == net(network);
        status.into_iter().find(fits).unwrap()
    }

    fn refused(&self, peer: &str, reason: Reason) -> u64 {
        let refused = self.path(peer, 0).refused;
        refused.iter().find(|r| r.0 == reason).map_or(0, |r| r.1)
    }
}

/// All publish and read until it is so.
fn until(nodes: &mut [&mut Node], what: &str, mut so: impl FnMut(&[&mut Node]) -> bool) {
    let deadline = boot_time() + PATIENCE;
    loop {
        for node in nodes.iter_mut() {
            node.transport.publish(node.payload.clone()).unwrap();
        }
        for node in nodes.iter_mut() {
            node.take(STEP);
        }
        if so(nodes) {
            return;
        }
        assert!(boot_time() < deadline, "never: {what}");
    }
}

#[test]
fn three_hosts_hear_each_other_over_both_networks() {
    let plan = Plan::new(3, 2);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|at| plan.start(at, 10));
    let most = vec![0x5a; PAYLOAD_BYTES_MAX];
    a.payload = most.clone();
    until(&mut [&mut a, &mut b, &mut c], "all hear all", |nodes| {
        ["a", "b", "c"].iter().zip(nodes).all(|(me, node)| {
            let others = ["a", "b", "c"].into_iter().filter(|name| name != me);
            others
                .into_iter()
                .all(|from| node.heard(from, 0) && node.heard(from, 1))
        })
    });
    for received in &b.received {
        let expected = if received.sender == host("a") {
            &most[..]
        } else {
            b"c"
        };
        assert_eq!(received.payload, expected);
        assert_eq!(received.incarnation, Incarnation(10));
        assert!(received.sent_after.is_none_or(|after| after <= received.at));
    }
    until(
        &mut [&mut a, &mut b],
        "a proof of when it was sent",
        |nodes| nodes[1].received.iter().any(|r| r.sent_after.is_some()),
    );
    let path = b.path("a", 1);
    assert!(
        path.sent > 0 && path.received > 0 && path.age.is_some(),
        "{path:?}"
    );
    assert_eq!(
        (path.send_failed, path.incarnation),
        (0, Some(Incarnation(10)))
    );
    assert_eq!(path.key_newest, Some(plan.keys.present()));
    assert_eq!((a.told(), b.told()), (vec![], vec![]));
    let too_long = a.transport.publish(vec![0; PAYLOAD_BYTES_MAX + 1]);
    assert!(matches!(too_long, Err(TransportError::Config(_))));
}

#[test]
fn a_restarted_host_is_heard_as_another_life() {
    let plan = Plan::new(2, 1);
    let (mut a, mut b) = (plan.start(0, 10), plan.start(1, 10));
    until(&mut [&mut a, &mut b], "a heard", |n| n[1].heard("a", 0));
    drop(a);
    let mut a = plan.start(0, 11);
    until(&mut [&mut a, &mut b], "both hear the new life", |nodes| {
        let new = |r: &Received| r.incarnation == Incarnation(11);
        nodes[1].received.iter().any(new) && nodes[0].heard("b", 0)
    });
    // Never a step back, in life or number.
    let numbers: Vec<_> = b
        .received
        .iter()
        .map(|r| (r.incarnation, r.sequence))
        .collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}

#[test]
fn a_recording_of_a_dead_host_is_not_heard_not_even_after_an_own_restart() {
    let plan = Plan::new(2, 1);
    let (mut a, mut b) = (plan.start(0, 10), plan.start(1, 20));
    until(&mut [&mut a, &mut b], "a heard", |n| n[1].heard("a", 0));
    drop(b);
    // Somebody listens at b's address while it is down: a knows b's life and goes on.
    let tap = bind(plan.addr(1, 0));
    tap.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut recording = Vec::new();
    for _ in 0..3 {
        a.transport.publish(b"recorded".to_vec()).unwrap();
        let mut datagram = vec![0; 5000];
        let length = tap.recv(&mut datagram).unwrap();
        datagram.truncate(length);
        recording.push(datagram);
    }
    drop((tap, a));
    // a is dead; the recording comes from its very address, over and over.
    let mut b = plan.start(1, 21);
    let ghost = bind(plan.addr(0, 0));
    until(&mut [&mut b], "the recording refused", |nodes| {
        for packet in &recording {
            ghost.send_to(packet, plan.addr(1, 0)).unwrap();
        }
        nodes[0].refused("a", Reason::Unproven) >= 10
    });
    assert_eq!((b.received.len(), b.path("a", 0).age), (0, None));
    drop(ghost);
    let mut a = plan.start(0, 11);
    until(&mut [&mut a, &mut b], "the real a", |n| n[1].heard("a", 0));
    assert!(b.received.iter().all(|r| r.payload == b"a"));
}

#[test]
fn a_flood_of_a_stranger_takes_bounded_work_and_is_told_once() {
    let plan = Plan::new(2, 2);
    let (mut a, mut b) = (plan.start(0, 10), plan.start(1, 10));
    until(&mut [&mut a, &mut b], "a heard", |n| n[1].heard("a", 0));
    let stranger = UdpSocket::bind("127.0.0.99:0").unwrap();
    let stop = AtomicBool::new(false);
    let flood = |to: SocketAddr| {
        while !stop.load(Ordering::Relaxed) {
            for length in [0, 1, 200, 4024, 4500] {
                // A full buffer on the way is fine.
                let _ = stranger.send_to(&vec![b'P'; length], to);
            }
        }
    };
    let at = |node: &Node| node.transport.status().networks[0].clone();
    std::thread::scope(|scope| {
        scope.spawn(|| flood(plan.addr(1, 0)));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until(&mut [&mut a, &mut b], "flooded for a while", |nodes| {
                at(nodes[1]).flooded >= 4
            });
            // The other network has a budget of its own.
            b.received.clear();
            until(&mut [&mut a, &mut b], "a heard beside the flood", |nodes| {
                nodes[1].heard("a", 1)
            });
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    let network = at(&b);
    assert!(
        network
            .refused
            .iter()
            .any(|r| r.0 == Reason::Malformed && r.1 > 1000)
    );
    until(&mut [&mut a, &mut b], "the end told", |nodes| {
        nodes[1]
            .events
            .contains(&Event::FloodOver { network: net(0) })
    });
    let expected = vec![
        Event::Flooded { network: net(0) },
        Event::FloodOver { network: net(0) },
    ];
    assert_eq!(b.told(), expected);
    b.received.clear();
    until(&mut [&mut a, &mut b], "a heard again", |n| {
        n[1].heard("a", 0)
    });
}

#[test]
fn hosts_networks_and_keys_change_while_it_runs() {
    let mut plan = Plan::new(3, 2);
    let strangers = plan.hosts.split_off(2);
    let (mut a, mut b) = (plan.start(0, 10), plan.start(1, 10));
    until(&mut [&mut a, &mut b], "a heard", |n| n[1].heard("a", 0));
    let sent = b.path("a", 0).sent;
    // A host is added and a network taken away.
    plan.hosts.extend(strangers);
    let mut c = plan.start(2, 10);
    for (at, node) in [&a, &b].into_iter().enumerate() {
        let networks = &plan.networks(at)[..1];
        node.transport.set_layout(networks, &plan.hosts).unwrap();
    }
    assert!(b.path("a", 0).sent >= sent, "what stays keeps its counters");
    until(&mut [&mut a, &mut b, &mut c], "c hears both", |nodes| {
        nodes[2].heard("a", 0) && nodes[2].heard("b", 0) && nodes[0].heard("c", 0)
    });
    assert!(!c.heard("a", 1), "a network that is gone");
    until(&mut [&mut a, &mut b, &mut c], "b counts on", |nodes| {
        nodes[1].path("a", 0).sent > sent
    });
    // A network that is gone frees its address.
    drop(bind(plan.addr(0, 1)));
    // The key changes, step by step on one host after the other.
    let mut keys = plan.keys.clone();
    keys.begin().unwrap();
    let next = keys.clone();
    keys.switch().unwrap();
    let switched = keys.clone();
    keys.finish().unwrap();
    for step in [next, switched, keys] {
        for changed in 0..3 {
            [&a, &b, &c][changed].transport.set_keys(&step);
            for node in [&mut a, &mut b, &mut c] {
                node.received.clear();
            }
            until(&mut [&mut a, &mut b, &mut c], "all hear all", |nodes| {
                let hears = |node: &Node, from: [&str; 2]| from.iter().all(|f| node.heard(f, 0));
                hears(nodes[0], ["b", "c"])
                    && hears(nodes[1], ["a", "c"])
                    && hears(nodes[2], ["a", "b"])
            });
        }
    }
    assert_eq!(a.refused("b", Reason::UnknownKey), 0);
    // Taken out, it is not heard.
    b.transport
        .set_layout(&plan.networks(1), &plan.hosts[1..])
        .unwrap();
    let refused = |node: &Node| {
        let refused = node.transport.status().networks[0].refused.clone();
        refused.iter().any(|r| r.0 == Reason::UnknownSender)
    };
    until(&mut [&mut a, &mut b], "a refused", |n| refused(n[1]));
}

#[test]
fn a_host_whose_daemon_hangs_falls_silent_until_it_publishes_again() {
    let plan = Plan::new(2, 1);
    let (mut a, mut b) = (plan.start(0, 10), plan.start(1, 10));
    until(&mut [&mut a, &mut b], "a heard", |n| n[1].heard("a", 0));
    a.payload = b"last words".to_vec();
    until(&mut [&mut a, &mut b], "the last words heard", |nodes| {
        nodes[1].received.iter().any(|r| r.payload == b"last words")
    });
    // a publishes no more; the last payload is repeated, then nothing.
    let deadline = boot_time() + PATIENCE;
    while a.events.last() != Some(&Event::ReportStale) {
        assert!(boot_time() < deadline, "{:?}", a.events);
        a.take(STEP);
    }
    let sent = a.path("b", 0).sent;
    // Three rounds of b, which a would have kept up with.
    let after = b.path("a", 0).sent + 3;
    until(&mut [&mut b], "three rounds", |n| {
        n[0].path("a", 0).sent >= after
    });
    assert_eq!(a.path("b", 0).sent, sent);
    a.payload = b"back".to_vec();
    until(&mut [&mut a, &mut b], "a heard again", |nodes| {
        let turn = [Event::ReportStale, Event::ReportFresh];
        nodes[1].received.iter().any(|r| r.payload == b"back")
            && nodes[0].events.windows(2).any(|two| two == turn)
    });
}

#[test]
fn a_configuration_without_sense_is_refused() {
    let plan = Plan::new(2, 2);
    let changed = |change: &dyn Fn(&mut TransportConfig)| {
        let mut config = plan.config(0, 1);
        change(&mut config);
        Transport::start(config).map(|_| ())
    };
    assert!(changed(&|_| ()).is_ok());
    let bad: [&dyn Fn(&mut TransportConfig); 9] = [
        &|c| c.period = PERIOD_MIN / 2,
        &|c| c.period = PERIOD_MAX * 2,
        &|c| c.networks[0].local = "0.0.0.0:7445".parse().unwrap(),
        &|c| c.networks[0].local.set_port(0),
        &|c| c.networks[1].index = net(0),
        &|c| c.networks[1].index = net(8),
        &|c| c.networks[1].local = c.networks[0].local,
        &|c| c.peers.push(c.peers[1].clone()),
        &|c| {
            let addr = "[::1]:7445".parse().unwrap();
            c.peers[1].addrs.insert(net(0), addr);
        },
    ];
    for (at, change) in bad.iter().enumerate() {
        let outcome = changed(change);
        assert!(matches!(outcome, Err(TransportError::Config(_))), "{at}");
    }
    let many = changed(&|c| {
        c.peers = (0..64)
            .map(|n| Peer {
                name: host(&format!("h{n}")),
                addrs: BTreeMap::new(),
            })
            .collect();
    });
    assert!(many.is_err(), "65 hosts");
}

#[test]
fn a_network_that_goes_and_comes_back_is_told_once_and_works_by_itself() {
    in_namespace(|| {
        let plug = || {
            ip("link add plug type veth peer name hole");
            ip("link set hole up");
            ip("link set plug up");
            for at in 1..=2 {
                ip(&format!("addr add 10.9.0.{at}/24 dev plug"));
            }
        };
        let mut plan = Plan::new(2, 1);
        for (at, addr) in ["10.9.0.1:7445", "10.9.0.2:7445"].into_iter().enumerate() {
            plan.hosts[at].addrs = BTreeMap::from([(net(0), addr.parse().unwrap())]);
        }
        // Nothing is there when they start. A socket that was bound to an interface is of no use
        // when another of that name comes.
        let mut bound = plan.config(0, 10);
        bound.networks[0].device = Some("plug".to_owned());
        let (mut a, mut b) = (Node::new(bound), plan.start(1, 10));
        let tell = |node: &Node| {
            let told = node.told().into_iter();
            told.map(|event| match event {
                Event::NetworkFails { error, .. } => format!("fails: {error:?}"),
                other => other.to_string(),
            })
            .collect::<Vec<_>>()
        };
        until(&mut [&mut a, &mut b], "told", |nodes| {
            nodes.iter().all(|node| !node.told().is_empty())
        });
        assert_eq!(tell(&b), ["fails: EADDRNOTAVAIL"]);
        assert_eq!(tell(&a), ["fails: ENODEV"]);
        assert!(!a.transport.status().networks[0].open);
        let works = Event::NetworkWorks { network: net(0) };
        for times in 1..=2 {
            plug();
            a.received.clear();
            b.received.clear();
            until(&mut [&mut a, &mut b], "back", |nodes| {
                let told = nodes[0]
                    .events
                    .iter()
                    .filter(|event| **event == works)
                    .count();
                told == times && nodes[0].heard("b", 0) && nodes[1].heard("a", 0)
            });
            assert_eq!(a.told().len(), 2 * times, "{:?}", tell(&a));
            ip("link del plug");
            until(&mut [&mut a, &mut b], "gone", |nodes| {
                nodes[0].told().len() > 2 * times
            });
        }
        // Long gone, and nothing more is told.
        let failed = a.path("b", 0).send_failed + 8;
        until(&mut [&mut a, &mut b], "more rounds", |nodes| {
            nodes[0].path("b", 0).send_failed >= failed
        });
        assert_eq!(a.told().len(), 5, "{:?}", tell(&a));
    });
}

#[test]
fn one_peer_out_of_reach_is_told_once_and_the_others_are_heard() {
    in_namespace(|| {
        for at in 1..=2 {
            ip(&format!("addr add 10.9.0.{at}/32 dev lo"));
        }
        let mut plan = Plan::new(3, 1);
        let addrs = ["10.9.0.1:7445", "10.9.0.2:7445", "192.0.2.3:7445"];
        for (at, addr) in addrs.into_iter().enumerate() {
            plan.hosts[at].addrs = BTreeMap::from([(net(0), addr.parse().unwrap())]);
        }
        let (mut a, mut b) = (plan.start(0, 10), plan.start(1, 10));
        let failed = |node: &Node| node.path("c", 0).send_failed;
        until(&mut [&mut a, &mut b], "rounds", |nodes| {
            nodes[1].heard("a", 0) && failed(nodes[0]) >= 5
        });
        let (network, peer) = (net(0), host("c"));
        let error = nix::errno::Errno::ENETUNREACH;
        let fails = Event::PathFails {
            network,
            peer: peer.clone(),
            error,
        };
        assert_eq!(a.told(), std::slice::from_ref(&fails));
        ip("addr add 192.0.2.3/32 dev lo");
        until(&mut [&mut a, &mut b], "told", |n| n[0].told().len() > 1);
        assert_eq!(a.told(), [fails, Event::PathWorks { network, peer }]);
    });
}

#[test]
fn a_network_bound_to_its_device_hears_nothing_that_comes_another_way() {
    in_namespace(|| {
        ip("link add plug type veth peer name hole");
        ip("link set hole up");
        ip("link set plug up");
        // a's address is on another interface than the one it is told to hear on: packets to it
        // come another way.
        ip("addr add 10.9.0.1/24 dev hole");
        ip("addr add 10.9.0.2/32 dev lo");
        let mut plan = Plan::new(2, 1);
        for (at, addr) in ["10.9.0.1:7445", "10.9.0.2:7445"].into_iter().enumerate() {
            plan.hosts[at].addrs = BTreeMap::from([(net(0), addr.parse().unwrap())]);
        }
        let mut bound = plan.config(0, 10);
        bound.networks[0].device = Some("plug".to_owned());
        let (mut a, mut b) = (Node::new(bound), plan.start(1, 10));
        until(&mut [&mut a, &mut b], "b sends", |n| {
            n[1].path("a", 0).sent >= 5
        });
        assert_eq!(
            a.path("b", 0).received + a.refused("b", Reason::Unproven),
            0
        );
        let mut missing = plan.config(0, 11);
        missing.networks[0].device = Some("plug9".to_owned());
        missing.networks[0].local.set_port(7446);
        let mut node = Node::new(missing);
        until(&mut [&mut node], "told", |n| !n[0].told().is_empty());
        let error = nix::errno::Errno::ENODEV;
        assert_eq!(
            node.told(),
            [Event::NetworkFails {
                network: net(0),
                error
            }]
        );
    });
}
