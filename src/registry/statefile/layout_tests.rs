use super::document::{BadDocument, Document, Proposal, id_of};
use super::layout::{
    BEAT_BYTES_MAX, BadBeat, Beat, Block, Geometry, Header, NAME_BYTES_MAX, ValueRef,
};
use super::page::{ATOM_BYTES, BadPage, PAGE_BYTES};
use super::paxos::{Ballot, HostSlot, Incarnation, Instance, Record, ValueId};
use crate::registry::Versioned;
use proptest::prelude::*;
use uuid::Uuid;

const POOL: Uuid = Uuid::from_u128(0x1234_5678_9abc);

fn header() -> Header {
    Header {
        pool: POOL,
        disk_id: Uuid::from_u128(77),
        disk: 2,
        geometry: Geometry {
            disks: 3,
            slots: 16,
            slot_bytes: 1 << 20,
        },
        set: 4,
    }
}

fn block(seq: u64) -> Block {
    let id = |n: u128| ValueId { hash: n, len: 90 };
    Block {
        pool: POOL,
        host: HostSlot(5),
        disk: 1,
        set: 4,
        seq,
        acked: [seq - 1, seq - 2, 0],
        written_us: 1_700_000_000_000_000,
        name: "b".repeat(NAME_BYTES_MAX),
        record: Record {
            incarnation: Incarnation(99),
            instance: Instance(seq),
            mbal: Ballot(69),
            bal: Ballot(5),
            chosen: Some(id(1)),
            proposed: Some(id(2)),
        },
        chosen: Some(ValueRef { slot: 3, id: id(1) }),
        proposed: Some(ValueRef { slot: 0, id: id(2) }),
    }
}

fn beat(seq: u64, payload: Vec<u8>) -> Beat {
    Beat {
        pool: POOL,
        host: HostSlot(63),
        disk: 2,
        seq,
        payload,
    }
}

#[test]
fn header_block_and_heartbeat_survive_their_own_bytes() {
    assert_eq!(Header::decode(&*header().encode()), Ok((header(), false)));
    assert_eq!(Block::decode(&*block(7).encode()), Ok((block(7), false)));
    let unused = Block::unused(POOL, HostSlot(0), 0, 1);
    assert_eq!(Block::decode(&*unused.encode()), Ok((unused, false)));
    for payload in [vec![], vec![9; 700], vec![8; BEAT_BYTES_MAX]] {
        let beat = beat(3, payload);
        assert_eq!(Beat::decode(&*beat.encode().unwrap()), Ok(beat));
    }
    assert_eq!(beat(3, vec![0; BEAT_BYTES_MAX + 1]).encode(), None);
}

#[test]
fn every_flipped_bit_of_header_block_and_heartbeat_is_noticed() {
    let pages = [
        header().encode(),
        block(7).encode(),
        beat(3, b"alive".to_vec()).encode().unwrap(),
    ];
    for at in 0..PAGE_BYTES {
        for bit in 0..8 {
            let bad = |page: &[u8; PAGE_BYTES]| {
                let mut page = page.to_vec();
                page[at] ^= 1 << bit;
                page
            };
            let noticed = [
                Header::decode(&bad(&pages[0])).map_or(true, |(_, cut)| cut),
                Block::decode(&bad(&pages[1])).map_or(true, |(_, cut)| cut),
                Beat::decode(&bad(&pages[2])).is_err(),
            ];
            assert_eq!(noticed, [true; 3], "byte {at} bit {bit}");
        }
    }
}

#[test]
fn a_write_cut_at_any_sector_leaves_the_old_block_or_the_new_one() {
    let (old, new) = (block(7), block(8));
    let (old_page, new_page) = (old.encode(), new.encode());
    for cut in (ATOM_BYTES..PAGE_BYTES).step_by(ATOM_BYTES) {
        // From the front, and from the back: a disk may write sectors in any order.
        let mut front = *new_page;
        front[cut..].copy_from_slice(&old_page[cut..]);
        assert_eq!(Block::decode(&front), Ok((new.clone(), true)), "at {cut}");
        let mut back = *old_page;
        back[cut..].copy_from_slice(&new_page[cut..]);
        assert_eq!(Block::decode(&back), Ok((old.clone(), true)), "at {cut}");
    }
}

#[test]
fn a_heartbeat_cut_at_any_sector_is_called_torn() {
    let old = beat(7, vec![1; BEAT_BYTES_MAX]).encode().unwrap();
    let new = beat(8, vec![2; BEAT_BYTES_MAX]).encode().unwrap();
    for cut in (ATOM_BYTES..PAGE_BYTES).step_by(ATOM_BYTES) {
        let mut page = *new;
        page[cut..].copy_from_slice(&old[cut..]);
        let torn = BadBeat::Torn { head: 8, tail: 7 };
        assert_eq!(Beat::decode(&page), Err(torn), "at {cut}");
    }
}

#[test]
fn an_empty_block_another_kind_and_another_version_are_told_apart() {
    let empty = [0; PAGE_BYTES];
    assert_eq!(Block::decode(&empty), Err(BadPage::Empty));
    assert_eq!(Header::decode(&empty[..99]), Err(BadPage::Short(99)));
    let page = header().encode();
    assert!(matches!(Block::decode(&*page), Err(BadPage::Magic(_))));
    let mut later = *page;
    later[8] = 2;
    assert_eq!(Header::decode(&later), Err(BadPage::Version(2)));
}

#[test]
fn whole_blocks_that_contradict_themselves_are_refused() {
    let nonsense = |change: fn(&mut Block)| {
        let mut block = block(7);
        change(&mut block);
        matches!(Block::decode(&*block.encode()), Err(BadPage::Nonsense(_)))
    };
    assert!(!nonsense(|_| ()));
    assert!(nonsense(|b| b.record.bal = Ballot(70)));
    assert!(nonsense(|b| b.record.bal = Ballot(0)));
    assert!(nonsense(|b| b.record.mbal = Ballot(u64::MAX)));
    assert!(nonsense(|b| b.record.instance = Instance(0)));
    assert!(nonsense(|b| b.record.instance = Instance(1)));
    assert!(nonsense(|b| b.chosen = None));
    assert!(nonsense(|b| b.proposed = None));
    assert!(nonsense(|b| b.proposed = b.chosen));
    assert!(nonsense(|b| b.host = HostSlot(64)));
}

fn document() -> Document {
    let proposal = |instance| Proposal {
        instance: Instance(instance),
        host: HostSlot(1),
        incarnation: Incarnation(2),
        number: 3,
    };
    let entry = Versioned {
        version: 1,
        value: b"v".to_vec(),
    };
    Document::default()
        .with("a", entry.clone(), proposal(8))
        .with("b", entry, proposal(9))
}

#[test]
fn a_document_survives_its_bytes_and_any_flipped_bit_is_noticed() {
    let bytes = document().encode().unwrap();
    let id = id_of(&bytes);
    assert_eq!(Document::decode(&bytes, id), Ok(document()));
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert_eq!(Document::decode(&bad, id), Err(BadDocument::Hash));
        // Even if somebody made the sum right.
        if at < 32 {
            assert!(Document::decode(&bad, id_of(&bad)).is_err(), "{at}");
        }
    }
}

#[test]
fn a_document_remembers_who_was_chosen_lately_and_no_more() {
    let mut document = document();
    let of = |number| Proposal {
        instance: Instance(10 + number),
        host: HostSlot(4),
        incarnation: Incarnation(5),
        number,
    };
    for number in 0..100 {
        let entry = Versioned {
            version: number + 1,
            value: vec![],
        };
        document = document.with("k", entry, of(number));
    }
    assert_eq!(document.was_chosen(&of(99)), Some(true));
    let mut other = of(99);
    other.incarnation = Incarnation(6);
    assert_eq!(document.was_chosen(&other), Some(false));
    assert_eq!(document.was_chosen(&of(0)), None);
    let bytes = document.encode().unwrap();
    assert_eq!(Document::decode(&bytes, id_of(&bytes)), Ok(document));
}

proptest! {
    #[test]
    fn any_bytes_are_an_error_or_a_block(
        bytes in proptest::collection::vec(any::<u8>(), 0..5000),
        fields in proptest::collection::vec(any::<u8>(), 496),
        few in proptest::collection::vec(0..4_u8, 496),
    ) {
        let _ = (Header::decode(&bytes), Block::decode(&bytes), Beat::decode(&bytes));
        let _ = Document::decode(&bytes, id_of(&bytes));
        // And framed so that they get through to the fields.
        for fields in [fields, few] {
            for magic in [b"pollxsta", b"pollxhst", b"pollxbea"] {
                let mut page = vec![0; PAGE_BYTES];
                page[..8].copy_from_slice(magic);
                page[8] = 1;
                page[16..512].copy_from_slice(&fields);
                page[12..16].copy_from_slice(&crc32fast::hash(&fields).to_le_bytes());
                let _ = (Header::decode(&page), Block::decode(&page), Beat::decode(&page));
            }
            let mut value = b"pollxval\x01\0\0\0\x02\0\0\0".to_vec();
            value.extend_from_slice(&fields);
            let _ = Document::decode(&value, id_of(&value));
        }
    }
}
