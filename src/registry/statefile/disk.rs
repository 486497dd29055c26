//! One disk of the statefile as one host uses it: what is read is checked, what is written is
//! placed so that no value that a block on the disk may name is ever written over.
//!
//! Must never: write a block before the values it names are durable; hand on a record from a
//! disk that is not the one meant, or that has lost what it had acknowledged.

use super::device::{Aligned, Device};
use super::document::id_of;
use super::fault::DiskFault;
use super::layout::{BadBeat, Beat, Block, Geometry, Header, VALUE_SLOTS, ValueRef};
use super::page::{BadPage, PAGE_BYTES};
use super::paxos::{DISKS_MAX, HOSTS_MAX, HostSlot, Incarnation, Record, ValueId};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Which disk this must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expect {
    pub(super) pool: Uuid,
    pub(super) set: u64,
    pub(super) geometry: Geometry,
}

/// Per host and disk the highest write counter known to be acknowledged, of one set
/// generation. Shared by the disks of a host: each reads what blocks say about the others.
/// Held for a few instructions at a time, and never over I/O.
#[derive(Debug)]
pub(super) struct Evidence(Mutex<Acked>);

#[derive(Debug)]
struct Acked {
    set: u64,
    by_host: Vec<[u64; DISKS_MAX]>,
}

impl Evidence {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Acked {
            set: 0,
            by_host: vec![[0; DISKS_MAX]; HOSTS_MAX.into()],
        }))
    }

    fn acked(&self) -> MutexGuard<'_, Acked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A replaced disk owes nothing of what its predecessor had acknowledged.
    pub(super) fn begin_set(&self, set: u64) {
        let mut acked = self.acked();
        if acked.set != set {
            acked.set = set;
            acked.by_host.fill([0; DISKS_MAX]);
        }
    }

    /// What `disk` has acknowledged, by host.
    fn of_disk(&self, disk: usize) -> Vec<u64> {
        self.acked().by_host.iter().map(|row| row[disk]).collect()
    }

    fn learn(&self, host: HostSlot, disk: usize, set: u64, seq: u64) {
        let mut acked = self.acked();
        if acked.set == set {
            let known = &mut acked.by_host[usize::from(host.0)][disk];
            *known = seq.max(*known);
        }
    }

    /// What this host's next block says about the disks.
    pub(super) fn row(&self, host: HostSlot) -> [u64; DISKS_MAX] {
        self.acked().by_host[usize::from(host.0)]
    }
}

/// A record to be written, with the bytes of the values it names.
#[derive(Clone, Debug)]
pub(super) struct Write {
    pub(super) record: Record,
    pub(super) values: Vec<(ValueId, Arc<[u8]>)>,
    pub(super) seq: u64,
}

/// A disk.
pub(super) struct Disk {
    path: PathBuf,
    index: u16,
    me: HostSlot,
    name: String,
    device: Option<Device>,
    evidence: Arc<Evidence>,
    /// What this host's block on the disk names; `None` while that is not known.
    placed: Option<Vec<ValueRef>>,
    /// Which run this is, once it has written here.
    wrote: Option<Incarnation>,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> DiskFault {
    move |why| DiskFault::Io { what, why }
}

/// Check a header against what is expected of disk `index`.
pub(super) fn check_header(header: &Header, index: u16, expect: &Expect) -> Result<(), DiskFault> {
    if header.pool != expect.pool {
        return Err(DiskFault::Foreign {
            found: header.pool,
            expected: expect.pool,
        });
    }
    if header.disk != index {
        return Err(DiskFault::Swapped {
            found: header.disk,
            expected: index,
        });
    }
    if header.geometry != expect.geometry {
        return Err(DiskFault::Geometry);
    }
    if header.set != expect.set {
        return Err(DiskFault::SetChanged {
            found: header.set,
            expected: expect.set,
        });
    }
    Ok(())
}

/// Heartbeats go on whatever set generation the disk is of.
fn check_for_beats(first: &[u8], index: u16, expect: &Expect) -> Result<(), DiskFault> {
    let header = decode_header(first)?;
    let expect = Expect {
        set: header.set,
        ..*expect
    };
    check_header(&header, index, &expect)
}

fn decode_header(first: &[u8]) -> Result<Header, DiskFault> {
    match Header::decode(first) {
        Ok((header, _)) => Ok(header),
        Err(BadPage::Empty) => Err(DiskFault::Unformatted),
        Err(why) => Err(DiskFault::Header(why)),
    }
}

/// The header of a device.
pub(super) fn read_header(device: &Device) -> Result<(Header, bool), DiskFault> {
    let size = device.size().map_err(failed("find its size"))?;
    let page = PAGE_BYTES as u64;
    if size < page {
        return Err(DiskFault::WrongSize {
            have: size,
            need: page,
        });
    }
    let first = device
        .read(0, PAGE_BYTES)
        .map_err(failed("read its header"))?;
    let (header, cut) = Header::decode(first.bytes()).map_err(|why| match why {
        BadPage::Empty => DiskFault::Unformatted,
        why => DiskFault::Header(why),
    })?;
    let need = header.geometry.total_bytes();
    if size < need {
        return Err(DiskFault::WrongSize { have: size, need });
    }
    Ok((header, cut))
}

/// The block of `host` in `page`, and whether its write was cut; it must be of this disk.
pub(super) fn decode_block(
    page: &[u8],
    host: HostSlot,
    header: &Header,
) -> Result<(Block, bool), DiskFault> {
    let (block, cut) = Block::decode(page).map_err(|why| DiskFault::Block { host, why })?;
    if block.host != host || block.disk != header.disk || block.pool != header.pool {
        return Err(DiskFault::Misplaced { host });
    }
    Ok((block, cut))
}

/// The bytes of a value in the area of `host`.
pub(super) fn read_value(
    device: &Device,
    geometry: &Geometry,
    host: HostSlot,
    value: ValueRef,
) -> Result<Arc<[u8]>, DiskFault> {
    let len = usize::try_from(value.id.len).unwrap_or(usize::MAX);
    if u64::from(value.id.len) > geometry.slot_bytes {
        return Err(DiskFault::Gone);
    }
    let aligned = device
        .read(
            geometry.value_at(host, value.slot),
            len.next_multiple_of(PAGE_BYTES),
        )
        .map_err(failed("read a value"))?;
    let bytes = &aligned.bytes()[..len];
    if id_of(bytes) != value.id {
        return Err(DiskFault::Gone);
    }
    Ok(bytes.into())
}

/// Microseconds since 1970, for people.
pub(super) fn wall_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

impl Disk {
    pub(super) fn new(
        path: PathBuf,
        index: u16,
        me: HostSlot,
        name: String,
        evidence: Arc<Evidence>,
    ) -> Self {
        Self {
            path,
            index,
            me,
            name,
            device: None,
            evidence,
            placed: None,
            wrote: None,
        }
    }

    /// The device, opened if it is not, or if the path leads elsewhere by now.
    fn device(&mut self) -> Result<&Device, DiskFault> {
        let keep = self.device.take().filter(Device::is_still_there);
        let device = match keep {
            Some(device) => device,
            None => {
                self.placed = None;
                Device::open(&self.path, true).map_err(failed("open it"))?
            }
        };
        Ok(self.device.insert(device))
    }

    /// After an error, which disk this is and what is on it is looked up again; after an I/O
    /// error the device is opened anew as well.
    fn noted<T>(&mut self, result: Result<T, DiskFault>) -> Result<T, DiskFault> {
        if result.is_err() {
            self.placed = None;
        }
        if matches!(result, Err(DiskFault::Io { .. })) {
            self.device = None;
        }
        result
    }

    /// Its header, whatever it says.
    pub(super) fn header(&mut self) -> Result<Header, DiskFault> {
        let result = self
            .device()
            .and_then(read_header)
            .map(|(header, _)| header);
        self.noted(result)
    }

    /// The blocks of all hosts, by slot.
    pub(super) fn read(&mut self, expect: &Expect) -> Result<Vec<Block>, DiskFault> {
        let result = self.read_blocks(expect);
        self.noted(result)
    }

    fn read_blocks(&mut self, expect: &Expect) -> Result<Vec<Block>, DiskFault> {
        let index = usize::from(self.index);
        let slots = expect.geometry.slots;
        // What was acknowledged before this read began must be in it.
        let acked = self.evidence.of_disk(index);
        let (expected_disk, me, wrote) = (self.index, self.me, self.wrote);
        let device = self.device()?;
        let need = expect.geometry.total_bytes();
        let have = device.size().map_err(failed("find its size"))?;
        if have < need {
            return Err(DiskFault::WrongSize { have, need });
        }
        let aligned = device
            .read(0, expect.geometry.pass_bytes())
            .map_err(failed("read its blocks"))?;
        let (first, rest) = aligned.bytes().split_at(PAGE_BYTES);
        let header = decode_header(first)?;
        check_header(&header, expected_disk, expect)?;
        let mut blocks = Vec::with_capacity(slots.into());
        for (slot, page) in (0..slots).zip(rest.chunks_exact(PAGE_BYTES)) {
            let host = HostSlot(slot);
            let (block, _) = decode_block(page, host, &header)?;
            let acked = acked[usize::from(slot)];
            if block.seq < acked {
                let other_run = wrote.is_some_and(|run| run != block.record.incarnation);
                if host == me && other_run {
                    return Err(DiskFault::OtherRun { host });
                }
                return Err(DiskFault::Stale {
                    host,
                    shows: block.seq,
                    acked,
                });
            }
            blocks.push(block);
        }
        for block in &blocks {
            for (disk, seq) in block.acked.iter().enumerate() {
                self.evidence.learn(block.host, disk, block.set, *seq);
            }
        }
        Ok(blocks)
    }

    /// A value that the block of `host` names.
    pub(super) fn value(
        &mut self,
        expect: &Expect,
        host: HostSlot,
        id: ValueId,
    ) -> Result<Arc<[u8]>, DiskFault> {
        let geometry = expect.geometry;
        let result = self.device().and_then(|device| {
            let page = device
                .read(geometry.block_at(host), PAGE_BYTES)
                .map_err(failed("read a block"))?;
            let (block, _) =
                Block::decode(page.bytes()).map_err(|why| DiskFault::Block { host, why })?;
            let value = [block.chosen, block.proposed]
                .into_iter()
                .flatten()
                .find(|value| value.id == id && block.pool == expect.pool)
                .ok_or(DiskFault::Gone)?;
            read_value(device, &geometry, host, value)
        });
        self.noted(result)
    }

    /// Write this host's record; durable when this returns. After an error the block on the
    /// disk may be the old one or the new one.
    pub(super) fn write(&mut self, expect: &Expect, write: &Write) -> Result<(), DiskFault> {
        let result = self.write_record(expect, write);
        self.noted(result)
    }

    fn write_record(&mut self, expect: &Expect, write: &Write) -> Result<(), DiskFault> {
        let (me, index) = (self.me, self.index);
        self.device()?;
        let placed = match self.placed.take() {
            Some(placed) => placed,
            None => self.look_up_placed(expect)?,
        };
        let record = &write.record;
        let wanted = [record.chosen, record.proposed];
        let (places, fresh) = place(&placed, wanted);
        let acked = self.evidence.row(me);
        let name = self.name.clone();
        let device = self.device()?;
        for value in fresh {
            let bytes = write
                .values
                .iter()
                .find(|(id, _)| *id == value.id)
                .map(|(_, bytes)| Aligned::copy_of(bytes))
                .filter(|bytes| bytes.bytes().len() as u64 <= expect.geometry.slot_bytes)
                .ok_or(DiskFault::Gone)?;
            device
                .write(expect.geometry.value_at(me, value.slot), &bytes)
                .map_err(failed("write a value"))?;
        }
        let block = Block {
            pool: expect.pool,
            host: me,
            disk: index,
            set: expect.set,
            seq: write.seq,
            acked,
            written_us: wall_us(),
            name,
            record: *record,
            chosen: places[0],
            proposed: places[1],
        };
        // From here on until it is written, either block may be there: `placed` is unknown.
        device
            .write(
                expect.geometry.block_at(me),
                &Aligned::copy_of(&*block.encode()),
            )
            .map_err(failed("write its block"))?;
        self.wrote = Some(record.incarnation);
        self.placed = Some(places.into_iter().flatten().collect());
        self.evidence
            .learn(me, usize::from(index), expect.set, write.seq);
        Ok(())
    }

    /// The heartbeats of all hosts, by slot.
    pub(super) fn read_beats(
        &mut self,
        expect: &Expect,
    ) -> Result<Vec<Result<Beat, BadBeat>>, DiskFault> {
        let (geometry, index) = (expect.geometry, self.index);
        let result = self.device().and_then(|device| {
            let len = geometry.pass_bytes() + usize::from(geometry.slots) * PAGE_BYTES;
            let aligned = device.read(0, len).map_err(failed("read its heartbeats"))?;
            check_for_beats(&aligned.bytes()[..PAGE_BYTES], index, expect)?;
            let pages = aligned.bytes()[geometry.pass_bytes()..].chunks_exact(PAGE_BYTES);
            let beats = (0..geometry.slots).zip(pages).map(|(slot, page)| {
                let beat = Beat::decode(page)?;
                if beat.host.0 != slot || beat.disk != index || beat.pool != expect.pool {
                    return Err(BadPage::Nonsense("it is of another slot, disk or pool").into());
                }
                Ok(beat)
            });
            Ok(beats.collect())
        });
        self.noted(result)
    }

    /// Write this host's heartbeat.
    pub(super) fn write_beat(
        &mut self,
        expect: &Expect,
        payload: Vec<u8>,
        seq: u64,
    ) -> Result<(), DiskFault> {
        let (me, index) = (self.me, self.index);
        let beat = Beat {
            pool: expect.pool,
            host: me,
            disk: index,
            seq,
            payload,
        };
        let result = self.device().and_then(|device| {
            let first = device
                .read(0, PAGE_BYTES)
                .map_err(failed("read its header"))?;
            check_for_beats(first.bytes(), index, expect)?;
            let page = beat.encode().ok_or(DiskFault::Gone)?;
            device
                .write(expect.geometry.beat_at(me), &Aligned::copy_of(&*page))
                .map_err(failed("write its heartbeat"))
        });
        self.noted(result)
    }

    /// What this host's block on the disk names. A damaged block names nothing that anybody
    /// could read; this host's next write mends it.
    fn look_up_placed(&mut self, expect: &Expect) -> Result<Vec<ValueRef>, DiskFault> {
        let (me, index) = (self.me, self.index);
        let device = self.device()?;
        let (header, _) = read_header(device)?;
        check_header(&header, index, expect)?;
        let page = device
            .read(expect.geometry.block_at(me), PAGE_BYTES)
            .map_err(failed("read its block"))?;
        match decode_block(page.bytes(), me, &header) {
            Ok((block, _)) => Ok([block.chosen, block.proposed]
                .into_iter()
                .flatten()
                .collect()),
            Err(DiskFault::Block { .. }) => Ok(Vec::new()),
            Err(fault) => Err(fault),
        }
    }
}

/// Where the values of the next block go: those that the present block names stay, the others
/// get slots that it does not name. Also those that have to be written.
fn place(
    placed: &[ValueRef],
    wanted: [Option<ValueId>; 2],
) -> ([Option<ValueRef>; 2], Vec<ValueRef>) {
    let mut fresh: Vec<ValueRef> = Vec::new();
    let places = wanted.map(|id| {
        let id = id?;
        if let Some(there) = placed.iter().find(|value| value.id == id) {
            return Some(*there);
        }
        let taken = |slot: &u16| placed.iter().chain(&fresh).any(|value| value.slot == *slot);
        // Two named and one fresh leave one of four; see VALUE_SLOTS.
        let slot = (0..VALUE_SLOTS).find(|slot| !taken(slot))?;
        let value = ValueRef { slot, id };
        fresh.push(value);
        Some(value)
    });
    (places, fresh)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_a_block_names_is_never_written_over() {
        let id = |hash| ValueId { hash, len: 1 };
        let mut placed = Vec::new();
        for n in 0..200_u128 {
            // Values stay, move from proposed to chosen, or are both new.
            let wanted = match n % 3 {
                0 => [Some(id(n)), None],
                1 => [Some(id(n - 1)), Some(id(n))],
                _ => [Some(id(n + 1000)), Some(id(n + 2000))],
            };
            let (places, fresh) = place(&placed, wanted);
            for value in &fresh {
                assert!(placed.iter().all(|p: &ValueRef| p.slot != value.slot));
            }
            let next: Vec<ValueRef> = places.into_iter().flatten().collect();
            assert_eq!(
                next.iter().map(|v| Some(v.id)).collect::<Vec<_>>(),
                wanted
                    .into_iter()
                    .filter(Option::is_some)
                    .collect::<Vec<_>>()
            );
            assert!(next.len() < 2 || next[0].slot != next[1].slot);
            placed = next;
        }
    }
}
