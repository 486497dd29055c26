//! What the pool asks of a host: its VMs in figures, and which of them have to end how.

use super::{Host, lock};
use crate::api::pool::PoolStatus;
use crate::api::types::{ApiError, Done, Role};
use crate::daemon::ha::{Ending, Membership};
use crate::daemon::worker::Routes;
use crate::fence::isolation::IsolatedVm;
use crate::ha::machine::Local;
use crate::ha::time::Millis;
use crate::interpose::disk::Pulse;
use crate::pool::HostName;
use crate::pool::spec::Protection;
use std::sync::Arc;

impl Host {
    /// Inboxes of all workers.
    pub(in crate::daemon) fn routes(&self) -> &Routes {
        &self.env.routes
    }

    /// Every VM that has a worker here, and how it is to end if this host may run nothing.
    pub(in crate::daemon) fn endings(&self) -> Vec<Ending> {
        let running = self.env.routes.names();
        let vms = lock(&self.vms);
        running
            .into_iter()
            .map(|vm| {
                let spec = vms.get(&vm).map(|entry| &entry.spec);
                let protection = spec.map_or(Protection::None, |spec| spec.protection);
                Ending {
                    isolated: IsolatedVm {
                        vm,
                        response: spec.map(|spec| spec.restart.isolation).unwrap_or_default(),
                        runs_elsewhere: protection != Protection::None,
                    },
                    restarts: protection == Protection::Restart,
                }
            })
            .collect()
    }

    /// The storage of all disks of the VMs that run here.
    pub(in crate::daemon) fn pulses(&self) -> Vec<Arc<Pulse>> {
        let vms = lock(&self.vms);
        let run = vms
            .values()
            .filter(|entry| entry.shared.snapshot().role == Role::Primary);
        run.flat_map(|entry| entry.shared.pulses()).collect()
    }

    /// What this host sees of itself, but for gateway and storage.
    pub(in crate::daemon) fn local(&self) -> Local {
        let vms = lock(&self.vms);
        let mut local = Local::default();
        for entry in vms.values() {
            let status = entry.shared.snapshot();
            match status.role {
                Role::Stopped => {}
                Role::Standby => {
                    let lag = status.lag_us.map(|us| Millis(us / 1000));
                    local.standby_lag = local.standby_lag.max(lag);
                }
                Role::Primary => {
                    local.weight = local.weight.saturating_add(entry.spec.restart.weight);
                }
            }
        }
        local
    }

    /// A person says that `host` is off.
    ///
    /// # Errors
    /// Why that cannot be taken, and what to do.
    pub fn pool_off(&self, host: &HostName) -> Result<Done, ApiError> {
        let membership = self.membership()?;
        membership.declare_off(host).map_err(super::refused)?;
        Ok(Done::default())
    }

    /// The pool as this host knows it.
    ///
    /// # Errors
    /// If it belongs to none.
    pub fn pool_status(&self) -> Result<PoolStatus, ApiError> {
        Ok(self.membership()?.status())
    }

    fn membership(&self) -> Result<&Membership, ApiError> {
        self.membership.get().ok_or_else(|| {
            super::refused(format!(
                "host {} belongs to no pool: its configuration has no table [pool] (docs/guide.md)",
                self.env.config.name
            ))
        })
    }
}
