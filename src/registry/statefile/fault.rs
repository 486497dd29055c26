//! What can be wrong with a disk of the statefile, told apart, and what to do about it.

use super::page::BadPage;
use super::paxos::HostSlot;
use std::io;
use uuid::Uuid;

/// Why a disk does not count.
#[derive(Debug, thiserror::Error)]
pub enum DiskFault {
    /// It cannot be opened, read or written.
    #[error("cannot {what}: {why}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The system's answer.
        why: io::Error,
    },
    /// Shorter than its header says, or than the layout needs.
    #[error("it has {have} bytes where {need} are needed")]
    WrongSize {
        /// Bytes there.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// Nothing was ever put there, or it was wiped.
    #[error("it is not formatted (its first block is empty)")]
    Unformatted,
    /// Its header is something else, or damaged.
    #[error("its header is damaged: {0}")]
    Header(BadPage),
    /// It belongs to another pool.
    #[error("it belongs to pool {found}, not to {expected}")]
    Foreign {
        /// The pool it says.
        found: Uuid,
        /// The pool meant.
        expected: Uuid,
    },
    /// It is another disk of the set.
    #[error("it is disk {found} of the set and stands in the place of disk {expected}")]
    Swapped {
        /// The index it says.
        found: u16,
        /// The index meant.
        expected: u16,
    },
    /// Divided in another way than the others.
    #[error("it is divided otherwise than the other disks of the set")]
    Geometry,
    /// A disk of the set was replaced since.
    #[error("it is of generation {found} of the disk set, here it is {expected}")]
    SetChanged {
        /// The set generation it says.
        found: u64,
        /// The one meant.
        expected: u64,
    },
    /// A registry block is damaged.
    #[error("the registry block of host slot {} is damaged: {why}", host.0)]
    Block {
        /// Whose.
        host: HostSlot,
        /// What is wrong with it.
        why: BadPage,
    },
    /// A registry block is whole and belongs elsewhere.
    #[error(
        "the registry block of host slot {} is that of another slot, disk or pool", host.0
    )]
    Misplaced {
        /// In whose place it is.
        host: HostSlot,
    },
    /// It has lost writes that it had acknowledged.
    #[error(
        "it went back in time: host slot {} shows write {shows}, but it had acknowledged {acked}",
        host.0
    )]
    Stale {
        /// Whose block shows it.
        host: HostSlot,
        /// The write counter it shows.
        shows: u64,
        /// The write counter it had acknowledged.
        acked: u64,
    },
    /// This host's own block was written by another run of it.
    #[error(
        "the block of host slot {} is not this run's: another process uses the slot, or the disk went back in time",
        host.0
    )]
    OtherRun {
        /// This host.
        host: HostSlot,
    },
    /// The value is not there any more, or damaged.
    #[error("the value is not there any more")]
    Gone,
}

impl DiskFault {
    /// One word for scripts.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::WrongSize { .. } => "wrong-size",
            Self::Unformatted => "unformatted",
            Self::Header(_) | Self::Block { .. } => "corrupt",
            Self::Foreign { .. } => "foreign",
            Self::Swapped { .. } | Self::Misplaced { .. } => "swapped",
            Self::Geometry => "geometry",
            Self::SetChanged { .. } => "old-set",
            Self::Stale { .. } => "stale",
            Self::OtherRun { .. } => "slot",
            Self::Gone => "gone",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } => {
                "look after the disk and its paths; if it does not come back, `pollux statefile replace` it"
            }
            Self::WrongSize { .. } => {
                "it was cut or is another device; give the right one, or `pollux statefile replace` it"
            }
            Self::Unformatted => {
                "if the path is right, `pollux statefile replace` it; a new pool begins with `pollux statefile format`"
            }
            Self::Header(_) | Self::Block { .. } => {
                "`pollux statefile replace` it, with itself if the device is sound; a pool of one disk needs its backup"
            }
            Self::Foreign { .. } => "give the disks of this pool; nothing was written to this one",
            Self::Swapped { .. } | Self::Misplaced { .. } => {
                "give the disks in the order of their indexes, the same on every host"
            }
            Self::Geometry => {
                "it was formatted apart from the others; `pollux statefile replace` it"
            }
            Self::SetChanged { .. } => {
                "if it is the disk that was replaced, give the new one; if a replacement was cut short, run it again"
            }
            Self::Stale { .. } => {
                "it was restored from a snapshot or loses writes; `pollux statefile replace` it, and find out why"
            }
            Self::OtherRun { .. } => {
                "stop the other process, or `pollux statefile replace` the disk; then start this one again"
            }
            Self::Gone => "run `pollux statefile check`",
        }
    }
}
