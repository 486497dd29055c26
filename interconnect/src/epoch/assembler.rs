//! The standby's half: frames to whole epochs.
//!
//! An epoch is held apart from the guest's memory until everything about it has
//! been checked, so that dropping a half-received one leaves no trace. Content is
//! decoded as it arrives, while the rest is still on the wire: when the end comes
//! only counts and digest remain to be compared before the acknowledgement.

use super::meta::{Totals, decode_end};
use super::packer::ns_since;
use super::{DecodeStats, ReceivedEpoch};
use crate::codec::{
    CodecError, DecodeBuffers, DiskWrite, PageBatch, decode_delta, decode_disk_writes,
    decode_packets,
};
use crate::frame::{Frame, FrameError, FrameKind};
use crate::ids::{Epoch, Generation, VmId};
use bytes::Bytes;
use ring::digest::{Context, SHA256};
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// How many epochs beyond the next whole one may already have ingress: epoch n+1
/// runs while n is on its way, and n+2 may have begun before n's end is read here.
pub const INGRESS_EPOCHS_AHEAD: u64 = 3;
/// Content beside the pages in [`EpochLimits::for_guest`]: disk writes (the write
/// overlay's bound), page tables of batches, device state.
pub const EPOCH_BESIDES_PAGES_BYTES: u64 = 256 << 20;
/// Ingress kept by default; beyond it the oldest goes first. At a promotion some
/// ms of packets matter, which is 12 MB at 10 Gbit/s.
pub const INGRESS_KEPT_BYTES: u64 = 16 << 20;
/// What one queued item costs beside its content, in bytes (headers of `Bytes`,
/// slots in vectors): makes a flood of empty items count.
const ITEM_BYTES: u64 = 64;

/// What one assembler may hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EpochLimits {
    /// Size of each disk in bytes, in the order of the VM's spec.
    pub disk_bytes: Vec<u64>,
    /// Most bytes of decoded content in one epoch.
    pub epoch_bytes_max: u64,
    /// Most bytes of ingress kept for epochs that are still open.
    pub ingress_bytes_max: u64,
}

impl EpochLimits {
    /// Limits that admit every page of the guest once and
    /// [`EPOCH_BESIDES_PAGES_BYTES`] more.
    #[must_use]
    pub fn for_guest(guest_pages: u64, disk_bytes: Vec<u64>) -> Self {
        Self {
            disk_bytes,
            epoch_bytes_max: guest_pages
                .saturating_mul(crate::codec::PAGE_BYTES as u64)
                .saturating_add(EPOCH_BESIDES_PAGES_BYTES),
            ingress_bytes_max: INGRESS_KEPT_BYTES,
        }
    }
}

/// A frame that does not fit the epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EpochError {
    /// [`EpochAssembler::expect`] was not called.
    #[error("a {0:?} frame came before any epoch was expected: drop the lane")]
    NotExpecting(FrameKind),
    /// A kind that has no place in an epoch.
    #[error("{0:?} frames do not belong to an epoch: drop the lane")]
    Kind(FrameKind),
    /// A frame of another VM.
    #[error("frame of VM {found} on the lane of VM {expected}: drop the lane")]
    Vm {
        /// The lane's VM.
        expected: VmId,
        /// The frame's.
        found: VmId,
    },
    /// A frame of another generation: a deposed primary, or one this side does not
    /// know yet.
    #[error(
        "frame of generation {found} where {expected} is expected: the sender must not run this VM, ask the registry"
    )]
    Generation {
        /// The generation this side follows.
        expected: Generation,
        /// The frame's.
        found: Generation,
    },
    /// A frame of another epoch: replayed, skipped or reordered.
    #[error("{kind:?} frame of epoch {found} where epoch {expected} must come next: drop the lane")]
    Order {
        /// The frame's kind.
        kind: FrameKind,
        /// The epoch that must come next.
        expected: Epoch,
        /// The frame's.
        found: Epoch,
    },
    /// A second device state, or content after it.
    #[error("epoch {epoch}: a {kind:?} frame after the device state: drop the lane")]
    AfterState {
        /// The epoch.
        epoch: Epoch,
        /// The frame's kind.
        kind: FrameKind,
    },
    /// The end came without a device state.
    #[error("epoch {0} ended without a device state: drop the lane")]
    NoState(Epoch),
    /// What came is not what the primary says it sent.
    #[error(
        "epoch {epoch}: {what} is not what the primary sent ({found}, it says {expected}): drop the epoch and the lane"
    )]
    Totals {
        /// The epoch.
        epoch: Epoch,
        /// Which count, or the digest.
        what: &'static str,
        /// As the primary says.
        expected: String,
        /// As received.
        found: String,
    },
    /// The guest has another size here than there.
    #[error(
        "the primary's guest has {found} pages of RAM, the standby's {expected}: give both the same VM spec"
    )]
    GuestPages {
        /// This side's.
        expected: u64,
        /// The primary's.
        found: u64,
    },
    /// The epoch is larger than this side may hold.
    #[error(
        "epoch {epoch} needs {bytes} bytes, the limit is {max}: the primary must checkpoint sooner, or the limit be raised"
    )]
    TooBig {
        /// The epoch.
        epoch: Epoch,
        /// Bytes needed so far.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// A payload that does not decode.
    #[error("epoch {epoch}, {kind:?} frame: {source}")]
    Codec {
        /// The epoch.
        epoch: Epoch,
        /// The frame's kind.
        kind: FrameKind,
        /// What is wrong.
        source: CodecError,
    },
    /// A frame that cannot have come off the wire.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// What is expected next.
#[derive(Clone, Debug)]
struct Expected {
    vm: VmId,
    generation: Generation,
    next: Epoch,
}

/// Content of the epoch that is coming in.
struct Partial {
    batches: Vec<PageBatch>,
    disk: Vec<DiskWrite>,
    state: Option<Bytes>,
    digest: Context,
    totals: Totals,
    bytes: u64,
    decode: DecodeStats,
}

impl Partial {
    fn new() -> Self {
        Self {
            batches: Vec::new(),
            disk: Vec::new(),
            state: None,
            digest: Context::new(&SHA256),
            totals: Totals::default(),
            bytes: 0,
            decode: DecodeStats::default(),
        }
    }
}

/// Buffers one epoch apart until it is whole.
///
/// ```text
///  NotExpecting --expect--> Open(next) --content--> Open(next) --EpochEnd ok--> Open(next+1), epoch handed up
///                              ^                        |
///                              +---- reset, any error --+   half an epoch is dropped, `next` stays
/// ```
pub struct EpochAssembler {
    guest_pages: u64,
    limits: EpochLimits,
    expected: Option<Expected>,
    partial: Partial,
    /// Device state of the last whole epoch: the base of the next delta.
    base: Option<Bytes>,
    /// Packets by the epoch they were delivered in; only open epochs.
    ingress: BTreeMap<Epoch, VecDeque<Bytes>>,
    ingress_bytes: u64,
    ingress_dropped: u64,
    buffers: DecodeBuffers,
}

impl std::fmt::Debug for EpochAssembler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "EpochAssembler({:?}, {} bytes held)",
            self.expected,
            self.held_bytes()
        )
    }
}

impl EpochAssembler {
    /// An assembler that expects nothing yet.
    #[must_use]
    pub fn new(guest_pages: u64, limits: EpochLimits) -> Self {
        Self {
            guest_pages,
            limits,
            expected: None,
            partial: Partial::new(),
            base: None,
            ingress: BTreeMap::new(),
            ingress_bytes: 0,
            ingress_dropped: 0,
            buffers: DecodeBuffers::default(),
        }
    }

    /// From now on take only frames of `vm` in `generation`, the next whole epoch
    /// being `next`. Drops what is half received, all ingress, and (if VM or
    /// generation differ or `next` does not follow the last whole epoch) the base
    /// for device-state deltas.
    pub fn expect(&mut self, vm: VmId, generation: Generation, next: Epoch) {
        let follows = self
            .expected
            .as_ref()
            .is_some_and(|now| now.vm == vm && now.generation == generation && now.next == next);
        if !follows {
            self.base = None;
        }
        self.reset();
        self.ingress.clear();
        self.ingress_bytes = 0;
        self.expected = Some(Expected {
            vm,
            generation,
            next,
        });
    }

    /// Take one frame; `Some` when it made the epoch whole and everything holds.
    ///
    /// # Errors
    /// [`EpochError`]; the half-received epoch is dropped then, the expected
    /// epoch stays the same. Drop the lane.
    pub fn push(&mut self, frame: Frame) -> Result<Option<ReceivedEpoch>, EpochError> {
        let begun = Instant::now();
        let bytes = frame.payload.len() as u64;
        let mut result = self.take(frame);
        let ns = ns_since(begun);
        match &mut result {
            Ok(Some(whole)) => whole.decode.decode_ns += ns,
            Ok(None) => {
                self.partial.decode.decode_ns += ns;
                self.partial.decode.wire_bytes += bytes;
            }
            Err(_) => self.reset(),
        }
        result
    }

    fn take(&mut self, frame: Frame) -> Result<Option<ReceivedEpoch>, EpochError> {
        let Some(expected) = self.expected.clone() else {
            return Err(EpochError::NotExpecting(frame.kind));
        };
        if frame.vm != expected.vm {
            return Err(EpochError::Vm {
                expected: expected.vm,
                found: frame.vm,
            });
        }
        if frame.generation != expected.generation {
            return Err(EpochError::Generation {
                expected: expected.generation,
                found: frame.generation,
            });
        }
        let (kind, epoch) = (frame.kind, frame.epoch);
        let codec = |source| EpochError::Codec {
            epoch,
            kind,
            source,
        };
        match kind {
            FrameKind::Ingress => {
                self.take_ingress(expected.next, &frame)?;
                return Ok(None);
            }
            FrameKind::Pages
            | FrameKind::DiskWrites
            | FrameKind::DeviceState
            | FrameKind::EpochEnd => {}
            FrameKind::Invalid
            | FrameKind::Control
            | FrameKind::EpochAck
            | FrameKind::SeedPages
            | FrameKind::SeedDisk
            | FrameKind::SeedBlocks
            | FrameKind::IoRequest
            | FrameKind::IoReply
            | FrameKind::Probe
            | FrameKind::ProbeAck => return Err(EpochError::Kind(kind)),
        }
        if epoch != expected.next {
            return Err(EpochError::Order {
                kind,
                expected: expected.next,
                found: epoch,
            });
        }
        if kind == FrameKind::EpochEnd {
            return self.finish(&expected, &frame).map(Some);
        }
        if self.partial.state.is_some() {
            return Err(EpochError::AfterState { epoch, kind });
        }
        // The frame's payload CRC was verified by the decoder; computing it again
        // here also covers what happened to the bytes between there and here.
        self.partial.digest.update(&frame.header()?);
        self.partial.totals.frames += 1;
        let added = match kind {
            FrameKind::Pages => {
                let batch = PageBatch::decode(&frame.payload, self.guest_pages, &self.buffers)
                    .map_err(codec)?;
                self.partial.totals.pages += batch.len() as u64;
                let bytes = batch.held_bytes();
                self.partial.batches.push(batch);
                bytes
            }
            FrameKind::DiskWrites => {
                let writes =
                    decode_disk_writes(&frame.payload, &self.limits.disk_bytes).map_err(codec)?;
                self.partial.totals.disk_writes += writes.len() as u64;
                // What is held: the plain data, wherever it lies, and the entries.
                let data: u64 = writes
                    .iter()
                    .map(|write| match &write.op {
                        crate::codec::DiskOp::Data(data) => data.len() as u64,
                        _ => 0,
                    })
                    .sum();
                let bytes = data + writes.len() as u64 * ITEM_BYTES;
                self.partial.disk.extend(writes);
                bytes
            }
            _ => {
                let state = decode_delta(self.base.as_deref(), &frame.payload).map_err(codec)?;
                let bytes = state.len() as u64;
                self.partial.state = Some(state);
                bytes
            }
        };
        self.partial.bytes += added + ITEM_BYTES;
        let (bytes, max) = (self.partial.bytes, self.limits.epoch_bytes_max);
        if bytes > max {
            return Err(EpochError::TooBig { epoch, bytes, max });
        }
        Ok(None)
    }

    fn finish(&mut self, expected: &Expected, end: &Frame) -> Result<ReceivedEpoch, EpochError> {
        let epoch = end.epoch;
        let (says, meta) = decode_end(&end.payload).map_err(|source| EpochError::Codec {
            epoch,
            kind: end.kind,
            source,
        })?;
        if meta.guest_pages != self.guest_pages {
            return Err(EpochError::GuestPages {
                expected: self.guest_pages,
                found: meta.guest_pages,
            });
        }
        let mut partial = std::mem::replace(&mut self.partial, Partial::new());
        partial
            .totals
            .digest
            .copy_from_slice(partial.digest.finish().as_ref());
        let found = &partial.totals;
        for (what, says, found) in [
            (
                "the number of frames",
                u64::from(says.frames),
                u64::from(found.frames),
            ),
            ("the number of pages", says.pages, found.pages),
            (
                "the number of disk writes",
                says.disk_writes,
                found.disk_writes,
            ),
        ] {
            if says != found {
                let (expected, found) = (says.to_string(), found.to_string());
                return Err(EpochError::Totals {
                    epoch,
                    what,
                    expected,
                    found,
                });
            }
        }
        if says.digest != found.digest {
            let (expected, found) = (hex(&says.digest), hex(&found.digest));
            return Err(EpochError::Totals {
                epoch,
                what: "the digest",
                expected,
                found,
            });
        }
        let Some(state) = partial.state else {
            return Err(EpochError::NoState(epoch));
        };
        self.base = Some(state.clone());
        let ingress: Vec<Bytes> = self.ingress.remove(&epoch).unwrap_or_default().into();
        self.ingress_bytes -= ingress.iter().map(packet_bytes).sum::<u64>();
        self.expected = Some(Expected {
            next: epoch.next(),
            ..expected.clone()
        });
        Ok(ReceivedEpoch {
            vm: expected.vm,
            generation: expected.generation,
            epoch,
            disk: partial.disk,
            device_state: state,
            ingress,
            meta,
            decode: partial.decode,
            batches: partial.batches,
        })
    }

    /// Keep packets of an open epoch; those of a whole one are part of its memory
    /// already and come late, those too far ahead are out of order.
    fn take_ingress(&mut self, next: Epoch, frame: &Frame) -> Result<(), EpochError> {
        let (kind, epoch) = (frame.kind, frame.epoch);
        if epoch < next {
            return Ok(());
        }
        if epoch.0 - next.0 > INGRESS_EPOCHS_AHEAD {
            return Err(EpochError::Order {
                kind,
                expected: next,
                found: epoch,
            });
        }
        let packets = decode_packets(&frame.payload).map_err(|source| EpochError::Codec {
            epoch,
            kind,
            source,
        })?;
        self.ingress_bytes += packets.iter().map(packet_bytes).sum::<u64>();
        self.ingress.entry(epoch).or_default().extend(packets);
        while self.ingress_bytes > self.limits.ingress_bytes_max {
            let Some(mut oldest) = self.ingress.first_entry() else {
                break;
            };
            if let Some(packet) = oldest.get_mut().pop_front() {
                self.ingress_bytes -= packet_bytes(&packet);
                self.ingress_dropped += 1;
            } else {
                oldest.remove();
            }
        }
        Ok(())
    }

    /// Drop the half-received epoch (the lane is gone). Ingress of open epochs
    /// stays: it may be replayed after a promotion.
    pub fn reset(&mut self) {
        self.partial = Partial::new();
    }

    /// The epoch that must come next.
    #[must_use]
    pub fn next_epoch(&self) -> Option<(VmId, Generation, Epoch)> {
        self.expected
            .as_ref()
            .map(|expected| (expected.vm, expected.generation, expected.next))
    }

    /// Packets delivered to the guest since the last whole epoch, oldest first:
    /// replay these after a promotion.
    #[must_use]
    pub fn open_ingress(&self) -> Vec<Bytes> {
        self.ingress.values().flatten().cloned().collect()
    }

    /// Packets not kept because of [`EpochLimits::ingress_bytes_max`], so far.
    #[must_use]
    pub fn ingress_dropped(&self) -> u64 {
        self.ingress_dropped
    }

    /// Bytes held now.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.partial.bytes
            + self.ingress_bytes
            + self.base.as_ref().map_or(0, |base| base.len() as u64)
    }
}

fn packet_bytes(packet: &Bytes) -> u64 {
    packet.len() as u64 + ITEM_BYTES
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
