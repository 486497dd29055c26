//! Bugs put back on purpose, in tests only, to prove that the checks find them.
//!
//! Outside tests [`sabotaged`] is a constant `false`.

/// One known way to get mirroring wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// The primary releases an epoch when it is cut, not when it is acknowledged.
    ReleaseBeforeAck,
    /// The standby acknowledges the next epoch without having it whole.
    AckBeforeWhole,
    /// The standby is promoted without a claim.
    PromoteWithoutClaim,
    /// The primary goes solo without a claim.
    SoloWithoutClaim,
    /// Acknowledgements of an older generation count.
    GenerationNotCompared,
    /// An acknowledgement that is older than the lease counts.
    StaleAckAccepted,
    /// The standby is promoted before its epochs are applied.
    PromoteBeforeApply,
    /// Unprotect dismisses the standby before the record is changed.
    DismissBeforeCommit,
    /// An unknown outcome is taken for a win.
    UnknownIsWon,
    /// The guest runs on however far the links are behind.
    NeverHeldBack,
    /// The first epoch is released before the record names the standby.
    ReleaseBeforeConfirm,
    /// The standby is promoted within the lease of its last acknowledgement.
    LeaseNotWaited,
    /// The model's shell lets an epoch out without looking at the clock once more.
    #[cfg(test)]
    ClockNotLookedAt,
    /// The primary notices no freeze of its own.
    FreezeNotNoticed,
    /// The primary takes an unknown outcome of naming the standby for a loss.
    UnknownIsLost,
    /// The standby does not see that a claim with an unknown outcome was its own win.
    OwnWinNotSeen,
    /// The standby claims although the record does not name it.
    ClaimUnnamed,
    /// The standby still acknowledges epochs once it has begun to claim.
    AckWhileClaiming,
    /// After a claim with an unknown outcome the primary never asks again.
    NeverAsksAgain,
}

#[cfg(not(test))]
pub(crate) const fn sabotaged(_bug: Bug) -> bool {
    false
}

#[cfg(test)]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
pub(crate) fn sabotaged(bug: Bug) -> bool {
    ACTIVE.get() == Some(bug)
}

/// Run `body` on this thread with one bug put back.
#[cfg(test)]
pub(crate) fn with_bug<T>(bug: Bug, body: impl FnOnce() -> T) -> T {
    ACTIVE.set(Some(bug));
    let result = body();
    ACTIVE.set(None);
    result
}
