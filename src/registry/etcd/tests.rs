//! The registry in one etcd: the common suite, and every way an answer can fail to come.

use super::testbed::{Cluster, Impostor, PATIENCE, make_certificates, read_request};
use super::{
    CasOutcome, EtcdConfigError, EtcdOptions, EtcdRegistry, PAGE_KEYS, Registry, RegistryError,
    Revision, Space, VALUE_BYTES_MAX, WatchEnd, wire,
};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;
use tokio::runtime::Runtime;

crate::registry::suite::registry_suite!(Cluster::start(1));

/// A deadline for what never comes.
pub(super) const SHORT: Duration = Duration::from_millis(300);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn open(runtime: &Runtime, urls: &[String], deadline: Duration) -> EtcdRegistry {
    let options = EtcdOptions {
        deadline,
        ..EtcdOptions::new("test", urls.to_vec())
    };
    EtcdRegistry::new(&options, runtime.handle().clone()).unwrap()
}

/// A URL where nobody listens.
fn nobody() -> String {
    let probe = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", probe.local_addr().unwrap())
}

fn won(version: u64) -> CasOutcome {
    CasOutcome::Won { version }
}

pub(super) fn assert_not_done(outcome: Result<impl std::fmt::Debug, RegistryError>, part: &str) {
    let error = outcome.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, RegistryError::NotDone { .. }), "{text}");
    assert!(text.contains(part), "{text}");
}

fn assert_unknown(outcome: Result<impl std::fmt::Debug, RegistryError>, part: &str) {
    let error = outcome.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, RegistryError::Unknown { .. }), "{text}");
    assert!(text.contains(part), "{text}");
}

fn http(status: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

#[test]
fn an_etcd_that_is_down_has_done_nothing() {
    let runtime = runtime();
    let mut registry = open(&runtime, &[nobody(), nobody()], PATIENCE);
    let cas = registry.compare_and_set("k", None, b"v");
    assert_not_done(cas, "Connection refused");
    assert_not_done(registry.read("k"), "Connection refused");
    assert_not_done(registry.list(""), "Connection refused");
}

#[test]
fn a_member_that_is_down_is_passed_over() {
    let cluster = Cluster::start(1);
    let mut options = cluster.options(&[0]);
    options.endpoints.insert(0, nobody());
    options.endpoints.push(nobody());
    let mut registry = cluster.open_with(&options);
    assert_eq!(registry.compare_and_set("k", None, b"v").unwrap(), won(1));
    assert_eq!(registry.read("k").unwrap().unwrap().value, b"v");
}

#[test]
fn an_etcd_that_never_answers_is_given_up_and_a_write_to_it_is_unknown() {
    let runtime = runtime();
    let mut kept = Vec::new();
    let silent = Impostor::start(move |stream| kept.push(stream));
    let mut registry = open(&runtime, &[silent.url()], SHORT);
    assert_unknown(registry.compare_and_set("k", None, b"v"), "in time");
    assert_not_done(registry.read("k"), "in time");
    assert_not_done(registry.list(""), "in time");
    let mut watch = registry.watch_from(Space::Keys, "", Revision(1));
    let error = watch.next(SHORT).unwrap_err();
    assert!(matches!(error, WatchEnd::NotNow(_)), "{error}");
}

#[test]
fn a_silent_member_leaves_time_to_read_from_another() {
    let cluster = Cluster::start(1);
    let mut kept = Vec::new();
    let silent = Impostor::start(move |stream| kept.push(stream));
    cluster.registry().compare_and_set("k", None, b"v").unwrap();
    let mut options = cluster.options(&[0]);
    options.endpoints.insert(0, silent.url());
    options.deadline = Duration::from_secs(2);
    let found = cluster.open_with(&options).read("k").unwrap();
    assert_eq!(found.unwrap().value, b"v");
}

#[test]
fn a_write_that_found_no_tls_partner_did_not_happen() {
    let runtime = runtime();
    let dir = tempfile::tempdir().unwrap();
    let mut kept = Vec::new();
    let silent = Impostor::start(move |stream| kept.push(stream));
    let options = EtcdOptions {
        tls: Some(make_certificates(dir.path(), Ipv4Addr::LOCALHOST)),
        deadline: SHORT,
        ..EtcdOptions::new("test", vec![format!("https://{}", silent.address)])
    };
    let mut registry = EtcdRegistry::new(&options, runtime.handle().clone()).unwrap();
    let cas = registry.compare_and_set("k", None, b"v");
    assert_not_done(cas, "no connection in time");
}

#[test]
fn garbage_is_no_answer_and_a_write_it_answers_is_unknown() {
    let header = r#"{"header":{"cluster_id":"1","revision":"1"}"#;
    let put = r#"{"response_put":{}}"#;
    let kv = r#"{"key":"eA==","value":"","version":"1","mod_revision":"1"}"#;
    let answers: Vec<Vec<u8>> = vec![
        b"\0\xff\x13garbage".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort".to_vec(),
        http("200 OK", "<html>hello</html>"),
        http("200 OK", "{}"),
        http("500 Internal Server Error", ""),
        http("404 Not Found", "404 page not found"),
        // An answer of etcd, to another question.
        http("200 OK", &format!(r#"{header},"succeeded":true}}"#)),
        http(
            "200 OK",
            &format!(r#"{header},"responses":[{put}],"more":true}}"#),
        ),
        http(
            "200 OK",
            &format!(
                r#"{header},"kvs":[{kv}],"responses":[{{"response_range":{{"kvs":[{kv}]}}}}]}}"#
            ),
        ),
        // Lost, and yet at the version that was expected.
        http(
            "200 OK",
            &format!(r#"{header},"more":true,"responses":[{{"response_range":{{}}}}]}}"#),
        ),
    ];
    for (n, answer) in answers.into_iter().enumerate() {
        let runtime = runtime();
        let impostor = Impostor::answering(answer);
        let mut registry = open(&runtime, &[impostor.url()], SHORT);
        let cas = registry.compare_and_set("k", None, b"v");
        assert!(
            matches!(cas, Err(RegistryError::Unknown { .. })),
            "{n}: {cas:?}"
        );
        let listed = registry.list("");
        assert!(
            matches!(listed, Err(RegistryError::NotDone { .. })) || n == 6,
            "{n}: {listed:?}"
        );
        let mut watch = registry.watch_from(Space::Keys, "", Revision(1));
        let told = watch.next(SHORT);
        assert!(matches!(told, Err(WatchEnd::NotNow(_))), "{n}: {told:?}");
    }
}

#[test]
fn an_answer_without_end_is_cut_off() {
    let runtime = runtime();
    let flood = Impostor::start(|mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let chunk = [b"10000\r\n".to_vec(), vec![b' '; 0x10000], b"\r\n".to_vec()].concat();
        while stream.write_all(&chunk).is_ok() {}
    });
    let mut registry = open(&runtime, &[flood.url()], PATIENCE);
    assert_unknown(registry.compare_and_set("k", None, b"v"), "limit");
    assert_not_done(registry.read("k"), "limit");
    let mut watch = registry.watch_from(Space::Keys, "", Revision(1));
    super::testbed::until("the end of a line without end", || {
        let error = watch.next(SHORT).unwrap_err().to_string();
        error.contains("exceeds").then_some(())
    });
}

#[test]
fn a_refusal_is_known_and_a_time_out_is_not() {
    let runtime = runtime();
    let answer = |message: &str| {
        let body = format!(r#"{{"error":"{message}","message":"{message}","code":14}}"#);
        Impostor::answering(http("503 Service Unavailable", &body))
    };
    for (message, known) in [
        ("etcdserver: mvcc: database space exceeded", true),
        ("etcdserver: request timed out", false),
        ("etcdserver: server stopped", false),
    ] {
        let impostor = answer(message);
        let mut registry = open(&runtime, &[impostor.url()], PATIENCE);
        let cas = registry.compare_and_set("k", None, b"v");
        match known {
            true => assert_not_done(cas, message),
            false => assert_unknown(cas, message),
        }
    }
}

#[test]
fn a_write_waits_for_a_leader_and_is_sent_to_it_once() {
    let cluster = Cluster::start(1);
    let to = cluster.address(0);
    let mut refusals = 3;
    // A member that has no leader at first, and then asks etcd.
    let etcd = Impostor::start(move |mut stream| {
        let request = read_request(&mut stream);
        if refusals > 0 {
            refusals -= 1;
            let body = r#"{"error":"etcdserver: no leader","code":14}"#;
            let _ = stream.write_all(&http("503 Service Unavailable", body));
            return;
        }
        let mut etcd = TcpStream::connect(to).unwrap();
        etcd.write_all(&request).unwrap();
        let mut answer = vec![0; 4096];
        let length = etcd.read(&mut answer).unwrap();
        let _ = stream.write_all(&answer[..length]);
    });
    let runtime = runtime();
    let mut registry = open(&runtime, &[etcd.url()], PATIENCE);
    assert_eq!(registry.compare_and_set("k", None, b"v").unwrap(), won(1));
}

#[test]
fn a_write_whose_answer_was_lost_is_unknown_and_a_read_finds_it() {
    let cluster = Cluster::start(1);
    let to = cluster.address(0);
    // Hands each request on, waits for the answer, and hangs up instead of giving it.
    let thief = Impostor::start(move |mut stream| {
        let request = read_request(&mut stream);
        let mut etcd = TcpStream::connect(to).unwrap();
        etcd.write_all(&request).unwrap();
        assert!(etcd.read(&mut [0; 4096]).unwrap() > 0);
    });
    let mut options = cluster.options(&[0]);
    options.endpoints.insert(0, thief.url());
    let mut registry = cluster.open_with(&options);
    assert_unknown(registry.compare_and_set("k", None, b"v"), "broke");
    let there = cluster.registry().read("k").unwrap().unwrap();
    assert_eq!((there.version, &there.value[..]), (1, &b"v"[..]));
    // The same registry goes on by another member.
    assert_eq!(registry.read("k").unwrap(), Some(there));
}

#[test]
fn a_connection_that_ended_between_two_calls_makes_nothing_unknown() {
    let mut cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    for version in 1..=3 {
        let expected = Some(version - 1).filter(|v| *v > 0);
        let outcome = registry.compare_and_set("k", expected, b"v");
        assert_eq!(outcome.unwrap(), won(version));
        cluster.kill(0);
        assert_not_done(registry.compare_and_set("k", Some(version), b"w"), "etcd");
        cluster.run(0);
        cluster.wait_ready(0);
    }
}

#[test]
fn certificates_of_both_sides_are_asked_for() {
    let cluster = Cluster::with_tls();
    let mut registry = cluster.registry();
    assert_eq!(registry.compare_and_set("k", None, b"v").unwrap(), won(1));

    let other = tempfile::tempdir().unwrap();
    let strangers = make_certificates(
        other.path(),
        *match cluster.address(0).ip() {
            std::net::IpAddr::V4(ref ip) => ip,
            std::net::IpAddr::V6(_) => unreachable!(),
        },
    );
    let refused = |change: &dyn Fn(&mut super::EtcdTls)| {
        let mut options = cluster.options(&[0]);
        change(options.tls.as_mut().unwrap());
        let mut registry = cluster.open_with(&options);
        let cas = registry.compare_and_set("stranger", None, b"v");
        assert_not_done(cas, "TLS failed");
        assert_not_done(registry.read("k"), "TLS failed");
    };
    // Another authority than the one that signed etcd's; etcd's own judgement of a host without
    // a certificate, and with a stranger's. Nothing is sent.
    refused(&|tls| tls.ca = strangers.ca.clone());
    refused(&|tls| tls.client = None);
    refused(&|tls| tls.client = strangers.client.clone());
    assert_eq!(registry.read("stranger").unwrap(), None);
}

#[test]
fn an_etcd_of_another_cluster_or_with_an_older_memory_is_not_believed() {
    let runtime = runtime();
    let answer = |cluster: u64, revision: u64| {
        let header = format!(r#"{{"cluster_id":"{cluster}","revision":"{revision}"}}"#);
        http("200 OK", &format!(r#"{{"header":{header}}}"#))
    };
    let mut answers = vec![
        answer(1, 9),
        answer(1, 9),
        answer(2, 10),
        answer(1, 9),
        answer(1, 8),
    ]
    .into_iter();
    let etcd = Impostor::start(move |mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(&answers.next().unwrap());
    });
    let mut registry = open(&runtime, &[etcd.url()], PATIENCE);
    assert_eq!(registry.read("k").unwrap(), None);
    assert_eq!(registry.read("k").unwrap(), None);
    assert_not_done(registry.read("k"), "cluster 2");
    assert_eq!(registry.read("k").unwrap(), None);
    assert_not_done(registry.read("k"), "revision 8");
    // From then on it is not even asked; the impostor has no further answer.
    assert_not_done(registry.compare_and_set("k", None, b"v"), "revision 8");
}

#[test]
fn a_listing_of_many_pages_is_whole() {
    const PAGES: usize = 3;
    let cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    let big = vec![7; VALUE_BYTES_MAX];
    for n in 0..PAGE_KEYS * PAGES {
        let key = format!("vm/{n:04}");
        let value: &[u8] = if n < PAGE_KEYS { &big } else { b"v" };
        registry.compare_and_set(&key, None, value).unwrap();
    }
    let listed = registry.list("vm/").unwrap();
    assert_eq!(listed.len(), PAGE_KEYS * PAGES);
    assert!(listed.is_sorted_by(|a, b| a.0 < b.0));
    assert!(listed[..PAGE_KEYS].iter().all(|(_, v)| v.value == big));
    assert!(listed.iter().all(|(_, v)| v.version == 1));
}

#[test]
fn every_page_of_a_listing_is_of_the_moment_of_the_first() {
    let runtime = runtime();
    let page = |revision: u64, key: &str, more: bool| {
        let key = wire::base64(format!("/pollux/test/keys/{key}").as_bytes());
        let kv = format!(r#"{{"key":"{key}","version":"1","mod_revision":"1"}}"#);
        let header = format!(r#"{{"cluster_id":"1","revision":"{revision}"}}"#);
        http(
            "200 OK",
            &format!(r#"{{"header":{header},"kvs":[{kv}],"more":{more}}}"#),
        )
    };
    let mut pages = vec![page(7, "a", true), page(9, "b", true), page(9, "c", false)].into_iter();
    let (tell, asked) = std::sync::mpsc::channel();
    let etcd = Impostor::start(move |mut stream| {
        let request = String::from_utf8(read_request(&mut stream)).unwrap();
        let body = request.split_once("\r\n\r\n").unwrap().1;
        let ask: serde_json::Value = serde_json::from_str(body).unwrap();
        let _ = tell.send((ask["revision"].clone(), ask["key"].clone()));
        let _ = stream.write_all(&pages.next().unwrap());
    });
    let listed = open(&runtime, &[etcd.url()], PATIENCE).list("").unwrap();
    let keys: Vec<_> = listed.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["a", "b", "c"]);
    let asked: Vec<_> = asked.try_iter().collect();
    let after = |key: &str| wire::base64(format!("/pollux/test/keys/{key}").as_bytes());
    assert_eq!(
        asked,
        [
            ("0".into(), after("").into()),
            ("7".into(), after("a\0").into()),
            ("7".into(), after("b\0").into()),
        ]
    );
}

#[test]
fn pools_do_not_see_each_other() {
    let cluster = Cluster::start(1);
    let pool = |name: &str| {
        let mut options = cluster.options(&[0]);
        options.pool = name.into();
        cluster.open_with(&options)
    };
    for name in ["a", "a0", "b"] {
        let value = name.as_bytes();
        assert_eq!(
            pool(name).compare_and_set("k", None, value).unwrap(),
            won(1)
        );
    }
    let listed = pool("a").list("").unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].1.value, b"a");
}

#[test]
fn settings_that_cannot_be_meant_are_refused() {
    let runtime = runtime();
    let refuse =
        |options: EtcdOptions| EtcdRegistry::new(&options, runtime.handle().clone()).unwrap_err();
    let local = || vec!["http://127.0.0.1:2379".to_owned()];
    for pool in ["", "a/b", "Ä", &"a".repeat(64)] {
        let error = refuse(EtcdOptions::new(pool, local()));
        assert!(matches!(error, EtcdConfigError::Pool(..)), "{error}");
    }
    for count in [0, 17] {
        let error = refuse(EtcdOptions::new("p", vec![local().remove(0); count]));
        assert!(matches!(error, EtcdConfigError::Endpoints(_)), "{error}");
    }
    let error = refuse(EtcdOptions::new("p", vec!["https://10.0.0.1:2379".into()]));
    assert!(matches!(error, EtcdConfigError::NoAuthority(_)), "{error}");
}

/// Prints figures; run it alone:
/// `cargo test -p pollux --lib -- --ignored --nocapture registry::etcd::tests::latency`
#[test]
#[ignore = "measures, checks nothing"]
fn latency_of_one_compare_and_set() {
    let cluster = Cluster::start(1);
    let mut registry = cluster.registry();
    let mut took: Vec<Duration> = (0..600u64)
        .map(|version| {
            let expected = Some(version).filter(|v| *v > 0);
            let from = std::time::Instant::now();
            registry.compare_and_set("k", expected, &[7; 512]).unwrap();
            from.elapsed()
        })
        .collect();
    took.sort();
    println!("p50 {:?} p99 {:?} of {}", took[300], took[594], took.len());
}
