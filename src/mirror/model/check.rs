//! The invariants, checked against what really is.

use super::world::{NAMES, World, name};
use crate::mirror::standby::StandbyEnd;
use crate::pool::{Epoch, Generation, HostName};

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) invariant: &'static str,
    pub(super) what: String,
}

pub(super) type Checked = Result<(), Violation>;

pub(super) fn ensure(holds: bool, invariant: &'static str, what: impl Fn() -> String) -> Checked {
    match holds {
        true => Ok(()),
        false => Err(Violation {
            invariant,
            what: what(),
        }),
    }
}

impl World {
    /// **one-life**, in every state: whoever speaks without waiting for anybody, or will when it
    /// thaws, is alone and has the registry's word for it.
    pub(super) fn check_state(&self) -> Checked {
        let ungated = self.hosts.iter().filter(|host| host.ungated()).count();
        ensure(ungated <= 1, "one-life", || {
            "both sides have effect outside".into()
        })?;
        for (h, host) in self.hosts.iter().enumerate() {
            let record = &self.record.value;
            let alone = record.owner == name(h) && record.standby.is_none();
            ensure(!host.ungated() || alone, "one-life", || {
                format!("{} runs ungated while the record says {record:?}", NAMES[h])
            })?;
        }
        Ok(())
    }

    /// Something leaves a host.
    pub(super) fn check_speaks(&self, h: usize) -> Checked {
        ensure(self.alive_on == h, "no-ghost-write", || {
            format!(
                "{} lets output out after the other side came to life",
                NAMES[h]
            )
        })
    }

    pub(super) fn check_release(&self, h: usize, attempt: Generation, through: Epoch) -> Checked {
        self.check_speaks(h)?;
        let (of, whole) = self.whole;
        ensure(of == attempt && through <= whole, "output-commit", || {
            format!(
                "{} releases epoch {through}, which no standby holds whole",
                NAMES[h]
            )
        })?;
        ensure(self.named >= attempt, "output-commit", || {
            format!(
                "{} releases epoch {through}, the record never named its standby",
                NAMES[h]
            )
        })
    }

    /// Everything that is held leaves a host, and all that follows goes direct.
    pub(super) fn check_solo(&self, h: usize) -> Checked {
        self.check_speaks(h)?;
        let record = &self.record.value;
        let alone = record.owner == name(h) && record.standby.is_none();
        ensure(alone, "one-life", || {
            format!("{} goes solo while the record says {record:?}", NAMES[h])
        })
    }

    pub(super) fn check_promote(
        &self,
        h: usize,
        attempt: Generation,
        epoch: Epoch,
        applied: Epoch,
    ) -> Checked {
        let record = &self.record.value;
        let owner = record.owner == name(h) && record.generation > attempt;
        ensure(owner, "one-life", || {
            format!("{} is promoted while the record says {record:?}", NAMES[h])
        })?;
        ensure(applied == epoch, "whole-epoch", || {
            format!(
                "{} runs from epoch {epoch}, but epoch {applied} is applied",
                NAMES[h]
            )
        })?;
        let (of, released) = self.released;
        ensure(of != attempt || epoch >= released, "nothing-lost", || {
            format!(
                "{} runs from epoch {epoch}, but {released} was released",
                NAMES[h]
            )
        })
    }

    /// **nothing-lost**: nobody throws away what the record counts on.
    pub(super) fn check_standby_end(
        &self,
        h: usize,
        attempt: Generation,
        why: &StandbyEnd,
    ) -> Checked {
        // Without a whole epoch there is nothing to throw away.
        if matches!(why, StandbyEnd::Broken { .. }) || self.whole.0 != attempt {
            return Ok(());
        }
        let record = &self.record.value;
        ensure(!self.counts_on(h, attempt), "nothing-lost", || {
            format!(
                "{} throws its copy away while the record says {record:?}",
                NAMES[h]
            )
        })
    }

    /// Whether the record counts on the standby of `attempt` on this host.
    pub(super) fn counts_on(&self, h: usize, attempt: Generation) -> bool {
        let record = &self.record.value;
        let named = record.standby == Some(name(h)) && record.generation == attempt;
        named || record.owner == name(h) && record.generation == attempt.next()
    }

    /// **nothing-lost**: a primary stands down only before another owner.
    pub(super) fn check_deposed(&self, h: usize) -> Checked {
        let record = &self.record.value;
        ensure(record.owner != name(h), "nothing-lost", || {
            format!("{} stands down while the record says {record:?}", NAMES[h])
        })
    }

    /// Whether nobody can be blamed that the VM runs nowhere: it was shut down, or all whom the
    /// record counts on came to harm. A standby is not to blame either if the write that names
    /// it landed after it had waited for that long enough.
    pub(super) fn is_excused(&self) -> bool {
        let record = &self.record.value;
        let harmed = |host: &HostName| {
            (0..2).any(|h| name(h) == *host && (self.hosts[h].harmed || self.hosts[h].gave_up))
        };
        !record.running || harmed(&record.owner) && record.standby.iter().all(harmed)
    }

    /// **bounded**: whatever happens, neither side sends or asks without end.
    pub(super) fn check_bounded(&self) -> Checked {
        let most = self.lanes.iter().flatten().map(Vec::len).max().unwrap_or(0);
        ensure(most <= 16 && self.ops.len() <= 8, "bounded", || {
            "messages or registry operations pile up".into()
        })
    }
}
