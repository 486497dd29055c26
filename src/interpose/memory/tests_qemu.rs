//! Tracking a real, unprivileged, sandboxed QEMU whose guest writes flat out.

use super::*;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RAM_BYTES: u64 = 128 << 20;
const RAM_PAGES: u64 = RAM_BYTES / PAGE_SIZE as u64;
const UNPRIVILEGED: u32 = 65534;
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// How long QEMU may take for anything before the test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A boot sector of our own. It enters protected mode and then for ever writes
/// its 32-bit xorshift state (13, 17, 5) to byte 16 of the page that the state
/// names in 1..64 MiB:
///
/// ```text
///     cli; ds = 0; lgdt; A20 by port 0x92; cr0 |= 1; ljmp 8:pm
/// pm: ds = 0x10; ebx = 0x12345679
/// next: ebx ^= ebx << 13; ebx ^= ebx >> 17; ebx ^= ebx << 5
///     edi = ebx & 0x03fff000; if edi < 0x100000 goto next
///     [edi + 16] = ebx; goto next
/// gdt: null, flat code, flat data
/// ```
const BOOT_SECTOR: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0x0f, 0x01, 0x16, 0x70, 0x7c, 0xe4, 0x92, 0x0c, 0x02, 0xe6,
    0x92, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x21, 0x7c, 0x00, 0x00, 0x08,
    0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0xbb, 0x79, 0x56, 0x34, 0x12, 0x89, 0xd8, 0xc1, 0xe0,
    0x0d, 0x31, 0xc3, 0x89, 0xd8, 0xc1, 0xe8, 0x11, 0x31, 0xc3, 0x89, 0xd8, 0xc1, 0xe0, 0x05, 0x31,
    0xc3, 0x89, 0xdf, 0x81, 0xe7, 0x00, 0xf0, 0xff, 0x03, 0x81, 0xff, 0x00, 0x00, 0x10, 0x00, 0x72,
    0xdb, 0x89, 0x5f, 0x10, 0xeb, 0xd6, 0x66, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x92, 0xcf, 0x00,
    0x17, 0x00, 0x58, 0x7c, 0x00, 0x00,
];

fn boot_disk(folder: &Path) -> std::path::PathBuf {
    let mut disk = vec![0; 1 << 20];
    disk[..BOOT_SECTOR.len()].copy_from_slice(BOOT_SECTOR);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = folder.join("disk");
    std::fs::write(&path, disk).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("opened up");
    path
}

struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
}

impl Qemu {
    /// Starts QEMU on the RAM file `ram` of `ram_bytes`, with `rest` on its command line.
    fn start(folder: &Path, machine: &str, ram: &Path, ram_bytes: u64, rest: &[&str]) -> Self {
        let socket = folder.join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666))
            .expect("opened up");
        let memory = format!(
            "memory-backend-file,id=ram,size={ram_bytes},share=on,mem-path={}",
            ram.display()
        );
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                "tcg,thread=multi",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args([
                "-machine",
                &format!("{machine},memory-backend=ram"),
                "-object",
                &memory,
            ])
            .args(["-m", &format!("{}M", ram_bytes >> 20), "-sandbox", SANDBOX])
            .args(["-qmp", &format!("unix:{}", socket.display())])
            .args(rest)
            .current_dir("/")
            .uid(UNPRIVILEGED)
            .gid(UNPRIVILEGED)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 starts (apt install qemu-system-x86)");
        let (stream, _) = listener.accept().expect("QEMU connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let qmp = BufReader::new(stream);
        let mut qemu = Self { child, qmp };
        qemu.line();
        qemu.execute("qmp_capabilities");
        qemu
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.qmp.read_line(&mut line).expect("QEMU answers");
        assert!(read > 0, "QEMU ended");
        line
    }

    fn execute(&mut self, command: &str) {
        writeln!(self.qmp.get_ref(), "{{\"execute\":\"{command}\"}}").expect("sent");
        loop {
            let line = self.line();
            assert!(!line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return;
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pages that differ between the stopped guest and the copy, over all of the RAM.
fn differences(view: &RamView, mirror: &RamImage) -> Vec<u64> {
    let stored = |image: &RamView| {
        image
            .allocated_ranges()
            .expect("read")
            .into_iter()
            .flatten()
    };
    let pages: BTreeSet<u64> = stored(view).chain(stored(mirror)).collect();
    let differ = |index: &u64| view.page(*index) != mirror.page(*index);
    pages.into_iter().filter(differ).collect()
}

fn folder() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.permissions(std::fs::Permissions::from_mode(0o777));
    builder
        .prefix("pollux-qemu-")
        .tempdir_in("/dev/shm")
        .expect("tmpfs")
}

fn wait_until_dirty(tracker: &mut Tracker, pages: u64) {
    let begun = Instant::now();
    while tracker.dirty_estimate().expect("counted") < pages {
        assert!(begun.elapsed() < PATIENCE, "the guest does not run");
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_writing_flat_out_is_copied_exactly_at_every_checkpoint() {
    let folder = folder();
    let ram = folder.path().join("ram");
    RamImage::create(&ram, RAM_BYTES, 0o600, UNPRIVILEGED, UNPRIVILEGED).expect("made");
    let disk = boot_disk(folder.path());
    let drive = format!("file={},format=raw,if=ide", disk.display());
    let mut qemu = Qemu::start(folder.path(), "pc", &ram, RAM_BYTES, &["-drive", &drive]);
    let pid = qemu.child.id().cast_signed();
    let mut tracker = Tracker::attach(pid, &ram, RAM_BYTES).expect("attached");
    let mirror = RamImage::create(&folder.path().join("mirror"), RAM_BYTES, 0o600, 0, 0);
    let mut mirror = mirror.expect("made");
    let mut staging = Staging::new(RAM_PAGES, RAM_PAGES).expect("made");

    // Until the boot sector runs: it dirties nearly all of 1..64 MiB at once.
    wait_until_dirty(&mut tracker, 10_000);
    let mut sink = |index: u64, page: &Page| mirror.write_page(index, page);
    let limits = SeedLimits {
        rounds_max: 2,
        ..SeedLimits::default()
    };
    seed(&mut tracker, limits, &mut sink, &mut |_| ()).expect("seeded");
    for round in 0..20 {
        if round % 3 == 1 {
            tracker.precopy(&mut staging).expect("copied");
        }
        // On a busy host the vCPU may wait long for its turn.
        wait_until_dirty(&mut tracker, 1);
        qemu.execute("stop");
        tracker.collect(&mut staging).expect("collected");
        assert!(!staging.is_empty());
        for (index, page) in staging.iter() {
            mirror.write_page(index, page).expect("written");
        }
        staging.clear();
        assert_eq!(
            differences(tracker.view(), &mirror),
            Vec::<u64>::new(),
            "round {round}"
        );
        qemu.execute("cont");
    }
}
