//! From reports to who stays: a pure function, the same answer wherever the same reports are.
//!
//! 1. A member of which no report is here, and which no reporting member hears on any path, is
//!    **lost**.
//! 2. The reporting members fall into sides: two are on one side if they hear each other over
//!    a network, or through others that do.
//! 3. With one side everybody stays. With several that still see each other's reports through
//!    storage: if some reach the gateway and some do not, the hosts of those that do not **go**,
//!    for they can serve no client; else everybody stays, for contact through storage is
//!    contact.
//!
//! The loss of one network, of the statefile, of the gateway or of the registry makes nobody
//! go by itself.

use super::report::{Path, Report};
use super::state::PoolState;
use super::time::Millis;
use super::timing::Timing;
use crate::pool::HostId;
use std::collections::{BTreeMap, BTreeSet};

/// What is thought of a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It stays.
    Stays,
    /// It is heard, but can be of no use where it is. Holds who saw what.
    Goes(String),
    /// Nobody hears it. Holds who saw what.
    Lost(String),
}

/// Judge all members that are in. `reports` are those of this host and of the members that it
/// hears, none of them old; `ages`, how long ago each came, if not just now: what it tells of
/// others is older by that.
#[must_use]
pub fn judge(
    timing: &Timing,
    state: &PoolState,
    reports: &BTreeMap<HostId, &Report>,
    ages: &BTreeMap<HostId, Millis>,
) -> BTreeMap<HostId, Verdict> {
    let members: BTreeMap<_, _> = state.members_in().collect();
    let reporting: BTreeMap<HostId, &Report> = reports
        .iter()
        .filter(|(host, report)| {
            members
                .get(host)
                .is_some_and(|member| member.incarnation == report.incarnation)
        })
        .map(|(host, report)| (*host, *report))
        .collect();
    let sides = sides(timing, &reporting);
    let on_gateway = |side: &BTreeSet<HostId>| {
        side.iter()
            .any(|host| reporting[host].reaches_gateway(timing.network_lost))
    };
    let served = sides.len() > 1 && sides.iter().any(on_gateway);
    let mut verdicts = BTreeMap::new();
    for (host, member) in &members {
        if reporting.contains_key(host) {
            continue;
        }
        let heard_by = reporting.iter().find(|(by, report)| {
            let since = ages.get(by).copied().unwrap_or_default();
            report.heard.get(host).is_some_and(|heard| {
                heard.incarnation == member.incarnation
                    && heard
                        .ages
                        .iter()
                        .any(|(path, age)| fresh(timing, *path, *age + since))
            })
        });
        let verdict = match heard_by {
            Some(_) => Verdict::Stays,
            None => Verdict::Lost(format!(
                "no report of {} on any path; {} hear it on none either",
                member.name,
                names(state, reporting.keys())
            )),
        };
        verdicts.insert(*host, verdict);
    }
    for side in &sides {
        let goes = served && !on_gateway(side);
        for host in side {
            let verdict = if goes {
                let others = reporting.keys().filter(|other| !side.contains(other));
                Verdict::Goes(format!(
                    "{} hear no other host over a network and do not reach the gateway; {} are on the other side, which does",
                    names(state, side),
                    names(state, others)
                ))
            } else {
                Verdict::Stays
            };
            verdicts.insert(*host, verdict);
        }
    }
    verdicts
}

fn fresh(timing: &Timing, path: Path, age: Millis) -> bool {
    match path {
        Path::Network(_) => age < timing.network_lost,
        Path::Storage(_) => age < timing.storage_lost,
    }
}

fn names<'a>(state: &PoolState, hosts: impl IntoIterator<Item = &'a HostId>) -> String {
    let names: Vec<String> = hosts.into_iter().map(|host| state.name(*host)).collect();
    names.join(", ")
}

/// Reporting hosts that hear each other over a network, directly or through others.
fn sides(timing: &Timing, reporting: &BTreeMap<HostId, &Report>) -> Vec<BTreeSet<HostId>> {
    let hears = |a: HostId, b: HostId| {
        reporting[&a].heard.get(&b).is_some_and(|heard| {
            heard.incarnation == reporting[&b].incarnation
                && heard.ages.iter().any(|(path, age)| {
                    matches!(path, Path::Network(_)) && fresh(timing, *path, *age)
                })
        })
    };
    let mut sides = Vec::new();
    let mut left: BTreeSet<HostId> = reporting.keys().copied().collect();
    while let Some(first) = left.pop_first() {
        let mut side = BTreeSet::from([first]);
        let mut new = vec![first];
        while let Some(host) = new.pop() {
            let near: Vec<HostId> = left
                .iter()
                .copied()
                .filter(|other| hears(host, *other) && hears(*other, host))
                .collect();
            for other in near {
                left.remove(&other);
                side.insert(other);
                new.push(other);
            }
        }
        sides.push(side);
    }
    sides
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::report::{Heard, RegistryView};
    use crate::ha::state::{Member, Standing};
    use crate::pool::{HostName, Incarnation, Seq};
    use proptest::prelude::*;

    const NET: Path = Path::Network(0);
    const DISK: Path = Path::Storage(0);

    fn state(hosts: u8) -> PoolState {
        let member = |n: u8| Member {
            name: HostName::new(format!("h{n}")).unwrap(),
            incarnation: Incarnation(1),
            standing: Standing::In,
            former: None,
            watchdog: None,
            unbound: None,
        };
        PoolState {
            members: (0..hosts).map(|n| (HostId(n), member(n))).collect(),
            ..PoolState::default()
        }
    }

    /// A report of host `n`, which hears `others` as told.
    fn report(n: u8, gateway: bool, others: &[(u8, Path, u64)]) -> Report {
        let mut heard: BTreeMap<HostId, Heard> = BTreeMap::new();
        for (other, path, age) in others {
            heard
                .entry(HostId(*other))
                .or_insert_with(|| Heard {
                    incarnation: Incarnation(1),
                    seq: Seq(1),
                    ages: BTreeMap::new(),
                })
                .ages
                .insert(*path, Millis(*age));
        }
        Report {
            host: HostId(n),
            incarnation: Incarnation(1),
            seq: Seq(1),
            heard,
            gateway_age: gateway.then_some(Millis(100)),
            registry: RegistryView::default(),
            storage_ok: true,
            standby_lag: None,
            weight: 0,
            watchdog: None,
            farewell: false,
        }
    }

    fn judged(state: &PoolState, reports: &[Report]) -> BTreeMap<HostId, Verdict> {
        let reports = reports.iter().map(|report| (report.host, report)).collect();
        judge(&Timing::DEFAULT, state, &reports, &BTreeMap::new())
    }

    fn stay(verdicts: &BTreeMap<HostId, Verdict>) -> Vec<u8> {
        let stay = verdicts.iter().filter(|(_, v)| **v == Verdict::Stays);
        stay.map(|(host, _)| host.0).collect()
    }

    #[test]
    fn a_host_that_nobody_hears_is_lost_and_one_that_anybody_hears_is_not() {
        let state = state(3);
        let a = report(0, true, &[(1, NET, 100), (2, NET, 2000)]);
        let silent = judged(&state, &[a.clone(), report(1, true, &[(0, NET, 100)])]);
        assert_eq!(stay(&silent), [0, 1]);
        assert!(
            matches!(&silent[&HostId(2)], Verdict::Lost(why) if why.contains("h0, h1 hear it on none"))
        );
        let b = report(1, true, &[(0, NET, 100), (2, DISK, 2400)]);
        assert_eq!(stay(&judged(&state, &[a, b])), [0, 1, 2]);
    }

    #[test]
    fn what_a_report_tells_grows_old_with_it() {
        let state = state(3);
        let (a, b) = (
            report(0, true, &[(1, NET, 100)]),
            report(1, true, &[(0, NET, 100), (2, NET, 1600)]),
        );
        let reports = BTreeMap::from([(a.host, &a), (b.host, &b)]);
        for (age, stays) in [(0, true), (399, true), (400, false)] {
            let ages = BTreeMap::from([(b.host, Millis(age))]);
            let verdicts = judge(&Timing::DEFAULT, &state, &reports, &ages);
            assert_eq!(verdicts[&HostId(2)] == Verdict::Stays, stays, "{age}");
        }
    }

    #[test]
    fn a_dead_heartbeat_network_alone_makes_nobody_go() {
        let state = state(3);
        for gateway in [true, false] {
            let reports: Vec<Report> = (0..3)
                .map(|n| {
                    report(
                        n,
                        gateway,
                        &[((n + 1) % 3, DISK, 500), ((n + 2) % 3, DISK, 500)],
                    )
                })
                .collect();
            assert_eq!(stay(&judged(&state, &reports)), [0, 1, 2]);
        }
    }

    #[test]
    fn of_two_sides_the_one_that_reaches_the_gateway_stays_whatever_its_number() {
        let state = state(2);
        for good in [0, 1] {
            let reports = [
                report(0, good == 0, &[(1, DISK, 500)]),
                report(1, good == 1, &[(0, DISK, 500)]),
            ];
            let verdicts = judged(&state, &reports);
            assert_eq!(stay(&verdicts), [good]);
            assert!(
                matches!(&verdicts[&HostId(1 - good)], Verdict::Goes(why) if why.contains("gateway"))
            );
        }
    }

    #[test]
    fn a_lost_gateway_makes_nobody_go_while_the_hosts_hear_each_other() {
        let state = state(2);
        let reports = [
            report(0, true, &[(1, NET, 1)]),
            report(1, false, &[(0, NET, 1)]),
        ];
        assert_eq!(stay(&judged(&state, &reports)), [0, 1]);
    }

    #[test]
    fn hearing_in_one_direction_only_is_no_contact_over_the_network() {
        let state = state(2);
        let reports = [
            report(0, true, &[(1, NET, 1), (1, DISK, 1)]),
            report(1, false, &[(0, DISK, 1)]),
        ];
        assert_eq!(stay(&judged(&state, &reports)), [0]);
    }

    #[test]
    fn a_report_of_another_life_counts_for_nothing() {
        let state = state(2);
        let mut old = report(1, true, &[(0, NET, 1)]);
        old.incarnation = Incarnation(2);
        let verdicts = judged(&state, &[report(0, true, &[]), old]);
        assert_eq!(stay(&verdicts), [0]);
    }

    /// Six hosts whose networks and gateways work or not, all seen through storage.
    fn any_pool() -> impl Strategy<Value = Vec<Report>> {
        let host = |n: u8| {
            (any::<bool>(), proptest::collection::vec(any::<bool>(), 6)).prop_map(
                move |(gateway, nets)| {
                    let mut others = Vec::new();
                    for other in (0..6).filter(|other| *other != n) {
                        others.push((other, DISK, 100));
                        if nets[usize::from(other)] {
                            others.push((other, NET, 100));
                        }
                    }
                    report(n, gateway, &others)
                },
            )
        };
        (host(0), host(1), host(2), host(3), host(4), host(5))
            .prop_map(|(a, b, c, d, e, f)| vec![a, b, c, d, e, f])
    }

    proptest! {
        #[test]
        fn somebody_always_stays_and_nobody_goes_where_the_gateway_is_reached(pool in any_pool()) {
            let verdicts = judged(&state(6), &pool);
            prop_assert!(!stay(&verdicts).is_empty());
            for report in &pool {
                if report.gateway_age.is_some() {
                    prop_assert_eq!(&verdicts[&report.host], &Verdict::Stays);
                }
            }
        }

        #[test]
        fn numbers_of_hosts_decide_nothing(pool in any_pool(), shift in 1_u8..6) {
            let renumber = |host: HostId| HostId((host.0 + shift) % 6);
            let renumbered: Vec<Report> = pool
                .iter()
                .map(|report| Report {
                    host: renumber(report.host),
                    heard: report.heard.iter().map(|(host, heard)| (renumber(*host), heard.clone())).collect(),
                    ..report.clone()
                })
                .collect();
            let before: BTreeSet<u8> = stay(&judged(&state(6), &pool)).into_iter().map(|n| renumber(HostId(n)).0).collect();
            let after: BTreeSet<u8> = stay(&judged(&state(6), &renumbered)).into_iter().collect();
            prop_assert_eq!(before, after);
        }
    }
}
