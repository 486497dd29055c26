//! What the pool is: hosts, VMs, protection; validation. Pure.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod host;
pub mod member;
pub mod spec;

pub use host::{HOST_NAME_BYTES_MAX, HostName};
pub use interconnect::ids::{Epoch, Generation, VmId};
pub use member::{HostId, Incarnation, POOL_HOSTS_MAX, Seq};
