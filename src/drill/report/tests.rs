use super::*;
use crate::drill::checks::tests::healthy;
use crate::drill::{Load, Service};

pub(crate) fn spec(kind: DrillKind) -> DrillSpec {
    let load = Load {
        clients: 2,
        disk_iops: 100,
        mem_pages_s: 100,
        net: false,
    };
    DrillSpec {
        kind,
        repeat: 1,
        links: 2,
        cut_before: false,
        load,
        service: Service::Counter,
        seed: 1,
        audit: true,
        json: false,
    }
}

pub(crate) fn view(host: &str, role: Role, generation: u64) -> VmView {
    VmView {
        host: HostName::new(host).unwrap(),
        role,
        state: "mirrored".into(),
        mirrored: true,
        generation,
        epoch: 9,
        committed_epoch: 8,
        lag_us: 900,
        pause: PauseView::default(),
        commit: Quantiles::default(),
        epochs: 8,
        pages_per_epoch: 0,
        bytes_per_epoch: 0,
        qemu_pid: None,
        last_failover: None,
        events: Vec::new(),
    }
}

/// 200 ms of two clients; at 100.6 ms the host dies, at 131.5 ms client 0 goes on.
pub(crate) fn good() -> Facts {
    let ms = |ms: u64, tenths: u64| MonotonicNs(ms * 1_000_000 + tenths * 100_000);
    let mut log = healthy(2, 200);
    for answer in &mut log.answers[101..] {
        answer.answered_ns.0 += 30_000_000;
        if answer.seq > 51 {
            answer.sent_ns.0 += 30_000_000;
        }
    }
    let audit = AuditView {
        memory_equal: true,
        disks_equal: true,
        audit_us: 5_000,
    };
    let mut after = view("b", Role::Solo, 2);
    after.last_failover = Some(FailoverView {
        suspected_at_ns: ms(110, 6),
        claim_started_ns: ms(111, 0),
        claim_won_ns: ms(112, 6),
        promote_started_ns: ms(112, 7),
        running_ns: ms(120, 6),
        from_epoch: 8,
        audit: Some(audit),
    });
    let run = RunFacts {
        before: view("a", Role::Primary, 1),
        calm: Window {
            from_ns: ms(50, 0),
            to_ns: ms(100, 0),
        },
        lag_us: vec![500, 900],
        injected_ns: ms(100, 6),
        after: Some(after),
        audit: Some(audit),
        links: Vec::new(),
        watched_until_ns: ms(180, 0),
        reprotected_us: Some(400_000),
        mirror_lost: false,
        trouble: Vec::new(),
    };
    let disk = Some(DiskRecords {
        ranges: vec![(1, 500)],
        oldest_kept: 0,
        damaged: 0,
    });
    Facts {
        unprotected: Window {
            from_ns: ms(0, 0),
            to_ns: ms(50, 0),
        },
        runs: vec![run],
        log,
        disk,
        trouble: Vec::new(),
    }
}

#[test]
fn a_good_drill_passes_and_its_blackout_is_the_sum_of_its_parts() {
    let report = DrillReport::new(&spec(DrillKind::KillHost), &good());
    assert_eq!(report.failures, Vec::<String>::new());
    assert_eq!(report.exit_status(), 0);
    let run = &report.runs[0];
    assert_eq!(
        (run.detection_us, run.claim_us, run.takeover_us),
        (Some(10_000), Some(2_000), Some(8_000))
    );
    assert_eq!(
        (run.blackout_us, run.client_us),
        (Some(32_000), Some(11_900))
    );
    assert_eq!(run.calm_gap_us, Some(2_000));
    assert_eq!(
        (
            report.unprotected.latency.p50_us,
            report.unprotected.per_second
        ),
        (500, 1000)
    );
    assert_eq!(
        (
            report.lag.max_us,
            report.numbers.answers,
            report.missing_on_disk
        ),
        (900, 200, Some(0))
    );
    assert!(report.to_json().unwrap().contains("\"passed\":true"));
}

/// Every way in which a drill can fail, and the word that names it.
#[test]
fn each_fault_fails_the_drill() {
    let fails = |word: &str, spoil: &dyn Fn(&mut Facts)| {
        let mut facts = good();
        spoil(&mut facts);
        let report = DrillReport::new(&spec(DrillKind::KillHost), &facts);
        assert_eq!(report.exit_status(), 1, "{word}");
        assert!(
            report.failures.iter().any(|f| f.contains(word)),
            "{word}: {:?}",
            report.failures
        );
        assert!(report.to_json().unwrap().contains("\"passed\":false"));
    };
    fails("lost", &|f| f.log.answers.retain(|a| a.number != 250));
    fails("twice", &|f| f.log.answers[150].number = 200);
    fails("lower", &|f| {
        let numbers = (f.log.answers[150].number, f.log.answers[190].number);
        (f.log.answers[190].number, f.log.answers[150].number) = numbers;
    });
    fails("broken", &|f| {
        f.log.broken.push((0, MonotonicNs(9), 3, "reset".into()))
    });
    fails("never answered", &|f| f.log.open.push((0, MonotonicNs(9))));
    fails("before its time", &|f| f.log.ended = false);
    fails("ever answered", &|f| f.log.answers.clear());
    fails("missing on the disk", &|f| {
        f.disk = Some(DiskRecords {
            ranges: vec![(1, 298)],
            oldest_kept: 0,
            damaged: 0,
        })
    });
    fails("damaged", &|f| {
        f.disk = Some(DiskRecords {
            ranges: vec![(1, 500)],
            oldest_kept: 0,
            damaged: 1,
        })
    });
    fails("no host went on", &|f| f.runs[0].after = None);
    fails("1 of 2 clients got no answer", &|f| {
        f.log
            .answers
            .retain(|a| a.client == 0 || a.answered_ns < MonotonicNs(100_000_000))
    });
    fails("generation", &|f| {
        f.runs[0].after.as_mut().unwrap().generation = 1
    });
    fails("did not leave", &|f| {
        f.runs[0].after.as_mut().unwrap().host = HostName::new("a").unwrap()
    });
    fails("its part is Standby", &|f| {
        f.runs[0].after.as_mut().unwrap().role = Role::Standby
    });
    fails("not audited", &|f| f.runs[0].audit = None);
    fails("memory differs", &|f| {
        f.runs[0].audit.as_mut().unwrap().memory_equal = false
    });
    fails("disk differs", &|f| {
        f.runs[0].audit.as_mut().unwrap().disks_equal = false
    });
    fails("not mirrored again", &|f| f.runs[0].reprotected_us = None);
    fails("run 1: wires", &|f| f.runs[0].trouble.push("wires".into()));
    fails("only 0 of 1", &|f| f.runs.clear());
    fails("no electricity", &|f| {
        f.trouble.push("no electricity".into())
    });
}

#[test]
fn a_cut_link_may_leave_the_vm_where_it_is() {
    let mut facts = good();
    let after = facts.runs[0].after.as_mut().unwrap();
    after.host = HostName::new("a").unwrap();
    after.last_failover.as_mut().unwrap().promote_started_ns = MonotonicNs(0);
    facts.runs[0].audit = None;
    assert!(DrillReport::new(&spec(DrillKind::CutLink), &facts).passed());
}
