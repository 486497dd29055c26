//! Rehearsed failures with measurements.
//!
//! A drill takes a running, protected VM with clients outside, does one named failure
//! at a random moment, and judges from what the clients wrote down whether anything
//! was lost. [`client`] is the process outside, [`env`] what the drill needs from the
//! product, [`report`] the pure part: logs in, verdict out.

pub mod checks;
pub mod client;
pub mod env;
pub mod log;
pub mod stats;

pub use client::client_main;
pub use env::{DrillEnv, EnvError, Load, MonotonicNs, Service};

use serde::{Deserialize, Serialize};

/// The failure that is rehearsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrillKind {
    /// The primary's host loses power.
    KillHost,
    /// The primary's QEMU process is killed; its daemon lives.
    KillQemu,
    /// Every private link of the pair is cut; both hosts live.
    CutLink,
    /// The primary's host stands still, and later goes on.
    FreezeHost,
    /// A planned role swap.
    Switchover,
}

/// What to rehearse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillSpec {
    /// Which failure.
    pub kind: DrillKind,
    /// How many times in a row, each followed by re-protection; 1 or more.
    pub repeat: u32,
    /// The load meanwhile.
    pub load: Load,
    /// The service the clients use.
    pub service: Service,
    /// Decides the random moments.
    pub seed: u64,
    /// Compare memory and disk with the checkpoint after each promotion.
    pub audit: bool,
    /// Print JSON, no table.
    pub json: bool,
}
