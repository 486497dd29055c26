//! The VM spec: what a VM is, on whichever host it runs.
//!
//! Written by people in TOML, carried between hosts and through the API in the
//! same shape as JSON. Both go through one reader ([`read`]) and one validator
//! ([`check`]), so a spec that exists is a spec that holds.
//!
//! Never: opens a file, asks the host, fills in a random value. What depends on
//! the host (the versioned machine type, the accelerator `auto` stands for) is
//! decided in `vm::probe`.
//!
//! Invariant: `VmSpec::parse(&spec.to_toml(), _) == Ok(spec)`.

mod check;
pub mod devices;
mod emit;
mod error;
mod fields;
mod machine;
mod parts;
mod read;
#[cfg(test)]
mod tests;
mod tree;
mod values;

pub use error::{Problem, SpecError, SpecProblem};
pub use machine::{Machine, MachineFamily, Transport, version_key};
pub use read::{SPEC_TEXT_BYTES_MAX, SpecNote};
pub use values::{
    AccelChoice, BadValue, CpuModel, Disk, DiskKind, Durability, IsolationResponse, MacAddr,
    MemoryBytes, MirrorPolicy, Nic, Overload, Protection, RestartPolicy, RestartPriority,
    SizeBytes, VmName,
};

use super::VmId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::path::PathBuf;

/// What a VM is. Equal on every host of the pool.
///
/// ```toml
/// name = "orders"
/// uuid = "6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11"
/// memory = "512 MiB"
/// vcpus = 2
/// kernel = "/boot/vmlinuz"            # or: boot = "disk"
/// initrd = "/boot/initrd.img"
/// cmdline = "console=ttyS0"
/// protection = "mirrored"
///
/// [[disk]]
/// name = "root"
/// path = "/var/lib/pollux/orders.raw"  # the same path on both hosts
/// size = "4 GiB"
///
/// [[nic]]
/// name = "lan"
/// bridge = "br0"
///
/// [mirror]
/// partner = "host-b"
/// ```
///
/// # Machine and transport
/// `machine = "auto"` means `microvm` for a VM with a `kernel` and `q35` for one
/// that boots from its disk. On a microvm the devices sit on virtio-mmio, on q35
/// and pc on virtio-pci with `disable-modern=on`. The device state is saved in
/// the pause of every checkpoint, so its size is felt by the guest: with one NIC
/// and one disk microvm saves 4.6 KB in 0.77 ms, pc with `disable-modern=on`
/// 15 KB in 0.93 ms, q35 likewise 34 KB in 1.09 ms, and q35 with modern
/// virtio-pci 124 KB in 1.84 ms (QEMU.md section 4). `transport =
/// "virtio-pci-modern"` is there for guests without a legacy virtio driver.
///
/// Under TCG, Linux on a microvm needs `tsc_early_khz=<kHz>` on its command line
/// (it finds no clock to calibrate by); a spec without it is noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// Name, a DNS label, unique in the pool.
    pub name: VmName,
    /// Identity of the VM for its whole life.
    pub uuid: VmId,
    /// Guest RAM.
    pub memory: MemoryBytes,
    /// Number of virtual CPUs, 1 to 255.
    pub vcpus: u8,
    /// Machine type as asked for; [`VmSpec::machine_family`] resolves `auto`.
    pub machine: Machine,
    /// How virtio devices are attached, if asked for; [`VmSpec::transport`] resolves it.
    pub transport_choice: Option<Transport>,
    /// CPU model and flags, if asked for.
    pub cpu: Option<CpuModel>,
    /// Accelerator as asked for.
    pub accel: AccelChoice,
    /// Firmware image; `None` is QEMU's own (`SeaBIOS`, or `qboot` on a microvm).
    pub firmware: Option<PathBuf>,
    /// What the VM starts from.
    pub boot: Boot,
    /// Disks in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// NICs in the order the guest sees them.
    pub nics: Vec<Nic>,
    /// Further devices, each as QEMU's `-device` takes it.
    pub devices: Vec<String>,
    /// Protection level.
    pub protection: Protection,
    /// How the VM is mirrored; has effect only under [`Protection::Mirrored`].
    pub mirror: MirrorPolicy,
    /// What becomes of it when its host dies.
    pub restart: RestartPolicy,
}

/// What a VM starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// Its first disk, through the firmware.
    Disk,
    /// A kernel that QEMU loads itself.
    Kernel {
        /// Kernel image.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
    },
}

impl VmSpec {
    /// Read a spec from TOML. `origin` is named in errors: a path, or `-`.
    ///
    /// # Errors
    /// [`SpecError`] with every problem found, each with line, column and what is allowed.
    pub fn parse(text: &str, origin: &str) -> Result<Self, SpecError> {
        read::from_toml(text, origin).map(|(spec, _)| spec)
    }

    /// As [`VmSpec::parse`], with remarks the operator should see (for example
    /// which durability a disk got because none was written).
    ///
    /// # Errors
    /// As [`VmSpec::parse`].
    pub fn parse_with_notes(text: &str, origin: &str) -> Result<(Self, Vec<SpecNote>), SpecError> {
        read::from_toml(text, origin)
    }

    /// The spec as TOML with every default written out.
    #[must_use]
    pub fn to_toml(&self) -> String {
        emit::to_toml(self)
    }

    /// The machine family, `auto` resolved: microvm for a kernel, q35 for a disk.
    #[must_use]
    pub fn machine_family(&self) -> MachineFamily {
        match &self.machine {
            Machine::Auto => match self.boot {
                Boot::Disk => MachineFamily::Q35,
                Boot::Kernel { .. } => MachineFamily::Microvm,
            },
            Machine::Family(family) => *family,
            Machine::Versioned { family, .. } => *family,
        }
    }

    /// How virtio devices are attached, the default by machine resolved.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport_choice
            .unwrap_or(match self.machine_family() {
                MachineFamily::Microvm => Transport::Mmio,
                MachineFamily::Q35 | MachineFamily::Pc => Transport::PciLegacy,
            })
    }
}

impl Serialize for VmSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        emit::table(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for VmSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = toml::Table::deserialize(deserializer)?;
        read::from_table(table, "spec")
            .map(|(spec, _)| spec)
            .map_err(serde::de::Error::custom)
    }
}
