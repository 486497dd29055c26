//! Compression: whether it is worth trying, and zstd with contexts that are kept.
//!
//! zstd's contexts are some hundred KiB and dear to set up for each batch, so each
//! thread keeps one of either kind.

use super::CodecError;
use std::cell::RefCell;
use zstd::bulk::{Compressor, Decompressor};

/// zstd level. Negative levels trade size for speed; what is gained on the wire at
/// higher ones is lost in the time until the standby can acknowledge.
const LEVEL: i32 = -1;

/// Level of [`Codec::ZstdFast`](super::Codec::ZstdFast).
pub const ZSTD_FAST_LEVEL: i32 = 1;
/// Level of [`Codec::ZstdSmall`](super::Codec::ZstdSmall).
pub const ZSTD_SMALL_LEVEL: i32 = 3;

/// Bytes looked at to guess whether content compresses.
const SAMPLE_BYTES: usize = 256;
/// Distinct values in the sample at or above which content goes raw. Of 256 bytes
/// drawn at random, 256 (1 - 1/e) = 162 values are expected to be distinct, with a
/// standard deviation of about 5; text, code and tables show well under 110, a page
/// half random and half zero about 100.
const DISTINCT_RAW: u32 = 128;

/// Guess from a sample whether `bytes` compress.
pub(super) fn looks_compressible(bytes: &[u8]) -> bool {
    // An odd stride visits every position within a record of 2^n bytes.
    let stride = (bytes.len() / SAMPLE_BYTES).saturating_sub(1) | 1;
    let mut seen = [0u64; 4];
    for byte in bytes.iter().step_by(stride).take(SAMPLE_BYTES) {
        seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }
    seen.iter().map(|word| word.count_ones()).sum::<u32>() < DISTINCT_RAW
}

thread_local! {
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compress `plain` into `out` (whose content is replaced). `false`: it did not
/// work or did not get smaller; send it raw.
pub(super) fn compress(plain: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    out.reserve(zstd::zstd_safe::compress_bound(plain.len()));
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Compressor::new(LEVEL).ok();
        }
        let Some(compressor) = slot else { return false };
        match compressor.compress_to_buffer(plain, out) {
            Ok(bytes) => bytes < plain.len(),
            Err(_) => false,
        }
    })
}

/// Decompress `packed` into exactly `plain_bytes` bytes, which the caller has capped.
pub(super) fn decompress(
    packed: &[u8],
    plain_bytes: usize,
    what: &'static str,
) -> Result<Vec<u8>, CodecError> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Decompressor::new().ok();
        }
        let Some(decompressor) = slot else {
            return Err(CodecError::Compression {
                what,
                reason: "no memory for a zstd context",
            });
        };
        let mut plain = Vec::with_capacity(plain_bytes);
        match decompressor.decompress_to_buffer(packed, &mut plain) {
            Ok(bytes) if bytes == plain_bytes => Ok(plain),
            Ok(_) => Err(CodecError::Compression {
                what,
                reason: "it has another size than stated",
            }),
            Err(_) => Err(CodecError::Compression {
                what,
                reason: "zstd refuses it",
            }),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn decompress_wants_the_stated_size() {
        let plain = vec![7u8; 10_000];
        let mut packed = Vec::new();
        assert!(compress(&plain, &mut packed));
        assert_eq!(decompress(&packed, plain.len(), "x").unwrap(), plain);
        assert!(decompress(&packed, plain.len() - 1, "x").is_err());
        assert!(decompress(&packed, plain.len() + 1, "x").is_err());
        assert!(decompress(&packed[..packed.len() - 1], plain.len(), "x").is_err());
    }
}
