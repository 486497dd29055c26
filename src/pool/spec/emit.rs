//! A spec as TOML or JSON, every default written out.

use super::{Boot, Disk, DiskKind, Durability, Nic, VmSpec};
use toml::{Table, Value};

/// The spec as text.
pub(super) fn to_toml(spec: &VmSpec) -> String {
    // Fails only on types TOML lacks; `table` makes strings, integers, booleans,
    // lists and tables.
    toml::to_string(&table(spec)).expect("a spec is plain TOML")
}

fn text(value: impl ToString) -> Value {
    Value::String(value.to_string())
}

fn list(items: impl Iterator<Item = Value>) -> Value {
    Value::Array(items.collect())
}

/// The spec as a TOML table; its JSON form has the same shape.
pub(super) fn table(spec: &VmSpec) -> Table {
    let mut t = Table::new();
    let mut put = |key: &str, value: Value| {
        t.insert(key.to_owned(), value);
    };
    put("name", text(&spec.name));
    put("uuid", text(spec.uuid));
    put("memory", text(spec.memory));
    put("vcpus", Value::Integer(spec.vcpus.into()));
    put("machine", text(&spec.machine));
    if let Some(transport) = spec.transport_choice {
        put("transport", text(transport.as_str()));
    }
    if let Some(cpu) = &spec.cpu {
        put("cpu", text(cpu.as_str()));
    }
    put("accel", text(spec.accel.as_str()));
    put(
        "firmware",
        match &spec.firmware {
            None => text("seabios"),
            Some(path) => text(path.display()),
        },
    );
    match &spec.boot {
        Boot::Disk => put("boot", text("disk")),
        Boot::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            put("kernel", text(kernel.display()));
            if let Some(initrd) = initrd {
                put("initrd", text(initrd.display()));
            }
            put("cmdline", text(cmdline));
        }
    }
    put("devices", list(spec.devices.iter().map(text)));
    put("protection", text(spec.protection.as_str()));
    put("disk", list(spec.disks.iter().map(disk)));
    put("nic", list(spec.nics.iter().map(nic)));
    put("mirror", Value::Table(mirror(spec)));
    put("restart", Value::Table(restart(spec)));
    t
}

fn disk(disk: &Disk) -> Value {
    let mut t = Table::new();
    t.insert("name".into(), text(&disk.name));
    t.insert("path".into(), text(disk.path.display()));
    t.insert("size".into(), text(disk.size));
    t.insert("format".into(), text("raw"));
    t.insert("bus".into(), text("virtio"));
    t.insert("kind".into(), text(disk.kind.word()));
    if disk.kind == DiskKind::Replicated {
        let durability = match disk.durability {
            Durability::Memory => "memory",
        };
        t.insert("durability".into(), text(durability));
    }
    Value::Table(t)
}

fn nic(nic: &Nic) -> Value {
    let mut t = Table::new();
    t.insert("name".into(), text(&nic.name));
    t.insert("mac".into(), text(nic.mac));
    t.insert("bridge".into(), text(&nic.bridge));
    Value::Table(t)
}

fn mirror(spec: &VmSpec) -> Table {
    let policy = &spec.mirror;
    let mut t = Table::new();
    if let Some(partner) = &policy.partner {
        t.insert("partner".into(), text(partner));
    }
    let mut number = |key: &str, value: u32| {
        t.insert(key.to_owned(), Value::Integer(value.into()));
    };
    number("epoch_gap_min_ms", policy.epoch_gap_min_ms);
    number("epoch_interval_max_ms", policy.epoch_interval_max_ms);
    number("overhead_max_percent", policy.overhead_max_percent.into());
    number("held_packets_max", policy.held_packets_max);
    t.insert("codec".into(), text(policy.codec));
    t.insert("delta".into(), Value::Boolean(policy.delta));
    t.insert("overload".into(), text(policy.overload.word()));
    t.insert("audit".into(), Value::Boolean(policy.audit));
    t.insert("overlay_max".into(), text(policy.overlay_max));
    t
}

fn restart(spec: &VmSpec) -> Table {
    let policy = &spec.restart;
    let mut t = Table::new();
    t.insert("priority".into(), text(policy.priority.word()));
    for (key, value) in [
        ("order", policy.order),
        ("delay_s", policy.delay_s),
        ("weight", policy.weight),
    ] {
        t.insert(key.into(), Value::Integer(value.into()));
    }
    t.insert("isolation".into(), text(policy.isolation.word()));
    t
}
