//! The owner of one VM on one host: a thread with an inbox.
//!
//! ```text
//!   events (acks, packets waiting, claims, verdicts, commands)
//!        |  inbox
//!        v
//!   +---------+   handle / poll_action   +---------------------------+
//!   | worker  | <----------------------> | mirror::Primary / Standby |
//!   +---------+                          +---------------------------+
//!     | carries out actions: cut, send, release, claim, promote
//!     v
//!   parts: QEMU, monitors, RAM, disks, ports
//! ```
//!
//! All state of a VM changes on its worker's thread. A worker begins as a primary or as a
//! standby; a promoted standby goes on as a primary in the same thread with the same QEMU.
//! It must never decide: what to do next is the machine's word.

mod attempt;
mod busy;
mod closing;
mod cutting;
mod ingress;
mod parts;
mod primary;
mod publish;
mod receiver;
mod seeder;
mod sender;
mod standby;
mod syncer;
mod verify;

pub use publish::Shared;

use super::claims::Claims;
use super::config::HostConfig;
use super::control::ControlMsg;
use crate::mirror::{ClaimOutcome, Micros, Ticket, Timing, Verdict, Versioned, VmRecord};
use crate::pool::spec::VmSpec;
use crate::pool::{Epoch, Generation, HostName, VmId};
use crate::vm::argv::Accel;
use interconnect::epoch::{EncodePool, ReceivedEpoch};
use interconnect::frame::{Frame, FrameKind};
use interconnect::link::Interconnect;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What an operator may ask of a running VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmCommand {
    /// Mirror it to this partner.
    Protect(HostName),
    /// Mirror it no longer.
    Unprotect,
    /// Swap the roles.
    Switchover,
    /// Power it off.
    Stop,
}

/// What reaches a worker.
pub enum WorkerEvent {
    /// An operator's word; the answer says whether it was taken up, not whether it worked.
    Command(VmCommand, tokio::sync::oneshot::Sender<Result<(), String>>),
    /// The interconnect to this partner carries frames.
    LinkUp(HostName),
    /// It does not.
    LinkDown(HostName, String),
    /// The heartbeats' word on this partner, with when it was last heard (CLOCK_MONOTONIC).
    Verdict {
        /// Whom.
        partner: HostName,
        /// Alive or lost.
        verdict: Verdict,
        /// CLOCK_MONOTONIC nanoseconds of its last heartbeat.
        last_heard_ns: u64,
    },
    /// This host stood still.
    Stalled(Duration),
    /// A message of the other side.
    Control {
        /// Who says it.
        from: HostName,
        /// The generation it speaks of.
        generation: Generation,
        /// What.
        message: ControlMsg,
    },
    /// The standby holds everything through this epoch.
    Acked {
        /// The attempt.
        generation: Generation,
        /// The epoch.
        epoch: Epoch,
    },
    /// The primary opened an epoch lane.
    Lane {
        /// Its attempt.
        generation: Generation,
        /// The frames.
        rx: tokio::sync::mpsc::Receiver<Frame>,
    },
    /// Output waits in the gate.
    OutputWaiting,
    /// A buffer nears its limit.
    Pressure(crate::mirror::primary::PressureKind),
    /// A claim or a read of the record has an outcome.
    Claim {
        /// Which.
        ticket: Ticket,
        /// The outcome.
        outcome: ClaimOutcome,
        /// When it was asked for, CLOCK_MONOTONIC nanoseconds.
        asked_ns: u64,
    },
    /// The sender is about to hand the epoch's closing frame to the lane.
    Closing {
        /// The attempt.
        generation: Generation,
        /// The epoch.
        epoch: Epoch,
        /// Just before.
        at: Micros,
    },
    /// The sender is done with an epoch.
    Sent(sender::SentEpoch),
    /// The seeder has ended.
    Seeded(Box<seeder::Seeded>),
    /// An epoch arrived whole.
    Whole(Box<ReceivedEpoch>),
    /// The applier is done with an epoch.
    Applied {
        /// Which.
        epoch: Epoch,
        /// What promotion needs of it, or why it is not applied.
        outcome: Result<Box<standby::applier::LastApplied>, String>,
    },
    /// An epoch or its lane is bad.
    Bad {
        /// Which, as far as known.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// The stream of RAM blocks outside the RAM file.
    Blocks(bytes::Bytes),
    /// The daemon is told to end.
    DaemonEnds,
    /// This host may run nothing any more. The registry is not asked: the record goes on to say
    /// that the VM is to run, for who may start it.
    Isolate {
        /// Why.
        reason: String,
        /// The guest is asked to shut down first; the same without this follows.
        gently: bool,
    },
    /// QEMU ended, and not by this daemon. A guest that powers itself off does not end
    /// QEMU, so this is never the guest's wish, whatever the exit status.
    QemuExit {
        /// In words.
        reason: String,
    },
}

/// Inboxes by VM, for whoever has something for a worker.
#[derive(Clone, Default)]
pub struct Routes {
    inboxes: Arc<Mutex<HashMap<VmId, Sender<WorkerEvent>>>>,
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Sender<WorkerEvent>>> {
        self.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hand `event` to the worker of `vm`; false if there is none.
    #[must_use]
    pub fn send(&self, vm: VmId, event: WorkerEvent) -> bool {
        let inbox = self.lock().get(&vm).cloned();
        inbox.is_some_and(|inbox| inbox.send(event).is_ok())
    }

    /// Hand an event to every worker.
    pub fn send_all(&self, event: impl Fn() -> WorkerEvent) {
        for inbox in self.lock().values() {
            let _ = inbox.send(event());
        }
    }

    /// The VMs that have a worker.
    #[must_use]
    pub fn names(&self) -> Vec<VmId> {
        self.lock().keys().copied().collect()
    }

    /// Whether no worker is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Register the inbox of a new worker.
    fn add(&self, vm: VmId) -> Receiver<WorkerEvent> {
        let (tx, rx) = channel();
        self.lock().insert(vm, tx);
        rx
    }

    fn inbox(&self, vm: VmId) -> Option<Sender<WorkerEvent>> {
        self.lock().get(&vm).cloned()
    }

    fn remove(&self, vm: VmId) {
        self.lock().remove(&vm);
    }
}

/// A partner as a worker sees it.
#[derive(Clone)]
pub struct Peer {
    /// Its interconnect.
    pub interconnect: Interconnect,
    /// Its name.
    pub name: HostName,
    /// What its heartbeats say.
    pub alive: Arc<AtomicBool>,
}

impl Peer {
    /// Whether it is there to hold a standby: heard now, and a session stands. A session
    /// alone may be that of a host that has just died.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.alive.load(Ordering::Relaxed) && self.interconnect.session().is_some()
    }

    /// Say something about `vm`; a message that cannot be sent is lost like one on the
    /// wire, and logged.
    pub fn say(&self, vm: VmId, generation: Generation, message: &ControlMsg) {
        let frame = Frame {
            kind: FrameKind::Control,
            vm,
            generation,
            epoch: Epoch::default(),
            payload: message.to_bytes(),
        };
        if let Err(e) = self.interconnect.control(frame) {
            tracing::info!(%vm, partner = %self.name, ?message, "not said: {e}");
        }
    }
}

/// What every worker of a host shares.
pub struct Env {
    /// The host's configuration.
    pub config: HostConfig,
    /// QEMU's binary.
    pub qemu: PathBuf,
    /// QEMU's version, told to the partner.
    pub qemu_version: String,
    /// Times of the pairs.
    pub timing: Timing,
    /// The registry.
    pub claims: Claims,
    /// Inboxes.
    pub routes: Routes,
    /// Partners by name.
    pub peers: Mutex<HashMap<HostName, Peer>>,
    /// Threads that encode for all VMs.
    pub encode_pool: EncodePool,
}

impl Env {
    /// The partner called `name`, if a link to it is pinned.
    #[must_use]
    pub fn peer(&self, name: &HostName) -> Option<Peer> {
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }
}

/// How a worker begins.
pub enum Begin {
    /// Start the VM here, which the record allows.
    Primary {
        /// The record.
        record: Versioned<VmRecord>,
        /// If it does not come up it is tried again: the record goes on to say that it is to
        /// run.
        again: bool,
    },
    /// Wait here as the standby of `primary`.
    Standby {
        /// Who runs it.
        primary: HostName,
        /// The attempt.
        generation: Generation,
    },
}

/// What a worker is started with.
#[derive(Clone)]
pub struct WorkerConfig {
    /// The VM.
    pub spec: Arc<VmSpec>,
    /// The versioned machine type, the same on both sides.
    pub machine: String,
    /// The accelerator, the same on both sides.
    pub accel: Accel,
    /// The partner it should be mirrored to, if any.
    pub partner: Option<HostName>,
}

/// Start a worker; it runs until it stands down. `started` hears whether QEMU came up.
///
/// # Errors
/// If no thread can be started.
pub fn start(
    env: Arc<Env>,
    config: WorkerConfig,
    begin: Begin,
    shared: Arc<Shared>,
    started: impl FnOnce(Result<(), String>) + Send + 'static,
) -> std::io::Result<()> {
    let vm = config.spec.uuid;
    let inbox = env.routes.add(vm);
    let name = format!("vm-{}", config.spec.name);
    // The kernel keeps 15 bytes of a thread's name.
    let short: String = name.chars().take(15).collect();
    let routes = env.routes.clone();
    let spawned = std::thread::Builder::new().name(short).spawn(move || {
        run(&env, &config, begin, &inbox, &shared, started);
        env.routes.remove(vm);
        shared.ended();
    });
    if spawned.is_err() {
        routes.remove(vm);
    }
    spawned.map(drop)
}

/// The record says that the VM runs here, and it does not: say so, or another host could
/// start it by force only. If the registry cannot be told, the operator's next start here
/// is not refused.
fn give_up_start(env: &Env, config: &WorkerConfig, record: &Versioned<VmRecord>) {
    let stopped = VmRecord {
        running: false,
        ..record.value.clone()
    };
    let vm = config.spec.uuid;
    match env.claims.claim_blocking(vm, Some(record.version), stopped) {
        ClaimOutcome::Won(_) => {}
        other => tracing::warn!(%vm, "the registry still says that it runs: {other:?}"),
    }
}

fn run(
    env: &Arc<Env>,
    config: &WorkerConfig,
    begin: Begin,
    inbox: &Receiver<WorkerEvent>,
    shared: &Arc<Shared>,
    started: impl FnOnce(Result<(), String>),
) {
    let promoted = match begin {
        Begin::Primary { record, again } => {
            match primary::PrimarySide::boot(env, config, record.clone(), shared) {
                Ok(side) => {
                    started(Ok(()));
                    side
                }
                Err(reason) => {
                    shared.event(format!("not started: {reason}"));
                    if !again {
                        give_up_start(env, config, &record);
                    }
                    return started(Err(reason));
                }
            }
        }
        Begin::Standby {
            primary,
            generation,
        } => {
            started(Ok(()));
            match standby::run(env, config, primary, generation, inbox, shared) {
                Some(side) => *side,
                None => return,
            }
        }
    };
    promoted.run(inbox);
}
