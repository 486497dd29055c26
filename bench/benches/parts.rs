//! The pieces of an epoch alone (criterion): what each costs, and beside it what the same work
//! costs without it. `cargo bench -p pollux-bench --bench parts [-- NAME]`.
//!
//! `pages`: 256 pages as a guest dirties them, packed and raw; `state`: a device state whole
//! and as a delta; `gate`: a frame through the egress gate; `disk`: 64 writes of 4 KiB over
//! NBD, mirrored (overlay, cut, commit) beside direct; `collect`: dirty pages of a 512 MiB
//! process, scanned, re-armed and copied.

use bytes::{BufMut, Bytes};
use criterion::{BatchSize, Criterion, Throughput};
use interconnect::codec::{
    Codec, CodecChoice, CodecVersion, EncodePolicy, PAGE_BYTES, Page, PageEncoder, decode_delta,
    decode_pages, encode_delta,
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use pollux::interpose::disk::{Disk, DiskOptions, DiskServer, Mode, create_sparse, nbd};
use pollux::interpose::memory::{RamImage, Staging, Tracker};
use pollux::interpose::net::Gate;
use pollux::pool::{Epoch, Generation};
use std::cell::RefCell;
use std::fs::OpenOptions;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Argument with which this program is the process whose memory is tracked.
const GUEST: &str = "parts-guest";
/// Its memory.
const RAM_BYTES: u64 = 512 << 20;
/// A batch of pages: the most that travels in one frame.
const PAGES: usize = 256;
/// A device state of microvm with one disk and one NIC.
const STATE_BYTES: usize = 8 << 10;
/// Writes of one epoch.
const WRITES: u64 = 64;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == GUEST) {
        return guest(Path::new(&args[2]));
    }
    let mut c = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500))
        .configure_from_args();
    pages(&mut c);
    state(&mut c);
    gate(&mut c);
    disk(&mut c);
    collect(&mut c);
    c.final_summary();
}

/// Reproducible noise (xorshift, Marsaglia 2003).
fn noise(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A third zero, a third like text and pointers, a third noise.
fn dirty_pages() -> Vec<Page> {
    let mut seed = 1;
    (0..PAGES)
        .map(|i| {
            let mut page = [0; PAGE_BYTES];
            if i % 3 > 0 {
                for word in page.chunks_exact_mut(8) {
                    let value = noise(&mut seed);
                    let value = if i % 3 == 1 { value % 50 } else { value };
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
            page
        })
        .collect()
}

fn pages(c: &mut Criterion) {
    let pages = dirty_pages();
    let mut group = c.benchmark_group("pages");
    group.throughput(Throughput::Elements(PAGES as u64));
    for (name, mode) in [("packed", CodecChoice::Zstd), ("raw", CodecChoice::Raw)] {
        let mut encoder = PageEncoder::new(EncodePolicy::v1(mode));
        let mut encode = || {
            let mut numbered = (0..).zip(&pages);
            let batch = encoder.encode(&mut numbered).expect("pages in range");
            batch.expect("there are pages").payload
        };
        group.bench_function(format!("encode {name}"), |b| b.iter(&mut encode));
        let batch = encode();
        group.bench_function(format!("decode {name}"), |b| {
            b.iter(|| {
                decode_pages(&batch, 1 << 20, |index, page| {
                    black_box((index, page));
                })
                .expect("what was encoded");
            });
        });
    }
    group.finish();
}

fn state(c: &mut Criterion) {
    let mut seed = 2;
    let old: Vec<u8> = (0..STATE_BYTES)
        .map(|_| (noise(&mut seed) % 7).to_le_bytes()[0])
        .collect();
    let mut new = old.clone();
    for at in (0..STATE_BYTES).step_by(100) {
        new[at] ^= 0x55;
    }
    let encode =
        |base: Option<&[u8]>, new: &[u8]| encode_delta(base, new, Codec::Lz4, CodecVersion::V2);
    let delta = encode(Some(&old), &new).expect("small");
    let mut group = c.benchmark_group("state");
    group.bench_function("encode whole", |b| b.iter(|| encode(None, black_box(&new))));
    group.bench_function("encode delta", |b| {
        b.iter(|| encode(Some(&old), black_box(&new)))
    });
    group.bench_function("decode delta", |b| {
        b.iter(|| decode_delta(Some(&old), &delta))
    });
    group.finish();
}

fn gate(c: &mut Criterion) {
    let frame = Bytes::from(vec![7; 1500]);
    let mut group = c.benchmark_group("gate");
    group.throughput(Throughput::Elements(PAGES as u64));
    group.bench_function("push and release 256 frames", |b| {
        let mut gate = Gate::default();
        let mut epoch = Epoch(1);
        b.iter(|| {
            for _ in 0..PAGES {
                gate.push(epoch, frame.clone(), Duration::ZERO)
                    .expect("far from full");
            }
            gate.epoch_begins();
            let sent = gate.release(epoch, PAGES).count();
            epoch = epoch.next();
            sent
        });
    });
    group.finish();
}

/// A client of a disk, as QEMU is one.
struct NbdClient(UnixStream);

impl NbdClient {
    fn go(path: &Path) -> std::io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.read_exact(&mut [0; 18])?;
        let mut hello = Vec::new();
        hello.put_u32(3);
        hello.put_u64(nbd::OPTION_MAGIC);
        hello.put_u32(nbd::option::GO);
        hello.put_u32(6);
        hello.put_bytes(0, 6);
        stream.write_all(&hello)?;
        loop {
            let mut reply = [0; 20];
            stream.read_exact(&mut reply)?;
            let number = |at: usize| {
                u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]])
            };
            let mut data = vec![0; number(16) as usize];
            stream.read_exact(&mut data)?;
            if number(12) == nbd::reply::ACK {
                return Ok(Self(stream));
            }
        }
    }

    /// Writes `count` blocks, all at once, and waits for all answers.
    fn write(&mut self, count: u64) -> std::io::Result<()> {
        let mut out = Vec::new();
        for i in 0..count {
            out.put_u32(nbd::REQUEST_MAGIC);
            out.put_u32(1);
            out.put_u64(i);
            out.put_u64(i * 4096);
            out.put_u32(4096);
            out.put_bytes(9, 4096);
        }
        let mut answers = vec![0; nbd::SIMPLE_REPLY_BYTES * usize::try_from(count).unwrap_or(0)];
        let mut writer = self.0.try_clone()?;
        std::thread::scope(|scope| {
            scope.spawn(move || writer.write_all(&out));
            self.0.read_exact(&mut answers)
        })
    }
}

fn disk(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut group = c.benchmark_group("disk");
    group.throughput(Throughput::Elements(WRITES));
    for (name, mode) in [
        ("mirrored", Mode::Overlay { epoch: Epoch(1) }),
        ("direct", Mode::Direct),
    ] {
        let image = folder.path().join(name);
        create_sparse(&image, 64 << 20).expect("an image");
        let options = DiskOptions::new(mode, Generation(1));
        let disk = Disk::open(&image, 64 << 20, options).expect("a disk");
        let socket = folder.path().join(format!("{name}.nbd"));
        let _server =
            DiskServer::start(&socket, None, std::sync::Arc::clone(&disk)).expect("a server");
        let mut client = NbdClient::go(&socket).expect("a client");
        let mut epoch = Epoch(1);
        group.bench_function(format!("64 writes, {name}"), |b| {
            b.iter(|| {
                client.write(WRITES).expect("written");
                if mode != Mode::Direct {
                    let next = epoch.next();
                    black_box(disk.cut(next).expect("a cut"));
                    disk.commit(epoch);
                    epoch = next;
                }
            });
        });
        let _ = disk.wait_written();
    }
    group.finish();
}

/// The tracked process: maps the RAM file, writes as many pages as it is told.
fn guest(ram: &Path) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(ram)
        .expect("the RAM file");
    let bytes = usize::try_from(RAM_BYTES).expect("fits");
    let length = NonZeroUsize::new(bytes).expect("not zero");
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file of that length, at an address of the kernel's choice.
    let memory =
        unsafe { mmap(None, length, prot, MapFlags::MAP_SHARED, &file, 0) }.expect("mapped");
    let memory = memory.cast::<u8>().as_ptr();
    println!("ready");
    for (round, line) in std::io::stdin().lines().map_while(Result::ok).enumerate() {
        let count: usize = line.parse().unwrap_or(0);
        for page in 0..count {
            // Spread over all of it, as a guest's writes are.
            let at = page * (bytes / PAGE_BYTES / count.max(1)) * PAGE_BYTES;
            // SAFETY: `at` is below `bytes`, and nothing else uses the mapping.
            unsafe { memory.add(at).write_volatile(round.to_le_bytes()[0]) };
        }
        println!("done");
    }
}

struct Guest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Guest {
    fn start(ram: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .arg(GUEST)
            .arg(ram)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program runs");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut guest = Self {
            child,
            input,
            output,
        };
        guest.wait();
        guest
    }

    fn wait(&mut self) {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it lives");
    }

    fn dirty(&mut self, pages: u64) {
        writeln!(self.input, "{pages}").expect("it lives");
        self.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(c: &mut Criterion) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
    let ram = folder.path().join("ram");
    RamImage::create(&ram, RAM_BYTES, 0o600, 0, 0).expect("a RAM file");
    let mut guest = Guest::start(&ram);
    let mut tracker = match Tracker::attach(guest.child.id().cast_signed(), &ram, RAM_BYTES) {
        Ok(tracker) => tracker,
        Err(e) => return eprintln!("collect: not measured: {e}"),
    };
    let all = tracker.pages();
    let staging = RefCell::new(Staging::new(all, all).expect("address space"));
    let mut group = c.benchmark_group("collect");
    for pages in [0, 100, 1000, 10_000] {
        group.throughput(Throughput::Elements(pages));
        group.bench_function(format!("{pages} dirty pages of 512 MiB"), |b| {
            b.iter_batched(
                || {
                    // Handing the pages on is not part of the pause.
                    staging.borrow_mut().clear();
                    guest.dirty(pages);
                },
                |()| {
                    tracker
                        .collect(&mut staging.borrow_mut())
                        .expect("tracked")
                        .pages
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}
