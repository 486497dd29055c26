//! The standby against its promises: by scenario, and against inputs at random.

use super::*;
use crate::mirror::MAX_IN_FLIGHT;
use proptest::prelude::*;

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

const ATTEMPT: Generation = Generation(2);

fn standby() -> Standby {
    let config = StandbyConfig {
        me: host("b"),
        primary: host("a"),
        generation: ATTEMPT,
        timing: Timing::DEFAULT,
        max_in_flight: MAX_IN_FLIGHT,
    };
    Standby::new(config, Micros::ZERO)
}

fn record(owner: &str, generation: u64, standby: Option<&str>) -> Versioned<VmRecord> {
    let value = VmRecord {
        generation: Generation(generation),
        owner: host(owner),
        standby: standby.map(host),
        running: true,
    };
    Versioned { version: 3, value }
}

fn put(standby: &mut Standby, input: StandbyInput, ms: u64) -> Vec<StandbyAction> {
    standby.handle(input, Micros::from_millis(ms));
    std::iter::from_fn(|| standby.poll_action()).collect()
}

fn answer(
    standby: &mut Standby,
    actions: &[StandbyAction],
    outcome: ClaimOutcome,
    ms: u64,
) -> Vec<StandbyAction> {
    let ticket = actions.iter().find_map(|action| match action {
        StandbyAction::Claim { ticket, .. } | StandbyAction::ReadRecord { ticket } => Some(*ticket),
        _ => None,
    });
    let ticket = ticket.expect("an operation to answer");
    put(standby, StandbyInput::ClaimResult { ticket, outcome }, ms)
}

fn whole(epoch: u64) -> StandbyInput {
    StandbyInput::EpochWhole {
        generation: ATTEMPT,
        epoch: Epoch(epoch),
    }
}

/// Holds epoch 1, named in the record; the last acknowledgement is at 3 ms.
fn mirrored() -> Standby {
    let mut s = standby();
    put(&mut s, StandbyInput::ShellReady, 1);
    put(&mut s, whole(1), 3);
    put(&mut s, StandbyInput::Applied { epoch: Epoch(1) }, 4);
    let out = put(
        &mut s,
        StandbyInput::MirrorConfirmed {
            generation: ATTEMPT,
            epoch: Epoch(1),
        },
        5,
    );
    answer(
        &mut s,
        &out,
        ClaimOutcome::Lost(Some(record("a", 2, Some("b")))),
        6,
    );
    assert_eq!(s.status(Micros::ZERO).state, StandbyState::Mirrored);
    s
}

fn promotes(actions: &[StandbyAction]) -> bool {
    actions
        .iter()
        .any(|action| matches!(action, StandbyAction::Promote { .. }))
}

#[test]
fn only_whole_epochs_of_the_attempt_are_acknowledged() {
    let mut s = mirrored();
    let other = StandbyInput::EpochWhole {
        generation: Generation(1),
        epoch: Epoch(2),
    };
    assert!(put(&mut s, other, 7).is_empty());
    let out = put(&mut s, whole(2), 8);
    assert!(out.contains(&StandbyAction::Ack {
        generation: ATTEMPT,
        epoch: Epoch(2)
    }));
    let out = put(&mut s, whole(9), 9);
    assert!(
        matches!(
            out[..],
            [StandbyAction::Alert(Alert::PartnerConfused { .. })]
        ),
        "{out:?}"
    );
}

#[test]
fn a_standby_that_cannot_keep_up_acknowledges_later() {
    let mut s = mirrored();
    assert!(!put(&mut s, whole(2), 7).is_empty());
    put(&mut s, whole(3), 8);
    assert!(put(&mut s, whole(4), 9).is_empty());
    let out = put(&mut s, StandbyInput::Applied { epoch: Epoch(2) }, 10);
    assert!(
        out.contains(&StandbyAction::Ack {
            generation: ATTEMPT,
            epoch: Epoch(4)
        }),
        "{out:?}"
    );
}

#[test]
fn the_primary_gets_its_head_start_and_the_lease_runs_out_first() {
    let mut s = mirrored();
    assert!(put(&mut s, StandbyInput::PeerVerdict(Verdict::Lost), 20).is_empty());
    assert!(put(&mut s, StandbyInput::Tick, 59).is_empty());
    let out = put(&mut s, StandbyInput::Tick, 60);
    assert!(
        matches!(out[..], [StandbyAction::Claim { expected: 3, .. }]),
        "{out:?}"
    );
    assert!(
        put(&mut s, whole(2), 61).is_empty(),
        "a claimer acknowledges nothing"
    );
    let out = answer(&mut s, &out, ClaimOutcome::Won(record("b", 3, None)), 62);
    assert!(!promotes(&out));
    assert!(!promotes(&put(&mut s, StandbyInput::Tick, 142)));
    assert!(promotes(&put(&mut s, StandbyInput::Tick, 143)));
}

#[test]
fn a_hiccup_is_forgiven() {
    let mut s = mirrored();
    put(&mut s, StandbyInput::PeerVerdict(Verdict::Lost), 20);
    put(&mut s, StandbyInput::PeerVerdict(Verdict::Alive), 50);
    assert!(put(&mut s, StandbyInput::Tick, 70).is_empty());
}

#[test]
fn the_primary_s_own_word_needs_no_delay_but_the_claim() {
    let mut s = mirrored();
    let out = put(
        &mut s,
        StandbyInput::PrimaryGone {
            reason: String::new(),
        },
        10,
    );
    assert!(!promotes(&out));
    let out = answer(&mut s, &out, ClaimOutcome::Won(record("b", 3, None)), 12);
    assert!(promotes(&out));
}

#[test]
fn promotion_waits_for_the_last_epoch_to_be_applied() {
    let mut s = mirrored();
    put(&mut s, whole(2), 8);
    let out = put(
        &mut s,
        StandbyInput::PrimaryGone {
            reason: String::new(),
        },
        10,
    );
    let out = answer(&mut s, &out, ClaimOutcome::Won(record("b", 3, None)), 12);
    assert!(!promotes(&out));
    assert!(promotes(&put(
        &mut s,
        StandbyInput::Applied { epoch: Epoch(2) },
        13
    )));
}

#[test]
fn a_lost_claim_ends_it_and_an_unknown_one_is_tried_again() {
    let mut s = mirrored();
    let out = put(
        &mut s,
        StandbyInput::PrimaryGone {
            reason: String::new(),
        },
        10,
    );
    let out = answer(
        &mut s,
        &out,
        ClaimOutcome::Unreachable {
            reason: String::new(),
        },
        12,
    );
    assert!(matches!(out[..], [StandbyAction::Alert(_)]), "{out:?}");
    let out = put(&mut s, StandbyInput::Tick, 70);
    let mut landed = s.clone();
    let won = answer(
        &mut landed,
        &out,
        ClaimOutcome::Lost(Some(record("b", 3, None))),
        71,
    );
    assert!(promotes(&won), "the first try had landed: {won:?}");
    let lost = answer(
        &mut s,
        &out,
        ClaimOutcome::Lost(Some(record("a", 3, None))),
        71,
    );
    assert!(
        matches!(lost[..], [StandbyAction::StandDown { .. }]),
        "{lost:?}"
    );
}

#[test]
fn without_the_confirmation_the_record_decides() {
    let mut s = standby();
    put(&mut s, StandbyInput::ShellReady, 1);
    put(&mut s, whole(1), 3);
    let out = put(&mut s, StandbyInput::PeerVerdict(Verdict::Lost), 20);
    let out = answer(
        &mut s,
        &out,
        ClaimOutcome::Lost(Some(record("a", 2, None))),
        21,
    );
    assert!(out.is_empty(), "not named, not yet given up: {out:?}");
    let out = put(&mut s, StandbyInput::Tick, 80);
    answer(
        &mut s,
        &out,
        ClaimOutcome::Lost(Some(record("a", 2, Some("b")))),
        81,
    );
    let out = put(&mut s, StandbyInput::Tick, 121);
    assert!(matches!(out[..], [StandbyAction::Claim { .. }]), "{out:?}");
}

#[test]
fn a_bad_epoch_stops_the_acknowledgements_and_keeps_the_copy() {
    let mut s = mirrored();
    let out = put(
        &mut s,
        StandbyInput::EpochBad {
            epoch: Epoch(2),
            reason: String::new(),
        },
        8,
    );
    assert!(
        out.iter()
            .any(|action| matches!(action, StandbyAction::TellBroken { .. }))
    );
    assert!(put(&mut s, whole(2), 9).is_empty());
    let out = put(
        &mut s,
        StandbyInput::PrimaryGone {
            reason: String::new(),
        },
        10,
    );
    assert!(matches!(out[..], [StandbyAction::Claim { .. }]));
}

#[test]
fn a_silent_primary_on_a_live_host_is_replaced_in_the_end() {
    let mut s = mirrored();
    let mut claimed = false;
    for ms in (100..6000).step_by(100) {
        let out = put(&mut s, StandbyInput::Tick, ms);
        claimed |= out
            .iter()
            .any(|action| matches!(action, StandbyAction::Claim { .. }));
        if out
            .iter()
            .any(|action| matches!(action, StandbyAction::ReadRecord { .. }))
        {
            answer(
                &mut s,
                &out,
                ClaimOutcome::Lost(Some(record("a", 2, Some("b")))),
                ms,
            );
        }
    }
    assert!(claimed);
}

fn input() -> impl Strategy<Value = StandbyInput> {
    let record = (0u64..5, any::<bool>(), any::<bool>()).prop_map(|(generation, mine, named)| {
        record(
            if mine { "b" } else { "a" },
            generation,
            named.then_some("b"),
        )
    });
    let outcome = prop_oneof![
        proptest::option::of(record).prop_map(ClaimOutcome::Lost),
        Just(ClaimOutcome::Won(super::tests::record("b", 3, None))),
        Just(ClaimOutcome::Unreachable {
            reason: String::new()
        }),
    ];
    let r = String::new;
    prop_oneof![
        4 => Just(StandbyInput::Tick),
        2 => any::<bool>().prop_map(|alive| StandbyInput::PeerVerdict(if alive { Verdict::Alive } else { Verdict::Lost })),
        4 => Just(StandbyInput::ShellReady),
        8 => (1u64..4, 0u64..6).prop_map(|(g, e)| StandbyInput::EpochWhole { generation: Generation(g), epoch: Epoch(e) }),
        6 => (0u64..6).prop_map(|e| StandbyInput::Applied { epoch: Epoch(e) }),
        3 => (1u64..4).prop_map(|g| StandbyInput::MirrorConfirmed { generation: Generation(g), epoch: Epoch(1) }),
        1 => Just(StandbyInput::EpochBad { epoch: Epoch(2), reason: r() }),
        1 => (0u64..6).prop_map(|e| StandbyInput::Handover { generation: Generation(3), epoch: Epoch(e) }),
        1 => Just(StandbyInput::PrimaryGone { reason: r() }),
        1 => Just(StandbyInput::Dismissed),
        8 => (1u64..12, outcome).prop_map(|(t, outcome)| StandbyInput::ClaimResult { ticket: Ticket(t), outcome }),
        1 => Just(StandbyInput::Promoted),
        1 => Just(StandbyInput::StandbyGuestDied { reason: r() }),
        1 => Just(StandbyInput::SelfStalled { for_: Micros(1) }),
    ]
}

proptest! {
    /// Whatever comes in: no panic (illegal steps panic), nothing after standing down, no
    /// acknowledgement of what was not whole, promotion only after all of it is applied.
    #[test]
    fn any_inputs_keep_the_promises(inputs in proptest::collection::vec((input(), 0u64..200_000), 0..120)) {
        let mut s = standby();
        let (mut seen, mut acked, mut over) = (std::collections::BTreeSet::new(), 0, false);
        let mut now = Micros::ZERO;
        for (input, gap) in inputs {
            now = now + Micros(gap);
            if let StandbyInput::EpochWhole { generation, epoch } = &input && *generation == ATTEMPT {
                seen.insert(epoch.0);
            }
            s.handle(input, now);
            while let Some(action) = s.poll_action() {
                prop_assert!(!over, "after standing down: {action:?}");
                match action {
                    StandbyAction::Ack { epoch, .. } => {
                        prop_assert!((1..=epoch.0).all(|e| seen.contains(&e)));
                        acked = epoch.0;
                    }
                    StandbyAction::Promote { epoch, .. } => {
                        prop_assert_eq!(epoch.0, acked);
                        prop_assert_eq!(s.status(now).applied.0, acked);
                    }
                    StandbyAction::StandDown { .. } => over = true,
                    _ => {}
                }
            }
        }
    }
}
