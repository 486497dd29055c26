//! The thread that takes a standby's frames off its lane.
//!
//! Seeded pages and blocks go straight into the standby's RAM file and images: nothing
//! older is there to be spoilt. Epochs are buffered apart and handed to the worker whole.

use super::WorkerEvent;
use super::sender::from_wire;
use crate::interpose::disk::Disk;
use crate::interpose::memory::RamImage;
use crate::pool::{Epoch, Generation, VmId};
use bytes::{Bytes, BytesMut};
use interconnect::codec::{DecodeBuffers, PageBatch, PageContent, decode_disk_writes};
use interconnect::epoch::EpochAssembler;
use interconnect::frame::{Frame, FrameKind};
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Largest stream of RAM blocks outside the RAM file: VGA memory of 16 MiB and firmware
/// with room (4.6 MB is the most measured, QEMU.md section 5).
const BLOCKS_BYTES_MAX: usize = 64 << 20;

/// What receiver and worker share of a standby.
#[derive(Clone)]
pub struct Landing {
    /// The VM.
    pub vm: VmId,
    /// The attempt.
    pub generation: Generation,
    /// Its RAM.
    pub ram: Arc<Mutex<RamImage>>,
    /// Its disks.
    pub disks: Vec<Arc<Disk>>,
    /// Epochs on their way, and the packets of the open one.
    pub assembler: Arc<Mutex<EpochAssembler>>,
}

impl Landing {
    /// The RAM.
    pub fn ram(&self) -> MutexGuard<'_, RamImage> {
        self.ram.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The assembler.
    pub fn assembler(&self) -> MutexGuard<'_, EpochAssembler> {
        self.assembler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Put one page where it belongs. The index was checked when it was decoded.
    pub fn put_page(
        ram: &mut RamImage,
        index: u64,
        content: PageContent<'_>,
    ) -> Result<(), String> {
        match content {
            PageContent::Zero => ram.zero_page(index).map_err(|e| e.to_string()),
            PageContent::Raw(page) => ram.write_page(index, page).map_err(|e| e.to_string()),
            PageContent::Patch(patch) => {
                // A copy: what fails its check must not be left behind in the RAM.
                let mut page = *ram.page(index);
                patch
                    .apply(&mut page)
                    .map_err(|e| format!("page {index}: {e}"))?;
                ram.write_page(index, &page).map_err(|e| e.to_string())
            }
        }
    }
}

/// Whole epochs that may wait for the worker. A primary keeps within
/// [`MAX_IN_FLIGHT`](crate::mirror::MAX_IN_FLIGHT) beyond what is acknowledged, and the
/// standby acknowledges [`APPLY_BACKLOG_MAX`](crate::mirror::APPLY_BACKLOG_MAX) ahead of
/// applying: one that sends more is confused, and is held by the lane's flow control.
const WHOLE_MAX: usize = 3;
const _: () = assert!(
    WHOLE_MAX as u64 >= crate::mirror::APPLY_BACKLOG_MAX + crate::mirror::MAX_IN_FLIGHT as u64
);

/// One for each whole epoch that is not applied yet; when they are gone the receiver ends.
pub struct Slots(std::sync::mpsc::Receiver<()>);

impl Slots {
    /// An epoch is applied (or dropped): one more may come.
    pub fn give_back(&self) {
        // Empty only if this is called too often, which frees nothing.
        let _ = self.0.try_recv();
    }
}

/// Start a receiver; it ends with the lane or when something is wrong with it.
///
/// # Errors
/// If no thread can be started.
pub fn start(
    landing: Landing,
    mut frames: tokio::sync::mpsc::Receiver<Frame>,
    inbox: Sender<WorkerEvent>,
) -> std::io::Result<Slots> {
    let (slots, given_back) = sync_channel(WHOLE_MAX);
    let receive = move || {
        let mut receiver = Receiver {
            landing,
            inbox,
            slots,
            blocks: Some(BytesMut::new()),
            begun: Epoch::default(),
            buffers: DecodeBuffers::default(),
        };
        while let Some(frame) = frames.blocking_recv() {
            let epoch = frame.epoch;
            match receiver.frame(frame) {
                Ok(Go::On) => {}
                Ok(Go::End) => return,
                Err(reason) => {
                    let _ = receiver.inbox.send(WorkerEvent::Bad { epoch, reason });
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("epoch-recv".into())
        .spawn(receive)?;
    Ok(Slots(given_back))
}

/// Whether a receiver goes on after a frame.
enum Go {
    On,
    /// Nobody is there to take epochs.
    End,
}

struct Receiver {
    landing: Landing,
    inbox: Sender<WorkerEvent>,
    /// One is taken for each whole epoch.
    slots: SyncSender<()>,
    /// The RAM blocks so far, until the first frame of another kind.
    blocks: Option<BytesMut>,
    /// The newest epoch of which content has come.
    begun: Epoch,
    /// For the pages of a seeding.
    buffers: DecodeBuffers,
}

impl Receiver {
    fn frame(&mut self, frame: Frame) -> Result<Go, String> {
        let Frame {
            kind,
            vm,
            generation,
            ..
        } = frame;
        if vm != self.landing.vm || generation != self.landing.generation {
            return Err(format!(
                "a frame of VM {vm} generation {generation} on the lane of VM {} generation {}",
                self.landing.vm, self.landing.generation
            ));
        }
        let seeding = matches!(
            kind,
            FrameKind::SeedBlocks | FrameKind::SeedPages | FrameKind::SeedDisk
        );
        if seeding && self.begun != Epoch::default() {
            // It would go past the buffer, into the middle of an epoch.
            return Err(format!("a {kind:?} frame after epoch {} began", self.begun));
        }
        if kind != FrameKind::SeedBlocks {
            self.end_blocks();
        }
        match kind {
            FrameKind::SeedBlocks => self.add_blocks(&frame.payload)?,
            FrameKind::SeedPages => self.seed_pages(&frame.payload)?,
            FrameKind::SeedDisk => self.seed_disk(&frame.payload)?,
            _ => return self.epoch_frame(frame),
        }
        Ok(Go::On)
    }

    fn epoch_frame(&mut self, frame: Frame) -> Result<Go, String> {
        if frame.kind != FrameKind::Ingress && frame.epoch > self.begun {
            self.begun = frame.epoch;
            tracing::debug!(epoch = %self.begun, "epoch begins to come");
        }
        let pushed = self.landing.assembler().push(frame);
        let Some(whole) = pushed.map_err(|e| e.to_string())? else {
            return Ok(Go::On);
        };
        tracing::debug!(epoch = %whole.epoch, "epoch whole");
        if self.slots.send(()).is_err() {
            return Ok(Go::End);
        }
        let _ = self.inbox.send(WorkerEvent::Whole(Box::new(whole)));
        Ok(Go::On)
    }

    fn add_blocks(&mut self, piece: &[u8]) -> Result<(), String> {
        let Some(blocks) = &mut self.blocks else {
            return Err("RAM blocks came twice".into());
        };
        if blocks.len() + piece.len() > BLOCKS_BYTES_MAX {
            return Err(format!(
                "RAM blocks outside the RAM file exceed {BLOCKS_BYTES_MAX} bytes"
            ));
        }
        blocks.extend_from_slice(piece);
        Ok(())
    }

    fn end_blocks(&mut self) {
        if let Some(blocks) = self.blocks.take() {
            let _ = self.inbox.send(WorkerEvent::Blocks(blocks.freeze()));
        }
    }

    fn seed_pages(&mut self, batch: &Bytes) -> Result<(), String> {
        let mut ram = self.landing.ram();
        let batch =
            PageBatch::decode(batch, ram.pages(), &self.buffers).map_err(|e| e.to_string())?;
        for (index, content) in batch.pages() {
            Landing::put_page(&mut ram, index, content)?;
        }
        Ok(())
    }

    fn seed_disk(&mut self, batch: &Bytes) -> Result<(), String> {
        let sizes: Vec<u64> = self.landing.disks.iter().map(|d| d.len()).collect();
        for write in decode_disk_writes(batch, &sizes).map_err(|e| e.to_string())? {
            let (index, write) = from_wire(write);
            let disk = self
                .landing
                .disks
                .get(index)
                .ok_or("a write for a disk the VM has not")?;
            disk.apply(self.landing.generation, &[write])
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

/// The epoch an assembler of a fresh attempt expects first.
pub const FIRST_EPOCH: Epoch = Epoch(1);

#[cfg(test)]
mod tests {
    use super::*;
    use interconnect::codec::{CodecChoice, EncodePolicy, LinkFacts};
    use interconnect::epoch::{EpochLimits, EpochMeta, EpochWriter};
    use std::convert::Infallible;
    use std::sync::mpsc::{Receiver as Inbox, channel};

    const VM: VmId = VmId([4; 16]);
    const GENERATION: Generation = Generation(2);
    const PAGES: u64 = 4;

    struct Lane {
        frames: tokio::sync::mpsc::Sender<Frame>,
        inbox: Inbox<WorkerEvent>,
        slots: Slots,
        writer: EpochWriter,
        _file: tempfile::NamedTempFile,
    }

    fn lane() -> Lane {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(PAGES * 4096).unwrap();
        let mut assembler = EpochAssembler::new(PAGES, EpochLimits::for_guest(PAGES, vec![]));
        assembler.expect(VM, GENERATION, FIRST_EPOCH);
        let landing = Landing {
            vm: VM,
            generation: GENERATION,
            ram: Arc::new(Mutex::new(
                RamImage::open(file.path(), PAGES * 4096).unwrap(),
            )),
            disks: vec![],
            assembler: Arc::new(Mutex::new(assembler)),
        };
        let (frames, rx) = tokio::sync::mpsc::channel(100);
        let (tx, inbox) = channel();
        Lane {
            frames,
            inbox,
            slots: start(landing, rx, tx).unwrap(),
            writer: EpochWriter::new(VM, GENERATION, EncodePolicy::v1(CodecChoice::Raw)),
            _file: file,
        }
    }

    impl Lane {
        fn put(&self, frame: Frame) {
            self.frames.blocking_send(frame).unwrap();
        }

        fn put_epoch(&mut self, epoch: u64) {
            let mut frames = Vec::new();
            let mut send = |frame| {
                frames.push(frame);
                Ok::<_, Infallible>(())
            };
            let meta = EpochMeta {
                guest_pages: PAGES,
                ..EpochMeta::default()
            };
            self.writer.begin(Epoch(epoch), LinkFacts::default());
            self.writer
                .device_state(Bytes::from_static(b"state"), &mut send)
                .unwrap();
            self.writer.finish(&meta, &mut send).unwrap();
            frames.into_iter().for_each(|frame| self.put(frame));
        }

        fn seed(&self, kind: FrameKind, payload: &'static [u8]) {
            self.put(Frame {
                kind,
                vm: VM,
                generation: GENERATION,
                epoch: Epoch::default(),
                payload: Bytes::from_static(payload),
            });
        }

        fn whole(&self) -> Epoch {
            loop {
                if let WorkerEvent::Whole(epoch) = self.inbox.recv().unwrap() {
                    return epoch.epoch;
                }
            }
        }
    }

    #[test]
    fn epochs_that_nobody_applies_are_bounded() {
        let mut lane = lane();
        let sent = WHOLE_MAX as u64 + 3;
        (1..=sent).for_each(|epoch| lane.put_epoch(epoch));
        for epoch in 1..=WHOLE_MAX as u64 {
            assert_eq!(lane.whole(), Epoch(epoch));
        }
        lane.slots.give_back();
        assert_eq!(lane.whole(), Epoch(WHOLE_MAX as u64 + 1));
        // The worker goes away: the receiver ends and what it held back never comes.
        drop(lane.slots);
        drop(lane.frames);
        assert_eq!(lane.inbox.iter().count(), 0);
    }

    #[test]
    fn seeding_does_not_go_past_an_epoch() {
        let mut lane = lane();
        lane.seed(FrameKind::SeedBlocks, b"blocks");
        lane.put_epoch(1);
        assert!(
            matches!(lane.inbox.recv().unwrap(), WorkerEvent::Blocks(b) if b[..] == b"blocks"[..])
        );
        assert_eq!(lane.whole(), Epoch(1));
        lane.seed(FrameKind::SeedPages, b"");
        match lane.inbox.recv().unwrap() {
            WorkerEvent::Bad { reason, .. } => {
                assert!(reason.contains("after epoch 1"), "{reason}")
            }
            _ => panic!("an epoch or blocks"),
        }
    }
}
