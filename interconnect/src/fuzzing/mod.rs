//! What the fuzzers run: one function for each decoder of bytes from a partner, taking bytes
//! of any content. Each panics when the decoder breaks a promise (or panics itself).
//!
//! They live here and not with the fuzzers so that `cargo test` replays the corpus
//! (`tests/corpus`) without a fuzzing toolchain, and so that a change of a decoder's
//! signature does not leave its fuzzer behind. Not for use in a product.
//!
//! Behind a checksum, blind mutation finds nothing. Where there is one, the input is a
//! script from which valid bytes are made and then damaged.

mod epochs;
mod lanes;
mod people;

use crate::codec::pages::{DecodeBuffers, PageBatch};
use crate::codec::{
    Codec, CodecVersion, DiskOp, PAGE_BYTES, PageContent, decode_delta, decode_disk_writes,
    decode_packets, encode_delta, encode_packets,
};
use crate::frame::{self, Frame, FrameDecoder, FrameKind, HEADER_BYTES};
use crate::ids::{Epoch, Generation, VmId};
use bytes::{Bytes, BytesMut};

/// Takes bytes of any content.
pub type Target = fn(&[u8]);

/// Every target by the name of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("delta", delta),
    ("disk", disk),
    ("epoch", epochs::epoch),
    ("epoch_end", epochs::epoch_end),
    ("frames", frames),
    ("heartbeat", crate::heartbeat::fuzz),
    ("hello", crate::link::fuzz_hello),
    ("join", lanes::join),
    ("lane_receiver", lanes::receiver),
    ("lane_sender", lanes::sender),
    ("lane_start", lanes::start),
    ("meeting", people::meeting),
    ("packets", packets),
    ("pages", pages),
    ("probe", people::probe),
    ("records", lanes::records),
    ("segments", lanes::segments),
    ("texts", people::texts),
];

/// Run the target of this name.
///
/// # Panics
/// If there is none, or if the decoder broke a promise.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.0 == name);
    target.expect("a target of this name").1(data);
}

/// Input read as a script; zeros after its end.
pub(crate) struct Script<'a>(pub(crate) &'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub(crate) fn u64(&mut self) -> u64 {
        let (mut word, taken) = ([0; 8], self.take(8));
        word[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(word)
    }
}

/// Feed `bytes` in pieces of `piece` bytes to `push` until it errs.
pub(crate) fn in_pieces<E>(
    bytes: &[u8],
    piece: usize,
    mut push: impl FnMut(Bytes) -> Result<(), E>,
) -> Result<(), E> {
    bytes
        .chunks(piece.max(1))
        .try_for_each(|chunk| push(Bytes::copy_from_slice(chunk)))
}

/// What a stream decoder makes of bytes in pieces of this size.
fn decode_frames(bytes: &[u8], piece: usize) -> (Vec<Frame>, bool) {
    let (mut decoder, mut frames) = (FrameDecoder::new(), Vec::new());
    let result = in_pieces(bytes, piece, |mut chunk| {
        while !chunk.is_empty() {
            frames.extend(decoder.push(&mut chunk)?);
        }
        Ok::<_, frame::FrameError>(())
    });
    (frames, result.is_err())
}

/// Byte 0: size of the pieces; its highest bit: mend the checksums first.
fn frames(data: &[u8]) {
    let mut script = Script(data);
    let how = script.u8();
    let mut bytes = script.0.to_vec();
    if how & 0x80 != 0 {
        mend(&mut bytes);
    }
    let piece = usize::from(how & 0x7f) + 1;
    let (frames, failed) = decode_frames(&bytes, piece);
    let (whole, whole_failed) = decode_frames(&bytes, bytes.len());
    assert!(frames == whole && failed == whole_failed);
    // One at a time, and back.
    let mut rest = Bytes::from(bytes.clone());
    let mut out = BytesMut::new();
    for frame in &frames {
        assert!(frame.payload.len() <= frame.kind.payload_bytes_max());
        assert_eq!(frame::decode(&mut rest).as_ref(), Ok(frame));
        frame::encode(frame, &mut out).expect("what was decoded can be encoded");
    }
    assert_eq!(bytes[..out.len()], out[..]);
}

/// Make frames of bytes: lengths within what there is, checksums that hold.
fn mend(bytes: &mut [u8]) {
    let mut rest = bytes;
    while rest.len() >= HEADER_BYTES {
        let (header, body) = rest.split_at_mut(HEADER_BYTES);
        let length = usize::from(u16::from_le_bytes([header[40], header[41]])).min(body.len());
        let (payload, after) = body.split_at_mut(length);
        header[..4].copy_from_slice(&frame::MAGIC);
        header[4] = frame::VERSION;
        let length = u32::try_from(length).unwrap_or(0);
        header[40..44].copy_from_slice(&length.to_le_bytes());
        header[44..48].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        let crc = crc32fast::hash(&header[..48]);
        header[48..].copy_from_slice(&crc.to_le_bytes());
        rest = after;
    }
}

/// Guest of the targets that need one.
pub(crate) const GUEST_PAGES: u64 = 300;
/// Its disks.
pub(crate) const DISK_BYTES: [u64; 2] = [1 << 20, 3 << 12];
/// Its name.
pub(crate) const VM: VmId = VmId(*b"the fuzzed guest");

fn pages(data: &[u8]) {
    let (batch, buffers) = (Bytes::copy_from_slice(data), DecodeBuffers::default());
    let Ok(batch) = PageBatch::decode(&batch, GUEST_PAGES, &buffers) else {
        return;
    };
    let (mut count, mut page) = (0, [7; PAGE_BYTES]);
    for (index, content) in batch.pages() {
        assert!(index < GUEST_PAGES);
        if let PageContent::Patch(patch) = content {
            let _ = patch.apply(&mut page);
        }
        count += 1;
    }
    assert_eq!(count, batch.len());
    assert!(batch.held_bytes() <= (data.len() + count * (PAGE_BYTES + 64)) as u64);
}

fn disk(data: &[u8]) {
    let batch = Bytes::copy_from_slice(data);
    for write in decode_disk_writes(&batch, &DISK_BYTES).unwrap_or_default() {
        let end = write.offset.checked_add(write.length());
        let disk = DISK_BYTES[usize::from(write.disk)];
        assert!(end.is_some_and(|end| end <= disk), "{write:?}");
        if let DiskOp::Data(data) = &write.op {
            assert!(data.len() <= crate::codec::disk::DISK_WRITE_BYTES_MAX);
        }
    }
}

fn packets(data: &[u8]) {
    let Ok(packets) = decode_packets(&Bytes::copy_from_slice(data)) else {
        return;
    };
    if packets.is_empty() {
        return;
    }
    let mut again = BytesMut::new();
    let taken = encode_packets(&packets, &mut again).expect("what was decoded can be encoded");
    let back = decode_packets(&again.freeze()).expect("and decoded again");
    assert_eq!(back[..], packets[..taken]);
}

/// Byte 0: bit 0 against a base this side holds, bit 1 the base's checksum mended, bits 2 and
/// 3 how it is packed again; then a base of so many bytes.
fn delta(data: &[u8]) {
    let mut script = Script(data);
    let how = script.u8();
    let base = match script.u8() {
        0 => Vec::new(),
        bytes => script.take(usize::from(bytes)).to_vec(),
    };
    let base = (how & 1 != 0).then_some(&base[..]);
    let mut delta = script.0.to_vec();
    if how & 2 != 0 && delta.len() >= 16 {
        delta[12..16].copy_from_slice(&base.map_or(0, crc32fast::hash).to_le_bytes());
    }
    let Ok(state) = decode_delta(base, &delta) else {
        return;
    };
    let codec = Codec::ALL[usize::from(how >> 2 & 3)];
    let again = encode_delta(base, &state, codec, CodecVersion::V2)
        .expect("a state that was decoded can be encoded");
    assert_eq!(decode_delta(base, &again).as_ref(), Ok(&state));
}

/// A frame of the guest of the targets.
pub(crate) fn frame_of(kind: FrameKind, epoch: u64, payload: &[u8]) -> Frame {
    Frame {
        kind,
        vm: VM,
        generation: Generation(1),
        epoch: Epoch(epoch),
        payload: Bytes::copy_from_slice(payload),
    }
}
