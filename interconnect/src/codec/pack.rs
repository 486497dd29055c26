//! Compression: whether it is worth trying, and lz4 and zstd with contexts that are kept.
//!
//! zstd's contexts are some hundred KiB and dear to set up for each batch, so each
//! thread keeps one of either kind; the same for lz4's table.

use super::{Codec, CodecError};
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use std::cell::RefCell;
use zstd::bulk::{Compressor, Decompressor};

/// Level of [`Codec::ZstdFast`]. Negative levels trade size for speed.
pub const ZSTD_FAST_LEVEL: i32 = -1;
/// Level of [`Codec::ZstdSmall`]: for links so slow that bytes cost more than cycles.
pub const ZSTD_SMALL_LEVEL: i32 = 3;

/// Bytes looked at to guess whether content compresses.
const SAMPLE_BYTES: usize = 256;
/// Distinct values in the sample at or above which content goes raw. Of 256 bytes
/// drawn at random, 256 (1 - 1/e) = 162 values are expected to be distinct, with a
/// standard deviation of about 5; text, code and tables show well under 110, a page
/// half random and half zero about 100.
const DISTINCT_RAW: u32 = 128;

/// Guess from a sample whether `bytes` compress.
pub(crate) fn looks_compressible(bytes: &[u8]) -> bool {
    // An odd stride visits every position within a record of 2^n bytes.
    let stride = (bytes.len() / SAMPLE_BYTES).saturating_sub(1) | 1;
    let mut seen = [0u64; 4];
    for byte in bytes.iter().step_by(stride).take(SAMPLE_BYTES) {
        seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }
    seen.iter().map(|word| word.count_ones()).sum::<u32>() < DISTINCT_RAW
}

/// How a body is packed, as a number on the wire. One file owns it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Packing {
    /// It is as it is.
    Plain = 1,
    /// zstd frame.
    Zstd = 2,
    /// lz4 block.
    Lz4 = 3,
}

impl Packing {
    /// The packing with this number.
    pub(crate) fn from_wire(what: &'static str, value: u8) -> Result<Self, CodecError> {
        match value {
            1 => Ok(Self::Plain),
            2 => Ok(Self::Zstd),
            3 => Ok(Self::Lz4),
            _ => Err(CodecError::Unknown {
                what,
                value: u64::from(value),
            }),
        }
    }

    /// What `codec` gives.
    pub(crate) const fn of(codec: Codec) -> Self {
        match codec {
            Codec::Raw => Self::Plain,
            Codec::Lz4 => Self::Lz4,
            Codec::ZstdFast | Codec::ZstdSmall => Self::Zstd,
        }
    }
}

thread_local! {
    static TABLE: RefCell<CompressTable> = RefCell::new(CompressTable::large());
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Grow `buffer` to at least `bytes`. What it held stays, so that a buffer used again is
/// not filled with zeros each time.
pub(crate) fn grow(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    buffer
}

/// Compress `plain` into the front of `out`, which grows as needed; returns the bytes.
/// `None`: it did not work or did not get smaller; send it as it is.
pub(crate) fn pack(codec: Codec, plain: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    let packed = match codec {
        Codec::Raw => None,
        Codec::Lz4 => {
            let out = grow(out, get_maximum_output_size(plain.len()));
            TABLE.with_borrow_mut(|table| compress_into_with_table(plain, out, table).ok())
        }
        Codec::ZstdFast => pack_zstd(ZSTD_FAST_LEVEL, plain, out),
        Codec::ZstdSmall => pack_zstd(ZSTD_SMALL_LEVEL, plain, out),
    };
    packed.filter(|bytes| *bytes < plain.len())
}

fn pack_zstd(level: i32, plain: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    let out = grow(out, zstd::zstd_safe::compress_bound(plain.len()));
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Compressor::new(level).ok().map(|made| (level, made));
        }
        let (at, compressor) = slot.as_mut()?;
        if *at != level {
            compressor.set_compression_level(level).ok()?;
            *at = level;
        }
        compressor.compress_to_buffer(plain, out).ok()
    })
}

/// Decompress `packed` into exactly the first `plain_bytes` of `out`, which the caller has
/// capped; `out` grows as needed.
pub(crate) fn unpack(
    packing: Packing,
    packed: &[u8],
    plain_bytes: usize,
    what: &'static str,
    out: &mut Vec<u8>,
) -> Result<(), CodecError> {
    let refused = |reason| CodecError::Compression { what, reason };
    let plain = grow(out, plain_bytes)
        .get_mut(..plain_bytes)
        .unwrap_or_default();
    let bytes = match packing {
        Packing::Plain => {
            if packed.len() == plain_bytes {
                plain.copy_from_slice(packed);
            }
            packed.len()
        }
        Packing::Lz4 => decompress_into(packed, plain).map_err(|_| refused("lz4 refuses it"))?,
        Packing::Zstd => DECOMPRESSOR.with_borrow_mut(|slot| {
            if slot.is_none() {
                *slot = Decompressor::new().ok();
            }
            let Some(decompressor) = slot else {
                return Err(refused("no memory for a zstd context"));
            };
            decompressor
                .decompress_to_buffer(packed, plain)
                .map_err(|_| refused("zstd refuses it"))
        })?,
    };
    if bytes == plain_bytes {
        Ok(())
    } else {
        Err(refused("it has another size than stated"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKED: [Codec; 3] = [Codec::Lz4, Codec::ZstdFast, Codec::ZstdSmall];

    #[test]
    fn text_is_compressible_and_noise_is_not() {
        let text: Vec<u8> = b"the quick brown fox jumps over the lazy dog. "
            .iter()
            .copied()
            .cycle()
            .take(4096)
            .collect();
        assert!(looks_compressible(&text));
        assert!(looks_compressible(&[0; 4096]));
        let noise = crate::codec::tests::noise(7, 4096);
        assert!(!looks_compressible(&noise));
        assert!(looks_compressible(&[]));
    }

    #[test]
    fn unpack_wants_the_stated_size() {
        let plain = vec![7u8; 10_000];
        for codec in PACKED {
            let (mut packed, mut back) = (Vec::new(), Vec::new());
            let bytes = pack(codec, &plain, &mut packed).unwrap();
            let packed = &packed[..bytes];
            let mut try_as = |packed: &[u8], stated: usize| {
                unpack(Packing::of(codec), packed, stated, "x", &mut back)
                    .map(|()| back[..stated].to_vec())
            };
            assert_eq!(try_as(packed, plain.len()).unwrap(), plain);
            assert!(try_as(packed, plain.len() - 1).is_err());
            assert!(try_as(packed, plain.len() + 1).is_err());
            assert!(try_as(&packed[..bytes - 1], plain.len()).is_err());
        }
    }

    #[test]
    fn noise_is_sent_as_it_is() {
        let noise = crate::codec::tests::noise(9, 4096);
        for codec in Codec::ALL {
            assert_eq!(pack(codec, &noise, &mut Vec::new()), None, "{codec:?}");
        }
    }
}
