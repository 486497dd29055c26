//! API sketch.
use std::os::fd::OwnedFd;
/// Why a tap could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {}
/// A tap device; gone when dropped.
pub struct Tap {}
#[allow(unused_variables, missing_docs, clippy::todo, clippy::missing_errors_doc)]
impl Tap {
    /// Create tap `name` with `mtu`, bring it up, join `bridge`.
    pub fn create(name: &str, mtu: u32, bridge: Option<&str>) -> Result<Self, TapError> { todo!() }
    pub fn name(&self) -> &str { todo!() }
    pub fn into_fd(self) -> OwnedFd { todo!() }
}
