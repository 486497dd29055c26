//! What a standby shows of itself.

use super::StandbySide;
use crate::api::types::Role;
use crate::daemon::clock::now;
use crate::daemon::worker::busy;
use crate::mirror::Micros;

/// How often the status is refreshed under a stream of epochs.
const PUBLISH_EVERY: Micros = Micros::from_millis(25);
/// How often resident memory is looked up.
const MEASURE_EVERY: Micros = Micros::from_millis(1000);

impl StandbySide<'_> {
    pub(super) fn publish(&mut self, force: bool) {
        let at = now();
        if !force && at.since(self.published_at) < PUBLISH_EVERY {
            return;
        }
        self.published_at = at;
        if at.since(self.measured_at) >= MEASURE_EVERY {
            self.measured_at = at;
            let held = self.landing.assembler().held_bytes();
            // The applier holds the RAM while it applies; an acknowledgement does not wait
            // for a figure.
            if let Ok(ram) = self.landing.ram.try_lock() {
                self.ram_bytes = ram.resident_bytes().unwrap_or(0);
            }
            let rest = self.ram_bytes + held;
            self.resident_bytes =
                busy::private_bytes(self.parts.qemu.pid()).map(|qemu| qemu + rest);
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
