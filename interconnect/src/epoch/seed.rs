//! The first full copy, and a resync: pages and disk ranges to frames outside of any epoch.

use super::packer::{PackError, Packer};
use super::pool::EncodePool;
use super::writer::WriteError;
use crate::codec::{DiskWrite, EncodePolicy, EncodeStats, LinkFacts, Page};
use crate::frame::{Frame, FrameKind};
use crate::ids::{Epoch, Generation, VmId};

/// Turns what a seeding copies into frames. It sends no patches: the guest runs, and no page
/// of a first copy was sent before.
pub struct SeedWriter {
    vm: VmId,
    generation: Generation,
    packer: Packer,
}

impl std::fmt::Debug for SeedWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SeedWriter({} {:?})", self.vm, self.generation)
    }
}

impl SeedWriter {
    /// A writer for the lane of an attempt.
    #[must_use]
    pub fn new(vm: VmId, generation: Generation, policy: EncodePolicy, pool: EncodePool) -> Self {
        let policy = EncodePolicy {
            delta: false,
            ..policy
        };
        Self {
            vm,
            generation,
            packer: Packer::new(policy, pool),
        }
    }

    /// Choose how to pack what follows; call it every few MiB.
    pub fn choose(&mut self, link: LinkFacts) {
        self.packer.learn();
        self.packer.begin(link);
    }

    /// What was encoded since the last [`Self::choose`].
    #[must_use]
    pub fn stats(&self) -> &EncodeStats {
        &self.packer.stats
    }

    /// Send pages (page index, content), batch by batch as they are encoded.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn pages<'a, E>(
        &mut self,
        pages: impl Iterator<Item = (u64, &'a Page)>,
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        let (vm, generation) = (self.vm, self.generation);
        let result = self.packer.pages(pages, &mut |_, payload, _| {
            send(Frame {
                kind: FrameKind::SeedPages,
                vm,
                generation,
                epoch: Epoch::default(),
                payload,
            })
        });
        result.map_err(|error| match error {
            PackError::Put(error) => WriteError::Send(error),
            PackError::Codec(error) => error.into(),
            PackError::Worker => WriteError::Worker,
        })
    }

    /// Send disk writes of at most [`crate::codec::disk::DISK_WRITE_BYTES_MAX`] of data.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn disk<E>(
        &mut self,
        writes: &[DiskWrite],
        send: &mut impl FnMut(Frame) -> Result<(), E>,
    ) -> Result<(), WriteError<E>> {
        let mut rest = writes;
        while let Some(batch) = self.packer.disks.encode(rest, self.packer.codec())? {
            rest = &rest[batch.writes..];
            self.packer.stats.disk_bytes += batch.data_bytes;
            self.packer.stats.disk_wire_bytes += batch.payload.len() as u64;
            send(Frame {
                kind: FrameKind::SeedDisk,
                vm: self.vm,
                generation: self.generation,
                epoch: Epoch::default(),
                payload: batch.payload,
            })
            .map_err(WriteError::Send)?;
        }
        Ok(())
    }
}
