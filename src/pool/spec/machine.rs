//! Machine types and how devices sit on them.

use super::values::BadValue;
use std::fmt;
use std::str::FromStr;

/// The kinds of machine pollux knows how to mirror (QEMU.md section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MachineFamily {
    /// No PCI, no legacy devices; direct kernel boot only.
    Microvm,
    /// ICH9 with PCI Express.
    Q35,
    /// i440FX with PCI.
    Pc,
}

impl MachineFamily {
    /// The alias QEMU knows the family's newest type by.
    #[must_use]
    pub const fn alias(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }

    /// What a versioned type of the family starts with; a microvm has no versions.
    #[must_use]
    pub const fn version_prefix(self) -> Option<&'static str> {
        match self {
            Self::Microvm => None,
            Self::Q35 => Some("pc-q35-"),
            Self::Pc => Some("pc-i440fx-"),
        }
    }
}

/// Machine type as a spec asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Machine {
    /// microvm for a kernel, q35 for a disk.
    Auto,
    /// The newest type of this family that both hosts have.
    Family(MachineFamily),
    /// Exactly this type, like `pc-q35-7.2`.
    Versioned {
        /// The family it belongs to.
        family: MachineFamily,
        /// QEMU's name of the type.
        name: String,
    },
}

impl FromStr for Machine {
    type Err = BadValue;
    fn from_str(text: &str) -> Result<Self, BadValue> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        for family in [
            MachineFamily::Microvm,
            MachineFamily::Q35,
            MachineFamily::Pc,
        ] {
            if text == family.alias() {
                return Ok(Self::Family(family));
            }
            let version = family
                .version_prefix()
                .and_then(|prefix| text.strip_prefix(prefix));
            if let Some(version) = version
                && version_key(version).is_some()
            {
                return Ok(Self::Versioned {
                    family,
                    name: text.to_owned(),
                });
            }
        }
        Err(BadValue(
            "use \"auto\", \"microvm\", \"q35\", \"pc\", or a versioned type like \"pc-q35-7.2\" or \
             \"pc-i440fx-7.2\""
                .to_owned(),
        ))
    }
}

/// `7.2` or `4.0.1` as numbers that compare in order of age.
#[must_use]
pub fn version_key(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.split('.').map(|part| {
        let digits =
            !part.is_empty() && part.len() <= 4 && part.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| part.parse::<u32>().ok()).flatten()
    });
    let major = parts.next()??;
    let minor = parts.next()??;
    let patch = match parts.next() {
        None => 0,
        Some(patch) => patch?,
    };
    parts.next().is_none().then_some((major, minor, patch))
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Family(family) => family.alias(),
            Self::Versioned { name, .. } => name,
        })
    }
}

/// How virtio devices are attached to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// `virtio-mmio`: microvm only; the smallest device state.
    Mmio,
    /// `virtio-pci` with `disable-modern=on`: the default on q35 and pc.
    PciLegacy,
    /// `virtio-pci-modern`: for guests without a legacy virtio driver; 46 KB of
    /// state a device (QEMU.md section 4).
    PciModern,
}

impl Transport {
    /// The word for it in a spec.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mmio => "virtio-mmio",
            Self::PciLegacy => "virtio-pci",
            Self::PciModern => "virtio-pci-modern",
        }
    }
}
