//! What must hold between the keys of a spec.

use super::devices::{self, model_of};
use super::error::Problem;
use super::fields::{Reader, quoted};
use super::read::SpecNote;
use super::{
    AccelChoice, Boot, DiskKind, IsolationResponse, MachineFamily, Protection, Transport, VmSpec,
};
use std::collections::HashMap;

/// Properties of a device that tie it to a back end, and where that is written instead.
const BACK_ENDS: &[(&str, &str)] = &[
    ("drive", "write a [[disk]]"),
    ("netdev", "write a [[nic]]"),
    (
        "chardev",
        "remove it: pollux gives the VM one serial console",
    ),
    ("memdev", "give the VM its memory with `memory`"),
    ("host", "remove it: real hardware cannot be mirrored"),
];

/// Report every conflict of a spec whose single values are all right.
pub(super) fn check(spec: &VmSpec, r: &mut Reader<'_>, notes: &mut Vec<SpecNote>) {
    machine(spec, r);
    timer(spec, notes);
    names(spec, r);
    protection(spec, r);
    for (i, device) in spec.devices.iter().enumerate() {
        one_device(spec, r, notes, &format!("devices[{i}]"), device);
    }
    let mirror = &spec.mirror;
    if mirror.epoch_gap_min_ms >= mirror.epoch_interval_max_ms {
        let why = format!(
            "`mirror.epoch_gap_min_ms` is {}, `mirror.epoch_interval_max_ms` is {}: the gap must be \
             the smaller one",
            mirror.epoch_gap_min_ms, mirror.epoch_interval_max_ms
        );
        r.report("mirror.epoch_gap_min_ms", Problem::Conflict(why));
    }
}

/// What a protection level asks of the disks and of the isolation response.
fn protection(spec: &VmSpec, r: &mut Reader<'_>) {
    for (i, disk) in spec.disks.iter().enumerate() {
        let shared = disk.kind == DiskKind::Shared;
        let why = match spec.protection {
            Protection::Restart if !shared => format!(
                "`protection = \"restart\"` needs disks that every host reaches: write \
                 disk[{i}].kind = \"shared\" if this one is on such storage, or use \
                 \"mirrored\" or \"none\""
            ),
            Protection::Mirrored if shared => format!(
                "a mirrored VM's disks are kept on both hosts: write disk[{i}].kind = \
                 \"replicated\", or use protection = \"restart\" (mirroring over shared disks is \
                 not built yet)"
            ),
            _ if shared && disk.path.is_relative() => format!(
                "a shared disk is at the same place on every host: write disk[{i}].path as an \
                 absolute path"
            ),
            _ => continue,
        };
        r.report(&format!("disk[{i}].kind"), Problem::Conflict(why));
    }
    if spec.restart.isolation == IsolationResponse::Leave && spec.protection != Protection::None {
        let why = format!(
            "`restart.isolation = \"leave\"` is only for a VM that runs on no other host, and \
             `protection = \"{}\"` lets it: use \"stop\" or \"shutdown\"",
            spec.protection.as_str()
        );
        r.report("restart.isolation", Problem::Conflict(why));
    }
}

/// A microvm has no HPET and no PM timer, and with ACPI of the reduced kind Linux does
/// not use its PIT: under TCG, whose CPU does not tell its frequency either, a stock
/// kernel waits for ever while it calibrates (Debian 6.1 on QEMU 7.2). KVM tells it.
const TSC_PARAMETER: &str = "tsc_early_khz=";

fn timer(spec: &VmSpec, notes: &mut Vec<SpecNote>) {
    let Boot::Kernel { cmdline, .. } = &spec.boot else {
        return;
    };
    if spec.machine_family() == MachineFamily::Microvm
        && spec.accel != AccelChoice::Kvm
        && !cmdline.contains(TSC_PARAMETER)
    {
        notes.push(SpecNote(format!(
            "under TCG a Linux kernel hangs at its start on a microvm unless it is told the host's TSC \
             frequency: add {TSC_PARAMETER}<kHz> to `cmdline`, or use machine = \"pc\""
        )));
    }
}

fn machine(spec: &VmSpec, r: &mut Reader<'_>) {
    let mut conflict = |key: &str, why: &str| r.report(key, Problem::Conflict(why.to_owned()));
    let microvm = spec.machine_family() == MachineFamily::Microvm;
    if spec.boot == Boot::Disk {
        if microvm {
            conflict(
                "machine",
                "`machine = \"microvm\"` starts a kernel only: name a `kernel`, or use \"q35\" or \
                 \"pc\" to start from a disk",
            );
        }
        if spec.disks.is_empty() {
            conflict("boot", "`boot = \"disk\"` needs a disk: add a [[disk]]");
        }
    }
    match spec.transport_choice {
        Some(Transport::Mmio) if !microvm => conflict(
            "transport",
            "`transport = \"virtio-mmio\"` exists on a microvm only: use \"virtio-pci\" or leave it \
             out",
        ),
        Some(Transport::PciLegacy | Transport::PciModern) if microvm => conflict(
            "transport",
            "a microvm has no PCI: use `transport = \"virtio-mmio\"` or leave it out",
        ),
        _ => {}
    }
}

fn names(spec: &VmSpec, r: &mut Reader<'_>) {
    let disks = spec.disks.iter().enumerate();
    let nics = spec.nics.iter().enumerate();
    let disk_names = disks
        .clone()
        .map(|(i, d)| (format!("disk[{i}].name"), d.name.clone()));
    let disk_paths = disks.map(|(i, d)| (format!("disk[{i}].path"), d.path.display().to_string()));
    let nic_names = nics
        .clone()
        .map(|(i, n)| (format!("nic[{i}].name"), n.name.clone()));
    let macs = nics.map(|(i, n)| (format!("nic[{i}].mac"), n.mac.to_string()));
    unique(r, disk_names);
    unique(r, disk_paths);
    unique(r, nic_names);
    unique(r, macs);
}

fn unique(r: &mut Reader<'_>, values: impl Iterator<Item = (String, String)>) {
    let mut seen: HashMap<String, String> = HashMap::new();
    for (key, value) in values {
        if let Some(first) = seen.get(&value) {
            let allowed = format!("`{first}` has it already");
            r.bad(&key, &quoted(&value), allowed);
        } else {
            seen.insert(value, key);
        }
    }
}

fn one_device(
    spec: &VmSpec,
    r: &mut Reader<'_>,
    notes: &mut Vec<SpecNote>,
    key: &str,
    device: &str,
) {
    let model = model_of(device);
    let mut bad = |allowed: String| r.bad(key, &quoted(device), allowed);
    for (property, instead) in BACK_ENDS {
        let tied = device
            .split(',')
            .skip(1)
            .any(|part| part.split('=').next() == Some(property));
        if tied {
            bad(format!(
                "`{property}` names something outside the device; {instead}"
            ));
            return;
        }
    }
    for (start, instead) in [("virtio-net", "[[nic]]"), ("virtio-blk", "[[disk]]")] {
        if model.starts_with(start) {
            bad(format!("write a {instead} instead"));
            return;
        }
    }
    let microvm = spec.machine_family() == MachineFamily::Microvm;
    if microvm && !model.ends_with("-device") {
        let device_on_mmio = model
            .strip_suffix("-pci")
            .filter(|base| base.starts_with("virtio-"))
            .map(|base| format!("use \"{base}-device\", or "));
        bad(format!(
            "a microvm has virtio-mmio devices only: {}use machine = \"q35\"",
            device_on_mmio.unwrap_or_default()
        ));
        return;
    }
    if !microvm && model.starts_with("virtio-") && model.ends_with("-device") {
        let base = model.trim_end_matches("-device");
        bad(format!(
            "virtio-mmio exists on a microvm only: use \"{base}-pci\""
        ));
        return;
    }
    if let Some(objection) = devices::objection(model) {
        match spec.protection {
            Protection::Mirrored => bad(objection),
            Protection::None | Protection::Restart => notes.push(SpecNote(objection)),
        }
    }
}
