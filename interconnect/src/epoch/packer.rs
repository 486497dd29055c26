//! Pages to batches in their order, with whatever threads there are and whatever codec pays:
//! what the writer of epochs and the writer of a seeding have in common.

use super::pool::{EncodePool, Packed, seal};
use crate::codec::choose::{Chooser, Situation};
use crate::codec::encoder::{Batch, PageEncoder};
use crate::codec::pack::{looks_compressible, pack};
use crate::codec::pages::BATCH_PAGES_MAX;
use crate::codec::{
    Codec, CodecError, CodecVersion, DiskEncoder, EncodePolicy, EncodeStats, LinkFacts, PAGE_BYTES,
    Page,
};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::time::Instant;

/// Pages in the first batch of a call; each next batch has twice as many, up to
/// [`BATCH_PAGES_MAX`]. A batch travels only when it is encoded whole, so the link (and
/// the standby's decoder) begin sooner.
const FIRST_BATCH_PAGES: usize = 32;

pub(super) fn ns_since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Why pages could not be packed or put.
pub(super) enum PackError<E> {
    Codec(CodecError),
    Put(E),
    /// A worker ended without giving its batch back.
    Worker,
}

pub(super) struct Packer {
    encoder: PageEncoder,
    chooser: Chooser,
    pool: EncodePool,
    pub(super) disks: DiskEncoder,
    pub(super) version: CodecVersion,
    pub(super) stats: EncodeStats,
    /// Batches that are with the workers, in order.
    in_work: VecDeque<Receiver<Packed>>,
    begun: Option<Instant>,
    delta: bool,
    /// Tried codecs write here.
    scratch: Vec<u8>,
    sample: Vec<u8>,
}

impl Packer {
    pub(super) fn new(policy: EncodePolicy, pool: EncodePool) -> Self {
        Self {
            encoder: PageEncoder::new(policy),
            chooser: Chooser::new(&policy),
            pool,
            disks: DiskEncoder::default(),
            version: policy.version,
            stats: EncodeStats::default(),
            in_work: VecDeque::new(),
            begun: None,
            delta: policy.delta && policy.version >= CodecVersion::V2,
            scratch: Vec::new(),
            sample: Vec::new(),
        }
    }

    /// The codec of this epoch.
    pub(super) fn codec(&self) -> Codec {
        self.encoder.codec()
    }

    /// What was encoded may never reach the standby.
    pub(super) fn forget(&mut self) {
        self.encoder.forget();
        // What the workers still have is of an epoch nobody wants.
        self.in_work.clear();
    }

    /// Choose for what comes next.
    pub(super) fn begin(&mut self, link: LinkFacts) {
        let since_last_ns = self.begun.map_or(0, ns_since);
        self.begun = Some(Instant::now());
        let chosen = self.chooser.choose(&Situation {
            link_bytes_per_s: link.bytes_per_s,
            threads: self.pool.threads(),
            since_last_ns,
        });
        self.encoder.set_codec(chosen.codec);
        self.encoder.begin_epoch();
        self.stats = EncodeStats {
            codec: chosen.codec,
            why: chosen.why,
            delta: self.delta,
            ..EncodeStats::default()
        };
    }

    /// Batches of `pages`, each given to `put` in order and as soon as it is packed.
    pub(super) fn pages<'a, E>(
        &mut self,
        mut pages: impl Iterator<Item = (u64, &'a Page)>,
        put: &mut impl FnMut(&mut EncodeStats, Bytes, u64) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let mut batch_pages = FIRST_BATCH_PAGES;
        // One in each worker's hands and one waiting for each: more would only be memory.
        let ahead = 2 * self.pool.threads();
        loop {
            let begun = Instant::now();
            let mut batch = pages.by_ref().take(batch_pages);
            let draft = self.encoder.draft(&mut batch).map_err(PackError::Codec)?;
            self.stats.classify_ns += ns_since(begun);
            let Some(draft) = draft else { break };
            batch_pages = (batch_pages * 2).min(BATCH_PAGES_MAX);
            if self.in_work.len() >= ahead {
                self.put_next(put)?;
            }
            match self.pool.submit(draft) {
                Ok(back) => self.in_work.push_back(back),
                // No workers: this thread packs.
                Err(draft) => {
                    while !self.in_work.is_empty() {
                        self.put_next(put)?;
                    }
                    self.done(seal(*draft), put)?;
                }
            }
        }
        while !self.in_work.is_empty() {
            self.put_next(put)?;
        }
        self.stats.base_bytes = self.encoder.base_bytes();
        Ok(())
    }

    /// Wait for the oldest batch that is with the workers, and put it.
    fn put_next<E>(
        &mut self,
        put: &mut impl FnMut(&mut EncodeStats, Bytes, u64) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let Some(back) = self.in_work.pop_front() else {
            return Ok(());
        };
        let packed = back.recv().map_err(|_| PackError::Worker)?;
        self.done(packed, put)
    }

    fn done<E>(
        &mut self,
        packed: Packed,
        put: &mut impl FnMut(&mut EncodeStats, Bytes, u64) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let Packed {
            codec,
            batch: Batch { payload, stats },
            ns,
        } = packed;
        let raw_bytes = stats.raw * PAGE_BYTES as u64;
        self.chooser.measured(
            codec,
            stats.body_bytes + raw_bytes,
            stats.packed_bytes + raw_bytes,
            ns,
        );
        self.stats.pack_ns += ns;
        self.stats.zero += stats.zero;
        self.stats.unchanged += stats.unchanged;
        self.stats.patched += stats.patched;
        self.stats.packed += stats.packed;
        self.stats.raw += stats.raw;
        self.stats.patch_bytes += stats.patch_bytes;
        self.stats.page_wire_bytes += stats.bytes;
        if payload.is_empty() {
            return Ok(());
        }
        let pages = stats.zero + stats.patched + stats.packed + stats.raw;
        put(&mut self.stats, payload, pages).map_err(PackError::Put)
    }

    /// The epoch is sent: learn for the next.
    pub(super) fn learn(&mut self) {
        let content = (self.stats.packed + self.stats.raw) * PAGE_BYTES as u64;
        self.chooser.epoch_had(content + self.stats.patch_bytes);
        let pages = self.encoder.sample();
        if pages.is_empty() {
            return;
        }
        let Some(codec) = self.chooser.to_try() else {
            return;
        };
        // As a batch is packed: what looks random stays out.
        let begun = Instant::now();
        self.sample.clear();
        let mut raw_bytes = 0;
        for page in pages {
            if codec != Codec::Raw && looks_compressible(page) {
                self.sample.extend_from_slice(page);
            } else {
                raw_bytes += PAGE_BYTES;
            }
        }
        let body_bytes = self.sample.len();
        let packed = pack(codec, &self.sample, &mut self.scratch).unwrap_or(body_bytes);
        self.chooser.measured(
            codec,
            (body_bytes + raw_bytes) as u64,
            (packed + raw_bytes) as u64,
            ns_since(begun),
        );
    }
}
