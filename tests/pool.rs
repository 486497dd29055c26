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
    let watchdog = Some(Duration::from_secs(5));
    pool_with(hosts, PoolLab { watchdog, fencing }, false)
}

fn pool_with(hosts: &[&str], pool: PoolLab, takeable_disks: bool) -> Bed {
    let mut spec = Bed::spec();
    spec.hosts = hosts.iter().map(|name| host(name)).collect();
    spec.pool = Some(pool);
    spec.takeable_disks = takeable_disks;
    let bed = Bed {
        lab: up_linked(spec).unwrap(),
    };
    for name in hosts {
        wait(&bed, name, "a pool of all hosts", |s| {
            s.phase == "member"
                && s.hosts
                    .iter()
                    .all(|host| host.standing == "in" && host.votes)
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

#[test]
fn of_two_hosts_that_lost_the_registry_one_runs_on_when_the_other_dies() {
    let pool = PoolLab {
        watchdog: Some(Duration::from_secs(5)),
        fencing: true,
    };
    let bed = pool_with(&["a", "b"], pool, true);
    let guest = movable(&bed);
    let before = status(&bed, "a").unwrap().incarnation;
    for name in ["a", "b"] {
        bed.lab.take_disk(&host(name), 0).unwrap();
    }
    // It has written down that it promises, and so has done it by its next report.
    let promised = |name: &str| {
        let dir = &bed.lab.host(&host(name)).unwrap().state_dir;
        dir.join("pool.promised").exists().then_some(())
    };
    let _: [(); 2] = ["a", "b"].map(|name| eventually("it promises", || promised(name)));
    let reports = |s: &PoolStatus| {
        let b = s.hosts.iter().find(|h| h.name.as_str() == "b").unwrap();
        b.report.as_ref().unwrap().seq
    };
    let from = reports(&status(&bed, "a").unwrap());
    let then = wait(&bed, "a", "two more reports of b", |s| {
        reports(s) >= from + 2
    });
    bed.lab.power_cut(&host("b")).unwrap();
    // The promise of b alone is worth 35 s.
    let age = then.registry_age_ms.unwrap() + 40_000;
    let alone = wait(&bed, "a", "a runs on", |s| {
        assert_eq!(s.phase, "member", "{:?}", s.why);
        s.registry_age_ms > Some(age)
    });
    assert_eq!(alone.incarnation, before);
    assert_eq!(
        standing(&alone, "b"),
        "in",
        "nothing is decided without the registry"
    );
    for name in ["a", "b"] {
        bed.lab.give_disk(&host(name), 0).unwrap();
    }
    let seen = wait(&bed, "a", "the death of b", |s| standing(s, "b") == "dead");
    let b = seen.hosts.iter().find(|h| h.name.as_str() == "b").unwrap();
    assert!(
        b.proof.as_ref().unwrap().contains("power is off"),
        "{:?}",
        b.proof
    );
    assert_eq!((seen.phase.as_str(), seen.incarnation), ("member", before));
    assert_eq!(runs_on_of(&bed, &guest.name, &["a"]), ["a"]);
    // Its next life joins, and is told of nothing that binds it.
    bed.lab.power_on(&host("b")).unwrap();
    wait(&bed, "b", "b is a member", |s| s.phase == "member");
    eventually("the promise is forgotten", || {
        promised("b").is_none().then_some(())
    });
}

#[test]
fn a_host_whose_death_nothing_proves_is_dead_by_a_persons_word() {
    let pool = PoolLab {
        watchdog: None,
        fencing: false,
    };
    let bed = pool_with(&HOSTS, pool, false);
    let guest = movable(&bed);
    let off = |on: &str, host: &str, flags: &[&str]| {
        let output = bed.cli(on, &[&["pool", "off", host], flags].concat());
        let told = String::from_utf8(output.stderr).unwrap();
        output.status.success().then_some(()).ok_or(told)
    };
    bed.lab.power_cut(&host("a")).unwrap();
    let asks = |s: &PoolStatus| {
        s.alerts
            .iter()
            .any(|alert| alert.text.contains("pollux pool off a"))
    };
    let on = eventually("somebody is asked", || {
        ["b", "c"]
            .into_iter()
            .find(|name| status(&bed, name).is_some_and(|s| asks(&s)))
    });
    let other = if on == "b" { "c" } else { "b" };
    wait(&bed, other, "it knows who coordinates", |s| {
        s.coordinator
            .as_ref()
            .is_some_and(|host| host.as_str() == on)
    });
    assert!(runs_on_of(&bed, &guest.name, &["b", "c"]).is_empty());
    assert!(off(on, "a", &[]).unwrap_err().contains("--yes"));
    assert!(
        off(on, other, &["--yes"])
            .unwrap_err()
            .contains("it is not off")
    );
    assert!(
        off(on, on, &["--yes"])
            .unwrap_err()
            .contains("is this host")
    );
    assert!(
        off(on, "d", &["--yes"])
            .unwrap_err()
            .contains("no host of this pool")
    );
    let told = off(other, "a", &["--yes"]).unwrap_err();
    assert!(
        told.contains(&format!("{on} coordinates: say it there")),
        "{told}"
    );
    off(on, "a", &["--yes"]).unwrap();
    eventually("it runs again", || {
        runs_on_of(&bed, &guest.name, &["b", "c"]).pop()
    });
    let why = bed.cli(on, &["why", "a"]);
    let why = String::from_utf8(why.stdout).unwrap();
    assert!(why.contains("a person has made certain"), "{why}");
    assert!(
        off(on, "a", &["--yes"])
            .unwrap_err()
            .contains("proved already")
    );
}
