//! The raw image file under a disk: sizes checked, sparse where it can be.
//!
//! It must never grow or shrink an image, and never touch a byte outside the stated size.

use super::extents::{DiskWrite, WriteData};
use super::pulse::Pulse;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::pool::Generation;

/// Unit of a disk's size: what every disk device model presents at least.
pub const SECTOR_BYTES: u64 = 512;

/// Neighbouring small extents are gathered into one write of up to this size: one system call
/// instead of dozens, and small enough to stay in the L2 cache.
const GATHER_BYTES_MAX: usize = 256 << 10;

/// Zeros written at a time where the file system cannot make them itself.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

/// Largest piece [`super::Disk::read_base`] reads at once: the largest NBD request.
pub const READ_BASE_BYTES_MAX: u64 = 32 << 20;

/// Why a disk operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No such image.
    #[error(
        "disk image {path} does not exist: create it, or correct `path` of the disk in the VM's spec"
    )]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// The image is too small.
    #[error(
        "disk image {path} has {actual} bytes, the VM's spec states {stated}: enlarge the image \
         (`truncate -s {stated}`) or lower `size` in the spec"
    )]
    Smaller {
        /// The image.
        path: PathBuf,
        /// Bytes it has.
        actual: u64,
        /// Bytes it should have.
        stated: u64,
    },
    /// The stated size is no disk size.
    #[error("{stated} bytes is not a disk size: it must be a positive multiple of {SECTOR_BYTES}")]
    BadSize {
        /// Bytes stated.
        stated: u64,
    },
    /// The policy that is not there yet.
    #[error(
        "durability = \"disk\" needs the standby's power-safe journal, which this version does not \
         have: set durability = \"memory\" (survives the loss of either host, not of both at once)"
    )]
    DurabilityUnavailable,
    /// Opening failed.
    #[error("cannot open disk image {path}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Creating failed.
    #[error("cannot create disk image {path}: {source}")]
    Create {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not enough room for a copy.
    #[error(
        "no room for disk image {path}: it needs {needed} bytes, its file system has {free} free: \
         free some, or choose another place for this VM's disks"
    )]
    NoSpace {
        /// The image.
        path: PathBuf,
        /// Bytes the copy needs.
        needed: u64,
        /// Bytes free to us.
        free: u64,
    },
    /// An I/O on the image failed.
    #[error("{doing} of {path} at byte {offset} failed: {source}")]
    Io {
        /// What was under way.
        doing: &'static str,
        /// The image.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A range outside the disk.
    #[error("bytes {}..{} are outside the disk {path} of {size} bytes, or too many at once", range.start, range.end)]
    OutOfRange {
        /// The image.
        path: PathBuf,
        /// The range asked for.
        range: Range<u64>,
        /// Size of the disk.
        size: u64,
    },
    /// A deposed side spoke.
    #[error(
        "disk {path}: refused for {given:?}, {in_force:?} is in force: another side has taken over \
         since"
    )]
    StaleGeneration {
        /// The image.
        path: PathBuf,
        /// Generation given.
        given: Generation,
        /// Generation in force.
        in_force: Generation,
    },
    /// A step that does not fit the disk's mode.
    #[error("disk {path}: cannot {step} in mode {mode}: {remedy}")]
    WrongMode {
        /// The image.
        path: PathBuf,
        /// What was asked.
        step: String,
        /// Mode it was in.
        mode: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A step that does not fit the epochs held.
    #[error("disk {path}: {reason}")]
    Epoch {
        /// The image.
        path: PathBuf,
        /// Which epochs do not fit.
        reason: String,
    },
    /// The writer thread could not start.
    #[error("cannot start the writer thread of disk {path}: {source}")]
    Thread {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Make a sparse raw image of `size` bytes for a replicated copy.
///
/// # Errors
/// [`DiskError`] if it exists already, `size` is no disk size, or the file system has less than
/// `size` bytes free.
pub fn create_sparse(path: &Path, size: u64) -> Result<(), DiskError> {
    create_sparse_for(path, size, size)
}

/// Like [`create_sparse`], asking only for room for `data_bytes` (what the other copy has
/// allocated), at most `size`.
///
/// # Errors
/// As [`create_sparse`].
pub fn create_sparse_for(path: &Path, size: u64, data_bytes: u64) -> Result<(), DiskError> {
    check_size(size)?;
    let create = |source| DiskError::Create {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(create)?;
    let made = (|| {
        let room = nix::sys::statvfs::fstatvfs(&file).map_err(|e| create(e.into()))?;
        let free = room.blocks_available() * room.fragment_size();
        let needed = data_bytes.min(size);
        if free < needed {
            return Err(DiskError::NoSpace {
                path: path.to_owned(),
                needed,
                free,
            });
        }
        file.set_len(size).map_err(create)?;
        file.sync_all().map_err(create)
    })();
    if made.is_err() {
        // Best effort: the reason for failing is already in hand.
        let _ = std::fs::remove_file(path);
    }
    made
}

fn check_size(size: u64) -> Result<(), DiskError> {
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || i64::try_from(size).is_err() {
        return Err(DiskError::BadSize { stated: size });
    }
    Ok(())
}

/// An open image of a fixed size.
pub(super) struct Image {
    file: File,
    pub path: PathBuf,
    pub size: u64,
    /// Everything that waits for the storage passes it.
    pub pulse: Arc<Pulse>,
}

impl Image {
    pub fn open(path: &Path, size: u64) -> Result<Self, DiskError> {
        check_size(size)?;
        let path = path.to_owned();
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(DiskError::Missing { path });
            }
            Err(source) => return Err(DiskError::Open { path, source }),
        };
        // A block device has no length in its metadata; the end of the file has it for both.
        let actual = match io::Seek::seek(&mut &file, io::SeekFrom::End(0)) {
            Ok(actual) => actual,
            Err(source) => return Err(DiskError::Open { path, source }),
        };
        if actual < size {
            return Err(DiskError::Smaller {
                path,
                actual,
                stated: size,
            });
        }
        let pulse = Arc::new(Pulse::new(&path));
        Ok(Self {
            file,
            path,
            size,
            pulse,
        })
    }

    pub fn error(&self, doing: &'static str, offset: u64, source: io::Error) -> DiskError {
        DiskError::Io {
            doing,
            path: self.path.clone(),
            offset,
            source,
        }
    }

    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pulse.of(|| self.file.read_exact_at(buf, offset))
    }

    /// Read only what the page cache holds. `false`: not (all) there, `buf` is undefined; also
    /// where the file system does not know `RWF_NOWAIT` (preadv2(2)).
    pub fn read_cached(&self, buf: &mut [u8], offset: u64) -> bool {
        let Ok(offset) = libc::off_t::try_from(offset) else {
            return false;
        };
        let iov = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        // SAFETY: `iov` describes exactly `buf`, which is writable and outlives the call; the
        // descriptor is open for the life of `self`.
        let got = unsafe {
            libc::preadv2(
                self.file.as_raw_fd(),
                &raw const iov,
                1,
                offset,
                libc::RWF_NOWAIT,
            )
        };
        usize::try_from(got).is_ok_and(|got| got == buf.len())
    }

    /// Put `writes` into the file, in order; neighbours are gathered.
    pub fn write<'a>(&self, writes: impl Iterator<Item = &'a DiskWrite>) -> io::Result<()> {
        self.pulse.of(|| self.put(writes))
    }

    /// Put one write into the file.
    pub fn write_one(&self, write: &DiskWrite) -> io::Result<()> {
        self.pulse.of(|| self.put_one(write))
    }

    fn put<'a>(&self, writes: impl Iterator<Item = &'a DiskWrite>) -> io::Result<()> {
        let mut gathered: Vec<u8> = Vec::new();
        let mut gathered_at = 0;
        for write in writes {
            match &write.data {
                WriteData::Data(bytes) => {
                    let next = gathered_at + gathered.len() as u64;
                    let fits = gathered.len() + bytes.len() <= GATHER_BYTES_MAX;
                    if !gathered.is_empty() && (next != write.offset || !fits) {
                        self.file.write_all_at(&gathered, gathered_at)?;
                        gathered.clear();
                    }
                    if bytes.len() >= GATHER_BYTES_MAX {
                        self.file.write_all_at(bytes, write.offset)?;
                    } else {
                        if gathered.is_empty() {
                            gathered_at = write.offset;
                        }
                        gathered.extend_from_slice(bytes);
                    }
                }
                WriteData::Zero(_) | WriteData::Trim(_) => {
                    self.file.write_all_at(&gathered, gathered_at)?;
                    gathered.clear();
                    self.put_one(write)?;
                }
            }
        }
        self.file.write_all_at(&gathered, gathered_at)
    }

    fn put_one(&self, write: &DiskWrite) -> io::Result<()> {
        match &write.data {
            WriteData::Data(bytes) => self.file.write_all_at(bytes, write.offset),
            WriteData::Zero(len) => self.zero(libc::FALLOC_FL_ZERO_RANGE, write.offset, *len),
            WriteData::Trim(len) => self.zero(libc::FALLOC_FL_PUNCH_HOLE, write.offset, *len),
        }
    }

    /// Make `len` bytes read as zero; `how` says what becomes of their storage.
    fn zero(&self, how: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let from = libc::off_t::try_from(offset).map_err(bad)?;
        let count = libc::off_t::try_from(len).map_err(bad)?;
        let mode = how | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: plain integers on a descriptor that is open for the life of `self`.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, from, count) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // File system without the operation, or a block device with unaligned bounds.
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => {}
            _ => return Err(error),
        }
        let chunk = usize::try_from(len).map_or(ZERO_CHUNK_BYTES, |len| len.min(ZERO_CHUNK_BYTES));
        let zeros = vec![0; chunk];
        let mut at = offset;
        while at < offset + len {
            let now = usize::try_from(offset + len - at).map_or(chunk, |left| left.min(chunk));
            self.file.write_all_at(&zeros[..now], at)?;
            at += now as u64;
        }
        Ok(())
    }

    pub fn sync(&self) -> io::Result<()> {
        self.pulse.of(|| self.file.sync_data())
    }

    /// Ranges that hold data, from `SEEK_DATA` and `SEEK_HOLE` (lseek(2)), rounded out to `unit`
    /// and merged. All of it where the file system has no holes to tell of.
    pub fn allocated(&self, unit: u64) -> io::Result<Vec<Range<u64>>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < self.size {
            let data = match self.seek(at, libc::SEEK_DATA) {
                Ok(data) => data,
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => at,
                Err(e) => return Err(e),
            };
            if data >= self.size {
                break;
            }
            let hole = match self.seek(data, libc::SEEK_HOLE) {
                Ok(hole) => hole,
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.size,
                Err(e) => return Err(e),
            };
            let start = data / unit * unit;
            let end = hole.div_ceil(unit).saturating_mul(unit).min(self.size);
            match ranges.last_mut() {
                Some(last) if last.end >= start => last.end = end.max(last.end),
                _ => ranges.push(start..end),
            }
            at = end.max(hole);
        }
        Ok(ranges)
    }

    fn seek(&self, at: u64, whence: libc::c_int) -> io::Result<u64> {
        let at =
            libc::off_t::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: plain integers on a descriptor that is open for the life of `self`. The file
        // position it moves is used by nothing else (all I/O names its offset).
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), at, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    }
}
