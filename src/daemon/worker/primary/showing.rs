//! What a primary shows of itself.

use super::{MEASURE_EVERY, PUBLISH_EVERY, PrimarySide};
use crate::api::types::Role;
use crate::daemon::clock::now;
use crate::interpose::checkpoint::ClockStatus;
use crate::mirror::Micros;
use crate::mirror::primary::PrimaryState;

/// What the links are behind with, in words.
pub(super) fn behind(bytes: u64, drains_in: Option<Micros>) -> String {
    let size = format!("{} KiB", bytes >> 10);
    match drains_in {
        Some(time) => format!("{} ms of data queued ({size})", time.0 / 1000),
        None => format!("{size} queued"),
    }
}

impl PrimarySide {
    pub(super) fn publish(&mut self, force: bool) {
        let at = now();
        if !force && at.since(self.published_at) < PUBLISH_EVERY {
            return;
        }
        self.published_at = at;
        if at.since(self.measured_at) >= MEASURE_EVERY {
            self.measured_at = at;
            self.resident_bytes =
                crate::daemon::worker::busy::resident_bytes(self.parts.qemu.pid());
        }
        let status = self.machine.status(now());
        let warnings = self.warnings(&status);
        self.shared.update(|s| {
            s.role = Role::Primary;
            s.state = format!("{:?}", status.state).to_lowercase();
            s.mirrored = status.mirrored;
            s.protection = if self.wanted.is_some() {
                "mirrored"
            } else {
                "none"
            }
            .into();
            s.partner = status.partner.clone().or_else(|| self.wanted.clone());
            s.generation = status.generation.0;
            s.epoch = status.epoch.0;
            s.committed = status.committed.0;
            s.lag_us = status.lag.map(|l| l.0);
            if status.state != PrimaryState::Seeding {
                s.seeding = None;
            }
            s.warnings = warnings;
            s.qemu_pid = i32::try_from(self.parts.qemu.pid()).ok();
            s.resident_bytes = self.resident_bytes;
            s.console = Some(self.parts.paths.console.display().to_string());
            s.disks = self
                .parts
                .images
                .iter()
                .map(|p| p.display().to_string())
                .collect();
        });
    }

    fn warnings(&self, status: &crate::mirror::PrimaryStatus) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.wanted.is_some() && !status.mirrored {
            let why = status.last_reason.as_deref().unwrap_or("not yet");
            warnings.push(format!("should be mirrored and is not: {why}"));
        }
        if status.holding_still {
            warnings.push("the guest stands still: the registry cannot be reached".into());
        }
        if let Some(limited) = &status.limited {
            let mut words = format!(
                "limited by the links: {}",
                behind(limited.bytes, limited.drains_in)
            );
            if limited.held_permille > 0 {
                let percent = limited.held_permille / 10;
                words += &format!("; the guest is held back {percent} % of its time");
            }
            warnings.push(words);
        }
        if let ClockStatus::Unrepaired { reason } = self.checkpointer.clock_status() {
            warnings.push(format!(
                "the guest's clock loses the time of every pause: {reason}"
            ));
        }
        warnings
    }
}
