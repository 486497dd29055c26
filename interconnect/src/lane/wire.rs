//! Layouts of everything the lane layer puts on QUIC streams (protocol version 2). This
//! file alone owns them. All integers are little-endian; reserved bytes are zero and
//! refused otherwise; lengths are checked before use; nothing is allocated for them.
//!
//! A connection's bidirectional stream carries Hello (as in version 1, see `link`), then
//! one Join from each side, then records. Every other stream is unidirectional and one
//! lane's: its start, then segments.
//!
//! Join, 40 bytes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXJ` |
//! | 4 | 1 | [`JoinKind`] |
//! | 5 | 1 | link index, as the sender counts its links |
//! | 6 | 2 | reserved |
//! | 8 | 16 | session nonce |
//! | 24 | 8 | lane window in bytes: what the sender of the Join takes beyond what it delivered |
//! | 32 | 8 | feature bits, see [`FEATURES`]; a bit counts if both sides set it |
//!
//! Start of a lane, 40 bytes. Byte 4 tells it from version 1's, where it is 1:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXL` |
//! | 4 | 1 | layout, 2 |
//! | 5 | 1 | class: 1 epoch lane, 2 I/O lane |
//! | 6 | 2 | reserved |
//! | 8 | 16 | VM id |
//! | 24 | 8 | generation |
//! | 32 | 4 | lane id, not 0 |
//! | 36 | 4 | the partner's lane that this one answers; 0: none |
//!
//! Segment, 16 bytes and its content:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | offset of its first byte in the lane |
//! | 8 | 4 | bytes of content, at most 262,144; 0 only with FIN |
//! | 12 | 1 | flags: 1 FIN (the lane ends after it), 2 FRAME_END (a frame ends with it) |
//! | 13 | 3 | reserved |
//!
//! Record, 8 bytes and its body:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | type |
//! | 1 | 3 | reserved |
//! | 4 | 4 | bytes of the body |
//!
//! | type | record | body |
//! |---|---|---|
//! | 1 | control segment | a segment of lane 0, header and content |
//! | 2 | [`LaneAck`] | u32 lane, u32 reserved, u64 delivered, u64 received |
//! | 3 | [`LaneStop`] | u32 lane, u32 reason |

mod decode;

pub use decode::{Piece, Record, RecordDecoder, SegmentDecoder};

use super::{LANE_WINDOW_BYTES_MIN, LINKS_MAX, LaneClass, LaneId, LinkIndex, SEGMENT_BYTES_MAX};
use crate::ids::{Generation, VmId};

/// First four bytes of a [`Join`].
pub const JOIN_MAGIC: [u8; 4] = *b"PLXJ";
/// Size of a [`Join`].
pub const JOIN_BYTES: usize = 40;
/// Feature bits this build offers: none yet.
pub const FEATURES: u64 = 0;
/// First four bytes of a lane's stream, as in version 1.
pub const LANE_MAGIC: [u8; 4] = *b"PLXL";
/// Fifth byte of a lane's stream in protocol version 2.
pub const LANE_LAYOUT: u8 = 2;
/// Size of a [`LaneStart`].
pub const LANE_START_BYTES: usize = 40;
/// Size of a segment's header.
pub const SEGMENT_HEADER_BYTES: usize = 16;
/// Size of a record's header.
pub const RECORD_HEADER_BYTES: usize = 8;

const FLAG_FIN: u8 = 1;
const FLAG_FRAME_END: u8 = 2;
const RECORD_SEGMENT: u8 = 1;
const RECORD_ACK: u8 = 2;
const RECORD_STOP: u8 = 3;
const ACK_BODY_BYTES: usize = 24;
const STOP_BODY_BYTES: usize = 8;

/// Bytes that are not what the lane layer expects. The session is over: nothing after them
/// can be trusted to be where it seems.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not a [`Join`].
    #[error("the partner's Join does not start with `PLXJ` (found {found:02x?})")]
    JoinMagic {
        /// What stood there.
        found: [u8; 4],
    },
    /// An unknown number where a kind stands.
    #[error("unknown {what} {number}: run the same pollux version on both hosts")]
    Unknown {
        /// What the number names.
        what: &'static str,
        /// The number.
        number: u8,
    },
    /// Reserved bytes are set.
    #[error("reserved bytes of a {what} are set: run the same pollux version on both hosts")]
    Reserved {
        /// Where.
        what: &'static str,
    },
    /// A link index no pair has.
    #[error("link index {found} is not below {LINKS_MAX}, the most links a pair has")]
    Link {
        /// The index.
        found: u8,
    },
    /// A window in which no frame could be delivered.
    #[error(
        "the partner takes {found} bytes of a lane, at least {LANE_WINDOW_BYTES_MIN} are needed"
    )]
    Window {
        /// The window asked for.
        found: u64,
    },
    /// Not a [`LaneStart`].
    #[error("a lane does not start as one of protocol version 2 (found {found:02x?})")]
    LaneMagic {
        /// What stood there.
        found: [u8; 5],
    },
    /// A stream for the control lane.
    #[error("a stream says it is lane 0: the control lane has none of its own")]
    LaneZero,
    /// A segment longer than any may be, or an empty one that ends nothing.
    #[error(
        "a segment of {found} bytes: 1 to {SEGMENT_BYTES_MAX} are allowed, 0 only at a lane's end"
    )]
    SegmentBytes {
        /// Its length.
        found: u32,
    },
    /// A segment beyond the end of the numbers.
    #[error("a segment of {bytes} bytes at offset {offset} has no end")]
    Offset {
        /// Where it starts.
        offset: u64,
        /// Its length.
        bytes: u32,
    },
    /// A record whose length does not fit its type.
    #[error("a record of type {number} has a body of {found} bytes")]
    RecordBytes {
        /// Its type.
        number: u8,
        /// The length.
        found: u32,
    },
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// What a [`Join`] asks or answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum JoinKind {
    /// Never sent.
    Invalid = 0,
    /// From the side that dialled: this nonce is new, start a session.
    New = 1,
    /// From the side that dialled: add this connection to the session of this nonce.
    Resume = 2,
    /// Answer: done.
    Joined = 3,
    /// Answer to [`JoinKind::Resume`]: no such session here; start a new one.
    Unknown = 4,
}

/// Says to which session a connection belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Join {
    /// What it asks or answers.
    pub kind: JoinKind,
    /// Which link it is, as its sender counts.
    pub link: LinkIndex,
    /// Names the session; drawn at random by the side that dials.
    pub nonce: [u8; 16],
    /// What its sender takes of a lane beyond what it delivered, in bytes.
    pub window_bytes: u64,
    /// Feature bits.
    pub features: u64,
}

impl Join {
    /// As sent.
    #[must_use]
    pub fn encode(&self) -> [u8; JOIN_BYTES] {
        let mut out = [0; JOIN_BYTES];
        out[..4].copy_from_slice(&JOIN_MAGIC);
        out[4] = self.kind as u8;
        out[5] = self.link.0;
        out[8..24].copy_from_slice(&self.nonce);
        out[24..32].copy_from_slice(&self.window_bytes.to_le_bytes());
        out[32..].copy_from_slice(&self.features.to_le_bytes());
        out
    }

    /// Undo [`Join::encode`].
    ///
    /// # Errors
    /// [`WireError`].
    pub fn parse(bytes: &[u8; JOIN_BYTES]) -> Result<Self, WireError> {
        let found = array(bytes, 0);
        if found != JOIN_MAGIC {
            return Err(WireError::JoinMagic { found });
        }
        let kind = match bytes[4] {
            1 => JoinKind::New,
            2 => JoinKind::Resume,
            3 => JoinKind::Joined,
            4 => JoinKind::Unknown,
            number => {
                let what = "kind of Join";
                return Err(WireError::Unknown { what, number });
            }
        };
        if bytes[6..8] != [0; 2] {
            return Err(WireError::Reserved { what: "Join" });
        }
        if usize::from(bytes[5]) >= LINKS_MAX {
            return Err(WireError::Link { found: bytes[5] });
        }
        let window_bytes = u64::from_le_bytes(array(bytes, 24));
        if window_bytes < LANE_WINDOW_BYTES_MIN {
            let found = window_bytes;
            return Err(WireError::Window { found });
        }
        Ok(Self {
            kind,
            link: LinkIndex(bytes[5]),
            nonce: array(bytes, 8),
            window_bytes,
            features: u64::from_le_bytes(array(bytes, 32)),
        })
    }
}

/// Says which lane a stream belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneStart {
    /// The lane.
    pub lane: LaneId,
    /// What it is for; [`LaneClass::Control`] has no stream and is never parsed.
    pub class: LaneClass,
    /// The VM.
    pub vm: VmId,
    /// Its generation at the sender.
    pub generation: Generation,
    /// An I/O lane has two directions: the partner's lane that this one goes back along;
    /// 0 if it is the first of the two, and for epoch lanes.
    pub answers: LaneId,
}

impl LaneStart {
    /// As sent.
    #[must_use]
    pub fn encode(&self) -> [u8; LANE_START_BYTES] {
        let mut out = [0; LANE_START_BYTES];
        out[..4].copy_from_slice(&LANE_MAGIC);
        out[4] = LANE_LAYOUT;
        out[5] = match self.class {
            LaneClass::Control => 0,
            LaneClass::Epoch => 1,
            LaneClass::Io => 2,
        };
        out[8..24].copy_from_slice(&self.vm.0);
        out[24..32].copy_from_slice(&self.generation.0.to_le_bytes());
        out[32..36].copy_from_slice(&self.lane.0.to_le_bytes());
        out[36..].copy_from_slice(&self.answers.0.to_le_bytes());
        out
    }

    /// Undo [`LaneStart::encode`].
    ///
    /// # Errors
    /// [`WireError`].
    pub fn parse(bytes: &[u8; LANE_START_BYTES]) -> Result<Self, WireError> {
        let found: [u8; 5] = array(bytes, 0);
        if found[..4] != LANE_MAGIC || found[4] != LANE_LAYOUT {
            return Err(WireError::LaneMagic { found });
        }
        let class = match bytes[5] {
            1 => LaneClass::Epoch,
            2 => LaneClass::Io,
            number => {
                let what = "class of lane";
                return Err(WireError::Unknown { what, number });
            }
        };
        let answers = LaneId(u32::from_le_bytes(array(bytes, 36)));
        if bytes[6..8] != [0; 2] || (class == LaneClass::Epoch && answers != LaneId::CONTROL) {
            let what = "lane's start";
            return Err(WireError::Reserved { what });
        }
        let lane = LaneId(u32::from_le_bytes(array(bytes, 32)));
        if lane == LaneId::CONTROL {
            return Err(WireError::LaneZero);
        }
        Ok(Self {
            lane,
            class,
            vm: VmId(array(bytes, 8)),
            generation: Generation(u64::from_le_bytes(array(bytes, 24))),
            answers,
        })
    }
}

/// Head of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// Where in the lane its content starts.
    pub offset: u64,
    /// Bytes of content.
    pub bytes: u32,
    /// The lane ends after it.
    pub fin: bool,
    /// A frame ends with it: whoever waits for frames can go on.
    pub frame_end: bool,
}

impl SegmentHeader {
    /// As sent.
    #[must_use]
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut out = [0; SEGMENT_HEADER_BYTES];
        out[..8].copy_from_slice(&self.offset.to_le_bytes());
        out[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        out[12] = u8::from(self.fin) * FLAG_FIN + u8::from(self.frame_end) * FLAG_FRAME_END;
        out
    }

    /// Undo [`SegmentHeader::encode`].
    ///
    /// # Errors
    /// [`WireError`].
    pub fn parse(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Result<Self, WireError> {
        if bytes[12] & !(FLAG_FIN | FLAG_FRAME_END) != 0 || bytes[13..] != [0; 3] {
            return Err(WireError::Reserved { what: "segment" });
        }
        let header = Self {
            offset: u64::from_le_bytes(array(bytes, 0)),
            bytes: u32::from_le_bytes(array(bytes, 8)),
            fin: bytes[12] & FLAG_FIN != 0,
            frame_end: bytes[12] & FLAG_FRAME_END != 0,
        };
        if header.bytes as usize > SEGMENT_BYTES_MAX || (header.bytes == 0 && !header.fin) {
            let found = header.bytes;
            return Err(WireError::SegmentBytes { found });
        }
        // One more for the lane's end, which counts as a byte.
        if header
            .offset
            .checked_add(u64::from(header.bytes) + 1)
            .is_none()
        {
            return Err(WireError::Offset {
                offset: header.offset,
                bytes: header.bytes,
            });
        }
        Ok(header)
    }
}

/// How far a lane has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LaneAck {
    /// The lane, of the partner's.
    pub lane: LaneId,
    /// Everything below this was taken out in order; one more than its bytes when the
    /// lane's end was, too.
    pub delivered: u64,
    /// Bytes of the lane's segments that came over the connection this record travels on,
    /// repeated ones too; a lane's end counts as one.
    pub received: u64,
}

/// The receiver gave a lane up: nothing more of it is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneStop {
    /// The lane, of the partner's.
    pub lane: LaneId,
    /// Why: [`LaneStop::READER_GONE`], [`LaneStop::OVER`]; other numbers mean nothing more.
    pub reason: u32,
}

impl LaneAck {
    /// The record as sent.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_HEADER_BYTES + ACK_BODY_BYTES] {
        let mut out = [0; RECORD_HEADER_BYTES + ACK_BODY_BYTES];
        out[..8].copy_from_slice(&record_header(RECORD_ACK, ACK_BODY_BYTES));
        out[8..12].copy_from_slice(&self.lane.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.delivered.to_le_bytes());
        out[24..].copy_from_slice(&self.received.to_le_bytes());
        out
    }
}

impl LaneStop {
    /// Reason: the reader went away.
    pub const READER_GONE: u32 = 0;
    /// Reason: the lane was delivered to its end; its last acknowledgement was lost with a
    /// link. Answers a stream of a lane that is over.
    pub const OVER: u32 = 1;

    /// The record as sent.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_HEADER_BYTES + STOP_BODY_BYTES] {
        let mut out = [0; RECORD_HEADER_BYTES + STOP_BODY_BYTES];
        out[..8].copy_from_slice(&record_header(RECORD_STOP, STOP_BODY_BYTES));
        out[8..12].copy_from_slice(&self.lane.0.to_le_bytes());
        out[12..].copy_from_slice(&self.reason.to_le_bytes());
        out
    }
}

/// What stands before the content of a control segment: the record's header and the
/// segment's.
#[must_use]
pub fn control_segment_head(
    header: &SegmentHeader,
) -> [u8; RECORD_HEADER_BYTES + SEGMENT_HEADER_BYTES] {
    let mut out = [0; RECORD_HEADER_BYTES + SEGMENT_HEADER_BYTES];
    let body = SEGMENT_HEADER_BYTES + header.bytes as usize;
    out[..8].copy_from_slice(&record_header(RECORD_SEGMENT, body));
    out[8..].copy_from_slice(&header.encode());
    out
}

fn record_header(number: u8, body: usize) -> [u8; RECORD_HEADER_BYTES] {
    let mut out = [0; RECORD_HEADER_BYTES];
    out[0] = number;
    let body = u32::try_from(body).unwrap_or(u32::MAX);
    out[4..].copy_from_slice(&body.to_le_bytes());
    out
}

const _: () = assert!(STOP_BODY_BYTES <= ACK_BODY_BYTES);
