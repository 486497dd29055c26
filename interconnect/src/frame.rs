//! The wire layout of everything that travels on a lane: one fixed header, then
//! the payload. This file alone owns the layout.
//!
//! It must never allocate for a length it has not checked, nor hand up a frame
//! whose checksums do not hold. Integrity against an attacker is QUIC's (AEAD);
//! the checksums here catch our own faults (a buffer reused too early, bad RAM on
//! either host) before they reach the standby's memory.
//!
//! All integers are little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXF` |
//! | 4 | 1 | version, see [`VERSION`] |
//! | 5 | 1 | [`FrameKind`] |
//! | 6 | 2 | reserved, zero |
//! | 8 | 16 | VM id |
//! | 24 | 8 | generation |
//! | 32 | 8 | epoch |
//! | 40 | 4 | payload length in bytes |
//! | 44 | 4 | CRC-32 (IEEE) of the payload |
//! | 48 | 4 | CRC-32 (IEEE) of bytes 0..48 |
//!
//! Versions:
//! - 1: first.

use crate::ids::{Epoch, Generation, VmId};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// First four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"PLXF";
/// The layout version this build writes.
pub const VERSION: u8 = 1;
/// The oldest layout version this build reads.
pub const VERSION_MIN: u8 = 1;
/// Size of the header, in bytes.
pub const HEADER_BYTES: usize = 52;
/// Bytes of the header its own checksum covers.
const HEADER_CHECKED_BYTES: usize = 48;

/// Largest payload of any kind, in bytes. 4 MiB holds a full page batch or disk
/// batch with room, is small beside a guest, and bounds what one lane can make
/// the receiver hold for a frame that never ends.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;
/// Largest control payload: status and plans in JSON, never bulk.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Largest ingress payload: a batch of a few dozen full-size packets.
pub const INGRESS_BYTES_MAX: usize = 256 << 10;
/// Largest epoch end: fixed fields and one sum for each disk.
pub const EPOCH_END_BYTES_MAX: usize = 4 << 10;

/// Largest I/O payload: a disk request of 1 MiB with its head, what a guest's NBD client
/// sends at most in one piece here.
pub const IO_BYTES_MAX: usize = (1 << 20) + 4096;

const _: () = assert!(IO_BYTES_MAX <= PAYLOAD_BYTES_MAX);
const _: () = assert!(CONTROL_BYTES_MAX <= PAYLOAD_BYTES_MAX);
const _: () = assert!(INGRESS_BYTES_MAX <= PAYLOAD_BYTES_MAX);
const _: () = assert!(EPOCH_END_BYTES_MAX <= PAYLOAD_BYTES_MAX);

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Never sent: a zeroed buffer is not a frame.
    Invalid = 0,
    /// Control lane: opaque bytes, defined by the product.
    Control = 1,
    /// Control lane: the standby holds this whole epoch. No payload.
    EpochAck = 2,
    /// Packets delivered to the guest during this epoch ([`crate::codec::packets`]).
    Ingress = 3,
    /// A batch of pages of this epoch ([`crate::codec::pages`]).
    Pages = 4,
    /// A batch of disk writes of this epoch ([`crate::codec::disk`]).
    DiskWrites = 5,
    /// The device state at the checkpoint, full or delta ([`crate::codec::delta`]).
    DeviceState = 6,
    /// Ends the epoch: digest, counts, [`crate::epoch::EpochMeta`].
    EpochEnd = 7,
    /// A batch of pages of the seeding or a resync; layout of [`FrameKind::Pages`].
    SeedPages = 8,
    /// A batch of disk ranges of the seeding or a resync; layout of [`FrameKind::DiskWrites`].
    SeedDisk = 9,
    /// A piece of the stream of RAM blocks outside the shared RAM file; opaque,
    /// in order, the product says when it is whole.
    SeedBlocks = 10,
    /// I/O lane: a disk or network request for the partner's path; opaque, defined by
    /// the product. Since protocol version 2.
    IoRequest = 11,
    /// I/O lane: its answer. Since protocol version 2.
    IoReply = 12,
    /// Epoch lane: a piece of a link test (see `probe`). Since protocol version 2.
    Probe = 13,
    /// Control lane: a link test's question or answer. Since protocol version 2.
    ProbeAck = 14,
}

impl FrameKind {
    /// The kind with this number on the wire; `None` for 0 and for unknown numbers.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Control,
            2 => Self::EpochAck,
            3 => Self::Ingress,
            4 => Self::Pages,
            5 => Self::DiskWrites,
            6 => Self::DeviceState,
            7 => Self::EpochEnd,
            8 => Self::SeedPages,
            9 => Self::SeedDisk,
            10 => Self::SeedBlocks,
            11 => Self::IoRequest,
            12 => Self::IoReply,
            13 => Self::Probe,
            14 => Self::ProbeAck,
            _ => return None,
        })
    }

    /// Largest payload of this kind, in bytes.
    #[must_use]
    pub const fn payload_bytes_max(self) -> usize {
        match self {
            Self::Invalid | Self::EpochAck => 0,
            Self::Control => CONTROL_BYTES_MAX,
            Self::Ingress => INGRESS_BYTES_MAX,
            Self::EpochEnd | Self::ProbeAck => EPOCH_END_BYTES_MAX,
            Self::IoRequest | Self::IoReply => IO_BYTES_MAX,
            Self::Probe
            | Self::Pages
            | Self::DiskWrites
            | Self::DeviceState
            | Self::SeedPages
            | Self::SeedDisk
            | Self::SeedBlocks => PAYLOAD_BYTES_MAX,
        }
    }

    /// Whether this kind belongs on the control lane.
    #[must_use]
    pub const fn is_control(self) -> bool {
        matches!(self, Self::Control | Self::EpochAck | Self::ProbeAck)
    }

    /// Whether this kind belongs on an I/O lane.
    #[must_use]
    pub const fn is_io(self) -> bool {
        matches!(self, Self::IoRequest | Self::IoReply)
    }

    /// The protocol version that brought this kind; an older peer must not be sent it.
    #[must_use]
    pub const fn since_version(self) -> u16 {
        match self {
            Self::IoRequest | Self::IoReply | Self::Probe | Self::ProbeAck => 2,
            _ => 1,
        }
    }
}

/// One unit on a lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What the payload is.
    pub kind: FrameKind,
    /// The VM it is about; all zero for control frames about no VM.
    pub vm: VmId,
    /// The VM's generation at the sender.
    pub generation: Generation,
    /// The epoch it belongs to; 0 where none applies.
    pub epoch: Epoch,
    /// The content, at most [`FrameKind::payload_bytes_max`] bytes.
    pub payload: Bytes,
}

/// Bytes that are not a frame, or a frame that cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The first four bytes are not [`MAGIC`].
    #[error(
        "frame does not start with the magic `PLXF` (found {found:02x?}): the lane is out of step, drop the session"
    )]
    Magic {
        /// What stood there.
        found: [u8; 4],
    },
    /// A layout version this build does not read.
    #[error(
        "frame has layout version {found}, this build reads {VERSION_MIN} to {VERSION}: run the same pollux version on both hosts"
    )]
    Version {
        /// The frame's version.
        found: u8,
    },
    /// The header's checksum does not hold.
    #[error(
        "frame header is damaged (CRC {found:08x}, expected {expected:08x}): drop the session and check both hosts' memory"
    )]
    HeaderCrc {
        /// Computed from the bytes.
        expected: u32,
        /// Stored in the header.
        found: u32,
    },
    /// A kind this build does not know.
    #[error("frame kind {0} is not known: run the same pollux version on both hosts")]
    Kind(u8),
    /// Reserved bits are set.
    #[error("frame has reserved bits {0:#06x} set: run the same pollux version on both hosts")]
    Reserved(u16),
    /// The payload is larger than its kind may be.
    #[error("{kind:?} frame of {bytes} bytes exceeds the limit of {max} bytes: split it")]
    TooBig {
        /// The frame's kind.
        kind: FrameKind,
        /// Payload size.
        bytes: usize,
        /// The kind's limit.
        max: usize,
    },
    /// The payload's checksum does not hold.
    #[error(
        "payload of a {kind:?} frame is damaged (CRC {found:08x}, expected {expected:08x}): drop the session and check both hosts' memory"
    )]
    PayloadCrc {
        /// The frame's kind.
        kind: FrameKind,
        /// Computed from the bytes.
        expected: u32,
        /// Stored in the header.
        found: u32,
    },
    /// [`decode`] was given fewer bytes than the frame has.
    #[error("frame ends after {have} of {need} bytes")]
    Truncated {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
}

/// A header as sent: 52 bytes, including the CRC of the payload.
pub type HeaderBytes = [u8; HEADER_BYTES];

/// A checked header.
#[derive(Clone, Copy, Debug)]
struct Header {
    kind: FrameKind,
    vm: VmId,
    generation: Generation,
    epoch: Epoch,
    payload_bytes: usize,
    payload_crc: u32,
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl Header {
    fn parse(bytes: &HeaderBytes) -> Result<Self, FrameError> {
        let mut magic = [0; 4];
        magic.copy_from_slice(&bytes[..4]);
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        if !(VERSION_MIN..=VERSION).contains(&bytes[4]) {
            return Err(FrameError::Version { found: bytes[4] });
        }
        let expected = crc32fast::hash(&bytes[..HEADER_CHECKED_BYTES]);
        let found = le_u32(bytes, 48);
        if expected != found {
            return Err(FrameError::HeaderCrc { expected, found });
        }
        let kind = FrameKind::from_wire(bytes[5]).ok_or(FrameError::Kind(bytes[5]))?;
        let reserved = u16::from_le_bytes([bytes[6], bytes[7]]);
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        let payload_bytes = le_u32(bytes, 40) as usize;
        let max = kind.payload_bytes_max();
        if payload_bytes > max {
            return Err(FrameError::TooBig {
                kind,
                bytes: payload_bytes,
                max,
            });
        }
        let mut vm = [0; 16];
        vm.copy_from_slice(&bytes[8..24]);
        Ok(Self {
            kind,
            vm: VmId(vm),
            generation: Generation(le_u64(bytes, 24)),
            epoch: Epoch(le_u64(bytes, 32)),
            payload_bytes,
            payload_crc: le_u32(bytes, 44),
        })
    }

    fn finish(self, payload: Bytes) -> Result<Frame, FrameError> {
        let expected = crc32fast::hash(&payload);
        if expected != self.payload_crc {
            return Err(FrameError::PayloadCrc {
                kind: self.kind,
                expected,
                found: self.payload_crc,
            });
        }
        Ok(Frame {
            kind: self.kind,
            vm: self.vm,
            generation: self.generation,
            epoch: self.epoch,
            payload,
        })
    }
}

impl Frame {
    /// A frame without payload, such as an acknowledgement.
    #[must_use]
    pub fn empty(kind: FrameKind, vm: VmId, generation: Generation, epoch: Epoch) -> Self {
        Self {
            kind,
            vm,
            generation,
            epoch,
            payload: Bytes::new(),
        }
    }

    /// Size on the wire, in bytes.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }

    /// The header as sent. Runs over the whole payload for its CRC.
    ///
    /// # Errors
    /// [`FrameError::TooBig`] if the payload exceeds its kind's limit,
    /// [`FrameError::Kind`] for [`FrameKind::Invalid`].
    pub fn header(&self) -> Result<HeaderBytes, FrameError> {
        if self.kind == FrameKind::Invalid {
            return Err(FrameError::Kind(0));
        }
        let max = self.kind.payload_bytes_max();
        let bytes = self.payload.len();
        let too_big = FrameError::TooBig {
            kind: self.kind,
            bytes,
            max,
        };
        if bytes > max {
            return Err(too_big);
        }
        let length = u32::try_from(bytes).map_err(|_| too_big)?;
        let mut header = [0; HEADER_BYTES];
        {
            let mut out = &mut header[..];
            out.put_slice(&MAGIC);
            out.put_u8(VERSION);
            out.put_u8(self.kind as u8);
            out.put_u16_le(0);
            out.put_slice(&self.vm.0);
            out.put_u64_le(self.generation.0);
            out.put_u64_le(self.epoch.0);
            out.put_u32_le(length);
            out.put_u32_le(crc32fast::hash(&self.payload));
        }
        let crc = crc32fast::hash(&header[..HEADER_CHECKED_BYTES]);
        header[HEADER_CHECKED_BYTES..].copy_from_slice(&crc.to_le_bytes());
        Ok(header)
    }
}

/// Append a frame to `out`.
///
/// # Errors
/// As [`Frame::header`]; `out` is then unchanged.
pub fn encode(frame: &Frame, out: &mut BytesMut) -> Result<(), FrameError> {
    let header = frame.header()?;
    out.reserve(HEADER_BYTES + frame.payload.len());
    out.put_slice(&header);
    out.put_slice(&frame.payload);
    Ok(())
}

/// Decode exactly one frame from the front of `bytes`; the rest stays there.
///
/// # Errors
/// [`FrameError::Truncated`] if it is not all there (`bytes` is then unchanged);
/// any other [`FrameError`] if it is not a frame.
pub fn decode(bytes: &mut Bytes) -> Result<Frame, FrameError> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(FrameError::Truncated {
            have: bytes.len(),
            need: HEADER_BYTES,
        });
    };
    let header = Header::parse(header)?;
    let need = HEADER_BYTES + header.payload_bytes;
    if bytes.len() < need {
        return Err(FrameError::Truncated {
            have: bytes.len(),
            need,
        });
    }
    bytes.advance(HEADER_BYTES);
    header.finish(bytes.split_to(header.payload_bytes))
}

/// Decoder of a byte stream that comes in pieces of any size.
///
/// Holds at most one frame: `HEADER_BYTES + PAYLOAD_BYTES_MAX` bytes. After an
/// error the stream has no frame boundary any more: drop it.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    /// Header bytes so far, while no header is complete.
    header: BytesMut,
    /// The complete header and its payload so far.
    body: Option<(Header, BytesMut)>,
}

impl FrameDecoder {
    /// A decoder at a frame boundary.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Take bytes from the front of `input` until a frame is whole or `input` is
    /// empty. `Ok(None)` means: more bytes are needed. Call again while `input`
    /// is not empty.
    ///
    /// # Errors
    /// Any [`FrameError`] but `Truncated`.
    pub fn push(&mut self, input: &mut impl Buf) -> Result<Option<Frame>, FrameError> {
        if self.body.is_none() {
            while self.header.len() < HEADER_BYTES && input.has_remaining() {
                let chunk = input.chunk();
                let take = chunk.len().min(HEADER_BYTES - self.header.len());
                self.header.extend_from_slice(&chunk[..take]);
                input.advance(take);
            }
            let Some(bytes) = self.header.first_chunk::<HEADER_BYTES>() else {
                return Ok(None);
            };
            let header = Header::parse(bytes)?;
            self.header.clear();
            self.body = Some((header, BytesMut::with_capacity(header.payload_bytes)));
        }
        if let Some((header, body)) = &mut self.body {
            while body.len() < header.payload_bytes && input.has_remaining() {
                let chunk = input.chunk();
                let take = chunk.len().min(header.payload_bytes - body.len());
                body.extend_from_slice(&chunk[..take]);
                input.advance(take);
            }
            if body.len() < header.payload_bytes {
                return Ok(None);
            }
        }
        match self.body.take() {
            Some((header, body)) => header.finish(body.freeze()).map(Some),
            None => Ok(None),
        }
    }

    /// Whether the stream stands at a frame boundary: ending here loses nothing.
    #[must_use]
    pub fn is_at_boundary(&self) -> bool {
        self.header.is_empty() && self.body.is_none()
    }
}

#[cfg(test)]
mod tests;
