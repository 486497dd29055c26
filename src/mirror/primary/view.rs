//! What a primary's future depends on, for [`crate::mirror::model`]: two that look alike here
//! do the same from now on.
//!
//! Times count from now, versions and generations from the registry's, epochs from the newest
//! committed one. A new field of [`Primary`] has to be named here before the tests compile.

use super::machine::{InFlight, Pending, Primary};
use super::{PrimaryAction, PrimaryState};
use crate::mirror::model::Frame;
use crate::pool::Epoch;
use std::hash::{Hash, Hasher};
use std::mem::discriminant;

impl Primary {
    pub(in crate::mirror) fn view(&self, frame: &Frame, into: &mut impl Hasher) {
        let Self {
            config,
            state,
            // Every input sets it before it is used.
            now: _,
            record,
            partner,
            generation,
            schedule,
            flow,
            held_back,
            cutting,
            last_cut,
            in_flight,
            committed,
            fresh_until,
            released,
            cut_failures,
            last_epoch,
            early_ack,
            peer,
            link_down_since,
            prepare_until,
            op,
            retry_at,
            backoff,
            verify,
            probe,
            holding_still,
            stalls,
            guest_stopped,
            stray_cut,
            actions,
            promised_wakeup,
            // At most one operation is out, so its ticket is always the newest.
            next_ticket: _,
            // Of these, only what the operator is told depends.
            committed_cut_at: _,
            lag_alerted: _,
            overload_alerted: _,
            unreachable_alerted: _,
            last_reason: _,
        } = self;
        let timing = &config.timing;
        let from_committed = |epoch: &Epoch| epoch.0.cast_signed() - committed.0.cast_signed();
        (state, partner, peer, held_back, verify, probe).hash(into);
        (holding_still, guest_stopped, stray_cut, cut_failures).hash(into);
        frame.record(record, into);
        frame.generation(*generation).hash(into);
        cutting
            .map(|(epoch, at)| (from_committed(&epoch), frame.ago(at, timing.ack_overdue)))
            .hash(into);
        // The first cut of an attempt sets all this anew.
        if state.holds_output() {
            schedule.view(frame.now, into);
            // Epochs of the model weigh nothing: of the flow only these touch the machine.
            (
                flow.slow_since().is_some(),
                flow.cut_by().map(|at| frame.ahead(at)),
            )
                .hash(into);
            (from_committed(last_cut), *last_cut == Epoch(0)).hash(into);
            (released < committed)
                .then(|| frame.ahead(*fresh_until))
                .hash(into);
        }
        for InFlight {
            epoch,
            cut_at,
            sent_at,
        } in in_flight
        {
            from_committed(epoch).hash(into);
            frame.ago(*cut_at, timing.ack_overdue).hash(into);
            frame.ago(*sent_at, timing.release_within).hash(into);
        }
        (
            last_epoch.as_ref().map(from_committed),
            early_ack.as_ref().map(from_committed),
        )
            .hash(into);
        link_down_since
            .map(|at| frame.ago(at, timing.link_down_bound))
            .hash(into);
        if *state == PrimaryState::Preparing {
            frame.ahead(*prepare_until).hash(into);
        }
        if let Some(Pending {
            ticket: _,
            purpose,
            wanted,
            stalls: asked_after,
        }) = op
        {
            (purpose, asked_after == stalls).hash(into);
            wanted.iter().for_each(|value| frame.value(value, into));
        }
        (frame.ahead(*retry_at), backoff).hash(into);
        frame.around(*promised_wakeup, timing.detection).hash(into);
        for action in actions {
            discriminant(action).hash(into);
            match action {
                PrimaryAction::Release { through, until } => {
                    (from_committed(through), frame.ahead(*until)).hash(into);
                }
                PrimaryAction::Cut {
                    epoch,
                    stay_stopped,
                } => (from_committed(epoch), stay_stopped).hash(into),
                PrimaryAction::Claim {
                    expected, value, ..
                } => {
                    frame.version(*expected).hash(into);
                    frame.value(value, into);
                }
                PrimaryAction::PrepareStandby { generation, .. }
                | PrimaryAction::ConfirmMirrored { generation, .. }
                | PrimaryAction::Handover { generation, .. }
                | PrimaryAction::GoSolo { generation } => {
                    frame.generation(*generation).hash(into);
                }
                _ => {}
            }
        }
    }

    /// The newest epoch that is committed: what a view counts from.
    pub(in crate::mirror) const fn newest_committed(&self) -> Epoch {
        self.committed
    }

    /// Whether actions wait to be carried out.
    pub(in crate::mirror) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }
}
