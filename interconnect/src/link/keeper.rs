//! Keeps one session up: dials or accepts, says hello, installs, tells of it.
//!
//! ```text
//!            dialler                                acceptor
//!  link 0 -> link 1 -> ... -> pause -+      one task per link: accept
//!    ^------------------------------ +            |
//!    | established                                | established
//!    v                                            v
//!  hello -> [ slot: close the old one, wait for its Down ] -> Up -> run -> Down
//! ```
//!
//! Who dials follows from the pinned fingerprints, so if one is wrong both sides may dial,
//! or neither. For the news of it, and for nothing else, a side that accepts looks at its
//! partner now and then while no session stands, and a side that dials answers such a look.

use super::config::PairConfig;
use super::drivers::OwnThread;
use super::hello::{self, HelloError};
use super::session::{
    CODE_DONE, CODE_PROTOCOL, CODE_REFUSED, Established, Lanes, Session, heartbeat_key,
};
use super::{LinkEvent, SessionId};
use quinn::{Connection, ConnectionError, Endpoint, VarInt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// First pause between two rounds of dialling: a partner whose daemon restarts is
/// back in some 10 ms.
const REDIAL_MIN: Duration = Duration::from_millis(20);
/// Longest pause: a dead partner costs four small packets a second.
const REDIAL_MAX: Duration = Duration::from_millis(250);
/// Time for handshake and hello on one link before the next link is tried. The
/// handshake is two round trips and two signatures; a host that needs longer for
/// it cannot mirror either.
const ESTABLISH_TIMEOUT: Duration = Duration::from_millis(500);
/// How often the side that accepts looks at its partner while no session stands: soon for
/// a person, and next to nothing for a partner that is dead.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a look waits for the partner's own verdict on this host.
const VERDICT_WAIT: Duration = Duration::from_millis(200);
/// Handshakes a link may have in progress; more are turned away unanswered.
const HANDSHAKES_MAX: usize = 4;

/// What this build calls itself.
const BUILD: &str = concat!("pollux ", env!("CARGO_PKG_VERSION"));

/// What the tasks of one interconnect share.
pub(super) struct Shared {
    pub(super) config: PairConfig,
    runtime: Handle,
    /// Ends with the last task that holds this.
    _thread: OwnThread,
    events: mpsc::Sender<LinkEvent>,
    current: Mutex<Option<Arc<dyn Lanes>>>,
    /// Held from `Up` to `Down`: sessions never overlap for the product.
    slot: tokio::sync::Mutex<()>,
    sessions: AtomicU64,
    last_error: Mutex<Option<String>>,
    /// The refusal told last, until a session stands.
    last_refusal: Mutex<Option<String>>,
    stop: watch::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Only whole values are ever stored: a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why no session came of an attempt.
enum Failed {
    /// Somebody has to act.
    Refused(String),
    /// Trying again may help.
    Broken(String),
}

impl From<HelloError> for Failed {
    fn from(error: HelloError) -> Self {
        match error {
            HelloError::Refuse(reason) => Self::Refused(reason),
            HelloError::Broken(reason) => Self::Broken(reason),
        }
    }
}

impl From<ConnectionError> for Failed {
    fn from(error: ConnectionError) -> Self {
        // RFC 9001, 4.8: TLS alerts are QUIC errors 0x100 to 0x1ff.
        let is_tls = |code: quinn::TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
        match &error {
            ConnectionError::TransportError(e) if is_tls(e.code) => Self::Refused(e.reason.clone()),
            ConnectionError::ConnectionClosed(e) if is_tls(e.error_code) => Self::Refused(format!(
                "the partner refuses this host: {}",
                String::from_utf8_lossy(&e.reason)
            )),
            ConnectionError::ApplicationClosed(e)
                if e.error_code == VarInt::from_u32(CODE_REFUSED) =>
            {
                Self::Refused(format!(
                    "the partner refuses this host: {}",
                    String::from_utf8_lossy(&e.reason)
                ))
            }
            _ => Self::Broken(error.to_string()),
        }
    }
}

impl Shared {
    pub(super) fn new(
        config: PairConfig,
        events: mpsc::Sender<LinkEvent>,
        runtime: Handle,
        thread: OwnThread,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            _thread: thread,
            runtime,
            events,
            current: Mutex::new(None),
            slot: tokio::sync::Mutex::new(()),
            sessions: AtomicU64::new(0),
            last_error: Mutex::new(None),
            last_refusal: Mutex::new(None),
            stop: watch::Sender::new(false),
        })
    }

    pub(super) fn current(&self) -> Option<Arc<dyn Lanes>> {
        lock(&self.current).clone()
    }

    pub(super) fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }

    /// End everything; the tasks finish by themselves.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
        if let Some(lanes) = self.current() {
            lanes.close(CODE_DONE, "the partner stops");
        }
    }

    async fn stopped(&self) {
        // The sender lives in `self`: this cannot fail while we borrow it.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    async fn tell_failed(&self, failed: Failed) {
        match failed {
            Failed::Broken(reason) => *lock(&self.last_error) = Some(reason),
            Failed::Refused(reason) => {
                *lock(&self.last_error) = Some(reason.clone());
                let told = lock(&self.last_refusal).replace(reason.clone());
                if told.as_ref() != Some(&reason) {
                    tracing::warn!(peer = %self.config.peer, "no session: {reason}");
                    let _ = self.events.send(LinkEvent::Refused { reason }).await;
                }
            }
        }
    }

    /// Say hello on a fresh connection.
    async fn greet(
        &self,
        connection: Connection,
        link: usize,
        dialled: bool,
    ) -> Result<Established, Failed> {
        let greeting = async {
            let (mut send, mut receive) = if dialled {
                let (mut send, receive) = connection.open_bi().await?;
                hello::send(&mut send, &self.config.me, BUILD).await?;
                (send, receive)
            } else {
                connection.accept_bi().await?
            };
            let hello = hello::receive(&mut receive, &self.config.peer).await?;
            if !dialled {
                hello::send(&mut send, &self.config.me, BUILD).await?;
            }
            Ok::<_, Failed>(Established {
                connection: connection.clone(),
                link,
                send,
                receive,
                hello,
            })
        };
        greeting.await.map_err(|failed| match failed {
            Failed::Refused(reason) => {
                connection.close(VarInt::from_u32(CODE_REFUSED), reason.as_bytes());
                Failed::Refused(reason)
            }
            // A stream error hides why the connection ended.
            Failed::Broken(reason) => connection
                .close_reason()
                .map_or(Failed::Broken(reason), Failed::from),
        })
    }

    /// Make this the session, after the one before it; returns when it is over.
    async fn hold(&self, established: Established, dialled: bool) {
        if let Some(old) = self.current() {
            old.close(CODE_DONE, "replaced by a newer session");
        }
        let slot = self.slot.lock().await;
        let key = match heartbeat_key(&established.connection, dialled) {
            Ok(key) => key,
            Err(reason) => {
                established
                    .connection
                    .close(VarInt::from_u32(CODE_PROTOCOL), reason.as_bytes());
                return self.tell_failed(Failed::Broken(reason)).await;
            }
        };
        let id = SessionId(self.sessions.fetch_add(1, Ordering::Relaxed) + 1);
        let session = Session::new(id, &established, self.runtime.clone());
        *lock(&self.current) = Some(Arc::clone(&session) as Arc<dyn Lanes>);
        *lock(&self.last_refusal) = None;
        if *self.stop.borrow() {
            session.close(CODE_DONE, "the partner stops");
        }
        let Established {
            send,
            receive,
            hello,
            ..
        } = established;
        tracing::info!(peer = %hello.host, build = %hello.build, session = id.0, "interconnect up");
        let _ = self
            .events
            .send(LinkEvent::Up {
                session: id,
                peer: hello,
                heartbeat_key: key,
            })
            .await;
        let reason = session
            .run(send, receive, self.config.on_ack.clone(), &self.events)
            .await;
        *lock(&self.current) = None;
        *lock(&self.last_error) = Some(reason.clone());
        tracing::info!(peer = %self.config.peer, session = id.0, "interconnect down: {reason}");
        let _ = self
            .events
            .send(LinkEvent::Down {
                session: id,
                reason,
            })
            .await;
        drop(slot);
    }

    async fn dial(
        &self,
        endpoint: &(Endpoint, quinn::ClientConfig),
        link: usize,
    ) -> Result<Established, Failed> {
        let peer = self.config.links[link].peer;
        let attempt = async {
            // The name is not looked at: the partner is known by its fingerprint.
            let connecting = endpoint
                .0
                .connect_with(endpoint.1.clone(), peer, "pollux")
                .map_err(|error| Failed::Broken(format!("cannot dial {peer}: {error}")))?;
            self.greet(connecting.await?, link, true).await
        };
        tokio::time::timeout(ESTABLISH_TIMEOUT, attempt)
            .await
            .unwrap_or_else(|_| {
                Err(Failed::Broken(format!(
                    "{peer} did not answer within {} ms",
                    ESTABLISH_TIMEOUT.as_millis()
                )))
            })
    }

    async fn dial_for_ever(&self, endpoints: &[(Endpoint, quinn::ClientConfig)]) {
        let mut pause = REDIAL_MIN;
        loop {
            for (link, endpoint) in endpoints.iter().enumerate() {
                match self.dial(endpoint, link).await {
                    Ok(established) => {
                        self.hold(established, true).await;
                        pause = REDIAL_MIN;
                        break;
                    }
                    Err(failed) => self.tell_failed(failed).await,
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REDIAL_MAX);
        }
    }

    async fn accept(&self, incoming: quinn::Incoming, link: usize) -> Result<Established, Failed> {
        let from = incoming.remote_address();
        let attempt = async { self.greet(incoming.await?, link, false).await };
        tokio::time::timeout(ESTABLISH_TIMEOUT, attempt)
            .await
            .unwrap_or_else(|_| {
                Err(Failed::Broken(format!(
                    "{from} did not finish its handshake"
                )))
            })
    }

    /// Find out whether the two sides are who they are pinned as: a handshake and no more.
    async fn look(&self, endpoint: &(Endpoint, quinn::ClientConfig), link: usize) {
        let peer = self.config.links[link].peer;
        let handshake = async {
            let connecting = endpoint
                .0
                .connect_with(endpoint.1.clone(), peer, "pollux")
                .ok()?;
            match connecting.await {
                Ok(connection) => {
                    // TLS 1.3 is done here before the partner has judged this side.
                    let verdict = tokio::time::timeout(VERDICT_WAIT, connection.closed()).await;
                    connection.close(VarInt::from_u32(CODE_DONE), b"only looked");
                    verdict.ok()
                }
                Err(error) => Some(error),
            }
        };
        if let Ok(Some(error)) = tokio::time::timeout(ESTABLISH_TIMEOUT, handshake).await
            && let refused @ Failed::Refused(_) = Failed::from(error)
        {
            self.tell_failed(refused).await;
        }
    }

    async fn look_for_ever(&self, endpoints: &[(Endpoint, quinn::ClientConfig)]) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            for (link, endpoint) in endpoints.iter().enumerate() {
                if self.current().is_none() {
                    self.look(endpoint, link).await;
                }
            }
        }
    }

    /// Answer looks on the side that dials: whoever may connect is sent away again.
    async fn answer_looks(self: Arc<Self>, endpoint: Endpoint) {
        let handshakes = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
        while let Some(incoming) = endpoint.accept().await {
            let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
                incoming.ignore();
                continue;
            };
            let shared = Arc::clone(&self);
            self.runtime.spawn(async move {
                let seen = tokio::time::timeout(ESTABLISH_TIMEOUT, async { incoming.await }).await;
                drop(permit);
                match seen {
                    Ok(Ok(connection)) => {
                        connection.close(VarInt::from_u32(CODE_DONE), b"this side dials");
                    }
                    Ok(Err(error)) => {
                        if let refused @ Failed::Refused(_) = Failed::from(error) {
                            shared.tell_failed(refused).await;
                        }
                    }
                    Err(_) => {}
                }
            });
        }
    }

    async fn accept_for_ever(self: Arc<Self>, endpoint: Endpoint, link: usize) {
        let handshakes = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
        while let Some(incoming) = endpoint.accept().await {
            let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
                incoming.ignore();
                continue;
            };
            let shared = Arc::clone(&self);
            self.runtime.spawn(async move {
                let accepted = shared.accept(incoming, link).await;
                drop(permit);
                match accepted {
                    Ok(established) => shared.hold(established, false).await,
                    Err(failed) => shared.tell_failed(failed).await,
                }
            });
        }
    }
}

/// Start the tasks that keep a session up until [`Shared::stop`].
pub(super) fn keep(shared: &Arc<Shared>, endpoints: Vec<(Endpoint, quinn::ClientConfig)>) {
    let dials = shared.config.identity.fingerprint() < shared.config.peer_fingerprint;
    let shared = Arc::clone(shared);
    let runtime = shared.runtime.clone();
    runtime.spawn(async move {
        if dials {
            for (endpoint, _) in &endpoints {
                shared
                    .runtime
                    .spawn(Arc::clone(&shared).answer_looks(endpoint.clone()));
            }
            tokio::select! {
                () = shared.dial_for_ever(&endpoints) => {}
                () = shared.stopped() => {}
            }
        } else {
            for (link, (endpoint, _)) in endpoints.iter().enumerate() {
                shared
                    .runtime
                    .spawn(Arc::clone(&shared).accept_for_ever(endpoint.clone(), link));
            }
            tokio::select! {
                () = shared.look_for_ever(&endpoints) => {}
                () = shared.stopped() => {}
            }
        }
        for (endpoint, _) in &endpoints {
            endpoint.close(VarInt::from_u32(CODE_DONE), b"the partner stops");
        }
        // Let the close reach the partner, so that it need not wait for the idle time.
        for (endpoint, _) in &endpoints {
            let _ = tokio::time::timeout(ESTABLISH_TIMEOUT, endpoint.wait_idle()).await;
        }
    });
}
