//! One connection of a session: its control stream both ways, and the streams of lanes.
//!
//! ```text
//!  control lane, acks, stops ─▶ control stream ─▶ ... ─▶ records ─▶ control lane, acked, stopped
//!  pull(lane) ─▶ the lane's stream on this connection ─▶ ... ─▶ pieces ─▶ the lane
//! ```
//!
//! What this must never do: keep reading or writing for a link that another connection
//! has taken over, or make control and I/O wait behind bulk.

use super::incoming::{InLane, Nudges, Started};
use super::outgoing::{Member, OutLane, Pull};
use super::plain::CODE_DONE;
use super::session::Session;
use crate::lane::LaneClass;
use crate::lane::wire::{
    LANE_START_BYTES, LaneStart, Piece, Record, RecordDecoder, SegmentDecoder,
};
use bytes::Bytes;
use quinn::{RecvStream, SendStream, VarInt, WriteError};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Priorities of streams: control, then I/O, then bulk (the library's default).
const CONTROL_PRIORITY: i32 = 10;
const IO_PRIORITY: i32 = 5;
/// Pieces taken from QUIC at a time: with 1.4 KB each about 90 KB.
const CHUNKS_MAX: usize = 64;
/// A lane must say what it is within this time.
const LANE_START_TIMEOUT: Duration = Duration::from_secs(2);
/// Everything a connection needs to take part.
pub(super) struct Joined {
    pub(super) member: Member,
    pub(super) send: SendStream,
    pub(super) receive: RecvStream,
}

/// Let the lanes use this connection from now on; [`run`] carries what they give it.
pub(super) fn enter(session: &Arc<Session>, member: &Member) -> Arc<Nudges> {
    let nudges = Nudges::new(member.clone(), Arc::clone(session.outgoing.control()));
    session.incoming.link_up(&nudges);
    for lane in session.outgoing.link_up(member) {
        session.spawn_writer(lane, member.clone());
    }
    nudges
}

/// Carry the session's lanes until the connection ends; returns why, in plain words.
pub(super) async fn run(session: &Arc<Session>, joined: Joined, nudges: Arc<Nudges>) -> String {
    let Joined {
        member,
        send,
        receive,
    } = joined;
    // Failing only means the default priority.
    let _ = send.set_priority(CONTROL_PRIORITY);
    let reason = tokio::select! {
        reason = write_control(session, &member, &nudges, send) => reason,
        reason = read_control(session, &member, receive) => reason,
        reason = accept_streams(session, &member, &nudges) => reason,
        error = member.connection.closed() => error.to_string(),
    };
    session.outgoing.link_down(&member);
    session.incoming.link_down(&member);
    // If the connection ended first, its own reason explains the others.
    member
        .connection
        .close_reason()
        .map_or(reason, |error| error.to_string())
}

/// Write all of `chunks`. `others`: what to do once if the stream does not take all of it at
/// once. With `urgent`, bulk that fills QUIC's buffer is not waited for.
async fn write(
    member: &Member,
    stream: &mut SendStream,
    chunks: &mut [Bytes],
    urgent: bool,
    others: impl FnOnce(),
) -> Result<(), WriteError> {
    let mut rest = chunks;
    let mut others = Some(others);
    let mut raised = false;
    while !rest.is_empty() {
        let written = tokio::select! {
            biased;
            written = stream.write_chunks(rest) => Some(written?),
            () = std::future::ready(()) => None,
        };
        if let Some(written) = written {
            rest = &mut rest[written.chunks..];
            continue;
        }
        if let Some(others) = others.take() {
            others();
        }
        if urgent && !raised {
            raised = true;
            member.raise_window(true);
            continue;
        }
        let written = stream.write_chunks(rest).await?;
        rest = &mut rest[written.chunks..];
    }
    if raised {
        member.raise_window(false);
    }
    Ok(())
}

async fn write_control(
    session: &Session,
    member: &Member,
    nudges: &Nudges,
    mut stream: SendStream,
) -> String {
    let control = session.outgoing.control();
    let mut chunks = Vec::new();
    loop {
        nudges.take(session.outgoing.now(), &mut chunks);
        if let Pull::Gone = session.outgoing.pull(control, member, &mut chunks) {
            return "another connection took over the link".to_owned();
        }
        if chunks.is_empty() {
            control.wake_at(member.link).notified().await;
            continue;
        }
        if let Err(error) = write(member, &mut stream, &mut chunks, true, || {}).await {
            return error.to_string();
        }
        chunks.clear();
    }
}

/// What a stream brought, chunk by chunk.
struct Chunks {
    buffer: Vec<Bytes>,
    come: VecDeque<Bytes>,
}

impl Chunks {
    fn new() -> Self {
        Self {
            buffer: vec![Bytes::new(); CHUNKS_MAX],
            come: VecDeque::new(),
        }
    }

    /// Read what is there; `false` at the end of the stream. Safe to cancel.
    async fn read(&mut self, stream: &mut RecvStream) -> Result<bool, quinn::ReadError> {
        let Some(count) = stream.read_chunks(&mut self.buffer).await? else {
            return Ok(false);
        };
        self.come
            .extend(self.buffer[..count].iter_mut().map(std::mem::take));
        Ok(true)
    }
}

async fn read_control(session: &Arc<Session>, member: &Member, mut stream: RecvStream) -> String {
    let lane = session.incoming.control();
    let mut chunks = Chunks::new();
    let mut decoder = RecordDecoder::new();
    let mut ack_at = None;
    loop {
        let read = tokio::select! {
            read = chunks.read(&mut stream) => read,
            () = session.clock().wait(ack_at) => {
                ack_at = None;
                lane.ack_now();
                continue;
            }
        };
        match read {
            Ok(true) => {}
            Ok(false) => return "the partner ended the control stream".to_owned(),
            Err(error) => return error.to_string(),
        }
        let mut pieces = Vec::new();
        while let Some(chunk) = chunks.come.front_mut() {
            match decoder.push(chunk) {
                Ok(None) => drop(chunks.come.pop_front()),
                Ok(Some(Record::Control(piece))) => pieces.push(piece),
                Ok(Some(Record::Ack(ack))) => {
                    if let Err(error) = session.outgoing.acked(member, ack) {
                        return session.broken(error.to_string());
                    }
                }
                Ok(Some(Record::Stop(stop))) => {
                    session.outgoing.stopped(stop.lane);
                    session.incoming.no_answer(stop.lane);
                }
                Err(error) => return session.broken(error.to_string()),
            }
        }
        if pieces.is_empty() {
            continue;
        }
        let mut pieces = pieces.into_iter();
        match lane.take(member, session.clock().now(), || Ok(pieces.next())) {
            Ok(taken) if taken.gone => return "another connection took over the link".to_owned(),
            Ok(taken) => {
                ack_at = taken.ack_at;
                if taken.over.is_some() {
                    return session
                        .broken("nobody listens to the interconnect's events".to_owned());
                }
                if taken.deliver {
                    session.spawn_delivery(Arc::clone(lane));
                }
            }
            Err(reason) => return session.broken(reason),
        }
    }
}

async fn accept_streams(session: &Arc<Session>, member: &Member, nudges: &Arc<Nudges>) -> String {
    loop {
        match member.connection.accept_uni().await {
            Ok(stream) => session.spawn(read_stream(
                Arc::clone(session),
                member.clone(),
                Arc::clone(nudges),
                stream,
            )),
            Err(error) => return error.to_string(),
        }
    }
}

async fn read_stream(
    session: Arc<Session>,
    member: Member,
    nudges: Arc<Nudges>,
    mut stream: RecvStream,
) {
    match carry_stream(&session, &member, &nudges, &mut stream).await {
        Ok(Some((lane, tell))) => session.incoming.forget(&lane, tell),
        Ok(None) => {}
        Err(reason) => drop(session.broken(reason)),
    }
    // The lane is over, or the connection: let the sender know.
    let _ = stream.stop(VarInt::from_u32(CODE_DONE));
}

/// Returns the lane if it is over, and whether the partner may not know.
async fn carry_stream(
    session: &Arc<Session>,
    member: &Member,
    nudges: &Arc<Nudges>,
    stream: &mut RecvStream,
) -> Result<Option<(Arc<InLane>, bool)>, String> {
    let mut start = [0; LANE_START_BYTES];
    match tokio::time::timeout(LANE_START_TIMEOUT, stream.read_exact(&mut start)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Ok(None),
        Err(_) => return Err("a lane did not say in time what it is".to_owned()),
    }
    let start = LaneStart::parse(&start).map_err(|error| error.to_string())?;
    let lane = match session.incoming.started(start)? {
        Started::Known(lane) => lane,
        Started::Epoch(lane, rx) => {
            session.tell_epoch_lane(&lane, rx).await;
            lane
        }
        Started::Io(lane, tx, rx) => {
            session.tell_io_lane(&lane, tx, rx).await;
            lane
        }
        Started::Over => {
            nudges.stop(start.lane);
            return Ok(None);
        }
    };
    let unread = lane.unread();
    let mut unread = std::pin::pin!(unread);
    let mut chunks = Chunks::new();
    let mut decoder = SegmentDecoder::new();
    let mut ack_at = None;
    loop {
        let read = tokio::select! {
            read = chunks.read(stream) => read,
            () = session.clock().wait(ack_at) => {
                ack_at = None;
                lane.ack_now();
                continue;
            }
            unread = &mut unread => return Ok(unread.then_some((Arc::clone(&lane), true))),
        };
        match read {
            Ok(true) => {}
            // This connection has no more of it.
            Ok(false) => {
                session
                    .clock()
                    .wait(ack_at.or(Some(crate::lane::Micros(0))))
                    .await;
                lane.ack_now();
                return if decoder.is_at_boundary() {
                    Ok(None)
                } else {
                    Err("a lane's stream ended within a segment".to_owned())
                };
            }
            Err(_) => return Ok(None),
        }
        let come = &mut chunks.come;
        let pieces = || -> Result<Option<Piece>, String> {
            while let Some(chunk) = come.front_mut() {
                match decoder.push(chunk).map_err(|error| error.to_string())? {
                    Some(piece) => return Ok(Some(piece)),
                    None => drop(come.pop_front()),
                }
            }
            Ok(None)
        };
        let taken = lane.take(member, session.clock().now(), pieces)?;
        if taken.gone {
            return Ok(None);
        }
        if let Some(tell) = taken.over {
            return Ok(Some((lane.clone(), tell)));
        }
        ack_at = taken.ack_at;
        if taken.deliver {
            session.spawn_delivery(Arc::clone(&lane));
        }
    }
}

/// Send a lane on one connection until it is over or the connection is.
pub(super) async fn write_lane(session: Arc<Session>, lane: Arc<OutLane>, member: Member) {
    // That the partner stopped a stream says nothing of the lane (it stops those of a
    // connection that another one replaced, too): it says so of lanes with a record.
    if let Err(error) = carry_lane(&session, &lane, &member).await {
        tracing::debug!(
            lane = lane.start.lane.0,
            link = member.link.0,
            "a lane's stream ended: {error}"
        );
    }
}

async fn carry_lane(session: &Session, lane: &OutLane, member: &Member) -> Result<(), WriteError> {
    let io = lane.start.class == LaneClass::Io;
    let mut chunks = Vec::new();
    let mut stream = member.connection.open_uni().await?;
    let _ = stream.set_priority(if io { IO_PRIORITY } else { 0 });
    chunks.push(Bytes::copy_from_slice(&lane.start.encode()));
    let mut took = false;
    loop {
        let more = match session.outgoing.pull(lane, member, &mut chunks) {
            Pull::Write { more } => more,
            Pull::Wait { more } if chunks.is_empty() => {
                // With what this link has taken, another may be the earlier one now.
                if more && std::mem::take(&mut took) {
                    lane.wake_others(member.link);
                }
                lane.wake_at(member.link).notified().await;
                continue;
            }
            Pull::Wait { more } => more,
            Pull::Over => {
                let _ = stream.finish();
                return Ok(());
            }
            Pull::Gone => return Ok(()),
        };
        took = true;
        write(member, &mut stream, &mut chunks, io, || {
            if more {
                lane.wake_others(member.link);
            }
        })
        .await?;
        chunks.clear();
    }
}
