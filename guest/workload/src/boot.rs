//! The boot block: how often the guest has booted from this disk.

use crate::checksum::{BLOCK_BYTES, checksum};

/// First eight bytes of the boot block; the last two digits are the version of the layout.
pub const BOOT_MAGIC: [u8; 8] = *b"PLXBOOT1";

/// Write the boot block: magic, number of boots, checksum of both; zeros follow.
pub fn encode(boots: u64, block: &mut [u8; BLOCK_BYTES]) {
    block.fill(0);
    block[..8].copy_from_slice(&BOOT_MAGIC);
    block[8..16].copy_from_slice(&boots.to_le_bytes());
    let sum = checksum(&block[..16]);
    block[16..24].copy_from_slice(&sum.to_le_bytes());
}

/// Number of boots by the boot block; `None` on a new or damaged disk.
#[must_use]
pub fn parse(block: &[u8; BLOCK_BYTES]) -> Option<u64> {
    let words = block.as_chunks::<8>().0;
    let sum = u64::from_le_bytes(words[2]);
    let whole = words[0] == BOOT_MAGIC && checksum(&block[..16]) == sum;
    whole.then(|| u64::from_le_bytes(words[1]))
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_BYTES, encode, parse};

    #[test]
    fn boots_come_back_and_damage_is_none() {
        let mut block = [0; BLOCK_BYTES];
        assert_eq!(parse(&block), None);
        encode(41, &mut block);
        assert_eq!(parse(&block), Some(41));
        block[9] = 1;
        assert_eq!(parse(&block), None);
    }
}
