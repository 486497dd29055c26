mod beats;
mod damage;
mod registry;
mod replace;

use super::device::hook;
use super::paxos::HostSlot;
use super::{Geometry, Statefile, StatefileOptions, format};
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const POOL: Uuid = Uuid::from_u128(0x9011);
/// For tests in which every answer comes: no machine is so slow.
const PATIENT: Duration = Duration::from_secs(120);
const GEOMETRY: Geometry = Geometry {
    disks: 3,
    slots: 4,
    slot_bytes: 64 * 1024,
};

/// A formatted set in a directory of its own, which has direct I/O where the build does.
struct Set {
    disks: Vec<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Set {
    fn new(disks: u16) -> Self {
        Self::of(Geometry { disks, ..GEOMETRY }, POOL)
    }

    fn of(geometry: Geometry, pool: Uuid) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disks: Vec<PathBuf> = (0..geometry.disks)
            .map(|n| dir.path().join(format!("disk{n}")))
            .collect();
        format(&disks, geometry, pool, false).unwrap();
        Self { disks, _dir: dir }
    }

    fn options(&self, slot: u16) -> StatefileOptions {
        StatefileOptions {
            disks: self.disks.clone(),
            pool: Some(POOL),
            slot: HostSlot(slot),
            name: format!("host{slot}"),
            take_slot: false,
            call_wait: PATIENT,
        }
    }

    fn open(&self, slot: u16) -> Statefile {
        Statefile::open(self.options(slot)).unwrap()
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        for disk in &self.disks {
            hook::clear(disk);
        }
    }
}

/// Change one byte of a file.
fn damage(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn kinds(statefile: &Statefile) -> Vec<Option<&'static str>> {
    let faults = statefile.faults().iter();
    faults.map(|f| f.as_ref().map(|f| f.kind())).collect()
}
