//! Faults, one by one: those of a scenario, and those drawn from the seed.

use super::world::{Item, NETWORKS, Registry, World};
use crate::sim::scenario::{Event, Network, Random, Who};

/// How long etcd is without a leader after its leader stopped.
const ELECTION_MS: (u64, u64) = (1000, 3000);

impl World {
    /// The hosts that `who` means.
    pub(super) fn who(&self, who: Who) -> Vec<usize> {
        let (coordinator, another) = self.roles.unwrap_or((0, 1));
        match who {
            Who::Host(n) => vec![n],
            Who::Coordinator => vec![coordinator],
            Who::Another => vec![another.min(self.hosts.len() - 1)],
            Who::All => (0..self.hosts.len()).collect(),
        }
    }

    /// Settle who is meant by the roles, now.
    pub(super) fn settle_roles(&mut self) {
        let coordinator = self.coordinator().unwrap_or(0);
        let another = (0..self.hosts.len()).find(|n| *n != coordinator);
        self.roles = Some((coordinator, another.unwrap_or(0)));
    }

    /// An event happens.
    pub(super) fn fault(&mut self, event: Event) {
        let about = event.about().into_iter();
        let hosts: Vec<usize> = about.flat_map(|who| self.who(who)).collect();
        for n in hosts {
            self.hosts[n].touched = true;
        }
        self.trace(|_| format!("event: {event:?}"));
        match event {
            Event::Crash(who) => self.who(who).into_iter().for_each(|n| self.crash(n)),
            Event::PowerOn(who) => {
                for n in self.who(who) {
                    if self.hosts[n].machine.is_none() && !self.hosts[n].boots {
                        self.boot(n, self.now);
                    }
                }
            }
            Event::Freeze(who, length) => {
                for n in self.who(who) {
                    self.freeze(n, length.0);
                }
            }
            Event::Cut(a, b) => {
                for (a, b) in self.pairs(a, b) {
                    for network in 0..NETWORKS {
                        self.net[network][a][b] = false;
                        self.net[network][b][a] = false;
                    }
                }
            }
            Event::CutOneWay(from, to) => {
                for (from, to) in self.pairs(from, to) {
                    for network in 0..NETWORKS {
                        self.net[network][from][to] = false;
                    }
                }
            }
            Event::CutNetwork(network, who) => {
                let network = match network {
                    Network::Management => 0,
                    Network::Interconnect => 1,
                };
                for n in self.who(who) {
                    for other in 0..self.hosts.len() {
                        self.net[network][n][other] = false;
                        self.net[network][other][n] = false;
                    }
                }
            }
            Event::HealNetworks => {
                self.loss_permille = 0;
                for to in self.net.iter_mut().flatten().flatten() {
                    *to = true;
                }
            }
            Event::Lose(permille) => self.loss_permille = permille,
            Event::TakeRegistry(who) => self.set_registry(who, false),
            Event::GiveRegistry(who) => self.set_registry(who, true),
            Event::TakeDisk(disk, who) => self.set_disk(disk, who, false),
            Event::GiveDisk(disk, who) => self.set_disk(disk, who, true),
            Event::TakeGateway(who) => self.set_gateway(who, false),
            Event::GiveGateway(who) => self.set_gateway(who, true),
            Event::FenceAgents(work) => self.fence_works = work,
            Event::StopLeader => {
                let until = self.now + self.rng.between(ELECTION_MS.0, ELECTION_MS.1);
                if let Registry::Etcd(register) = &mut self.registry {
                    register.paused_until = until;
                }
            }
        }
    }

    fn pairs(&self, a: Who, b: Who) -> Vec<(usize, usize)> {
        let (a, b) = (self.who(a), self.who(b));
        let pairs = a
            .iter()
            .flat_map(|a| b.iter().map(move |b| (*a, *b)))
            .filter(|(a, b)| a != b);
        pairs.collect()
    }

    fn set_registry(&mut self, who: Who, works: bool) {
        for n in self.who(who) {
            self.hosts[n].etcd = works;
            self.hosts[n].disks.fill(works);
        }
    }

    fn set_disk(&mut self, disk: u8, who: Who, works: bool) {
        for n in self.who(who) {
            if let Some(disk) = self.hosts[n].disks.get_mut(usize::from(disk)) {
                *disk = works;
            }
        }
    }

    fn set_gateway(&mut self, who: Who, works: bool) {
        for n in self.who(who) {
            self.hosts[n].gateway = works;
        }
    }

    /// Draw one fault and let it happen.
    pub(super) fn random_fault(&mut self) {
        let count = self.hosts.len() as u64;
        let pick = |world: &mut Self| usize::try_from(world.rng.between(0, count - 1)).unwrap_or(0);
        let (n, other) = (pick(self), pick(self));
        let works = self.rng.permille(500);
        let (host, with) = (Who::Host(n), Who::Host(other));
        let length = self.rng.between(0, 25_000);
        match self.rng.between(0, 13) {
            0 => {
                self.fault(Event::Crash(host));
                let at = self.now + self.rng.between(0, 20_000);
                self.boot(n, at);
            }
            1 => self.fault(Event::Freeze(host, crate::ha::time::Millis(length))),
            2 => self.fault(Event::Cut(host, with)),
            3 => self.fault(Event::CutOneWay(host, with)),
            4 => {
                let network = if works {
                    Network::Management
                } else {
                    Network::Interconnect
                };
                self.fault(Event::CutNetwork(network, host));
            }
            5 => self.fault(Event::HealNetworks),
            6 => {
                let permille = self.rng.between(0, 400);
                self.fault(Event::Lose(permille));
            }
            7 => self.fault(if works {
                Event::GiveRegistry(host)
            } else {
                Event::TakeRegistry(host)
            }),
            8 => self.fault(if works {
                Event::GiveRegistry(Who::All)
            } else {
                Event::TakeRegistry(Who::All)
            }),
            9 => {
                let disk = u8::try_from(self.rng.between(0, 2)).unwrap_or(0);
                self.fault(if works {
                    Event::GiveDisk(disk, host)
                } else {
                    Event::TakeDisk(disk, host)
                });
            }
            10 => self.fault(if works {
                Event::GiveGateway(host)
            } else {
                Event::TakeGateway(host)
            }),
            11 => self.fault(Event::StopLeader),
            // A partition: each host is on one of two sides.
            12 => {
                let side: Vec<bool> = (0..count).map(|_| self.rng.permille(500)).collect();
                for a in 0..side.len() {
                    for b in (0..side.len()).filter(|b| side[a] != side[*b]) {
                        self.fault(Event::Cut(Who::Host(a), Who::Host(b)));
                    }
                }
            }
            // In the middle of whatever the coordinator is doing.
            _ => {
                if let Some(coordinator) = self.coordinator() {
                    let length = crate::ha::time::Millis(self.rng.between(0, 12_000));
                    self.fault(Event::Freeze(Who::Host(coordinator), length));
                }
            }
        }
    }

    /// All of them, in the time they have; then everything works again.
    pub(super) fn random_faults(&mut self, random: Random) {
        for host in &mut self.hosts {
            host.touched = true;
        }
        self.lost_answers = self.rng.permille(500);
        self.fence_works = self.rng.permille(600);
        let mut times: Vec<u64> = (0..random.faults)
            .map(|_| self.now + self.rng.between(0, random.within.0))
            .collect();
        times.sort_unstable();
        for at in times {
            self.run_until(at, |_| false);
            if self.violation.is_some() {
                return;
            }
            self.random_fault();
        }
        self.lost_answers = false;
        self.fence_works = true;
        self.fault(Event::HealNetworks);
        self.fault(Event::GiveRegistry(Who::All));
        self.fault(Event::GiveGateway(Who::All));
        for n in 0..self.hosts.len() {
            let host = &mut self.hosts[n];
            host.frozen_until = host.frozen_until.min(self.now);
            self.push(self.now, Item::Thaw(n));
        }
    }

    /// Whoever is without power and does not boot gets some.
    pub(super) fn power_all(&mut self) {
        for n in 0..self.hosts.len() {
            if self.hosts[n].machine.is_none() && !self.hosts[n].boots {
                self.boot(n, self.now + super::BOOT_MS);
            }
        }
    }
}
