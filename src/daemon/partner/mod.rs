//! One partner of this host: its interconnect, its heartbeats, and the threads that hand
//! what comes from it to the workers.

mod pump;
mod status;

pub use pump::KeyMessage;
pub use status::micros;

use super::clock::now_ns;
use super::control::ControlMsg;
use super::keys::{KeyWord, Pins};
use super::worker::{Peer, Routes, WorkerEvent};
use crate::api::types::LinkConfig;
use crate::mirror::Verdict;
use crate::pool::{Generation, HostName, VmId};
use interconnect::detector;
use interconnect::frame::Frame;
use interconnect::heartbeat::{Heartbeat, HeartbeatConfig, HeartbeatLink};
use interconnect::identity::{Fingerprint, Identity};
use interconnect::link::{Interconnect, LinkAddr, LinkSettings, LinkState, PairConfig};
use interconnect::probe::wire::Talk;
use interconnect::probe::{Responder, Tester};
use pump::Pump;
use status::{PairLog, Readings};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a link that was dialled anew may take until it stands again.
const REDIAL_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at it.
const REDIAL_LOOK_EVERY: Duration = Duration::from_millis(20);

/// Called for a control message that has no worker here: a request for a standby, or a
/// standby that looks for its primary.
pub type OnUnrouted = Arc<dyn Fn(&HostName, VmId, Generation, ControlMsg) + Send + Sync>;
/// Called when a session with the partner has come up.
pub type OnSession = Arc<dyn Fn(&HostName) + Send + Sync>;
/// Called when the partner says something about keys.
pub type OnKey = Arc<dyn Fn(&HostName, KeyMessage) + Send + Sync>;

/// What a host is told of by its partners, beyond what goes to the workers.
#[derive(Clone)]
pub struct Hooks {
    /// For messages that have no worker.
    pub on_unrouted: OnUnrouted,
    /// For new sessions.
    pub on_session: OnSession,
    /// For keys.
    pub on_key: OnKey,
}

/// Link tests with a partner, both ways.
struct Probes {
    responder: Responder,
    /// The test under way from this side.
    tester: Mutex<Option<Arc<Tester>>>,
}

impl Probes {
    fn heard(&self, talk: Talk) {
        self.responder.asked(&talk);
        if let Some(tester) = lock(&self.tester).as_ref() {
            tester.answered(talk);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A partner and everything that runs for it.
pub struct Partner {
    /// Its name.
    pub name: HostName,
    /// Its interconnect.
    pub interconnect: Interconnect,
    /// As pinned.
    config: Mutex<LinkConfig>,
    heartbeat: Arc<Heartbeat>,
    alive: Arc<AtomicBool>,
    log: Arc<PairLog>,
    probes: Arc<Probes>,
    readings: Arc<Readings>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Partner {
    fn drop(&mut self) {
        // It holds the interconnect.
        self.reader.abort();
    }
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
    /// Whom to tell.
    pub hooks: Hooks,
}

/// The pins in a link's file.
///
/// # Errors
/// Which of them is no fingerprint.
pub fn pins(config: &LinkConfig) -> Result<Pins, String> {
    let parse = |text: &String| {
        text.parse::<Fingerprint>()
            .map_err(|e| format!("link to {}: {e}", config.partner))
    };
    Ok(Pins {
        present: parse(&config.fingerprint)?,
        next: config.next_fingerprint.as_ref().map(parse).transpose()?,
    })
}

impl Partner {
    /// Bind, dial, beat.
    ///
    /// # Errors
    /// What cannot be bound or understood.
    pub fn start(setup: PartnerSetup) -> Result<Self, String> {
        let name = setup.config.partner.clone();
        let pins = pins(&setup.config)?;
        let acks = setup.routes.clone();
        let (interconnect, events) = Interconnect::start(
            PairConfig {
                identity: setup.identity,
                me: setup.me.to_string(),
                peer: name.to_string(),
                peer_fingerprint: pins.present,
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
            setup.runtime.clone(),
        )
        .map_err(|e| e.to_string())?;
        interconnect.set_pins(pins.all());
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
        let log = Arc::new(PairLog::default());
        let probes = Arc::new(Probes {
            responder: Responder::new(interconnect.clone(), setup.runtime.clone()),
            tester: Mutex::default(),
        });
        let pump = Pump {
            partner: name.clone(),
            routes: setup.routes,
            heartbeat: Arc::clone(&heartbeat),
            log: Arc::clone(&log),
            probes: Arc::downgrade(&probes),
            hooks: setup.hooks,
        };
        std::thread::Builder::new()
            .name("partner".into())
            .spawn(move || pump.run(events))
            .map_err(|e| format!("no thread for the partner's events: {e}"))?;
        let readings = Arc::new(Readings::default());
        let (keeps, reads) = (Arc::clone(&readings), interconnect.clone());
        let reader = setup.runtime.spawn(async move { keeps.keep(reads).await });
        Ok(Self {
            name,
            interconnect,
            config: Mutex::new(setup.config),
            heartbeat,
            alive,
            log,
            probes,
            readings,
            reader,
        })
    }

    /// End everything that runs for it, whoever still holds it. When the future, which holds
    /// nothing of it, is done, its addresses can be bound again.
    pub fn close(&self) -> impl Future<Output = ()> + Send + use<> {
        self.cancel_test();
        let closed = self.interconnect.close();
        self.heartbeat.stop();
        closed
    }

    /// As a worker sees it.
    #[must_use]
    pub fn peer(&self) -> Peer {
        Peer {
            interconnect: self.interconnect.clone(),
            name: self.name.clone(),
            alive: Arc::clone(&self.alive),
        }
    }

    /// As pinned now.
    #[must_use]
    pub fn config(&self) -> LinkConfig {
        lock(&self.config).clone()
    }

    /// Age of the newest heartbeat.
    #[must_use]
    pub fn last_heard(&self) -> Option<Duration> {
        self.heartbeat.last_heard()
    }

    /// Note something an operator may want to know.
    pub fn event(&self, what: String) {
        self.log.event(what);
    }

    /// A host says `word` of its own key: the link's new file content, if anything changes.
    /// To be kept before [`Partner::pin`].
    ///
    /// # Errors
    /// Why the word cannot be right.
    pub fn repinned(&self, word: KeyWord) -> Result<Option<LinkConfig>, String> {
        let config = self.config();
        let before = pins(&config)?;
        let after = before.after(word).ok_or_else(|| {
            format!(
                "{} speaks of an identity of its own that is not pinned: {word:?}",
                self.name
            )
        })?;
        Ok((after != before).then(|| LinkConfig {
            fingerprint: after.present.to_string(),
            next_fingerprint: after.next.map(|f| f.to_string()),
            ..config
        }))
    }

    /// Trust what this file says from now on.
    ///
    /// # Errors
    /// As [`pins`].
    pub fn pin(&self, config: LinkConfig) -> Result<(), String> {
        self.interconnect.set_pins(pins(&config)?.all());
        *lock(&self.config) = config;
        Ok(())
    }

    /// Say something about no VM.
    pub fn say(&self, message: &ControlMsg) {
        self.peer()
            .say(VmId([0; 16]), Generation::default(), message);
    }

    /// Dial every link that stands anew, one after the other, so that one always carries;
    /// blocks until that is done.
    ///
    /// # Errors
    /// Which link does not come back: the others keep the connection they have.
    pub fn redial(&self) -> Result<(), String> {
        for (index, link) in self.interconnect.stats().links.iter().enumerate() {
            if link.state == LinkState::Down {
                continue;
            }
            let asked = Instant::now();
            self.interconnect.redial(index);
            loop {
                let stats = self.interconnect.stats();
                let link = stats.links.get(index);
                if link.is_some_and(|l| l.state == LinkState::Up && l.since < asked.elapsed()) {
                    break;
                }
                if asked.elapsed() > REDIAL_PATIENCE {
                    return Err(format!(
                        "link {index} does not come back with the new key within {} s: {}",
                        REDIAL_PATIENCE.as_secs(),
                        link.and_then(|l| l.last_error.as_deref())
                            .unwrap_or("see the partner's log")
                    ));
                }
                std::thread::sleep(REDIAL_LOOK_EVERY);
            }
        }
        Ok(())
    }

    /// Take up a test from this side, unless one is under way; drop the guard when it is over.
    #[must_use]
    pub fn begin_test(self: &Arc<Self>, tester: &Arc<Tester>) -> Option<Testing> {
        let mut slot = lock(&self.probes.tester);
        if slot.is_some() {
            return None;
        }
        *slot = Some(Arc::clone(tester));
        Some(Testing {
            probes: Arc::clone(&self.probes),
        })
    }

    /// End the test from this side, if one is under way.
    pub fn cancel_test(&self) {
        if let Some(tester) = lock(&self.probes.tester).as_ref() {
            tester.cancel();
        }
    }
}

/// A test is under way; over when dropped.
pub struct Testing {
    probes: Arc<Probes>,
}

impl Drop for Testing {
    fn drop(&mut self) {
        lock(&self.probes.tester).take();
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
