//! What a primary does when its machine says so.

use super::{GuestOff, PrimarySide, say};
use crate::daemon::claims::Reply;
use crate::daemon::clock::{now, now_ns};
use crate::daemon::control::ControlMsg;
use crate::daemon::worker::attempt::InFlight;
use crate::daemon::worker::cutting::Taking;
use crate::daemon::worker::sender::EpochJob;
use crate::daemon::worker::{WorkerEvent, ingress};
use crate::interpose::net::{NetMode, NetPort};
use crate::mirror::primary::{PrimaryEnd, PrimaryState};
use crate::mirror::{Alert, Micros, PrimaryAction, PrimaryInput, Ticket};
use crate::pool::{Epoch, Generation};
use bytes::Bytes;
use interconnect::epoch::EpochMeta;
use std::sync::Arc;

impl PrimarySide {
    /// Tell the machine, carry out what it says.
    pub(super) fn input(&mut self, input: PrimaryInput) {
        self.machine.handle(input, now());
        while let Some(action) = self.machine.poll_action() {
            if let Some(answer) = self.carry_out(action) {
                self.machine.handle(answer, now());
            }
        }
    }

    fn carry_out(&mut self, action: PrimaryAction) -> Option<PrimaryInput> {
        match action {
            PrimaryAction::PrepareStandby {
                partner,
                generation,
            } => {
                return self.prepare_standby(&partner, generation);
            }
            PrimaryAction::BeginSeeding => return self.begin_seeding(),
            PrimaryAction::EndSeeding { reason } => {
                if let Some(attempt) = &self.attempt {
                    attempt.give_up();
                }
                self.shared.event(format!("seeding ended: {reason}"));
            }
            PrimaryAction::Cut {
                epoch,
                stay_stopped,
            } => return Some(self.cut(epoch, stay_stopped)),
            PrimaryAction::Release { through, until } => return self.release(through, until),
            PrimaryAction::ConfirmMirrored { generation, epoch } => {
                self.say(generation, &ControlMsg::MirrorConfirmed { epoch: epoch.0 });
            }
            PrimaryAction::Claim {
                ticket,
                expected,
                value,
            } => {
                let reply = self.claim_reply(ticket);
                self.env
                    .claims
                    .claim(self.config.spec.uuid, Some(expected), value, reply);
            }
            PrimaryAction::ReadRecord { ticket } => {
                let reply = self.claim_reply(ticket);
                self.env.claims.read(self.config.spec.uuid, reply);
            }
            PrimaryAction::HoldStill { reason } => {
                self.shared
                    .event(format!("the guest stands still: {reason}"));
                // QEMU's `stop` waits for the guest's writes: none may be held back now.
                for disk in &self.parts.disks {
                    disk.checkpoint_begins();
                }
                if let Err(e) = self.checkpointer.stop() {
                    tracing::error!("the guest cannot be held still: {e}");
                }
            }
            PrimaryAction::Resume => {
                self.shared.event("the guest goes on".into());
                if let Err(e) = self.checkpointer.cont() {
                    tracing::error!("the guest cannot go on: {e}");
                }
                for disk in &self.parts.disks {
                    disk.checkpoint_ends();
                }
            }
            PrimaryAction::HoldBack => self.hold_back(),
            PrimaryAction::LetGo => self.let_go(),
            PrimaryAction::GoSolo { generation } => self.go_solo(generation),
            PrimaryAction::DismissStandby => {
                let attempt = self
                    .attempt
                    .as_ref()
                    .map(|a| (a.peer.clone(), a.generation));
                if let Some((peer, generation)) = attempt.or_else(|| self.last_peer.take()) {
                    peer.say(self.config.spec.uuid, generation, &ControlMsg::Dismiss);
                }
            }
            PrimaryAction::Handover { generation, epoch } => {
                self.say(generation, &ControlMsg::Handover { epoch: epoch.0 });
            }
            PrimaryAction::TellGone { reason } => {
                if let Some(generation) = self.attempt.as_ref().map(|a| a.generation) {
                    self.say(generation, &ControlMsg::PrimaryGone { reason });
                }
            }
            PrimaryAction::StandDown { why } => self.stand_down(&why),
            PrimaryAction::Alert(alert) => self.alert(&alert),
        }
        None
    }

    fn say(&self, generation: Generation, message: &ControlMsg) {
        if let Some(attempt) = &self.attempt {
            attempt.peer.say(self.config.spec.uuid, generation, message);
        }
    }

    fn claim_reply(&self, ticket: Ticket) -> Reply {
        let inbox = self.inbox.clone();
        let asked_ns = now_ns();
        Box::new(move |outcome| {
            let _ = inbox.send(WorkerEvent::Claim {
                ticket,
                outcome,
                asked_ns,
            });
        })
    }

    fn cut(&mut self, epoch: Epoch, stay_stopped: bool) -> PrimaryInput {
        self.guest_events();
        if self.guest_off != GuestOff::No {
            // A standby must not wake a guest that is off: it would hang where it went down.
            return PrimaryInput::CutFailed {
                epoch,
                reason: "the guest has powered itself off".into(),
            };
        }
        let Some(attempt) = &mut self.attempt else {
            return PrimaryInput::CutFailed {
                epoch,
                reason: "there is no attempt to mirror".into(),
            };
        };
        let (Some(tracker), Some(mut staging)) = (&mut attempt.tracker, attempt.spare.pop()) else {
            return PrimaryInput::CutFailed {
                epoch,
                reason: "no staging is free".into(),
            };
        };
        let begun_ns = now_ns();
        self.busy.sample(begun_ns);
        for disk in &self.parts.disks {
            disk.checkpoint_begins();
        }
        let mut taking = Taking {
            epoch,
            generation: attempt.generation,
            ports: &self.parts.ports,
            disks: &self.parts.disks,
            tracker,
            staging: &mut staging,
            ingress: &self.parts.ingress,
            writes: Vec::new(),
            collected: Default::default(),
        };
        let result = if stay_stopped {
            self.checkpointer.cut_and_stay(&mut taking)
        } else {
            self.checkpointer.cut(&mut taking)
        };
        let cut = match result {
            Ok(cut) => cut,
            Err(e) => {
                taking.undo();
                for disk in &self.parts.disks {
                    disk.checkpoint_ends();
                }
                attempt.spare.push(staging);
                let reason = e.to_string();
                if e.monitor_is_gone() {
                    // Going solo with it would depose the standby, which is whole, for a
                    // guest that is dead or that nobody can ever stop or resume again.
                    self.parts.qemu.kill();
                    let exit = self.parts.qemu.wait_exit(None);
                    let reason = exit.map_or(reason, |exit| exit.to_string());
                    return PrimaryInput::GuestDied { reason };
                }
                return PrimaryInput::CutFailed { epoch, reason };
            }
        };
        let (writes, collected) = (taking.writes, taking.collected);
        let resumed_ns = now_ns();
        self.busy.paused(cut.timings.pause_us * 1000);
        let mut base = Vec::new();
        if epoch.0 == 1 {
            base = std::mem::take(&mut attempt.base);
            for (disk, ranges) in self.parts.disks.iter().zip(&mut base) {
                ranges.extend(disk.take_dirty());
                disk.end_dirty_tracking();
            }
        }
        let pages = staging.len_pages();
        let flush = writes.iter().any(|w| w.flushed);
        let bytes: u64 = pages * 4096 + writes.iter().map(|w| w.bytes).sum::<u64>();
        attempt.in_flight.push_back(InFlight {
            epoch,
            // Before epoch 1 nothing was promised, so nothing lagged.
            began_ns: if epoch.0 == 1 {
                begun_ns
            } else {
                self.resumed_ns
            },
            resumed_ns,
            timings: cut.timings,
            capture_us: collected.wall_us,
            pages,
            wire_bytes: 0,
            encode: None,
        });
        self.resumed_ns = resumed_ns;
        let egress = held_egress(&self.parts.ports, epoch);
        let job = EpochJob {
            epoch,
            staging,
            writes: writes.into_iter().map(|w| w.writes).collect(),
            base,
            device_state: cut.device_state,
            egress,
            meta: EpochMeta {
                flush,
                clock_ns: begun_ns,
                guest_pages: self.config.spec.memory.get() / 4096,
                audit: None,
            },
        };
        if let Some(sender) = &attempt.sender
            && let Err(job) = sender.send(job)
        {
            attempt.spare.push(job.staging);
            tracing::warn!(%epoch, "the sender has ended; its reason came before");
        }
        let busy = PrimaryInput::GuestBusy {
            permille: self.busy.permille(),
            crowding: Micros(self.busy.crowding_ns() / 1000),
        };
        self.machine.handle(busy, now());
        PrimaryInput::CutDone {
            epoch,
            pause: Micros(cut.timings.pause_us),
            bytes,
            pages,
        }
    }

    /// Packets first, port by port, looking at the clock before each; then the overlays.
    fn release(&mut self, through: Epoch, until: Micros) -> Option<PrimaryInput> {
        for port in &self.parts.ports {
            let late = now();
            if late >= until {
                return Some(PrimaryInput::SelfStalled {
                    for_: late.since(until),
                });
            }
            port.release(through);
        }
        for disk in &self.parts.disks {
            disk.commit(through);
        }
        None
    }

    /// As for `HoldStill`, but without a word: it happens many times a second.
    fn hold_back(&mut self) {
        // A guest that is off would be woken by letting it go.
        if self.guest_off != GuestOff::No {
            return;
        }
        for disk in &self.parts.disks {
            disk.checkpoint_begins();
        }
        match self.checkpointer.stop() {
            Ok(()) => self.held_back_ns = Some(now_ns()),
            Err(e) => {
                tracing::error!("the guest cannot be held back: {e}");
                self.disks_go_on();
            }
        }
    }

    fn let_go(&mut self) {
        let Some(since) = self.held_back_ns.take() else {
            return;
        };
        // The time it stood is no time in which it wanted nothing.
        self.busy.stood(now_ns().saturating_sub(since));
        self.guest_events();
        if self.guest_off != GuestOff::No {
            return self.disks_go_on();
        }
        if let Err(e) = self.checkpointer.cont() {
            tracing::error!("the guest cannot be let go: {e}");
        }
        self.disks_go_on();
    }

    fn disks_go_on(&self) {
        for disk in &self.parts.disks {
            disk.checkpoint_ends();
        }
    }

    fn go_solo(&mut self, generation: Generation) {
        for port in &self.parts.ports {
            if let Err(e) = port.set_mode(NetMode::Direct, generation) {
                tracing::error!("a port cannot go direct: {e}");
            }
        }
        for disk in &self.parts.disks {
            disk.end_dirty_tracking();
            if let Err(e) = disk.go_direct(generation) {
                tracing::error!("a disk cannot go direct: {e}");
            }
        }
        self.parts.ingress.close();
        if let Some(attempt) = self.attempt.take() {
            attempt.give_up();
            self.last_peer = Some((attempt.peer.clone(), attempt.generation));
            if self.machine.status(now()).state == PrimaryState::Solo {
                self.shared
                    .event(format!("runs unmirrored, generation {generation}"));
            }
            if self.solo.suspected_ns != 0 {
                let mut solo = std::mem::take(&mut self.solo);
                solo.running_ns = now_ns();
                solo.from_generation = attempt.generation.0;
                self.shared.failover(solo);
            }
        }
        self.shared.update(|s| s.seeding = None);
    }

    fn stand_down(&mut self, why: &PrimaryEnd) {
        let words = match why {
            PrimaryEnd::Deposed { by } => format!("stands down: {by} runs the VM now"),
            PrimaryEnd::HandedOver { to } => format!("handed over to {to}"),
            PrimaryEnd::GuestGone => "stands down: the guest is gone".into(),
        };
        let generation = self.machine.status(now()).generation;
        for port in &self.parts.ports {
            if let Err(e) = port.set_mode(NetMode::Stopped, generation) {
                tracing::error!("a port cannot be stopped: {e}");
            }
        }
        self.parts.qemu.kill();
        for disk in &self.parts.disks {
            let stopped = disk
                .set_mode(crate::interpose::disk::Mode::Stopped, generation)
                .and_then(|()| disk.discard_uncommitted())
                .and_then(|_| disk.wait_written());
            if let Err(e) = stopped {
                tracing::error!("a disk cannot be stopped cleanly: {e}");
            }
        }
        if let Some(attempt) = self.attempt.take() {
            attempt.give_up();
        }
        self.shared.event(words);
        self.over = true;
    }

    fn alert(&mut self, alert: &Alert) {
        match alert {
            Alert::Lagging { lag } => tracing::warn!("replication lag is {} ms", lag.0 / 1000),
            Alert::Overloaded { bytes, drains_in } => self.shared.event(format!(
                "the guest dirties more than the links carry: {}",
                super::showing::behind(*bytes, *drains_in)
            )),
            Alert::NotMirrored { reason } => self.shared.event(format!("not mirrored: {reason}")),
            Alert::Refused { what, reason } => {
                self.shared.event(format!("{what} refused: {reason}"))
            }
            other => self.shared.event(format!("{other:?}")),
        }
    }

    /// Stop the guest outside a cut.
    pub(in crate::daemon::worker) fn checkpointer_stop(&mut self) -> Result<(), String> {
        self.checkpointer.stop().map_err(say)
    }

    /// Let it run again.
    pub(in crate::daemon::worker) fn checkpointer_cont(&mut self) -> Result<(), String> {
        self.checkpointer.cont().map_err(say)
    }
}

/// What the gates hold of `epoch`, as it travels with it.
fn held_egress(ports: &[Arc<NetPort>], epoch: Epoch) -> Vec<Bytes> {
    let share = ingress::EGRESS_BYTES_MAX / ports.len().max(1);
    let of_port = |(nic, port): (usize, &Arc<NetPort>)| {
        let frames = port.held_of(epoch, share);
        frames
            .into_iter()
            .filter_map(move |frame| ingress::egress(nic, &frame))
    };
    ports.iter().enumerate().flat_map(of_port).collect()
}
