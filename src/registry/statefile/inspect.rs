//! Looks at the disks of a statefile and says what is there and what is wrong, for `pollux
//! statefile show` and `check`. Writes nothing.

use super::device::Device;
use super::disk::{decode_block, read_header, read_value, wall_us};
use super::document::Document;
use super::fault::DiskFault;
use super::layout::{BadBeat, Beat, Block, Geometry, Header};
use super::page::{BadPage, PAGE_BYTES};
use super::paxos::{HostSlot, Instance, ValueId, majority};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Harmless, and mends itself.
    Note,
    /// A disk does not count, or soon will not.
    Problem,
}

/// Something found.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// Which disk; `None` for the set.
    pub disk: Option<PathBuf>,
    /// One word: `io`, `wrong-size`, `unformatted`, `corrupt`, `foreign`, `swapped`,
    /// `geometry`, `old-set`, `stale`, `torn`, `value`, `majority`, `contradiction`.
    pub kind: &'static str,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// A disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// Where it is.
    pub path: PathBuf,
    /// Its header, if it has one.
    pub header: Option<Header>,
    /// Whether it is read past the page cache.
    pub direct: bool,
    /// Whether it counts.
    pub well: bool,
}

/// A host slot that is or was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// Its slot.
    pub slot: HostSlot,
    /// Its name.
    pub name: String,
    /// The instance it last worked on.
    pub instance: Instance,
    /// Its last write, by its own clock, age in microseconds by this host's.
    pub written_us_ago: u64,
    /// Its write counter on each disk, by index; `None` where it cannot be read.
    pub seq: Vec<Option<u64>>,
    /// Sequence of its newest storage heartbeat; 0 if it never wrote one.
    pub beat: u64,
}

/// A key of the pool document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyReport {
    /// The key.
    pub key: String,
    /// Its version.
    pub version: u64,
    /// Bytes of its value.
    pub bytes: usize,
}

/// Everything found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The pool, if a disk says one.
    pub pool: Option<Uuid>,
    /// How its disks are divided.
    pub geometry: Option<Geometry>,
    /// The disks as given.
    pub disks: Vec<DiskReport>,
    /// Slots in use.
    pub hosts: Vec<HostReport>,
    /// The newest instance known to be chosen, as the blocks say it.
    pub instance: Option<Instance>,
    /// A later one is proposed, and may be chosen already.
    pub proposed: bool,
    /// The keys of the newest document found; its values are for those who may read them.
    pub keys: Vec<KeyReport>,
    /// Everything found wrong.
    pub problems: Vec<Problem>,
}

impl Report {
    /// Nothing worse than a note.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.problems.iter().all(|p| p.severity < Severity::Problem)
    }

    fn problem(&mut self, disk: Option<&Path>, kind: &'static str, what: String, remedy: &str) {
        self.problems.push(Problem {
            severity: Severity::Problem,
            disk: disk.map(Path::to_owned),
            kind,
            what,
            remedy: remedy.to_owned(),
        });
    }

    fn fault(&mut self, disk: &Path, fault: &DiskFault) {
        self.problem(Some(disk), fault.kind(), fault.to_string(), fault.remedy());
    }

    fn note(&mut self, disk: &Path, what: String) {
        self.problems.push(Problem {
            severity: Severity::Note,
            disk: Some(disk.to_owned()),
            kind: "torn",
            what,
            remedy: "nothing: the next write of that host mends it".to_owned(),
        });
    }
}

/// A disk that is open.
struct Open {
    at: usize,
    device: Device,
    header: Header,
    blocks: Vec<Option<Block>>,
}

/// Look at `paths`, which should be all disks of a set in the order of their indexes.
#[must_use]
pub fn inspect(paths: &[PathBuf], pool: Option<Uuid>) -> Report {
    let mut report = Report {
        pool,
        geometry: None,
        disks: Vec::new(),
        hosts: Vec::new(),
        instance: None,
        proposed: false,
        keys: Vec::new(),
        problems: Vec::new(),
    };
    let mut open = open_all(paths, &mut report);
    check_set(paths, &mut open, &mut report);
    let mut beats: Vec<Vec<u64>> = Vec::new();
    for disk in &mut open {
        beats.push(look_at(&paths[disk.at], disk, &mut report));
    }
    check_stale(paths, &open, &mut report);
    let bad: Vec<&Path> = report
        .problems
        .iter()
        .filter(|p| p.severity == Severity::Problem)
        .filter_map(|p| p.disk.as_deref())
        .collect();
    let well: Vec<bool> = paths
        .iter()
        .map(|path| !bad.contains(&path.as_path()))
        .collect();
    for (disk, well) in report.disks.iter_mut().zip(&well) {
        disk.well = *well;
    }
    let counted = well.iter().filter(|well| **well).count();
    if let Some(geometry) = report.geometry {
        let disks = usize::from(geometry.disks);
        if paths.len() != disks {
            let what = format!("the set has {disks} disks, {} were given", paths.len());
            report.problem(
                None,
                "majority",
                what,
                "give all disks, in the order of their indexes",
            );
        } else if counted < majority(disks) {
            let what = format!("{counted} of {disks} disks count, a majority is needed");
            report.problem(
                None,
                "majority",
                what,
                "the registry stands still until enough of them are back",
            );
        }
    }
    hosts(&open, &beats, paths.len(), &mut report);
    newest(paths, &open, &mut report);
    report
}

fn open_all(paths: &[PathBuf], report: &mut Report) -> Vec<Open> {
    let mut open = Vec::new();
    for (at, path) in paths.iter().enumerate() {
        let device = Device::open(path, false).map_err(|why| DiskFault::Io {
            what: "open it",
            why,
        });
        let direct = device.as_ref().is_ok_and(|d| d.direct);
        let found = device.and_then(|device| {
            let (header, cut) = read_header(&device)?;
            Ok((device, header, cut))
        });
        let header = found.as_ref().ok().map(|(_, header, _)| header.clone());
        report.disks.push(DiskReport {
            path: path.clone(),
            header,
            direct,
            well: false,
        });
        match found {
            Ok((device, header, cut)) => {
                if cut {
                    report.note(path, "the last write of its header was cut".to_owned());
                }
                open.push(Open {
                    at,
                    device,
                    header,
                    blocks: Vec::new(),
                });
            }
            Err(fault) => report.fault(path, &fault),
        }
    }
    open
}

/// Which pool and set the disks are of, and which of them are of another.
fn check_set(paths: &[PathBuf], open: &mut Vec<Open>, report: &mut Report) {
    let alike = |pool: Uuid| open.iter().filter(|d| d.header.pool == pool).count();
    let Some(model) = open
        .iter()
        .filter(|d| report.pool.is_none_or(|pool| d.header.pool == pool))
        .max_by_key(|d| (alike(d.header.pool), d.header.set))
        .map(|d| d.header.clone())
    else {
        for disk in open.drain(..) {
            let fault = DiskFault::Foreign {
                found: disk.header.pool,
                expected: report.pool.unwrap_or_default(),
            };
            report.fault(&paths[disk.at], &fault);
        }
        return;
    };
    report.pool = Some(model.pool);
    report.geometry = Some(model.geometry);
    let expect = super::disk::Expect {
        pool: model.pool,
        set: model.set,
        geometry: model.geometry,
    };
    open.retain(|disk| {
        let index = u16::try_from(disk.at).unwrap_or(u16::MAX);
        match super::disk::check_header(&disk.header, index, &expect) {
            Ok(()) => true,
            Err(fault) => {
                report.fault(&paths[disk.at], &fault);
                false
            }
        }
    });
}

/// Read all blocks, values and heartbeats of a disk; the heartbeats' sequences by slot.
fn look_at(path: &Path, disk: &mut Open, report: &mut Report) -> Vec<u64> {
    let geometry = disk.header.geometry;
    let slots = usize::from(geometry.slots);
    let pages = match disk
        .device
        .read(0, geometry.pass_bytes() + slots * PAGE_BYTES)
    {
        Ok(pages) => pages,
        Err(why) => {
            let what = "read its blocks";
            report.fault(path, &DiskFault::Io { what, why });
            return Vec::new();
        }
    };
    let mut pages = pages.bytes().chunks_exact(PAGE_BYTES).skip(1);
    for (slot, page) in (0..geometry.slots).zip(pages.by_ref()) {
        let host = HostSlot(slot);
        match decode_block(page, host, &disk.header) {
            Ok((block, cut)) => {
                if cut {
                    let what = format!(
                        "the last write of host slot {slot} ({}) was cut; its block is whole",
                        block.name
                    );
                    report.note(path, what);
                }
                for value in [block.chosen, block.proposed].into_iter().flatten() {
                    let bytes = read_value(&disk.device, &geometry, host, value);
                    if bytes.is_err() && is_unchanged(disk, host, &block) {
                        report.problem(
                            Some(path),
                            "value",
                            format!(
                                "value slot {} of host slot {slot} ({}) is not what its block names",
                                value.slot, block.name
                            ),
                            "the other disks have it too; `pollux statefile replace` this one",
                        );
                    }
                }
                disk.blocks.push(Some(block));
            }
            Err(fault) => {
                report.fault(path, &fault);
                disk.blocks.push(None);
            }
        }
    }
    let mut beats = Vec::new();
    for (slot, page) in (0..geometry.slots).zip(pages) {
        let beat = Beat::decode(page).and_then(|beat| {
            let ours = beat.host.0 == slot
                && beat.disk == disk.header.disk
                && beat.pool == disk.header.pool;
            if ours {
                Ok(beat)
            } else {
                Err(BadPage::Nonsense("it is of another slot, disk or pool").into())
            }
        });
        match beat {
            Ok(beat) => beats.push(beat.seq),
            Err(e) => {
                beats.push(0);
                let what = format!("the storage heartbeat of host slot {slot}: {e}");
                match e {
                    BadBeat::Torn { .. } => report.note(path, what),
                    BadBeat::Page(_) => report.problem(
                        Some(path),
                        "corrupt",
                        what,
                        "that host's next heartbeat mends it; if none comes, `pollux statefile replace` the disk",
                    ),
                }
            }
        }
    }
    beats
}

/// Whether the host has not moved on since its block was read.
fn is_unchanged(disk: &Open, host: HostSlot, block: &Block) -> bool {
    disk.device
        .read(disk.header.geometry.block_at(host), PAGE_BYTES)
        .is_ok_and(|page| {
            decode_block(page.bytes(), host, &disk.header).is_ok_and(|(now, _)| now == *block)
        })
}

/// A disk that shows less than others say it had acknowledged, also when asked again.
fn check_stale(paths: &[PathBuf], open: &[Open], report: &mut Report) {
    for disk in open {
        let index = usize::from(disk.header.disk);
        for block in disk.blocks.iter().flatten() {
            let acked = open
                .iter()
                .filter_map(|other| other.blocks.get(usize::from(block.host.0))?.as_ref())
                .filter(|other| other.set == disk.header.set)
                .map(|other| other.acked[index])
                .max()
                .unwrap_or(0);
            let shows = block.seq;
            if shows < acked && is_unchanged(disk, block.host, block) {
                let fault = DiskFault::Stale {
                    host: block.host,
                    shows,
                    acked,
                };
                report.fault(&paths[disk.at], &fault);
            }
        }
    }
}

fn hosts(open: &[Open], beats: &[Vec<u64>], disks: usize, report: &mut Report) {
    let slots = report.geometry.map_or(0, |g| g.slots);
    for slot in (0..slots).map(HostSlot) {
        let at = usize::from(slot.0);
        let mut seq = vec![None; disks];
        let mut newest: Option<&Block> = None;
        for disk in open {
            if let Some(Some(block)) = disk.blocks.get(at) {
                seq[disk.at] = Some(block.seq);
                newest = newest.filter(|b| b.seq >= block.seq).or(Some(block));
            }
        }
        let beat = beats.iter().filter_map(|b| b.get(at)).max().copied();
        if let Some(block) = newest
            && (!block.name.is_empty() || beat.unwrap_or(0) > 0)
        {
            report.hosts.push(HostReport {
                slot,
                name: block.name.clone(),
                instance: block.record.instance,
                written_us_ago: wall_us().saturating_sub(block.written_us),
                seq,
                beat: beat.unwrap_or(0),
            });
        }
    }
}

/// The newest document that the blocks name, and whether they agree about it.
fn newest(paths: &[PathBuf], open: &[Open], report: &mut Report) {
    let blocks = || {
        open.iter()
            .flat_map(|disk| disk.blocks.iter().flatten().map(move |b| (disk, b)))
    };
    let Some(at) = blocks().map(|(_, b)| b.record.instance).max() else {
        return;
    };
    let newest = || blocks().filter(move |(_, b)| b.record.instance == at);
    let chosen = newest().next().and_then(|(_, b)| b.record.chosen);
    if newest().any(|(_, b)| b.record.chosen != chosen) {
        let what = format!(
            "the blocks name different documents as chosen in instance {}",
            at.0 - 1
        );
        let remedy = "stop every host of the pool and keep copies of all disks before anything else; one of them lies";
        report.problem(None, "contradiction", what, remedy);
        return;
    }
    let (instance, value) = match decided(open, at, report.geometry) {
        Some(id) => (at, Some(id)),
        None => (Instance(at.0 - 1), chosen),
    };
    report.instance = Some(instance);
    report.proposed = instance < at && newest().any(|(_, b)| b.record.proposed.is_some());
    let Some(id) = value else { return };
    let read = |id: ValueId| -> Option<Arc<[u8]>> {
        newest().find_map(|(disk, b)| {
            let value = [b.chosen, b.proposed]
                .into_iter()
                .flatten()
                .find(|value| value.id == id)?;
            read_value(&disk.device, &disk.header.geometry, b.host, value).ok()
        })
    };
    match read(id).and_then(|bytes| Document::decode(&bytes, id).ok()) {
        Some(document) => {
            report.keys = document
                .entries
                .iter()
                .map(|(key, entry)| KeyReport {
                    key: key.clone(),
                    version: entry.version,
                    bytes: entry.value.len(),
                })
                .collect();
        }
        // Hosts at work may have moved on meanwhile; then the others name it.
        None if newest().all(|(disk, b)| is_unchanged(disk, b.host, b)) => {
            let disks: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
            let what = format!(
                "the document of instance {} is whole on none of {}",
                instance.0,
                disks.join(", ")
            );
            let remedy = "bring back a disk that is missing; otherwise restore the disks from a backup, all hosts stopped";
            report.problem(None, "value", what, remedy);
        }
        None => {}
    }
}

/// The value proposed in instance `at` on a majority of the disks with nobody above it there,
/// which makes it the chosen one (`paxos.rs`).
fn decided(open: &[Open], at: Instance, geometry: Option<Geometry>) -> Option<ValueId> {
    let records = || {
        open.iter()
            .flat_map(|disk| disk.blocks.iter().flatten())
            .map(|b| b.record)
            .filter(|r| r.instance == at)
    };
    let top = records()
        .filter(|r| r.proposed.is_some())
        .max_by_key(|r| r.bal)?;
    let disks = open
        .iter()
        .filter(|disk| {
            let there = || disk.blocks.iter().flatten().map(|b| b.record);
            there().any(|r| r == top && r.mbal == top.bal)
                && !there().any(|r| r.instance == at && r.mbal > top.bal)
        })
        .count();
    let quorum = majority(geometry.map_or(usize::MAX, |g| g.disks.into()));
    top.proposed.filter(|_| disks >= quorum)
}
