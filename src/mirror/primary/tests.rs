//! The primary against its promises: by scenario, and against inputs at random.

use super::*;
use crate::mirror::{MAX_IN_FLIGHT, Versioned};
use proptest::prelude::*;

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

/// A primary with a registry that does what it is told, and all actions so far.
struct Bench {
    primary: Primary,
    now: Micros,
    record: Versioned<VmRecord>,
    reachable: bool,
    actions: Vec<PrimaryAction>,
}

impl Bench {
    fn new() -> Self {
        let record = Versioned {
            version: 1,
            value: VmRecord::started(host("a"), None),
        };
        let config = PrimaryConfig {
            me: host("a"),
            timing: Timing::DEFAULT,
            policy: Policy::default(),
            max_in_flight: MAX_IN_FLIGHT,
        };
        let primary = Primary::new(config, record.clone(), Micros::ZERO);
        Self {
            primary,
            now: Micros::ZERO,
            record,
            reachable: true,
            actions: Vec::new(),
        }
    }

    /// Put in, answer the registry's part, and return what came out.
    fn put(&mut self, input: PrimaryInput) -> Vec<PrimaryAction> {
        self.now = self.now + Micros(100);
        self.primary.handle(input, self.now);
        let mut out = Vec::new();
        while let Some(action) = self.primary.poll_action() {
            out.push(action.clone());
            let (ticket, write) = match action {
                PrimaryAction::Claim {
                    ticket,
                    expected,
                    value,
                } => (ticket, Some((expected, value))),
                PrimaryAction::ReadRecord { ticket } => (ticket, None),
                _ => continue,
            };
            let outcome = match write {
                _ if !self.reachable => ClaimOutcome::Unreachable {
                    reason: "test".into(),
                },
                Some((expected, value)) if expected == self.record.version => {
                    self.record = Versioned {
                        version: expected + 1,
                        value,
                    };
                    ClaimOutcome::Won(self.record.clone())
                }
                _ => ClaimOutcome::Lost(Some(self.record.clone())),
            };
            self.primary
                .handle(PrimaryInput::ClaimResult { ticket, outcome }, self.now);
        }
        self.actions.extend(out.iter().cloned());
        out
    }

    fn cut_done(&mut self, epoch: u64) -> Vec<PrimaryAction> {
        self.put(PrimaryInput::CutDone {
            epoch: Epoch(epoch),
            pause: Micros(2000),
            bytes: 4096,
            pages: 1,
        })
    }

    fn ack(&mut self, epoch: u64) -> Vec<PrimaryAction> {
        let generation = self.primary.status(self.now).generation;
        self.put(PrimaryInput::Acked {
            generation,
            epoch: Epoch(epoch),
        })
    }

    fn mirrored() -> Self {
        let mut bench = Self::new();
        bench.put(PrimaryInput::Protect { partner: host("b") });
        bench.put(PrimaryInput::StandbyReady);
        bench.put(PrimaryInput::SeedingConverged);
        bench.cut_done(1);
        bench.ack(1);
        assert_eq!(bench.state(), PrimaryState::Mirrored);
        bench
    }

    fn state(&self) -> PrimaryState {
        self.primary.status(self.now).state
    }

    /// Tick until the next cut is asked for.
    fn until_cut(&mut self) -> Epoch {
        for _ in 0..2000 {
            for action in self.put(PrimaryInput::Tick) {
                if let PrimaryAction::Cut { epoch, .. } = action {
                    return epoch;
                }
            }
        }
        panic!("no cut");
    }
}

fn releases(actions: &[PrimaryAction]) -> Vec<u64> {
    let through = |action: &PrimaryAction| match action {
        PrimaryAction::Release { through, .. } => Some(through.0),
        _ => None,
    };
    actions.iter().filter_map(through).collect()
}

#[test]
fn nothing_is_released_before_the_record_names_the_standby() {
    let mut bench = Bench::new();
    bench.put(PrimaryInput::Protect { partner: host("b") });
    bench.put(PrimaryInput::StandbyReady);
    assert_eq!(bench.record.value.standby, None);
    bench.put(PrimaryInput::SeedingConverged);
    bench.cut_done(1);
    bench.reachable = false;
    let out = bench.ack(1);
    assert!(releases(&out).is_empty());
    assert!(
        out.iter()
            .any(|action| matches!(action, PrimaryAction::HoldStill { .. }))
            || bench.state() == PrimaryState::Confirming
    );
    bench.reachable = true;
    bench.now = bench.now + Micros::from_millis(60);
    let out = bench.put(PrimaryInput::Tick);
    assert_eq!(bench.record.value.standby, Some(host("b")));
    assert_eq!(bench.state(), PrimaryState::Mirrored);
    drop(out);
}

#[test]
fn an_epoch_is_released_on_its_own_acknowledgement_and_no_other() {
    let mut bench = Bench::mirrored();
    assert_eq!(bench.until_cut(), Epoch(2));
    assert!(releases(&bench.cut_done(2)).is_empty());
    let old = PrimaryInput::Acked {
        generation: Generation(1),
        epoch: Epoch(2),
    };
    assert!(releases(&bench.put(old)).is_empty());
    assert!(releases(&bench.ack(7)).is_empty());
    assert_eq!(releases(&bench.ack(2)), [2]);
    assert!(releases(&bench.ack(2)).is_empty());
}

#[test]
fn a_stale_acknowledgement_releases_with_the_next_fresh_one() {
    let mut bench = Bench::mirrored();
    bench.until_cut();
    bench.cut_done(2);
    bench.now = bench.now + Micros::from_millis(130);
    let out = bench.ack(2);
    assert!(releases(&out).is_empty());
    assert!(
        out.contains(&PrimaryAction::Cut {
            epoch: Epoch(3),
            stay_stopped: false
        }),
        "at once: {out:?}"
    );
    bench.cut_done(3);
    assert_eq!(releases(&bench.ack(3)), [3]);
}

#[test]
fn the_lease_counts_from_the_sending_however_late_it_is_told() {
    let sent_after = |told_late: Micros| {
        let mut bench = Bench::mirrored();
        bench.until_cut();
        bench.cut_done(2);
        // A big epoch: encoding it takes longer than an acknowledgement is good for.
        bench.now = bench.now + Micros::from_millis(130);
        let at = bench.now;
        bench.now = bench.now + told_late;
        bench.put(PrimaryInput::Sent {
            epoch: Epoch(2),
            at,
        });
        releases(&bench.ack(2))
    };
    assert_eq!(sent_after(Micros::from_millis(1)), [2]);
    assert!(sent_after(Micros::from_millis(130)).is_empty());
}

#[test]
fn a_frozen_primary_asks_before_it_releases() {
    let mut bench = Bench::mirrored();
    bench.until_cut();
    bench.cut_done(2);
    bench.reachable = false;
    bench.put(PrimaryInput::SelfStalled {
        for_: Micros::from_millis(500),
    });
    assert!(releases(&bench.ack(2)).is_empty());
    bench.put(PrimaryInput::Tick);
    assert!(bench.primary.status(bench.now).holding_still);
    bench.record.value.owner = host("b");
    bench.record.value.generation = bench.record.value.generation.next();
    bench.reachable = true;
    bench.now = bench.now + Micros::from_millis(60);
    let out = bench.put(PrimaryInput::Tick);
    assert!(releases(&out).is_empty());
    assert_eq!(bench.state(), PrimaryState::StoodDown);
}

#[test]
fn a_freeze_nobody_mentions_is_noticed_by_the_clock() {
    let mut bench = Bench::mirrored();
    bench.now = bench.now + Micros::from_millis(400);
    let out = bench.put(PrimaryInput::Tick);
    assert!(
        out.iter()
            .any(|action| matches!(action, PrimaryAction::ReadRecord { .. })),
        "{out:?}"
    );
}

#[test]
fn the_partner_is_lost_and_only_a_won_claim_goes_solo() {
    let mut bench = Bench::mirrored();
    bench.reachable = false;
    bench.put(PrimaryInput::PeerVerdict(Verdict::Lost));
    bench.put(PrimaryInput::Tick);
    assert_eq!(bench.state(), PrimaryState::Claiming);
    assert!(
        bench
            .actions
            .iter()
            .any(|action| matches!(action, PrimaryAction::HoldStill { .. }))
    );
    bench.reachable = true;
    bench.now = bench.now + Micros::from_millis(60);
    let before = bench.actions.len();
    bench.put(PrimaryInput::Tick);
    bench.put(PrimaryInput::Tick);
    assert_eq!(bench.state(), PrimaryState::Solo);
    assert!(
        bench.actions[before..]
            .iter()
            .any(|action| matches!(action, PrimaryAction::Resume))
    );
    assert_eq!(bench.record.value.standby, None);
}

#[test]
fn unprotect_without_a_registry_leaves_the_mirror_alone() {
    let mut bench = Bench::mirrored();
    bench.reachable = false;
    bench.put(PrimaryInput::Unprotect);
    bench.put(PrimaryInput::Tick);
    assert_eq!(bench.state(), PrimaryState::Mirrored);
    assert!(
        !bench
            .actions
            .iter()
            .any(|action| matches!(action, PrimaryAction::DismissStandby))
    );
}

#[test]
fn a_switchover_hands_over_the_last_epoch() {
    let mut bench = Bench::mirrored();
    bench.put(PrimaryInput::Switchover);
    bench.put(PrimaryInput::Tick);
    let last = PrimaryAction::Cut {
        epoch: Epoch(2),
        stay_stopped: true,
    };
    assert!(bench.actions.contains(&last), "{:?}", bench.actions);
    bench.cut_done(2);
    bench.ack(2);
    bench.put(PrimaryInput::Tick);
    assert_eq!(bench.record.value.owner, host("b"));
    assert_eq!(bench.state(), PrimaryState::StoodDown);
}

#[test]
fn a_guest_that_shuts_down_is_not_run_by_anybody() {
    let mut bench = Bench::mirrored();
    bench.put(PrimaryInput::GuestShutdown);
    bench.put(PrimaryInput::Tick);
    assert!(!bench.record.value.running && bench.record.value.standby.is_none());
    assert_eq!(bench.state(), PrimaryState::StoodDown);
}

#[test]
fn checkpoints_that_keep_failing_end_the_mirror_and_not_the_vm() {
    let mut bench = Bench::mirrored();
    for _ in 0..3 {
        let epoch = bench.until_cut();
        assert_eq!(epoch, Epoch(2));
        bench.put(PrimaryInput::CutFailed {
            epoch,
            reason: "test".into(),
        });
    }
    bench.put(PrimaryInput::Tick);
    bench.put(PrimaryInput::Tick);
    assert_eq!(bench.state(), PrimaryState::Solo);
}

fn outcome() -> impl Strategy<Value = ClaimOutcome> {
    let record = (
        0u64..6,
        0u64..5,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(version, generation, mine, named, running)| Versioned {
            version,
            value: VmRecord {
                generation: Generation(generation),
                owner: host(if mine { "a" } else { "b" }),
                standby: named.then(|| host(if mine { "b" } else { "a" })),
                running,
            },
        });
    prop_oneof![
        record.clone().prop_map(ClaimOutcome::Won),
        proptest::option::of(record).prop_map(ClaimOutcome::Lost),
        Just(ClaimOutcome::Unreachable { reason: "r".into() }),
    ]
}

fn input() -> impl Strategy<Value = PrimaryInput> {
    let r = String::new;
    prop_oneof![
        4 => Just(PrimaryInput::Tick),
        3 => Just(PrimaryInput::Protect { partner: host("b") }),
        1 => Just(PrimaryInput::Unprotect),
        1 => Just(PrimaryInput::Switchover),
        1 => any::<bool>().prop_map(|up| if up { PrimaryInput::LinkUp } else { PrimaryInput::LinkDown { reason: String::new() } }),
        1 => any::<bool>().prop_map(|alive| PrimaryInput::PeerVerdict(if alive { Verdict::Alive } else { Verdict::Lost })),
        3 => Just(PrimaryInput::StandbyReady),
        1 => Just(PrimaryInput::StandbyGone { reason: r() }),
        3 => Just(PrimaryInput::SeedingConverged),
        1 => Just(PrimaryInput::SeedingFailed { reason: r() }),
        2 => Just(PrimaryInput::OutputWaiting),
        6 => (0u64..6).prop_map(|e| PrimaryInput::CutDone { epoch: Epoch(e), pause: Micros(10), bytes: 1, pages: u64::MAX }),
        1 => (0u64..6).prop_map(|e| PrimaryInput::CutFailed { epoch: Epoch(e), reason: String::new() }),
        1 => (0u64..6).prop_map(|e| PrimaryInput::SendFailed { epoch: Epoch(e), reason: String::new() }),
        6 => (0u64..5, 0u64..6).prop_map(|(g, e)| PrimaryInput::Acked { generation: Generation(g), epoch: Epoch(e) }),
        8 => (1u64..12, outcome()).prop_map(|(t, outcome)| PrimaryInput::ClaimResult { ticket: Ticket(t), outcome }),
        1 => Just(PrimaryInput::SelfStalled { for_: Micros(1) }),
        1 => Just(PrimaryInput::GuestDied { reason: r() }),
        1 => Just(PrimaryInput::GuestShutdown),
    ]
}

proptest! {
    /// Whatever comes in: no panic (illegal steps panic), nothing after standing down, no
    /// release of what was not acknowledged under the attempt's generation.
    #[test]
    fn any_inputs_keep_the_promises(inputs in proptest::collection::vec((input(), 0u64..200_000), 0..120)) {
        let mut bench = Bench::new();
        let (mut attempt, mut acked, mut over) = (Generation(0), 0, false);
        let mut now = Micros::ZERO;
        for (input, gap) in inputs {
            now = now + Micros(gap);
            if let PrimaryInput::Acked { generation, epoch } = &input && *generation == attempt {
                acked = acked.max(epoch.0);
            }
            bench.primary.handle(input, now);
            while let Some(action) = bench.primary.poll_action() {
                prop_assert!(!over, "after standing down: {action:?}");
                match action {
                    PrimaryAction::PrepareStandby { generation, .. } => (attempt, acked) = (generation, 0),
                    PrimaryAction::Release { through, until } => {
                        prop_assert!(through.0 <= acked && now < until);
                    }
                    PrimaryAction::StandDown { .. } => over = true,
                    _ => {}
                }
            }
            prop_assert!(bench.primary.next_wakeup() >= Micros::ZERO);
            let _ = bench.primary.status(now);
        }
    }
}
