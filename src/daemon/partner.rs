//! One partner of this host: its interconnect, its heartbeats, and the threads that hand
//! what comes from it to the workers.

use super::clock::now_ns;
use super::control::ControlMsg;
use super::worker::{Peer, Routes, WorkerEvent};
use crate::api::links::LinkHealth;
use crate::api::types::LinkConfig;
use crate::api::types::PartnerStatus;
use crate::mirror::Verdict;
use crate::pool::{Generation, HostName, VmId};
use interconnect::detector;
use interconnect::frame::{Frame, FrameKind};
use interconnect::heartbeat::{Heartbeat, HeartbeatConfig, HeartbeatLink};
use interconnect::identity::Identity;
use interconnect::link::{Interconnect, LinkAddr, LinkEvent, LinkSettings, LinkState, PairConfig};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Called for a control message that has no worker here: a request for a standby, or a
/// standby that looks for its primary.
pub type OnUnrouted = Arc<dyn Fn(&HostName, VmId, Generation, ControlMsg) + Send + Sync>;

/// A partner and everything that runs for it.
pub struct Partner {
    /// As pinned.
    pub config: LinkConfig,
    /// Its interconnect.
    pub interconnect: Interconnect,
    heartbeat: Arc<Heartbeat>,
    refused: Arc<Mutex<Option<String>>>,
    alive: Arc<AtomicBool>,
}

/// What a partner is started with.
pub struct PartnerSetup {
    /// As pinned.
    pub config: LinkConfig,
    /// This host's identity.
    pub identity: Arc<Identity>,
    /// This host's name.
    pub me: HostName,
    /// Heartbeat period.
    pub period: Duration,
    /// Detection time.
    pub detection: Duration,
    /// Where the network runs.
    pub runtime: tokio::runtime::Handle,
    /// Inboxes of the workers.
    pub routes: Routes,
    /// For messages that have no worker.
    pub on_unrouted: OnUnrouted,
}

impl Partner {
    /// Bind, dial, beat.
    ///
    /// # Errors
    /// What cannot be bound or understood.
    pub fn start(setup: PartnerSetup) -> Result<Self, String> {
        let name = setup.config.partner.clone();
        let fingerprint = setup
            .config
            .fingerprint
            .parse()
            .map_err(|e| format!("link to {name}: {e}"))?;
        let acks = setup.routes.clone();
        let (interconnect, events) = Interconnect::start(
            PairConfig {
                identity: setup.identity,
                me: setup.me.to_string(),
                peer: name.to_string(),
                peer_fingerprint: fingerprint,
                links: setup
                    .config
                    .links
                    .iter()
                    .map(|l| LinkAddr {
                        local: l.local,
                        peer: l.peer,
                    })
                    .collect(),
                settings: LinkSettings::default(),
                on_ack: Some(Arc::new(move |frame: Frame| {
                    let Frame {
                        vm,
                        generation,
                        epoch,
                        ..
                    } = frame;
                    tracing::debug!(%vm, %epoch, "acknowledged");
                    if !acks.send(vm, WorkerEvent::Acked { generation, epoch }) {
                        tracing::debug!(%vm, %epoch, "an acknowledgement for no worker");
                    }
                })),
            },
            setup.runtime,
        )
        .map_err(|e| e.to_string())?;
        let (routes, partner) = (setup.routes.clone(), name.clone());
        let alive = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&alive);
        let heartbeat = Heartbeat::start(HeartbeatConfig {
            me: setup.me.to_string(),
            peer: name.to_string(),
            links: setup
                .config
                .links
                .iter()
                .map(|l| l.heartbeat())
                .map(|l| HeartbeatLink {
                    local: l.local,
                    peer: l.peer,
                })
                .collect(),
            period: setup.period,
            detection: setup.detection,
            on_verdict: Box::new(move |verdict, age| {
                if !matches!(verdict, detector::Verdict::SelfStalled { .. }) {
                    heard.store(verdict == detector::Verdict::Alive, Ordering::Relaxed);
                }
                on_verdict(&routes, &partner, verdict, age);
            }),
        })
        .map_err(|e| e.to_string())?;
        let heartbeat = Arc::new(heartbeat);
        let refused = Arc::new(Mutex::new(None));
        let pump = Pump {
            partner: name,
            routes: setup.routes,
            heartbeat: Arc::clone(&heartbeat),
            refused: Arc::clone(&refused),
            on_unrouted: setup.on_unrouted,
        };
        std::thread::Builder::new()
            .name("partner".into())
            .spawn(move || pump.run(events))
            .map_err(|e| format!("no thread for the partner's events: {e}"))?;
        Ok(Self {
            config: setup.config,
            interconnect,
            heartbeat,
            refused,
            alive,
        })
    }

    /// As a worker sees it.
    #[must_use]
    pub fn peer(&self) -> Peer {
        Peer {
            interconnect: self.interconnect.clone(),
            name: self.config.partner.clone(),
            alive: Arc::clone(&self.alive),
        }
    }

    /// What is known of it.
    #[must_use]
    pub fn status(&self) -> PartnerStatus {
        let stats = self.interconnect.stats();
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let link = stats.links.iter().find(|l| l.state != LinkState::Down);
        let refused = self
            .refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        PartnerStatus {
            name: self.config.partner.clone(),
            connected: stats.session.is_some(),
            verdict: format!("{:?}", self.heartbeat.verdict()).to_lowercase(),
            heard_us_ago: self.heartbeat.last_heard().map(micros),
            rtt_us: link.map(|l| micros(l.rtt)),
            last_error: refused.or(stats.last_error),
            realtime: self.heartbeat.status().priority_warning.is_none(),
            link: link
                .and_then(|l| l.path)
                .map(|(local, peer)| format!("{local} - {peer}")),
            links: stats.links.iter().map(|l| health(l.state)).collect(),
        }
    }
}

fn health(state: LinkState) -> LinkHealth {
    match state {
        LinkState::Down => LinkHealth::Down,
        LinkState::Suspect => LinkHealth::Suspect,
        LinkState::Up => LinkHealth::Up,
    }
}

/// Runs on the heartbeat thread: only hands on.
fn on_verdict(
    routes: &Routes,
    partner: &HostName,
    verdict: detector::Verdict,
    age: Option<Duration>,
) {
    let age_ns = age.map_or(0, |a| u64::try_from(a.as_nanos()).unwrap_or(u64::MAX));
    let last_heard_ns = now_ns().saturating_sub(age_ns);
    let told = match verdict {
        detector::Verdict::Alive => Verdict::Alive,
        detector::Verdict::Lost => Verdict::Lost,
        detector::Verdict::SelfStalled { stalled } => {
            return routes.send_all(|| WorkerEvent::Stalled(stalled));
        }
        detector::Verdict::Unknown | detector::Verdict::Suspect => return,
    };
    routes.send_all(|| WorkerEvent::Verdict {
        partner: partner.clone(),
        verdict: told,
        last_heard_ns,
    });
}

/// Hands the interconnect's events to the workers.
struct Pump {
    partner: HostName,
    routes: Routes,
    heartbeat: Arc<Heartbeat>,
    refused: Arc<Mutex<Option<String>>>,
    on_unrouted: OnUnrouted,
}

impl Pump {
    fn run(self, mut events: tokio::sync::mpsc::Receiver<LinkEvent>) {
        while let Some(event) = events.blocking_recv() {
            self.event(event);
        }
    }

    fn set_refused(&self, reason: Option<String>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    fn event(&self, event: LinkEvent) {
        let partner = &self.partner;
        match event {
            LinkEvent::Up {
                peer,
                heartbeat_key,
                ..
            } => {
                tracing::info!(%partner, version = peer.version, "interconnect up");
                self.set_refused(None);
                self.heartbeat.set_key(heartbeat_key);
                self.routes
                    .send_all(|| WorkerEvent::LinkUp(partner.clone()));
            }
            LinkEvent::Down { reason, .. } => {
                tracing::warn!(%partner, "interconnect down: {reason}");
                self.routes
                    .send_all(|| WorkerEvent::LinkDown(partner.clone(), reason.clone()));
            }
            LinkEvent::Control { frame, .. } => self.control(frame),
            LinkEvent::EpochLane {
                vm, generation, rx, ..
            } => {
                if !self.routes.send(vm, WorkerEvent::Lane { generation, rx }) {
                    tracing::warn!(%partner, %vm, "an epoch lane for a VM that has no standby here");
                }
            }
            LinkEvent::Refused { reason } => {
                tracing::error!(%partner, "{reason}");
                self.set_refused(Some(reason));
            }
        }
    }

    fn control(&self, frame: Frame) {
        if frame.kind != FrameKind::Control {
            return;
        }
        let message = match ControlMsg::from_bytes(&frame.payload) {
            Ok(message) => message,
            Err(e) => {
                tracing::warn!(partner = %self.partner, "a control message is not understood: {e}");
                return;
            }
        };
        if matches!(message, ControlMsg::Prepare { .. }) {
            return (self.on_unrouted)(&self.partner, frame.vm, frame.generation, message);
        }
        let event = WorkerEvent::Control {
            from: self.partner.clone(),
            generation: frame.generation,
            message: message.clone(),
        };
        if !self.routes.send(frame.vm, event) {
            (self.on_unrouted)(&self.partner, frame.vm, frame.generation, message);
        }
    }
}
