//! Whole epochs come through; anything else is refused and leaves no trace.

use super::super::{AuditSums, EncodePool, EpochMeta, EpochWriter, SeedWriter, ingress_frames};
use super::*;
use crate::codec::tests::noise;
use crate::codec::{CodecChoice, DiskOp, EncodePolicy, LinkFacts, Page, PageContent};
use std::convert::Infallible;

const VM: VmId = VmId([7; 16]);
const GENERATION: Generation = Generation(3);
const GUEST_PAGES: u64 = 4096;

fn meta() -> EpochMeta {
    EpochMeta {
        flush: true,
        clock_ns: 123_456_789,
        guest_pages: GUEST_PAGES,
        audit: Some(AuditSums {
            memory: 1,
            disks: vec![2, 3],
        }),
    }
}

fn page(seed: u64) -> Page {
    let mut page = [0; 4096];
    match seed % 3 {
        0 => {}
        1 => page.fill(u8::try_from(seed % 251).unwrap()),
        _ => page.copy_from_slice(&noise(seed, 4096)),
    }
    page
}

fn pages(epoch: Epoch) -> Vec<(u64, Page)> {
    (0..600)
        .map(|i| (i * 5 + epoch.0, page(i + epoch.0)))
        .collect()
}

fn writes(epoch: Epoch) -> Vec<DiskWrite> {
    vec![
        DiskWrite {
            disk: 0,
            offset: 512 * epoch.0,
            op: DiskOp::Data(noise(epoch.0, 3 << 20).into()),
        },
        DiskWrite {
            disk: 1,
            offset: 0,
            op: DiskOp::Zero { length: 4096 },
        },
        DiskWrite {
            disk: 1,
            offset: 8192,
            op: DiskOp::Trim { length: 4096 },
        },
    ]
}

fn state(epoch: Epoch) -> Bytes {
    let mut state = noise(1, 30_000);
    state[100] = epoch.0.to_le_bytes()[0];
    state.into()
}

fn frames(writer: &mut EpochWriter, epoch: Epoch) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut send = |frame| {
        frames.push(frame);
        Ok::<(), Infallible>(())
    };
    writer.begin(epoch, LinkFacts::default());
    writer
        .pages(pages(epoch).iter().map(|(i, p)| (*i, p)), &mut send)
        .unwrap();
    writer.disk(&writes(epoch), &mut send).unwrap();
    writer.device_state(state(epoch), &mut send).unwrap();
    writer.finish(&meta(), &mut send).unwrap();
    frames
}

fn writer() -> EpochWriter {
    EpochWriter::new(VM, GENERATION, EncodePolicy::v1(CodecChoice::Zstd))
}

fn assembler() -> EpochAssembler {
    let mut assembler = EpochAssembler::new(
        GUEST_PAGES,
        EpochLimits::for_guest(GUEST_PAGES, vec![64 << 20, 64 << 20]),
    );
    assembler.expect(VM, GENERATION, Epoch(1));
    assembler
}

fn push_all(
    assembler: &mut EpochAssembler,
    frames: &[Frame],
) -> Result<Option<ReceivedEpoch>, EpochError> {
    let mut whole = None;
    for frame in frames {
        assert!(whole.is_none());
        whole = assembler.push(frame.clone())?;
    }
    Ok(whole)
}

fn check(received: &ReceivedEpoch, epoch: Epoch) {
    assert_eq!(
        (received.vm, received.generation, received.epoch),
        (VM, GENERATION, epoch)
    );
    let got: Vec<(u64, Page)> = received
        .pages()
        .map(|(index, content)| {
            (
                index,
                match content {
                    PageContent::Zero => [0; 4096],
                    PageContent::Raw(page) => *page,
                    PageContent::Patch(_) => panic!("no page is sent twice"),
                },
            )
        })
        .collect();
    assert!(got == pages(epoch));
    assert_eq!(received.page_count(), 600);
    let data: Vec<u8> = received
        .disk
        .iter()
        .filter_map(|write| match &write.op {
            DiskOp::Data(data) => Some(data.to_vec()),
            _ => None,
        })
        .flatten()
        .collect();
    assert!(data == noise(epoch.0, 3 << 20));
    assert_eq!(received.disk[0].offset, 512 * epoch.0);
    assert_eq!(received.disk.last(), writes(epoch).last());
    assert_eq!(received.device_state, state(epoch));
    assert_eq!(received.meta, meta());
}

#[test]
fn epochs_come_through_whole_and_in_order() {
    let (mut writer, mut assembler) = (writer(), assembler());
    let mut state_bytes = Vec::new();
    for epoch in (1..4).map(Epoch) {
        let frames = frames(&mut writer, epoch);
        state_bytes.push(
            frames
                .iter()
                .find(|f| f.kind == FrameKind::DeviceState)
                .unwrap()
                .payload
                .len(),
        );
        let received = push_all(&mut assembler, &frames).unwrap().expect("whole");
        check(&received, epoch);
    }
    assert!(
        state_bytes[0] > 20_000 && state_bytes[1] < 200,
        "first full, then delta: {state_bytes:?}"
    );
}

#[test]
fn any_missing_swapped_or_repeated_frame_is_refused() {
    let frames = frames(&mut writer(), Epoch(1));
    assert!(frames.len() > 6);
    let mut broken = Vec::new();
    for i in 0..frames.len() - 1 {
        let mut missing = frames.clone();
        missing.remove(i);
        broken.push(missing);
        let mut swapped = frames.clone();
        swapped.swap(i, i + 1);
        broken.push(swapped);
        let mut repeated = frames.clone();
        repeated.insert(i, frames[i].clone());
        broken.push(repeated);
    }
    for broken in &broken {
        let mut assembler = assembler();
        let mut refused = false;
        for frame in broken {
            match assembler.push(frame.clone()) {
                Ok(whole) => assert!(whole.is_none()),
                Err(_) => {
                    refused = true;
                    break;
                }
            }
        }
        assert!(refused);
        // No trace: the right epoch is taken afterwards.
        check(
            &push_all(&mut assembler, &frames).unwrap().expect("whole"),
            Epoch(1),
        );
    }
}

#[test]
fn content_that_changed_after_its_crc_is_refused_by_the_digest() {
    let mut frames = frames(&mut writer(), Epoch(1));
    let mut payload = frames[0].payload.to_vec();
    let last = payload.len() - 1;
    payload[last] ^= 1;
    frames[0].payload = payload.into();
    assert!(matches!(
        push_all(&mut assembler(), &frames),
        Err(EpochError::Totals { .. } | EpochError::Codec { .. })
    ));
}

#[test]
fn replayed_skipped_and_foreign_epochs_are_refused() {
    let (mut writer, mut assembler) = (writer(), assembler());
    let first = frames(&mut writer, Epoch(1));
    let second = frames(&mut writer, Epoch(2));
    let third = frames(&mut writer, Epoch(3));
    assert!(matches!(
        push_all(&mut assembler, &second),
        Err(EpochError::Order { .. })
    ));
    push_all(&mut assembler, &first).unwrap().expect("whole");
    assert!(matches!(
        push_all(&mut assembler, &first),
        Err(EpochError::Order { .. })
    ));
    assert!(matches!(
        push_all(&mut assembler, &third),
        Err(EpochError::Order { .. })
    ));
    let foreign = Frame {
        generation: Generation(2),
        ..second[0].clone()
    };
    assert_eq!(
        assembler.push(foreign).unwrap_err(),
        EpochError::Generation {
            expected: GENERATION,
            found: Generation(2)
        }
    );
    let other_vm = Frame {
        vm: VmId([8; 16]),
        ..second[0].clone()
    };
    assert!(matches!(
        assembler.push(other_vm),
        Err(EpochError::Vm { .. })
    ));
    let seed = Frame {
        kind: FrameKind::SeedPages,
        ..second[0].clone()
    };
    assert_eq!(
        assembler.push(seed).unwrap_err(),
        EpochError::Kind(FrameKind::SeedPages)
    );
    check(
        &push_all(&mut assembler, &second).unwrap().expect("whole"),
        Epoch(2),
    );
}

#[test]
fn nothing_is_taken_before_it_is_expected() {
    let mut assembler =
        EpochAssembler::new(GUEST_PAGES, EpochLimits::for_guest(GUEST_PAGES, vec![]));
    let frames = frames(&mut writer(), Epoch(1));
    assert_eq!(
        push_all(&mut assembler, &frames).unwrap_err(),
        EpochError::NotExpecting(FrameKind::Pages)
    );
}

#[test]
fn a_half_epoch_is_dropped_and_its_memory_given_back() {
    let mut assembler = assembler();
    let frames = frames(&mut writer(), Epoch(1));
    assert!(
        push_all(&mut assembler, &frames[..frames.len() - 1])
            .unwrap()
            .is_none()
    );
    assert!(assembler.held_bytes() > 3 << 20);
    assembler.reset();
    assert_eq!(assembler.held_bytes(), 0);
    assert_eq!(assembler.next_epoch(), Some((VM, GENERATION, Epoch(1))));
    check(
        &push_all(&mut assembler, &frames).unwrap().expect("whole"),
        Epoch(1),
    );
}

#[test]
fn a_new_lane_starts_with_a_full_state() {
    let mut assembler = assembler();
    push_all(&mut assembler, &frames(&mut writer(), Epoch(1)))
        .unwrap()
        .expect("whole");
    assembler.reset();
    let received = push_all(&mut assembler, &frames(&mut writer(), Epoch(2)))
        .unwrap()
        .expect("whole");
    check(&received, Epoch(2));
}

#[test]
fn a_delta_against_a_lost_epoch_is_refused() {
    let mut writer = writer();
    frames(&mut writer, Epoch(1));
    let second = frames(&mut writer, Epoch(2));
    let mut assembler = assembler();
    assembler.expect(VM, GENERATION, Epoch(2));
    assert!(matches!(
        push_all(&mut assembler, &second),
        Err(EpochError::Codec {
            source: CodecError::DeltaBase { .. },
            ..
        })
    ));
}

#[test]
fn an_epoch_beyond_its_limit_is_refused() {
    let limits = EpochLimits {
        epoch_bytes_max: 1 << 20,
        ..EpochLimits::for_guest(GUEST_PAGES, vec![64 << 20; 2])
    };
    let mut assembler = EpochAssembler::new(GUEST_PAGES, limits);
    assembler.expect(VM, GENERATION, Epoch(1));
    let result = push_all(&mut assembler, &frames(&mut writer(), Epoch(1)));
    assert!(matches!(
        result,
        Err(EpochError::TooBig { max: 1_048_576, .. })
    ));
    assert_eq!(assembler.held_bytes(), 0);
}

#[test]
fn another_guest_size_is_refused() {
    let mut assembler = EpochAssembler::new(
        GUEST_PAGES + 1,
        EpochLimits::for_guest(GUEST_PAGES, vec![64 << 20; 2]),
    );
    assembler.expect(VM, GENERATION, Epoch(1));
    assert!(matches!(
        push_all(&mut assembler, &frames(&mut writer(), Epoch(1))),
        Err(EpochError::GuestPages { .. })
    ));
}

fn ingress(epoch: u64, packets: &[&'static [u8]]) -> Frame {
    let packets: Vec<Bytes> = packets.iter().map(|p| Bytes::from_static(p)).collect();
    ingress_frames(VM, GENERATION, Epoch(epoch), &packets)
        .unwrap()
        .remove(0)
}

#[test]
fn ingress_of_open_epochs_can_be_replayed() {
    let (mut writer, mut assembler) = (writer(), assembler());
    let first = frames(&mut writer, Epoch(1));
    assembler.push(ingress(1, &[b"a"])).unwrap();
    assembler.push(first[0].clone()).unwrap();
    // The next epoch runs already while this one is on its way.
    assembler.push(ingress(2, &[b"b", b"c"])).unwrap();
    assert_eq!(assembler.open_ingress(), [&b"a"[..], b"b", b"c"]);
    let received = push_all(&mut assembler, &first[1..])
        .unwrap()
        .expect("whole");
    assert_eq!(received.ingress, [&b"a"[..]]);
    assembler.push(ingress(1, &[b"late"])).unwrap();
    assembler.reset();
    assert_eq!(assembler.open_ingress(), [&b"b"[..], b"c"]);
    assert!(matches!(
        assembler.push(ingress(9, &[b"x"])),
        Err(EpochError::Order { .. })
    ));
}

#[test]
fn ingress_is_bounded_and_the_oldest_goes_first() {
    let mut assembler = assembler();
    assembler.limits.ingress_bytes_max = 10 * (ITEM_BYTES + 4);
    for n in 0..100u32 {
        let packets = [Bytes::copy_from_slice(&n.to_le_bytes())];
        let epoch = Epoch(1 + u64::from(n) / 50);
        for frame in ingress_frames(VM, GENERATION, epoch, &packets).unwrap() {
            assembler.push(frame).unwrap();
        }
    }
    let kept = assembler.open_ingress();
    assert_eq!(kept.len(), 10);
    assert_eq!(kept[0], Bytes::copy_from_slice(&90u32.to_le_bytes()));
    assert_eq!(assembler.ingress_dropped(), 90);
}

#[test]
fn the_writer_refuses_calls_out_of_order() {
    let mut writer = writer();
    let mut send = |_| Ok::<(), Infallible>(());
    assert!(writer.disk(&[], &mut send).is_err());
    writer.begin(Epoch(1), LinkFacts::default());
    assert!(writer.finish(&meta(), &mut send).is_err());
    writer.device_state(state(Epoch(1)), &mut send).unwrap();
    assert!(writer.device_state(state(Epoch(1)), &mut send).is_err());
    assert!(writer.pages(std::iter::empty(), &mut send).is_err());
    writer.finish(&meta(), &mut send).unwrap();
    assert!(writer.finish(&meta(), &mut send).is_err());
}

#[test]
fn damaged_epoch_ends_are_refused() {
    let frames = frames(&mut writer(), Epoch(1));
    let end = frames.last().unwrap();
    for at in 0..end.payload.len() {
        // flags bit 0 (flush), the clock and the audit sums stand for themselves
        if at == 0 || (32..40).contains(&at) || at >= 72 {
            continue;
        }
        let mut payload = end.payload.to_vec();
        payload[at] ^= 0x10;
        let mut broken = frames.clone();
        broken.last_mut().unwrap().payload = payload.into();
        assert!(push_all(&mut assembler(), &broken).is_err(), "byte {at}");
    }
}

/// The guest's memory at an epoch: most pages keep most of their bytes.
fn evolving(epoch: u64) -> Vec<(u64, Page)> {
    (0..700)
        .map(|index| {
            let mut page = [0; 4096];
            page.copy_from_slice(&noise(index % 9 + 1, 4096));
            page[..8].copy_from_slice(&(epoch * index).to_le_bytes());
            if (index + epoch).is_multiple_of(50) {
                page.fill(0);
            }
            (index * 3, page)
        })
        .collect()
}

/// The frames of an epoch of nothing but pages and a state.
fn page_frames(writer: &mut EpochWriter, epoch: u64, pages: &[(u64, Page)]) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut send = |frame| {
        frames.push(frame);
        Ok::<(), Infallible>(())
    };
    writer.begin(Epoch(epoch), LinkFacts::default());
    writer
        .pages(pages.iter().map(|(index, page)| (*index, page)), &mut send)
        .unwrap();
    writer.device_state(state(Epoch(epoch)), &mut send).unwrap();
    writer.finish(&meta(), &mut send).unwrap();
    frames
}

/// What the standby does with an epoch.
fn apply(ram: &mut [Page], received: &ReceivedEpoch) -> Result<(), CodecError> {
    for (index, content) in received.pages() {
        let page = &mut ram[usize::try_from(index).unwrap()];
        match content {
            PageContent::Zero => *page = [0; 4096],
            PageContent::Raw(new) => *page = *new,
            PageContent::Patch(patch) => patch.apply(page)?,
        }
    }
    Ok(())
}

fn adaptive(codec: CodecChoice) -> EncodePolicy {
    EncodePolicy {
        codec,
        ..EncodePolicy::default()
    }
}

#[test]
fn epochs_of_patches_leave_the_standby_equal() {
    for codec in CodecChoice::ALL {
        for threads in [1, 3] {
            let pool = EncodePool::start(threads).unwrap();
            let mut writer = EpochWriter::with_pool(VM, GENERATION, adaptive(codec), pool);
            let (mut assembler, mut ram) = (assembler(), vec![[0; 4096]; 4096]);
            for epoch in 1..20 {
                let pages = evolving(epoch);
                let frames = page_frames(&mut writer, epoch, &pages);
                let received = push_all(&mut assembler, &frames).unwrap().expect("whole");
                let order = received.pages().map(|(index, _)| index);
                assert!(order.is_sorted(), "the order they were given in");
                apply(&mut ram, &received).unwrap();
                for (index, page) in &pages {
                    assert!(
                        ram[usize::try_from(*index).unwrap()] == *page,
                        "page {index}"
                    );
                }
                let stats = writer.stats();
                assert_eq!((stats.epoch, stats.pages()), (Epoch(epoch), 700));
                assert_eq!(stats.raw + stats.packed > 600, epoch == 1, "{stats:?}");
                let pages = frames.iter().filter(|frame| frame.kind == FrameKind::Pages);
                let bytes: usize = pages.map(|frame| frame.payload.len()).sum();
                assert_eq!(stats.page_wire_bytes, bytes as u64);
            }
        }
    }
}

#[test]
fn an_epoch_given_up_is_no_base() {
    let mut writer = EpochWriter::new(VM, GENERATION, adaptive(CodecChoice::Raw));
    let (mut assembler, mut ram) = (assembler(), vec![[0; 4096]; 4096]);
    let first = page_frames(&mut writer, 1, &evolving(1));
    let received = push_all(&mut assembler, &first).unwrap().expect("whole");
    apply(&mut ram, &received).unwrap();
    // The second breaks off after a few batches, which nobody will apply.
    let mut left = 2;
    writer.begin(Epoch(2), LinkFacts::default());
    let pages = evolving(2);
    let broken = writer.pages(pages.iter().map(|(i, p)| (*i, p)), &mut |_| {
        left -= 1;
        if left > 0 {
            Ok(())
        } else {
            Err("the lane is gone")
        }
    });
    assert!(matches!(
        broken,
        Err(super::super::WriteError::Send("the lane is gone"))
    ));
    let again = page_frames(&mut writer, 2, &evolving(3));
    assert_eq!(writer.stats().patched, 0, "nothing is known of the standby");
    let received = push_all(&mut assembler, &again).unwrap().expect("whole");
    apply(&mut ram, &received).unwrap();
    assert!(
        evolving(3)
            .iter()
            .all(|(i, page)| ram[usize::try_from(*i).unwrap()] == *page)
    );
}

#[test]
fn epochs_out_of_order_are_refused_by_their_patches() {
    let mut writer = EpochWriter::new(VM, GENERATION, adaptive(CodecChoice::Lz4));
    let mut assembler = assembler();
    let mut received = |epoch| {
        let frames = page_frames(&mut writer, epoch, &evolving(epoch));
        push_all(&mut assembler, &frames).unwrap().expect("whole")
    };
    let (first, second, third) = (received(1), received(2), received(3));
    let mut ram = vec![[0; 4096]; 4096];
    apply(&mut ram, &first).unwrap();
    let mut early = ram.clone();
    // The third one's patches say all bytes that changed since the second; that a page
    // was something else in between must show.
    let refused = apply(&mut early, &third);
    assert!(
        matches!(refused, Err(CodecError::PatchBase { .. })),
        "{refused:?}"
    );
    apply(&mut ram, &second).unwrap();
    apply(&mut ram, &third).unwrap();
}

#[test]
fn a_seeding_is_read_page_by_page_and_sends_no_patches() {
    for threads in [1, 2] {
        let pool = EncodePool::start(threads).unwrap();
        let mut writer = SeedWriter::new(VM, GENERATION, EncodePolicy::default(), pool);
        let mut ram = vec![[0; 4096]; 4096];
        for round in 1..4 {
            let pages = evolving(round);
            let mut frames = Vec::new();
            writer.choose(LinkFacts::default());
            writer
                .pages(pages.iter().map(|(i, p)| (*i, p)), &mut |frame: Frame| {
                    frames.push(frame);
                    Ok::<(), Infallible>(())
                })
                .unwrap();
            for frame in frames {
                assert_eq!(frame.kind, FrameKind::SeedPages);
                crate::codec::decode_pages(&frame.payload, 4096, |index, content| {
                    ram[usize::try_from(index).unwrap()] = match content {
                        PageContent::Zero => [0; 4096],
                        PageContent::Raw(page) => *page,
                        PageContent::Patch(_) => panic!("a patch in a seeding"),
                    };
                })
                .unwrap();
            }
            assert!(
                pages
                    .iter()
                    .all(|(i, page)| ram[usize::try_from(*i).unwrap()] == *page)
            );
        }
    }
}
