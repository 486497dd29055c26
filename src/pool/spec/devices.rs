//! Which device models can be mirrored (QEMU.md section 4). Pure.
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
        /// Why, as the end of a sentence that begins with the device.
        why: &'static str,
        /// What to do, as an imperative.
        instead: &'static str,
    },
    /// Not tested.
    Unknown,
}

/// Virtio models tested, without the suffix of their bus.
const ACCEPTED_VIRTIO: &[&str] = &[
    "virtio-net",
    "virtio-blk",
    "virtio-rng",
    "virtio-serial",
    "virtio-scsi",
    "virtio-gpu",
];

/// Ends of the names of one virtio model on its buses.
const BUS_SUFFIXES: &[&str] = &[
    "-pci",
    "-pci-transitional",
    "-pci-non-transitional",
    "-device",
];

/// Other models tested.
const ACCEPTED: &[&str] = &[
    "isa-serial",
    "VGA",
    "qxl",
    "qxl-vga",
    "e1000",
    "qemu-xhci",
    "nec-usb-xhci",
    "usb-tablet",
    "intel-hda",
    "vmgenid",
    "pvpanic",
    "pvpanic-pci",
    "i6300esb",
];

/// Beginnings of the names of models known not to work, with why and what instead.
const REFUSED: &[(&str, &str, &str)] = &[
    (
        "nvme",
        "kills QEMU when its state is saved",
        "use a [[disk]], which is a virtio disk",
    ),
    (
        "ivshmem",
        "shares memory with other processes; its state cannot be loaded",
        "remove it",
    ),
    (
        "vfio",
        "is real hardware that writes guest memory unseen and cannot be copied",
        "use a [[nic]] or a [[disk]]",
    ),
    (
        "vhost",
        "writes guest memory from outside QEMU, where the writes are not seen",
        "use QEMU's own virtio device",
    ),
    (
        "virtiofs",
        "writes guest memory from outside QEMU, where the writes are not seen",
        "use a [[disk]] or a network file system",
    ),
    (
        "pc-dimm",
        "adds memory outside the mirrored RAM file",
        "give the VM its memory with `memory`",
    ),
    (
        "nvdimm",
        "adds memory outside the mirrored RAM file",
        "use a [[disk]]",
    ),
    (
        "virtio-mem",
        "adds memory outside the mirrored RAM file",
        "give the VM its memory with `memory`",
    ),
    (
        "virtio-pmem",
        "adds memory outside the mirrored RAM file",
        "use a [[disk]]",
    ),
    // Measured: a page punched out of the RAM file (MADV_REMOVE) is not reported by
    // PAGEMAP_SCAN, so the standby keeps its old content. Free page reporting is a
    // property of the balloon and goes with it.
    (
        "virtio-balloon",
        "takes pages out of guest memory (ballooning, free page reporting) in a way that is not \
         seen as a change",
        "remove it",
    ),
    (
        "usb-host",
        "is real hardware that cannot be copied",
        "remove it",
    ),
    (
        "virtio-9p",
        "works on files of one host",
        "use a [[disk]] or a network file system",
    ),
];

/// What pollux says to a device model, by its name as QEMU's `-device` takes it.
#[must_use]
pub fn verdict(model: &str) -> Verdict {
    for &(start, why, instead) in REFUSED {
        if model.starts_with(start) {
            return Verdict::Refused { why, instead };
        }
    }
    let virtio = BUS_SUFFIXES
        .iter()
        .find_map(|suffix| model.strip_suffix(suffix));
    if ACCEPTED.contains(&model) || virtio.is_some_and(|base| ACCEPTED_VIRTIO.contains(&base)) {
        Verdict::Accepted
    } else {
        Verdict::Unknown
    }
}

/// Every accepted model, for messages: virtio ones without their bus.
#[must_use]
pub fn accepted_words() -> String {
    [ACCEPTED_VIRTIO, ACCEPTED].concat().join(", ")
}

/// The model of a device as `-device` takes it: what stands before the first comma.
#[must_use]
pub fn model_of(device: &str) -> &str {
    device.split(',').next().unwrap_or_default()
}

/// Why `model` cannot be mirrored and what to do; `None` if it can.
#[must_use]
pub fn objection(model: &str) -> Option<String> {
    match verdict(model) {
        Verdict::Accepted => None,
        Verdict::Refused { why, instead } => Some(format!(
            "device `{model}` cannot be mirrored: it {why}; {instead}"
        )),
        Verdict::Unknown => Some(format!(
            "device `{model}` cannot be mirrored: nobody has tested a failover with it; remove it, \
             or use one of {}",
            accepted_words()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_the_measurements_is_kept() {
        for good in [
            "virtio-net-pci",
            "virtio-blk-device",
            "virtio-rng-pci",
            "virtio-serial-pci",
            "virtio-scsi-pci-transitional",
            "virtio-gpu-pci",
            "isa-serial",
            "VGA",
            "e1000",
            "i6300esb",
        ] {
            assert_eq!(verdict(good), Verdict::Accepted, "{good}");
        }
        for bad in [
            "nvme",
            "nvme-ns",
            "ivshmem-plain",
            "vfio-pci",
            "vhost-user-blk-pci",
            "vhost-vsock-pci",
            "vhost-user-fs-pci",
            "pc-dimm",
            "virtio-balloon-pci",
            "virtio-balloon-device",
        ] {
            assert!(matches!(verdict(bad), Verdict::Refused { .. }), "{bad}");
        }
        for unknown in ["e1000e", "virtio-crypto-pci", "virtio-net", ""] {
            assert_eq!(verdict(unknown), Verdict::Unknown, "{unknown}");
        }
    }

    #[test]
    fn an_objection_says_what_why_and_what_instead() {
        assert_eq!(
            objection("nvme").unwrap(),
            "device `nvme` cannot be mirrored: it kills QEMU when its state is saved; use a [[disk]], \
             which is a virtio disk"
        );
        assert_eq!(objection("virtio-rng-pci"), None);
    }
}
