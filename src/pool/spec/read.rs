//! TOML or JSON to a [`VmSpec`]: the keys, their types and their bounds.

use super::error::{Problem, SpecError, SpecProblem};
use super::fields::{Field, Fields, Reader, quoted};
use super::tree::{self, Entry, Node, line_column};
use super::values::{LABEL_RULE, is_label};
use super::{
    AccelChoice, BadValue, Boot, CpuModel, MemoryBytes, Protection, Transport, VmName, VmSpec,
};
use super::{check, parts};
use crate::pool::VmId;
use std::path::PathBuf;
use toml::de::DeTable;

/// Longest spec as text: a page a disk and NIC and plenty beside, so that a file
/// given by mistake is not read into the parser.
pub const SPEC_TEXT_BYTES_MAX: usize = 64 << 10;
/// Most disks of a VM.
pub const DISKS_MAX: usize = 8;
/// Most NICs of a VM.
pub const NICS_MAX: usize = 8;
/// Most further devices of a VM.
pub const DEVICES_MAX: usize = 8;
// QEMU's microvm has 24 virtio-mmio slots, its i440FX has 32 PCI slots.
const _: () = assert!(DISKS_MAX + NICS_MAX + DEVICES_MAX <= 24);
/// Longest kernel command line in bytes (Linux x86 `COMMAND_LINE_SIZE` less the NUL).
pub const CMDLINE_BYTES_MAX: usize = 2047;
/// Longest path in bytes (Linux `PATH_MAX` less the NUL).
pub const PATH_BYTES_MAX: usize = 4095;
/// Longest entry of `devices` in bytes.
pub const DEVICE_BYTES_MAX: usize = 512;
/// A remark on a good spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecNote(pub String);

impl std::fmt::Display for SpecNote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

const KEYS: &[&str] = &[
    "name",
    "uuid",
    "memory",
    "vcpus",
    "machine",
    "transport",
    "cpu",
    "accel",
    "firmware",
    "boot",
    "kernel",
    "initrd",
    "cmdline",
    "devices",
    "protection",
    "disk",
    "nic",
    "mirror",
    "restart",
];

/// Read a spec from TOML text.
pub(super) fn from_toml(text: &str, origin: &str) -> Result<(VmSpec, Vec<SpecNote>), SpecError> {
    let refuse = |at, what| SpecError {
        origin: origin.to_owned(),
        problems: vec![SpecProblem { at, what }],
    };
    if text.len() > SPEC_TEXT_BYTES_MAX {
        let what = Problem::TooLong {
            bytes: text.len(),
            max: SPEC_TEXT_BYTES_MAX,
        };
        return Err(refuse(None, what));
    }
    let document = DeTable::parse(text).map_err(|e| {
        let at = e.span().map(|span| line_column(text, span.start));
        refuse(at, Problem::Syntax(e.message().to_owned()))
    })?;
    let entries = tree::from_parsed(document.get_ref());
    read(Reader::new(Some(text)), &entries, origin)
}

/// Read a spec from a table that did not come as text.
pub(super) fn from_table(
    table: toml::Table,
    origin: &str,
) -> Result<(VmSpec, Vec<SpecNote>), SpecError> {
    read(Reader::new(None), &tree::from_table(table), origin)
}

fn read(
    mut r: Reader<'_>,
    entries: &[Entry],
    origin: &str,
) -> Result<(VmSpec, Vec<SpecNote>), SpecError> {
    let mut notes = Vec::new();
    let spec = spec(&mut r, entries, &mut notes);
    if let Some(spec) = &spec {
        check::check(spec, &mut r, &mut notes);
    }
    match spec {
        Some(spec) if !r.failed() => Ok((spec, notes)),
        _ => Err(SpecError {
            origin: origin.to_owned(),
            problems: r.finish(),
        }),
    }
}

/// `field`, or a problem if it is not there.
pub(super) fn needed<T>(
    r: &mut Reader<'_>,
    fields: &Fields<'_>,
    key: &str,
    field: Field<T>,
    allowed: &str,
) -> Option<T> {
    if !field.present() {
        r.missing(fields, key, allowed);
    }
    field.optional().flatten()
}

pub(super) fn label(text: &str) -> Result<String, BadValue> {
    if is_label(text) {
        Ok(text.to_owned())
    } else {
        Err(BadValue(LABEL_RULE.to_owned()))
    }
}

pub(super) fn path(text: &str) -> Result<PathBuf, BadValue> {
    let fine = text.starts_with('/')
        && text.len() <= PATH_BYTES_MAX
        && !text.chars().any(char::is_control);
    if fine {
        Ok(PathBuf::from(text))
    } else {
        Err(BadValue(format!(
            "write an absolute path of at most {PATH_BYTES_MAX} bytes"
        )))
    }
}

/// A disk's image: an absolute path, or one below the host's image folder.
pub(super) fn image_path(text: &str) -> Result<PathBuf, BadValue> {
    let leaves = text.split('/').any(|part| part == "..");
    let fine = !text.is_empty()
        && !leaves
        && text.len() <= PATH_BYTES_MAX
        && !text.chars().any(char::is_control);
    if fine {
        Ok(PathBuf::from(text))
    } else {
        Err(BadValue(format!(
            "write an absolute path, or one below the host's image folder, without `..`, of at most {PATH_BYTES_MAX} bytes"
        )))
    }
}

/// One of `words`, else what is allowed in words.
pub(super) fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, BadValue> {
    let found = words.iter().find(|(word, _)| *word == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let list: Vec<String> = words.iter().map(|(word, _)| quoted(word)).collect();
        BadValue(format!("use {}", list.join(" or ")))
    })
}

/// A word that a later version will accept: reports it and returns true.
pub(super) fn not_built(
    r: &mut Reader<'_>,
    fields: &Fields<'_>,
    key: &str,
    words: &[(&str, &'static str)],
) -> bool {
    let Some(Node {
        value: tree::Value::Text(text),
        ..
    }) = r.node(fields, key)
    else {
        return false;
    };
    let Some((_, instead)) = words.iter().find(|(word, _)| word == text) else {
        return false;
    };
    let problem = Problem::NotBuilt {
        key: fields.path(key),
        value: quoted(text),
        instead,
    };
    r.report(&fields.path(key), problem);
    true
}

fn uuid(text: &str) -> Result<VmId, BadValue> {
    // Only the usual form: 36 characters with '-'; others would not survive to_toml unchanged.
    let parsed = (text.len() == 36)
        .then(|| uuid::Uuid::try_parse(text).ok())
        .flatten()
        .filter(|uuid| !uuid.is_nil());
    parsed
        .map(|uuid| VmId(*uuid.as_bytes()))
        .ok_or_else(|| BadValue("write a uuid as uuidgen prints it".to_owned()))
}

fn spec(r: &mut Reader<'_>, entries: &[Entry], notes: &mut Vec<SpecNote>) -> Option<VmSpec> {
    let f = r.table("", Some(0..0), entries, "a VM spec", KEYS);
    let name = r.text(&f, "name", VmName::new);
    let name = needed(r, &f, "name", name, "name the VM, like name = \"orders\"");
    let id = r.text(&f, "uuid", uuid);
    let id = needed(
        r,
        &f,
        "uuid",
        id,
        "write one that uuidgen prints; it is the VM's identity for its whole life",
    );
    let memory = r.size(&f, "memory", MemoryBytes::new);
    let memory = needed(
        r,
        &f,
        "memory",
        memory,
        "write the guest's memory, like memory = \"512 MiB\"",
    );
    let vcpus = r.integer(&f, "vcpus", 1_u8, u8::MAX).or(1);
    let machine = r.text(&f, "machine", str::parse).or(super::Machine::Auto);
    let transport_choice = r
        .text(&f, "transport", |text| {
            one_of(
                text,
                &[Transport::PciLegacy, Transport::PciModern, Transport::Mmio]
                    .map(|transport| (transport.as_str(), transport)),
            )
        })
        .optional();
    let cpu = r.text(&f, "cpu", CpuModel::new).optional();
    let accel = r
        .text(&f, "accel", |text| {
            one_of(
                text,
                &[AccelChoice::Auto, AccelChoice::Kvm, AccelChoice::Tcg]
                    .map(|accel| (accel.as_str(), accel)),
            )
        })
        .or(AccelChoice::Auto);
    let firmware = r
        .text(&f, "firmware", |text| match text {
            "seabios" => Ok(None),
            other => path(other).map(Some).map_err(|_| {
                BadValue("use \"seabios\" or the absolute path of a firmware image".to_owned())
            }),
        })
        .or(None);
    let boot = boot(r, &f);
    let devices = devices(r, &f);
    let protection = protection(r, &f);
    let mirror = parts::mirror(r, &f);
    let restart = parts::restart(r, &f);
    let disks = tables(r, &f, "disk", DISKS_MAX, |r, path, node| {
        parts::disk(r, path, node, notes)
    });
    let nics = tables(r, &f, "nic", NICS_MAX, |r, path, node| {
        parts::nic(r, path, node, id)
    });
    Some(VmSpec {
        name: name?,
        uuid: id?,
        memory: memory?,
        vcpus: vcpus?,
        machine: machine?,
        transport_choice: transport_choice?,
        cpu: cpu?,
        accel: accel?,
        firmware: firmware?,
        boot: boot?,
        disks: disks?,
        nics: nics?,
        devices: devices?,
        protection: protection?,
        mirror: mirror?,
        restart: restart?,
    })
}

/// Read every table of a list of tables; `None` if one is wrong.
fn tables<T>(
    r: &mut Reader<'_>,
    f: &Fields<'_>,
    key: &str,
    max: usize,
    mut one: impl FnMut(&mut Reader<'_>, &str, &Node) -> Option<T>,
) -> Option<Vec<T>> {
    let items = r.list(f, key, "a list of tables, each begun with [[…]]", max)?;
    let read: Vec<Option<T>> = items
        .iter()
        .enumerate()
        .map(|(i, node)| one(r, &format!("{}[{i}]", f.path(key)), node))
        .collect();
    read.into_iter().collect()
}

fn boot(r: &mut Reader<'_>, f: &Fields<'_>) -> Option<Boot> {
    let disk = r.text(f, "boot", |text| one_of(text, &[("disk", ())]));
    let kernel = r.text(f, "kernel", path);
    let initrd = r.text(f, "initrd", path);
    let cmdline = r.text(f, "cmdline", |text| {
        if text.len() <= CMDLINE_BYTES_MAX && !text.chars().any(char::is_control) {
            Ok(text.to_owned())
        } else {
            Err(BadValue(format!(
                "a kernel command line is one line of at most {CMDLINE_BYTES_MAX} bytes"
            )))
        }
    });
    if !kernel.present() {
        for (key, present) in [("initrd", initrd.present()), ("cmdline", cmdline.present())] {
            if present {
                let why = format!("`{key}` needs a `kernel`: add one or remove `{key}`");
                r.report(key, Problem::Conflict(why));
            }
        }
    }
    match (disk, kernel) {
        (Field::Absent, Field::Absent) => {
            let allowed = "name a kernel to start, or write boot = \"disk\" to start from the first \
                           disk";
            r.missing(f, "kernel", allowed);
            None
        }
        (Field::Absent, Field::Good(kernel)) => Some(Boot::Kernel {
            kernel,
            initrd: initrd.optional()?,
            cmdline: cmdline.or(String::new())?,
        }),
        (Field::Good(()), Field::Absent) => Some(Boot::Disk),
        (Field::Good(()), Field::Good(_)) => {
            let why = "`boot = \"disk\"` and `kernel` exclude each other: remove one";
            r.report("boot", Problem::Conflict(why.to_owned()));
            None
        }
        _ => None,
    }
}

fn devices(r: &mut Reader<'_>, f: &Fields<'_>) -> Option<Vec<String>> {
    let items = r.list(f, "devices", "a list of strings", DEVICES_MAX)?;
    let mut devices = Vec::new();
    let mut good = true;
    for (i, node) in items.iter().enumerate() {
        let path = format!("{}[{i}]", f.path("devices"));
        let Some(text) = r.item_text(&path, node) else {
            good = false;
            continue;
        };
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_.,=:".contains(&b);
        if text.is_empty() || text.len() > DEVICE_BYTES_MAX || !text.bytes().all(fine) {
            let allowed = "write a model and properties as QEMU's -device takes them, like \
                           \"virtio-rng-pci\"";
            r.bad(&path, &quoted(text), allowed);
            good = false;
        } else {
            devices.push(text.to_owned());
        }
    }
    good.then_some(devices)
}

fn protection(r: &mut Reader<'_>, f: &Fields<'_>) -> Option<Protection> {
    let later = [(
        "reserved",
        "use \"mirrored\", which includes it, or \"restart\"",
    )];
    if not_built(r, f, "protection", &later) {
        return None;
    }
    r.text(f, "protection", |text| {
        one_of(
            text,
            &[Protection::None, Protection::Restart, Protection::Mirrored]
                .map(|level| (level.as_str(), level)),
        )
    })
    .or(Protection::None)
}
