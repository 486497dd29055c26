//! Faults: power cuts, freezes, link cuts (one-way too), registry trouble, deaths of
//! guests, wishes of the operator at bad moments; and their ends.

use super::registry::Mood;
use super::world::{Event, Role, World};
use crate::mirror::{Micros, PrimaryInput, StandbyInput, Verdict};

/// The end of a fault.
#[derive(Clone, Copy, Debug)]
pub(super) enum Heal {
    Boot(usize),
    Registry,
    Links,
    LinkNoticed(usize),
}

impl World {
    pub(super) fn fault(&mut self) {
        if !self.faults_on {
            return;
        }
        self.report.faults += 1;
        let host = usize::from(self.rng.permille(500));
        // Mostly the host that runs the VM: that is where it hurts.
        let host = if self.rng.permille(400) {
            self.alive_on
        } else {
            host
        };
        // A frozen host takes no news, so only faults from outside (0 to 7) happen to it.
        let frozen = self.hosts.iter().any(|host| host.frozen_until > self.now);
        let last = if frozen { 7 } else { 11 };
        match self.rng.between(0, last) {
            0 => self.crash(host),
            1 | 2 => self.hosts[host].crash_in = Some(self.rng.between(0, 30)),
            3 => self.freeze(host),
            4 => self.hosts[host].freeze_in = Some(self.rng.between(0, 30)),
            5 | 6 => self.cut_link(),
            7 => {
                self.registry.mood = match self.rng.between(0, 2) {
                    0 => Mood::Slow,
                    1 => Mood::Out,
                    _ => Mood::Mute,
                };
                let length = Micros(self.rng.between(20_000, 1_500_000));
                self.after(length, Event::Heal(Heal::Registry));
            }
            8 => self.tell_primary(self.alive_on, PrimaryInput::Unprotect),
            9 => self.tell_primary(self.alive_on, PrimaryInput::Switchover),
            10 => {
                self.harmed[host] = self.now;
                let reason = String::from("by chance");
                let died = PrimaryInput::GuestDied {
                    reason: reason.clone(),
                };
                let died = if self.rng.permille(300) {
                    PrimaryInput::GuestShutdown
                } else {
                    died
                };
                self.tell_machine(host, died, StandbyInput::StandbyGuestDied { reason });
            }
            _ => {
                let for_ = Micros(self.rng.between(1000, 500_000));
                self.tell_machine(
                    host,
                    PrimaryInput::SelfStalled { for_ },
                    StandbyInput::SelfStalled { for_ },
                );
            }
        }
        // Some seeds see one fault at a time, some see them pile up.
        let gap = if self.seed.is_multiple_of(3) {
            self.rng.between(800_000, 1_600_000)
        } else {
            self.rng.between(10_000, 600_000)
        };
        self.after(Micros(gap), Event::Fault);
    }

    /// Power cut: memory is gone, the host comes back some time later.
    pub(super) fn crash(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        if !it.up {
            return;
        }
        self.harmed[host] = self.now;
        let it = &mut self.hosts[host];
        it.up = false;
        it.role = Role::Idle;
        it.life += 1;
        it.crash_in = None;
        it.freeze_in = None;
        let length = Micros(self.rng.between(200_000, 1_500_000));
        self.after(length, Event::Heal(Heal::Boot(host)));
    }

    /// Nothing on the host moves for a while; then it goes on as if nothing had been.
    pub(super) fn freeze(&mut self, host: usize) {
        let length = Micros(self.rng.between(20_000, 1_500_000));
        let it = &mut self.hosts[host];
        if !it.up {
            return;
        }
        it.frozen_until = it.frozen_until.max(self.now + length);
        if let Role::Primary { guest, .. } = &mut it.role {
            guest.account(self.now);
            guest.seen_at = it.frozen_until;
        }
        let life = it.life;
        self.after(length, Event::Continue { host, life });
    }

    fn cut_link(&mut self) {
        let (heartbeats, data) = match self.rng.between(0, 2) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        let reset = self.rng.permille(400);
        let one_way = self
            .rng
            .permille(300)
            .then(|| usize::from(self.rng.permille(500)));
        for from in 0..2 {
            if one_way.is_some_and(|only| only != from) {
                continue;
            }
            let direction = &mut self.directions[from];
            direction.heartbeats_cut |= heartbeats;
            direction.cut |= data;
            direction.reset |= reset;
            if data {
                let notice = Micros(self.rng.between(20_000, 60_000));
                self.after(notice, Event::Heal(Heal::LinkNoticed(from)));
            }
        }
        let length = Micros(self.rng.between(10_000, 1_200_000));
        self.after(length, Event::Heal(Heal::Links));
    }

    pub(super) fn heal(&mut self, heal: Heal) {
        match heal {
            Heal::Boot(host) => {
                let it = &mut self.hosts[host];
                if !it.up {
                    it.up = true;
                    it.frozen_until = self.now;
                    it.last_heard = self.now;
                    it.verdict = Verdict::Alive;
                }
            }
            Heal::Registry => self.registry.mood = Mood::Well,
            Heal::LinkNoticed(host) => {
                if self.directions[host].cut {
                    let reason = String::from("cut");
                    let down = PrimaryInput::LinkDown {
                        reason: reason.clone(),
                    };
                    self.tell_machine(host, down, StandbyInput::LinkDown { reason });
                }
            }
            Heal::Links => {
                for from in 0..2 {
                    let direction = &mut self.directions[from];
                    let was_cut = direction.cut;
                    let stuck = std::mem::take(&mut direction.stuck);
                    *direction = super::world::Direction::default();
                    for event in stuck {
                        let delay = Micros(self.rng.between(100, 30_000));
                        self.after(delay, event);
                    }
                    if was_cut {
                        self.tell_machine(from, PrimaryInput::LinkUp, StandbyInput::LinkUp);
                    }
                }
            }
        }
    }

    /// The liveness phase begins.
    pub(super) fn end_all_faults(&mut self) {
        self.faults_on = false;
        self.heal(Heal::Registry);
        self.heal(Heal::Links);
        for host in 0..2 {
            self.heal(Heal::Boot(host));
            self.hosts[host].crash_in = None;
            self.hosts[host].freeze_in = None;
        }
    }
}
