use super::*;
use crate::plan::tolerance::{Budget, Checker, Outcome};

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

const POOL: &str = r#"
tolerate = 1
[policy]
starts_per_host = 2
[[host]]
name = "a"
memory = "32 GiB"
[[host]]
name = "b"
memory = "32 GiB"
[[host]]
name = "c"
memory = "32 GiB"

[[vm]]
name = "db"
memory = "12 GiB"
host = "a"
delay_s = 30
[[vm]]
name = "app"
memory = "8 GiB"
host = "a"
order = 1
after = ["cache"]
[[vm]]
name = "cache"
memory = "2 GiB"
host = "a"
order = 2
delay_s = 5
[[vm]]
name = "extra"
memory = "4 GiB"
host = "a"
priority = "best-effort"
[[vm]]
name = "pair"
memory = "4 GiB"
host = "a"
standby = "b"
protection = "mirrored"
[[vm]]
name = "kept"
memory = "2 GiB"
host = "a"
standby = "c"
protection = "reserved"
[[vm]]
name = "stays"
memory = "8 GiB"
host = "b"
min_memory = "4 GiB"
[[vm]]
name = "spare"
memory = "10 GiB"
host = "c"
priority = "best-effort"
"#;

fn pool() -> Pool {
    Pool::parse(POOL, "p").unwrap()
}

#[test]
fn starts_are_ordered_by_class_dependency_and_delay() {
    let pool = pool();
    let plan = plan(&pool, &[host("a")], None).unwrap();
    let seen: Vec<(&str, u32)> = (plan.starts.iter())
        .map(|s| (s.vm.as_str(), s.after_s.0))
        .collect();
    // `app` is of order 1 and waits for `cache` of order 2.
    assert_eq!(
        seen,
        [
            ("db", 0),
            ("kept", 0),
            ("cache", 30),
            ("app", 35),
            ("extra", 35)
        ]
    );
    assert!(plan.starts[1].reserved && plan.starts[1].host == host("c"));
    assert_eq!(
        plan.go_on,
        [GoOn {
            vm: "pair".into(),
            host: host("b")
        }]
    );
    assert!(plan.left_over.is_empty() && plan.measures.is_empty());
    // What fits after all that: pairs are whole again, each on another host than it runs on.
    for standby in &plan.standbys {
        let runs = if standby.vm == "pair" { "b" } else { "c" };
        assert_ne!(standby.host, Some(host(runs)));
    }
    assert_eq!(plan.standbys.len(), 2);
}

#[test]
fn a_host_starts_its_vms_in_batches() {
    let mut pool = pool();
    pool.hosts[2].state = HostState::Maintenance;
    pool.policy.starts_per_host = Some(1);
    let plan = plan(&pool, &[host("a")], None).unwrap();
    let on_b: Vec<u32> = (plan.starts.iter())
        .filter(|s| s.host == host("b"))
        .map(|s| s.batch)
        .collect();
    assert_eq!(on_b, [1, 2]);
    // 20 GiB are free on b; `app` is of an earlier class than `cache`.
    let left: Vec<&str> = plan.left_over.iter().map(|d| d.vm.as_str()).collect();
    assert_eq!(left, ["cache", "extra"]);
}

#[test]
fn the_certificate_is_respected() {
    let pool = pool();
    let checker = Checker::new(&pool, 1, Scope::Always, Budget::default());
    assert_eq!(*checker.outcome(), Outcome::Survives);
    let by_proof = plan(&pool, &[host("a")], Some(&checker)).unwrap();
    assert_eq!(by_proof.by, By::Certificate);
    let promised = checker.placement(1).unwrap();
    assert_eq!(promised.len(), 3);
    for (at, to) in promised {
        let name = &checker.layout().running[at as usize].name;
        let start = by_proof.starts.iter().find(|s| s.vm == *name).unwrap();
        assert_eq!(start.host, pool.hosts[usize::from(to)].name);
    }
    // Two at once were not promised.
    let two = plan(&pool, &[host("a"), host("b")], Some(&checker)).unwrap();
    assert_eq!(two.by, By::Search);
}

#[test]
fn a_larger_failures_proof_serves_a_smaller_one() {
    let mut pool = pool();
    pool.vms
        .retain(|vm| vm.name != "stays" && vm.name != "spare");
    let checker = Checker::new(&pool, 2, Scope::Always, Budget::default());
    assert_eq!(*checker.outcome(), Outcome::Survives);
    let one = plan(&pool, &[host("a")], Some(&checker)).unwrap();
    assert_eq!(one.by, By::Certificate);
    assert!(one.left_over.is_empty());
    assert_eq!(one.starts.len(), 5);
}

#[test]
fn if_not_all_fit_the_most_important_are_started() {
    let mut pool = pool();
    // 20 on b and 20 on c are free; db, app, cache and two new ones need more.
    for (name, size, order) in [("huge", 19, 3), ("late", 6, 4)] {
        pool.vms.push(crate::plan::model::Vm {
            name: name.into(),
            memory: Bytes::gib(size),
            host: Some(host("a")),
            order,
            ..Default::default()
        });
    }
    let plan = plan(&pool, &[host("a")], None).unwrap();
    let left: Vec<&str> = plan.left_over.iter().map(|d| d.vm.as_str()).collect();
    // `late` is of a later class than `huge`, and fits beside the earlier ones.
    assert_eq!(left, ["huge"]);
    assert!(plan.fewest);
}

#[test]
fn the_last_resort_is_taken_only_if_allowed_and_says_whom() {
    let mut pool = pool();
    pool.vms[0].memory = Bytes::gib(23);
    let plain = plan(&pool, &[host("a")], None).unwrap();
    assert_eq!(plain.left_over[0].vm, "db");
    assert!(plain.measures.is_empty());
    pool.policy.shrink = true;
    let shrunk = plan(&pool, &[host("a")], None).unwrap();
    assert_eq!(shrunk.measures.len(), 1);
    assert_eq!(shrunk.measures[0].vm, "stays");
    assert_eq!(shrunk.measures[0].shrink_to, Some(Bytes::gib(4)));
    assert!(
        shrunk
            .left_over
            .iter()
            .all(|d| d.priority == Priority::BestEffort)
    );
    pool.policy.shrink = false;
    pool.policy.stop_best_effort = true;
    let stopped = plan(&pool, &[host("a")], None).unwrap();
    assert_eq!(
        stopped.measures,
        [Measure {
            vm: "spare".into(),
            host: host("c"),
            shrink_to: None
        }]
    );
    assert!(stopped.starts.iter().any(|s| s.vm == "db"));
}

#[test]
fn a_host_that_is_not_there_is_named() {
    let error = plan(&pool(), &[host("x")], None).unwrap_err();
    assert!(
        error.contains("`x`") && error.contains("a, b and c"),
        "{error}"
    );
}
