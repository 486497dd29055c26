//! What the checkpoint's hooks do to a VM's ports, disks and tracker.

use crate::interpose::checkpoint::{CutHooks, HookError};
use crate::interpose::disk::{Disk, EpochWrites, Mode};
use crate::interpose::memory::{CollectStats, Staging, Tracker};
use crate::interpose::net::{NetMode, NetPort};
use crate::pool::{Epoch, Generation};
use std::sync::Arc;

use super::ingress::IngressTap;

/// The hooks of one cut, and what they took.
pub struct Taking<'a> {
    /// The epoch this cut ends.
    pub epoch: Epoch,
    /// The attempt.
    pub generation: Generation,
    /// Ports to drain.
    pub ports: &'a [Arc<NetPort>],
    /// Disks to cut.
    pub disks: &'a [Arc<Disk>],
    /// Tracker to collect from.
    pub tracker: &'a mut Tracker,
    /// Where dirty pages go.
    pub staging: &'a mut Staging,
    /// Ingress is tagged from here too.
    pub ingress: &'a IngressTap,
    /// One per disk, filled by `stopped`.
    pub writes: Vec<EpochWrites>,
    /// Filled by `capture`.
    pub collected: CollectStats,
}

impl Taking<'_> {
    /// The first cut of an attempt turns pass-through into hold and overlay.
    const fn is_first(&self) -> bool {
        self.epoch.0 == 1
    }

    /// Undo what `stopped` did: the epoch goes on.
    pub fn undo(&mut self) {
        let epoch = self.epoch;
        for port in self.ports {
            let undone = if self.is_first() {
                port.set_mode(NetMode::Direct, self.generation)
            } else {
                port.uncut(epoch, epoch)
            };
            if let Err(e) = undone {
                tracing::error!("a port cannot go on in epoch {epoch}: {e}");
            }
        }
        for disk in self.disks {
            let undone = if self.is_first() {
                disk.go_direct(self.generation)
            } else {
                disk.uncut(epoch, epoch)
            };
            if let Err(e) = undone {
                tracing::error!("a disk cannot go on in epoch {epoch}: {e}");
            }
        }
        self.tracker.give_back(self.staging);
        self.ingress.running(epoch);
    }
}

impl CutHooks for Taking<'_> {
    fn stopped(&mut self) -> Result<(), HookError> {
        let next = self.epoch.next();
        self.ingress.running(next);
        for port in self.ports {
            if self.is_first() {
                port.set_mode(NetMode::Hold { epoch: next }, self.generation)?;
            } else {
                port.cut(next)?;
            }
        }
        for disk in self.disks {
            if self.is_first() {
                disk.set_mode(Mode::Overlay { epoch: next }, self.generation)?;
                self.writes.push(EpochWrites::default());
            } else {
                self.writes.push(disk.cut(next)?);
            }
        }
        Ok(())
    }

    fn capture(&mut self) -> Result<(), HookError> {
        self.collected = self.tracker.collect(self.staging)?;
        Ok(())
    }

    fn resumed(&mut self) {
        for disk in self.disks {
            disk.checkpoint_ends();
        }
    }
}
