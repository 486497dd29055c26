//! Tests of the disk as a whole.

mod bench;
mod model;
mod modes;
mod nbd_clients;

use super::*;
use crate::pool::{Epoch, Generation};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

pub(super) const MIB: u64 = 1 << 20;

/// An open disk and the folder it lies in.
pub(super) struct TestDisk {
    pub disk: Arc<Disk>,
    pub path: PathBuf,
    pub folder: tempfile::TempDir,
}

pub(super) fn test_disk(size: u64, change: impl FnOnce(&mut DiskOptions)) -> TestDisk {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk.raw");
    create_sparse(&path, size).expect("an image");
    let mut options = DiskOptions::new(Mode::Overlay { epoch: Epoch(1) }, Generation(5));
    change(&mut options);
    let disk = Disk::open(&path, size, options).expect("a disk");
    TestDisk { disk, path, folder }
}

pub(super) fn data(offset: u64, byte: u8, len: usize) -> DiskWrite {
    DiskWrite {
        offset,
        data: WriteData::Data(Bytes::from(vec![byte; len])),
    }
}

pub(super) fn put(disk: &Disk, write: DiskWrite) {
    disk.guest_write(write, false, Instant::now())
        .expect("a write");
}

pub(super) fn get(disk: &Disk, offset: u64, len: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let done = disk.guest_read(offset, len, &mut out, guest::Patience::Wait, Instant::now());
    assert!(done.expect("a read"));
    out
}
