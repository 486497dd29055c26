//! The side that runs the VM: carries out what [`mirror::Primary`](crate::mirror::Primary) decides.
//!
//! Here is what reaches it; [`acting`] does what the machine says, [`showing`] tells.

mod acting;
mod showing;

use super::attempt::Attempt;
use super::busy::BusyMeter;
use super::parts::{self, Parts};
use super::publish::Shared;
use super::receiver::FIRST_EPOCH;
use super::sender::SentEpoch;
use super::{Env, Peer, VmCommand, WorkerConfig, WorkerEvent};
use crate::api::types::Failover;
use crate::daemon::clock::{now, now_ns};
use crate::daemon::control::ControlMsg;
use crate::interpose::checkpoint::Checkpointer;
use crate::mirror::primary::PrimaryState;
use crate::mirror::{
    MAX_IN_FLIGHT, Micros, Policy, Primary, PrimaryConfig, PrimaryInput, Verdict, VmRecord,
};
use crate::pool::{Epoch, Generation, HostName};
use crate::registry::Versioned;
use crate::vm::admission;
use crate::vm::argv::Side;
use crate::vm::qmp::Qmp;
use serde_json::json;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

/// First wait before mirroring is tried again after a failed attempt.
const RETRY_MIN: Micros = Micros::from_millis(500);
/// Longest wait between attempts.
const RETRY_MAX: Micros = Micros::from_millis(15_000);
/// Longest sleep of the loop: status stays younger than this.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// How often the vCPUs are looked at while output waits for them to be idle: a look costs
/// some 20 µs, and a client waits half of this longer on average.
const IDLE_LOOK: Duration = Duration::from_micros(400);
/// How often a busy mirrored VM's status is refreshed.
const PUBLISH_EVERY: Micros = Micros::from_millis(25);
/// How often what is expensive to know (resident memory) is looked up.
const MEASURE_EVERY: Micros = Micros::from_millis(1000);

/// A running VM and the machine that says what becomes of it.
pub struct PrimarySide {
    pub(super) env: Arc<Env>,
    pub(super) config: WorkerConfig,
    pub(super) shared: Arc<Shared>,
    pub(super) inbox: Sender<WorkerEvent>,
    machine: Primary,
    checkpointer: Checkpointer,
    pub(super) control: Qmp,
    pub(super) attempt: Option<Attempt>,
    busy: BusyMeter,
    /// Whom the VM should be mirrored to.
    wanted: Option<HostName>,
    retry_at: Micros,
    retry_wait: Micros,
    published_at: Micros,
    measured_at: Micros,
    resident_bytes: Option<u64>,
    /// The running epoch began: the last cut's end, or the beginning of the seeding.
    pub(super) resumed_ns: u64,
    /// Since when it stands for the links' sake.
    held_back_ns: Option<u64>,
    /// The guest powered itself off and stands.
    guest_off: GuestOff,
    /// Whom the last attempt was made with, for a word after its end.
    last_peer: Option<(Peer, Generation)>,
    /// How this side went solo, step by step.
    solo: Failover,
    /// This host may run nothing any more, and why: the guest's own end is no wish of its owner.
    isolated: Option<String>,
    over: bool,
    /// Last: QEMU goes when all who use it are gone.
    pub(super) parts: Parts,
}

/// Whether the guest has powered itself off.
#[derive(Clone, Copy, PartialEq, Eq)]
enum GuestOff {
    No,
    /// QEMU said so, the machine does not know yet.
    Seen,
    /// The machine knows.
    Told,
}

fn say<E: std::fmt::Display>(e: E) -> String {
    e.to_string()
}

impl PrimarySide {
    /// Start the VM from its boot.
    ///
    /// # Errors
    /// What failed, on what, and what to do.
    pub fn boot(
        env: &Arc<Env>,
        config: &WorkerConfig,
        record: Versioned<VmRecord>,
        shared: &Arc<Shared>,
    ) -> Result<Self, String> {
        let inbox = env
            .routes
            .inbox(config.spec.uuid)
            .ok_or("the worker was ended")?;
        let (parts, control) =
            Parts::make(env, config, Side::Primary, record.value.generation, &inbox)?;
        shared.disks(parts.pulses());
        shared.event(format!("started, QEMU is process {}", parts.qemu.pid()));
        Self::over(
            env,
            config,
            record,
            shared,
            inbox,
            parts,
            control,
            config.partner.clone(),
        )
    }

    /// Go on as the primary over `parts`, whose guest runs.
    ///
    /// # Errors
    /// If QEMU does not answer.
    #[allow(clippy::too_many_arguments)]
    pub fn over(
        env: &Arc<Env>,
        config: &WorkerConfig,
        record: Versioned<VmRecord>,
        shared: &Arc<Shared>,
        inbox: Sender<WorkerEvent>,
        parts: Parts,
        mut control: Qmp,
        wanted: Option<HostName>,
    ) -> Result<Self, String> {
        let (monitors, options) = parts.cut_setup()?;
        let checkpointer = Checkpointer::new(monitors, options).map_err(say)?;
        let busy = BusyMeter::new(parts.qemu.pid(), parts::vcpu_threads(&mut control)?);
        busy.prioritise();
        let machine = Primary::new(
            PrimaryConfig {
                me: env.config.name.clone(),
                timing: env.timing,
                policy: policy(&config.spec.mirror),
                max_in_flight: MAX_IN_FLIGHT,
            },
            record,
            now(),
        );
        Ok(Self {
            env: Arc::clone(env),
            config: config.clone(),
            shared: Arc::clone(shared),
            inbox,
            machine,
            checkpointer,
            control,
            attempt: None,
            busy,
            wanted,
            retry_at: now(),
            retry_wait: RETRY_MIN,
            published_at: Micros::ZERO,
            measured_at: Micros::ZERO,
            resident_bytes: None,
            resumed_ns: now_ns(),
            held_back_ns: None,
            guest_off: GuestOff::No,
            last_peer: None,
            solo: Failover::default(),
            isolated: None,
            over: false,
            parts,
        })
    }

    /// Serve the inbox until the VM is no longer this side's.
    pub fn run(mut self, inbox: &Receiver<WorkerEvent>) {
        self.publish(true);
        while !self.over {
            let mut wake =
                Duration::from_micros(self.machine.next_wakeup().since(now()).0).min(SLEEP_MAX);
            if self.machine.awaits_idle(now()) {
                wake = wake.min(IDLE_LOOK);
            }
            match inbox.recv_timeout(wake) {
                Ok(event) => {
                    let state = self.machine.status(now()).state;
                    self.event(event);
                    // Whatever waits is taken in before time is told to the machine.
                    while !self.over
                        && let Ok(event) = inbox.try_recv()
                    {
                        self.event(event);
                    }
                    self.note_change(state);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let state = self.machine.status(now()).state;
            self.guest_events();
            if self.guest_off == GuestOff::Seen {
                self.guest_off = GuestOff::Told;
                self.wanted = None;
                self.input(match self.isolated.clone() {
                    Some(reason) => PrimaryInput::GuestDied { reason },
                    None => PrimaryInput::GuestShutdown,
                });
            }
            if self.machine.awaits_idle(now()) && self.busy.idle() {
                self.input(PrimaryInput::GuestIdle);
            }
            if let Some(level) = self.attempt.as_ref().and_then(Attempt::level) {
                self.input(PrimaryInput::Lane(level));
            }
            self.input(PrimaryInput::Tick);
            self.retry();
            self.note_change(state);
            self.publish(false);
        }
        self.publish(true);
    }

    /// Take in what QEMU reports by itself. A guest that powers itself off does not end
    /// QEMU (`-action shutdown=pause`): it stands, so that its last words can leave once
    /// the registry knows that it is to run nowhere.
    fn guest_events(&mut self) {
        while let Some(event) = self.checkpointer.poll_event() {
            let by_guest = event.data["guest"] == true;
            let why = event.data["reason"].as_str().unwrap_or("no reason given");
            match event.name.as_str() {
                "SHUTDOWN" if by_guest && self.guest_off == GuestOff::No => {
                    self.guest_off = GuestOff::Seen;
                    self.shared
                        .event(format!("the guest powered itself off ({why})"));
                }
                "RESET" if by_guest => self.shared.event(format!("the guest reboots ({why})")),
                "GUEST_PANICKED" => self.shared.event("the guest's kernel panicked".into()),
                _ => {}
            }
        }
    }

    fn note_change(&mut self, before: PrimaryState) {
        let status = self.machine.status(now());
        if status.state != before {
            self.shared
                .event(format!("{before:?} -> {:?}", status.state).to_lowercase());
            if status.state == PrimaryState::Mirrored {
                self.retry_wait = RETRY_MIN;
            }
            if status.state == PrimaryState::Solo {
                self.retry_at = now() + self.retry_wait;
                self.retry_wait = Micros((self.retry_wait.0 * 2).min(RETRY_MAX.0));
            }
            self.publish(true);
        }
    }

    /// A VM that should be mirrored and is not is tried again while its partner is there.
    fn retry(&mut self) {
        let Some(partner) = self.wanted.clone() else {
            return;
        };
        if self.over
            || self.machine.status(now()).state != PrimaryState::Solo
            || now() < self.retry_at
        {
            return;
        }
        if self.env.peer(&partner).is_some_and(|p| p.is_there()) {
            self.retry_at = now() + self.retry_wait;
            if let Err(reason) = self.admit() {
                self.shared.event(format!("not mirrored: {reason}"));
                self.shared
                    .update(|s| s.warnings = vec![format!("not mirrored: {reason}")]);
                self.retry_at = now() + RETRY_MAX;
                return;
            }
            self.input(PrimaryInput::LinkUp);
            self.input(PrimaryInput::PeerVerdict(Verdict::Alive));
            self.input(PrimaryInput::Protect { partner });
        }
    }

    /// May this VM be checkpointed at all? Asked before the first save: with some devices
    /// the save itself kills QEMU (QEMU.md section 4).
    fn admit(&mut self) -> Result<(), String> {
        admission::check_spec(&self.config.spec).map_err(say)?;
        let control = &mut self.control;
        admission::check_running(&mut |command: &str, args| {
            control.execute(command, args).map_err(say)
        })
        .map_err(say)
    }

    /// True if `partner` is the one this attempt is about, or the wanted one before any.
    fn concerns(&self, partner: &HostName) -> bool {
        match &self.attempt {
            Some(attempt) => attempt.peer.name == *partner,
            None => self.machine.status(now()).partner.as_ref() == Some(partner),
        }
    }

    fn event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Command(command, reply) => {
                let _ = reply.send(self.command(command));
            }
            WorkerEvent::LinkUp(partner) => {
                if self.wanted.as_ref() == Some(&partner) {
                    self.retry_at = now();
                    self.retry_wait = RETRY_MIN;
                }
                if self.concerns(&partner) {
                    self.input(PrimaryInput::LinkUp);
                }
            }
            WorkerEvent::LinkDown(partner, reason) if self.concerns(&partner) => {
                self.suspected(now_ns());
                self.input(PrimaryInput::LinkDown { reason });
            }
            WorkerEvent::Verdict {
                partner,
                verdict,
                last_heard_ns,
            } if self.concerns(&partner) => {
                if verdict == Verdict::Lost {
                    self.suspected(last_heard_ns);
                }
                self.input(PrimaryInput::PeerVerdict(verdict));
            }
            WorkerEvent::Stalled(for_) => {
                let micros = u64::try_from(for_.as_micros()).unwrap_or(u64::MAX);
                self.input(PrimaryInput::SelfStalled {
                    for_: Micros(micros),
                });
            }
            WorkerEvent::Control {
                from,
                generation,
                message,
            } => {
                self.control_message(&from, generation, message);
            }
            WorkerEvent::Acked { generation, epoch } => self.acked(generation, epoch),
            WorkerEvent::OutputWaiting => self.input(PrimaryInput::OutputWaiting),
            WorkerEvent::Pressure(kind) => self.input(PrimaryInput::Pressure(kind)),
            WorkerEvent::Claim {
                ticket,
                outcome,
                asked_ns,
            } => {
                self.solo.claim_started_ns = asked_ns;
                self.solo.claim_won_ns = now_ns();
                self.input(PrimaryInput::ClaimResult { ticket, outcome });
            }
            WorkerEvent::Closing {
                generation,
                epoch,
                at,
            } => {
                if self
                    .attempt
                    .as_ref()
                    .is_some_and(|a| a.generation == generation)
                {
                    self.input(PrimaryInput::Sent { epoch, at });
                }
            }
            WorkerEvent::Sent(sent) => self.sent(sent),
            WorkerEvent::Seeded(seeded) => {
                if let Some(input) = self.seeded(*seeded) {
                    self.input(input);
                }
            }
            WorkerEvent::QemuExit { reason } => {
                self.shared.event(reason.clone());
                self.input(PrimaryInput::GuestDied { reason });
            }
            WorkerEvent::DaemonEnds => {
                let reason = format!("the daemon of {} was told to end", self.env.config.name);
                self.input(if self.machine.status(now()).mirrored {
                    PrimaryInput::GuestDied { reason }
                } else {
                    PrimaryInput::GuestShutdown
                });
            }
            WorkerEvent::Isolate { reason, gently } => {
                self.wanted = None;
                self.isolated = Some(reason.clone());
                if !gently {
                    self.input(PrimaryInput::GuestDied { reason });
                } else if let Err(e) = self.control.execute("system_powerdown", json!({})) {
                    self.shared
                        .event(format!("the guest could not be asked to shut down: {e}"));
                }
            }
            WorkerEvent::LinkDown(..)
            | WorkerEvent::Verdict { .. }
            | WorkerEvent::Lane { .. }
            | WorkerEvent::Whole(_)
            | WorkerEvent::Applied { .. }
            | WorkerEvent::Bad { .. }
            | WorkerEvent::Blocks(_) => {}
        }
    }

    fn command(&mut self, command: VmCommand) -> Result<(), String> {
        let status = self.machine.status(now());
        match command {
            VmCommand::Protect(partner) => {
                if status.state != PrimaryState::Solo {
                    return match status.partner {
                        Some(p) if p == partner => Ok(()),
                        Some(p) => Err(format!(
                            "it is mirrored to {p}; `pollux vm unprotect` it first to choose {partner}"
                        )),
                        None => Err(format!("it is {:?}; try again in a moment", status.state)),
                    };
                }
                self.admit()?;
                if self.env.peer(&partner).is_none() {
                    return Err(format!(
                        "no link to {partner} is known here; make one with `pollux link create`"
                    ));
                }
                self.wanted = Some(partner);
                self.retry_wait = RETRY_MIN;
                self.retry_at = now();
                self.retry();
            }
            VmCommand::Unprotect => {
                self.wanted = None;
                // Solo there is nothing to undo but the wish.
                if status.state != PrimaryState::Solo {
                    self.input(PrimaryInput::Unprotect);
                }
            }
            VmCommand::Switchover => {
                if status.state != PrimaryState::Mirrored {
                    return Err(format!(
                        "a switchover needs a mirrored VM; it is {:?}",
                        status.state
                    ));
                }
                self.input(PrimaryInput::Switchover);
            }
            VmCommand::Stop => {
                self.wanted = None;
                self.input(PrimaryInput::GuestShutdown);
            }
        }
        // Whoever asked may look at once.
        self.publish(true);
        Ok(())
    }

    fn control_message(&mut self, from: &HostName, generation: Generation, message: ControlMsg) {
        let current = self
            .attempt
            .as_ref()
            .is_some_and(|a| a.peer.name == *from && a.generation == generation);
        if !current {
            // It may have missed its dismissal, and would hold its memory for ever.
            let waits = matches!(message, ControlMsg::Ready | ControlMsg::StandbyHere);
            if waits
                && generation < self.machine.status(now()).generation
                && let Some(peer) = self.env.peer(from)
            {
                peer.say(self.config.spec.uuid, generation, &ControlMsg::Dismiss);
            }
            return;
        }
        match message {
            ControlMsg::Ready => self.input(PrimaryInput::StandbyReady),
            ControlMsg::Refused { reason } => self.input(PrimaryInput::StandbyRefused { reason }),
            ControlMsg::StandbyGone { reason } => self.input(PrimaryInput::StandbyGone { reason }),
            ControlMsg::StandbyHere => {}
            other => tracing::warn!(%from, ?other, "not a message for a primary; dropped"),
        }
    }

    /// The partner may be gone; the last of these before a won claim counts.
    fn suspected(&mut self, last_heard_ns: u64) {
        self.solo = Failover {
            kind: "solo".into(),
            last_heard_ns,
            suspected_ns: now_ns(),
            ..Failover::default()
        };
    }

    fn acked(&mut self, generation: Generation, epoch: Epoch) {
        if let Some(attempt) = &mut self.attempt
            && attempt.generation == generation
        {
            let at = now_ns();
            while let Some(done) = attempt.in_flight.pop_front_if(|e| e.epoch <= epoch) {
                // The first is as long as the seeding and its pause finds the clocks: no
                // figure of an epoch.
                if done.epoch > FIRST_EPOCH {
                    self.shared.epoch(done.sample(at));
                }
            }
        }
        self.input(PrimaryInput::Acked { generation, epoch });
    }

    fn sent(&mut self, sent: SentEpoch) {
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        if attempt.generation != sent.generation {
            return;
        }
        attempt.spare.push(sent.staging);
        let epoch = sent.epoch;
        match sent.result {
            Ok(bytes) => {
                if let Some(e) = attempt.in_flight.iter_mut().find(|e| e.epoch == epoch) {
                    e.wire_bytes = bytes;
                    e.encode = Some((&sent.stats).into());
                }
            }
            Err(reason) => self.input(PrimaryInput::SendFailed { epoch, reason }),
        }
    }
}

/// The operator's policy as the schedule takes it.
fn policy(mirror: &crate::pool::spec::MirrorPolicy) -> Policy {
    Policy {
        gap_min: Micros::from_millis(u64::from(mirror.epoch_gap_min_ms)),
        interval_max: Micros::from_millis(u64::from(mirror.epoch_interval_max_ms)),
        overhead_permille: u16::from(mirror.overhead_max_percent) * 10,
        overload: mirror.overload,
        ..Policy::default()
    }
}
