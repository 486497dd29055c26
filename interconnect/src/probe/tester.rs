//! The side that asks and measures.

use super::wire::Talk;
use crate::link::{Interconnect, SendError};
use std::sync::Arc;
use std::time::Duration;

/// How much of the links a test may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Share {
    /// Short bursts with pauses three times as long: mirrored VMs' epochs wait for at most
    /// one burst.
    Bursts,
    /// All there is.
    Full,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long in all; at most [`super::TEST_TIME_MAX`].
    pub time: Duration,
    /// Only these links (from 0); all if empty.
    pub links: Vec<usize>,
    /// How much of them.
    pub share: Share,
}

/// What a test does at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Questions and answers on the control lane.
    RoundTrips,
    /// As much as goes through.
    Goodput,
    /// Epochs of a few pages, one after the other.
    SmallEpochs,
    /// Epochs of a thousand pages, one after the other.
    LargeEpochs,
}

/// Samples of one path; times in microseconds.
#[derive(Clone, Debug, Default)]
pub struct PathSample {
    /// Round trips on the control lane.
    pub rtt_us: Vec<u64>,
    /// Payload bytes acknowledged a second.
    pub goodput_bytes_per_s: u64,
    /// Small epochs.
    pub small_epoch_us: Vec<u64>,
    /// Large epochs.
    pub large_epoch_us: Vec<u64>,
}

/// What a test measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// How long it took.
    pub took: Duration,
    /// All tested links together.
    pub together: PathSample,
}

/// Why a test has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestError {
    /// The interconnect does not carry.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The partner does not serve it.
    #[error("the partner refuses the test: {0}")]
    Refused(String),
    /// Told to end.
    #[error("the test was told to end")]
    Cancelled,
}

/// A test of one interconnect.
#[derive(Debug)]
pub struct Tester {}

impl Tester {
    /// A test that can be told to end and be given the partner's answers from other threads.
    #[must_use]
    pub fn new(_settings: Settings) -> Arc<Self> {
        Arc::new(Self {})
    }

    /// The partner answered.
    pub fn answered(&self, _talk: Talk) {}

    /// End soon.
    pub fn cancel(&self) {}

    /// Measure; on a thread of its own. `progress` is told the step and how much of the
    /// whole is done, thousandths.
    ///
    /// # Errors
    /// [`TestError`].
    pub fn run(
        &self,
        _interconnect: &Interconnect,
        _progress: impl FnMut(Step, u64),
    ) -> Result<Measured, TestError> {
        Err(TestError::Cancelled)
    }
}
