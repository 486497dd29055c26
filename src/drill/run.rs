//! The course of a drill: prepare, measure unprotected, protect, then fail, watch and
//! repair as often as asked, and judge at the end.

use super::client::{ClientOptions, Mode};
use super::clients::Clients;
use super::env::{DrillEnv, EnvError, Setting, VmView};
use super::links::LinkPlan;
use super::report::{DrillReport, Facts, RunFacts, Window};
use super::stats::{Rng, micros};
use super::{DrillSpec, MonotonicNs, Service};
use std::net::{Ipv4Addr, SocketAddr};
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
    /// A link that fails alone does so for a random time: from, to. From shorter than a
    /// silent loss takes to be noticed to longer than the quinn session of it lives.
    pub harm: (Duration, Duration),
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
            harm: (Duration::from_millis(100), Duration::from_millis(2500)),
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
    if spec.links < 2 && (spec.kind.vm_stays() || spec.cut_before) {
        return Err(DrillError::Spec(format!(
            "a pair with {} links has none to spare: use 2 links or more",
            spec.links
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
            links: spec.links,
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
            match self.one_run(number, before, moment, &mut rng, &clients) {
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
        rng: &mut Rng,
        clients: &Clients,
    ) -> Result<(RunFacts, Option<VmView>), EnvError> {
        let kind = self.spec.kind;
        let links = self.spec.links;
        self.say(&format!(
            "run {number} of {}: mirrored from {}; {} comes",
            self.spec.repeat,
            before.host,
            kind.name()
        ));
        if kind.vm_stays() {
            let plans = LinkPlan::of_run(kind, links, rng, self.pace.harm);
            let run = self.calm(&before, moment, None)?;
            return self.link_run(run, &plans, clients);
        }
        let cut = self
            .spec
            .cut_before
            .then(|| LinkPlan::before_failure(links, rng, moment));
        let mut run = self.calm(&before, moment, cut)?;
        let host = run.before.host.clone();
        let injected_ns = self.env.inject(kind, &host)?;
        run.injected_ns = injected_ns;
        run.calm.to_ns = injected_ns;
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

    /// Mirrored and undisturbed for `moment`, less one link if `cut` says so: the facts of
    /// a run whose failure is yet to come.
    fn calm(
        &mut self,
        before: &VmView,
        moment: Duration,
        mut cut: Option<LinkPlan>,
    ) -> Result<RunFacts, EnvError> {
        let host = before.host.clone();
        let from_ns = MonotonicNs::now();
        let begun = Instant::now();
        let mut lag_us = Vec::new();
        let mut newest: Option<VmView> = None;
        while begun.elapsed() < moment {
            if let Some(plan) = cut.take_if(|plan| begun.elapsed() >= plan.after) {
                self.say(&format!("link {} first: {:?}", plan.link, plan.harm));
                self.env.harm_link(plan.link, plan.harm)?;
            }
            if let Some(view) = self.env.views()?.into_iter().find(|v| v.host == host) {
                lag_us.push(view.lag_us);
                newest = Some(view);
            }
            std::thread::sleep(
                self.pace
                    .look_every
                    .min(moment.saturating_sub(begun.elapsed())),
            );
        }
        let Some(mut newest) = newest else {
            return Err(EnvError::new(
                format!("watching host `{host}`"),
                "it does not tell about the VM",
            ));
        };
        let mut trouble = Vec::new();
        let mirror_lost = !newest.mirrored || newest.generation != before.generation;
        if mirror_lost {
            // Only a mirrored VM is promised to live on.
            let last = newest.events.last().map_or("", |e| e.text.as_str());
            let lost = format!("the mirror was lost on its own ({last})");
            self.say(&format!("{lost}; waiting for it"));
            if self.spec.cut_before {
                trouble.push(format!("{lost}, with one link cut"));
            }
            newest = self.env.wait_mirrored(self.pace.mirror_max)?;
        }
        let to_ns = MonotonicNs::now();
        Ok(RunFacts {
            before: newest,
            calm: Window { from_ns, to_ns },
            lag_us,
            injected_ns: to_ns,
            after: None,
            audit: None,
            links: Vec::new(),
            watched_until_ns: to_ns,
            reprotected_us: None,
            mirror_lost,
            trouble,
        })
    }

    fn reprotect(&mut self, run: &mut RunFacts, failed: &crate::pool::HostName) -> Option<VmView> {
        let repaired = Instant::now();
        let links = 0..if self.spec.cut_before {
            self.spec.links
        } else {
            0
        };
        let healed: Result<(), EnvError> = links
            .into_iter()
            .try_for_each(|link| self.env.heal_link(link).map(|_| ()));
        let mirrored = healed
            .and_then(|()| self.env.repair(self.spec.kind, failed))
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

mod links;
#[cfg(test)]
mod tests;
