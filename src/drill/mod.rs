//! Rehearsed failures with measurements.
//!
//! A drill takes a running, protected VM with clients outside, does one named failure
//! at a random moment, and judges from what the clients wrote down whether anything
//! was lost. [`client`] is the process outside, [`mod@env`] what the drill needs from the
//! product, [`report`] the pure part: logs in, verdict out.

pub mod checks;
pub mod client;
mod clients;
pub mod env;
pub mod lab_env;
pub mod links;
pub mod log;
pub mod report;
pub mod run;
pub mod scenario;
pub mod stats;
pub mod table;

pub use client::client_main;
pub use env::{DrillEnv, EnvError, Load, MonotonicNs, Service};
pub use report::DrillReport;
pub use run::{DrillError, run};

use serde::{Deserialize, Serialize};
use std::ffi::OsString;

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
    /// One private link of several is cut and comes back, perhaps another one after it.
    CutOneLink,
    /// One private link of several carries next to nothing for a while.
    SlowLink,
}

impl DrillKind {
    /// Whether the VM is to stay mirrored where it is: such a failure is none to the guest.
    #[must_use]
    pub const fn vm_stays(self) -> bool {
        matches!(self, Self::CutOneLink | Self::SlowLink)
    }
}

/// What to rehearse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillSpec {
    /// Which failure.
    pub kind: DrillKind,
    /// How many times in a row, each followed by re-protection; 1 or more.
    pub repeat: u32,
    /// Private links of the pair, 1 or more; 2 or more where one of several fails.
    pub links: u8,
    /// Also cut one link in the calm time before the failure, so that it meets a pair with
    /// a link less; needs 2 or more links.
    pub cut_before: bool,
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

/// Runs a hidden subcommand of the drill if `args` (without the program's name) names
/// one, and gives its exit status.
#[must_use]
pub fn hidden_main(args: &[OsString]) -> Option<i32> {
    (args.first()?.to_str()? == client::CLIENT_COMMAND).then(|| client_main(&args[1..]))
}
