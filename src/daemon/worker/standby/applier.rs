//! The thread that puts whole epochs into a standby's RAM and disks.
//!
//! A thread of its own, so that a large epoch does not delay the acknowledgement of the
//! next one. Order is kept by handing over one epoch at a time (the machine asks for the
//! next when one is applied), and so is the bound:
//! [`APPLY_BACKLOG_MAX`](crate::mirror::APPLY_BACKLOG_MAX) epochs are acknowledged ahead.
//! Must never apply an epoch after another has failed: what is here then is a mixture.

use super::say;
use crate::daemon::clock::now_ns;
use crate::daemon::worker::WorkerEvent;
use crate::daemon::worker::receiver::{FIRST_EPOCH, Landing};
use crate::daemon::worker::sender::from_wire;
use crate::daemon::worker::syncer::Syncer;
use crate::pool::Epoch;
use bytes::Bytes;
use interconnect::epoch::{AuditSums, ReceivedEpoch};
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// What promotion needs of the newest applied epoch.
pub struct LastApplied {
    /// Which.
    pub epoch: Epoch,
    /// Its device state.
    pub device_state: Bytes,
    /// When its applying began, CLOCK_MONOTONIC nanoseconds.
    pub arrived_ns: u64,
    /// Packets on their way at its end, both ways.
    pub ingress: Vec<Bytes>,
    /// The primary's sums over everything.
    pub audit: Option<AuditSums>,
}

/// A running applier; dropping it waits for the epoch under way.
pub struct Applier {
    epochs: Option<SyncSender<Box<ReceivedEpoch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Applier {
    /// Start one; it answers each epoch with [`WorkerEvent::Applied`].
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        landing: Landing,
        syncer: Syncer,
        inbox: Sender<WorkerEvent>,
    ) -> std::io::Result<Self> {
        // One at a time: see the module.
        let (epochs, queue) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("epoch-apply".into())
            .spawn(move || serve(&landing, &syncer, &queue, &inbox))?;
        Ok(Self {
            epochs: Some(epochs),
            thread: Some(thread),
        })
    }

    /// Hand over an epoch. False if the thread has ended: it said why.
    pub fn apply(&self, epoch: Box<ReceivedEpoch>) -> bool {
        let sent = self.epochs.as_ref().map(|epochs| epochs.send(epoch));
        matches!(sent, Some(Ok(())))
    }
}

impl Drop for Applier {
    fn drop(&mut self) {
        self.epochs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    landing: &Landing,
    syncer: &Syncer,
    queue: &Receiver<Box<ReceivedEpoch>>,
    inbox: &Sender<WorkerEvent>,
) {
    while let Ok(received) = queue.recv() {
        let epoch = received.epoch;
        let outcome = apply(landing, syncer, *received).map(Box::new);
        let failed = outcome.is_err();
        if inbox.send(WorkerEvent::Applied { epoch, outcome }).is_err() || failed {
            return;
        }
    }
}

/// Put a whole epoch into RAM and disks. An error here leaves a mixture behind: the
/// standby is broken then and must not be promoted.
fn apply(
    landing: &Landing,
    syncer: &Syncer,
    received: ReceivedEpoch,
) -> Result<LastApplied, String> {
    let arrived_ns = now_ns();
    {
        let mut ram = landing.ram();
        for (index, content) in received.pages() {
            Landing::put_page(&mut ram, index, content)?;
        }
    }
    let ram_ns = now_ns();
    let epoch = received.epoch;
    let mut per_disk = vec![Vec::new(); landing.disks.len()];
    for write in received.disk {
        let (index, write) = from_wire(write);
        per_disk
            .get_mut(index)
            .ok_or("a write for a disk the VM has not")?
            .push(write);
    }
    for (disk, writes) in landing.disks.iter().zip(&per_disk) {
        disk.apply(landing.generation, writes).map_err(say)?;
        // What was seeded is synced after the first.
        if !writes.is_empty() || epoch == FIRST_EPOCH {
            syncer.written();
        }
    }
    let (ram_us, disk_us) = (
        (ram_ns - arrived_ns) / 1000,
        now_ns().saturating_sub(ram_ns) / 1000,
    );
    tracing::debug!(%epoch, ram_us, disk_us, "epoch applied");
    Ok(LastApplied {
        epoch,
        device_state: received.device_state,
        arrived_ns,
        ingress: received.ingress,
        audit: received.meta.audit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interpose::memory::RamImage;
    use crate::pool::{Generation, VmId};
    use interconnect::codec::{CodecChoice, EncodePolicy, LinkFacts};
    use interconnect::epoch::{EpochAssembler, EpochLimits, EpochMeta, EpochWriter};
    use std::convert::Infallible;
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};

    const VM: VmId = VmId([4; 16]);
    const GENERATION: Generation = Generation(2);
    const PAGES: u64 = 8;

    struct Bench {
        landing: Landing,
        writer: EpochWriter,
        file: tempfile::NamedTempFile,
    }

    impl Bench {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(PAGES * 4096).unwrap();
            let mut assembler = EpochAssembler::new(PAGES, EpochLimits::for_guest(PAGES, vec![]));
            assembler.expect(VM, GENERATION, FIRST_EPOCH);
            let ram = RamImage::open(file.path(), PAGES * 4096).unwrap();
            Self {
                landing: Landing {
                    vm: VM,
                    generation: GENERATION,
                    ram: Arc::new(Mutex::new(ram)),
                    disks: vec![],
                    assembler: Arc::new(Mutex::new(assembler)),
                },
                writer: EpochWriter::new(VM, GENERATION, EncodePolicy::v1(CodecChoice::Raw)),
                file,
            }
        }

        /// An epoch with these pages, as it comes out of the assembler.
        fn epoch(&mut self, number: u64, pages: &[(u64, [u8; 4096])]) -> Box<ReceivedEpoch> {
            let mut frames = Vec::new();
            let mut put = |frame| {
                frames.push(frame);
                Ok::<_, Infallible>(())
            };
            let meta = EpochMeta {
                guest_pages: PAGES,
                ..EpochMeta::default()
            };
            self.writer.begin(Epoch(number), LinkFacts::default());
            self.writer
                .pages(pages.iter().map(|(index, page)| (*index, page)), &mut put)
                .unwrap();
            let state = Bytes::from(vec![1; 64]);
            self.writer.device_state(state, &mut put).unwrap();
            self.writer.finish(&meta, &mut put).unwrap();
            let mut assembler = self.landing.assembler();
            let whole = frames
                .into_iter()
                .filter_map(|frame| assembler.push(frame).unwrap());
            Box::new(whole.last().unwrap())
        }

        fn start(&self) -> (Applier, Receiver<WorkerEvent>) {
            let (inbox, events) = channel();
            let syncer = Syncer::start(vec![]).unwrap();
            let applier = Applier::start(self.landing.clone(), syncer, inbox).unwrap();
            (applier, events)
        }
    }

    fn applied(events: &Receiver<WorkerEvent>) -> (Epoch, Result<Box<LastApplied>, String>) {
        match events.recv().unwrap() {
            WorkerEvent::Applied { epoch, outcome } => (epoch, outcome),
            _ => panic!("another event"),
        }
    }

    #[test]
    fn epochs_are_applied_in_order_and_the_last_one_is_told_whole() {
        let mut bench = Bench::new();
        let (applier, events) = bench.start();
        for number in 1..=20 {
            let fill = u8::try_from(number).unwrap();
            let pages = [(number % PAGES, [fill; 4096]), (3, [fill; 4096])];
            assert!(applier.apply(bench.epoch(number, &pages)));
        }
        for number in 1..=20 {
            let (epoch, outcome) = applied(&events);
            let last = outcome.unwrap();
            assert_eq!((epoch, last.epoch), (Epoch(number), Epoch(number)));
            assert_eq!(last.device_state.len(), 64);
        }
        drop(applier);
        let ram = std::fs::read(bench.file.path()).unwrap();
        assert_eq!((ram[3 * 4096], ram[4 * 4096], ram[5 * 4096]), (20, 20, 13));
    }

    #[test]
    fn it_is_told_while_an_epoch_is_applied_and_ends_with_the_first_that_fails() {
        let mut bench = Bench::new();
        let (applier, events) = bench.start();
        // The RAM is taken: nothing can be applied, and nobody has to wait for that.
        let held = Arc::clone(&bench.landing.ram);
        let guard = held.lock().unwrap();
        assert!(applier.apply(bench.epoch(1, &[(0, [1; 4096])])));
        assert!(events.try_recv().is_err());
        drop(guard);
        assert!(applied(&events).1.is_ok());
        let mut bad = bench.epoch(2, &[(0, [2; 4096])]);
        bad.disk.push(interconnect::codec::DiskWrite {
            disk: 0,
            offset: 0,
            op: interconnect::codec::DiskOp::Zero { length: 4096 },
        });
        assert!(applier.apply(bad));
        assert!(applied(&events).1.is_err_and(|e| e.contains("disk")));
        // One may still find room in the queue; nothing comes of it.
        while applier.apply(bench.epoch(3, &[])) {
            bench = Bench::new();
            bench.landing.assembler().expect(VM, GENERATION, Epoch(3));
        }
        assert!(events.try_recv().is_err());
    }
}
