//! What the encoder is told, what it chose, and what it did: plain data, no decision.

use crate::ids::Epoch;

/// Which codec an operator wants for a VM's pages, disk writes and device state. The
/// words of `mirror.compress` in a VM's spec.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum CodecChoice {
    /// What is measured to be soonest at the standby.
    #[default]
    Auto,
    /// Never compress (zero pages and deltas are still made small).
    Raw,
    /// Always lz4.
    Lz4,
    /// Always zstd.
    Zstd,
}

impl CodecChoice {
    /// Every choice, in the order they are shown.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Raw, Self::Lz4, Self::Zstd];

    /// The word for it in specs and figures.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// The choice with this word.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|choice| choice.word() == word)
    }
}

impl std::fmt::Display for CodecChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// Which batches the partner's decoder reads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum CodecVersion {
    /// Pages zero, raw or zstd; bodies plain or zstd. What protocol version 1 speaks.
    #[default]
    V1,
    /// And patches, and lz4. Since protocol version 2.
    V2,
}

impl CodecVersion {
    /// What a partner reads with whom this protocol version was agreed on.
    #[must_use]
    pub const fn of_protocol(version: u16) -> Self {
        if version >= 2 { Self::V2 } else { Self::V1 }
    }
}

/// How bytes are packed.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// Not at all.
    #[default]
    Raw,
    /// lz4, block format.
    Lz4,
    /// zstd at [`ZSTD_FAST_LEVEL`](super::pack::ZSTD_FAST_LEVEL).
    ZstdFast,
    /// zstd at [`ZSTD_SMALL_LEVEL`](super::pack::ZSTD_SMALL_LEVEL).
    ZstdSmall,
}

impl Codec {
    /// Every codec, cheapest first.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Lz4, Self::ZstdFast, Self::ZstdSmall];

    /// The word for it in figures.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::ZstdFast => "zstd-fast",
            Self::ZstdSmall => "zstd-small",
        }
    }
}

/// Why a codec is in use.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The operator pinned it.
    Pinned,
    /// Nothing was measured yet; the built-in figures decided.
    #[default]
    Assumed,
    /// The measured cost and gain decided.
    Measured,
    /// A better one would take more CPU than allowed.
    CpuLimit,
    /// A better one was found, but not for long enough to change over.
    Settling,
}

impl Why {
    /// A few words for people.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Pinned => "pinned by the spec",
            Self::Assumed => "not measured yet",
            Self::Measured => "soonest at the standby",
            Self::CpuLimit => "kept within the CPU limit",
            Self::Settling => "about to change",
        }
    }
}

/// Smallest default for what delta bases may take on the primary, in bytes.
pub const BASE_BYTES_MIN: u64 = 16 << 20;
/// Largest default for what delta bases may take on the primary, in bytes.
pub const BASE_BYTES_MAX: u64 = 256 << 20;
/// The default is this part of the guest's RAM: the pages a guest dirties again and
/// again are few, and the primary's host has the guest itself to hold.
pub const BASE_RAM_PART: u64 = 16;

/// What an encoder is told.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct EncodePolicy {
    /// Which codec.
    pub codec: CodecChoice,
    /// Whether pages may be sent as patches on what was sent last.
    pub delta: bool,
    /// What the partner reads. [`CodecVersion::V1`] means no patches and no lz4,
    /// whatever else is said.
    pub version: CodecVersion,
    /// Most bytes of pages kept as bases of patches.
    pub base_bytes_max: u64,
    /// Most of one core that packing may take, 1.0 being all of it, over the time
    /// between two epochs; `None`: no limit. Only [`CodecChoice::Auto`] heeds it.
    pub cpu_share_max: Option<f64>,
}

impl Default for EncodePolicy {
    fn default() -> Self {
        Self {
            codec: CodecChoice::Auto,
            delta: true,
            version: CodecVersion::V2,
            base_bytes_max: BASE_BYTES_MIN,
            cpu_share_max: None,
        }
    }
}

impl EncodePolicy {
    /// The defaults for a guest of `ram_bytes`, a codec, and a partner who reads `version`.
    #[must_use]
    pub fn for_guest(ram_bytes: u64, codec: CodecChoice, version: CodecVersion) -> Self {
        Self {
            codec,
            version,
            base_bytes_max: (ram_bytes / BASE_RAM_PART).clamp(BASE_BYTES_MIN, BASE_BYTES_MAX),
            ..Self::default()
        }
    }

    /// This codec and neither patches nor a newer layout: what a version-1 peer reads.
    #[must_use]
    pub fn v1(codec: CodecChoice) -> Self {
        Self {
            codec,
            delta: false,
            version: CodecVersion::V1,
            ..Self::default()
        }
    }
}

/// What is known of the link before an epoch is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkFacts {
    /// What all links that stand carry together, in bytes a second; `None` until known.
    pub bytes_per_s: Option<u64>,
    /// Bytes that wait for a link.
    pub queued_bytes: u64,
}

/// What encoding one epoch took and gave.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct EncodeStats {
    /// The epoch.
    pub epoch: Epoch,
    /// All-zero pages.
    pub zero: u64,
    /// Dirty pages that were what the standby holds; not sent.
    pub unchanged: u64,
    /// Pages sent as patches.
    pub patched: u64,
    /// Pages sent compressed.
    pub packed: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Bytes of the patches, before they were packed.
    pub patch_bytes: u64,
    /// Payload bytes of the page batches.
    pub page_wire_bytes: u64,
    /// Bytes of disk data.
    pub disk_bytes: u64,
    /// Payload bytes of the disk batches.
    pub disk_wire_bytes: u64,
    /// Bytes of the device state.
    pub state_bytes: u64,
    /// Payload bytes of the device state.
    pub state_wire_bytes: u64,
    /// Time spent sorting pages into classes and making patches.
    pub classify_ns: u64,
    /// Time spent packing (all threads together).
    pub pack_ns: u64,
    /// Time spent on frame headers: CRC and digest.
    pub check_ns: u64,
    /// How the bodies of pages were packed.
    pub codec: Codec,
    /// Why so.
    pub why: Why,
    /// Whether patches were made.
    pub delta: bool,
    /// Bytes kept as bases of patches.
    pub base_bytes: u64,
}

impl EncodeStats {
    /// Dirty pages given to the encoder.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.zero + self.unchanged + self.patched + self.packed + self.raw
    }

    /// Bytes before encoding: pages, disk data, device state.
    #[must_use]
    pub const fn plain_bytes(&self) -> u64 {
        self.pages() * super::PAGE_BYTES as u64 + self.disk_bytes + self.state_bytes
    }

    /// Payload bytes after it.
    #[must_use]
    pub const fn wire_bytes(&self) -> u64 {
        self.page_wire_bytes + self.disk_wire_bytes + self.state_wire_bytes
    }

    /// Time spent in all, in ns of CPU.
    #[must_use]
    pub const fn encode_ns(&self) -> u64 {
        self.classify_ns + self.pack_ns + self.check_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_has_its_word() {
        for choice in CodecChoice::ALL {
            assert_eq!(CodecChoice::from_word(choice.word()), Some(choice));
        }
        assert_eq!(CodecChoice::from_word("gzip"), None);
    }

    #[test]
    fn bases_take_a_sixteenth_of_the_guest_within_bounds() {
        let of = |mib: u64| {
            EncodePolicy::for_guest(mib << 20, CodecChoice::Auto, CodecVersion::V2).base_bytes_max
                >> 20
        };
        assert_eq!([of(64), of(512), of(1024), of(1 << 20)], [16, 32, 64, 256]);
    }
}
