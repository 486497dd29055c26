//! What the epoch lane carries: a capacity that changes, and a guest that dirties more than
//! it or less.
//!
//! Only the size of epochs counts here: an epoch's parts are with the standby once everything
//! before them has gone through at the capacity of the day, and the network's delay after that.

use super::rng::Rng;
use super::world::{Event, Role, World};
use crate::mirror::{LaneLevel, Micros, PrimaryInput};
use crate::pool::Epoch;

/// Most that a guest dirties in an epoch: the memory it works on.
const WORKING_SET_BYTES: u64 = 48_000_000;
/// What every epoch carries besides pages: device state, closing frame.
const EPOCH_BYTES_MIN: u64 = 8_000;
/// The shell hands over an epoch's closing frame once so little waits before it.
const CLOSING_BACKLOG: Micros = Micros::from_millis(10);

/// Both directions have one, as both hosts may be primary.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    /// What was put on it has gone through by then.
    free_at: Micros,
}

/// The link's and the guest's figures.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Bytes a second.
    capacity: u64,
    /// Whether the lane tells its capacity.
    told: bool,
    /// Bytes a second that a running guest dirties.
    dirty: u64,
    lanes: [Lane; 2],
}

impl Load {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let heavy = rng.permille(500);
        Self {
            capacity: 200_000_000,
            told: rng.permille(700),
            dirty: if heavy {
                rng.between(10_000_000, 60_000_000)
            } else {
                rng.between(100_000, 10_000_000)
            },
            lanes: [Lane {
                free_at: Micros::ZERO,
            }; 2],
        }
    }

    /// Another capacity, often far less than the guest dirties.
    pub(super) fn change(&mut self, rng: &mut Rng) {
        self.capacity = match rng.between(0, 2) {
            0 => rng.between(4_000_000, 20_000_000),
            1 => rng.between(20_000_000, 100_000_000),
            _ => 200_000_000,
        };
    }

    /// A new attempt has a lane of its own.
    pub(super) const fn open(&mut self, host: usize, now: Micros) {
        self.lanes[host].free_at = now;
    }

    /// Bytes of an epoch whose guest ran for `ran`.
    pub(super) fn epoch_bytes(&self, ran: Micros) -> u64 {
        let dirtied = self.dirty.saturating_mul(ran.0) / 1_000_000;
        dirtied.min(WORKING_SET_BYTES) + EPOCH_BYTES_MIN
    }

    /// Put bytes on a lane: how long until they are through.
    pub(super) fn put(&mut self, host: usize, bytes: u64, now: Micros) -> Micros {
        let lane = &mut self.lanes[host];
        lane.free_at = lane.free_at.max(now) + Micros(bytes * 1_000_000 / self.capacity);
        lane.free_at.since(now)
    }

    fn level(&self, host: usize, now: Micros) -> LaneLevel {
        let left = self.lanes[host].free_at.since(now);
        LaneLevel {
            queued_bytes: left.0 * self.capacity / 1_000_000,
            unacked_bytes: 0,
            bytes_per_s: self.told.then_some(self.capacity),
        }
    }
}

impl World {
    /// The shell tells the machine how its lane stands.
    pub(super) fn tell_level(&mut self, host: usize) {
        if let Role::Primary { .. } = self.hosts[host].role {
            let level = self.load.level(host, self.now);
            self.tell_primary(host, PrimaryInput::Lane(level));
        }
    }

    /// The closing frame is handed over when little waits before it, as by the shell; small
    /// epochs are not always told of.
    pub(super) fn close_epoch(&mut self, host: usize, epoch: Epoch, through: Micros) {
        let wait = through - CLOSING_BACKLOG;
        if wait > Micros::ZERO || self.rng.permille(500) {
            let life = self.hosts[host].life;
            self.after(wait, Event::Closing { host, life, epoch });
        }
    }

    pub(super) fn change_capacity(&mut self) {
        if self.faults_on {
            self.load.change(&mut self.rng);
            let delay = Micros(self.rng.between(100_000, 1_500_000));
            self.after(delay, Event::Capacity);
        }
    }
}
