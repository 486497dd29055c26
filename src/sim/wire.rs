//! What crosses between the hosts: delays, losses, lanes, and how a shell takes it in.

use super::GuestState;
use super::shell::WHOLE;
use super::world::{Event, Message, Role, StandbyCopy, World};
use crate::mirror::{
    APPLY_BACKLOG_MAX, MAX_IN_FLIGHT, Micros, PrimaryInput, Standby, StandbyConfig, StandbyInput,
    Timing, Verdict,
};
use crate::pool::{Epoch, Generation};

impl World {
    pub(super) fn send(&mut self, from: usize, message: Message) {
        self.send_after(Micros::ZERO, from, message);
    }

    /// Send what takes `through` to get onto the wire.
    pub(super) fn send_after(&mut self, through: Micros, from: usize, message: Message) {
        let from_life = self.hosts[from].life;
        let event = Event::Deliver {
            to: 1 - from,
            from_life,
            message,
        };
        // A lost packet is sent again, later; lanes overtake each other.
        let slow = self.rng.permille(30);
        let delay = if slow {
            self.rng.between(2000, 25_000)
        } else {
            self.rng.between(100, 900)
        };
        let direction = &mut self.directions[from];
        if direction.cut {
            if !direction.reset {
                direction.stuck.push(event);
            }
            return;
        }
        self.after(through + Micros(delay), event);
    }

    pub(super) fn deliver(&mut self, to: usize, message: Message) {
        let standby_of = match &self.hosts[to].role {
            Role::Standby { attempt, .. } => Some(*attempt),
            _ => None,
        };
        let primary_of = match &self.hosts[to].role {
            Role::Primary { attempt, .. } => Some(*attempt),
            _ => None,
        };
        match message {
            Message::Prepare(generation) => self.prepare(to, generation),
            Message::Part {
                generation,
                epoch,
                part,
                state,
            } if standby_of == Some(generation) => self.part(to, generation, epoch, part, state),
            // The machine itself has to tell old acknowledgements from new ones.
            Message::Ack(generation, epoch) => {
                self.tell_primary(to, PrimaryInput::Acked { generation, epoch })
            }
            Message::Ready(g) if primary_of == Some(g) => {
                self.tell_primary(to, PrimaryInput::StandbyReady)
            }
            Message::Refused(g) if primary_of == Some(g) => {
                self.tell_primary(
                    to,
                    PrimaryInput::StandbyRefused {
                        reason: "occupied".into(),
                    },
                );
            }
            Message::StandbyGone(g) if primary_of == Some(g) => {
                self.tell_primary(
                    to,
                    PrimaryInput::StandbyGone {
                        reason: "it says so".into(),
                    },
                );
            }
            Message::Confirm(generation, epoch) => {
                self.tell_standby(to, StandbyInput::MirrorConfirmed { generation, epoch });
            }
            Message::Handover(session, generation, epoch) if standby_of == Some(session) => {
                self.tell_standby(to, StandbyInput::Handover { generation, epoch });
            }
            Message::Gone(g) if standby_of == Some(g) => {
                self.tell_standby(
                    to,
                    StandbyInput::PrimaryGone {
                        reason: "it says so".into(),
                    },
                );
            }
            Message::Dismiss(g) if standby_of == Some(g) => {
                self.tell_standby(to, StandbyInput::Dismissed)
            }
            _ => {}
        }
    }

    fn prepare(&mut self, host: usize, generation: Generation) {
        match &self.hosts[host].role {
            Role::Primary { .. } => return self.send(host, Message::Refused(generation)),
            Role::Standby { attempt, .. } if *attempt >= generation => return,
            Role::Standby { .. } | Role::Idle => {}
        }
        let config = StandbyConfig {
            me: self.hosts[host].name.clone(),
            primary: self.hosts[1 - host].name.clone(),
            generation,
            timing: Timing::DEFAULT,
            max_in_flight: MAX_IN_FLIGHT,
        };
        let machine = Box::new(Standby::new(config, self.now));
        self.hosts[host].life += 1;
        self.hosts[host].role = Role::Standby {
            machine,
            attempt: generation,
            copy: StandbyCopy::default(),
        };
        let (life, ok) = (self.hosts[host].life, !self.rng.permille(20));
        let delay = Micros(self.rng.between(1000, 20_000));
        self.after(delay, Event::StandbyUp { host, life, ok });
        if self.hosts[host].verdict == Verdict::Lost {
            self.tell_standby(host, StandbyInput::PeerVerdict(Verdict::Lost));
        }
    }

    fn part(
        &mut self,
        host: usize,
        generation: Generation,
        epoch: Epoch,
        part: u8,
        state: GuestState,
    ) {
        let Role::Standby { copy, .. } = &mut self.hosts[host].role else {
            return;
        };
        let (parts, _) = copy.buffered.entry(epoch.0).or_insert((0, state));
        *parts |= 1 << part;
        let whole = *parts == WHOLE;
        let buffered = copy.buffered.len();
        if buffered as u64 > MAX_IN_FLIGHT as u64 + APPLY_BACKLOG_MAX {
            self.violated(
                "bounded",
                format!("{buffered} epochs are buffered on the standby"),
            );
        }
        if whole {
            let newest = self.whole.entry(generation).or_default();
            if epoch == newest.next() {
                *newest = epoch;
            }
            self.tell_standby(host, StandbyInput::EpochWhole { generation, epoch });
        }
    }
}
