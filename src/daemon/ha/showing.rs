//! What is shown of the pool: copied from the machine at each of its turns, read by the API.

use super::Setup;
use super::life::boot_now;
use super::watchdog::HostWatchdog;
use crate::api::pool::{
    AlertView, DecisionView, GatewayView, KeysView, PathView, PoolHostView, PoolStatus, ReportView,
    RestartView, WatchdogView,
};
use crate::beat::{PoolKeys, TransportStatus};
use crate::ha::detector::{Listening, PathVerdict};
use crate::ha::machine::{Machine, Phase};
use crate::ha::report::{Path, Report};
use crate::ha::state::{PoolState, Standing};
use crate::ha::time::Millis;
use crate::pool::{HostId, HostName, Incarnation};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Alerts that are kept.
const ALERTS_MAX: usize = 64;

/// What the API answers from.
pub(super) struct Shown(Mutex<Inner>);

struct Inner {
    status: PoolStatus,
    at: Millis,
    alerts: VecDeque<(Millis, String)>,
    left: bool,
}

/// What there is to be seen.
pub(super) struct Seen<'a> {
    pub(super) setup: &'a Setup,
    pub(super) incarnation: Incarnation,
    pub(super) machine: &'a Machine,
    pub(super) listening: &'a Listening,
    pub(super) watchdog: Option<&'a HostWatchdog>,
    pub(super) registry_error: Option<&'a str>,
    pub(super) transport: &'a TransportStatus,
}

/// A phase in a word or two, with its reason.
pub(super) fn phase_words(phase: &Phase) -> String {
    match phase {
        Phase::Joining => "joining".into(),
        Phase::Member => "a member".into(),
        Phase::Stopping { why } => format!("stopping: {why}"),
        Phase::Stopped { why } => format!("stopped: {why}"),
    }
}

impl Shown {
    pub(super) fn new(host: &HostName, id: u8, watchdog: Option<&std::path::Path>) -> Self {
        let status = PoolStatus {
            host: host.clone(),
            id,
            incarnation: 0,
            phase: "joining".into(),
            why: None,
            judges: false,
            lease_ms: None,
            watchdog: WatchdogView {
                place: watchdog.map(|place| place.display().to_string()),
                timeout_ms: None,
                state: "disarmed".into(),
            },
            gateway: None,
            keys: KeysView::default(),
            registry_age_ms: None,
            registry_error: None,
            state_version: None,
            term: 0,
            coordinator: None,
            hosts: Vec::new(),
            decisions: Vec::new(),
            restarts: Vec::new(),
            alerts: Vec::new(),
            age_ms: 0,
        };
        Self(Mutex::new(Inner {
            status,
            at: boot_now(),
            alerts: VecDeque::new(),
            left: false,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything, with its age.
    pub(super) fn status(&self) -> PoolStatus {
        let inner = self.lock();
        let now = boot_now();
        let alerts = inner.alerts.iter().map(|(at, text)| AlertView {
            age_ms: now.since(*at).0,
            text: text.clone(),
        });
        PoolStatus {
            alerts: alerts.collect(),
            age_ms: now.since(inner.at).0,
            ..inner.status.clone()
        }
    }

    /// Somebody should look at this.
    pub(super) fn alert(&self, text: String) {
        let mut inner = self.lock();
        if inner.alerts.len() == ALERTS_MAX {
            inner.alerts.pop_front();
        }
        inner.alerts.push_back((boot_now(), text));
    }

    /// What became of the VMs of hosts that died.
    pub(super) fn restarts(&self, restarts: Vec<RestartView>) {
        self.lock().status.restarts = restarts;
    }

    /// No life could begin, or the last one failed.
    pub(super) fn failed(&self, reason: &str) {
        let mut inner = self.lock();
        inner.status.phase = "failed".into();
        inner.status.why = Some(reason.to_owned());
        inner.status.judges = false;
        inner.status.lease_ms = None;
        inner.at = boot_now();
    }

    /// This host has left the pool for good.
    pub(super) fn left(&self) {
        self.lock().left = true;
    }

    /// Whether it has; also if it never was of it.
    pub(super) fn has_left(&self) -> bool {
        let inner = self.lock();
        inner.left || inner.status.phase == "failed"
    }

    /// Show what there is to be seen now.
    pub(super) fn update(&self, seen: &Seen<'_>) {
        let now = boot_now();
        let status = seen.status(now);
        let mut inner = self.lock();
        let restarts = std::mem::take(&mut inner.status.restarts);
        inner.status = PoolStatus { restarts, ..status };
        inner.at = now;
    }
}

impl Seen<'_> {
    fn status(&self, now: Millis) -> PoolStatus {
        let machine = self.machine;
        let state = machine.state();
        let pool = state.map(|state| &state.value);
        let (phase, why) = match machine.phase() {
            Phase::Joining => ("joining", None),
            Phase::Member => ("member", None),
            Phase::Stopping { why } => ("stopping", Some(why.clone())),
            Phase::Stopped { why } => ("stopped", Some(why.clone())),
        };
        let gateway = self.setup.gateway.as_ref().map(|probe| {
            let status = probe.status();
            GatewayView {
                address: self
                    .setup
                    .pool
                    .gateway
                    .map(|address| address.to_string())
                    .unwrap_or_default(),
                age_ms: status
                    .age
                    .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
                failure: status.failure,
            }
        });
        let paths = machine.paths(now);
        let hosts = self.setup.pool.hosts.iter().map(|host| {
            let id = HostId(host.id);
            let found = paths.get(&id).map(Vec::as_slice).unwrap_or_default();
            self.host(&host.name, id, pool, found)
        });
        PoolStatus {
            host: self.setup.host.clone(),
            id: self.setup.id.0,
            incarnation: self.incarnation.0,
            phase: phase.into(),
            why,
            judges: *machine.phase() == Phase::Member
                && machine.may_give_up()
                && self.listening.may_judge(now),
            lease_ms: machine.lease_until().map(|until| until.since(now).0),
            watchdog: self
                .watchdog
                .map_or_else(WatchdogView::default, HostWatchdog::view),
            gateway,
            keys: keys_view(&super::lock(&self.setup.keys)),
            registry_age_ms: machine.read_age(now).map(|age| age.0),
            registry_error: self.registry_error.map(str::to_owned),
            state_version: state.map(|state| state.version),
            term: pool.map_or(0, |pool| pool.term),
            coordinator: pool
                .and_then(|pool| pool.coordinator)
                .and_then(|coordinator| self.setup.pool.host_by_id(coordinator.host))
                .map(|host| host.name.clone()),
            hosts: hosts.collect(),
            decisions: pool.map(decisions).unwrap_or_default(),
            restarts: Vec::new(),
            alerts: Vec::new(),
            age_ms: 0,
        }
    }

    fn host(
        &self,
        name: &HostName,
        id: HostId,
        pool: Option<&PoolState>,
        found: &[(Path, PathVerdict, Millis)],
    ) -> PoolHostView {
        let member = pool.and_then(|pool| pool.members.get(&id));
        let standing = match member.map(|member| member.standing) {
            None => "unknown",
            Some(Standing::In) => "in",
            Some(Standing::Ousted) => "ousted",
            Some(Standing::Dead(_)) => "dead",
            Some(Standing::Away) => "away",
        };
        let proof = member.and_then(|member| match member.standing {
            Standing::Dead(proof) => Some(proof.to_string()),
            _ => None,
        });
        let is_self = id == self.setup.id;
        let report = self.machine.report_of(id).map(|report| self.report(report));
        PoolHostView {
            name: name.clone(),
            id: id.0,
            standing: standing.into(),
            proof,
            votes: pool
                .zip(member)
                .is_some_and(|(pool, member)| pool.is_voter(id, member.incarnation)),
            unbound: member.is_some_and(|member| member.unbound.is_some()),
            incarnation: member.map(|member| member.incarnation.0),
            is_self,
            paths: if is_self {
                Vec::new()
            } else {
                self.paths(name, found)
            },
            report,
        }
    }

    /// Every path that there should be, heard or not.
    fn paths(&self, name: &HostName, found: &[(Path, PathVerdict, Millis)]) -> Vec<PathView> {
        let disks = self
            .setup
            .statefile
            .as_ref()
            .map_or(0, |options| options.disks.len());
        let disks = (0..disks).filter_map(|disk| u8::try_from(disk).ok());
        let own = &self.transport.networks;
        let both = |path: &&crate::beat::PathStatus| {
            path.peer == *name && own.iter().any(|network| network.network == path.network)
        };
        let networks = self.transport.paths.iter().filter(both);
        let networks = networks.map(|path| path.network.0);
        let all = networks.map(Path::Network).chain(disks.map(Path::Storage));
        all.map(|path| {
            let known = found.iter().find(|(at, ..)| *at == path);
            PathView {
                path: self.path_name(path),
                verdict: match known.map(|(_, verdict, _)| verdict) {
                    Some(PathVerdict::Healthy) => "healthy",
                    Some(PathVerdict::Suspect) => "suspect",
                    Some(PathVerdict::Lost) | None => "lost",
                }
                .into(),
                age_ms: known.map(|(_, _, age)| age.0),
            }
        })
        .collect()
    }

    fn path_name(&self, path: Path) -> String {
        match path {
            Path::Network(index) => {
                let name = self.setup.pool.networks.get(usize::from(index));
                name.cloned().unwrap_or_else(|| format!("network {index}"))
            }
            Path::Storage(disk) => format!("statefile disk {disk}"),
        }
    }

    fn report(&self, report: &Report) -> ReportView {
        let hears = report.heard.iter().filter(|(_, heard)| {
            let lost = self.setup.pool.timing.network_lost_ms;
            heard.ages.values().any(|age| age.0 < lost)
        });
        ReportView {
            incarnation: report.incarnation.0,
            seq: report.seq.0,
            hears: hears
                .map(|(host, _)| {
                    let known = self.setup.pool.host_by_id(*host);
                    known.map_or_else(|| host.to_string(), |host| host.name.to_string())
                })
                .collect(),
            gateway_age_ms: report.gateway_age.map(|age| age.0),
            registry_age_ms: report.registry.age.map(|age| age.0),
            storage_ok: report.storage_ok,
            standby_lag_ms: report.standby_lag.map(|lag| lag.0),
            weight: report.weight,
            watchdog_ms: report.watchdog.map(|timeout| timeout.0),
            farewell: report.farewell,
        }
    }
}

fn keys_view(keys: &PoolKeys) -> KeysView {
    let mut accepts: Vec<u32> = keys.digests().iter().map(|(number, _)| number.0).collect();
    accepts.sort_unstable();
    KeysView {
        sends: keys.present().0,
        accepts,
    }
}

fn decisions(pool: &PoolState) -> Vec<DecisionView> {
    let view = |decision: &crate::ha::state::Decision| DecisionView {
        number: decision.number,
        by: pool.name(decision.by),
        about: pool.name(decision.about),
        what: decision.what.clone(),
        cause: decision.cause.clone(),
    };
    pool.decisions.iter().map(view).collect()
}
