//! Outside the hosts: a client that counts its answers, and an operator.

use super::GuestState;
use super::world::{Client, Event, Host, Role, World};
use crate::mirror::{Micros, PrimaryInput, PrimaryState, StandbyState, VmRecord};

impl World {
    pub(super) fn request(&mut self, number: u64, story: u64) {
        if story != self.client.story {
            return;
        }
        for host in 0..2 {
            if !self.hosts[host].up || self.hosts[host].frozen_until > self.now {
                continue;
            }
            let Role::Primary { guest, .. } = &mut self.hosts[host].role else {
                continue;
            };
            if guest.paused || guest.held_back {
                // Waits in the virtual NIC.
                let delay = Micros(self.rng.between(300, 2000));
                self.after(delay, Event::Request { number, story });
                continue;
            }
            if !guest.runs() {
                continue;
            }
            let Some(answer) = guest.state.serve(number) else {
                continue;
            };
            if guest.gated {
                let epoch = guest.epoch;
                guest.gate.push((epoch, answer));
                self.tell_primary(host, PrimaryInput::OutputWaiting);
            } else {
                self.leaves_direct(host, answer);
            }
        }
    }

    pub(super) fn answered(&mut self, number: u64, story: u64) {
        if story != self.client.story || number != self.client.next {
            return;
        }
        self.report.answers += 1;
        self.client.acked = number;
        self.client.next += 1;
        let number = self.client.next;
        let think = Micros(self.rng.between(500, 15_000));
        self.after(think, Event::Request { number, story });
        self.after(
            think + Micros(200_000),
            Event::ClientResend { number, story },
        );
    }

    pub(super) fn operator(&mut self) {
        let delay = Micros(self.rng.between(50_000, 300_000));
        self.after(delay, Event::Operator);
        // A standby without a whole epoch is of no use once its primary is gone; the real
        // shell learns from the broken session.
        let useless = |host: &Host| match &host.role {
            Role::Idle => true,
            Role::Primary { .. } => false,
            Role::Standby { machine, .. } => matches!(
                machine.status(self.now).state,
                StandbyState::Preparing | StandbyState::Seeding
            ),
        };
        if self.hosts.iter().all(useless) {
            return self.restart();
        }
        for host in 0..2 {
            let Role::Primary { machine, .. } = &self.hosts[host].role else {
                continue;
            };
            if machine.status(self.now).state == PrimaryState::Solo && self.hosts[1 - host].up {
                let partner = self.hosts[1 - host].name.clone();
                self.tell_primary(host, PrimaryInput::Protect { partner });
            }
        }
    }

    /// Nothing holds the VM any more: start it from its disk, as high availability would.
    pub(super) fn restart(&mut self) {
        let Some(host) =
            (0..2).find(|host| self.hosts[*host].up && self.hosts[*host].frozen_until <= self.now)
        else {
            return;
        };
        self.check_lost();
        self.named_at = self.now;
        self.report.restarts += 1;
        let record = VmRecord::started(
            self.hosts[host].name.clone(),
            Some(&self.registry.record.value),
        );
        self.registry.put(record);
        let story = self.client.story + 1;
        self.client = Client {
            story,
            next: 1,
            acked: 0,
        };
        let record = self.registry.record.clone();
        self.start_primary(host, record, GuestState::default());
        self.after(Micros(100), Event::Request { number: 1, story });
        self.after(Micros(200_000), Event::ClientResend { number: 1, story });
    }
}
