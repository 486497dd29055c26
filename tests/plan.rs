//! The planner at the command line: the real binary on the pools of tests/pools. No root, no
//! daemon, no guest.

// Helpers outside of #[test] functions unwrap too.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::process::{Command, Output};

fn plan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pollux"))
        .arg("plan")
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

fn json(args: &[&str]) -> Value {
    let out = plan(&[args, &["--json"]].concat());
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

const SAFE: &str = "tests/pools/scattered.toml";
const SHOP: &str = "tests/pools/shop.toml";
const TOO_MANY: &str = "tests/pools/one-too-many.toml";

#[test]
fn each_pool_is_answered_and_the_exit_status_tells() {
    let safe = plan(&["check", "--pool", SAFE, SHOP, "tests/pools/mixed-12.toml"]);
    assert!(safe.status.success());
    says(
        &text(&safe),
        &["SURVIVES any 2 host failures", "the proof was verified"],
    );
    let bad = plan(&["check", "--pool", SAFE, TOO_MANY]);
    assert!(!bad.status.success());
    says(
        &text(&bad),
        &[
            "OVERCOMMITTED",
            "If a fails",
            "2 GiB of memory too little",
            "app",
            "pollux plan explain",
        ],
    );
    let both = json(&["check", "--pool", SAFE, TOO_MANY]);
    assert_eq!(both[0]["answer"], "survives");
    assert_eq!(both[0]["verified"], true);
    assert_eq!(both[1]["answer"], "overcommitted");
    assert_eq!(both[1]["failing"]["failed"][0], "a");
}

#[test]
fn an_overcommitted_pool_is_explained_and_the_advice_holds() {
    let out = plan(&["explain", "--pool", TOO_MANY]);
    says(
        &text(&out),
        &[
            "FREE",
            "What makes it safe again",
            "changed protections",
            "VMs stopped (1",
        ],
    );
    let explained = json(&["explain", "--pool", TOO_MANY]);
    let stop = explained[0]["advice"]["stops"]["steps"][0]["vm"]
        .as_str()
        .unwrap();
    let then = plan(&["whatif", "--pool", TOO_MANY, "--stop", stop]);
    assert!(then.status.success());
    says(&text(&then), &["ADMITTED", "survived again"]);
}

#[test]
fn the_proof_is_written_and_names_every_set() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proof.json");
    let out = plan(&[
        "check",
        "--pool",
        SAFE,
        "--certificate",
        path.to_str().unwrap(),
    ]);
    assert!(out.status.success());
    let proof: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(proof["sets"].as_array().unwrap().len(), 6);
}

#[test]
fn the_largest_number_is_told_for_both_classes() {
    let most = json(&["max", "--pool", SHOP]);
    assert_eq!(most[0]["classes"][0]["survives"], 2);
    assert_eq!(most[0]["classes"][1]["survives"], 1);
    says(
        &text(&plan(&["max", "--pool", SHOP])),
        &["survives 2 of 4 hosts", "STAYS DOWN"],
    );
}

#[test]
fn a_restart_is_planned_in_order() {
    let out = plan(&["restart", "--pool", SHOP, "--dead", "north-1"]);
    assert!(out.status.success());
    says(
        &text(&out),
        &[
            "placed by the proof",
            "orders-db goes on at its standby on south-1",
            "after cache",
        ],
    );
    let starts = json(&["restart", "--pool", SHOP, "--dead", "north-1"])["starts"].clone();
    assert_eq!(starts[0]["vm"], "cache");
    assert_eq!(starts[1]["vm"], "web-1");
    assert_eq!(starts[1]["after_s"], 10);
    // The other web VM runs there.
    assert_ne!(starts[1]["host"], "south-2");
    let wrong = plan(&["restart", "--pool", SHOP, "--dead", "east-1"]);
    assert!(!wrong.status.success());
    says(
        &String::from_utf8_lossy(&wrong.stderr),
        &["no host `east-1`", "north-1"],
    );
}

#[test]
fn a_change_is_judged_before_it_is_made() {
    let whatif = |change: &[&str]| plan(&[&["whatif", "--pool", SHOP], change].concat());
    assert!(
        whatif(&["--start", "crm", "--memory", "24 GiB"])
            .status
            .success()
    );
    let grown = whatif(&["--resize", "search=40 GiB"]);
    assert!(!grown.status.success());
    says(
        &text(&grown),
        &["REFUSED", "`search` needs 40 GiB of memory", "32 GiB"],
    );
    says(
        &text(&whatif(&["--maintenance", "north-2"])),
        &["ADMITTED", "`search` moves to"],
    );
    let unknown = whatif(&["--stop", "nobody"]);
    says(&text(&unknown), &["REFUSED", "`nobody`"]);
    let none = whatif(&[]);
    assert!(!none.status.success());
}

#[test]
fn a_random_pool_can_be_read_back() {
    let dir = tempfile::tempdir().unwrap();
    for (name, more) in [("pool.toml", &[][..]), ("pool.json", &["--json"][..])] {
        let made = plan(
            &[
                &[
                    "random", "--hosts", "6", "--seed", "3", "--mixed", "-r", "1",
                ],
                more,
            ]
            .concat(),
        );
        let again = plan(
            &[
                &[
                    "random", "--hosts", "6", "--seed", "3", "--mixed", "-r", "1",
                ],
                more,
            ]
            .concat(),
        );
        assert_eq!(made.stdout, again.stdout);
        let path = dir.path().join(name);
        std::fs::write(&path, made.stdout).unwrap();
        let read = plan(&["max", "--pool", path.to_str().unwrap()]);
        assert!(
            read.status.success(),
            "{}",
            String::from_utf8_lossy(&read.stderr)
        );
    }
}

#[test]
fn what_is_wrong_with_a_file_is_said_all_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    let text = std::fs::read_to_string(TOO_MANY).unwrap();
    std::fs::write(&path, text.replace("host = \"a\"", "host = \"x\"")).unwrap();
    let out = plan(&["check", "--pool", path.to_str().unwrap()]);
    assert!(!out.status.success());
    says(
        &String::from_utf8_lossy(&out.stderr),
        &["2 things are wrong", "vm `db`", "vm `app`", "the host `x`"],
    );
    std::fs::write(&path, "tolerate = 1\n[[hosts]]\nname = \"a\"\n").unwrap();
    let out = plan(&["check", "--pool", path.to_str().unwrap()]);
    says(&String::from_utf8_lossy(&out.stderr), &["hosts", "line 2"]);
}
