//! Round trips, pieces of any size, and damage.

use super::*;
use proptest::prelude::*;

fn arb_frame() -> impl Strategy<Value = Frame> {
    (
        1u8..=14,
        any::<[u8; 16]>(),
        any::<u64>(),
        any::<u64>(),
        prop::collection::vec(any::<u8>(), 0..2000),
    )
        .prop_map(|(kind, vm, generation, epoch, mut payload)| {
            let kind = FrameKind::from_wire(kind).unwrap();
            payload.truncate(kind.payload_bytes_max());
            Frame {
                kind,
                vm: VmId(vm),
                generation: Generation(generation),
                epoch: Epoch(epoch),
                payload: payload.into(),
            }
        })
}

fn wire(frames: &[Frame]) -> Vec<u8> {
    let mut out = BytesMut::new();
    for frame in frames {
        encode(frame, &mut out).unwrap();
    }
    out.to_vec()
}

/// Run `bytes` through the decoder in pieces of `piece` bytes.
fn decode_in_pieces(bytes: &[u8], piece: usize) -> (Vec<Frame>, Option<FrameError>, bool) {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for mut chunk in bytes.chunks(piece) {
        loop {
            match decoder.push(&mut chunk) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error), false),
            }
        }
    }
    (frames, None, decoder.is_at_boundary())
}

proptest! {
    #[test]
    fn frames_come_back_from_pieces_of_any_size(
        frames in prop::collection::vec(arb_frame(), 1..6), piece in 1usize..3000,
    ) {
        let bytes = wire(&frames);
        prop_assert_eq!(decode_in_pieces(&bytes, piece), (frames.clone(), None, true));
        let mut rest = Bytes::from(bytes);
        for frame in &frames {
            prop_assert_eq!(&decode(&mut rest).unwrap(), frame);
        }
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn one_flipped_bit_is_always_refused(frame in arb_frame(), at in any::<usize>(), bit in 0u8..8) {
        let mut bytes = wire(std::slice::from_ref(&frame));
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        let (frames, error, _) = decode_in_pieces(&bytes, 7);
        prop_assert!(frames.is_empty());
        prop_assert!(error.is_some());
        prop_assert!(decode(&mut Bytes::from(bytes)).is_err());
    }

    #[test]
    fn a_cut_frame_is_not_handed_up(frame in arb_frame(), at in any::<usize>()) {
        let bytes = wire(std::slice::from_ref(&frame));
        let at = at % bytes.len();
        let (frames, error, boundary) = decode_in_pieces(&bytes[..at], 100);
        prop_assert!(frames.is_empty() && error.is_none());
        prop_assert_eq!(boundary, at == 0);
        let is_truncated = matches!(
            decode(&mut Bytes::copy_from_slice(&bytes[..at])),
            Err(FrameError::Truncated { .. })
        );
        prop_assert!(is_truncated);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let (frames, _, _) = decode_in_pieces(&bytes, 9);
        prop_assert!(frames.is_empty());
    }
}

/// A header that is right but for what `change` does to it; its CRC holds.
fn forged(change: impl FnOnce(&mut HeaderBytes)) -> Bytes {
    let frame = Frame::empty(FrameKind::Control, VmId([1; 16]), Generation(2), Epoch(3));
    let mut header = frame.header().unwrap();
    change(&mut header);
    let crc = crc32fast::hash(&header[..HEADER_CHECKED_BYTES]);
    header[HEADER_CHECKED_BYTES..].copy_from_slice(&crc.to_le_bytes());
    Bytes::copy_from_slice(&header)
}

#[test]
fn lengths_are_capped_before_allocation() {
    let mut bytes = forged(|h| h[40..44].copy_from_slice(&u32::MAX.to_le_bytes()));
    let mut decoder = FrameDecoder::new();
    assert!(matches!(
        decoder.push(&mut bytes),
        Err(FrameError::TooBig { .. })
    ));
    // An acknowledgement has no payload, not even a small one.
    let mut bytes = forged(|h| {
        h[5] = FrameKind::EpochAck as u8;
        h[40] = 1;
    });
    assert!(matches!(
        decode(&mut bytes),
        Err(FrameError::TooBig { max: 0, .. })
    ));
}

#[test]
fn other_versions_kinds_and_reserved_bits_are_refused() {
    assert_eq!(
        decode(&mut forged(|h| h[4] = VERSION + 1)),
        Err(FrameError::Version { found: VERSION + 1 })
    );
    assert_eq!(
        decode(&mut forged(|h| h[4] = 0)),
        Err(FrameError::Version { found: 0 })
    );
    assert_eq!(decode(&mut forged(|h| h[5] = 0)), Err(FrameError::Kind(0)));
    assert_eq!(
        decode(&mut forged(|h| h[5] = 77)),
        Err(FrameError::Kind(77))
    );
    assert_eq!(
        decode(&mut forged(|h| h[6] = 1)),
        Err(FrameError::Reserved(1))
    );
    assert!(decode(&mut forged(|_| ())).is_ok());
}

#[test]
fn what_may_not_be_sent_is_refused_at_the_sender() {
    let mut out = BytesMut::new();
    let mut frame = Frame::empty(FrameKind::Invalid, VmId([0; 16]), Generation(0), Epoch(0));
    assert_eq!(encode(&frame, &mut out), Err(FrameError::Kind(0)));
    frame.kind = FrameKind::Pages;
    frame.payload = vec![0; PAYLOAD_BYTES_MAX + 1].into();
    assert!(matches!(
        encode(&frame, &mut out),
        Err(FrameError::TooBig { .. })
    ));
    assert!(out.is_empty());
}
