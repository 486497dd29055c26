//! Figures of the recent epochs, and the log of what happened: bounded rings that the
//! status reads.

use crate::api::links::EncodeFigures;
use crate::api::types::{EPOCH_WINDOW, EpochFigures, Event, Percentiles};
use interconnect::codec::EncodeStats;
use std::collections::VecDeque;

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
    /// What encoding it took and gave.
    pub encode: EncodeStats,
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
}

impl Figures {
    /// What the encoder made of the epochs of the window.
    fn encoding(&self) -> Option<EncodeFigures> {
        let sum = |pick: fn(&EncodeStats) -> u64| self.window.iter().map(|s| pick(&s.encode)).sum();
        let mut encode_us: Vec<u64> = self
            .window
            .iter()
            .map(|s| s.encode.encode_ns() / 1000)
            .collect();
        let figures = EncodeFigures {
            raw_bytes: sum(EncodeStats::plain_bytes),
            encoded_bytes: sum(EncodeStats::wire_bytes),
            encode_us: Percentiles::of(&mut encode_us),
            pages_zero: sum(|e| e.zero),
            pages_unchanged: sum(|e| e.unchanged),
            pages_delta: sum(|e| e.patched),
            pages_compressed: sum(|e| e.packed),
            pages_raw: sum(|e| e.raw),
        };
        (figures.encoded_bytes > 0).then_some(figures)
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
    fn rings_are_bounded_and_keep_the_newest() {
        let mut figures = Figures::default();
        assert!(figures.summary().is_none());
        figures.push(EpochSample {
            encode: EncodeStats {
                zero: 3,
                patched: 5,
                page_wire_bytes: 1024,
                pack_ns: 7_000,
                ..EncodeStats::default()
            },
            ..EpochSample::default()
        });
        let encoding = figures.summary().unwrap().encoding.unwrap();
        assert_eq!(
            (encoding.raw_bytes, encoding.encoded_bytes),
            (8 * 4096, 1024)
        );
        assert_eq!((encoding.pages_zero, encoding.pages_delta), (3, 5));
        assert_eq!((encoding.encode_us.max, encoding.ratio()), (7, Some(32.0)));
        let mut figures = Figures::default();
        for i in 0..EPOCH_WINDOW as u64 + 10 {
            figures.push(EpochSample {
                pause_us: i,
                ..EpochSample::default()
            });
        }
        let s = figures.summary().unwrap();
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
