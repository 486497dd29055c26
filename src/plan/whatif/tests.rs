use super::*;
use crate::plan::model::Vcpus;
use crate::plan::tolerance::InOrder;

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

const POOL: &str = r#"
tolerate = 1
[[host]]
name = "a"
memory = "16 GiB"
[[host]]
name = "b"
memory = "16 GiB"
[[host]]
name = "c"
memory = "16 GiB"
[[vm]]
name = "one"
memory = "8 GiB"
host = "a"
[[vm]]
name = "two"
memory = "8 GiB"
host = "b"
[[vm]]
name = "three"
memory = "8 GiB"
host = "c"
[[vm]]
name = "off"
memory = "4 GiB"
"#;

fn judged(pool: &Pool, change: &Change) -> WhatIf {
    let mut checker = checker(&InOrder, pool, Budget::default());
    let before = checker.outcome().clone();
    let what = judge(&InOrder, &mut checker, pool, change);
    assert_eq!(*checker.outcome(), before);
    what
}

fn ask(change: &Change) -> WhatIf {
    judged(&Pool::parse(POOL, "p").unwrap(), change)
}

#[test]
fn what_fits_is_admitted_and_what_does_not_is_refused_in_words() {
    let start = |gib: u64| {
        ask(&Change::Start(Box::new(Vm {
            name: "new".into(),
            memory: Bytes::gib(gib),
            ..Vm::default()
        })))
    };
    let small = start(8);
    assert_eq!(small.admission, Admission::Admitted);
    assert!(small.details[0].contains("started on"), "{small:?}");
    let big = start(9);
    assert_eq!(big.admission, Admission::Refused);
    assert!(big.reason.contains("room"), "{}", big.reason);
    let grown = ask(&Change::Resize("one".into(), Bytes::gib(9)));
    assert_eq!(grown.admission, Admission::Refused);
    assert!(
        grown.reason.contains("`one` needs 9 GiB") && grown.reason.contains("8 GiB of memory free"),
        "{}",
        grown.reason
    );
}

#[test]
fn a_known_vm_is_started_and_stopped() {
    let off = Change::Start(Box::new(Vm {
        name: "off".into(),
        ..Vm::default()
    }));
    assert_eq!(ask(&off).admission, Admission::Admitted);
    assert_eq!(
        ask(&Change::Stop("one".into())).admission,
        Admission::Admitted
    );
    let gone = ask(&Change::Stop("nobody".into()));
    assert!(gone.reason.contains("`nobody`") && gone.after.is_none());
}

#[test]
fn a_policy_that_allows_overcommitment_warns() {
    let mut pool = Pool::parse(POOL, "p").unwrap();
    pool.policy.allow_overcommit = true;
    let grown = judged(&pool, &Change::Resize("one".into(), Bytes::gib(9)));
    assert_eq!(grown.admission, Admission::Warned);
    assert!(grown.reason.contains("allow_overcommit"));
}

#[test]
fn a_standby_is_put_where_the_pool_stays_safe() {
    let mirrored = ask(&Change::Protect("one".into(), Protection::Mirrored, None));
    assert_eq!(mirrored.admission, Admission::Admitted);
    assert_eq!(mirrored.details, ["its standby goes to `b`"]);
    // b falls together with a, and c is the only other choice.
    let mut pool = Pool::parse(POOL, "p").unwrap();
    pool.hosts[0].domain = Some("rack".into());
    pool.hosts[1].domain = Some("rack".into());
    let mirrored = judged(
        &pool,
        &Change::Protect("one".into(), Protection::Mirrored, None),
    );
    assert_eq!(mirrored.details, ["its standby goes to `c`"]);
    pool.hosts[2].memory = Bytes::gib(12);
    let nowhere = judged(
        &pool,
        &Change::Protect("one".into(), Protection::Mirrored, None),
    );
    assert_eq!(nowhere.admission, Admission::Refused);
    assert!(
        nowhere.reason.contains("`c` does not have room"),
        "{nowhere:?}"
    );
}

#[test]
fn a_host_is_emptied_before_maintenance() {
    let mut pool = Pool::parse(POOL, "p").unwrap();
    let tight = judged(&pool, &Change::Maintenance(host("a")));
    assert_eq!(tight.admission, Admission::Refused);
    assert!(tight.details[0].contains("`one` moves to"), "{tight:?}");
    for host in &mut pool.hosts {
        host.memory = Bytes::gib(32);
    }
    let wide = judged(&pool, &Change::Maintenance(host("a")));
    assert_eq!(wide.admission, Admission::Admitted, "{wide:?}");
    pool.hosts[1].memory = Bytes::gib(8);
    pool.hosts[2].memory = Bytes::gib(8);
    let stuck = judged(&pool, &Change::Maintenance(host("a")));
    assert!(stuck.reason.contains("cannot be emptied") && stuck.reason.contains("`one`"));
}

#[test]
fn a_new_host_makes_a_pool_safe_again() {
    let mut pool = Pool::parse(POOL, "p").unwrap();
    pool.vms[0].memory = Bytes::gib(9);
    let more = Host {
        name: host("d"),
        ..pool.hosts[0].clone()
    };
    let added = judged(&pool, &Change::Add(Box::new(more)));
    assert_eq!(added.before.answer, Word::Overcommitted);
    assert_eq!(added.admission, Admission::Admitted);
    assert!(added.reason.contains("again"));
}

#[test]
fn vcpus_and_devices_have_to_be_there_too() {
    let limited = POOL.replace(
        "memory = \"16 GiB\"\n",
        "memory = \"16 GiB\"\nvcpus = 8\ndevices = { gpu = 1 }\n",
    );
    let pool = Pool::parse(&limited, "p").unwrap();
    let start = |vcpus: u32, gpus: u32| {
        let vm = Vm {
            name: "new".into(),
            memory: Bytes::gib(1),
            vcpus: Vcpus(vcpus),
            devices: [("gpu".to_owned(), gpus)].into(),
            ..Vm::default()
        };
        judged(&pool, &Change::Start(Box::new(vm)))
    };
    assert_eq!(start(7, 1).admission, Admission::Admitted);
    for (vcpus, gpus, says) in [(8, 1, "9 of vCPUs, of 8"), (7, 2, "2 of gpu, of 1")] {
        let what = start(vcpus, gpus);
        assert_eq!(what.admission, Admission::Refused);
        assert!(what.reason.contains(says), "{}", what.reason);
    }
}
