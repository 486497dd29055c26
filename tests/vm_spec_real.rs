//! A spec becomes a real QEMU: the command line is accepted, the process is
//! watched and ended, what cannot be mirrored is refused.

// Helpers of tests: a failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

use pollux::pool::spec::VmSpec;
use pollux::vm::admission::{AdmissionError, check_running};
use pollux::vm::argv::{Accel, QEMU, Side, VmPaths, command_line};
use pollux::vm::kernel::check_host;
use pollux::vm::probe::{common_machine, find_qemu};
use pollux::vm::process::{ExitHow, Qemu, SpawnOpts};
use pollux::vm::room::{
    check_memory_room, create_ram_file, give, prepare_run_dir, stage_boot_files,
};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// `nobody` on every Debian: QEMU's user in these tests.
const UID: u32 = 65_534;
/// Far beyond what any step takes; only a broken QEMU gets here.
const PATIENCE: Duration = Duration::from_secs(60);

/// A VM of one test: its folders, its disk and the NBD server of it.
struct Place {
    _dir: tempfile::TempDir,
    _ram: tempfile::TempDir,
    spec: VmSpec,
    paths: VmPaths,
    nbd: Vec<Child>,
}

impl Drop for Place {
    fn drop(&mut self) {
        for child in &mut self.nbd {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spec(dir: &Path, machine: &str, more: &str) -> VmSpec {
    let boot = if machine == "microvm" {
        // No Linux: QEMU only loads it, the guest may do with it what it likes.
        let kernel = dir.join("kernel");
        let mut image = vec![0_u8; 4096];
        // Header of a multiboot kernel (Multiboot 0.6.96, 3.1): magic, flags with addresses, sum.
        let (magic, flags) = (0x1bad_b002_u32, 0x1_0000_u32);
        let sum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
        let at = 0x10_0000_u32;
        for (i, word) in [magic, flags, sum, at, at, at + 4096, at + 4096, at + 64]
            .iter()
            .enumerate()
        {
            image[i * 4..i * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        image[64..67].copy_from_slice(&[0xf4, 0xeb, 0xfd]); // hlt; jmp
        std::fs::write(&kernel, image).unwrap();
        format!("kernel = \"{}\"", kernel.display())
    } else {
        "boot = \"disk\"".to_owned()
    };
    let disk = dir.join("disk,with comma.raw");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let text = format!(
        "name = \"real\"\nuuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"\nmemory = \"64 MiB\"\nvcpus = 2\n\
         machine = \"{machine}\"\n{boot}\n{more}\n[[disk]]\nname = \"root\"\npath = \"{}\"\nsize = \"1 \
         MiB\"\n[[nic]]\nname = \"lan\"\nbridge = \"br0\"\n",
        disk.display()
    );
    VmSpec::parse(&text, "-").unwrap()
}

fn place(machine: &str, more: &str) -> Place {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let ram = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::set_permissions(ram.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let spec = spec(dir.path(), machine, more);
    let run_dir = dir.path().join("run");
    prepare_run_dir(&run_dir, UID, UID).unwrap();
    let mut paths = VmPaths::new(&spec, &run_dir, ram.path()).unwrap();
    stage_boot_files(&mut paths, UID, UID).unwrap();
    check_memory_room(ram.path(), spec.memory.get()).unwrap();
    create_ram_file(&paths.ram_file, spec.memory.get(), UID, UID).unwrap();
    let mut nbd = Vec::new();
    for (disk, socket) in spec.disks.iter().zip(&paths.nbd) {
        let listener = UnixListener::bind(socket).unwrap();
        give(socket, UID, UID, 0o660).unwrap();
        nbd.push(serve(&disk.path, listener));
    }
    Place {
        _dir: dir,
        _ram: ram,
        spec,
        paths,
        nbd,
    }
}

/// qemu-nbd on a socket that listens already (systemd's LISTEN_FDS), so that nothing has
/// to wait for it.
fn serve(disk: &Path, listener: UnixListener) -> Child {
    use std::os::fd::AsRawFd;
    let child = Command::new("sh")
        .args(["-c", "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec qemu-nbd -t -e 8 --image-opts \"$0\""])
        .arg(format!("driver=raw,file.driver=file,file.filename={}", disk.display().to_string().replace(',', ",,")))
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(listener.try_clone().unwrap())))
        .spawn()
        .unwrap();
    assert!(listener.as_raw_fd() >= 0);
    child
}

fn opts(paths: &VmPaths) -> SpawnOpts {
    SpawnOpts {
        uid: UID,
        gid: UID,
        groups: vec![],
        log: paths.qemu_log.clone(),
        cwd: paths.run_dir.clone(),
    }
}

fn start(place: &Place, machine: &str, side: Side) -> Qemu {
    let cmd = command_line(&place.spec, machine, side, &place.paths, Accel::Tcg);
    Qemu::spawn(&cmd, opts(&place.paths)).unwrap()
}

/// One monitor, spoken to one command at a time.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Waits until QEMU listens; tells why if it ended instead.
    fn connect(path: &PathBuf, qemu: &Qemu) -> Self {
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(path) {
                break stream;
            }
            if let Some(exit) = qemu.wait_exit(Some(Duration::from_millis(5))) {
                panic!("{exit}");
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Self(BufReader::new(stream));
        let mut greeting = String::new();
        qmp.0.read_line(&mut greeting).unwrap();
        qmp.run("qmp_capabilities", json!({})).unwrap();
        qmp
    }

    fn run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.0
            .get_mut()
            .write_all(text.as_bytes())
            .map_err(|e| e.to_string())?;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).map_err(|e| e.to_string())? == 0 {
                return Err("the monitor is gone".to_owned());
            }
            let answer: Value = serde_json::from_str(&line).map_err(|e| e.to_string())?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].to_string());
            }
        }
    }
}

#[test]
fn every_machine_takes_the_line_on_both_sides_and_may_be_mirrored() {
    let host = find_qemu(QEMU).unwrap();
    for (machine, devices) in [
        ("microvm", "[\"virtio-rng-device\"]"),
        (
            "q35",
            "[\"virtio-rng-pci\", \"virtio-serial-pci\", \"i6300esb\"]",
        ),
        ("pc", "[\"virtio-rng-pci\", \"virtio-gpu-pci\"]"),
    ] {
        for side in [Side::Primary, Side::Standby] {
            let place = place(machine, &format!("devices = {devices}"));
            let versioned = common_machine(&place.spec, &host.machines, &host.machines).unwrap();
            let qemu = start(&place, &versioned, side);
            let status = std::fs::read_to_string(format!("/proc/{}/status", qemu.pid())).unwrap();
            assert!(
                status.contains(&format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n")),
                "{status}"
            );
            let mut qmp = Qmp::connect(&place.paths.qmp.control, &qemu);
            let status = qmp.run("query-status", json!({})).unwrap();
            let expected = match side {
                Side::Primary => "running",
                Side::Standby => "inmigrate",
            };
            assert_eq!(status["status"], expected, "{machine}");
            check_running(|command, arguments| qmp.run(command, arguments)).unwrap();
            for socket in [
                &place.paths.qmp.run,
                &place.paths.qmp.save,
                &place.paths.qmp.spare,
            ] {
                Qmp::connect(socket, &qemu);
            }
            let mut console = UnixStream::connect(&place.paths.console).unwrap();
            console.write_all(b"\n").unwrap();
            if side == Side::Primary {
                qmp.run("stop", json!({})).unwrap();
                let save = json!({ "filename": place.paths.state_file, "live": false });
                qmp.run("xen-save-devices-state", save).unwrap();
                let state = std::fs::metadata(&place.paths.state_file).unwrap();
                assert_eq!(state.uid(), UID);
                println!("{machine}: state of {} bytes", state.len());
                qmp.run("cont", json!({})).unwrap();
            }
            qemu.kill();
            let exit = qemu.wait_exit(Some(PATIENCE)).unwrap();
            assert_eq!(exit.how, ExitHow::Signal(libc::SIGKILL));
            assert!(exit.to_string().contains("was killed by SIGKILL"), "{exit}");
        }
    }
}

#[test]
fn an_nvme_device_is_refused_before_any_save() {
    let place = place("q35", "devices = [\"nvme,serial=x\"]");
    let qemu = start(&place, "q35", Side::Primary);
    let mut qmp = Qmp::connect(&place.paths.qmp.control, &qemu);
    let mut asked = Vec::new();
    let error = check_running(|command, arguments| {
        asked.push(command.to_owned());
        qmp.run(command, arguments)
    })
    .unwrap_err();
    assert!(matches!(error, AdmissionError::Refused(_)));
    let said = error.to_string();
    assert!(
        said.contains("device `nvme` cannot be mirrored: it kills QEMU"),
        "{said}"
    );
    assert!(
        asked.iter().all(|command| !command.contains("save")),
        "{asked:?}"
    );
    // Still alive: nothing was tried on it.
    assert!(qemu.wait_exit(Some(Duration::ZERO)).is_none());
}

#[test]
fn what_bypasses_pollux_is_seen_in_a_running_qemu() {
    let place = place("pc", "");
    let mut cmd = command_line(&place.spec, "pc", Side::Primary, &place.paths, Accel::Tcg);
    // As somebody would do it by hand.
    let file = place.paths.run_dir.join("other.raw");
    std::fs::write(&file, [0; 4096]).unwrap();
    give(&file, UID, UID, 0o600).unwrap();
    cmd.extend(["-netdev".into(), "user,id=u0".into(), "-blockdev".into()]);
    cmd.push(format!("driver=file,node-name=own,filename={}", file.display()).into());
    for i in cmd.iter_mut().filter(|arg| *arg == "64M") {
        *i = "64M,slots=1,maxmem=256M".into();
    }
    cmd.extend([
        "-object".into(),
        "memory-backend-ram,id=more,size=64M".into(),
    ]);
    cmd.extend(["-device".into(), "pc-dimm,id=dimm1,memdev=more".into()]);
    let qemu = Qemu::spawn(&cmd, opts(&place.paths)).unwrap();
    let mut qmp = Qmp::connect(&place.paths.qmp.control, &qemu);
    let said = check_running(|command, arguments| qmp.run(command, arguments))
        .unwrap_err()
        .to_string();
    for part in [
        "memory device `dimm1`",
        "`u0` of type user",
        "disk node `own`",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn an_end_is_told_in_words_with_the_log() {
    let place = place("q35", "");
    let qemu = start(&place, "no-such-machine", Side::Primary);
    let exit = qemu.wait_exit(Some(PATIENCE)).unwrap();
    assert_eq!(exit.how, ExitHow::Status(1));
    let said = exit.to_string();
    assert!(
        said.contains("ended with status 1; it said last:")
            && said.contains("unsupported machine type"),
        "{said}"
    );
}

#[test]
fn a_dropped_qemu_is_dead_and_reaped() {
    let place = place("q35", "");
    let qemu = start(&place, "q35", Side::Primary);
    let pid = qemu.pid();
    // Started from a thread that is gone by now, it must live on until the drop.
    assert!(qemu.wait_exit(Some(Duration::ZERO)).is_none());
    drop(qemu);
    assert!(!Path::new(&format!("/proc/{pid}/exe")).exists());
}

/// Run by the next test as a daemon of its own.
#[test]
#[ignore = "the other half of a_qemu_dies_with_its_daemon"]
fn daemon_for_the_next_test() {
    let Ok(log) = std::env::var("POLLUX_TEST_DAEMON_LOG") else {
        return;
    };
    let dir = PathBuf::from(&log).parent().unwrap().to_owned();
    let cmd = ["sleep".into(), "1000".into()];
    let opts = SpawnOpts {
        uid: UID,
        gid: UID,
        groups: vec![],
        log: log.into(),
        cwd: dir,
    };
    // From a thread that ends at once: the child must not die with it.
    let child = std::thread::spawn(move || Qemu::spawn(&cmd, opts).unwrap())
        .join()
        .unwrap();
    println!("child {}", child.pid());
    std::io::stdout().flush().unwrap();
    // Until the parent kills us.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn a_qemu_dies_with_its_daemon() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "daemon_for_the_next_test",
        ])
        .env("POLLUX_TEST_DAEMON_LOG", dir.path().join("log"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let pid: i32 = lines
        .find_map(|line| Some(line.unwrap().split_once("child ")?.1.parse().unwrap()))
        .unwrap();
    // SAFETY: integers only; a pidfd of a process that runs.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(pidfd >= 0, "the child lives while its daemon does");
    let mut poll = libc::pollfd {
        fd: i32::try_from(pidfd).unwrap(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, as said.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 0);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 60_000) }, 1);
}

#[test]
fn this_host_can_mirror() {
    check_host().unwrap();
}

#[test]
fn too_little_room_says_how_much_is_missing() {
    let ram = tempfile::tempdir_in("/dev/shm").unwrap();
    let said = check_memory_room(ram.path(), 1 << 50)
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("the VM needs 1024 TiB") && said.contains("are missing"),
        "{said}"
    );
    let said = check_memory_room(Path::new("/proc"), 1)
        .unwrap_err()
        .to_string();
    assert!(said.starts_with("/proc is not a tmpfs"), "{said}");
}
