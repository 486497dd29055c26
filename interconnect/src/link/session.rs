//! A session: an association of two running processes over all the links of a pair, which
//! outlives every single connection.
//!
//! ```text
//!             first Join                         no link for session_keep,
//!   (none) ───────────────▶ Forming ──slot──▶ Standing ──protocol error, closed──▶ Over
//!                                     Up      │    ▲                         Down
//!                                             └────┘ LinkUp, LinkDown
//! ```
//!
//! What this must never do: tell of anything before `Up` or after `Down`, or take a
//! connection of another process for one of its own.

use super::config::LinkSettings;
use super::event::{Hello, LinkEvent, SendError, SessionId};
use super::incoming::{Clock, IO_EVENTS_MAX, InLane, Incoming};
use super::keeper::Shared;
use super::lanes::{EpochLane, IoEnd, IoEvent, IoLane, IoSender, Lanes};
use super::member::{self, Joined};
use super::outgoing::{LaneHandle, Member, OutLane, Outgoing};
use super::plain::{CODE_LINK, CODE_PROTOCOL};
use super::queue::PushError;
use super::stats::PairStats;
use crate::frame::Frame;
use crate::heartbeat::HeartbeatKey;
use crate::ids::{Generation, VmId};
use crate::lane::{LaneClass, LaneId, LinkIndex, Micros};
use quinn::{ConnectionError, VarInt};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Why a session ended: the code its connections are closed with, and words.
#[derive(Clone, Debug)]
struct End {
    code: u32,
    reason: String,
}

/// What a new session is made of.
pub(super) struct Founding {
    pub(super) id: SessionId,
    pub(super) nonce: [u8; 16],
    pub(super) peer: Hello,
    pub(super) key: HeartbeatKey,
    /// What the partner takes of a lane, in bytes.
    pub(super) window_bytes: u64,
}

/// A session over several links.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) nonce: [u8; 16],
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) incoming: Arc<Incoming>,
    peer: Hello,
    clock: Clock,
    runtime: Handle,
    events: mpsc::Sender<LinkEvent>,
    joins: mpsc::UnboundedSender<Joined>,
    end: watch::Sender<Option<End>>,
    /// Readers, writers, deliveries; `None` when the session is over.
    tasks: Mutex<Option<JoinSet<()>>>,
    me: std::sync::Weak<Self>,
}

impl Session {
    /// Make it, and the task that runs it until it is over.
    pub(super) fn found(shared: &Arc<Shared>, founding: Founding) -> Arc<Self> {
        let Founding {
            id,
            nonce,
            peer,
            key,
            window_bytes,
        } = founding;
        let (joins, joined) = mpsc::unbounded_channel();
        let own_window = crate::lane::LANE_WINDOW_BYTES;
        let outgoing = Outgoing::new(window_bytes.min(own_window));
        let session = Arc::new_cyclic(|me| Self {
            id,
            nonce,
            incoming: Incoming::new(
                own_window,
                id,
                shared.config.on_ack.clone(),
                shared.events.clone(),
            ),
            clock: outgoing.clock(),
            outgoing,
            peer,
            runtime: shared.runtime.clone(),
            events: shared.events.clone(),
            joins,
            end: watch::Sender::new(None),
            tasks: Mutex::new(Some(JoinSet::new())),
            me: me.clone(),
        });
        let (task, shared) = (Arc::clone(&session), Arc::clone(shared));
        session
            .runtime
            .spawn(async move { task.run(&shared, key, joined).await });
        session
    }

    /// Add a connection.
    pub(super) fn join(&self, joined: Joined) {
        // Fails only when the session is over; dropping it closes nothing by itself.
        if let Err(error) = self.joins.send(joined) {
            error
                .0
                .member
                .connection
                .close(VarInt::from_u32(CODE_LINK), b"the session is over");
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.end.borrow().is_some()
    }

    pub(super) fn version(&self) -> u16 {
        self.peer.version
    }

    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    /// End it; the first reason counts.
    pub(super) fn end(&self, code: u32, reason: &str) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                *end = Some(End {
                    code,
                    reason: reason.to_owned(),
                });
            }
            first
        });
    }

    /// The partner broke the protocol: end the session, with the reason for the log.
    pub(super) fn broken(&self, reason: String) -> String {
        tracing::warn!(peer = %self.peer.host, session = self.id.0, "session broken: {reason}");
        self.end(CODE_PROTOCOL, &reason);
        reason
    }

    /// Run a task that must not outlive the session.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tasks) = tasks.as_mut() {
            // Those that ended are collected here, so that the set stays small.
            while tasks.try_join_next().is_some() {}
            tasks.spawn_on(task, &self.runtime);
        }
    }

    pub(super) fn spawn_writer(&self, lane: Arc<OutLane>, member: Member) {
        if let Some(me) = self.me.upgrade() {
            self.spawn(member::write_lane(me, lane, member));
        }
    }

    pub(super) fn spawn_delivery(&self, lane: Arc<InLane>) {
        let Some(me) = self.me.upgrade() else {
            return;
        };
        self.spawn(async move {
            match lane.deliver(&me.clock).await {
                Ok(Some(_)) if lane.start.lane == LaneId::CONTROL => {
                    me.broken("nobody listens to the interconnect's events".to_owned());
                }
                Ok(Some(tell)) => me.incoming.forget(&lane, tell),
                Ok(None) => {}
                Err(reason) => drop(me.broken(reason)),
            }
        });
    }

    pub(super) async fn tell_epoch_lane(&self, lane: &InLane, rx: mpsc::Receiver<Frame>) {
        let event = LinkEvent::EpochLane {
            vm: lane.start.vm,
            generation: lane.start.generation,
            session: self.id,
            rx,
        };
        // Nobody listens: the lane finds its receiver gone.
        let _ = self.events.send(event).await;
    }

    /// Open this side's direction of a lane the partner opened, and tell the product.
    pub(super) async fn tell_io_lane(
        &self,
        lane: &InLane,
        tx: mpsc::Sender<IoEvent>,
        rx: mpsc::Receiver<IoEvent>,
    ) {
        let notices = tx.downgrade();
        drop(tx);
        let (vm, generation) = (lane.start.vm, lane.start.generation);
        let handle = self.open(
            LaneClass::Io,
            vm,
            generation,
            lane.start.lane,
            0,
            Some(notices),
        );
        let event = LinkEvent::IoLane {
            vm,
            generation,
            session: self.id,
            lane: self.io_lane(handle, rx),
        };
        let _ = self.events.send(event).await;
    }

    fn io_lane(&self, handle: LaneHandle, rx: mpsc::Receiver<IoEvent>) -> IoLane {
        let inner = Arc::new(IoEnd {
            sink: Arc::new(handle),
            session: self.id,
            peer: self.peer.host.clone(),
        });
        IoLane {
            tx: IoSender { inner },
            rx,
        }
    }

    fn open(
        &self,
        class: LaneClass,
        vm: VmId,
        generation: Generation,
        answers: LaneId,
        queue_bytes: usize,
        notices: Option<mpsc::WeakSender<IoEvent>>,
    ) -> LaneHandle {
        let (lane, members) =
            self.outgoing
                .open(class, vm, generation, answers, queue_bytes as u64, notices);
        for member in members {
            self.spawn_writer(Arc::clone(&lane), member);
        }
        LaneHandle {
            outgoing: Arc::clone(&self.outgoing),
            lane,
        }
    }

    /// From the first connection to the last word.
    async fn run(
        self: Arc<Self>,
        shared: &Arc<Shared>,
        key: HeartbeatKey,
        mut joined: mpsc::UnboundedReceiver<Joined>,
    ) {
        let slot = shared.slot.lock().await;
        if !self.is_over() {
            shared.stands(Some(Arc::clone(&self) as Arc<dyn Lanes>));
            tracing::info!(peer = %self.peer.host, build = %self.peer.build, session = self.id.0, "interconnect up");
            let event = LinkEvent::Up {
                session: self.id,
                peer: self.peer.clone(),
                heartbeat_key: key,
            };
            let _ = self.events.send(event).await;
            let outgoing = Arc::clone(&self.outgoing);
            self.spawn(async move { match outgoing.keep_time().await {} });
            self.stand(shared, &mut joined).await;
            shared.stands(None);
        }
        let End { code, reason } = ended(&mut self.end.subscribe()).await;
        joined.close();
        while let Ok(joined) = joined.try_recv() {
            let connection = joined.member.connection;
            connection.close(VarInt::from_u32(code), reason.as_bytes());
        }
        drop(slot);
    }

    /// Between `Up` and `Down`.
    async fn stand(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        joined: &mut mpsc::UnboundedReceiver<Joined>,
    ) {
        let mut over = self.end.subscribe();
        let mut running: JoinSet<(Member, String, Option<ConnectionError>)> = JoinSet::new();
        let mut standing: BTreeMap<LinkIndex, Member> = BTreeMap::new();
        let mut alone_since = Instant::now();
        let mut last_reason = String::from("no link came up");
        let LinkSettings { session_keep, .. } = shared.config.settings;
        let end = loop {
            tokio::select! {
                biased;
                end = ended(&mut over) => break end,
                Some(ended) = running.join_next(), if !running.is_empty() => {
                    // A task that panicked has said so; its connection ends by itself.
                    let Ok((member, reason, error)) = ended else { continue };
                    let of_session = match &error {
                        Some(ConnectionError::ApplicationClosed(close)) => {
                            close.error_code != VarInt::from_u32(CODE_LINK)
                        }
                        _ => false,
                    };
                    if standing.get(&member.link).is_some_and(|m| m.serial == member.serial) {
                        standing.remove(&member.link);
                        self.tell_link_down(shared, &member, &reason).await;
                    }
                    if of_session {
                        self.end(super::plain::CODE_DONE, &reason);
                    }
                    alone_since = Instant::now();
                    last_reason = reason;
                }
                Some(joined) = joined.recv() => {
                    let member = joined.member.clone();
                    if let Some(old) = standing.insert(member.link, member.clone()) {
                        let reason = "replaced by a newer connection of this link";
                        old.connection.close(VarInt::from_u32(CODE_LINK), reason.as_bytes());
                        self.tell_link_down(shared, &old, reason).await;
                    }
                    // Whoever is told finds the link in use.
                    let nudges = member::enter(self, &member);
                    let (session, told) = (Arc::clone(self), member.clone());
                    running.spawn_on(async move {
                        let reason = member::run(&session, joined, nudges).await;
                        let error = member.connection.close_reason();
                        let code = VarInt::from_u32(CODE_LINK);
                        member.connection.close(code, reason.as_bytes());
                        (member, reason, error)
                    }, &self.runtime);
                    self.tell_link_up(shared, &told).await;
                }
                () = tokio::time::sleep_until((alone_since + session_keep).into()), if standing.is_empty() => {
                    let reason = format!("no link for {} ms: {last_reason}", session_keep.as_millis());
                    self.end(CODE_PROTOCOL, &reason);
                }
            }
        };
        for member in standing.values() {
            let code = VarInt::from_u32(end.code);
            member.connection.close(code, end.reason.as_bytes());
        }
        self.outgoing.end();
        self.incoming.end();
        let tasks = self
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
        running.shutdown().await;
        for member in standing.values() {
            self.tell_link_down(shared, member, &end.reason).await;
        }
        shared.session_ended(&end.reason);
        tracing::info!(peer = %self.peer.host, session = self.id.0, "interconnect down: {}", end.reason);
        let _ = self
            .events
            .send(LinkEvent::Down {
                session: self.id,
                reason: end.reason,
            })
            .await;
    }

    async fn tell_link_up(&self, shared: &Shared, member: &Member) {
        let link = usize::from(member.link.0);
        shared.link_stands(link, &member.connection);
        tracing::info!(peer = %self.peer.host, session = self.id.0, link, "link up");
        let _ = self
            .events
            .send(LinkEvent::LinkUp {
                session: self.id,
                link,
                path: shared.path(link, &member.connection),
            })
            .await;
    }

    async fn tell_link_down(&self, shared: &Shared, member: &Member, reason: &str) {
        let link = usize::from(member.link.0);
        shared.link_fell(link, &member.connection, reason);
        tracing::info!(peer = %self.peer.host, session = self.id.0, link, "link down: {reason}");
        let _ = self
            .events
            .send(LinkEvent::LinkDown {
                session: self.id,
                link,
                reason: reason.to_owned(),
            })
            .await;
    }
}

/// Wait for the end of the session.
async fn ended(end: &mut watch::Receiver<Option<End>>) -> End {
    match end.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(end)) => end.clone(),
        // The sender is in the session, which whoever asks holds on to.
        _ => End {
            code: CODE_PROTOCOL,
            reason: "the session is gone".to_owned(),
        },
    }
}

impl Lanes for Session {
    fn id(&self) -> SessionId {
        self.id
    }

    fn version(&self) -> u16 {
        self.peer.version
    }

    fn control(&self, frame: Frame) -> Result<(), PushError> {
        self.outgoing
            .push(self.outgoing.control(), frame, None, false)
            .map(|_| ())
    }

    fn open_epoch_lane(&self, vm: VmId, generation: Generation, queue_bytes: usize) -> EpochLane {
        let none = LaneId::CONTROL;
        let handle = self.open(LaneClass::Epoch, vm, generation, none, queue_bytes, None);
        EpochLane {
            sink: Arc::new(handle),
            session: self.id,
            peer: self.peer.host.clone(),
            version: self.peer.version,
        }
    }

    fn open_io_lane(&self, vm: VmId, generation: Generation) -> Result<IoLane, SendError> {
        let (tx, rx) = mpsc::channel(IO_EVENTS_MAX);
        let (none, notices) = (LaneId::CONTROL, Some(tx.downgrade()));
        let handle = self.open(LaneClass::Io, vm, generation, none, 0, notices);
        self.incoming.expect_answer(handle.lane.start.lane, tx);
        Ok(self.io_lane(handle, rx))
    }

    fn stats(&self, stats: &mut PairStats) {
        for (index, link) in (0u8..).zip(&mut stats.links) {
            let (state, in_flight, resent) = self.outgoing.link_state(LinkIndex(index));
            link.state = state;
            link.in_flight_bytes = in_flight;
            link.resent_bytes = resent;
        }
        stats.lanes = self.outgoing.lane_stats();
        stats.lanes.extend(self.incoming.lane_stats());
    }

    fn close(&self, code: u32, reason: &str) {
        self.end(code, reason);
    }
}

impl Clock {
    /// Until then, or for ever.
    pub(super) async fn wait(self, at: Option<Micros>) {
        match at {
            Some(at) => self.sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}
