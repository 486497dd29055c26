//! One 64-bit checksum for all self-describing blocks and pages, and their filler.
//!
//! Not for adversaries: it finds lost, torn, misplaced and stale blocks. Word-wise, because
//! the guest computes it thousands of times a second on an emulated CPU.

/// Bytes of every record, block and page of this crate: one page, one disk block.
pub const BLOCK_BYTES: usize = 4096;

/// Odd constant of the mixing step: 2^64 divided by the golden ratio (Fibonacci hashing,
/// Knuth, The Art of Computer Programming volume 3, section 6.4).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Checksum of `bytes`, which are read as little-endian 64-bit words; a shorter tail counts
/// as if padded with zeros, and the length itself is part of the sum.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = GOLDEN ^ bytes.len() as u64;
    let (words, tail) = bytes.as_chunks::<8>();
    for word in words {
        sum = step(sum, u64::from_le_bytes(*word));
    }
    let mut last = [0u8; 8];
    last[..tail.len()].copy_from_slice(tail);
    step(sum, u64::from_le_bytes(last))
}

fn step(sum: u64, word: u64) -> u64 {
    let mixed = (sum ^ word).wrapping_mul(GOLDEN);
    mixed ^ (mixed >> 29)
}

/// Fill `bytes` with noise that follows from `seed` alone and does not compress.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut noise = Noise::new(seed);
    let (words, tail) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = noise.next_word().to_le_bytes();
    }
    let last = noise.next_word().to_le_bytes();
    let n = tail.len();
    tail.copy_from_slice(&last[..n]);
}

/// A small sequence of pseudo-random words: a Weyl sequence with [`checksum`]'s mixing step.
pub struct Noise(u64);

impl Noise {
    /// The sequence that follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next word.
    pub fn next_word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        let mixed = step(self.0, self.0 >> 32);
        mixed ^ (mixed >> 32)
    }

    /// A number below `limit`; 0 if `limit` is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_word().checked_rem(limit).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_BYTES, Noise, checksum, fill};

    #[test]
    fn every_flipped_bit_and_swapped_word_is_seen() {
        let mut block = [0u8; BLOCK_BYTES];
        fill(&mut block, 7);
        let sum = checksum(&block);
        for bit in (0..BLOCK_BYTES * 8).step_by(61) {
            block[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(checksum(&block), sum, "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
        block.swap(0, 8);
        assert_ne!(checksum(&block), sum);
        assert_ne!(checksum(&[0; 8]), checksum(&[0; 9]), "the length counts");
    }

    #[test]
    fn noise_follows_from_its_seed_and_spreads() {
        let words = |seed| {
            let mut noise = Noise::new(seed);
            (0..64).map(|_| noise.below(16)).collect::<Vec<_>>()
        };
        assert_eq!(words(1), words(1));
        assert_ne!(words(1), words(2));
        assert!((0..16).all(|n| words(1).contains(&n) || words(2).contains(&n)));
        assert_eq!(Noise::new(1).below(0), 0);
    }
}
