//! Two ends of the interconnect, and an epoch lane between them that carries bulk.

use super::peer::{Report, say_ready};
use super::tcp::measure;
use super::{PIECE_BYTES, cpu};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use interconnect::frame::{Frame, FrameKind};
use interconnect::heartbeat::{DETECTION_DEFAULT, Heartbeat, HeartbeatConfig, HeartbeatLink};
use interconnect::heartbeat::{HeartbeatKey, PERIOD_DEFAULT};
use interconnect::identity::{Fingerprint, Identity};
use interconnect::ids::{Epoch, Generation, VmId};
use interconnect::link::{Interconnect, LinkAddr, LinkEvent, LinkSettings, OnAck, PairConfig};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// The VM all of it is about.
pub const VM: VmId = VmId([7; 16]);
/// Its generation.
pub const GENERATION: Generation = Generation(1);
/// Worker threads of each side's runtime, as in the daemon.
const WORKERS: usize = 2;
/// Between two looks at the heartbeat; well below its period.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// One end of a pair.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct End {
    /// Folder of its identity.
    pub identity: PathBuf,
    /// Its name and the partner's.
    pub names: (String, String),
    /// The partner's fingerprint.
    pub peer_fingerprint: Fingerprint,
    /// Local and partner's address of each link.
    pub links: Vec<(SocketAddr, SocketAddr)>,
}

impl End {
    /// Both ends of a pair, with identities made in `folder`: the first one dials.
    ///
    /// # Errors
    /// If an identity cannot be written.
    pub fn pair(folder: &Path, links: &[(SocketAddr, SocketAddr)]) -> Result<[Self; 2]> {
        let folders = [folder.join("identity-0"), folder.join("identity-1")];
        let mut made = Vec::new();
        for folder in folders {
            made.push((Identity::load_or_create(&folder)?.fingerprint(), folder));
        }
        let end = |me: usize, links| Self {
            identity: made[me].1.clone(),
            names: (format!("host-{me}"), format!("host-{}", 1 - me)),
            peer_fingerprint: made[1 - me].0,
            links,
        };
        let turned = links.iter().map(|&(a, b)| (b, a)).collect();
        Ok([end(0, links.to_vec()), end(1, turned)])
    }
}

/// What to do with an epoch lane.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// This end.
    pub end: End,
    /// Not measured at the start, in s.
    pub warm_up_s: f64,
    /// Measured, in s.
    pub seconds: f64,
    /// Send nothing: only the pair stands.
    pub idle: bool,
    /// Heartbeats beside it, from and to these addresses; the sender's end tells their times.
    pub heartbeat: Option<(SocketAddr, SocketAddr)>,
}

/// A running end.
pub struct Running {
    /// The interconnect.
    pub pair: Interconnect,
    /// Its events.
    pub events: mpsc::Receiver<LinkEvent>,
    /// For the heartbeats.
    pub key: Option<HeartbeatKey>,
    runtime: Option<Runtime>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Running {
    /// Binds the links and begins to dial or accept.
    ///
    /// # Errors
    /// If it cannot start.
    pub fn start(end: &End, on_ack: Option<OnAck>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .enable_all()
            .build()?;
        let link = |&(local, peer): &(SocketAddr, SocketAddr)| LinkAddr { local, peer };
        let config = PairConfig {
            identity: Arc::new(Identity::load_or_create(&end.identity)?),
            me: end.names.0.clone(),
            peer: end.names.1.clone(),
            peer_fingerprint: end.peer_fingerprint,
            links: end.links.iter().map(link).collect(),
            settings: LinkSettings::default(),
            on_ack,
        };
        let (pair, events) = Interconnect::start(config, runtime.handle().clone())?;
        Ok(Self {
            pair,
            events,
            key: None,
            runtime: Some(runtime),
        })
    }

    /// Waits until the session stands.
    ///
    /// # Errors
    /// If it is refused.
    pub fn wait_up(&mut self) -> Result<()> {
        loop {
            match self.events.blocking_recv() {
                Some(LinkEvent::Up { heartbeat_key, .. }) => {
                    self.key = Some(heartbeat_key);
                    return Ok(());
                }
                Some(LinkEvent::Refused { reason }) => bail!("refused: {reason}"),
                Some(_) => {}
                None => bail!("the interconnect ended"),
            }
        }
    }

    /// Waits for the partner's epoch lane.
    ///
    /// # Errors
    /// If the session ends before.
    pub fn wait_lane(&mut self) -> Result<mpsc::Receiver<Frame>> {
        loop {
            match self.events.blocking_recv() {
                Some(LinkEvent::EpochLane { rx, .. }) => return Ok(rx),
                Some(LinkEvent::Down { reason, .. }) => bail!("the session ended: {reason}"),
                Some(_) => {}
                None => bail!("the interconnect ended"),
            }
        }
    }

    /// Figures of all links, as notes.
    #[must_use]
    pub fn notes(&self) -> Vec<(String, f64)> {
        let mut notes = Vec::new();
        for (index, link) in self.pair.stats().links.iter().enumerate() {
            let mut note = |name: &str, value: f64| notes.push((format!("{name}{index}"), value));
            note("rtt_ms", link.rtt.as_secs_f64() * 1e3);
            note("sent_packets", link.sent_packets as f64);
            note("lost_packets", link.lost_packets as f64);
            note("sent_bytes", link.sent_bytes as f64);
            note("black_holes", link.black_holes as f64);
            note("mtu", f64::from(link.mtu_bytes));
            note("window", link.window_bytes as f64);
            note("capacity", link.capacity_bytes_per_s.unwrap_or(0) as f64);
        }
        notes
    }

    fn heartbeat(&self, plan: &Plan) -> Result<Option<Heartbeat>> {
        let Some((local, peer)) = plan.heartbeat else {
            return Ok(None);
        };
        let heartbeat = Heartbeat::start(HeartbeatConfig {
            me: plan.end.names.0.clone(),
            peer: plan.end.names.1.clone(),
            links: vec![HeartbeatLink { local, peer }],
            period: PERIOD_DEFAULT,
            detection: DETECTION_DEFAULT,
            on_verdict: Box::new(|_, _| {}),
        })?;
        heartbeat.set_key(self.key.clone().context("no key yet")?);
        Ok(Some(heartbeat))
    }
}

/// How late each heartbeat came after the one before, beyond the period, in µs, while
/// `going`. A look that comes too late to tell two heartbeats apart tells of neither.
fn lateness(heartbeat: &Heartbeat, going: &AtomicBool) -> Vec<f64> {
    let mut times = Vec::new();
    let mut last = None;
    while going.load(Ordering::Relaxed) {
        std::thread::sleep(LOOK_EVERY);
        let before = heartbeat.status().heard;
        let (now, age) = (std::time::Instant::now(), heartbeat.last_heard());
        if heartbeat.status().heard != before {
            continue;
        }
        let Some(came) = age.and_then(|age| now.checked_sub(age)) else {
            continue;
        };
        match last {
            Some((heard, at)) if before == heard + 1 => {
                let gap = came.saturating_duration_since(at);
                times.push(gap.saturating_sub(PERIOD_DEFAULT).as_secs_f64() * 1e6);
            }
            _ => {}
        }
        last = Some((before, came));
    }
    times
}

/// Receives for the time of the plan.
///
/// # Errors
/// If the pair does not come up or ends early.
pub fn receive(plan: &Plan) -> Result<Report> {
    let mut running = Running::start(&plan.end, None)?;
    say_ready()?;
    running.wait_up()?;
    let heartbeat = running.heartbeat(plan)?;
    let mut report = if plan.idle {
        std::thread::sleep(Duration::from_secs_f64(plan.warm_up_s + plan.seconds));
        Report::default()
    } else {
        let mut lane = running.wait_lane()?;
        measure(plan.warm_up_s, plan.seconds, || {
            let frame = lane.blocking_recv().context("the lane ended")?;
            Ok(frame.payload.len() as u64)
        })?
    };
    report.notes = running.notes();
    drop(heartbeat);
    Ok(report)
}

/// Sends until the receiver has enough.
///
/// # Errors
/// If the pair does not come up.
pub fn send(plan: &Plan) -> Result<Report> {
    let mut running = Running::start(&plan.end, None)?;
    running.wait_up()?;
    let heartbeat = running.heartbeat(plan)?;
    let going = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let sampler = heartbeat
            .as_ref()
            .map(|heartbeat| scope.spawn(|| lateness(heartbeat, &going)));
        let sent = send_measured(plan, &running);
        going.store(false, Ordering::Relaxed);
        let mut report = sent?;
        if let Some(sampler) = sampler {
            report.times_us = sampler.join().unwrap_or_default();
        }
        Ok(report)
    })
}

fn send_measured(plan: &Plan, running: &Running) -> Result<Report> {
    if plan.idle {
        let cpu = cpu::used()?;
        std::thread::sleep(Duration::from_secs_f64(plan.warm_up_s + plan.seconds * 0.9));
        return Ok(Report {
            cpu_seconds: (cpu::used()? - cpu).as_secs_f64(),
            ..Report::default()
        });
    }
    let lane = running.pair.open_epoch_lane(VM, GENERATION)?;
    let payload = Bytes::from(vec![0x5a; PIECE_BYTES]);
    let mut epoch = 0;
    let mut next = || {
        epoch += 1;
        let frame = Frame {
            kind: FrameKind::SeedPages,
            vm: VM,
            generation: GENERATION,
            epoch: Epoch(epoch),
            payload: payload.clone(),
        };
        lane.send_blocking(frame)
            .ok()
            .map(|()| payload.len() as u64)
    };
    let mut report = measure(plan.warm_up_s, plan.seconds * 0.9, || {
        next().context("the receiver went away early")
    })?;
    report.notes = running.notes();
    while next().is_some() {}
    Ok(report)
}
