//! Numbers by which the hosts of a pool know each other, their lives and their reports.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Most hosts of a pool; the largest that is planned and simulated for.
pub const POOL_HOSTS_MAX: usize = 64;

/// Number of a host in its pool, below [`POOL_HOSTS_MAX`]: its slot in the statefile. Given
/// once, never to another host. The lower one wins where nothing else tells two sides apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub u8);

/// One life of a host's daemon: rises with every start that remembers nothing of the life
/// before, and is on disk before it is first used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

/// Number of a report within its host's incarnation, the same over all paths.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

impl fmt::Debug for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}
