//! The standby's states and the one table of what may follow what.

/// Where a standby is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StandbyState {
    /// Its QEMU is being started.
    Preparing,
    /// Memory and disk arrive; no whole epoch yet.
    Seeding,
    /// Holds a whole epoch; not known to be named in the record.
    Unconfirmed,
    /// Named in the record: may claim if the primary is lost.
    Mirrored,
    /// The primary is lost to the detector; it gets the claim delay to claim first.
    Suspecting,
    /// The primary is lost before the confirmation came: does the record name this host?
    Checking,
    /// Claims; acknowledges nothing any more.
    Claiming,
    /// Owner by the record; applies what is left, waits out the lease, starts the guest.
    Promoting,
    /// The guest runs here; a primary takes over from this machine.
    Promoted,
    /// Nothing is kept here any more.
    StoodDown,
}

use StandbyState::{
    Checking, Claiming, Mirrored, Preparing, Promoted, Promoting, Seeding, StoodDown, Suspecting,
    Unconfirmed,
};

/// Every legal step; staying is always legal.
pub const STANDBY_TRANSITIONS: &[(StandbyState, &[StandbyState])] = &[
    (Preparing, &[Seeding, StoodDown]),
    (Seeding, &[Unconfirmed, StoodDown]),
    (Unconfirmed, &[Mirrored, Checking, Claiming, StoodDown]),
    (Mirrored, &[Suspecting, Claiming, StoodDown]),
    (Suspecting, &[Mirrored, Claiming, StoodDown]),
    (
        Checking,
        &[
            Unconfirmed,
            Mirrored,
            Suspecting,
            Claiming,
            Promoting,
            StoodDown,
        ],
    ),
    (Claiming, &[Promoting, StoodDown]),
    (Promoting, &[Promoted, StoodDown]),
    (Promoted, &[]),
    (StoodDown, &[]),
];

impl StandbyState {
    /// Whether `self` may be followed by `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        self == next
            || STANDBY_TRANSITIONS
                .iter()
                .any(|(from, to)| *from == self && to.contains(&next))
    }

    /// Whether epochs are still taken and acknowledged.
    #[must_use]
    pub const fn acknowledges(self) -> bool {
        matches!(
            self,
            Seeding | Unconfirmed | Mirrored | Suspecting | Checking
        )
    }
}
