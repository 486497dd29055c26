//! Corruption, truncation, reordering and replay through the whole decode path: epochs as
//! the primary writes them, cut into segments over two links, damaged, put in order, decoded,
//! assembled. Whatever happens on the way, only epochs as they were sent come out, each once
//! and in order.

#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use interconnect::codec::{
    CodecChoice, DiskOp, DiskWrite, EncodePolicy, LinkFacts, PAGE_BYTES, Page, PageContent,
};
use interconnect::epoch::{EpochAssembler, EpochLimits, EpochMeta, EpochWriter, ReceivedEpoch};
use interconnect::frame::{self, Frame, FrameDecoder};
use interconnect::ids::{Epoch, Generation, VmId};
use interconnect::lane::links::{LinkMeasure, Links};
use interconnect::lane::receive::LaneReceiver;
use interconnect::lane::send::LaneSender;
use interconnect::lane::wire::SegmentDecoder;
use interconnect::lane::{LANE_WINDOW_BYTES, LaneClass, LaneId, LinkIndex, Micros};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::convert::Infallible;

const VM: VmId = VmId([9; 16]);
const GENERATION: Generation = Generation(4);
const FIRST: Epoch = Epoch(11);
const GUEST_PAGES: u64 = 512;
const EPOCHS: usize = 4;
const NOW: Micros = Micros(60_000_000);
const LINKS: [LinkIndex; 2] = [LinkIndex(0), LinkIndex(1)];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }
}

/// All of an epoch that must arrive as it was; its pages as they are once it was applied.
#[derive(PartialEq, Debug)]
struct Content {
    epoch: Epoch,
    pages: Vec<(u64, Page)>,
    disk: Vec<DiskWrite>,
    state: Bytes,
    meta: EpochMeta,
}

/// A guest's memory.
#[derive(Default)]
struct Memory(BTreeMap<u64, Page>);

impl Memory {
    fn apply(&mut self, epoch: &ReceivedEpoch) -> Content {
        let pages = epoch.pages().map(|(index, content)| {
            let page = self.0.entry(index).or_insert([0; PAGE_BYTES]);
            match content {
                PageContent::Zero => *page = [0; PAGE_BYTES],
                PageContent::Raw(raw) => *page = *raw,
                PageContent::Patch(patch) => patch.apply(page).unwrap(),
            }
            (index, *page)
        });
        Content {
            epoch: epoch.epoch,
            pages: pages.collect(),
            disk: epoch.disk.clone(),
            state: epoch.device_state.clone(),
            meta: epoch.meta.clone(),
        }
    }
}

/// A writer on a fresh lane.
fn writer(seed: u64) -> EpochWriter {
    let codec = [CodecChoice::Raw, CodecChoice::Lz4, CodecChoice::Zstd];
    let policy = EncodePolicy {
        codec: codec[Random(seed).below(3)],
        ..EncodePolicy::default()
    };
    EpochWriter::new(VM, GENERATION, policy)
}

/// A few epochs as frames, of a few hundred KiB.
fn epochs(seed: u64) -> Vec<Frame> {
    let mut random = Random(seed);
    let mut frames = Vec::new();
    let mut send = |frame: Frame| {
        frames.push(frame);
        Ok::<_, Infallible>(())
    };
    let mut writer = writer(seed);
    let mut epoch = FIRST;
    for _ in 0..EPOCHS {
        writer.begin(epoch, LinkFacts::default());
        epoch = epoch.next();
        let pages: Vec<_> = (0..random.below(60))
            .map(|_| {
                let mut page = [0; PAGE_BYTES];
                match random.below(3) {
                    0 => {}
                    1 => page.fill_with(|| random.next().to_le_bytes()[0]),
                    _ => page[..100].fill(7),
                }
                (random.next() % GUEST_PAGES, page)
            })
            .collect();
        let pages = pages.iter().map(|(index, page)| (*index, page));
        writer.pages(pages, &mut send).unwrap();
        let disk = DiskWrite {
            disk: 0,
            offset: 512,
            op: DiskOp::Data(vec![3; random.below(20_000)].into()),
        };
        writer.disk(&[disk], &mut send).unwrap();
        let state = vec![epoch.0.to_le_bytes()[0]; 1000];
        writer.device_state(state.into(), &mut send).unwrap();
        let meta = EpochMeta {
            clock_ns: random.next(),
            guest_pages: GUEST_PAGES,
            ..EpochMeta::default()
        };
        writer.finish(&meta, &mut send).unwrap();
    }
    frames
}

fn assembler() -> EpochAssembler {
    let limits = EpochLimits::for_guest(GUEST_PAGES, vec![1 << 20]);
    let mut assembler = EpochAssembler::new(GUEST_PAGES, limits);
    assembler.expect(VM, GENERATION, FIRST);
    assembler
}

/// What an assembler makes of frames, up to the first error.
fn assemble(frames: impl IntoIterator<Item = Frame>) -> (Vec<Content>, Result<(), String>) {
    let (mut assembler, mut memory, mut out) = (assembler(), Memory::default(), Vec::new());
    for frame in frames {
        match assembler.push(frame) {
            Ok(epoch) => out.extend(epoch.map(|epoch| memory.apply(&epoch))),
            Err(error) => return (out, Err(error.to_string())),
        }
    }
    (out, Ok(()))
}

fn whole(frames: &[Frame]) -> Vec<Content> {
    let (epochs, result) = assemble(frames.to_vec());
    assert_eq!((epochs.len(), result), (EPOCHS, Ok(())));
    epochs
}

/// The bytes of a lane's stream on each link. The second link dies at some point, and what
/// was on its way there comes over the first one, too.
fn streams(frames: &[Frame], random: &mut Random) -> [Vec<u8>; 2] {
    let (mut links, mut out) = (Links::new(), [Vec::new(), Vec::new()]);
    let mut sender = LaneSender::new(LaneClass::Epoch, u64::MAX, LANE_WINDOW_BYTES);
    for link in LINKS {
        links.up(link, NOW);
        sender.link_up(link);
        // Nothing is acknowledged here; there is room for all of it.
        let measure = LinkMeasure {
            capacity: Some(1 << 40),
            ..LinkMeasure::default()
        };
        links.measured(link, measure);
    }
    for frame in frames {
        let header = Bytes::copy_from_slice(&frame.header().unwrap());
        sender.push(header, frame.payload.clone(), None).unwrap();
    }
    sender.finish();
    let dies_after = random.below(12);
    for turn in 0.. {
        if turn == dies_after {
            links.down(LINKS[1], NOW);
            sender.link_down(LINKS[1]);
        }
        let first = random.below(2);
        let next = [LINKS[first], LINKS[1 - first]]
            .into_iter()
            .find_map(|link| Some((link, sender.next(link, &mut links, NOW)?)));
        let Some((link, segment)) = next else {
            break;
        };
        let stream = &mut out[usize::from(link.0)];
        stream.extend(segment.header.encode());
        for chunk in segment.chunks {
            stream.extend(&chunk);
        }
    }
    assert_eq!(sender.queued_bytes(), 0);
    out
}

/// Everything behind the network: pieces of the two streams in a random order to epochs, up
/// to the first error. Whether the lane came to its end.
fn receive(streams: [Vec<u8>; 2], random: &mut Random) -> (Vec<Content>, Result<bool, String>) {
    let mut streams = streams.map(Bytes::from);
    let mut segments = [SegmentDecoder::new(), SegmentDecoder::new()];
    let mut lane = LaneReceiver::new(LaneId(1), LANE_WINDOW_BYTES);
    let (mut decoder, mut assembler) = (FrameDecoder::new(), assembler());
    let (mut memory, mut out) = (Memory::default(), Vec::new());
    let mut take = |out: &mut Vec<Content>| -> Result<bool, String> {
        while !streams.iter().all(Bytes::is_empty) {
            let from = random.below(2);
            let bytes = random.below(5000).min(streams[from].len());
            let mut chunk = streams[from].split_to(bytes);
            while let Some(piece) = segments[from]
                .push(&mut chunk)
                .map_err(|error| error.to_string())?
            {
                lane.insert(LINKS[from], piece, NOW)
                    .map_err(|error| error.to_string())?;
            }
            while let Some(mut bytes) = lane.pop(NOW) {
                while !bytes.is_empty() {
                    let frame = decoder
                        .push(&mut bytes)
                        .map_err(|error| error.to_string())?;
                    let Some(frame) = frame else { continue };
                    let epoch = assembler.push(frame).map_err(|error| error.to_string())?;
                    out.extend(epoch.map(|epoch| memory.apply(&epoch)));
                }
            }
        }
        Ok(lane.is_finished() && decoder.is_at_boundary())
    };
    let result = take(&mut out);
    (out, result)
}

/// Only what was sent, in order, from the first on.
fn is_prefix(got: &[Content], sent: &[Content]) -> bool {
    got.len() <= sent.len() && got == &sent[..got.len()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn segments_in_any_order_over_links_that_die_make_the_same_epochs(seed in any::<u64>()) {
        let (frames, mut random) = (epochs(seed), Random(seed));
        let streams = streams(&frames, &mut random);
        let (got, result) = receive(streams, &mut random);
        prop_assert_eq!(result, Ok(true));
        prop_assert_eq!(got, whole(&frames));
    }

    #[test]
    fn no_damage_anywhere_makes_another_epoch(seed in any::<u64>()) {
        let (frames, mut random) = (epochs(seed), Random(seed));
        let mut streams = streams(&frames, &mut random);
        for _ in 0..=random.below(3) {
            let stream = &mut streams[random.below(2)];
            let at = random.below(stream.len());
            if let Some(byte) = stream.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        let (got, _) = receive(streams, &mut random);
        prop_assert!(is_prefix(&got, &whole(&frames)));
    }

    #[test]
    fn a_lane_cut_off_anywhere_makes_no_half_epoch(seed in any::<u64>()) {
        let (frames, mut random) = (epochs(seed), Random(seed));
        let mut streams = streams(&frames, &mut random);
        let cut = random.below(2);
        let keep = random.below(streams[cut].len());
        streams[cut].truncate(keep);
        let (got, result) = receive(streams, &mut random);
        prop_assert!(is_prefix(&got, &whole(&frames)));
        prop_assert!(result.is_ok(), "cut off is not damaged: {:?}", result);
    }

    #[test]
    fn frames_out_of_order_or_repeated_are_refused(seed in any::<u64>(), how in 0..4) {
        let (frames, mut random) = (epochs(seed), Random(seed));
        let sent = whole(&frames);
        let mut changed = frames.clone();
        let (one, other) = (random.below(frames.len()), random.below(frames.len()));
        match how {
            0 => changed.swap(one, other),
            1 => {
                let moved = changed.remove(one);
                changed.insert(other, moved);
            }
            2 => changed.insert(other, frames[one].clone()),
            // All of it again, from some frame on.
            _ => changed.extend_from_slice(&frames[one..]),
        }
        let (got, result) = assemble(changed.clone());
        prop_assert!(is_prefix(&got, &sent));
        prop_assert_eq!(changed == frames, result.is_ok(), "{:?}", result);
    }
}

#[test]
fn every_byte_of_a_frame_is_covered() {
    // The smallest whole epoch, each of its bytes damaged in turn.
    let mut bytes = BytesMut::new();
    let mut writer = writer(0);
    let mut frames = Vec::new();
    let mut send = |frame: Frame| {
        frames.push(frame);
        Ok::<_, Infallible>(())
    };
    writer.begin(FIRST, LinkFacts::default());
    let page = [5; PAGE_BYTES];
    writer.pages([(3, &page)].into_iter(), &mut send).unwrap();
    writer
        .device_state(Bytes::from_static(b"devices"), &mut send)
        .unwrap();
    let meta = EpochMeta {
        guest_pages: GUEST_PAGES,
        ..EpochMeta::default()
    };
    writer.finish(&meta, &mut send).unwrap();
    for frame in &frames {
        frame::encode(frame, &mut bytes).unwrap();
    }
    let decode = |bytes: &[u8]| {
        let (mut decoder, mut rest, mut assembler) = (FrameDecoder::new(), bytes, assembler());
        let mut epochs = 0;
        while !rest.is_empty() {
            match decoder.push(&mut rest) {
                Ok(Some(frame)) => match assembler.push(frame) {
                    Ok(epoch) => epochs += usize::from(epoch.is_some()),
                    Err(_) => return epochs,
                },
                Ok(None) => {}
                Err(_) => return epochs,
            }
        }
        epochs
    };
    assert_eq!(decode(&bytes), 1);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert_eq!(decode(&damaged), 0, "byte {at}, bit {bit}");
        }
        assert_eq!(decode(&bytes[..at]), 0, "cut off at {at}");
    }
}
