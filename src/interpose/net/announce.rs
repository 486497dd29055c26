//! API sketch.
/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MacAddr(pub [u8; 6]);
/// The RARP broadcast that tells switches where a guest now is.
#[must_use]
pub fn rarp_frame(_mac: MacAddr) -> [u8; 60] { [0; 60] }
