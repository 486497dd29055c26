//! The disk against flat arrays: random writes, zeros, trims, cuts, commits, takings back.

use super::super::*;
use super::{data, get, put, test_disk};
use crate::pool::{Epoch, Generation};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

const SIZE: usize = 64 << 10;

#[derive(Clone, Debug)]
enum Op {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Trim(usize, usize),
    Read(usize, usize),
    Cut,
    /// Commit all but this many of the epochs cut.
    Commit(usize),
    /// Take back this many of the newest cut epochs; keep the newest number or go back.
    Uncut(usize, bool),
    Discard,
    Solo,
}

fn range() -> impl Strategy<Value = (usize, usize)> {
    // Mostly small, some large, some on sector bounds, so that extents cut each other every way.
    prop_oneof![
        (0..SIZE, 0..3000_usize),
        (0..SIZE / 512, 1..8_usize).prop_map(|(at, len)| (at * 512, len * 512)),
        (0..SIZE, 0..SIZE),
    ]
    .prop_map(|(at, len)| (at, len.min(SIZE - at)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (range(), 1..=255_u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        2 => range().prop_map(|(at, len)| Op::Zero(at, len)),
        2 => range().prop_map(|(at, len)| Op::Trim(at, len)),
        6 => range().prop_map(|(at, len)| Op::Read(at, len)),
        4 => Just(Op::Cut),
        3 => (0..3_usize).prop_map(Op::Commit),
        1 => (1..3_usize, any::<bool>()).prop_map(|(count, keep)| Op::Uncut(count, keep)),
        1 => Just(Op::Discard),
        1 => Just(Op::Solo),
    ]
}

/// What each side should hold: `seen` by the guest, `cut` epochs not yet committed with the
/// picture at their end, `committed` on the standby and sooner or later in the file.
struct Model {
    seen: Vec<u8>,
    cut: VecDeque<(u64, Vec<u8>)>,
    committed: Vec<u8>,
    running: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn reads_file_and_standby_hold_what_they_should(
        ops in proptest::collection::vec(op(), 1..80)
    ) {
        let primary = test_disk(SIZE as u64, |_| {});
        let standby = test_disk(SIZE as u64, |options| options.mode = Mode::Standby);
        let disk = &primary.disk;
        let mut generation = Generation(5);
        let mut sent: VecDeque<(u64, EpochWrites)> = VecDeque::new();
        let mut model = Model {
            seen: vec![0; SIZE], cut: VecDeque::new(), committed: vec![0; SIZE], running: 1,
        };
        for op in ops {
            match op {
                Op::Write(at, len, byte) => {
                    put(disk, data(at as u64, byte, len));
                    model.seen[at..at + len].fill(byte);
                }
                Op::Zero(at, len) => {
                    put(disk, DiskWrite { offset: at as u64, data: WriteData::Zero(len as u64) });
                    model.seen[at..at + len].fill(0);
                }
                Op::Trim(at, len) => {
                    put(disk, DiskWrite { offset: at as u64, data: WriteData::Trim(len as u64) });
                    model.seen[at..at + len].fill(0);
                }
                Op::Read(at, len) => {
                    let read = get(disk, at as u64, u32::try_from(len).expect("small"));
                    prop_assert!(read == model.seen[at..at + len], "read {at}+{len}");
                }
                Op::Cut => {
                    let writes = disk.cut(Epoch(model.running + 1)).expect("a cut");
                    prop_assert_eq!(writes.epoch, Epoch(model.running));
                    sent.push_back((model.running, writes));
                    model.cut.push_back((model.running, model.seen.clone()));
                    model.running += 1;
                }
                Op::Commit(but) => {
                    while model.cut.len() > but {
                        let (epoch, picture) = model.cut.pop_front().expect("one");
                        let (_, writes) = sent.pop_front().expect("one");
                        standby.disk.apply(Generation(5), &writes.writes).expect("applied");
                        disk.commit(Epoch(epoch));
                        model.committed = picture;
                    }
                }
                Op::Uncut(count, keep) => {
                    let count = count.min(model.cut.len());
                    if count == 0 {
                        continue;
                    }
                    let from = model.cut[model.cut.len() - count].0;
                    model.cut.truncate(model.cut.len() - count);
                    sent.truncate(sent.len() - count);
                    let running = if keep { model.running } else { from };
                    disk.uncut(Epoch(from), Epoch(running)).expect("taken back");
                    model.running = running;
                }
                Op::Discard => {
                    generation = generation.next();
                    disk.set_mode(Mode::Stopped, generation).expect("stopped");
                    disk.discard_uncommitted().expect("discarded");
                    generation = generation.next();
                    let epoch = Epoch(model.running);
                    disk.set_mode(Mode::Overlay { epoch }, generation).expect("mirrored again");
                    model.seen.clone_from(&model.committed);
                    model.cut.clear();
                    sent.clear();
                }
                Op::Solo => {
                    // The standby gets what solo wrote by a full copy, as a resync would.
                    disk.go_direct(generation).expect("solo");
                    prop_assert!(std::fs::read(&primary.path).expect("file") == model.seen);
                    let whole = [data(0, 0, 0), DiskWrite {
                        offset: 0, data: WriteData::Data(model.seen.clone().into()),
                    }];
                    standby.disk.apply(Generation(5), &whole).expect("resynced");
                    let epoch = Epoch(model.running);
                    disk.set_mode(Mode::Overlay { epoch }, generation).expect("mirrored again");
                    model.committed.clone_from(&model.seen);
                    model.cut.clear();
                    sent.clear();
                }
            }
        }
        prop_assert!(get(disk, 0, u32::try_from(SIZE).expect("small")) == model.seen);
        disk.wait_written().expect("written");
        prop_assert!(std::fs::read(&primary.path).expect("file") == model.committed, "primary");
        prop_assert!(std::fs::read(&standby.path).expect("file") == model.committed, "standby");
    }
}

/// A writer raises a counter in every block, epochs are cut and committed meanwhile, readers never
/// see a block going back, nor anything but its value while no write of it is under way. Beside
/// a write the kernel's page cache may hand out parts of the old and of the new, as it does to
/// QEMU with a raw file.
#[test]
fn readers_beside_cuts_and_commits_never_see_a_mix_or_an_older_block() {
    const BLOCKS: u64 = 16;
    const BLOCK: u64 = 4096;
    const ROUNDS: u64 = 3000;
    let test = test_disk(BLOCKS * BLOCK, |_| {});
    let disk = &test.disk;
    // Highest value acknowledged, a block.
    let acknowledged: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    // Highest value of which a write has begun, a block.
    let begun: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    let done = AtomicBool::new(false);
    let block = |value: u64| value.to_le_bytes().repeat(512);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (acknowledged, begun, done) = (&acknowledged, &begun, &done);
            scope.spawn(move || {
                let mut at = reader;
                while !done.load(SeqCst) {
                    at = (at + 7) % BLOCKS;
                    let index = usize::try_from(at).expect("small");
                    let floor = acknowledged[index].load(SeqCst);
                    let read = get(disk, at * BLOCK, 4096);
                    let top = begun[index].load(SeqCst);
                    for chunk in read.chunks(8) {
                        let value = u64::from_le_bytes(chunk.try_into().expect("8"));
                        assert!(
                            (floor..=top).contains(&value),
                            "block {at}: {value} after {floor} was acknowledged, before {top} ended"
                        );
                    }
                }
            });
        }
        for round in 1..=ROUNDS {
            let at = round * 5 % BLOCKS;
            let index = usize::try_from(at).expect("small");
            let write = DiskWrite {
                offset: at * BLOCK,
                data: WriteData::Data(block(round).into()),
            };
            begun[index].store(round, SeqCst);
            put(disk, write);
            acknowledged[index].store(round, SeqCst);
            if round % 8 == 0 && round < ROUNDS / 2 {
                let epoch = disk.cut(Epoch(round + 1)).expect("a cut").epoch;
                if round % 24 == 0 {
                    disk.commit(epoch);
                }
            }
            if round == ROUNDS / 2 {
                disk.go_direct(Generation(5)).expect("solo");
            }
            if round == ROUNDS / 2 + 100 {
                break;
            }
        }
        done.store(true, SeqCst);
    });
}
