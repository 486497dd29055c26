//! The values a spec is made of: newtypes that hold only what is allowed.

use crate::pool::HostName;
use interconnect::codec::CodecChoice;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A value that its type refuses: what is allowed, for the end of the sentence
/// "... is not valid: ".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(pub String);

/// Longest VM, disk or NIC name in bytes (RFC 1035, one label).
pub const NAME_BYTES_MAX: usize = 63;

/// Name of a VM: a DNS label (RFC 1035): 1 to 63 of `a-z 0-9 -`, starting and
/// ending with a letter or a digit. Disks and NICs are named by the same rule,
/// because their names become parts of socket paths.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

/// Is `name` a DNS label?
pub(super) fn is_label(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// What [`is_label`] allows, in words.
pub(super) const LABEL_RULE: &str =
    "use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'";

impl VmName {
    /// Check and wrap a name.
    ///
    /// # Errors
    /// [`BadValue`] if it is not a DNS label.
    pub fn new(name: &str) -> Result<Self, BadValue> {
        if is_label(name) {
            Ok(Self(name.to_owned()))
        } else {
            Err(BadValue(LABEL_RULE.to_owned()))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One MiB in bytes.
pub(super) const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub(super) const GIB: u64 = 1 << 30;

/// A size in bytes with its unit in text: `"4 GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SizeBytes(pub u64);

impl SizeBytes {
    /// The number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for SizeBytes {
    type Err = BadValue;

    /// `"<number> <unit>"` with unit `B`, `KiB`, `MiB`, `GiB` or `TiB`.
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || {
            BadValue(
                "write a whole number and a unit of B, KiB, MiB, GiB or TiB, like \"512 MiB\", \
                 or an integer number of bytes"
                    .to_owned(),
            )
        };
        let text = text.trim();
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (digits, unit) = text.split_at(digits_end);
        let shift = match unit.trim_start() {
            "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return Err(bad()),
        };
        let number: u64 = digits.parse().map_err(|_| bad())?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| BadValue("it does not fit into 64 bits".to_owned()))
    }
}

impl fmt::Display for SizeBytes {
    /// The largest unit that divides the size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Guest RAM in bytes: a multiple of 2 MiB within [`MEMORY_MIN`] and [`MEMORY_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryBytes(u64);

/// Guest RAM is counted in huge pages of x86-64, so that a host may back it with them.
pub const MEMORY_STEP: u64 = 2 * MIB;
/// Least guest RAM: below this no Linux kernel unpacks itself.
pub const MEMORY_MIN: u64 = 32 * MIB;
/// Most guest RAM. TCG's CPU models address 40 bits (1 TiB), less the holes for
/// PCI; half of it always fits.
pub const MEMORY_MAX: u64 = 512 * GIB;
const _: () = assert!(MEMORY_MIN.is_multiple_of(MEMORY_STEP));
const _: () = assert!(MEMORY_MAX.is_multiple_of(MEMORY_STEP));

impl MemoryBytes {
    /// Check and wrap a number of bytes.
    ///
    /// # Errors
    /// [`BadValue`] if it is out of bounds or no multiple of 2 MiB.
    pub fn new(bytes: u64) -> Result<Self, BadValue> {
        if (MEMORY_MIN..=MEMORY_MAX).contains(&bytes) && bytes.is_multiple_of(MEMORY_STEP) {
            Ok(Self(bytes))
        } else {
            Err(BadValue(format!(
                "guest memory is a multiple of {}, from {} to {}",
                SizeBytes(MEMORY_STEP),
                SizeBytes(MEMORY_MIN),
                SizeBytes(MEMORY_MAX)
            )))
        }
    }

    /// The number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for MemoryBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SizeBytes(self.0).fmt(f)
    }
}

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Check and wrap six bytes.
    ///
    /// # Errors
    /// [`BadValue`] if it is all zero or the multicast bit is set (IEEE 802, bit 0
    /// of the first byte).
    pub fn new(bytes: [u8; 6]) -> Result<Self, BadValue> {
        if bytes[0] & 1 != 0 {
            Err(BadValue(
                "its first byte is odd, which makes it a multicast address; a NIC needs a unicast \
                 one, like \"52:54:00:12:34:56\""
                    .to_owned(),
            ))
        } else if bytes == [0; 6] {
            Err(BadValue(
                "all zero is no address; leave `mac` out to get one made from the VM's uuid"
                    .to_owned(),
            ))
        } else {
            Ok(Self(bytes))
        }
    }

    /// The address of a NIC whose spec names none: made from the VM's uuid and
    /// the NIC's name, so that it is the same on every host. Locally
    /// administered, in QEMU's usual `52:54` range.
    #[must_use]
    pub fn derived(uuid: [u8; 16], nic: &str) -> Self {
        let mut seed = uuid.to_vec();
        seed.extend_from_slice(nic.as_bytes());
        let h = xxhash_rust::xxh3::xxh3_64(&seed).to_be_bytes();
        Self([0x52, 0x54, h[0], h[1], h[2], h[3]])
    }

    /// The six bytes in the order they have on the wire.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || {
            BadValue(
                "write six bytes in hex with ':' between, like \"52:54:00:12:34:56\"".to_owned(),
            )
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Self::new(bytes)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Accelerator as a spec asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccelChoice {
    /// KVM if it really runs a guest on this host, else TCG.
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG.
    Tcg,
}

impl AccelChoice {
    /// The word for it in a spec.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// CPU model with flags, as QEMU's `-cpu` takes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CpuModel(String);

/// Longest CPU model with flags, in bytes: room for some hundred flags.
pub const CPU_BYTES_MAX: usize = 4096;

impl CpuModel {
    /// Check and wrap a model.
    ///
    /// # Errors
    /// [`BadValue`] on characters QEMU's CPU models and flags do not have.
    pub fn new(model: &str) -> Result<Self, BadValue> {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_.,=+".contains(&b);
        if !model.is_empty() && model.len() <= CPU_BYTES_MAX && model.bytes().all(fine) {
            Ok(Self(model.to_owned()))
        } else {
            Err(BadValue(
                "write a model and flags as QEMU's -cpu takes them, like \"max\" or \
                 \"qemu64,+ssse3\""
                    .to_owned(),
            ))
        }
    }

    /// The model as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One disk. Always raw, always virtio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Name, a DNS label, unique in the VM.
    pub name: String,
    /// File or block device that holds it, the same path on every host.
    pub path: PathBuf,
    /// Size the guest sees; a multiple of [`DISK_STEP`].
    pub size: SizeBytes,
    /// Where its copies are.
    pub kind: DiskKind,
    /// When a guest's flush may be acknowledged.
    pub durability: Durability,
}

/// Disks are tracked and copied in blocks of this many bytes (the block NBD
/// servers advertise by default, QEMU.md section 7).
pub const DISK_STEP: u64 = 4096;
/// Largest disk: bitmaps of 4 KiB blocks stay within 512 MiB.
pub const DISK_MAX: u64 = 16 << 40;

/// Where a disk's copies are (DESIGN section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskKind {
    /// Each host has its own copy.
    Replicated,
    /// One, on storage that every host reaches at the same path.
    Shared,
}

impl DiskKind {
    /// The word for it in a spec.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Replicated => "replicated",
            Self::Shared => "shared",
        }
    }
}

/// When a guest's flush counts as done (DESIGN section 3, output-commit).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// When the standby holds the epoch in memory. Survives the loss of either
    /// host; loss of power on both can lose flushed writes.
    Memory,
}

/// One NIC, always virtio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Name, a DNS label, unique in the VM.
    pub name: String,
    /// Its address, the same on both sides.
    pub mac: MacAddr,
    /// Bridge of the host its tap is put on.
    pub bridge: String,
}

/// Longest name of a network interface in bytes (Linux `IFNAMSIZ` less the final NUL).
pub const BRIDGE_BYTES_MAX: usize = 15;

/// Protection level of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// Runs on one host and dies with it.
    None,
    /// Started again on another host when its own is dead; its disks are on shared storage.
    Restart,
    /// A standby on the partner follows in lockstep epochs.
    Mirrored,
}

impl Protection {
    /// The word for it in a spec.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Restart => "restart",
            Self::Mirrored => "mirrored",
        }
    }
}

/// Which VMs are placed first after a failure, and whether one may be left down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum RestartPriority {
    /// It is to run again; before any other.
    #[default]
    Always,
    /// If room is left.
    BestEffort,
}

impl RestartPriority {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Always, Self::BestEffort];

    /// The word for it in a spec.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::BestEffort => "best-effort",
        }
    }
}

/// What happens to a VM on a host that may run nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum IsolationResponse {
    /// Stop it at once, as if its power went.
    #[default]
    Stop,
    /// Ask the guest to shut down; stop it at half of the time.
    Shutdown,
    /// Let it run; only for a VM that can run nowhere else.
    Leave,
}

impl IsolationResponse {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Stop, Self::Shutdown, Self::Leave];

    /// The word for it in a spec.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Shutdown => "shutdown",
            Self::Leave => "leave",
        }
    }
}

/// What becomes of a VM when its host dies, or may run nothing any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Which are placed first. Has effect only under [`Protection::Restart`].
    pub priority: RestartPriority,
    /// Lower ones are started before higher ones. Has effect only under
    /// [`Protection::Restart`].
    pub order: u32,
    /// Seconds from its start until VMs of a higher order are started.
    pub delay_s: u32,
    /// What happens to it on a host that may run nothing.
    pub isolation: IsolationResponse,
    /// What it counts for when two sides of a pool are weighed against each other.
    pub weight: u32,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            priority: RestartPriority::Always,
            order: 0,
            delay_s: 0,
            isolation: IsolationResponse::Stop,
            weight: 1,
        }
    }
}

/// What becomes of a mirrored VM that dirties more than the links carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Overload {
    /// The guest is slowed until they keep up.
    #[default]
    Throttle,
    /// It goes on at full speed, unmirrored, and is mirrored again later.
    Solo,
}

impl Overload {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Throttle, Self::Solo];

    /// The word for it in a spec.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Throttle => "throttle",
            Self::Solo => "solo",
        }
    }
}

/// How a VM is mirrored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorPolicy {
    /// Host of the standby; by default the host's only partner.
    pub partner: Option<HostName>,
    /// Least time from one checkpoint's resume to the next checkpoint.
    pub epoch_gap_min_ms: u32,
    /// Most time without a checkpoint.
    pub epoch_interval_max_ms: u32,
    /// Most of the CPU time the guest wants that checkpoints may take.
    pub overhead_max_percent: u8,
    /// How pages, disk writes and device state are packed on the wire.
    pub codec: CodecChoice,
    /// Send pages as differences to what the standby holds where that is less.
    pub delta: bool,
    /// What becomes of the VM if it dirties more than the links carry.
    pub overload: Overload,
    /// Keep sums over all memory and disks and compare them at a promotion (for drills).
    pub audit: bool,
    /// Most packets the egress gate of a NIC holds; beyond it they are dropped, as a full
    /// queue of any router does, and a checkpoint is asked for well before.
    pub held_packets_max: u32,
    /// Most bytes the write overlay of a disk holds before it slows the guest.
    pub overlay_max: SizeBytes,
}

impl Default for MirrorPolicy {
    fn default() -> Self {
        Self {
            partner: None,
            // The overhead ceiling spaces the checkpoints by what they cost; a fixed gap on
            // top of it would only add latency where there is none to save.
            epoch_gap_min_ms: 0,
            // Bounds what a promotion loses of an otherwise silent guest's computing.
            epoch_interval_max_ms: 100,
            // A guest keeps at least 70 % of its unprotected throughput, with some to spare for
            // what the pauses do not show.
            overhead_max_percent: 25,
            // What is soonest at the standby, as measured on this link and this CPU.
            codec: CodecChoice::Auto,
            delta: true,
            overload: Overload::Throttle,
            audit: false,
            // 16,384 full Ethernet frames are 24 MB: one second at 200 Mbit/s.
            held_packets_max: 16_384,
            overlay_max: SizeBytes(256 * MIB),
        }
    }
}
