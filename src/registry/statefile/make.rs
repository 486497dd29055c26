//! Formatting a set of disks, and putting a new one in for a broken one.

use super::device::{Aligned, Device};
use super::disk::{decode_block, read_header, read_value, wall_us};
use super::fault::DiskFault;
use super::layout::{Beat, Block, Geometry, Header, ValueRef};
use super::page::PAGE_BYTES;
use super::paxos::{HostSlot, Record, ValueId, majority, merge};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Times that blocks and values are read anew; a host writes over a value that it no longer
/// names after two more changes at the earliest, so the second try finds it whole.
const COPY_TRIES: u32 = 8;

/// Bytes zeroed at a time.
const CHUNK_BYTES: usize = 1024 * 1024;

/// Why nothing was formatted or replaced.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Impossible numbers.
    #[error("{0}")]
    Geometry(&'static str),
    /// The same disk twice, or not as many as needed.
    #[error("{0}")]
    Disks(String),
    /// There is something on it already.
    #[error(
        "{path}: {what}; look at it with `pollux statefile show`, and give --force to overwrite it"
    )]
    NotEmpty {
        /// The disk.
        path: PathBuf,
        /// What is there.
        what: String,
    },
    /// A disk cannot be used.
    #[error("{path}: {fault}; {}", fault.remedy())]
    Disk {
        /// The disk.
        path: PathBuf,
        /// Why not.
        fault: DiskFault,
    },
    /// A value that has to be copied is nowhere whole.
    #[error(
        "a value of host slot {} is damaged on every disk that names it; nothing was put on the new disk", host.0
    )]
    Value {
        /// Whose.
        host: HostSlot,
    },
}

fn at(path: &Path, fault: DiskFault) -> MakeError {
    MakeError::Disk {
        path: path.to_owned(),
        fault,
    }
}

fn io_at(path: &Path, what: &'static str) -> impl Fn(io::Error) -> MakeError {
    move |why| at(path, DiskFault::Io { what, why })
}

/// A new set on `paths`, in the order of their indexes. Without `force` only disks that hold
/// nothing are taken. Files are created and grown as needed.
///
/// # Errors
/// [`MakeError`]. Disks are checked first, all of them; nothing is written if one is refused.
pub fn format(
    paths: &[PathBuf],
    geometry: Geometry,
    pool: Uuid,
    force: bool,
) -> Result<(), MakeError> {
    geometry.check().map_err(MakeError::Geometry)?;
    if paths.len() != usize::from(geometry.disks) {
        let what = format!(
            "{} disks were given for a set of {}",
            paths.len(),
            geometry.disks
        );
        return Err(MakeError::Disks(what));
    }
    let devices: Vec<Device> = paths
        .iter()
        .map(|path| prepare(path, geometry.total_bytes(), force))
        .collect::<Result<_, _>>()?;
    for (a, path) in paths.iter().enumerate() {
        if paths[..a].iter().any(|other| same(other, path)) {
            let what = format!("{} is given twice", path.display());
            return Err(MakeError::Disks(what));
        }
    }
    for (disk, (path, device)) in (0_u16..).zip(paths.iter().zip(&devices)) {
        let header = Header {
            pool,
            disk_id: Uuid::new_v4(),
            disk,
            geometry,
            set: 1,
        };
        let blocks = (0..geometry.slots)
            .map(|slot| Block::unused(pool, HostSlot(slot), disk, 1))
            .collect::<Vec<_>>();
        fill(device, &header, &blocks, &[]).map_err(io_at(path, "format it"))?;
    }
    Ok(())
}

fn same(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// Open a disk that is to be overwritten.
fn prepare(path: &Path, bytes: u64, force: bool) -> Result<Device, MakeError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(io_at(path, "open it"))?;
    let device = Device::open(path, true).map_err(io_at(path, "open it"))?;
    let have = device.size().map_err(io_at(path, "find its size"))?;
    if !force {
        let what = match read_header(&device) {
            Ok((header, _)) => Some(format!(
                "it is disk {} of the statefile of pool {}",
                header.disk, header.pool
            )),
            Err(DiskFault::Io { what, why }) => return Err(io_at(path, what)(why)),
            Err(_) => first_used(&device, have.min(bytes))
                .map_err(io_at(path, "read it"))?
                .map(|at| format!("it is not empty (byte {at})")),
        };
        if let Some(what) = what {
            return Err(MakeError::NotEmpty {
                path: path.to_owned(),
                what,
            });
        }
    }
    if have < bytes {
        let kind = file
            .metadata()
            .map_err(io_at(path, "find its size"))?
            .file_type();
        if kind.is_block_device() {
            return Err(at(path, DiskFault::WrongSize { have, need: bytes }));
        }
        file.set_len(bytes).map_err(io_at(path, "make it larger"))?;
    }
    Ok(device)
}

/// The first byte that is not zero.
fn first_used(device: &Device, bytes: u64) -> io::Result<Option<u64>> {
    let page = PAGE_BYTES as u64;
    let mut at = 0;
    while at < bytes {
        // A rest of less than a block cannot be read directly; it is grown over later.
        let len = (bytes - at).min(CHUNK_BYTES as u64) / page * page;
        if len == 0 {
            return Ok(Some(at));
        }
        let chunk = device.read(at, usize::try_from(len).unwrap_or(CHUNK_BYTES))?;
        if let Some(used) = chunk.bytes().iter().position(|b| *b != 0) {
            return Ok(Some(at + used as u64));
        }
        at += len;
    }
    Ok(None)
}

/// A value to be copied: whose area, where in it, its bytes.
type Copied = (HostSlot, ValueRef, Arc<[u8]>);

/// Put everything on a disk, its header last: cut short, it stays unformatted.
fn fill(device: &Device, header: &Header, blocks: &[Block], values: &[Copied]) -> io::Result<()> {
    let geometry = header.geometry;
    let total = geometry.total_bytes();
    let mut at = 0;
    while at < total {
        let len = (total - at).min(CHUNK_BYTES as u64);
        let zeros = Aligned::zeroed(usize::try_from(len).unwrap_or(CHUNK_BYTES));
        device.write(at, &zeros)?;
        at += len;
    }
    for (host, value, bytes) in values {
        device.write(
            geometry.value_at(*host, value.slot),
            &Aligned::copy_of(bytes),
        )?;
    }
    for block in blocks {
        device.write(
            geometry.block_at(block.host),
            &Aligned::copy_of(&*block.encode()),
        )?;
        let beat = Beat {
            pool: header.pool,
            host: block.host,
            disk: header.disk,
            seq: 0,
            payload: Vec::new(),
        };
        if let Some(page) = beat.encode() {
            device.write(geometry.beat_at(block.host), &Aligned::copy_of(&*page))?;
        }
    }
    device.write(0, &Aligned::copy_of(&*header.encode()))
}

/// Put `new` in as disk `index`, with what `others` know; the hosts may go on meanwhile.
///
/// A majority of the old set and one of the new set must have a disk in common that knows of
/// both. So first the generation in the headers of *all* other disks is raised: a host of the
/// old generation reads one of those headers in every phase, and from then on completes none.
/// Whatever it had completed is in the blocks that are read after that, on one of these disks.
/// Only then the new disk is written, its header last. Cut short at any step, it leaves a set
/// that hosts refuse, and running it again completes it.
///
/// # Errors
/// [`MakeError`]; before the first header is raised, nothing was changed.
pub fn replace(
    others: &[PathBuf],
    index: u16,
    new: &Path,
    force: bool,
) -> Result<Header, MakeError> {
    let mut sources: Vec<(&Path, Device, Header)> = Vec::new();
    for path in others {
        let device = Device::open(path, true).map_err(io_at(path, "open it"))?;
        let (header, _) = read_header(&device).map_err(|fault| at(path, fault))?;
        sources.push((path, device, header));
    }
    let first = match sources.first() {
        Some((_, _, header)) => header.clone(),
        None => return Err(MakeError::Disks("no other disk was given".to_owned())),
    };
    let geometry = first.geometry;
    let disks = usize::from(geometry.disks);
    if disks == 1 {
        return Err(MakeError::Disks(
            "a statefile of one disk has no others to copy from; stop all hosts and copy the disk as it is, or format a new one".to_owned(),
        ));
    }
    if index >= geometry.disks {
        let what = format!("there is no disk {index} in a set of {disks} (0 is the first)");
        return Err(MakeError::Disks(what));
    }
    for (n, (path, _, header)) in sources.iter().enumerate() {
        if header.pool != first.pool {
            let fault = DiskFault::Foreign {
                found: header.pool,
                expected: first.pool,
            };
            return Err(at(path, fault));
        }
        if header.geometry != geometry {
            return Err(at(path, DiskFault::Geometry));
        }
        let twice = sources[..n].iter().any(|(_, _, h)| h.disk == header.disk);
        if twice || header.disk == index || same(path, new) {
            let what = format!(
                "{} is disk {}: give the disks that stay, each once, and not the one to be replaced",
                path.display(),
                header.disk
            );
            return Err(MakeError::Disks(what));
        }
    }
    // Of three disks both others: with one alone, what the broken one and the missing one
    // had decided between them would be lost.
    if sources.len() != disks - 1 || sources.len() < majority(disks) {
        let what = format!(
            "all {} other disks are needed, {} were given: what the missing one knows may be decided",
            disks - 1,
            sources.len()
        );
        return Err(MakeError::Disks(what));
    }
    // A block that cannot be read must be found before anything is changed.
    for (path, device, header) in &sources {
        blocks_of(device, header).map_err(|fault| at(path, fault))?;
    }
    let device = prepare(new, geometry.total_bytes(), force)?;
    let set = sources.iter().map(|(_, _, h)| h.set).max().unwrap_or(0) + 1;
    for (path, device, header) in &mut sources {
        header.set = set;
        device
            .write(0, &Aligned::copy_of(&*header.encode()))
            .map_err(io_at(path, "raise its set generation"))?;
    }
    let header = Header {
        disk: index,
        disk_id: Uuid::new_v4(),
        set,
        ..first
    };
    let mut tries = 1;
    let (blocks, values) = loop {
        match copy_of(&sources, &header) {
            // A host that is at work wrote over the value after its block was read.
            Err(MakeError::Value { .. }) if tries < COPY_TRIES => tries += 1,
            copied => break copied?,
        }
    };
    fill(&device, &header, &blocks, &values).map_err(io_at(new, "write it"))?;
    Ok(header)
}

/// What the disks know of every host, for the disk of `header`.
fn copy_of(
    sources: &[(&Path, Device, Header)],
    header: &Header,
) -> Result<(Vec<Block>, Vec<Copied>), MakeError> {
    let mut found = Vec::new();
    for (path, device, header) in sources {
        found.push(blocks_of(device, header).map_err(|fault| at(path, fault))?);
    }
    let mut blocks = Vec::new();
    let mut values = Vec::new();
    for slot in 0..header.geometry.slots {
        let of_host: Vec<(&Device, &Block)> = sources
            .iter()
            .zip(&found)
            .map(|((_, device, _), blocks)| (device, &blocks[usize::from(slot)]))
            .collect();
        let (block, copied) = merged(&of_host, header, HostSlot(slot))?;
        blocks.push(block);
        values.extend(copied);
    }
    Ok((blocks, values))
}

fn blocks_of(device: &Device, header: &Header) -> Result<Vec<Block>, DiskFault> {
    let pass = device
        .read(0, header.geometry.pass_bytes())
        .map_err(|why| DiskFault::Io {
            what: "read its blocks",
            why,
        })?;
    (0..header.geometry.slots)
        .zip(pass.bytes().chunks_exact(PAGE_BYTES).skip(1))
        .map(|(slot, page)| decode_block(page, HostSlot(slot), header).map(|(block, _)| block))
        .collect()
}

/// One host's block for the new disk, and the values it names.
fn merged(
    of_host: &[(&Device, &Block)],
    header: &Header,
    host: HostSlot,
) -> Result<(Block, Vec<Copied>), MakeError> {
    let records: Vec<Record> = of_host.iter().map(|(_, block)| block.record).collect();
    let record = merge(&records).unwrap_or(Record::FIRST);
    let newest = of_host.iter().max_by_key(|(_, block)| block.seq);
    let mut copied = Vec::new();
    let mut copy = |id: Option<ValueId>, slot: u16| {
        let Some(id) = id else { return Ok(None) };
        let bytes = of_host.iter().find_map(|(device, block)| {
            let value = [block.chosen, block.proposed]
                .into_iter()
                .flatten()
                .find(|value| value.id == id)?;
            read_value(device, &header.geometry, host, value).ok()
        });
        let value = ValueRef { slot, id };
        copied.push((host, value, bytes.ok_or(MakeError::Value { host })?));
        Ok(Some(value))
    };
    let chosen = copy(record.chosen, 0)?;
    let proposed = copy(record.proposed, 1)?;
    let mut block = Block::unused(header.pool, host, header.disk, header.set);
    block.record = record;
    block.chosen = chosen;
    block.proposed = proposed;
    if let Some((_, newest)) = newest {
        block.seq = newest.seq;
        block.name.clone_from(&newest.name);
        block.written_us = if newest.name.is_empty() { 0 } else { wall_us() };
    }
    Ok((block, copied))
}
