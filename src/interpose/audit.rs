//! Digests over all of a VM's memory or disk, kept incrementally.
//!
//! The digest is the sum modulo 2^64 of one 64-bit hash per 4 KiB page: XXH3
//! with the page's index as seed; a page of zeros counts 0, so holes cost
//! nothing. A sum can be kept up to date page by page and computed in any
//! order, by any number of threads.
//!
//! # What it proves
//!
//! If two images differ by accident (a lost, stale, torn or misplaced page),
//! their digests are equal with a probability of about 2^-64, under the usual
//! assumption that XXH3's output looks uniform and independent for different
//! seeds and contents. Swapped pages are found, since the index is in the seed.
//!
//! # What it does not
//!
//! XXH3 is no cryptographic hash and the sum is linear: a guest that wants to
//! can make different memories of equal digest. It fools only the audit of
//! itself. Equal digests do not say that either image is right, and an
//! [`AuditTable`] says what its updates said, not what is in the memory:
//! compare it with [`sum_of_image`] to learn that.

use super::memory::image::{data_ranges, is_zero};
use super::memory::{ImageError, PAGE_SIZE, Page, RamView};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pages a thread takes at a time: 4 MiB, long against taking, short against
/// the whole.
const PIECE_PAGES: u64 = 1024;

/// Threads for a file, at most: disks answer a few readers faster than one.
const FILE_THREADS_MAX: usize = 4;

/// Why a digest could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The memory image could not be read.
    #[error("audit: {0}")]
    Image(#[from] ImageError),
    /// The file could not be read.
    #[error("audit: cannot read {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// What page `index` with this content adds to the digest.
pub fn page_hash(index: u64, content: &Page) -> u64 {
    if is_zero(content) {
        return 0;
    }
    xxh3_64_with_seed(content, index)
}

/// The hash of every page and their sum, kept up to date page by page. Eight
/// bytes for each page: 2 MiB per GiB.
#[derive(Debug, Clone)]
pub struct AuditTable {
    hashes: Vec<u64>,
    sum: u64,
}

impl AuditTable {
    /// A table for `pages` pages, all zero.
    pub fn new(pages: u64) -> Self {
        Self {
            hashes: vec![0; usize::try_from(pages).unwrap_or(usize::MAX)],
            sum: 0,
        }
    }

    /// Pages in the table.
    pub fn pages(&self) -> u64 {
        self.hashes.len() as u64
    }

    /// Notes the new content of page `index`. Panics if it is out of range.
    pub fn update(&mut self, index: u64, content: &Page) {
        self.replace(index, page_hash(index, content));
    }

    /// Notes that page `index` is zero now. Panics if it is out of range.
    pub fn update_zero(&mut self, index: u64) {
        self.replace(index, 0);
    }

    fn replace(&mut self, index: u64, new: u64) {
        let slot = &mut self.hashes[usize::try_from(index).unwrap_or(usize::MAX)];
        let old = std::mem::replace(slot, new);
        self.sum = self.sum.wrapping_sub(old).wrapping_add(new);
    }

    /// The digest of the whole.
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

/// The digest of a whole memory image, holes skipped, by `threads` threads.
/// The guest must stand still.
pub fn sum_of_image(image: &RamView, threads: usize) -> Result<u64, AuditError> {
    let pieces = cut(image.allocated_ranges()?);
    sum_of_pieces(&pieces, threads, &|piece| {
        let hash = |index| page_hash(index, image.page(index));
        Ok(piece.map(hash).fold(0, u64::wrapping_add))
    })
}

/// The digest of a raw disk file by 4 KiB blocks, holes skipped; a last partial
/// block counts as filled up with zeros. Nobody may write it meanwhile.
pub fn sum_of_file(path: &Path) -> Result<u64, AuditError> {
    let failed = |source| AuditError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let len = file_len(&file).map_err(failed)?;
    let pieces = cut(data_ranges(&file, len).map_err(failed)?);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    sum_of_pieces(&pieces, cpus.min(FILE_THREADS_MAX), &|piece| {
        sum_of_blocks(&file, len, &piece).map_err(failed)
    })
}

/// Length in bytes of a file or a block device, whose metadata says 0.
fn file_len(mut file: &File) -> io::Result<u64> {
    io::Seek::seek(&mut file, io::SeekFrom::End(0))
}

fn sum_of_blocks(file: &File, len: u64, piece: &Range<u64>) -> io::Result<u64> {
    let page = PAGE_SIZE as u64;
    let bytes = piece.start * page..len.min(piece.end * page);
    // At most PIECE_PAGES; what lies behind the end stays zero.
    let pages = usize::try_from(piece.end - piece.start).unwrap_or(0);
    let mut buffer = vec![0; pages * PAGE_SIZE];
    let read = usize::try_from(bytes.end.saturating_sub(bytes.start)).unwrap_or(0);
    file.read_exact_at(&mut buffer[..read], bytes.start)?;
    let (blocks, _) = buffer.as_chunks::<PAGE_SIZE>();
    let hashes = piece
        .clone()
        .zip(blocks)
        .map(|(index, block)| page_hash(index, block));
    Ok(hashes.fold(0, u64::wrapping_add))
}

/// Cuts ranges into pieces of at most [`PIECE_PAGES`].
fn cut(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let step = usize::try_from(PIECE_PAGES).unwrap_or(usize::MAX);
    let cut_one = |range: Range<u64>| {
        let end = range.end;
        range
            .step_by(step)
            .map(move |start| start..end.min(start + PIECE_PAGES))
    };
    ranges.into_iter().flat_map(cut_one).collect()
}

/// Adds up `sum_of` over all pieces, on `threads` threads.
fn sum_of_pieces(
    pieces: &[Range<u64>],
    threads: usize,
    sum_of: &(dyn Fn(Range<u64>) -> Result<u64, AuditError> + Sync),
) -> Result<u64, AuditError> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<u64, AuditError> {
        let mut sum = 0u64;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            sum = sum.wrapping_add(sum_of(piece.clone())?);
        }
        Ok(sum)
    };
    let helpers = threads.clamp(1, pieces.len().max(1)) - 1;
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(work)).collect();
        let own = work();
        let joined = helpers.into_iter().map(|helper| {
            helper
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        std::iter::once(own)
            .chain(joined)
            .try_fold(0u64, |sum, part| Ok(sum.wrapping_add(part?)))
    })
}

#[cfg(test)]
mod tests {
    use super::super::memory::RamImage;
    use super::*;
    use std::io::Write;

    fn content(seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        for (at, byte) in page.iter_mut().enumerate() {
            let mixed = seed
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left((at % 64).try_into().expect("small"));
            *byte = mixed.to_le_bytes()[0] ^ at.to_le_bytes()[0];
        }
        page
    }

    #[test]
    fn table_image_and_file_agree_at_every_step() {
        let folder = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
        let pages = 5000;
        let path = folder.path().join("ram");
        let mut image = RamImage::create(&path, pages * 4096, 0o600, 0, 0).expect("made");
        let mut table = AuditTable::new(pages);
        for round in 1..6u64 {
            for index in (0..pages).filter(|index| index % (7 * round) == 0) {
                image
                    .write_page(index, &content(index ^ round))
                    .expect("written");
                table.update(index, &content(index ^ round));
            }
            image
                .zero_pages(round * 100..round * 100 + 50)
                .expect("punched");
            (round * 100..round * 100 + 50).for_each(|index| table.update_zero(index));
            image
                .write_page(round, &[0; PAGE_SIZE])
                .expect("zeros with storage");
            table.update(round, &[0; PAGE_SIZE]);
            for threads in [0, 1, 3] {
                assert_eq!(sum_of_image(&image, threads).expect("read"), table.sum());
            }
            assert_eq!(sum_of_file(&path).expect("read"), table.sum());
        }
        assert_ne!(table.sum(), 0);
    }

    #[test]
    fn one_bit_one_swap_one_shift_change_the_digest() {
        let mut table = AuditTable::new(3);
        table.update(0, &content(1));
        table.update(1, &content(2));
        let before = table.sum();
        let mut flipped = content(1);
        flipped[4095] ^= 1;
        table.update(0, &flipped);
        assert_ne!(table.sum(), before);
        table.update(0, &content(2));
        table.update(1, &content(1));
        assert_ne!(table.sum(), before);
        table.update(0, &content(1));
        table.update_zero(1);
        table.update(2, &content(2));
        assert_ne!(table.sum(), before);
        table.update_zero(2);
        table.update(1, &content(2));
        assert_eq!(table.sum(), before);
        assert_eq!(table.pages(), 3);
    }

    #[test]
    fn a_partial_last_block_counts_as_filled_up() {
        let mut file = tempfile::NamedTempFile::new().expect("made");
        file.write_all(&content(1)).expect("written");
        file.write_all(b"tail").expect("written");
        let mut last = [0; PAGE_SIZE];
        last[..4].copy_from_slice(b"tail");
        let expected = page_hash(0, &content(1)).wrapping_add(page_hash(1, &last));
        assert_eq!(sum_of_file(file.path()).expect("read"), expected);
        let missing = sum_of_file(Path::new("/nonexistent/disk")).expect_err("not there");
        assert!(missing.to_string().contains("/nonexistent/disk"));
    }
}
