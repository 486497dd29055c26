//! The RAM file of a guest, mapped by us.
//!
//! QEMU maps the same tmpfs file as the guest's memory. The primary has a
//! [`RamView`], which cannot write; the standby applies pages to a [`RamImage`]
//! while its QEMU waits.
//!
//! # What it must never do
//!
//! Write the RAM of a running guest (see [`super`]). Die of SIGBUS because the
//! tmpfs is full: a page without storage is written with pwrite(2), which
//! reports that; only pages known to have storage are stored through the map.
//! Turn holes into pages of zeros by reading them: use
//! [`RamView::allocated_ranges`].
//!
//! The file must not shrink while it is mapped; so only pollux may own it.

use super::region::Region;
use super::{PAGE_SIZE, Page};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A run of at least this many zero pages is given back to the system. A shorter
/// one is overwritten: punching costs a system call and unmaps the pages, and
/// a guest that zeroes a single page is about to use it.
pub const PUNCH_PAGES_MIN: u64 = 16;

/// Unit of `st_blocks`, in bytes (stat(3type)).
const STAT_BLOCK: u64 = 512;

/// Why the RAM file could not be made, opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A system call failed.
    #[error("cannot {what} RAM file {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The length is not what it must be.
    #[error("RAM file {} has {found} bytes, not {wanted}; it belongs to another VM spec", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it must have.
        wanted: u64,
    },
    /// The length asked for makes no RAM.
    #[error("RAM of {len} bytes is not possible: it must be a positive multiple of 4096")]
    NotPages {
        /// The length.
        len: u64,
    },
    /// The file system is too small.
    #[error("RAM file {} needs {needed} bytes but its file system has {free} free; enlarge /dev/shm or free memory", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// No such page.
    #[error("page {index} is outside of a RAM of {pages} pages")]
    OutOfRange {
        /// The page.
        index: u64,
        /// Pages of the RAM.
        pages: u64,
    },
}

/// A read-only mapping of a RAM file: all that a primary may have.
#[derive(Debug)]
pub struct RamView {
    path: PathBuf,
    file: File,
    map: Region,
}

/// A writable mapping of a RAM file: the standby's. Reads through [`RamView`].
#[derive(Debug)]
pub struct RamImage {
    view: RamView,
    /// One bit per page: it surely has storage. Others may have some too.
    stored: Vec<u64>,
}

fn check_len(len: u64) -> Result<usize, ImageError> {
    usize::try_from(len)
        .ok()
        .filter(|bytes| *bytes > 0 && bytes.is_multiple_of(PAGE_SIZE))
        .ok_or(ImageError::NotPages { len })
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { what, path, source }
}

impl RamView {
    /// Maps the file at `path`, which must be exactly `len` bytes long (a
    /// multiple of the page size).
    pub fn open(path: &Path, len: u64) -> Result<Self, ImageError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        Self::map(path, file, len, false)
    }

    fn map(path: &Path, file: File, len: u64, writable: bool) -> Result<Self, ImageError> {
        let bytes = check_len(len)?;
        let found = file.metadata().map_err(io_error("inspect", path))?.len();
        if found != len {
            let path = path.to_owned();
            return Err(ImageError::Length {
                path,
                found,
                wanted: len,
            });
        }
        let map = Region::of_file(&file, bytes, writable).map_err(io_error("map", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            map,
        })
    }

    /// Length in bytes, never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Length in pages.
    pub fn pages(&self) -> u64 {
        self.len() / PAGE_SIZE as u64
    }

    /// The address of page `index`. Panics if it is out of range.
    pub(super) fn page_address(&self, index: u64) -> *mut u8 {
        let offset = usize::try_from(index)
            .ok()
            .and_then(|i| i.checked_mul(PAGE_SIZE));
        self.map.at(offset.unwrap_or(usize::MAX), PAGE_SIZE)
    }

    /// The content of page `index`, only while nobody writes it (guest stopped,
    /// or the standby's own image). Reading a hole of the file fills it with a
    /// page of zeros. Panics if `index` is out of range.
    pub fn page(&self, index: u64) -> &Page {
        // SAFETY: in bounds and aligned; that nobody writes meanwhile is the
        // documented condition, kept by the checkpoint (vCPUs stopped).
        unsafe { &*self.page_address(index).cast::<Page>() }
    }

    /// Copies page `index` as it is now; allowed while the guest runs, when the
    /// copy may be torn. Panics if `index` is out of range.
    pub fn copy_page(&self, index: u64, into: &mut Page) {
        let source = self.page_address(index);
        // SAFETY: in bounds, apart, a page each. The guest may write meanwhile:
        // every byte read is some byte that was there, and the page is dirty
        // again and will be copied again.
        unsafe { std::ptr::copy_nonoverlapping(source, into.as_mut_ptr(), PAGE_SIZE) };
    }

    /// The page ranges that have storage, in order; all others are zero
    /// (lseek(2), `SEEK_DATA`).
    pub fn allocated_ranges(&self) -> Result<Vec<Range<u64>>, ImageError> {
        data_ranges(&self.file, self.len()).map_err(io_error("find the data of", &self.path))
    }

    /// Bytes of memory the file really uses.
    pub fn resident_bytes(&self) -> Result<u64, ImageError> {
        let meta = self
            .file
            .metadata()
            .map_err(io_error("inspect", &self.path))?;
        Ok(meta.blocks().saturating_mul(STAT_BLOCK))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The ranges of `file` that have storage, in pages, rounded outwards. `len` is
/// its length in bytes. Moves the file's offset.
pub(crate) fn data_ranges(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let page = PAGE_SIZE as u64;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(file, at, libc::SEEK_DATA)? {
        let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(len).min(len);
        if start >= end {
            break;
        }
        let pages = start / page..end.div_ceil(page);
        match ranges.last_mut() {
            Some(last) if last.end >= pages.start => last.end = pages.end,
            _ => ranges.push(pages),
        }
        at = end;
    }
    Ok(ranges)
}

/// lseek(2); `None` if there is nothing of the kind from `offset` on.
fn seek(file: &File, offset: u64, whence: i32) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: plain numbers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

impl RamImage {
    /// Creates the RAM file: `len` bytes of hole, permissions `mode`, owned by
    /// `uid`/`gid`. Fails if the file exists or its file system has not `len`
    /// bytes free; a file begun is removed again.
    pub fn create(
        path: &Path,
        len: u64,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Result<Self, ImageError> {
        check_len(len)?;
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(mode);
        let file = options.open(path).map_err(io_error("create", path))?;
        Self::prepare(path, file, len, mode, uid, gid).inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })
    }

    fn prepare(
        path: &Path,
        file: File,
        len: u64,
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Result<Self, ImageError> {
        let free = free_bytes(&file).map_err(io_error("inspect", path))?;
        if free < len {
            let path = path.to_owned();
            return Err(ImageError::NoSpace {
                path,
                needed: len,
                free,
            });
        }
        file.set_len(len).map_err(io_error("size", path))?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        file.set_permissions(permissions)
            .map_err(io_error("set the mode of", path))?;
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid))
            .map_err(io_error("give away", path))?;
        Self::from_view(RamView::map(path, file, len, true)?)
    }

    /// Maps an existing RAM file of `len` bytes for writing.
    pub fn open(path: &Path, len: u64) -> Result<Self, ImageError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(path);
        let file = file.map_err(io_error("open", path))?;
        Self::from_view(RamView::map(path, file, len, true)?)
    }

    fn from_view(view: RamView) -> Result<Self, ImageError> {
        let words = usize::try_from(view.pages().div_ceil(64)).unwrap_or(0);
        let ranges = view.allocated_ranges()?;
        let mut image = Self {
            view,
            stored: vec![0; words],
        };
        for index in ranges.into_iter().flatten() {
            image.note(index, true);
        }
        Ok(image)
    }

    /// Notes whether page `index`, which exists, has storage.
    fn note(&mut self, index: u64, stored: bool) {
        let word = usize::try_from(index / 64).ok();
        if let Some(word) = word.and_then(|word| self.stored.get_mut(word)) {
            let bit = 1 << (index % 64);
            *word = if stored { *word | bit } else { *word & !bit };
        }
    }

    fn has_storage(&self, index: u64) -> bool {
        let word = usize::try_from(index / 64).ok();
        let word = word.and_then(|word| self.stored.get(word));
        word.is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    fn check(&self, index: u64) -> Result<(), ImageError> {
        let pages = self.pages();
        if index < pages {
            return Ok(());
        }
        Err(ImageError::OutOfRange { index, pages })
    }

    /// Writes page `index`.
    pub fn write_page(&mut self, index: u64, content: &Page) -> Result<(), ImageError> {
        self.check(index)?;
        if self.has_storage(index) {
            let target = self.page_address(index);
            // SAFETY: in bounds and apart, a page each; the borrow is exclusive,
            // and the page has storage, so the store cannot raise SIGBUS.
            unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), target, PAGE_SIZE) };
            return Ok(());
        }
        let written = self.file.write_all_at(content, index * PAGE_SIZE as u64);
        written.map_err(io_error("write a new page of", &self.path))?;
        self.note(index, true);
        Ok(())
    }

    /// Makes page `index` zero; a hole stays a hole, and a page that is zero
    /// already is only read.
    pub fn zero_page(&mut self, index: u64) -> Result<(), ImageError> {
        self.check(index)?;
        if !self.has_storage(index) {
            let offset = index * PAGE_SIZE as u64;
            let data = seek(&self.file, offset, libc::SEEK_DATA)
                .map_err(io_error("find the data of", &self.path))?;
            if data != Some(offset) {
                return Ok(());
            }
            self.note(index, true);
        }
        if !is_zero(self.page(index)) {
            self.write_page(index, &[0; PAGE_SIZE])?;
        }
        Ok(())
    }

    /// Makes a range of pages zero and gives a long one
    /// ([`PUNCH_PAGES_MIN`]) back to the system.
    pub fn zero_pages(&mut self, pages: Range<u64>) -> Result<(), ImageError> {
        let Some(last) = pages.end.checked_sub(1).filter(|_| !pages.is_empty()) else {
            return Ok(());
        };
        self.check(last)?;
        if pages.end - pages.start < PUNCH_PAGES_MIN {
            return pages
                .into_iter()
                .try_for_each(|index| self.zero_page(index));
        }
        let bytes = |pages: u64| i64::try_from(pages * PAGE_SIZE as u64).unwrap_or(i64::MAX);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (bytes(pages.start), bytes(pages.end - pages.start));
        // SAFETY: plain numbers. Our mapping stays valid: the pages read as zero.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } != 0 {
            let error = io::Error::last_os_error();
            return Err(io_error("punch a hole into", &self.path)(error));
        }
        for index in pages {
            self.note(index, false);
        }
        Ok(())
    }
}

impl Deref for RamImage {
    type Target = RamView;
    fn deref(&self) -> &RamView {
        &self.view
    }
}

/// True if all bytes are zero. A page that is not mostly shows it at once.
pub fn is_zero(page: &Page) -> bool {
    let (chunks, _) = page.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64])
}

/// Bytes an unprivileged user may still use on the file system of `file`.
fn free_bytes(file: &File) -> io::Result<u64> {
    // SAFETY: statvfs is plain integers; fstatvfs fills it.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a live structure.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tmpfs, where holes have page grain.
    fn folder() -> tempfile::TempDir {
        tempfile::Builder::new()
            .prefix("pollux-image-")
            .tempdir_in("/dev/shm")
            .expect("/dev/shm is writable")
    }

    fn image(folder: &tempfile::TempDir, pages: u64) -> RamImage {
        let path = folder.path().join("ram");
        RamImage::create(&path, pages * PAGE_SIZE as u64, 0o600, 0, 0).expect("created")
    }

    #[test]
    fn only_what_is_written_has_storage() {
        let folder = folder();
        let mut image = image(&folder, 1000);
        assert_eq!(image.allocated_ranges().expect("read"), vec![]);
        for index in [3, 4, 999] {
            image.write_page(index, &[1; PAGE_SIZE]).expect("written");
        }
        image.zero_page(7).expect("a hole is zero already");
        image.zero_pages(100..400).expect("punched");
        assert_eq!(
            image.allocated_ranges().expect("read"),
            vec![3..5, 999..1000]
        );
        assert_eq!(image.resident_bytes().expect("read"), 3 * 4096);
        image
            .write_page(3, &[2; PAGE_SIZE])
            .expect("written in place");
        let view = RamView::open(image.path(), image.len()).expect("opened");
        assert_eq!(
            (view.page(3)[0], view.page(4)[4095], view.page(999)[9]),
            (2, 1, 1)
        );
    }

    #[test]
    fn zeroing_erases_single_pages_and_frees_runs() {
        let folder = folder();
        let mut image = image(&folder, 100);
        for index in 0..100 {
            image.write_page(index, &[1; PAGE_SIZE]).expect("written");
        }
        image.zero_page(5).expect("zeroed");
        image.zero_pages(8..11).expect("zeroed");
        image.zero_pages(20..80).expect("punched");
        let full = 40 * PAGE_SIZE as u64;
        assert_eq!(image.resident_bytes().expect("read"), full);
        let zero: Vec<u64> = (0..100)
            .filter(|index| is_zero(image.page(*index)))
            .collect();
        let expected: Vec<u64> = (5..6).chain(8..11).chain(20..80).collect();
        assert_eq!(zero, expected);
        image
            .write_page(30, &[7; PAGE_SIZE])
            .expect("a punched page gets storage again");
        assert_eq!(image.page(30)[1], 7);
    }

    #[test]
    fn a_page_somebody_else_stored_is_zeroed_too() {
        let folder = folder();
        let mut image = image(&folder, 10);
        let mut other = RamImage::open(image.path(), image.len()).expect("opened");
        other.write_page(4, &[9; PAGE_SIZE]).expect("written");
        image.zero_page(4).expect("zeroed");
        assert!(is_zero(image.page(4)));
    }

    #[test]
    fn wrong_files_lengths_and_indices_are_refused() {
        let folder = folder();
        let mut image = image(&folder, 10);
        let path = image.path().to_owned();
        let refused = RamView::open(&path, 8192);
        assert!(matches!(
            refused,
            Err(ImageError::Length { found: 40960, .. })
        ));
        for len in [0, 4095] {
            assert!(matches!(
                RamView::open(&path, len),
                Err(ImageError::NotPages { .. })
            ));
        }
        assert!(matches!(
            RamImage::create(&path, 4096, 0o600, 0, 0),
            Err(ImageError::Io { .. })
        ));
        let huge = RamImage::create(&folder.path().join("huge"), 1 << 60, 0o600, 0, 0);
        assert!(matches!(huge, Err(ImageError::NoSpace { .. })), "{huge:?}");
        assert!(!folder.path().join("huge").exists());
        for index in [10, u64::MAX] {
            assert!(image.write_page(index, &[0; PAGE_SIZE]).is_err());
            assert!(image.zero_page(index).is_err());
        }
        assert!(image.zero_pages(5..11).is_err());
    }

    #[test]
    fn mode_and_owner_are_set() {
        let folder = folder();
        let path = folder.path().join("ram");
        let _image = RamImage::create(&path, 4096, 0o660, 65534, 65534).expect("created");
        let meta = std::fs::metadata(&path).expect("there");
        assert_eq!(
            (meta.mode() & 0o777, meta.uid(), meta.gid()),
            (0o660, 65534, 65534)
        );
    }
}
