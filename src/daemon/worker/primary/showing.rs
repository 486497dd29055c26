//! What a primary shows of itself.

use super::{MEASURE_EVERY, PUBLISH_EVERY, PrimarySide};
use crate::api::links::LinkLag;
use crate::api::types::Role;
use crate::daemon::clock::now;
use crate::interpose::checkpoint::ClockStatus;
use crate::mirror::primary::PrimaryState;
use crate::mirror::{Micros, PrimaryStatus};
use interconnect::link::{LinkState, LinkStats};

/// The link that bounds the others: one that carries nothing, or else the one that is to
/// carry what it has for the longest. None if there is one link only, or all are alike.
fn limiting(links: &[LinkStats]) -> Option<usize> {
    let down = links.iter().position(|link| link.state != LinkState::Up);
    if links.len() < 2 || down.is_some() {
        return down.filter(|_| links.len() > 1);
    }
    let behind_us = |link: &LinkStats| {
        let rate = link.capacity_bytes_per_s.filter(|rate| *rate > 0)?;
        Some(link.in_flight_bytes.saturating_mul(1_000_000) / rate)
    };
    let all: Option<Vec<u64>> = links.iter().map(behind_us).collect();
    let all = all?;
    let (worst, least) = (all.iter().max()?, all.iter().min()?);
    // Half as much again is no accident of the moment.
    (worst * 2 > least * 3).then(|| all.iter().position(|us| us == worst))?
}

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
        let link_lag = self.link_lag(&status);
        let warnings = self.warnings(&status, link_lag);
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
            s.link_lag = link_lag;
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

    /// How far the links are behind, and which one most.
    fn link_lag(&self, status: &PrimaryStatus) -> Option<LinkLag> {
        let limited = status.limited?;
        let attempt = self.attempt.as_ref()?;
        Some(LinkLag {
            bytes: limited.bytes,
            drains_us: limited.drains_in.map(|t| t.0),
            held_permille: limited.held_permille,
            limiting_link: limiting(&attempt.peer.interconnect.stats().links),
        })
    }

    fn warnings(&self, status: &PrimaryStatus, lag: Option<LinkLag>) -> Vec<String> {
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
            if let Some(link) = lag.and_then(|lag| lag.limiting_link) {
                words += &format!(", link {link} is most behind");
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_that_bounds_the_others_is_named() {
        let link = |state, capacity_bytes_per_s, in_flight_bytes| LinkStats {
            state,
            capacity_bytes_per_s,
            in_flight_bytes,
            ..LinkStats::default()
        };
        let up = |rate, bytes| link(LinkState::Up, Some(rate), bytes);
        assert_eq!(limiting(&[]), None);
        assert_eq!(limiting(&[link(LinkState::Down, None, 0)]), None);
        let down = link(LinkState::Suspect, None, 0);
        assert_eq!(limiting(&[up(100, 9), down]), Some(1));
        assert_eq!(limiting(&[up(100, 9), up(100, 10)]), None);
        assert_eq!(limiting(&[up(100, 90), up(1000, 90)]), Some(0));
        assert_eq!(limiting(&[up(100, 9), link(LinkState::Up, None, 90)]), None);
    }

    #[test]
    fn what_is_queued_is_told_in_time_where_that_is_known() {
        assert_eq!(
            behind(3 << 20, Some(Micros::from_millis(340))),
            "340 ms of data queued (3072 KiB)"
        );
        assert_eq!(behind(2048, None), "2 KiB queued");
    }
}
