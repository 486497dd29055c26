//! Which pages the guest wrote since we last asked, and copies of them.
//!
//! QEMU's mapping of the RAM file is write-protected page by page; the kernel
//! lifts the protection of a page by itself when it is written (userfaultfd,
//! `WP_ASYNC`), and ioctl `PAGEMAP_SCAN` returns the lifted ones and puts the
//! protection back in one step. Sources: Documentation/admin-guide/mm of the
//! kernel, userfaultfd.rst ("Write Protect Notifications") and pagemap.rst
//! ("Pagemap Scan IOCTL"). Needs Linux 6.7.
//!
//! # Why a copy is exact
//!
//! A page is armed *before* it is copied. A write before the arming is in the
//! copy; a write after it marks the page again. With the guest stopped between
//! scan and resume, the staging therefore holds exactly what changed. While the
//! guest runs a copy may be torn, and then the page is dirty again.
//!
//! # What it must never do
//!
//! Forget a page: see the invariant in [`super`]. Report "nothing written"
//! because the process or its mapping is gone: each scan checks afterwards that
//! the mapping was still there.
//!
//! # What it does not see
//!
//! Writes through another process's mapping, and storage punched out of the
//! file (fallocate, MADV_REMOVE: what virtio-balloon, free page reporting and
//! virtio-mem do to pages the guest gave up). Such a page reads as zero on the
//! primary while the copy keeps its last content, until it is written again,
//! which is seen. The guest has promised not to rely on it, but the two sides
//! are not equal byte for byte: do not give a mirrored VM such a device.

use super::carried::Carried;
use super::crew::Crew;
use super::image::{ImageError, RamView};
use super::inject::{InjectError, userfaultfd_in};
use super::staging::Staging;
use super::uapi::{self, PageRegion};
use super::{PAGE_SIZE, maps};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The scan is divided into pieces of this size: a fraction of 0.1 ms each, so
/// that threads finish together, and system calls do not count.
const PIECE_BYTES: u64 = 64 << 20;

/// One more scan thread for so much RAM. A scan costs 0.45 to 0.9 ms per GiB,
/// waking a thread up to 0.1 ms on a busy host: at 2 GiB a second thread saves
/// about half a millisecond of pause, below that it does not pay.
const BYTES_PER_SCAN_THREAD: u64 = 2 << 30;

/// Scan threads at most: beyond, memory bandwidth and the page-table locks set
/// the pace, and the threads take the cores of other guests.
const SCAN_THREADS_MAX: usize = 8;

/// Regions asked for in one call: 12 KiB, well inside the first-level cache. It
/// is also the size of the kernel's own buffer (one page table, 512 pages).
const REGIONS_PER_CALL: usize = 512;

/// Dirty pages from which [`Tracker::precopy`] pays (measured: about 2 ms of
/// copying taken out of the pause, against the cost of a second scan).
pub const PRECOPY_WORTH_PAGES: u64 = 3000;

/// Why dirty tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The RAM file cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No userfaultfd could be had.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Something of the process could not be read.
    #[error("cannot {what} of process {pid}: {source}")]
    Look {
        /// What was tried.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The cause.
        source: io::Error,
    },
    /// The process does not map all of the RAM file.
    #[error("process {pid} does not map page {page} of {} shared; it must be started with memory-backend-file,share=on and this file", path.display())]
    NotMapped {
        /// The process.
        pid: i32,
        /// The RAM file.
        path: PathBuf,
        /// The first page that is missing.
        page: u64,
    },
    /// The kernel is too old.
    #[error(
        "this kernel cannot track memory ({what}: {source}); Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP is needed"
    )]
    Kernel {
        /// What it refused.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Another userfaultfd is registered.
    #[error(
        "the memory of process {pid} is tracked already, by another daemon or by QEMU itself (postcopy, background snapshot)"
    )]
    Taken {
        /// The process.
        pid: i32,
    },
    /// The staging got full; nothing is lost.
    #[error(
        "an epoch of {pages} dirty pages does not fit into a staging of {limit_pages}; all are carried to the next collection: seed again, slow the guest or raise the limit"
    )]
    Full {
        /// Pages dirty now.
        pages: u64,
        /// What the staging holds at most.
        limit_pages: u64,
    },
    /// The staging is made for another guest.
    #[error("a staging for {staging} pages cannot take those of a guest of {guest}")]
    OtherGuest {
        /// Pages of the staging's guest.
        staging: u64,
        /// Pages of this guest.
        guest: u64,
    },
    /// The process or its mapping of the RAM is gone.
    #[error("process {pid} has ended or unmapped its RAM")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// The kernel failed in the middle of a scan.
    #[error(
        "scan of the memory of process {pid} failed: {source}; what was written since the last checkpoint is unknown: attach and seed again"
    )]
    Broken {
        /// The process.
        pid: i32,
        /// The cause.
        source: io::Error,
    },
}

/// What a collection found and cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CollectStats {
    /// Time in the kernel's scan, microseconds, summed over the scan threads.
    pub scan_us: u64,
    /// Time copying pages, microseconds, summed over the scan threads.
    pub copy_us: u64,
    /// Time from call to return, microseconds.
    pub wall_us: u64,
    /// Pages copied into the staging by this call.
    pub pages: u64,
    /// Runs of neighbouring pages the kernel reported.
    pub ranges: u64,
}

/// A part of the guest's RAM as it lies in QEMU's address space.
#[derive(Debug, Clone)]
struct Piece {
    addresses: Range<u64>,
    first_page: u64,
}

impl Piece {
    fn pages(&self) -> Range<u64> {
        let count = (self.addresses.end - self.addresses.start) / PAGE_SIZE as u64;
        self.first_page..self.first_page + count
    }

    /// The pages at `region`, which lies inside this piece.
    fn pages_at(&self, region: &PageRegion) -> Range<u64> {
        let page = |address: u64| {
            let inside = address.clamp(self.addresses.start, self.addresses.end);
            self.first_page + (inside - self.addresses.start) / PAGE_SIZE as u64
        };
        page(region.start)..page(region.end)
    }
}

/// Tracks the pages that a process writes in its mapping of the RAM file.
#[derive(Debug)]
pub struct Tracker {
    pid: i32,
    uffd: OwnedFd,
    pagemap: File,
    view: RamView,
    /// Each whole mapping, then the same cut into pieces for scanning.
    mappings: Vec<Piece>,
    pieces: Vec<Piece>,
    carried: Carried,
    crew: Crew,
    /// A scan failed half-way: the kernel may have forgotten pages.
    broken: bool,
}

/// Scan threads, the calling one included, for `ram_len` bytes on `cpus` cores.
fn scan_threads(ram_len: u64, cpus: usize) -> usize {
    let wanted = usize::try_from(ram_len / BYTES_PER_SCAN_THREAD).unwrap_or(SCAN_THREADS_MAX);
    wanted.clamp(1, SCAN_THREADS_MAX).min(cpus.max(1))
}

/// The mappings of the file of `view` in process `pid`, by place in the file.
fn ram_mappings(pid: i32, view: &RamView) -> Result<Vec<Piece>, TrackError> {
    let look = |what| move |source| TrackError::Look { what, pid, source };
    let meta = std::fs::metadata(view.path()).map_err(look("inspect the RAM file"))?;
    let device = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let map = maps::read(pid).map_err(look("read the memory map"))?;
    let mut found: Vec<Piece> = map
        .into_iter()
        .filter(|m| m.inode == meta.ino() && m.device == device && m.shared)
        .filter(|m| m.offset < view.len())
        .map(|m| {
            let len = (m.addresses.end - m.addresses.start).min(view.len() - m.offset);
            Piece {
                addresses: m.addresses.start..m.addresses.start + len,
                first_page: m.offset / PAGE_SIZE as u64,
            }
        })
        .collect();
    found.sort_by_key(|piece| piece.first_page);
    let covered = found.iter().fold(0, |end: u64, piece| {
        let pages = piece.pages();
        if pages.start <= end {
            end.max(pages.end)
        } else {
            end
        }
    });
    if covered < view.pages() {
        return Err(TrackError::NotMapped {
            pid,
            path: view.path().to_owned(),
            page: covered,
        });
    }
    Ok(found)
}

/// Cuts mappings into pieces of [`PIECE_BYTES`].
fn cut(mappings: &[Piece]) -> Vec<Piece> {
    let step = usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX);
    let mut pieces = Vec::new();
    for mapping in mappings {
        for start in mapping.addresses.clone().step_by(step) {
            pieces.push(Piece {
                addresses: start..mapping.addresses.end.min(start + PIECE_BYTES),
                first_page: mapping.first_page
                    + (start - mapping.addresses.start) / PAGE_SIZE as u64,
            });
        }
    }
    pieces
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Tracker {
    /// Starts tracking what process `pid` writes to its RAM, the file at
    /// `ram_path` of `ram_len` bytes. From the return on every write is seen;
    /// what was written before is for [`super::seed()`] to copy.
    pub fn attach(pid: i32, ram_path: &Path, ram_len: u64) -> Result<Self, TrackError> {
        let view = RamView::open(ram_path, ram_len)?;
        let mappings = ram_mappings(pid, &view)?;
        let look = |what| move |source| TrackError::Look { what, pid, source };
        let pagemap =
            File::open(format!("/proc/{pid}/pagemap")).map_err(look("open the page map"))?;
        let kernel = |what| move |source| TrackError::Kernel { what, source };
        if let Some(first) = mappings.first() {
            // Before QEMU is touched: does the kernel know the request at all?
            let at = first.addresses.start;
            let probed = uapi::pagemap_scan(&pagemap, at..at, false, &mut []);
            probed.map_err(kernel("PAGEMAP_SCAN"))?;
        }
        let uffd = userfaultfd_in(pid)?;
        uapi::enable_async_wp(&uffd).map_err(kernel("userfaultfd WP_ASYNC"))?;
        for mapping in &mappings {
            uapi::register_wp(&uffd, &mapping.addresses).map_err(|source| {
                match source.raw_os_error() {
                    Some(libc::EBUSY) => TrackError::Taken { pid },
                    Some(libc::EINVAL) => kernel("UFFDIO_REGISTER")(source),
                    _ => look("register the RAM")(source),
                }
            })?;
        }
        let pieces = cut(&mappings);
        for piece in &pieces {
            uapi::write_protect(&uffd, &piece.addresses).map_err(look("arm the RAM"))?;
        }
        // Threads may divide the RAM only if no page is in two mappings.
        let apart = mappings
            .windows(2)
            .all(|two| two[0].pages().end <= two[1].pages().start);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if apart {
            scan_threads(ram_len, cpus)
        } else {
            1
        };
        Ok(Self {
            pid,
            uffd,
            pagemap,
            carried: Carried::new(usize::try_from(view.pages()).unwrap_or(0)),
            view,
            mappings,
            pieces,
            crew: Crew::new(threads - 1),
            broken: false,
        })
    }

    /// Pages of the guest.
    pub fn pages(&self) -> u64 {
        self.view.pages()
    }

    /// The read-only mapping of the RAM file the tracker copies from.
    pub fn view(&self) -> &RamView {
        &self.view
    }

    /// Copies every page written since the last call into `staging`, carried
    /// pages included, and arms them again. If the guest is stopped, `staging`
    /// then holds all that changed since it was last cleared.
    ///
    /// On [`TrackError::Full`] every page, also those the staging held before,
    /// is carried, and the staging is empty.
    pub fn collect(&mut self, staging: &mut Staging) -> Result<CollectStats, TrackError> {
        let begun = Instant::now();
        self.check_usable()?;
        if staging.ram_pages() != self.pages() {
            return Err(TrackError::OtherGuest {
                staging: staging.ram_pages(),
                guest: self.pages(),
            });
        }
        let tally = Tally::default();
        let putter = staging.putter();
        let (view, pagemap, carried, pieces) =
            (&self.view, &self.pagemap, &self.carried, &self.pieces);
        self.crew.run(pieces.len(), &|number| {
            let piece = &pieces[number];
            let mut copied = 0;
            let mut refused = Vec::new();
            let mut copy = |page: u64| {
                let index = usize::try_from(page).unwrap_or(usize::MAX);
                // SAFETY: the source is a page of our mapping; pieces do not
                // share pages or only one thread runs, so no page is put by two;
                // the staging is borrowed exclusively and read afterwards only.
                if unsafe { putter.put(index, view.page_address(page)) } {
                    copied += 1;
                } else {
                    refused.push(index);
                }
            };
            let (mut scan, mut copying, mut ranges) = (Duration::ZERO, Duration::ZERO, 0);
            let mut mark = Instant::now();
            let scanned = scan_piece(pagemap, piece, true, &mut |found| {
                let at = Instant::now();
                scan += at - mark;
                ranges += found.len() as u64;
                for region in found {
                    piece.pages_at(region).for_each(&mut copy);
                }
                mark = Instant::now();
                copying += mark - at;
            });
            scan += mark.elapsed();
            let pages = piece.pages();
            let pages =
                usize::try_from(pages.start).unwrap_or(0)..usize::try_from(pages.end).unwrap_or(0);
            let at = Instant::now();
            carried.take(pages, |index| copy(index as u64));
            copying += at.elapsed();
            for index in &refused {
                carried.add(*index);
            }
            tally.note(scanned, scan, copying, copied, ranges, !refused.is_empty());
        });
        staging.settle();
        self.carried.settle();
        self.finish(
            tally
                .failed
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
        )?;
        if tally.full.into_inner() {
            let limit_pages = staging.limit_pages();
            self.give_back(staging);
            return Err(TrackError::Full {
                pages: self.carried.len(),
                limit_pages,
            });
        }
        Ok(CollectStats {
            scan_us: tally.scan_ns.into_inner() / 1000,
            copy_us: tally.copy_ns.into_inner() / 1000,
            wall_us: micros(begun.elapsed()),
            pages: tally.pages.into_inner(),
            ranges: tally.ranges.into_inner(),
        })
    }

    /// [`Self::collect`] while the guest runs, just before a stop: the
    /// collection in the pause then copies only what was written again. Pays
    /// above [`PRECOPY_WORTH_PAGES`].
    pub fn precopy(&mut self, staging: &mut Staging) -> Result<CollectStats, TrackError> {
        self.collect(staging)
    }

    /// Arms the dirty pages again and appends their ranges, carried ones
    /// included, in order, without copying. Returns the number of pages. Ranges
    /// that are not used after all must go back by [`Self::carry`].
    pub fn scan_dirty(&mut self, dirty: &mut Vec<Range<u64>>) -> Result<u64, TrackError> {
        self.check_usable()?;
        let mut new: Vec<Range<u64>> = Vec::new();
        let mut outcome = Ok(());
        for piece in &self.pieces {
            outcome = scan_piece(&self.pagemap, piece, true, &mut |found| {
                new.extend(found.iter().map(|region| piece.pages_at(region)));
            });
            if outcome.is_err() {
                break;
            }
        }
        self.finish(outcome.err())?;
        let all = 0..usize::try_from(self.pages()).unwrap_or(0);
        self.carried
            .take(all, |index| new.push(index as u64..index as u64 + 1));
        self.carried.settle();
        let new = joined(new);
        let pages = new.iter().map(|range| range.end - range.start).sum();
        dirty.extend(new);
        Ok(pages)
    }

    /// How many pages are dirty now, carried ones included (those in both
    /// states count twice); arms nothing. Costs a scan without a copy.
    pub fn dirty_estimate(&mut self) -> Result<u64, TrackError> {
        self.check_usable()?;
        let (pages, failed) = (AtomicU64::new(self.carried.len()), Mutex::new(None));
        let (pagemap, pieces) = (&self.pagemap, &self.pieces);
        self.crew.run(pieces.len(), &|number| {
            let piece = &pieces[number];
            let outcome = scan_piece(pagemap, piece, false, &mut |found| {
                let count = |region| piece.pages_at(region).count() as u64;
                pages.fetch_add(found.iter().map(count).sum(), Ordering::Relaxed);
            });
            if let Err(error) = outcome {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
        if let Some(source) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let (what, pid) = ("count the dirty pages", self.pid);
            return Err(TrackError::Look { what, pid, source });
        }
        self.check_mapped()?;
        Ok(pages.into_inner())
    }

    /// Takes back the pages of a dropped epoch: the next collection includes
    /// them. The staging is empty afterwards.
    pub fn give_back(&mut self, staging: &mut Staging) {
        for (index, _content) in staging.iter() {
            self.carried
                .add(usize::try_from(index).unwrap_or(usize::MAX));
        }
        staging.clear();
    }

    /// Takes back ranges that [`Self::scan_dirty`] reported and that were not used.
    pub fn carry(&mut self, pages: &[Range<u64>]) {
        for index in pages.iter().cloned().flatten() {
            self.carried
                .add(usize::try_from(index).unwrap_or(usize::MAX));
        }
    }

    /// Ends tracking: the guest writes at full speed again. Dropping does the
    /// same, without a report.
    pub fn detach(self) -> Result<(), TrackError> {
        for mapping in &self.mappings {
            uapi::unregister(&self.uffd, &mapping.addresses).map_err(|source| {
                let (what, pid) = ("release the RAM", self.pid);
                TrackError::Look { what, pid, source }
            })?;
        }
        Ok(())
    }

    fn check_usable(&self) -> Result<(), TrackError> {
        if !self.broken {
            return Ok(());
        }
        let source = io::Error::other("an earlier scan failed");
        Err(TrackError::Broken {
            pid: self.pid,
            source,
        })
    }

    /// After a scan that arms: was it whole?
    fn finish(&mut self, failed: Option<io::Error>) -> Result<(), TrackError> {
        let pid = self.pid;
        let outcome = match failed {
            // The kernel's word for an address space that has been torn down.
            Some(source) if source.raw_os_error() == Some(libc::ESRCH) => {
                Err(TrackError::Gone { pid })
            }
            Some(source) => Err(TrackError::Broken { pid, source }),
            None => self.check_mapped(),
        };
        self.broken = outcome.is_err();
        outcome
    }

    /// The scan of an address space that is being torn down finds nothing, and
    /// says so without an error. Mappings never come back, so a mapping that is
    /// there after a scan was there during it.
    fn check_mapped(&self) -> Result<(), TrackError> {
        for mapping in &self.mappings {
            let tracked = uapi::is_tracked(&self.pagemap, mapping.addresses.start);
            if !tracked.unwrap_or(false) {
                return Err(TrackError::Gone { pid: self.pid });
            }
        }
        Ok(())
    }
}

/// Scans one piece and hands the regions on as they come.
fn scan_piece(
    pagemap: &File,
    piece: &Piece,
    rearm: bool,
    found: &mut dyn FnMut(&[PageRegion]),
) -> io::Result<()> {
    let mut regions = [PageRegion::default(); REGIONS_PER_CALL];
    let mut at = piece.addresses.start;
    while at < piece.addresses.end {
        let addresses = at..piece.addresses.end;
        let (filled, walked) = uapi::pagemap_scan(pagemap, addresses, rearm, &mut regions)?;
        found(regions.get(..filled).unwrap_or_default());
        if walked <= at {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        at = walked;
    }
    Ok(())
}

/// Sorts ranges and joins those that touch or overlap.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touches = next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
    ranges
}

/// What the scan threads found, added up.
#[derive(Debug, Default)]
struct Tally {
    scan_ns: AtomicU64,
    copy_ns: AtomicU64,
    pages: AtomicU64,
    ranges: AtomicU64,
    full: AtomicBool,
    failed: Mutex<Option<io::Error>>,
}

impl Tally {
    fn note(
        &self,
        outcome: io::Result<()>,
        scan: Duration,
        copying: Duration,
        pages: u64,
        ranges: u64,
        full: bool,
    ) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.scan_ns.fetch_add(nanos(scan), Ordering::Relaxed);
        self.copy_ns.fetch_add(nanos(copying), Ordering::Relaxed);
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.ranges.fetch_add(ranges, Ordering::Relaxed);
        self.full.fetch_or(full, Ordering::Relaxed);
        if let Err(error) = outcome {
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_follow_the_ram_and_the_cores() {
        let gib = 1 << 30;
        assert_eq!(scan_threads(gib / 2, 64), 1);
        assert_eq!(scan_threads(3 * gib, 64), 1);
        assert_eq!(scan_threads(4 * gib, 64), 2);
        assert_eq!(scan_threads(4 * gib, 1), 1);
        assert_eq!(scan_threads(512 * gib, 64), SCAN_THREADS_MAX);
        assert_eq!(scan_threads(512 * gib, 0), 1);
    }

    #[test]
    fn pieces_cover_a_mapping_without_gap() {
        let mapping = Piece {
            addresses: 0x1000..0x1000 + 3 * PIECE_BYTES + 4096,
            first_page: 10,
        };
        let pieces = cut(std::slice::from_ref(&mapping));
        assert_eq!(pieces.len(), 4);
        assert_eq!(pieces[0].pages().start, 10);
        for two in pieces.windows(2) {
            assert_eq!(two[0].addresses.end, two[1].addresses.start);
            assert_eq!(two[0].pages().end, two[1].pages().start);
        }
        assert_eq!(pieces[3].pages().end, mapping.pages().end);
    }

    #[test]
    fn ranges_are_joined_in_order() {
        let ranges = vec![5..6, 0..2, 2..3, 8..12, 9..10];
        assert_eq!(joined(ranges), vec![0..3, 5..6, 8..12]);
    }
}
