//! A device state, whole or as its difference from the one before.
//!
//! All integers are little-endian:
//!
//! ```text
//! u8   class        0 invalid, 1 full, 2 xor
//! u8   packing      0 zstd, 1 plain, 2 zstd, 3 lz4; not 0 only since protocol version 2
//! u8   × 2          reserved, zero
//! u32  state bytes  of the new state, at most DEVICE_STATE_BYTES_MAX
//! u32  state CRC    CRC-32 (IEEE) of the new state
//! u32  base CRC     of the state it is a difference from; 0 when full
//! ...  packed       the state, or state XOR base (the base cut or filled up with
//!                   zeros to the state's length)
//! ```
//!
//! Two states of one VM differ in a few counters and queue indices, so the XOR is
//! almost all zero and packing turns it into runs; it is packed whatever the pages are. The base's CRC stands beside it
//! because a delta against the wrong base would decode to plausible nonsense.

use super::cursor::{Cursor, cap};
use super::pack::{Packing, pack, unpack};
use super::{Codec, CodecError, CodecVersion};
use bytes::{BufMut, Bytes, BytesMut};

/// Largest device state, in bytes. Measured states are 5 KB to 262 KB (a VM with
/// serial, rng and balloon); the rest is room for many devices.
pub const DEVICE_STATE_BYTES_MAX: usize = 16 << 20;

const HEAD_BYTES: usize = 16;
const CLASS_FULL: u8 = 1;
const CLASS_XOR: u8 = 2;

/// `state` XOR `base` in place; where `base` is shorter, `state` stays.
fn xor(state: &mut [u8], base: &[u8]) {
    for (byte, base) in state.iter_mut().zip(base) {
        *byte ^= base;
    }
}

/// The codec for a state beside pages of `pages`: a state is some KB to 100 KB in which
/// almost nothing changed, so lz4 is as good as any and soonest, but for links on which
/// pages go as zstd.
const fn state_codec(pages: Codec, version: CodecVersion) -> Codec {
    match (pages, version) {
        (_, CodecVersion::V1) => Codec::ZstdFast,
        (Codec::Raw | Codec::Lz4, CodecVersion::V2) => Codec::Lz4,
        (zstd, CodecVersion::V2) => zstd,
    }
}

/// Encode `new` as its difference from `previous`; full if `previous` is `None`. `pages` is
/// how the pages beside it are packed.
///
/// # Errors
/// [`CodecError::TooBig`] if the state is larger than [`DEVICE_STATE_BYTES_MAX`] or
/// does not compress into one frame.
pub fn encode_delta(
    previous: Option<&[u8]>,
    new: &[u8],
    pages: Codec,
    version: CodecVersion,
) -> Result<Bytes, CodecError> {
    cap("device state", new.len(), DEVICE_STATE_BYTES_MAX)?;
    let (class, base_crc, plain) = match previous {
        None => (CLASS_FULL, 0, std::borrow::Cow::Borrowed(new)),
        Some(base) => {
            let mut difference = new.to_vec();
            xor(&mut difference, base);
            (
                CLASS_XOR,
                crc32fast::hash(base),
                std::borrow::Cow::Owned(difference),
            )
        }
    };
    let codec = state_codec(pages, version);
    let mut packed = Vec::new();
    let (packing, body) = match pack(codec, &plain, &mut packed) {
        Some(bytes) => (Packing::of(codec), packed.get(..bytes).unwrap_or_default()),
        None => (Packing::Plain, &plain[..]),
    };
    cap(
        "compressed device state",
        HEAD_BYTES + body.len(),
        crate::frame::PAYLOAD_BYTES_MAX,
    )?;
    // An old partner knows zstd alone, by the number 0: what does not get smaller has to be
    // a zstd frame all the same.
    let forced;
    let (number, body) = match (version, packing) {
        (CodecVersion::V1, Packing::Plain) => {
            forced = zstd::bulk::compress(&plain, 0).map_err(|_| CodecError::Compression {
                what: "device state",
                reason: "zstd cannot compress it",
            })?;
            (0, &forced[..])
        }
        (CodecVersion::V1, _) => (0, body),
        (CodecVersion::V2, packing) => (packing as u8, body),
    };
    let mut out = BytesMut::with_capacity(HEAD_BYTES + body.len());
    out.put_u8(class);
    out.put_u8(number);
    out.put_bytes(0, 2);
    out.put_u32_le(u32::try_from(new.len()).unwrap_or(u32::MAX));
    out.put_u32_le(crc32fast::hash(new));
    out.put_u32_le(base_crc);
    out.put_slice(body);
    Ok(out.freeze())
}

/// Undo [`encode_delta`]; `previous` is the state it was encoded against, if this
/// side holds one.
///
/// # Errors
/// [`CodecError::DeltaBase`] if it is a delta against another state, any other
/// [`CodecError`] if it is damaged.
pub fn decode_delta(previous: Option<&[u8]>, delta: &[u8]) -> Result<Bytes, CodecError> {
    let mut cursor = Cursor::new(delta, "device state");
    let class = cursor.u8()?;
    let packing = match cursor.u8()? {
        0 => Packing::Zstd,
        number => Packing::from_wire("packing of a device state", number)?,
    };
    let reserved = cursor.u16()?;
    cursor.reserved(u64::from(reserved))?;
    let bytes = cursor.u32()? as usize;
    cap("device state", bytes, DEVICE_STATE_BYTES_MAX)?;
    let expected = cursor.u32()?;
    let wanted = cursor.u32()?;
    let base = match (class, previous) {
        (CLASS_FULL, _) => None,
        (CLASS_XOR, None) => {
            return Err(CodecError::DeltaBase {
                wanted,
                have: "none".to_owned(),
            });
        }
        (CLASS_XOR, Some(base)) => {
            let have = crc32fast::hash(base);
            if have != wanted {
                return Err(CodecError::DeltaBase {
                    wanted,
                    have: format!("one of CRC {have:08x}"),
                });
            }
            Some(base)
        }
        (value, _) => {
            return Err(CodecError::Unknown {
                what: "device state class",
                value: u64::from(value),
            });
        }
    };
    let mut state = Vec::new();
    unpack(
        packing,
        cursor.take(cursor.remaining())?,
        bytes,
        "device state",
        &mut state,
    )?;
    if let Some(base) = base {
        xor(&mut state, base);
    }
    let found = crc32fast::hash(&state);
    if found != expected {
        return Err(CodecError::StateCrc { expected, found });
    }
    Ok(Bytes::from(state))
}
