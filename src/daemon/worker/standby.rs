//! The side that waits: carries out what [`mirror::Standby`](crate::mirror::Standby) decides.

use super::ingress::{self, Way};
use super::parts::Parts;
use super::primary::PrimarySide;
use super::publish::Shared;
use super::receiver::{self, FIRST_EPOCH, Landing};
use super::sender::from_wire;
use super::syncer::Syncer;
use super::verify::audit;
use super::{Env, Peer, WorkerConfig, WorkerEvent};
use crate::api::types::{Failover, Role};
use crate::daemon::clock::{now, now_ns};
use crate::daemon::control::ControlMsg;
use crate::interpose::checkpoint::{HookError, Incoming, patch_state_clock, ticks_per_second};
use crate::interpose::disk::{Disk, Mode};
use crate::interpose::memory::RamImage;
use crate::interpose::net::NetMode;
use crate::mirror::standby::StandbyEnd;
use crate::mirror::{
    Alert, MAX_IN_FLIGHT, Micros, Standby, StandbyAction, StandbyConfig, StandbyInput, Ticket,
    VmRecord,
};
use crate::pool::{Epoch, Generation, HostName};
use crate::registry::Versioned;
use crate::vm::argv::Side;
use crate::vm::qmp::Qmp;
use bytes::Bytes;
use interconnect::epoch::{EpochAssembler, EpochLimits, ReceivedEpoch};
use interconnect::frame::{Frame, FrameKind};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longest sleep of the loop: status stays younger than this.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// How often the status is refreshed under a stream of epochs.
const PUBLISH_EVERY: Micros = Micros::from_millis(25);
/// How often resident memory is looked up.
const MEASURE_EVERY: Micros = Micros::from_millis(1000);
/// From patching the guest's clock into its state until it runs with it: 1.2 to 3 ms
/// measured without an audit. Being wrong by a millisecond is less than a cut costs.
const LOAD_NS: u64 = 2_000_000;
/// Packets kept for the replay: a few hundred full-size frames, what a guest takes in
/// some tens of milliseconds.
const INGRESS_BYTES_MAX: u64 = 4 << 20;

/// A waiting VM.
struct StandbySide<'a> {
    env: &'a Arc<Env>,
    config: &'a WorkerConfig,
    shared: &'a Arc<Shared>,
    inbox: Sender<WorkerEvent>,
    machine: Standby,
    peer: Peer,
    primary: HostName,
    generation: Generation,
    landing: Landing,
    incoming: Option<Incoming>,
    blocks: Option<Bytes>,
    /// Whole, not applied, oldest first.
    whole: VecDeque<Box<ReceivedEpoch>>,
    /// The newest applied epoch, less its pages.
    last: Option<LastApplied>,
    failover: Failover,
    lane_seen: bool,
    /// Given back with each applied epoch, or the receiver takes no more.
    slots: Option<receiver::Slots>,
    published_at: Micros,
    measured_at: Micros,
    resident_bytes: Option<u64>,
    epochs: u64,
    over: bool,
    promoted: Option<(Qmp, Versioned<VmRecord>)>,
    syncer: Syncer,
    parts: Parts,
}

/// What promotion needs of the newest applied epoch.
struct LastApplied {
    epoch: Epoch,
    device_state: Bytes,
    arrived_ns: u64,
    ingress: Vec<Bytes>,
    audit: Option<interconnect::epoch::AuditSums>,
}

fn say<E: std::fmt::Display>(e: E) -> String {
    e.to_string()
}

/// What was applied as a standby may still be in the page cache; a solo VM's flushes
/// cover it, but a guest that never flushes should not depend on the kernel's mood.
fn sync_behind(disks: &[Arc<Disk>]) {
    let disks = disks.to_vec();
    let sync = move || {
        for disk in disks {
            if let Err(e) = disk.sync() {
                tracing::error!("a promoted disk cannot be synced: {e}");
            }
        }
    };
    if let Err(e) = std::thread::Builder::new()
        .name("disk-sync".into())
        .spawn(sync)
    {
        tracing::warn!("no thread to sync the promoted disks: {e}");
    }
}

/// Be the standby until dismissed, broken or promoted; the promoted side goes on as primary.
pub fn run(
    env: &Arc<Env>,
    config: &WorkerConfig,
    primary: HostName,
    generation: Generation,
    inbox: &Receiver<WorkerEvent>,
    shared: &Arc<Shared>,
) -> Option<Box<PrimarySide>> {
    let vm = config.spec.uuid;
    let peer = env.peer(&primary)?;
    let refuse = |reason: String| {
        shared.event(format!("no standby for {primary}: {reason}"));
        peer.say(vm, generation, &ControlMsg::Refused { reason });
    };
    let side = match StandbySide::make(env, config, &primary, generation, shared, peer.clone()) {
        Ok(side) => side,
        Err(reason) => {
            refuse(reason);
            return None;
        }
    };
    side.run(inbox)
}

impl<'a> StandbySide<'a> {
    fn make(
        env: &'a Arc<Env>,
        config: &'a WorkerConfig,
        primary: &HostName,
        generation: Generation,
        shared: &'a Arc<Shared>,
        peer: Peer,
    ) -> Result<Self, String> {
        let spec = &config.spec;
        let inbox = env.routes.inbox(spec.uuid).ok_or("the worker was ended")?;
        // Measured once per process, 20 ms; a promotion has no time for it.
        let _ = ticks_per_second();
        let (parts, control) = Parts::make(env, config, Side::Standby, generation, &inbox)?;
        let incoming = Incoming::prepare(control).map_err(say)?;
        // Measured once in a process, 20 ms that a promotion should not wait for.
        let _ = ticks_per_second();
        let ram = RamImage::open(&parts.paths.ram_file, spec.memory.get()).map_err(say)?;
        let pages = ram.pages();
        let mut assembler = EpochAssembler::new(
            pages,
            EpochLimits {
                disk_bytes: parts.disks.iter().map(|d| d.len()).collect(),
                // An epoch is never larger than everything it could change.
                epoch_bytes_max: spec.memory.get() + 2 * spec.mirror.overlay_max.get(),
                ingress_bytes_max: INGRESS_BYTES_MAX,
            },
        );
        assembler.expect(spec.uuid, generation, FIRST_EPOCH);
        let landing = Landing {
            vm: spec.uuid,
            generation,
            ram: Arc::new(Mutex::new(ram)),
            disks: parts.disks.clone(),
            assembler: Arc::new(Mutex::new(assembler)),
        };
        let machine = Standby::new(
            StandbyConfig {
                me: env.config.name.clone(),
                primary: primary.clone(),
                generation,
                timing: env.timing,
                max_in_flight: MAX_IN_FLIGHT,
            },
            now(),
        );
        let syncer = Syncer::start(parts.disks.clone()).map_err(say)?;
        shared.event(format!("standby for {primary}, generation {generation}"));
        Ok(Self {
            env,
            config,
            shared,
            inbox,
            machine,
            peer,
            primary: primary.clone(),
            generation,
            landing,
            incoming: Some(incoming),
            blocks: None,
            whole: VecDeque::new(),
            last: None,
            failover: Failover {
                kind: "failover".into(),
                ..Failover::default()
            },
            lane_seen: false,
            slots: None,
            published_at: Micros::ZERO,
            measured_at: Micros::ZERO,
            resident_bytes: None,
            epochs: 0,
            over: false,
            promoted: None,
            syncer,
            parts,
        })
    }

    fn run(mut self, inbox: &Receiver<WorkerEvent>) -> Option<Box<PrimarySide>> {
        self.input(StandbyInput::LinkUp);
        self.input(StandbyInput::ShellReady);
        self.publish(true);
        while !self.over && self.promoted.is_none() {
            let wake =
                Duration::from_micros(self.machine.next_wakeup().since(now()).0).min(SLEEP_MAX);
            let state = self.machine.status(now()).state;
            match inbox.recv_timeout(wake) {
                Ok(event) => self.event(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.input(StandbyInput::Tick);
            let after = self.machine.status(now()).state;
            if after != state {
                self.shared
                    .event(format!("{state:?} -> {after:?}").to_lowercase());
            }
            self.publish(after != state);
        }
        let (control, record) = self.promoted.take()?;
        match PrimarySide::over(
            self.env,
            self.config,
            record,
            self.shared,
            self.inbox,
            self.parts,
            control,
            Some(self.primary),
        ) {
            Ok(side) => Some(Box::new(side)),
            Err(e) => {
                self.shared
                    .event(format!("the promoted VM cannot be looked after: {e}"));
                None
            }
        }
    }

    fn event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Command(_, reply) => {
                let _ = reply.send(Err(format!(
                    "this host holds the standby; ask {} who runs the VM",
                    self.primary
                )));
            }
            WorkerEvent::LinkUp(partner) if partner == self.primary => {
                self.peer.say(
                    self.config.spec.uuid,
                    self.generation,
                    &ControlMsg::StandbyHere,
                );
                self.input(StandbyInput::LinkUp);
            }
            WorkerEvent::LinkDown(partner, reason) if partner == self.primary => {
                self.landing.assembler().reset();
                self.input(StandbyInput::LinkDown { reason });
            }
            WorkerEvent::Verdict {
                partner,
                verdict,
                last_heard_ns,
            } if partner == self.primary => {
                if verdict == crate::mirror::Verdict::Lost {
                    self.failover.last_heard_ns = last_heard_ns;
                    self.failover.suspected_ns = now_ns();
                }
                self.input(StandbyInput::PeerVerdict(verdict));
            }
            WorkerEvent::Stalled(for_) => {
                let micros = u64::try_from(for_.as_micros()).unwrap_or(u64::MAX);
                self.input(StandbyInput::SelfStalled {
                    for_: Micros(micros),
                });
            }
            WorkerEvent::Control {
                from,
                generation,
                message,
            } if from == self.primary => {
                self.control_message(generation, message);
            }
            WorkerEvent::Lane { generation, rx } if generation == self.generation => {
                if self.lane_seen {
                    // An attempt has one lane: a second one would be a second history.
                    tracing::warn!("a second lane for the same attempt is refused");
                    return;
                }
                self.lane_seen = true;
                match receiver::start(self.landing.clone(), rx, self.inbox.clone()) {
                    Ok(slots) => self.slots = Some(slots),
                    Err(e) => self.input(StandbyInput::ShellFailed {
                        reason: e.to_string(),
                    }),
                }
            }
            WorkerEvent::Blocks(blocks) => self.blocks = Some(blocks),
            WorkerEvent::Whole(received) => {
                let (generation, epoch) = (received.generation, received.epoch);
                self.whole.push_back(received);
                self.input(StandbyInput::EpochWhole { generation, epoch });
            }
            WorkerEvent::Bad { epoch, reason } => {
                self.landing.assembler().reset();
                self.input(StandbyInput::EpochBad { epoch, reason });
            }
            WorkerEvent::Claim {
                ticket,
                outcome,
                asked_ns,
            } => {
                self.failover.claim_started_ns = asked_ns;
                self.failover.claim_won_ns = now_ns();
                self.input(StandbyInput::ClaimResult { ticket, outcome });
            }
            WorkerEvent::DaemonEnds => {
                self.peer.say(
                    self.config.spec.uuid,
                    self.generation,
                    &ControlMsg::StandbyGone {
                        reason: "its daemon was told to end".into(),
                    },
                );
                self.over = true;
            }
            WorkerEvent::QemuExit { reason } => {
                self.input(StandbyInput::StandbyGuestDied { reason });
            }
            _ => {}
        }
    }

    fn control_message(&mut self, generation: Generation, message: ControlMsg) {
        match message {
            ControlMsg::MirrorConfirmed { epoch } => {
                self.input(StandbyInput::MirrorConfirmed {
                    generation,
                    epoch: Epoch(epoch),
                });
            }
            ControlMsg::Handover { epoch } => {
                self.failover.kind = "switchover".into();
                self.failover.suspected_ns = now_ns();
                self.failover.last_heard_ns = self.failover.suspected_ns;
                self.failover.claim_started_ns = self.failover.suspected_ns;
                self.failover.claim_won_ns = self.failover.suspected_ns;
                self.input(StandbyInput::Handover {
                    generation,
                    epoch: Epoch(epoch),
                });
            }
            ControlMsg::PrimaryGone { reason } => {
                self.failover.suspected_ns = now_ns();
                self.failover.last_heard_ns = self.failover.suspected_ns;
                self.input(StandbyInput::PrimaryGone { reason });
            }
            // One of an earlier attempt may come late.
            ControlMsg::Dismiss if generation < self.generation => {}
            ControlMsg::Dismiss => self.input(StandbyInput::Dismissed),
            other => tracing::warn!(?other, "not a message for a standby; dropped"),
        }
    }

    fn input(&mut self, input: StandbyInput) {
        self.machine.handle(input, now());
        while let Some(action) = self.machine.poll_action() {
            if let Some(answer) = self.carry_out(action) {
                self.machine.handle(answer, now());
            }
        }
    }

    fn carry_out(&mut self, action: StandbyAction) -> Option<StandbyInput> {
        let vm = self.config.spec.uuid;
        match action {
            StandbyAction::TellReady => self.peer.say(vm, self.generation, &ControlMsg::Ready),
            StandbyAction::Ack { generation, epoch } => {
                let ack = Frame::empty(FrameKind::EpochAck, vm, generation, epoch);
                if let Err(e) = self.peer.interconnect.control(ack) {
                    tracing::info!(%epoch, "an acknowledgement could not be sent: {e}");
                }
            }
            StandbyAction::Apply { epoch } => return Some(self.apply(epoch)),
            StandbyAction::DropIncomplete => {
                let mut assembler = self.landing.assembler();
                assembler.reset();
            }
            StandbyAction::Claim {
                ticket,
                expected,
                value,
            } => {
                let reply = self.claim_reply(ticket);
                self.env.claims.claim(vm, Some(expected), value, reply);
            }
            StandbyAction::ReadRecord { ticket } => {
                let reply = self.claim_reply(ticket);
                self.env.claims.read(vm, reply);
            }
            StandbyAction::Promote {
                generation,
                epoch,
                record,
            } => {
                return Some(match self.promote(generation, epoch) {
                    Ok(control) => {
                        self.promoted = Some((control, record));
                        StandbyInput::Promoted
                    }
                    Err(reason) => StandbyInput::PromotionFailed { reason },
                });
            }
            StandbyAction::StandDown { why } => {
                self.over = true;
                let words = match why {
                    StandbyEnd::Dismissed => "dismissed".to_owned(),
                    StandbyEnd::NotNamed { reason } => reason,
                    StandbyEnd::Broken { reason } => {
                        let message = ControlMsg::StandbyGone {
                            reason: reason.clone(),
                        };
                        self.peer.say(vm, self.generation, &message);
                        reason
                    }
                };
                self.shared.event(format!("standby stands down: {words}"));
            }
            StandbyAction::TellBroken { reason } => {
                self.shared.event(format!("standby broken: {reason}"));
                self.peer
                    .say(vm, self.generation, &ControlMsg::StandbyGone { reason });
            }
            StandbyAction::Alert(alert) => match alert {
                Alert::Refused { what, reason } => {
                    self.shared.event(format!("{what} refused: {reason}"));
                }
                other => self.shared.event(format!("{other:?}")),
            },
        }
        None
    }

    fn claim_reply(&self, ticket: Ticket) -> super::super::claims::Reply {
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

    /// Put a whole epoch into RAM and disks. An error here leaves a mixture behind: the
    /// standby is broken then and must not be promoted.
    fn apply(&mut self, epoch: Epoch) -> StandbyInput {
        match self.try_apply(epoch) {
            Ok(()) => StandbyInput::Applied { epoch },
            Err(reason) => StandbyInput::StandbyGuestDied {
                reason: format!("epoch {epoch} could not be applied: {reason}"),
            },
        }
    }

    fn try_apply(&mut self, epoch: Epoch) -> Result<(), String> {
        let received = self
            .whole
            .pop_front()
            .filter(|r| r.epoch == epoch)
            .ok_or("it is not here")?;
        let arrived_ns = now_ns();
        {
            let mut ram = self.landing.ram();
            for (index, content) in received.pages() {
                Landing::put_page(&mut ram, index, content)?;
            }
        }
        let ram_ns = now_ns();
        let received = *received;
        let mut per_disk = vec![Vec::new(); self.landing.disks.len()];
        for write in received.disk {
            let (index, write) = from_wire(write);
            per_disk
                .get_mut(index)
                .ok_or("a write for a disk the VM has not")?
                .push(write);
        }
        for (disk, writes) in self.landing.disks.iter().zip(&per_disk) {
            disk.apply(self.generation, writes).map_err(say)?;
            // What was seeded is synced after the first.
            if !writes.is_empty() || epoch == FIRST_EPOCH {
                self.syncer.written();
            }
        }
        let (ram_us, disk_us) = ((ram_ns - arrived_ns) / 1000, (now_ns() - ram_ns) / 1000);
        tracing::debug!(%epoch, ram_us, disk_us, "epoch applied");
        if let Some(slots) = &self.slots {
            slots.give_back();
        }
        self.epochs += 1;
        self.last = Some(LastApplied {
            epoch,
            device_state: received.device_state,
            arrived_ns,
            ingress: received.ingress,
            audit: received.meta.audit,
        });
        Ok(())
    }

    fn promote(&mut self, generation: Generation, epoch: Epoch) -> Result<Qmp, String> {
        let last = self
            .last
            .take()
            .filter(|l| l.epoch == epoch)
            .ok_or_else(|| format!("epoch {epoch} is not the newest applied one"))?;
        let prefix = self
            .blocks
            .take()
            .ok_or("the RAM blocks outside the RAM file never came")?;
        let incoming = self
            .incoming
            .take()
            .ok_or("this standby was promoted before")?;
        self.failover.promote_started_ns = now_ns();
        self.failover.from_epoch = epoch.0;
        self.failover.from_generation = self.generation.0;
        let mut state = last.device_state.to_vec();
        let advance_ns = now_ns().saturating_sub(last.arrived_ns) + LOAD_NS;
        patch_state_clock(&mut state, advance_ns, ticks_per_second()).map_err(say)?;
        let (parts, landing, failover) = (&self.parts, &self.landing, &mut self.failover);
        let mut hook = || -> Result<(), HookError> {
            if let Some(sums) = &last.audit {
                audit(landing, &parts.images, sums, failover);
            }
            for disk in &parts.disks {
                disk.set_mode(Mode::Direct, generation)?;
            }
            for port in &parts.ports {
                port.set_mode(NetMode::Direct, generation)?;
            }
            Ok(())
        };
        let (control, timings) = incoming.promote(&prefix, &state, &mut hook).map_err(say)?;
        self.failover.running_ns = now_ns();
        for port in &self.parts.ports {
            port.announce();
        }
        sync_behind(&self.parts.disks);
        self.failover.replayed = self.replay(last.ingress);
        self.shared
            .event(format!("promoted from epoch {epoch}: {timings:?}"));
        self.shared.failover(self.failover.clone());
        Ok(control)
    }

    /// Let out what the old primary held of the epoch this side goes on from, and give the
    /// guest again what it may have been given after its checkpoint: the open epoch's
    /// frames, and the last one's (a frame that reached QEMU while the guest stood still is
    /// in no checkpoint). Networks may repeat frames; TCP drops what it has.
    fn replay(&mut self, last: Vec<Bytes>) -> u64 {
        let mut ways = vec![(Vec::new(), Vec::new()); self.parts.ports.len()];
        for (way, nic, frame) in last.into_iter().filter_map(ingress::split) {
            match (way, ways.get_mut(nic)) {
                (Way::Out, Some((out, _))) => out.push(frame),
                (Way::In, Some((_, again))) => again.push(frame),
                (_, None) => {}
            }
        }
        // The open epoch was not committed: nothing of what its guest sent may leave.
        let open = self.landing.assembler().open_ingress();
        for (way, nic, frame) in open.into_iter().filter_map(ingress::split) {
            if let (Way::In, Some((_, again))) = (way, ways.get_mut(nic)) {
                again.push(frame);
            }
        }
        let mut replayed = 0;
        for (port, (out, again)) in self.parts.ports.iter().zip(ways) {
            replayed += (port.let_out(&out) + again.len()) as u64;
            port.inject(again);
        }
        replayed
    }

    fn publish(&mut self, force: bool) {
        let at = now();
        if !force && at.since(self.published_at) < PUBLISH_EVERY {
            return;
        }
        self.published_at = at;
        if at.since(self.measured_at) >= MEASURE_EVERY {
            self.measured_at = at;
            let held = self.landing.assembler().held_bytes();
            let file = self.landing.ram().resident_bytes().unwrap_or(0);
            self.resident_bytes =
                super::busy::private_bytes(self.parts.qemu.pid()).map(|qemu| qemu + file + held);
        }
        let status = self.machine.status(now());
        self.shared.update(|s| {
            s.role = Role::Standby;
            s.state = format!("{:?}", status.state).to_lowercase();
            s.protection = "mirrored".into();
            s.mirrored = false;
            s.partner = Some(self.primary.clone());
            s.generation = status.generation.0;
            s.epoch = status.acked.0;
            s.committed = status.applied.0;
            s.lag_us = status.since_ack.map(|t| t.0);
            s.qemu_pid = i32::try_from(self.parts.qemu.pid()).ok();
            s.resident_bytes = self.resident_bytes;
            s.disks = self
                .parts
                .images
                .iter()
                .map(|p| p.display().to_string())
                .collect();
            s.warnings = Vec::new();
            s.console = None;
        });
    }
}
