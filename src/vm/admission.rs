//! Admission: which VM may be mirrored at all.
//!
//! Asked before the first checkpoint, because a wrong answer is deadly: with an
//! nvme device in the VM the first save kills the primary (QEMU.md section 4).
//! [`check_spec`] looks at what is written, [`check_running`] at what QEMU has
//! now, hot-added devices included. What is not known to work is refused.
//!
//! Must never: change the VM. Every command sent is a query.

use crate::pool::spec::VmSpec;
use crate::pool::spec::devices::{model_of, objection};
use serde_json::{Value, json};
use std::fmt;

/// One reason not to mirror a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A device model that is not on the list.
    Device {
        /// Where it is: its id, or its place in the spec.
        place: String,
        /// What is wrong with it and what to use instead.
        objection: String,
    },
    /// QEMU itself says that the VM's state cannot be saved.
    Blocked(String),
    /// Memory outside the RAM file.
    Memory {
        /// QEMU's id of it.
        id: String,
    },
    /// A network back end that bypasses the egress gate.
    Network {
        /// QEMU's id of it.
        id: String,
        /// Its type, as `user`.
        kind: String,
    },
    /// A writable disk that bypasses the write overlay.
    Disk {
        /// QEMU's node name.
        node: String,
        /// The driver QEMU opens it with.
        driver: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { place, objection } => write!(f, "{objection} ({place})"),
            Self::Blocked(why) => write!(
                f,
                "QEMU cannot save this VM's state: {why}; remove the device it names"
            ),
            Self::Memory { id } => write!(
                f,
                "memory device `{id}` cannot be mirrored: it lies outside the mirrored RAM file; give \
                 the VM its memory with `memory`"
            ),
            Self::Network { id, kind } => write!(
                f,
                "network back end `{id}` of type {kind} cannot be mirrored: its packets bypass the \
                 egress gate; use a [[nic]]"
            ),
            Self::Disk { node, driver } => write!(
                f,
                "disk node `{node}` cannot be mirrored: QEMU opens it itself (driver {driver}), so its \
                 writes bypass the write overlay; use a [[disk]]"
            ),
        }
    }
}

/// Why a VM may not be mirrored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// It holds something that cannot be mirrored. Never empty.
    #[error("this VM cannot be mirrored: {}", lines(.0))]
    Refused(Vec<Refusal>),
    /// QEMU did not answer one of the questions.
    #[error("cannot find out whether this VM can be mirrored: {command}: {why}")]
    NoAnswer {
        /// The QMP command.
        command: String,
        /// What went wrong.
        why: String,
    },
}

fn lines(refusals: &[Refusal]) -> String {
    let lines: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

fn verdict(refusals: Vec<Refusal>) -> Result<(), AdmissionError> {
    if refusals.is_empty() {
        Ok(())
    } else {
        Err(AdmissionError::Refused(refusals))
    }
}

/// May a VM of this spec be mirrored? Everything else in a spec is already
/// mirrorable by its own validation; its further devices need not be.
///
/// # Errors
/// [`AdmissionError::Refused`] with every device that cannot.
pub fn check_spec(spec: &VmSpec) -> Result<(), AdmissionError> {
    let refusals = spec.devices.iter().enumerate().filter_map(|(i, device)| {
        objection(model_of(device)).map(|objection| Refusal::Device {
            place: format!("devices[{i}] of the spec"),
            objection,
        })
    });
    verdict(refusals.collect())
}

/// May the VM that runs now be mirrored? `qmp` executes one command with its
/// arguments and gives back what `return` holds. Ask before the first checkpoint
/// and before each re-protection.
///
/// # Errors
/// [`AdmissionError`].
pub fn check_running(
    mut qmp: impl FnMut(&str, Value) -> Result<Value, String>,
) -> Result<(), AdmissionError> {
    let mut ask = |command: &str, arguments: Value| {
        qmp(command, arguments).map_err(|why| AdmissionError::NoAnswer {
            command: command.to_owned(),
            why,
        })
    };
    let mut refusals = Vec::new();
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let list = ask("qom-list", json!({ "path": path }))?;
        for item in array("qom-list", &list)? {
            devices(item, path, &mut refusals);
        }
    }
    let memory = ask("query-memory-devices", json!({}))?;
    for device in array("query-memory-devices", &memory)? {
        let id = text(&device["data"]["id"]);
        refusals.push(Refusal::Memory { id });
    }
    let network = ask(
        "human-monitor-command",
        json!({ "command-line": "info network" }),
    )?;
    let network = network.as_str().ok_or_else(|| shape("info network"))?;
    refusals.extend(network.lines().filter_map(network_backend));
    let blocks = ask("query-named-block-nodes", json!({ "flat": true }))?;
    refusals.extend(
        array("query-named-block-nodes", &blocks)?
            .iter()
            .filter_map(block_node),
    );
    // Absent when nothing blocks.
    let migrate = ask("query-migrate", json!({}))?;
    if let Some(reasons) = migrate.get("blocked-reasons") {
        for reason in array("query-migrate", reasons)? {
            refusals.push(Refusal::Blocked(text(reason)));
        }
    }
    verdict(refusals)
}

fn shape(command: &str) -> AdmissionError {
    AdmissionError::NoAnswer {
        command: command.to_owned(),
        why: "the answer has not the shape QEMU documents".to_owned(),
    }
}

fn array<'v>(command: &str, value: &'v Value) -> Result<&'v Vec<Value>, AdmissionError> {
    value.as_array().ok_or_else(|| shape(command))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("(without a name)").to_owned()
}

/// One property of a folder of devices; children have the type `child<MODEL>`.
fn devices(item: &Value, path: &str, refusals: &mut Vec<Refusal>) {
    let kind = item["type"].as_str().unwrap_or_default();
    let model = kind
        .strip_prefix("child<")
        .and_then(|kind| kind.strip_suffix('>'));
    if let Some(objection) = model.and_then(objection) {
        refusals.push(Refusal::Device {
            place: format!("{path}/{}", text(&item["name"])),
            objection,
        });
    }
}

/// One line of HMP's `info network`, like ` \ n0: index=0,type=user,net=10.0.2.0`.
fn network_backend(line: &str) -> Option<Refusal> {
    let (id, properties) = line.trim_start_matches([' ', '\\']).split_once(": ")?;
    let kind = properties
        .split(',')
        .find_map(|property| property.strip_prefix("type="))?;
    (!matches!(kind, "nic" | "dgram")).then(|| Refusal::Network {
        id: id.to_owned(),
        kind: kind.to_owned(),
    })
}

/// One node of the block layer: what is written must go to pollux, over NBD.
fn block_node(node: &Value) -> Option<Refusal> {
    let driver = node["drv"].as_str().unwrap_or_default();
    // `raw` is a layer over another node, which is looked at by itself.
    if node["ro"] == true || matches!(driver, "nbd" | "raw") {
        return None;
    }
    Some(Refusal::Disk {
        node: text(&node["node-name"]),
        driver: driver.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers like a QEMU with one virtio disk and NIC, one answer replaced.
    fn qemu(
        command: &'static str,
        answer: Value,
    ) -> impl FnMut(&str, Value) -> Result<Value, String> {
        move |asked, arguments| {
            if asked == command {
                return Ok(answer.clone());
            }
            Ok(match asked {
                "qom-list" if arguments["path"] == "/machine/peripheral" => json!([
                    { "name": "type", "type": "string" },
                    { "name": "disk0", "type": "child<virtio-blk-pci>" },
                    { "name": "nic0", "type": "child<virtio-net-pci>" },
                ]),
                "qom-list" | "query-memory-devices" => json!([]),
                "human-monitor-command" => json!(
                    "nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: \
                     index=0,type=dgram,udp\r\n"
                ),
                "query-named-block-nodes" => {
                    json!([{ "node-name": "d0", "drv": "nbd", "ro": false }])
                }
                "query-migrate" => json!({}),
                other => return Err(format!("unexpected {other}")),
            })
        }
    }

    fn refusal(command: &'static str, answer: Value) -> String {
        check_running(qemu(command, answer))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_plain_vm_is_admitted() {
        assert_eq!(check_running(qemu("none", json!(null))), Ok(()));
    }

    #[test]
    fn each_kind_of_refusal_names_what_why_and_what_instead() {
        assert_eq!(
            refusal(
                "qom-list",
                json!([{ "name": "device[0]", "type": "child<nvme>" }])
            ),
            "this VM cannot be mirrored: device `nvme` cannot be mirrored: it kills QEMU when its state \
             is saved; use a [[disk]], which is a virtio disk (/machine/peripheral/device[0]); device \
             `nvme` cannot be mirrored: it kills QEMU when its state is saved; use a [[disk]], which is \
             a virtio disk (/machine/peripheral-anon/device[0])"
        );
        assert_eq!(
            refusal(
                "query-memory-devices",
                json!([{ "type": "dimm", "data": { "id": "dimm1" } }])
            ),
            "this VM cannot be mirrored: memory device `dimm1` cannot be mirrored: it lies outside the \
             mirrored RAM file; give the VM its memory with `memory`"
        );
        assert_eq!(
            refusal(
                "human-monitor-command",
                json!(" \\ u0: index=0,type=user,net=10.0.2.0\r\n")
            ),
            "this VM cannot be mirrored: network back end `u0` of type user cannot be mirrored: its \
             packets bypass the egress gate; use a [[nic]]"
        );
        assert_eq!(
            refusal(
                "query-named-block-nodes",
                json!([{ "node-name": "f", "drv": "file", "ro": false }])
            ),
            "this VM cannot be mirrored: disk node `f` cannot be mirrored: QEMU opens it itself (driver \
             file), so its writes bypass the write overlay; use a [[disk]]"
        );
        assert_eq!(
            refusal(
                "query-migrate",
                json!({ "blocked-reasons": ["device X is non-migratable"] })
            ),
            "this VM cannot be mirrored: QEMU cannot save this VM's state: device X is non-migratable; \
             remove the device it names"
        );
    }

    #[test]
    fn a_qemu_that_does_not_answer_or_answers_nonsense_is_not_admitted() {
        for command in [
            "qom-list",
            "query-memory-devices",
            "human-monitor-command",
            "query-named-block-nodes",
        ] {
            let error = check_running(qemu(command, json!(7))).unwrap_err();
            assert!(
                matches!(error, AdmissionError::NoAnswer { .. }),
                "{command}: {error}"
            );
        }
        assert_eq!(
            check_running(|_, _| Err("the monitor is gone".to_owned()))
                .unwrap_err()
                .to_string(),
            "cannot find out whether this VM can be mirrored: qom-list: the monitor is gone"
        );
    }
}
