//! A bitmap of 64 KiB blocks whose content in the file has changed. Pure.

use std::ops::Range;

/// Granularity of the dirty bitmap: 1 TiB costs 2 MiB of bits, and one block is a good unit for a
/// sequential copy.
pub const DIRTY_BLOCK_BYTES: u64 = 64 << 10;

/// See the module's text.
#[derive(Default)]
pub(super) struct DirtyBitmap {
    words: Vec<u64>,
    active: bool,
    disk_bytes: u64,
}

impl DirtyBitmap {
    pub fn begin(&mut self, disk_bytes: u64) {
        let blocks = disk_bytes.div_ceil(DIRTY_BLOCK_BYTES);
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX);
        *self = Self {
            words: vec![0; words],
            active: true,
            disk_bytes,
        };
    }

    pub fn end(&mut self) {
        *self = Self::default();
    }

    /// Note a change; nothing happens while no tracking is active.
    pub fn mark(&mut self, range: &Range<u64>) {
        if !self.active || range.is_empty() {
            return;
        }
        let first = range.start / DIRTY_BLOCK_BYTES;
        let last = (range.end - 1) / DIRTY_BLOCK_BYTES;
        for block in first..=last {
            let word = usize::try_from(block / 64).unwrap_or(usize::MAX);
            if let Some(word) = self.words.get_mut(word) {
                *word |= 1 << (block % 64);
            }
        }
    }

    /// The marked ranges, merged, ascending, inside the disk; all bits are clear afterwards.
    pub fn take(&mut self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (index, word) in self.words.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                let block = index as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let start = block * DIRTY_BLOCK_BYTES;
                let end = (start + DIRTY_BLOCK_BYTES).min(self.disk_bytes);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_merge_and_clear() {
        let mut bitmap = DirtyBitmap::default();
        bitmap.mark(&(0..10));
        assert!(bitmap.take().is_empty(), "inactive");
        let size = 100 * DIRTY_BLOCK_BYTES + 512;
        bitmap.begin(size);
        bitmap.mark(&(DIRTY_BLOCK_BYTES - 1..DIRTY_BLOCK_BYTES + 1));
        bitmap.mark(&(63 * DIRTY_BLOCK_BYTES..65 * DIRTY_BLOCK_BYTES));
        bitmap.mark(&(size - 1..size));
        assert_eq!(
            bitmap.take(),
            [
                0..2 * DIRTY_BLOCK_BYTES,
                63 * DIRTY_BLOCK_BYTES..65 * DIRTY_BLOCK_BYTES,
                100 * DIRTY_BLOCK_BYTES..size
            ]
        );
        assert!(bitmap.take().is_empty());
    }
}
