//! The course of a drill: prepare, measure unprotected, protect, then fail, watch and
//! repair as often as asked, and judge at the end.

use super::client::{ClientOptions, Mode};
use super::env::{ClientPipes, DrillEnv, EnvError, Setting, VmView};
use super::log::{ClientLog, LINE_BYTES_MAX, Line};
use super::report::{DrillReport, Facts, RunFacts, Window};
use super::stats::{Rng, micros};
use super::{DrillSpec, MonotonicNs, Service};
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The guest's address on the lab's lan, and its ports (the workload's).
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
const COUNTER_PORT: u16 = 7000;
const ECHO_PORT: u16 = 7001;
const REDIS_PORT: u16 = 6379;

/// How long each step may take, and how long is measured.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Starting hosts and booting the guest; TCG on a busy machine takes the longest.
    pub prepare_max: Duration,
    /// Seeding, or seeding again.
    pub mirror_max: Duration,
    /// Until the VM runs again, and until every client is answered again.
    pub failover_max: Duration,
    /// Hashing all of memory and disk.
    pub audit_max: Duration,
    /// Unprotected service is measured this long.
    pub baseline: Duration,
    /// The failure comes at a random moment this long after the VM is mirrored: from, to.
    pub calm: (Duration, Duration),
    /// Between two looks at the replication lag and at the clients' log.
    pub look_every: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            prepare_max: Duration::from_secs(180),
            mirror_max: Duration::from_secs(120),
            failover_max: Duration::from_secs(30),
            audit_max: Duration::from_secs(60),
            baseline: Duration::from_secs(3),
            calm: (Duration::from_secs(1), Duration::from_secs(3)),
            look_every: Duration::from_millis(20),
        }
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// The spec asks for nothing that could be rehearsed.
    #[error("drill spec: {0}")]
    Spec(String),
    /// The scene could not be set; nothing was rehearsed.
    #[error("the drill could not start: {0}")]
    Env(#[from] EnvError),
}

/// Runs a drill; progress goes to standard error. `env.finish` is called in every case.
///
/// # Errors
/// [`DrillError`] if it could not start. What goes wrong after that is in the report,
/// which then is not passed.
pub fn run(spec: &DrillSpec, env: &mut dyn DrillEnv) -> Result<DrillReport, DrillError> {
    run_paced(spec, env, &Pace::default(), &mut |text| eprintln!("{text}"))
}

/// [`run`] with other times and another place for the progress.
///
/// # Errors
/// As [`run`].
pub fn run_paced(
    spec: &DrillSpec,
    env: &mut dyn DrillEnv,
    pace: &Pace,
    progress: &mut dyn FnMut(&str),
) -> Result<DrillReport, DrillError> {
    if spec.repeat == 0 || spec.load.clients == 0 || spec.load.clients > super::client::CLIENTS_MAX
    {
        let most = super::client::CLIENTS_MAX;
        return Err(DrillError::Spec(format!(
            "use a repeat of 1 or more and 1 to {most} clients"
        )));
    }
    let facts = Drill {
        spec,
        pace,
        env,
        progress,
    }
    .rehearse();
    env.finish();
    Ok(DrillReport::new(spec, &facts?))
}

struct Drill<'a> {
    spec: &'a DrillSpec,
    pace: &'a Pace,
    env: &'a mut dyn DrillEnv,
    progress: &'a mut dyn FnMut(&str),
}

impl Drill<'_> {
    fn say(&mut self, text: &str) {
        (self.progress)(text);
    }

    fn rehearse(&mut self) -> Result<Facts, EnvError> {
        let spec = self.spec;
        let setting = Setting {
            load: spec.load.clone(),
            service: spec.service,
            audit: spec.audit,
        };
        self.say("starting hosts and guest");
        self.env.prepare(&setting, self.pace.prepare_max)?;
        let (mode, port) = match spec.service {
            Service::Counter => (Mode::Counter, COUNTER_PORT),
            Service::Redis => (Mode::Redis, REDIS_PORT),
        };
        let clients = self.client(mode, port, spec.load.clients)?;
        if !clients.wait_answers(
            spec.load.clients,
            MonotonicNs(0),
            self.pace.prepare_max,
            self.pace.look_every,
        ) {
            return Err(EnvError::new(
                "waiting for the guest's service",
                "not every client was answered; look at the guest's console",
            ));
        }
        let echo = if spec.load.net {
            Some(self.client(Mode::Echo, ECHO_PORT, 1)?)
        } else {
            None
        };

        self.say("serving unprotected, to compare");
        let from_ns = MonotonicNs::now();
        std::thread::sleep(self.pace.baseline);
        let mut facts = Facts {
            unprotected: Window {
                from_ns,
                to_ns: MonotonicNs::now(),
            },
            ..Facts::default()
        };
        self.say("protecting: the first full copy");
        self.env.protect()?;
        let mut mirrored = Some(self.env.wait_mirrored(self.pace.mirror_max)?);

        let mut rng = Rng::new(spec.seed);
        for number in 1..=spec.repeat {
            let Some(before) = mirrored.take() else { break };
            let moment = rng.duration(self.pace.calm.0, self.pace.calm.1);
            match self.one_run(number, before, moment, &clients) {
                Ok((run, again)) => {
                    facts.runs.push(run);
                    mirrored = again;
                }
                Err(e) => {
                    facts.trouble.push(format!("run {number}: {e}"));
                    break;
                }
            }
        }
        self.say("judging");
        let log = clients.finish();
        if let Some(echo) = echo.map(Clients::finish)
            && !(echo.broken.is_empty() && echo.open.is_empty() && echo.ended)
        {
            let why = echo
                .broken
                .first()
                .map_or("never answered", |(_, _, _, why)| why.as_str());
            facts
                .trouble
                .push(format!("the echo connection did not hold: {why}"));
        }
        match self.env.disk_records() {
            Ok(disk) => facts.disk = disk,
            Err(e) => facts.trouble.push(e.to_string()),
        }
        facts.log = log;
        Ok(facts)
    }

    /// One failure. What cannot be done before it is an error; what cannot after it is
    /// part of its facts. Also gives the view of the VM mirrored again, if it was.
    fn one_run(
        &mut self,
        number: u32,
        before: VmView,
        moment: Duration,
        clients: &Clients,
    ) -> Result<(RunFacts, Option<VmView>), EnvError> {
        let kind = self.spec.kind;
        self.say(&format!(
            "run {number} of {}: mirrored from {}; {} comes",
            self.spec.repeat,
            before.host,
            kind.name()
        ));
        let host = before.host;
        let calm_from = MonotonicNs::now();
        let end = Instant::now() + moment;
        let mut lag_us = Vec::new();
        let mut newest = None;
        while Instant::now() < end {
            if let Some(view) = self.env.views()?.into_iter().find(|v| v.host == host) {
                lag_us.push(view.lag_us);
                newest = Some(view);
            }
            std::thread::sleep(
                self.pace
                    .look_every
                    .min(end.saturating_duration_since(Instant::now())),
            );
        }
        let Some(before) = newest else {
            return Err(EnvError::new(
                format!("watching host `{host}`"),
                "it does not tell about the VM",
            ));
        };
        let injected_ns = self.env.inject(kind, &host)?;
        let mut run = RunFacts {
            calm: Window {
                from_ns: calm_from,
                to_ns: injected_ns,
            },
            lag_us,
            injected_ns,
            after: None,
            audit: None,
            watched_until_ns: injected_ns,
            reprotected_us: None,
            trouble: Vec::new(),
            before,
        };
        match self
            .env
            .wait_running(run.before.generation, self.pace.failover_max)
        {
            Ok(after) => run.after = Some(after),
            Err(e) => run.trouble.push(e.to_string()),
        }
        let again = match run.after.clone() {
            Some(after) => {
                let running_ns = after
                    .last_failover
                    .as_ref()
                    .map_or(injected_ns, |f| f.running_ns.max(injected_ns));
                // The gap over the failure ends with these answers.
                clients.wait_answers(
                    self.spec.load.clients,
                    running_ns,
                    self.pace.failover_max,
                    self.pace.look_every,
                );
                run.watched_until_ns = MonotonicNs::now();
                if self.spec.audit {
                    match self.env.audit(&after.host, self.pace.audit_max) {
                        Ok(audit) => run.audit = audit,
                        Err(e) => run.trouble.push(e.to_string()),
                    }
                }
                self.reprotect(&mut run, &host)
            }
            None => {
                run.watched_until_ns = MonotonicNs::now();
                None
            }
        };
        Ok((run, again))
    }

    fn reprotect(&mut self, run: &mut RunFacts, failed: &crate::pool::HostName) -> Option<VmView> {
        let repaired = Instant::now();
        let mirrored = self
            .env
            .repair(self.spec.kind, failed)
            .and_then(|()| self.env.wait_mirrored(self.pace.mirror_max));
        match mirrored {
            Ok(view) => {
                run.reprotected_us = Some(micros(repaired.elapsed()));
                Some(view)
            }
            Err(e) => {
                run.trouble.push(e.to_string());
                None
            }
        }
    }

    fn client(&mut self, mode: Mode, port: u16, clients: u16) -> Result<Clients, EnvError> {
        let options = ClientOptions {
            mode,
            address: SocketAddr::from((GUEST, port)),
            clients,
            think: Duration::ZERO,
        };
        let pipes = self.env.spawn_client(&options.args())?;
        Clients::new(pipes).map_err(|e| EnvError::new("starting a thread for the client's log", e))
    }
}

/// A client process and the thread that reads its log.
struct Clients {
    input: Option<Box<dyn std::io::Write + Send>>,
    child: Option<std::process::Child>,
    log: Arc<Mutex<ClientLog>>,
    reader: Option<JoinHandle<()>>,
}

impl Clients {
    fn new(pipes: ClientPipes) -> std::io::Result<Self> {
        let log = Arc::new(Mutex::new(ClientLog::default()));
        let shared = Arc::clone(&log);
        let reader = std::thread::Builder::new()
            .name("client-log".into())
            .spawn(move || read_log(pipes.output, &shared))?;
        Ok(Self {
            input: Some(pipes.input),
            child: pipes.child,
            log,
            reader: Some(reader),
        })
    }

    fn log(&self) -> MutexGuard<'_, ClientLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until each client was answered after `since`. False if it took too long.
    fn wait_answers(
        &self,
        clients: u16,
        since: MonotonicNs,
        limit: Duration,
        look_every: Duration,
    ) -> bool {
        let end = Instant::now() + limit;
        loop {
            if super::checks::silent_since(&self.log().answers, clients, since) == 0 {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(look_every);
        }
    }

    /// Ends the process in good order and gives what it wrote.
    fn finish(mut self) -> ClientLog {
        self.end();
        std::mem::take(&mut self.log())
    }

    fn end(&mut self) {
        self.input = None;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.end();
    }
}

fn read_log(output: Box<dyn Read + Send>, log: &Mutex<ClientLog>) {
    let mut reader = BufReader::new(output);
    let mut line = String::new();
    loop {
        line.clear();
        match reader
            .by_ref()
            .take(LINE_BYTES_MAX as u64)
            .read_line(&mut line)
        {
            Ok(bytes) if bytes > 0 => {}
            _ => return,
        }
        // A bad line ends the reading; the log then lacks its end, and the drill fails for it.
        let Ok(parsed) = Line::parse(line.trim_end()) else {
            return;
        };
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(parsed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::client::run_clients;
    use crate::drill::env::{AuditView, DiskRecords, FailoverView, Role};
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
            view(["a", "b"][self.host], Role::Primary, self.generation)
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
                    audit_ms: 1,
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
        let pace = Pace {
            baseline: Duration::from_millis(20),
            calm: (Duration::from_millis(5), Duration::from_millis(10)),
            look_every: Duration::from_millis(1),
            ..Pace::default()
        };
        let report = run_paced(
            &DrillSpec {
                repeat: 2,
                ..spec(DrillKind::KillHost)
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
            report.unprotected.latency.count > 0
                && report.runs.iter().all(|r| r.blackout_us.is_some())
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
}
