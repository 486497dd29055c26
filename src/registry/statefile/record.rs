//! What a host has on a disk and the numbers in it: the nouns of [`super::paxos`], and what of
//! several records of one host can be concluded.

use serde::Serialize;

/// Most hosts: ballots are dealt out by this modulus, so it is part of the format.
pub const HOSTS_MAX: u16 = 64;
/// Most disks: three survive the loss of one, and each adds a write to every change.
pub const DISKS_MAX: usize = 3;
/// Ballots and instances above this are nonsense on a disk. A thousand changes a second for
/// two thousand years stay below, and no sum can overflow.
pub const NUMBER_MAX: u64 = 1 << 56;

/// A host's place on every disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct HostSlot(pub u16);

/// A version of the pool's document; 0 is the empty one that was there before all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Instance(pub u64);

/// A ballot; 0 is none. Each belongs to one host: its slot, modulo [`HOSTS_MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Ballot(pub u64);

impl Ballot {
    /// No ballot.
    pub const NONE: Self = Self(0);

    /// The lowest ballot of `host` that is above this one.
    #[must_use]
    pub fn above(self, host: HostSlot) -> Self {
        let hosts = u64::from(HOSTS_MAX);
        Self((self.0.min(NUMBER_MAX) / hosts + 1) * hosts + u64::from(host.0))
    }
}

/// One run of one host's registry, drawn at random: two that use one slot are told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Incarnation(pub u64);

/// Which value: XXH3-128 of its bytes, and their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId {
    /// XXH3-128.
    pub hash: u128,
    /// Bytes.
    pub len: u32,
}

/// What a host has on a disk: the paper's `dblock`, for one instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Record {
    /// Which run of the host wrote it.
    pub incarnation: Incarnation,
    /// The instance that the rest is about, at least 1 once anything was written.
    pub instance: Instance,
    /// The highest ballot it has begun.
    pub mbal: Ballot,
    /// The highest ballot in which it reached phase 2, or none.
    pub bal: Ballot,
    /// The value chosen in the instance before; none if that is instance 0.
    pub chosen: Option<ValueId>,
    /// The paper's `inp`: what it proposes in `bal`.
    pub proposed: Option<ValueId>,
}

impl Record {
    /// What a freshly formatted disk holds for each host.
    pub const FIRST: Self = Self {
        incarnation: Incarnation(0),
        instance: Instance(1),
        mbal: Ballot::NONE,
        bal: Ballot::NONE,
        chosen: None,
        proposed: None,
    };
}

/// The records of all hosts on one disk, by slot.
pub type Pass = Vec<Record>;

/// How many of `disks` are a majority.
#[must_use]
pub fn majority(disks: usize) -> usize {
    disks / 2 + 1
}

/// Where a value can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index of the disk.
    pub disk: usize,
    /// In whose area.
    pub host: HostSlot,
}

/// What a host knows of itself after a restart, from the disks that could be read (the
/// paper's recovery). `None` without a majority: its last ballot might be used again.
#[must_use]
pub fn recover(me: HostSlot, passes: &[Option<Pass>]) -> Option<Record> {
    let own: Vec<Record> = passes
        .iter()
        .flatten()
        .filter_map(|pass| pass.get(usize::from(me.0)).copied())
        .collect();
    if own.len() < majority(passes.len()) {
        return None;
    }
    merge(&own)
}

/// One host's records on several disks as one that stands for all of them: the newest
/// instance, its highest ballot, and the proposal with the highest ballot. They need not be of
/// one and the same record: a ballot that was begun on one disk before a crash may be above
/// the one that was accepted on the others after it.
#[must_use]
pub fn merge(records: &[Record]) -> Option<Record> {
    let newest = records.iter().map(|r| r.instance).max()?;
    let newest = || records.iter().filter(move |r| r.instance == newest);
    let mut record = newest().max_by_key(|r| (r.bal, r.mbal)).copied()?;
    record.mbal = newest().map(|r| r.mbal).max()?;
    Some(record)
}
