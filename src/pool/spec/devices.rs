//! Which device models can be mirrored (QEMU.md section 4).
//!
//! A model is accepted only if a failover and a reboot of the guest on the
//! standby were tested with it. Everything else is refused: a model nobody
//! tested may save its state and not load it, or kill the primary while saving.

/// What pollux says to a device model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Tested with failover and reboot.
    Accepted,
    /// Known not to work.
    Refused {
        /// Why, as half a sentence about the device.
        why: &'static str,
        /// What to use, as half a sentence.
        instead: &'static str,
    },
    /// Not tested.
    Unknown,
}

/// Models tested with failover and reboot, without the suffix of their bus
/// (`-pci`, `-device`, …, see [`BUS_SUFFIXES`]).
const ACCEPTED_VIRTIO: &[&str] = &[
    "virtio-net", "virtio-blk", "virtio-rng", "virtio-serial", "virtio-balloon", "virtio-scsi",
    "virtio-gpu",
];

/// Ends of the names of one virtio device on its buses.
const BUS_SUFFIXES: &[&str] = &["-pci", "-device", "-pci-non-transitional", "-pci-transitional"];
