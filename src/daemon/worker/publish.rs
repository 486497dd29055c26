//! What a worker shows: its status, its figures, its events. The API reads it, nobody
//! else writes it.

use crate::api::types::{Failover, Role, SeedingStatus, VmStatus};
use crate::daemon::clock::now_ns;
use crate::daemon::figures::{EpochSample, EventLog, Figures};
use crate::interpose::disk::Pulse;
use crate::pool::Generation;
use crate::pool::spec::VmSpec;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One VM's shown state.
pub struct Shared {
    inner: Mutex<Inner>,
}

struct Inner {
    name: String,
    status: VmStatus,
    at_ns: u64,
    figures: Figures,
    events: EventLog,
    /// Of the disks it has here.
    pulses: Vec<Arc<Pulse>>,
}

impl Shared {
    /// A VM that does not run here.
    #[must_use]
    pub fn stopped(spec: &VmSpec) -> Self {
        let status = VmStatus {
            name: spec.name.to_string(),
            uuid: spec.uuid.to_string(),
            role: Role::Stopped,
            state: "stopped".into(),
            protection: spec.protection.as_str().into(),
            mirrored: false,
            partner: None,
            generation: 0,
            epoch: 0,
            committed: 0,
            lag_us: None,
            link_lag: None,
            seeding: None,
            epochs: None,
            last_failover: None,
            warnings: Vec::new(),
            events: Vec::new(),
            qemu_pid: None,
            resident_bytes: None,
            memory_bytes: spec.memory.get(),
            console: None,
            disks: Vec::new(),
            age_us: 0,
        };
        let inner = Inner {
            name: spec.name.to_string(),
            status,
            at_ns: now_ns(),
            figures: Figures::default(),
            events: EventLog::default(),
            pulses: Vec::new(),
        };
        Self {
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Change what is shown.
    pub fn update(&self, change: impl FnOnce(&mut VmStatus)) {
        let mut inner = self.lock();
        change(&mut inner.status);
        inner.at_ns = now_ns();
    }

    /// Seeding progress.
    pub fn seeding(&self, progress: &SeedingStatus) {
        self.update(|s| s.seeding = Some(progress.clone()));
    }

    /// One more committed epoch.
    pub fn epoch(&self, sample: EpochSample) {
        self.lock().figures.push(sample);
    }

    /// A new attempt: figures begin anew.
    pub fn reset_figures(&self) {
        self.lock().figures = Figures::default();
    }

    /// Something happened.
    pub fn event(&self, what: String) {
        let mut inner = self.lock();
        tracing::info!(vm = %inner.name, "{what}");
        inner.events.push(now_ns(), what);
    }

    /// This side took over.
    pub fn failover(&self, failover: Failover) {
        self.update(|s| s.last_failover = Some(failover));
    }

    /// It has these disks here.
    pub fn disks(&self, pulses: Vec<Arc<Pulse>>) {
        self.lock().pulses = pulses;
    }

    /// The storage of its disks here; none if nothing of it is.
    #[must_use]
    pub fn pulses(&self) -> Vec<Arc<Pulse>> {
        self.lock().pulses.clone()
    }

    /// Take the VM's place on this host for a standby of `generation`; false if something
    /// of it is here already. From here on nobody else gets it until [`Shared::ended`].
    #[must_use]
    pub fn begin_standby(&self, generation: Generation) -> bool {
        let mut inner = self.lock();
        if inner.status.role != Role::Stopped {
            return false;
        }
        inner.status.role = Role::Standby;
        inner.status.state = "preparing".into();
        inner.status.generation = generation.0;
        inner.at_ns = now_ns();
        true
    }

    /// The worker is gone.
    pub fn ended(&self) {
        self.lock().pulses.clear();
        self.update(|s| {
            s.role = Role::Stopped;
            s.state = "stopped".into();
            s.mirrored = false;
            s.link_lag = None;
            s.seeding = None;
            s.lag_us = None;
            s.qemu_pid = None;
            s.resident_bytes = None;
            s.console = None;
        });
    }

    /// Everything, as of now.
    #[must_use]
    pub fn snapshot(&self) -> VmStatus {
        let inner = self.lock();
        let mut status = inner.status.clone();
        status.epochs = inner.figures.summary();
        status.events = inner.events.list();
        status.age_us = now_ns().saturating_sub(inner.at_ns) / 1000;
        status
    }
}
