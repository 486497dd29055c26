//! Labs with real namespaces: what a power cut, a cut link, a freeze and a crash do.
//! Needs root, as `make test` says.

// Helpers outside of #[test] functions unwrap too.
#![allow(clippy::unwrap_used)]

use pollux::lab::{
    DaemonState, HostPower, KeepPolicy, Lab, LabError, LabSpec, MonotonicNs, OUTSIDE, Place,
    TakenDown, Wiring, in_network, take_down,
};
use pollux::pool::HostName;
use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Nothing here takes long; this only keeps a broken lab from hanging the tests.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long silence is watched before it counts as silence.
const SILENCE: Duration = Duration::from_millis(300);

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn at(name: &str) -> Place {
    name.parse().unwrap()
}

/// A spec with a name no other test or copy of this one uses; its "daemon" sleeps.
fn spec(dir: &Path) -> LabSpec {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let mut spec = LabSpec::new(
        name,
        Box::new(|host, net| format!("# {host} {}\n", net.management)),
    )
    .unwrap();
    spec.dir = dir.join("lab");
    spec.program = PathBuf::from(env!("CARGO_BIN_EXE_pollux"));
    spec.daemon_argv = ["/bin/sh", "-c", "cat {config}; sleep 100000 & wait"]
        .map(String::from)
        .to_vec();
    spec
}

fn eventually(what: &str, mut look: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// A TCP connection between two places: (client's end, server's end).
fn connect(
    lab: &Lab,
    from: &Place,
    to: &Place,
    address: Ipv4Addr,
) -> std::io::Result<(TcpStream, TcpStream)> {
    let server = lab.place_fd(to).unwrap();
    let client = lab.place_fd(from).unwrap();
    let listener = in_network(server.as_fd(), || TcpListener::bind((address, 0))).unwrap()?;
    let port = listener.local_addr()?.port();
    let near = in_network(client.as_fd(), || {
        TcpStream::connect_timeout(&SocketAddr::from((address, port)), PATIENCE)
    })
    .unwrap()?;
    Ok((near, listener.accept()?.0))
}

/// A pair of UDP sockets over private link 0 of hosts a and b.
fn private_pair(lab: &Lab) -> (UdpSocket, UdpSocket) {
    let link = lab.host(&host("a")).unwrap().links[0].clone();
    let bind = |place: &str, address: Ipv4Addr| {
        let fd = lab.place_fd(&at(place)).unwrap();
        in_network(fd.as_fd(), || UdpSocket::bind((address, 0)))
            .unwrap()
            .unwrap()
    };
    let (a, b) = (bind("a", link.local), bind("b", link.remote));
    a.connect(b.local_addr().unwrap()).unwrap();
    b.connect(a.local_addr().unwrap()).unwrap();
    b.set_read_timeout(Some(SILENCE)).unwrap();
    (a, b)
}

fn passes(from: &UdpSocket, to: &UdpSocket, bytes: usize) -> bool {
    from.send(&vec![7; bytes]).unwrap();
    let mut buffer = vec![0; 16 * 1024];
    matches!(to.recv(&mut buffer), Ok(n) if n == bytes)
}

/// Pids of all descendants of a process, as the machine sees them.
fn descendants(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((
                pid,
                stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?,
            ))
        })
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let of = found[next];
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == of)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found.split_off(1)
}

/// The keeper's pid as the machine sees it, from the socket it listens on.
fn keeper_pid(dir: &Path) -> i32 {
    let stream = UnixStream::connect(dir.join("keeper.sock")).unwrap();
    nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
        .unwrap()
        .pid()
}

fn kill_keeper(dir: &Path) -> Vec<u32> {
    let keeper = keeper_pid(dir);
    let inside = descendants(keeper.unsigned_abs());
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(keeper),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    inside
}

#[test]
fn hosts_and_outside_reach_each_other_and_power_cycles() {
    let tmp = tempfile::tempdir().unwrap();
    let lab = Lab::up(spec(tmp.path())).unwrap();
    let (a, b) = (
        lab.host(&host("a")).unwrap().clone(),
        lab.host(&host("b")).unwrap().clone(),
    );
    assert!(
        std::fs::read_to_string(&a.config_file)
            .unwrap()
            .contains("# a 10.77.0.101")
    );

    connect(&lab, &Place::Outside, &at("a"), a.management).unwrap();
    connect(&lab, &at("b"), &at("a"), a.management).unwrap();
    connect(&lab, &at("a"), &Place::Outside, a.gateway).unwrap();
    let (udp_a, udp_b) = private_pair(&lab);
    assert!(
        passes(&udp_a, &udp_b, 8000),
        "a jumbo datagram over the private link"
    );
    drop((udp_a, udp_b));

    std::fs::write(a.state_dir.join("disk"), "kept").unwrap();
    let touched = lab
        .exec(
            &at("a"),
            &[
                "/bin/sh",
                "-c",
                &format!("echo ram > {}/ram", a.run_dir.display()),
            ],
        )
        .unwrap();
    assert!(touched.success());
    assert!(
        !a.run_dir.join("ram").exists(),
        "the run directory is the host's own"
    );

    // What talks to the host must not hear of its death: no FIN, no reset. The server
    // runs inside, so that its sockets die with it.
    let mut server = lab
        .command(&at("a"), &["perl", "-e", SERVER])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut port = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(server.stdout.take().unwrap()),
        &mut port,
    )
    .unwrap();
    let outside = lab.place_fd(&Place::Outside).unwrap();
    let address = (a.management, port.trim().parse::<u16>().unwrap());
    let mut client = in_network(outside.as_fd(), || TcpStream::connect(address))
        .unwrap()
        .unwrap();
    client.read_exact(&mut [0; 2]).unwrap();

    let before = MonotonicNs::now();
    let cut = lab.power_cut(&host("a")).unwrap();
    assert!(before <= cut && cut <= MonotonicNs::now());
    assert_eq!(lab.status().unwrap().hosts[0].power, HostPower::Off);
    assert_eq!(
        server.wait().unwrap().code(),
        Some(128 + 9),
        "what ran inside died with it"
    );
    client.set_read_timeout(Some(SILENCE)).unwrap();
    let heard = client.read(&mut [0; 1]);
    assert!(
        heard
            .as_ref()
            .is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
        "a dead host says nothing: {heard:?}"
    );
    assert!(matches!(
        lab.power_cut(&host("a")),
        Err(LabError::HostState { .. })
    ));
    assert!(matches!(
        lab.place_fd(&at("a")),
        Err(LabError::HostState { .. })
    ));

    lab.power_on(&host("a")).unwrap();
    assert_eq!(
        std::fs::read_to_string(a.state_dir.join("disk")).unwrap(),
        "kept"
    );
    let gone = lab
        .exec(
            &at("a"),
            &["test", "-e", &format!("{}/ram", a.run_dir.display())],
        )
        .unwrap();
    assert!(!gone.success(), "RAM is gone with the power");
    connect(&lab, &at("b"), &at("a"), a.management).unwrap();
    connect(&lab, &at("a"), &at("b"), b.management).unwrap();
    let (udp_a, udp_b) = private_pair(&lab);
    assert!(passes(&udp_a, &udp_b, 8000));
    assert!(matches!(
        lab.status().unwrap().hosts[0].daemon,
        DaemonState::Running(_)
    ));
    lab.down().unwrap();
    assert!(!tmp.path().join("lab").exists());
}

/// Accepts one connection and holds it. Perl is part of every Debian.
const SERVER: &str = "use IO::Socket::INET; $| = 1; \
    my $s = IO::Socket::INET->new(Listen => 1, LocalAddr => '0.0.0.0') or die; print $s->sockport, qq(\n); \
    my $c = $s->accept; print $c 'hi'; $c->flush; sleep 100000;";

#[test]
fn a_cut_link_is_silent_and_heals() {
    let tmp = tempfile::tempdir().unwrap();
    let lab = Lab::up(spec(tmp.path())).unwrap();
    let (a, b) = (host("a"), host("b"));
    let (udp_a, udp_b) = private_pair(&lab);
    assert!(passes(&udp_a, &udp_b, 100));
    lab.cut_link(&a, &b, 0).unwrap();
    assert!(!passes(&udp_a, &udp_b, 100));
    udp_a.send(b"still no error").unwrap();
    assert!(lab.status().unwrap().links[0].cut);
    let b_address = lab.host(&b).unwrap().management;
    connect(&lab, &at("a"), &at("b"), b_address).expect("the lan is another cable");
    // A power cycle is no repair.
    drop((udp_a, udp_b));
    lab.power_cut(&a).unwrap();
    lab.power_on(&a).unwrap();
    let (udp_a, udp_b) = private_pair(&lab);
    assert!(!passes(&udp_a, &udp_b, 100));
    lab.heal_link(&b, &a, 0).unwrap();
    // Host a knows nobody after its power cycle and asks again (ARP) once a second.
    eventually("it passes again", || passes(&udp_a, &udp_b, 100));
    lab.cut_lan(&b).unwrap();
    assert!(
        passes(&udp_a, &udp_b, 100),
        "the private link is another cable"
    );
    lab.heal_lan(&b).unwrap();
    connect(&lab, &Place::Outside, &at("b"), b_address).unwrap();
    assert!(
        lab.cut_link(&a, &b, 1)
            .unwrap_err()
            .to_string()
            .contains("private link 1")
    );
}

/// The carrier of host `a`'s end of its private link, as its kernel sees it.
fn carrier(lab: &Lab) -> String {
    let out = lab
        .command(&at("a"), &["ip", "-o", "link", "show", "dev", "ic0"])
        .output()
        .unwrap();
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn an_unplugged_link_has_no_carrier_and_a_slowed_one_drops() {
    let tmp = tempfile::tempdir().unwrap();
    let lab = Lab::up(spec(tmp.path())).unwrap();
    let (a, b) = (host("a"), host("b"));
    let (udp_a, udp_b) = private_pair(&lab);
    assert!(passes(&udp_a, &udp_b, 100) && !carrier(&lab).contains("NO-CARRIER"));
    lab.unplug_link(&a, &b, 0).unwrap();
    eventually("no carrier", || carrier(&lab).contains("NO-CARRIER"));
    let link = &lab.status().unwrap().links[0];
    assert!(link.cut && link.wiring == Wiring::Unplugged);
    lab.heal_link(&a, &b, 0).unwrap();
    eventually("it passes again", || {
        let _ = udp_a.send(&[7; 100]);
        matches!(udp_b.recv(&mut [0; 200]), Ok(100))
    });

    // 64 KiB/s: of 2 MB at once all but the burst and 50 ms are dropped, after a power
    // cycle as well.
    lab.shape_link(&a, &b, 0, Some(64 << 10)).unwrap();
    lab.power_cut(&b).unwrap();
    lab.power_on(&b).unwrap();
    drop((udp_a, udp_b));
    let (udp_a, udp_b) = private_pair(&lab);
    eventually("it passes", || {
        let _ = udp_a.send(&[7; 100]);
        matches!(udp_b.recv(&mut [0; 200]), Ok(100))
    });
    let flood = || {
        for _ in 0..250 {
            let _ = udp_a.send(&[1; 8000]);
        }
        let mut buffer = [0; 9000];
        std::iter::from_fn(|| udp_b.recv(&mut buffer).ok()).sum::<usize>()
    };
    let got = flood();
    assert!(got < 500_000, "{got} bytes of 2,000,000");
    assert_eq!(lab.status().unwrap().links[0].bytes_per_s, Some(64 << 10));
    lab.shape_link(&a, &b, 0, None).unwrap();
    lab.shape_link(&a, &b, 0, None).unwrap();
    assert!(passes(&udp_a, &udp_b, 8000));
}

#[test]
fn a_frozen_host_stands_still_as_a_whole() {
    let tmp = tempfile::tempdir().unwrap();
    let mut spec = spec(tmp.path());
    // A writer and one that forks without end: neither may slip through.
    spec.daemon_argv = [
        "/bin/sh",
        "-c",
        "(while :; do echo x; done > ticks.{host} &) ; (while :; do (:) ; echo y ; done > forks.{host} &) ; sleep 100000 & wait",
    ]
    .map(String::from)
    .to_vec();
    let lab = Lab::up(spec).unwrap();
    let state = lab.host(&host("a")).unwrap().state_dir.clone();
    let sizes =
        || ["ticks.a", "forks.a"].map(|f| std::fs::metadata(state.join(f)).map_or(0, |m| m.len()));
    eventually("both write", || sizes().iter().all(|&s| s > 0));
    lab.freeze(&host("a")).unwrap();
    let frozen = sizes();
    assert!(
        lab.processes(&host("a"))
            .unwrap()
            .iter()
            .all(|p| p.pid == 1 || "TZ".contains(p.state))
    );
    assert!(
        matches!(lab.place_fd(&at("a")), Err(LabError::HostState { .. })),
        "nothing new starts in it"
    );
    assert!(matches!(
        lab.freeze(&host("a")),
        Err(LabError::HostState { .. })
    ));
    assert_eq!(lab.status().unwrap().hosts[0].power, HostPower::Frozen);
    connect(
        &lab,
        &Place::Outside,
        &at("b"),
        lab.host(&host("b")).unwrap().management,
    )
    .unwrap();
    assert_eq!(sizes(), frozen);
    lab.thaw(&host("a")).unwrap();
    eventually("both go on", || {
        sizes().iter().zip(frozen).all(|(&now, then)| now > then)
    });
    lab.freeze(&host("a")).unwrap();
    lab.power_cut(&host("a")).unwrap();
    assert_eq!(lab.status().unwrap().hosts[0].power, HostPower::Off);
}

#[test]
fn one_process_can_be_killed_by_its_pid_inside() {
    let tmp = tempfile::tempdir().unwrap();
    let lab = Lab::up(spec(tmp.path())).unwrap();
    let DaemonState::Running(daemon) = lab.status().unwrap().hosts[1].daemon else {
        panic!("no daemon")
    };
    lab.kill_pid_in(&host("b"), daemon).unwrap();
    eventually("the daemon's end is seen", || {
        lab.status().unwrap().hosts[1].daemon == DaemonState::Ended(128 + 9)
    });
    assert!(matches!(
        lab.status().unwrap().hosts[0].daemon,
        DaemonState::Running(_)
    ));
    assert!(
        lab.kill_pid_in(&host("b"), 1)
            .unwrap_err()
            .to_string()
            .contains("cut its power")
    );
}

#[test]
fn labs_live_side_by_side_and_names_are_taken() {
    let tmp = tempfile::tempdir().unwrap();
    let tmp2 = tempfile::tempdir().unwrap();
    let first = Lab::up(spec(tmp.path())).unwrap();
    let second = Lab::up(spec(tmp2.path())).unwrap();
    for lab in [&first, &second] {
        connect(
            lab,
            &Place::Outside,
            &at("a"),
            lab.host(&host("a")).unwrap().management,
        )
        .unwrap();
    }
    let taken = Lab::up(spec(tmp.path())).err().expect("refused");
    assert!(matches!(taken, LabError::NameTaken { .. }), "{taken}");
    first.power_cut(&host("a")).unwrap();
    assert_eq!(second.status().unwrap().hosts[0].power, HostPower::On);
    drop(first);
    assert!(!tmp.path().join("lab").exists(), "dropping ends it");
    connect(
        &second,
        &Place::Outside,
        &at("b"),
        second.host(&host("b")).unwrap().management,
    )
    .unwrap();
}

#[test]
fn a_detached_lab_stays_and_is_taken_down_by_its_directory() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("lab");
    let mut spec = spec(tmp.path());
    spec.keep = KeepPolicy::Detached;
    drop(Lab::up(spec).unwrap());
    let lab = Lab::open_at(&dir).unwrap();
    assert_eq!(lab.status().unwrap().hosts.len(), 2);
    drop(lab);
    assert_eq!(take_down(&dir).unwrap(), TakenDown::WasUp);
    assert_eq!(take_down(&dir).unwrap(), TakenDown::WasNotThere);
    assert!(matches!(Lab::open_at(&dir), Err(LabError::NotUp { .. })));
}

#[test]
fn a_killed_keeper_leaves_no_process_mount_or_interface() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("lab");
    let lab = Lab::up(spec(tmp.path())).unwrap();
    eventually("the shells have started their sleeps", || {
        ["a", "b"].iter().all(|h| {
            lab.processes(&host(h))
                .unwrap()
                .iter()
                .any(|p| p.command == "sleep 100000")
        })
    });
    let inside = kill_keeper(&dir);
    assert!(
        inside.len() >= 6,
        "two inits, two shells, two sleeps: {inside:?}"
    );
    eventually("all are gone", || {
        inside
            .iter()
            .all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()));
    for interface in ["lan0", "lan-0", "lan-1", "ic0-0-1", "br0", "ic0"] {
        assert!(
            !Path::new("/sys/class/net").join(interface).exists(),
            "{interface}"
        );
    }
    assert!(matches!(lab.status(), Err(LabError::Control { .. })));
    assert!(dir.exists(), "a crash leaves its directory");

    let again = Lab::up(spec(tmp.path())).expect("the remains are no obstacle");
    assert!(
        matches!(lab.status(), Err(LabError::NotUp { .. })),
        "a dead lab's handle has no say in its successor"
    );
    drop(lab);
    connect(
        &again,
        &Place::Outside,
        &at("a"),
        again.host(&host("a")).unwrap().management,
    )
    .unwrap();
    kill_keeper(&dir);
    eventually("the keeper is dead", || again.status().is_err());
    drop(again);
    assert!(
        !dir.exists(),
        "the handle of a crashed lab removes its remains"
    );
}

#[test]
fn a_lab_dies_with_its_creator() {
    if let Some(dir) = std::env::var_os("POLLUX_TEST_CREATOR") {
        let _lab = Lab::up(spec(Path::new(&dir))).unwrap();
        println!("up");
        std::thread::sleep(PATIENCE * 10);
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("lab");
    // This very test, in a process of its own, is the creator.
    let mut creator = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_lab_dies_with_its_creator", "--nocapture"])
        .env("POLLUX_TEST_CREATOR", tmp.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    eventually("it is up", || {
        Lab::open_at(&dir).is_ok_and(|lab| lab.status().is_ok())
    });
    let inside = descendants(keeper_pid(&dir).unsigned_abs());
    creator.kill().unwrap();
    creator.wait().unwrap();
    eventually("all are gone", || {
        inside
            .iter()
            .all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
    eventually("so is the directory", || !dir.exists());
}

#[test]
fn bad_wishes_are_refused_in_words() {
    let tmp = tempfile::tempdir().unwrap();
    std::fs::create_dir(tmp.path().join("lab")).unwrap();
    std::fs::write(tmp.path().join("lab/thesis.txt"), "years").unwrap();
    assert!(matches!(
        Lab::up(spec(tmp.path())),
        Err(LabError::ForeignDir { .. })
    ));
    std::fs::remove_dir_all(tmp.path().join("lab")).unwrap();

    let mut missing = spec(tmp.path());
    missing.daemon_argv = vec!["/no/such/daemon".into()];
    let error = Lab::up(missing).err().expect("refused").to_string();
    assert!(
        error.contains("host `a`") && error.contains("/no/such/daemon"),
        "{error}"
    );

    let lab = Lab::up(spec(tmp.path())).unwrap();
    let error = lab.power_cut(&host("c")).unwrap_err().to_string();
    assert!(error.contains("no host `c`; it has a, b"), "{error}");
    assert!(
        lab.thaw(&host("a"))
            .unwrap_err()
            .to_string()
            .contains("only a frozen host")
    );
    assert_eq!(
        lab.exec(&at(OUTSIDE), &["/no/such/program"])
            .unwrap()
            .code(),
        Some(127)
    );
    assert_eq!(
        lab.exec(&at(OUTSIDE), &["sh", "-c", "exit 7"])
            .unwrap()
            .code(),
        Some(7)
    );
}
