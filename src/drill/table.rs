//! A report for people: what happened, what it means, at one look.

use super::env::Quantiles;
use super::report::DrillReport;
use super::{DrillKind, Service};
use std::fmt::Write as _;

impl DrillKind {
    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KillHost => "kill-host",
            Self::KillQemu => "kill-qemu",
            Self::CutLink => "cut-link",
            Self::FreezeHost => "freeze-host",
            Self::Switchover => "switchover",
            Self::CutOneLink => "cut-one-link",
            Self::SlowLink => "slow-link",
        }
    }

    fn sentence(self) -> &'static str {
        match self {
            Self::KillHost => "the host that ran the VM lost power",
            Self::KillQemu => "the VM's QEMU process was killed",
            Self::CutLink => "the interconnect of the two hosts was cut",
            Self::FreezeHost => "the host that ran the VM stood still, and later went on",
            Self::Switchover => "the VM was moved to its standby on purpose",
            Self::CutOneLink => "one link of the interconnect was cut and came back",
            Self::SlowLink => "one link of the interconnect carried next to nothing for a while",
        }
    }
}

/// Microseconds as milliseconds with one decimal.
fn ms(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

fn ms_or(us: Option<u64>) -> String {
    us.map_or_else(|| "-".into(), ms)
}

fn line(out: &mut String, what: &str, q: &Quantiles) {
    let _ = writeln!(
        out,
        "  {what:<34} half under {:>10}   99 % under {:>10}   worst {:>10}",
        ms(q.p50_us),
        ms(q.p99_us),
        ms(q.max_us)
    );
}

/// What became of the VM in each run.
fn failovers(out: &mut String, report: &DrillReport) {
    let _ = writeln!(
        out,
        "  {:<4} {:<10} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}  {:<15} {:>11}",
        "run",
        "moved",
        "detection",
        "claim",
        "takeover",
        "promotion",
        "client",
        "blackout",
        "audit",
        "mirrored in"
    );
    for run in &report.runs {
        let to = run.to.as_ref().map_or("nowhere", |h| h.as_str());
        let audit = match run.audit {
            Some(a) if a.memory_equal && a.disks_equal => format!("equal {}", ms(a.audit_us)),
            Some(_) => "DIFFERENT".into(),
            None => "-".into(),
        };
        let _ = writeln!(
            out,
            "  {:<4} {:<10} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}  {:<15} {:>11}",
            run.run,
            format!("{} -> {to}", run.from),
            ms_or(run.detection_us),
            ms_or(run.claim_us),
            ms_or(run.takeover_us),
            ms_or(run.promotion_us),
            ms_or(run.client_us),
            ms_or(run.blackout_us),
            audit,
            ms_or(run.reprotected_us),
        );
    }
    out.push_str(
        "\n  detection: until the failure was noticed; claim: until the registry granted the VM;\n  \
         takeover: until it ran again, with audit; promotion: the part of it that loads the devices and\n  \
         starts the vCPUs; client: until the client's TCP had sent again and was answered.\n  \
         blackout: from the last answer before to the first after. audit: all memory and disk of\n  \
         the promoted VM against the last checkpoint, and the time that took.\n\n",
    );
}

/// What became of single links in each run, and of the VM meanwhile.
fn links(out: &mut String, report: &DrillReport) {
    let _ = writeln!(
        out,
        "  {:<4} {:<5} {:<10} {:>11} {:>11} {:>11} {:>13} {:>13} {:>11} {:>11}",
        "run",
        "link",
        "harm",
        "for",
        "back in",
        "worst lag",
        "usual epoch",
        "worst epoch",
        "blackout",
        "before it"
    );
    for run in &report.runs {
        for link in &run.links {
            let _ = writeln!(
                out,
                "  {:<4} {:<5} {:<10} {:>11} {:>11} {:>11} {:>13} {:>13} {:>11} {:>11}",
                run.run,
                link.link,
                format!("{:?}", link.harm).to_lowercase(),
                ms(link.harmed_us),
                ms_or(link.back_us),
                ms(link.lag.max_us),
                ms(link.epoch_usual_us),
                ms_or(link.epoch_worst_us),
                ms_or(run.blackout_us),
                ms_or(run.calm_gap_us),
            );
        }
    }
    out.push_str(
        "\n  back in: from the repair until both hosts said that the link carries again; worst lag:\n  \
         the oldest that the newest committed epoch was meanwhile; epoch: from the guest's resume to\n  \
         the standby's acknowledgement (worst: while the link was harmed; - if one before was slower);\n  \
         blackout: the longest that a client waited, before it: in the calm time before.\n\n",
    );
}

/// The report as text, ended by the verdict.
#[must_use]
pub fn table(report: &DrillReport) -> String {
    let mut out = String::new();
    let kind = report.spec.kind;
    let times = if report.runs.len() == 1 {
        "once".into()
    } else {
        format!("{} times", report.runs.len())
    };
    let _ = writeln!(
        out,
        "Drill {}: {}, {times}, with clients connected.\n",
        kind.name(),
        kind.sentence()
    );
    if kind.vm_stays() {
        links(&mut out, report);
    } else {
        failovers(&mut out, report);
    }
    line(&mut out, "blackout as clients saw it", &report.blackout);
    line(&mut out, "replication lag", &report.lag);
    line(&mut out, "pause per checkpoint", &report.pause.total);
    let p = &report.pause;
    let parts = [
        ("stop", p.stop),
        ("copy memory", p.capture),
        ("save devices", p.save),
        ("resume", p.cont),
    ];
    let parts: Vec<String> = parts
        .iter()
        .map(|(name, q)| format!("{name} {}", ms(q.p50_us)))
        .collect();
    let _ = writeln!(
        out,
        "  {:<34} {}",
        "  of which, half under",
        parts.join(", ")
    );
    line(
        &mut out,
        "request, unprotected",
        &report.unprotected.latency,
    );
    line(&mut out, "request, mirrored", &report.protected.latency);
    let _ = writeln!(
        out,
        "  {:<34} {} unprotected, {} mirrored",
        "requests per second", report.unprotected.per_second, report.protected.per_second
    );
    let _ = writeln!(out, "  {:<34} {}\n", "epochs committed", report.epochs);
    let n = &report.numbers;
    let _ = writeln!(out, "  {:<34} {}", "requests answered", n.answers);
    let _ = writeln!(
        out,
        "  {:<34} {} lost, {} repeated, {} out of order",
        "of these", n.lost, n.repeated, n.went_back
    );
    let kept = u64::from(report.spec.load.clients).saturating_sub(report.connections_broken);
    let _ = writeln!(
        out,
        "  {:<34} {kept} of {}",
        "connections kept", report.spec.load.clients
    );
    match (report.missing_on_disk, report.spec.service) {
        (Some(missing), _) => {
            let _ = writeln!(
                out,
                "  {:<34} {missing}",
                "acknowledged but not on the disk"
            );
        }
        (None, Service::Redis) => {
            let _ = writeln!(
                out,
                "  {:<34} not checked (redis keeps its numbers in memory)",
                "acknowledged but not on the disk"
            );
        }
        (None, Service::Counter) => {
            let _ = writeln!(
                out,
                "  {:<34} not checked",
                "acknowledged but not on the disk"
            );
        }
    }
    if report.mirror_lost > 0 {
        let _ = writeln!(
            out,
            "  {:<34} before {} of the runs",
            "mirror lost on its own, made anew", report.mirror_lost
        );
    }
    if report.passed() {
        out.push_str("\nNOTHING WAS LOST. The clients noticed a delay and nothing else.\n");
    } else {
        out.push_str("\nTHE DRILL FAILED:\n");
        for failure in &report.failures {
            let _ = writeln!(out, "  - {failure}");
        }
    }
    let _ = writeln!(
        out,
        "Seed {}: the same moments again with --seed {}.",
        report.spec.seed, report.spec.seed
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::report::tests::{good, spec};

    #[test]
    fn the_verdict_is_the_report_s() {
        let mut facts = good();
        let text = table(&DrillReport::new(&spec(DrillKind::KillHost), &facts));
        for part in [
            "a -> b",
            "32.0 ms",
            "NOTHING WAS LOST",
            "2 of 2",
            "0 lost, 0 repeated",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        facts.log.answers.remove(150);
        let text = table(&DrillReport::new(&spec(DrillKind::KillHost), &facts));
        assert!(
            text.contains("THE DRILL FAILED")
                && text.contains("1 lost")
                && !text.contains("NOTHING"),
            "{text}"
        );
    }
}
