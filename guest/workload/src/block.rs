//! Self-describing blocks: what the disk worker writes and the memory worker keeps.
//!
//! A block names its own place and version, so that a lost, misplaced, torn or stale write is
//! told apart from a good one by looking at the block alone.

use crate::checksum::{BLOCK_BYTES, checksum, fill};
use std::fmt;

/// First eight bytes of every block; the last two digits are the version of the layout.
pub const BLOCK_MAGIC: [u8; 8] = *b"PLXBLK01";

const SUM_AT: usize = BLOCK_BYTES - 8;
const FIELDS_BYTES: usize = 24;

/// What a block says about itself. Little-endian words after the magic, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its place: index of the slot from the start of its area.
    pub place: u64,
    /// Its version: grows with every write to this place within a boot.
    pub version: u64,
}

/// A block that is not what was expected there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadBlock {
    /// Only zeros: never written.
    Empty,
    /// Neither zeros nor a block.
    Magic,
    /// Torn or damaged.
    Checksum,
    /// A whole block, but another one than expected.
    Other {
        /// What the block says.
        found: Block,
        /// What was expected.
        expected: Block,
    },
}

impl fmt::Display for BadBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("never written"),
            Self::Magic => f.write_str("something else than a block"),
            Self::Checksum => f.write_str("torn or damaged (checksum)"),
            Self::Other { found, expected } => write!(
                f,
                "place {} version {} where place {} version {} was written",
                found.place, found.version, expected.place, expected.version
            ),
        }
    }
}

impl Block {
    /// Write the block: magic, place, version, filler that follows from both, checksum.
    pub fn encode(&self, bytes: &mut [u8; BLOCK_BYTES]) {
        bytes[..8].copy_from_slice(&BLOCK_MAGIC);
        bytes[8..16].copy_from_slice(&self.place.to_le_bytes());
        bytes[16..FIELDS_BYTES].copy_from_slice(&self.version.to_le_bytes());
        let seed = checksum(&bytes[..FIELDS_BYTES]);
        fill(&mut bytes[FIELDS_BYTES..SUM_AT], seed);
        let sum = checksum(&bytes[..SUM_AT]);
        bytes[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
    }

    /// Read a block, whichever it is.
    ///
    /// # Errors
    /// [`BadBlock`], never its variant `Other`.
    pub fn parse(bytes: &[u8; BLOCK_BYTES]) -> Result<Self, BadBlock> {
        if bytes[..8] != BLOCK_MAGIC {
            let empty = bytes.iter().all(|byte| *byte == 0);
            return Err(if empty {
                BadBlock::Empty
            } else {
                BadBlock::Magic
            });
        }
        let words = bytes.as_chunks::<8>().0;
        let word = |n: usize| u64::from_le_bytes(words[n]);
        if checksum(&bytes[..SUM_AT]) != word(SUM_AT / 8) {
            return Err(BadBlock::Checksum);
        }
        Ok(Self {
            place: word(1),
            version: word(2),
        })
    }

    /// Check that the bytes hold exactly this block.
    ///
    /// # Errors
    /// [`BadBlock`] says what they hold instead.
    pub fn check(&self, bytes: &[u8; BLOCK_BYTES]) -> Result<(), BadBlock> {
        let found = Self::parse(bytes)?;
        if found == *self {
            Ok(())
        } else {
            Err(BadBlock::Other {
                found,
                expected: *self,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_told_from_a_stale_misplaced_torn_or_missing_one() {
        let mut bytes = [0; BLOCK_BYTES];
        let block = Block {
            place: 3,
            version: 9,
        };
        assert_eq!(block.check(&bytes), Err(BadBlock::Empty));
        block.encode(&mut bytes);
        assert_eq!(block.check(&bytes), Ok(()));
        let expected = Block {
            place: 3,
            version: 10,
        };
        assert_eq!(
            expected.check(&bytes),
            Err(BadBlock::Other {
                found: block,
                expected
            })
        );
        bytes[2048..].fill(0);
        assert_eq!(block.check(&bytes), Err(BadBlock::Checksum));
        bytes[1] = 0;
        assert_eq!(block.check(&bytes), Err(BadBlock::Magic));
    }
}
