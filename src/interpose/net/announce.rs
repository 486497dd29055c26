//! Telling the network where a guest is now. Pure.

use std::fmt;
use std::time::Duration;

/// An Ethernet address, in wire order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Smallest Ethernet frame without its checksum (IEEE 802.3).
pub const RARP_FRAME_BYTES: usize = 60;

/// When an announcement is repeated, counted from the first: one lost frame (a switch port still
/// learning, a bridge still listening) must not cost a blackout of seconds. QEMU's own
/// announcements after a migration are 50, 150, 250, 350 ms apart for the same reason.
pub const ANNOUNCE_AT: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(450),
    Duration::from_millis(1000),
];

/// The RARP broadcast that makes every switch learn `mac` on the port it comes from: a "request
/// reverse" (RFC 903) for the guest's own address, EtherType 0x8035, padded to the minimum.
#[must_use]
pub fn rarp_frame(mac: MacAddr) -> [u8; RARP_FRAME_BYTES] {
    let mut frame = [0; RARP_FRAME_BYTES];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..14].copy_from_slice(&0x8035_u16.to_be_bytes());
    // Hardware Ethernet, protocol IPv4, their address lengths, operation 3.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac.0);
    frame[32..38].copy_from_slice(&mac.0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rarp_names_the_guest_as_source_and_target() {
        let mac = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
        let frame = rarp_frame(mac);
        assert_eq!(&frame[..6], &[0xff; 6]);
        assert_eq!(&frame[6..14], &[0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35]);
        assert_eq!(&frame[22..28], &mac.0);
        assert_eq!(&frame[32..38], &mac.0);
    }
}
