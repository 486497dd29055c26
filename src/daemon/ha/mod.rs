//! This host as a member of its pool: carries out what [`crate::ha::machine`] decides.
//!
//! ```text
//!  networks --ear--+              +--> heartbeats, storage
//!  statefile ------+--> [life] ---+--> registry thread: read, compare-and-set
//!  registry -------+    machine   +--> watchdog, fence agents
//!  gateway, VMs ---+              +--> gate: may VMs start here?   isolation: stop them
//!                                 +--> restarts: VMs of hosts that are proved dead
//! ```
//!
//! One thread owns the machine and never waits but for its next event. A [`life`] ends when the
//! pool has given this host up and all its VMs are stopped; the next one begins with nothing
//! running, a new incarnation, and new sockets. A host without a `[pool]` has none of this.
//!
//! Must never: open the gate before the watchdog is armed, say that all is stopped while a start
//! is under way, disarm the watchdog while anything runs.

mod disks;
mod gate;
mod isolating;
mod life;
mod notes;
mod restarts;
mod showing;
mod storage;
mod watchdog;

pub use gate::Gate;
pub(in crate::daemon) use isolating::Ending;
pub(in crate::daemon) use restarts::{put, spec_key};

use super::Host;
use super::claims::Claims;
use super::config::{HostConfig, PoolConfig, RegistryConfig};
use super::pair::LastHeard;
use crate::api::pool::PoolStatus;
use crate::beat::{
    GATEWAY_PERIOD_DEFAULT, GatewayConfig, GatewayProbe, PoolKeys, load_keys, next_incarnation,
};
use crate::fence::config::FenceConfig;
use crate::ha::machine::WriteOutcome;
use crate::ha::report::{Path, Report};
use crate::ha::state::PoolState;
use crate::pool::{HostId, HostName, Incarnation};
use crate::registry::Versioned;
use crate::registry::statefile::paxos::HostSlot;
use crate::registry::statefile::{CALL_WAIT, StatefileOptions};
use disks::Disks;
use life::{End, Life};
use restarts::Restarts;
use showing::Shown;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Between a life that could not begin, or failed, and the next try.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// How long an orderly leaving may take; stopping VMs is the longest of it.
const LEAVE_DEADLINE: Duration = Duration::from_secs(15);
/// How long the thread of the pool may take to answer.
const DECLARE_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks whether it is done.
const LEAVE_POLL: Duration = Duration::from_millis(20);

/// What reaches a life.
enum Event {
    /// A report that was authenticated.
    Heard {
        path: Path,
        sender: HostName,
        incarnation: Incarnation,
        report: Report,
    },
    /// An answer of the registry.
    Read(Result<Option<Versioned<PoolState>>, String>),
    /// What became of a write; the text is for people.
    Written(WriteOutcome, Option<String>),
    /// All VMs are stopped.
    Stopped,
    /// Whether what was to be written down is on disk.
    Remembered(bool),
    /// A person says that a host is off; the answer is whether that could be taken, or why not.
    Declare {
        host: HostName,
        answer: Sender<Result<(), String>>,
    },
    /// The daemon is told to end.
    Leave,
}

/// What a host's lives have in common.
struct Setup {
    host: HostName,
    id: HostId,
    state_dir: std::path::PathBuf,
    pool: PoolConfig,
    /// As the state folder has them; shared with the thread of storage heartbeats.
    keys: Arc<Mutex<PoolKeys>>,
    fencing: Option<FenceConfig>,
    statefile: Option<StatefileOptions>,
    gateway: Option<GatewayProbe>,
    claims: Claims,
    gate: Gate,
    vms: Weak<Host>,
    /// Noted for a registry that must not call a host dead that is heard.
    heard: LastHeard,
    shown: Arc<Shown>,
    restarts: Restarts,
    disks: Disks,
}

/// The membership of this host.
pub struct Membership {
    shown: Arc<Shown>,
    now: Arc<Mutex<Option<Sender<Event>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Membership {
    /// Begin to be a member of the pool in `config`. `gate` is closed until this host is one.
    ///
    /// # Errors
    /// What is missing and what to do about it.
    pub fn start(
        config: &HostConfig,
        pool: &PoolConfig,
        claims: Claims,
        gate: Gate,
        vms: Weak<Host>,
        heard: LastHeard,
    ) -> anyhow::Result<Self> {
        gate.close("this host is not a member of its pool yet; see `pollux pool status`");
        let own = pool
            .host(&config.name)
            .ok_or_else(|| anyhow::anyhow!("[pool] does not name this host"))?;
        let keys = load_keys(&config.state_dir)?.ok_or_else(|| {
            anyhow::anyhow!(
                "[pool] is configured, but this host has no key of a pool: `pollux pool key create` on the first host, `pollux pool key import` on all others, with --state-dir {}",
                config.state_dir.display()
            )
        })?;
        let fencing = pool.fencing.as_ref().map(|path| read_fencing(path));
        let statefile = match config.registry() {
            RegistryConfig::Statefile { disks, slot } => Some(StatefileOptions {
                disks: disks.clone(),
                pool: None,
                slot: HostSlot(*slot),
                name: config.name.to_string(),
                take_slot: false,
                call_wait: CALL_WAIT,
            }),
            _ => None,
        };
        let gateway = pool.gateway.map(|gateway| {
            GatewayProbe::start(GatewayConfig {
                gateway,
                local: None,
                device: None,
                period: GATEWAY_PERIOD_DEFAULT.min(Duration::from_millis(pool.timing.period_ms)),
            })
        });
        let shown = Arc::new(Shown::new(&config.name, own.id, pool.watchdog.as_deref()));
        let restarts = Restarts::start(restarts::Setup {
            me: config.name.clone(),
            id: HostId(own.id),
            claims: claims.clone(),
            gate: gate.clone(),
            vms: vms.clone(),
            shown: Arc::clone(&shown),
        })?;
        let setup = Setup {
            host: config.name.clone(),
            id: HostId(own.id),
            state_dir: config.state_dir.clone(),
            pool: pool.clone(),
            keys: Arc::new(Mutex::new(keys)),
            fencing: fencing.transpose()?,
            statefile,
            gateway: gateway.transpose()?,
            claims,
            gate,
            disks: Disks::start(vms.clone())?,
            vms,
            heard,
            shown: Arc::clone(&shown),
            restarts,
        };
        if setup.pool.watchdog.is_none() {
            tracing::warn!(
                "no `watchdog` in [pool]: if this host hangs, only its power being switched off can prove that it is dead, and its VMs wait for that"
            );
        }
        let now = Arc::default();
        let membership = Self {
            shown,
            now: Arc::clone(&now),
        };
        std::thread::Builder::new()
            .name("pool".into())
            .spawn(move || live(&setup, &now))?;
        Ok(membership)
    }

    /// What is known of the pool now.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        self.shown.status()
    }

    /// Take a person's word that `host` is off, if this host can decide by it.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn declare_off(&self, host: &HostName) -> Result<(), String> {
        let (answer, answered) = channel();
        let event = Event::Declare {
            host: host.clone(),
            answer,
        };
        if let Some(life) = &*lock(&self.now) {
            // One that ends just now drops the question, and with it the way to answer.
            let _ = life.send(event);
        }
        answered.recv_timeout(DECLARE_DEADLINE).unwrap_or_else(|_| {
            Err("this host is between two lives in its pool and decides nothing; try again".into())
        })
    }

    /// Leave the pool in order: stop all VMs, let the mirrored ones go on at their standbys and
    /// say farewell. Returns when that is done, or has taken too long.
    pub fn leave(&self) {
        let begun = Instant::now();
        while !self.shown.has_left() && begun.elapsed() < LEAVE_DEADLINE {
            if let Some(life) = &*lock(&self.now) {
                // One that ends just now is followed by another look.
                let _ = life.send(Event::Leave);
            }
            std::thread::sleep(LEAVE_POLL);
        }
        if !self.shown.has_left() {
            tracing::error!(
                "the pool was not told farewell within {LEAVE_DEADLINE:?}; it counts this host as dead only once that is proved"
            );
        }
    }
}

pub(in crate::daemon) fn read_fencing(path: &std::path::Path) -> anyhow::Result<FenceConfig> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| anyhow::anyhow!("[pool] fencing: cannot read {}: {e}", path.display()))?;
    FenceConfig::parse(&text).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

/// One life after the other.
fn live(setup: &Setup, now: &Mutex<Option<Sender<Event>>>) {
    if let Err(e) = interconnect::heartbeat::realtime::raise_priority() {
        tracing::warn!("the pool's decisions run at ordinary priority: {e}");
    }
    loop {
        let (tell, inbox) = channel();
        *lock(now) = Some(tell.clone());
        let end = next_incarnation(&setup.state_dir)
            .map_err(|e| e.to_string())
            .and_then(|incarnation| Life::begin(setup, incarnation, tell, inbox))
            .map_or_else(End::Failed, Life::run);
        setup
            .gate
            .close("this host is no member of its pool now; see `pollux pool status`");
        match end {
            End::Over => {}
            End::Left => {
                setup.shown.left();
                return;
            }
            End::Failed(reason) => {
                tracing::error!("this host cannot be a member of its pool: {reason}");
                setup.shown.failed(&reason);
                // Whoever wants to leave meanwhile finds nobody; there is nothing to leave.
                *lock(now) = None;
                std::thread::sleep(AGAIN_AFTER);
            }
        }
    }
}
