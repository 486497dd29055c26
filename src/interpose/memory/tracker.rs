//! Which pages the guest wrote.
use super::staging::Staging;
use std::ops::Range;
use std::path::Path;

/// Why dirty tracking failed.
#[derive(Debug, thiserror::Error)]
#[error("pending")]
pub struct TrackError;

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

/// Tracks the pages that process `pid` writes in its mapping of the RAM file.
#[derive(Debug)]
pub struct Tracker;

impl Tracker {
    /// Starts tracking: from the return on, every write is seen.
    pub fn attach(pid: i32, ram_path: &Path, ram_len: u64) -> Result<Self, TrackError> {
        let _ = (pid, ram_path, ram_len);
        Err(TrackError)
    }
    /// Pages of the guest.
    pub fn pages(&self) -> u64 {
        0
    }
    /// The read-only mapping of the RAM file the tracker copies from.
    pub fn view(&self) -> &super::RamView {
        &super::RamView
    }
    /// Copies every page written since the last call into `staging` and arms
    /// them again. With the guest stopped the staging is then exact. On
    /// "staging full" everything the staging held is carried and it is empty.
    pub fn collect(&mut self, staging: &mut Staging) -> Result<CollectStats, TrackError> {
        let _ = staging;
        Err(TrackError)
    }
    /// The same while the guest runs, just before a stop: the later
    /// [`Self::collect`] then has only to copy what was written again.
    pub fn precopy(&mut self, staging: &mut Staging) -> Result<CollectStats, TrackError> {
        let _ = staging;
        Err(TrackError)
    }
    /// Arms the dirty pages again and appends their ranges, in order, without
    /// copying. Returns the number of pages.
    pub fn scan_dirty(&mut self, dirty: &mut Vec<Range<u64>>) -> Result<u64, TrackError> {
        let _ = dirty;
        Err(TrackError)
    }
    /// How many pages are dirty now; arms nothing.
    pub fn dirty_estimate(&mut self) -> Result<u64, TrackError> {
        Err(TrackError)
    }
    /// Takes back the pages of a dropped epoch: the next collection includes
    /// them. The staging is empty afterwards.
    pub fn give_back(&mut self, staging: &mut Staging) {
        let _ = staging;
    }
    /// Takes back ranges that [`Self::scan_dirty`] reported and that were not used.
    pub fn carry(&mut self, pages: &[Range<u64>]) {
        let _ = pages;
    }
    /// Ends tracking: the guest writes at full speed again. Dropping does the same.
    pub fn detach(self) -> Result<(), TrackError> {
        Ok(())
    }
}
