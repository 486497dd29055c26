//! Layouts: as written down, back again, in pieces of any size, and damaged.

use crate::ids::{Generation, VmId};
use crate::lane::wire::*;
use crate::lane::{
    LANE_WINDOW_BYTES_MIN, LINKS_MAX, LaneClass, LaneId, LinkIndex, SEGMENT_BYTES_MAX,
};
use bytes::Bytes;
use proptest::prelude::*;

fn join() -> Join {
    Join {
        kind: JoinKind::Resume,
        link: LinkIndex(1),
        nonce: [7; 16],
        window_bytes: LANE_WINDOW_BYTES_MIN,
        features: 0x8000_0000_0000_0001,
    }
}

fn start() -> LaneStart {
    LaneStart {
        lane: LaneId(0x0102_0304),
        class: LaneClass::Io,
        vm: VmId([3; 16]),
        answers: LaneId(0),
        generation: Generation(9),
    }
}

#[test]
fn the_bytes_are_those_written_down() {
    let mut want = b"PLXJ\x02\x01\0\0".to_vec();
    want.extend([7; 16]);
    want.extend([0, 0, 0x10, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80]);
    assert_eq!(join().encode()[..], want);
    let mut want = b"PLXL\x02\x02\0\0".to_vec();
    want.extend([3; 16]);
    want.extend([9, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0]);
    assert_eq!(start().encode()[..], want);
    let header = SegmentHeader {
        offset: 0x0a0b,
        bytes: 258,
        fin: true,
        frame_end: true,
    };
    let segment = [0x0b, 0x0a, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0];
    assert_eq!(header.encode(), segment);
    let mut want = vec![1, 0, 0, 0, 18, 1, 0, 0];
    want.extend(segment);
    assert_eq!(control_segment_head(&header)[..], want);
    let ack = LaneAck {
        lane: LaneId(5),
        delivered: 6,
        received: 7,
    };
    let mut want = vec![2, 0, 0, 0, 24, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
    want.extend([6, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(ack.encode()[..], want);
    let stop = LaneStop {
        lane: LaneId(5),
        reason: LaneStop::OVER,
    };
    assert_eq!(
        stop.encode(),
        [3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0]
    );
}

#[test]
fn joins_and_starts_come_back_or_are_refused() {
    assert_eq!(Join::parse(&join().encode()), Ok(join()));
    for at in [0, 1, 2, 3, 4, 6, 7] {
        let mut bad = join().encode();
        bad[at] ^= 0x40;
        assert!(Join::parse(&bad).is_err(), "byte {at}");
    }
    let mut bad = join();
    bad.link = LinkIndex(u8::try_from(LINKS_MAX).unwrap());
    assert!(Join::parse(&bad.encode()).is_err());
    let mut bad = join();
    bad.window_bytes -= 1;
    assert!(Join::parse(&bad.encode()).is_err());
    assert!(Join::parse(&[0; JOIN_BYTES]).is_err());

    assert_eq!(LaneStart::parse(&start().encode()), Ok(start()));
    for at in 0..8 {
        let mut bad = start().encode();
        bad[at] ^= 0x40;
        assert!(LaneStart::parse(&bad).is_err(), "byte {at}");
    }
    for bad in [
        LaneStart {
            lane: LaneId::CONTROL,
            ..start()
        },
        LaneStart {
            class: LaneClass::Control,
            ..start()
        },
        LaneStart {
            class: LaneClass::Epoch,
            answers: LaneId(1),
            ..start()
        },
    ] {
        assert!(LaneStart::parse(&bad.encode()).is_err());
    }
}

#[test]
fn a_version_1_lane_is_not_taken_for_one_of_version_2() {
    // As version 1 writes it: `PLXL`, 1, zeros, VM id, generation.
    let mut old = [0; LANE_START_BYTES];
    old[..5].copy_from_slice(b"PLXL\x01");
    let error = LaneStart::parse(&old).unwrap_err();
    assert!(matches!(error, WireError::LaneMagic { .. }), "{error}");
}

fn segments() -> impl Strategy<Value = Vec<(u64, Vec<u8>, bool, bool)>> {
    let one = (
        0..u64::MAX / 2,
        prop::collection::vec(any::<u8>(), 1..300),
        any::<bool>(),
        any::<bool>(),
    );
    prop::collection::vec(one, 1..8)
}

/// Pieces put together again.
fn whole(pieces: Vec<Piece>) -> Vec<(u64, Vec<u8>, bool, bool)> {
    let mut out: Vec<(u64, Vec<u8>, bool, bool)> = Vec::new();
    let mut open = false;
    for piece in pieces {
        if open {
            let last = out.last_mut().unwrap();
            assert_eq!(piece.offset, last.0 + last.1.len() as u64);
            last.1.extend(&piece.bytes);
            (last.2, last.3) = (piece.fin, piece.frame_end);
        } else {
            let bytes = piece.bytes.to_vec();
            out.push((piece.offset, bytes, piece.fin, piece.frame_end));
        }
        open = !(piece.fin || piece.frame_end);
    }
    out
}

proptest! {
    #[test]
    fn segments_and_records_come_back_from_pieces_of_any_size(
        mut segments in segments(), step in 1usize..400,
    ) {
        // A flag ends each, so that they can be told apart again.
        for segment in &mut segments {
            segment.2 |= !segment.3;
        }
        let (mut lane, mut control, mut want) = (Vec::new(), Vec::new(), Vec::new());
        for (offset, bytes, fin, frame_end) in &segments {
            let header = SegmentHeader {
                offset: *offset,
                bytes: u32::try_from(bytes.len()).unwrap(),
                fin: *fin,
                frame_end: *frame_end,
            };
            lane.extend(header.encode());
            lane.extend(bytes);
            let ack = LaneAck { lane: LaneId(1), delivered: *offset, received: 2 };
            let stop = LaneStop { lane: LaneId(1), reason: header.bytes };
            control.extend(ack.encode());
            control.extend(control_segment_head(&header));
            control.extend(bytes);
            control.extend(stop.encode());
            want.extend([Record::Ack(ack), Record::Stop(stop)]);
        }
        let (mut decoder, mut pieces) = (SegmentDecoder::new(), Vec::new());
        for chunk in lane.chunks(step) {
            let mut input = Bytes::copy_from_slice(chunk);
            while let Some(piece) = decoder.push(&mut input).unwrap() {
                pieces.push(piece);
            }
            prop_assert!(input.is_empty());
        }
        prop_assert!(decoder.is_at_boundary());
        prop_assert_eq!(whole(pieces), segments.clone());

        let (mut decoder, mut pieces, mut others) = (RecordDecoder::new(), Vec::new(), Vec::new());
        for chunk in control.chunks(step) {
            let mut input = Bytes::copy_from_slice(chunk);
            while let Some(record) = decoder.push(&mut input).unwrap() {
                match record {
                    Record::Control(piece) => pieces.push(piece),
                    other => others.push(other),
                }
            }
            prop_assert!(input.is_empty());
        }
        prop_assert!(decoder.is_at_boundary());
        prop_assert_eq!(whole(pieces), segments);
        prop_assert_eq!(others, want);
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut input = Bytes::from(bytes.clone());
        while let Ok(Some(_)) = SegmentDecoder::new().push(&mut input) {}
        let (mut decoder, mut input) = (RecordDecoder::new(), Bytes::from(bytes));
        while let Ok(Some(_)) = decoder.push(&mut input) {}
    }
}

#[test]
fn damaged_segments_and_records_are_refused() {
    let refused = |bytes: &[u8]| {
        let mut input = Bytes::copy_from_slice(bytes);
        RecordDecoder::new().push(&mut input).is_err()
    };
    let header = |bytes, fin| SegmentHeader {
        offset: 0,
        bytes,
        fin,
        frame_end: false,
    };
    assert!(refused(&[0; 8]), "type 0");
    assert!(refused(&[9, 0, 0, 0, 0, 0, 0, 0]), "unknown type");
    assert!(refused(&[2, 1, 0, 0, 24, 0, 0, 0]), "reserved");
    assert!(refused(&[2, 0, 0, 0, 25, 0, 0, 0]), "length");
    assert!(refused(&[3, 0, 0, 0, 255, 255, 255, 255]), "length");
    assert!(refused(&control_segment_head(&header(0, false))), "empty");
    assert!(!refused(&control_segment_head(&header(0, true))));
    let too_long = u32::try_from(SEGMENT_BYTES_MAX + 1).unwrap();
    assert!(refused(&control_segment_head(&header(too_long, false))));
    // The record's length and the segment's disagree.
    let mut record = control_segment_head(&header(5, false)).to_vec();
    record.extend([0; 10]);
    assert!(!refused(&record));
    for body in [20_u8, 22] {
        record[4] = body;
        let mut decoder = RecordDecoder::new();
        let mut input = Bytes::from(record.clone());
        let refused = loop {
            match decoder.push(&mut input) {
                Ok(Some(_)) => {}
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        assert!(refused, "body of {body}");
    }
    let mut flags = header(5, false).encode();
    flags[12] = 4;
    assert!(SegmentHeader::parse(&flags).is_err());
    let mut endless = header(5, false);
    endless.offset = u64::MAX - 5;
    assert!(SegmentHeader::parse(&endless.encode()).is_err());
}
