//! Whether the storage under a disk answers.
//!
//! Everything that is done to an image passes here. Its storage is in **trouble** while something
//! has been under way for longer than one is patient, and after something failed, until the next
//! thing works. A guest that rests asks its storage nothing; [`Pulse::probe`] does instead, past
//! the page cache, which would answer for a storage that is gone.
//!
//! A storage that is full answers.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a probe reads, at an address of this alignment: a sector of today's disks (open(2),
/// `O_DIRECT`).
const PROBE_BYTES: usize = 4096;

/// The storage of one image.
pub struct Pulse {
    path: PathBuf,
    /// `None` where the file system has no `O_DIRECT`: then only the guest's own I/O tells.
    direct: Option<File>,
    inner: Mutex<Inner>,
}

struct Inner {
    next: u64,
    /// When each operation began.
    under_way: BTreeMap<u64, Instant>,
    ended: Instant,
    failure: Option<String>,
}

/// An operation; it has ended when this is dropped.
struct UnderWay<'a> {
    pulse: &'a Pulse,
    ticket: u64,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut inner = self.pulse.lock();
        inner.under_way.remove(&self.ticket);
        inner.ended = Instant::now();
    }
}

impl Pulse {
    pub(super) fn new(path: &Path) -> Self {
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path);
        Self {
            path: path.to_owned(),
            direct: direct.ok(),
            inner: Mutex::new(Inner {
                next: 0,
                under_way: BTreeMap::new(),
                ended: Instant::now(),
                failure: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Do something to the image.
    pub(super) fn of<T>(&self, operation: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let ticket = {
            let mut inner = self.lock();
            let ticket = inner.next;
            inner.next += 1;
            inner.under_way.insert(ticket, Instant::now());
            ticket
        };
        let under_way = UnderWay {
            pulse: self,
            ticket,
        };
        let result = operation();
        self.lock().failure = match &result {
            Err(e) if !is_full(e) => Some(e.to_string()),
            Ok(_) | Err(_) => None,
        };
        drop(under_way);
        result
    }

    /// What is wrong with the storage at `now`, for who waits for an answer for `patience`.
    #[must_use]
    pub fn trouble(&self, now: Instant, patience: Duration) -> Option<String> {
        let inner = self.lock();
        // Tickets rise, so the first has waited longest.
        let waits = inner.under_way.values().next();
        let waits = waits.map(|begun| now.saturating_duration_since(*begun));
        let image = self.path.display();
        if let Some(waits) = waits.filter(|waits| *waits >= patience) {
            let s = waits.as_secs_f64();
            return Some(format!("{image} has not answered for {s:.1} s"));
        }
        let failure = inner.failure.as_ref();
        failure.map(|failure| format!("{image}: {failure}"))
    }

    /// Ask the storage, unless something is under way or has just ended. Waits for its answer,
    /// however long that takes.
    pub fn probe(&self, now: Instant, idle: Duration) {
        let rests = {
            let inner = self.lock();
            let ended = now.saturating_duration_since(inner.ended);
            inner.under_way.is_empty() && (ended >= idle || inner.failure.is_some())
        };
        if let Some(direct) = self.direct.as_ref().filter(|_| rests) {
            // The failure is kept, which is all that a probe is for.
            let _ = self.of(|| {
                let mut bytes = vec![0; 2 * PROBE_BYTES];
                let skip = bytes.as_ptr().align_offset(PROBE_BYTES).min(PROBE_BYTES);
                match direct.read_at(&mut bytes[skip..skip + PROBE_BYTES], 0)? {
                    0 => Err(io::ErrorKind::UnexpectedEof.into()),
                    _ => Ok(()),
                }
            });
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interpose::disk::{Disk, DiskOptions, Mode, create_sparse};
    use crate::pool::Generation;
    use std::sync::mpsc::channel;

    const PATIENCE: Duration = Duration::from_secs(3);

    fn pulse(dir: &Path) -> Pulse {
        let path = dir.join("image");
        create_sparse(&path, 1 << 20).unwrap();
        Pulse::new(&path)
    }

    #[test]
    fn an_operation_that_does_not_end_is_trouble_after_the_patience_and_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let pulse = &pulse(dir.path());
        let ((begun, has_begun), (end, may_end)) = (channel(), channel());
        // What fails here drops `end`, and with it ends the operation.
        std::thread::scope(move |scope| {
            let operation = scope.spawn(move || {
                pulse.of(|| {
                    begun.send(Instant::now()).unwrap();
                    may_end.recv().map_err(io::Error::other)
                })
            });
            let at = has_begun.recv().unwrap();
            assert_eq!(pulse.trouble(at, PATIENCE), None);
            let trouble = pulse.trouble(at + PATIENCE, PATIENCE).unwrap();
            assert!(
                trouble.contains("image has not answered for 3."),
                "{trouble}"
            );
            // Whoever asks meanwhile does not wait as well.
            pulse.probe(at + PATIENCE, Duration::ZERO);
            end.send(()).unwrap();
            operation.join().unwrap().unwrap();
        });
        let later = Instant::now() + 2 * PATIENCE;
        assert_eq!(pulse.trouble(later, PATIENCE), None);
    }

    #[test]
    fn a_failure_is_trouble_until_something_works_and_a_full_storage_answers() {
        let dir = tempfile::tempdir().unwrap();
        let pulse = pulse(dir.path());
        let fails = |errno| {
            let failed = pulse.of(|| Err::<(), _>(io::Error::from_raw_os_error(errno)));
            assert!(failed.is_err());
            pulse.trouble(Instant::now(), PATIENCE)
        };
        assert_eq!(fails(libc::ENOSPC), None);
        let trouble = fails(libc::EIO).unwrap();
        assert!(trouble.contains("os error 5"), "{trouble}");
        pulse.of(|| Ok(())).unwrap();
        assert_eq!(pulse.trouble(Instant::now(), PATIENCE), None);
    }

    #[test]
    fn a_disk_whose_guest_rests_is_asked_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        create_sparse(&path, 1 << 20).unwrap();
        let options = DiskOptions::new(Mode::Direct, Generation(1));
        let disk = Disk::open(&path, 1 << 20, options).unwrap();
        let pulse = disk.pulse();
        if pulse.direct.is_none() {
            return; // A file system without O_DIRECT.
        }
        let now = Instant::now();
        let shown = || pulse.trouble(now, PATIENCE);
        let image = OpenOptions::new().write(true).open(&path).unwrap();
        image.set_len(0).unwrap();
        // Something has just ended: no need to ask.
        pulse.probe(now, PATIENCE);
        assert_eq!(shown(), None);
        pulse.probe(now + PATIENCE, PATIENCE);
        assert!(shown().is_some());
        // Once in trouble it is asked every time.
        image.set_len(1 << 20).unwrap();
        pulse.probe(now, PATIENCE);
        assert_eq!(shown(), None);
        // And the disk's own I/O counts.
        image.set_len(0).unwrap();
        assert!(disk.read_base(0..4096).is_err());
        assert!(shown().is_some());
    }
}
