//! Bad input and broken parts, through the real product: daemons, API, command line, QEMU
//! with a real guest. Each must be told in words (what failed, on what, what to do), and
//! must harm nothing else. Needs root, as `make test` says.

// Helpers outside of #[test] functions unwrap too.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Api, Bed, Guest, POLLUX, at, eventually, host, told};
use pollux::api::BODY_BYTES_MAX;
use pollux::api::types::{Done, HostInfo, LinkConfig, Role, VmStatus};
use pollux::lab::Lab;
use pollux::lab::daemons::{link_addrs, wait_daemon};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// One lab for all tests of this file, one test at a time: two cores run few guests well.
fn bed() -> MutexGuard<'static, Bed> {
    static BED: LazyLock<Mutex<Bed>> = LazyLock::new(|| Mutex::new(Bed::up()));
    BED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The refusal's words.
fn refusal(answer: Result<Done, impl std::fmt::Display>) -> String {
    answer.expect_err("it was to be refused").to_string()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn pid_of(status: &VmStatus) -> u32 {
    u32::try_from(status.qemu_pid.expect("QEMU runs")).unwrap()
}

// ---- what is written wrong ----

#[test]
fn an_unknown_key_names_the_nearest_one() {
    let bed = bed();
    let dir = tempfile::tempdir().unwrap();
    let spec = dir.path().join("orders.toml");
    let guest = Guest::new();
    std::fs::write(&spec, guest.toml().replace("memory =", "memroy =")).unwrap();
    let out = bed.cli("a", &["vm", "create", spec.to_str().unwrap()]);
    assert!(!out.status.success());
    says(
        &stderr(&out),
        &[
            "orders.toml:3:1: unknown key `memroy`",
            "did you mean `memory`?",
        ],
    );
    assert!(
        bed.api("a").vm(&guest.name).is_err(),
        "nothing was taken in"
    );
}

#[test]
fn a_device_that_cannot_be_mirrored_is_refused_before_any_checkpoint() {
    let bed = bed();
    let api = bed.api("a");
    let mut guest = Guest::new();
    guest.protection = "mirrored";
    for (device, why) in [
        ("nvme,serial=x", "kills QEMU when its state is saved"),
        ("virtio-balloon-pci", "takes pages out of guest memory"),
    ] {
        guest.more = format!("machine = \"q35\"\ndevices = [\"{device}\"]");
        says(
            &refusal(api.create(&guest.toml())),
            &["vm.toml:", device, why],
        );
    }

    // Unprotected it may have one; then the running VM cannot be mirrored.
    guest.protection = "none";
    guest.more = "machine = \"q35\"\ndevices = [\"nvme,serial=x\"]".into();
    let vm = bed.vm(&guest);
    api.command(&vm.name, "start").unwrap();
    let before = api.wait(&vm.name, "running", |s| s.qemu_pid.is_some());
    says(
        &refusal(api.protect(&vm.name)),
        &[
            &vm.name,
            "device `nvme` cannot be mirrored",
            "use a [[disk]]",
        ],
    );
    let after = api.vm(&vm.name).unwrap();
    assert_eq!(
        (after.qemu_pid, after.state.as_str()),
        (before.qemu_pid, "solo")
    );
    assert!(!told(&after, "QEMU ended"), "{after:#?}");
}

#[test]
fn a_disk_that_is_missing_or_too_small_is_told() {
    let bed = bed();
    let api = bed.api("a");
    let vm = bed.vm(&Guest::new());
    let image = vm.image.display().to_string();
    std::fs::File::options()
        .write(true)
        .open(&vm.image)
        .unwrap()
        .set_len(4096)
        .unwrap();
    says(
        &refusal(api.command(&vm.name, "start")),
        &[
            "disk `data`",
            &image,
            "has 4096 bytes",
            "states 67108864",
            "truncate -s 67108864",
        ],
    );
    std::fs::remove_file(&vm.image).unwrap();
    says(
        &refusal(api.command(&vm.name, "start")),
        &["disk `data`", &image, "does not exist", "create it"],
    );
    // Mended, it starts: a failed start leaves nothing behind.
    std::fs::File::create(&vm.image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    api.command(&vm.name, "start").unwrap();
}

#[test]
fn garbage_on_the_api_socket_harms_nobody() {
    let bed = bed();
    let socket = bed.socket("a");
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        // The daemon may hang up in the middle of it.
        let _ = stream.write_all(bytes);
        if !bytes.ends_with(b"\r\n\r\n") && !bytes.starts_with(b"POST") {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let answer = ask(&noise);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
        "{answer}"
    );
    let endless = [b"GET /v1/host?".as_slice(), &[b'x'; 1 << 20]].concat();
    let answer = ask(&endless);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
        "{answer}"
    );
    let post = |path: &str, body: &[u8]| {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        ask(&[head.as_bytes(), body].concat())
    };
    let answer = post("/v1/vms", b"{\"spec\": 7}");
    says(
        &answer,
        &[
            "HTTP/1.1 400",
            "the request's body is not understood",
            "expected a string",
        ],
    );
    let answer = post("/v1/vms", &vec![b' '; BODY_BYTES_MAX + 1]);
    says(&answer, &["HTTP/1.1 4", "larger than 8 MiB"]);
    let answer = post("/v1/vms/x/explode", b"null");
    says(
        &answer,
        &[
            "HTTP/1.1 404",
            "a VM has no command `explode`",
            "switchover",
        ],
    );
    let answer = ask(b"GET /v2/host HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    says(&answer, &["HTTP/1.1 404", "the API has no GET /v2/host"]);
    // A client that says it will send much and never does.
    let mut slow = UnixStream::connect(&socket).unwrap();
    slow.write_all(b"POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{")
        .unwrap();
    let info: HostInfo = bed.api("a").get("/v1/host").unwrap();
    assert_eq!(info.name, host("a"));
}

// ---- a host that cannot do it ----

/// A daemon of its own, outside any lab.
struct Alone {
    dir: tempfile::TempDir,
    config: PathBuf,
}

impl Alone {
    fn new(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let config = dir.path().join("host.toml");
        let text = format!(
            "name = \"alone\"\nstate_dir = \"state\"\nrun_dir = \"run\"\nram_dir = \"ram\"\n\
             api_socket = \"api.sock\"\nregistry_dir = \"registry\"\n{more}\n"
        );
        std::fs::write(&config, text).unwrap();
        Self { dir, config }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(POLLUX);
        command
            .args(["daemon", "--config"])
            .arg(&self.config)
            .stdin(Stdio::null());
        command
    }

    /// What it says when it cannot start.
    fn fails(&self) -> String {
        let out = self.command().output().unwrap();
        assert!(!out.status.success());
        let said = stderr(&out);
        assert!(!said.contains("panicked"), "{said}");
        said
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }
}

/// Ends a daemon that a test started.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_qemu_that_is_missing_or_too_old_is_told() {
    let alone = Alone::new("qemu = \"/no/such/qemu\"");
    says(
        &alone.fails(),
        &[
            "/no/such/qemu is not installed",
            "apt-get install qemu-system-x86",
        ],
    );
    let alone = Alone::new("");
    let old = alone.script("qemu-6", "echo 'QEMU emulator version 6.2.0 (Debian)'");
    let text = std::fs::read_to_string(&alone.config).unwrap();
    std::fs::write(
        &alone.config,
        format!("{text}qemu = \"{}\"\n", old.display()),
    )
    .unwrap();
    says(
        &alone.fails(),
        &["qemu-6 is QEMU 6.2.0", "7.2.0 or later", "upgrade"],
    );
}

#[test]
fn a_host_configuration_that_is_wrong_is_told() {
    let alone = Alone::new("detection_ns = 100");
    says(
        &alone.fails(),
        &[
            "host.toml: line 7: unknown field `detection_ns`",
            "did you mean `detection_ms`?",
        ],
    );
    let alone = Alone::new("detection_ms = 15");
    says(
        &alone.fails(),
        &["host.toml: detection_ms = 15", "at least three heartbeats"],
    );
    let out = Command::new(POLLUX)
        .args(["daemon", "--config", "/no/such.toml"])
        .output()
        .unwrap();
    says(
        &stderr(&out),
        &[
            "cannot read the host configuration /no/such.toml",
            "--config",
        ],
    );
}

#[test]
fn a_daemon_that_is_not_root_says_so() {
    let alone = Alone::new("");
    // The build's folder may be closed to others: nobody gets a copy.
    let copy = alone.dir.path().join("pollux");
    std::fs::copy(POLLUX, &copy).unwrap();
    let mut command = Command::new(&copy);
    command
        .args(["daemon", "--config"])
        .arg(&alone.config)
        .uid(65_534)
        .gid(65_534);
    let out = command.output().unwrap();
    assert!(!out.status.success());
    says(
        &stderr(&out),
        &["pollux runs as user 65534", "it must run as root", "sudo"],
    );
}

/// Answers one ioctl request like a kernel that does not know it, for this process and its
/// children (seccomp(2)).
fn without_ioctl(request: u32) -> std::io::Result<()> {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let (load, equal, answer) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    // struct seccomp_data: nr at 0, args[1] at 24 (its lower half, little-endian).
    let mut filter = [
        statement(load, 0, 0, 0),
        statement(equal, 0, 3, u32::try_from(libc::SYS_ioctl).unwrap_or(0)),
        statement(load, 0, 0, 24),
        statement(equal, 0, 1, request),
        statement(
            answer,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::ENOTTY.unsigned_abs(),
        ),
        statement(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 6,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: integers, and a pointer to a filter of the stated length that outlives the call.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) != 0
        {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

#[test]
fn a_kernel_without_pagemap_scan_can_run_vms_but_not_mirror_them() {
    /// `_IOWR('f', 16, struct pm_scan_arg)` (Linux include/uapi/linux/fs.h).
    const PAGEMAP_SCAN: u32 = 0xc060_6610;
    let alone = Alone::new("");
    let mut command = alone.command();
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(|| without_ioctl(PAGEMAP_SCAN)) };
    let _daemon = Ended(command.stderr(Stdio::null()).spawn().unwrap());
    let socket = alone.dir.path().join("api.sock");
    wait_daemon(&socket).unwrap();
    let said = |args: &[&str]| {
        Command::new(POLLUX)
            .arg("--api")
            .arg(&socket)
            .args(args)
            .output()
            .unwrap()
    };
    let shown = String::from_utf8(said(&["host", "show"]).stdout).unwrap();
    let why = ["no PAGEMAP_SCAN", "boot Linux 6.7 or later"];
    says(&shown, &["can mirror   no: "]);
    says(&shown, &why);
    let spec = alone.dir.path().join("vm.toml");
    let guest = Guest::new();
    std::fs::write(&spec, guest.toml()).unwrap();
    assert!(
        said(&["vm", "create", spec.to_str().unwrap()])
            .status
            .success()
    );
    let out = said(&["vm", "protect", &guest.name]);
    assert!(!out.status.success());
    says(&stderr(&out), &["host alone cannot mirror"]);
    says(&stderr(&out), &why);
}

#[test]
fn too_little_memory_is_told_by_either_side() {
    let bed = bed();
    let (a, b) = (bed.api("a"), bed.api("b"));
    let mut guest = Guest::new();
    guest.memory = "512 GiB".into();
    let big = bed.vm(&guest);
    says(
        &refusal(a.command(&big.name, "start")),
        &["the VM needs 512 GiB", "are missing", "less memory"],
    );
    drop(big);
    let mut guest = Guest::new();

    // The standby's host has room for other VMs only.
    let run_dir = bed
        .lab
        .host(&host("b"))
        .unwrap()
        .run_dir
        .display()
        .to_string();
    let resize = |size: &str| {
        bed.on(
            "b",
            &["mount", "-o", &format!("remount,size={size}"), &run_dir],
        )
    };
    guest.memory = "256 MiB".into();
    let vm = bed.vm(&guest);
    let mut client = vm.start();
    resize("160m");
    a.protect(&vm.name).unwrap();
    let refused = a.wait(&vm.name, "refused a standby", |s| {
        s.warnings
            .iter()
            .any(|w| w.contains("refused to hold a standby"))
    });
    let warning = refused.warnings.join("; ");
    says(
        &warning,
        &[
            "should be mirrored and is not",
            "the VM needs 256 MiB",
            "are missing",
            "tmpfs",
        ],
    );
    assert_eq!(b.vm(&vm.name).unwrap().role, Role::Stopped);
    let n = client.count_on(0, 5);
    // With room again it is mirrored without anybody's help.
    resize("50%");
    a.wait_mirrored(&vm.name);
    client.count_on(n, 5);
    client.check(1);
}

// ---- a partner that is not who it should be ----

#[test]
fn a_partner_with_the_wrong_identity_is_not_spoken_to() {
    let lab = Lab::up(Bed::spec()).unwrap();
    let bed = Bed { lab };
    for name in ["a", "b"] {
        wait_daemon(&bed.socket(name)).unwrap();
    }
    let (a, b) = (bed.api("a"), bed.api("b"));
    let fingerprint = |api: &Api| api.get::<HostInfo>("/v1/host").unwrap().fingerprint;
    let (a_is, b_is) = (fingerprint(&a), fingerprint(&b));
    let pin = |api: &Api, here: &str, partner: &str, fingerprint: &str| {
        let links = link_addrs(bed.lab.host(&host(here)).unwrap(), &host(partner));
        api.post(
            "/v1/links",
            &LinkConfig {
                partner: host(partner),
                fingerprint: fingerprint.into(),
                next_fingerprint: None,
                links,
            },
        )
    };
    says(
        &refusal(pin(&a, "a", "b", "sha256:12")),
        &["link to b", "fingerprint"],
    );
    says(
        &refusal(pin(&a, "a", "a", &a_is)),
        &["a host cannot be its own partner"],
    );
    // On a, b is pinned as somebody else; b has it right.
    let pinned = format!("sha256:{}", "0123456789abcdef".repeat(4));
    pin(&a, "a", "b", &pinned).unwrap();
    pin(&b, "b", "a", &a_is).unwrap();
    let seen = eventually("a refuses b", || {
        a.status()
            .partners
            .into_iter()
            .find(|p| p.last_error.as_ref().is_some_and(|e| e.contains(&pinned)))
    });
    says(
        seen.last_error.as_deref().unwrap(),
        &["b", &pinned, &b_is, "pollux link create"],
    );
    assert!(!seen.connected);
    let theirs = b.status().partners.remove(0);
    assert!(!theirs.connected, "{theirs:?}");
    let shown = bed.cli("a", &["status"]);
    says(
        &String::from_utf8_lossy(&shown.stdout),
        &["not connected", &pinned, &b_is],
    );

    // Nothing is mirrored to it, and the VM runs all the same.
    let vm = bed.vm(&Guest::new());
    let mut client = vm.start();
    a.protect(&vm.name).unwrap();
    client.count_on(0, 3);
    let status = a.vm(&vm.name).unwrap();
    assert_eq!(
        (status.role, status.mirrored, status.state.as_str()),
        (Role::Primary, false, "solo")
    );
    assert!(b.vm(&vm.name).is_err(), "b never heard of the VM");

    // Pinned as it is, it is mirrored.
    a.command(&vm.name, "unprotect").unwrap();
    a.delete("/v1/links/b").unwrap();
    pin(&a, "a", "b", &b_is).unwrap();
    eventually("they are connected", || {
        a.status().partners[0].connected.then_some(())
    });
    a.protect(&vm.name).unwrap();
    a.wait_mirrored(&vm.name);
    client.count_on(3, 3);
}

// ---- parts that break while a VM is mirrored ----

/// What no NBD client says, and what one might.
const NBD_GARBAGE: &str = r#"
use IO::Socket::UNIX; my $path = shift; $SIG{PIPE} = 'IGNORE';
my $open = sub { IO::Socket::UNIX->new(Peer => $path) or die "connect $path: $!" };
my @noise = (pack('C*', map { ($_ * 73) % 251 } 1 .. 70000), "GET / HTTP/1.1\r\n\r\n", "\0" x 4096,
  pack('N', 3),                                                   # flags, then nothing
  pack('N a8 N N', 3, 'IHAVEOPT', 7, 0xffffffff),                 # an option of 4 GiB
  pack('N a8 N N', 3, 'IHAVEOPT', 0xdeadbeef, 0),                 # an unknown option
  pack('N a8 N N N n', 3, 'IHAVEOPT', 7, 6, 0, 0)                 # GO, then a bad request
    . pack('N n n Q> Q> N', 0x25609513, 0, 1, 1, ~0, 0xffffffff)  # a write far outside
    . pack('N n n Q> Q> N', 0x12345678, 9, 9, 9, 9, 9));
for my $round (1 .. 3) { for my $bytes (@noise) { my $s = $open->(); print $s $bytes; $s->flush; shutdown($s, 1); my $x; 1 while sysread($s, $x, 65536); } }
my @held = map { IO::Socket::UNIX->new(Peer => $path) } 1 .. 40;  # more than it serves at once
print "done\n";
"#;

#[test]
fn garbage_on_the_disk_socket_and_a_dying_qemu_lose_nothing() {
    let bed = bed();
    let (a, b) = (bed.api("a"), bed.api("b"));
    let vm = bed.vm(&Guest::new());
    let mut client = vm.start();
    a.protect(&vm.name).unwrap();
    let mirrored = a.wait_mirrored(&vm.name);
    let n = client.count_on(0, 5);

    let run_dir = bed.lab.host(&host("a")).unwrap().run_dir.join(&vm.name);
    let listing = bed
        .lab
        .command(&at("a"), &["ls".as_ref(), run_dir.as_os_str()])
        .output()
        .unwrap();
    let listing = String::from_utf8(listing.stdout).unwrap();
    let socket = listing
        .lines()
        .find(|name| name.contains("nbd"))
        .expect("the disk's socket");
    let socket = run_dir.join(socket).display().to_string();
    bed.on("a", &["perl", "-e", NBD_GARBAGE, &socket]);
    let n = client.count_on(n, 5);
    client.check(1);
    let after = a.wait_mirrored(&vm.name);
    assert_eq!(
        (after.generation, after.qemu_pid),
        (mirrored.generation, mirrored.qemu_pid)
    );

    // QEMU stops answering in the middle of a checkpoint, and then dies.
    let pid = pid_of(&after).to_string();
    bed.on("a", &["kill", "-STOP", &pid]);
    a.wait(&vm.name, "stuck in a checkpoint", |s| s.age_us > 300_000);
    bed.on("a", &["kill", "-KILL", &pid]);
    let n = client.count_on(n, 20);
    client.check(1);
    let promoted = b.vm(&vm.name).unwrap();
    assert_eq!(promoted.role, Role::Primary);
    assert_eq!(promoted.last_failover.unwrap().kind, "failover");
    let old = a.wait(&vm.name, "told of its end", |s| told(s, "SIGKILL"));
    assert!(old.role != Role::Primary, "{old:#?}");

    // Mirrored back to a by itself; now QEMU dies between two checkpoints, or in one.
    let mirrored = b.wait_mirrored(&vm.name);
    bed.lab.kill_pid_in(&host("b"), pid_of(&mirrored)).unwrap();
    let n = client.count_on(n, 20);
    client.check(1);
    // Somebody ends QEMU politely: not the guest's wish either.
    let mirrored = a.wait_mirrored(&vm.name);
    bed.on("a", &["kill", "-TERM", &pid_of(&mirrored).to_string()]);
    b.wait(&vm.name, "running here again", |s| s.role == Role::Primary);
    client.count_on(n, 20);
    client.check(1);
}

/// Fill the second disk of a VM with what does not compress, so that seeding takes a while.
fn fill(image: &Path, bytes: usize) {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut data = Vec::with_capacity(bytes);
    while data.len() < bytes {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        data.extend_from_slice(&x.to_le_bytes());
    }
    std::fs::write(image, data).unwrap();
}

/// Bytes of the second disk that makes seeding take a while.
const BALLAST_BYTES: usize = 384 << 20;

#[test]
fn a_standby_that_dies_while_seeding_costs_the_vm_nothing() {
    let bed = bed();
    let (a, b) = (bed.api("a"), bed.api("b"));
    let mut guest = Guest::new();
    guest.disks =
        format!("[[disk]]\nname = \"ballast\"\npath = \"ballast.raw\"\nsize = {BALLAST_BYTES}\n");
    let vm = bed.vm(&guest);
    fill(&vm.image.with_file_name("ballast.raw"), BALLAST_BYTES);
    let mut client = vm.start();
    let mut n = client.count_on(0, 3);
    let seeding = |s: &VmStatus| s.seeding.as_ref().is_some_and(|p| p.done_bytes > 0) || s.mirrored;

    // Its QEMU dies.
    a.protect(&vm.name).unwrap();
    let seen = a.wait(&vm.name, "seeding", seeding);
    assert!(!seen.mirrored, "seeding was over too soon to be disturbed");
    bed.lab
        .kill_pid_in(&host("b"), pid_of(&b.vm(&vm.name).unwrap()))
        .unwrap();
    a.wait(&vm.name, "told that seeding ended", |s| {
        told(s, "seeding ended: the standby is gone")
    });
    n = client.count_on(n, 3);
    a.wait_mirrored(&vm.name);
    n = client.count_on(n, 3);

    // Its host dies.
    a.command(&vm.name, "unprotect").unwrap();
    a.wait(&vm.name, "solo", |s| s.state == "solo");
    b.wait_stopped(&vm.name);
    a.protect(&vm.name).unwrap();
    let seen = a.wait(&vm.name, "seeding", seeding);
    assert!(!seen.mirrored, "seeding was over too soon to be disturbed");
    bed.lab.power_cut(&host("b")).unwrap();
    let solo = a.wait(&vm.name, "solo again", |s| {
        s.state == "solo" && !s.warnings.is_empty()
    });
    assert!(!solo.mirrored);
    says(
        &solo.warnings[0],
        &["should be mirrored and is not", "lost"],
    );
    n = client.count_on(n, 3);
    bed.lab.power_on(&host("b")).unwrap();
    wait_daemon(&bed.socket("b")).unwrap();
    a.wait_mirrored(&vm.name);
    client.count_on(n, 3);
    client.check(1);
}

#[test]
fn a_guest_may_reboot_and_power_itself_off_while_mirrored() {
    let bed = bed();
    let (a, b) = (bed.api("a"), bed.api("b"));
    let vm = bed.vm(&Guest::new());
    let mut client = vm.start();
    a.protect(&vm.name).unwrap();
    let mirrored = a.wait_mirrored(&vm.name);
    let n = client.count_on(0, 5);
    let _ = client.try_ask("REBOOT");
    let mut client = vm.client_of_boot(2);
    client.check(2);
    let n = client.count_on(n, 5);
    let after = a.wait_mirrored(&vm.name);
    assert_eq!(
        (after.generation, after.qemu_pid),
        (mirrored.generation, mirrored.qemu_pid)
    );
    assert!(told(&after, "the guest reboots"), "{:#?}", after.events);

    // After a failover it reboots as well, and powers itself off while mirrored.
    bed.lab.kill_pid_in(&host("a"), pid_of(&after)).unwrap();
    let n = client.count_on(n, 5);
    let _ = client.try_ask("REBOOT");
    let mut client = vm.client_of_boot(3);
    client.check(3);
    let n = client.count_on(n, 5);
    b.wait_mirrored(&vm.name);
    // Its last word leaves, as that of a machine which is then switched off.
    assert_eq!(client.ask("POWEROFF"), "OK");
    let off = b.wait_stopped(&vm.name);
    assert!(
        told(&off, "the guest powered itself off"),
        "{:#?}",
        off.events
    );
    let standby = a.wait_stopped(&vm.name);
    assert!(
        told(&standby, "standby stands down: dismissed"),
        "{:#?}",
        standby.events
    );

    // The registry knows that it runs nowhere, and whose disk is the newest.
    let refused = refusal(a.command(&vm.name, "start"));
    says(
        &refused,
        &[
            "it ran on host b last",
            "disks are the newest",
            "start it there",
        ],
    );
    b.command(&vm.name, "start").unwrap();
    let mut client = vm.client();
    client.check(4);
    client.count_on(n, 3);
}
