//! One epoch to frames and back. No tokio, no file, no socket; the only threads are those
//! of [`EncodePool`], and the only use of a clock is to measure what encoding and decoding
//! cost.
//!
//! On the wire an epoch is, on one lane and in this order:
//!
//! ```text
//!  Ingress*      while it runs; may come between the frames of the epoch before
//!  (Pages | DiskWrites)*
//!  DeviceState   exactly one
//!  EpochEnd      digest over the headers of all of these but Ingress
//! ```
//!
//! What this must never do: hand up an epoch that is not whole, not next in
//! order, of another generation, or larger than its limits.

mod assembler;
mod meta;
mod packer;
mod pool;
mod received;
mod seed;
mod writer;

pub use assembler::{EpochAssembler, EpochError, EpochLimits};
pub use meta::{AuditSums, EpochMeta};
pub use pool::{EncodePool, THREADS_MAX};
pub use received::{DecodeStats, ReceivedEpoch};
pub use seed::SeedWriter;
pub use writer::{EpochWriter, WriteError, ingress_frames};

/// Decode an epoch's end of any content; what decodes comes back as it was.
pub(crate) fn fuzz_end(data: &[u8]) {
    if let Ok((totals, meta)) = meta::decode_end(data) {
        let again = meta::encode_end(&totals, &meta).expect("what was decoded can be encoded");
        assert_eq!(meta::decode_end(&again), Ok((totals, meta)));
    }
}
