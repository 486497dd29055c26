use super::*;
use crate::drill::client::run_clients;
use crate::drill::env::{AuditView, ClientPipes, DiskRecords, FailoverView, LinkHarm, Role};
use crate::drill::report::tests::{spec, view};
use crate::drill::{DrillKind, client};
use crate::pool::HostName;
use std::ffi::OsString;

/// Hosts a and b that exist in words only; the service is a thread.
#[derive(Default)]
struct Words {
    /// The number that is answered wrongly, by the number before.
    repeat_at: Option<u64>,
    /// Fails here.
    fail_at: &'static str,
    calls: Vec<String>,
    generation: u64,
    host: usize,
    finished: bool,
    harmed: Vec<u8>,
    healed: u64,
    /// The mirror breaks when a link is harmed and is made anew when it heals.
    breaks: bool,
}

impl Words {
    fn call(&mut self, name: &'static str) -> Result<(), EnvError> {
        self.calls.push(name.into());
        if self.fail_at == name {
            Err(EnvError::new(name, "as told"))
        } else {
            Ok(())
        }
    }

    fn view(&self) -> VmView {
        let broken = self.breaks && !self.harmed.is_empty();
        let generation = self.generation + if self.breaks { self.healed } else { 0 };
        VmView {
            mirrored: !broken,
            state: if broken { "solo" } else { "mirrored" }.into(),
            ..view(["a", "b"][self.host], Role::Primary, generation)
        }
    }
}

impl DrillEnv for Words {
    fn prepare(&mut self, _: &Setting, _: Duration) -> Result<(), EnvError> {
        self.call("prepare")
    }
    fn spawn_client(&mut self, args: &[OsString]) -> Result<ClientPipes, EnvError> {
        self.call("spawn_client")?;
        let mut options = ClientOptions::parse(&args[1..]).unwrap();
        let repeat_at = self.repeat_at;
        options.address = client::tests::serve(options.mode, move |n| {
            (Some(n) == repeat_at).then(|| format!("{}\n", n - 1))
        });
        options.think = Duration::from_millis(1);
        let (theirs, input) = std::io::pipe().unwrap();
        let (output, log) = std::io::pipe().unwrap();
        std::thread::spawn(move || run_clients(&options, theirs, log));
        Ok(ClientPipes {
            input: Box::new(input),
            output: Box::new(output),
            child: None,
        })
    }
    fn protect(&mut self) -> Result<(), EnvError> {
        self.call("protect")
    }
    fn wait_mirrored(&mut self, _: Duration) -> Result<VmView, EnvError> {
        self.call("wait_mirrored").map(|()| self.view())
    }
    fn views(&mut self) -> Result<Vec<VmView>, EnvError> {
        Ok(vec![self.view()])
    }
    fn inject(&mut self, _: DrillKind, primary: &HostName) -> Result<MonotonicNs, EnvError> {
        assert_eq!(*primary, self.view().host);
        self.call("inject").map(|()| MonotonicNs::now())
    }
    fn harm_link(&mut self, link: u8, _: LinkHarm) -> Result<MonotonicNs, EnvError> {
        self.harmed.push(link);
        self.call("harm_link").map(|()| MonotonicNs::now())
    }
    fn heal_link(&mut self, link: u8) -> Result<MonotonicNs, EnvError> {
        self.harmed.retain(|harmed| *harmed != link);
        self.healed += 1;
        self.call("heal_link").map(|()| MonotonicNs::now())
    }
    fn link_carries(&mut self, link: u8) -> Result<Option<bool>, EnvError> {
        let carries = !self.harmed.contains(&link) && self.fail_at != "link_carries";
        Ok((self.fail_at != "link_told").then_some(carries))
    }
    fn wait_running(&mut self, generation: u64, _: Duration) -> Result<VmView, EnvError> {
        assert_eq!(generation, self.generation);
        self.call("wait_running")?;
        self.generation += 1;
        self.host = 1 - self.host;
        let now = MonotonicNs::now();
        let failover = FailoverView {
            promote_started_ns: now,
            running_ns: now,
            ..FailoverView::default()
        };
        Ok(VmView {
            last_failover: Some(failover),
            ..self.view()
        })
    }
    fn audit(&mut self, _: &HostName, _: Duration) -> Result<Option<AuditView>, EnvError> {
        self.call("audit").map(|()| {
            Some(AuditView {
                memory_equal: true,
                disks_equal: true,
                audit_us: 1,
            })
        })
    }
    fn repair(&mut self, _: DrillKind, _: &HostName) -> Result<(), EnvError> {
        self.call("repair")
    }
    fn disk_records(&mut self) -> Result<Option<DiskRecords>, EnvError> {
        self.call("disk_records").map(|()| {
            Some(DiskRecords {
                ranges: vec![(1, u64::MAX)],
                oldest_kept: 0,
                damaged: 0,
            })
        })
    }
    fn finish(&mut self) {
        self.finished = true;
    }
}

fn drill(env: &mut Words) -> Result<DrillReport, DrillError> {
    drill_kind(env, DrillKind::KillHost)
}

fn drill_kind(env: &mut Words, kind: DrillKind) -> Result<DrillReport, DrillError> {
    let pace = Pace {
        baseline: Duration::from_millis(20),
        calm: (Duration::from_millis(5), Duration::from_millis(10)),
        harm: (Duration::from_millis(5), Duration::from_millis(10)),
        failover_max: Duration::from_secs(1),
        look_every: Duration::from_millis(1),
        ..Pace::default()
    };
    let report = run_paced(
        &DrillSpec {
            repeat: 2,
            ..spec(kind)
        },
        env,
        &pace,
        &mut |_| {},
    );
    assert!(env.finished);
    report
}

#[test]
fn a_drill_takes_its_steps_in_order_and_passes() {
    let mut env = Words::default();
    let report = drill(&mut env).unwrap();
    assert_eq!(report.failures, Vec::<String>::new());
    let run = ["inject", "wait_running", "audit", "repair", "wait_mirrored"];
    let steps = [
        &["prepare", "spawn_client", "protect", "wait_mirrored"][..],
        &run,
        &run,
        &["disk_records"],
    ]
    .concat();
    assert_eq!(env.calls, steps);
    assert!(
        report.unprotected.latency.count > 0 && report.runs.iter().all(|r| r.blackout_us.is_some())
    );
}

#[test]
fn what_the_clients_saw_fails_it() {
    let report = drill(&mut Words {
        repeat_at: Some(7),
        ..Words::default()
    })
    .unwrap();
    assert_eq!((report.numbers.repeated, report.exit_status()), (1, 1));
}

#[test]
fn what_cannot_be_done_is_an_error_before_and_a_failed_drill_after() {
    for step in ["prepare", "spawn_client", "protect", "wait_mirrored"] {
        assert!(
            drill(&mut Words {
                fail_at: step,
                ..Words::default()
            })
            .is_err(),
            "{step}"
        );
    }
    for step in ["inject", "wait_running", "audit", "repair", "disk_records"] {
        let report = drill(&mut Words {
            fail_at: step,
            ..Words::default()
        })
        .unwrap();
        assert!(
            report.failures.iter().any(|f| f.contains(step)),
            "{step}: {:?}",
            report.failures
        );
    }
}

#[test]
fn a_link_of_several_is_harmed_and_healed_and_the_vm_stays() {
    for kind in [DrillKind::CutOneLink, DrillKind::SlowLink] {
        let mut env = Words::default();
        let report = drill_kind(&mut env, kind).unwrap();
        assert_eq!(report.failures, Vec::<String>::new());
        assert!(env.harmed.is_empty() && env.healed >= 2);
        assert!(!env.calls.iter().any(|call| call == "inject"));
        for run in &report.runs {
            assert!(!run.links.is_empty() && run.blackout_us.is_some());
            assert!(
                run.links
                    .iter()
                    .all(|l| l.back_us.is_some() && l.lag.count > 0)
            );
        }
    }
}

#[test]
fn a_mirror_that_breaks_with_one_link_is_told_of() {
    let fails = |env: Words, words: &[&str]| {
        let report = drill_kind(&mut { env }, DrillKind::CutOneLink).unwrap();
        for word in words {
            assert!(
                report.failures.iter().any(|f| f.contains(word)),
                "{word}: {:?}",
                report.failures
            );
        }
    };
    let breaks = Words {
        breaks: true,
        ..Words::default()
    };
    fails(
        breaks,
        &["did not stay mirrored: mirrored anew", "seen solo"],
    );
    let of = |fail_at| Words {
        fail_at,
        ..Words::default()
    };
    fails(of("link_carries"), &["was not taken back"]);
    fails(of("link_told"), &["do not tell"]);
    fails(of("harm_link"), &["harm_link: as told"]);
}

#[test]
fn a_pair_with_one_link_has_none_to_spare() {
    let alone = |kind, cut_before| {
        let spec = DrillSpec {
            links: 1,
            cut_before,
            ..spec(kind)
        };
        run_paced(&spec, &mut Words::default(), &Pace::default(), &mut |_| {})
    };
    for refused in [
        alone(DrillKind::CutOneLink, false),
        alone(DrillKind::KillHost, true),
    ] {
        assert!(refused.unwrap_err().to_string().contains("none to spare"));
    }
}

#[test]
fn a_failure_may_meet_a_pair_with_a_link_less() {
    let mut env = Words::default();
    let pace = Pace {
        baseline: Duration::from_millis(20),
        calm: (Duration::from_millis(20), Duration::from_millis(30)),
        look_every: Duration::from_millis(1),
        ..Pace::default()
    };
    let spec = DrillSpec {
        cut_before: true,
        ..spec(DrillKind::KillHost)
    };
    let report = run_paced(&spec, &mut env, &pace, &mut |_| {}).unwrap();
    assert_eq!(report.failures, Vec::<String>::new());
    let at = |name: &str| env.calls.iter().position(|call| call == name).unwrap();
    assert!(at("harm_link") < at("inject") && at("inject") < at("heal_link"));
    assert!(env.harmed.is_empty() && at("heal_link") < at("repair"));
}
