//! A file or block device, read and written past the page cache in whole blocks.

use super::page::PAGE_BYTES;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes that begin at a multiple of 4 KiB in memory, as direct I/O demands (open(2)).
pub(super) struct Aligned {
    raw: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` zero bytes, rounded up to whole blocks.
    pub(super) fn zeroed(len: usize) -> Self {
        let len = len.next_multiple_of(PAGE_BYTES);
        let raw = vec![0; len + PAGE_BYTES];
        let start = raw.as_ptr().align_offset(PAGE_BYTES);
        Self { raw, start, len }
    }

    /// A copy of `bytes`, filled up with zero bytes.
    pub(super) fn copy_of(bytes: &[u8]) -> Self {
        let mut aligned = Self::zeroed(bytes.len());
        aligned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        aligned
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.raw[self.start..self.start + self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.len]
    }
}

/// An open disk of the statefile.
#[derive(Debug)]
pub(super) struct Device {
    file: File,
    path: PathBuf,
    /// Device and inode, or the number of the block device: what the path led to.
    identity: (u64, u64),
    /// Whether it goes past the page cache.
    pub(super) direct: bool,
}

fn identity(meta: &fs::Metadata) -> (u64, u64) {
    if meta.file_type().is_block_device() {
        (0, meta.rdev())
    } else {
        (meta.dev(), meta.ino())
    }
}

impl Device {
    /// Open what `path` leads to; writes are durable when they return. Where the file system
    /// has no direct I/O (tmpfs) this warns and goes through the page cache: good for hosts
    /// on one machine, and for no others.
    pub(super) fn open(path: &Path, writes: bool) -> io::Result<Self> {
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(writes)
                .custom_flags(flags | libc::O_DSYNC | libc::O_CLOEXEC)
                .open(path)
        };
        let (file, direct) = match open(libc::O_DIRECT) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                let file = open(0)?;
                tracing::warn!(
                    "{}: its file system has no direct I/O; hosts on other machines would read old data from their caches, so use it for trying only",
                    path.display()
                );
                (file, false)
            }
            Err(e) => return Err(e),
        };
        let identity = identity(&file.metadata()?);
        Ok(Self {
            file,
            path: path.to_owned(),
            identity,
            direct,
        })
    }

    /// Whether the path still leads to what is open here.
    pub(super) fn is_still_there(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| identity(&meta) == self.identity)
    }

    /// Its bytes; of a block device too.
    pub(super) fn size(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Read `len` bytes, a multiple of a block.
    pub(super) fn read(&self, at: u64, len: usize) -> io::Result<Aligned> {
        #[cfg(test)]
        hook::call(&self.path, hook::Op::Read)?;
        let mut aligned = Aligned::zeroed(len);
        self.file.read_exact_at(aligned.bytes_mut(), at)?;
        Ok(aligned)
    }

    /// Write whole blocks; they are on the disk when this returns.
    pub(super) fn write(&self, at: u64, bytes: &Aligned) -> io::Result<()> {
        #[cfg(test)]
        if hook::call(&self.path, hook::Op::Write(at))? == hook::Then::Lose {
            return Ok(());
        }
        self.file.write_all_at(bytes.bytes(), at)
    }
}

/// Faults that tests put before a device's operations, by its path.
#[cfg(test)]
pub(super) mod hook {
    use std::collections::HashMap;
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex, PoisonError};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Op {
        Read,
        Write(u64),
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Then {
        Go,
        /// Say it is written, and do not write.
        Lose,
    }

    type Hook = Arc<dyn Fn(Op) -> io::Result<Then> + Send + Sync>;

    static HOOKS: Mutex<Option<HashMap<PathBuf, Hook>>> = Mutex::new(None);

    pub(crate) fn set(path: &Path, hook: impl Fn(Op) -> io::Result<Then> + Send + Sync + 'static) {
        let mut hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        hooks
            .get_or_insert_default()
            .insert(path.to_owned(), Arc::new(hook));
    }

    pub(crate) fn clear(path: &Path) {
        let mut hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
        hooks.get_or_insert_default().remove(path);
    }

    pub(super) fn call(path: &Path, op: Op) -> io::Result<Then> {
        let hook = {
            let hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
            hooks.as_ref().and_then(|hooks| hooks.get(path).cloned())
        };
        hook.map_or(Ok(Then::Go), |hook| hook(op))
    }
}
