//! The lane layer: layouts, stream decoders, and both sides of a lane against a partner that
//! says anything.

use super::{Script, in_pieces};
use crate::lane::incoming::IncomingLanes;
use crate::lane::links::Links;
use crate::lane::receive::LaneReceiver;
use crate::lane::send::LaneSender;
use crate::lane::wire::{
    JOIN_BYTES, Join, LANE_START_BYTES, LaneAck, LaneStart, Piece, Record, RecordDecoder,
    SegmentDecoder,
};
use crate::lane::{LANE_WINDOW_BYTES_MIN, LaneClass, LaneId, LinkIndex, Micros};
use bytes::Bytes;

pub(super) fn join(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<JOIN_BYTES>()
        && let Ok(join) = Join::parse(bytes)
    {
        assert_eq!(join.encode(), *bytes);
    }
}

/// Many starts, one after the other.
pub(super) fn start(data: &[u8]) {
    let mut lanes = IncomingLanes::new();
    for bytes in data.as_chunks::<LANE_START_BYTES>().0 {
        if let Ok(start) = LaneStart::parse(bytes) {
            assert_eq!(start.encode(), *bytes);
            let _ = lanes.starts(start.lane);
            assert!(!lanes.starts(start.lane), "a lane starts once");
        }
    }
}

/// Pieces that follow one another within a segment, as one.
fn join_pieces(pieces: Vec<Piece>) -> Vec<(u64, Vec<u8>, bool, bool)> {
    let mut out: Vec<(u64, Vec<u8>, bool, bool)> = Vec::new();
    for piece in pieces {
        match out.last_mut() {
            Some(last) if last.0 + last.1.len() as u64 == piece.offset && !last.2 && !last.3 => {
                last.1.extend(&piece.bytes);
                (last.2, last.3) = (piece.fin, piece.frame_end);
            }
            _ => out.push((
                piece.offset,
                piece.bytes.to_vec(),
                piece.fin,
                piece.frame_end,
            )),
        }
    }
    out
}

/// Byte 0: size of the pieces.
pub(super) fn segments(data: &[u8]) {
    let mut script = Script(data);
    let piece = usize::from(script.u8()) + 1;
    let decode = |piece| {
        let (mut decoder, mut pieces) = (SegmentDecoder::new(), Vec::new());
        let result = in_pieces(script.0, piece, |mut chunk| {
            while let Some(piece) = decoder.push(&mut chunk)? {
                assert!(!piece.bytes.is_empty() || piece.fin);
                pieces.push(piece);
            }
            assert!(chunk.is_empty());
            Ok::<_, crate::lane::wire::WireError>(())
        });
        (join_pieces(pieces), result)
    };
    assert_eq!(decode(piece), decode(script.0.len()));
}

/// Byte 0: size of the pieces.
pub(super) fn records(data: &[u8]) {
    let mut script = Script(data);
    let piece = usize::from(script.u8()) + 1;
    let decode = |piece| {
        let (mut decoder, mut pieces, mut others) = (RecordDecoder::new(), Vec::new(), Vec::new());
        let result = in_pieces(script.0, piece, |mut chunk| {
            while let Some(record) = decoder.push(&mut chunk)? {
                match record {
                    Record::Control(piece) => pieces.push(piece),
                    other => others.push(other),
                }
            }
            assert!(chunk.is_empty());
            Ok::<_, crate::lane::wire::WireError>(())
        });
        // Where the content of a record that does not fit its length is cut off depends on
        // the pieces.
        match result {
            Ok(()) => (join_pieces(pieces), others, result),
            Err(_) => (Vec::new(), others, result),
        }
    };
    assert_eq!(decode(piece), decode(script.0.len()));
}

fn content(offset: u64, bytes: usize) -> Bytes {
    (0..bytes as u64)
        .map(|at| (offset.wrapping_add(at) % 251).to_le_bytes()[0])
        .collect()
}

/// A script of: arrival of a piece, taking, acknowledging, links that come and go.
pub(super) fn receiver(data: &[u8]) {
    let mut script = Script(data);
    let window = LANE_WINDOW_BYTES_MIN;
    let mut receiver = LaneReceiver::new(LaneId(1), window);
    let (mut now, mut taken, mut delivered) = (Micros(1), 0, 0);
    while !script.is_empty() {
        let op = script.u8();
        let link = LinkIndex(op >> 4);
        match op & 0xf {
            0 => receiver.link_up(link),
            1 => receiver.link_down(link),
            2 => now = now.plus(Micros(u64::from(script.u16()))),
            3 => {
                while let Some(bytes) = receiver.pop(now) {
                    assert!(!bytes.is_empty());
                    assert_eq!(bytes, content(taken, bytes.len()));
                    taken += bytes.len() as u64;
                }
            }
            4 => {
                if let Some(ack) = receiver.next_ack(link, now) {
                    assert!(ack.delivered >= delivered && ack.delivered <= taken + 1);
                    delivered = ack.delivered;
                    assert!(!receiver.ack_due(link));
                }
            }
            op => {
                let offset = match op & 3 {
                    0 => script.u64(),
                    1 => taken + u64::from(script.u8()),
                    _ => taken + u64::from(script.u16()) * 16,
                };
                let bytes = usize::from(script.u16());
                let flags = script.u8();
                let piece = Piece {
                    offset,
                    bytes: content(offset, bytes),
                    fin: flags & 0x81 == 0x81,
                    frame_end: flags & 2 != 0,
                };
                if receiver.insert(link, piece, now).is_err() {
                    return;
                }
            }
        }
        assert!(receiver.held_bytes() <= window);
    }
}

/// A script of: frames, what links may send, acknowledgements of any content, links that
/// come and go, time.
pub(super) fn sender(data: &[u8]) {
    let mut script = Script(data);
    let class = match script.u8() % 3 {
        0 => LaneClass::Control,
        1 => LaneClass::Epoch,
        _ => LaneClass::Io,
    };
    let window = LANE_WINDOW_BYTES_MIN;
    let mut sender = LaneSender::new(class, 1 << 20, window);
    let (mut links, mut now, mut pushed) = (Links::new(), Micros(1), 0);
    let payload = Bytes::from_static(&[7; 0xffff]);
    let mut steps = 0;
    while !script.is_empty() && steps < 4096 {
        steps += 1;
        let op = script.u8();
        let link = LinkIndex(op >> 4 & 3);
        match op & 7 {
            0 => {
                links.up(link, now);
                sender.link_up(link);
            }
            1 => {
                links.down(link, now);
                sender.link_down(link);
            }
            2 => {
                now = now.plus(Micros(u64::from(script.u16()) * 16));
                sender.tick(&mut links, now);
                sender.expired();
            }
            3 | 4 => {
                let bytes = usize::from(script.u16());
                let deadline = (op & 8 != 0).then(|| now.plus(Micros(u64::from(script.u16()))));
                let frame = payload.slice(..bytes);
                if sender.push(Bytes::new(), frame, deadline).is_ok() {
                    pushed += bytes as u64;
                }
            }
            5 => {
                let ack = LaneAck {
                    lane: LaneId(1),
                    delivered: u64::from(script.u16()) << (op >> 6 << 2),
                    received: u64::from(script.u16()) << (op >> 6 << 2),
                };
                if sender.acked(link, ack, &mut links, now).is_err() {
                    return;
                }
            }
            6 if op & 0x80 != 0 => sender.finish(),
            _ => {
                while let Some(segment) = sender.next(link, &mut links, now) {
                    let bytes: usize = segment.chunks.iter().map(Bytes::len).sum();
                    assert_eq!(bytes, segment.header.bytes as usize);
                    assert!(segment.header.offset + bytes as u64 <= pushed);
                }
            }
        }
        assert!(sender.unacked_bytes() <= window + 1);
        assert!(sender.queued_bytes() <= 2 << 20);
    }
    sender.abandon(&mut links, now);
    for link in 0..4 {
        assert_eq!(links.in_flight(LinkIndex(link)), 0);
    }
}
