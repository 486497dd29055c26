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
        };
        value.members.insert(HostId(host), member);
    }
    value.admit();
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

fn goes_on_by(hosts: u8, reports: &[Report]) -> Option<u64> {
    let mut pact = Pact::default();
    reports.iter().for_each(|report| pact.heard(report));
    let state = state(hosts);
    let heard = reports.iter().map(|report| (report.host, report)).collect();
    let own = Own {
        me: ME,
        timing: &Timing::DEFAULT,
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
    pact.heard(&report(2, 5, 50, true, &[]));
    let mut next = report(2, 1, 0, false, &[]);
    next.incarnation = Incarnation(2);
    pact.heard(&next);
    pact.heard(&report(2, 4, 50, false, &[]));
    pact.follow(&state.value);
    assert_eq!(pact.promised(&state), [HostId(2)].into());
    // But not when it is no voter any more.
    let mut gone = state.clone();
    gone.value.voters.remove(&HostId(2));
    pact.follow(&gone.value);
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
        state: &state,
        heard: &heard,
    };
    pact.promise(own, Millis(10_000), false, |seq| Some(Millis(seq.0 * 500)));
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
    pact.acknowledged(ME, &heard, |seq| Some(Millis(seq.0 * 500)));
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
            state: &state,
            heard: &heard,
        };
        pact.promise(own, Millis(10_000), false, |seq| Some(Millis(seq.0 * 500)));
        assert!(!pact.promises() && !pact.binds());
    }
}
