//! Keeps connections up on every link: dials or accepts, says hello, hands them to the
//! session they belong to.
//!
//! ```text
//!       each link, for ever                       version 2
//!  dial or accept ─▶ hello ─┬──────────────▶ Join ─▶ session ─▶ until it ends ─▶ pause ─▶ again
//!                           └─ version 1: one link at a time ─▶ plain session ─┘
//! ```
//!
//! The side with the lower fingerprint dials. If a pin is wrong both sides may dial, or
//! neither; for the news of it, and for nothing else, a side that accepts looks at its
//! partner now and then while no session stands, and a side that dials answers such a look.
//!
//! A partner of version 1 takes a second connection for the end of the first, so until it
//! is known to speak more, hello is said on one link at a time.

use super::config::PairConfig;
use super::drivers::OwnThread;
use super::event::{LinkEvent, SessionId};
use super::hello::{self, HelloError};
use super::join::Association;
use super::keys::{Keys, Role};
use super::lanes::Lanes;
use super::plain::{
    CODE_DONE, CODE_PROTOCOL, CODE_REFUSED, Established, PlainSession, heartbeat_key,
};
use super::stats::{LinkState, LinkStats};
use quinn::{Connection, ConnectionError, Endpoint, TransportConfig, VarInt};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// First pause between two attempts on a link: a partner whose daemon restarts is back in
/// some 10 ms.
const REDIAL_MIN: Duration = Duration::from_millis(20);
/// Longest pause: a dead partner costs four small packets a second on each link.
const REDIAL_MAX: Duration = Duration::from_millis(250);
/// Time for handshake and hello on one link. The handshake is two round trips and two
/// signatures; a host that needs longer for it cannot mirror either.
pub(super) const ESTABLISH_TIMEOUT: Duration = Duration::from_millis(500);
/// Head start of each link before the next one when a partner is dialled first: with one of
/// version 1, the best link that answers is the one that is used.
const HEAD_START: Duration = Duration::from_millis(20);
/// How often the side that accepts looks at its partner while no session stands: soon for
/// a person, and next to nothing for a partner that is dead.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a look waits for the partner's own verdict on this host.
const VERDICT_WAIT: Duration = Duration::from_millis(200);
/// Handshakes a link may have in progress; more are turned away unanswered.
const HANDSHAKES_MAX: usize = 4;

/// What this build calls itself.
const BUILD: &str = concat!("pollux ", env!("CARGO_PKG_VERSION"));

/// An endpoint on a link, and how its connections are set up.
#[derive(Clone)]
pub(super) struct LinkEndpoint {
    pub(super) endpoint: Endpoint,
    pub(super) transport: Arc<TransportConfig>,
}

/// How a link stands, beyond what its connection knows.
struct LinkInfo {
    state: LinkState,
    since: Instant,
    connection: Option<Connection>,
    flaps: u64,
    last_error: Option<String>,
}

/// What the tasks of one interconnect share.
pub(super) struct Shared {
    pub(super) config: PairConfig,
    pub(super) runtime: Handle,
    /// Ends with the last task that holds this.
    _thread: OwnThread,
    pub(super) events: mpsc::Sender<LinkEvent>,
    /// Empty once stopped, so that nobody who still holds this keeps a socket open.
    endpoints: Mutex<Vec<LinkEndpoint>>,
    keys: Mutex<Keys>,
    links: Vec<Mutex<LinkInfo>>,
    current: Mutex<Option<Arc<dyn Lanes>>>,
    /// Held from `Up` to `Down`: sessions never overlap for the product.
    pub(super) slot: tokio::sync::Mutex<()>,
    /// The session that connections join; the lock orders Joins.
    pub(super) association: tokio::sync::Mutex<Association>,
    /// Held while hello is said, or a plain session stands, with a partner not known to
    /// speak version 2.
    first: tokio::sync::Mutex<()>,
    /// Whether the partner spoke version 2 last.
    speaks_lanes: AtomicBool,
    sessions: AtomicU64,
    connections: AtomicU64,
    /// Wakes who looks only now and then whether it is to dial.
    keys_changed: tokio::sync::Notify,
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
pub(super) enum Failed {
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
        keys: Keys,
        endpoints: Vec<LinkEndpoint>,
        events: mpsc::Sender<LinkEvent>,
        runtime: Handle,
        thread: OwnThread,
    ) -> Arc<Self> {
        let info = || {
            Mutex::new(LinkInfo {
                state: LinkState::Down,
                since: Instant::now(),
                connection: None,
                flaps: 0,
                last_error: None,
            })
        };
        Arc::new(Self {
            links: endpoints.iter().map(|_| info()).collect(),
            config,
            _thread: thread,
            runtime,
            events,
            endpoints: Mutex::new(endpoints),
            keys: Mutex::new(keys),
            current: Mutex::new(None),
            slot: tokio::sync::Mutex::new(()),
            association: tokio::sync::Mutex::default(),
            first: tokio::sync::Mutex::new(()),
            speaks_lanes: AtomicBool::new(false),
            sessions: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            keys_changed: tokio::sync::Notify::new(),
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

    fn keys(&self) -> Keys {
        lock(&self.keys).clone()
    }

    /// Change who this host is or whom it accepts; new connections use it.
    pub(super) fn change_keys(&self, change: impl FnOnce(&mut Keys)) {
        let keys = {
            let mut keys = lock(&self.keys);
            change(&mut keys);
            keys.clone()
        };
        for LinkEndpoint {
            endpoint,
            transport,
        } in lock(&self.endpoints).iter()
        {
            match keys.server(transport) {
                Ok(server) => endpoint.set_server_config(Some(server)),
                Err(reason) => tracing::error!("cannot set up TLS with the new keys: {reason}"),
            }
        }
        self.keys_changed.notify_waiters();
    }

    /// What carries the product's lanes from now on.
    pub(super) fn stands(&self, lanes: Option<Arc<dyn Lanes>>) {
        if lanes.is_some() {
            *lock(&self.last_refusal) = None;
        }
        let stopping = *self.stop.borrow();
        if let Some(lanes) = lanes.as_ref().filter(|_| stopping) {
            lanes.close(CODE_DONE, "the partner stops");
        }
        *lock(&self.current) = lanes;
    }

    pub(super) fn session_ended(&self, reason: &str) {
        *lock(&self.last_error) = Some(reason.to_owned());
    }

    pub(super) fn next_session(&self) -> SessionId {
        SessionId(self.sessions.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(super) fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Local and partner's address of a link.
    pub(super) fn path(&self, link: usize, connection: &Connection) -> (SocketAddr, SocketAddr) {
        let remote = connection.remote_address();
        let bound = self
            .endpoint(link)
            .and_then(|link| link.endpoint.local_addr().ok());
        let mut local = bound.unwrap_or(remote);
        if local.ip().is_unspecified()
            && let Some(ip) = connection.local_ip()
        {
            local.set_ip(ip);
        }
        (local, remote)
    }

    pub(super) fn link_stands(&self, link: usize, connection: &Connection) {
        if let Some(info) = self.links.get(link) {
            let mut info = lock(info);
            info.state = LinkState::Up;
            info.since = Instant::now();
            info.connection = Some(connection.clone());
        }
    }

    pub(super) fn link_fell(&self, link: usize, connection: &Connection, reason: &str) {
        if let Some(info) = self.links.get(link) {
            let mut info = lock(info);
            let is_this = info
                .connection
                .as_ref()
                .is_some_and(|current| current.stable_id() == connection.stable_id());
            if is_this {
                info.state = LinkState::Down;
                info.since = Instant::now();
                info.connection = None;
            }
            info.flaps += 1;
            info.last_error = Some(reason.to_owned());
        }
    }

    /// Close the connection that stands on a link; another is made at once.
    pub(super) fn redial(&self, link: usize) {
        let connection = self
            .links
            .get(link)
            .and_then(|info| lock(info).connection.clone());
        if let Some(connection) = connection {
            connection.close(VarInt::from_u32(super::plain::CODE_LINK), b"dialled anew");
        }
    }

    /// Figures of the links as their connections have them.
    pub(super) fn link_stats(&self) -> Vec<LinkStats> {
        self.links
            .iter()
            .enumerate()
            .map(|(link, info)| {
                let info = lock(info);
                let mut stats = LinkStats {
                    state: info.state,
                    since: info.since.elapsed(),
                    flaps: info.flaps,
                    last_error: info.last_error.clone(),
                    ..LinkStats::default()
                };
                if let Some(connection) = &info.connection {
                    stats.path = Some(self.path(link, connection));
                    stats.read(connection);
                }
                stats
            })
            .collect()
    }

    fn endpoint(&self, link: usize) -> Option<LinkEndpoint> {
        lock(&self.endpoints).get(link).cloned()
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

    async fn tell_failed(&self, link: usize, failed: Failed) {
        let (Failed::Broken(reason) | Failed::Refused(reason)) = &failed;
        *lock(&self.last_error) = Some(reason.clone());
        if let Some(info) = self.links.get(link) {
            lock(info).last_error = Some(reason.clone());
        }
        if let Failed::Refused(reason) = failed {
            let told = lock(&self.last_refusal).replace(reason.clone());
            if told.as_ref() != Some(&reason) {
                tracing::warn!(peer = %self.config.peer, "no session: {reason}");
                let _ = self.events.send(LinkEvent::Refused { reason }).await;
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
        let version_max = self.version_max();
        let me = &self.config.me;
        let greeting = async {
            let (mut send, mut receive) = if dialled {
                let (mut send, receive) = connection.open_bi().await?;
                hello::send(&mut send, me, BUILD, version_max).await?;
                (send, receive)
            } else {
                connection.accept_bi().await?
            };
            let hello = hello::receive(&mut receive, &self.config.peer, version_max).await?;
            if !dialled {
                hello::send(&mut send, me, BUILD, version_max).await?;
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

    fn version_max(&self) -> u16 {
        self.config
            .settings
            .version_max
            .clamp(hello::PROTOCOL_VERSION_MIN, hello::PROTOCOL_VERSION)
    }

    /// Make this the session with a partner of version 1, after the one before it; returns
    /// when it is over.
    async fn hold(&self, established: Established, dialled: bool) -> Result<(), Failed> {
        if let Some(old) = self.current() {
            old.close(CODE_DONE, "replaced by a newer session");
        }
        self.association
            .lock()
            .await
            .end("the partner runs an older version now");
        let slot = self.slot.lock().await;
        let connection = established.connection.clone();
        let key = heartbeat_key(&connection, dialled).map_err(|reason| {
            connection.close(VarInt::from_u32(CODE_PROTOCOL), reason.as_bytes());
            Failed::Broken(reason)
        })?;
        let id = self.next_session();
        let session = PlainSession::new(id, &established, self.runtime.clone());
        let Established {
            link,
            send,
            receive,
            hello,
            ..
        } = established;
        self.link_stands(link, &connection);
        self.stands(Some(Arc::clone(&session) as Arc<dyn Lanes>));
        tracing::info!(peer = %hello.host, build = %hello.build, session = id.0, link, "interconnect up with protocol version 1");
        let up = LinkEvent::Up {
            session: id,
            peer: hello,
            heartbeat_key: key,
        };
        let link_up = LinkEvent::LinkUp {
            session: id,
            link,
            path: self.path(link, &connection),
        };
        let _ = self.events.send(up).await;
        let _ = self.events.send(link_up).await;
        let reason = session
            .run(send, receive, self.config.on_ack.clone(), &self.events)
            .await;
        self.stands(None);
        self.link_fell(link, &connection, &reason);
        self.session_ended(&reason);
        tracing::info!(peer = %self.config.peer, session = id.0, "interconnect down: {reason}");
        let link_down = LinkEvent::LinkDown {
            session: id,
            link,
            reason: reason.clone(),
        };
        let down = LinkEvent::Down {
            session: id,
            reason,
        };
        let _ = self.events.send(link_down).await;
        let _ = self.events.send(down).await;
        drop(slot);
        Ok(())
    }

    /// A handshake with the partner at a link.
    async fn connect(&self, link: usize) -> Result<(Connection, Role), Failed> {
        let LinkEndpoint {
            endpoint,
            transport,
        } = self
            .endpoint(link)
            .ok_or_else(|| Failed::Broken("the interconnect is closed".into()))?;
        let peer = self.config.links[link].peer;
        let keys = self.keys();
        let client = keys.client(&transport).map_err(Failed::Broken)?;
        // The name is not looked at: the partner is known by its fingerprint.
        let connecting = endpoint
            .connect_with(client, peer, "pollux")
            .map_err(|error| Failed::Broken(format!("cannot dial {peer}: {error}")))?;
        let connection = timely(connecting, || {
            format!(
                "{peer} did not answer within {} ms",
                ESTABLISH_TIMEOUT.as_millis()
            )
        })
        .await??;
        let role = keys.role(&connection);
        Ok((connection, role))
    }

    /// One connection on a link, from the handshake to its end.
    async fn dial(self: &Arc<Self>, link: usize) -> Result<(), Failed> {
        // With a partner of version 1: while another link is in use, this one waits.
        if !self.speaks_lanes.load(Ordering::Relaxed) {
            drop(self.first.lock().await);
        }
        let (connection, role) = self.connect(link).await?;
        if role == Role::Accepts {
            connection.close(VarInt::from_u32(CODE_DONE), b"the other side dials");
            return Ok(());
        }
        let first = if self.speaks_lanes.load(Ordering::Relaxed) {
            None
        } else {
            let Ok(first) = self.first.try_lock() else {
                connection.close(VarInt::from_u32(CODE_DONE), b"another link is first");
                return Ok(());
            };
            Some(first)
        };
        let greeting = self.greet(connection, link, true);
        let late = || {
            let peer = self.config.links[link].peer;
            format!("{peer} did not say hello in time")
        };
        let established = timely(greeting, late).await??;
        if established.hello.version >= 2 {
            self.speaks_lanes.store(true, Ordering::Relaxed);
            let connection = established.connection.clone();
            timely(self.join(established), late).await??;
            drop(first);
            connection.closed().await;
            return Ok(());
        }
        self.speaks_lanes.store(false, Ordering::Relaxed);
        if first.is_none() {
            // It spoke version 2 a moment ago: start over, one link at a time.
            let connection = established.connection;
            connection.close(VarInt::from_u32(CODE_DONE), b"another link is first");
            return Ok(());
        }
        self.hold(established, true).await
    }

    async fn dial_for_ever(self: Arc<Self>, link: usize) {
        tokio::time::sleep(HEAD_START * u32::try_from(link).unwrap_or(0)).await;
        let mut pause = REDIAL_MIN;
        loop {
            if self.keys().may_dial() {
                let began = Instant::now();
                if let Err(failed) = self.dial(link).await {
                    self.tell_failed(link, failed).await;
                }
                // It stood for a while: whatever ended it, dial at once.
                if began.elapsed() > ESTABLISH_TIMEOUT * 2 {
                    pause = REDIAL_MIN;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(REDIAL_MAX);
            } else {
                // Another key may make it this side's turn to dial.
                tokio::select! {
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                    () = self.keys_changed.notified() => continue,
                }
                if self.current().is_none() {
                    self.look(link).await;
                }
            }
        }
    }

    /// Find out whether the two sides are who they are pinned as: a handshake and no more.
    async fn look(&self, link: usize) {
        let seen = match self.connect(link).await {
            Ok((connection, _)) => {
                // TLS 1.3 is done here before the partner has judged this side.
                let verdict = tokio::time::timeout(VERDICT_WAIT, connection.closed()).await;
                connection.close(VarInt::from_u32(CODE_DONE), b"only looked");
                verdict.map_or(Ok(()), |error| Err(Failed::from(error)))
            }
            Err(failed) => Err(failed),
        };
        if let Err(refused @ Failed::Refused(_)) = seen {
            self.tell_failed(link, refused).await;
        }
    }

    async fn accept(
        self: &Arc<Self>,
        incoming: quinn::Incoming,
        link: usize,
    ) -> Result<(), Failed> {
        let from = incoming.remote_address();
        let late = || format!("{from} did not finish its handshake");
        let keys = self.keys();
        let connection = timely(async { incoming.await }, late).await??;
        if keys.role(&connection) == Role::Dials {
            connection.close(VarInt::from_u32(CODE_DONE), b"this side dials");
            return Ok(());
        }
        let established = timely(self.greet(connection, link, false), late).await??;
        if established.hello.version >= 2 {
            timely(self.joined(established), late).await?
        } else {
            let (shared, runtime) = (Arc::clone(self), self.runtime.clone());
            // Not within the handshake's limits: it stands for as long as it likes.
            runtime.spawn(async move {
                if let Err(failed) = shared.hold(established, false).await {
                    shared.tell_failed(link, failed).await;
                }
            });
            Ok(())
        }
    }

    async fn accept_for_ever(self: Arc<Self>, link: usize) {
        let handshakes = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
        let Some(LinkEndpoint { endpoint, .. }) = self.endpoint(link) else {
            return;
        };
        while let Some(incoming) = endpoint.accept().await {
            let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
                incoming.ignore();
                continue;
            };
            let shared = Arc::clone(&self);
            self.runtime.spawn(async move {
                let accepted = shared.accept(incoming, link).await;
                drop(permit);
                if let Err(failed) = accepted {
                    shared.tell_failed(link, failed).await;
                }
            });
        }
    }
}

/// Within the time a connection may take to stand.
async fn timely<T>(
    attempt: impl Future<Output = T>,
    late: impl FnOnce() -> String,
) -> Result<T, Failed> {
    tokio::time::timeout(ESTABLISH_TIMEOUT, attempt)
        .await
        .map_err(|_| Failed::Broken(late()))
}

/// Start the tasks that keep connections up until [`Shared::stop`].
pub(super) fn keep(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    let runtime = shared.runtime.clone();
    runtime.spawn(async move {
        let mut dialling = tokio::task::JoinSet::new();
        for link in 0..shared.config.links.len() {
            shared
                .runtime
                .spawn(Arc::clone(&shared).accept_for_ever(link));
            dialling.spawn(Arc::clone(&shared).dial_for_ever(link));
        }
        shared.stopped().await;
        dialling.shutdown().await;
        shared.association.lock().await.end("the partner stops");
        let endpoints = std::mem::take(&mut *lock(&shared.endpoints));
        for LinkEndpoint { endpoint, .. } in &endpoints {
            endpoint.close(VarInt::from_u32(CODE_DONE), b"the partner stops");
        }
        // Let the close reach the partner, so that it need not wait for the idle time.
        for LinkEndpoint { endpoint, .. } in &endpoints {
            let _ = tokio::time::timeout(ESTABLISH_TIMEOUT, endpoint.wait_idle()).await;
        }
    });
}
