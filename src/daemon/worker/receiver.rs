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
use interconnect::codec::{PageContent, decode_disk_writes, decode_pages};
use interconnect::epoch::EpochAssembler;
use interconnect::frame::{Frame, FrameKind};
use std::sync::mpsc::Sender;
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
        }
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
) -> std::io::Result<()> {
    let receive = move || {
        let blocks = Some(BytesMut::new());
        let mut receiver = Receiver {
            landing,
            inbox,
            blocks,
            begun: Epoch::default(),
        };
        while let Some(frame) = frames.blocking_recv() {
            let epoch = frame.epoch;
            if let Err(reason) = receiver.frame(frame) {
                let _ = receiver.inbox.send(WorkerEvent::Bad { epoch, reason });
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("epoch-recv".into())
        .spawn(receive)
        .map(drop)
}

struct Receiver {
    landing: Landing,
    inbox: Sender<WorkerEvent>,
    /// The RAM blocks so far, until the first frame of another kind.
    blocks: Option<BytesMut>,
    /// The newest epoch of which content has come.
    begun: Epoch,
}

impl Receiver {
    fn frame(&mut self, frame: Frame) -> Result<(), String> {
        if frame.vm != self.landing.vm || frame.generation != self.landing.generation {
            return Err(format!(
                "a frame of VM {} generation {} on the lane of VM {} generation {}",
                frame.vm, frame.generation, self.landing.vm, self.landing.generation
            ));
        }
        match frame.kind {
            FrameKind::SeedBlocks => self.add_blocks(&frame.payload),
            FrameKind::SeedPages => {
                self.end_blocks();
                self.seed_pages(&frame.payload)
            }
            FrameKind::SeedDisk => {
                self.end_blocks();
                self.seed_disk(&frame.payload)
            }
            kind => {
                self.end_blocks();
                if kind != FrameKind::Ingress && frame.epoch > self.begun {
                    self.begun = frame.epoch;
                    tracing::debug!(epoch = %self.begun, "epoch begins to come");
                }
                let whole = self
                    .landing
                    .assembler()
                    .push(frame)
                    .map_err(|e| e.to_string())?;
                if let Some(epoch) = whole {
                    tracing::debug!(epoch = %epoch.epoch, "epoch whole");
                    let _ = self.inbox.send(WorkerEvent::Whole(Box::new(epoch)));
                }
                Ok(())
            }
        }
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
        let pages = ram.pages();
        let mut failed = None;
        decode_pages(batch, pages, |index, content| {
            if failed.is_none() {
                failed = Landing::put_page(&mut ram, index, content).err();
            }
        })
        .map_err(|e| e.to_string())?;
        failed.map_or(Ok(()), Err)
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
