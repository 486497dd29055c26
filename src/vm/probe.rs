//! What this host's QEMU can: its version and its machine types.
//!
//! Every answer that is "no" says what to install or change. The kernel is asked in
//! [`super::kernel`], the accelerator is found out in [`super::accel`].
//!
//! Must never: take a version number as proof of what can be tried.

use crate::pool::spec::{Machine, MachineFamily, VmSpec, version_key};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::Command;

/// Version of a QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QemuVersion {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Micro number.
    pub micro: u32,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Oldest QEMU pollux runs: the one everything was measured on, and the first
/// with `-netdev dgram` (QEMU 7.2's release notes).
pub const QEMU_MIN: QemuVersion = QemuVersion {
    major: 7,
    minor: 2,
    micro: 0,
};

/// The QEMU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuBinary {
    /// The program.
    pub program: PathBuf,
    /// Its version.
    pub version: QemuVersion,
    /// Names of the machine types it has, aliases included.
    pub machines: Vec<String>,
}

/// Why this host's QEMU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// It is not there.
    #[error("{} is not installed: install the package qemu-system-x86 (apt-get install qemu-system-x86)", program.display())]
    Missing {
        /// The program.
        program: PathBuf,
    },
    /// It cannot be run.
    #[error("cannot run {} {argument}: {why}; install the package qemu-system-x86 again", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What it was asked.
        argument: &'static str,
        /// What went wrong.
        why: String,
    },
    /// It does not say its version.
    #[error("{} is not QEMU: it says {said:?}; install the package qemu-system-x86", program.display())]
    NotQemu {
        /// The program.
        program: PathBuf,
        /// Its first line.
        said: String,
    },
    /// It is too old.
    #[error("{} is QEMU {version}; pollux needs {QEMU_MIN} or later: upgrade the package qemu-system-x86", program.display())]
    TooOld {
        /// The program.
        program: PathBuf,
        /// Its version.
        version: QemuVersion,
    },
}

/// Look at the QEMU called `program` (see [`super::argv::QEMU`]): its version and
/// machine types.
///
/// # Errors
/// [`QemuError`].
pub fn find_qemu(program: &str) -> Result<QemuBinary, QemuError> {
    let said = ask(program, "--version")?;
    let version = parse_version(&said).ok_or_else(|| QemuError::NotQemu {
        program: program.into(),
        said: said.lines().next().unwrap_or_default().to_owned(),
    })?;
    if version < QEMU_MIN {
        return Err(QemuError::TooOld {
            program: program.into(),
            version,
        });
    }
    let list = Command::new(program).args(["-machine", "help"]).output();
    let list = output(program, "-machine help", list)?;
    Ok(QemuBinary {
        program: program.into(),
        version,
        machines: parse_machines(&list),
    })
}

fn ask(program: &str, argument: &'static str) -> Result<String, QemuError> {
    output(
        program,
        argument,
        Command::new(program).arg(argument).output(),
    )
}

fn output(
    program: &str,
    argument: &'static str,
    output: io::Result<std::process::Output>,
) -> Result<String, QemuError> {
    let failed = |why| QemuError::Run {
        program: program.into(),
        argument,
        why,
    };
    match output {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(QemuError::Missing {
            program: program.into(),
        }),
        Err(e) => Err(failed(e.to_string())),
        Ok(out) if !out.status.success() => Err(failed(format!(
            "{}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        ))),
        Ok(out) => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
    }
}

/// `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(said: &str) -> Option<QemuVersion> {
    let rest = said.strip_prefix("QEMU emulator version ")?;
    let number = rest.split([' ', '\n', '(']).next()?;
    // A development build is 9.0.50-something.
    let number = number.split('-').next()?;
    let (major, minor, micro) = version_key(number)?;
    Some(QemuVersion {
        major,
        minor,
        micro,
    })
}

/// Names in the list of `-machine help`: the first word of every line but the title.
fn parse_machines(list: &str) -> Vec<String> {
    list.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// No machine type that both hosts have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// The one asked for is missing on one side.
    #[error(
        "machine type {name} is missing in the QEMU of {side}: use another `machine`, or one that both have: {common}"
    )]
    Missing {
        /// The type asked for.
        name: String,
        /// "this host" or "the partner".
        side: &'static str,
        /// What both have, newest first.
        common: String,
    },
    /// The family has no type in common.
    #[error(
        "the QEMUs of this host and the partner have no {family} machine type in common: use another `machine`, or bring both to the same QEMU"
    )]
    NoneInCommon {
        /// The family, as its alias.
        family: &'static str,
    },
}

/// The versioned machine type both sides name: the one the spec asks for, or the
/// newest of its family that both lists hold (so, of the older QEMU). For a VM
/// that is not mirrored, give the same list twice. Pure.
///
/// A microvm has no versions in QEMU: its type is `microvm` everywhere.
///
/// # Errors
/// [`MachineError`].
pub fn common_machine(
    spec: &VmSpec,
    ours: &[String],
    theirs: &[String],
) -> Result<String, MachineError> {
    let family = spec.machine_family();
    let common = common_types(family, ours, theirs);
    let wanted = match &spec.machine {
        Machine::Versioned { name, .. } => name.as_str(),
        _ => {
            let none = MachineError::NoneInCommon {
                family: family.alias(),
            };
            return common.into_iter().next().ok_or(none);
        }
    };
    for (list, side) in [(ours, "this host"), (theirs, "the partner")] {
        if !list.iter().any(|name| name == wanted) {
            return Err(MachineError::Missing {
                name: wanted.to_owned(),
                side,
                common: common.join(", "),
            });
        }
    }
    Ok(wanted.to_owned())
}

/// Types of a family in both lists, newest first.
fn common_types(family: MachineFamily, ours: &[String], theirs: &[String]) -> Vec<String> {
    let Some(prefix) = family.version_prefix() else {
        let alias = family.alias().to_owned();
        let both = ours.contains(&alias) && theirs.contains(&alias);
        return if both { vec![alias] } else { vec![] };
    };
    let age = |name: &str| name.strip_prefix(prefix).and_then(version_key);
    let mut common: Vec<String> = ours
        .iter()
        .filter(|name| age(name).is_some() && theirs.contains(name))
        .cloned()
        .collect();
    common.sort_by_key(|name| std::cmp::Reverse(age(name)));
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(machine: &str) -> VmSpec {
        VmSpec::parse(
            &format!(
                "name = \"a\"\nuuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"\nmemory = \"64 \
                 MiB\"\nkernel = \"/k\"\nmachine = \"{machine}\""
            ),
            "-",
        )
        .unwrap()
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn versions_are_read_as_distributions_print_them() {
        let version = |text| parse_version(text).map(|version| version.to_string());
        assert_eq!(
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright").as_deref(),
            Some("7.2.22")
        );
        assert_eq!(
            version("QEMU emulator version 10.0.13\n").as_deref(),
            Some("10.0.13")
        );
        assert_eq!(
            version("QEMU emulator version 9.0.50-v9-dirty\n").as_deref(),
            Some("9.0.50")
        );
        assert_eq!(version("bash 5"), None);
        assert_eq!(version("QEMU emulator version x"), None);
        assert!(parse_version("QEMU emulator version 7.1.9").unwrap() < QEMU_MIN);
        assert!(parse_version("QEMU emulator version 10.0.0").unwrap() > QEMU_MIN);
    }

    #[test]
    fn the_machine_type_is_the_newest_both_have() {
        let old = names(&["microvm", "pc", "q35", "pc-q35-7.2", "pc-q35-6.2"]);
        let new = names(&[
            "microvm",
            "q35",
            "pc-q35-10.0",
            "pc-q35-7.2",
            "pc-q35-6.2",
            "pc-i440fx-10.0",
        ]);
        let both = |machine| common_machine(&spec(machine), &new, &old);
        assert_eq!(both("q35").unwrap(), "pc-q35-7.2");
        assert_eq!(both("microvm").unwrap(), "microvm");
        assert_eq!(both("pc-q35-6.2").unwrap(), "pc-q35-6.2");
        assert_eq!(
            common_machine(&spec("q35"), &new, &new).unwrap(),
            "pc-q35-10.0"
        );
        assert_eq!(
            both("pc-q35-10.0").unwrap_err().to_string(),
            "machine type pc-q35-10.0 is missing in the QEMU of the partner: use another `machine`, or \
             one that both have: pc-q35-7.2, pc-q35-6.2"
        );
        assert_eq!(
            both("pc").unwrap_err().to_string(),
            "the QEMUs of this host and the partner have no pc machine type in common: use another \
             `machine`, or bring both to the same QEMU"
        );
    }

    #[test]
    fn a_missing_an_old_and_a_strange_qemu_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path.display().to_string()
        };
        let missing = dir.path().join("none").display().to_string();
        assert_eq!(
            find_qemu(&missing).unwrap_err().to_string(),
            format!(
                "{missing} is not installed: install the package qemu-system-x86 (apt-get install \
                 qemu-system-x86)"
            )
        );
        let old = script("old", "echo 'QEMU emulator version 6.2.0 (x)'");
        assert_eq!(
            find_qemu(&old).unwrap_err().to_string(),
            format!(
                "{old} is QEMU 6.2.0; pollux needs 7.2.0 or later: upgrade the package qemu-system-x86"
            )
        );
        let strange = script("strange", "echo hello");
        assert!(
            find_qemu(&strange)
                .unwrap_err()
                .to_string()
                .contains("is not QEMU: it says \"hello\"")
        );
        let broken = script("broken", "echo bad library >&2; exit 127");
        assert!(
            find_qemu(&broken)
                .unwrap_err()
                .to_string()
                .contains("bad library")
        );
    }
}
