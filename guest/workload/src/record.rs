//! The counter's record: what an acknowledged request leaves on the disk.
//!
//! The guest writes and flushes a record before it answers a request. So a number that a
//! client saw and that no valid record holds is a lost acknowledgement. (The ring holds the
//! newest [`Layout::record_slots`] records; older ones are overwritten.)

use crate::checksum::{BLOCK_BYTES, checksum, fill};
use crate::layout::{GROUP_RECORDS_MAX, Layout};
use std::fmt;
use std::io;

/// Bytes of one record on the disk.
pub const RECORD_BYTES: usize = BLOCK_BYTES;

/// First eight bytes of every record. The last two digits are the version of the layout:
/// 01: number, client, seq, boot, monotonic time, filler, checksum.
pub const RECORD_MAGIC: [u8; 8] = *b"PLXREC01";

/// Where the checksum of all bytes before it lies: in the last eight.
const SUM_AT: usize = RECORD_BYTES - 8;

/// Bytes taken by the magic and the five fields; the filler follows.
const FIELDS_BYTES: usize = 48;

/// One record. All fields are little-endian 64-bit words on the disk, in this order, after
/// the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The counter's value after this request, from 1.
    pub number: u64,
    /// Which client asked.
    pub client: u64,
    /// The client's own number of the request.
    pub seq: u64,
    /// Which boot of the guest served it (see [`crate::boot`]).
    pub boot: u64,
    /// The guest's `CLOCK_MONOTONIC` when it was written, in nanoseconds.
    pub mono_ns: u64,
}

/// A slot that holds no valid record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRecord {
    /// Only zeros: never written.
    Empty,
    /// Not [`RECORD_BYTES`] long.
    Length(usize),
    /// Does not begin with [`RECORD_MAGIC`].
    Magic,
    /// The checksum does not fit the contents: torn or damaged.
    Checksum,
}

impl fmt::Display for BadRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the slot was never written"),
            Self::Length(n) => write!(f, "a record has {RECORD_BYTES} bytes, this has {n}"),
            Self::Magic => f.write_str("the slot holds something else than a record"),
            Self::Checksum => f.write_str("the record is torn or damaged (checksum)"),
        }
    }
}

impl std::error::Error for BadRecord {}

impl Record {
    /// Write the record into one slot's bytes. The filler depends on all fields, so that two
    /// records differ in nearly every byte.
    pub fn encode(&self, slot: &mut [u8; RECORD_BYTES]) {
        slot[..8].copy_from_slice(&RECORD_MAGIC);
        let fields = [self.number, self.client, self.seq, self.boot, self.mono_ns];
        for (place, field) in slot[8..FIELDS_BYTES]
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(fields)
        {
            *place = field.to_le_bytes();
        }
        let seed = checksum(&slot[..FIELDS_BYTES]);
        fill(&mut slot[FIELDS_BYTES..SUM_AT], seed);
        let sum = checksum(&slot[..SUM_AT]);
        slot[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
    }

    /// Read a record from one slot's bytes.
    ///
    /// # Errors
    /// [`BadRecord`] says why the slot holds none.
    pub fn parse(slot: &[u8]) -> Result<Self, BadRecord> {
        let slot: &[u8; RECORD_BYTES] =
            slot.try_into().map_err(|_| BadRecord::Length(slot.len()))?;
        if slot[..8] != RECORD_MAGIC {
            let empty = slot.iter().all(|byte| *byte == 0);
            return Err(if empty {
                BadRecord::Empty
            } else {
                BadRecord::Magic
            });
        }
        let words = slot.as_chunks::<8>().0;
        let word = |n: usize| u64::from_le_bytes(words[n]);
        if checksum(&slot[..SUM_AT]) != word(SUM_AT / 8) {
            return Err(BadRecord::Checksum);
        }
        Ok(Self {
            number: word(1),
            client: word(2),
            seq: word(3),
            boot: word(4),
            mono_ns: word(5),
        })
    }
}

/// Read one block at a byte offset: how [`newest`] and [`list`] see a disk.
pub trait ReadBlocks {
    /// Fill `bytes` (a multiple of [`BLOCK_BYTES`]) from `offset`.
    ///
    /// # Errors
    /// Whatever the disk says; a short disk is an error too.
    fn read_blocks(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

impl ReadBlocks for std::fs::File {
    fn read_blocks(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, bytes, offset)
    }
}

/// The newest record's number such that all before it (within the ring) are there too; 0 on
/// an empty disk. `slot` is scratch space (the guest hands in an aligned one).
///
/// Numbers grow slot by slot, so a binary search finds the end of the newest lap. After a
/// crash the last unflushed group (at most [`GROUP_RECORDS_MAX`] slots) may have holes; the
/// search then walks back to the first of them.
///
/// # Errors
/// The disk's own.
pub fn newest(
    disk: &impl ReadBlocks,
    layout: &Layout,
    slot: &mut [u8; RECORD_BYTES],
) -> io::Result<u64> {
    let mut number_at = |index: u64| -> io::Result<Option<u64>> {
        let offset = layout.records.start + index * RECORD_BYTES as u64;
        disk.read_blocks(offset, slot)?;
        Ok(Record::parse(slot).ok().map(|record| record.number))
    };
    let slots = layout.record_slots();
    // A first slot that is torn or empty: either a new disk, or a crash in the first group of
    // a lap. Then the newest whole record is the last of the lap before, at the ring's end.
    let Some(first) = number_at(0)? else {
        return Ok(number_at(slots - 1)?.unwrap_or(0));
    };
    let (mut held, mut missing) = (0, slots);
    while missing - held > 1 {
        let middle = held + (missing - held) / 2;
        if number_at(middle)? == first.checked_add(middle) {
            held = middle;
        } else {
            missing = middle;
        }
    }
    let mut last = held;
    for index in held.saturating_sub(GROUP_RECORDS_MAX)..held {
        if number_at(index)? != first.checked_add(index) {
            last = index.saturating_sub(1);
            break;
        }
    }
    Ok(first.saturating_add(last))
}

/// What [`list`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// All valid records in order of their slots.
    pub records: Vec<Record>,
    /// Slots with something other than a record in its right place: byte offset and reason.
    /// A record of another slot counts as [`BadRecord::Magic`].
    pub bad: Vec<(u64, BadRecord)>,
}

/// All records of a disk of `bytes` bytes, for a drill that reads the promoted image.
/// Reads the whole record area (holes of a sparse file are cheap) in pieces of 1 MiB.
///
/// # Errors
/// The disk's own, and a disk too small to have a layout.
pub fn list(disk: &impl ReadBlocks, bytes: u64) -> io::Result<Listing> {
    const PIECE_BYTES: u64 = 1 << 20;
    let layout = Layout::for_disk(bytes).map_err(io::Error::other)?;
    let mut listing = Listing::default();
    let mut piece = vec![0; usize::try_from(PIECE_BYTES).map_err(io::Error::other)?];
    let mut at = layout.records.start;
    while at < layout.records.end {
        let want = PIECE_BYTES.min(layout.records.end - at);
        let piece = &mut piece[..usize::try_from(want).map_err(io::Error::other)?];
        disk.read_blocks(at, piece)?;
        for slot in piece.as_chunks::<RECORD_BYTES>().0 {
            match Record::parse(slot) {
                Ok(record) if layout.record_offset(record.number) == at => {
                    listing.records.push(record);
                }
                Ok(_) => listing.bad.push((at, BadRecord::Magic)),
                Err(BadRecord::Empty) => {}
                Err(reason) => listing.bad.push((at, reason)),
            }
            at += RECORD_BYTES as u64;
        }
    }
    Ok(listing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::DISK_BYTES_MIN;
    use std::cell::RefCell;

    struct Image(RefCell<Vec<u8>>);

    impl ReadBlocks for Image {
        fn read_blocks(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
            let at = usize::try_from(offset).unwrap();
            bytes.copy_from_slice(&self.0.borrow()[at..at + bytes.len()]);
            Ok(())
        }
    }

    fn record(number: u64) -> Record {
        Record {
            number,
            client: 7,
            seq: number * 3,
            boot: 1,
            mono_ns: 99,
        }
    }

    fn image() -> (Image, Layout) {
        let bytes = usize::try_from(DISK_BYTES_MIN).unwrap();
        (
            Image(RefCell::new(vec![0; bytes])),
            Layout::for_disk(DISK_BYTES_MIN).unwrap(),
        )
    }

    impl Image {
        fn slot(&self, layout: &Layout, number: u64, change: impl FnOnce(&mut [u8; RECORD_BYTES])) {
            let at = usize::try_from(layout.record_offset(number)).unwrap();
            let mut bytes = self.0.borrow_mut();
            change((&mut bytes[at..at + RECORD_BYTES]).try_into().unwrap());
        }

        fn put(&self, layout: &Layout, number: u64) {
            self.slot(layout, number, |slot| record(number).encode(slot));
        }

        fn newest(&self, layout: &Layout) -> u64 {
            newest(self, layout, &mut [0; RECORD_BYTES]).unwrap()
        }
    }

    #[test]
    fn a_record_comes_back_and_any_damage_is_named() {
        let mut slot = [0; RECORD_BYTES];
        assert_eq!(Record::parse(&slot), Err(BadRecord::Empty));
        record(5).encode(&mut slot);
        assert_eq!(Record::parse(&slot), Ok(record(5)));
        assert_eq!(Record::parse(&slot[..100]), Err(BadRecord::Length(100)));
        slot[3000] ^= 4;
        assert_eq!(Record::parse(&slot), Err(BadRecord::Checksum));
        slot[0] ^= 1;
        assert_eq!(Record::parse(&slot), Err(BadRecord::Magic));
    }

    #[test]
    fn the_newest_record_is_found_at_every_fill_level_and_lap() {
        let (image, layout) = image();
        assert_eq!(image.newest(&layout), 0);
        for number in 1..=layout.record_slots() * 2 + 3 {
            image.put(&layout, number);
            assert_eq!(image.newest(&layout), number);
        }
    }

    #[test]
    fn a_hole_in_the_last_group_ends_the_count_before_it() {
        let (image, layout) = image();
        for number in 1..=200 {
            image.put(&layout, number);
        }
        for hole in 201 - GROUP_RECORDS_MAX + 1..200 {
            image.slot(&layout, hole, |slot| slot[9] ^= 1);
            assert_eq!(image.newest(&layout), hole - 1, "hole at {hole}");
            image.put(&layout, hole);
        }
    }

    #[test]
    fn a_torn_first_slot_of_a_lap_falls_back_to_the_lap_before() {
        let (image, layout) = image();
        let slots = layout.record_slots();
        for number in 1..=slots {
            image.put(&layout, number);
        }
        image.slot(&layout, 1, |slot| slot[2000] ^= 1);
        assert_eq!(image.newest(&layout), slots);
    }

    #[test]
    fn the_listing_names_records_and_bad_slots() {
        let (image, layout) = image();
        for number in 1..=3 {
            image.put(&layout, number);
        }
        image.slot(&layout, 2, |slot| slot[4000] ^= 1);
        image.slot(&layout, 9, |slot| record(1).encode(slot));
        let listing = list(&image, DISK_BYTES_MIN).unwrap();
        assert_eq!(listing.records, [record(1), record(3)]);
        assert_eq!(
            listing.bad,
            [
                (layout.record_offset(2), BadRecord::Checksum),
                (layout.record_offset(9), BadRecord::Magic)
            ]
        );
    }
}
