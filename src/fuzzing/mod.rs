//! What the fuzzers run: one function for each decoder of the pool's own formats, taking bytes of
//! any content. Each panics when the decoder breaks a promise (or panics itself).
//!
//! They live here and not with the fuzzers so that `cargo test` replays the corpus
//! (`tests/corpus`) without a fuzzing toolchain, and so that a change of a decoder's signature
//! does not leave its fuzzer behind. Those of a decoder that only its room can call are in the
//! room, in a file `fuzz.rs`. Not for use in a product.
//!
//! Behind a checksum, blind mutation finds nothing. Where there is one, the input's first byte
//! says whether it is mended first. The interconnect has its own (`interconnect::fuzzing`).

mod decisions;
mod files;
mod seeds;
mod values;

pub use seeds::{Seed, seeds};

/// Takes bytes of any content.
pub type Target = fn(&[u8]);

/// Every target by the name of its corpus; none has the name of one of the interconnect's.
pub const TARGETS: &[(&str, Target)] = &[
    ("beat_network", crate::beat::fuzz::network),
    ("beat_storage", crate::beat::fuzz::storage),
    ("etcd_answer", crate::registry::etcd::fuzz::answer),
    ("etcd_watch", crate::registry::etcd::fuzz_watch),
    ("fence_config", files::fence_config),
    ("fence_metadata", files::fence_metadata),
    ("ha_report", decisions::report),
    ("host_config", files::host_config),
    ("pool_key", crate::beat::fuzz::keys),
    ("pool_state", decisions::state),
    ("restart_plan", decisions::plan),
    ("scenario", files::scenario),
    ("statefile_block", crate::registry::statefile::fuzz::block),
    ("statefile_value", crate::registry::statefile::fuzz::value),
    ("vm_record", values::vm_record),
    ("vm_spec", values::vm_spec),
];

/// Run the target of this name.
///
/// # Panics
/// If there is none, or if the decoder broke a promise.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.0 == name);
    target.expect("a target of this name").1(data);
}
