//! Segments and records from the bytes of streams, in pieces as they come.

use super::{
    ACK_BODY_BYTES, LaneAck, LaneStop, RECORD_ACK, RECORD_HEADER_BYTES, RECORD_SEGMENT,
    RECORD_STOP, SEGMENT_HEADER_BYTES, STOP_BODY_BYTES, SegmentHeader, WireError, array,
};
use crate::lane::{LaneId, SEGMENT_BYTES_MAX};
use bytes::{Buf, Bytes};

/// A part of a segment, as it came: segments need not be collected before they are put in
/// order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Where in the lane it starts.
    pub offset: u64,
    /// Its content; empty only with `fin`.
    pub bytes: Bytes,
    /// The lane ends after it.
    pub fin: bool,
    /// A frame ends with it.
    pub frame_end: bool,
}

/// Pieces of segments from the bytes of a lane's stream after its start. Holds at most one
/// header; content is passed on without a copy.
#[derive(Debug, Default)]
pub struct SegmentDecoder {
    header: [u8; SEGMENT_HEADER_BYTES],
    /// Bytes of `header` that have come, while `rest` is `None`.
    have: usize,
    /// What is still to come of the segment.
    rest: Option<SegmentHeader>,
}

impl SegmentDecoder {
    /// A decoder before a segment.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Take from the front of `input`. `Ok(None)`: all of it is taken, more is needed. Call
    /// again while there is a piece.
    ///
    /// # Errors
    /// [`WireError`]; the stream is then of no use.
    pub fn push(&mut self, input: &mut Bytes) -> Result<Option<Piece>, WireError> {
        let mut rest = match self.rest.take() {
            Some(rest) => rest,
            None => {
                let take = input.len().min(SEGMENT_HEADER_BYTES - self.have);
                self.header[self.have..self.have + take].copy_from_slice(&input[..take]);
                input.advance(take);
                self.have += take;
                if self.have < SEGMENT_HEADER_BYTES {
                    return Ok(None);
                }
                self.have = 0;
                SegmentHeader::parse(&self.header)?
            }
        };
        if input.is_empty() && rest.bytes > 0 {
            self.rest = Some(rest);
            return Ok(None);
        }
        let bytes = input.split_to(input.len().min(rest.bytes as usize));
        let offset = rest.offset;
        rest.bytes -= u32::try_from(bytes.len()).unwrap_or(rest.bytes);
        rest.offset += bytes.len() as u64;
        let last = rest.bytes == 0;
        if !last {
            self.rest = Some(rest);
        }
        Ok(Some(Piece {
            offset,
            bytes,
            fin: last && rest.fin,
            frame_end: last && rest.frame_end,
        }))
    }

    /// Whether the stream stands between two segments.
    #[must_use]
    pub fn is_at_boundary(&self) -> bool {
        self.have == 0 && self.rest.is_none()
    }
}

/// What comes on a connection's control stream after the Join.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// A part of a control segment.
    Control(Piece),
    /// How far one of this side's lanes has come.
    Ack(LaneAck),
    /// The partner gave one of this side's lanes up.
    Stop(LaneStop),
}

/// Records from the bytes of a control stream. Holds at most a header and a small body.
#[derive(Debug, Default)]
pub struct RecordDecoder {
    small: [u8; RECORD_HEADER_BYTES + ACK_BODY_BYTES],
    /// Bytes of `small` that have come.
    have: usize,
    /// Bytes of the control segment's record still to come.
    segment_rest: usize,
    segment: SegmentDecoder,
}

impl RecordDecoder {
    /// A decoder before a record.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Take from the front of `input`. `Ok(None)`: all of it is taken, more is needed. Call
    /// again while there is a record.
    ///
    /// # Errors
    /// [`WireError`]; the stream is then of no use.
    pub fn push(&mut self, input: &mut Bytes) -> Result<Option<Record>, WireError> {
        loop {
            if self.segment_rest > 0 {
                let mut part = input.slice(..input.len().min(self.segment_rest));
                let before = part.len();
                let piece = self.segment.push(&mut part)?;
                let taken = before - part.len();
                input.advance(taken);
                self.segment_rest -= taken;
                let ends = piece.is_some() && self.segment.is_at_boundary();
                if ends != (self.segment_rest == 0) {
                    return Err(WireError::RecordBytes {
                        number: RECORD_SEGMENT,
                        found: u32::from_le_bytes(array(&self.small, 4)),
                    });
                }
                return Ok(piece.map(Record::Control));
            }
            if !self.fill(RECORD_HEADER_BYTES, input) {
                return Ok(None);
            }
            if self.small[1..4] != [0; 3] {
                return Err(WireError::Reserved { what: "record" });
            }
            let (number, found) = (self.small[0], u32::from_le_bytes(array(&self.small, 4)));
            let wrong = WireError::RecordBytes { number, found };
            let body = found as usize;
            match number {
                RECORD_SEGMENT => {
                    let range = SEGMENT_HEADER_BYTES..=SEGMENT_HEADER_BYTES + SEGMENT_BYTES_MAX;
                    if !range.contains(&body) {
                        return Err(wrong);
                    }
                    self.have = 0;
                    self.segment_rest = body;
                }
                RECORD_ACK if body == ACK_BODY_BYTES => {
                    if !self.fill(RECORD_HEADER_BYTES + ACK_BODY_BYTES, input) {
                        return Ok(None);
                    }
                    self.have = 0;
                    if self.small[12..16] != [0; 4] {
                        let what = "lane acknowledgement";
                        return Err(WireError::Reserved { what });
                    }
                    return Ok(Some(Record::Ack(LaneAck {
                        lane: LaneId(u32::from_le_bytes(array(&self.small, 8))),
                        delivered: u64::from_le_bytes(array(&self.small, 16)),
                        received: u64::from_le_bytes(array(&self.small, 24)),
                    })));
                }
                RECORD_STOP if body == STOP_BODY_BYTES => {
                    if !self.fill(RECORD_HEADER_BYTES + STOP_BODY_BYTES, input) {
                        return Ok(None);
                    }
                    self.have = 0;
                    return Ok(Some(Record::Stop(LaneStop {
                        lane: LaneId(u32::from_le_bytes(array(&self.small, 8))),
                        reason: u32::from_le_bytes(array(&self.small, 12)),
                    })));
                }
                RECORD_ACK | RECORD_STOP => return Err(wrong),
                number => {
                    let what = "record on a control stream";
                    return Err(WireError::Unknown { what, number });
                }
            }
        }
    }

    /// Fill `small` to `want` bytes; whether it is.
    fn fill(&mut self, want: usize, input: &mut Bytes) -> bool {
        let take = input.len().min(want.saturating_sub(self.have));
        self.small[self.have..self.have + take].copy_from_slice(&input[..take]);
        input.advance(take);
        self.have += take;
        self.have >= want
    }

    /// Whether the stream stands between two records.
    #[must_use]
    pub fn is_at_boundary(&self) -> bool {
        self.have == 0 && self.segment_rest == 0
    }
}
