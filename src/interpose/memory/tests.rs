//! Tracking a real process: our own test binary, run again as the writer.
//!
//! The writer maps the RAM file and obeys lines on its standard input; a reply
//! on its standard output means that the command is done.

use super::inject::inject;
use super::*;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const RAM_PAGES: u64 = 40_000;
const RAM_BYTES: u64 = RAM_PAGES * PAGE_SIZE as u64;
const UNPRIVILEGED: u32 = 65534;
/// Replies are marked, as the test harness prints on the same stream.
const MARK: &str = "@@ ";

/// The writer's side. Does nothing unless it was started by [`Writer`].
#[test]
#[ignore = "the child process of the other tests"]
fn writer_process() {
    let Ok(path) = std::env::var("POLLUX_TEST_RAM") else {
        return;
    };
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.expect("RAM file opens");
    let len = usize::try_from(RAM_BYTES).expect("fits");
    let ram = region::Region::of_file(&file, len, true).expect("maps");
    let page = |index: u64| ram.at(usize::try_from(index).expect("fits") * PAGE_SIZE, PAGE_SIZE);
    println!("\n{MARK}ready");
    for line in std::io::stdin().lines() {
        let line = line.expect("reads");
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().expect("a number");
        let mut reply = "done".to_owned();
        match words[0] {
            // A store by the process itself.
            "store" => {
                let byte = number(2).to_le_bytes()[0];
                // SAFETY: inside the mapping.
                unsafe { page(number(1)).add(100).write_volatile(byte) };
            }
            // Many stores, all over the RAM.
            "storm" => {
                let mut state = number(1) | 1;
                for _ in 0..number(2) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let at = page(state % RAM_PAGES);
                    // SAFETY: inside the mapping.
                    unsafe { at.add(8).cast::<u64>().write_volatile(state) };
                }
            }
            // A store by the kernel: read(2) into the mapping.
            "read" => {
                let source = std::fs::File::open("/proc/self/exe").expect("opens");
                let at = page(number(1)).cast();
                // SAFETY: inside the mapping, and the file is longer than that.
                let got = unsafe {
                    libc::pread(std::os::fd::AsRawFd::as_raw_fd(&source), at, 5000, 1000)
                };
                assert_eq!(got, 5000);
            }
            "touch" => {
                // SAFETY: inside the mapping.
                reply = unsafe { page(number(1)).read_volatile() }.to_string();
            }
            "punch" => {
                let at = page(number(1)).cast();
                let bytes = usize::try_from(number(2)).expect("fits") * PAGE_SIZE;
                // SAFETY: inside the mapping; drops the pages' storage.
                assert_eq!(unsafe { libc::madvise(at, bytes, libc::MADV_REMOVE) }, 0);
            }
            "fds" => {
                let all = std::fs::read_dir("/proc/self/fd").expect("lists");
                reply = all.count().to_string();
            }
            other => panic!("unknown command {other}"),
        }
        println!("{MARK}{reply}");
    }
}

/// Calls that block, one after the other, `ms` each; says which came back with
/// anything but what an undisturbed process sees.
fn waits(ms: u64) -> String {
    let ms_int = i32::try_from(ms).expect("fits");
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: i64::try_from(ms * 1_000_000).expect("fits"),
    };
    let word = 7u32;
    let mut wrong = String::new();
    let mut check = |what: &str, expected: i64, call: &dyn Fn() -> i64| {
        let begun = Instant::now();
        let result = call();
        let errno = std::io::Error::last_os_error().raw_os_error();
        let early = begun.elapsed() < Duration::from_millis(ms);
        if result != expected || early {
            wrong += &format!("{what}: {result} errno {errno:?} early {early}; ");
        }
    };
    let none = std::ptr::null_mut();
    // SAFETY: no descriptors, and live timeouts.
    check("poll", 0, &|| unsafe { libc::poll(none, 0, ms_int) }.into());
    check("ppoll", 0, &|| {
        // SAFETY: as above.
        unsafe { libc::ppoll(none, 0, &raw const time, std::ptr::null()) }.into()
    });
    check("nanosleep", 0, &|| {
        // SAFETY: a live timespec, no remainder wanted.
        unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) }.into()
    });
    // SAFETY: waits on a live word that nobody wakes.
    check("futex", -1, &|| unsafe {
        libc::syscall(
            libc::SYS_futex,
            &raw const word,
            libc::FUTEX_WAIT,
            7,
            &raw const time,
        )
    });
    wrong + "done"
}

/// Computes for `ms` in registers and on the stack; the parent knows the result
/// of each round.
fn spin(ms: u64) -> String {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(ms) {
        let mut state = 1u64;
        let mut float = 1.0f64;
        for step in 0..10_000u64 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(step);
            float = float * 1.000_001 + 0.5;
        }
        if state != spin_result() || !(5000.0..5100.0).contains(&float) {
            return format!("wrong {state} {float}");
        }
    }
    "done".to_owned()
}

fn spin_result() -> u64 {
    (0..10_000u64).fold(1, |state: u64, step| {
        state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(step)
    })
}

struct Writer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Writer {
    fn start(ram: &Path) -> Self {
        let name = "interpose::memory::tests::writer_process";
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env("POLLUX_TEST_RAM", ram)
            .current_dir("/")
            .uid(UNPRIVILEGED)
            .gid(UNPRIVILEGED)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test binary runs");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut writer = Self {
            child,
            input,
            output,
        };
        assert_eq!(writer.reply(), "ready");
        writer
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("writer lives");
    }

    fn reply(&mut self) -> String {
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).expect("writer lives");
            assert!(read > 0, "the writer ended");
            if let Some((_, reply)) = line.split_once(MARK) {
                return reply.trim().to_owned();
            }
        }
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.reply()
    }

    fn run(&mut self, command: &str) {
        assert_eq!(self.ask(command), "done", "{command}");
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A writer, its tracker, a staging, and the copy that must follow it.
struct Pair {
    folder: tempfile::TempDir,
    writer: Writer,
    tracker: Tracker,
    staging: Staging,
    mirror: RamImage,
}

fn ram_file(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("ram");
    RamImage::create(&path, RAM_BYTES, 0o600, UNPRIVILEGED, UNPRIVILEGED).expect("made");
    path
}

fn shm() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = tempfile::Builder::new();
    builder.permissions(std::fs::Permissions::from_mode(0o755));
    builder
        .prefix("pollux-memory-")
        .tempdir_in("/dev/shm")
        .expect("tmpfs")
}

impl Pair {
    fn new() -> Self {
        let folder = shm();
        let ram = ram_file(&folder);
        let writer = Writer::start(&ram);
        let tracker = Tracker::attach(writer.pid(), &ram, RAM_BYTES).expect("attached");
        let mirror = RamImage::create(&folder.path().join("mirror"), RAM_BYTES, 0o600, 0, 0);
        Self {
            folder,
            writer,
            tracker,
            staging: Staging::new(RAM_PAGES, RAM_PAGES).expect("made"),
            mirror: mirror.expect("made"),
        }
    }

    fn collect(&mut self) -> BTreeSet<u64> {
        self.tracker.collect(&mut self.staging).expect("collected");
        self.staging.iter().map(|(index, _)| index).collect()
    }

    /// Collects, applies, and compares all of the RAM.
    fn checkpoint(&mut self) -> BTreeSet<u64> {
        let found = self.collect();
        self.apply();
        self.assert_equal();
        found
    }

    fn apply(&mut self) {
        for (index, page) in self.staging.iter() {
            self.mirror.write_page(index, page).expect("written");
        }
        self.staging.clear();
    }

    fn assert_equal(&self) {
        let view = self.tracker.view();
        let mut pages: BTreeSet<u64> = view
            .allocated_ranges()
            .expect("read")
            .into_iter()
            .flatten()
            .collect();
        pages.extend(
            self.mirror
                .allocated_ranges()
                .expect("read")
                .into_iter()
                .flatten(),
        );
        let differ: Vec<u64> = pages
            .into_iter()
            .filter(|index| view.page(*index) != self.mirror.page(*index))
            .collect();
        assert!(differ.is_empty(), "pages differ: {differ:?}");
    }
}

#[test]
fn stores_of_process_and_kernel_are_seen_once_and_exactly() {
    let mut pair = Pair::new();
    assert_eq!(pair.checkpoint(), BTreeSet::new());
    // Populated only now, at both ends and in the middle.
    for index in [0, 511, 512, 20_000, RAM_PAGES - 1] {
        pair.writer.run(&format!("store {index} 7"));
    }
    let found = pair.checkpoint();
    assert_eq!(found, BTreeSet::from([0, 511, 512, 20_000, RAM_PAGES - 1]));
    assert_eq!(
        pair.checkpoint(),
        BTreeSet::new(),
        "armed again, nothing written"
    );
    pair.writer.run("store 511 8");
    assert_eq!(
        pair.checkpoint(),
        BTreeSet::from([511]),
        "seen a second time"
    );
    pair.writer.run("read 600");
    assert_eq!(
        pair.checkpoint(),
        BTreeSet::from([600, 601]),
        "the kernel's stores"
    );
    pair.writer.run("read 600");
    assert_eq!(
        pair.checkpoint(),
        BTreeSet::from([600, 601]),
        "and once more"
    );
    assert_eq!(pair.writer.ask("touch 700"), "0");
    pair.checkpoint();
    pair.writer.run("store 700 1");
    assert_eq!(
        pair.checkpoint(),
        BTreeSet::from([700]),
        "read first, then written"
    );
}

/// The known limit, see [`tracker`]: punching is not seen, but what comes after is.
#[test]
fn a_store_to_a_punched_page_is_seen() {
    let mut pair = Pair::new();
    for index in 1000..1010 {
        pair.writer.run(&format!("store {index} 7"));
    }
    pair.checkpoint();
    pair.writer.run("punch 1002 3");
    for index in 1002..1005 {
        pair.writer.run(&format!("store {index} 9"));
    }
    assert_eq!(pair.checkpoint(), BTreeSet::from([1002, 1003, 1004]));
}

#[test]
fn a_storm_of_stores_is_copied_exactly_with_and_without_precopy() {
    let mut pair = Pair::new();
    for round in 1..20 {
        pair.writer.send(&format!("storm {round} 30000"));
        if round % 2 == 0 {
            // Beside the running writer.
            for _ in 0..3 {
                pair.tracker.precopy(&mut pair.staging).expect("copied");
            }
        }
        assert_eq!(pair.writer.reply(), "done");
        assert!(pair.checkpoint().len() > 10_000);
    }
}

#[test]
fn a_dropped_epoch_is_not_lost() {
    let mut pair = Pair::new();
    pair.writer.run("store 10 1");
    pair.writer.run("store 11 1");
    pair.collect();
    // Dropped before it was handed on: given back to the tracker ...
    pair.tracker.give_back(&mut pair.staging);
    assert!(pair.staging.is_empty());
    pair.writer.run("store 11 2");
    pair.writer.run("store 12 2");
    assert_eq!(pair.collect(), BTreeSet::from([10, 11, 12]));
    // ... or kept in the staging ...
    pair.writer.run("store 12 3");
    assert_eq!(pair.checkpoint(), BTreeSet::from([10, 11, 12]));
    // ... or found by a scan whose ranges were not used.
    pair.writer.run("store 13 3");
    let mut ranges = Vec::new();
    assert_eq!(pair.tracker.scan_dirty(&mut ranges).expect("scanned"), 1);
    pair.tracker.carry(&ranges);
    assert_eq!(pair.tracker.dirty_estimate().expect("counted"), 1);
    assert_eq!(pair.checkpoint(), BTreeSet::from([13]));
    assert_eq!(pair.checkpoint(), BTreeSet::new());
}

#[test]
fn an_epoch_too_big_for_the_staging_is_refused_and_not_lost() {
    let mut pair = Pair::new();
    let mut small = Staging::new(RAM_PAGES, 5).expect("made");
    pair.writer.run("store 100 1");
    pair.tracker.collect(&mut small).expect("fits");
    for index in (200..230).step_by(3) {
        pair.writer.run(&format!("store {index} 1"));
    }
    let refused = pair.tracker.collect(&mut small);
    assert!(
        matches!(
            refused,
            Err(TrackError::Full {
                pages: 11,
                limit_pages: 5
            })
        ),
        "{refused:?}"
    );
    assert!(small.is_empty());
    pair.writer.run("store 203 2");
    let expected: BTreeSet<u64> = (200..230).step_by(3).chain([100]).collect();
    assert_eq!(pair.checkpoint(), expected);
    let mut foreign = Staging::new(7, 7).expect("made");
    let refused = pair.tracker.collect(&mut foreign);
    assert!(matches!(
        refused,
        Err(TrackError::OtherGuest { staging: 7, .. })
    ));
}

#[test]
fn counting_arms_nothing_and_scanning_does() {
    let mut pair = Pair::new();
    pair.writer.run("store 5 1");
    pair.writer.run("store 6 1");
    pair.writer.run("store 39999 1");
    assert_eq!(pair.tracker.dirty_estimate().expect("counted"), 3);
    let mut ranges = Vec::new();
    assert_eq!(pair.tracker.scan_dirty(&mut ranges).expect("scanned"), 3);
    assert_eq!(ranges, [5..7, 39_999..40_000]);
    assert_eq!(pair.tracker.dirty_estimate().expect("counted"), 0);
}

#[test]
fn seeding_beside_a_running_writer_and_one_checkpoint_make_the_copy_whole() {
    let mut pair = Pair::new();
    pair.writer.run("storm 77 60000");
    pair.writer.send("storm 78 400000");
    let mirror = &mut pair.mirror;
    let mut sink = |index: u64, page: &Page| mirror.write_page(index, page);
    let limits = SeedLimits::default();
    let outcome = seed(&mut pair.tracker, limits, &mut sink, &mut |_| ()).expect("seeded");
    assert!(outcome.pages_sent > 20_000, "{outcome:?}");
    assert_eq!(pair.writer.reply(), "done");
    pair.checkpoint();
}

#[test]
fn detaching_frees_the_memory_and_attaching_again_works() {
    let pair = Pair::new();
    let Pair {
        folder,
        mut writer,
        tracker,
        ..
    } = pair;
    let ram = folder.path().join("ram");
    let taken = Tracker::attach(writer.pid(), &ram, RAM_BYTES);
    assert!(matches!(taken, Err(TrackError::Taken { .. })), "{taken:?}");
    tracker.detach().expect("detached");
    let fds = writer.ask("fds");
    let tracker = Tracker::attach(writer.pid(), &ram, RAM_BYTES).expect("attached again");
    // The daemon died: nothing was detached in order.
    drop(tracker);
    Tracker::attach(writer.pid(), &ram, RAM_BYTES).expect("and again");
    assert_eq!(writer.ask("fds"), fds, "no descriptor stays in the process");
}

#[test]
fn a_dead_process_is_an_error_and_not_a_clean_memory() {
    let mut pair = Pair::new();
    pair.writer.run("store 5 1");
    pair.writer.child.kill().expect("killed");
    pair.writer.child.wait().expect("ended");
    let gone = pair.tracker.collect(&mut pair.staging);
    assert!(matches!(gone, Err(TrackError::Gone { .. })), "{gone:?}");
    assert!(pair.tracker.collect(&mut pair.staging).is_err());
    let pid = pair.writer.pid();
    let ram = pair.folder.path().join("ram");
    assert!(Tracker::attach(pid, &ram, RAM_BYTES).is_err());
    assert!(matches!(userfaultfd_in(pid), Err(InjectError::Look { .. })));
}

#[test]
fn a_process_without_the_file_is_refused() {
    let folder = shm();
    let ram = ram_file(&folder);
    let writer = Writer::start(&ram);
    let other = folder.path().join("other");
    RamImage::create(&other, RAM_BYTES, 0o600, 0, 0).expect("made");
    let refused = Tracker::attach(writer.pid(), &other, RAM_BYTES);
    assert!(
        matches!(refused, Err(TrackError::NotMapped { page: 0, .. })),
        "{refused:?}"
    );
    let refused = Tracker::attach(writer.pid(), &ram, 4096);
    assert!(matches!(refused, Err(TrackError::Image(_))), "{refused:?}");
    let own = userfaultfd_in(std::process::id().cast_signed());
    assert!(matches!(own, Err(InjectError::Own { .. })));
}

/// The harness runs tests beside its main thread, and injection stops the main
/// thread; so this needs a fork, whose one thread is the main one.
#[test]
fn injection_disturbs_neither_blocking_calls_nor_computation() {
    for (work, ms) in [(waits as fn(u64) -> String, 60), (spin, 100)] {
        // SAFETY: the child calls only code that takes no lock but malloc's,
        // which glibc keeps usable after a fork, and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let outcome = work(ms);
            let wrong = outcome != "done";
            // SAFETY: a live buffer; ends the child at once.
            unsafe {
                libc::write(
                    2,
                    outcome.as_ptr().cast(),
                    if wrong { outcome.len() } else { 0 },
                );
                libc::_exit(i32::from(wrong));
            }
        }
        assert!(pid > 0);
        let mut status = 0;
        let mut count = 0;
        // SAFETY: a live int; the child is ours.
        while unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } == 0 {
            // May end meanwhile.
            count += u32::from(inject(pid).is_ok());
        }
        assert!(
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
            "{status:#x}"
        );
        assert!(count > 0, "nothing was injected");
    }
}

#[test]
fn a_stopped_process_is_refused_and_stays_stopped() {
    let folder = shm();
    let ram = ram_file(&folder);
    let mut writer = Writer::start(&ram);
    let pid = writer.pid();
    // SAFETY: plain numbers; the process is ours. Waits until it has stopped.
    unsafe {
        assert_eq!(libc::kill(pid, libc::SIGSTOP), 0);
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, libc::WUNTRACED), pid);
        assert!(libc::WIFSTOPPED(status));
    }
    assert!(matches!(inject(pid), Err(InjectError::JobStopped { .. })));
    // The kernel passes it through its running state back into the stop.
    let begun = Instant::now();
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("read");
        if stat.contains(") T ") {
            break;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "runs again: {stat}"
        );
        std::thread::yield_now();
    }
    // SAFETY: as above.
    unsafe { assert_eq!(libc::kill(pid, libc::SIGCONT), 0) };
    writer.run("store 1 1");
    inject(pid).expect("injected");
}

/// A thread that waits for the child to end must not take the stops for it.
#[test]
fn a_waiting_parent_does_not_see_the_stops() {
    let folder = shm();
    let ram = ram_file(&folder);
    let mut writer = Writer::start(&ram);
    let pid = writer.pid();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let mut status = 0;
            // SAFETY: a live int; the child is left for `Writer` to collect.
            unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOWAIT;
                libc::waitid(libc::P_PID, pid.cast_unsigned(), &raw mut info, flags);
                status += info.si_code;
            }
            status
        });
        for _ in 0..200 {
            inject(pid).expect("injected");
            assert!(!waiter.is_finished(), "took a stop for the end");
        }
        // SAFETY: plain numbers; the process is ours.
        unsafe { assert_eq!(libc::kill(pid, libc::SIGKILL), 0) };
        assert_eq!(waiter.join().expect("waited"), libc::CLD_KILLED);
    });
    let _ = writer.child.wait();
}
