//! The tables of a spec: disks, NICs and the mirror policy.

use super::fields::{Fields, Reader};
use super::read::{SpecNote, image_path, label, needed, not_built, one_of};
use super::tree::{Node, Value};
use super::values::{BRIDGE_BYTES_MAX, DISK_MAX, DISK_STEP, LABEL_RULE, MIB, SizeBytes};
use super::{
    BadValue, Disk, DiskKind, Durability, IsolationResponse, MacAddr, MirrorPolicy, Nic, Overload,
    RestartPolicy, RestartPriority,
};
use crate::pool::{HostName, VmId};
use interconnect::codec::CodecChoice;

/// Bounds of the overlay: below, one large write stalls the guest; above, it is
/// larger than the staging of any epoch.
const OVERLAY_MIN: u64 = MIB;
const OVERLAY_MAX: u64 = 64 << 30;

const DISK_KEYS: &[&str] = &[
    "name",
    "path",
    "size",
    "format",
    "kind",
    "durability",
    "bus",
];
const RESTART_KEYS: &[&str] = &["priority", "order", "delay_s", "isolation", "weight"];
const NIC_KEYS: &[&str] = &["name", "mac", "bridge"];
const MIRROR_KEYS: &[&str] = &[
    "partner",
    "epoch_gap_min_ms",
    "epoch_interval_max_ms",
    "overhead_max_percent",
    "codec",
    "delta",
    "overload",
    "audit",
    "held_packets_max",
    "overlay_max",
];

/// What to write for `compress`, which said less than there is to say.
fn codec_for_compress(value: &Value) -> &'static str {
    match value {
        Value::Bool(true) => {
            "write codec = \"auto\", which compresses where that is faster, or pin \"lz4\" or \"zstd\""
        }
        Value::Bool(false) => {
            "write codec = \"raw\" to send pages as they are, or leave it out: \"auto\" compresses \
             only where that is faster"
        }
        _ => "write codec = \"auto\", \"raw\", \"lz4\" or \"zstd\"",
    }
}

/// One table: `None` if something is wrong with it, which is reported.
pub(super) fn disk(
    r: &mut Reader<'_>,
    at: &str,
    node: &Node,
    notes: &mut Vec<SpecNote>,
) -> Option<Disk> {
    let entries = r.entries(at, node)?;
    let prefix = format!("{at}.");
    let f = r.table(&prefix, node.span.clone(), entries, "a disk", DISK_KEYS);
    let name = r.text(&f, "name", label);
    let name = needed(r, &f, "name", name, "name the disk, like name = \"root\"");
    let file = r.text(&f, "path", image_path);
    let file = needed(
        r,
        &f,
        "path",
        file,
        "write the path of a raw file, absolute or below the host's image folder",
    );
    let size = r.size(&f, "size", |bytes| {
        if bytes.is_multiple_of(DISK_STEP) && (DISK_STEP..=DISK_MAX).contains(&bytes) {
            Ok(SizeBytes(bytes))
        } else {
            Err(BadValue(format!(
                "a disk's size is a multiple of {}, from {} to {}",
                SizeBytes(DISK_STEP),
                SizeBytes(DISK_STEP),
                SizeBytes(DISK_MAX)
            )))
        }
    });
    let size = needed(
        r,
        &f,
        "size",
        size,
        "write the size the guest sees, like size = \"4 GiB\"",
    );
    let format = r
        .text(&f, "format", |text| {
            one_of(text, &[("raw", ())]).map_err(|_| {
                BadValue(
                    "use \"raw\"; qemu-img convert -O raw makes one of other formats".to_owned(),
                )
            })
        })
        .or(());
    let bus = r
        .text(&f, "bus", |text| one_of(text, &[("virtio", ())]))
        .or(());
    let kind = r
        .text(&f, "kind", |text| {
            one_of(
                text,
                &[DiskKind::Replicated, DiskKind::Shared].map(|kind| (kind.word(), kind)),
            )
        })
        .or(DiskKind::Replicated);
    let power_safe = "use \"memory\": the VM survives the loss of either host, but loss of power on \
                      both hosts at once can lose flushed writes";
    let durability = if not_built(r, &f, "durability", &[("disk", power_safe)]) {
        None
    } else {
        let field = r.text(&f, "durability", |text| {
            one_of(text, &[("memory", Durability::Memory)])
        });
        if !field.present()
            && kind == Some(DiskKind::Replicated)
            && let Some(name) = &name
        {
            notes.push(SpecNote(format!(
                "disk `{name}` has no `durability`: it gets \"memory\"; the VM survives the loss of \
                 either host, but loss of power on both hosts at once can lose flushed writes"
            )));
        }
        field.or(Durability::Memory)
    };
    format.and(bus)?;
    Some(Disk {
        name: name?,
        path: file?,
        size: size?,
        kind: kind?,
        durability: durability?,
    })
}

/// One table: `None` if something is wrong with it, which is reported.
pub(super) fn nic(r: &mut Reader<'_>, at: &str, node: &Node, vm: Option<VmId>) -> Option<Nic> {
    let entries = r.entries(at, node)?;
    let prefix = format!("{at}.");
    let f = r.table(&prefix, node.span.clone(), entries, "a NIC", NIC_KEYS);
    let name = r.text(&f, "name", label);
    let name = needed(r, &f, "name", name, "name the NIC, like name = \"lan\"");
    let bridge = r.text(&f, "bridge", |text| {
        // What the kernel's dev_valid_name allows, less what needs quoting elsewhere.
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let named = !matches!(text, "" | "." | "..") && text.len() <= BRIDGE_BYTES_MAX;
        if named && text.bytes().all(fine) {
            Ok(text.to_owned())
        } else {
            Err(BadValue(format!(
                "write the name of a bridge of the host: 1 to {BRIDGE_BYTES_MAX} of letters, digits, \
                 '-', '_' and '.'"
            )))
        }
    });
    let bridge = needed(
        r,
        &f,
        "bridge",
        bridge,
        "name the bridge the NIC is put on, like bridge = \"br0\"",
    );
    let mac = r.text(&f, "mac", str::parse);
    let (name, bridge) = (name?, bridge?);
    let mac = match mac.optional()? {
        Some(mac) => mac,
        None => MacAddr::derived(vm?.0, &name),
    };
    Some(Nic { name, mac, bridge })
}

/// One table: `None` if something is wrong with it, which is reported.
pub(super) fn mirror(r: &mut Reader<'_>, f: &Fields<'_>) -> Option<MirrorPolicy> {
    let default = MirrorPolicy::default();
    let Some(node) = r.node(f, "mirror") else {
        return Some(default);
    };
    let entries = r.entries("mirror", node)?;
    let f = r.table_replacing(
        "mirror.",
        node.span.clone(),
        entries,
        "[mirror]",
        MIRROR_KEYS,
        &[("compress", codec_for_compress)],
    );
    let partner = r
        .text(&f, "partner", |text| {
            HostName::new(text).map_err(|_| BadValue(LABEL_RULE.to_owned()))
        })
        .optional();
    let gap = r.integer(&f, "epoch_gap_min_ms", 0_u32, 1_000);
    let interval = r.integer(&f, "epoch_interval_max_ms", 5_u32, 10_000);
    let overhead = r.integer(&f, "overhead_max_percent", 1_u8, 90);
    let codec = r.text(&f, "codec", |text| {
        one_of(
            text,
            &CodecChoice::ALL.map(|choice| (choice.word(), choice)),
        )
    });
    let delta = r.flag(&f, "delta");
    let overload = r.text(&f, "overload", |text| {
        one_of(text, &Overload::ALL.map(|what| (what.word(), what)))
    });
    let audit = r.flag(&f, "audit");
    let packets = r.integer(&f, "held_packets_max", 16_u32, 1 << 20);
    let overlay = r.size(&f, "overlay_max", |bytes| {
        if (OVERLAY_MIN..=OVERLAY_MAX).contains(&bytes) {
            Ok(SizeBytes(bytes))
        } else {
            Err(BadValue(format!(
                "use a size from {} to {}",
                SizeBytes(OVERLAY_MIN),
                SizeBytes(OVERLAY_MAX)
            )))
        }
    });
    Some(MirrorPolicy {
        partner: partner?,
        epoch_gap_min_ms: gap.or(default.epoch_gap_min_ms)?,
        epoch_interval_max_ms: interval.or(default.epoch_interval_max_ms)?,
        overhead_max_percent: overhead.or(default.overhead_max_percent)?,
        codec: codec.or(default.codec)?,
        delta: delta.or(default.delta)?,
        overload: overload.or(default.overload)?,
        audit: audit.or(default.audit)?,
        held_packets_max: packets.or(default.held_packets_max)?,
        overlay_max: overlay.or(default.overlay_max)?,
    })
}

/// One table: `None` if something is wrong with it, which is reported.
pub(super) fn restart(r: &mut Reader<'_>, f: &Fields<'_>) -> Option<RestartPolicy> {
    let default = RestartPolicy::default();
    let Some(node) = r.node(f, "restart") else {
        return Some(default);
    };
    let entries = r.entries("restart", node)?;
    let f = r.table(
        "restart.",
        node.span.clone(),
        entries,
        "[restart]",
        RESTART_KEYS,
    );
    let priority = r.text(&f, "priority", |text| {
        one_of(text, &RestartPriority::ALL.map(|what| (what.word(), what)))
    });
    let order = r.integer(&f, "order", 0_u32, 1_000);
    let delay = r.integer(&f, "delay_s", 0_u32, 3_600);
    let isolation = r.text(&f, "isolation", |text| {
        one_of(
            text,
            &IsolationResponse::ALL.map(|what| (what.word(), what)),
        )
    });
    let weight = r.integer(&f, "weight", 0_u32, 1_000_000);
    Some(RestartPolicy {
        priority: priority.or(default.priority)?,
        order: order.or(default.order)?,
        delay_s: delay.or(default.delay_s)?,
        isolation: isolation.or(default.isolation)?,
        weight: weight.or(default.weight)?,
    })
}
