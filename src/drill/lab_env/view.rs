//! The API's words in the drill's.

use super::super::env::{
    AuditView, EventView, FailoverView, MonotonicNs, PauseView, Quantiles, Role, VmView,
};
use crate::api::types::{self, EpochFigures, Failover, Percentiles, VmStatus};
use crate::pool::HostName;

fn quantiles(p: Percentiles, count: u64) -> Quantiles {
    Quantiles {
        count,
        p50_us: p.p50,
        p90_us: p.p90,
        p99_us: p.p99,
        max_us: p.max,
    }
}

pub(super) fn audit_view(f: &Failover) -> Option<AuditView> {
    Some(AuditView {
        memory_equal: f.memory_equal?,
        disks_equal: f.disks_equal?,
        audit_us: f.audit_us,
    })
}

pub(super) fn view(host: HostName, status: VmStatus) -> VmView {
    let e: EpochFigures = status.epochs.unwrap_or_default();
    let q = |p| quantiles(p, e.window);
    VmView {
        host,
        role: match (status.role, status.state.as_str()) {
            (types::Role::Primary, "solo") => Role::Solo,
            (types::Role::Primary, _) => Role::Primary,
            (types::Role::Standby, _) => Role::Standby,
            (types::Role::Stopped, _) => Role::None,
        },
        state: status.state,
        mirrored: status.mirrored,
        generation: status.generation,
        epoch: status.epoch,
        committed_epoch: status.committed,
        lag_us: status.lag_us.unwrap_or(0),
        pause: PauseView {
            total: q(e.pause_us),
            stop: q(e.stop_us),
            capture: q(e.capture_us),
            save: q(e.save_us),
            cont: q(e.cont_us),
        },
        commit: q(e.commit_us),
        epochs: e.committed,
        pages_per_epoch: e.pages.p50,
        bytes_per_epoch: e.wire_bytes.p50,
        qemu_pid: status.qemu_pid.and_then(|p| u32::try_from(p).ok()),
        last_failover: status.last_failover.as_ref().map(|f| FailoverView {
            suspected_at_ns: MonotonicNs(f.suspected_ns),
            claim_started_ns: MonotonicNs(f.claim_started_ns),
            claim_won_ns: MonotonicNs(f.claim_won_ns),
            promote_started_ns: MonotonicNs(f.promote_started_ns),
            running_ns: MonotonicNs(f.running_ns),
            from_epoch: f.from_epoch,
            audit: audit_view(f),
        }),
        events: status
            .events
            .into_iter()
            .map(|e| EventView {
                at_ns: MonotonicNs(e.at_ns),
                text: e.what,
            })
            .collect(),
    }
}
