//! A page as its difference from the content the standby holds already.
//!
//! A patch is a tree of masks over the page, and the new bytes where it differs:
//!
//! ```text
//! u64          lines      bit i: line i (64 bytes) differs; never 0
//! per such line, in order
//!   u8         words      bit j: word j (8 bytes) of it differs; never 0
//!   per such word, in order
//!     u8       bytes      bit k: byte k of it differs; never 0
//!     ...      the new bytes, one for each bit
//! ```
//!
//! Lines, words and bytes that differ are found by XOR of old and new, a line at a
//! time. Masks instead of runs because every position they can name lies within the
//! page: the decoder has only the end of the patch to mistrust. The new bytes
//! and not their XOR are sent, so that a patch applied twice gives the same page, and
//! because new bytes of neighbouring pages resemble each other more than differences do.
//!
//! Every patch carries the XXH3-64 of the page that must come out. A patch against
//! another base than the sender's gives another page in at least one byte, and is
//! refused. XXH3 and not CRC-32: a CRC is linear, so that whether a wrong base shows
//! would depend on the base alone and not on the patch, its 32 bits are few for the
//! billions of patches of a VM's life, and the frame's CRC over the same bytes would not
//! be independent of it.

use super::{CodecError, PAGE_BYTES, Page};
use xxhash_rust::xxh3::xxh3_64;

/// Longest patch, in bytes: beyond half of a page, sending the page (packed or not) is
/// as good, and the standby need not read its old content.
pub const PATCH_BYTES_MAX: usize = PAGE_BYTES / 2;
/// Bytes of a line: a cache line, and 64 of them make a page.
const LINE_BYTES: usize = 64;
const LINES: usize = PAGE_BYTES / LINE_BYTES;
const _: () = assert!(LINES == u64::BITS as usize);
/// Longest encoding of one line: a word mask, and for each word a mask and its bytes.
const LINE_PATCH_BYTES_MAX: usize = 1 + 8 * (1 + 8);
const _: () = assert!(PATCH_BYTES_MAX <= u16::MAX as usize);

/// What a patched page must be.
#[must_use]
pub fn page_check(page: &Page) -> u64 {
    xxh3_64(page)
}

/// A page's difference from the content the standby holds, and what must come out.
///
/// Patches are good only in order: each page's patch holds against the content that the
/// page has after every earlier entry, of the same epoch and of all epochs before it on
/// the same lane, was applied. Applied against anything else it is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagePatch<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) check: u64,
}

impl PagePatch<'_> {
    /// Change `page`, which must be the page's last content, into the new content.
    ///
    /// # Errors
    /// [`CodecError::PatchBase`] if another page than the sender's comes out, any other
    /// [`CodecError`] if the patch is damaged. `page` is spoilt then: drop the standby,
    /// it is not what the primary takes it for.
    pub fn apply(&self, page: &mut Page) -> Result<(), CodecError> {
        patch(page, self.bytes)?;
        let found = page_check(page);
        if found == self.check {
            Ok(())
        } else {
            Err(CodecError::PatchBase {
                expected: self.check,
                found,
            })
        }
    }

    /// Bytes of the patch.
    #[must_use]
    pub const fn patch_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// What [`diff`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Diff {
    /// The pages are equal.
    Same,
    /// The patch was appended.
    Patch,
    /// It would be longer than [`PATCH_BYTES_MAX`]; nothing was appended.
    TooLong,
}

fn words(line: &[u8; LINE_BYTES]) -> [u64; 8] {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(line.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// Bit k is set where byte k of `word` is not zero.
fn byte_mask(word: u64) -> u8 {
    // Fold each byte onto its lowest bit, then gather these eight bits with one
    // multiplication (each lands at another position of the top byte, none carries).
    let mut folded = word | word >> 4;
    folded |= folded >> 2;
    folded |= folded >> 1;
    let bits = folded & 0x0101_0101_0101_0101;
    (bits.wrapping_mul(0x0102_0408_1020_4080) >> 56).to_le_bytes()[0]
}

/// Append to `out` what turns `base` into `new`, and make `base` that: only the lines that
/// differ are written, most of a page is read once and no more. After [`Diff::TooLong`]
/// `base` is neither.
pub(super) fn diff(base: &mut Page, new: &Page, out: &mut Vec<u8>) -> Diff {
    let (old_lines, new_lines) = (
        base.as_chunks_mut::<LINE_BYTES>().0,
        new.as_chunks::<LINE_BYTES>().0,
    );
    let mut lines = 0u64;
    for (i, (old, new)) in old_lines.iter().zip(new_lines).enumerate() {
        let or = words(old)
            .iter()
            .zip(words(new))
            .fold(0, |or, (old, new)| or | (old ^ new));
        lines |= u64::from(or != 0) << i;
    }
    if lines == 0 {
        return Diff::Same;
    }
    let start = out.len();
    out.extend_from_slice(&lines.to_le_bytes());
    let mut rest = lines;
    while rest != 0 {
        let i = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        let (old, new) = (words(&old_lines[i]), words(&new_lines[i]));
        old_lines[i] = new_lines[i];
        let mut piece = [0u8; LINE_PATCH_BYTES_MAX + 8];
        let mut at = 1;
        for j in 0..8 {
            let mask = byte_mask(old[j] ^ new[j]);
            if mask == 0 {
                continue;
            }
            piece[0] |= 1 << j;
            piece[at] = mask;
            at += 1;
            if mask == u8::MAX {
                piece[at..at + 8].copy_from_slice(&new[j].to_le_bytes());
                at += 8;
            } else {
                let bytes = new[j].to_le_bytes();
                let mut left = mask;
                while left != 0 {
                    piece[at] = bytes[left.trailing_zeros() as usize];
                    at += 1;
                    left &= left - 1;
                }
            }
        }
        if out.len() - start + at > PATCH_BYTES_MAX {
            out.truncate(start);
            return Diff::TooLong;
        }
        out.extend_from_slice(&piece[..at]);
    }
    Diff::Patch
}

/// Undo [`diff`]: change `page` as `bytes` say.
fn patch(page: &mut Page, bytes: &[u8]) -> Result<(), CodecError> {
    let short = || CodecError::Length {
        what: "page patch",
        have: bytes.len() as u64,
        need: bytes.len() as u64 + 1,
    };
    let empty = || CodecError::Unknown {
        what: "mask of a page patch",
        value: 0,
    };
    let (head, mut rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    let mut lines = u64::from_le_bytes(*head);
    if lines == 0 {
        return Err(empty());
    }
    let page_lines = page.as_chunks_mut::<LINE_BYTES>().0;
    while lines != 0 {
        let line = &mut page_lines[lines.trailing_zeros() as usize];
        lines &= lines - 1;
        let (&mask, after) = rest.split_first().ok_or_else(short)?;
        rest = after;
        let mut words = mask;
        if words == 0 {
            return Err(empty());
        }
        let line_words = line.as_chunks_mut::<8>().0;
        while words != 0 {
            let word = &mut line_words[words.trailing_zeros() as usize];
            words &= words - 1;
            let (&mask, after) = rest.split_first().ok_or_else(short)?;
            let (new, after) = after
                .split_at_checked(mask.count_ones() as usize)
                .ok_or_else(short)?;
            rest = after;
            if mask == 0 {
                return Err(empty());
            }
            if let Ok(whole) = <[u8; 8]>::try_from(new) {
                *word = whole;
                continue;
            }
            let mut left = mask;
            for byte in new {
                word[left.trailing_zeros() as usize] = *byte;
                left &= left - 1;
            }
        }
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(CodecError::Length {
            what: "page patch",
            have: bytes.len() as u64,
            need: (bytes.len() - rest.len()) as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;
    use proptest::prelude::*;

    fn page_of(bytes: &[u8]) -> Page {
        bytes.try_into().unwrap()
    }

    fn patched(base: &Page, new: &Page) -> (Diff, Vec<u8>) {
        let (mut out, mut base) = (Vec::new(), *base);
        let found = diff(&mut base, new, &mut out);
        assert!(found == Diff::TooLong || base == *new);
        (found, out)
    }

    #[test]
    fn a_mask_names_the_bytes_that_are_not_zero() {
        for mask in 0..=u8::MAX {
            for value in [1u8, 0x80, 0x10, 0xff] {
                let mut bytes = [0; 8];
                for (k, byte) in bytes.iter_mut().enumerate() {
                    if mask >> k & 1 == 1 {
                        *byte = value;
                    }
                }
                assert_eq!(byte_mask(u64::from_le_bytes(bytes)), mask);
            }
        }
    }

    #[test]
    fn a_counter_costs_a_few_bytes_and_nothing_costs_nothing() {
        let base = page_of(&noise(5, PAGE_BYTES));
        let mut new = base;
        assert_eq!(patched(&base, &new), (Diff::Same, vec![]));
        new[1000] ^= 1;
        let (found, bytes) = patched(&base, &new);
        assert_eq!((found, bytes.len()), (Diff::Patch, 8 + 1 + 1 + 1));
    }

    #[test]
    fn a_page_that_changed_all_over_is_given_up() {
        let (base, new) = (
            page_of(&noise(1, PAGE_BYTES)),
            page_of(&noise(2, PAGE_BYTES)),
        );
        assert_eq!(patched(&base, &new), (Diff::TooLong, vec![]));
    }

    #[test]
    fn a_wrong_base_is_refused() {
        let base = page_of(&noise(1, PAGE_BYTES));
        let mut new = base;
        new[7..20].fill(9);
        let (_, bytes) = patched(&base, &new);
        let patch = PagePatch {
            bytes: &bytes,
            check: page_check(&new),
        };
        let mut right = base;
        patch.apply(&mut right).unwrap();
        assert!(right == new);
        // Applied twice: the same page.
        patch.apply(&mut right).unwrap();
        for at in [0, 63, 64, 4095] {
            let mut wrong = base;
            wrong[at] ^= 1;
            let refused = matches!(patch.apply(&mut wrong), Err(CodecError::PatchBase { .. }));
            assert!(refused, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn patches_round_trip(
            seed in any::<u64>(),
            changes in prop::collection::vec((0usize..PAGE_BYTES, 1usize..200, any::<u8>()), 0..30),
        ) {
            let base = page_of(&noise(seed, PAGE_BYTES));
            let mut new = base;
            for (at, length, value) in changes {
                let end = (at + length).min(PAGE_BYTES);
                new[at..end].fill(value);
            }
            let (found, bytes) = patched(&base, &new);
            match found {
                Diff::Same => prop_assert!(base == new),
                Diff::TooLong => prop_assert!(bytes.is_empty()),
                Diff::Patch => {
                    prop_assert!(bytes.len() <= PATCH_BYTES_MAX);
                    let mut page = base;
                    PagePatch { bytes: &bytes, check: page_check(&new) }.apply(&mut page).unwrap();
                    prop_assert!(page == new);
                    for cut in 0..bytes.len() {
                        prop_assert!(patch(&mut page, &bytes[..cut]).is_err());
                    }
                }
            }
        }

        #[test]
        fn any_bytes_are_refused_or_applied_without_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..600), ones in any::<bool>(),
        ) {
            let mut page = [0; PAGE_BYTES];
            let mut bytes = bytes;
            if ones {
                bytes.iter_mut().for_each(|byte| *byte |= 0x0f);
            }
            let _ = patch(&mut page, &bytes);
        }
    }
}
