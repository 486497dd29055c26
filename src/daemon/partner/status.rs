//! What is shown of a pair: its links and lanes, with rates from two readings.

use super::Partner;
use crate::api::links::{LaneStatus, LinkHealth, LinkStatus, PairStatus, VmEncoding};
use crate::api::types::{LinkConfig, PartnerStatus};
use crate::daemon::figures::EventLog;
use interconnect::link::{
    Hello, Interconnect, LaneKind, LaneStats, LinkState, LinkStats, PairStats,
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two readings of a pair's figures.
const READ_EVERY: Duration = Duration::from_secs(1);

/// What happened to a pair.
#[derive(Default)]
pub(super) struct PairLog {
    inner: Mutex<LogInner>,
}

#[derive(Default)]
struct LogInner {
    events: EventLog,
    /// Why the partner is refused, or refuses, until a session stands.
    refused: Option<String>,
}

impl PairLog {
    fn lock(&self) -> MutexGuard<'_, LogInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something an operator may want to know.
    pub(super) fn event(&self, what: String) {
        self.lock()
            .events
            .push(crate::daemon::clock::now_ns(), what);
    }

    /// A session stands.
    pub(super) fn up(&self, peer: &Hello) {
        self.lock().refused = None;
        self.event(format!(
            "session up with {} ({}, protocol version {})",
            peer.host, peer.build, peer.version
        ));
    }

    /// There will be none until somebody acts.
    pub(super) fn refused(&self, reason: String) {
        self.event(reason.clone());
        self.lock().refused = Some(reason);
    }
}

/// The two newest readings of a pair's figures.
#[derive(Default)]
pub(super) struct Readings {
    inner: Mutex<Vec<(Instant, PairStats)>>,
}

impl Readings {
    /// Read for ever.
    pub(super) async fn keep(&self, interconnect: Interconnect) {
        loop {
            tokio::time::sleep(READ_EVERY).await;
            let reading = (Instant::now(), interconnect.stats());
            let mut readings = self.lock();
            if readings.len() == 2 {
                readings.remove(0);
            }
            readings.push(reading);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, PairStats)>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both, if there are two of the same session, and the time between.
    fn two(&self) -> Option<(Duration, PairStats, PairStats)> {
        match self.lock().as_slice() {
            [(t0, old), (t1, new)] if old.session == new.session => {
                Some((t1.duration_since(*t0), old.clone(), new.clone()))
            }
            _ => None,
        }
    }
}

pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What was added between two readings, a second; `None` if the counter began anew.
fn rate(old: u64, new: u64, over: Duration) -> Option<u64> {
    let grown = u128::from(new.checked_sub(old)?);
    let per_s = (grown * 1_000_000_000).checked_div(over.as_nanos())?;
    u64::try_from(per_s).ok()
}

const fn health(state: LinkState) -> LinkHealth {
    match state {
        LinkState::Down => LinkHealth::Down,
        LinkState::Suspect => LinkHealth::Suspect,
        LinkState::Up => LinkHealth::Up,
    }
}

fn link(
    index: usize,
    config: &LinkConfig,
    stats: &LinkStats,
    readings: Option<&(Duration, PairStats, PairStats)>,
) -> Option<LinkStatus> {
    let addrs = config.links.get(index)?;
    let (local, peer) = stats.path.unwrap_or((addrs.local, addrs.peer));
    let lately = |pick: fn(&LinkStats) -> u64| {
        let (over, old, new) = readings?;
        rate(
            pick(old.links.get(index)?),
            pick(new.links.get(index)?),
            *over,
        )
    };
    let measured = |time: Duration| (!time.is_zero()).then(|| micros(time));
    Some(LinkStatus {
        link: index,
        state: health(stats.state),
        since_us: micros(stats.since),
        local,
        peer,
        rtt_us: measured(stats.rtt),
        rtt_min_us: measured(stats.rtt_min),
        capacity_bytes_per_s: stats.capacity_bytes_per_s,
        sent_bytes_per_s: lately(|l| l.sent_bytes),
        received_bytes_per_s: lately(|l| l.received_bytes),
        sent_bytes: stats.sent_bytes,
        received_bytes: stats.received_bytes,
        sent_packets: stats.sent_packets,
        lost_packets: stats.lost_packets,
        resent_bytes: stats.resent_bytes,
        in_flight_bytes: stats.in_flight_bytes,
        flaps: stats.flaps,
        black_holes: stats.black_holes,
        mtu_bytes: stats.mtu_bytes,
        window_bytes: stats.window_bytes,
        last_error: stats.last_error.clone(),
    })
}

fn lane(stats: &LaneStats, readings: Option<&(Duration, PairStats, PairStats)>) -> LaneStatus {
    let is_same = |l: &&LaneStats| {
        (l.kind, l.vm, l.generation, l.outgoing)
            == (stats.kind, stats.vm, stats.generation, stats.outgoing)
    };
    let bytes_per_s = readings.and_then(|(over, old, new)| {
        let old = old.lanes.iter().find(is_same)?;
        let new = new.lanes.iter().find(is_same)?;
        rate(old.bytes, new.bytes, *over)
    });
    let kind = match stats.kind {
        LaneKind::Control => "control",
        LaneKind::Epoch => "epoch",
        LaneKind::Io => "io",
    };
    LaneStatus {
        kind: kind.into(),
        vm: (stats.vm.0 != [0; 16]).then(|| stats.vm.to_string()),
        generation: stats.generation.0,
        outgoing: stats.outgoing,
        frames: stats.frames,
        bytes: stats.bytes,
        bytes_per_s,
        queued_bytes: stats.queued_bytes,
        unacked_bytes: stats.unacked_bytes,
        repeated_bytes: stats.repeated_bytes,
        expired_frames: stats.expired_frames,
    }
}

impl Partner {
    /// What is known of it, in short.
    #[must_use]
    pub fn status(&self) -> PartnerStatus {
        let stats = self.interconnect.stats();
        let link = stats.links.iter().find(|l| l.state != LinkState::Down);
        PartnerStatus {
            name: self.name.clone(),
            connected: stats.session.is_some(),
            verdict: format!("{:?}", self.heartbeat.verdict()).to_lowercase(),
            heard_us_ago: self.heartbeat.last_heard().map(micros),
            rtt_us: link.map(|l| micros(l.rtt)),
            realtime: self.heartbeat.status().priority_warning.is_none(),
            link: link
                .and_then(|l| l.path)
                .map(|(local, peer)| format!("{local} - {peer}")),
            links: stats.links.iter().map(|l| health(l.state)).collect(),
            last_error: self.last_error(stats),
        }
    }

    fn last_error(&self, stats: PairStats) -> Option<String> {
        self.log.lock().refused.clone().or(stats.last_error)
    }

    /// All that is known of the pair; `encoding` is what the VMs mirrored over it show.
    #[must_use]
    pub fn pair_status(&self, encoding: Vec<VmEncoding>) -> PairStatus {
        let config = self.config();
        let stats = self.interconnect.stats();
        let readings = self.readings.two();
        let readings = readings.as_ref();
        let links = stats.links.iter().enumerate();
        let events = self.log.lock().events.list();
        PairStatus {
            partner: self.name.clone(),
            pinned: [
                Some(config.fingerprint.clone()),
                config.next_fingerprint.clone(),
            ]
            .into_iter()
            .flatten()
            .collect(),
            connected: stats.session.is_some(),
            version: stats.version,
            verdict: format!("{:?}", self.heartbeat.verdict()).to_lowercase(),
            heard_us_ago: self.heartbeat.last_heard().map(micros),
            realtime: self.heartbeat.status().priority_warning.is_none(),
            rates_over_ms: readings.map_or(0, |(over, ..)| micros(*over) / 1000),
            links: links
                .filter_map(|(i, stats)| link(i, &config, stats, readings))
                .collect(),
            lanes: stats.lanes.iter().map(|l| lane(l, readings)).collect(),
            encoding,
            events,
            last_error: self.last_error(stats),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_two_readings_of_one_counter() {
        let half = Duration::from_millis(500);
        assert_eq!(rate(1000, 1500, half), Some(1000));
        assert_eq!(rate(1000, 10, half), None, "the counter began anew");
        assert_eq!(rate(0, 10, Duration::ZERO), None);
        assert_eq!(
            rate(0, u64::MAX, Duration::from_nanos(1)),
            None,
            "no number for it"
        );
    }
}
