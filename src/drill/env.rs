//! What a drill needs from the product: [`DrillEnv`], implemented over the API.
//!
//! A drill decides what to do and when, measures and judges; the environment carries
//! it out. All times are nanoseconds of `CLOCK_MONOTONIC`. In the lab every namespace
//! shares that clock, so times taken on host a, on host b and by the client outside
//! can be subtracted from each other; on separate machines they could not.

use super::DrillKind;
use crate::pool::HostName;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::Child;
use std::time::Duration;

pub use crate::lab::MonotonicNs;

/// Something the environment could not do; ends the drill.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {message}")]
pub struct EnvError {
    /// What was being done, on what.
    pub step: String,
    /// What happened and what to do.
    pub message: String,
}

impl EnvError {
    /// An error of this step.
    pub fn new(step: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self {
            step: step.into(),
            message: message.to_string(),
        }
    }
}

/// The load inside and outside the guest while the drill runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Clients outside, one TCP connection each, one request at a time.
    pub clients: u16,
    /// Writes per second of the guest's disk worker; 0 = none.
    pub disk_iops: u32,
    /// Pages per second that the guest's memory worker dirties; 0 = none.
    pub mem_pages_s: u32,
    /// Also send full-size packets to the guest's echo port without pause.
    pub net: bool,
}

/// Which service the clients talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// The test guest's own counter on port 7000; every answer is a record on its disk.
    Counter,
    /// Redis on port 6379: `INCR`.
    Redis,
}

/// What the environment is to make ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Load inside the guest (the clients are the drill's own).
    pub load: Load,
    /// The service the guest must answer on.
    pub service: Service,
    /// Private links between the two hosts.
    pub links: u8,
    /// After every promotion compare memory and disks with the committed checkpoint.
    pub audit: bool,
}

/// Which part a host has in a VM's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Runs the VM (mirrored, or not yet).
    Primary,
    /// Holds its standby.
    Standby,
    /// Runs it unmirrored after the partner is gone.
    Solo,
    /// Has nothing of it.
    None,
}

/// p50, p90, p99 and the largest of something, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    /// How many were measured.
    pub count: u64,
    /// Half are at or under this.
    pub p50_us: u64,
    /// Nine in ten.
    pub p90_us: u64,
    /// 99 in 100.
    pub p99_us: u64,
    /// The largest.
    pub max_us: u64,
}

/// The pause of a checkpoint and what it is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseView {
    /// The whole.
    pub total: Quantiles,
    /// Until QEMU says that the vCPUs stand.
    pub stop: Quantiles,
    /// Scan and copy of dirty pages.
    pub capture: Quantiles,
    /// Saving the device state.
    pub save: Quantiles,
    /// Until the vCPUs run again.
    pub cont: Quantiles,
}

/// What the audit of a promotion found: the promoted side against the committed checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditView {
    /// All of memory equal, by hash.
    pub memory_equal: bool,
    /// All disks equal, by hash.
    pub disks_equal: bool,
    /// How long it took, microseconds; the guest stood still for it.
    pub audit_us: u64,
}

/// The last failover as the new running side saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverView {
    /// The partner was suspected (switchover: asked for).
    pub suspected_at_ns: MonotonicNs,
    /// The claim was sent to the registry.
    pub claim_started_ns: MonotonicNs,
    /// The claim was won.
    pub claim_won_ns: MonotonicNs,
    /// Promotion began; zero if this side ran already and went solo.
    pub promote_started_ns: MonotonicNs,
    /// The vCPUs run here.
    pub running_ns: MonotonicNs,
    /// The committed epoch it went on from.
    pub from_epoch: u64,
    /// The audit's result once it is in; none if audits are off.
    pub audit: Option<AuditView>,
}

/// Something that happened to the VM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// When.
    pub at_ns: MonotonicNs,
    /// What, in the words of the events list.
    pub text: String,
}

/// One VM as one host sees it. Counters run since the VM came to this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    /// The host that says so.
    pub host: HostName,
    /// Its part.
    pub role: Role,
    /// The state in the daemon's words (`mirrored`, `seeding`, …).
    pub state: String,
    /// True only while the newest committed epoch is younger than the lag alarm.
    pub mirrored: bool,
    /// Generation in the registry.
    pub generation: u64,
    /// The running epoch.
    pub epoch: u64,
    /// The newest committed one.
    pub committed_epoch: u64,
    /// Age of the newest committed epoch, microseconds.
    pub lag_us: u64,
    /// Pauses.
    pub pause: PauseView,
    /// From resume to commit.
    pub commit: Quantiles,
    /// Epochs committed.
    pub epochs: u64,
    /// Pages per epoch, mean.
    pub pages_per_epoch: u64,
    /// Bytes sent per epoch, mean.
    pub bytes_per_epoch: u64,
    /// Pid of the QEMU process inside the host's pid namespace, if one runs.
    pub qemu_pid: Option<u32>,
    /// The last failover to this host, if any.
    pub last_failover: Option<FailoverView>,
    /// Newest last, bounded by the daemon.
    pub events: Vec<EventView>,
}

impl VmView {
    /// Whether that host runs the VM.
    #[must_use]
    pub const fn runs(&self) -> bool {
        matches!(self.role, Role::Primary | Role::Solo)
    }
}

/// A client process with pipes; it ends when `input` is closed.
pub struct ClientPipes {
    /// Closing it tells the client to finish its requests and end.
    pub input: Box<dyn Write + Send>,
    /// Its JSON lines, see [`super::client`].
    pub output: Box<dyn Read + Send>,
    /// To wait for, where it is a process.
    pub child: Option<Child>,
}

/// What is done to one private link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkHarm {
    /// What is sent on it is lost in silence: no end sees an error.
    Silent,
    /// Its cable is out: both ends lose their carrier.
    Unplugged,
    /// It carries no more than [`SLOW_LINK_BYTES_PER_S`] each way.
    Slow,
}

/// What a slowed link still carries: a tenth of what the drill's default load puts on the
/// wire (some 10 MB/s), and enough for a connection to stand.
pub const SLOW_LINK_BYTES_PER_S: u64 = 1_000_000;

/// The counter's records found on a disk: numbers whose record is whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecords {
    /// Inclusive ranges of record numbers, ascending, not overlapping.
    pub ranges: Vec<(u64, u64)>,
    /// Lower numbers are not expected: the ring of records has come round over them.
    /// With a ring of `slots` and `newest` the highest whole record: `newest - slots + 1`.
    pub oldest_kept: u64,
    /// Records whose checksum or number is wrong.
    pub damaged: u64,
}

/// Carries out what a drill decides. Calls come one at a time, in this order:
/// `prepare`; `spawn_client`; `protect`; then per run `wait_mirrored`, `views`
/// (repeatedly), `inject`, `wait_running`, `audit`, `repair`; at the end
/// `disk_records` and `finish`. Where a single link fails, `harm_link`, `heal_link` and
/// `link_carries` come instead of `inject` to `repair`, or before `inject`.
///
/// Every wait has a limit given by the drill; a method that cannot do its work in it
/// returns an error that says what it waited for and what it saw instead.
pub trait DrillEnv {
    /// Brings up hosts and the VM, unprotected, with this load; returns once the
    /// guest's service answers (or is about to: the client connects with retries).
    ///
    /// # Errors
    /// What could not be started.
    fn prepare(&mut self, setting: &Setting, limit: Duration) -> Result<(), EnvError>;

    /// Starts `pollux ARGS` outside with pipes on stdin and stdout.
    ///
    /// # Errors
    /// If it cannot be started.
    fn spawn_client(&mut self, args: &[OsString]) -> Result<ClientPipes, EnvError>;

    /// Asks for protection `mirrored`; does not wait.
    ///
    /// # Errors
    /// If it is refused.
    fn protect(&mut self) -> Result<(), EnvError>;

    /// Waits until the VM is mirrored and returns the primary's view.
    ///
    /// # Errors
    /// If it is not within `limit`.
    fn wait_mirrored(&mut self, limit: Duration) -> Result<VmView, EnvError>;

    /// The VM as each reachable host sees it now; a dead or frozen host is left out.
    ///
    /// # Errors
    /// If no host can be asked.
    fn views(&mut self) -> Result<Vec<VmView>, EnvError>;

    /// Does the failure, for the VM that runs on `primary`: power-cut that host, kill
    /// that VM's QEMU, cut every private link of the pair, freeze the host, or ask for
    /// the switchover. Returns the instant it took effect.
    ///
    /// # Errors
    /// If it could not be done.
    fn inject(&mut self, kind: DrillKind, primary: &HostName) -> Result<MonotonicNs, EnvError>;

    /// Does something to private link `link` of the pair; returns the instant it took effect.
    ///
    /// # Errors
    /// If it could not be done.
    fn harm_link(&mut self, link: u8, harm: LinkHarm) -> Result<MonotonicNs, EnvError>;

    /// Undoes everything that was done to private link `link`; returns the instant.
    ///
    /// # Errors
    /// If it could not be done.
    fn heal_link(&mut self, link: u8) -> Result<MonotonicNs, EnvError>;

    /// Whether both hosts say that private link `link` carries; none if they do not tell.
    ///
    /// # Errors
    /// If no host can be asked.
    fn link_carries(&mut self, link: u8) -> Result<Option<bool>, EnvError>;

    /// Waits until exactly one side runs the VM in a later generation than
    /// `generation` and returns that side's view, its `last_failover` filled. After a
    /// cut link that side may be the same host, now solo.
    ///
    /// # Errors
    /// If none does within `limit`, or two do.
    fn wait_running(&mut self, generation: u64, limit: Duration) -> Result<VmView, EnvError>;

    /// Waits for the audit of the last promotion on `host`. None where there was no
    /// promotion (the side ran already and went solo).
    ///
    /// # Errors
    /// If there was a promotion but its audit is not in within `limit`.
    fn audit(&mut self, host: &HostName, limit: Duration) -> Result<Option<AuditView>, EnvError>;

    /// Undoes the failure (power on, heal, thaw; nothing for kill-qemu and
    /// switchover); re-protection then follows by itself or is asked for here.
    ///
    /// # Errors
    /// If it could not be done.
    fn repair(&mut self, kind: DrillKind, failed: &HostName) -> Result<(), EnvError>;

    /// Reads the counter's records off the disk of the host that runs the VM, at a
    /// moment when no client has a request in flight. None for [`Service::Redis`].
    ///
    /// # Errors
    /// If the disk cannot be read.
    fn disk_records(&mut self) -> Result<Option<DiskRecords>, EnvError>;

    /// Stops VM and hosts and removes what `prepare` made. Called in every case.
    fn finish(&mut self);
}
