//! Counters of a disk.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Buckets of the latency histogram: powers of two of microseconds, the last is about 17 minutes.
const BUCKETS: usize = 31;

/// Latency of one kind of request, in microseconds, as upper bounds of power-of-two buckets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LatencySummary {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Largest, exact.
    pub max_us: u64,
}

/// Counters since the disk was opened, and what it holds now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskStats {
    /// Reads answered.
    pub reads: u64,
    /// Writes acknowledged.
    pub writes: u64,
    /// Flushes acknowledged, FUA included.
    pub flushes: u64,
    /// Trims and write-zeroes acknowledged.
    pub trims: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub write_bytes: u64,
    /// Memory the overlay holds.
    pub overlay_bytes: u64,
    /// Epochs the overlay holds, the running one included; 0 without an overlay.
    pub overlay_epochs: u64,
    /// Time from a read's arrival in the disk to its answer.
    pub read_latency: LatencySummary,
    /// The same for writes, held-back time included.
    pub write_latency: LatencySummary,
    /// Writes held back because the overlay was full.
    pub throttled: u64,
    /// Why the newest attempt to write a committed epoch to the file failed; `None` once it worked.
    pub write_error: Option<String>,
}

#[derive(Default)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    max_us: AtomicU64,
}

impl Histogram {
    pub fn add(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (64 - us.leading_zeros() as usize).min(BUCKETS - 1);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.max_us.fetch_max(us, Relaxed);
    }

    pub fn summary(&self) -> LatencySummary {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let at = |percent: u64| {
            let mut left = (total * percent).div_ceil(100);
            for (bucket, count) in counts.iter().enumerate() {
                if left <= *count {
                    return 1_u64 << bucket;
                }
                left -= count;
            }
            0
        };
        let max_us = self.max_us.load(Relaxed);
        if total == 0 {
            return LatencySummary::default();
        }
        LatencySummary {
            p50_us: at(50).min(max_us),
            p99_us: at(99).min(max_us),
            max_us,
        }
    }
}

#[derive(Default)]
pub(super) struct Counters {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub trims: AtomicU64,
    pub read_bytes: AtomicU64,
    pub write_bytes: AtomicU64,
    pub throttled: AtomicU64,
    pub read_latency: Histogram,
    pub write_latency: Histogram,
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}

impl Counters {
    pub fn snapshot(&self) -> DiskStats {
        DiskStats {
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            trims: self.trims.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            write_bytes: self.write_bytes.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            read_latency: self.read_latency.summary(),
            write_latency: self.write_latency.summary(),
            ..DiskStats::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_upper_bounds() {
        let histogram = Histogram::default();
        assert_eq!(histogram.summary(), LatencySummary::default());
        for _ in 0..99 {
            histogram.add(Duration::from_micros(10));
        }
        histogram.add(Duration::from_micros(5000));
        let summary = histogram.summary();
        assert_eq!(
            (summary.p50_us, summary.p99_us, summary.max_us),
            (16, 16, 5000)
        );
    }
}
