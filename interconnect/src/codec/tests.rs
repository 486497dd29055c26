//! Round trips and hostile input for every batch layout.

use super::disk::{BATCH_BODY_BYTES_MAX, DISK_WRITE_BYTES_MAX, split_write};
use super::pages::{BATCH_PAGES_MAX, PAGE_INDEX_END};
use super::*;
use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

/// Bytes without pattern, the same for the same seed (xorshift64).
pub(crate) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        })
        .collect()
}

/// A zero, sparse, text-like or random page.
fn page(kind: u8, seed: u64) -> Box<Page> {
    let mut page = Box::new([0; PAGE_BYTES]);
    match kind % 4 {
        0 => {}
        1 => page[(seed % 4096) as usize] = 1,
        2 => page.iter_mut().enumerate().for_each(|(i, b)| {
            *b = b"abcdefgh 0123456"[(i + usize::from(seed.to_le_bytes()[0])) % 16]
        }),
        _ => page.copy_from_slice(&noise(seed, PAGE_BYTES)),
    }
    page
}

const POLICIES: [(CodecChoice, CodecVersion); 6] = [
    (CodecChoice::Raw, CodecVersion::V1),
    (CodecChoice::Zstd, CodecVersion::V1),
    (CodecChoice::Auto, CodecVersion::V1),
    (CodecChoice::Raw, CodecVersion::V2),
    (CodecChoice::Zstd, CodecVersion::V2),
    (CodecChoice::Auto, CodecVersion::V2),
];

fn policy(which: usize) -> EncodePolicy {
    let (codec, version) = POLICIES[which % POLICIES.len()];
    EncodePolicy {
        codec,
        version,
        ..EncodePolicy::default()
    }
}

fn encode_with(encoder: &mut PageEncoder, pages: &[(u64, Box<Page>)]) -> Vec<Bytes> {
    let mut iter = pages.iter().map(|(index, page)| (*index, &**page));
    let mut batches = Vec::new();
    while let Some(batch) = encoder.encode(&mut iter).unwrap() {
        assert_eq!(batch.stats.bytes, batch.payload.len() as u64);
        if !batch.payload.is_empty() {
            batches.push(batch.payload);
        }
    }
    batches
}

fn encode_all(pages: &[(u64, Box<Page>)], policy: EncodePolicy) -> Vec<Bytes> {
    encode_with(&mut PageEncoder::new(policy), pages)
}

/// Apply batches to the standby's memory.
fn apply_all(batches: &[Bytes], ram: &mut [Page]) -> Result<(), CodecError> {
    for batch in batches {
        let mut failed = None;
        decode_pages(batch, ram.len() as u64, |index, content| {
            let page = &mut ram[usize::try_from(index).unwrap()];
            match content {
                PageContent::Zero => *page = [0; PAGE_BYTES],
                PageContent::Raw(new) => *page = *new,
                PageContent::Patch(patch) => failed = failed.take().or(patch.apply(page).err()),
            }
        })?;
        failed.map_or(Ok(()), Err)?;
    }
    Ok(())
}

fn decode_all(batches: &[Bytes], guest_pages: u64) -> Result<Vec<(u64, Box<Page>)>, CodecError> {
    let mut pages = Vec::new();
    for batch in batches {
        decode_pages(batch, guest_pages, |index, content| {
            pages.push((
                index,
                Box::new(match content {
                    PageContent::Zero => [0; PAGE_BYTES],
                    PageContent::Raw(page) => *page,
                    // Not known here what it is a patch on.
                    PageContent::Patch(_) => [0xee; PAGE_BYTES],
                }),
            ));
        })?;
    }
    Ok(pages)
}

#[test]
fn page_classes_are_chosen_by_content() {
    let pages: Vec<_> = (0..4)
        .map(|kind| (u64::from(kind), page(kind, 99)))
        .collect();
    for which in [1, 4, 5] {
        let batch = PageEncoder::new(policy(which))
            .encode(&mut pages.iter().map(|(i, p)| (*i, &**p)))
            .unwrap()
            .unwrap();
        let stats = batch.stats;
        assert_eq!((stats.zero, stats.packed, stats.raw), (1, 2, 1));
        assert!(batch.payload.len() < PAGE_BYTES + 512, "{stats:?}");
    }
}

#[test]
fn many_pages_make_many_batches() {
    let pages: Vec<_> = (0..700).map(|i| (i, page((i % 4) as u8, i))).collect();
    for which in 0..POLICIES.len() {
        let batches = encode_all(&pages, policy(which));
        assert_eq!(batches.len(), 700usize.div_ceil(BATCH_PAGES_MAX));
        assert_eq!(decode_all(&batches, 700).unwrap(), pages);
    }
}

#[test]
fn page_index_is_checked_against_the_guest() {
    for which in 0..POLICIES.len() {
        let batches = encode_all(&[(9, page(3, 1)), (10, page(0, 1))], policy(which));
        assert!(decode_all(&batches, 11).is_ok());
        assert_eq!(
            decode_all(&batches, 10).unwrap_err(),
            CodecError::PageIndex {
                index: 10,
                guest_pages: 10
            }
        );
    }
    let zero = [0; PAGE_BYTES];
    let mut encoder = PageEncoder::new(policy(0));
    assert!(
        encoder
            .encode(&mut [(PAGE_INDEX_END, &zero)].into_iter())
            .is_err()
    );
}

#[test]
fn packed_size_is_what_the_classes_say() {
    // Two packed pages; claim that one of them is zero: the zstd frame is too long.
    let mut batch = encode_all(&[(0, page(2, 1)), (1, page(2, 2))], policy(1))[0].to_vec();
    batch[8] = 1;
    assert!(matches!(
        decode_all(&[Bytes::from(batch)], 2).unwrap_err(),
        CodecError::Compression { .. }
    ));
}

#[test]
fn an_old_partner_is_sent_what_it_reads() {
    let pages: Vec<_> = (0..40).map(|i| (i, page((i % 4) as u8, i))).collect();
    for which in 0..3 {
        let mut encoder = PageEncoder::new(policy(which));
        encoder.set_codec(Codec::Lz4);
        // The second time they are all unchanged: an old partner gets them whole again.
        for _ in 0..2 {
            for batch in encode_with(&mut encoder, &pages) {
                assert_eq!(batch[2..4], [0, 0], "reserved in version 1");
                let table = &batch[8..8 + 40 * 8];
                assert!(table.chunks(8).all(|entry| (1..=3).contains(&entry[0])));
            }
        }
    }
}

#[test]
fn patches_and_their_edges() {
    let mut ram = vec![[0; PAGE_BYTES]; 8];
    let mut encoder = PageEncoder::new(policy(5));
    let mut content = page(3, 5);
    let mut send = |pages: &[(u64, Box<Page>)], ram: &mut [Page]| {
        let mut iter = pages.iter().map(|(index, page)| (*index, &**page));
        let batch = encoder.encode(&mut iter).unwrap().unwrap();
        if !batch.payload.is_empty() {
            apply_all(std::slice::from_ref(&batch.payload), ram).unwrap();
        }
        batch
    };
    let first = send(&[(3, content.clone())], &mut ram);
    assert_eq!((first.stats.raw, first.stats.patched), (1, 0));
    content[77] ^= 1;
    let second = send(&[(3, content.clone())], &mut ram);
    assert_eq!((second.stats.raw, second.stats.patched), (0, 1));
    assert!(second.payload.len() < 64, "{:?}", second.stats);
    assert!(ram[3] == *content);
    // Unchanged: nothing is sent at all.
    let third = send(&[(3, content.clone())], &mut ram);
    assert_eq!((third.stats.unchanged, third.payload.len()), (1, 0));
    // Twice in one batch: the second is a patch on the first.
    let (mut a, mut b) = (content.clone(), content.clone());
    a[1..9].fill(1);
    b[5..12].fill(2);
    let twice = send(&[(3, a), (3, b.clone())], &mut ram);
    assert_eq!(twice.stats.patched, 2);
    assert!(ram[3] == *b);
    // Zero, and back.
    send(&[(3, page(0, 0))], &mut ram);
    assert!(ram[3] == [0; PAGE_BYTES]);
    let back = send(&[(3, page(1, 9))], &mut ram);
    assert_eq!(back.stats.patched, 1);
    assert!(ram[3] == *page(1, 9));
    // All over: whole, and the next is a patch on that.
    send(&[(3, page(3, 6))], &mut ram);
    let mut near = page(3, 6);
    near[4095] ^= 0x80;
    let again = send(&[(3, near.clone())], &mut ram);
    assert_eq!(again.stats.patched, 1);
    assert!(ram[3] == *near);
    encoder.forget();
    let batch = encoder
        .encode(&mut [(3, &*near)].into_iter())
        .unwrap()
        .unwrap();
    assert_eq!((batch.stats.raw, batch.stats.patched), (1, 0));
}

/// A layout-2 batch by hand: a patch on page 5 that sets byte 8 to 0xab, then page 3 zero.
fn by_hand() -> Vec<u8> {
    let mut page = [0; PAGE_BYTES];
    page[8] = 0xab;
    let mut batch = vec![2, 0, 2, 0, 1, 0, 0, 0];
    batch.extend_from_slice(&11u32.to_le_bytes());
    batch.extend_from_slice(&11u32.to_le_bytes());
    // Table: +5 in zigzag is 10, class 4; 11 bytes of patch, its check; -2 is 3, class 1.
    batch.extend_from_slice(&[10 << 3 | 4, 11]);
    batch.extend_from_slice(&patch::page_check(&page).to_le_bytes());
    batch.push(3 << 3 | 1);
    // Body: line 0, word 1, byte 0.
    batch.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0xab]);
    batch
}

#[test]
fn layout_2_is_as_written_down() {
    let mut ram = vec![[0; PAGE_BYTES]; 6];
    ram[3] = [9; PAGE_BYTES];
    apply_all(&[by_hand().into()], &mut ram).unwrap();
    assert_eq!((ram[5][8], ram[5][9], ram[3][0]), (0xab, 0, 0));
    // And the encoder writes it so.
    let mut encoder = PageEncoder::new(policy(3));
    let mut content = Box::new([0; PAGE_BYTES]);
    content[9] = 1;
    encode_with(&mut encoder, &[(5, content.clone())]);
    encode_with(&mut encoder, &[(5, page(0, 0))]);
    content[8..10].copy_from_slice(&[0xab, 0]);
    let batches = encode_with(&mut encoder, &[(5, content), (3, page(0, 0))]);
    assert_eq!(batches, [Bytes::from(by_hand())]);
}

#[test]
fn lies_of_layout_2_are_refused() {
    let lie = |at: usize, value: u8| {
        let mut batch = by_hand();
        batch[at] = value;
        decode_all(&[batch.into()], 6).unwrap_err()
    };
    // Layout, packing, reserved, raw pages, table bytes, body bytes.
    for (at, value) in [
        (2, 1),
        (2, 3),
        (4, 0),
        (4, 4),
        (5, 1),
        (6, 1),
        (8, 10),
        (8, 12),
        (12, 10),
    ] {
        let _ = lie(at, value);
    }
    assert!(
        matches!(lie(4, 2), CodecError::Compression { .. }),
        "not zstd"
    );
    assert!(
        matches!(lie(4, 3), CodecError::Compression { .. }),
        "not lz4"
    );
    assert!(matches!(
        lie(16, 12 << 3 | 4),
        CodecError::PageIndex { index: 6, .. }
    ));
    assert!(
        matches!(lie(16, 9 << 3 | 4), CodecError::PageIndex { .. }),
        "below zero"
    );
    assert!(matches!(lie(15, 0xff), CodecError::TooBig { .. }));
    for class in [0, 5, 6, 7] {
        assert!(matches!(
            lie(16, 10 << 3 | class),
            CodecError::Unknown { .. }
        ));
    }
    // A number longer than it needs to be, and one without an end.
    let mut batch = by_hand();
    batch.splice(17..18, [0x8b, 0]);
    batch[8] = 12;
    assert!(decode_all(&[batch.clone().into()], 6).is_err());
    batch.splice(17..19, [0xff; 12]);
    batch[8] = 22;
    assert!(decode_all(&[batch.into()], 6).is_err());
}

#[test]
fn a_payload_is_used_again_when_the_lane_is_done_with_it() {
    for which in 0..POLICIES.len() {
        let mut encoder = PageEncoder::new(EncodePolicy {
            delta: false,
            ..policy(which)
        });
        let pages: Vec<_> = (0..200).map(|i| (i, page((i % 4) as u8, i))).collect();
        let mut places = std::collections::BTreeSet::new();
        for _ in 0..20 {
            for batch in encode_with(&mut encoder, &pages) {
                places.insert(batch.as_ptr());
            }
        }
        // Two buffers take turns in layout 0, one serves in layout 2; growing moves each.
        assert!(places.len() <= 4, "{} places", places.len());
    }
}

#[test]
fn a_patch_on_another_memory_is_refused() {
    let mut encoder = PageEncoder::new(policy(3));
    let mut content = page(3, 5);
    encode_with(&mut encoder, &[(0, content.clone())]);
    content[9] ^= 1;
    let batches = encode_with(&mut encoder, &[(0, content)]);
    let refused = apply_all(&batches, &mut [[7; PAGE_BYTES]]).unwrap_err();
    assert!(matches!(refused, CodecError::PatchBase { .. }));
}

fn arb_pages() -> impl Strategy<Value = Vec<(u64, Box<Page>)>> {
    prop::collection::vec((0u64..1000, any::<u8>(), any::<u64>()), 0..40).prop_map(|list| {
        list.into_iter()
            .map(|(index, kind, seed)| (index, page(kind, seed)))
            .collect()
    })
}

fn arb_write() -> impl Strategy<Value = DiskWrite> {
    (0u16..2, 0u64..1000, 0usize..5000, any::<u8>(), any::<u64>()).prop_map(
        |(disk, offset, length, kind, seed)| DiskWrite {
            disk,
            offset,
            op: match kind % 4 {
                0 => DiskOp::Zero {
                    length: length as u64,
                },
                1 => DiskOp::Trim {
                    length: length as u64,
                },
                2 => DiskOp::Data(noise(seed, length).into()),
                _ => DiskOp::Data(vec![kind; length].into()),
            },
        },
    )
}

fn encode_writes(mut writes: &[DiskWrite], codec: Codec) -> Vec<Bytes> {
    let mut encoder = DiskEncoder::default();
    let mut batches = Vec::new();
    while let Some(batch) = encoder.encode(writes, codec).unwrap() {
        assert!(batch.writes > 0);
        writes = &writes[batch.writes..];
        batches.push(batch.payload);
    }
    assert!(writes.is_empty());
    batches
}

/// Damage of one kind: a flipped bit, a cut, or bytes at the end.
fn damage(bytes: &[u8], at: usize, kind: u8) -> Bytes {
    let mut bytes = bytes.to_vec();
    let at = at % bytes.len().max(1);
    match kind % 3 {
        0 => bytes[at] ^= 1 << (kind / 3 % 8),
        1 => bytes.truncate(at),
        _ => bytes.push(kind),
    }
    bytes.into()
}

proptest! {
    #[test]
    fn pages_round_trip(pages in arb_pages(), which in any::<usize>()) {
        let policy = EncodePolicy { delta: false, ..policy(which) };
        prop_assert_eq!(decode_all(&encode_all(&pages, policy), 1000).unwrap(), pages);
    }

    #[test]
    fn epochs_of_changes_leave_the_same_memory(
        epochs in prop::collection::vec(
            prop::collection::vec((0u64..12, 0u8..8, any::<u64>(), 0usize..4096), 1..30), 1..8),
        which in any::<usize>(), base_pages in 0u64..16,
    ) {
        let policy = EncodePolicy { base_bytes_max: base_pages * 4096, ..policy(which) };
        let mut encoder = PageEncoder::new(policy);
        let (mut primary, mut standby) = (vec![[0; PAGE_BYTES]; 12], vec![[0; PAGE_BYTES]; 12]);
        for changes in epochs {
            let mut pages = Vec::new();
            for (index, kind, seed, at) in changes {
                let now = &mut primary[usize::try_from(index).unwrap()];
                // Half of the changes are small ones.
                match kind {
                    0..4 => *now = *page(kind, seed),
                    4 => {}
                    _ => now[at..(at + usize::from(kind) * 20).min(PAGE_BYTES)].fill(kind),
                }
                pages.push((index, Box::new(*now)));
            }
            apply_all(&encode_with(&mut encoder, &pages), &mut standby).unwrap();
            prop_assert!(primary == standby);
        }
    }

    #[test]
    fn damaged_pages_never_panic_nor_leave_the_guest(
        pages in arb_pages(), which in any::<usize>(), at in any::<usize>(), kind in any::<u8>(),
    ) {
        let mut encoder = PageEncoder::new(policy(which));
        encode_with(&mut encoder, &pages);
        let changed: Vec<_> = pages.iter().map(|(index, page)| {
            let mut page = page.clone();
            page[100] ^= 1;
            (*index, page)
        }).collect();
        for batch in encode_with(&mut encoder, &changed) {
            let damaged = [damage(&batch, at, kind)];
            let result = decode_all(&damaged, 1000);
            if kind % 3 != 0 {
                prop_assert!(result.is_err());
            }
            for (index, _) in result.unwrap_or_default() {
                prop_assert!(index < 1000);
            }
            let _ = apply_all(&damaged, &mut vec![[0; PAGE_BYTES]; 1000]);
        }
    }

    #[test]
    fn writes_round_trip(writes in prop::collection::vec(arb_write(), 0..20), codec in 0usize..4) {
        let mut back = Vec::new();
        for batch in encode_writes(&writes, Codec::ALL[codec]) {
            back.extend(decode_disk_writes(&batch, &[6000, 6000]).unwrap());
        }
        prop_assert_eq!(back, writes);
    }

    #[test]
    fn damaged_writes_never_panic_nor_leave_the_disk(
        writes in prop::collection::vec(arb_write(), 1..20), at in any::<usize>(), kind in any::<u8>(),
        codec in 0usize..4,
    ) {
        for batch in encode_writes(&writes, Codec::ALL[codec]) {
            for write in decode_disk_writes(&damage(&batch, at, kind), &[6000, 6000]).unwrap_or_default() {
                prop_assert!(write.disk < 2 && write.offset + write.length() <= 6000);
            }
        }
    }

    #[test]
    fn packets_round_trip(sizes in prop::collection::vec(0usize..9000, 0..80)) {
        let packets: Vec<Bytes> = sizes.iter().map(|n| noise(*n as u64, *n).into()).collect();
        let (mut rest, mut back) = (&packets[..], Vec::new());
        while !rest.is_empty() {
            let mut out = BytesMut::new();
            rest = &rest[encode_packets(rest, &mut out).unwrap()..];
            prop_assert!(out.len() <= crate::frame::INGRESS_BYTES_MAX);
            back.extend(decode_packets(&out.freeze()).unwrap());
        }
        prop_assert_eq!(back, packets);
    }

    #[test]
    fn any_bytes_are_refused_or_decoded_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let batch = Bytes::from(bytes);
        let _ = decode_all(std::slice::from_ref(&batch), 1000);
        let _ = decode_disk_writes(&batch, &[1 << 20]);
        let _ = decode_packets(&batch);
        let _ = decode_delta(Some(b"base"), &batch);
    }

    #[test]
    fn delta_round_trips(
        base in prop::collection::vec(any::<u8>(), 0..3000),
        flips in prop::collection::vec((any::<usize>(), any::<u8>()), 0..10),
        length in 0usize..3000, codec in 0usize..4, old in any::<bool>(),
    ) {
        let version = if old { CodecVersion::V1 } else { CodecVersion::V2 };
        let encode_delta = |base, new: &[u8]| encode_delta(base, new, Codec::ALL[codec], version);
        let mut new = base.clone();
        new.resize(length, 7);
        for (at, value) in flips {
            if let Some(n) = (!new.is_empty()).then(|| at % new.len()) { new[n] = value; }
        }
        let delta = encode_delta(Some(&base), &new).unwrap();
        prop_assert_eq!(&decode_delta(Some(&base), &delta).unwrap()[..], &new[..]);
        let full = encode_delta(None, &new).unwrap();
        prop_assert_eq!(&decode_delta(Some(&base), &full).unwrap()[..], &new[..]);
        let no_base = matches!(decode_delta(None, &delta), Err(CodecError::DeltaBase { .. }));
        prop_assert!(no_base);
    }

    #[test]
    fn damaged_delta_is_refused(at in any::<usize>(), kind in any::<u8>()) {
        let (base, new) = (noise(1, 5000), noise(2, 5000));
        let delta = encode_delta(Some(&base), &new, Codec::Lz4, CodecVersion::V2).unwrap();
        let damaged = damage(&delta, at, kind);
        if let Ok(state) = decode_delta(Some(&base), &damaged) {
            prop_assert_eq!(&state[..], &new[..]);
        }
    }
}

#[test]
fn a_small_change_makes_a_small_delta() {
    let base = noise(1, 124_000);
    let mut new = base.clone();
    new[5000] ^= 0xff;
    let delta = encode_delta(Some(&base), &new, Codec::ZstdFast, CodecVersion::V1).unwrap();
    assert_eq!(delta[1..4], [0; 3], "reserved in version 1");
    assert!(delta.len() < 200, "{} bytes", delta.len());
    let delta = encode_delta(Some(&base), &new, Codec::Raw, CodecVersion::V2).unwrap();
    assert!(delta.len() < 700, "{} bytes", delta.len());
}

#[test]
fn a_delta_against_another_base_is_refused() {
    let delta = encode_delta(Some(b"one"), b"two", Codec::Raw, CodecVersion::V2).unwrap();
    assert!(matches!(
        decode_delta(Some(b"six"), &delta),
        Err(CodecError::DeltaBase { .. })
    ));
}

#[test]
fn a_big_state_is_refused_before_it_is_allocated() {
    let mut delta = encode_delta(None, b"small", Codec::Raw, CodecVersion::V2)
        .unwrap()
        .to_vec();
    delta[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        decode_delta(None, &delta),
        Err(CodecError::TooBig { .. })
    ));
}

#[test]
fn disk_ranges_are_checked() {
    let write = |disk, offset, length| DiskWrite {
        disk,
        offset,
        op: DiskOp::Trim { length },
    };
    for (write, good) in [
        (write(0, 0, 100), true),
        (write(0, 100, 0), true),
        (write(0, 1, 100), false),
        (write(1, 0, 1), false),
        (write(0, u64::MAX, 2), false),
    ] {
        let batch = &encode_writes(std::slice::from_ref(&write), Codec::Raw)[0];
        assert_eq!(decode_disk_writes(batch, &[100]).is_ok(), good, "{write:?}");
    }
}

#[test]
fn a_big_write_is_split() {
    let data: Bytes = noise(3, 2 * DISK_WRITE_BYTES_MAX + 5).into();
    let write = DiskWrite {
        disk: 0,
        offset: 4096,
        op: DiskOp::Data(data.clone()),
    };
    assert!(matches!(
        DiskEncoder::default().encode(std::slice::from_ref(&write), Codec::Raw),
        Err(CodecError::TooBig { .. })
    ));
    let pieces: Vec<_> = split_write(&write).collect();
    assert_eq!(pieces.len(), 3);
    let mut back = Vec::new();
    for batch in encode_writes(&pieces, Codec::ZstdFast) {
        assert!(batch.len() <= BATCH_BODY_BYTES_MAX + 100);
        for write in decode_disk_writes(&batch, &[1 << 30]).unwrap() {
            assert_eq!(write.offset, 4096 + back.len() as u64);
            if let DiskOp::Data(data) = write.op {
                back.extend_from_slice(&data);
            }
        }
    }
    assert_eq!(back, data);
}
