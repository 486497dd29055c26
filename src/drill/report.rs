//! From what was seen to a verdict. Pure: facts in, [`DrillReport`] out.
//!
//! Times of the hosts and of the clients are subtracted from each other here; that is
//! sound in the lab only, where all share one `CLOCK_MONOTONIC` (see [`super::env`]).

use super::checks::{
    NumberCheck, check_numbers, longest_gap, longest_gap_within, missing_on_disk, silent_since,
};
use super::env::{AuditView, DiskRecords, FailoverView, PauseView, Quantiles, Role, VmView};
use super::links::{LinkFacts, LinkReport, judge};
use super::log::ClientLog;
use super::stats::{micros, quantiles};
use super::{DrillKind, DrillSpec, MonotonicNs};
use crate::pool::HostName;
use serde::Serialize;

/// A stretch of time in which clients were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// From.
    pub from_ns: MonotonicNs,
    /// To.
    pub to_ns: MonotonicNs,
}

/// What was seen of one failure.
#[derive(Clone, Debug)]
pub struct RunFacts {
    /// The primary's view just before.
    pub before: VmView,
    /// Mirrored and undisturbed, up to the failure.
    pub calm: Window,
    /// Replication lag seen in that time, microseconds.
    pub lag_us: Vec<u64>,
    /// The failure took effect.
    pub injected_ns: MonotonicNs,
    /// The new running side's view; none if no side ran the VM in time.
    pub after: Option<VmView>,
    /// The result of the audit, if one was made.
    pub audit: Option<AuditView>,
    /// What was done to single links, in order; empty if nothing was.
    pub links: Vec<LinkFacts>,
    /// The clients were watched until then.
    pub watched_until_ns: MonotonicNs,
    /// From the repair until the VM was mirrored again; none if it was not.
    pub reprotected_us: Option<u64>,
    /// The mirror was lost on its own before the failure, and waited for.
    pub mirror_lost: bool,
    /// What the environment could not do, in words.
    pub trouble: Vec<String>,
}

/// All that was seen.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Service before protection.
    pub unprotected: Window,
    /// Each failure.
    pub runs: Vec<RunFacts>,
    /// What the clients wrote.
    pub log: ClientLog,
    /// The records at the end; none if the service keeps none.
    pub disk: Option<DiskRecords>,
    /// What went wrong outside of a run, in words.
    pub trouble: Vec<String>,
}

/// One failure, measured.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// Which, from 1.
    pub run: usize,
    /// Where the VM ran.
    pub from: HostName,
    /// Where it runs now; none if nowhere.
    pub to: Option<HostName>,
    /// Failure until it was suspected.
    pub detection_us: Option<u64>,
    /// Suspicion until the claim was won.
    pub claim_us: Option<u64>,
    /// Claim until the vCPUs run: waiting for the old side's lease to end, applying what
    /// is committed, audit, promotion.
    pub takeover_us: Option<u64>,
    /// Part of it: loading devices and starting the vCPUs, without the audit. None if the
    /// side ran already and went solo.
    pub promotion_us: Option<u64>,
    /// vCPUs run until the worst client's next answer: TCP's retransmission, mostly.
    pub client_us: Option<u64>,
    /// The longest any client waited from one answer to its next, over the failure.
    pub blackout_us: Option<u64>,
    /// The same over the calm time before it.
    pub calm_gap_us: Option<u64>,
    /// The committed epoch it went on from.
    pub from_epoch: Option<u64>,
    /// Replication lag before the failure.
    pub lag: Quantiles,
    /// Pauses of the failed side.
    pub pause: PauseView,
    /// Resume to commit, on the failed side.
    pub commit: Quantiles,
    /// Epochs it had committed.
    pub epochs: u64,
    /// Promoted side against committed checkpoint.
    pub audit: Option<AuditView>,
    /// From the repair until mirrored again.
    pub reprotected_us: Option<u64>,
    /// What single links did, in order.
    pub links: Vec<LinkReport>,
    /// Why this run is not good; empty if it is.
    pub failures: Vec<String>,
}

/// Requests in some stretch of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rate {
    /// How long each took.
    pub latency: Quantiles,
    /// Per second, all clients together.
    pub per_second: u64,
}

/// A drill, measured and judged.
#[derive(Clone, Debug, Serialize)]
pub struct DrillReport {
    /// What was asked for; its seed repeats the moments.
    pub spec: DrillSpec,
    /// Each failure.
    pub runs: Vec<RunReport>,
    /// Requests before protection.
    pub unprotected: Rate,
    /// Requests while mirrored and undisturbed.
    pub protected: Rate,
    /// All pauses: p50 and p90 are the middle of the runs', p99 and max the worst.
    pub pause: PauseView,
    /// Replication lag over all runs.
    pub lag: Quantiles,
    /// Epochs committed in all runs.
    pub epochs: u64,
    /// Blackouts over all runs.
    pub blackout: Quantiles,
    /// What the numbers prove.
    pub numbers: NumberCheck,
    /// Connections that broke.
    pub connections_broken: u64,
    /// Requests never answered.
    pub unanswered: u64,
    /// Acknowledged records that are not on the disk; none if the service keeps none.
    pub missing_on_disk: Option<u64>,
    /// Damaged records on the disk.
    pub damaged_on_disk: u64,
    /// Runs before which the mirror was lost on its own and made anew: no loss, but the
    /// VM was unprotected for a while.
    pub mirror_lost: u64,
    /// Why the drill is not passed; empty if it is.
    pub failures: Vec<String>,
}

impl DrillReport {
    /// Judge.
    #[must_use]
    pub fn new(spec: &DrillSpec, facts: &Facts) -> Self {
        let log = &facts.log;
        let runs: Vec<RunReport> = facts
            .runs
            .iter()
            .enumerate()
            .map(|(i, run)| run_report(spec, i + 1, run, log))
            .collect();
        let numbers = check_numbers(log);
        let missing = facts.disk.as_ref().map(|disk| missing_on_disk(log, disk));
        let damaged_on_disk = facts.disk.as_ref().map_or(0, |d| d.damaged);
        let mut failures = facts.trouble.clone();
        let mut fail_if = |count: u64, what: &str| {
            if count > 0 {
                failures.push(format!("{count} {what}"));
            }
        };
        fail_if(numbers.lost, "answers lost: numbers that no client got");
        fail_if(
            numbers.repeated,
            "answers repeated: numbers handed out twice",
        );
        fail_if(
            numbers.went_back,
            "answers lower than one already received before",
        );
        fail_if(log.broken.len() as u64, "connections broken");
        fail_if(log.open.len() as u64, "requests never answered");
        fail_if(
            missing.as_ref().map_or(0, |m| m.len() as u64),
            "acknowledged records missing on the disk",
        );
        fail_if(damaged_on_disk, "damaged records on the disk");
        if log.answers.is_empty() {
            failures.push("no client was ever answered".into());
        }
        if !log.ended {
            failures.push("the client process ended before its time; its log is not whole".into());
        }
        let asked = usize::try_from(spec.repeat).unwrap_or(usize::MAX);
        if runs.len() < asked {
            failures.push(format!(
                "only {} of {asked} failures were rehearsed",
                runs.len()
            ));
        }
        for run in &runs {
            failures.extend(run.failures.iter().map(|f| format!("run {}: {f}", run.run)));
        }
        let calm: Vec<Window> = facts.runs.iter().map(|r| r.calm).collect();
        Self {
            spec: spec.clone(),
            unprotected: rate(log, &[facts.unprotected]),
            protected: rate(log, &calm),
            pause: worst_pause(&runs),
            lag: quantiles(
                facts
                    .runs
                    .iter()
                    .flat_map(|r| r.lag_us.iter().copied())
                    .collect(),
            ),
            epochs: runs.iter().map(|r| r.epochs).sum(),
            blackout: quantiles(runs.iter().filter_map(|r| r.blackout_us).collect()),
            numbers,
            connections_broken: log.broken.len() as u64,
            unanswered: log.open.len() as u64,
            missing_on_disk: missing.map(|m| m.len() as u64),
            damaged_on_disk,
            mirror_lost: facts.runs.iter().filter(|r| r.mirror_lost).count() as u64,
            failures,
            runs,
        }
    }

    /// True if nothing was lost.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// 0 only if nothing was lost.
    #[must_use]
    pub fn exit_status(&self) -> i32 {
        i32::from(!self.passed())
    }

    /// As one JSON object.
    ///
    /// # Errors
    /// Never in practice: all of it is plain data.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let mut value = serde_json::to_value(self)?;
        if let Some(object) = value.as_object_mut() {
            object.insert("passed".into(), self.passed().into());
        }
        serde_json::to_string(&value)
    }
}

fn run_report(spec: &DrillSpec, number: usize, facts: &RunFacts, log: &ClientLog) -> RunReport {
    let failover = facts.after.as_ref().and_then(|v| v.last_failover.clone());
    let stage = |from: Option<MonotonicNs>, to: Option<MonotonicNs>| match (from, to) {
        // Zero means that there was no such stage.
        (Some(from), Some(to)) if from.0 > 0 && to.0 > 0 => Some(micros(to.since(from))),
        _ => None,
    };
    let at = |field: fn(&FailoverView) -> MonotonicNs| failover.as_ref().map(field);
    let gap = longest_gap(&log.answers, facts.injected_ns, facts.watched_until_ns);
    let running = at(|f| f.running_ns).filter(|t| t.0 > 0);
    let failures = if spec.kind.vm_stays() {
        judge(facts, log)
    } else {
        judge_failover(spec, facts, log)
    };
    RunReport {
        run: number,
        from: facts.before.host.clone(),
        to: facts.after.as_ref().map(|v| v.host.clone()),
        detection_us: stage(Some(facts.injected_ns), at(|f| f.suspected_at_ns)),
        claim_us: stage(at(|f| f.suspected_at_ns), at(|f| f.claim_won_ns)),
        takeover_us: stage(at(|f| f.claim_won_ns), at(|f| f.running_ns)),
        promotion_us: stage(at(|f| f.promote_started_ns), at(|f| f.running_ns))
            .map(|us| us.saturating_sub(facts.audit.map_or(0, |a| a.audit_us))),
        client_us: stage(running, gap.map(|g| g.to_ns)),
        blackout_us: gap.map(super::checks::Gap::us),
        calm_gap_us: longest_gap_within(&log.answers, facts.calm.from_ns, facts.calm.to_ns)
            .map(super::checks::Gap::us),
        from_epoch: failover.as_ref().map(|f| f.from_epoch),
        lag: quantiles(facts.lag_us.clone()),
        pause: facts.before.pause,
        commit: facts.before.commit,
        epochs: facts.before.epochs,
        audit: facts.audit,
        reprotected_us: facts.reprotected_us,
        links: facts.links.iter().map(LinkFacts::report).collect(),
        failures,
    }
}

/// Why a run in which the VM should have lived on elsewhere is not good; empty if it is.
fn judge_failover(spec: &DrillSpec, facts: &RunFacts, log: &ClientLog) -> Vec<String> {
    let mut failures = facts.trouble.clone();
    match &facts.after {
        None => failures.push("no host went on running the VM".into()),
        Some(after) => {
            let failover = after.last_failover.as_ref();
            let running = failover.map(|f| f.running_ns).filter(|t| t.0 > 0);
            let silent = silent_since(
                &log.answers,
                log.clients,
                running.unwrap_or(facts.injected_ns),
            );
            if silent > 0 {
                failures.push(format!(
                    "{silent} of {} clients got no answer after the failure",
                    log.clients
                ));
            }
            if after.generation <= facts.before.generation {
                failures.push(format!(
                    "the generation did not rise ({} before and {} after)",
                    facts.before.generation, after.generation
                ));
            }
            let promoted = failover.is_some_and(|f| f.promote_started_ns.0 > 0);
            let must_move = spec.kind != DrillKind::CutLink;
            if must_move && after.host == facts.before.host {
                failures.push(format!("the VM did not leave host `{}`", after.host));
            }
            match facts.audit {
                None if spec.audit && promoted => {
                    failures.push("the promotion was not audited".into())
                }
                Some(AuditView {
                    memory_equal: false,
                    ..
                }) => failures.push("memory differs from the committed checkpoint".into()),
                Some(AuditView {
                    disks_equal: false, ..
                }) => failures.push("a disk differs from the committed checkpoint".into()),
                _ => {}
            }
            if !matches!(after.role, Role::Primary | Role::Solo) {
                failures.push(format!(
                    "host `{}` says it runs the VM but its part is {:?}",
                    after.host, after.role
                ));
            }
        }
    }
    if facts.reprotected_us.is_none() {
        failures.push("the VM was not mirrored again".into());
    }
    failures
}

fn rate(log: &ClientLog, windows: &[Window]) -> Rate {
    let inside = |t: MonotonicNs| windows.iter().any(|w| (w.from_ns..w.to_ns).contains(&t));
    let served = log
        .answers
        .iter()
        .filter(|a| inside(a.sent_ns) && inside(a.answered_ns));
    let latency = quantiles(
        served
            .map(|a| micros(a.answered_ns.since(a.sent_ns)))
            .collect(),
    );
    let time_us: u64 = windows
        .iter()
        .map(|w| micros(w.to_ns.since(w.from_ns)))
        .sum();
    Rate {
        latency,
        per_second: (latency.count * 1_000_000)
            .checked_div(time_us)
            .unwrap_or(0),
    }
}

fn worst_pause(runs: &[RunReport]) -> PauseView {
    let part = |of: fn(&PauseView) -> Quantiles| {
        let all: Vec<Quantiles> = runs
            .iter()
            .map(|r| of(&r.pause))
            .filter(|q| q.count > 0)
            .collect();
        let middle = |f: fn(&Quantiles) -> u64| quantiles(all.iter().map(f).collect()).p50_us;
        let worst = |f: fn(&Quantiles) -> u64| all.iter().map(f).max().unwrap_or(0);
        Quantiles {
            count: all.iter().map(|q| q.count).sum(),
            p50_us: middle(|q| q.p50_us),
            p90_us: middle(|q| q.p90_us),
            p99_us: worst(|q| q.p99_us),
            max_us: worst(|q| q.max_us),
        }
    };
    PauseView {
        total: part(|p| p.total),
        stop: part(|p| p.stop),
        capture: part(|p| p.capture),
        save: part(|p| p.save),
        cont: part(|p| p.cont),
    }
}

#[cfg(test)]
pub(crate) mod tests;
