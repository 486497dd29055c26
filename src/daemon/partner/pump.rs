//! The thread that hands on what comes from a partner: to the workers, to a link test, to
//! the host. It must never wait for any of them.

use super::{Hooks, PairLog, Probes};
use crate::daemon::control::ControlMsg;
use crate::daemon::keys::KeyWord;
use crate::daemon::worker::{Routes, WorkerEvent};
use crate::pool::HostName;
use interconnect::frame::{Frame, FrameKind};
use interconnect::heartbeat::Heartbeat;
use interconnect::identity::Fingerprint;
use interconnect::link::LinkEvent;
use interconnect::probe::PROBE_VM;
use interconnect::probe::wire::Talk;
use std::sync::{Arc, Weak};

/// What a partner says about keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyMessage {
    /// Of its own key.
    Own(KeyWord),
    /// It has pinned this one of ours.
    Pinned(Fingerprint),
}

/// Hands the interconnect's events on.
pub(super) struct Pump {
    pub(super) partner: HostName,
    pub(super) routes: Routes,
    pub(super) heartbeat: Arc<Heartbeat>,
    pub(super) log: Arc<PairLog>,
    /// Weakly: it keeps the interconnect alive, and this thread ends with that.
    pub(super) probes: Weak<Probes>,
    pub(super) hooks: Hooks,
}

impl Pump {
    pub(super) fn run(self, mut events: tokio::sync::mpsc::Receiver<LinkEvent>) {
        while let Some(event) = events.blocking_recv() {
            self.event(event);
        }
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
                self.log.up(&peer);
                self.heartbeat.set_key(heartbeat_key);
                self.routes
                    .send_all(|| WorkerEvent::LinkUp(partner.clone()));
                (self.hooks.on_session)(partner);
            }
            LinkEvent::Down { reason, .. } => {
                tracing::warn!(%partner, "interconnect down: {reason}");
                self.log.event(format!("session down: {reason}"));
                self.routes
                    .send_all(|| WorkerEvent::LinkDown(partner.clone(), reason.clone()));
            }
            // One link of several: the session stands or falls for itself, and the workers
            // with it.
            LinkEvent::LinkUp { link, path, .. } => {
                let (local, peer) = path;
                tracing::info!(%partner, link, %local, %peer, "link up");
                self.log.event(format!("link {link} up ({local} - {peer})"));
            }
            LinkEvent::LinkDown { link, reason, .. } => {
                tracing::warn!(%partner, link, "link down: {reason}");
                self.log.event(format!("link {link} down: {reason}"));
            }
            LinkEvent::Control { frame, .. } => self.control(frame),
            LinkEvent::EpochLane { vm, rx, .. } if vm == PROBE_VM => {
                if let Some(probes) = self.probes.upgrade() {
                    probes.responder.lane(rx);
                }
            }
            LinkEvent::EpochLane {
                vm, generation, rx, ..
            } => {
                if !self.routes.send(vm, WorkerEvent::Lane { generation, rx }) {
                    tracing::warn!(%partner, %vm, "an epoch lane for a VM that has no standby here");
                }
            }
            LinkEvent::Refused { reason } => {
                tracing::error!(%partner, "{reason}");
                self.log.refused(reason);
            }
            // No product uses it here yet; the lane ends when it is dropped.
            LinkEvent::IoLane { vm, .. } => {
                tracing::warn!(%partner, %vm, "an I/O lane for a VM that has no use for it here");
            }
        }
    }

    fn control(&self, frame: Frame) {
        match frame.kind {
            FrameKind::Control => self.message(&frame),
            FrameKind::ProbeAck => match Talk::parse(&frame.payload) {
                Ok(talk) => {
                    if let Some(probes) = self.probes.upgrade() {
                        probes.heard(talk);
                    }
                }
                Err(e) => tracing::warn!(partner = %self.partner, "{e}"),
            },
            _ => {}
        }
    }

    fn message(&self, frame: &Frame) {
        let message = match ControlMsg::from_bytes(&frame.payload) {
            Ok(message) => message,
            Err(e) => {
                tracing::warn!(partner = %self.partner, "a control message is not understood: {e}");
                return;
            }
        };
        let key = match message {
            ControlMsg::NewKey { present, next } => KeyMessage::Own(KeyWord::New { present, next }),
            ControlMsg::OnlyKey { present } => KeyMessage::Own(KeyWord::Only { present }),
            ControlMsg::NewKeyPinned { next } => KeyMessage::Pinned(next),
            ControlMsg::Prepare { .. } => {
                return (self.hooks.on_unrouted)(
                    &self.partner,
                    frame.vm,
                    frame.generation,
                    message,
                );
            }
            message => {
                let event = WorkerEvent::Control {
                    from: self.partner.clone(),
                    generation: frame.generation,
                    message: message.clone(),
                };
                if !self.routes.send(frame.vm, event) {
                    (self.hooks.on_unrouted)(&self.partner, frame.vm, frame.generation, message);
                }
                return;
            }
        };
        (self.hooks.on_key)(&self.partner, key);
    }
}
