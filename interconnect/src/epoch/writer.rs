//! The primary's half: content of an epoch to frames.
//!
//! Each frame is handed to the caller's `send` as soon as it is encoded, so that
//! the link carries the first batch while the second is being compressed.

use super::EpochMeta;
use super::meta::{Totals, encode_end};
use crate::codec::disk::{DISK_WRITE_BYTES_MAX, split_write};
use crate::codec::pages::{BATCH_BYTES_MAX, BATCH_PAGES_MAX};
use crate::codec::{
    Codec, CodecChoice, CodecError, DiskWrite, EncodePolicy, EncodeStats, LinkFacts, Page,
    PageEncoder, encode_delta, encode_disk_writes, encode_packets,
};
use crate::frame::{Frame, FrameError, FrameKind};
use crate::ids::{Epoch, Generation, VmId};
use bytes::{Bytes, BytesMut};
use ring::digest::{Context, SHA256};
use std::borrow::Cow;

/// Pages in the first batch of a call; each next batch has twice as many, up to
/// [`BATCH_PAGES_MAX`]. A batch travels only when it is encoded whole, so the link (and
/// the standby's decoder) begin sooner.
const FIRST_BATCH_PAGES: usize = 32;

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
/// its lane (make a new one for a new lane: the first device state is then full).
///
/// ```text
/// Idle --begin--> Content --device_state--> StateSent --finish--> Idle
///                 | pages, disk: stay
/// ```
pub struct EpochWriter {
    vm: VmId,
    generation: Generation,
    policy: EncodePolicy,
    encoder: PageEncoder,
    phase: Phase,
    epoch: Epoch,
    digest: Context,
    totals: Totals,
    /// Device state of the last finished epoch: the base of the next delta.
    base: Option<Bytes>,
    /// Device state of the epoch being written.
    state: Option<Bytes>,
    stats: EncodeStats,
}

impl std::fmt::Debug for EpochWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "EpochWriter({} {:?} {:?} {:?})",
            self.vm, self.generation, self.epoch, self.phase
        )
    }
}

impl EpochWriter {
    /// A writer for a fresh lane.
    #[must_use]
    pub fn new(vm: VmId, generation: Generation, policy: EncodePolicy) -> Self {
        Self {
            vm,
            generation,
            policy,
            encoder: PageEncoder::new(policy),
            stats: EncodeStats::default(),
            phase: Phase::Idle,
            epoch: Epoch(0),
            digest: Context::new(&SHA256),
            totals: Totals::default(),
            base: None,
            state: None,
        }
    }

    /// Start the frames of `epoch`; drops an unfinished one. `link` is what is known of
    /// the link by now.
    pub fn begin(&mut self, epoch: Epoch, _link: LinkFacts) {
        self.epoch = epoch;
        self.phase = Phase::Content;
        self.digest = Context::new(&SHA256);
        self.totals = Totals::default();
        self.state = None;
    }

    /// What encoding the epoch begun last took and gave, so far.
    #[must_use]
    pub fn stats(&self) -> &EncodeStats {
        &self.stats
    }

    fn want<E>(&self, phase: Phase, what: &'static str) -> Result<(), WriteError<E>> {
        if self.phase == phase {
            Ok(())
        } else {
            Err(WriteError::Order(what))
        }
    }

    /// Count a frame into the digest and send it.
    fn emit<E>(
        &mut self,
        kind: FrameKind,
        payload: Bytes,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        let frame = Frame {
            kind,
            vm: self.vm,
            generation: self.generation,
            epoch: self.epoch,
            payload,
        };
        self.digest.update(&frame.header()?);
        self.totals.frames += 1;
        send(frame).map_err(WriteError::Send)
    }

    /// Send pages (page index, content), batch by batch as they are encoded.
    ///
    /// # Errors
    /// [`WriteError`]; the epoch is then spoilt: `begin` anew on a new lane.
    pub fn pages<'a, E>(
        &mut self,
        mut pages: impl Iterator<Item = (u64, &'a Page)>,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        self.want(
            Phase::Content,
            "pages come after begin and before the device state",
        )?;
        let mut batch_pages = FIRST_BATCH_PAGES;
        loop {
            let mut out = BytesMut::new();
            let mut batch = pages.by_ref().take(batch_pages);
            let Some(stats) = self.encoder.encode(&mut batch, &mut out)? else {
                return Ok(());
            };
            batch_pages = (batch_pages * 2).min(BATCH_PAGES_MAX);
            debug_assert!(out.len() <= BATCH_BYTES_MAX);
            self.totals.pages += stats.zero + stats.raw + stats.packed;
            self.emit(FrameKind::Pages, out.freeze(), send)?;
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
        while !rest.is_empty() {
            let mut out = BytesMut::new();
            let taken = encode_disk_writes(
                rest,
                if self.policy.codec == CodecChoice::Raw {
                    Codec::Raw
                } else {
                    Codec::ZstdFast
                },
                &mut out,
            )?;
            rest = &rest[taken..];
            self.totals.disk_writes += taken as u64;
            self.emit(FrameKind::DiskWrites, out.freeze(), send)?;
        }
        Ok(())
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
        let delta = encode_delta(self.base.as_deref(), &state)?;
        self.emit(FrameKind::DeviceState, delta, send)?;
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
        let digest = std::mem::replace(&mut self.digest, Context::new(&SHA256)).finish();
        self.totals.digest.copy_from_slice(digest.as_ref());
        let payload = encode_end(&self.totals, meta)?;
        self.phase = Phase::Idle;
        self.emit(FrameKind::EpochEnd, payload, send)?;
        self.base = self.state.take();
        Ok(())
    }
}
