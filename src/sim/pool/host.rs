//! One host: its clock, its machine, its watchdog, and what of the world it reaches.

use super::paxos;
use crate::ha::machine::{Config, Input, Machine, Phase};
use crate::ha::time::Millis;
use crate::ha::timing::Timing;
use crate::pool::{HostId, HostName, Incarnation};
use crate::sim::Rng;
use crate::sim::scenario::host_name;
use std::collections::VecDeque;

/// A host.
pub(super) struct Host {
    pub(super) machine: Option<Machine>,
    pub(super) life: u64,
    /// Its clock: what it shows at virtual time 0, and how many ppm it is fast.
    offset: u64,
    rate_ppm: i64,
    pub(super) frozen_until: u64,
    /// What came while it stood still.
    pub(super) held: VecDeque<Input>,
    /// It was to tick meanwhile.
    pub(super) tick_held: bool,
    /// By its own clock.
    pub(super) pet_until: Option<Millis>,
    /// Whether this life may have effect outside.
    pub(super) effect: bool,
    pub(super) gateway: bool,
    pub(super) etcd: bool,
    pub(super) disks: Vec<bool>,
    pub(super) client: Option<paxos::Client>,
    pub(super) boots: bool,
    pub(super) resets: u32,
    /// What is written down on it: the life that promised as one of two.
    pub(super) promised: Option<Incarnation>,
    /// A fault was about it.
    pub(super) touched: bool,
}

impl Host {
    /// One without power, whose clock differs from others as much as they may.
    pub(super) fn new(rng: &mut Rng, disks: usize) -> Self {
        // Half of the allowance to either side.
        let most = Timing::DEFAULT.rates_permille * 1000 / 2;
        let rate =
            i64::try_from(rng.between(0, 2 * most)).unwrap_or(0) - i64::try_from(most).unwrap_or(0);
        Self {
            machine: None,
            life: 0,
            offset: rng.between(1000, 1_000_000_000),
            rate_ppm: rate,
            frozen_until: 0,
            held: VecDeque::new(),
            tick_held: false,
            pet_until: None,
            effect: false,
            gateway: true,
            etcd: true,
            disks: vec![true; disks],
            client: None,
            boots: false,
            resets: 0,
            promised: None,
            touched: false,
        }
    }

    /// What its clock shows at virtual time `now`, milliseconds.
    pub(super) fn clock(&self, now: u64) -> Millis {
        let scaled = u128::from(now) * u128::from(self.factor()) / 1_000_000;
        Millis(self.offset + u64::try_from(scaled).unwrap_or(u64::MAX))
    }

    /// When its clock shows `moment` at the earliest.
    pub(super) fn when(&self, moment: Millis) -> u64 {
        let since = u128::from(moment.0.saturating_sub(self.offset));
        let factor = u128::from(self.factor());
        u64::try_from((since * 1_000_000).div_ceil(factor)).unwrap_or(u64::MAX)
    }

    /// Virtual time that passes while its clock goes on by `length`.
    pub(super) fn takes(&self, length: Millis) -> u64 {
        u64::try_from(u128::from(length.0) * 1_000_000 / u128::from(self.factor()))
            .unwrap_or(u64::MAX)
    }

    fn factor(&self) -> u64 {
        u64::try_from(1_000_000 + self.rate_ppm).unwrap_or(1_000_000)
    }

    /// Begin a life.
    pub(super) fn begin(&mut self, index: usize, now: u64, watchdog: bool, fencing: bool) {
        self.life += 1;
        self.boots = false;
        self.effect = false;
        self.pet_until = None;
        self.held.clear();
        self.tick_held = false;
        let config = Config {
            me: HostId(u8::try_from(index).unwrap_or(u8::MAX)),
            name: name(index),
            incarnation: Incarnation(self.life),
            timing: Timing::DEFAULT,
            watchdog: watchdog.then_some(Timing::DEFAULT.watchdog),
            power_fencing: fencing,
            promised: self.promised,
        };
        self.machine = Some(Machine::new(config, self.clock(now)));
    }

    /// Its power goes.
    pub(super) fn lose_power(&mut self) {
        self.machine = None;
        self.client = None;
        self.pet_until = None;
        self.effect = false;
        self.boots = false;
        self.frozen_until = 0;
        self.held.clear();
        self.tick_held = false;
    }

    /// Whether it is a member that runs.
    pub(super) fn is_member(&self) -> bool {
        let machine = self.machine.as_ref();
        machine.is_some_and(|machine| *machine.phase() == Phase::Member)
    }
}

/// The name of a host by index.
pub(super) fn name(index: usize) -> HostName {
    // A letter and a number at most: always a name.
    HostName::new(host_name(index)).unwrap_or_else(|_| unreachable!("a host name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_of_another_rate_is_turned_back_without_being_early() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let host = Host::new(&mut rng, 1);
            let now = rng.between(0, 100_000_000);
            let shown = host.clock(now);
            assert!(host.when(shown) <= now);
            let moment = shown + Millis(5000);
            assert!(host.clock(host.when(moment)) >= moment);
            assert!(host.clock(host.when(moment) - 1) < moment);
        }
    }
}
