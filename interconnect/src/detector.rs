//! skeleton
use std::time::Duration;
/// What the detector thinks of the partner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing was heard since the start: no ground for any claim.
    Unknown,
    /// Heard within half the detection time.
    Alive,
    /// Silent for more than half the detection time.
    Suspect,
    /// Silent for the whole detection time, as observed by a thread that itself ran.
    Lost,
    /// This host itself stood still this long (frozen, starved): what it believes
    /// about the partner and about its own role may be out of date.
    SelfStalled {
        /// How long.
        stalled: Duration,
    },
}
