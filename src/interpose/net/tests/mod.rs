//! Tests of a port with a real tap on a real bridge, in a network namespace of their own.

mod bench;
mod port;

use super::*;
use crate::pool::{Epoch, Generation};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// EtherType for local experiments (IEEE 802): nothing else in the namespace speaks it.
pub(super) const TEST_TYPE: u16 = 0x88b5;
const RARP_TYPE: u16 = 0x8035;

/// A failure guard for receives, not a measure.
const PATIENCE: Duration = Duration::from_secs(20);

/// Run `test` in a thread with its own network namespace holding bridge `br0`.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let run = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a namespace");
        for args in [
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 up",
        ] {
            let status = Command::new("ip")
                .args(args.split(' '))
                .status()
                .expect("iproute2");
            assert!(status.success(), "ip {args}");
        }
        test();
    };
    let thread = std::thread::spawn(run);
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A raw socket on an interface of the namespace, for one EtherType: the outside.
pub(super) struct Outside(OwnedFd);

impl Outside {
    pub fn on(interface: &str, ethertype: u16) -> Self {
        let protocol = i32::from(ethertype.to_be());
        // SAFETY: no memory is passed; the descriptor is taken over at once.
        let socket = unsafe {
            let fd = libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol,
            );
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: plain data for which all zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = 17;
        address.sll_protocol = ethertype.to_be();
        let index = nix::net::if_::if_nametoindex(interface).expect("an interface");
        address.sll_ifindex = i32::try_from(index).expect("small");
        let len = u32::try_from(size_of_val(&address)).expect("small");
        // SAFETY: `address` is a whole sockaddr_ll of `len` bytes.
        let bound =
            unsafe { libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        let patience = nix::sys::time::TimeVal::new(20, 0);
        nix::sys::socket::setsockopt(
            &socket,
            nix::sys::socket::sockopt::ReceiveTimeout,
            &patience,
        )
        .expect("a timeout");
        Self(socket)
    }

    pub fn receive(&self) -> Vec<u8> {
        let mut buf = vec![0; 70_000];
        let len = nix::unistd::read(&self.0, &mut buf).expect("a frame");
        buf.truncate(len);
        buf
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.0, frame), Ok(frame.len()));
    }
}

/// A broadcast test frame carrying `number`.
pub(super) fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x52, 0x54, 0, 0, 0, 9]);
    frame.extend(TEST_TYPE.to_be_bytes());
    frame.extend(number.to_be_bytes());
    frame.resize(60, 0);
    frame
}

pub(super) fn number(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[14..18].try_into().expect("4 bytes"))
}

/// A port with its QEMU played by a datagram socket.
pub(super) struct TestPort {
    pub port: NetPort,
    pub qemu: UnixDatagram,
    pub folder: tempfile::TempDir,
    pub waiting: Arc<AtomicU64>,
    pub ingress: Arc<AtomicU64>,
    /// Held, it stops the port's thread in its first hook: only the cut empties the socket then.
    pub thread_stop: Arc<Mutex<()>>,
}

pub(super) fn test_port(mode: NetMode) -> TestPort {
    let folder = tempfile::tempdir().expect("a folder");
    let qemu_sock = folder.path().join("qemu");
    let qemu = UnixDatagram::bind(&qemu_sock).expect("QEMU's socket");
    qemu.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let (waiting, ingress) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let thread_stop = Arc::new(Mutex::new(()));
    let stop = Arc::clone(&thread_stop);
    let (w, i) = (Arc::clone(&waiting), Arc::clone(&ingress));
    let hooks = NetHooks {
        on_output_waiting: Some(Arc::new(move |nic| {
            assert_eq!(nic, 3);
            w.fetch_add(1, SeqCst);
            drop(stop.lock());
        })),
        on_ingress: Some(Arc::new(move |nic, _| {
            assert_eq!(nic, 3);
            i.fetch_add(1, SeqCst);
        })),
        on_pressure: None,
    };
    let port = NetPort::start(NetPortConfig {
        nic: 3,
        tap: TapSource::Create {
            name: "tap0".into(),
            mtu: 1500,
            bridge: Some("br0".into()),
        },
        pollux_sock: folder.path().join("pollux"),
        qemu_sock,
        owner: None,
        mac: MacAddr([0x52, 0x54, 0, 0, 0, 9]),
        mode,
        generation: Generation(5),
        held_packets_max: crate::interpose::net::GATE_PACKETS_MAX,
        hooks,
    })
    .expect("a port");
    TestPort {
        port,
        qemu,
        folder,
        waiting,
        ingress,
        thread_stop,
    }
}

impl TestPort {
    /// The guest sends.
    pub fn guest_sends(&self, frame: &[u8]) {
        let to = self.folder.path().join("pollux");
        assert_eq!(self.qemu.send_to(frame, to).expect("sent"), frame.len());
    }

    pub fn guest_receives(&self) -> Vec<u8> {
        let mut buf = vec![0; 70_000];
        loop {
            let len = self.qemu.recv(&mut buf).expect("a frame");
            // The bridge's own IPv6 chatter comes along.
            if buf[12..14] == TEST_TYPE.to_be_bytes() {
                return buf[..len].to_vec();
            }
        }
    }

    /// Until a counter has a value; the test fails by its harness if it never does.
    pub fn until(&self, reached: impl Fn(NetStats) -> bool) {
        while !reached(self.port.stats()) {
            std::thread::yield_now();
        }
    }
}

#[test]
fn taps_that_cannot_be_are_named() {
    in_namespace(|| {
        let error = |name: &str, bridge| Tap::create(name, 1500, bridge).expect_err("refused");
        assert!(matches!(error("", None), TapError::BadName { .. }));
        assert!(matches!(
            error("sixteen-bytes-xx", None),
            TapError::BadName { .. }
        ));
        assert!(matches!(error("a%d", None), TapError::BadName { .. }));
        let missing = error("tap1", Some("br9")).to_string();
        assert!(
            missing.contains("bridge br9") && missing.contains("does not exist"),
            "{missing}"
        );
        assert!(matches!(
            error("tap1", Some("lo")),
            TapError::NotABridge { .. }
        ));
        assert!(
            nix::net::if_::if_nametoindex("tap1").is_err(),
            "nothing left behind"
        );
        let tap = Tap::create("tap1", 1400, Some("br0")).expect("a tap");
        assert!(matches!(error("tap1", None), TapError::Busy { .. }));
        let mtu = std::process::Command::new("ip")
            .args(["link", "show", "tap1"])
            .output();
        let shown = String::from_utf8(mtu.expect("ip").stdout).expect("text");
        assert!(
            shown.contains("mtu 1400") && shown.contains("master br0"),
            "{shown}"
        );
        drop(tap);
        assert!(
            nix::net::if_::if_nametoindex("tap1").is_err(),
            "gone when dropped"
        );
    });
}

#[test]
fn an_unprivileged_daemon_is_told_so() {
    in_namespace(|| {
        // SAFETY: changes this thread's user only (the raw call, unlike libc's wrapper, is per
        // thread), and the thread ends with the test.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) };
        assert_eq!(result, 0);
        let error = Tap::create("tap1", 1500, None)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("run the daemon as root"), "{error}");
    });
}

#[test]
fn announcements_come_out_a_few_times() {
    in_namespace(|| {
        let test = test_port(NetMode::Standby);
        let outside = Outside::on("br0", RARP_TYPE);
        test.port.announce();
        assert_eq!(test.port.stats().egress, 0, "a standby keeps quiet");
        test.port
            .set_mode(NetMode::Direct, Generation(6))
            .expect("promoted");
        test.port.announce();
        for _ in 0..5 {
            assert_eq!(
                outside.receive(),
                rarp_frame(MacAddr([0x52, 0x54, 0, 0, 0, 9]))
            );
        }
    });
}

/// The epoch `n` as a value, for short tests.
pub(super) const fn epoch(n: u64) -> Epoch {
    Epoch(n)
}
