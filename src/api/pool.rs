//! The pool as one host knows it. Ages are by the clock of the answering host, counted when it
//! answers.

use crate::pool::HostName;
use serde::{Deserialize, Serialize};

/// Everything one host knows of its pool.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolStatus {
    /// The answering host.
    pub host: HostName,
    /// Its number in the pool.
    pub id: u8,
    /// Its life, from its heartbeats' keys on.
    pub incarnation: u64,
    /// Where it is in that life: `joining`, `member`, `stopping`, `stopped`, `failed`.
    pub phase: String,
    /// Why it stops, stopped or failed.
    pub why: Option<String>,
    /// Whether it may give others up: a member that a voter has seen join, that is bound by no promise,
    /// and that has listened for long enough to call one silent.
    pub judges: bool,
    /// How long it may go on without a further word, milliseconds.
    pub lease_ms: Option<u64>,
    /// Its watchdog.
    pub watchdog: WatchdogView,
    /// The gateway.
    pub gateway: Option<GatewayView>,
    /// The pool's keys as its daemon uses them.
    #[serde(default)]
    pub keys: KeysView,
    /// Age of its newest read of the registry, from its begin, milliseconds.
    pub registry_age_ms: Option<u64>,
    /// Why the registry gave no answer, if so.
    pub registry_error: Option<String>,
    /// Version of the pool state that it has seen.
    pub state_version: Option<u64>,
    /// Number of the coordinator's term.
    pub term: u64,
    /// Who decides.
    pub coordinator: Option<HostName>,
    /// All hosts of the pool, this one among them.
    pub hosts: Vec<PoolHostView>,
    /// The newest decisions, oldest first.
    pub decisions: Vec<DecisionView>,
    /// What became of the VMs of hosts that died.
    pub restarts: Vec<RestartView>,
    /// What somebody should look at, oldest first.
    pub alerts: Vec<AlertView>,
    /// Age of all this, milliseconds.
    pub age_ms: u64,
}

/// The watchdog of a host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WatchdogView {
    /// Device or socket; none is configured if it is missing.
    pub place: Option<String>,
    /// After so long without a pet it resets the host, milliseconds.
    pub timeout_ms: Option<u64>,
    /// `petting`, `expired`, `failing`; `disarmed` while nothing may run.
    pub state: String,
}

/// Numbers of the pool's keys that a daemon uses; the files may be a moment ahead.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysView {
    /// It seals its heartbeats with this one; 0 before its first life.
    pub sends: u32,
    /// It accepts these, lowest first.
    pub accepts: Vec<u32>,
}

/// The gateway as a host sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GatewayView {
    /// Its address.
    pub address: String,
    /// Age of its newest answer, milliseconds; none if it never answered.
    pub age_ms: Option<u64>,
    /// Why it could not be asked.
    pub failure: Option<String>,
}

/// One host of the pool.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolHostView {
    /// Its name.
    pub name: HostName,
    /// Its number.
    pub id: u8,
    /// What it is to the pool: `in`, `ousted`, `dead`, `away`, `unknown`.
    pub standing: String,
    /// How its death is known.
    pub proof: Option<String>,
    /// Whether it votes: without the registry the pool goes on while a majority of those lives.
    #[serde(default)]
    pub votes: bool,
    /// Whether it may run without a lease that could be waited out; then no watchdog bound proves
    /// its death.
    #[serde(default)]
    pub unbound: bool,
    /// The life that the pool knows of.
    pub incarnation: Option<u64>,
    /// Whether it is the answering host.
    pub is_self: bool,
    /// Its paths to the answering host.
    pub paths: Vec<PathView>,
    /// What it says of itself, as far as it was ever heard.
    pub report: Option<ReportView>,
}

/// One path by which a host is heard.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PathView {
    /// Name of the network, or `statefile disk N`.
    pub path: String,
    /// `healthy`, `suspect`, `lost`.
    pub verdict: String,
    /// Age of what came last, milliseconds; none if nothing ever came.
    pub age_ms: Option<u64>,
}

/// What a host said of itself last. Its ages are as of its saying so.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReportView {
    /// Its life.
    pub incarnation: u64,
    /// Number of the report.
    pub seq: u64,
    /// Whom it hears, by name.
    pub hears: Vec<String>,
    /// Age of the gateway's newest answer, milliseconds.
    pub gateway_age_ms: Option<u64>,
    /// Age of its newest read of the registry, milliseconds.
    pub registry_age_ms: Option<u64>,
    /// Whether the storage of its VMs answers.
    pub storage_ok: bool,
    /// Largest replication lag of its standbys, milliseconds.
    pub standby_lag_ms: Option<u64>,
    /// Sum of its VMs' weights.
    pub weight: u32,
    /// Its watchdog's timeout, milliseconds.
    pub watchdog_ms: Option<u64>,
    /// It runs nothing and will start nothing.
    pub farewell: bool,
}

/// Something the pool decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionView {
    /// Its number.
    pub number: u64,
    /// Who decided.
    pub by: String,
    /// About which host.
    pub about: String,
    /// What.
    pub what: String,
    /// Who saw what, and which rule followed from it.
    pub cause: String,
}

/// A VM of a dead host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartView {
    /// Its name.
    pub vm: String,
    /// Its uuid.
    pub uuid: String,
    /// The host that ran it.
    pub from: String,
    /// Where it is to run; none if it is left down.
    pub to: Option<String>,
    /// `ordered`, `runs` (on the answering host), `left`.
    pub state: String,
    /// Why there, or why not.
    pub cause: String,
}

/// Something somebody should look at.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AlertView {
    /// How long ago, milliseconds.
    pub age_ms: u64,
    /// What.
    pub text: String,
}
