//! Of two hosts without a registry that no longer hear each other, who switches the other off.
//!
//! Either may, by what [`super::pact`] says of two. If both live and the link between them is cut
//! the better side should be first: one that reaches the registry, then one that reaches
//! the gateway, then the one whose standbys and VMs matter more, which both reckon from what
//! they last said to each other. Who is worse waits longer by steps of [`Timing::race_step`],
//! in which a fence agent cuts power. Nothing but comfort depends on it: if both are switched
//! off, nothing runs twice.
//!
//! [`Timing::race_step`]: super::timing::Timing::race_step

use super::deciding::FENCE_AGAIN;
use super::time::Millis;

/// What this host knows of its own side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side {
    pub(super) registry: bool,
    pub(super) gateway: bool,
    /// Its standbys are fresher than the other's, or its VMs heavier, or its number is lower.
    pub(super) better: bool,
}

impl Side {
    /// How long it lets the other be first.
    pub(super) fn waits(self, step: Millis) -> Millis {
        let missing = [(self.registry, 4), (self.gateway, 2), (self.better, 1)]
            .map(|(has, steps)| if has { 0 } else { steps });
        Millis(step.0 * missing.iter().sum::<u64>())
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Race {
    /// Since when the other has been silent.
    since: Option<Millis>,
    /// Whether a fence agent is at work.
    at_work: bool,
    /// Not before then one is asked (again).
    from: Option<Millis>,
}

impl Race {
    /// There is no reason any more. An agent that is at work is not called back.
    pub(super) fn ends(&mut self) {
        self.since = None;
    }

    /// The other is silent, and this host waits for so long: whether to switch it off now.
    pub(super) fn shoots(&mut self, now: Millis, waits: Millis) -> bool {
        let since = *self.since.get_or_insert(now);
        let due = now.since(since) >= waits && self.from.is_none_or(|from| from <= now);
        let shoots = due && !self.at_work;
        self.at_work |= shoots;
        shoots
    }

    /// A fence agent has ended.
    pub(super) fn fenced(&mut self, now: Millis) {
        self.at_work = false;
        self.from = Some(now + FENCE_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_side_is_first_whatever_the_worse_is_good_for() {
        let waits = |registry, gateway, better| {
            let side = Side {
                registry,
                gateway,
                better,
            };
            side.waits(Millis(2000)).0
        };
        assert_eq!(waits(true, true, true), 0);
        assert!(waits(true, false, false) < waits(false, true, true));
        assert!(waits(false, true, false) < waits(false, false, true));
        assert!(waits(false, true, true) < waits(false, true, false));
    }

    #[test]
    fn one_agent_is_asked_at_a_time_and_a_sign_of_life_begins_anew() {
        let mut race = Race::default();
        let waits = Millis(2000);
        assert!(!race.shoots(Millis(1000), waits));
        race.ends();
        assert!(!race.shoots(Millis(3500), waits));
        assert!(!race.shoots(Millis(5499), waits));
        assert!(race.shoots(Millis(5500), waits));
        assert!(!race.shoots(Millis(6000), waits));
        race.fenced(Millis(7000));
        assert!(!race.shoots(Millis(7500), waits));
        assert!(race.shoots(Millis(7000) + FENCE_AGAIN, waits));
    }
}
