//! What this side sends in a session: its lanes, who may take what, and the tasks that
//! write it.
//!
//! ```text
//!  push ─▶ LaneSender ◀─pull─ one task for each (lane, connection) ─▶ its QUIC stream
//!             ▲   ▲
//!   acked ────┘   └── tick: overdue, deadlines
//! ```
//!
//! All of it stands under one lock, held for the time of a decision and never across a
//! system call, a checksum or an `await`.
//!
//! What this must never do: hand a segment to a connection that is no longer its link's
//! (it would count as on its way for ever), or let a task sleep while it has something
//! to send.

use super::capacity::{self, PathFigures};
use super::incoming::Clock;
use super::lanes::{IoEvent, IoTicket, LaneSink};
use super::queue::PushError;
use super::stats::{LaneKind, LanePressure, LaneStats, LinkState};
use crate::frame::Frame;
use crate::ids::{Generation, VmId};
use crate::lane::links::{LinkMeasure, Links};
use crate::lane::send::{AckError, FrameNumber, LaneSender, PushError as QueueError};
use crate::lane::stripe::LinkHealth;
use crate::lane::wire::{LaneAck, LaneStart, control_segment_head};
use crate::lane::{LINKS_MAX, LaneClass, LaneId, LinkIndex, Micros};
use bytes::Bytes;
use quinn::Connection;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

/// Bytes of control frames that may wait for a link: acknowledgements and status are
/// small; if a MiB of them waits, the links are dead.
pub(super) const CONTROL_QUEUE_BYTES: u64 = 1 << 20;
/// Bytes of I/O frames that may wait for a link on one lane: four requests of the largest
/// size; more is the guest's queue to hold.
const IO_QUEUE_BYTES: u64 = 4 << 20;
/// Bytes taken from a lane at a time while there is no choice of links.
const PULL_BYTES_ALONE: usize = 1 << 20;
/// Shortest and longest time between two looks at what is on its way. Nothing is overdue
/// before 20 ms; timers come by the millisecond.
const TICK_MIN: Duration = Duration::from_millis(1);
const TICK_MAX: Duration = Duration::from_millis(5);

/// What bulk may have in QUIC beyond what may be on its way, in bytes: so that it is always
/// the congestion window that holds it, which measures the path by that; more could not go
/// another way any more.
const SEND_AHEAD_BYTES: u64 = 512 << 10;
/// Least that bulk may have in QUIC on a link, in bytes: an epoch of 250 raw pages.
const SEND_WINDOW_MIN: u64 = 1 << 20;
/// The same while there is no other way: as much as ever is on its way and as much ahead.
const SEND_WINDOW_ALONE: u64 = 9 << 20;
/// What control and I/O may have in QUIC beyond what bulk has filled, in bytes. Bulk fills
/// the send window; without room of their own the others would wait for it to drain, and
/// priorities only order what is inside.
const URGENT_BYTES: u64 = 2 << 20;

/// A connection that stands on a link.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) link: LinkIndex,
    /// Tells it from others on the same link; counts up from 1.
    pub(super) serial: u64,
    pub(super) connection: Connection,
    /// What bulk may have in QUIC now, in bytes.
    window: Arc<AtomicU64>,
}

impl Member {
    pub(super) fn new(link: LinkIndex, serial: u64, connection: Connection) -> Self {
        let window = send_window(&capacity::figures(&connection));
        connection.set_send_window(window);
        Self {
            link,
            serial,
            connection,
            window: Arc::new(AtomicU64::new(window)),
        }
    }

    /// Let urgent streams write beside bulk that has filled the window, or no longer.
    pub(super) fn raise_window(&self, raised: bool) {
        let urgent = if raised { URGENT_BYTES } else { 0 };
        let window = self.window.load(Ordering::Relaxed);
        self.connection.set_send_window(window + urgent);
    }

    /// Keep what is in QUIC to what goes out soon: it can go no other way any more.
    fn fit_window(&self, figures: &PathFigures, alone: bool) {
        let window = if alone {
            SEND_WINDOW_ALONE
        } else {
            send_window(figures)
        };
        let before = self.window.load(Ordering::Relaxed);
        // Not for every wobble: it takes QUIC's lock and wakes its task.
        if window.abs_diff(before) > before / 8 {
            self.window.store(window, Ordering::Relaxed);
            self.connection.set_send_window(window);
        }
    }
}

fn send_window(figures: &PathFigures) -> u64 {
    (figures.window_bytes + SEND_AHEAD_BYTES).max(SEND_WINDOW_MIN)
}

/// The part of a lane that its tasks and its owner hold on to.
pub(super) struct OutLane {
    pub(super) start: LaneStart,
    /// Room came up, or the lane closed. With the lock of [`Outgoing`].
    room: Condvar,
    /// For the writer of each link: there may be something to send.
    wake: [Notify; LINKS_MAX],
    /// Where news of frames past their deadline go (I/O lanes).
    notices: Option<mpsc::WeakSender<IoEvent>>,
}

impl OutLane {
    fn wake_all(&self) {
        self.wake.iter().for_each(Notify::notify_one);
    }

    pub(super) fn wake_at(&self, link: LinkIndex) -> &Notify {
        &self.wake[usize::from(link.0) % LINKS_MAX]
    }

    pub(super) fn wake_others(&self, link: LinkIndex) {
        for (index, wake) in self.wake.iter().enumerate() {
            if index != usize::from(link.0) {
                wake.notify_one();
            }
        }
    }
}

struct Sending {
    lane: Arc<OutLane>,
    sender: LaneSender,
    /// No frame is taken any more.
    closed: bool,
    /// Expired frames the product has not been told of.
    untold: Vec<IoTicket>,
    frames: u64,
    bytes: u64,
}

impl Sending {
    /// Anything is on its way, waits, or is to be told.
    fn is_busy(&self) -> bool {
        self.sender.unacked_bytes() + self.sender.queued_bytes() > 0 || !self.untold.is_empty()
    }

    fn tell_expired(&mut self, expired: Vec<FrameNumber>) {
        let Some(notices) = &self.lane.notices else {
            return;
        };
        self.untold
            .extend(expired.into_iter().map(|number| IoTicket(number.0)));
        if self.untold.is_empty() {
            return;
        }
        match notices.upgrade() {
            // Those that find no room are told at the next look.
            Some(notices) => {
                self.untold
                    .retain(|ticket| match notices.try_send(IoEvent::Expired(*ticket)) {
                        Ok(()) | Err(TrySendError::Closed(_)) => false,
                        Err(TrySendError::Full(_)) => true,
                    })
            }
            None => self.untold.clear(),
        }
    }
}

struct Core {
    links: Links,
    members: [Option<Member>; LINKS_MAX],
    lanes: BTreeMap<LaneId, Sending>,
    next_lane: u32,
    /// Bytes of segments sent again on each link because another one failed them.
    resent: [u64; LINKS_MAX],
    ended: bool,
    /// Nobody looks at the clock: wake it when something is sent.
    clock_stopped: bool,
}

impl Core {
    fn is_member(&self, member: &Member) -> bool {
        self.members
            .get(usize::from(member.link.0))
            .and_then(Option::as_ref)
            .is_some_and(|current| current.serial == member.serial)
    }
}

/// What a writer finds.
pub(super) enum Pull {
    /// Chunks to write; whether more waits.
    Write { more: bool },
    /// Nothing for this link now; whether something waits all the same.
    Wait { more: bool },
    /// Everything was delivered, or nobody wants it.
    Over,
    /// Its connection is not the link's any more.
    Gone,
}

/// The sending half of a session.
pub(super) struct Outgoing {
    core: Mutex<Core>,
    started: Instant,
    window_bytes: u64,
    clock: Notify,
    control: Arc<OutLane>,
}

impl Outgoing {
    /// `window_bytes`: the smaller of both sides'.
    pub(super) fn new(window_bytes: u64) -> Arc<Self> {
        let control = Arc::new(OutLane {
            start: LaneStart {
                lane: LaneId::CONTROL,
                class: LaneClass::Control,
                vm: VmId([0; 16]),
                generation: Generation(0),
                answers: LaneId::CONTROL,
            },
            room: Condvar::new(),
            wake: Default::default(),
            notices: None,
        });
        let sending = Sending {
            lane: Arc::clone(&control),
            sender: LaneSender::new(LaneClass::Control, CONTROL_QUEUE_BYTES, window_bytes),
            closed: false,
            untold: Vec::new(),
            frames: 0,
            bytes: 0,
        };
        Arc::new(Self {
            core: Mutex::new(Core {
                links: Links::new(),
                members: Default::default(),
                lanes: BTreeMap::from([(LaneId::CONTROL, sending)]),
                next_lane: 1,
                resent: [0; LINKS_MAX],
                ended: false,
                clock_stopped: false,
            }),
            started: Instant::now(),
            window_bytes,
            clock: Notify::new(),
            control,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        // Each change under the lock is whole, so a panic elsewhere spoils nothing.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clock(&self) -> Clock {
        Clock(self.started)
    }

    pub(super) fn now(&self) -> Micros {
        self.clock().now()
    }

    pub(super) fn control(&self) -> &Arc<OutLane> {
        &self.control
    }

    /// A new lane, and the connections that stand: each needs a writer.
    pub(super) fn open(
        &self,
        class: LaneClass,
        vm: VmId,
        generation: Generation,
        answers: LaneId,
        queue_bytes: u64,
        notices: Option<mpsc::WeakSender<IoEvent>>,
    ) -> (Arc<OutLane>, Vec<Member>) {
        let mut core = self.lock();
        let lane = Arc::new(OutLane {
            start: LaneStart {
                lane: LaneId(core.next_lane),
                class,
                vm,
                generation,
                answers,
            },
            room: Condvar::new(),
            wake: Default::default(),
            notices,
        });
        core.next_lane += 1;
        let queue_bytes = match class {
            LaneClass::Io => IO_QUEUE_BYTES,
            LaneClass::Control | LaneClass::Epoch => queue_bytes,
        };
        let mut sender = LaneSender::new(class, queue_bytes, self.window_bytes);
        let members: Vec<Member> = core.members.iter().flatten().cloned().collect();
        members
            .iter()
            .for_each(|member| sender.link_up(member.link));
        if !core.ended {
            core.lanes.insert(
                lane.start.lane,
                Sending {
                    lane: Arc::clone(&lane),
                    sender,
                    closed: false,
                    untold: Vec::new(),
                    frames: 0,
                    bytes: 0,
                },
            );
        }
        (lane, members)
    }

    /// A connection stands; returns the lanes that need a writer on it.
    pub(super) fn link_up(&self, member: &Member) -> Vec<Arc<OutLane>> {
        let now = self.now();
        let mut core = self.lock();
        let Some(slot) = core.members.get_mut(usize::from(member.link.0)) else {
            return Vec::new();
        };
        let replaced = slot.replace(member.clone()).is_some();
        if replaced {
            take_down(&mut core, member.link, now);
        }
        core.links.up(member.link, now);
        for sending in core.lanes.values_mut() {
            sending.sender.link_up(member.link);
            sending.lane.wake_all();
        }
        core.lanes
            .values()
            .filter(|sending| sending.lane.start.class != LaneClass::Control)
            .map(|sending| Arc::clone(&sending.lane))
            .collect()
    }

    /// A connection is gone (no matter if another has taken its place).
    pub(super) fn link_down(&self, member: &Member) {
        let now = self.now();
        let mut core = self.lock();
        if core.is_member(member) {
            core.members[usize::from(member.link.0)] = None;
            take_down(&mut core, member.link, now);
        }
        self.start_clock(&mut core);
        for sending in core.lanes.values() {
            sending.lane.wake_all();
        }
    }

    fn start_clock(&self, core: &mut Core) {
        if std::mem::take(&mut core.clock_stopped) {
            self.clock.notify_one();
        }
    }

    /// What this connection sends next of a lane, appended to `chunks`.
    pub(super) fn pull(&self, lane: &OutLane, member: &Member, chunks: &mut Vec<Bytes>) -> Pull {
        let now = self.now();
        let mut core = self.lock();
        if !core.is_member(member) {
            return Pull::Gone;
        }
        let alone = core.members.iter().flatten().count() == 1;
        let Core {
            links,
            lanes,
            resent,
            ..
        } = &mut *core;
        let Some(sending) = lanes.get_mut(&lane.start.lane) else {
            return Pull::Over;
        };
        // One segment decides at a time: the next may be better off elsewhere.
        let control = lane.start.class == LaneClass::Control;
        let bytes_max = if alone || control {
            PULL_BYTES_ALONE
        } else {
            1
        };
        let mut bytes = 0;
        while bytes < bytes_max
            && let Some(segment) = sending.sender.next(member.link, links, now)
        {
            bytes += segment.header.bytes as usize + 1;
            if segment.again {
                resent[usize::from(member.link.0) % LINKS_MAX] += u64::from(segment.header.bytes);
            }
            chunks.push(if control {
                Bytes::copy_from_slice(&control_segment_head(&segment.header))
            } else {
                Bytes::copy_from_slice(&segment.header.encode())
            });
            chunks.extend(segment.chunks);
        }
        let more = !alone && sending.sender.queued_bytes() > 0;
        if bytes == 0 {
            return Pull::Wait { more };
        }
        let lane = Arc::clone(&sending.lane);
        self.start_clock(&mut core);
        drop(core);
        lane.room.notify_all();
        Pull::Write { more }
    }

    /// An acknowledgement that came on this connection.
    pub(super) fn acked(&self, member: &Member, ack: LaneAck) -> Result<(), AckError> {
        let now = self.now();
        let mut core = self.lock();
        if !core.is_member(member) {
            return Ok(());
        }
        let health = core.links.health(member.link, now);
        let Core { links, lanes, .. } = &mut *core;
        let Some(sending) = lanes.get_mut(&ack.lane) else {
            return Ok(());
        };
        sending.sender.acked(member.link, ack, links, now)?;
        if sending.sender.is_done() && ack.lane != LaneId::CONTROL {
            let lane = Arc::clone(&sending.lane);
            lanes.remove(&ack.lane);
            lane.wake_all();
        }
        let recovered = health != core.links.health(member.link, now);
        for sending in core.lanes.values() {
            if recovered {
                sending.lane.wake_all();
            } else if sending.is_busy() {
                sending.lane.wake_at(member.link).notify_one();
            }
        }
        Ok(())
    }

    /// The partner does not want a lane any more.
    pub(super) fn stopped(&self, lane: LaneId) {
        let now = self.now();
        let mut core = self.lock();
        if lane == LaneId::CONTROL {
            return;
        }
        if let Some(mut sending) = core.lanes.remove(&lane) {
            sending.sender.abandon(&mut core.links, now);
            sending.lane.room.notify_all();
            sending.lane.wake_all();
        }
    }

    /// The session is over: nothing more goes in or out.
    pub(super) fn end(&self) {
        let mut core = self.lock();
        core.ended = true;
        core.members = Default::default();
        for sending in std::mem::take(&mut core.lanes).into_values() {
            sending.lane.room.notify_all();
            sending.lane.wake_all();
        }
    }

    /// Look after what is on its way, for ever. Cancel it when the session is over.
    pub(super) async fn keep_time(&self) -> std::convert::Infallible {
        loop {
            match self.tick() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => self.clock.notified().await,
            }
        }
    }

    /// `None`: nothing is on its way or waits.
    fn tick(&self) -> Option<Duration> {
        let members: Vec<Member> = self.lock().members.iter().flatten().cloned().collect();
        // Not under the lock: QUIC has its own, and holds it while it sends.
        let alone = members.len() == 1;
        let measures: Vec<_> = members
            .into_iter()
            .map(|member| {
                let figures = capacity::figures(&member.connection);
                member.fit_window(&figures, alone);
                let measure = measure(&member, &figures);
                (member, measure)
            })
            .collect();
        let now = self.now();
        let mut core = self.lock();
        for (member, measure) in measures {
            if core.is_member(&member) {
                core.links.measured(member.link, measure);
            }
        }
        let Core { links, lanes, .. } = &mut *core;
        let (mut busy, mut changed, mut next) = (false, false, None);
        for sending in lanes.values_mut() {
            changed |= !sending.sender.tick(links, now).is_empty();
            let expired = sending.sender.expired();
            if !expired.is_empty() {
                sending.lane.room.notify_all();
            }
            sending.tell_expired(expired);
            busy |= sending.is_busy();
        }
        for sending in lanes.values() {
            next = earlier(next, sending.sender.next_wakeup(links));
            // A link that was held back may be free now; figures may be new.
            if changed || sending.is_busy() {
                sending.lane.wake_all();
            }
        }
        if !busy {
            core.clock_stopped = true;
            return None;
        }
        let pause = next.map_or(TICK_MAX, |at| at.since(now).into());
        Some(pause.clamp(TICK_MIN, TICK_MAX))
    }

    /// How a link stands, the bytes on their way on it, and those sent again on it.
    pub(super) fn link_state(&self, link: LinkIndex) -> (LinkState, u64, u64) {
        let core = self.lock();
        let state = match core.links.health(link, self.now()) {
            LinkHealth::Down => LinkState::Down,
            LinkHealth::Suspect => LinkState::Suspect,
            LinkHealth::Up => LinkState::Up,
        };
        let resent = core.resent[usize::from(link.0) % LINKS_MAX];
        (state, core.links.in_flight(link), resent)
    }

    pub(super) fn lane_stats(&self) -> Vec<LaneStats> {
        let core = self.lock();
        core.lanes
            .values()
            .map(|sending| LaneStats {
                kind: kind(sending.lane.start.class),
                vm: sending.lane.start.vm,
                generation: sending.lane.start.generation,
                outgoing: true,
                frames: sending.frames,
                bytes: sending.bytes,
                queued_bytes: sending.sender.queued_bytes(),
                unacked_bytes: sending.sender.unacked_bytes(),
                repeated_bytes: sending.sender.repeated_bytes(),
                expired_frames: sending.sender.expired_frames(),
            })
            .collect()
    }

    fn pressure(&self, lane: LaneId) -> LanePressure {
        let core = self.lock();
        let sender = core.lanes.get(&lane).map(|sending| &sending.sender);
        LanePressure {
            queued_bytes: sender.map_or(0, LaneSender::queued_bytes),
            unacked_bytes: sender.map_or(0, LaneSender::unacked_bytes),
            capacity_bytes_per_s: core.links.capacity(self.now()),
        }
    }

    fn finish(&self, lane: &OutLane) {
        let mut core = self.lock();
        if let Some(sending) = core.lanes.get_mut(&lane.start.lane)
            && !sending.closed
        {
            sending.closed = true;
            sending.sender.finish();
            lane.wake_all();
        }
        lane.room.notify_all();
    }

    /// Queue a frame on a lane; with `wait`, not before there is room.
    pub(super) fn push(
        &self,
        lane: &OutLane,
        frame: Frame,
        deadline: Option<Instant>,
        wait: bool,
    ) -> Result<u64, PushError> {
        // Runs over the payload for its checksum: not under the lock.
        let header = frame.header().map_err(|_| PushError::Closed)?;
        let header = Bytes::copy_from_slice(&header);
        let deadline = deadline.map(|at| at.saturating_duration_since(self.started).into());
        let bytes = frame.wire_bytes() as u64;
        let mut core = self.lock();
        loop {
            let Some(sending) = core
                .lanes
                .get_mut(&lane.start.lane)
                .filter(|sending| !sending.closed)
            else {
                return Err(PushError::Closed);
            };
            match sending
                .sender
                .push(header.clone(), frame.payload.clone(), deadline)
            {
                Ok(number) => {
                    sending.frames += 1;
                    sending.bytes += bytes;
                    if deadline.is_some() {
                        self.start_clock(&mut core);
                    }
                    drop(core);
                    lane.wake_all();
                    return Ok(number.0);
                }
                Err(QueueError::Full { queued_bytes }) if !wait => {
                    let queued = usize::try_from(queued_bytes).unwrap_or(usize::MAX);
                    return Err(PushError::Full(queued));
                }
                Err(QueueError::Full { .. }) => {
                    core = lane.room.wait(core).unwrap_or_else(PoisonError::into_inner);
                }
                Err(_) => return Err(PushError::Closed),
            }
        }
    }
}

pub(super) fn kind(class: LaneClass) -> LaneKind {
    match class {
        LaneClass::Control => LaneKind::Control,
        LaneClass::Epoch => LaneKind::Epoch,
        LaneClass::Io => LaneKind::Io,
    }
}

fn earlier(a: Option<Micros>, b: Option<Micros>) -> Option<Micros> {
    a.into_iter().chain(b).min()
}

fn take_down(core: &mut Core, link: LinkIndex, now: Micros) {
    core.links.down(link, now);
    for sending in core.lanes.values_mut() {
        sending.sender.link_down(link);
    }
}

/// What QUIC knows of a connection now.
fn measure(member: &Member, figures: &PathFigures) -> LinkMeasure {
    let rtt = member.connection.rtt();
    let rtt_min = if figures.rtt_min.is_zero() {
        rtt
    } else {
        figures.rtt_min
    };
    LinkMeasure {
        capacity: figures.bytes_per_s,
        saturated: figures.saturated,
        rtt: rtt.into(),
        rtt_min: rtt_min.into(),
    }
}

/// A lane as its owner pushes into it.
pub(super) struct LaneHandle {
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) lane: Arc<OutLane>,
}

impl LaneSink for LaneHandle {
    fn push_blocking(&self, frame: Frame) -> Result<(), PushError> {
        self.outgoing
            .push(&self.lane, frame, None, true)
            .map(|_| ())
    }

    fn try_push(&self, frame: Frame) -> Result<(), PushError> {
        self.outgoing
            .push(&self.lane, frame, None, false)
            .map(|_| ())
    }

    fn push_until(&self, frame: Frame, deadline: Instant) -> Result<u64, PushError> {
        self.outgoing.push(&self.lane, frame, Some(deadline), false)
    }

    fn queued_bytes(&self) -> usize {
        usize::try_from(self.outgoing.pressure(self.lane.start.lane).queued_bytes)
            .unwrap_or(usize::MAX)
    }

    fn pressure(&self) -> LanePressure {
        self.outgoing.pressure(self.lane.start.lane)
    }

    fn is_closed(&self) -> bool {
        let core = self.outgoing.lock();
        core.lanes
            .get(&self.lane.start.lane)
            .is_none_or(|sending| sending.closed)
    }

    fn finish(&self) {
        self.outgoing.finish(&self.lane);
    }
}
