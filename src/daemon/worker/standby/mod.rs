//! The side that waits: carries out what [`mirror::Standby`](crate::mirror::Standby) decides.
//!
//! Here is what reaches it; [`acting`] does what the machine says, [`applier`] puts epochs
//! where they belong, [`promoting`] makes the VM run, [`showing`] tells.

mod acting;
pub mod applier;
mod promoting;
mod showing;

use self::applier::{Applier, LastApplied};
use super::parts::Parts;
use super::primary::PrimarySide;
use super::publish::Shared;
use super::receiver::{self, FIRST_EPOCH, Landing};
use super::syncer::Syncer;
use super::{Env, Peer, WorkerConfig, WorkerEvent};
use crate::api::types::Failover;
use crate::daemon::clock::{now, now_ns};
use crate::daemon::control::ControlMsg;
use crate::interpose::checkpoint::{Incoming, ticks_per_second};
use crate::interpose::memory::RamImage;
use crate::mirror::{MAX_IN_FLIGHT, Micros, Standby, StandbyConfig, StandbyInput, VmRecord};
use crate::pool::{Epoch, Generation, HostName};
use crate::registry::Versioned;
use crate::vm::argv::Side;
use crate::vm::qmp::Qmp;
use bytes::Bytes;
use interconnect::epoch::{EpochAssembler, EpochLimits, ReceivedEpoch};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longest sleep of the loop: status stays younger than this.
const SLEEP_MAX: Duration = Duration::from_millis(100);
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
    /// Before the parts: it writes to their RAM and disks.
    applier: Applier,
    failover: Failover,
    lane_seen: bool,
    /// Given back with each applied epoch, or the receiver takes no more.
    slots: Option<receiver::Slots>,
    published_at: Micros,
    measured_at: Micros,
    resident_bytes: Option<u64>,
    /// Of the RAM file, as last seen.
    ram_bytes: u64,
    epochs: u64,
    over: bool,
    promoted: Option<(Qmp, Versioned<VmRecord>)>,
    parts: Parts,
}

fn say<E: std::fmt::Display>(e: E) -> String {
    e.to_string()
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
        shared.disks(parts.pulses());
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
        let applier = Applier::start(landing.clone(), syncer, inbox.clone()).map_err(say)?;
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
            applier,
            failover: Failover {
                kind: "failover".into(),
                ..Failover::default()
            },
            lane_seen: false,
            slots: None,
            published_at: Micros::ZERO,
            measured_at: Micros::ZERO,
            resident_bytes: None,
            ram_bytes: 0,
            epochs: 0,
            over: false,
            promoted: None,
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
            WorkerEvent::Applied { epoch, outcome } => self.applied(epoch, outcome),
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
            WorkerEvent::DaemonEnds | WorkerEvent::Isolate { .. } => {
                self.peer.say(
                    self.config.spec.uuid,
                    self.generation,
                    &ControlMsg::StandbyGone {
                        reason: "its host was told to end, or may run nothing any more".into(),
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
}
