//! Watchdog, supervisor and petter with real processes.

use super::{BootNs, Ended, Petter, Remote, Supervisor, Watchdog, WatchdogError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

/// Long beside what a busy machine may keep a thread waiting: two tests need a host to live.
const TIMEOUT: Duration = Duration::from_millis(1500);
const FAR: BootNs = BootNs(u64::MAX);
const CHILD_SOCKET: &str = "POLLUX_TEST_WATCHDOG";

/// Killed at the end, whatever happens.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    fn was_killed(&mut self) -> bool {
        self.0.wait().unwrap().signal() == Some(libc::SIGKILL)
    }
}

struct Bed {
    dir: tempfile::TempDir,
    host: Process,
    supervisor: JoinHandle<Result<Ended, WatchdogError>>,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Process(Command::new("sleep").arg("3600").spawn().unwrap());
        let supervisor = Supervisor::new(&dir.path().join("dog"), host.pid(), TIMEOUT).unwrap();
        let supervisor = std::thread::spawn(|| supervisor.run());
        Self {
            dir,
            host,
            supervisor,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("dog")
    }

    fn petter(&self, deadline: BootNs) -> Petter {
        Petter::start(Box::new(Remote::arm(&self.socket()).unwrap()), deadline).unwrap()
    }

    /// A daemon of its own process that pets for ever; returned once it does.
    fn daemon(&self) -> Process {
        let ready = self.dir.path().join("ready");
        nix::unistd::mkfifo(&ready, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let daemon = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "fence::watchdog::tests::a_daemon_that_pets",
                "--ignored",
            ])
            .env(CHILD_SOCKET, self.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Process(daemon);
        assert_eq!(std::fs::read(ready).unwrap(), b"petting");
        daemon
    }

    fn dies(mut self) {
        assert!(self.host.was_killed());
        assert_eq!(self.supervisor.join().unwrap().unwrap(), Ended::Fired);
    }
}

#[test]
#[ignore = "the other process of the tests below"]
fn a_daemon_that_pets() {
    let Some(dir) = std::env::var_os(CHILD_SOCKET) else {
        return;
    };
    let dir = Path::new(&dir);
    let petter = Petter::start(Box::new(Remote::arm(&dir.join("dog")).unwrap()), FAR).unwrap();
    std::fs::write(dir.join("ready"), b"petting").unwrap();
    loop {
        std::thread::park();
        assert_eq!(petter.timeout(), TIMEOUT);
    }
}

#[test]
fn a_host_whose_lease_is_not_renewed_dies() {
    let bed = Bed::new();
    let petter = bed.petter(BootNs::now().after(TIMEOUT));
    bed.dies();
    drop(petter);
}

#[test]
fn a_renewed_lease_keeps_the_host_alive_and_a_shortened_one_ends_it() {
    let mut bed = Bed::new();
    let petter = bed.petter(BootNs::now().after(TIMEOUT));
    petter.lease().set(FAR);
    // Longer than the first lease and the timeout together: only pets explain its life.
    let past = BootNs::now().after(TIMEOUT * 4);
    while BootNs::now() < past {
        assert!(bed.host.lives());
        std::thread::yield_now();
    }
    petter.lease().set(BootNs(0));
    bed.dies();
}

#[test]
fn a_killed_daemon_takes_its_host_with_it() {
    let bed = Bed::new();
    let daemon = bed.daemon();
    kill(daemon.pid(), Signal::SIGKILL).unwrap();
    bed.dies();
}

#[test]
fn a_frozen_daemon_takes_its_host_with_it() {
    let bed = Bed::new();
    let daemon = bed.daemon();
    kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    bed.dies();
    drop(daemon);
}

#[test]
fn a_dropped_petter_is_no_farewell() {
    let bed = Bed::new();
    drop(bed.petter(FAR));
    bed.dies();
}

#[test]
fn after_a_farewell_the_host_lives_and_can_be_armed_again() {
    let mut bed = Bed::new();
    bed.petter(FAR).farewell().unwrap();
    let past = BootNs::now().after(TIMEOUT * 3);
    while BootNs::now() < past {
        assert!(bed.host.lives());
        std::thread::yield_now();
    }
    drop(bed.petter(FAR));
    bed.dies();
}

#[test]
fn a_second_petter_cannot_take_over_not_even_after_the_first_is_gone() {
    let bed = Bed::new();
    let first = Remote::arm(&bed.socket()).unwrap();
    let refused = Remote::arm(&bed.socket()).unwrap_err().to_string();
    assert!(refused.contains("armed already"), "{refused}");
    drop(first);
    assert!(Remote::arm(&bed.socket()).is_err());
    bed.dies();
}

#[test]
fn a_permission_of_long_ago_does_not_keep_the_host_alive() {
    let bed = Bed::new();
    let mut dog = Remote::arm(&bed.socket()).unwrap();
    let stale = BootNs::now();
    while dog.pet(stale).is_ok() {}
    bed.dies();
}

#[test]
fn a_supervisor_whose_host_is_gone_ends() {
    let mut bed = Bed::new();
    bed.host.0.kill().unwrap();
    bed.host.0.wait().unwrap();
    assert_eq!(bed.supervisor.join().unwrap().unwrap(), Ended::HostGone);
}

#[test]
fn a_supervisor_refuses_this_machines_own_init() {
    let dir = tempfile::tempdir().unwrap();
    let refused = Supervisor::new(&dir.path().join("dog"), Pid::from_raw(1), TIMEOUT);
    assert!(matches!(refused.err(), Some(WatchdogError::Refused { .. })));
}
