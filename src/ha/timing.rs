//! The times that the pool lives by, and what ties them together.

use super::sabotage::{Bug, sabotaged};
use super::time::Millis;

/// Times of a pool, the same on all its hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between two reports.
    pub period: Millis,
    /// Silence after which a network path is lost: four reports, so that three lost datagrams
    /// in a row, or a host descheduled for a second, are no death.
    pub network_lost: Millis,
    /// The same of a storage path, where one write may wait behind a busy array.
    pub storage_lost: Millis,
    /// How long a host may go on without a word from the registry or from a voucher.
    pub lease: Millis,
    /// What the watchdog is armed with: after this time without being petted it resets the
    /// host.
    pub watchdog: Millis,
    /// A side that cannot reach the gateway lets the other be first for so long.
    pub hesitation: Millis,
    /// What the waiting for a lease and a watchdog to end is lengthened by: clocks of two hosts
    /// may differ by this many parts in a thousand. Crystals differ by 0.1 at the most; NTP
    /// slews by 0.5 (adjtimex(2)).
    pub rates_permille: u64,
    /// And by this, for timers that fire late.
    pub slack: Millis,
}

impl Timing {
    /// Half a second of period; a crash without power fencing restarts VMs after 14 s. A lease
    /// outlives the choice of another leader in etcd, for a host may die with the leader on it.
    pub const DEFAULT: Self = Self {
        period: Millis(500),
        network_lost: Millis(2000),
        storage_lost: Millis(2500),
        lease: Millis(5000),
        watchdog: Millis(5000),
        hesitation: Millis(2000),
        rates_permille: 20,
        slack: Millis(500),
    };

    /// The longest silence that is not yet the loss of a path.
    #[must_use]
    pub fn longest_silence(&self) -> Millis {
        self.network_lost.max(self.storage_lost)
    }

    /// A tick that comes this late means that the host stood still, and that all it has heard
    /// may be old.
    #[must_use]
    pub const fn stall(&self) -> Millis {
        Millis(self.period.0 * 2)
    }

    /// How long the side whose standbys and VMs matter less lets the other be first, if there is
    /// no path between them at all: both hear each other last, and look next, within a period of
    /// one another, and the other may have to become the coordinator first.
    #[must_use]
    pub const fn yielding(&self) -> Millis {
        Millis(self.period.0 * 19 / 10)
    }

    /// How long a host that was given up, and that no member says it hears, waits before it joins all
    /// the same: the members may all have died since. If they live they give it up again.
    #[must_use]
    pub const fn stranded(&self) -> Millis {
        Millis(12 * self.lease.0)
    }

    /// For so long the registry has not been read when a host begins to promise; see
    /// [`super::pact`]. Longer than etcd needs to choose another leader, with a call that finds
    /// none, for a promise delays decisions once the registry is back.
    #[must_use]
    pub const fn registry_lost(&self) -> Millis {
        Millis(self.lease.0 + 2 * self.period.0)
    }

    /// How long a promise binds. More than a lease: who is cut off has stopped before.
    #[must_use]
    pub const fn promise(&self) -> Millis {
        Millis(self.lease.0 + self.period.0)
    }

    /// How long a promise of one of two binds: so long the other has to make certain that its
    /// power is off. A fence agent takes some seconds, and the worse side lets the better be first.
    #[must_use]
    pub const fn promise_of_two(&self) -> Millis {
        Millis(6 * self.lease.0)
    }

    /// By so much longer the worse of two hosts waits before it switches the other off, for each
    /// thing that it lacks: they notice the other's silence up to a second apart, and an agent
    /// takes a moment to cut power.
    #[must_use]
    pub const fn race_step(&self) -> Millis {
        Millis(6 * self.period.0)
    }

    /// What `length` on another host's clock is here at the least.
    #[must_use]
    pub const fn at_least(&self, length: Millis) -> Millis {
        Millis(length.0 - length.0 * self.rates_permille / 1000)
    }

    /// The **watchdog bound**: how long after an ousting is committed the ousted host is dead at
    /// the latest, if it has a watchdog armed with `watchdog`.
    #[must_use]
    pub fn watchdog_bound(&self, watchdog: Millis) -> Millis {
        let runs_out = if sabotaged(Bug::BoundWithoutLease) {
            watchdog
        } else {
            self.lease + watchdog
        };
        runs_out + Millis(runs_out.0 * self.rates_permille / 1000) + self.slack
    }

    /// Whether these times hold together.
    ///
    /// # Errors
    /// Which do not, and what must be.
    pub fn check(&self) -> Result<(), String> {
        let bad = |what: String| Err(what);
        if self.period.0 < 50 {
            return bad(format!("period {} must be at least 0.050 s", self.period));
        }
        for (name, lost) in [
            ("network_lost", self.network_lost),
            ("storage_lost", self.storage_lost),
        ] {
            if lost.0 < 3 * self.period.0 {
                return bad(format!(
                    "{name} {lost} must be at least three periods of {}, or lost datagrams look like a dead host",
                    self.period
                ));
            }
        }
        if self.lease.0 < 3 * self.period.0 {
            return bad(format!(
                "lease {} must be at least three periods of {}, or a slow read stops a host",
                self.lease, self.period
            ));
        }
        if self.watchdog.0 < 2 * self.period.0 {
            return bad(format!(
                "watchdog {} must be at least two periods of {}",
                self.watchdog, self.period
            ));
        }
        Ok(())
    }
}

// What docs/promises.md says of the defaults: "VMs may restart" at most 15 s after a crash.
const _: () = {
    let t = Timing::DEFAULT;
    let waits = (t.lease.0 + t.watchdog.0) * (1000 + t.rates_permille) / 1000 + t.slack.0;
    // Heard last just before it died, judged at the next tick, two turns at the registry.
    assert!(t.storage_lost.0 + 3 * t.period.0 + waits <= 15_000);
    assert!(t.network_lost.0 >= 4 * t.period.0);
    // Without a path through storage, and on the side that matters less.
    assert!(t.network_lost.0 + t.yielding().0 + 2 * t.period.0 + waits <= 15_000);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_hold_together_and_nonsense_is_named() {
        assert_eq!(Timing::DEFAULT.check(), Ok(()));
        let short = Timing {
            network_lost: Millis(1000),
            ..Timing::DEFAULT
        };
        let told = short.check().unwrap_err();
        assert!(told.contains("network_lost 1.000 s"), "{told}");
        let lease = Timing {
            lease: Millis(1),
            ..Timing::DEFAULT
        };
        assert!(lease.check().unwrap_err().contains("lease 0.001 s"));
    }

    #[test]
    fn the_watchdog_bound_is_longer_than_lease_and_watchdog_on_the_slower_clock() {
        let t = Timing::DEFAULT;
        let bound = t.watchdog_bound(t.watchdog);
        assert_eq!(bound, Millis(10_000 + 200 + 500));
        // Both clocks off by half of the allowance, in opposite ways.
        assert!(bound.0 * 990 > (t.lease.0 + t.watchdog.0) * 1010);
    }
}
