//! What a standby's future depends on, for [`crate::mirror::model`]: two that look alike here
//! do the same from now on.
//!
//! Times count from now, versions and generations from the registry's, epochs from the newest
//! acknowledged one. A new field of [`Standby`] has to be named here before the tests compile.

use super::machine::Standby;
use super::{StandbyAction, StandbyState};
use crate::mirror::Micros;
use crate::mirror::model::Frame;
use crate::pool::Epoch;
use std::hash::{Hash, Hasher};
use std::mem::discriminant;

impl Standby {
    pub(in crate::mirror) fn view(&self, frame: &Frame, into: &mut impl Hasher) {
        use StandbyState as S;
        let Self {
            config,
            state,
            // Every input sets it before it is used.
            now: _,
            record,
            whole,
            acked,
            applied,
            applying,
            last_ack_at,
            broken,
            peer,
            suspect_since,
            urgent,
            promote_asked,
            op,
            retry_at,
            backoff,
            silence_at,
            last_epoch_at,
            actions,
            promised_wakeup,
            // At most one operation is out, so its ticket is always the newest.
            next_ticket: _,
            // Of this, only what the operator is told depends.
            unreachable_alerted: _,
        } = self;
        let timing = &config.timing;
        let from_acked = |epoch: &Epoch| epoch.0.cast_signed() - acked.0.cast_signed();
        frame.generation(config.generation).hash(into);
        (
            state,
            applying,
            broken,
            peer,
            urgent,
            promote_asked,
            backoff,
        )
            .hash(into);
        record.iter().for_each(|record| frame.record(record, into));
        whole.iter().for_each(|epoch| from_acked(epoch).hash(into));
        (from_acked(applied), *acked == Epoch(0)).hash(into);
        last_ack_at.map(|at| frame.ago(at, timing.lease)).hash(into);
        // The next input finds this side woken from a freeze, and both begin anew.
        let overslept = frame.now.since(*promised_wakeup) > timing.detection;
        if *state == S::Suspecting && !overslept {
            frame.ago(*suspect_since, timing.claim_delay).hash(into);
        }
        if let Some((_, wanted)) = op {
            true.hash(into);
            wanted.iter().for_each(|value| frame.value(value, into));
        }
        (frame.ahead(*retry_at), frame.ahead(*silence_at)).hash(into);
        // The first epoch sets it, and whoever is promoted does not ask any more.
        if !matches!(state, S::Preparing | S::Seeding | S::Promoting) && !overslept {
            frame.ago(*last_epoch_at, timing.orphan_patience).hash(into);
        }
        frame.around(*promised_wakeup, timing.detection).hash(into);
        for action in actions {
            discriminant(action).hash(into);
            match action {
                StandbyAction::Ack { epoch, .. }
                | StandbyAction::Apply { epoch }
                | StandbyAction::Promote { epoch, .. } => from_acked(epoch).hash(into),
                StandbyAction::Claim {
                    expected, value, ..
                } => {
                    frame.version(*expected).hash(into);
                    frame.value(value, into);
                }
                _ => {}
            }
        }
    }

    /// The newest epoch that is acknowledged: what a view counts from.
    pub(in crate::mirror) const fn newest_acked(&self) -> Epoch {
        self.acked
    }

    /// Whether it has waited long enough to be named: a write that names it is not on its way
    /// any more, or if it is, nobody can know.
    pub(in crate::mirror) fn has_lost_patience(&self, now: Micros) -> bool {
        now.since(self.last_epoch_at) >= self.config.timing.orphan_patience
    }

    /// Whether actions wait to be carried out.
    pub(in crate::mirror) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }
}
