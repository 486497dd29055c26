//! A real QEMU for the tests here: no disk, no kernel, only a firmware of thirty bytes
//! that counts. It shows everything a checkpoint must keep: memory that changes all the
//! time, a tick counter, and a ROM outside the shared RAM without which no reboot works.

use super::{Checkpointer, CutHooks, CutOptions, HookError, Monitors};
use crate::vm::qmp::Qmp;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(super) const RAM_MIB: u64 = 16;
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Guest address of the number of rounds (be careful: little endian u32).
const ROUNDS_AT: u64 = 0x1000;
/// Guest address of the number of boots.
const BOOTS_AT: u64 = 0x1008;
/// Guest address of the guest's last `rdtsc`.
const TICKS_AT: u64 = 0x1010;

/// The firmware, or one that halts at once and so leaves the CPUs alone. The reset vector is 16 bytes below the end; it jumps to offset 0.
fn firmware(idle: bool) -> Vec<u8> {
    const CODE: [u8; 27] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xff, 0x06, 0x08, 0x10, // inc dword [0x1008]
        0x66, 0xff, 0x06, 0x00, 0x10, // again: inc dword [0x1000]
        0x0f, 0x31, // rdtsc
        0x66, 0xa3, 0x10, 0x10, // mov [0x1010], eax
        0x66, 0x89, 0x16, 0x14, 0x10, // mov [0x1014], edx
        0xeb, 0xee, // jmp again
    ];
    let mut rom = vec![0xf4; 64 * 1024];
    if !idle {
        rom[..CODE.len()].copy_from_slice(&CODE);
        rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    }
    rom
}

/// One QEMU and its files. Ends with the value.
pub(super) struct TestVm {
    pub(super) child: Child,
    pub(super) dir: TempDir,
}

impl TestVm {
    pub(super) fn primary(machine: &str, extra: &[&str]) -> Self {
        Self::start(machine, extra, None, false)
    }

    /// A primary whose guest does nothing, for measurements.
    pub(super) fn idle(machine: &str, extra: &[&str]) -> Self {
        Self::start(machine, extra, None, true)
    }

    /// A standby whose RAM file holds `ram`.
    pub(super) fn standby(machine: &str, extra: &[&str], ram: &[u8]) -> Self {
        Self::start(machine, extra, Some(ram), false)
    }

    fn start(machine: &str, extra: &[&str], incoming: Option<&[u8]>, idle: bool) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("pollux-cut-")
            .tempdir_in("/dev/shm")
            .expect("a folder in /dev/shm");
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("bios"), firmware(idle)).expect("firmware");
        let ram = File::create(path("ram")).expect("RAM file");
        ram.set_len(RAM_MIB << 20).expect("RAM size");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-nodefaults"])
            .args(["-display", "none", "-vga", "none"])
            .arg("-machine")
            .arg(format!("{machine},memory-backend=ram,suppress-vmdesc=on"))
            .args(["-global", "migration.send-configuration=off"])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=ram,size={RAM_MIB}M,share=on,mem-path={}",
                path("ram")
            ))
            .args(["-m", &format!("{RAM_MIB}M"), "-bios", &path("bios")])
            .args(extra)
            .current_dir(dir.path());
        for monitor in ["control", "stop", "save", "cont"] {
            command.arg("-qmp").arg(format!(
                "unix:{},server=on,wait=off",
                path(&format!("{monitor}.qmp"))
            ));
        }
        if let Some(content) = incoming {
            ram.write_all_at(content, 0).expect("RAM content");
            command.args(["-S", "-incoming", "defer"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(path("stderr")).expect("stderr file"));
        // SAFETY: prctl with these arguments only sets a flag of the new process; it is
        // async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command
            .spawn()
            .expect("qemu-system-x86_64 must be installed");
        Self { child, dir }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn monitor(&self, name: &str) -> Qmp {
        let path = self.path(&format!("{name}.qmp"));
        Qmp::connect(&path, PATIENCE).unwrap_or_else(|error| panic!("{error}: {}", self.stderr()))
    }

    pub(super) fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    pub(super) fn checkpointer(&self, repair_clock: bool) -> Checkpointer {
        let monitors = Monitors {
            stop: self.monitor("stop"),
            save: self.monitor("save"),
            cont: self.monitor("cont"),
        };
        let options = CutOptions {
            qemu_pid: self.child.id(),
            state_file: self.path("state"),
            state_name: self.path("state"),
            repair_clock,
        };
        Checkpointer::new(monitors, options).expect("checkpointer")
    }

    pub(super) fn ram(&self) -> Vec<u8> {
        read_ram(&self.path("ram"))
    }

    pub(super) fn counters(&self) -> Counters {
        let ram = File::open(self.path("ram")).expect("RAM file");
        Counters::read(|at, bytes| ram.read_exact_at(bytes, at).expect("RAM"))
    }

    /// Waits until the guest's counters satisfy `ready`.
    pub(super) fn until(&self, what: &str, ready: impl Fn(Counters) -> bool) -> Counters {
        let end = Instant::now() + PATIENCE;
        loop {
            let counters = self.counters();
            if ready(counters) {
                return counters;
            }
            assert!(
                Instant::now() < end,
                "{what} never came: {counters:?}; {}",
                self.stderr()
            );
            std::thread::yield_now();
        }
    }

    /// As `kill -9`, and waits for the end.
    pub(super) fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the firmware has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) rounds: u64,
    pub(super) boots: u64,
    pub(super) ticks: u64,
}

impl Counters {
    fn read(get: impl Fn(u64, &mut [u8])) -> Self {
        let word = |at: u64, len: usize| {
            let mut bytes = [0; 8];
            get(at, &mut bytes[..len]);
            u64::from_le_bytes(bytes)
        };
        Self {
            rounds: word(ROUNDS_AT, 4),
            boots: word(BOOTS_AT, 4),
            ticks: word(TICKS_AT, 8),
        }
    }

    pub(super) fn of(ram: &[u8]) -> Self {
        Self::read(|at, bytes| {
            let at = usize::try_from(at).expect("small");
            bytes.copy_from_slice(&ram[at..at + bytes.len()]);
        })
    }
}

fn read_ram(path: &Path) -> Vec<u8> {
    let mut ram = Vec::new();
    let mut file = File::open(path).expect("RAM file");
    file.read_to_end(&mut ram).expect("RAM");
    ram
}

/// Hooks that copy all of RAM and count their calls.
pub(super) struct CopyAll {
    path: PathBuf,
    pub(super) ram: Vec<u8>,
    pub(super) stopped: u32,
    pub(super) resumed: u32,
    /// Runs in `capture`, before the copy.
    pub(super) on_capture: Box<dyn FnMut() -> Result<(), HookError>>,
    /// Whether to copy at all.
    pub(super) copy: bool,
}

impl CopyAll {
    pub(super) fn of(vm: &TestVm) -> Self {
        Self {
            path: vm.path("ram"),
            ram: Vec::new(),
            stopped: 0,
            resumed: 0,
            on_capture: Box::new(|| Ok(())),
            copy: true,
        }
    }
}

impl CutHooks for CopyAll {
    fn stopped(&mut self) -> Result<(), HookError> {
        self.stopped += 1;
        Ok(())
    }

    fn capture(&mut self) -> Result<(), HookError> {
        (self.on_capture)()?;
        if self.copy {
            self.ram = read_ram(&self.path);
        }
        Ok(())
    }

    fn resumed(&mut self) {
        self.resumed += 1;
    }
}
