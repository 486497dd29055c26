//! What the partner sends in a session: its lanes put in order, frames handed up, and what
//! is to be acknowledged.
//!
//! ```text
//!  QUIC streams of all links ─take─▶ LaneReceiver ─▶ FrameDecoder ─▶ channel of the product
//!                                        │                 (full: a task waits for room)
//!                                        └─ acks due ─▶ control writer of each link
//! ```
//!
//! Whoever brings bytes hands the frames up at once while there is room: one task less to
//! wake. Only what the product has room for is taken out of the receiver and with that
//! acknowledged; the rest stands in the lane's window.
//!
//! Locks: the table before a lane, never the other way round, and none across an `await`.

use super::config::OnAck;
use super::event::{LinkEvent, SessionId};
use super::lanes::IoEvent;
use super::outgoing::{Member, OutLane, kind};
use super::stats::LaneStats;
use crate::frame::{Frame, FrameDecoder, FrameKind};
use crate::lane::incoming::IncomingLanes;
use crate::lane::receive::LaneReceiver;
use crate::lane::wire::{LaneAck, LaneStart, LaneStop, Piece};
use crate::lane::{LINKS_MAX, LaneClass, LaneId, Micros};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

/// Frames of one lane that wait for the standby's thread. With page batches of
/// 1 MiB this is 8 MiB; beyond it the lane's window holds the sender.
pub(super) const LANE_FRAMES_MAX: usize = 8;
/// Events of one I/O lane that wait for the product.
pub(super) const IO_EVENTS_MAX: usize = 64;
/// Lanes the partner may have open in a session: two for each of many VMs. Each may hold
/// its window.
const LANES_MAX: usize = 128;

/// What a connection's control writer has to say besides the control lane.
pub(super) struct Nudges {
    member: Member,
    due: Mutex<Due>,
    control: Arc<OutLane>,
}

#[derive(Default)]
struct Due {
    acks: Vec<Arc<InLane>>,
    stops: Vec<LaneStop>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under the locks is whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nudges {
    pub(super) fn new(member: Member, control: Arc<OutLane>) -> Arc<Self> {
        Arc::new(Self {
            member,
            due: Mutex::default(),
            control,
        })
    }

    fn ack(&self, lane: &Arc<InLane>) {
        {
            let mut due = lock(&self.due);
            if due.acks.iter().any(|known| Arc::ptr_eq(known, lane)) {
                return;
            }
            due.acks.push(Arc::clone(lane));
        }
        self.control.wake_at(self.member.link).notify_one();
    }

    pub(super) fn stop(&self, lane: LaneId) {
        lock(&self.due).stops.push(LaneStop { lane, reason: 0 });
        self.control.wake_at(self.member.link).notify_one();
    }

    /// What is due now, as records.
    pub(super) fn take(&self, now: Micros, chunks: &mut Vec<Bytes>) {
        let Due { acks, stops } = std::mem::take(&mut *lock(&self.due));
        if acks.is_empty() && stops.is_empty() {
            return;
        }
        let mut out = Vec::with_capacity(32 * acks.len() + 16 * stops.len());
        for lane in acks {
            if let Some(ack) = lane.next_ack(&self.member, now) {
                out.extend_from_slice(&ack.encode());
            }
        }
        for stop in stops {
            out.extend_from_slice(&stop.encode());
        }
        if !out.is_empty() {
            chunks.push(out.into());
        }
    }
}

/// Where a lane's frames go.
enum Sink {
    Control {
        session: SessionId,
        on_ack: Option<OnAck>,
        events: mpsc::Sender<LinkEvent>,
    },
    Epoch(mpsc::Sender<Frame>),
    Io(mpsc::Sender<IoEvent>),
}

/// How handing up ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Handed {
    /// All there is.
    All,
    /// The product has no room.
    Full,
    /// The lane ended.
    Finished,
    /// The product went away.
    Unwanted,
}

struct State {
    receiver: LaneReceiver,
    decoder: FrameDecoder,
    /// Bytes taken out of the receiver and not decoded.
    rest: Bytes,
    /// A frame that found no room.
    ready: Option<Frame>,
    /// `None`: nobody takes frames any more.
    sink: Option<Sink>,
    members: [Option<Arc<Nudges>>; LINKS_MAX],
    /// A task waits for room; it hands up what comes.
    delivering: bool,
    frames: u64,
    bytes: u64,
}

/// One lane of the partner's.
pub(super) struct InLane {
    pub(super) start: LaneStart,
    state: Mutex<State>,
    over: watch::Sender<bool>,
}

enum Gone {
    Frames(mpsc::Sender<Frame>),
    Io(mpsc::Sender<IoEvent>),
    Never,
}

/// What became of bytes that came in.
pub(super) struct Taken {
    /// The connection is not its link's any more: read no further.
    pub(super) gone: bool,
    /// The product has no room: [`InLane::deliver`] must run.
    pub(super) deliver: bool,
    /// The lane is over: forget it, and with `Some(true)` tell the partner.
    pub(super) over: Option<bool>,
    /// Ask for acknowledgements again at this time.
    pub(super) ack_at: Option<Micros>,
}

impl InLane {
    fn new(start: LaneStart, window_bytes: u64, sink: Sink) -> Arc<Self> {
        Arc::new(Self {
            start,
            state: Mutex::new(State {
                receiver: LaneReceiver::new(start.lane, window_bytes),
                decoder: FrameDecoder::new(),
                rest: Bytes::new(),
                ready: None,
                sink: Some(sink),
                members: Default::default(),
                delivering: false,
                frames: 0,
                bytes: 0,
            }),
            over: watch::Sender::new(false),
        })
    }

    fn link_up(&self, nudges: &Arc<Nudges>) {
        let mut state = lock(&self.state);
        let link = nudges.member.link;
        state.receiver.link_down(link);
        state.receiver.link_up(link);
        state.members[usize::from(link.0)] = Some(Arc::clone(nudges));
    }

    fn link_down(&self, member: &Member) {
        let mut state = lock(&self.state);
        let slot = &mut state.members[usize::from(member.link.0)];
        if slot
            .as_ref()
            .is_some_and(|current| current.member.serial == member.serial)
        {
            *slot = None;
            state.receiver.link_down(member.link);
        }
    }

    fn next_ack(&self, member: &Member, now: Micros) -> Option<LaneAck> {
        let mut state = lock(&self.state);
        if state.is_member(member) {
            state.receiver.next_ack(member.link, now)
        } else {
            None
        }
    }

    /// Bytes that came in on a connection, as pieces.
    pub(super) fn take(
        self: &Arc<Self>,
        member: &Member,
        now: Micros,
        mut pieces: impl FnMut() -> Result<Option<Piece>, String>,
    ) -> Result<Taken, String> {
        let mut state = lock(&self.state);
        let mut taken = Taken {
            gone: !state.is_member(member),
            deliver: false,
            over: None,
            ack_at: None,
        };
        if taken.gone {
            return Ok(taken);
        }
        while let Some(piece) = pieces()? {
            state
                .receiver
                .insert(member.link, piece, now)
                .map_err(|error| error.to_string())?;
        }
        if !state.delivering {
            match state.hand_up(now)? {
                Handed::All => {}
                Handed::Full => (state.delivering, taken.deliver) = (true, true),
                Handed::Finished => taken.over = Some(false),
                Handed::Unwanted => taken.over = Some(true),
            }
        }
        self.nudge(&state, taken.over == Some(false));
        taken.ack_at = state.receiver.next_wakeup();
        Ok(taken)
    }

    /// Have the links that are owed an acknowledgement send it; with `all`, every one.
    fn nudge(self: &Arc<Self>, state: &State, all: bool) {
        for nudges in state.members.iter().flatten() {
            if all || state.receiver.ack_due(nudges.member.link) {
                nudges.ack(self);
            }
        }
    }

    /// The time of an acknowledgement has come.
    pub(super) fn ack_now(self: &Arc<Self>) {
        let state = lock(&self.state);
        self.nudge(&state, true);
    }

    /// Hand up while the product makes room; ends when there is nothing left. Returns
    /// [`Taken::over`].
    pub(super) async fn deliver(self: &Arc<Self>, clock: &Clock) -> Result<Option<bool>, String> {
        loop {
            self.room().await;
            let ack_at = {
                let now = clock.now();
                let mut state = lock(&self.state);
                let handed = state.hand_up(now)?;
                self.nudge(&state, handed == Handed::Finished);
                match handed {
                    Handed::Full => continue,
                    Handed::Finished => return Ok(Some(false)),
                    Handed::Unwanted => return Ok(Some(true)),
                    Handed::All => {}
                }
                state.delivering = false;
                state.receiver.next_wakeup()
            };
            if let Some(at) = ack_at {
                clock.sleep_until(at).await;
                self.ack_now();
            }
            return Ok(None);
        }
    }

    /// Wait until the product has room for a frame, or is gone.
    async fn room(&self) {
        enum Room {
            Events(mpsc::Sender<LinkEvent>),
            Frames(mpsc::Sender<Frame>),
            Io(mpsc::Sender<IoEvent>),
        }
        let room = match &lock(&self.state).sink {
            None => return,
            Some(Sink::Control { events, .. }) => Room::Events(events.clone()),
            Some(Sink::Epoch(frames)) => Room::Frames(frames.clone()),
            Some(Sink::Io(events)) => Room::Io(events.clone()),
        };
        match room {
            Room::Events(events) => drop(events.reserve().await),
            Room::Frames(frames) => drop(frames.reserve().await),
            Room::Io(events) => drop(events.reserve().await),
        }
    }

    /// The lane is over: ends the product's channel, and the tasks that read for it.
    fn close(&self) {
        lock(&self.state).sink = None;
        self.over.send_replace(true);
    }

    /// Wait until the lane is over (`false`), or the product does not read it any more.
    pub(super) async fn unread(&self) -> bool {
        let mut over = self.over.subscribe();
        let over = over.wait_for(|over| *over);
        let gone = match &lock(&self.state).sink {
            Some(Sink::Epoch(frames)) => Gone::Frames(frames.clone()),
            Some(Sink::Io(events)) => Gone::Io(events.clone()),
            _ => Gone::Never,
        };
        let gone = async {
            match gone {
                Gone::Frames(frames) => frames.closed().await,
                Gone::Io(events) => events.closed().await,
                Gone::Never => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = over => false,
            () = gone => true,
        }
    }

    fn stats(&self) -> LaneStats {
        let state = lock(&self.state);
        LaneStats {
            kind: kind(self.start.class),
            vm: self.start.vm,
            generation: self.start.generation,
            outgoing: false,
            frames: state.frames,
            bytes: state.bytes,
            queued_bytes: state.receiver.held_bytes(),
            unacked_bytes: 0,
            repeated_bytes: state.receiver.repeated_bytes(),
            expired_frames: 0,
        }
    }
}

impl State {
    fn is_member(&self, member: &Member) -> bool {
        self.members
            .get(usize::from(member.link.0))
            .and_then(Option::as_ref)
            .is_some_and(|current| current.member.serial == member.serial)
    }

    fn hand_up(&mut self, now: Micros) -> Result<Handed, String> {
        loop {
            if let Some(frame) = self.ready.take() {
                let bytes = frame.wire_bytes() as u64;
                let Some(sink) = &self.sink else {
                    return Ok(Handed::Unwanted);
                };
                match sink.send(frame)? {
                    Ok(()) => (self.frames, self.bytes) = (self.frames + 1, self.bytes + bytes),
                    Err(Some(frame)) => {
                        self.ready = Some(frame);
                        return Ok(Handed::Full);
                    }
                    Err(None) => {
                        self.sink = None;
                        return Ok(Handed::Unwanted);
                    }
                }
            }
            if self.rest.is_empty() {
                match self.receiver.pop(now) {
                    Some(bytes) => self.rest = bytes,
                    None if self.receiver.is_finished() => {
                        self.sink = None;
                        if !self.decoder.is_at_boundary() {
                            return Err("a lane ended within a frame".to_owned());
                        }
                        return Ok(Handed::Finished);
                    }
                    None => return Ok(Handed::All),
                }
            }
            self.ready = self
                .decoder
                .push(&mut self.rest)
                .map_err(|error| error.to_string())?;
        }
    }
}

impl Sink {
    /// `Err(Some)`: no room, the frame back. `Err(None)`: nobody takes it.
    fn send(&self, frame: Frame) -> Result<Result<(), Option<Frame>>, String> {
        let kind = frame.kind;
        let (lane, fits) = match self {
            Self::Control { .. } => ("the control lane", kind.is_control()),
            Self::Epoch(_) => ("an epoch lane", !kind.is_control() && !kind.is_io()),
            Self::Io(_) => ("an I/O lane", kind.is_io()),
        };
        if !fits {
            return Err(format!("the partner sent a {kind:?} frame on {lane}"));
        }
        Ok(match self {
            Self::Control {
                on_ack: Some(on_ack),
                ..
            } if kind == FrameKind::EpochAck => {
                on_ack(frame);
                Ok(())
            }
            Self::Control {
                session, events, ..
            } => {
                let event = LinkEvent::Control {
                    session: *session,
                    frame,
                };
                events.try_send(event).map_err(|error| match error {
                    TrySendError::Full(LinkEvent::Control { frame, .. }) => Some(frame),
                    _ => None,
                })
            }
            Self::Epoch(frames) => frames.try_send(frame).map_err(|error| match error {
                TrySendError::Full(frame) => Some(frame),
                TrySendError::Closed(_) => None,
            }),
            Self::Io(events) => {
                events
                    .try_send(IoEvent::Frame(frame))
                    .map_err(|error| match error {
                        TrySendError::Full(IoEvent::Frame(frame)) => Some(frame),
                        _ => None,
                    })
            }
        })
    }
}

/// The session's clock: microseconds since it was made.
#[derive(Clone, Copy)]
pub(super) struct Clock(pub(super) Instant);

impl Clock {
    pub(super) fn now(self) -> Micros {
        self.0.elapsed().into()
    }

    pub(super) async fn sleep_until(self, at: Micros) {
        let at = self.0 + std::time::Duration::from(at);
        tokio::time::sleep_until(at.into()).await;
    }
}

struct Table {
    known: IncomingLanes,
    open: BTreeMap<LaneId, Arc<InLane>>,
    members: [Option<Arc<Nudges>>; LINKS_MAX],
    /// I/O lanes opened here whose answering lane has not come: by this side's lane.
    unanswered: BTreeMap<LaneId, mpsc::Sender<IoEvent>>,
    ended: bool,
}

/// What a stream's start means.
pub(super) enum Started {
    /// A lane that is known.
    Known(Arc<InLane>),
    /// A new one, for the product to be told of.
    Epoch(Arc<InLane>, mpsc::Receiver<Frame>),
    /// A new one; this side's own direction is to be opened.
    Io(Arc<InLane>, mpsc::Sender<IoEvent>, mpsc::Receiver<IoEvent>),
    /// The lane is over.
    Over,
}

/// Whom to tell of a new lane.
enum Told {
    Nobody,
    Epoch(mpsc::Receiver<Frame>),
    Io(mpsc::Sender<IoEvent>, mpsc::Receiver<IoEvent>),
}

/// The receiving half of a session.
pub(super) struct Incoming {
    table: Mutex<Table>,
    window_bytes: u64,
    control: Arc<InLane>,
}

impl Incoming {
    pub(super) fn new(
        window_bytes: u64,
        session: SessionId,
        on_ack: Option<OnAck>,
        events: mpsc::Sender<LinkEvent>,
    ) -> Arc<Self> {
        let start = LaneStart {
            lane: LaneId::CONTROL,
            class: LaneClass::Control,
            vm: crate::ids::VmId([0; 16]),
            generation: crate::ids::Generation(0),
            answers: LaneId::CONTROL,
        };
        let sink = Sink::Control {
            session,
            on_ack,
            events,
        };
        let control = InLane::new(start, window_bytes, sink);
        Arc::new(Self {
            table: Mutex::new(Table {
                known: IncomingLanes::new(),
                open: BTreeMap::from([(LaneId::CONTROL, Arc::clone(&control))]),
                members: Default::default(),
                unanswered: BTreeMap::new(),
                ended: false,
            }),
            window_bytes,
            control,
        })
    }

    pub(super) fn control(&self) -> &Arc<InLane> {
        &self.control
    }

    pub(super) fn link_up(&self, nudges: &Arc<Nudges>) {
        let mut table = lock(&self.table);
        table.members[usize::from(nudges.member.link.0)] = Some(Arc::clone(nudges));
        for lane in table.open.values() {
            lane.link_up(nudges);
        }
    }

    pub(super) fn link_down(&self, member: &Member) {
        let mut table = lock(&self.table);
        let slot = &mut table.members[usize::from(member.link.0)];
        if slot
            .as_ref()
            .is_some_and(|current| current.member.serial == member.serial)
        {
            *slot = None;
        }
        for lane in table.open.values() {
            lane.link_down(member);
        }
    }

    /// A stream says which lane it belongs to.
    pub(super) fn started(&self, start: LaneStart) -> Result<Started, String> {
        let mut table = lock(&self.table);
        let table = &mut *table;
        if table.ended {
            return Ok(Started::Over);
        }
        if let Some(lane) = table.open.get(&start.lane) {
            if lane.start != start {
                return Err(format!(
                    "two streams say different things of lane {}",
                    start.lane
                ));
            }
            return Ok(Started::Known(Arc::clone(lane)));
        }
        if !table.known.starts(start.lane) {
            return Ok(Started::Over);
        }
        if table.open.len() > LANES_MAX {
            return Err(format!("the partner has more than {LANES_MAX} lanes open"));
        }
        let (sink, told) = match start.class {
            LaneClass::Io if start.answers != LaneId::CONTROL => {
                let Some(events) = table.unanswered.remove(&start.answers) else {
                    return Ok(Started::Over);
                };
                (Sink::Io(events), Told::Nobody)
            }
            LaneClass::Io => {
                let (tx, rx) = mpsc::channel(IO_EVENTS_MAX);
                (Sink::Io(tx.clone()), Told::Io(tx, rx))
            }
            LaneClass::Epoch | LaneClass::Control => {
                let (tx, rx) = mpsc::channel(LANE_FRAMES_MAX);
                (Sink::Epoch(tx), Told::Epoch(rx))
            }
        };
        let lane = InLane::new(start, self.window_bytes, sink);
        for nudges in table.members.iter().flatten() {
            lane.link_up(nudges);
        }
        table.open.insert(start.lane, Arc::clone(&lane));
        Ok(match told {
            Told::Nobody => Started::Known(lane),
            Told::Epoch(rx) => Started::Epoch(lane, rx),
            Told::Io(tx, rx) => Started::Io(lane, tx, rx),
        })
    }

    /// The answers to this lane of our own go there.
    pub(super) fn expect_answer(&self, lane: LaneId, events: mpsc::Sender<IoEvent>) {
        let mut table = lock(&self.table);
        if !table.ended {
            table.unanswered.insert(lane, events);
        }
    }

    /// The partner does not want that lane of ours: no answer will come.
    pub(super) fn no_answer(&self, lane: LaneId) {
        lock(&self.table).unanswered.remove(&lane);
    }

    /// A lane is over. If the partner may not know, it is told on every link.
    pub(super) fn forget(&self, lane: &InLane, tell: bool) {
        let mut table = lock(&self.table);
        if table.open.remove(&lane.start.lane).is_some() && tell {
            for nudges in table.members.iter().flatten() {
                nudges.stop(lane.start.lane);
            }
        }
        lane.close();
    }

    /// The session is over: every lane ends for the product.
    pub(super) fn end(&self) {
        let mut table = lock(&self.table);
        table.ended = true;
        table.unanswered.clear();
        table.members = Default::default();
        for lane in std::mem::take(&mut table.open).into_values() {
            lane.close();
        }
    }

    pub(super) fn lane_stats(&self) -> Vec<LaneStats> {
        lock(&self.table)
            .open
            .values()
            .map(|lane| lane.stats())
            .collect()
    }
}
