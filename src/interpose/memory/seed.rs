//! Live seeding: the first full copy, made while the guest runs.
use super::{Page, TrackError, Tracker};

/// When seeding stops.
#[derive(Debug, Clone, Copy)]
pub struct SeedLimits {
    /// Rounds of scan-and-copy after the first pass, at most.
    pub rounds_max: u32,
    /// A round that finds at most this many dirty pages is the last.
    pub small_pages: u64,
}

/// How far seeding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedProgress {
    /// 0 = first pass over all allocated memory, then the rounds.
    pub round: u32,
    /// Bytes of this round handed to the sink.
    pub bytes_done: u64,
    /// Bytes of this round in all.
    pub bytes_total: u64,
}

/// What seeding did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedOutcome {
    /// Rounds after the first pass.
    pub rounds: u32,
    /// Pages handed to the sink, repeats counted.
    pub pages_sent: u64,
    /// Dirty pages the last round found: what the first checkpoint may expect.
    pub last_dirty_pages: u64,
    /// True if the last round was small enough, false if the rounds ran out.
    pub converged: bool,
}

/// Why seeding failed; `E` is the sink's error.
#[derive(Debug, thiserror::Error)]
pub enum SeedError<E> {
    /// Tracking failed.
    #[error("seeding: {0}")]
    Track(#[from] TrackError),
    /// The RAM file could not be read.
    #[error("seeding: {0}")]
    Image(#[from] super::ImageError),
    /// The sink refused a page.
    #[error("seeding: cannot hand page {index} on: {source}")]
    Sink {
        /// The page.
        index: u64,
        /// The sink's error.
        source: E,
    },
}

/// Hands every page the standby needs to `sink` while the guest runs. The sink
/// may block (back-pressure). Afterwards one checkpoint makes the standby whole.
pub fn seed<E>(
    tracker: &mut Tracker,
    limits: SeedLimits,
    sink: &mut dyn FnMut(u64, &Page) -> Result<(), E>,
    progress: &mut dyn FnMut(SeedProgress),
) -> Result<SeedOutcome, SeedError<E>> {
    let _ = (limits, sink, progress);
    tracker.scan_dirty(&mut Vec::new())?;
    Err(SeedError::Track(TrackError))
}
