use super::*;
use crate::plan::certificate::Certificate;
use crate::plan::model::{Bytes, Fails, HostState, Priority, Protection, Rule};
use crate::plan::pack::tests::Noise;
use crate::plan::random::{Random, pool as random};
use crate::plan::verify::verify;
use std::collections::BTreeSet;

mod oracle;

fn check(pool: &Pool, r: u32) -> Checker {
    Checker::new(pool, r, Scope::Always, Budget::default())
}

/// The answer, with its certificate verified.
fn survives(pool: &Pool, r: u32) -> bool {
    assert_eq!(pool.check(), vec![]);
    let checker = check(pool, r);
    proven(pool, &checker)
}

fn proven(pool: &Pool, checker: &Checker) -> bool {
    match checker.outcome() {
        Outcome::Survives => {
            let certificate = Certificate::of(checker, pool.fails).unwrap();
            verify(pool, &certificate).unwrap();
            true
        }
        Outcome::Overcommitted(_) => {
            assert!(Certificate::of(checker, pool.fails).is_none());
            false
        }
        Outcome::Unknown { .. } => panic!("undecided"),
    }
}

/// Hosts by what is free on them and the sizes of what they run, in GiB.
fn pool(hosts: &[(u64, &[u64])]) -> Pool {
    let mut text = String::from("tolerate = 1\n");
    for (n, (free, runs)) in hosts.iter().enumerate() {
        let all = free + runs.iter().sum::<u64>();
        text += &format!("[[host]]\nname = \"h{n}\"\nmemory = \"{all} GiB\"\n");
        for (m, size) in runs.iter().enumerate() {
            text +=
                &format!("[[vm]]\nname = \"v{n}-{m}\"\nmemory = \"{size} GiB\"\nhost = \"h{n}\"\n");
        }
    }
    Pool::parse(&text, "made").unwrap()
}

#[test]
fn the_known_minimal_pools_are_safe() {
    assert!(survives(&pool(&[(5, &[3, 3, 5]), (7, &[]), (5, &[])]), 1));
    let two = pool(&[(4, &[3, 1]), (5, &[3]), (4, &[4]), (4, &[4])]);
    assert!(survives(&two, 2));
}

#[test]
fn one_more_is_too_much_and_the_set_is_named() {
    let pool = pool(&[(5, &[3, 3, 6]), (7, &[]), (4, &[])]);
    let checker = check(&pool, 1);
    let Outcome::Overcommitted(failure) = checker.outcome() else {
        panic!("{:?}", checker.outcome());
    };
    assert_eq!(failure.failed, 1);
    assert!(
        matches!(failure.bound, Bound::Sum { need, have, .. } if need == 12 << 30 && have == 11 << 30)
    );
    assert_eq!(failure.chosen.left_over.len(), 1);
    assert_eq!(
        checker.layout().running[failure.chosen.left_over[0] as usize].name,
        "v0-2"
    );
}

/// All pools of up to `hosts` hosts and `vms` VMs of these sizes, up to the order of VMs.
fn small_pools(hosts: usize, vms: usize, rooms: &[u64], sizes: &[u64], see: &mut dyn FnMut(&Pool)) {
    // A VM is (host, size); hosts have rooms beside what they run.
    let kinds: Vec<(usize, u64)> = (0..hosts)
        .flat_map(|host| sizes.iter().map(move |size| (host, *size)))
        .collect();
    let mut chosen = vec![0_usize; vms];
    loop {
        let mut free = vec![0_usize; hosts];
        loop {
            let runs: Vec<Vec<u64>> = (0..hosts)
                .map(|host| {
                    let here = chosen.iter().filter(|kind| kinds[**kind].0 == host);
                    here.map(|kind| kinds[*kind].1).collect()
                })
                .collect();
            let spec: Vec<(u64, &[u64])> = (0..hosts)
                .map(|host| (rooms[free[host]], runs[host].as_slice()))
                .collect();
            see(&pool(&spec));
            // Rooms ascend: permutations of them are covered by those of the VMs.
            let Some(at) = (0..hosts).rev().find(|at| free[*at] + 1 < rooms.len()) else {
                break;
            };
            let next = free[at] + 1;
            free[at..].fill(next);
        }
        let Some(at) = (0..vms).rev().find(|at| chosen[*at] + 1 < kinds.len()) else {
            break;
        };
        let next = chosen[at] + 1;
        chosen[at..].fill(next);
    }
}

fn exhaust(hosts: usize, vms: usize, rooms: &[u64], sizes: &[u64], r: u32) -> (u64, u64) {
    let (mut safe, mut all) = (0, 0);
    small_pools(hosts, vms, rooms, sizes, &mut |pool| {
        let truth = oracle::survives(pool, r);
        assert_eq!(survives(pool, r), truth, "r = {r}\n{}", pool.to_toml());
        safe += u64::from(truth);
        all += 1;
    });
    (safe, all)
}

#[test]
fn all_small_pools_agree_with_trying_all() {
    let mut seen = (0, 0);
    for (hosts, vms, rooms, sizes, r) in [
        (2, 4, &[2, 3, 5][..], &[1, 2, 3][..], 1),
        (3, 4, &[2, 3, 5], &[1, 2, 3], 1),
        (3, 6, &[3, 5], &[2, 3], 1),
        (3, 4, &[5, 8], &[2, 3], 2),
        (4, 4, &[2, 4], &[2, 3], 1),
        (4, 4, &[2, 4], &[1, 3], 2),
        (5, 3, &[1, 3], &[1, 2], 2),
    ] {
        let (safe, all) = exhaust(hosts, vms, rooms, sizes, r);
        assert!(
            safe > 0 && safe < all,
            "{hosts} hosts, r = {r}: {safe} of {all}"
        );
        seen.0 += safe;
        seen.1 += all;
    }
    assert!(seen.1 > 10_000, "{seen:?}");
}

#[test]
fn all_pools_of_five_hosts_and_six_vms_agree_with_trying_all() {
    for (hosts, vms) in [(4, 5), (4, 6), (5, 4), (5, 5), (5, 6)] {
        for r in 1..=3 {
            let counts = exhaust(hosts, vms, &[2, 5], &[2, 3], r);
            println!("{hosts} hosts, {vms} VMs, r = {r}: {counts:?}");
        }
    }
}

/// A small pool with everything in it.
fn motley(noise: &mut Noise) -> Pool {
    let below = |noise: &mut Noise, n: u64| u8::try_from(noise.below(n)).unwrap();
    let mut pool = random(&Random {
        hosts: 3 + below(noise, 3),
        memory_gib: Some(12 + noise.below(24)),
        vms: Some(4 + u16::from(below(noise, 7))),
        used_permille: 500,
        tolerate: 1,
        mixed: noise.below(4) != 0,
        seed: noise.below(u64::MAX),
    });
    for vm in &mut pool.vms {
        vm.memory = Bytes::gib(1 + (vm.memory.0 >> 30) / 2);
        vm.min_memory = None;
    }
    if noise.below(3) == 0 {
        pool.fails = Fails::Domain;
    }
    for host in &mut pool.hosts {
        if host.vcpus.is_some() {
            host.vcpus = Some(crate::plan::model::Vcpus(10));
        }
        match noise.below(12) {
            0 => host.state = HostState::Failed,
            1 => host.state = HostState::Maintenance,
            _ => {}
        }
    }
    pool
}

#[test]
fn random_pools_with_everything_in_them_agree_with_trying_all() {
    let mut noise = Noise(3);
    let mut counts = [[0; 2]; 4];
    for _ in 0..1_500 {
        let pool = motley(&mut noise);
        for r in 0..=3 {
            let truth = oracle::survives(&pool, r);
            assert_eq!(survives(&pool, r), truth, "r = {r}\n{}", pool.to_toml());
            counts[r as usize][usize::from(truth)] += 1;
        }
    }
    for both in &counts {
        assert!(both.iter().all(|n| *n > 20), "too one-sided: {counts:?}");
    }
}

#[test]
fn what_is_survived_with_more_failures_is_survived_with_fewer() {
    let mut noise = Noise(5);
    for _ in 0..400 {
        let pool = motley(&mut noise);
        let answers: Vec<bool> = (0..=3).map(|r| survives(&pool, r)).collect();
        assert!(
            answers.is_sorted_by(|a, b| a >= b),
            "{answers:?}\n{}",
            pool.to_toml()
        );
    }
}

#[test]
fn neither_the_order_of_entries_nor_the_names_of_hosts_matter() {
    let mut noise = Noise(9);
    for _ in 0..400 {
        let pool = motley(&mut noise);
        let answer = survives(&pool, 1 + u32::try_from(noise.below(2)).unwrap());
        let r = check(&pool, 1).failures();
        let expected = survives(&pool, r);
        let mut other = pool.clone();
        for n in (1..other.vms.len()).rev() {
            other
                .vms
                .swap(n, usize::try_from(noise.below(n as u64 + 1)).unwrap());
        }
        for n in (1..other.hosts.len()).rev() {
            other
                .hosts
                .swap(n, usize::try_from(noise.below(n as u64 + 1)).unwrap());
        }
        other.groups.reverse();
        assert_eq!(survives(&other, r), expected);
        // Two hosts change names with all that is on them: the same pool under other names.
        let text = other.to_toml();
        let swapped = text
            .replace("\"host-0\"", "\"host-x\"")
            .replace("\"host-1\"", "\"host-0\"")
            .replace("\"host-x\"", "\"host-1\"");
        assert_eq!(
            survives(&Pool::parse(&swapped, "swapped").unwrap(), r),
            expected
        );
        let _ = answer;
    }
}

#[test]
fn an_update_answers_like_a_proof_from_scratch() {
    let mut noise = Noise(13);
    let mut kept = 0;
    let mut all = 0;
    for _ in 0..300 {
        let mut pool = motley(&mut noise);
        let mut checker = check(&pool, 2);
        for _ in 0..8 {
            change(&mut pool, &mut noise);
            if !pool.check().is_empty() {
                break;
            }
            checker.update(&pool);
            let fresh = survives(&pool, 2);
            assert_eq!(proven(&pool, &checker), fresh, "{}", pool.to_toml());
            if fresh {
                all += checker.sets().len();
                kept += checker.sets().len() - checker.looked();
            }
        }
    }
    assert!(
        kept * 5 > all,
        "updates looked at nearly all: {kept} of {all} kept"
    );
}

/// Something that happens to a pool.
fn change(pool: &mut Pool, noise: &mut Noise) {
    let vm = usize::try_from(noise.below(pool.vms.len() as u64)).unwrap();
    let host = usize::try_from(noise.below(pool.hosts.len() as u64)).unwrap();
    let name = pool.hosts[host].name.clone();
    let number = pool.vms.len();
    match noise.below(8) {
        0 => {
            pool.vms[vm].host = None;
            pool.vms[vm].standby = None;
        }
        1 => pool.vms[vm].memory = Bytes::gib(1 + noise.below(12)),
        2 if pool.vms[vm].host.is_some() && pool.vms[vm].host != Some(name.clone()) => {
            pool.vms[vm].protection = Protection::Mirrored;
            pool.vms[vm].standby = Some(name);
        }
        3 => pool.vms[vm].priority = Priority::BestEffort,
        4 => pool.vms[vm].priority = Priority::Always,
        5 if noise.below(4) == 0 => pool.hosts[host].memory = Bytes::gib(10 + noise.below(30)),
        _ => pool.vms.insert(
            vm,
            crate::plan::model::Vm {
                name: format!("new-{number}-{}", noise.below(1 << 30)),
                memory: Bytes::gib(1 + noise.below(4)),
                host: Some(name),
                ..Default::default()
            },
        ),
    }
}

#[test]
fn a_certificate_that_was_tampered_with_is_found_out() {
    let safe = pool(&[(5, &[3, 3, 5]), (7, &[]), (5, &[])]);
    let good = Certificate::of(&check(&safe, 1), Fails::Host).unwrap();
    assert_eq!(verify(&safe, &good), Ok(()));
    let spoil = |change: &dyn Fn(&mut Certificate)| {
        let mut bad = good.clone();
        change(&mut bad);
        verify(&safe, &bad).unwrap_err()
    };
    let of_zero = good.sets.iter().position(|set| set.failed == [0]).unwrap();
    assert!(
        spoil(&|c| {
            c.sets.remove(of_zero);
        })
        .contains("left out")
    );
    assert!(
        spoil(&|c| {
            c.sets[of_zero].restarts.pop();
        })
        .contains("nowhere")
    );
    assert!(spoil(&|c| c.sets[of_zero].restarts[0].1 = 0).contains("takes no restarts"));
    assert!(
        spoil(&|c| for r in &mut c.sets[of_zero].restarts {
            r.1 = 1;
        })
        .contains("more than it has")
    );
    assert!(
        spoil(&|c| {
            let first = c.sets[of_zero].restarts[0];
            c.sets[of_zero].restarts.push(first);
        })
        .contains("twice")
    );
    assert!(spoil(&|c| c.sets[of_zero].restarts[0].1 = 9).contains("does not have"));
}

/// The cells of docs/planner.md: of random pools, all that are safe are accepted, and no other.
#[test]
fn random_pools_of_eight_hosts_are_decided_exactly() {
    for used in [550, 600, 650, 700] {
        let mut safe = 0;
        for seed in 0..200 {
            let pool = random(&Random {
                hosts: 8,
                memory_gib: Some(64),
                vms: None,
                used_permille: used,
                tolerate: 2,
                mixed: false,
                seed,
            });
            let truth = oracle::survives_by_table(&pool, 2);
            assert_eq!(survives(&pool, 2), truth, "use {used}, seed {seed}");
            safe += u32::from(truth);
        }
        println!("use {used}: {safe} of 200 are safe");
        assert!(safe > 20);
    }
}

#[test]
fn beyond_what_is_listed_the_answer_is_unknown() {
    let big = random(&Random {
        hosts: 64,
        memory_gib: Some(64),
        vms: None,
        used_permille: 300,
        tolerate: 6,
        mixed: false,
        seed: 1,
    });
    let checker = check(&big, 6);
    assert!(matches!(
        checker.outcome(),
        Outcome::Unknown { failed: None, .. }
    ));
}

#[test]
fn a_runner_that_loses_a_part_proves_nothing() {
    struct Lossy;
    impl Runner for Lossy {
        fn parts(&self) -> usize {
            2
        }
        fn run(&self, parts: usize, job: &(dyn Fn(usize) -> Part + Sync)) -> Vec<Part> {
            (1..parts).map(job).collect()
        }
    }
    let safe = pool(&[(5, &[3, 3, 5]), (7, &[]), (5, &[])]);
    let checker = Checker::new_on(&Lossy, &safe, 1, Scope::Always, Budget::default());
    assert!(matches!(checker.outcome(), Outcome::Unknown { .. }));
    let distinct: BTreeSet<_> = check(&safe, 1).sets().iter().copied().collect();
    assert_eq!(distinct.len(), 3);
    let _ = Rule::Apart;
}

#[test]
fn the_largest_number_of_failures_is_found() {
    let mut noise = Noise(17);
    for _ in 0..150 {
        let pool = motley(&mut noise);
        let found =
            crate::plan::largest::largest(&InOrder, &pool, Scope::Always, Budget::default());
        let truth = (0..=pool.hosts.len())
            .filter(|r| oracle::survives(&pool, u32::try_from(*r).unwrap()))
            .max();
        assert_eq!(
            found.survives.map(|r| r as usize),
            truth.map(|r| r.min(found.of as usize))
        );
        if found.survives != Some(found.of) {
            let next = found.next.unwrap();
            assert_eq!(
                Some(next.tolerate),
                found.survives.map_or(Some(0), |r| Some(r + 1))
            );
            assert!(next.failing.is_some());
        }
    }
}
