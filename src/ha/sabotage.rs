//! Bugs put back on purpose, in tests only, to prove that the simulator finds them.
//!
//! Outside tests [`sabotaged`] is a constant `false`.

/// One known way to get membership wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// An agent's success counts although nobody confirmed that the power is off.
    FenceUnconfirmed,
    /// The watchdog bound counts the watchdog alone: the lease is forgotten.
    BoundWithoutLease,
    /// The watchdog is armed a period after the host became a member.
    WatchdogArmedLate,
    /// A host's silence is taken for its death: its VMs may restart once it is given up.
    SilenceIsDeath,
    /// A host that does not coordinate gives others up.
    AnybodyDecides,
    /// Farewell is said when the VMs are told to stop, not when they have.
    FarewellTooSoon,
    /// A host gives others up although it promised not to.
    PromiseBroken,
    /// One that promised goes on although no majority hears it any more.
    PromiseWithoutEnd,
    /// One that joined gives others up before a voter has admitted it.
    JoinerDecides,
    /// The word of one that said farewell counts, also where it is known to be over.
    WordAfterFarewell,
    /// A member that hears nobody else takes all others for lost at once, though it stood still.
    StallUnnoticed,
    /// Of two the one goes on though the other's power was confirmed off after its promise.
    OutlivesTooLate,
    /// The next life of one that promised as one of two does not tell that it did.
    PromiseForgotten,
    /// A lease earned by a promise is not cut when others may give the host up again.
    LongLease,
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
