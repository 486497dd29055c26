//! What the coordinator decides: who is ousted, whose death is proved, who is to coordinate.
//!
//! Pure functions of one view; the machine carries out what comes of them. First comes the
//! write, by compare-and-set of the state that the view was made of; fencing, and the leave to
//! restart VMs, follow only from a state that is committed.
//!
//! The first proof counts: a confirmed power-off, the host's own farewell in that life, or the
//! watchdog bound, for a host that had reported an armed watchdog. Without any of them nothing
//! is restarted, and somebody is told.

use super::detector::Contacts;
use super::liveset::{Verdict, judge};
use super::machine::Config;
use super::report::{IN_DOUBT, Path, Report};
use super::sabotage::{Bug, sabotaged};
use super::state::{Coordinator, PoolState, Proof, Standing};
use super::time::Millis;
use crate::pool::{HostId, Incarnation};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// How the giving up of one life of a host goes on, as this host knows.
#[derive(Clone, Copy, Debug)]
struct Ousting {
    /// When it was first seen here, at its commit or later, that this life is given up and has a
    /// lease as usual, or is given up.
    since: Millis,
    /// It has no lease that could be waited out.
    unbound: bool,
    /// Not before then a fence agent is asked (again); `None` while one is at work.
    ask_from: Option<Millis>,
    /// By what it is certain that it runs nothing any more.
    proof: Option<Proof>,
    alerted: bool,
}

/// All of them, and how long members have been missed.
#[derive(Clone, Debug, Default)]
pub(super) struct Oustings {
    lives: BTreeMap<(HostId, Incarnation), Ousting>,
    /// Since when this host would have given a member up.
    missed: BTreeMap<HostId, Millis>,
    /// Since when there is no coordinator.
    leaderless: Option<Millis>,
    /// Since when these are to be admitted, or taken from the voters.
    unadmitted: Option<(Millis, usize)>,
}

impl Oustings {
    /// A committed state was seen at `now`; of these lives the death can be proved.
    pub(super) fn follow(
        &mut self,
        now: Millis,
        state: &PoolState,
        proofs: &BTreeMap<(HostId, Incarnation), Proof>,
    ) {
        let ousted: BTreeMap<_, _> = state
            .members
            .iter()
            .filter(|(_, member)| member.standing == Standing::Ousted)
            .map(|(host, member)| ((*host, member.incarnation), member.unbound.is_some()))
            .collect();
        self.lives.retain(|life, _| ousted.contains_key(life));
        for (life, unbound) in ousted {
            let ousting = self.lives.entry(life).or_insert(Ousting {
                since: now,
                unbound,
                ask_from: Some(now),
                proof: proofs.get(&life).copied(),
                alerted: false,
            });
            if std::mem::replace(&mut ousting.unbound, unbound) {
                ousting.since = now;
            }
        }
    }

    /// What became of a fence agent's work.
    pub(super) fn fenced(
        &mut self,
        now: Millis,
        host: HostId,
        incarnation: Incarnation,
        confirmed: bool,
    ) {
        if let Some(ousting) = self.lives.get_mut(&(host, incarnation)) {
            if confirmed {
                ousting.proof = Some(Proof::PowerOff);
            }
            ousting.ask_from = Some(now + FENCE_AGAIN);
        }
    }

    /// The death of a life is proved otherwise.
    pub(super) fn proved(&mut self, life: (HostId, Incarnation), proof: Proof) {
        if let Some(ousting) = self.lives.get_mut(&life) {
            ousting.proof.get_or_insert(proof);
        }
    }

    /// Whether it is time to admit: many that join together are admitted with one write.
    fn is_time_to_admit(&mut self, view: &View<'_>, wait: Millis) -> bool {
        if view.state.is_admitted(|host, life| view.hears(host, life)) {
            self.unadmitted = None;
            return false;
        }
        let members = view.state.members_in().count();
        match self.unadmitted {
            Some((since, then)) if then == members => view.now.since(since) >= wait,
            _ => {
                self.unadmitted = Some((view.now, members));
                false
            }
        }
    }

    /// For how long `host` has been missed, if it is `missing` now.
    fn missed_for(&mut self, host: HostId, missing: bool, now: Millis) -> Millis {
        if !missing {
            self.missed.remove(&host);
            return Millis(0);
        }
        now.since(*self.missed.entry(host).or_insert(now))
    }
}

/// A fence agent that failed is asked again after this time: it had its own deadline, and its
/// device may be restarting.
pub(super) const FENCE_AGAIN: Millis = Millis(10_000);

/// What a decision rests on.
pub(super) struct View<'a> {
    pub(super) now: Millis,
    pub(super) config: &'a Config,
    /// The state, read a moment ago.
    pub(super) state: &'a PoolState,
    /// Of this host and of all that it hears.
    pub(super) reports: &'a BTreeMap<HostId, &'a Report>,
    /// How long ago each came.
    pub(super) ages: BTreeMap<HostId, Millis>,
    pub(super) contacts: &'a Contacts,
    /// Whether this host may oust others, and admit who joined.
    pub(super) may_give_up: bool,
    /// Whether it votes, or a voter has seen it join.
    pub(super) is_seen: bool,
}

impl View<'_> {
    fn hears(&self, host: HostId, life: Incarnation) -> bool {
        let report = self.reports.get(&host);
        report.is_some_and(|report| report.incarnation == life)
    }
}

/// What follows.
#[derive(Debug, Default)]
pub(super) struct Decided {
    /// The next state; nothing else is to be done before it is committed.
    pub(super) write: Option<PoolState>,
    /// Lives to fence.
    pub(super) fence: Vec<(HostId, Incarnation)>,
    /// Lives whose VMs may be restarted.
    pub(super) may_restart: Vec<(HostId, Incarnation, Proof)>,
    /// To be told to somebody.
    pub(super) alerts: Vec<String>,
}

/// Make this host the coordinator.
pub(super) fn take_over(state: &mut PoolState, config: &Config, cause: &str) {
    state.term += 1;
    state.coordinator = Some(Coordinator {
        host: config.me,
        incarnation: config.incarnation,
    });
    state.decide(config.me, config.me, "coordinates", cause);
}

/// Decide by this view. Whatever is written admits who joined and is heard, if this host may.
pub(super) fn decide(view: &View<'_>, oustings: &mut Oustings) -> Decided {
    let mut decided = judged(view, oustings);
    if let Some(next) = decided.write.as_mut().filter(|_| view.may_give_up) {
        next.admit(|host, life| view.hears(host, life));
    }
    decided
}

fn judged(view: &View<'_>, oustings: &mut Oustings) -> Decided {
    let verdicts = judge(&view.config.timing, view.state, view.reports, &view.ages);
    let me = view.config.me;
    if verdicts.get(&me) != Some(&Verdict::Stays) {
        // The others are the better side.
        return Decided::default();
    }
    // Counted also by one that does not coordinate yet, or its waiting would begin anew once it does.
    for (host, verdict) in &verdicts {
        oustings.missed_for(*host, *verdict != Verdict::Stays, view.now);
    }
    match view.state.coordinator {
        Some(c) if c.host == me && c.incarnation == view.config.incarnation => {
            oustings.leaderless = None;
            coordinate(view, &verdicts, oustings)
        }
        Some(c)
            if view.state.is_in(c.host, c.incarnation)
                && is_able(view, &verdicts, c.host)
                && is_entitled(view, &verdicts, c) =>
        {
            oustings.leaderless = None;
            if sabotaged(Bug::AnybodyDecides) {
                return coordinate(view, &verdicts, oustings);
            }
            Decided::default()
        }
        _ => elect(view, &verdicts, oustings),
    }
}

/// Whether another coordinator can do its work: it stays, runs, and reads the registry. One
/// that is heard by others only is left to them.
fn is_able(view: &View<'_>, verdicts: &BTreeMap<HostId, Verdict>, host: HostId) -> bool {
    let able = |report: &&Report| {
        let age = report.registry.age;
        !report.farewell && age.is_some_and(|age| age < view.config.timing.lease)
    };
    verdicts.get(&host) == Some(&Verdict::Stays) && view.reports.get(&host).is_none_or(able)
}

/// Whether a coordinator is a voter, or no voter that could take its place is heard.
fn is_entitled(
    view: &View<'_>,
    verdicts: &BTreeMap<HostId, Verdict>,
    coordinator: Coordinator,
) -> bool {
    let state = view.state;
    state.is_voter(coordinator.host, coordinator.incarnation)
        || state.is_orphaned()
        || !view
            .reports
            .keys()
            .any(|host| is_fit(view, verdicts, *host) && votes(view, *host))
}

fn votes(view: &View<'_>, host: HostId) -> bool {
    let life = view.reports.get(&host).map(|report| report.incarnation);
    life.is_some_and(|life| view.state.is_voter(host, life))
}

/// Whether a host could coordinate.
fn is_fit(view: &View<'_>, verdicts: &BTreeMap<HostId, Verdict>, host: HostId) -> bool {
    let fit = |report: &&Report| {
        let age = report.registry.age;
        !report.farewell && age.is_some_and(|age| age < view.config.timing.network_lost)
    };
    verdicts.get(&host) == Some(&Verdict::Stays) && view.reports.get(&host).is_some_and(fit)
}

fn reaches_gateway(view: &View<'_>) -> bool {
    let own = view.reports.get(&view.config.me);
    own.is_some_and(|own| own.reaches_gateway(view.config.timing.network_lost))
}

/// How long this host lets others be first.
fn hesitation(view: &View<'_>, verdicts: &BTreeMap<HostId, Verdict>) -> Millis {
    let timing = &view.config.timing;
    let yields = if matters_less(view, verdicts) {
        timing.yielding()
    } else {
        Millis(0)
    };
    if reaches_gateway(view) {
        yields
    } else {
        timing.hesitation + yields
    }
}

/// Whether those that are lost, if they live, are a side that matters more to the VMs: its standbys are
/// fresher, by whole periods; then its VMs are heavier; then its lowest number is lower. Asked
/// only where nothing ever came through storage: else sides that live see each other there, and
/// all stay.
fn matters_less(view: &View<'_>, verdicts: &BTreeMap<HostId, Verdict>) -> bool {
    let lost = verdicts
        .iter()
        .filter(|(_, v)| matches!(v, Verdict::Lost(_)));
    let lost = lost.filter_map(|(host, _)| view.contacts.get(*host));
    let lost: Vec<_> = lost.collect();
    let paths = lost.iter().flat_map(|contact| contact.paths.keys());
    if paths
        .into_iter()
        .any(|path| matches!(path, Path::Storage(_)))
    {
        return false;
    }
    let mine = view.reports.iter();
    let mine = mine.filter(|(host, _)| verdicts.get(host) == Some(&Verdict::Stays));
    let period = view.config.timing.period.0;
    let theirs = lost.iter().map(|contact| &contact.report);
    side_matters(theirs, period) < side_matters(mine.map(|(_, report)| *report), period)
}

/// How fresh, how heavy, and which number: the least matters most.
fn side_matters<'r>(
    side: impl Iterator<Item = &'r Report> + Clone,
    period: u64,
) -> (u64, Reverse<u64>, HostId) {
    let lag = |report: &Report| report.standby_lag.map_or(u64::MAX, |lag| lag.0 / period);
    let weights = side.clone().map(|report| u64::from(report.weight));
    let numbers = side.clone().map(|report| report.host);
    (
        side.map(lag).min().unwrap_or(u64::MAX),
        Reverse(weights.sum()),
        numbers.min().unwrap_or(HostId(u8::MAX)),
    )
}

/// Who coordinates first, the least of all: a voter; on the side of the clients; with the
/// freshest standbys; with the heaviest VMs; and only last by its number.
fn preference(view: &View<'_>, host: HostId) -> impl Ord + use<> {
    let report = view.reports.get(&host);
    let gateway = report.is_some_and(|r| r.reaches_gateway(view.config.timing.network_lost));
    let lag = report.and_then(|report| report.standby_lag);
    (
        !votes(view, host),
        !gateway,
        lag.unwrap_or(Millis(u64::MAX)),
        Reverse(report.map_or(0, |report| report.weight)),
        host,
    )
}

/// No coordinator is heard: the best host that stays and reaches the registry becomes it.
fn elect(
    view: &View<'_>,
    verdicts: &BTreeMap<HostId, Verdict>,
    oustings: &mut Oustings,
) -> Decided {
    let since = *oustings.leaderless.get_or_insert(view.now);
    let fit = view.reports.keys().copied();
    let mut fit: Vec<HostId> = fit.filter(|host| is_fit(view, verdicts, *host)).collect();
    fit.sort_by_key(|host| preference(view, *host));
    let before = view.state.coordinator.map(|c| c.host);
    // One that is heard may have the registry back by now and have had no report since.
    let stays = before.is_some_and(|host| verdicts.get(&host) == Some(&Verdict::Stays));
    let wait = Millis(if stays {
        view.config.timing.period.0 * 2
    } else {
        0
    });
    let wait = wait.max(hesitation(view, verdicts));
    // A coordinator that lives, and does not hear this host, has given it up by then.
    let wait = if view.is_seen {
        wait
    } else {
        wait.max(view.config.timing.lease)
    };
    if fit.first() != Some(&view.config.me) || view.now.since(since) < wait {
        return Decided::default();
    }
    let cause = match before {
        Some(host) => match verdicts.get(&host) {
            Some(Verdict::Lost(why) | Verdict::Goes(why)) => {
                format!("coordinator {} is gone: {why}", view.state.name(host))
            }
            _ => format!(
                "coordinator {} is no member any more, does not reach the registry, or may not decide",
                view.state.name(host)
            ),
        },
        None => "there is no coordinator".to_owned(),
    };
    let mut next = view.state.clone();
    take_over(&mut next, view.config, &cause);
    Decided {
        write: Some(next),
        ..Decided::default()
    }
}

fn coordinate(
    view: &View<'_>,
    verdicts: &BTreeMap<HostId, Verdict>,
    oustings: &mut Oustings,
) -> Decided {
    let mut next = view.state.clone();
    let wait = Millis(view.config.timing.period.0 * 2);
    let admits = view.may_give_up && oustings.is_time_to_admit(view, wait);
    let changes = [
        admits,
        bind(view, &mut next),
        oust(view, verdicts, oustings, &mut next),
        prove(view, oustings, &mut next),
    ];
    if changes.contains(&true) {
        return Decided {
            write: Some(next),
            ..Decided::default()
        };
    }
    let mut decided = Decided::default();
    for ((host, incarnation), ousting) in &mut oustings.lives {
        let now = ousting.ask_from.is_some_and(|from| from <= view.now);
        // Its next life would be hit, which says itself that this one is over, once it has joined.
        let reborn = view.contacts.get(*host).is_some_and(|contact| {
            let life = contact.report.incarnation;
            life > *incarnation && view.contacts.is_heard(*host, life, view.now)
        });
        if view.config.power_fencing && now && ousting.proof.is_none() && !reborn {
            ousting.ask_from = None;
            decided.fence.push((*host, *incarnation));
        }
        if !view.config.power_fencing && bound(view.state, *host).is_none() && !ousting.alerted {
            ousting.alerted = true;
            decided.alerts.push(format!(
                "{0} is given up, but nothing can prove that it runs nothing any more: it has no fence agent and had no watchdog. Its VMs stay down until it says so itself; or make certain that it is off, then say `pollux pool off {0}` on this host",
                view.state.name(*host)
            ));
        }
    }
    for (host, member) in &view.state.members {
        if let Standing::Dead(proof) = member.standing {
            decided.may_restart.push((*host, member.incarnation, proof));
        }
        if member.standing == Standing::Away {
            let said = (*host, member.incarnation, Proof::Farewell);
            decided.may_restart.push(said);
        }
        if let Some((incarnation, proof)) = member.former {
            decided.may_restart.push((*host, incarnation, proof));
        }
    }
    decided
}

fn oust(
    view: &View<'_>,
    verdicts: &BTreeMap<HostId, Verdict>,
    oustings: &mut Oustings,
    next: &mut PoolState,
) -> bool {
    let mut changed = false;
    let waits = hesitation(view, verdicts);
    for (host, verdict) in verdicts {
        let why = match verdict {
            Verdict::Stays => None,
            Verdict::Goes(why) | Verdict::Lost(why) => Some(why),
        };
        let missed = oustings.missed_for(*host, why.is_some(), view.now);
        let Some(why) = why.filter(|_| view.may_give_up && missed >= waits) else {
            continue;
        };
        if next.become_standing(*host, Standing::Ousted) {
            next.decide(view.config.me, *host, "ousted", why);
            changed = true;
        }
    }
    changed
}

/// Members that say that they know a state in which they are unbound have a lease as usual.
fn bind(view: &View<'_>, next: &mut PoolState) -> bool {
    let mut changed = false;
    for (host, report) in view.reports {
        let version = report.registry.version;
        changed |= version != IN_DOUBT && next.bind(*host, report.incarnation, version);
    }
    changed
}

/// The watchdog that the life of a lost host had said to be armed with when it joined, if it goes
/// by a lease.
fn bound(state: &PoolState, host: HostId) -> Option<Millis> {
    let member = state.members.get(&host)?;
    member.watchdog.filter(|_| member.unbound.is_none())
}

fn prove(view: &View<'_>, oustings: &Oustings, next: &mut PoolState) -> bool {
    let mut changed = false;
    for (host, member) in &view.state.members {
        let life = (*host, member.incarnation);
        // What is heard of its next life began with nothing running.
        let farewell = view.contacts.get(*host).is_some_and(|contact| {
            contact.report.incarnation > member.incarnation && !contact.report.registry.former
                || contact.report.incarnation == member.incarnation && contact.report.farewell
        });
        let (standing, what) = match member.standing {
            Standing::In if farewell => (Standing::Away, "away"),
            Standing::Ousted => {
                let Some(ousting) = oustings.lives.get(&life) else {
                    continue;
                };
                let watchdog = bound(view.state, *host);
                let run_out = watchdog.filter(|watchdog| {
                    let waits = view.config.timing.watchdog_bound(*watchdog);
                    view.now.since(ousting.since) >= waits
                });
                let proof = if farewell || sabotaged(Bug::SilenceIsDeath) {
                    Proof::Farewell
                } else if let Some(proof) = ousting.proof {
                    proof
                } else if let Some(watchdog) = run_out {
                    Proof::WatchdogBound { watchdog }
                } else {
                    continue;
                };
                (Standing::Dead(proof), "dead")
            }
            _ => continue,
        };
        if next.become_standing(*host, standing) {
            let cause = match standing {
                Standing::Dead(proof) => proof.to_string(),
                _ => Proof::Farewell.to_string(),
            };
            next.decide(view.config.me, *host, what, &cause);
            changed = true;
        }
    }
    changed
}
