//! A pool of two hosts that has neither shared storage for its registry nor etcd: each host holds
//! a copy, and the gateway and a fence agent decide who goes on.

#![allow(clippy::unwrap_used)]

mod common;

use common::pool::{movable, runs_on_of, standing, status, wait};
use common::{Bed, Guest, eventually, host};
use pollux::api::pool::PoolStatus;
use pollux::api::types::Role;
use pollux::lab::daemons::{pair_config, up_linked};
use pollux::lab::pool::PoolLab;
use std::time::Duration;

const HOSTS: [&str; 2] = ["a", "b"];

fn pair(fencing: bool) -> Bed {
    let mut spec = Bed::spec();
    spec.statefile_disks = 0;
    spec.host_config = Box::new(pair_config);
    spec.pool = Some(PoolLab {
        watchdog: Some(Duration::from_secs(5)),
        fencing,
    });
    let bed = Bed {
        lab: up_linked(spec).unwrap(),
    };
    for name in HOSTS {
        // Both vote: no change of the registry is under way, which a cut could leave in doubt.
        wait(&bed, name, "a pool of both hosts", |s| {
            all_in(s) && s.hosts.iter().all(|host| host.votes)
        });
    }
    bed
}

fn all_in(status: &PoolStatus) -> bool {
    status.phase == "member"
        && status.hosts.len() == 2
        && status.hosts.iter().all(|host| host.standing == "in")
}

fn runs_on(bed: &Bed, vm: &str) -> Vec<&'static str> {
    runs_on_of(bed, vm, &HOSTS)
}

/// Let nothing through between the two hosts, over any network, while both reach the gateway.
fn between(bed: &Bed, what: &str) {
    let b = host("b");
    for (name, other) in [("a", "b"), ("b", "a")] {
        let there = bed.lab.host(&host(other)).unwrap().management;
        bed.on(
            name,
            &["ip", "route", what, "blackhole", &format!("{there}/32")],
        );
    }
    for link in &bed.lab.host(&host("a")).unwrap().links.clone() {
        if what == "add" {
            bed.lab.cut_link(&host("a"), &b, link.index).unwrap();
        } else {
            bed.lab.heal_link(&host("a"), &b, link.index).unwrap();
        }
    }
}

#[test]
fn the_survivor_switches_the_other_off_and_goes_on_alone_until_it_is_back() {
    let bed = pair(true);
    let guest = movable(&bed);
    let mirrored = bed.vm(&Guest::new());
    let mut client = mirrored.start();
    bed.api("a").protect(&mirrored.name).unwrap();
    bed.api("a").wait_mirrored(&mirrored.name);
    let n = client.count_on(0, 5);
    assert_eq!(runs_on(&bed, &guest.name), ["a"]);

    bed.lab.power_cut(&host("a")).unwrap();
    // Promoted, with the client's connection, and restarted: both took a change of the registry.
    client.count_on(n, 10);
    let b = bed.api("b");
    b.wait(&mirrored.name, "promoted", |s| s.role == Role::Primary);
    eventually("it runs again", || runs_on(&bed, &guest.name).pop());
    let seen = wait(&bed, "b", "the death of a", |s| standing(s, "a") == "dead");
    let dead = seen.hosts.iter().find(|h| h.name.as_str() == "a").unwrap();
    let proof = dead.proof.as_ref().unwrap();
    assert!(proof.contains("power is off"), "{proof}");

    // Back with power, a holds a stale copy until b has brought it in sync; then it joins by a
    // change that both hold.
    bed.lab.power_on(&host("a")).unwrap();
    wait(&bed, "b", "a is in again", all_in);
    wait(&bed, "a", "a knows it", all_in);
    assert_eq!(runs_on(&bed, &guest.name), ["b"]);

    // And the other way round: what b had changed alone is with a.
    bed.lab.power_cut(&host("b")).unwrap();
    eventually("it runs on a again", || {
        Some(()).filter(|()| runs_on(&bed, &guest.name) == ["a"])
    });
}

#[test]
fn cut_off_from_each_other_without_a_fence_agent_both_go_on_and_nothing_starts_twice() {
    let bed = pair(false);
    let guest = movable(&bed);
    let lives = |bed: &Bed| HOSTS.map(|name| status(bed, name).unwrap().incarnation);
    let before = lives(&bed);
    between(&bed, "add");
    let silent = |s: &PoolStatus| {
        let others = s.hosts.iter().filter(|host| !host.is_self);
        others
            .flat_map(|host| &host.paths)
            .all(|path| path.verdict == "lost")
    };
    for name in HOSTS {
        wait(&bed, name, "it hears nothing of the other", silent);
    }
    // Longer than any lease and watchdog, by each host's own account of the silence.
    const LONG_MS: u64 = 20_000;
    let silent_long = |s: &PoolStatus| {
        let others = s.hosts.iter().filter(|host| !host.is_self);
        let ages = others.flat_map(|host| host.paths.iter().filter_map(|path| path.age_ms));
        ages.min().is_some_and(|age| age > LONG_MS)
    };
    for name in HOSTS {
        let later = wait(&bed, name, "a long silence", silent_long);
        assert!(all_in(&later), "{later:#?}");
    }
    assert_eq!(lives(&bed), before);
    assert_eq!(runs_on(&bed, &guest.name), ["a"]);
    let refused = bed.api("b").command(&guest.name, "start").unwrap_err();
    assert!(refused.to_string().contains(&guest.name), "{refused}");
    assert_eq!(runs_on(&bed, &guest.name), ["a"]);

    between(&bed, "del");
    // In sync again: what needs a change of the registry can be done.
    let another = Guest::new();
    let vm = bed.vm(&another);
    eventually("a VM starts", || {
        bed.api("a").command(&vm.name, "start").ok()
    });
    assert_eq!(lives(&bed), before);
}

#[test]
fn a_daemon_that_is_told_to_end_hands_the_registry_over_without_a_fence_agent() {
    let bed = pair(false);
    let guest = movable(&bed);
    let daemon = bed.lab.processes(&host("a")).unwrap();
    let daemon = daemon
        .iter()
        .find(|p| p.command.contains("daemon --config"))
        .unwrap();
    bed.on("a", &["kill", "-TERM", &daemon.pid.to_string()]);
    eventually("it runs again", || {
        Some(()).filter(|()| runs_on(&bed, &guest.name) == ["b"])
    });
    wait(&bed, "b", "a has left", |s| standing(s, "a") == "away");
}
