//! Hosts, QEMUs and links fail under a real VM with clients outside; nothing may be lost.
//! Drills (`pollux::drill`) where the measured course is the same each time, and the lab
//! by hand where it is not. Needs root and the test guest.

// Helpers outside of #[test] functions unwrap too.
#![allow(clippy::unwrap_used)]

mod common;

use common::eventually;
use pollux::api::client::block;
use pollux::api::types::{Done, Role, VmStatus};
use pollux::drill::env::{DrillEnv, Load, Service, Setting, VmView};
use pollux::drill::lab_env::{GUEST, Guest, LabEnv, VM_NAME};
use pollux::drill::run::{Pace, run_paced};
use pollux::drill::{DrillKind, DrillReport, DrillSpec, table};
use pollux::lab::{DaemonState, Place, in_network};
use pollux::pool::HostName;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long silence is watched before it counts as silence.
const SILENCE: Duration = Duration::from_millis(500);
/// A standby may cost its host this share of the guest's memory, per cent.
const STANDBY_MEMORY_MAX_PERCENT: u64 = 125;

/// One VM with its lab at a time: two would measure and starve each other.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder of the test guest, built if it is missing.
static IMAGES: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = Command::new(root.join("guest/build"))
        .current_dir(root)
        .output()
        .unwrap();
    assert!(
        built.status.success(),
        "guest/build: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    String::from_utf8(built.stdout).unwrap().trim().into()
});

fn guest(machine: &str) -> Guest {
    Guest {
        machine: machine.into(),
        ..Guest::new(&IMAGES)
    }
}

/// `pollux drill run`'s own defaults.
fn load() -> Load {
    Load {
        clients: 2,
        disk_iops: 200,
        mem_pages_s: 2000,
        net: false,
    }
}

fn env(guest: Guest) -> LabEnv {
    LabEnv::new(common::fresh_name(), guest).program(common::POLLUX)
}

/// The failures come sooner than in a drill for people; the limits stay.
fn pace() -> Pace {
    Pace {
        baseline: Duration::from_millis(300),
        calm: (Duration::from_millis(200), Duration::from_millis(1200)),
        ..Pace::default()
    }
}

fn drill(env: &mut LabEnv, kind: DrillKind, repeat: u32, service: Service) -> DrillReport {
    let seed = std::env::var("POLLUX_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let since_boot = pollux::lab::MonotonicNs::now().0;
    let spec = DrillSpec {
        kind,
        repeat,
        links: 2,
        cut_before: false,
        load: load(),
        service,
        seed: seed.unwrap_or(since_boot),
        audit: true,
        json: false,
    };
    let report = run_paced(&spec, env, &pace(), &mut |text| eprintln!("{text}")).unwrap();
    let text = table::table(&report);
    assert!(report.passed(), "{text}\n{}", logs(env));
    eprintln!("{text}");
    report
}

/// What the daemons said last, for the reader of a failed test.
fn logs(env: &LabEnv) -> String {
    let Ok(lab) = env.lab() else {
        return String::new();
    };
    let mut all = String::new();
    for net in &lab.plan().hosts {
        let log = std::fs::read_to_string(&net.daemon_log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(60)..];
        all += &format!("--- daemon of {} ---\n{}\n", net.name, last.join("\n"));
    }
    all
}

#[test]
fn every_kind_of_failure_loses_nothing() {
    let _alone = alone();
    let mut env = env(guest("auto")).stay_up();
    for kind in [
        DrillKind::KillHost,
        DrillKind::KillQemu,
        DrillKind::CutLink,
        DrillKind::FreezeHost,
        DrillKind::Switchover,
    ] {
        let report = drill(&mut env, kind, 2, Service::Counter);
        // What the report's own verdict may not be built on by mistake.
        assert_eq!(report.runs.len(), 2);
        assert_eq!(
            (report.missing_on_disk, report.damaged_on_disk),
            (Some(0), 0)
        );
        assert!(
            report.numbers.answers > 100,
            "{} answers",
            report.numbers.answers
        );
        for run in &report.runs {
            let moved = run.to.as_ref() != Some(&run.from);
            assert!(moved || kind == DrillKind::CutLink);
            assert_eq!(
                run.audit.is_some_and(|a| a.memory_equal && a.disks_equal),
                moved
            );
        }
    }
}

#[test]
fn one_link_of_two_may_fail_and_the_vm_stays_mirrored() {
    let _alone = alone();
    let mut env = env(guest("auto")).stay_up();
    for (kind, runs) in [(DrillKind::CutOneLink, 3), (DrillKind::SlowLink, 1)] {
        let report = drill(&mut env, kind, runs, Service::Counter);
        assert_eq!(report.runs.len(), runs as usize);
        assert_eq!(
            (report.missing_on_disk, report.damaged_on_disk),
            (Some(0), 0)
        );
        for run in &report.runs {
            assert_eq!(run.to.as_ref(), Some(&run.from));
            assert!(!run.links.is_empty() && run.reprotected_us.is_none());
            assert!(run.links.iter().all(|link| link.back_us.is_some()));
        }
    }
}

#[test]
fn redis_counts_on_over_three_failovers() {
    let _alone = alone();
    let report = drill(
        &mut env(guest("auto")),
        DrillKind::KillHost,
        3,
        Service::Redis,
    );
    assert_eq!(report.runs.len(), 3);
    assert!(report.runs.iter().all(|run| run.reprotected_us.is_some()));
}

#[test]
fn two_processors_and_legacy_pci_fail_over() {
    let _alone = alone();
    let guest = Guest {
        vcpus: 2,
        ..guest("q35")
    };
    let report = drill(&mut env(guest), DrillKind::KillHost, 1, Service::Counter);
    assert!(
        report.runs[0]
            .audit
            .is_some_and(|a| a.memory_equal && a.disks_equal)
    );
}

/// A mirrored VM, and a connection to its counter that must never break.
struct Bench {
    env: LabEnv,
    primary: VmView,
    stream: BufReader<TcpStream>,
    number: u64,
}

impl Bench {
    fn new(mut env: LabEnv) -> Self {
        let setting = Setting {
            load: load(),
            service: Service::Counter,
            links: 2,
            audit: true,
        };
        env.prepare(&setting, pace().prepare_max).unwrap();
        env.protect().unwrap();
        let primary = env.wait_mirrored(pace().mirror_max).unwrap();
        let stream = connect(&env);
        let number = env.ask_guest("GET").unwrap().parse().unwrap();
        let mut bench = Self {
            env,
            primary,
            stream,
            number,
        };
        bench.count(20);
        bench
    }

    fn send(&mut self) {
        let request = format!("INC 1 {}\n", self.number + 1);
        self.stream.get_mut().write_all(request.as_bytes()).unwrap();
    }

    /// The next number, and no other; false if nothing came in `limit`.
    fn take(&mut self, limit: Duration) -> bool {
        self.stream.get_mut().set_read_timeout(Some(limit)).unwrap();
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(_) => {
                self.number += 1;
                assert_eq!(
                    line.trim_end(),
                    self.number.to_string(),
                    "{}",
                    logs(&self.env)
                );
                true
            }
            Err(e)
                if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
                    && line.is_empty() =>
            {
                false
            }
            Err(e) => panic!("the connection broke: {e}\n{}", logs(&self.env)),
        }
    }

    /// So many answers, each one more than the last.
    fn count(&mut self, times: u64) {
        for _ in 0..times {
            self.send();
            assert!(
                self.take(common::PATIENCE),
                "no answer\n{}",
                logs(&self.env)
            );
        }
    }

    fn host(&self) -> HostName {
        self.primary.host.clone()
    }

    fn other(&self) -> HostName {
        let hosts = &self.env.lab().unwrap().plan().hosts;
        hosts
            .iter()
            .map(|h| h.name.clone())
            .find(|h| *h != self.primary.host)
            .unwrap()
    }

    /// Some side runs the VM after the tenure that was.
    fn wait_running(&mut self) {
        let was = self.primary.generation;
        self.primary = self
            .env
            .wait_running(was, pace().failover_max)
            .unwrap_or_else(|e| panic!("{e}\n{}", logs(&self.env)));
    }

    fn wait_mirrored(&mut self) {
        self.primary = self
            .env
            .wait_mirrored(pace().mirror_max)
            .unwrap_or_else(|e| panic!("{e}\n{}", logs(&self.env)));
    }

    fn fail(&mut self, kind: DrillKind) -> HostName {
        let failed = self.host();
        self.env.inject(kind, &failed).unwrap();
        failed
    }

    fn command(&self, host: &HostName, command: &str) {
        let path = format!("/v1/vms/{VM_NAME}/{command}");
        let _: Done = block(self.env.client(host).unwrap().post(&path, &())).unwrap();
    }

    fn wait_status(
        &self,
        host: &HostName,
        what: &str,
        wanted: impl Fn(&VmStatus) -> bool,
    ) -> VmStatus {
        eventually(what, || self.env.status(host).filter(|s| wanted(s)))
    }

    /// Command lines of a host's processes that name QEMU, less those that are dead.
    fn qemus(&self, host: &HostName) -> Vec<String> {
        let all = self.env.lab().unwrap().processes(host).unwrap();
        all.into_iter()
            .filter(|p| p.command.contains("qemu-system") && p.state != 'Z')
            .map(|p| p.command)
            .collect()
    }

    /// A host's taps.
    fn taps(&self, host: &HostName) -> String {
        let argv = ["ip", "-o", "link", "show", "type", "tun"];
        let out = self
            .env
            .lab()
            .unwrap()
            .command(&Place::Host(host.clone()), &argv)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// The guest's own word on itself: which boot, and that no worker found a fault.
    fn check_guest(&self) -> u64 {
        let verdict = self.env.ask_guest("VERIFY").unwrap();
        assert!(verdict.starts_with("OK "), "{verdict}");
        let state = self.env.ask_guest("STATE").unwrap();
        assert!(
            state.contains("disk_errors=0") && state.contains("memory_errors=0"),
            "{state}"
        );
        boot_of(&state).unwrap_or_else(|| panic!("{state}"))
    }
}

fn boot_of(state: &str) -> Option<u64> {
    state.strip_prefix("boot=")?.split(' ').next()?.parse().ok()
}

fn connect(env: &LabEnv) -> BufReader<TcpStream> {
    let outside = env.lab().unwrap().place_fd(&Place::Outside).unwrap();
    let connect =
        || TcpStream::connect_timeout(&SocketAddr::from((GUEST, 7000)), Duration::from_secs(5));
    let stream = in_network(outside.as_fd(), connect).unwrap().unwrap();
    stream.set_nodelay(true).unwrap();
    BufReader::new(stream)
}

/// QEMU skips the reset of an incoming guest's ROMs, so a careless standby dies at its
/// first reboot (QEMU.md section 5).
#[test]
fn the_guest_reboots_after_a_failover() {
    let _alone = alone();
    for machine in ["auto", "q35", "pc"] {
        eprintln!("machine {machine}");
        let mut bench = Bench::new(env(guest(machine)));
        let boot = bench.check_guest();
        let failed = bench.fail(DrillKind::KillHost);
        bench.wait_running();
        bench.count(5);
        bench.env.repair(DrillKind::KillHost, &failed).unwrap();
        bench.wait_mirrored();
        bench.count(5);
        assert_eq!(bench.env.ask_guest("REBOOT").unwrap(), "OK");
        eventually("the guest is back", || {
            let state = bench.env.ask_guest("STATE").ok()?;
            (boot_of(&state)? == boot + 1).then_some(())
        });
        bench.stream = connect(&bench.env);
        bench.count(20);
        assert_eq!(bench.check_guest(), boot + 1);
        bench.wait_mirrored();
        assert_ne!(bench.host(), failed);
    }
}

#[test]
fn a_frozen_host_finds_itself_deposed_and_puts_everything_away() {
    let _alone = alone();
    let mut bench = Bench::new(env(guest("auto")));
    // Under the default load for a while first: what the standby costs its host.
    let standby = bench.other();
    let end = Instant::now() + Duration::from_secs(3);
    let mut worst = 0;
    while worst == 0 || Instant::now() < end {
        bench.count(1);
        worst = worst.max(
            bench
                .env
                .status(&standby)
                .and_then(|s| s.resident_bytes)
                .unwrap_or(0),
        );
    }
    let memory = bench.env.status(&standby).unwrap().memory_bytes;
    eprintln!(
        "the standby costs {} MiB for a guest of {} MiB",
        worst >> 20,
        memory >> 20
    );
    assert!(
        worst * 100 <= memory * STANDBY_MEMORY_MAX_PERCENT,
        "{worst} bytes for a guest of {memory}"
    );

    let failed = bench.fail(DrillKind::FreezeHost);
    bench.wait_running();
    assert_ne!(bench.host(), failed);
    bench.count(20);
    // No new standby: nothing but the deposed side is to be seen there.
    bench.command(&bench.host(), "unprotect");
    bench.env.repair(DrillKind::FreezeHost, &failed).unwrap();
    bench.count(50);
    bench.wait_status(&failed, "the deposed side stands down", |s| {
        s.role == Role::Stopped
    });
    assert_eq!(bench.qemus(&failed), Vec::<String>::new());
    assert_eq!(bench.taps(&failed), "");
    assert_eq!(bench.qemus(&bench.host()).len(), 1);
    assert_ne!(bench.taps(&bench.host()), "");
    bench.count(50);
    bench.check_guest();
    bench.env.protect().unwrap();
    bench.wait_mirrored();
    assert_ne!(bench.host(), failed);
    bench.count(20);
}

#[test]
fn a_daemon_that_crashes_takes_its_qemu_along_and_the_standby_goes_on() {
    let _alone = alone();
    let mut bench = Bench::new(env(guest("auto")));
    let failed = bench.host();
    let lab = bench.env.lab().unwrap();
    let status = lab.status().unwrap();
    let daemon = status
        .hosts
        .into_iter()
        .find(|h| h.name == failed)
        .unwrap()
        .daemon;
    let DaemonState::Running(pid) = daemon else {
        panic!("{daemon:?}")
    };
    lab.kill_pid_in(&failed, pid).unwrap();
    bench.wait_running();
    assert_ne!(bench.host(), failed);
    bench.count(20);
    eventually("the crashed daemon's QEMU is dead", || {
        bench.qemus(&failed).is_empty().then_some(())
    });
    assert_eq!(bench.taps(&failed), "");
    // As after the host's own restart.
    bench.env.lab().unwrap().power_cut(&failed).unwrap();
    bench.env.repair(DrillKind::KillHost, &failed).unwrap();
    bench.wait_mirrored();
    bench.count(20);
    bench.check_guest();
}

#[test]
fn without_registry_the_guest_holds_still_and_later_one_side_goes_on() {
    let _alone = alone();
    // A locked file in a folder that can be taken away.
    let mut bench = Bench::new(env(guest("auto")).statefile_disks(0));
    let (primary, standby) = (bench.host(), bench.other());
    let shared = bench.env.lab().unwrap().plan().hosts[0].shared_dir.clone();
    let away = shared.with_extension("away");
    std::fs::rename(&shared, &away).unwrap();
    bench.count(20); // who is mirrored needs no registry
    bench.fail(DrillKind::CutLink);
    let held = bench.wait_status(&primary, "the guest is held still", |s| {
        s.warnings
            .iter()
            .any(|w| w.contains("stands still") && w.contains("registry"))
    });
    assert!(held.role == Role::Primary && !held.mirrored, "{held:#?}");
    bench.send();
    assert!(
        !bench.take(SILENCE),
        "answered although nobody may run the VM"
    );
    // Neither side has made itself the one that runs the VM.
    for host in [&primary, &standby] {
        let status = bench.env.status(host).unwrap();
        assert_eq!(status.generation, bench.primary.generation, "{status:#?}");
    }
    std::fs::rename(&away, &shared).unwrap();
    assert!(
        bench.take(common::PATIENCE),
        "no answer after the registry came back\n{}",
        logs(&bench.env)
    );
    bench.count(20);
    bench.wait_running();
    let loser = bench.other();
    bench.env.repair(DrillKind::CutLink, &primary).unwrap();
    bench.wait_mirrored();
    assert_eq!(bench.other(), loser, "the side that won kept the VM");
    bench.count(20);
    bench.check_guest();
}
