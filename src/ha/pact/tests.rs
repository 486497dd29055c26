use super::*;
use crate::ha::report::{Heard, RegistryView};
use crate::ha::state::{Member, Standing};
use crate::pool::HostName;

const ME: (HostId, Incarnation) = (HostId(0), Incarnation(1));
const V: u64 = 9;

/// `n` members, all voters, at version [`V`].
fn state(n: u8) -> Versioned<PoolState> {
    let mut value = PoolState::default();
    for host in 0..n {
        let member = Member {
            name: HostName::new(format!("h{host}")).unwrap(),
            incarnation: Incarnation(1),
            standing: Standing::In,
            former: None,
            watchdog: None,
            unbound: None,
        };
        value.members.insert(HostId(host), member);
    }
    value.admit(|_, _| true);
    Versioned { version: V, value }
}

/// Host `host` says its `seq`, has heard `mine` of this host, and a promise of each of `promised`.
fn report(host: u8, seq: u64, mine: u64, promise: bool, promised: &[u8]) -> Report {
    let heard = Heard {
        incarnation: ME.1,
        seq: Seq(mine),
        ages: BTreeMap::new(),
    };
    Report {
        host: HostId(host),
        incarnation: Incarnation(1),
        seq: Seq(seq),
        heard: BTreeMap::from([(ME.0, heard)]),
        gateway_age: None,
        registry: RegistryView {
            version: V,
            promise,
            promised: promised.iter().map(|n| HostId(*n)).collect(),
            ..RegistryView::default()
        },
        storage_ok: true,
        standby_lag: None,
        weight: 0,
        watchdog: None,
        farewell: false,
    }
}

/// When an own report was sent.
fn sent(seq: Seq) -> Option<Millis> {
    Some(Millis(seq.0 * 500))
}

fn hear(pact: &mut Pact, report: &Report) {
    pact.heard(ME, &Timing::DEFAULT, report, sent);
}

fn goes_on_by(hosts: u8, reports: &[Report]) -> Option<u64> {
    let mut pact = Pact::default();
    reports.iter().for_each(|report| hear(&mut pact, report));
    let state = state(hosts);
    let heard = reports.iter().map(|report| (report.host, report)).collect();
    let own = Own {
        me: ME,
        timing: &Timing::DEFAULT,
        power_fencing: false,
        state: &state,
        heard: &heard,
    };
    pact.goes_on_by(own, Seq(100)).map(|seq| seq.0)
}

#[test]
fn the_oldest_word_counts_and_each_voter_has_to_say_one() {
    let (b, c) = (report(1, 5, 90, false, &[]), report(2, 5, 80, false, &[]));
    assert_eq!(goes_on_by(3, &[b.clone(), c.clone()]), Some(80));
    assert_eq!(goes_on_by(3, std::slice::from_ref(&b)), None);
    let mut newer = c.clone();
    newer.registry.version = V + 1;
    assert_eq!(goes_on_by(3, &[b.clone(), newer]), None);
    let mut doubts = c;
    doubts.registry.version = u64::MAX;
    assert_eq!(goes_on_by(3, &[b, doubts]), None);
}

#[test]
fn a_majority_speaks_for_a_silent_voter_that_promised() {
    // Host 2 promised, said last that it had heard report 50, and is silent.
    let dead = report(2, 5, 50, true, &[]);
    let b = |promised: &[u8]| report(1, 9, 90, true, promised);
    assert_eq!(goes_on_by(3, &[b(&[2]), dead.clone()]), Some(90));
    // Its own word is old, and nobody speaks for it.
    assert_eq!(goes_on_by(3, &[b(&[]), dead.clone()]), Some(50));
    // This host alone does not speak for it; nor is half of four a majority.
    let broken = report(2, 6, 50, false, &[]);
    assert_eq!(goes_on_by(3, &[b(&[2]), broken]), Some(50));
    let fourth = |promised: &[u8]| report(3, 9, 70, true, promised);
    assert_eq!(
        goes_on_by(4, &[b(&[2]), dead.clone(), fourth(&[])]),
        Some(50)
    );
    assert_eq!(
        goes_on_by(4, &[b(&[2]), dead.clone(), fourth(&[2])]),
        Some(70)
    );
    // Who speaks for it is at the same version.
    let mut older = b(&[2]);
    older.registry.version = V - 1;
    assert_eq!(goes_on_by(3, &[older, dead]), Some(50));
}

#[test]
fn who_said_farewell_has_no_word_but_its_promise_lasts() {
    let farewell = |mut report: Report| {
        report.farewell = true;
        report
    };
    let left = farewell(report(2, 5, 95, true, &[1]));
    let b = |promised: &[u8]| report(1, 9, 90, true, promised);
    assert_eq!(goes_on_by(3, &[b(&[2]), left.clone()]), Some(90));
    assert_eq!(goes_on_by(3, &[b(&[]), left.clone()]), None);
    // Nor does it speak for another.
    let dead = report(1, 9, 50, true, &[2]);
    assert_eq!(goes_on_by(3, &[dead, left]), Some(50));
}

#[test]
fn the_word_of_a_life_outlives_its_next_life() {
    let mut pact = Pact::default();
    let state = state(3);
    hear(&mut pact, &report(2, 5, 50, true, &[]));
    let mut next = report(2, 1, 0, false, &[]);
    next.incarnation = Incarnation(2);
    hear(&mut pact, &next);
    hear(&mut pact, &report(2, 4, 50, false, &[]));
    pact.follow(ME, &state.value);
    assert_eq!(pact.promised(&state), [HostId(2)].into());
    // But not when it is no voter any more.
    let mut gone = state.clone();
    gone.value.voters.remove(&HostId(2));
    pact.follow(ME, &gone.value);
    assert_eq!(pact.words.len(), 1);
}

/// This host promised at 10 s, in its report 20, and last was heard by a majority then.
fn promised() -> (Pact, Versioned<PoolState>) {
    let (mut pact, state) = (Pact::default(), state(3));
    let b = report(1, 9, 20, false, &[]);
    let heard = BTreeMap::from([(HostId(1), &b)]);
    let own = Own {
        me: ME,
        timing: &Timing::DEFAULT,
        power_fencing: false,
        state: &state,
        heard: &heard,
    };
    pact.promise(own, Millis(10_000), false, sent);
    assert!(pact.promises() && pact.binds());
    (pact, state)
}

#[test]
fn who_promised_and_is_heard_by_no_majority_stops_for_good() {
    let timing = Timing::DEFAULT;
    let (mut pact, _) = promised();
    assert!(pact.is_kept(&timing, Millis(14_999)));
    assert!(!pact.clone().is_kept(&timing, Millis(15_000)));
    // Also if it looks only long afterwards, when the promise would be over.
    assert!(!pact.clone().is_kept(&timing, Millis(90_000)));
    // Heard in time by one more of three, which is a majority: it is free when the promise ends.
    let b = report(1, 11, 22, false, &[]);
    let heard = BTreeMap::from([(HostId(1), &b)]);
    pact.acknowledged(ME, &heard, sent);
    assert!(pact.is_kept(&timing, Millis(15_499)) && pact.binds());
    assert!(pact.is_kept(&timing, Millis(15_500)) && !pact.binds());
}

#[test]
fn one_that_is_heard_by_no_majority_or_is_one_of_two_promises_nothing() {
    let heard_late = report(1, 9, 9, false, &[]);
    for (hosts, b) in [(3, heard_late), (2, report(1, 9, 20, false, &[]))] {
        let (mut pact, state) = (Pact::default(), state(hosts));
        let heard = BTreeMap::from([(HostId(1), &b)]);
        let own = Own {
            me: ME,
            timing: &Timing::DEFAULT,
            power_fencing: false,
            state: &state,
            heard: &heard,
        };
        pact.promise(own, Millis(10_000), false, sent);
        assert!(!pact.promises() && !pact.binds());
    }
}

/// What this host, one of two that can be switched off, knows with these reports heard.
fn of_two<T>(reports: &[&Report], check: impl FnOnce(Own<'_>) -> T) -> T {
    let state = state(2);
    let heard = reports.iter().map(|report| (report.host, *report));
    check(Own {
        me: ME,
        timing: &Timing::DEFAULT,
        power_fencing: true,
        state: &state,
        heard: &heard.collect(),
    })
}

const OTHER: (HostId, Incarnation) = (HostId(1), Incarnation(1));

#[test]
fn the_promise_of_the_other_of_two_counts_from_the_own_report_that_it_had_heard() {
    let mut pact = Pact::default();
    // It had heard report 20, sent at 10 s; its clock may be 2 % fast.
    let promise = report(1, 9, 20, true, &[]);
    let until = Millis(10_000 + 30_000 * 98 / 100);
    hear(&mut pact, &promise);
    assert_eq!(of_two(&[&promise], |own| pact.pledged(own)), Some(until));
    // A later report that promises nothing takes nothing back; nor does one that came late.
    hear(&mut pact, &report(1, 10, 22, false, &[]));
    hear(&mut pact, &report(1, 8, 18, true, &[]));
    assert_eq!(of_two(&[&promise], |own| pact.pledged(own)), Some(until));
    // It is worth nothing at another version, or where another may act as well.
    let mut newer = state(2);
    newer.version = V + 1;
    let heard = BTreeMap::new();
    let own = Own {
        me: ME,
        timing: &Timing::DEFAULT,
        power_fencing: true,
        state: &newer,
        heard: &heard,
    };
    assert_eq!(pact.pledged(own), None);
    let three = state(3);
    assert_eq!(
        pact.pledged(Own {
            state: &three,
            ..own
        }),
        None
    );
}

#[test]
fn of_two_one_goes_on_once_the_others_power_is_off_before_its_promise_ends() {
    let promise = report(1, 9, 20, true, &[]);
    let goes_on = |off_at: u64, version: u64| {
        let mut pact = Pact::default();
        hear(&mut pact, &promise);
        let known = of_two(&[&promise], |own| {
            let state = Versioned {
                version,
                ..own.state.clone()
            };
            let own = Own {
                state: &state,
                ..own
            };
            pact.is_over(OTHER, Some(Proof::PowerOff), Some(own), Millis(off_at));
            pact.proofs()
        });
        assert_eq!(known, [(OTHER, Proof::PowerOff)].into());
        of_two(&[&promise], |own| pact.goes_on_by(own, Seq(100)))
    };
    assert_eq!(goes_on(39_399, V), Some(Seq(100)));
    // Its own old word is all that there is else.
    assert_eq!(goes_on(39_400, V), Some(Seq(20)));
    assert_eq!(goes_on(20_000, V + 1), Some(Seq(20)));
}

#[test]
fn the_promise_of_one_of_two_stops_nobody_and_ends_with_the_other() {
    let timing = Timing::DEFAULT;
    let b = report(1, 9, 20, false, &[]);
    let mut pact = Pact::default();
    of_two(&[&b], |own| pact.promise(own, Millis(10_000), false, sent));
    assert!(pact.promises() && pact.binds() && pact.binds_of_two());
    assert!(pact.hides(V + 1) && !pact.hides(V));
    assert!(pact.is_kept(&timing, Millis(39_999)) && pact.binds());
    let mut over = pact.clone();
    of_two(&[&b], |own| {
        over.is_over(OTHER, None, Some(own), Millis(20_000))
    });
    assert!(!over.binds());
    // And nothing is promised to one that is over, or by one that stops.
    of_two(&[&b], |own| over.promise(own, Millis(20_500), false, sent));
    assert!(!over.promises() && !over.binds());
    let mut given_up = pact.clone();
    let mut ousted = state(2);
    ousted.value.become_standing(ME.0, Standing::Ousted);
    given_up.follow(ME, &ousted.value);
    assert!(!given_up.binds());
    assert!(pact.is_kept(&timing, Millis(40_000)) && !pact.binds());
    of_two(&[&b], |own| pact.promise(own, Millis(41_000), true, sent));
    assert!(!pact.promises() && !pact.binds());
}
