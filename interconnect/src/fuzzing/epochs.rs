//! Epochs from frames of any content, and from whole epochs that were tampered with.

use super::{DISK_BYTES, GUEST_PAGES, Script, VM, frame_of};
use crate::codec::{
    CodecChoice, DiskOp, DiskWrite, EncodePolicy, LinkFacts, PAGE_BYTES, Page, PageContent,
};
use crate::epoch::{EpochAssembler, EpochLimits, EpochMeta, EpochWriter, ReceivedEpoch};
use crate::frame::{Frame, FrameKind};
use crate::ids::{Epoch, Generation};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::convert::Infallible;

/// Epochs of a run.
const EPOCHS: u64 = 3;
/// Frames of a run, at most.
const FRAMES_MAX: usize = 256;

pub(super) fn epoch_end(data: &[u8]) {
    crate::epoch::fuzz_end(data);
}

fn assembler() -> EpochAssembler {
    let mut limits = EpochLimits::for_guest(GUEST_PAGES, DISK_BYTES.to_vec());
    limits.epoch_bytes_max = 4 << 20;
    limits.ingress_bytes_max = 64 << 10;
    let mut assembler = EpochAssembler::new(GUEST_PAGES, limits);
    assembler.expect(VM, Generation(1), Epoch(1));
    assembler
}

/// Byte 0: 0 frames of any content, 1 epochs that are tampered with.
pub(super) fn epoch(data: &[u8]) {
    let mut script = Script(data);
    if script.u8() & 1 == 0 {
        any_frames(script);
    } else {
        tampered(script);
    }
}

fn any_frames(mut script: Script<'_>) {
    let mut assembler = assembler();
    for _ in 0..FRAMES_MAX {
        if script.is_empty() {
            return;
        }
        let (kind, epoch) = (script.u8() & 0xf, u64::from(script.u8()));
        let bytes = usize::from(script.u16());
        let payload = script.take(bytes);
        let Some(kind) = FrameKind::from_wire(kind) else {
            continue;
        };
        let _ = assembler.push(frame_of(kind, epoch, payload));
        assert!(assembler.held_bytes() <= (4 << 20) + (64 << 10) + (2 << 20));
    }
}

/// What an epoch holds, but for what its last frame says of it; its pages as they are once
/// it was applied.
#[derive(PartialEq, Debug, Default)]
struct Content {
    pages: Vec<(u64, Page)>,
    disk: Vec<DiskWrite>,
    state: Bytes,
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
                PageContent::Patch(patch) => {
                    patch.apply(page).expect("a patch in its order applies");
                }
            }
            (index, *page)
        });
        Content {
            pages: pages.collect(),
            disk: epoch.disk.clone(),
            state: epoch.device_state.clone(),
        }
    }
}

/// Write an epoch from the script.
fn write(script: &mut Script<'_>, writer: &mut EpochWriter, frames: &mut Vec<Frame>) {
    let mut send = |frame: Frame| {
        frames.push(frame);
        Ok::<_, Infallible>(())
    };
    let shape = script.u8();
    let pages: Vec<_> = (0..u64::from(shape & 7))
        .map(|_| {
            let mut page = [0; PAGE_BYTES];
            let (index, bytes) = (u64::from(script.u8()), usize::from(script.u8()));
            let content = script.take(bytes);
            page[..content.len()].copy_from_slice(content);
            (index, page)
        })
        .collect();
    let writes: Vec<_> = (0..shape >> 3 & 3)
        .map(|at| DiskWrite {
            disk: u16::from(at & 1),
            offset: u64::from(script.u8()) * 16,
            op: DiskOp::Data(Bytes::copy_from_slice(script.take(usize::from(shape)))),
        })
        .collect();
    let state = Bytes::copy_from_slice(script.take(usize::from(shape >> 5) * 16));
    let meta = EpochMeta {
        guest_pages: GUEST_PAGES,
        ..EpochMeta::default()
    };
    let pages = pages.iter().map(|(index, page)| (*index, page));
    writer
        .pages(pages, &mut send)
        .and_then(|()| writer.disk(&writes, &mut send))
        .and_then(|()| writer.device_state(state, &mut send))
        .and_then(|()| writer.finish(&meta, &mut send))
        .expect("an epoch within all limits");
}

/// Epochs made from the script, whole; then some frames are dropped, doubled, moved, changed
/// or moved into another epoch. Only whole epochs as they were sent may come out, in order.
fn tampered(mut script: Script<'_>) {
    let codec = match script.u8() & 3 {
        0 => CodecChoice::Raw,
        1 => CodecChoice::Lz4,
        _ => CodecChoice::Zstd,
    };
    let policy = EncodePolicy {
        codec,
        ..EncodePolicy::default()
    };
    let mut writer = EpochWriter::new(VM, Generation(1), policy);
    let mut frames = Vec::new();
    for epoch in 1..=EPOCHS {
        writer.begin(Epoch(epoch), LinkFacts::default());
        write(&mut script, &mut writer, &mut frames);
    }
    let (mut sent, mut memory) = (Vec::new(), Memory::default());
    let mut whole = assembler();
    for frame in &frames {
        let epoch = whole.push(frame.clone()).expect("an epoch as it was sent");
        sent.extend(epoch.map(|epoch| memory.apply(&epoch)));
    }
    assert_eq!(sent.len() as u64, EPOCHS);

    while !script.is_empty() && !frames.is_empty() && frames.len() < FRAMES_MAX {
        let (op, at, to) = (script.u8(), script.u8(), script.u8());
        let (at, to_frame) = (
            usize::from(at) % frames.len(),
            usize::from(to) % frames.len(),
        );
        match op % 5 {
            0 => drop(frames.remove(at)),
            1 => frames.insert(to_frame, frames[at].clone()),
            2 => frames.swap(at, to_frame),
            3 => frames[at].epoch = Epoch(u64::from(to & 7)),
            _ => {
                let mut payload = frames[at].payload.to_vec();
                let place = usize::from(script.u16()) % payload.len().max(1);
                if let Some(byte) = payload.get_mut(place) {
                    *byte ^= to;
                }
                frames[at].payload = payload.into();
            }
        }
    }
    let (mut assembler, mut memory, mut next) = (assembler(), Memory::default(), 1);
    for frame in frames {
        if let Ok(Some(epoch)) = assembler.push(frame) {
            assert_eq!(epoch.epoch, Epoch(next));
            let as_sent = sent.get(usize::try_from(next).unwrap_or(0) - 1);
            assert_eq!(Some(&memory.apply(&epoch)), as_sent);
            next += 1;
        }
    }
}
