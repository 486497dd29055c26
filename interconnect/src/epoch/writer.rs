//! The primary's half: content of an epoch to frames.
//!
//! Each frame is handed to the caller's `send` as soon as it is encoded, so that
//! the link carries the first batch while the second is being compressed.

use super::EpochMeta;
use super::meta::{Totals, encode_end};
use super::packer::{PackError, Packer, ns_since};
use super::pool::EncodePool;
use crate::codec::disk::{DISK_WRITE_BYTES_MAX, split_write};
use crate::codec::{
    CodecError, DiskWrite, EncodePolicy, EncodeStats, LinkFacts, Page, encode_delta, encode_packets,
};
use crate::frame::{Frame, FrameError, FrameKind};
use crate::ids::{Epoch, Generation, VmId};
use bytes::{Bytes, BytesMut};
use ring::digest::{Context, SHA256};
use std::borrow::Cow;
use std::time::Instant;

/// Why an epoch could not be written; `E` is the error of the caller's `send`.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E> {
    /// The caller's `send` failed.
    #[error("{0}")]
    Send(E),
    /// Content that cannot be encoded.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Content that does not fit a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The calls came out of order.
    #[error("epoch writer called out of order: {0}")]
    Order(&'static str),
    /// A thread of the pool ended in the middle of a batch.
    #[error("an encoding thread ended with a batch of the epoch: restart the daemon")]
    Worker,
}

/// Frames for packets delivered to the guest during the running `epoch`. They may
/// be sent from any thread, also between the frames of the epoch before: they are
/// not part of the digest, because a packet that is missing at a replay is one lost
/// on the wire, which the client's TCP sends again.
///
/// # Errors
/// [`CodecError::TooBig`] for a packet above [`crate::codec::packets::PACKET_BYTES_MAX`].
pub fn ingress_frames(
    vm: VmId,
    generation: Generation,
    epoch: Epoch,
    packets: &[Bytes],
) -> Result<Vec<Frame>, CodecError> {
    let mut rest = packets;
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let mut out = BytesMut::new();
        let taken = encode_packets(rest, &mut out)?;
        rest = &rest[taken..];
        frames.push(Frame {
            kind: FrameKind::Ingress,
            vm,
            generation,
            epoch,
            payload: out.freeze(),
        });
    }
    Ok(frames)
}

/// Where the writer stands within an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// No epoch is begun.
    Idle,
    /// Pages and disk writes may come.
    Content,
    /// The device state is sent; only the end may come.
    StateSent,
}

/// Turns the content of one epoch after the other into frames; lives as long as
/// its lane (make a new one for a new lane: the first device state is then full, and no page
/// is sent as a patch before it was sent whole).
///
/// ```text
/// Idle --begin--> Content --device_state--> StateSent --finish--> Idle
///                 | pages, disk: stay
/// ```
pub struct EpochWriter {
    packer: Packer,
    frames: Frames,
    phase: Phase,
    /// Device state of the last finished epoch: the base of the next delta.
    base: Option<Bytes>,
    /// Device state of the epoch being written.
    state: Option<Bytes>,
}

/// Numbers the frames of an epoch and keeps their digest.
struct Frames {
    vm: VmId,
    generation: Generation,
    epoch: Epoch,
    digest: Context,
    totals: Totals,
}

impl Frames {
    /// Count a frame into the digest and send it.
    fn emit<E>(
        &mut self,
        kind: FrameKind,
        payload: Bytes,
        stats: &mut EncodeStats,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        let frame = Frame {
            kind,
            vm: self.vm,
            generation: self.generation,
            epoch: self.epoch,
            payload,
        };
        let begun = Instant::now();
        self.digest.update(&frame.header()?);
        stats.check_ns += ns_since(begun);
        self.totals.frames += 1;
        send(frame).map_err(WriteError::Send)
    }
}

impl std::fmt::Debug for EpochWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "EpochWriter({} {:?} {:?} {:?})",
            self.frames.vm, self.frames.generation, self.frames.epoch, self.phase
        )
    }
}

impl EpochWriter {
    /// A writer for a fresh lane that packs in the calling thread.
    #[must_use]
    pub fn new(vm: VmId, generation: Generation, policy: EncodePolicy) -> Self {
        Self::with_pool(vm, generation, policy, EncodePool::default())
    }

    /// A writer for a fresh lane that packs in the threads of `pool`.
    #[must_use]
    pub fn with_pool(
        vm: VmId,
        generation: Generation,
        policy: EncodePolicy,
        pool: EncodePool,
    ) -> Self {
        Self {
            packer: Packer::new(policy, pool),
            frames: Frames {
                vm,
                generation,
                epoch: Epoch(0),
                digest: Context::new(&SHA256),
                totals: Totals::default(),
            },
            phase: Phase::Idle,
            base: None,
            state: None,
        }
    }

    /// Start the frames of `epoch`; drops an unfinished one. `link` is what is known of
    /// the link by now.
    pub fn begin(&mut self, epoch: Epoch, link: LinkFacts) {
        if self.phase != Phase::Idle {
            // The epoch begun before did not end. What was sent of it the standby drops, so
            // it is no base for anything.
            self.packer.forget();
        }
        self.packer.begin(link);
        self.packer.stats.epoch = epoch;
        self.frames.epoch = epoch;
        self.frames.digest = Context::new(&SHA256);
        self.frames.totals = Totals::default();
        self.phase = Phase::Content;
        self.state = None;
    }

    /// What encoding the epoch begun last took and gave, so far.
    #[must_use]
    pub fn stats(&self) -> &EncodeStats {
        &self.packer.stats
    }

    fn want<E>(&self, phase: Phase, what: &'static str) -> Result<(), WriteError<E>> {
        if self.phase == phase {
            Ok(())
        } else {
            Err(WriteError::Order(what))
        }
    }

    /// Send pages (page index, content), batch by batch as they are encoded.
    ///
    /// # Errors
    /// [`WriteError`]; the epoch is then spoilt: `begin` anew on a new lane.
    pub fn pages<'a, E>(
        &mut self,
        pages: impl Iterator<Item = (u64, &'a Page)>,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        self.want(
            Phase::Content,
            "pages come after begin and before the device state",
        )?;
        let frames = &mut self.frames;
        let result = self.packer.pages(pages, &mut |stats, payload, pages| {
            frames.totals.pages += pages;
            frames.emit(FrameKind::Pages, payload, stats, send)
        });
        match result {
            Ok(()) => Ok(()),
            Err(PackError::Put(error)) => Err(error),
            Err(PackError::Codec(error)) => Err(error.into()),
            Err(PackError::Worker) => Err(WriteError::Worker),
        }
    }

    /// Send disk writes, in the guest's order.
    ///
    /// # Errors
    /// As [`EpochWriter::pages`].
    pub fn disk<E>(
        &mut self,
        writes: &[DiskWrite],
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        self.want(
            Phase::Content,
            "disk writes come after begin and before the device state",
        )?;
        let writes: Cow<'_, [DiskWrite]> = if writes
            .iter()
            .any(|write| write.length() > DISK_WRITE_BYTES_MAX as u64)
        {
            writes.iter().flat_map(split_write).collect()
        } else {
            writes.into()
        };
        let mut rest = &writes[..];
        let (packer, frames) = (&mut self.packer, &mut self.frames);
        loop {
            let begun = Instant::now();
            let batch = packer.disks.encode(rest, packer.codec())?;
            packer.stats.pack_ns += ns_since(begun);
            let Some(batch) = batch else { return Ok(()) };
            rest = &rest[batch.writes..];
            packer.stats.disk_bytes += batch.data_bytes;
            packer.stats.disk_wire_bytes += batch.payload.len() as u64;
            frames.totals.disk_writes += batch.writes as u64;
            frames.emit(
                FrameKind::DiskWrites,
                batch.payload,
                &mut packer.stats,
                send,
            )?;
        }
    }

    /// Send the device state; once an epoch, after pages and disk writes.
    ///
    /// # Errors
    /// As [`EpochWriter::pages`].
    pub fn device_state<E>(
        &mut self,
        state: Bytes,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        self.want(Phase::Content, "the device state comes once, after begin")?;
        let (packer, frames) = (&mut self.packer, &mut self.frames);
        let begun = Instant::now();
        let delta = encode_delta(self.base.as_deref(), &state, packer.codec(), packer.version)?;
        packer.stats.pack_ns += ns_since(begun);
        packer.stats.state_bytes += state.len() as u64;
        packer.stats.state_wire_bytes += delta.len() as u64;
        frames.emit(FrameKind::DeviceState, delta, &mut packer.stats, send)?;
        self.state = Some(state);
        self.phase = Phase::StateSent;
        Ok(())
    }

    /// End the epoch.
    ///
    /// # Errors
    /// As [`EpochWriter::pages`].
    pub fn finish<E>(
        &mut self,
        meta: &EpochMeta,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        self.want(Phase::StateSent, "the end comes after the device state")?;
        let frames = &mut self.frames;
        let digest = std::mem::replace(&mut frames.digest, Context::new(&SHA256)).finish();
        frames.totals.digest.copy_from_slice(digest.as_ref());
        let payload = encode_end(&frames.totals, meta)?;
        frames.emit(FrameKind::EpochEnd, payload, &mut self.packer.stats, send)?;
        // Only now: an end that was not sent leaves the epoch unfinished.
        self.phase = Phase::Idle;
        self.base = self.state.take();
        self.packer.learn();
        Ok(())
    }
}
