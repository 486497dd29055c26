//! A session with a partner of protocol version 1: one connection, its control lane and
//! its epoch lanes, each a QUIC stream of plain frames.
//!
//! ```text
//!  control(frame) -> queue -> writer task -> QUIC ~> reader task -> on_ack, or LinkEvent::Control
//!  EpochLane::send -> queue -> writer task -> QUIC ~> lane task  -> LinkEvent::EpochLane.rx
//! ```
//!
//! What this must never do: tell of a frame before `Up` or after `Down`; hold more
//! of the partner's bytes than the windows and channels allow.

use super::config::OnAck;
use super::event::{Hello, LinkEvent, SendError, SessionId};
use super::hello::{LANE_BYTES, lane_start, parse_lane_start};
use super::lanes::{EpochLane, IoLane, LaneSink, Lanes};
use super::queue::{FrameQueue, PushError};
use super::stats::{LanePressure, PairStats};
use crate::frame::{Frame, FrameDecoder, HEADER_BYTES};
use crate::heartbeat::HeartbeatKey;
use crate::ids::{Generation, VmId};
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
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
/// Close code: this connection only; its session goes on over other links or a new
/// connection of this one. Since protocol version 2.
pub(super) const CODE_LINK: u32 = 3;

/// A session on one connection.
pub(super) struct PlainSession {
    id: SessionId,
    version: u16,
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

impl PlainSession {
    pub(super) fn new(id: SessionId, established: &Established, runtime: Handle) -> Arc<Self> {
        Arc::new(Self {
            id,
            version: established.hello.version,
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

impl Lanes for PlainSession {
    fn id(&self) -> SessionId {
        self.id
    }

    fn version(&self) -> u16 {
        self.version
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
            sink: queue,
            session: self.id,
            peer: self.peer.clone(),
            version: self.version,
        }
    }

    fn open_io_lane(&self, _vm: VmId, _generation: Generation) -> Result<IoLane, SendError> {
        Err(SendError::Version {
            peer: self.peer.clone(),
            what: "an I/O lane",
            version: self.version,
            needed: 2,
        })
    }

    fn stats(&self, _stats: &mut PairStats) {}

    fn close(&self, code: u32, reason: &str) {
        // The first reason counts.
        let _ = self.closed_here.set(reason.to_owned());
        self.connection
            .close(VarInt::from_u32(code), reason.as_bytes());
    }
}

impl LaneSink for FrameQueue {
    fn push_blocking(&self, frame: Frame) -> Result<(), PushError> {
        FrameQueue::push_blocking(self, frame)
    }

    fn try_push(&self, frame: Frame) -> Result<(), PushError> {
        FrameQueue::try_push(self, frame)
    }

    /// Version 1 has no lane with deadlines.
    fn push_until(&self, _frame: Frame, _deadline: Instant) -> Result<u64, PushError> {
        Err(PushError::Closed)
    }

    fn queued_bytes(&self) -> usize {
        self.bytes()
    }

    fn pressure(&self) -> LanePressure {
        LanePressure {
            queued_bytes: self.bytes() as u64,
            ..LanePressure::default()
        }
    }

    fn is_closed(&self) -> bool {
        FrameQueue::is_closed(self)
    }

    fn finish(&self) {
        FrameQueue::finish(self);
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

const _: () = assert!(
    HEADER_BYTES + LANE_BYTES < 1200,
    "lane start and first header fit one packet"
);
