//! QEMU's command line, from a spec. Pure.
//!
//! Invariant: primary and standby get the same line apart from paths and
//! `-S -incoming defer` (QEMU.md section 2).

use crate::pool::spec::devices::model_of;
use crate::pool::spec::{Boot, Transport, VmSpec};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The accelerator in use on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accel {
    /// The kernel's.
    Kvm,
    /// QEMU's own, one thread a vCPU.
    Tcg,
}

/// Which side of a mirrored VM the QEMU is started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Runs at once.
    Primary,
    /// Waits, stopped, for `migrate-incoming`.
    Standby,
}

/// The QMP sockets of one QEMU. Several, because a command typed ahead on a
/// monitor blocks it for everything else (QEMU.md section 4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpPaths {
    /// Queries and everything that is not urgent.
    pub control: PathBuf,
    /// `stop` and `cont`.
    pub run: PathBuf,
    /// `xen-save-devices-state`.
    pub save: PathBuf,
    /// For people and drills.
    pub spare: PathBuf,
}

/// The two ends of one NIC's datagram link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicPaths {
    /// The socket the egress gate binds; QEMU sends to it.
    pub gate: PathBuf,
    /// The socket QEMU binds; the egress gate sends to it.
    pub qemu: PathBuf,
}

/// Every path in one VM's life on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths {
    /// Folder of all sockets below, owned by QEMU's uid.
    pub run_dir: PathBuf,
    /// The guest's RAM, on a tmpfs.
    pub ram_file: PathBuf,
    /// QMP sockets; QEMU listens.
    pub qmp: QmpPaths,
    /// One NBD socket a disk, in the spec's order; pollux listens.
    pub nbd: Vec<PathBuf>,
    /// One link a NIC, in the spec's order.
    pub nics: Vec<NicPaths>,
    /// Serial console; QEMU listens.
    pub console: PathBuf,
    /// What the console has said.
    pub console_log: PathBuf,
    /// Where QEMU saves the device state of a checkpoint.
    pub state_file: PathBuf,
    /// Where a standby listens for its device state at promotion.
    pub incoming: PathBuf,
    /// QEMU's own output.
    pub qemu_log: PathBuf,
    /// Kernel to load: the spec's, or a copy of it that QEMU's uid can read.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk, likewise.
    pub initrd: Option<PathBuf>,
    /// Firmware image, likewise.
    pub firmware: Option<PathBuf>,
}

/// Name of the program.
pub const QEMU: &str = "qemu-system-x86_64";

/// How long QEMU holds a guest's disk requests while pollux is away from the NBD
/// socket, in seconds; without it the guest gets an I/O error (QEMU.md section 7).
const NBD_RECONNECT_S: u32 = 30;

/// First PCI slot pollux uses: below are the chipsets' own (0 and 1 on i440FX,
/// 0 and 0x1f on q35).
const PCI_SLOT_FIRST: usize = 2;

/// Node name of disk `index` in QEMU's block layer.
#[must_use]
pub fn disk_node(index: usize) -> String {
    format!("d{index}")
}

/// QOM id of the device of disk `index`.
#[must_use]
pub fn disk_device(index: usize) -> String {
    format!("disk{index}")
}

/// Id of the net back end of NIC `index`.
#[must_use]
pub fn nic_netdev(index: usize) -> String {
    format!("n{index}")
}

/// QOM id of the device of NIC `index`.
#[must_use]
pub fn nic_device(index: usize) -> String {
    format!("nic{index}")
}

/// The command line of one QEMU; the first item is the program's name.
///
/// `machine_versioned` is what both sides agreed on
/// (`vm::probe::common_machine`). pollux must listen on the NBD sockets before
/// QEMU starts, and the RAM file must exist with the guest's size.
///
/// A guest that powers itself off leaves QEMU stopped in the state `shutdown`
/// (QMP event `SHUTDOWN`), so that its last epoch can be committed before pollux
/// ends the process.
#[must_use]
pub fn command_line(
    spec: &VmSpec,
    machine_versioned: &str,
    side: Side,
    paths: &VmPaths,
    accel: Accel,
) -> Vec<OsString> {
    let mut line = Line(vec![QEMU.into()]);
    platform(&mut line, spec, machine_versioned, paths, accel);
    monitors(&mut line, paths);
    devices(&mut line, spec, paths);
    match &spec.boot {
        Boot::Disk => {}
        Boot::Kernel { cmdline, .. } => {
            line.path("-kernel", paths.kernel.as_deref());
            line.path("-initrd", paths.initrd.as_deref());
            line.opt("-append", cmdline);
        }
    }
    line.path("-bios", paths.firmware.as_deref());
    if side == Side::Standby {
        line.0.push("-S".into());
        line.opt("-incoming", "defer");
    }
    line.0
}

/// A command line being written.
struct Line(Vec<OsString>);

impl Line {
    fn opt(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.push(name.into());
        self.0.push(value.as_ref().into());
    }

    fn path(&mut self, name: &str, path: Option<&Path>) {
        if let Some(path) = path {
            self.opt(name, path);
        }
    }
}

/// `before` and a path in one of QEMU's comma-separated options: a comma of the
/// path itself is written twice (qemu-options, "QemuOpts").
fn with_path(before: &str, path: &Path) -> OsString {
    let mut option = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        option.push(byte);
        if byte == b',' {
            option.push(b',');
        }
    }
    OsString::from_vec(option)
}

fn platform(line: &mut Line, spec: &VmSpec, machine: &str, paths: &VmPaths, accel: Accel) {
    line.opt("-name", format!("guest={},debug-threads=on", spec.name));
    line.opt("-uuid", spec.uuid.to_string());
    line.0.push("-no-user-config".into());
    line.0.push("-nodefaults".into());
    line.opt("-display", "none");
    line.opt("-vga", "none");
    line.opt("-msg", "timestamp=on");
    line.opt(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    line.opt(
        "-accel",
        match accel {
            Accel::Kvm => "kvm",
            // QEMU would keep up to 1 GiB of translated code beside the guest's memory.
            Accel::Tcg => "tcg,thread=multi,tb-size=128",
        },
    );
    line.opt(
        "-machine",
        format!("{machine},memory-backend=ram,suppress-vmdesc=on"),
    );
    if let Some(cpu) = &spec.cpu {
        line.opt("-cpu", cpu.as_str());
    }
    // The state begins with its first section: no configuration to skip at promotion.
    line.opt("-global", "migration.send-configuration=off");
    let backend = format!(
        "memory-backend-file,id=ram,size={},share=on,mem-path=",
        spec.memory.get()
    );
    line.opt("-object", with_path(&backend, &paths.ram_file));
    line.opt("-m", format!("{}M", spec.memory.get() >> 20));
    line.opt("-smp", format!("cpus={}", spec.vcpus));
    // The wall clock of whichever host runs the VM: pauses must not make it late.
    line.opt("-rtc", "base=utc,clock=host");
    line.opt("-action", "shutdown=pause");
}

fn monitors(line: &mut Line, paths: &VmPaths) {
    let QmpPaths {
        control,
        run,
        save,
        spare,
    } = &paths.qmp;
    for (name, path) in [
        ("control", control),
        ("run", run),
        ("save", save),
        ("spare", spare),
    ] {
        let mut option = with_path(&format!("socket,id=qmp-{name},path="), path);
        option.push(",server=on,wait=off");
        line.opt("-chardev", option);
        line.opt("-mon", format!("chardev=qmp-{name},mode=control"));
    }
    let mut option = with_path("socket,id=con0,path=", &paths.console);
    option.push(",server=on,wait=off,");
    option.push(with_path("logfile=", &paths.console_log));
    option.push(",logappend=on");
    line.opt("-chardev", option);
    line.opt("-serial", "chardev:con0");
}

fn devices(line: &mut Line, spec: &VmSpec, paths: &VmPaths) {
    let transport = spec.transport();
    let mut slot = PCI_SLOT_FIRST;
    // PCI addresses are written out: they must be equal on both sides.
    let mut place = |model: &str| {
        let device = match transport {
            Transport::Mmio => return format!("{model}-device"),
            Transport::PciLegacy => format!("{model}-pci,disable-modern=on,addr={slot:#x}"),
            Transport::PciModern => format!("{model}-pci,addr={slot:#x}"),
        };
        slot += 1;
        device
    };
    for (i, socket) in paths.nbd.iter().enumerate().take(spec.disks.len()) {
        let node = disk_node(i);
        let mut backend = with_path(
            &format!("driver=nbd,node-name={node},discard=unmap,server.type=unix,server.path="),
            socket,
        );
        backend.push(format!(",reconnect-delay={NBD_RECONNECT_S}"));
        line.opt("-blockdev", backend);
        let mut device = format!("{},id={},drive={node}", place("virtio-blk"), disk_device(i));
        if i == 0 && spec.boot == Boot::Disk {
            device.push_str(",bootindex=0");
        }
        line.opt("-device", device);
    }
    for (i, (nic, socket)) in spec.nics.iter().zip(&paths.nics).enumerate() {
        let netdev = nic_netdev(i);
        let mut backend = with_path(
            &format!("dgram,id={netdev},local.type=unix,local.path="),
            &socket.qemu,
        );
        backend.push(with_path(",remote.type=unix,remote.path=", &socket.gate));
        line.opt("-netdev", backend);
        let mut device = format!(
            "{},id={},netdev={netdev},mac={}",
            place("virtio-net"),
            nic_device(i),
            nic.mac
        );
        if transport != Transport::Mmio {
            // No network boot: its ROM would be one more block of memory to carry over.
            device.push_str(",romfile=");
        }
        line.opt("-device", device);
    }
    for (i, device) in spec.devices.iter().enumerate() {
        line.opt("-device", extra_device(i, device, transport));
    }
}

/// Virtio models that exist in a legacy form (virtio 1.2, appendix of legacy devices).
const LEGACY_VIRTIO: &[&str] = &[
    "virtio-rng-pci",
    "virtio-serial-pci",
    "virtio-balloon-pci",
    "virtio-scsi-pci",
];

fn extra_device(index: usize, device: &str, transport: Transport) -> String {
    let mut option = device.to_owned();
    let has = |key: &str| {
        device
            .split(',')
            .any(|part| part.split('=').next() == Some(key))
    };
    if transport == Transport::PciLegacy
        && LEGACY_VIRTIO.contains(&model_of(device))
        && !has("disable-modern")
    {
        option.push_str(",disable-modern=on");
    }
    if !has("id") {
        option.push_str(&format!(",id=extra{index}"));
    }
    option
}

impl VmPaths {
    /// The usual layout: everything in `run_dir` (one folder a VM, on a tmpfs), the
    /// RAM file in `ram_dir`. Touches no file.
    ///
    /// # Errors
    /// [`PathTooLong`] if a socket path does not fit into a socket address.
    pub fn new(spec: &VmSpec, run_dir: &Path, ram_dir: &Path) -> Result<Self, PathTooLong> {
        let socket = |name: String| {
            let path = run_dir.join(name);
            let bytes = path.as_os_str().len();
            if bytes > SOCKET_PATH_BYTES_MAX {
                Err(PathTooLong { path, bytes })
            } else {
                Ok(path)
            }
        };
        let (kernel, initrd) = match &spec.boot {
            Boot::Disk => (None, None),
            Boot::Kernel { kernel, initrd, .. } => (Some(kernel.clone()), initrd.clone()),
        };
        let nbd = (0..spec.disks.len()).map(|i| socket(format!("disk{i}.nbd")));
        let nics = (0..spec.nics.len()).map(|i| {
            Ok(NicPaths {
                gate: socket(format!("nic{i}.gate"))?,
                qemu: socket(format!("nic{i}.qemu"))?,
            })
        });
        Ok(Self {
            run_dir: run_dir.to_owned(),
            ram_file: ram_dir.join(format!("{}.ram", spec.uuid)),
            qmp: QmpPaths {
                control: socket("qmp-control".to_owned())?,
                run: socket("qmp-run".to_owned())?,
                save: socket("qmp-save".to_owned())?,
                spare: socket("qmp-spare".to_owned())?,
            },
            nbd: nbd.collect::<Result<_, _>>()?,
            nics: nics.collect::<Result<_, _>>()?,
            console: socket("console".to_owned())?,
            console_log: run_dir.join("console.log"),
            state_file: run_dir.join("state"),
            incoming: socket("incoming".to_owned())?,
            qemu_log: run_dir.join("qemu.log"),
            kernel,
            initrd,
            firmware: spec.firmware.clone(),
        })
    }
}

/// A socket path that does not fit into a socket address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the socket path {} has {bytes} bytes, {SOCKET_PATH_BYTES_MAX} are possible: use a shorter run directory", path.display())]
pub struct PathTooLong {
    /// The path.
    pub path: PathBuf,
    /// Its length.
    pub bytes: usize,
}

/// Longest path of a unix socket (Linux `sockaddr_un.sun_path` less the final NUL).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(more: &str) -> VmSpec {
        VmSpec::parse(
            &format!(
                "name = \"a\"\nuuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"\nmemory = \"64 \
                 MiB\"\n{more}\n[[disk]]\nname = \"root\"\npath = \"/d\"\nsize = 4096\n[[nic]]\nname = \
                 \"lan\"\nmac = \"52:54:00:12:34:56\"\nbridge = \"br0\""
            ),
            "-",
        )
        .unwrap()
    }

    fn line(spec: &VmSpec, side: Side, run_dir: &str) -> Vec<String> {
        let paths = VmPaths::new(spec, Path::new(run_dir), Path::new("/dev/shm")).unwrap();
        command_line(spec, "m-1.0", side, &paths, Accel::Tcg)
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn both_sides_differ_in_paths_and_the_incoming_end_only() {
        for boot in ["kernel = \"/k\"\ncmdline = \"x\"", "boot = \"disk\""] {
            let spec = spec(boot);
            let primary = line(&spec, Side::Primary, "/run/one");
            let mut standby = line(&spec, Side::Standby, "/run/two");
            assert_eq!(
                standby.split_off(primary.len()),
                ["-S", "-incoming", "defer"]
            );
            let standby: Vec<String> = standby
                .iter()
                .map(|arg| arg.replace("/run/two", "/run/one"))
                .collect();
            assert_eq!(primary, standby);
        }
    }

    #[test]
    fn devices_sit_as_the_transport_says() {
        let devices = |more: &str| -> Vec<String> {
            let line = line(&spec(more), Side::Primary, "/r");
            let after = line.iter().zip(line.iter().skip(1));
            after
                .filter(|(option, _)| *option == "-device")
                .map(|(_, value)| value.clone())
                .collect()
        };
        assert_eq!(
            devices("kernel = \"/k\"\ndevices = [\"virtio-rng-device\"]"),
            [
                "virtio-blk-device,id=disk0,drive=d0",
                "virtio-net-device,id=nic0,netdev=n0,mac=52:54:00:12:34:56",
                "virtio-rng-device,id=extra0",
            ]
        );
        assert_eq!(
            devices("boot = \"disk\"\ndevices = [\"virtio-rng-pci\", \"virtio-gpu-pci,id=g\"]"),
            [
                "virtio-blk-pci,disable-modern=on,addr=0x2,id=disk0,drive=d0,bootindex=0",
                "virtio-net-pci,disable-modern=on,addr=0x3,id=nic0,netdev=n0,mac=52:54:00:12:34:56,\
                 romfile=",
                "virtio-rng-pci,disable-modern=on,id=extra0",
                "virtio-gpu-pci,id=g",
            ]
        );
        assert_eq!(
            devices("boot = \"disk\"\ntransport = \"virtio-pci-modern\"")[0],
            "virtio-blk-pci,addr=0x2,id=disk0,drive=d0,bootindex=0"
        );
    }

    #[test]
    fn a_comma_in_a_path_stays_in_the_path() {
        assert_eq!(with_path("path=", Path::new("/a,b,/c")), "path=/a,,b,,/c");
    }

    #[test]
    fn a_socket_path_that_does_not_fit_is_told() {
        let deep = format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
        let error = VmPaths::new(&spec("boot = \"disk\""), Path::new(&deep), Path::new("/"));
        let said = error.unwrap_err().to_string();
        assert!(
            said.ends_with("107 are possible: use a shorter run directory"),
            "{said}"
        );
    }
}
