//! A guest small enough to compare whole: memory, devices and disk are three digests of
//! everything it ever did, and a request served is a step of all three.

use super::rng::mix;
use crate::mirror::Micros;

/// What a checkpoint takes of a guest. Each part can be copied apart, and only parts of
/// one moment agree with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestState {
    /// Newest request served; part of memory.
    pub served: u64,
    /// Digest of memory.
    pub memory: u64,
    /// Digest of devices.
    pub devices: u64,
    /// Digest of the disk.
    pub disk: u64,
}

impl GuestState {
    /// Work of its own between requests.
    pub const fn work(&mut self, noise: u64) {
        self.memory = mix(self.memory ^ noise);
        self.devices = mix(self.devices ^ noise ^ 1);
        self.disk = mix(self.disk ^ noise ^ 2);
    }

    /// Serve a request; the answer is its number, or none if one before it is missing.
    /// A repeated request gets its answer again, as TCP would send it again.
    pub const fn serve(&mut self, request: u64) -> Option<u64> {
        if request == self.served + 1 {
            self.served = request;
            self.work(request);
        }
        if request <= self.served {
            Some(request)
        } else {
            None
        }
    }
}

/// A guest on a host, with its egress gate.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    /// What it is.
    pub state: GuestState,
    /// Its vCPUs stand for a checkpoint.
    pub paused: bool,
    /// Its vCPUs stand because the machine says so.
    pub held: bool,
    /// Its vCPUs stand for the link's sake.
    pub held_back: bool,
    /// How long it has run in the running epoch, as of `seen_at`.
    pub ran: Micros,
    /// Until when `ran` is known.
    pub seen_at: Micros,
    /// Output is held.
    pub gated: bool,
    /// The running epoch.
    pub epoch: u64,
    /// Packets in the gate: epoch and answer.
    pub gate: Vec<(u64, u64)>,
}

impl Guest {
    /// Whether it executes.
    #[must_use]
    pub const fn runs(&self) -> bool {
        !self.paused && !self.held && !self.held_back
    }

    /// Account for the time until now, before anything changes.
    pub fn account(&mut self, now: Micros) {
        if self.runs() {
            self.ran = self.ran + now.since(self.seen_at);
        }
        self.seen_at = self.seen_at.max(now);
    }
}
