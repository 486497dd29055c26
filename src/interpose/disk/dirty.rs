//! API sketch.
/// Granularity of the dirty bitmap.
pub const DIRTY_BLOCK_BYTES: u64 = 65536;
