//! What crosses the API. Times are CLOCK_MONOTONIC of the answering host, durations
//! carry their unit last in the name.

use crate::pool::HostName;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A refusal or failure: what failed, on what, and what to do.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct ApiError {
    /// One or more sentences for a person.
    pub error: String,
}

/// Who this host is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub name: HostName,
    /// Fingerprint of its identity.
    pub fingerprint: String,
    /// pollux's version.
    pub version: String,
    /// QEMU's version, or why it cannot be used.
    pub qemu: String,
    /// Why this host cannot mirror, if so: kernel or privileges.
    pub cannot_mirror: Option<String>,
    /// CLOCK_MONOTONIC now, nanoseconds.
    pub now_ns: u64,
}

/// Everything a host knows of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostStatus {
    /// Who it is.
    pub host: HostInfo,
    /// Its partners.
    pub partners: Vec<PartnerStatus>,
    /// Its VMs, primary and standby.
    pub vms: Vec<VmStatus>,
}

/// The interconnect to one partner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PartnerStatus {
    /// Its name.
    pub name: HostName,
    /// Whether a QUIC session stands.
    pub connected: bool,
    /// Verdict of the heartbeats: `alive`, `suspect`, `lost`, `unknown`.
    pub verdict: String,
    /// Age of the last heartbeat heard, microseconds.
    pub heard_us_ago: Option<u64>,
    /// Smoothed round-trip time of the session, microseconds.
    pub rtt_us: Option<u64>,
    /// Why the last session ended or none could be made.
    pub last_error: Option<String>,
    /// False if the heartbeat thread could not get real-time priority.
    pub realtime: bool,
    /// Local and peer address of the first link that is not down.
    pub link: Option<String>,
    /// State of each link, in the order of `pollux link create`.
    #[serde(default)]
    pub links: Vec<super::links::LinkHealth>,
}

/// Which side of a VM this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It runs here.
    Primary,
    /// A standby of it waits here.
    Standby,
    /// Known here, not running.
    Stopped,
}

/// One VM on one host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmStatus {
    /// Name.
    pub name: String,
    /// uuid.
    pub uuid: String,
    /// Which side this host is.
    pub role: Role,
    /// State of the side's machine, in the words of docs/ARCHITECTURE.md.
    pub state: String,
    /// `none` or `mirrored`, as asked for.
    pub protection: String,
    /// True only while the newest committed epoch is younger than the lag alarm.
    pub mirrored: bool,
    /// Partner of the mirroring.
    pub partner: Option<HostName>,
    /// Generation of who may run it.
    pub generation: u64,
    /// Running epoch.
    pub epoch: u64,
    /// Newest committed epoch.
    pub committed: u64,
    /// Age of the newest committed epoch, microseconds.
    pub lag_us: Option<u64>,
    /// How far the links are behind; None while they keep up or nothing goes over them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_lag: Option<super::links::LinkLag>,
    /// Seeding progress.
    pub seeding: Option<SeedingStatus>,
    /// Figures of the recent epochs.
    pub epochs: Option<EpochFigures>,
    /// How this side came to run the VM, if by a promotion.
    pub last_failover: Option<Failover>,
    /// What an operator should know.
    pub warnings: Vec<String>,
    /// Recent events, oldest first.
    pub events: Vec<Event>,
    /// Process id of QEMU, in the daemon's pid namespace.
    pub qemu_pid: Option<i32>,
    /// Resident memory that this side of the VM costs the host: RAM file, QEMU's own and
    /// buffers, bytes.
    pub resident_bytes: Option<u64>,
    /// Guest memory by spec, bytes.
    pub memory_bytes: u64,
    /// The console's unix socket.
    pub console: Option<String>,
    /// The disks' image files on this host.
    pub disks: Vec<String>,
    /// How old this status is, microseconds.
    pub age_us: u64,
}

/// How far the first full copy is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SeedingStatus {
    /// Bytes sent.
    pub done_bytes: u64,
    /// Bytes known to be needed.
    pub total_bytes: u64,
    /// Scan-and-copy round.
    pub round: u32,
}

/// A distribution over the recent epochs, microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Largest.
    pub max: u64,
}

impl Percentiles {
    /// Of a set of samples; all zero if it is empty. Nearest-rank.
    #[must_use]
    pub fn of(samples: &mut [u64]) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        samples.sort_unstable();
        let last = samples.len() - 1;
        let at = |percent: usize| {
            samples[(samples.len() * percent).div_ceil(100).clamp(1, last + 1) - 1]
        };
        Self {
            p50: at(50),
            p90: at(90),
            p99: at(99),
            max: samples[last],
        }
    }
}

/// Figures over the recent epochs (a window of [`EPOCH_WINDOW`]).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct EpochFigures {
    /// Epochs committed since mirroring began.
    pub committed: u64,
    /// Epochs in the window.
    pub window: u64,
    /// Whole pause.
    pub pause_us: Percentiles,
    /// Part of it: `stop`.
    pub stop_us: Percentiles,
    /// Part of it: dirty pages collected and copied (parallel to save).
    pub capture_us: Percentiles,
    /// Part of it: device state saved (parallel to capture).
    pub save_us: Percentiles,
    /// Part of it: `cont`.
    pub cont_us: Percentiles,
    /// From resume to the standby's acknowledgement.
    pub commit_us: Percentiles,
    /// Replication lag at each commit: age of the epoch's beginning, the most a failover
    /// at that moment would have undone.
    pub lag_us: Percentiles,
    /// Length of epochs.
    pub length_us: Percentiles,
    /// Dirty pages an epoch.
    pub pages: Percentiles,
    /// Bytes an epoch on the wire.
    pub wire_bytes: Percentiles,
    /// What the encoder made of them; None before it has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<super::links::EncodeFigures>,
}

/// How many epochs [`EpochFigures`] looks back.
pub const EPOCH_WINDOW: usize = 4096;

/// A takeover, step by step; all times CLOCK_MONOTONIC nanoseconds of this host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Failover {
    /// `failover` or `switchover`.
    pub kind: String,
    /// Last sign of life of the old primary.
    pub last_heard_ns: u64,
    /// It was declared lost, or said itself that it is gone.
    pub suspected_ns: u64,
    /// The claim was sent to the registry.
    pub claim_started_ns: u64,
    /// The claim was won.
    pub claim_won_ns: u64,
    /// Everything committed was applied and promotion began.
    pub promote_started_ns: u64,
    /// The guest ran.
    pub running_ns: u64,
    /// Epoch it went on from.
    pub from_epoch: u64,
    /// Generation before.
    pub from_generation: u64,
    /// Time spent on the audit between promotion and `cont`, microseconds.
    pub audit_us: u64,
    /// Whether all of memory equals the committed checkpoint; None without audit.
    pub memory_equal: Option<bool>,
    /// Whether every disk equals the committed checkpoint; None without audit.
    pub disks_equal: Option<bool>,
    /// Packets delivered again to the guest.
    pub replayed: u64,
}

/// Something that happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// CLOCK_MONOTONIC nanoseconds.
    pub at_ns: u64,
    /// What, for a person.
    pub what: String,
}

/// A partner host, as `pollux link create` pinned it; one file in `state_dir/links`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// The partner's name.
    pub partner: HostName,
    /// The partner's fingerprint, `sha256:` and 64 hex digits.
    pub fingerprint: String,
    /// A second one, while the partner changes its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_fingerprint: Option<String>,
    /// The physical links, best first.
    pub links: Vec<LinkAddrs>,
}

/// UDP port of a link unless told otherwise; heartbeats use the one above.
pub const LINK_PORT: u16 = 7_443;

/// The two ends of one physical link. Heartbeats use the port above each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkAddrs {
    /// Address and UDP port on this host.
    pub local: SocketAddr,
    /// Address and UDP port on the partner.
    pub peer: SocketAddr,
}

impl LinkAddrs {
    /// The same link as the partner writes it.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        Self {
            local: self.peer,
            peer: self.local,
        }
    }

    /// The heartbeat sockets' addresses: one port above the link's.
    #[must_use]
    pub fn heartbeat(self) -> Self {
        let up = |a: SocketAddr| SocketAddr::new(a.ip(), a.port().wrapping_add(1));
        Self {
            local: up(self.local),
            peer: up(self.peer),
        }
    }
}

/// `POST /v1/vms`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateVm {
    /// The spec, TOML.
    pub spec: String,
    /// Name of the file it came from, for errors.
    pub origin: String,
}

/// `POST /v1/vms/NAME/start`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Start {
    /// Start from this host's disks although another host may hold newer writes.
    pub force: bool,
}

/// `POST /v1/vms/NAME/protect`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Protect {
    /// The partner; may be left out if the host has exactly one.
    pub partner: Option<HostName>,
}

/// Answer of a command that has nothing else to say.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Done {
    /// Notes for the operator.
    pub notes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::Percentiles;

    #[test]
    fn nearest_rank() {
        let mut v: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(
            Percentiles::of(&mut v),
            Percentiles {
                p50: 50,
                p90: 90,
                p99: 99,
                max: 100
            }
        );
        assert_eq!(
            Percentiles::of(&mut [7]),
            Percentiles {
                p50: 7,
                p90: 7,
                p99: 7,
                max: 7
            }
        );
        assert_eq!(Percentiles::of(&mut []), Percentiles::default());
    }
}
