//! Paths between two hosts, made of network namespaces, and what is sent over them.
//!
//! Every scene makes its own namespaces, runs its sender and its receiver as processes of
//! their own inside them, and removes both when it ends, whatever happened. Nothing leaves
//! the namespaces.

pub mod cpu;
pub mod epochs;
pub mod lanes;
pub mod net;
pub mod peer;
pub mod relay;
pub mod tcp;

/// Bytes of one piece handed over at a time, to a lane (as a frame) and to TCP alike.
pub const PIECE_BYTES: usize = 1 << 20;
