//! The write overlay: a stack of epochs, each a map of what it wrote. Pure.
//!
//! ```text
//!   oldest                                                          newest
//!   [committed, being written] [committed] … [cut] [cut] … [running]
//!        | written()               ^ commit()  ^ cut()
//!        v dropped                             | uncut(): back into running
//! ```
//!
//! Invariant: tags ascend strictly from oldest to newest, committed epochs lie below uncommitted
//! ones, and the last is the running one. A layer leaves only after its content is in the file
//! (`written`) or the epoch was given up (`discard_uncommitted`).

use super::extents::{DiskWrite, ExtentMap, Piece, resolve};
use crate::pool::Epoch;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// One epoch in the overlay.
#[derive(Clone, Debug)]
struct Layer {
    epoch: Epoch,
    /// Shared with the writer thread while it is written out; unique while running.
    map: Arc<ExtentMap>,
    /// The guest asked for durability in this epoch.
    flushed: bool,
    committed: bool,
}

impl Layer {
    fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            map: Arc::default(),
            flushed: false,
            committed: false,
        }
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Overlay {
    below: VecDeque<Layer>,
    running: Layer,
    /// Cost of the layers below, kept so that a write need not sum it.
    below_cost_bytes: u64,
}

/// A step that does not fit the overlay's epochs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum EpochError {
    #[error("epoch {next:?} cannot follow the running epoch {running:?}: it must be higher")]
    NotHigher { next: Epoch, running: Epoch },
    #[error(
        "epochs from {from:?} cannot go back into {as_running:?}: the running epoch is {running:?} \
         and the newest one below is {newest_below:?}"
    )]
    BadUncut {
        from: Epoch,
        as_running: Epoch,
        running: Epoch,
        newest_below: Option<Epoch>,
    },
}

impl Overlay {
    pub fn new(epoch: Epoch) -> Self {
        Self {
            below: VecDeque::new(),
            running: Layer::new(epoch),
            below_cost_bytes: 0,
        }
    }

    pub fn running(&self) -> Epoch {
        self.running.epoch
    }

    pub fn write(&mut self, write: DiskWrite) {
        Arc::make_mut(&mut self.running.map).insert(write);
    }

    pub fn flush(&mut self) {
        self.running.flushed = true;
    }

    /// What a read of `range` sees.
    pub fn resolve(&self, range: Range<u64>) -> Vec<Piece> {
        let newest_first = std::iter::once(&self.running)
            .chain(self.below.iter().rev())
            .map(|l| &*l.map);
        resolve(range, newest_first)
    }

    /// End the running epoch. Answers its content and whether the guest flushed in it.
    pub fn cut(&mut self, next: Epoch) -> Result<(Epoch, Arc<ExtentMap>, bool), EpochError> {
        if next <= self.running.epoch {
            return Err(EpochError::NotHigher {
                next,
                running: self.running.epoch,
            });
        }
        let ended = std::mem::replace(&mut self.running, Layer::new(next));
        let answer = (ended.epoch, Arc::clone(&ended.map), ended.flushed);
        self.below_cost_bytes += ended.map.cost_bytes();
        self.below.push_back(ended);
        Ok(answer)
    }

    /// Every cut epoch up to `through` is committed.
    pub fn commit(&mut self, through: Epoch) {
        for layer in self
            .below
            .iter_mut()
            .take_while(|layer| layer.epoch <= through)
        {
            layer.committed = true;
        }
    }

    /// Put cut, uncommitted epochs from `from` on back into the running one, numbered `running`
    /// from now.
    pub fn uncut(&mut self, from: Epoch, running: Epoch) -> Result<(), EpochError> {
        let first = self
            .below
            .partition_point(|l| l.committed || l.epoch < from);
        let newest_below = first
            .checked_sub(1)
            .and_then(|i| self.below.get(i))
            .map(|l| l.epoch);
        let fits = running <= self.running.epoch
            && running >= from
            && newest_below.is_none_or(|newest| newest < running);
        if !fits {
            return Err(EpochError::BadUncut {
                from,
                as_running: running,
                running: self.running.epoch,
                newest_below,
            });
        }
        let mut merged = Layer::new(running);
        for layer in self.below.drain(first..) {
            self.below_cost_bytes -= layer.map.cost_bytes();
            merged.put_on_top(layer);
        }
        merged.put_on_top(std::mem::replace(&mut self.running, Layer::new(running)));
        self.running = merged;
        Ok(())
    }

    /// Give up everything that is not committed. Answers the ranges given up.
    pub fn discard_uncommitted(&mut self) -> Vec<Range<u64>> {
        let first = self.below.partition_point(|l| l.committed);
        let epoch = self.running.epoch;
        let running = std::mem::replace(&mut self.running, Layer::new(epoch));
        let mut ranges = Vec::new();
        for layer in self.below.drain(first..) {
            self.below_cost_bytes -= layer.map.cost_bytes();
            ranges.extend(layer.map.ranges());
        }
        ranges.extend(running.map.ranges());
        ranges
    }

    /// End the running epoch and commit all: going solo. The running number stays one ahead.
    pub fn commit_all(&mut self) {
        let next = self.running.epoch.next();
        // `next` is higher by construction.
        let _ = self.cut(next);
        self.commit(next);
    }

    /// The oldest epoch, if it is committed: what the writer must write next.
    pub fn next_to_write(&self) -> Option<(Epoch, Arc<ExtentMap>)> {
        let layer = self.below.front().filter(|layer| layer.committed)?;
        Some((layer.epoch, Arc::clone(&layer.map)))
    }

    /// The file holds `epoch` now.
    pub fn written(&mut self, epoch: Epoch) {
        if self
            .below
            .front()
            .is_some_and(|l| l.committed && l.epoch == epoch)
            && let Some(layer) = self.below.pop_front()
        {
            self.below_cost_bytes -= layer.map.cost_bytes();
        }
    }

    /// Nothing of an ended epoch is left.
    pub fn all_written(&self) -> bool {
        !self.below.iter().any(|layer| layer.committed)
    }

    /// Epochs held that are not committed and not empty.
    pub fn has_uncommitted(&self) -> bool {
        !self.running.map.is_empty() || self.below.iter().any(|l| !l.committed && !l.map.is_empty())
    }

    /// Memory held.
    pub fn cost_bytes(&self) -> u64 {
        self.below_cost_bytes + self.running.map.cost_bytes()
    }

    /// Epochs held, the running one included.
    pub fn epochs(&self) -> u64 {
        self.below.len() as u64 + 1
    }
}

impl Layer {
    fn put_on_top(&mut self, newer: Self) {
        self.flushed |= newer.flushed;
        let newer_map = Arc::unwrap_or_clone(newer.map);
        if self.map.is_empty() {
            self.map = Arc::new(newer_map);
        } else {
            Arc::make_mut(&mut self.map).merge(newer_map);
        }
    }
}
