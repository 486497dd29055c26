//! Until the interconnect can change its keys while it stands.

use interconnect::identity::{Fingerprint, Identity};
use interconnect::link::Interconnect;
use std::sync::Arc;

/// What the interconnect will have of its own.
pub(in crate::daemon) trait Rekey {
    fn set_identity(&self, _identity: Arc<Identity>) {}
    fn set_pins(&self, _pins: Vec<Fingerprint>) {}
    fn redial(&self, _link: usize) {}
}

impl Rekey for Interconnect {}
