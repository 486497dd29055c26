//! The primary's states and the one table of what may follow what.

/// Where a primary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrimaryState {
    /// Runs unmirrored; packets and writes go direct.
    Solo,
    /// Solo; the attempt to mirror wins its generation.
    Reserving,
    /// Solo; the partner sets up a standby.
    Preparing,
    /// Solo; memory and disk are copied live.
    Seeding,
    /// Output is held; epoch 1 is being cut or sent.
    FirstEpoch,
    /// The standby holds epoch 1; the record is being changed to name it.
    Confirming,
    /// Every epoch is released when it is acknowledged.
    Mirrored,
    /// Switching over: the last epoch is cut with the guest stopped and sent.
    LastEpoch,
    /// Switching over: the record is being changed to name the partner as owner.
    HandingOver,
    /// The partner is lost or not wanted; the record is being changed to name none.
    Claiming,
    /// The guest shut down; the record is being changed to say so.
    Ending,
    /// Nothing runs here any more.
    StoodDown,
}

use PrimaryState::{
    Claiming, Confirming, Ending, FirstEpoch, HandingOver, LastEpoch, Mirrored, Preparing,
    Reserving, Seeding, Solo, StoodDown,
};

/// Every legal step; staying is always legal.
pub const PRIMARY_TRANSITIONS: &[(PrimaryState, &[PrimaryState])] = &[
    (Solo, &[Reserving, Ending, StoodDown]),
    (Reserving, &[Preparing, Solo, Ending, StoodDown]),
    (Preparing, &[Seeding, Solo, Ending, StoodDown]),
    (Seeding, &[FirstEpoch, Solo, Ending, StoodDown]),
    (FirstEpoch, &[Confirming, Solo, Ending, StoodDown]),
    (Confirming, &[Mirrored, Claiming, Ending, StoodDown]),
    (Mirrored, &[LastEpoch, Claiming, Ending, StoodDown]),
    (
        LastEpoch,
        &[HandingOver, Mirrored, Claiming, Ending, StoodDown],
    ),
    (HandingOver, &[Claiming, Ending, StoodDown]),
    (Claiming, &[Solo, Ending, StoodDown]),
    (Ending, &[StoodDown]),
    (StoodDown, &[]),
];

impl PrimaryState {
    /// Whether `self` may be followed by `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        self == next
            || PRIMARY_TRANSITIONS
                .iter()
                .any(|(from, to)| *from == self && to.contains(&next))
    }

    /// Whether output is held apart until its epoch commits.
    #[must_use]
    pub const fn holds_output(self) -> bool {
        matches!(
            self,
            FirstEpoch | Confirming | Mirrored | LastEpoch | HandingOver | Claiming
        )
    }
}
