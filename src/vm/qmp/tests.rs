//! The client against a scripted peer, which may say anything.

use super::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_millis(30);
const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

/// Starts a peer that runs `script` on its end after greeting and negotiation.
fn with_peer(
    script: impl FnOnce(&mut BufReader<UnixStream>, &mut UnixStream) + Send + 'static,
) -> (Qmp, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let peer = std::thread::spawn(move || {
        let mut write = theirs.try_clone().expect("clone");
        let mut read = BufReader::new(theirs);
        write.write_all(GREETING.as_bytes()).expect("greet");
        let negotiation = read_message(&mut read);
        assert_eq!(negotiation["execute"], "qmp_capabilities");
        answer(&mut write, &negotiation, &json!({}));
        script(&mut read, &mut write);
    });
    (Qmp::over(ours, PATIENCE).expect("greeting"), peer)
}

/// One message, up to the brace that closes it.
fn read_message(read: &mut BufReader<UnixStream>) -> Value {
    let mut text = Vec::new();
    loop {
        let before = text.len();
        read.read_until(b'}', &mut text).expect("read");
        assert!(text.len() > before, "the client closed");
        if let Ok(value) = serde_json::from_slice(&text) {
            return value;
        }
    }
}

fn answer(write: &mut UnixStream, to: &Value, with: &Value) {
    let line = json!({ "return": with, "id": to["id"] });
    write
        .write_all(format!("{line}\r\n").as_bytes())
        .expect("answer");
}

fn say(write: &mut UnixStream, line: &str) {
    write.write_all(line.as_bytes()).expect("say");
}

#[test]
fn events_between_question_and_answer_are_kept_in_order() {
    let (mut qmp, peer) = with_peer(|read, write| {
        let question = read_message(read);
        say(
            write,
            "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 2, \"microseconds\": 5}}\r\n",
        );
        say(
            write,
            "{\"event\": \"RESET\", \"data\": {\"guest\": true}}\r\n",
        );
        answer(write, &question, &json!({"status": "paused"}));
        say(write, "{\"event\": \"RESUME\"}\n");
    });
    let value = qmp.execute("query-status", Value::Null).expect("answer");
    assert_eq!(value["status"], "paused");
    peer.join().expect("peer");
    let stop = qmp.poll_event().expect("alive").expect("an event");
    assert_eq!((stop.name.as_str(), stop.at_us), ("STOP", 2_000_005));
    let resume = qmp.wait_event("RESUME", PATIENCE).expect("resume");
    assert_eq!(resume.data, Value::Null);
    let reset = qmp.poll_event().expect("alive").expect("an event");
    assert_eq!(reset.data, json!({"guest": true}));
    let closed = qmp.poll_event().expect_err("the peer is gone");
    assert!(closed.is_fatal());
}

#[test]
fn a_typed_command_runs_only_when_fired() {
    let (mut qmp, peer) = with_peer(|read, write| {
        write.set_read_timeout(Some(SOON)).expect("timeout");
        let mut text = Vec::new();
        let early = read.read_until(b'\n', &mut text);
        assert!(early.is_err(), "not finished yet: {early:?}");
        assert!(
            serde_json::from_slice::<Value>(&text).is_err(),
            "runs early"
        );
        write.set_read_timeout(None).expect("timeout");
        say(write, "{\"event\": \"TYPED\"}\r\n");
        text.push(read_byte(read));
        let question: Value = serde_json::from_slice(&text).expect("whole now");
        assert_eq!(question["execute"], "stop");
        answer(write, &question, &json!({}));
    });
    qmp.arm("stop", Value::Null).expect("arm");
    assert!(qmp.is_armed());
    let busy = qmp.execute("cont", Value::Null).expect_err("busy");
    assert!(matches!(busy, QmpError::OutOfTurn { .. }));
    assert!(qmp.arm("cont", Value::Null).is_err());
    assert!(qmp.complete(SOON).is_err(), "not fired");
    qmp.wait_event("TYPED", PATIENCE).expect("typed");
    qmp.fire().expect("fire");
    assert!(qmp.fire().is_err(), "only once");
    qmp.complete(PATIENCE).expect("answer");
    assert!(!qmp.is_armed());
    peer.join().expect("peer");
}

fn read_byte(read: &mut BufReader<UnixStream>) -> u8 {
    let mut byte = [0];
    read.read_exact(&mut byte).expect("a byte");
    byte[0]
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let (mut qmp, peer) = with_peer(|read, write| {
        let first = read_message(read);
        let second = read_message(read);
        answer(write, &first, &json!("late"));
        answer(write, &second, &json!("right"));
    });
    let error = qmp
        .execute_within("slow", Value::Null, SOON)
        .expect_err("too slow");
    assert!(matches!(error, QmpError::Timeout { .. }) && !error.is_fatal());
    assert!(error.to_string().contains("`slow`"), "{error}");
    let value = qmp.execute("next", Value::Null).expect("answer");
    assert_eq!(value, "right");
    peer.join().expect("peer");
}

#[test]
fn refusals_carry_qemus_words() {
    let (mut qmp, peer) = with_peer(|read, write| {
        let id = read_message(read)["id"].clone();
        let error = json!({"class": "GenericError", "desc": "no disk"});
        let line = json!({ "error": error, "id": id });
        say(write, &format!("{line}\r\n"));
        // QEMU gives no id if it could not read the command.
        read_message(read);
        say(
            write,
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON\"}}\r\n",
        );
    });
    for words in ["no disk", "JSON"] {
        let error = qmp.execute("eject", Value::Null).expect_err("refused");
        assert!(matches!(error, QmpError::Refused { .. }));
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("`eject`"), "{error}");
    }
    peer.join().expect("peer");
}

#[test]
fn garbage_ends_the_connection_with_the_command_named() {
    for line in [
        "hello\r\n",
        "[1]\r\n",
        "{\"neither\": 1}\r\n",
        "\u{1F40E}\n",
    ] {
        let (mut qmp, peer) = with_peer(move |read, write| {
            read_message(read);
            say(write, line);
        });
        let error = qmp.execute("stop", Value::Null).expect_err("garbage");
        assert!(matches!(error, QmpError::Garbage { .. }), "{error}");
        assert!(error.to_string().contains("`stop`"), "{error}");
        let after = qmp.execute("cont", Value::Null).expect_err("over");
        assert!(matches!(after, QmpError::Closed { .. }), "{after}");
        peer.join().expect("peer");
    }
}

#[test]
fn a_line_without_end_is_cut_off() {
    let (mut qmp, peer) = with_peer(|read, write| {
        read_message(read);
        let chunk = vec![b'x'; 1 << 16];
        // Ends when the client has had enough and hangs up.
        while write.write_all(&chunk).is_ok() {}
    });
    let error = qmp.execute("stop", Value::Null).expect_err("endless");
    assert!(matches!(error, QmpError::LineTooLong { .. }), "{error}");
    drop(qmp);
    peer.join().expect("peer");
}

#[test]
fn a_peer_that_leaves_in_the_middle_is_closed() {
    let (mut qmp, peer) = with_peer(|read, write| {
        read_message(read);
        say(write, "{\"return\": {}, \"id\"");
    });
    let error = qmp.execute("stop", Value::Null).expect_err("gone");
    assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    peer.join().expect("peer");
}

#[test]
fn an_event_flood_drops_the_oldest() {
    const EXTRA: usize = 10;
    let (mut qmp, peer) = with_peer(|read, write| {
        let question = read_message(read);
        for n in 0..EVENTS_MAX + EXTRA {
            say(write, &format!("{{\"event\": \"E{n}\"}}\r\n"));
        }
        answer(write, &question, &json!({}));
    });
    qmp.execute("query-status", Value::Null).expect("answer");
    peer.join().expect("peer");
    assert_eq!(qmp.events_dropped(), EXTRA as u64);
    let first = qmp.poll_event().expect("held").expect("an event");
    assert_eq!(first.name, format!("E{EXTRA}"));
}

#[test]
fn no_monitor_and_no_greeting_are_told_apart() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("nobody");
    let error = Qmp::connect(&path, SOON).expect_err("nobody");
    assert!(matches!(error, QmpError::Connect { .. }));
    assert!(error.to_string().contains("nobody"), "{error}");
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    say(&mut theirs, "{\"return\": {}}\r\n");
    let error = Qmp::over(ours, PATIENCE).expect_err("no greeting");
    assert!(error.to_string().contains("(greeting)"), "{error}");
    let (ours, _silent) = UnixStream::pair().expect("pair");
    let error = Qmp::over(ours, SOON).expect_err("silence");
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
}

#[test]
fn a_descriptor_travels_with_its_command() {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let (file, mut other) = UnixStream::pair().expect("pair");
    let (mut qmp, peer) = with_peer(move |read, write| {
        let mut bytes = [0u8; 4096];
        let mut control = nix::cmsg_space!([RawFd; 1]);
        let (len, fds) = {
            let mut parts = [io::IoSliceMut::new(&mut bytes)];
            let got = recvmsg::<()>(
                read.get_ref().as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::empty(),
            )
            .expect("recvmsg");
            let mut fds = Vec::new();
            for message in got.cmsgs().expect("control") {
                if let ControlMessageOwned::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            (got.bytes, fds)
        };
        let question: Value = serde_json::from_slice(&bytes[..len]).expect("one message");
        assert_eq!(question["arguments"]["fdname"], "stream");
        assert_eq!(fds.len(), 1);
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        let received = unsafe { OwnedFd::from_raw_fd(fds[0]) };
        say(&mut UnixStream::from(received), "through");
        answer(write, &question, &json!({}));
    });
    qmp.send_fd("stream", file.as_fd()).expect("getfd");
    peer.join().expect("peer");
    drop(file);
    let mut text = String::new();
    other.read_to_string(&mut text).expect("read");
    assert_eq!(text, "through");
}

#[test]
fn an_event_may_stand_for_an_answer_that_is_late() {
    let (mut qmp, peer) = with_peer(|read, write| {
        let first = read_message(read);
        say(write, "{\"event\": \"RESUME\"}\r\n");
        let second = read_message(read);
        answer(write, &first, &json!("late"));
        answer(write, &second, &json!("right"));
        let id = read_message(read)["id"].clone();
        let error = json!({"class": "GenericError", "desc": "reset required"});
        say(
            write,
            &format!("{}\r\n", json!({ "error": error, "id": id })),
        );
    });
    qmp.arm("cont", Value::Null).expect("arm");
    qmp.fire().expect("fire");
    qmp.complete_at_event("RESUME", PATIENCE).expect("event");
    let value = qmp.execute("query-status", Value::Null).expect("answer");
    assert_eq!(value, "right");
    qmp.wait_event("RESUME", PATIENCE).expect("still queued");
    qmp.arm("cont", Value::Null).expect("arm");
    qmp.fire().expect("fire");
    let error = qmp
        .complete_at_event("RESUME", PATIENCE)
        .expect_err("refused");
    assert!(error.to_string().contains("reset required"), "{error}");
    peer.join().expect("peer");
}
