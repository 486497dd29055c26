//! When a silent partner is to be switched off: times and gateway, and nothing else. The machine
//! ([`super::core`]) decides whether this host may.
//!
//! Must never: judge by what was heard before this host stood still, or by an answer of the
//! gateway to a question from before the silence.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::copy::Side;
use crate::ha::time::Millis;

/// After an order that failed, before the next: fence devices are slow, and those asked all the
/// time answer nobody.
const AGAIN_AFTER: Millis = Millis(5000);

/// What it goes by.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Silence of the partner after which it may be switched off.
    pub silence: Millis,
    /// How much longer the higher side waits, so that of two hosts that cannot hear each other
    /// one is first.
    pub hesitation: Millis,
    /// A tick that comes this late means that this host stood still.
    pub stall: Millis,
}

/// Of one host.
#[derive(Clone, Debug)]
pub struct Judge {
    patience: Patience,
    side: Side,
    heard: Millis,
    ticked: Millis,
    not_before: Millis,
}

impl Judge {
    /// Begin to listen.
    #[must_use]
    pub fn new(patience: Patience, side: Side, now: Millis) -> Self {
        Self {
            patience,
            side,
            heard: now,
            ticked: now,
            not_before: Millis(0),
        }
    }

    /// The partner was heard.
    pub fn heard(&mut self, now: Millis) {
        self.heard = self.heard.max(now);
    }

    /// Time went on.
    pub fn tick(&mut self, now: Millis) {
        if now.since(self.ticked) >= self.patience.stall {
            self.heard = now;
        }
        self.ticked = now;
    }

    /// An order was given, or failed: not again at once.
    pub fn ordered(&mut self, now: Millis) {
        self.not_before = now + AGAIN_AFTER;
    }

    /// How long the partner has been silent.
    #[must_use]
    pub fn silence(&self, now: Millis) -> Millis {
        now.since(self.heard)
    }

    /// Whether the partner is silent, wherever this host stands.
    #[must_use]
    pub fn is_silent(&self, now: Millis) -> bool {
        self.silence(now) >= self.patience.silence
    }

    /// Whether the partner is to be switched off, if this host may. `gateway_age`: of the
    /// gateway's newest answer, from when it was asked.
    #[must_use]
    pub fn says_off(&self, now: Millis, gateway_age: Option<Millis>) -> bool {
        let silence = self.silence(now);
        let patience = match self.side {
            Side::Lower => self.patience.silence,
            Side::Higher => self.patience.silence + self.patience.hesitation,
        };
        let reaches = gateway_age.is_some_and(|age| age < silence && age < self.patience.silence);
        silence >= patience && reaches && now >= self.not_before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience {
        silence: Millis(2000),
        hesitation: Millis(2000),
        stall: Millis(1000),
    };

    fn ticked(side: Side, until: u64) -> Judge {
        let mut judge = Judge::new(PATIENCE, side, Millis(0));
        for now in (0..=until).step_by(500) {
            judge.tick(Millis(now));
        }
        judge
    }

    #[test]
    fn the_lower_side_is_first_and_the_higher_one_hesitates() {
        let gateway = Some(Millis(100));
        for (side, from) in [(Side::Lower, 2000), (Side::Higher, 4000)] {
            assert!(!ticked(side, from - 1).says_off(Millis(from - 1), gateway));
            assert!(ticked(side, from).says_off(Millis(from), gateway));
        }
    }

    #[test]
    fn only_a_gateway_that_answers_now_counts() {
        let judge = ticked(Side::Higher, 9000);
        for (age, says) in [(None, false), (Some(2000), false), (Some(1999), true)] {
            assert_eq!(
                judge.says_off(Millis(9000), age.map(Millis)),
                says,
                "{age:?}"
            );
        }
    }

    #[test]
    fn a_host_that_stood_still_listens_first() {
        let mut judge = ticked(Side::Lower, 500);
        judge.tick(Millis(60_000));
        assert!(!judge.says_off(Millis(60_000), Some(Millis(1))));
        assert!(!judge.is_silent(Millis(60_000)));
    }

    #[test]
    fn an_order_is_not_given_again_at_once() {
        let mut judge = ticked(Side::Lower, 3000);
        judge.ordered(Millis(3000));
        assert!(!judge.says_off(Millis(7999), Some(Millis(1))));
        assert!(judge.says_off(Millis(8000), Some(Millis(1))));
        judge.heard(Millis(8000));
        assert!(!judge.says_off(Millis(8001), Some(Millis(1))));
    }
}
