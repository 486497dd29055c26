//! Hosts of a lab as a pool: real heartbeats, a real statefile, watchdogs that really reset.

#![allow(clippy::unwrap_used)]

mod common;

use common::pool::{movable, runs_on_of, standing, status, wait};
use common::{Bed, eventually, host};
use pollux::api::pool::PoolStatus;
use pollux::api::types::Role;
use pollux::beat::{PoolKeys, load_keys, save_keys};
use pollux::lab::HostPower;
use pollux::lab::daemons::up_linked;
use pollux::lab::pool::PoolLab;
use std::path::Path;
use std::time::Duration;

const HOSTS: [&str; 3] = ["a", "b", "c"];

fn pool(fencing: bool) -> Bed {
    pool_of(&HOSTS, fencing)
}

fn pool_of(hosts: &[&str], fencing: bool) -> Bed {
    let mut spec = Bed::spec();
    spec.hosts = hosts.iter().map(|name| host(name)).collect();
    spec.pool = Some(PoolLab {
        watchdog: Some(Duration::from_secs(5)),
        fencing,
    });
    let bed = Bed {
        lab: up_linked(spec).unwrap(),
    };
    for name in hosts {
        wait(&bed, name, "a pool of all hosts", |s| {
            s.phase == "member" && s.hosts.iter().all(|host| host.standing == "in")
        });
    }
    bed
}

fn runs_on(bed: &Bed, vm: &str) -> Vec<&'static str> {
    runs_on_of(bed, vm, &HOSTS)
}

#[test]
fn the_vm_of_a_host_whose_power_is_confirmed_off_runs_again_on_another() {
    let bed = pool(true);
    let guest = movable(&bed);
    assert_eq!(runs_on(&bed, &guest.name), ["a"]);
    bed.lab.power_cut(&host("a")).unwrap();
    let on = eventually("it runs again", || runs_on(&bed, &guest.name).pop());
    let seen = wait(&bed, on, "the death of a", |s| standing(s, "a") == "dead");
    let proof = &seen
        .hosts
        .iter()
        .find(|h| h.name.as_str() == "a")
        .unwrap()
        .proof;
    assert!(
        proof.as_ref().unwrap().contains("power is off"),
        "{proof:?}"
    );
    let why = bed.cli(on, &["why", &guest.name]);
    let why = String::from_utf8(why.stdout).unwrap();
    assert!(why.contains("a is dead: its power is off"), "{why}");

    // Back with power, a is a member again, and does not start what another runs.
    bed.lab.power_on(&host("a")).unwrap();
    wait(&bed, on, "a is in again", |s| standing(s, "a") == "in");
    wait(&bed, "a", "a knows it", |s| s.phase == "member");
    assert_eq!(runs_on(&bed, &guest.name), [on]);
    let refused = bed.api("a").command(&guest.name, "start").unwrap_err();
    assert!(
        refused.to_string().contains("may be running it"),
        "{refused}"
    );
}

#[test]
fn a_host_that_stands_still_is_reset_by_its_watchdog_and_its_vm_runs_elsewhere() {
    let bed = pool(false);
    let guest = movable(&bed);
    let before = status(&bed, "a").unwrap().incarnation;
    bed.lab.freeze(&host("a")).unwrap();
    let on = eventually("it runs again", || {
        ["b", "c"].into_iter().find(|name| {
            let vm = bed.api(name).vm(&guest.name);
            vm.is_ok_and(|vm| vm.role == Role::Primary)
        })
    });
    // By then the watchdog has fired: a is not frozen any more.
    let power = |bed: &Bed| bed.lab.status().unwrap().hosts[0].power;
    assert_ne!(power(&bed), HostPower::Frozen);
    let dead = |s: &PoolStatus| {
        let dead = s
            .decisions
            .iter()
            .find(|d| d.about == "a" && d.what == "dead");
        dead.map(|dead| dead.cause.clone())
    };
    let seen = wait(&bed, on, "the decision", |s| dead(s).is_some());
    let cause = dead(&seen).unwrap();
    assert!(cause.contains("its lease and its watchdog"), "{cause}");
    // It boots by itself, into another life.
    let again = wait(&bed, on, "a is in again", |s| standing(s, "a") == "in");
    let life = again
        .hosts
        .iter()
        .find(|h| h.name.as_str() == "a")
        .unwrap()
        .incarnation;
    assert!(life.unwrap() > before);
    assert_eq!(runs_on(&bed, &guest.name), [on]);
}

#[test]
fn a_daemon_that_is_told_to_end_says_farewell_and_its_vm_moves() {
    let bed = pool(false);
    let guest = movable(&bed);
    let daemon = bed.lab.processes(&host("a")).unwrap();
    let daemon = daemon
        .iter()
        .find(|p| p.command.contains("daemon --config"))
        .unwrap();
    bed.on("a", &["kill", "-TERM", &daemon.pid.to_string()]);
    let on = eventually("it runs again", || {
        ["b", "c"].into_iter().find(|name| {
            let vm = bed.api(name).vm(&guest.name);
            vm.is_ok_and(|vm| vm.role == Role::Primary)
        })
    });
    let seen = wait(&bed, on, "a has left", |s| standing(s, "a") == "away");
    assert!(
        seen.decisions
            .iter()
            .any(|d| d.about == "a" && d.what == "away")
    );
    // Nobody was reset for it.
    assert_eq!(bed.lab.status().unwrap().hosts[0].power, HostPower::On);
}

#[test]
fn a_dead_management_network_resets_nobody() {
    let bed = pool(false);
    let lives = |bed: &Bed| HOSTS.map(|name| status(bed, name).unwrap().incarnation);
    let before = lives(&bed);
    for name in HOSTS {
        bed.lab.cut_lan(&host(name)).unwrap();
    }
    let lost = |s: &PoolStatus| {
        let others = s.hosts.iter().filter(|host| !host.is_self);
        others
            .flat_map(|host| &host.paths)
            .all(|path| (path.path == "management") == (path.verdict == "lost"))
    };
    for name in HOSTS {
        wait(
            &bed,
            name,
            "the management network is lost, and nothing else",
            lost,
        );
    }
    // Longer than any lease or watchdog, measured in their own reports.
    let seq = |s: &PoolStatus| s.hosts.iter().find_map(|h| h.report.as_ref()).unwrap().seq;
    let from = seq(&status(&bed, "a").unwrap());
    let later = wait(&bed, "a", "20 more reports", |s| seq(s) > from + 20);
    assert!(
        later.hosts.iter().all(|host| host.standing == "in"),
        "{later:#?}"
    );
    assert_eq!(lives(&bed), before);
}

#[test]
fn the_key_changes_while_the_pool_runs_and_a_host_that_boots_afterwards_is_heard() {
    const PAIR: [&str; 2] = ["a", "b"];
    let bed = pool_of(&PAIR, false);
    let dir = |name: &str| bed.lab.host(&host(name)).unwrap().state_dir.clone();
    let change = |dir: &Path, step: &dyn Fn(&mut PoolKeys)| {
        let mut keys = load_keys(dir).unwrap().unwrap();
        step(&mut keys);
        save_keys(dir, &keys).unwrap();
        keys
    };
    // Each step on every host, and the next once every daemon uses it.
    let taken_up = |sends: u32, accepts: &[u32]| {
        for name in PAIR {
            let seen = wait(&bed, name, "the keys are taken up", |s| {
                s.keys.sends == sends && s.keys.accepts == accepts
            });
            assert!(seen.hosts.iter().all(|host| host.standing == "in"));
        }
    };
    let lives = || PAIR.map(|name| status(&bed, name).unwrap().incarnation);
    let before = lives();
    taken_up(1, &[1]);
    let next = change(&dir("a"), &|keys| assert!(keys.begin().is_ok()));
    change(&dir("b"), &|keys| keys.import(&next).unwrap());
    taken_up(1, &[1, 2]);
    for name in PAIR {
        change(&dir(name), &|keys| keys.switch().unwrap());
    }
    taken_up(2, &[1, 2]);
    for name in PAIR {
        change(&dir(name), &|keys| keys.finish().unwrap());
    }
    taken_up(2, &[2]);
    assert_eq!(lives(), before, "nobody noticed");

    // It knows the new key alone; whoever still used the old one would not be heard by it.
    bed.lab.power_cut(&host("b")).unwrap();
    bed.lab.power_on(&host("b")).unwrap();
    let whole = |s: &PoolStatus, life: u64| {
        let b = s.hosts.iter().find(|h| h.name.as_str() == "b").unwrap();
        b.standing == "in"
            && b.incarnation > Some(life)
            && b.paths.iter().all(|path| path.verdict == "healthy")
    };
    wait(&bed, "a", "b is in again, on every path", |s| {
        whole(s, before[1])
    });
}

#[test]
fn a_host_whose_vms_have_lost_their_storage_says_so() {
    let bed = pool_of(&["a", "b"], false);
    let guest = movable(&bed);
    let image = bed.lab.host(&host("a")).unwrap().shared_dir.clone();
    let image = std::fs::OpenOptions::new()
        .write(true)
        .open(image.join(format!("{}.raw", guest.name)))
        .unwrap();
    let of_a = |s: &PoolStatus| {
        let a = s.hosts.iter().find(|h| h.name.as_str() == "a").unwrap();
        a.report.as_ref().map(|report| report.storage_ok)
    };
    wait(&bed, "b", "a says that its storage answers", |s| {
        of_a(s) == Some(true)
    });
    // The nearest to a disk that is gone: one that has nothing to read.
    image.set_len(0).unwrap();
    wait(&bed, "b", "a says that it does not", |s| {
        of_a(s) == Some(false)
    });
    image.set_len(guest.disk_bytes).unwrap();
    wait(&bed, "b", "a says that it does again", |s| {
        of_a(s) == Some(true)
    });
    // It is no reason to go.
    assert!(
        status(&bed, "b")
            .unwrap()
            .hosts
            .iter()
            .all(|host| host.standing == "in")
    );
}
