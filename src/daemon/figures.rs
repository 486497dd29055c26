//! Figures of the recent epochs, and the log of what happened: bounded rings that the
//! status reads.

use crate::api::links::EncodeFigures;
use crate::api::types::{EPOCH_WINDOW, EpochFigures, Event, Percentiles};
use interconnect::codec::EncodeStats;
use std::collections::VecDeque;

/// What encoding one epoch took and gave, as far as the status shows it.
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeSample {
    raw_bytes: u64,
    encoded_bytes: u64,
    encode_us: u64,
    zero: u64,
    unchanged: u64,
    delta: u64,
    compressed: u64,
    raw: u64,
}

impl From<&EncodeStats> for EncodeSample {
    fn from(stats: &EncodeStats) -> Self {
        Self {
            raw_bytes: stats.plain_bytes(),
            encoded_bytes: stats.wire_bytes(),
            encode_us: stats.encode_ns() / 1000,
            zero: stats.zero,
            unchanged: stats.unchanged,
            delta: stats.patched,
            compressed: stats.packed,
            raw: stats.raw,
        }
    }
}

/// One committed epoch, times in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct EpochSample {
    /// Whole pause.
    pub pause_us: u64,
    /// `stop`.
    pub stop_us: u64,
    /// Dirty pages collected and copied.
    pub capture_us: u64,
    /// Device state saved.
    pub save_us: u64,
    /// `cont`.
    pub cont_us: u64,
    /// From resume to acknowledgement.
    pub commit_us: u64,
    /// Age of the epoch's beginning at its commit.
    pub lag_us: u64,
    /// From the last cut to this one.
    pub length_us: u64,
    /// Dirty pages.
    pub pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Its encoding; None if that was never told.
    pub encode: Option<EncodeSample>,
}

/// The ring of epochs.
#[derive(Debug, Default)]
pub struct Figures {
    committed: u64,
    window: VecDeque<EpochSample>,
}

impl Figures {
    /// Add one epoch; the oldest beyond [`EPOCH_WINDOW`] goes.
    pub fn push(&mut self, sample: EpochSample) {
        self.committed += 1;
        if self.window.len() == EPOCH_WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(sample);
    }

    /// Percentiles over the window; None before the first epoch.
    #[must_use]
    pub fn summary(&self) -> Option<EpochFigures> {
        if self.window.is_empty() {
            return None;
        }
        let mut samples: Vec<u64> = Vec::with_capacity(self.window.len());
        let mut of = |pick: fn(&EpochSample) -> u64| {
            samples.clear();
            samples.extend(self.window.iter().map(pick));
            Percentiles::of(&mut samples)
        };
        Some(EpochFigures {
            committed: self.committed,
            window: self.window.len() as u64,
            pause_us: of(|s| s.pause_us),
            stop_us: of(|s| s.stop_us),
            capture_us: of(|s| s.capture_us),
            save_us: of(|s| s.save_us),
            cont_us: of(|s| s.cont_us),
            commit_us: of(|s| s.commit_us),
            lag_us: of(|s| s.lag_us),
            length_us: of(|s| s.length_us),
            pages: of(|s| s.pages),
            wire_bytes: of(|s| s.wire_bytes),
            encoding: self.encoding(),
        })
    }

    fn encoding(&self) -> Option<EncodeFigures> {
        let mut times = Vec::with_capacity(self.window.len());
        let mut figures = EncodeFigures::default();
        for sample in self.window.iter().filter_map(|s| s.encode) {
            times.push(sample.encode_us);
            figures.raw_bytes += sample.raw_bytes;
            figures.encoded_bytes += sample.encoded_bytes;
            figures.pages_zero += sample.zero;
            figures.pages_unchanged += sample.unchanged;
            figures.pages_delta += sample.delta;
            figures.pages_compressed += sample.compressed;
            figures.pages_raw += sample.raw;
        }
        if times.is_empty() {
            return None;
        }
        figures.encode_us = Percentiles::of(&mut times);
        Some(figures)
    }
}

/// How many events the log of a VM or a pair keeps.
pub const EVENTS_MAX: usize = 256;

/// The ring of events.
#[derive(Debug, Default)]
pub struct EventLog {
    events: VecDeque<Event>,
}

impl EventLog {
    /// Add one; the oldest beyond [`EVENTS_MAX`] goes.
    pub fn push(&mut self, at_ns: u64, what: String) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { at_ns, what });
    }

    /// All kept, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Event> {
        self.events.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{EPOCH_WINDOW, EVENTS_MAX, EncodeStats, EpochSample, EventLog, Figures};

    #[test]
    fn encoding_is_summed_over_the_epochs_that_tell_of_it() {
        let mut figures = Figures::default();
        for encode in [
            None,
            Some(&EncodeStats {
                raw: 1,
                zero: 3,
                page_wire_bytes: 4096,
                pack_ns: 7_000,
                ..EncodeStats::default()
            }),
            Some(&EncodeStats {
                packed: 1,
                page_wire_bytes: 1024,
                ..EncodeStats::default()
            }),
        ] {
            figures.push(EpochSample {
                encode: encode.map(Into::into),
                ..EpochSample::default()
            });
        }
        let encoding = figures.summary().unwrap().encoding.unwrap();
        assert_eq!(
            (encoding.raw_bytes, encoding.encoded_bytes),
            (5 * 4096, 5 * 1024)
        );
        assert_eq!(encoding.ratio(), Some(4.0));
        assert_eq!((encoding.pages_raw, encoding.pages_compressed), (1, 1));
        assert_eq!(encoding.encode_us.max, 7);
    }

    #[test]
    fn rings_are_bounded_and_keep_the_newest() {
        let mut figures = Figures::default();
        assert!(figures.summary().is_none());
        for i in 0..EPOCH_WINDOW as u64 + 10 {
            figures.push(EpochSample {
                pause_us: i,
                ..EpochSample::default()
            });
        }
        let s = figures.summary().unwrap();
        assert!(s.encoding.is_none(), "nobody has told of it");
        assert_eq!(
            (s.window, s.committed),
            (EPOCH_WINDOW as u64, EPOCH_WINDOW as u64 + 10)
        );
        assert_eq!(s.pause_us.max, EPOCH_WINDOW as u64 + 9);
        let mut log = EventLog::default();
        for i in 0..EVENTS_MAX as u64 + 5 {
            log.push(i, String::new());
        }
        assert_eq!((log.list().len(), log.list()[0].at_ns), (EVENTS_MAX, 5));
    }
}
