//! One fencing of one host: level after level until one has confirmed. A thread of its
//! own, so that several hosts are fenced at the same time.
//!
//! ```text
//! level 1: off, off, …  ->  status, status, … all off?  -> Confirmed (or Rehearsed)
//!             | one failed         | one not off
//! level 2:  <-+--------------------+            no level left -> Failed
//! ```
//!
//! All devices of a level are asked for `off` before the first is asked for its status: a
//! host with two supplies is off only while both are.

use super::agent::{Action, Answer, CallError, Cancel, call};
use super::config::{DUMMY, Device, FenceConfig};
use super::metadata::actions;
use crate::pool::HostName;
use serde::Serialize;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

/// Exit status of `status` for a device without power (`FenceAgentAPI`).
const STATUS_OFF: i32 = 2;

/// What came of a fencing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// The host has no power: proof.
    Confirmed {
        /// The level that confirmed, from 1.
        level: usize,
        /// From the start of the fencing.
        took: Duration,
        /// The level's agents.
        agents: Vec<String>,
    },
    /// A level with an agent that only pretends said yes: **no proof**.
    Rehearsed {
        /// The level, from 1.
        level: usize,
        /// From the start of the fencing.
        took: Duration,
        /// The level's agents.
        agents: Vec<String>,
    },
    /// No level has confirmed: the host may or may not have power.
    Failed {
        /// Every device that failed, and why.
        reasons: Vec<Reason>,
    },
    /// Given up on the way: the host may or may not have power.
    Cancelled,
}

/// Why one device did not confirm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The level, from 1.
    pub level: usize,
    /// The device's agent.
    pub agent: String,
    /// In words, without secrets.
    pub why: String,
}

/// A host that is not in the configuration.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No `[[host]]` of that name.
    #[error("no fencing is configured for host `{0}`; add a [[host]] with its levels")]
    Unknown(HostName),
    /// The kernel gave no thread or descriptor.
    #[error("fencing host `{host}`: {source}")]
    Io {
        /// Which host.
        host: HostName,
        /// Why not.
        source: io::Error,
    },
}

/// A running fencing. Dropping it cancels it.
pub struct Job {
    cancel: Cancel,
    outcome: Receiver<Outcome>,
    known: Option<Outcome>,
}

impl Job {
    /// Begin to take the power of `host`.
    ///
    /// # Errors
    /// [`StartError`]: nothing has been done.
    pub fn start(config: &FenceConfig, host: &HostName) -> Result<Self, StartError> {
        let io = |source| StartError::Io {
            host: host.clone(),
            source,
        };
        let run = Run::new(config, host)?;
        let cancel = run.cancel.clone();
        let (tell, outcome) = sync_channel(1);
        std::thread::Builder::new()
            .name(format!("fence-{host}"))
            .spawn(move || {
                // Nobody listens any more: the job was dropped.
                let _ = tell.send(run.off());
            })
            .map_err(io)?;
        Ok(Self {
            cancel,
            outcome,
            known: None,
        })
    }

    /// What came of it, once it has ended.
    pub fn poll(&mut self) -> Option<&Outcome> {
        if self.known.is_none() {
            self.known = match self.outcome.try_recv() {
                Ok(outcome) => Some(outcome),
                Err(TryRecvError::Empty) => None,
                // The thread is gone without a word: nothing is known.
                Err(TryRecvError::Disconnected) => Some(Outcome::Cancelled),
            };
        }
        self.known.as_ref()
    }

    /// Wait until it has ended; bounded by the sum of all its time limits.
    #[must_use]
    pub fn wait(mut self) -> Outcome {
        match self.known.take() {
            Some(outcome) => outcome,
            None => self.outcome.recv().unwrap_or(Outcome::Cancelled),
        }
    }

    /// Give up: running agents are killed. The outcome is [`Outcome::Cancelled`] unless it
    /// was reached before.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// What one device says, without anything being switched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The level, from 1.
    pub level: usize,
    /// The device's agent.
    pub agent: String,
    /// Whether the device has power, or why that is not known.
    pub power: Result<Power, String>,
    /// Why this device cannot be relied on, if so.
    pub problem: Option<String>,
}

/// What `status` said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// It has power.
    On,
    /// It has none.
    Off,
}

/// Ask every device of every level of `host` for its status; with `thorough` also whether
/// its agent knows `off` and whether `monitor` succeeds. Switches nothing.
///
/// # Errors
/// [`StartError`] if the host is not configured.
pub fn check(
    config: &FenceConfig,
    host: &HostName,
    thorough: bool,
) -> Result<Vec<Check>, StartError> {
    let run = Run::new(config, host)?;
    let mut checks = Vec::new();
    for (level, device) in run.devices() {
        let power = run.power(device);
        let mut problem = power.clone().err();
        if thorough && problem.is_none() {
            problem = run
                .knows_off(device)
                .and_then(|()| run.done(device, Action::Monitor))
                .err();
        }
        if device.agent == DUMMY && problem.is_none() {
            problem = Some("a rehearsal: this agent switches nothing".into());
        }
        checks.push(Check {
            level,
            agent: device.agent.clone(),
            power,
            problem,
        });
    }
    Ok(checks)
}

struct Run {
    levels: Vec<super::config::Level>,
    agents_dir: PathBuf,
    cancel: Cancel,
}

impl Run {
    fn new(config: &FenceConfig, host: &HostName) -> Result<Self, StartError> {
        let found = config
            .host(host)
            .ok_or_else(|| StartError::Unknown(host.clone()))?;
        let cancel = Cancel::new().map_err(|source| StartError::Io {
            host: host.clone(),
            source,
        })?;
        Ok(Self {
            levels: found.levels.clone(),
            agents_dir: config.agents_dir.clone(),
            cancel,
        })
    }

    fn devices(&self) -> impl Iterator<Item = (usize, &Device)> {
        let numbered = self.levels.iter().enumerate();
        numbered.flat_map(|(i, level)| level.devices.iter().map(move |d| (i + 1, d)))
    }

    fn off(&self) -> Outcome {
        let start = Instant::now();
        let mut reasons = Vec::new();
        for (index, level) in self.levels.iter().enumerate() {
            let number = index + 1;
            match self.level_off(number, &level.devices) {
                Err(Ended::Cancelled) => return Outcome::Cancelled,
                Err(Ended::Failed(mut more)) => reasons.append(&mut more),
                Ok(()) => {
                    let agents: Vec<_> = level.devices.iter().map(|d| d.agent.clone()).collect();
                    let took = start.elapsed();
                    return if agents.iter().any(|a| a == DUMMY) {
                        Outcome::Rehearsed {
                            level: number,
                            took,
                            agents,
                        }
                    } else {
                        Outcome::Confirmed {
                            level: number,
                            took,
                            agents,
                        }
                    };
                }
            }
        }
        Outcome::Failed { reasons }
    }

    /// Each round goes to every device, also after one has failed: half a host off is
    /// nearer to the aim than none of it.
    fn level_off(&self, level: usize, devices: &[Device]) -> Result<(), Ended> {
        type Step = fn(&Run, &Device) -> Result<(), String>;
        // The agent's own description last: power goes first.
        let rounds: [Step; 3] = [
            |run, device| run.done(device, Action::Off),
            |run, device| match run.power(device)? {
                Power::Off => Ok(()),
                Power::On => Err("said `off` was done, but its status says on".into()),
            },
            Run::knows_off,
        ];
        for round in rounds {
            let mut reasons = Vec::new();
            for device in devices {
                if let Err(why) = round(self, device) {
                    reasons.push(Reason {
                        level,
                        agent: device.agent.clone(),
                        why,
                    });
                }
            }
            if self.cancel.is_cancelled() {
                return Err(Ended::Cancelled);
            }
            if !reasons.is_empty() {
                return Err(Ended::Failed(reasons));
            }
        }
        Ok(())
    }

    fn done(&self, device: &Device, action: Action) -> Result<(), String> {
        self.ask(device, action, |a| a.code == 0).map(|_| ())
    }

    fn power(&self, device: &Device) -> Result<Power, String> {
        let known = |a: &Answer| matches!(a.code, 0 | STATUS_OFF);
        let answer = self.ask(device, Action::Status, known)?;
        Ok(if answer.code == STATUS_OFF {
            Power::Off
        } else {
            Power::On
        })
    }

    fn knows_off(&self, device: &Device) -> Result<(), String> {
        let answer = self.ask(device, Action::Metadata, |a| a.code == 0)?;
        if actions(&answer.stdout).iter().any(|a| a == "off") {
            Ok(())
        } else {
            Err("its metadata has no action `off`: it cannot take power".into())
        }
    }

    /// Call until the answer is good or the retries are used up.
    fn ask(
        &self,
        device: &Device,
        action: Action,
        good: impl Fn(&Answer) -> bool,
    ) -> Result<Answer, String> {
        let mut tries = 0;
        loop {
            let why = match call(&self.agents_dir, device, action, &self.cancel) {
                Ok(answer) if good(&answer) => return Ok(answer),
                Ok(answer) => format!(
                    "`{}` ended with exit status {}: {}",
                    action.name(),
                    answer.code,
                    answer.complaint()
                ),
                Err(e @ (CallError::Cancelled | CallError::Missing(_))) => {
                    return Err(e.to_string());
                }
                Err(e) => e.to_string(),
            };
            if tries >= device.retries {
                return Err(why);
            }
            tries += 1;
        }
    }
}

/// Why a level did not confirm.
enum Ended {
    Cancelled,
    Failed(Vec<Reason>),
}
