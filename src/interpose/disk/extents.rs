//! An interval map of disk content: what one epoch wrote, newest write winning.
//!
//! Pure. Extents never overlap. A new write cuts what lies under it; what remains of a cut extent
//! shares the old buffer, unless it has become a small part of it: then it is copied, so that a
//! guest cannot make the host keep much more memory than the map accounts for.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;

/// What one write puts on the disk.
#[derive(Clone, PartialEq, Eq)]
pub enum WriteData {
    /// These bytes.
    Data(Bytes),
    /// This many zero bytes; storage stays allocated.
    Zero(u64),
    /// This many bytes given up. They read as zeros from now on, on both hosts alike (NBD leaves
    /// the content after a trim open; two copies must not differ). Storage is freed where the file
    /// system can.
    Trim(u64),
}

impl WriteData {
    /// Bytes of disk covered.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero(len) | Self::Trim(len) => *len,
        }
    }

    /// Covers nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Debug for WriteData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Data(bytes) => write!(f, "Data({} bytes)", bytes.len()),
            Self::Zero(len) => write!(f, "Zero({len})"),
            Self::Trim(len) => write!(f, "Trim({len})"),
        }
    }
}

/// One write: where and what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskWrite {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Content.
    pub data: WriteData,
}

impl DiskWrite {
    /// First byte after the write; saturates, so that an absurd offset fails a bounds check.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.data.len())
    }
}

/// Memory an extent costs beside its bytes: tree node share, two handles, allocator overhead.
pub(super) const EXTENT_OVERHEAD_BYTES: u64 = 128;

/// A remainder smaller than this part of its buffer is copied out of it.
const KEEP_SHARED_DIVISOR: usize = 4;

/// Extents of one epoch by offset.
#[derive(Clone, Default, Debug)]
pub(super) struct ExtentMap {
    extents: BTreeMap<u64, Extent>,
    /// Live payload bytes (zeros and trims have none).
    payload_bytes: u64,
}

#[derive(Clone, Debug)]
struct Extent {
    data: WriteData,
    /// Size of the buffer `data` is a slice of; 0 without one.
    buffer_bytes: usize,
}

/// Part of a read's answer.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// From the overlay.
    Data(Bytes),
    /// Zeros of this length.
    Zero(u64),
    /// This much from the file.
    Base(u64),
}

impl ExtentMap {
    /// Put a write on top. Empty writes change nothing.
    pub fn insert(&mut self, write: DiskWrite) {
        let buffer_bytes = match &write.data {
            WriteData::Data(bytes) => bytes.len(),
            WriteData::Zero(_) | WriteData::Trim(_) => 0,
        };
        self.insert_extent(
            write.offset,
            Extent {
                data: write.data,
                buffer_bytes,
            },
        );
    }

    fn insert_extent(&mut self, offset: u64, extent: Extent) {
        let len = extent.data.len();
        if len == 0 {
            return;
        }
        self.clear(offset..offset + len);
        self.payload_bytes += extent.payload();
        self.extents.insert(offset, extent);
    }

    /// Cut a hole: nothing of this map covers `range` afterwards.
    fn clear(&mut self, range: Range<u64>) {
        // Left neighbour that reaches into the range.
        if let Some((&start, extent)) = self.extents.range_mut(..range.start).next_back() {
            let end = start + extent.data.len();
            if end > range.start {
                self.payload_bytes -= extent.payload();
                let tail = (end > range.end).then(|| extent.slice(range.end - start, end - start));
                let head = extent.slice(0, range.start - start);
                self.payload_bytes += head.payload();
                *extent = head;
                if let Some(tail) = tail {
                    self.payload_bytes += tail.payload();
                    self.extents.insert(range.end, tail);
                    return;
                }
            }
        }
        while let Some((&start, _)) = self.extents.range(range.clone()).next() {
            let Some(extent) = self.extents.remove(&start) else {
                return;
            };
            self.payload_bytes -= extent.payload();
            let end = start + extent.data.len();
            if end > range.end {
                let tail = extent.slice(range.end - start, end - start);
                self.payload_bytes += tail.payload();
                self.extents.insert(range.end, tail);
            }
        }
    }

    /// Put `newer` on top of this map.
    pub fn merge(&mut self, newer: Self) {
        for (offset, extent) in newer.extents {
            self.insert_extent(offset, extent);
        }
    }

    /// Call `hit(offset, piece)` for every part of `range` this map covers, ascending.
    fn overlaps(&self, range: &Range<u64>, mut hit: impl FnMut(u64, Piece)) {
        let first = self
            .extents
            .range(..=range.start)
            .next_back()
            .filter(|(start, extent)| *start + extent.data.len() > range.start)
            .map_or(range.start, |(start, _)| *start);
        for (&start, extent) in self.extents.range(first..range.end) {
            let from = start.max(range.start);
            let to = (start + extent.data.len()).min(range.end);
            let piece = match extent.data.slice(from - start, to - start) {
                WriteData::Data(bytes) => Piece::Data(bytes),
                WriteData::Zero(len) | WriteData::Trim(len) => Piece::Zero(len),
            };
            hit(from, piece);
        }
    }

    /// The map's content as writes: ascending offsets, no overlaps. Buffers are shared.
    pub fn writes(&self) -> Vec<DiskWrite> {
        self.extents
            .iter()
            .map(|(&offset, extent)| DiskWrite {
                offset,
                data: extent.data.clone(),
            })
            .collect()
    }

    /// Offset ranges covered, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.extents
            .iter()
            .map(|(&offset, extent)| offset..offset + extent.data.len())
    }

    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Live payload bytes.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Memory to account for: payload and overhead.
    pub fn cost_bytes(&self) -> u64 {
        self.payload_bytes + self.extents.len() as u64 * EXTENT_OVERHEAD_BYTES
    }
}

impl Extent {
    fn payload(&self) -> u64 {
        match &self.data {
            WriteData::Data(bytes) => bytes.len() as u64,
            WriteData::Zero(_) | WriteData::Trim(_) => 0,
        }
    }

    fn slice(&self, from: u64, to: u64) -> Self {
        match self.data.slice(from, to) {
            WriteData::Data(bytes) if bytes.len() * KEEP_SHARED_DIVISOR < self.buffer_bytes => {
                let copy = Bytes::copy_from_slice(&bytes);
                Self {
                    buffer_bytes: copy.len(),
                    data: WriteData::Data(copy),
                }
            }
            data => Self {
                data,
                buffer_bytes: self.buffer_bytes,
            },
        }
    }
}

impl WriteData {
    /// The part `from..to`; the caller keeps it inside.
    fn slice(&self, from: u64, to: u64) -> Self {
        match self {
            // Inside a buffer that exists, so the offsets fit usize.
            #[allow(clippy::cast_possible_truncation)]
            Self::Data(bytes) => Self::Data(bytes.slice(from as usize..to as usize)),
            Self::Zero(_) => Self::Zero(to - from),
            Self::Trim(_) => Self::Trim(to - from),
        }
    }
}

/// What a read of `range` sees: `maps` newest first, then the file. The pieces cover the range
/// without gaps, ascending.
pub(super) fn resolve<'a>(
    range: Range<u64>,
    maps: impl Iterator<Item = &'a ExtentMap>,
) -> Vec<Piece> {
    // Parts not yet covered, ascending, and what was found so far.
    let mut open = vec![range];
    let mut found: Vec<(u64, Piece)> = Vec::new();
    for map in maps.filter(|map| !map.is_empty()) {
        let mut still_open = Vec::with_capacity(open.len());
        for part in open {
            let mut at = part.start;
            map.overlaps(&part, |offset, piece| {
                if offset > at {
                    still_open.push(at..offset);
                }
                at = offset + piece.len();
                found.push((offset, piece));
            });
            if at < part.end {
                still_open.push(at..part.end);
            }
        }
        open = still_open;
        if open.is_empty() {
            break;
        }
    }
    found.extend(
        open.into_iter()
            .map(|part| (part.start, Piece::Base(part.end - part.start))),
    );
    found.sort_unstable_by_key(|(offset, _)| *offset);
    found.into_iter().map(|(_, piece)| piece).collect()
}

impl Piece {
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero(len) | Self::Base(len) => *len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(offset: u64, byte: u8, len: usize) -> DiskWrite {
        DiskWrite {
            offset,
            data: WriteData::Data(Bytes::from(vec![byte; len])),
        }
    }

    #[test]
    fn a_write_in_the_middle_splits_what_lies_under_it() {
        let mut map = ExtentMap::default();
        map.insert(data(0, 1, 100));
        map.insert(DiskWrite {
            offset: 40,
            data: WriteData::Trim(10),
        });
        let ranges: Vec<_> = map.ranges().collect();
        assert_eq!(ranges, [0..40, 40..50, 50..100]);
        assert_eq!(map.payload_bytes(), 90);
    }

    #[test]
    fn a_small_remainder_does_not_keep_a_large_buffer() {
        let mut map = ExtentMap::default();
        map.insert(data(0, 1, 1 << 20));
        map.insert(data(512, 2, (1 << 20) - 512));
        let (_, rest) = map.extents.first_key_value().expect("an extent");
        assert_eq!(rest.buffer_bytes, 512);
    }

    #[test]
    fn empty_writes_change_nothing() {
        let mut map = ExtentMap::default();
        map.insert(DiskWrite {
            offset: 7,
            data: WriteData::Zero(0),
        });
        assert!(map.is_empty());
    }
}
