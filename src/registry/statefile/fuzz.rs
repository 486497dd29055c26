//! What the fuzzers run of this room (`crate::fuzzing`): blocks and values of a disk. The first
//! byte says which kind, and whether checksums are mended first.

use super::super::format;
use super::document::{Document, Proposal, id_of};
use super::layout::{BEAT_BYTES_MAX, Beat, Block, Geometry, Header, ValueRef};
use super::page::{ATOM_BYTES, PAGE_BYTES};
use super::paxos::{Ballot, DISKS_MAX, HOSTS_MAX, HostSlot, Incarnation, Instance, Record};
use crate::registry::Versioned;
use uuid::Uuid;

const MEND: u8 = 0x80;
const MAGICS: [&[u8; 8]; 3] = [b"pollxsta", b"pollxhst", b"pollxbea"];
/// Magic, version, number of proposals, instance.
const VALUE_HEAD_BYTES: usize = 24;
const PROPOSAL_BYTES: usize = 32;
/// Magic, version, CRC, length.
const FILE_HEAD_BYTES: usize = 24;

/// A block of 4 KiB; what the input does not fill is zero.
pub(crate) fn block(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let kind = usize::from(how & 3).min(2);
    let mut page = bytes.to_vec();
    if how & MEND != 0 {
        page.resize(PAGE_BYTES, 0);
        mend_page(kind, &mut page);
    }
    match kind {
        0 => {
            if let Ok((header, cut)) = Header::decode(&page) {
                assert!(header.geometry.check().is_ok() && header.disk < header.geometry.disks);
                let total = header.geometry.total_bytes();
                assert!(header.geometry.pass_bytes() as u64 <= total);
                same(&header.encode()[..], &page, cut);
            }
        }
        1 => {
            if let Ok((block, cut)) = Block::decode(&page) {
                assert!(block.host.0 < HOSTS_MAX && usize::from(block.disk) < DISKS_MAX);
                same(&block.encode()[..], &page, cut);
            }
        }
        _ => {
            if let Ok(beat) = Beat::decode(&page) {
                assert!(beat.payload.len() <= BEAT_BYTES_MAX);
                let again = beat.encode().expect("its payload fits");
                same(&again[..], &page, false);
            }
        }
    }
}

/// All of it; of a block whose write was cut, all but the stamp at its end.
fn same(again: &[u8], page: &[u8], cut: bool) {
    let end = PAGE_BYTES - 8;
    assert_eq!(again[..end], page[..end]);
    assert_eq!(again[end..] != page[end..], cut);
}

fn mend_page(kind: usize, page: &mut [u8]) {
    page[..8].copy_from_slice(MAGICS[kind]);
    page[8..12].copy_from_slice(&1_u32.to_le_bytes());
    let signed = if kind == 2 {
        page.copy_within(40..48, PAGE_BYTES - 8);
        let length = u32::from_le_bytes([page[36], page[37], page[38], page[39]]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        48 + length.min(BEAT_BYTES_MAX)
    } else {
        ATOM_BYTES
    };
    let crc = crc32fast::hash(&page[16..signed]);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// A value: the pool's document. With the first byte's bit 0 the registry file alone.
pub(crate) fn value(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if how & 1 != 0 {
        if how & MEND != 0 {
            mend_file(&mut bytes);
        }
        if let Ok(entries) = format::decode(&bytes) {
            assert_eq!(format::encode(&entries).as_ref(), Ok(&bytes));
        }
        return;
    }
    if how & MEND != 0 && bytes.len() >= VALUE_HEAD_BYTES {
        bytes[..8].copy_from_slice(b"pollxval");
        bytes[8..12].copy_from_slice(&1_u32.to_le_bytes());
        let file = VALUE_HEAD_BYTES + usize::from(bytes[12]) * PROPOSAL_BYTES;
        if let Some(file) = bytes.get_mut(file..) {
            mend_file(file);
        }
    }
    let id = id_of(&bytes);
    if let Ok(document) = Document::decode(&bytes, id) {
        assert_eq!(document.encode().as_ref(), Ok(&bytes));
        for proposal in &document.proposals {
            assert_eq!(document.was_chosen(proposal), Some(true));
        }
        let other = super::paxos::ValueId {
            hash: !id.hash,
            ..id
        };
        assert!(Document::decode(&bytes, other).is_err());
    }
}

/// Magic, version, length and checksum of a registry file.
fn mend_file(file: &mut [u8]) {
    if file.len() < FILE_HEAD_BYTES {
        return;
    }
    let (head, payload) = file.split_at_mut(FILE_HEAD_BYTES);
    head[..8].copy_from_slice(b"pollxreg");
    head[8..12].copy_from_slice(&1_u32.to_le_bytes());
    head[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    head[16..].copy_from_slice(&(payload.len() as u64).to_le_bytes());
}

type Seeds = Vec<(&'static str, Vec<u8>)>;

const POOL: Uuid = Uuid::from_bytes(*b"the fuzzed pool.");

/// Without the zeros at its end, to be mended.
fn short(kind: u8, page: &[u8]) -> Vec<u8> {
    let fields = &page[..PAGE_BYTES - 8];
    let end = fields.iter().rposition(|byte| *byte != 0).unwrap_or(0);
    [&[MEND | kind], &fields[..=end]].concat()
}

pub(crate) fn block_seeds() -> Seeds {
    let header = Header {
        pool: POOL,
        disk_id: Uuid::from_bytes([7; 16]),
        disk: 2,
        geometry: Geometry {
            disks: 3,
            slots: 16,
            slot_bytes: 1 << 20,
        },
        set: 1,
    };
    let (value, host) = (id_of(b"value"), HostSlot(3));
    let unused = Block::unused(POOL, host, 0, 1);
    let used = Block {
        seq: 9,
        acked: [8, 9, 7],
        written_us: 1,
        name: "host".into(),
        record: Record {
            incarnation: Incarnation(5),
            instance: Instance(4),
            mbal: Ballot(131),
            bal: Ballot(67),
            chosen: Some(value),
            proposed: Some(value),
        },
        chosen: Some(ValueRef { slot: 0, id: value }),
        proposed: Some(ValueRef { slot: 1, id: value }),
        ..unused.clone()
    };
    let beat = Beat {
        pool: POOL,
        host,
        disk: 0,
        seq: 6,
        payload: b"report".to_vec(),
    };
    let beat = beat.encode().expect("its payload fits");
    vec![
        ("header", short(0, &header.encode()[..])),
        ("unused", short(1, &unused.encode()[..])),
        ("used", short(1, &used.encode()[..])),
        ("beat", short(2, &beat[..])),
        ("whole-block", [&[1], &used.encode()[..]].concat()),
    ]
}

pub(crate) fn value_seeds() -> Seeds {
    let write = |document: &Document, instance, key: &str, value: &[u8]| {
        let entry = Versioned {
            version: instance,
            value: value.to_vec(),
        };
        let proposal = Proposal {
            instance: Instance(instance),
            host: HostSlot(1),
            incarnation: Incarnation(5),
            number: instance,
        };
        document.with(key, entry, proposal)
    };
    let first = write(&Document::default(), 1, "pool/state", b"{}");
    let second = write(&first, 2, "vm/x", b"");
    let bytes = second.encode().expect("it is small");
    let file = format::encode(&second.entries).expect("it is small");
    vec![
        ("document", [&[0], &bytes[..]].concat()),
        ("mended", [&[MEND], &bytes[..]].concat()),
        ("file", [&[MEND | 1], &file[..]].concat()),
    ]
}
