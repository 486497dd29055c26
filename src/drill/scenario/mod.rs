//! A case of a scenario on a lab of real daemons: real heartbeats, a real statefile or etcd,
//! watchdogs that really reset, a fence agent that really takes the power.
//!
//! One thread a host looks at what its daemon says of the pool ([`watch`]); what was expected is
//! judged by what any of them has seen, and when. Must never: judge by what a daemon remembers
//! of the time before the first event.

mod etcd;
mod watch;

use crate::lab::daemons::{DaemonsError, daemon_spec, host_config, up_linked};
use crate::lab::pool::PoolLab;
use crate::lab::{HOSTS_MAX, KeepPolicy, Lab, LabError};
use crate::pool::HostName;
use crate::sim::scenario::{Case, Event, Network, RegistryKind, Who, host_name};
use etcd::Cluster;
use serde::Serialize;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use watch::{Seen, Watch};

/// Longest time until the hosts are one pool, in which each may judge the others.
const FORMING: Duration = Duration::from_secs(60);

/// Why a case could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// A lab does not have it.
    #[error("case `{case}`: {what}; it runs in the simulator alone (`pollux sim run`)")]
    NotInLab {
        /// The case.
        case: String,
        /// What a lab does not have.
        what: String,
    },
    /// The lab.
    #[error(transparent)]
    Daemons(#[from] DaemonsError),
    /// The lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Something in it.
    #[error("case `{case}`: {what}")]
    Failed {
        /// The case.
        case: String,
        /// What failed.
        what: String,
    },
}

/// What came of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The case.
    pub case: String,
    /// Sentences that did not come true, and what was seen instead.
    pub unmet: Vec<String>,
    /// From the last event until the first host was given up.
    pub given_up_ms: Option<u64>,
    /// From the last event until the first VMs might be restarted.
    pub may_restart_ms: Option<u64>,
    /// Hosts that lost power by themselves.
    pub resets: u64,
    /// What was decided, in words.
    pub decisions: Vec<String>,
    /// What XenServer's daemon was measured to do.
    pub xenserver: Option<String>,
}

/// Why a lab cannot run a case, if so.
#[must_use]
pub fn not_in_lab(case: &Case) -> Option<String> {
    if case.random.is_some() || case.stalls.is_some() {
        return Some("faults drawn from a seed do not exist in a lab".into());
    }
    if case.hosts.1 > HOSTS_MAX {
        return Some(format!("a lab has at most {HOSTS_MAX} hosts"));
    }
    let missing = case
        .events
        .iter()
        .find(|(_, event, _)| !event.in_lab(case.registry));
    missing.map(|(_, _, sentence)| format!("a lab cannot \"{sentence}\""))
}

/// Run one case on a lab of its own, with `program` as the product.
///
/// # Errors
/// [`ScenarioError`]; unmet expectations are none, they are in the outcome.
pub fn run_case(
    case: &Case,
    lab: &str,
    program: Option<PathBuf>,
    mut say: impl FnMut(&str),
) -> Result<Outcome, ScenarioError> {
    if let Some(what) = not_in_lab(case) {
        return Err(ScenarioError::NotInLab {
            case: case.name.clone(),
            what,
        });
    }
    let failed = |what: String| ScenarioError::Failed {
        case: case.name.clone(),
        what,
    };
    let names: Vec<HostName> = (0..case.hosts.0)
        .map(|index| HostName::new(host_name(index)))
        .collect::<Result<_, _>>()
        .map_err(|e| failed(e.to_string()))?;
    let mut spec = daemon_spec(lab, names.clone(), 1, KeepPolicy::WithCreator)?;
    if let Some(program) = program {
        spec.daemon_argv[0] = program.display().to_string();
        spec.program = program;
    }
    let watchdog_ms = crate::ha::timing::Timing::DEFAULT.watchdog.0;
    spec.pool = Some(PoolLab {
        watchdog: case.watchdog.then(|| Duration::from_millis(watchdog_ms)),
        fencing: case.fencing.is_some(),
    });
    match case.registry {
        RegistryKind::Statefile { disks } => {
            spec.statefile_disks = disks;
            spec.takeable_disks = true;
        }
        RegistryKind::Etcd => {
            spec.statefile_disks = 0;
            let registry = Cluster::config();
            spec.host_config = Box::new(move |name, net| {
                let whole = host_config(name, net);
                let (before, after) = whole.split_once("[registry]").unwrap_or((&whole, ""));
                let pool = after.find("\n[pool]").map_or("", |at| &after[at..]);
                format!("{before}{registry}{pool}")
            });
        }
    }
    let data = spec.dir.join("etcd");
    say("making a lab");
    let lab = up_linked(spec)?;
    let mut cluster = match case.registry {
        RegistryKind::Etcd => Some(Cluster::start(&lab, &data).map_err(failed)?),
        RegistryKind::Statefile { .. } => None,
    };
    say("waiting until the hosts are one pool");
    let watch = Watch::start(&lab);
    watch
        .wait(FORMING, Seen::all_judge)
        .map_err(|what| failed(format!("the hosts are no pool: {what}")))?;

    let roles = watch.roles();
    let who = |who: Who| -> Vec<HostName> {
        match who {
            Who::Host(index) => vec![names[index].clone()],
            Who::Coordinator => vec![roles.0.clone()],
            Who::Another => vec![roles.1.clone()],
            Who::All => names.clone(),
        }
    };
    watch.begin();
    let base = Instant::now();
    let mut first = base;
    let mut last = base;
    let mut thaws: Vec<(Instant, HostName)> = Vec::new();
    for (index, (at, event, sentence)) in case.events.iter().enumerate() {
        wait_until(base + Duration::from_millis(at.0), &lab, &mut thaws);
        say(sentence);
        last = Instant::now();
        if index == 0 {
            first = last;
        }
        do_event(&lab, *event, &who, cluster.as_mut(), &watch, &mut thaws).map_err(failed)?;
    }
    say("watching what comes of it");
    let most = case
        .expect
        .iter()
        .filter_map(|(expect, _)| expect.limit())
        .max();
    let run = most.unwrap_or(case.run);
    wait_until(last + Duration::from_millis(run.0), &lab, &mut thaws);
    let outcome = watch.judge(case, &who, first, last);
    drop(watch);
    lab.down()?;
    Ok(outcome)
}

/// Wait, and let frozen hosts go on when their time is over.
fn wait_until(until: Instant, lab: &Lab, thaws: &mut Vec<(Instant, HostName)>) {
    loop {
        let next = thaws.iter().map(|(at, _)| *at).min();
        let end = next.map_or(until, |next| next.min(until));
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        let now = Instant::now();
        for (_, host) in thaws.extract_if(.., |(at, _)| *at <= now) {
            // Its watchdog may have reset it meanwhile: nothing to let go on then.
            let _ = lab.thaw(&host);
        }
        if now >= until {
            return;
        }
    }
}

fn do_event(
    lab: &Lab,
    event: Event,
    who: &dyn Fn(Who) -> Vec<HostName>,
    cluster: Option<&mut Cluster>,
    watch: &Watch,
    thaws: &mut Vec<(Instant, HostName)>,
) -> Result<(), String> {
    let say = |e: LabError| e.to_string();
    let disks = |host: &HostName| lab.host(host).map_or(0, |net| net.statefile.len());
    match event {
        Event::Crash(of) => {
            for host in who(of) {
                watch.expects_off(&host);
                lab.power_cut(&host).map_err(say)?;
            }
        }
        Event::PowerOn(of) => {
            for host in who(of) {
                lab.power_on(&host).map_err(say)?;
            }
        }
        Event::Freeze(of, length) => {
            for host in who(of) {
                lab.freeze(&host).map_err(say)?;
                thaws.push((Instant::now() + Duration::from_millis(length.0), host));
            }
        }
        Event::CutNetwork(Network::Management, of) => {
            for host in who(of) {
                lab.cut_lan(&host).map_err(say)?;
            }
        }
        Event::HealNetworks => {
            for host in who(Who::All) {
                lab.heal_lan(&host).map_err(say)?;
            }
        }
        Event::TakeRegistry(of) | Event::GiveRegistry(of) => {
            let take = matches!(event, Event::TakeRegistry(_));
            for host in who(of) {
                for disk in 0..disks(&host) {
                    set_disk(lab, &host, disk, take).map_err(say)?;
                }
            }
        }
        Event::TakeDisk(disk, of) | Event::GiveDisk(disk, of) => {
            let take = matches!(event, Event::TakeDisk(..));
            for host in who(of) {
                set_disk(lab, &host, disk.into(), take).map_err(say)?;
            }
        }
        Event::StopLeader => {
            let cluster = cluster.ok_or("there is no etcd")?;
            cluster.stop_leader(lab)?;
        }
        Event::Cut(..)
        | Event::CutOneWay(..)
        | Event::CutNetwork(Network::Interconnect, _)
        | Event::Lose(_)
        | Event::TakeGateway(_)
        | Event::GiveGateway(_)
        | Event::FenceAgents(_) => return Err("a lab does not have this".into()),
    }
    Ok(())
}

fn set_disk(lab: &Lab, host: &HostName, disk: usize, take: bool) -> Result<(), LabError> {
    if take {
        lab.take_disk(host, disk).map(drop)
    } else {
        lab.give_disk(host, disk).map(drop)
    }
}
