//! API sketch.
/// Default limit of a disk's overlay.
pub const OVERLAY_BYTES_MAX_DEFAULT: u64 = 256 << 20;
