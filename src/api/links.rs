//! What the API tells and takes about links: how a pair's interconnect stands, the first
//! meeting of two hosts, the rotation of a host's key, and link tests.

use super::types::{Event, LinkAddrs, Percentiles};
use crate::pool::HostName;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// `GET /v1/links/PARTNER/status`: a pair's interconnect as this host sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PairStatus {
    /// The partner.
    pub partner: HostName,
    /// Fingerprints pinned for it: one, or two while it changes its key.
    pub pinned: Vec<String>,
    /// Whether a session stands.
    pub connected: bool,
    /// The protocol version spoken in it; 0 without one.
    pub version: u16,
    /// Verdict of the heartbeats: `alive`, `suspect`, `lost`, `unknown`.
    pub verdict: String,
    /// Age of the last heartbeat heard, microseconds.
    pub heard_us_ago: Option<u64>,
    /// Why the last session ended or none could be made.
    pub last_error: Option<String>,
    /// False if the heartbeat thread could not get real-time priority.
    pub realtime: bool,
    /// Between the two readings that rates are taken from, milliseconds; 0 before the second.
    pub rates_over_ms: u64,
    /// The links, in the order of `pollux link create`.
    pub links: Vec<LinkStatus>,
    /// The lanes of the session.
    pub lanes: Vec<LaneStatus>,
    /// What the encoder makes of each VM mirrored over this pair.
    pub encoding: Vec<VmEncoding>,
    /// Recent events of the pair, oldest first.
    pub events: Vec<Event>,
}

/// How one link stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkHealth {
    /// No connection.
    Down,
    /// A connection stands, but what was sent on it is overdue: it gets nothing new.
    Suspect,
    /// It carries.
    Up,
}

/// One link of a pair. Counters only grow while its connection stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Its place in the pair's list, from 0.
    pub link: usize,
    /// How it stands.
    pub state: LinkHealth,
    /// For how long, microseconds.
    pub since_us: u64,
    /// Address here.
    pub local: SocketAddr,
    /// Address at the partner.
    pub peer: SocketAddr,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: Option<u64>,
    /// Least round-trip time seen, microseconds.
    pub rtt_min_us: Option<u64>,
    /// What it was measured to carry, bytes of payload a second.
    pub capacity_bytes_per_s: Option<u64>,
    /// Sent lately, bytes a second; `None` before the second reading.
    pub sent_bytes_per_s: Option<u64>,
    /// Received lately, bytes a second.
    pub received_bytes_per_s: Option<u64>,
    /// UDP payload bytes sent.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Bytes sent again on this link because another one failed them.
    pub resent_bytes: u64,
    /// Bytes on their way that the partner has not acknowledged.
    pub in_flight_bytes: u64,
    /// How often a connection on it ended.
    pub flaps: u64,
    /// How often losses looked like a path that swallows large packets.
    pub black_holes: u64,
    /// Largest UDP payload in use, bytes.
    pub mtu_bytes: u16,
    /// What may be on its way, bytes.
    pub window_bytes: u64,
    /// Why its last connection ended or its last attempt failed.
    pub last_error: Option<String>,
}

/// One lane of a session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaneStatus {
    /// `control`, `epoch` or `io`.
    pub kind: String,
    /// The VM's uuid; `None` for the control lane.
    pub vm: Option<String>,
    /// The VM's generation.
    pub generation: u64,
    /// Whether this host sends on it.
    pub outgoing: bool,
    /// Frames sent or received.
    pub frames: u64,
    /// Bytes of those frames.
    pub bytes: u64,
    /// The same lately, bytes a second.
    pub bytes_per_s: Option<u64>,
    /// Outgoing: bytes that wait for a link. Incoming: bytes held for an earlier piece.
    pub queued_bytes: u64,
    /// Outgoing: bytes sent and not acknowledged.
    pub unacked_bytes: u64,
    /// Bytes sent again (outgoing) or received twice (incoming).
    pub repeated_bytes: u64,
    /// Frames dropped because their deadline passed before a link took them.
    pub expired_frames: u64,
}

/// What the encoder makes of one VM's epochs, over the recent ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEncoding {
    /// The VM's name.
    pub vm: String,
    /// The figures.
    pub figures: EncodeFigures,
}

/// How far the links are behind a VM's epochs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkLag {
    /// Bytes on the epoch lane that the partner has not.
    pub bytes: u64,
    /// Time until it has them, microseconds; `None` while nobody knows what the links carry.
    pub drains_us: Option<u64>,
    /// Share of its time that the guest was held back for it in its last epoch, per mille.
    pub held_permille: u16,
    /// The link (from 0) that is most behind, or carries nothing; `None` if all are alike.
    pub limiting_link: Option<usize>,
}

/// The encoder's figures over the recent epochs (a window of
/// [`super::types::EPOCH_WINDOW`]).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodeFigures {
    /// Bytes that went in: pages, disk blocks, device state.
    pub raw_bytes: u64,
    /// Bytes that came out.
    pub encoded_bytes: u64,
    /// Time spent encoding one epoch, summed over all threads, microseconds.
    pub encode_us: Percentiles,
    /// Pages of zeros.
    pub pages_zero: u64,
    /// Pages the standby has already.
    pub pages_unchanged: u64,
    /// Pages sent as a difference to what the standby holds.
    pub pages_delta: u64,
    /// Pages sent compressed.
    pub pages_compressed: u64,
    /// Pages sent as they are.
    pub pages_raw: u64,
}

impl EncodeFigures {
    /// Bytes in for each byte out; `None` before anything was encoded.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn ratio(&self) -> Option<f64> {
        (self.encoded_bytes > 0).then(|| self.raw_bytes as f64 / self.encoded_bytes as f64)
    }
}

/// `POST /v1/meeting`: wait for another host at these links' addresses.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MeetRequest {
    /// The links to pin if the codes are the same; the hosts meet on the first.
    pub links: Vec<LinkAddrs>,
}

/// How far a meeting is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MeetingState {
    /// The partner has not come yet.
    Waiting,
    /// There is a code to compare.
    Code,
    /// It was confirmed here: the partner is pinned.
    Pinned,
    /// It is over without a result.
    Failed,
}

/// `GET /v1/meeting`, and the answer to `POST`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MeetingStatus {
    /// How far it is.
    pub state: MeetingState,
    /// The links asked for.
    pub links: Vec<LinkAddrs>,
    /// What the partner says its name is, once it has come.
    pub partner: Option<HostName>,
    /// Its fingerprint.
    pub fingerprint: Option<String>,
    /// Eight digits: the same on both hosts, or somebody stands between them.
    pub code: Option<String>,
    /// Why it failed, or why nobody has come so far.
    pub reason: Option<String>,
    /// Time until the meeting is given up, milliseconds.
    pub left_ms: u64,
}

/// `POST /v1/meeting/confirm`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConfirmMeeting {
    /// The code that the partner shows.
    pub code: String,
}

/// How far the rotation of this host's key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotationState {
    /// None is under way.
    Idle,
    /// Partners are being told of the next key; the present one is in use.
    Telling,
    /// The next key is the present one; links are dialled anew with it one by one.
    Switched,
}

/// `GET /v1/rotation`, and the answer to `POST` (begin) and `DELETE` (give up).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RotationStatus {
    /// How far it is.
    pub state: RotationState,
    /// Fingerprint of the key in use.
    pub present: String,
    /// Fingerprint of the key to come.
    pub next: Option<String>,
    /// The partners and how far each is.
    pub partners: Vec<PartnerRotation>,
}

/// One partner in the rotation of this host's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartnerRotation {
    /// Its name.
    pub partner: HostName,
    /// Whether it needs nothing more from this host in the present state.
    pub done: bool,
    /// In words: what was done, or what is waited for.
    pub step: String,
}

/// `POST /v1/links/PARTNER/test`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct TestRequest {
    /// How long to measure in all, seconds.
    pub seconds: u64,
    /// Saturate the links even if mirrored VMs use them.
    #[serde(default)]
    pub full: bool,
}

/// How a test stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TestState {
    /// It measures.
    Running,
    /// There is a report.
    Done,
    /// It ended without one.
    Failed,
    /// It was told to end.
    Cancelled,
}

/// `GET /v1/links/PARTNER/test`: the newest test with this partner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestStatus {
    /// Which test, counted since the daemon started.
    pub test: u64,
    /// How it stands.
    pub state: TestState,
    /// What it does now, in words.
    pub step: String,
    /// How much of it is done, thousandths.
    pub done_permille: u64,
    /// The result.
    pub report: Option<TestReport>,
    /// Why there is none.
    pub reason: Option<String>,
}

/// What a test measured, and what it means.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestReport {
    /// The partner.
    pub partner: HostName,
    /// How long it measured, milliseconds.
    pub took_ms: u64,
    /// Whether the links were saturated; otherwise short bursts left them to mirrored VMs.
    pub full: bool,
    /// All tested links together.
    pub together: PathFigures,
    /// Each tested link.
    pub links: Vec<LinkFigures>,
    /// Longest silence of the partner's heartbeats while the test ran, microseconds.
    pub heartbeat_gap_us_max: u64,
    /// What it means for mirroring.
    pub meaning: Meaning,
    /// What should be looked at, in words.
    pub warnings: Vec<String>,
}

/// What was measured over one or more links.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFigures {
    /// Question and answer on the control lane, microseconds.
    pub rtt_us: Percentiles,
    /// Payload received and acknowledged, bytes a second.
    pub goodput_bytes_per_s: u64,
    /// An epoch of [`SMALL_EPOCH_PAGES`] pages, from the first byte to the acknowledgement,
    /// microseconds.
    pub small_epoch_us: Percentiles,
    /// An epoch of [`LARGE_EPOCH_PAGES`] pages likewise.
    pub large_epoch_us: Percentiles,
}

/// What was measured on one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkFigures {
    /// Which, from 0.
    pub link: usize,
    /// Address here.
    pub local: SocketAddr,
    /// Address at the partner.
    pub peer: SocketAddr,
    /// Round-trip time of its packets while the test ran, microseconds.
    pub rtt_us: Percentiles,
    /// UDP payload sent while the lanes were full, bytes a second: its share of the goodput
    /// with all headers.
    pub sent_bytes_per_s: u64,
    /// What it was measured to carry, bytes a second; None if it was never given more than it
    /// took, which with several links may mean that the others sufficed.
    #[serde(default)]
    pub capacity_bytes_per_s: Option<u64>,
    /// Packets sent while the test ran.
    pub sent_packets: u64,
    /// Packets of those declared lost.
    pub lost_packets: u64,
    /// Largest UDP payload in use, bytes.
    pub mtu_bytes: u16,
}

/// Pages of a small epoch: a request answered, a few stacks and buffers.
pub const SMALL_EPOCH_PAGES: u64 = 16;
/// Pages of a large epoch.
pub const LARGE_EPOCH_PAGES: u64 = 1_000;

/// What figures of a pair mean for mirroring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Meaning {
    /// Largest dirty rate the links carry for long if every page goes as it is, pages a second.
    pub dirty_pages_per_s: u64,
    /// The same, bytes of guest memory a second.
    pub dirty_bytes_per_s: u64,
    /// Bytes in for each byte out, as the encoder does for the VMs mirrored now.
    pub codec_ratio: Option<f64>,
    /// Largest dirty rate with that ratio, bytes of guest memory a second.
    pub encoded_dirty_bytes_per_s: Option<u64>,
    /// What an answer of the guest waits for the links, microseconds: small epochs.
    pub small_latency_us: Percentiles,
    /// Likewise with large epochs.
    pub large_latency_us: Percentiles,
    /// Replication lag to expect with small epochs at the least gap between checkpoints,
    /// microseconds.
    pub small_lag_us: u64,
    /// Likewise with large epochs.
    pub large_lag_us: u64,
    /// All of it in sentences.
    pub words: Vec<String>,
}
