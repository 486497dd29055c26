//! Modes, generations, pressure, seeding, bad images.

use super::super::guest::GuestIoError;
use super::super::*;
use super::{MIB, data, get, put, test_disk};
use crate::pool::{Epoch, Generation};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Instant;

#[test]
fn bad_images_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("d.raw");
    let open = |size, durability| {
        let options = DiskOptions {
            durability,
            ..DiskOptions::new(Mode::Direct, Generation(1))
        };
        Disk::open(&path, size, options)
            .map(drop)
            .expect_err("refused")
            .to_string()
    };
    assert!(open(MIB, Durability::Memory).contains("does not exist"));
    create_sparse(&path, MIB / 2).expect("an image");
    let smaller = open(MIB, Durability::Memory);
    assert!(
        smaller.contains("524288") && smaller.contains("1048576"),
        "{smaller}"
    );
    assert!(open(1000, Durability::Memory).contains("multiple of 512"));
    assert!(open(512, Durability::Disk).contains("durability = \"memory\""));
    let again = create_sparse(&path, MIB).expect_err("exists").to_string();
    assert!(again.contains("File exists"), "{again}");
    let huge = folder.path().join("huge.raw");
    assert!(matches!(
        create_sparse(&huge, 1 << 60),
        Err(DiskError::NoSpace { .. })
    ));
    assert!(!huge.exists(), "nothing left behind");
}

#[test]
fn an_uncommitted_write_never_reaches_the_file() {
    let test = test_disk(MIB, |_| {});
    put(&test.disk, data(0, 7, 4096));
    let first = test.disk.cut(Epoch(2)).expect("a cut");
    put(&test.disk, data(4096, 8, 4096));
    test.disk.cut(Epoch(3)).expect("a cut");
    test.disk.commit(first.epoch);
    test.disk.wait_written().expect("written");
    let file = std::fs::read(&test.path).expect("file");
    assert!(file[..4096].iter().all(|b| *b == 7));
    assert!(file[4096..].iter().all(|b| *b == 0));
    assert_eq!(get(&test.disk, 4096, 1), [8]);
}

#[test]
fn a_lower_generation_and_a_wrong_step_change_nothing() {
    let test = test_disk(MIB, |_| {});
    let disk = &test.disk;
    let stale = disk
        .set_mode(Mode::Direct, Generation(4))
        .expect_err("stale");
    assert!(matches!(stale, DiskError::StaleGeneration { .. }));
    assert!(disk.go_direct(Generation(4)).is_err());
    assert!(
        disk.apply(Generation(5), &[data(0, 1, 1)]).is_err(),
        "not a standby"
    );
    assert!(disk.discard_uncommitted().is_err(), "not stopped");
    assert!(disk.cut(Epoch(1)).is_err(), "not higher");
    put(disk, data(0, 7, 512));
    assert!(
        disk.set_mode(Mode::Standby, Generation(6)).is_err(),
        "uncommitted writes"
    );
    assert_eq!(
        (disk.mode(), disk.generation()),
        (Mode::Overlay { epoch: Epoch(1) }, Generation(5))
    );

    disk.set_mode(Mode::Stopped, Generation(6))
        .expect("deposed");
    let late = disk.guest_write(data(0, 9, 512), false, Instant::now());
    assert!(matches!(late, Err(GuestIoError::Stopped)));
    assert_eq!(disk.discard_uncommitted().expect("discarded"), 512);
    assert!(
        disk.set_mode(Mode::Direct, Generation(6)).is_err(),
        "same generation"
    );
    disk.set_mode(Mode::Standby, Generation(6))
        .expect("a standby now");
    assert!(
        disk.apply(Generation(5), &[data(0, 1, 1)]).is_err(),
        "stale epoch"
    );
    assert!(
        disk.apply(Generation(6), &[data(0, 1, 1), data(MIB, 1, 1)])
            .is_err(),
        "outside"
    );
    assert_eq!(get(disk, 0, 1), [0], "nothing of a bad epoch was applied");
    let refused = disk.guest_write(data(0, 9, 512), false, Instant::now());
    assert!(matches!(refused, Err(GuestIoError::Standby)));
    disk.guest_flush().expect("a standby's flush is harmless");
    disk.set_mode(Mode::Direct, Generation(7))
        .expect("promoted");
    put(disk, data(0, 9, 512));
    assert_eq!(std::fs::read(&test.path).expect("file")[0], 9);
}

#[test]
#[allow(clippy::single_range_in_vec_init)] // Lists of ranges that happen to have one.
fn seeding_sees_every_direct_write() {
    let test = test_disk(MIB, |options| options.mode = Mode::Direct);
    let disk = &test.disk;
    assert!(disk.allocated_ranges().expect("ranges").is_empty());
    put(disk, data(0, 1, 1));
    disk.begin_dirty_tracking();
    put(disk, data(2 * DIRTY_BLOCK_BYTES - 1, 2, 2));
    assert_eq!(
        disk.allocated_ranges().expect("ranges"),
        [0..3 * DIRTY_BLOCK_BYTES]
    );
    assert_eq!(
        disk.take_dirty(),
        [DIRTY_BLOCK_BYTES..3 * DIRTY_BLOCK_BYTES]
    );
    put(
        disk,
        DiskWrite {
            offset: 0,
            data: WriteData::Trim(1),
        },
    );
    disk.set_mode(Mode::Overlay { epoch: Epoch(1) }, Generation(5))
        .expect("mirrored");
    put(disk, data(MIB - 1, 1, 1));
    assert_eq!(
        disk.take_dirty(),
        [0..DIRTY_BLOCK_BYTES],
        "the overlay is not the file"
    );
    assert_eq!(disk.read_base(MIB - 1..MIB).expect("base")[..], [0]);
    assert!(disk.read_base(MIB..MIB + 1).is_err());
    disk.go_direct(Generation(5)).expect("solo");
    assert_eq!(disk.take_dirty(), [MIB - DIRTY_BLOCK_BYTES..MIB]);
}

/// The rule of `pressure`: at the limit a write waits, but not while a checkpoint needs QEMU to
/// drain, and never for ever.
#[test]
fn a_full_overlay_holds_writes_back_except_for_a_checkpoint() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    let test = test_disk(4 * MIB, move |options| {
        options.overlay_bytes_max = MIB;
        options.hooks.on_pressure = Some(Arc::new(move || {
            count.fetch_add(1, SeqCst);
        }));
    });
    let disk = &test.disk;
    put(disk, data(0, 1, 1 << 20));
    assert_eq!(asked.load(SeqCst), 1);
    assert!(disk.stats().overlay_bytes > MIB);
    let (send, written) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            put(disk, data(2 * MIB, 2, 4096));
            send.send(()).expect("the test listens");
        });
        while disk.stats().throttled == 0 {
            std::thread::yield_now();
        }
        assert!(written.try_recv().is_err(), "held back");
        // As the checkpoint does: announce, stop (drains), cut, go on.
        let began = Instant::now();
        disk.checkpoint_begins();
        written.recv().expect("let through");
        assert!(
            began.elapsed() < pressure::HOLD_MAX,
            "by the checkpoint, not by its own limit"
        );
        put(disk, data(3 * MIB, 3, 4096));
        let cut = disk.cut(Epoch(2)).expect("a cut");
        assert_eq!(cut.bytes, MIB + 8192);
        disk.checkpoint_ends();
        put(disk, data(0, 4, 4096));
        assert_eq!(disk.stats().throttled, 2);
        assert_eq!(asked.load(SeqCst), 2, "asked again in the next epoch");
        // A commit makes room.
        disk.commit(cut.epoch);
        disk.wait_written().expect("written");
        put(disk, data(0, 5, 4096));
        assert_eq!(disk.stats().throttled, 2);
    });
}

#[test]
fn flushes_and_fua_mark_their_epoch() {
    let test = test_disk(MIB, |_| {});
    assert!(!test.disk.cut(Epoch(2)).expect("a cut").flushed);
    test.disk.guest_flush().expect("a flush");
    assert!(test.disk.cut(Epoch(3)).expect("a cut").flushed);
    test.disk.uncut(Epoch(2), Epoch(3)).expect("taken back");
    assert!(
        test.disk.cut(Epoch(4)).expect("a cut").flushed,
        "a flush is not forgotten"
    );
    test.disk
        .guest_write(data(0, 1, 1), true, Instant::now())
        .expect("FUA");
    assert!(test.disk.cut(Epoch(5)).expect("a cut").flushed);
}

/// A sealed memfd opens for writing but takes no write: the nearest thing to a failed device.
#[test]
fn a_file_that_fails_keeps_the_epoch_in_memory_and_says_so() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsRawFd;
    let memfd = memfd_create("image", MFdFlags::MFD_ALLOW_SEALING).expect("a memfd");
    nix::unistd::ftruncate(&memfd, i64::try_from(MIB).expect("small")).expect("sized");
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let (send, told) = mpsc::channel();
    let mut options = DiskOptions::new(Mode::Overlay { epoch: Epoch(1) }, Generation(1));
    options.hooks.on_write_error = Some(Arc::new(move |error| {
        let _ = send.send(error.to_string());
    }));
    let disk = Disk::open(std::path::Path::new(&path), MIB, options).expect("a disk");
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).expect("sealed");
    put(&disk, data(0, 7, 4096));
    let cut = disk.cut(Epoch(2)).expect("a cut");
    disk.commit(cut.epoch);
    assert!(told.recv().expect("told").contains("not permitted"));
    assert!(disk.stats().write_error.is_some());
    put(&disk, data(4096, 8, 4096));
    let refused = disk
        .go_direct(Generation(1))
        .expect_err("cannot be written")
        .to_string();
    assert!(refused.contains("committed epoch"), "{refused}");
    assert!(matches!(disk.mode(), Mode::Overlay { .. }));
    assert_eq!((get(&disk, 0, 1), get(&disk, 4096, 1)), (vec![7], vec![8]));
    put(&disk, data(0, 9, 1));
    assert_eq!(get(&disk, 0, 2), [9, 7], "the guest goes on");
}
