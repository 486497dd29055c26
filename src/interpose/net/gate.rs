//! API sketch.
/// limit
pub const GATE_PACKETS_MAX: usize = 16384;
/// limit
pub const GATE_BYTES_MAX: usize = 64 << 20;
/// Gate.
pub struct Gate {}
/// Full.
#[derive(Debug, thiserror::Error)]
#[error("full")]
pub struct GateFull;
/// A held packet.
pub struct Held {}
/// What a push did.
pub struct Pushed {}
