use super::*;

const POOL: &str = r#"
tolerate = 1

[[host]]
name = "a"
memory = "64 GiB"
overhead = "4 GiB"
vcpus = 32
domain = "rack-1"
devices = { gpu = 1 }

[[host]]
name = "b"
memory = "64 GiB"
domain = "rack-1"

[[vm]]
name = "db"
memory = "16 GiB"
min_memory = "8 GiB"
host = "a"
standby = "b"
protection = "mirrored"

[[vm]]
name = "web"
memory = 1073741824
host = "b"
priority = "best-effort"
after = ["db"]
hosts = ["a", "b"]

[[group]]
name = "pair"
rule = "apart"
vms = ["db", "web"]
"#;

fn faults(text: &str) -> String {
    Pool::parse(text, "p.toml").unwrap_err().to_string()
}

#[test]
fn a_pool_is_read_and_written_in_both_forms() {
    let pool = Pool::parse(POOL, "p").unwrap();
    assert_eq!(pool.vms[1].memory, Bytes::gib(1));
    assert_eq!(Pool::parse(&pool.to_toml(), "p").unwrap(), pool);
    assert_eq!(Pool::parse(&pool.to_json(), "p").unwrap(), pool);
    assert!(pool.to_toml().contains("memory = \"1 GiB\""));
}

#[test]
fn sizes_are_exact_in_files_and_short_on_screen() {
    let odd = Bytes((16 << 30) + (1 << 10));
    assert_eq!(odd.to_string(), "16.0 GiB");
    let text = serde_json::to_string(&odd).unwrap();
    assert_eq!(serde_json::from_str::<Bytes>(&text).unwrap(), odd);
    assert_eq!("3 MiB".parse::<Bytes>().unwrap(), Bytes(3 << 20));
    assert!("3 GB".parse::<Bytes>().unwrap_err().contains("GiB"));
    assert!("99999999999 TiB".parse::<Bytes>().is_err());
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let text = faults(&POOL.replace("standby =", "standbi ="));
    assert!(
        text.contains("standbi") && text.contains("standby") && text.contains("line"),
        "{text}"
    );
}

#[test]
fn every_reference_is_checked() {
    for (from, to, parts) in [
        ("host = \"a\"", "host = \"c\"", &["vm `db`", "host `c`"][..]),
        (
            "standby = \"b\"",
            "standby = \"a\"",
            &["vm `db`", "one failure"],
        ),
        ("\"mirrored\"", "\"restart\"", &["vm `db`", "standby"]),
        (
            "after = [\"db\"]",
            "after = [\"dc\"]",
            &["vm `web`", "`dc`"],
        ),
        (
            "vms = [\"db\", \"web\"]",
            "vms = [\"db\", \"x\"]",
            &["group `pair`", "`x`"],
        ),
        ("name = \"b\"", "name = \"a\"", &["host `a`", "unique"]),
        ("name = \"web\"", "name = \"db\"", &["vm `db`", "unique"]),
        (
            "min_memory = \"8 GiB\"",
            "min_memory = \"80 GiB\"",
            &["vm `db`", "min_memory"],
        ),
        (
            "overhead = \"4 GiB\"",
            "overhead = \"65 GiB\"",
            &["host `a`", "overhead"],
        ),
        (
            "hosts = [\"a\", \"b\"]",
            "hosts = []",
            &["vm `web`", "nowhere"],
        ),
        (
            "hosts = [\"a\", \"b\"]",
            "devices = { fpga = 1 }",
            &["vm `web`", "`fpga`"],
        ),
        (
            "memory = \"16 GiB\"",
            "memory = \"65 TiB\"",
            &["vm `db`", "64 TiB"],
        ),
        ("name = \"web\"", "name = \"Web\"", &["vm `Web`", "a-z"]),
    ] {
        assert!(POOL.contains(from), "{from}");
        let text = faults(&POOL.replacen(from, to, 1));
        for part in parts {
            assert!(
                text.contains(part),
                "{from} -> {to}: `{part}` not in {text}"
            );
        }
    }
}

#[test]
fn a_circle_of_starts_is_refused() {
    let text = faults(&POOL.replace("min_memory = \"8 GiB\"", "after = [\"web\"]"));
    assert!(
        text.contains("circle") && text.contains("db, web"),
        "{text}"
    );
}

#[test]
fn groups_that_contradict_each_other_are_refused() {
    let more = "\n[[group]]\nname = \"t\"\nrule = \"together\"\nvms = [\"db\", \"web\"]\n";
    let text = faults(&format!("{POOL}{more}"));
    assert!(
        text.contains("apart") && text.contains("together"),
        "{text}"
    );
}

#[test]
fn what_is_odd_is_remarked() {
    let mut pool = Pool::parse(POOL, "p").unwrap();
    let both = pool.remarks();
    assert!(
        both.iter().any(|r| r.contains("failure domain `rack-1`")),
        "{both:?}"
    );
    pool.hosts[0].memory = Bytes::gib(8);
    assert!(pool.check().is_empty());
    assert!(
        pool.remarks()
            .iter()
            .any(|r| r.contains("has given 16 GiB"))
    );
}
