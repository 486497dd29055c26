//! Percentiles and the seeded random numbers of a drill. Pure.

use super::env::Quantiles;
use std::time::Duration;

/// p50, p90, p99 and the largest by nearest rank: the smallest measured value that at
/// least that share of all values does not exceed. Never a value that was not measured.
#[must_use]
pub fn quantiles(mut values_us: Vec<u64>) -> Quantiles {
    values_us.sort_unstable();
    let at = |percent: usize| {
        let rank = (values_us.len() * percent).div_ceil(100).max(1);
        values_us.get(rank - 1).copied().unwrap_or(0)
    };
    Quantiles {
        count: values_us.len() as u64,
        p50_us: at(50),
        p90_us: at(90),
        p99_us: at(99),
        max_us: values_us.last().copied().unwrap_or(0),
    }
}

/// Microseconds of a duration.
#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// `SplitMix64` (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A duration from `low` up to, not including, `high`.
    pub fn duration(&mut self, low: Duration, high: Duration) -> Duration {
        let span = micros(high.saturating_sub(low)).max(1);
        low + Duration::from_micros(self.next_u64() % span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_values() {
        let q = quantiles((1..=100).rev().collect());
        assert_eq!(
            (q.count, q.p50_us, q.p90_us, q.p99_us, q.max_us),
            (100, 50, 90, 99, 100)
        );
        let q = quantiles(vec![7]);
        assert_eq!((q.p50_us, q.p99_us, q.max_us), (7, 7, 7));
        assert_eq!(quantiles(Vec::new()), Quantiles::default());
    }

    #[test]
    fn a_seed_decides_everything() {
        let draw = |seed| {
            (0..5)
                .map(|_| Rng::new(seed).next_u64())
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        // First value of seed 0 in the reference implementation.
        assert_eq!(Rng::new(0).next_u64(), 0xe220_a839_7b1d_cdaf);
        let (low, high) = (Duration::from_millis(5), Duration::from_millis(6));
        let mut rng = Rng::new(9);
        assert!((0..1000).all(|_| (low..high).contains(&rng.duration(low, high))));
    }
}
