//! The NBD server against real clients and against garbage.

use super::super::nbd::{self, REQUEST_BYTES};
use super::super::*;
use super::{MIB, TestDisk, test_disk};
use crate::pool::{Epoch, Generation};
use bytes::BufMut;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// A small NBD client.
pub(super) struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        let mut stream = UnixStream::connect(path).expect("connected");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(greeting, nbd::greeting());
        stream.write_all(&3_u32.to_be_bytes()).expect("flags");
        Self { stream }
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut out = Vec::new();
        out.put_u64(nbd::OPTION_MAGIC);
        out.put_u32(option);
        out.put_u32(u32::try_from(data.len()).expect("small"));
        out.put_slice(data);
        self.stream.write_all(&out).expect("sent");
    }

    /// Reply type and data.
    pub fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header).expect("a reply");
        assert_eq!(header[..8], nbd::OPTION_REPLY_MAGIC.to_be_bytes());
        assert_eq!(header[8..12], option.to_be_bytes());
        let kind = u32::from_be_bytes(header[12..16].try_into().expect("4"));
        let len = u32::from_be_bytes(header[16..20].try_into().expect("4"));
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).expect("its data");
        (kind, data)
    }

    pub fn go(path: &Path) -> Self {
        let mut client = Self::connect(path);
        client.option(nbd::option::GO, &[0, 0, 0, 0, 0, 0]);
        while client.option_reply(nbd::option::GO).0 != nbd::reply::ACK {}
        client
    }

    pub fn request(out: &mut Vec<u8>, command: u16, flags: u16, cookie: u64, at: u64, len: u32) {
        out.put_u32(nbd::REQUEST_MAGIC);
        out.put_u16(flags);
        out.put_u16(command);
        out.put_u64(cookie);
        out.put_u64(at);
        out.put_u32(len);
    }

    /// Error and cookie.
    pub fn reply(&mut self) -> (u32, u64) {
        let mut reply = [0; nbd::SIMPLE_REPLY_BYTES];
        self.stream.read_exact(&mut reply).expect("a reply");
        assert_eq!(reply[..4], nbd::SIMPLE_REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().expect("4"));
        (error, u64::from_be_bytes(reply[8..].try_into().expect("8")))
    }

    fn exchange(&mut self, command: u16, flags: u16, at: u64, len: u32, payload: &[u8]) -> u32 {
        let mut out = Vec::new();
        Self::request(&mut out, command, flags, 42, at, len);
        out.put_slice(payload);
        self.stream.write_all(&out).expect("sent");
        let (error, cookie) = self.reply();
        assert_eq!(cookie, 42);
        error
    }

    fn read(&mut self, at: u64, len: u32) -> Result<Vec<u8>, u32> {
        match self.exchange(0, 0, at, len, &[]) {
            0 => {
                let mut data = vec![0; len as usize];
                self.stream.read_exact(&mut data).expect("data");
                Ok(data)
            }
            error => Err(error),
        }
    }

    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        matches!(self.stream.read_to_end(&mut rest), Ok(_) | Err(_))
    }
}

pub(super) fn serve(test: &TestDisk) -> DiskServer {
    let path = test.folder.path().join("nbd");
    DiskServer::start(&path, None, Arc::clone(&test.disk)).expect("a server")
}

#[test]
fn options_are_answered_by_the_document() {
    let test = test_disk(MIB, |_| {});
    let server = serve(&test);
    let mut client = Client::connect(server.path());
    for option in [5, 8, 10, 11, 999] {
        client.option(option, b"whatever");
        assert_eq!(
            client.option_reply(option).0,
            nbd::reply::ERR_UNSUP,
            "option {option}"
        );
    }
    client.option(nbd::option::LIST, &[]);
    assert_eq!(
        client.option_reply(nbd::option::LIST),
        (nbd::reply::SERVER, vec![0; 4])
    );
    assert_eq!(client.option_reply(nbd::option::LIST).0, nbd::reply::ACK);
    client.option(nbd::option::GO, &[0, 0, 0, 1, b'x', 0, 0]);
    assert_eq!(
        client.option_reply(nbd::option::GO).0,
        nbd::reply::ERR_UNKNOWN
    );
    client.option(nbd::option::INFO, &[0xff; 6]);
    assert_eq!(
        client.option_reply(nbd::option::INFO).0,
        nbd::reply::ERR_INVALID
    );
    client.option(nbd::option::INFO, &[0, 0, 0, 0, 0, 1, 0, 3]);
    let (kind, export) = client.option_reply(nbd::option::INFO);
    assert_eq!((kind, export.len()), (nbd::reply::INFO, 12));
    assert_eq!(export[2..10], MIB.to_be_bytes());
    let (_, blocks) = client.option_reply(nbd::option::INFO);
    assert_eq!(blocks[2..6], 1_u32.to_be_bytes());
    assert_eq!(client.option_reply(nbd::option::INFO).0, nbd::reply::ACK);
    client.option(nbd::option::ABORT, &[]);
    assert_eq!(client.option_reply(nbd::option::ABORT).0, nbd::reply::ACK);
    assert!(client.is_closed());

    let mut old = Client::connect(server.path());
    old.option(nbd::option::EXPORT_NAME, &[]);
    let mut answer = [0; 10];
    old.stream.read_exact(&mut answer).expect("size and flags");
    assert_eq!(answer[..8], MIB.to_be_bytes());
    assert_eq!(old.read(0, 4), Ok(vec![0; 4]));
}

#[test]
fn requests_are_answered_by_the_document() {
    let test = test_disk(MIB, |_| {});
    let server = serve(&test);
    let mut client = Client::go(server.path());
    assert_eq!(client.exchange(1, 1, 100, 3, b"abc"), 0, "write with FUA");
    assert_eq!(client.read(99, 5), Ok(b"\0abc\0".to_vec()));
    assert_eq!(client.exchange(3, 0, 0, 0, &[]), 0, "flush");
    assert_eq!(client.exchange(6, 2, 101, 1, &[]), 0, "write zeroes");
    assert_eq!(client.exchange(4, 0, 102, 1, &[]), 0, "trim");
    assert_eq!(client.read(99, 5), Ok(b"\0a\0\0\0".to_vec()));
    assert_eq!(client.read(MIB - 1, 2), Err(22), "beyond the end");
    assert_eq!(
        client.exchange(1, 0, MIB - 1, 2, b"xx"),
        28,
        "write beyond the end"
    );
    assert_eq!(client.exchange(1, 0, u64::MAX, 2, b"xx"), 28, "overflowing");
    assert_eq!(client.read(0, u32::MAX), Err(75), "over the payload limit");
    assert_eq!(client.exchange(77, 0, 0, 0, &[]), 22, "unknown command");
    let cut = test.disk.cut(Epoch(2)).expect("a cut");
    assert!(cut.flushed);
    assert_eq!(cut.writes.len(), 3);
    test.disk
        .set_mode(Mode::Stopped, Generation(5))
        .expect("stopped");
    assert_eq!(client.exchange(1, 0, 0, 1, b"x"), 108, "deposed");
    assert_eq!(client.read(0, 1), Err(108));
}

#[test]
fn many_requests_in_flight_are_all_answered() {
    for mode in [Mode::Overlay { epoch: Epoch(1) }, Mode::Direct] {
        let test = test_disk(64 * MIB, |options| options.mode = mode);
        let server = serve(&test);
        let mut client = Client::go(server.path());
        let mut out = Vec::new();
        for cookie in 0..200 {
            // FUA, so that Direct goes through the slow threads.
            Client::request(&mut out, 1, 1, cookie, cookie * 4096, 4096);
            out.put_bytes(u8::try_from(cookie).expect("small"), 4096);
        }
        client.stream.write_all(&out).expect("sent");
        let mut cookies: Vec<u64> = (0..200)
            .map(|_| client.reply())
            .map(|(e, c)| {
                assert_eq!(e, 0);
                c
            })
            .collect();
        cookies.sort_unstable();
        assert!(cookies.into_iter().eq(0..200));
        assert_eq!(client.read(199 * 4096, 1), Ok(vec![199]));
    }
}

#[test]
fn garbage_closes_its_connection_and_nothing_else() {
    let test = test_disk(MIB, |_| {});
    let server = serve(&test);
    let mut good = Client::go(server.path());
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        &[0, 0, 0, 3, 1, 2],
    ] {
        let mut bad = UnixStream::connect(server.path()).expect("connected");
        bad.write_all(garbage).expect("sent");
        bad.shutdown(std::net::Shutdown::Write)
            .expect("half closed");
        let mut rest = Vec::new();
        let _ = bad.read_to_end(&mut rest);
        let mut bad = Client::go(server.path());
        bad.stream.write_all(garbage).expect("sent");
        let _ = bad.stream.write_all(&[0; REQUEST_BYTES]);
        assert!(bad.is_closed());
    }
    let mut huge = Client::go(server.path());
    let mut out = Vec::new();
    Client::request(&mut out, 1, 0, 1, 0, u32::MAX);
    huge.stream.write_all(&out).expect("sent");
    assert!(huge.is_closed());
    assert_eq!(good.exchange(1, 0, 0, 1, b"x"), 0);
    assert_eq!(good.read(0, 1), Ok(b"x".to_vec()));
}

#[test]
fn sockets_in_the_way_are_named_and_stale_ones_replaced() {
    let test = test_disk(MIB, |_| {});
    let path = test.folder.path().join("nbd");
    std::fs::write(&path, "precious").expect("a file");
    let start = || DiskServer::start(&path, None, Arc::clone(&test.disk));
    assert!(matches!(start(), Err(ServerError::NotASocket { .. })));
    std::fs::remove_file(&path).expect("removed");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale socket"));
    let server = start().expect("replaced");
    assert!(matches!(start(), Err(ServerError::InUse { .. })));
    let mut client = Client::go(server.path());
    drop(server);
    assert!(client.is_closed());
    assert!(!path.exists());
}

/// Runs a QEMU tool; `None` if qemu-utils is not installed.
fn qemu(tool: &str, args: &[&str]) -> Option<String> {
    let output = match Command::new(tool).args(args).output() {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: {tool} is not installed");
            return None;
        }
        Err(e) => panic!("{tool}: {e}"),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {text}{errors}");
    assert!(!text.contains("Pattern verification failed"), "{text}");
    Some(text)
}

#[test]
fn qemus_own_clients_read_what_they_wrote() {
    let test = test_disk(64 * MIB, |_| {});
    let server = serve(&test);
    let uri = format!("nbd+unix:///?socket={}", server.path().display());
    let io = [
        "-c",
        "write -P 0xab 0 1M",
        "-c",
        "write -P 0xcd 1000448 4k",
        "-c",
        "write -z 8k 64k",
        "-c",
        "discard 128k 64k",
        "-c",
        "write -f -P 0x11 33M 20M",
        "-c",
        "flush",
        "-c",
        "aio_write -P 1 60M 1M",
        "-c",
        "aio_write -P 2 61M 1M",
        "-c",
        "aio_flush",
        "-c",
        "read -P 0xab 0 8k",
        "-c",
        "read -P 0 8k 64k",
        "-c",
        "read -P 0xab 72k 56k",
        "-c",
        "read -P 0 128k 64k",
        "-c",
        "read -P 0xcd 1000448 4k",
        "-c",
        "read -P 0x11 33M 20M",
        "-c",
        "read -P 1 60M 1M",
        "-c",
        "read -P 2 61M 1M",
    ];
    let mut args = vec!["-f", "raw", uri.as_str()];
    args.extend(io);
    if qemu("qemu-io", &args).is_none() {
        return;
    }
    let info = qemu("qemu-img", &["info", &uri]).expect("installed");
    assert!(info.contains("64 MiB"), "{info}");
    let cut = test.disk.cut(Epoch(2)).expect("a cut");
    assert!(cut.flushed && cut.bytes > 20 << 20);
    test.disk.commit(cut.epoch);
    test.disk.wait_written().expect("written");
    let file = test.path.to_str().expect("utf-8");
    qemu(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", file, &uri],
    )
    .expect("installed");
    test.disk.go_direct(Generation(5)).expect("solo");
    let direct = [
        "-f",
        "raw",
        &uri,
        "-c",
        "write -P 0x77 0 3M",
        "-c",
        "flush",
        "-c",
        "read -P 0x77 0 3M",
    ];
    qemu("qemu-io", &direct).expect("installed");
    assert_eq!(
        std::fs::read(&test.path).expect("file")[..3 << 20],
        vec![0x77; 3 << 20]
    );
}
