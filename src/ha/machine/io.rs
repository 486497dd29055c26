//! What a machine is told, and what it says.

use crate::ha::report::{Path, Report};
use crate::ha::state::{PoolState, Proof};
use crate::ha::time::Millis;
use crate::ha::timing::Timing;
use crate::pool::{HostId, HostName, Incarnation};
use crate::registry::Versioned;

/// What a machine is told at its begin.
#[derive(Clone, Debug)]
pub struct Config {
    /// This host.
    pub me: HostId,
    /// Its name.
    pub name: HostName,
    /// This life of it, higher than all before; nothing of a former life runs any more.
    pub incarnation: Incarnation,
    /// The pool's times.
    pub timing: Timing,
    /// What this host's watchdog is armed with, if it has one that really resets it.
    pub watchdog: Option<Millis>,
    /// Whether hosts can be switched off by a fence agent.
    pub power_fencing: bool,
    /// The life of this host that wrote down that it promises as one of two, if one did.
    pub promised: Option<Incarnation>,
}

/// What this host sees of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Local {
    /// Age of the gateway's newest answer.
    pub gateway_age: Option<Millis>,
    /// Whether the storage of its VMs answers.
    pub storage_ok: bool,
    /// Largest replication lag of its standbys.
    pub standby_lag: Option<Millis>,
    /// Sum of its VMs' weights.
    pub weight: u32,
}

/// How a write of the pool state ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteOutcome {
    /// It is written.
    Won {
        /// The version it has.
        version: u64,
    },
    /// Another was faster, or nothing was written.
    Lost,
    /// It may be written, or may yet be.
    Unknown,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time went on; once a period.
    Tick,
    /// An authenticated report came.
    Heard {
        /// Over which path.
        path: Path,
        /// The report.
        report: Report,
    },
    /// What this host sees of itself, newly.
    Local(Local),
    /// The answer to [`Action::Read`]; `None` if there is no state yet, an error if the
    /// registry gave none.
    Read(Result<Option<Versioned<PoolState>>, String>),
    /// The answer to [`Action::Write`].
    Written(WriteOutcome),
    /// What became of [`Action::Fence`]. `confirmed` means that the agent, asked anew, said
    /// that the power is off; an agent's mere success is not that.
    Fenced {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
        /// Whether it is off for certain.
        confirmed: bool,
    },
    /// A person has made certain that this life of a host is off.
    Declared {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// All VMs of this host are stopped, and no process of any is left.
    Stopped,
    /// What became of [`Action::Remember`]: whether it outlasts a loss of power.
    Remembered(bool),
    /// This host is to leave the pool, in order.
    Leave {
        /// Why.
        why: String,
    },
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Send this over every path.
    Publish(Report),
    /// Read the pool state.
    Read,
    /// Compare-and-set the pool state.
    Write {
        /// The version it must be at.
        expected: Option<u64>,
        /// The value.
        state: PoolState,
    },
    /// Pet the watchdog until then and no longer.
    PetUntil(Millis),
    /// Switch that host's power off, and make certain of it.
    Fence {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// Write down on this host that this life of it promises as one of two, so that its next life
    /// is told of it ([`Config::promised`]) also after a loss of power; then
    /// [`Input::Remembered`]. Replaces what was written down before.
    Remember(Incarnation),
    /// What is written down is no longer true: remove it.
    Forget,
    /// Stop all VMs by their isolation response and start none; then [`Input::Stopped`].
    StopVms {
        /// Why.
        why: String,
    },
    /// The VMs that this life of the host ran may be restarted elsewhere, each by a
    /// compare-and-set of its record. Said again after a change of coordinator.
    MayRestart {
        /// The host.
        host: HostId,
        /// Its life.
        incarnation: Incarnation,
        /// Why it runs them no more.
        proof: Proof,
    },
    /// Somebody should look at this.
    Alert(String),
    /// This life is over; begin the next one.
    Over,
}

/// Where this host is in its life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Not a member yet.
    Joining,
    /// A member, with a lease.
    Member,
    /// Its VMs are being stopped.
    Stopping {
        /// Why.
        why: String,
    },
    /// Nothing runs, and nothing will.
    Stopped {
        /// Why.
        why: String,
    },
}
