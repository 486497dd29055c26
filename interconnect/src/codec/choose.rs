//! Which codec gets an epoch to the standby soonest. Pure: figures in, a choice out.
//!
//! # The model
//!
//! An epoch of `n` bytes of content (pages that are neither zero nor unchanged, and patches)
//! goes through two stages that overlap batch by batch: encoding, `E = n · e / threads`, and
//! the wire, `W = n · r · w`, with `e` the codec's measured ns per byte, `r` what it
//! measurably leaves of a byte, and `w` the ns a byte takes on its way: what the link is
//! measured to carry, but never less than what QUIC costs in CPU. A pipeline of `k` batches
//! takes the longer stage, and one batch of the shorter before it can start; then the standby
//! decodes the last batch:
//!
//! ```text
//! T = max(E, W) + min(E, W) / k + (n / k) · d
//! ```
//!
//! Codecs within [`EVEN`] of the soonest are even, and among them the one that takes the
//! least CPU wins: the cycles are the guests'.
//!
//! Patches are not part of the choice: one costs some hundred ns and saves at least half a
//! page of all later stages.
//!
//! # What keeps it calm, and what keeps it honest
//!
//! Another codec must be sooner by [`GAIN_MIN`], or even and cheaper by [`SAVING_MIN`], in
//! [`SETTLE_EPOCHS`] epochs running before it is taken. A codec that is not in use would never be measured again and stay as bad as it
//! once was; so after every [`TRY_EVERY`]th epoch one of the others is tried on a few of its
//! pages, after the epoch is sent and so outside of its latency.

use super::policy::{Codec, CodecChoice, CodecVersion, EncodePolicy, Why};

/// Share by which another codec must be sooner. Measurements of one epoch vary by more
/// than a tenth.
pub const GAIN_MIN: f64 = 0.10;
/// Share of time within which two codecs are even.
pub const EVEN: f64 = 0.02;
/// Share of CPU by which an even codec must be cheaper.
pub const SAVING_MIN: f64 = 0.25;
/// Epochs in which it must be so.
pub const SETTLE_EPOCHS: u32 = 4;
/// Epochs between two trials; each costs some 10 to 300 µs.
pub const TRY_EVERY: u32 = 16;
/// Weight of a new measurement.
const EWMA_WEIGHT: f64 = 0.125;
/// What QUIC costs, in ns of CPU for each byte on each side (docs/interconnect.md: UDP, AES-GCM
/// and copies), when no capacity is measured: then it is taken for the bottleneck.
pub const QUIC_NS_PER_BYTE: f64 = 1.0;
/// Bytes of a batch.
const BATCH_BYTES: f64 = (super::pages::BATCH_PAGES_MAX * super::PAGE_BYTES) as f64;

/// What a codec costs and gives.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Figures {
    /// ns of CPU to encode a byte.
    encode_ns: f64,
    /// Bytes out for a byte in.
    ratio: f64,
    /// ns of CPU to decode a byte; not measured on this side.
    decode_ns: f64,
    measured: bool,
}

/// Before anything is measured: pages of the test guest with redis on the machine of
/// docs/promises.md (`cargo bench --bench codec`).
const fn assumed(codec: Codec) -> Figures {
    let (encode_ns, ratio, decode_ns) = match codec {
        Codec::Raw => (0.1, 1.0, 0.05),
        Codec::Lz4 => (1.5, 0.37, 0.8),
        Codec::ZstdFast => (3.5, 0.28, 1.2),
        Codec::ZstdSmall => (9.0, 0.23, 1.4),
    };
    Figures {
        encode_ns,
        ratio,
        decode_ns,
        measured: false,
    }
}

/// What is known before an epoch is encoded.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Situation {
    /// What the links carry, in bytes a second; `None` while not known.
    pub link_bytes_per_s: Option<u64>,
    /// Threads that pack.
    pub threads: usize,
    /// Time since the last epoch was encoded, in ns; 0 for the first.
    pub since_last_ns: u64,
}

/// A choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chosen {
    /// The codec.
    pub codec: Codec,
    /// Why.
    pub why: Why,
}

/// Chooses epoch by epoch.
///
/// ```text
/// measured(..)* --> choose(..) --> the epoch is encoded --> measured(..)*, to_try() -> measured(..)
/// ```
#[derive(Debug)]
pub struct Chooser {
    pinned: Option<Codec>,
    version: CodecVersion,
    cpu_share_max: Option<f64>,
    figures: [Figures; Codec::ALL.len()],
    codec: Codec,
    /// The codec that is better by now, and for how many epochs.
    rival: Option<(Codec, u32)>,
    /// Bytes of content of an epoch.
    content_bytes: f64,
    epochs: u32,
    next_try: usize,
}

fn ewma(old: f64, new: f64, first: bool) -> f64 {
    if first {
        new
    } else {
        old + (new - old) * EWMA_WEIGHT
    }
}

impl Chooser {
    /// A chooser that has measured nothing.
    #[must_use]
    pub fn new(policy: &EncodePolicy) -> Self {
        let codec = super::encoder::first_codec(policy);
        Self {
            pinned: (policy.codec != CodecChoice::Auto).then_some(codec),
            version: policy.version,
            cpu_share_max: policy.cpu_share_max,
            figures: Codec::ALL.map(assumed),
            codec,
            rival: None,
            content_bytes: 0.0,
            epochs: 0,
            next_try: 0,
        }
    }

    fn candidates(&self) -> impl Iterator<Item = Codec> {
        let version = self.version;
        Codec::ALL
            .into_iter()
            .filter(move |codec| version >= CodecVersion::V2 || *codec != Codec::Lz4)
    }

    fn of(&self, codec: Codec) -> &Figures {
        &self.figures[codec as usize]
    }

    /// A batch or a trial: `plain` bytes became `packed` bytes in `ns`.
    pub fn measured(&mut self, codec: Codec, plain: u64, packed: u64, ns: u64) {
        if plain == 0 || ns == 0 {
            return;
        }
        let figures = &mut self.figures[codec as usize];
        let (plain, first) = (plain as f64, !figures.measured);
        figures.encode_ns = ewma(figures.encode_ns, ns as f64 / plain, first);
        figures.ratio = ewma(figures.ratio, packed as f64 / plain, first);
        figures.measured = true;
    }

    /// An epoch had so many bytes of content.
    pub fn epoch_had(&mut self, content_bytes: u64) {
        let first = self.content_bytes == 0.0;
        self.content_bytes = ewma(self.content_bytes, content_bytes as f64, first);
    }

    /// Expected ns until the standby has the epoch.
    fn predict(&self, codec: Codec, situation: &Situation) -> f64 {
        let figures = self.of(codec);
        let content = self.content_bytes.max(super::PAGE_BYTES as f64);
        let link_ns = match situation.link_bytes_per_s {
            Some(rate) if rate > 0 => 1e9 / rate as f64,
            _ => 0.0,
        };
        let encode = content * figures.encode_ns / situation.threads.max(1) as f64;
        let wire = content * figures.ratio * link_ns.max(QUIC_NS_PER_BYTE);
        let batches = (content / BATCH_BYTES).max(1.0);
        encode.max(wire) + (encode.min(wire) + content * figures.decode_ns) / batches
    }

    /// ns of CPU for a byte of content on this side.
    fn cpu_ns(&self, codec: Codec) -> f64 {
        let figures = self.of(codec);
        figures.encode_ns + figures.ratio * QUIC_NS_PER_BYTE
    }

    /// Whether packing with `codec` stays within the CPU limit.
    fn affordable(&self, codec: Codec, situation: &Situation) -> bool {
        match self.cpu_share_max {
            Some(share) if situation.since_last_ns > 0 => {
                self.content_bytes * self.of(codec).encode_ns
                    <= share * situation.since_last_ns as f64
            }
            _ => true,
        }
    }

    /// The best codec, of all or of those within the CPU limit.
    fn best(&self, situation: &Situation, within_limit: bool) -> Codec {
        let allowed = || {
            self.candidates().filter(|codec| {
                !within_limit || *codec == Codec::Raw || self.affordable(*codec, situation)
            })
        };
        let soonest_ns = allowed()
            .map(|codec| self.predict(codec, situation))
            .min_by(f64::total_cmp)
            .unwrap_or(f64::INFINITY);
        allowed()
            .filter(|codec| self.predict(*codec, situation) <= soonest_ns * (1.0 + EVEN))
            .min_by(|a, b| self.cpu_ns(*a).total_cmp(&self.cpu_ns(*b)))
            .unwrap_or(Codec::Raw)
    }

    /// The codec for the next epoch.
    pub fn choose(&mut self, situation: &Situation) -> Chosen {
        self.epochs = self.epochs.wrapping_add(1);
        if let Some(codec) = self.pinned {
            return Chosen {
                codec,
                why: Why::Pinned,
            };
        }
        let best = self.best(situation, true);
        let must_leave = !self.affordable(self.codec, situation) && best != self.codec;
        let better = best != self.codec && {
            let (best_ns, now_ns) = (
                self.predict(best, situation),
                self.predict(self.codec, situation),
            );
            best_ns < now_ns * (1.0 - GAIN_MIN)
                || best_ns <= now_ns * (1.0 + EVEN)
                    && self.cpu_ns(best) < self.cpu_ns(self.codec) * (1.0 - SAVING_MIN)
        };
        // The first choice has nothing to be calm about.
        let first = !self.figures.iter().any(|figures| figures.measured);
        let mut settling = false;
        if must_leave || first {
            self.take(best);
        } else if better {
            let epochs = match self.rival {
                Some((rival, epochs)) if rival == best => epochs + 1,
                _ => 1,
            };
            if epochs >= SETTLE_EPOCHS {
                self.take(best);
            } else {
                self.rival = Some((best, epochs));
                settling = true;
            }
        } else {
            self.rival = None;
        }
        let why = if settling {
            Why::Settling
        } else if self.best(situation, false) != best {
            Why::CpuLimit
        } else if self.of(self.codec).measured {
            Why::Measured
        } else {
            Why::Assumed
        };
        Chosen {
            codec: self.codec,
            why,
        }
    }

    fn take(&mut self, codec: Codec) {
        self.codec = codec;
        self.rival = None;
    }

    /// After an epoch is sent: a codec to try on a few of its pages, and to report with
    /// [`Self::measured`]. Every codec once at the beginning, then one now and then.
    pub fn to_try(&mut self) -> Option<Codec> {
        if self.pinned.is_some() {
            return None;
        }
        let unknown = self.candidates().find(|codec| !self.of(*codec).measured);
        if unknown.is_some() {
            return unknown;
        }
        if !self.epochs.is_multiple_of(TRY_EVERY) {
            return None;
        }
        let others: Vec<Codec> = self.candidates().filter(|c| *c != self.codec).collect();
        self.next_try = (self.next_try + 1) % others.len().max(1);
        others.get(self.next_try).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// ns per KiB and bytes left of 100, of each codec.
    type World = [(u64, u64); 4];
    const GUEST: World = [(100, 100), (1500, 37), (3500, 28), (9000, 23)];
    /// What does not compress.
    const NOISE: World = [(100, 100), (900, 100), (1500, 100), (4000, 100)];

    fn auto() -> EncodePolicy {
        EncodePolicy::default()
    }

    /// A link of so many Mbit/s.
    fn at(mbit: u64) -> Situation {
        Situation {
            link_bytes_per_s: Some(mbit * 125_000),
            threads: 1,
            since_last_ns: 20_000_000,
        }
    }

    /// An epoch of 4 MiB: choose, encode, try.
    fn epoch(chooser: &mut Chooser, world: &World, situation: &Situation) -> Chosen {
        let chosen = chooser.choose(situation);
        let report = |chooser: &mut Chooser, codec: Codec, bytes: u64| {
            let (ns_per_kib, percent) = world[codec as usize];
            chooser.measured(
                codec,
                bytes,
                bytes * percent / 100,
                bytes / 1024 * ns_per_kib,
            );
        };
        report(chooser, chosen.codec, 4 * MIB);
        if let Some(codec) = chooser.to_try() {
            report(chooser, codec, 64 << 10);
        }
        chooser.epoch_had(4 * MIB);
        chosen
    }

    fn settled(policy: &EncodePolicy, world: &World, situation: &Situation) -> Chosen {
        let mut chooser = Chooser::new(policy);
        let mut last = epoch(&mut chooser, world, situation);
        for _ in 0..100 {
            last = epoch(&mut chooser, world, situation);
        }
        last
    }

    #[test]
    fn the_slower_the_link_the_harder_it_compresses() {
        let at_speed = |mbit| settled(&auto(), &GUEST, &at(mbit)).codec;
        assert_eq!(at_speed(100), Codec::ZstdSmall);
        assert_eq!(at_speed(500), Codec::ZstdFast);
        assert_eq!(at_speed(2000), Codec::Lz4);
        assert_eq!(at_speed(40000), Codec::Raw);
    }

    #[test]
    fn what_does_not_compress_goes_raw_on_any_link() {
        for mbit in [100, 1000, 10_000, 100_000] {
            let chosen = settled(&auto(), &NOISE, &at(mbit));
            assert_eq!((chosen.codec, chosen.why), (Codec::Raw, Why::Measured));
        }
    }

    #[test]
    fn more_threads_compress_on_faster_links() {
        let with = |threads| {
            let situation = Situation {
                threads,
                ..at(20000)
            };
            settled(&auto(), &GUEST, &situation).codec
        };
        assert_eq!([with(1), with(4)], [Codec::Raw, Codec::Lz4]);
    }

    #[test]
    fn a_pinned_codec_is_kept_and_nothing_is_tried() {
        for (choice, codec) in [
            (CodecChoice::Raw, Codec::Raw),
            (CodecChoice::Lz4, Codec::Lz4),
            (CodecChoice::Zstd, Codec::ZstdFast),
        ] {
            let policy = EncodePolicy {
                codec: choice,
                ..auto()
            };
            let mut chooser = Chooser::new(&policy);
            for mbit in [100, 100_000, 1000] {
                let chosen = epoch(&mut chooser, &NOISE, &at(mbit));
                assert_eq!((chosen.codec, chosen.why), (codec, Why::Pinned));
                assert_eq!(chooser.to_try(), None);
            }
        }
    }

    #[test]
    fn an_old_partner_never_gets_lz4() {
        let policy = EncodePolicy {
            version: CodecVersion::V1,
            ..auto()
        };
        for mbit in [100, 1000, 3000, 10_000, 100_000] {
            let mut chooser = Chooser::new(&policy);
            for _ in 0..100 {
                assert_ne!(epoch(&mut chooser, &GUEST, &at(mbit)).codec, Codec::Lz4);
            }
        }
    }

    #[test]
    fn a_cpu_limit_is_kept_though_a_better_one_is_known() {
        // 4 MiB in 20 ms: zstd-fast takes 14 ms of it, lz4 6 ms, raw 0.4.
        let at_share = |share| {
            let policy = EncodePolicy {
                cpu_share_max: Some(share),
                ..auto()
            };
            settled(&policy, &GUEST, &at(500))
        };
        assert_eq!(at_share(0.9).codec, Codec::ZstdFast);
        let chosen = at_share(0.4);
        assert_eq!((chosen.codec, chosen.why), (Codec::Lz4, Why::CpuLimit));
        assert_eq!(at_share(0.01).codec, Codec::Raw);
    }

    #[test]
    fn one_odd_epoch_changes_nothing_and_a_lasting_change_does() {
        let mut chooser = Chooser::new(&auto());
        for _ in 0..50 {
            epoch(&mut chooser, &GUEST, &at(2000));
        }
        for _ in 0..SETTLE_EPOCHS - 1 {
            let chosen = epoch(&mut chooser, &GUEST, &at(100000));
            assert_eq!((chosen.codec, chosen.why), (Codec::Lz4, Why::Settling));
        }
        assert_eq!(epoch(&mut chooser, &GUEST, &at(2000)).codec, Codec::Lz4);
        for _ in 0..SETTLE_EPOCHS - 1 {
            assert_eq!(epoch(&mut chooser, &GUEST, &at(100000)).codec, Codec::Lz4);
        }
        assert_eq!(epoch(&mut chooser, &GUEST, &at(100000)).codec, Codec::Raw);
    }

    #[test]
    fn a_codec_once_found_bad_gets_another_chance() {
        let mut chooser = Chooser::new(&auto());
        for _ in 0..100 {
            epoch(&mut chooser, &NOISE, &at(1000));
        }
        assert_eq!(chooser.choose(&at(1000)).codec, Codec::Raw);
        // The guest does something else now.
        let mut epochs = 0;
        while epoch(&mut chooser, &GUEST, &at(1000)).codec == Codec::Raw {
            epochs += 1;
            assert!(epochs < 3 * TRY_EVERY * 16, "still raw");
        }
    }

    #[test]
    fn nothing_measured_says_so() {
        let mut chooser = Chooser::new(&auto());
        assert_eq!(chooser.choose(&Situation::default()).why, Why::Assumed);
    }
}
