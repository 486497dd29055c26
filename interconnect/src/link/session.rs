//! One session: an established connection, its control lane and its epoch lanes.
//!
//! ```text
//!  control(frame) -> queue -> writer task -> QUIC ~> reader task -> on_ack, or LinkEvent::Control
//!  EpochLane::send -> queue -> writer task -> QUIC ~> lane task  -> LinkEvent::EpochLane.rx
//! ```
//!
//! What this must never do: tell of a frame before `Up` or after `Down`; hold more
//! of the partner's bytes than the windows and channels allow.

use super::config::OnAck;
use super::hello::{LANE_BYTES, lane_start, parse_lane_start};
use super::queue::{FrameQueue, PushError};
use super::{Hello, LinkEvent, LinkStats, SendError, SessionId};
use crate::frame::{Frame, FrameDecoder, HEADER_BYTES};
use crate::heartbeat::HeartbeatKey;
use crate::ids::{Generation, VmId};
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Bytes of control frames that may wait for the link: acknowledgements and status
/// are small; if a MiB of them waits, the link is dead.
const CONTROL_QUEUE_BYTES: usize = 1 << 20;
/// Priority of the control lane over epoch lanes (0).
const CONTROL_PRIORITY: i32 = 10;
/// Frames of one lane that wait for the standby's thread. With page batches of
/// 1 MiB this is 8 MiB; beyond it the lane's own flow control holds the sender.
const LANE_FRAMES_MAX: usize = 8;
/// Pieces taken from QUIC at a time: with 1.4 KB each about 90 KB.
const CHUNKS_MAX: usize = 64;
/// Bytes handed to QUIC at a time.
const WRITE_BYTES: usize = 1 << 20;
/// A lane must say what it is within this time.
const LANE_START_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a session's figures go to the log at DEBUG.
const FIGURES_EVERY: Duration = Duration::from_secs(1);
/// Close code: ended in order, or replaced by a newer session.
pub(super) const CODE_DONE: u32 = 0;
/// Close code: the partner is refused; the reason says why.
pub(super) const CODE_REFUSED: u32 = 1;
/// Close code: the partner broke the protocol; the reason says how.
pub(super) const CODE_PROTOCOL: u32 = 2;

/// The lanes of a pair, whatever carries them. Today one connection on one link;
/// several links, an I/O lane and striping come behind this trait.
pub(super) trait Lanes: Send + Sync {
    fn id(&self) -> SessionId;
    fn control(&self, frame: Frame) -> Result<(), PushError>;
    fn open_epoch_lane(&self, vm: VmId, generation: Generation, queue_bytes: usize) -> EpochLane;
    /// The link it runs on, and its figures.
    fn stats(&self) -> (usize, LinkStats);
    fn close(&self, code: u32, reason: &str);
}

/// A session on one connection.
pub(super) struct Session {
    id: SessionId,
    link: usize,
    connection: Connection,
    control: FrameQueue,
    runtime: Handle,
    peer: String,
    /// Why this side closed it, if it did.
    closed_here: OnceLock<String>,
}

/// What an established connection brings along.
pub(super) struct Established {
    pub(super) connection: Connection,
    pub(super) link: usize,
    pub(super) send: SendStream,
    pub(super) receive: RecvStream,
    pub(super) hello: Hello,
}

impl Session {
    pub(super) fn new(id: SessionId, established: &Established, runtime: Handle) -> Arc<Self> {
        Arc::new(Self {
            id,
            link: established.link,
            connection: established.connection.clone(),
            control: FrameQueue::new(CONTROL_QUEUE_BYTES),
            runtime,
            peer: established.hello.host.clone(),
            closed_here: OnceLock::new(),
        })
    }

    /// Carry frames until the connection ends; returns why, in plain words.
    pub(super) async fn run(
        self: &Arc<Self>,
        send: SendStream,
        receive: RecvStream,
        on_ack: Option<OnAck>,
        events: &mpsc::Sender<LinkEvent>,
    ) -> String {
        // Failing only means the default priority.
        let _ = send.set_priority(CONTROL_PRIORITY);
        let mut lanes = tokio::task::JoinSet::new();
        let reason = tokio::select! {
            reason = self.write_control(send) => reason,
            reason = self.read_control(receive, on_ack.as_ref(), events) => reason,
            reason = self.accept_lanes(&mut lanes, events) => reason,
            error = self.connection.closed() => error.to_string(),
            never = self.tell_figures() => match never {},
        };
        self.control.close();
        // Before closing from here, which would hide the partner's own words. If the
        // connection ended first, its reason explains the others.
        let reason = match self.connection.close_reason() {
            None => reason,
            Some(quinn::ConnectionError::LocallyClosed) => {
                self.closed_here.get().cloned().unwrap_or(reason)
            }
            Some(error) => error.to_string(),
        };
        self.connection
            .close(VarInt::from_u32(CODE_PROTOCOL), reason.as_bytes());
        lanes.shutdown().await;
        reason
    }

    /// What the connection did, once a second, for whoever reads the log at DEBUG.
    async fn tell_figures(&self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(FIGURES_EVERY).await;
            let stats = self.connection.stats();
            tracing::debug!(peer = %self.peer, path = ?stats.path, tx = ?stats.udp_tx, rx = ?stats.udp_rx, "figures");
        }
    }

    async fn write_control(&self, stream: SendStream) -> String {
        write_frames(&self.control, stream)
            .await
            .err()
            .unwrap_or_else(|| "control lane ended".to_owned())
    }

    async fn read_control(
        &self,
        mut stream: RecvStream,
        on_ack: Option<&OnAck>,
        events: &mpsc::Sender<LinkEvent>,
    ) -> String {
        let mut reader = FrameReader::default();
        loop {
            match reader.next(&mut stream).await {
                Ok(Some(frame)) if frame.kind.is_control() => match on_ack {
                    Some(on_ack) if frame.kind == crate::frame::FrameKind::EpochAck => {
                        on_ack(frame)
                    }
                    _ => {
                        let event = LinkEvent::Control {
                            session: self.id,
                            frame,
                        };
                        if events.send(event).await.is_err() {
                            return "nobody listens to the interconnect's events".to_owned();
                        }
                    }
                },
                Ok(Some(frame)) => {
                    return format!(
                        "the partner sent a {:?} frame on the control lane",
                        frame.kind
                    );
                }
                Ok(None) => return "the partner ended the control lane".to_owned(),
                Err(reason) => return reason,
            }
        }
    }

    async fn accept_lanes(
        self: &Arc<Self>,
        lanes: &mut tokio::task::JoinSet<()>,
        events: &mpsc::Sender<LinkEvent>,
    ) -> String {
        loop {
            // Tasks that ended are collected here, so that the set stays small.
            while lanes.try_join_next().is_some() {}
            match self.connection.accept_uni().await {
                Ok(stream) => {
                    let (session, events) = (Arc::clone(self), events.clone());
                    lanes.spawn(async move { session.read_lane(stream, events).await });
                }
                Err(error) => return error.to_string(),
            }
        }
    }

    async fn read_lane(&self, mut stream: RecvStream, events: mpsc::Sender<LinkEvent>) {
        if let Err(reason) = self.carry_lane(&mut stream, events).await {
            tracing::warn!(peer = %self.peer, session = self.id.0, "epoch lane broken: {reason}");
            self.close(CODE_PROTOCOL, &reason);
        }
        // The reader went away or the lane is over: let the sender know.
        let _ = stream.stop(VarInt::from_u32(CODE_DONE));
    }

    async fn carry_lane(
        &self,
        stream: &mut RecvStream,
        events: mpsc::Sender<LinkEvent>,
    ) -> Result<(), String> {
        let mut start = [0; LANE_BYTES];
        match tokio::time::timeout(LANE_START_TIMEOUT, stream.read_exact(&mut start)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => return Err("a lane did not say in time what it is".to_owned()),
        }
        let (vm, generation) = parse_lane_start(&start)?;
        let (tx, rx) = mpsc::channel(LANE_FRAMES_MAX);
        let event = LinkEvent::EpochLane {
            vm,
            generation,
            session: self.id,
            rx,
        };
        if events.send(event).await.is_err() {
            return Ok(());
        }
        drop(events);
        let mut reader = FrameReader::default();
        loop {
            let frame = tokio::select! {
                frame = reader.next(stream) => frame?,
                () = tx.closed() => return Ok(()),
            };
            match frame {
                Some(frame) if frame.kind.is_control() => {
                    return Err(format!(
                        "the partner sent a {:?} frame on an epoch lane",
                        frame.kind
                    ));
                }
                Some(frame) => {
                    if tx.send(frame).await.is_err() {
                        return Ok(());
                    }
                }
                None => return Ok(()),
            }
        }
    }
}

impl Lanes for Session {
    fn id(&self) -> SessionId {
        self.id
    }

    fn control(&self, frame: Frame) -> Result<(), PushError> {
        self.control.try_push(frame)
    }

    fn open_epoch_lane(&self, vm: VmId, generation: Generation, queue_bytes: usize) -> EpochLane {
        let queue = Arc::new(FrameQueue::new(queue_bytes));
        let (connection, task_queue) = (self.connection.clone(), Arc::clone(&queue));
        self.runtime.spawn(async move {
            let open = async {
                let mut stream = connection
                    .open_uni()
                    .await
                    .map_err(|error| error.to_string())?;
                stream
                    .write_all(&lane_start(vm, generation))
                    .await
                    .map_err(|error| error.to_string())?;
                Ok::<_, String>(stream)
            };
            let result = match open.await {
                Ok(stream) => write_frames(&task_queue, stream).await,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = result {
                tracing::debug!("epoch lane of {vm} ended: {reason}");
            }
            task_queue.close();
        });
        EpochLane {
            queue,
            session: self.id,
            peer: self.peer.clone(),
        }
    }

    fn stats(&self) -> (usize, LinkStats) {
        let stats = self.connection.stats();
        let figures = super::capacity::figures(&self.connection);
        let local = self.connection.local_ip();
        let remote = self.connection.remote_address();
        let link = LinkStats {
            state: super::LinkState::Up,
            path: Some((local.map_or(remote, |ip| (ip, 0).into()), remote)),
            rtt: stats.path.rtt,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            black_holes: stats.path.black_holes_detected,
            mtu_bytes: stats.path.current_mtu,
            rtt_min: figures.rtt_min,
            capacity_bytes_per_s: figures.bytes_per_s,
            window_bytes: figures.window_bytes,
            ..LinkStats::default()
        };
        (self.link, link)
    }

    fn close(&self, code: u32, reason: &str) {
        // The first reason counts.
        let _ = self.closed_here.set(reason.to_owned());
        self.connection
            .close(VarInt::from_u32(code), reason.as_bytes());
    }
}

/// Send what comes into the queue until it is finished; `Err` with the reason if the
/// stream ended first. Payloads go to QUIC as they are, without a copy.
async fn write_frames(queue: &FrameQueue, mut stream: SendStream) -> Result<(), String> {
    let (mut frames, mut chunks) = (Vec::new(), Vec::new());
    loop {
        tokio::select! {
            more = queue.take(WRITE_BYTES, &mut frames) => if !more {
                return stream.finish().map_err(|error| error.to_string());
            },
            _ = stream.stopped() => return Err("the partner stopped reading the lane".to_owned()),
        }
        for frame in frames.drain(..) {
            let header = frame.header().map_err(|error| error.to_string())?;
            chunks.push(Bytes::copy_from_slice(&header));
            if !frame.payload.is_empty() {
                chunks.push(frame.payload);
            }
        }
        stream
            .write_all_chunks(&mut chunks)
            .await
            .map_err(|error| error.to_string())?;
        chunks.clear();
    }
}

/// Frames from a stream.
#[derive(Default)]
struct FrameReader {
    decoder: FrameDecoder,
    chunks: Vec<Bytes>,
    /// Chunks of `chunks` that are read already.
    at: usize,
    /// Chunks of `chunks` that hold bytes.
    end: usize,
}

impl FrameReader {
    /// The next frame; `None` at the end of the stream. Safe to cancel: what was
    /// read stays here.
    async fn next(&mut self, stream: &mut RecvStream) -> Result<Option<Frame>, String> {
        loop {
            while self.at < self.end {
                let chunk = &mut self.chunks[self.at];
                let frame = self
                    .decoder
                    .push(chunk)
                    .map_err(|error| error.to_string())?;
                if chunk.is_empty() {
                    self.at += 1;
                }
                if frame.is_some() {
                    return Ok(frame);
                }
            }
            self.chunks.resize(CHUNKS_MAX, Bytes::new());
            match stream.read_chunks(&mut self.chunks).await {
                Ok(Some(count)) => (self.at, self.end) = (0, count),
                Ok(None) if self.decoder.is_at_boundary() => return Ok(None),
                Ok(None) => return Err("a lane ended within a frame".to_owned()),
                // The partner gave the lane up (or the connection went): an end.
                Err(quinn::ReadError::Reset(_)) => return Ok(None),
                Err(quinn::ReadError::ConnectionLost(_)) => return Ok(None),
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

/// Secrets for the heartbeats of this session, one for each direction so that a
/// heartbeat cannot be reflected.
pub(super) fn heartbeat_key(
    connection: &Connection,
    dialled: bool,
) -> Result<HeartbeatKey, String> {
    let export = |from_dialler: bool| {
        let mut secret = [0; 32];
        let context: &[u8] = if from_dialler {
            b"dialler"
        } else {
            b"acceptor"
        };
        connection
            .export_keying_material(&mut secret, b"pollux heartbeat 1", context)
            .map(|()| secret)
            .map_err(|_| "TLS gave no key for the heartbeats".to_owned())
    };
    Ok(HeartbeatKey {
        send: export(dialled)?,
        receive: export(!dialled)?,
    })
}

/// A lane of one VM's epochs; dropping it ends the lane after what is queued is sent.
pub struct EpochLane {
    queue: Arc<FrameQueue>,
    session: SessionId,
    peer: String,
}

impl std::fmt::Debug for EpochLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "EpochLane(session {}, {} bytes queued)",
            self.session.0,
            self.queued_bytes()
        )
    }
}

impl EpochLane {
    fn check(frame: &Frame) -> Result<(), SendError> {
        if frame.kind.is_control() {
            return Err(SendError::Kind(frame.kind));
        }
        super::check_size(frame)
    }

    fn error(&self, error: &PushError) -> SendError {
        match *error {
            PushError::Closed => SendError::LaneGone,
            PushError::Full(queued_bytes) => SendError::Full {
                peer: self.peer.clone(),
                queued_bytes,
            },
        }
    }

    /// Send, waiting while the queue is full. Not from a tokio task.
    ///
    /// # Errors
    /// [`SendError::LaneGone`], [`SendError::Frame`], [`SendError::Kind`].
    pub fn send_blocking(&self, frame: Frame) -> Result<(), SendError> {
        Self::check(&frame)?;
        self.queue
            .push_blocking(frame)
            .map_err(|error| self.error(&error))
    }

    /// Send if the queue has room.
    ///
    /// # Errors
    /// As [`EpochLane::send_blocking`], and [`SendError::Full`].
    pub fn try_send(&self, frame: Frame) -> Result<(), SendError> {
        Self::check(&frame)?;
        self.queue
            .try_push(frame)
            .map_err(|error| self.error(&error))
    }

    /// Bytes queued and not yet handed to QUIC.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queue.bytes()
    }

    /// How much waits on this lane and how fast it leaves.
    #[must_use]
    pub fn pressure(&self) -> super::LanePressure {
        super::LanePressure {
            queued_bytes: self.queue.bytes() as u64,
            ..super::LanePressure::default()
        }
    }

    /// The session it belongs to.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Whether its session still stands and the partner still reads it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.queue.is_closed()
    }
}

impl Drop for EpochLane {
    fn drop(&mut self) {
        self.queue.finish();
    }
}

const _: () = assert!(
    HEADER_BYTES + LANE_BYTES < 1200,
    "lane start and first header fit one packet"
);
