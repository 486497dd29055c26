use super::explore::{Explored, explore};
use super::world::{Budget, World};

fn states_max() -> usize {
    std::env::var("POLLUX_MODEL_STATES")
        .ok()
        .map_or(usize::MAX, |n| {
            n.parse().expect("POLLUX_MODEL_STATES is a number")
        })
}

fn check(what: &str, start: World, budget: Budget) -> Explored {
    let began = std::time::Instant::now();
    let done = explore(start, budget, states_max()).unwrap_or_else(|found| panic!("{found:?}"));
    println!("{what}: {done:?} {:?}", began.elapsed());
    done
}

#[test]
fn bugs() {
    use crate::mirror::sabotage::{Bug, with_bug};
    let b = Budget::NONE;
    let all = [
        (Bug::ReleaseBeforeAck, World::mirrored(), b),
        (
            Bug::AckBeforeWhole,
            World::mirrored(),
            Budget { delays: 1, ..b },
        ),
        (
            Bug::PromoteWithoutClaim,
            World::mirrored(),
            Budget { cuts: 1, ..b },
        ),
        (
            Bug::SoloWithoutClaim,
            World::mirrored(),
            Budget { cuts: 1, ..b },
        ),
        (
            Bug::GenerationNotCompared,
            World::mirrored(),
            Budget {
                copies: 1,
                cuts: 1,
                protects: 1,
                ..b
            },
        ),
        (
            Bug::StaleAckAccepted,
            World::mirrored(),
            Budget { freezes: 1, ..b },
        ),
        (
            Bug::PromoteBeforeApply,
            World::mirrored(),
            Budget {
                crashes: 1,
                delays: 1,
                ..b
            },
        ),
        (
            Bug::DismissBeforeCommit,
            World::mirrored(),
            Budget { unprotects: 1, ..b },
        ),
        (
            Bug::UnknownIsWon,
            World::mirrored(),
            Budget {
                cuts: 1,
                unknowns: 1,
                ..b
            },
        ),
        (
            Bug::ReleaseBeforeConfirm,
            World::solo(),
            Budget { protects: 1, ..b },
        ),
        (
            Bug::LeaseNotWaited,
            World::mirrored(),
            Budget { cuts: 1, ..b },
        ),
        (
            Bug::ClockNotLookedAt,
            World::mirrored(),
            Budget { freezes: 1, ..b },
        ),
        (
            Bug::FreezeNotNoticed,
            World::mirrored(),
            Budget {
                freezes: 2,
                cuts: 1,
                delays: 1,
                ..b
            },
        ),
        (
            Bug::UnknownIsLost,
            World::solo(),
            Budget {
                protects: 1,
                unknowns: 1,
                ..b
            },
        ),
        (
            Bug::OwnWinNotSeen,
            World::mirrored(),
            Budget {
                crashes: 1,
                unknowns: 1,
                ..b
            },
        ),
        (
            Bug::ClaimUnnamed,
            World::solo(),
            Budget {
                protects: 1,
                cuts: 1,
                losses: 1,
                ..b
            },
        ),
        (
            Bug::AckWhileClaiming,
            World::mirrored(),
            Budget {
                freezes: 1,
                cuts: 1,
                delays: 1,
                ..b
            },
        ),
        (
            Bug::NeverAsksAgain,
            World::mirrored(),
            Budget {
                cuts: 1,
                unknowns: 1,
                ..b
            },
        ),
    ];
    for (bug, start, budget) in all {
        let began = std::time::Instant::now();
        match with_bug(bug, || explore(start, budget, 3_000_000)) {
            Ok(done) => println!("{bug:?}: NOT FOUND {done:?} {:?}", began.elapsed()),
            Err(found) => {
                println!(
                    "{bug:?}: {} {} {} states, {} lines {:?}",
                    found.violation.invariant,
                    found.violation.what,
                    found.states,
                    found.trace.len(),
                    began.elapsed()
                );
                if std::env::var("TRACE").is_ok() {
                    println!("{found:?}");
                }
            }
        }
    }
}

#[test]
fn scratch() {
    let b = Budget::NONE;
    check("calm", World::mirrored(), b);
    check("protect", World::solo(), Budget { protects: 1, ..b });
    check("crash", World::mirrored(), Budget { crashes: 1, ..b });
    check("freeze", World::mirrored(), Budget { freezes: 1, ..b });
    check("cut", World::mirrored(), Budget { cuts: 1, ..b });
    check("loss", World::mirrored(), Budget { losses: 1, ..b });
    check("delay", World::mirrored(), Budget { delays: 1, ..b });
    check("death", World::mirrored(), Budget { deaths: 1, ..b });
    check(
        "unprotect",
        World::mirrored(),
        Budget { unprotects: 1, ..b },
    );
    check(
        "switchover",
        World::mirrored(),
        Budget {
            switchovers: 1,
            ..b
        },
    );
    check("shutdown", World::mirrored(), Budget { shutdowns: 1, ..b });
    check("unknown", World::mirrored(), Budget { unknowns: 1, ..b });
    check(
        "freeze crash",
        World::mirrored(),
        Budget {
            freezes: 1,
            crashes: 1,
            ..b
        },
    );
    check(
        "cut unknown",
        World::mirrored(),
        Budget {
            cuts: 1,
            unknowns: 1,
            ..b
        },
    );
    check(
        "cut delay",
        World::mirrored(),
        Budget {
            cuts: 1,
            delays: 1,
            ..b
        },
    );
    check(
        "crash start protect",
        World::mirrored(),
        Budget {
            crashes: 1,
            starts: 1,
            protects: 1,
            ..b
        },
    );
    check(
        "cut protect copy",
        World::mirrored(),
        Budget {
            cuts: 1,
            copies: 1,
            protects: 1,
            ..b
        },
    );
    check(
        "protect unknown crash start",
        World::solo(),
        Budget {
            unknowns: 1,
            crashes: 1,
            protects: 1,
            starts: 1,
            ..b
        },
    );
    check(
        "switch unknown crash freeze",
        World::mirrored(),
        Budget {
            unknowns: 1,
            crashes: 1,
            freezes: 1,
            switchovers: 1,
            ..b
        },
    );
    check(
        "freeze output",
        World::mirrored(),
        Budget {
            freezes: 1,
            outputs: 2,
            ..b
        },
    );
    check(
        "all 1 output",
        World::mirrored(),
        Budget { outputs: 1, ..b },
    );
    check(
        "freeze delay",
        World::mirrored(),
        Budget {
            freezes: 1,
            delays: 1,
            ..b
        },
    );
    check(
        "unknowns 2 cut",
        World::mirrored(),
        Budget {
            cuts: 1,
            unknowns: 2,
            ..b
        },
    );
    check(
        "death delay",
        World::mirrored(),
        Budget {
            deaths: 1,
            delays: 1,
            ..b
        },
    );
    check(
        "deaths crash",
        World::mirrored(),
        Budget {
            deaths: 1,
            crashes: 1,
            ..b
        },
    );
    check(
        "protect cut crash",
        World::solo(),
        Budget {
            protects: 1,
            cuts: 1,
            crashes: 1,
            ..b
        },
    );
    check(
        "protect freeze",
        World::solo(),
        Budget {
            protects: 1,
            freezes: 1,
            ..b
        },
    );
    check(
        "protect delay unknown",
        World::solo(),
        Budget {
            protects: 1,
            delays: 1,
            unknowns: 1,
            ..b
        },
    );
    check(
        "freeze protect",
        World::mirrored(),
        Budget {
            protects: 1,
            freezes: 1,
            ..b
        },
    );
    check(
        "2 protects copy loss",
        World::mirrored(),
        Budget {
            protects: 1,
            copies: 1,
            unprotects: 1,
            ..b
        },
    );
    check(
        "2 protects cut copy",
        World::mirrored(),
        Budget {
            protects: 2,
            copies: 1,
            cuts: 1,
            ..b
        },
    );
    check(
        "crash shutdown unknown",
        World::mirrored(),
        Budget {
            shutdowns: 1,
            crashes: 1,
            unknowns: 1,
            ..b
        },
    );
    check(
        "freeze shutdown",
        World::mirrored(),
        Budget {
            shutdowns: 1,
            freezes: 1,
            ..b
        },
    );
    check(
        "switch cut",
        World::mirrored(),
        Budget {
            switchovers: 1,
            cuts: 1,
            ..b
        },
    );
    check(
        "switch cut fail",
        World::mirrored(),
        Budget {
            switchovers: 1,
            cut_failures: 1,
            cuts: 1,
            ..b
        },
    );
    check(
        "switch loss crash",
        World::mirrored(),
        Budget {
            switchovers: 1,
            losses: 1,
            crashes: 1,
            ..b
        },
    );
    check(
        "unprot loss crash",
        World::mirrored(),
        Budget {
            unprotects: 1,
            losses: 1,
            crashes: 1,
            ..b
        },
    );
    check(
        "freeze cut",
        World::mirrored(),
        Budget {
            freezes: 1,
            cuts: 1,
            ..b
        },
    );
    check(
        "freeze unknown",
        World::mirrored(),
        Budget {
            freezes: 1,
            unknowns: 1,
            ..b
        },
    );
}
