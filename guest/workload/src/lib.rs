//! What the test guest leaves on its disk and in its memory, readable from both sides.
//!
//! The guest's program (the binary of this crate) writes records and blocks that describe
//! themselves; a drill reads the same formats from a disk image on the host. So this library
//! is plain `std`, touches no device and never trusts a byte it parses.
//!
//! ```text
//! disk image          0        4 KiB      1 MiB             1 MiB + records       end
//!                     | boot   | unused   | counter records | disk worker's blocks |
//!                     | block  |          | one slot each   | one slot each        |
//! ```
//!
//! [`layout::Layout::for_disk`] gives the exact places for a disk of a given size.

pub mod block;
pub mod boot;
pub mod checksum;
pub mod layout;
pub mod record;
