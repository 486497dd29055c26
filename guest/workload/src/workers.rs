//! The workers: loads that check themselves, with rates that can be changed while they run.

use crate::disk::{Buffer, Disk};
use crate::os;
use crate::settings::Settings;
use pollux_workload::block::{BadBlock, Block};
use pollux_workload::checksum::{BLOCK_BYTES, Noise};
use pollux_workload::record::ReadBlocks;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// A worker with a high rate wakes this often and does what is due, in nanoseconds: finer is
/// only timer load, coarser makes bursts longer than an epoch.
const TICK_NS: u64 = 2_000_000;

/// A worker that is paused looks this often whether it is wanted again, in nanoseconds.
const PAUSED_NS: u64 = 50_000_000;

/// A worker that fell behind (a slow disk, a starved guest) catches up at most this much, in
/// nanoseconds; the rest of the debt is dropped instead of becoming one long burst.
const DEBT_NS_MAX: u64 = 100_000_000;

/// The disk worker flushes after this many writes, as a database with a small log would.
const WRITES_PER_FLUSH: u64 = 64;

/// The disk worker reads one block back after this many writes.
const WRITES_PER_READ: u64 = 4;

/// Iterations of the CPU worker between two updates of its counter.
const CPU_BATCH: u64 = 10_000;

/// How a worker is doing. Written by it alone, read by the service.
#[derive(Default)]
pub struct Health {
    /// Writes done (blocks or pages).
    pub writes: AtomicU64,
    /// Checks done.
    pub checks: AtomicU64,
    /// Checks that failed, and failed reads or writes.
    pub errors: AtomicU64,
}

impl Health {
    fn error(&self, worker: &str, what: impl Display) {
        // The first few tell the story; the count has the rest.
        if self.errors.fetch_add(1, Relaxed) < 8 {
            eprintln!("workload: {worker} worker: {what}");
        }
    }
}

/// All workers' rates and health.
pub struct Workers {
    /// Writes per second of the disk worker.
    pub disk_iops: AtomicU64,
    /// Pages per second of the memory worker.
    pub mem_pages_s: AtomicU64,
    /// Busy threads of the CPU worker.
    pub cpu_threads: AtomicU64,
    /// The disk worker.
    pub disk: Health,
    /// The memory worker.
    pub memory: Health,
    /// Iterations of the CPU worker.
    pub cpu_iterations: AtomicU64,
    /// `CLOCK_MONOTONIC` when the CPU worker began, in nanoseconds.
    pub cpu_start_ns: u64,
}

impl Workers {
    /// Start what the settings ask for.
    pub fn start(settings: &Settings, disk: Option<&Arc<Disk>>) -> Arc<Self> {
        let workers = Arc::new(Self {
            disk_iops: AtomicU64::new(settings.disk_iops),
            mem_pages_s: AtomicU64::new(settings.mem_pages_s),
            cpu_threads: AtomicU64::new(settings.cpu_threads),
            disk: Health::default(),
            memory: Health::default(),
            cpu_iterations: AtomicU64::new(0),
            cpu_start_ns: os::mono_ns(),
        });
        let blocks_per_mb = (1 << 20) / BLOCK_BYTES as u64;
        match disk.filter(|_| settings.disk) {
            Some(disk) => {
                let blocks = disk
                    .layout
                    .block_slots()
                    .min(settings.disk_mb * blocks_per_mb);
                let share = blocks / settings.disk_depth;
                for lane in 0..settings.disk_depth {
                    let (workers, disk) = (workers.clone(), disk.clone());
                    let (first, depth) = (lane * share, settings.disk_depth);
                    thread::spawn(move || workers.run_disk(&disk, first, share, depth));
                }
            }
            None if settings.disk => workers.disk.error("disk", "there is no /dev/vda"),
            None => {}
        }
        if settings.memory {
            let (workers, pages) = (workers.clone(), settings.mem_mb * blocks_per_mb);
            thread::spawn(move || workers.run_memory(pages));
        }
        if settings.cpu {
            let vcpus = thread::available_parallelism().map_or(1, |n| n.get() as u64);
            for index in 0..vcpus {
                let workers = workers.clone();
                thread::spawn(move || workers.run_cpu(index));
            }
        }
        workers
    }

    /// Write blocks `first .. first + count` of the area at random, a `depth`-th of the whole
    /// rate, and read them back.
    fn run_disk(&self, disk: &Disk, first: u64, count: u64, depth: u64) {
        let mut buffer = Buffer::new();
        let mut noise = Noise::new(os::real_ns() ^ first);
        // What each block must hold; None until it is first written in this boot.
        let mut versions = vec![0u64; usize::try_from(count).unwrap_or(0)];
        let mut writes = 0u64;
        pace(
            || self.disk_iops.load(Relaxed),
            depth,
            || {
                let index = noise.below(count);
                let place = first + index;
                let offset = disk.layout.blocks.start + place * BLOCK_BYTES as u64;
                let Some(version) = usize::try_from(index)
                    .ok()
                    .and_then(|at| versions.get_mut(at))
                else {
                    return;
                };
                if writes.is_multiple_of(WRITES_PER_READ) {
                    self.disk.checks.fetch_add(1, Relaxed);
                    match disk.read_blocks(offset, &mut buffer.block()[..]) {
                        Ok(()) => {
                            if let Err(reason) = check(
                                Block {
                                    place,
                                    version: *version,
                                },
                                buffer.block(),
                            ) {
                                self.disk.error("disk", format!("block {place}: {reason}"));
                            }
                        }
                        Err(error) => self
                            .disk
                            .error("disk", format!("read of block {place}: {error}")),
                    }
                }
                *version += 1;
                Block {
                    place,
                    version: *version,
                }
                .encode(buffer.block());
                writes += 1;
                let mut done = disk.write(offset, &buffer.block()[..]);
                if done.is_ok() && writes.is_multiple_of(WRITES_PER_FLUSH) {
                    done = disk.flush();
                }
                match done {
                    Ok(()) => _ = self.disk.writes.fetch_add(1, Relaxed),
                    Err(error) => self
                        .disk
                        .error("disk", format!("write of block {place}: {error}")),
                }
            },
        );
    }

    /// Write random pages of a buffer of `count` pages and check another for each written.
    fn run_memory(&self, count: u64) {
        let pages = usize::try_from(count).unwrap_or(0);
        let mut buffer = vec![[0u8; BLOCK_BYTES]; pages];
        let mut versions = vec![0u64; pages];
        let mut noise = Noise::new(os::real_ns());
        pace(
            || self.mem_pages_s.load(Relaxed),
            1,
            || {
                let place = noise.below(count);
                let Ok(at) = usize::try_from(place) else {
                    return;
                };
                versions[at] += 1;
                Block {
                    place,
                    version: versions[at],
                }
                .encode(&mut buffer[at]);
                self.memory.writes.fetch_add(1, Relaxed);
                let place = noise.below(count);
                let Ok(at) = usize::try_from(place) else {
                    return;
                };
                if versions[at] > 0 {
                    self.memory.checks.fetch_add(1, Relaxed);
                    if let Err(reason) = (Block {
                        place,
                        version: versions[at],
                    })
                    .check(&buffer[at])
                    {
                        self.memory
                            .error("memory", format!("page {place}: {reason}"));
                    }
                }
            },
        );
    }

    /// Compute for as long as `index` is below the wanted number of threads.
    fn run_cpu(&self, index: u64) {
        let mut noise = Noise::new(index);
        loop {
            if index >= self.cpu_threads.load(Relaxed) {
                thread::sleep(Duration::from_nanos(PAUSED_NS));
                continue;
            }
            let mut sum = 0u64;
            for _ in 0..CPU_BATCH {
                sum ^= noise.next_word();
            }
            std::hint::black_box(sum);
            self.cpu_iterations.fetch_add(CPU_BATCH, Relaxed);
        }
    }
}

/// Check a block read back from the disk. Version 0 stands for "not written in this boot":
/// then nothing, or whatever an earlier boot wrote there, is right.
fn check(expected: Block, bytes: &[u8; BLOCK_BYTES]) -> Result<(), BadBlock> {
    if expected.version > 0 {
        return expected.check(bytes);
    }
    match Block::parse(bytes) {
        Ok(found) if found.place != expected.place => Err(BadBlock::Other { found, expected }),
        Ok(_) | Err(BadBlock::Empty) => Ok(()),
        Err(reason) => Err(reason),
    }
}

/// Call `step` forever, `rate()` times a second divided by `share`.
fn pace(rate: impl Fn() -> u64, share: u64, mut step: impl FnMut()) {
    let mut due_ns = os::mono_ns();
    loop {
        let rate = rate();
        let now = os::mono_ns();
        if rate == 0 {
            thread::sleep(Duration::from_nanos(PAUSED_NS));
            due_ns = now;
            continue;
        }
        let gap_ns = (1_000_000_000 * share / rate).max(1);
        due_ns = due_ns.max(now.saturating_sub(DEBT_NS_MAX));
        if due_ns > now {
            thread::sleep(Duration::from_nanos(
                (due_ns - now).max(if gap_ns < TICK_NS { TICK_NS } else { 0 }),
            ));
            continue;
        }
        step();
        due_ns += gap_ns;
    }
}
