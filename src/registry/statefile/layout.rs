//! What lies where on a disk of the statefile. This module owns the layout; `page.rs` owns
//! the frame of a block, `document.rs` the bytes of a value.
//!
//! ```text
//! block 0            header
//! block 1 .. n       registry blocks, one per host slot, written by that host alone
//! block n+1 .. 2n    storage heartbeats, one per host slot, likewise
//! then per host      its value area: VALUE_SLOTS slots of `slot_bytes` each
//! ```
//!
//! Numbers are little-endian. One read from the start of the disk takes the header and all
//! registry blocks, so whoever looks at the registry also learns whether this is still the
//! disk it takes it for.

use super::page::{BadPage, Fields, PAGE_BYTES, Reader, check_magic, stamp_of};
use super::paxos::{
    Ballot, DISKS_MAX, HOSTS_MAX, HostSlot, Incarnation, Instance, NUMBER_MAX, Record, ValueId,
};
use serde::Serialize;
use uuid::Uuid;

/// Value slots of a host. A block names at most two values. The next block is written only
/// when the fate of the one before is known, and may name two others: four.
pub const VALUE_SLOTS: u16 = 4;
/// Bytes of a value slot by default: a pool of hundreds of VMs with specs of a few KiB.
pub const SLOT_BYTES_DEFAULT: u64 = 1024 * 1024;
/// Largest value slot: each change writes the whole document to every disk.
pub const SLOT_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Host slots by default.
pub const SLOTS_DEFAULT: u16 = 16;
/// Longest host name in a block.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest payload of a storage heartbeat: what the block's frame leaves, rounded down.
pub const BEAT_BYTES_MAX: usize = 3968;

const HEADER: &str = "pollxsta";
const BLOCK: &str = "pollxhst";
const BEAT: &str = "pollxbea";
const PAGE: u64 = PAGE_BYTES as u64;
/// Start of a heartbeat's payload.
const BEAT_AT: usize = 48;

const _: () = assert!(BEAT_AT + BEAT_BYTES_MAX + 8 <= PAGE_BYTES);

/// How large a disk of the statefile is and what it is divided into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Geometry {
    /// Disks of the set, 1 to [`DISKS_MAX`].
    pub disks: u16,
    /// Host slots, 1 to [`HOSTS_MAX`].
    pub slots: u16,
    /// Bytes of one value slot, a multiple of 4 KiB.
    pub slot_bytes: u64,
}

impl Geometry {
    /// Whether the numbers are possible; what is wrong otherwise.
    ///
    /// # Errors
    /// Names the number and its limits.
    pub fn check(&self) -> Result<(), &'static str> {
        if !matches!(self.disks, 1 | 3) {
            return Err("a statefile has 1 or 3 disks (of 2, both would be needed)");
        }
        if self.slots == 0 || self.slots > HOSTS_MAX {
            return Err("a statefile has 1 to 64 host slots");
        }
        if self.slot_bytes == 0
            || self.slot_bytes > SLOT_BYTES_MAX
            || !self.slot_bytes.is_multiple_of(PAGE)
        {
            return Err("a value slot has 4 KiB to 16 MiB, in steps of 4 KiB");
        }
        Ok(())
    }

    /// Bytes from the start that hold the header and all registry blocks.
    #[must_use]
    pub fn pass_bytes(&self) -> usize {
        PAGE_BYTES * (1 + usize::from(self.slots))
    }

    /// Where a host's registry block is.
    #[must_use]
    pub fn block_at(&self, host: HostSlot) -> u64 {
        PAGE * (1 + u64::from(host.0))
    }

    /// Where a host's storage heartbeat is.
    #[must_use]
    pub fn beat_at(&self, host: HostSlot) -> u64 {
        PAGE * (1 + u64::from(self.slots) + u64::from(host.0))
    }

    /// Where value slot `slot` of a host is.
    #[must_use]
    pub fn value_at(&self, host: HostSlot, slot: u16) -> u64 {
        let area = u64::from(VALUE_SLOTS) * self.slot_bytes;
        PAGE * (1 + 2 * u64::from(self.slots))
            + u64::from(host.0) * area
            + u64::from(slot) * self.slot_bytes
    }

    /// Bytes of the whole.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.value_at(HostSlot(self.slots), 0)
    }
}

/// The first block of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Header {
    /// The pool.
    pub pool: Uuid,
    /// This disk; every format draws a new one.
    pub disk_id: Uuid,
    /// Which of the set's disks this is, from 0.
    pub disk: u16,
    /// How it is divided.
    pub geometry: Geometry,
    /// Rises when a disk of the set is replaced; a majority is only one within a generation.
    pub set: u64,
}

impl Header {
    /// The block.
    #[must_use]
    pub fn encode(&self) -> Box<[u8; PAGE_BYTES]> {
        let mut fields = Fields::new(HEADER);
        fields.put(self.pool.as_bytes());
        fields.put(self.disk_id.as_bytes());
        fields.put(&self.disk.to_le_bytes());
        fields.put(&self.geometry.disks.to_le_bytes());
        fields.put(&self.geometry.slots.to_le_bytes());
        fields.put(&VALUE_SLOTS.to_le_bytes());
        fields.put(&self.geometry.slot_bytes.to_le_bytes());
        fields.put(&self.geometry.total_bytes().to_le_bytes());
        fields.put(&self.set.to_le_bytes());
        fields.seal(self.set)
    }

    /// The header in a block, and whether its last write was cut.
    ///
    /// # Errors
    /// What is wrong with the block.
    pub fn decode(page: &[u8]) -> Result<(Self, bool), BadPage> {
        let mut r = Reader::open(page, HEADER)?;
        let pool = Uuid::from_bytes(r.array()?);
        let disk_id = Uuid::from_bytes(r.array()?);
        let (disk, disks, slots) = (r.u16()?, r.u16()?, r.u16()?);
        if r.u16()? != VALUE_SLOTS {
            return Err(BadPage::Nonsense("it has another number of value slots"));
        }
        let geometry = Geometry {
            disks,
            slots,
            slot_bytes: r.u64()?,
        };
        geometry.check().map_err(BadPage::Nonsense)?;
        if r.u64()? != geometry.total_bytes() {
            return Err(BadPage::Nonsense("its size is not that of its parts"));
        }
        if disk >= disks {
            return Err(BadPage::Nonsense(
                "its disk index is not below the number of disks",
            ));
        }
        let set = r.u64()?;
        if set == 0 || set > NUMBER_MAX {
            return Err(BadPage::Nonsense("its set generation is impossible"));
        }
        let cut = r.close(set)?;
        let header = Self {
            pool,
            disk_id,
            disk,
            geometry,
            set,
        };
        Ok((header, cut))
    }
}

/// A value and where in its owner's area it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueRef {
    /// Value slot, below [`VALUE_SLOTS`].
    pub slot: u16,
    /// Which value.
    pub id: ValueId,
}

/// A host's registry block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The pool.
    pub pool: Uuid,
    /// Whose block.
    pub host: HostSlot,
    /// On which disk.
    pub disk: u16,
    /// Under which set generation it was written.
    pub set: u64,
    /// Counts the host's writes to any disk.
    pub seq: u64,
    /// Per disk the highest `seq` that it had acknowledged before: a disk that shows less has
    /// gone back in time.
    pub acked: [u64; DISKS_MAX],
    /// When it was written, microseconds since 1970 by the host's clock; for people.
    pub written_us: u64,
    /// The host's name; empty if the slot was never used.
    pub name: String,
    /// What Disk Paxos keeps here.
    pub record: Record,
    /// Where the record's `chosen` is.
    pub chosen: Option<ValueRef>,
    /// Where the record's `proposed` is.
    pub proposed: Option<ValueRef>,
}

impl Block {
    /// The block of a slot that nobody has used yet.
    #[must_use]
    pub fn unused(pool: Uuid, host: HostSlot, disk: u16, set: u64) -> Self {
        Self {
            pool,
            host,
            disk,
            set,
            seq: 0,
            acked: [0; DISKS_MAX],
            written_us: 0,
            name: String::new(),
            record: Record::FIRST,
            chosen: None,
            proposed: None,
        }
    }

    /// The block as written. A name beyond [`NAME_BYTES_MAX`] is cut.
    #[must_use]
    pub fn encode(&self) -> Box<[u8; PAGE_BYTES]> {
        let mut end = self.name.len().min(NAME_BYTES_MAX);
        while !self.name.is_char_boundary(end) {
            end -= 1;
        }
        let mut name = [0; NAME_BYTES_MAX];
        name[..end].copy_from_slice(&self.name.as_bytes()[..end]);
        let name_len = u16::try_from(end).unwrap_or(0);
        let mut fields = Fields::new(BLOCK);
        fields.put(self.pool.as_bytes());
        fields.put(&self.host.0.to_le_bytes());
        fields.put(&self.disk.to_le_bytes());
        fields.put(&name_len.to_le_bytes());
        fields.put(&[0; 2]);
        fields.put(&name);
        fields.put(&self.set.to_le_bytes());
        fields.put(&self.seq.to_le_bytes());
        for acked in self.acked {
            fields.put(&acked.to_le_bytes());
        }
        fields.put(&self.written_us.to_le_bytes());
        fields.put(&self.record.incarnation.0.to_le_bytes());
        fields.put(&self.record.instance.0.to_le_bytes());
        fields.put(&self.record.mbal.0.to_le_bytes());
        fields.put(&self.record.bal.0.to_le_bytes());
        for value in [self.chosen, self.proposed] {
            let place = value.map_or(0, |v| u32::from(v.slot) + 1);
            let id = value.map_or(ValueId { hash: 0, len: 0 }, |v| v.id);
            fields.put(&place.to_le_bytes());
            fields.put(&id.len.to_le_bytes());
            fields.put(&id.hash.to_le_bytes());
        }
        fields.seal(self.seq)
    }

    /// The block in `page`, and whether its last write was cut.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(page: &[u8]) -> Result<(Self, bool), BadPage> {
        let mut r = Reader::open(page, BLOCK)?;
        let pool = Uuid::from_bytes(r.array()?);
        let host = HostSlot(r.u16()?);
        let disk = r.u16()?;
        let name_len = usize::from(r.u16()?);
        if r.u16()? != 0 || host.0 >= HOSTS_MAX || usize::from(disk) >= DISKS_MAX {
            return Err(BadPage::Nonsense("its slot or disk is impossible"));
        }
        let name = r.take(NAME_BYTES_MAX)?;
        let (name, rest) = name
            .split_at_checked(name_len)
            .ok_or(BadPage::Nonsense("the host's name is too long"))?;
        if rest.iter().any(|b| *b != 0) {
            return Err(BadPage::Nonsense("bytes follow the host's name"));
        }
        let name = std::str::from_utf8(name)
            .map_err(|_| BadPage::Nonsense("the host's name is not UTF-8"))?
            .to_owned();
        let (set, seq) = (r.u64()?, r.u64()?);
        let mut acked = [0; DISKS_MAX];
        for acked in &mut acked {
            *acked = r.u64()?;
        }
        let written_us = r.u64()?;
        let mut record = Record {
            incarnation: Incarnation(r.u64()?),
            instance: Instance(r.u64()?),
            mbal: Ballot(r.u64()?),
            bal: Ballot(r.u64()?),
            chosen: None,
            proposed: None,
        };
        let (chosen, proposed) = (value_ref(&mut r)?, value_ref(&mut r)?);
        record.chosen = chosen.map(|v| v.id);
        record.proposed = proposed.map(|v| v.id);
        if [seq, set, record.instance.0, record.mbal.0]
            .iter()
            .any(|n| *n > NUMBER_MAX)
        {
            return Err(BadPage::Nonsense("a number is impossibly high"));
        }
        let first = record.instance == Instance(1);
        if record.instance.0 == 0
            || record.bal > record.mbal
            || chosen.is_none() != first
            || proposed.is_none() != (record.bal == Ballot::NONE)
            || (chosen.is_some() && chosen.map(|v| v.slot) == proposed.map(|v| v.slot))
        {
            return Err(BadPage::Nonsense(
                "its ballots and values contradict each other",
            ));
        }
        let cut = r.close(seq)?;
        let block = Self {
            pool,
            host,
            disk,
            set,
            seq,
            acked,
            written_us,
            name,
            record,
            chosen,
            proposed,
        };
        Ok((block, cut))
    }
}

fn value_ref(r: &mut Reader<'_>) -> Result<Option<ValueRef>, BadPage> {
    let place = r.u32()?;
    let id = ValueId {
        len: r.u32()?,
        hash: u128::from_le_bytes(r.array()?),
    };
    if place == 0 {
        return match id {
            ValueId { hash: 0, len: 0 } => Ok(None),
            _ => Err(BadPage::Nonsense("a value without a place")),
        };
    }
    let slot = u16::try_from(place - 1)
        .ok()
        .filter(|slot| *slot < VALUE_SLOTS)
        .ok_or(BadPage::Nonsense("a value in a slot that is not there"))?;
    if u64::from(id.len) > SLOT_BYTES_MAX {
        return Err(BadPage::Nonsense("a value larger than any slot"));
    }
    Ok(Some(ValueRef { slot, id }))
}

/// A host's storage heartbeat. What it says is another room's affair.
///
/// ```text
/// 0     magic "pollxbea"      8  u32 version    12  u32 CRC-32 of bytes 16 .. 48 + length
/// 16    pool   32 u16 slot   34 u16 disk   36 u32 length   40 u64 sequence   48 payload
/// 4088  u64 the sequence again
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The pool.
    pub pool: Uuid,
    /// Whose.
    pub host: HostSlot,
    /// On which disk.
    pub disk: u16,
    /// Rises with each; 0 before the first.
    pub seq: u64,
    /// At most [`BEAT_BYTES_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// What is wrong with a storage heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBeat {
    /// Read while it was written, or a write that was cut. The next one mends it.
    #[error("its write was cut (sequence {head} at its start, {tail} at its end)")]
    Torn {
        /// Sequence at the start.
        head: u64,
        /// Sequence at the end.
        tail: u64,
    },
    /// Anything else.
    #[error(transparent)]
    Page(#[from] BadPage),
}

impl Beat {
    /// The block, or `None` if the payload is longer than [`BEAT_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Option<Box<[u8; PAGE_BYTES]>> {
        let len = u32::try_from(self.payload.len())
            .ok()
            .filter(|_| self.payload.len() <= BEAT_BYTES_MAX)?;
        let mut fields = Fields::new(BEAT);
        fields.put(self.pool.as_bytes());
        fields.put(&self.host.0.to_le_bytes());
        fields.put(&self.disk.to_le_bytes());
        fields.put(&len.to_le_bytes());
        fields.put(&self.seq.to_le_bytes());
        let mut page = fields.seal(self.seq);
        let end = BEAT_AT + self.payload.len();
        page[BEAT_AT..end].copy_from_slice(&self.payload);
        let crc = crc32fast::hash(&page[16..end]);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        Some(page)
    }

    /// The heartbeat in `page`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(page: &[u8]) -> Result<Self, BadBeat> {
        check_magic(page, BEAT)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&page[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (head, tail) = (number(40), stamp_of(page));
        if head != tail {
            return Err(BadBeat::Torn { head, tail });
        }
        let lengths = number(32);
        let len = usize::try_from(lengths >> 32).unwrap_or(usize::MAX);
        if len > BEAT_BYTES_MAX {
            return Err(BadPage::Nonsense("its payload is too long").into());
        }
        let end = BEAT_AT + len;
        let said = u32::from_le_bytes([page[12], page[13], page[14], page[15]]);
        let found = crc32fast::hash(&page[16..end]);
        if said != found {
            return Err(BadPage::Crc { found, said }.into());
        }
        if page[end..PAGE_BYTES - 8].iter().any(|b| *b != 0) {
            return Err(BadPage::Nonsense("bytes follow the payload").into());
        }
        let mut pool = [0; 16];
        pool.copy_from_slice(&page[16..32]);
        Ok(Self {
            pool: Uuid::from_bytes(pool),
            host: HostSlot(u16::from_le_bytes([page[32], page[33]])),
            disk: u16::from_le_bytes([page[34], page[35]]),
            seq: head,
            payload: page[BEAT_AT..end].to_vec(),
        })
    }
}
