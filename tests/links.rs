//! Linking two hosts, testing the links and changing keys, through the real product: lab
//! hosts, daemons, the command line. Needs root, as `make test` says.

// Helpers outside of #[test] functions unwrap too.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Bed, Guest, POLLUX, eventually, host};
use pollux::api::links::{
    MeetingState, MeetingStatus, PairStatus, RotationState, RotationStatus, TestReport, TestState,
    TestStatus,
};
use pollux::api::types::HostInfo;
use pollux::lab::Lab;
use pollux::lab::daemons::{link_addrs, wait_daemon};
use std::process::{Child, Command, Output, Stdio};

/// Two hosts whose daemons run and that know nothing of each other.
fn strangers() -> Bed {
    let lab = Lab::up(Bed::spec()).unwrap();
    let bed = Bed { lab };
    for name in ["a", "b"] {
        wait_daemon(&bed.socket(name)).unwrap();
    }
    bed
}

const fn other(name: &str) -> &'static str {
    if name.as_bytes()[0] == b'a' { "b" } else { "a" }
}

/// The lab's link as that host writes it.
fn pair_of(bed: &Bed, name: &str) -> String {
    let links = link_addrs(bed.lab.host(&host(name)).unwrap(), &host(other(name)));
    format!("{}={}", links[0].local.ip(), links[0].peer.ip())
}

fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[track_caller]
fn done(out: &Output) -> String {
    assert!(
        out.status.success(),
        "{}{}",
        stdout(out),
        String::from_utf8_lossy(&out.stderr)
    );
    stdout(out)
}

#[track_caller]
fn refused(out: &Output, parts: &[&str]) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{}{said}", stdout(out));
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
}

#[track_caller]
fn json<T: serde::de::DeserializeOwned>(out: &Output) -> T {
    serde_json::from_str(&done(out)).unwrap()
}

fn spawn(bed: &Bed, name: &str, args: &[&str]) -> Child {
    Command::new(POLLUX)
        .arg("--api")
        .arg(bed.socket(name))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn connected(bed: &Bed, name: &str) {
    let api = bed.api(name);
    eventually("they are connected", || {
        api.status()
            .partners
            .iter()
            .any(|p| p.connected)
            .then_some(())
    });
}

/// Both hosts wait for each other; what they show.
fn meet(bed: &Bed) -> (MeetingStatus, MeetingStatus) {
    let (at_a, at_b) = (pair_of(bed, "a"), pair_of(bed, "b"));
    let on_a = spawn(bed, "a", &["--json", "link", "create", "--link", &at_a]);
    let on_b = bed.cli("b", &["--json", "link", "create", "--link", &at_b]);
    (json(&on_a.wait_with_output().unwrap()), json(&on_b))
}

#[test]
fn two_hosts_compare_a_code_and_pin_each_other() {
    let bed = strangers();
    let (at_a, at_b) = (pair_of(&bed, "a"), pair_of(&bed, "b"));
    refused(
        &bed.cli("a", &["link", "create", "--cancel"]),
        &["waits for nobody"],
    );
    let (a, b) = meet(&bed);
    assert_eq!((a.state, b.state), (MeetingState::Code, MeetingState::Code));
    assert_eq!(a.code, b.code);
    assert_eq!((a.partner, b.partner), (Some(host("b")), Some(host("a"))));
    assert!(
        bed.api("a").status().partners.is_empty(),
        "nothing is pinned without a person"
    );

    // A wrong code pins nothing and cannot be tried again.
    let wrong = if a.code.as_deref() == Some("0000 0001") {
        "0000 0002"
    } else {
        "0000 0001"
    };
    let yes = |name: &str, pair: &str, code: &str| {
        bed.cli(
            name,
            &["link", "create", "--link", pair, "--yes-code", code],
        )
    };
    refused(
        &yes("a", &at_a, wrong),
        &["codes differ", "nothing was pinned"],
    );
    let over: MeetingStatus = bed.api("a").get("/v1/meeting").unwrap();
    assert_eq!(over.state, MeetingState::Failed);
    done(&bed.cli("b", &["link", "create", "--cancel"]));
    assert!(bed.api("a").status().partners.is_empty());

    // Begun again, the code is another one.
    let (again, _) = meet(&bed);
    assert_ne!(again.code, a.code);
    let code = again.code.unwrap();
    let pinned = done(&yes("a", &at_a, &code));
    assert!(pinned.contains("b is pinned here"), "{pinned}");
    done(&yes("b", &at_b, &code.replace(' ', "")));
    connected(&bed, "a");
    connected(&bed, "b");
    refused(
        &bed.cli("a", &["link", "create", "a", "b", "--lab", "no-such-lab"]),
        &["no-such-lab"],
    );
    let list = done(&bed.cli("a", &["link", "list"]));
    assert!(list.contains("connected") && list.contains(" up"), "{list}");
    let shown = done(&bed.cli("a", &["link", "show", "b"]));
    let b_is = bed
        .api("b")
        .get::<HostInfo>("/v1/host")
        .unwrap()
        .fingerprint;
    assert!(
        shown.contains(&b_is) && shown.contains("session up"),
        "{shown}"
    );
    let shown: PairStatus = json(&bed.cli("a", &["--json", "link", "show", "b"]));
    assert_eq!((shown.pinned, shown.links.len()), (vec![b_is], 1));
    refused(
        &bed.cli("a", &["link", "show", "c"]),
        &["no link to c", "links to: b"],
    );
}

#[test]
fn two_hosts_are_linked_by_file_by_sockets_and_not_twice() {
    let bed = strangers();
    let files = tempfile::tempdir().unwrap();
    let at = |name: &str| files.path().join(format!("{name}.link"));
    for name in ["a", "b"] {
        let out = bed.cli(name, &["link", "export", "--link", &pair_of(&bed, name)]);
        std::fs::write(at(name), done(&out)).unwrap();
    }
    for name in ["a", "b"] {
        let file = at(other(name)).display().to_string();
        let said = done(&bed.cli(name, &["link", "create", "--file", &file]));
        assert!(said.contains(&format!("--partner {name}")), "{said}");
        refused(
            &bed.cli(name, &["link", "create", "--file", &file]),
            &["pinned already", "pollux link remove"],
        );
    }
    connected(&bed, "a");
    std::fs::write(at("a"), "version = 7\n").unwrap();
    let file = at("a").display().to_string();
    refused(
        &bed.cli("b", &["link", "create", "--file", &file]),
        &["a.link is not a link file", "pollux link export"],
    );
    refused(
        &bed.cli("b", &["link", "create", "--file", "/no/such.link"]),
        &["/no/such.link", "pollux link export"],
    );
    refused(
        &bed.cli("b", &["link", "create"]),
        &["no link given", "--link LOCAL=PEER"],
    );

    for name in ["a", "b"] {
        done(&bed.cli(name, &["link", "remove", other(name)]));
        refused(
            &bed.cli(name, &["link", "remove", other(name)]),
            &["has no link to"],
        );
    }
    // The command asks neither daemon named by --api here.
    let (a, b) = (bed.socket("a"), bed.socket("b"));
    let out = bed.cli(
        "a",
        &[
            "link",
            "create",
            a.to_str().unwrap(),
            b.to_str().unwrap(),
            "--link",
            &pair_of(&bed, "a"),
        ],
    );
    done(&out);
    connected(&bed, "b");
}

#[test]
fn a_pair_is_tested_and_told_what_it_means() {
    let bed = strangers();
    refused(
        &bed.cli("a", &["link", "test", "b"]),
        &["no link to b", "pollux link create"],
    );
    let (a, b) = (bed.socket("a"), bed.socket("b"));
    let sockets = [a.to_str().unwrap(), b.to_str().unwrap()];
    let pair = pair_of(&bed, "a");
    done(&bed.cli(
        "a",
        &["link", "create", sockets[0], sockets[1], "--link", &pair],
    ));
    connected(&bed, "a");
    connected(&bed, "b");

    let report: TestReport =
        json(&bed.cli("a", &["--json", "link", "test", "b", "--seconds", "1"]));
    assert!(report.full, "nothing is mirrored: nobody to leave room for");
    assert!(report.together.goodput_bytes_per_s > 0, "{report:?}");
    assert!(report.together.large_epoch_us.p50 >= report.together.small_epoch_us.p50);
    assert_eq!(report.links.len(), 1);
    assert!(report.meaning.dirty_pages_per_s > 0);
    let out = bed.cli("b", &["link", "test", "a", "--seconds", "1"]);
    let text = done(&out);
    for part in ["link test with a", "goodput", "Replication lag", "pages"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert!(
        out.stderr.is_empty(),
        "no progress bar without a terminal: {}",
        String::from_utf8_lossy(&out.stderr)
    );

    // One at a time, and Ctrl-C ends it.
    let long = spawn(&bed, "a", &["link", "test", "b", "--seconds", "120"]);
    let running = || bed.api("a").get::<TestStatus>("/v1/links/b/test");
    eventually("the long test runs", || {
        running().ok().filter(|s| s.state == TestState::Running)
    });
    refused(
        &bed.cli("a", &["link", "test", "b", "--seconds", "1"]),
        &["under way already", "--cancel"],
    );
    let pid = nix::unistd::Pid::from_raw(i32::try_from(long.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = long.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{ended:?}");
    assert_eq!(running().unwrap().state, TestState::Cancelled);
    // Nothing of it stays, at the partner either.
    eventually("the next one is served", || {
        let out = bed.cli("a", &["--json", "link", "test", "b", "--seconds", "1"]);
        out.status.success().then_some(())
    });

    bed.lab.power_cut(&host("b")).unwrap();
    eventually("the session is down", || {
        (!bed.api("a").status().partners[0].connected).then_some(())
    });
    refused(
        &bed.cli("a", &["link", "test", "b"]),
        &["interconnect to b is down", "pollux link show b"],
    );
}

#[test]
fn a_test_leaves_room_to_mirrored_vms() {
    let bed = Bed::up();
    let vm = bed.vm(&Guest::new());
    let mut client = vm.start();
    client.count_on(0, 3);
    bed.api("a").protect(&vm.name).unwrap();
    bed.api("a").wait_mirrored(&vm.name);
    let report: TestReport =
        json(&bed.cli("a", &["--json", "link", "test", "b", "--seconds", "2"]));
    assert!(!report.full, "{report:?}");
    let report: TestReport = json(&bed.cli(
        "b",
        &["--json", "link", "test", "a", "--seconds", "1", "--full"],
    ));
    assert!(report.full);
    let status = bed.api("a").wait_mirrored(&vm.name);
    assert_eq!(
        status.generation,
        bed.api("a").vm(&vm.name).unwrap().generation
    );
    client.count_on(3, 3);
    client.check(1);
}

fn rotation(bed: &Bed, name: &str) -> RotationStatus {
    bed.api(name).get("/v1/rotation").unwrap()
}

fn shown(bed: &Bed, name: &str) -> PairStatus {
    bed.api(name)
        .get(&format!("/v1/links/{}/status", other(name)))
        .unwrap()
}

/// Sessions that came up so far, as the pair's events tell.
fn sessions(bed: &Bed, name: &str) -> usize {
    let events = shown(bed, name).events;
    events
        .iter()
        .filter(|e| e.what.starts_with("session up"))
        .count()
}

#[test]
fn a_host_changes_its_key_under_a_mirrored_vm() {
    let bed = Bed::up();
    let vm = bed.vm(&Guest::new());
    let mut client = vm.start();
    client.count_on(0, 3);
    bed.api("a").protect(&vm.name).unwrap();
    let before = bed.api("a").wait_mirrored(&vm.name);
    let came_up = (sessions(&bed, "a"), sessions(&bed, "b"));
    let fingerprint = |name: &str| {
        bed.api(name)
            .get::<HostInfo>("/v1/host")
            .unwrap()
            .fingerprint
    };
    for name in ["a", "b", "a"] {
        let old = fingerprint(name);
        let said = done(&bed.cli(name, &["link", "rotate"]));
        let new = fingerprint(name);
        assert_ne!(old, new);
        assert!(said.contains(&new), "{said}");
        eventually("the partner has the new key alone", || {
            (shown(&bed, other(name)).pinned == [new.clone()]).then_some(())
        });
        let file = bed
            .lab
            .host(&host(name))
            .unwrap()
            .state_dir
            .join("identity");
        let files: Vec<_> = std::fs::read_dir(file).unwrap().flatten().collect();
        assert_eq!(files.len(), 1, "{files:?}");
    }
    assert_eq!(
        (sessions(&bed, "a"), sessions(&bed, "b")),
        came_up,
        "no session was interrupted"
    );
    let after = bed.api("a").wait_mirrored(&vm.name);
    assert_eq!(
        (after.generation, after.qemu_pid),
        (before.generation, before.qemu_pid)
    );
    client.count_on(3, 3);
    client.check(1);

    // The new keys are what a restarted host comes back with.
    drop(client);
    bed.lab.power_cut(&host("b")).unwrap();
    bed.lab.power_on(&host("b")).unwrap();
    wait_daemon(&bed.socket("b")).unwrap();
    connected(&bed, "b");
}

#[test]
fn a_key_change_waits_for_a_partner_that_is_away() {
    let bed = Bed::up();
    connected(&bed, "a");
    let present = rotation(&bed, "a").present;
    bed.lab.power_cut(&host("b")).unwrap();
    eventually("the session is down", || {
        (!bed.api("a").status().partners[0].connected).then_some(())
    });
    let status: RotationStatus = json(&bed.cli("a", &["--json", "link", "rotate", "--no-wait"]));
    assert_eq!(
        (status.state, &status.present),
        (RotationState::Telling, &present)
    );
    let text = done(&bed.cli("a", &["link", "rotate", "--status"]));
    assert!(
        text.contains("b: is not connected") && text.contains("pollux link remove b"),
        "{text}"
    );
    // Given up, the present key stays.
    done(&bed.cli("a", &["link", "rotate", "--give-up"]));
    refused(
        &bed.cli("a", &["link", "rotate", "--give-up"]),
        &["no change of this host's key"],
    );
    assert_eq!(rotation(&bed, "a").present, present);

    // Begun again, it survives this host's own end, and goes on when b is back.
    let status: RotationStatus = json(&bed.cli("a", &["--json", "link", "rotate", "--no-wait"]));
    let next = status.next.unwrap();
    bed.lab.power_cut(&host("a")).unwrap();
    bed.lab.power_on(&host("a")).unwrap();
    wait_daemon(&bed.socket("a")).unwrap();
    let status = rotation(&bed, "a");
    assert_eq!(
        (status.state, status.present, status.next),
        (RotationState::Telling, present, Some(next.clone()))
    );
    bed.lab.power_on(&host("b")).unwrap();
    wait_daemon(&bed.socket("b")).unwrap();
    eventually("the change is done", || {
        (rotation(&bed, "a").present == next).then_some(())
    });
    eventually("b has the new key alone", || {
        (shown(&bed, "b").pinned == [next.clone()]).then_some(())
    });
    connected(&bed, "b");
}
