//! Which accelerator really runs a guest on this host.
//!
//! /dev/kvm may exist and still not run Linux (nested, software-backed KVM runs 16-
//! and 32-bit payloads and hangs a Linux kernel, QEMU.md section 11). The only
//! honest question is to boot one: a kernel with a first program of 200 bytes that
//! sleeps on a timer, prints a line and reboots. KVM is used if the line comes
//! before a deadline.
//!
//! Must never: hang, or take "probably" for "yes".

use super::argv::{Accel, QEMU};
use super::probe::QemuBinary;
use super::process::{ExitHow, Qemu, SpawnOpts};
use crate::pool::spec::AccelChoice;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The accelerator to use and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccelVerdict {
    /// The accelerator.
    pub accel: Accel,
    /// One sentence for the operator.
    pub reason: String,
}

/// `accel = "kvm"` on a host that cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`accel = \"kvm\"` is not possible on this host: {0}; use \"auto\" or \"tcg\"")]
pub struct NoKvm(pub String);

/// How long a guest under test may take to its line. Real KVM needs one to two
/// seconds; a busy host gets several times that. Paid once per boot of a host
/// whose KVM does not work.
const PROBE_DEADLINE: Duration = Duration::from_secs(12);

/// What the guest under test prints.
const PROOF: &str = "pollux: this guest runs";

/// Decide between KVM and TCG. `kernels` are tried as files, the first that exists
/// is booted (the VM's own first, then [`host_kernels`]); the answer is kept in
/// `cache_dir` until the host reboots or its QEMU or the kernel file changes.
/// Takes up to some 12 s the first time on a host whose KVM does not work.
///
/// # Errors
/// [`NoKvm`] if the choice is `kvm` and it does not run a guest.
pub fn choose_accel(
    choice: AccelChoice,
    qemu: &QemuBinary,
    kernels: &[PathBuf],
    cache_dir: &Path,
) -> Result<AccelVerdict, NoKvm> {
    if choice == AccelChoice::Tcg {
        return Ok(AccelVerdict {
            accel: Accel::Tcg,
            reason: "the spec asks for TCG".to_owned(),
        });
    }
    let answer = kvm_runs(qemu, kernels, cache_dir);
    match (answer, choice) {
        (Ok(reason), _) => Ok(AccelVerdict {
            accel: Accel::Kvm,
            reason,
        }),
        (Err(reason), AccelChoice::Kvm) => Err(NoKvm(reason)),
        (Err(reason), _) => Ok(AccelVerdict {
            accel: Accel::Tcg,
            reason,
        }),
    }
}

/// Kernels of the host itself, for a VM that has none: the running one first.
#[must_use]
pub fn host_kernels() -> Vec<PathBuf> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut kernels = vec![PathBuf::from(format!("/boot/vmlinuz-{}", release.trim()))];
    let others = fs::read_dir("/boot").into_iter().flatten().flatten();
    let mut others: Vec<PathBuf> = others
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("vmlinuz-")
        })
        .collect();
    others.sort();
    kernels.extend(others);
    kernels
}

/// What an earlier answer depended on, and the answer.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
struct Cached {
    key: String,
    /// `Ok`: KVM runs. Both sides hold the reason.
    answer: Result<String, String>,
}

/// Largest cache file that is read: a key and a sentence.
const CACHE_BYTES_MAX: u64 = 64 << 10;

fn kvm_runs(qemu: &QemuBinary, kernels: &[PathBuf], cache_dir: &Path) -> Result<String, String> {
    let device = Path::new("/dev/kvm");
    fs::File::options()
        .read(true)
        .write(true)
        .open(device)
        .map_err(|e| format!("/dev/kvm cannot be opened ({e})"))?;
    let kernel = kernels.iter().find(|kernel| kernel.is_file()).ok_or(
        "there is no kernel to try KVM with: name one in the spec or install one in /boot",
    )?;
    let key = key(qemu, kernel);
    let cache = cache_dir.join("kvm-probe.json");
    if let Some(cached) = read_cache(&cache)
        && cached.key == key
    {
        return cached.answer;
    }
    let answer = boot(&qemu.program, Accel::Kvm, kernel, PROBE_DEADLINE);
    let cached = Cached { key, answer };
    // A cache that cannot be written costs time only.
    if let Ok(text) = serde_json::to_string(&cached) {
        let part = cache_dir.join("kvm-probe.part");
        if fs::write(&part, text).is_ok() {
            let _ = fs::rename(&part, &cache);
        }
    }
    cached.answer
}

fn read_cache(path: &Path) -> Option<Cached> {
    let small = fs::metadata(path).ok()?.len() <= CACHE_BYTES_MAX;
    let text = small.then(|| fs::read_to_string(path).ok()).flatten()?;
    serde_json::from_str(&text).ok()
}

/// This boot of the host, this QEMU, this kernel file.
fn key(qemu: &QemuBinary, kernel: &Path) -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = fs::metadata(kernel).and_then(|meta| Ok((meta.len(), meta.modified()?)));
    format!(
        "{} {} {} {} {file:?}",
        boot.trim(),
        qemu.program.display(),
        qemu.version,
        kernel.display()
    )
}

/// Boot `kernel` with the small first program. Says how it went, as one sentence.
fn boot(program: &Path, accel: Accel, kernel: &Path, deadline: Duration) -> Result<String, String> {
    let name = match accel {
        Accel::Kvm => "KVM",
        Accel::Tcg => "TCG",
    };
    let cannot =
        |what: &str, e: &dyn std::fmt::Display| format!("{name} cannot be tried: {what}: {e}");
    let dir = ProbeDir::new().map_err(|e| cannot("no directory for it", &e))?;
    let initrd = dir.0.join("initrd");
    fs::write(&initrd, initramfs()).map_err(|e| cannot("no initial RAM disk", &e))?;
    let log = dir.0.join("log");
    let mut cmd: Vec<OsString> = vec![program.into()];
    let accel = match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg,thread=multi",
    };
    for arg in [
        "-accel",
        accel,
        "-machine",
        "q35",
        "-m",
        "256M",
        "-nodefaults",
    ] {
        cmd.push(arg.into());
    }
    for arg in [
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ] {
        cmd.push(arg.into());
    }
    // The reboot of the first program, or of a panic, ends QEMU.
    for arg in ["-append", "console=ttyS0 panic=-1 quiet", "-kernel"] {
        cmd.push(arg.into());
    }
    cmd.extend([kernel.into(), "-initrd".into(), initrd.into()]);
    let opts = SpawnOpts {
        uid: 0,
        gid: 0,
        groups: vec![],
        log: log.clone(),
        cwd: dir.0.clone(),
    };
    let qemu = Qemu::spawn(&cmd, opts).map_err(|e| cannot("it does not start", &e))?;
    let exit = qemu.wait_exit(Some(deadline));
    drop(qemu);
    let said = fs::read(&log).unwrap_or_default();
    if String::from_utf8_lossy(&said).contains(PROOF) {
        return Ok(format!(
            "{name} ran a guest to its first program ({})",
            kernel.display()
        ));
    }
    Err(match exit {
        None => format!(
            "{name} does not run a Linux guest here: {} did not get to its first program within {} s",
            kernel.display(),
            deadline.as_secs()
        ),
        Some(exit) if exit.how == ExitHow::Status(0) => format!(
            "{name} does not run a Linux guest here: {} rebooted before its first program",
            kernel.display()
        ),
        Some(exit) => format!("{name} does not run a Linux guest here: {exit}"),
    })
}

/// A folder below /tmp that goes with its value.
struct ProbeDir(PathBuf);

impl ProbeDir {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("{QEMU}-probe-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for ProbeDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The guest's first program: sleep 10 ms on a timer, write [`PROOF`] to standard
/// output, reboot; if that fails, wait for ever. A static ELF file with one segment
/// (System V ABI, "ELF header" and "program header").
fn first_program() -> Vec<u8> {
    const LOAD_AT: u64 = 0x40_0000;
    const HEADERS_BYTES: usize = 64 + 56;
    let line = format!("{PROOF}\n");
    let line_len = u8::try_from(line.len()).unwrap_or(u8::MAX);
    // nanosleep(rsp -> {0 s, 10 ms}, 0); write(1, line, len); reboot(magic1, magic2,
    // RESTART); pause() for ever. Numbers of Linux x86-64, reboot(2).
    #[rustfmt::skip]
    let mut code: Vec<u8> = vec![
        0x68, 0x80, 0x96, 0x98, 0x00, // push 10000000
        0x6a, 0x00, // push 0
        0x48, 0x89, 0xe7, // mov rdi, rsp
        0x31, 0xf6, // xor esi, esi
        0xb8, 35, 0, 0, 0, // mov eax, nanosleep
        0x0f, 0x05, // syscall
        0xb8, 1, 0, 0, 0, // mov eax, write
        0xbf, 1, 0, 0, 0, // mov edi, 1
        0x48, 0x8d, 0x35, 38, 0, 0, 0, // lea rsi, [rip + line]
        0xba, line_len, 0, 0, 0, // mov edx, len
        0x0f, 0x05, // syscall
        0xb8, 169, 0, 0, 0, // mov eax, reboot
        0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, 0xfee1dead
        0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, 672274793
        0xba, 0x67, 0x45, 0x23, 0x01, // mov edx, 0x01234567
        0x0f, 0x05, // syscall
        0xb8, 34, 0, 0, 0, // mov eax, pause
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp to pause
    ];
    code.extend_from_slice(line.as_bytes());
    let size = (HEADERS_BYTES + code.len()) as u64;
    let mut elf = Vec::new();
    elf.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend_from_slice(&2_u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1_u32.to_le_bytes()); // version
    elf.extend_from_slice(&(LOAD_AT + HEADERS_BYTES as u64).to_le_bytes()); // entry
    elf.extend_from_slice(&64_u64.to_le_bytes()); // program headers
    elf.extend_from_slice(&0_u64.to_le_bytes()); // section headers
    elf.extend_from_slice(&0_u32.to_le_bytes()); // flags
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes()); // sizes and counts of headers
    }
    elf.extend_from_slice(&1_u32.to_le_bytes()); // load
    elf.extend_from_slice(&5_u32.to_le_bytes()); // read, execute
    for word in [0, LOAD_AT, LOAD_AT, size, size, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes()); // offset, addresses, sizes, alignment
    }
    elf.extend_from_slice(&code);
    elf
}

/// An initial RAM disk with `/init` and `/dev/console`, in the "newc" format
/// (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
fn initramfs() -> Vec<u8> {
    const DIR: u32 = 0o040_755;
    const CHAR: u32 = 0o020_600;
    const FILE: u32 = 0o100_755;
    let init = first_program();
    let mut archive = Vec::new();
    let mut add = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        let len = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let fields = [
            len(archive.len()), // inode: any number no other entry has
            mode,
            0,
            0,
            1,
            0,
            len(data.len()),
            0,
            0,
            device.0,
            device.1,
            len(name.len() + 1),
            0,
        ];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    add("dev", DIR, (0, 0), &[]);
    add("dev/console", CHAR, (5, 1), &[]);
    add("init", FILE, (0, 0), &init);
    add("TRAILER!!!", 0, (0, 0), &[]);
    archive
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::probe::QemuVersion;

    fn qemu(program: &Path) -> QemuBinary {
        QemuBinary {
            program: program.to_owned(),
            version: QemuVersion {
                major: 7,
                minor: 2,
                micro: 0,
            },
            machines: vec![],
        }
    }

    /// The first program is an ordinary Linux program: it prints on this host, too. Its
    /// reboot(2) is harmless in a child without privileges.
    #[test]
    fn the_first_program_sleeps_and_prints() {
        use std::io::Read;
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::process::CommandExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let file = dir.path().join("init");
        fs::write(&file, first_program()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = std::process::Command::new(&file)
            .uid(65_534)
            .gid(65_534)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = vec![0; PROOF.len() + 1];
        let read = child.stdout.take().unwrap().read_exact(&mut said);
        child.kill().unwrap();
        child.wait().unwrap();
        read.unwrap();
        assert_eq!(String::from_utf8(said).unwrap(), format!("{PROOF}\n"));
    }

    #[test]
    fn tcg_needs_no_proof_and_kvm_without_a_kernel_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let qemu = qemu(Path::new("/none"));
        let tcg = choose_accel(AccelChoice::Tcg, &qemu, &[], dir.path()).unwrap();
        assert_eq!(tcg.accel, Accel::Tcg);
        let auto = choose_accel(AccelChoice::Auto, &qemu, &[], dir.path()).unwrap();
        assert_eq!(auto.accel, Accel::Tcg);
        let error = choose_accel(AccelChoice::Kvm, &qemu, &[], dir.path()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("`accel = \"kvm\"` is not possible"),
            "{error}"
        );
    }

    #[test]
    fn a_guest_that_says_nothing_is_ended_and_an_early_end_is_told() {
        let kernel = tempfile::NamedTempFile::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let hangs = script("hangs", "exec sleep 1000");
        let told = boot(&hangs, Accel::Kvm, kernel.path(), Duration::from_millis(50)).unwrap_err();
        assert!(
            told.contains("did not get to its first program within"),
            "{told}"
        );
        let dies = script("dies", "echo no such device; exit 1");
        let told = boot(&dies, Accel::Kvm, kernel.path(), PROBE_DEADLINE).unwrap_err();
        assert!(
            told.contains("ended with status 1; it said last: no such device"),
            "{told}"
        );
        let runs = script("runs", &format!("echo '{PROOF}'"));
        assert!(boot(&runs, Accel::Kvm, kernel.path(), PROBE_DEADLINE).is_ok());
    }

    /// Run by hand: POLLUX_PROBE_KERNEL=/boot/vmlinuz-… cargo test --lib accel -- --ignored
    #[test]
    #[ignore = "needs a kernel image"]
    fn a_kernel_boots_to_its_first_program_under_tcg() {
        let kernel = PathBuf::from(std::env::var("POLLUX_PROBE_KERNEL").unwrap());
        let far = Duration::from_secs(120);
        println!(
            "{:?}",
            boot(Path::new(QEMU), Accel::Tcg, &kernel, far).unwrap()
        );
        println!(
            "{:?}",
            boot(Path::new(QEMU), Accel::Kvm, &kernel, PROBE_DEADLINE)
        );
    }

    #[test]
    fn an_answer_is_kept_until_what_it_depended_on_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvm-probe.json");
        assert_eq!(read_cache(&path), None);
        fs::write(&path, "garbage").unwrap();
        assert_eq!(read_cache(&path), None);
        let kernel = dir.path().join("k");
        fs::write(&kernel, "1").unwrap();
        let first = key(&qemu(Path::new("/q")), &kernel);
        assert_eq!(first, key(&qemu(Path::new("/q")), &kernel));
        fs::write(&kernel, "12").unwrap();
        assert_ne!(first, key(&qemu(Path::new("/q")), &kernel));
    }
}
