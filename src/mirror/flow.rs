//! Whether the links keep up with the guest, and how long it may run if they do not. Pure.
//!
//! An epoch is under way from its guest's resume to the standby's acknowledgement, and the
//! guest runs meanwhile: the next epoch is as long as that. While the links carry what the
//! guest dirties this settles by itself. If they do not, each epoch is larger than the one
//! before, up to all the memory the guest touches, and the replication lag with it. Then
//! the guest is **throttled**: it stands still for a part of the time that its last epoch
//! is under way, so that the next one, by the time it may be cut, is no larger than what
//! the links carry in [`UNDER_WAY_MAX`].
//!
//! ```text
//!   guest   run--run-|cut|     held back      |--run--|cut|    held back    |--run--|cut|
//!   links                |====== epoch n =============|   |===== epoch n+1 =========|
//!                                             ^ what is left of n takes as long as the
//!                                               guest may run
//! ```
//!
//! How the lane stands comes in as data ([`LaneLevel`]): what waits there is seen while it
//! waits, not when its acknowledgement is late. Must never starve the guest ([`RUN_LEAST`]).

use super::Micros;

/// An epoch that is under way for longer than this is too large for the links: a quarter of
/// the lag alarm of [`super::Timing::DEFAULT`], for at the acknowledgement the lag is the
/// epoch's own length and this, and the next one grows on top of it.
pub const UNDER_WAY_MAX: Micros = Micros::from_millis(250);

/// A throttled guest runs at least this long in each epoch: some ten requests served, and
/// with [`UNDER_WAY_MAX`] still 4 % of its time.
pub const RUN_LEAST: Micros = Micros::from_millis(10);

/// The guest is not held back for less than this: holding and letting go cost it 1 ms
/// (QEMU.md section 4).
pub const HOLD_LEAST: Micros = Micros::from_millis(10);

/// How long the links must have been too slow before a VM whose policy says so goes solo:
/// a link that flaps is back by then.
pub const OVERLOAD_PATIENCE: Micros = Micros::from_millis(5000);

/// A smaller epoch says nothing about what the links carry: what it took was the way there
/// and back.
const TELLING_BYTES: u64 = 64 << 10;

/// What waits for less than this is no limit worth a word to the operator.
const WORTH_A_WORD: Micros = Micros::from_millis(20);

/// What is on the lane and does not become less for so long stands still: a link died and
/// its bytes wait to be sent again. That is no lack of capacity, and slowing the guest would
/// not help. At 1 MB/s, less than an epoch can live with, it is the time of two segments.
const STALL: Micros = Micros::from_millis(100);

/// How the VM's epoch lane stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneLevel {
    /// Bytes that wait for a link.
    pub queued_bytes: u64,
    /// Bytes sent and not acknowledged by the partner.
    pub unacked_bytes: u64,
    /// What all links that stand carry together, bytes a second; none until measured.
    pub bytes_per_s: Option<u64>,
}

impl LaneLevel {
    /// Time until `bytes` are through.
    fn time_for(&self, bytes: u64) -> Option<Micros> {
        let rate = self.bytes_per_s.filter(|rate| *rate > 0)?;
        Some(Micros(bytes.saturating_mul(1_000_000) / rate))
    }

    /// Time until what is on the lane is with the partner.
    #[must_use]
    pub fn drains_in(&self) -> Option<Micros> {
        self.time_for(self.queued_bytes.saturating_add(self.unacked_bytes))
    }
}

/// The links are what bounds the VM now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limited {
    /// Bytes on the lane that the partner has not.
    pub bytes: u64,
    /// Time until they will be there, as far as known.
    pub drains_in: Option<Micros>,
    /// Share of its time that the guest was held back in its last epoch, per mille.
    pub held_permille: u16,
}

/// An epoch under way.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    since: Micros,
    /// How long its guest ran.
    ran: Micros,
    /// Before encoding.
    bytes: u64,
}

/// Keeps the account of one mirrored VM.
#[derive(Clone, Debug)]
pub struct Flow {
    level: LaneLevel,
    level_at: Micros,
    under_way: Option<UnderWay>,
    /// Bytes a second, before encoding, that the last epochs went through at.
    rate: Option<u64>,
    /// The least time that an epoch was under way, whatever its size.
    least: Micros,
    /// How long the guest may run in an epoch; none: as long as it likes.
    allowance: Option<Micros>,
    /// When what is on the lane last became more or less, and for how long it has stood
    /// still while the epoch is under way.
    moved_at: Micros,
    stalled: Micros,
    /// Since when the links are too slow.
    slow_since: Option<Micros>,
    /// When the running epoch began, and how much of it the guest was held back.
    running_since: Micros,
    held: Micros,
    held_since: Option<Micros>,
    held_permille: u16,
}

impl Flow {
    /// For a guest whose first epoch begins now.
    #[must_use]
    pub const fn new(now: Micros) -> Self {
        Self {
            level: LaneLevel {
                queued_bytes: 0,
                unacked_bytes: 0,
                bytes_per_s: None,
            },
            level_at: now,
            under_way: None,
            rate: None,
            least: Micros::MAX,
            allowance: None,
            moved_at: now,
            stalled: Micros::ZERO,
            slow_since: None,
            running_since: now,
            held: Micros::ZERO,
            held_since: None,
            held_permille: 0,
        }
    }

    /// How the lane stands.
    pub fn level(&mut self, level: LaneLevel, now: Micros) {
        let on_lane = |level: &LaneLevel| level.queued_bytes.saturating_add(level.unacked_bytes);
        if on_lane(&level) != on_lane(&self.level) || on_lane(&level) == 0 {
            self.stalled = self.stalled(now);
            self.moved_at = now;
        }
        self.level = level;
        self.level_at = now;
        // An epoch that will be too long is known before it is acknowledged.
        if let Some(epoch) = self.under_way {
            let passed = now.since(epoch.since) - self.stalled(now);
            let whole = passed + self.left(now).unwrap_or(Micros::ZERO);
            if whole > UNDER_WAY_MAX {
                self.tighten(epoch.ran, whole, now);
            }
        }
    }

    /// How long the lane has stood still while the epoch is under way.
    fn stalled(&self, now: Micros) -> Micros {
        let still = now.since(self.moved_at);
        let waits = self
            .level
            .queued_bytes
            .saturating_add(self.level.unacked_bytes)
            > 0;
        match waits && still >= STALL {
            true => self.stalled + still,
            false => self.stalled,
        }
    }

    /// The guest runs again after a cut that was begun at `cut_at`.
    pub fn cut_done(&mut self, cut_at: Micros, bytes: u64, now: Micros) {
        self.let_go(now);
        let length = cut_at.since(self.running_since);
        let ran = length - self.held;
        self.held_permille = u16::try_from(self.held.0 * 1000 / length.0.max(1)).unwrap_or(1000);
        self.running_since = now;
        self.held = Micros::ZERO;
        self.stalled = Micros::ZERO;
        self.moved_at = now;
        self.under_way = Some(UnderWay {
            since: now,
            ran,
            bytes,
        });
    }

    /// The newest epoch under way is acknowledged.
    pub fn acknowledged(&mut self, now: Micros) {
        let Some(epoch) = self.under_way.take() else {
            return;
        };
        let took = now.since(epoch.since) - self.stalled(now);
        self.least = self.least.min(took);
        if epoch.bytes >= TELLING_BYTES {
            let moving = (took - self.least).max(Micros(1));
            let seen = epoch.bytes.saturating_mul(1_000_000) / moving.0;
            // Down at once, up by halves: taking links for too slow costs the guest some
            // time, taking them for too fast costs lag.
            let rate = self.rate.map_or(seen, |rate| rate.midpoint(seen).min(seen));
            self.rate = Some(rate.max(1));
        }
        if took > UNDER_WAY_MAX {
            return self.tighten(epoch.ran, took, now);
        }
        if let Some(allowance) = self.allowance
            && took.0 * 5 < UNDER_WAY_MAX.0 * 4
            && (epoch.ran.0 * 2 >= allowance.0 || self.keeps_up(epoch))
        {
            // A quarter more each time: an epoch that is too large costs lag, one that is
            // too small costs the guest little.
            let more = Micros(allowance.0 + allowance.0 / 4);
            self.allowance = (more < UNDER_WAY_MAX).then_some(more);
        }
        if self.allowance.is_none() {
            self.slow_since = None;
        }
    }

    /// Whether the links carry what the guest dirtied in an epoch in less time than it ran.
    /// Of a short epoch that is much: most of what a guest dirties it dirties again.
    fn keeps_up(&self, epoch: UnderWay) -> bool {
        let Some(rate) = self.rate else { return false };
        let carried = u128::from(rate) * u128::from(epoch.ran.0) * 4 / 5;
        carried > u128::from(epoch.bytes) * 1_000_000
    }

    /// An epoch whose guest ran for `ran` takes `whole`: as large as the links carry in time.
    fn tighten(&mut self, ran: Micros, whole: Micros, now: Micros) {
        self.slow_since.get_or_insert(now);
        let fits = Micros(ran.0.saturating_mul(UNDER_WAY_MAX.0) / whole.0.max(1)).max(RUN_LEAST);
        self.allowance = Some(self.allowance.map_or(fits, |now| now.min(fits)));
    }

    /// Time until the epoch under way is through, as far as known.
    fn left(&self, now: Micros) -> Option<Micros> {
        let epoch = self.under_way?;
        let lane = self.level.drains_in().map(|t| t - now.since(self.level_at));
        // What is not encoded yet is not on the lane; by experience. Once that has been
        // wrong for long, what has taken so long may well take as long again.
        let passed = now.since(epoch.since) - self.stalled(now);
        let experience = match self.rate {
            Some(rate) => Some(Micros(epoch.bytes.saturating_mul(1_000_000) / rate) - passed),
            None => (passed > UNDER_WAY_MAX).then_some(Micros::ZERO),
        };
        let experience = experience.map(|left| match passed > UNDER_WAY_MAX {
            true => left.max(passed),
            false => left,
        });
        match (lane, experience) {
            // On the lane stands what is left, and it counts what the other only guesses.
            (Some(lane), _) if self.level.queued_bytes + self.level.unacked_bytes > 0 => Some(lane),
            (lane, experience) => experience.or(lane),
        }
    }

    /// How long the guest has run in this epoch.
    fn ran(&self, now: Micros) -> Micros {
        let held = self
            .held_since
            .map_or(Micros::ZERO, |since| now.since(since));
        now.since(self.running_since) - self.held - held
    }

    /// Whether the guest should be held back now.
    #[must_use]
    pub fn holds(&self, now: Micros) -> bool {
        let (Some(allowance), Some(left)) = (self.allowance, self.left(now)) else {
            return false;
        };
        let may_run = allowance - self.ran(now);
        match self.held_since {
            _ if may_run == Micros::ZERO => true,
            Some(_) => left > may_run,
            None => left > may_run + HOLD_LEAST,
        }
    }

    /// The guest is held back from now on.
    pub fn hold(&mut self, now: Micros) {
        self.held_since.get_or_insert(now);
    }

    /// It runs again.
    pub fn let_go(&mut self, now: Micros) {
        if let Some(since) = self.held_since.take() {
            self.held = self.held + now.since(since);
        }
    }

    /// When the guest should be let go, if it is held back now.
    #[must_use]
    pub fn let_go_at(&self, now: Micros) -> Option<Micros> {
        self.held_since?;
        let may_run = self.allowance.unwrap_or(Micros::MAX) - self.ran(now);
        Some(now + (self.left(now).unwrap_or(Micros::ZERO) - may_run))
    }

    /// By when a throttled guest should be cut, so that its epoch is no larger than allowed.
    #[must_use]
    pub fn cut_by(&self) -> Option<Micros> {
        Some(self.running_since + self.held + self.allowance?)
    }

    /// Until when a cut would only wait behind what is on the lane already.
    #[must_use]
    pub fn backlog_until(&self) -> Micros {
        let drains = self.level.time_for(self.level.queued_bytes);
        drains.map_or(Micros::ZERO, |drains| self.level_at + drains)
    }

    /// Since when the links have been too slow.
    #[must_use]
    pub const fn slow_since(&self) -> Option<Micros> {
        self.slow_since
    }

    /// Whether the links are what bounds the VM.
    #[must_use]
    pub fn limited(&self) -> Option<Limited> {
        let bytes = self
            .level
            .queued_bytes
            .saturating_add(self.level.unacked_bytes);
        let drains_in = self.level.drains_in();
        let waits = drains_in.is_some_and(|t| t >= WORTH_A_WORD);
        (waits || self.slow_since.is_some()).then_some(Limited {
            bytes,
            drains_in,
            held_permille: self.held_permille,
        })
    }
}

const _: () = {
    let t = super::Timing::DEFAULT;
    assert!(4 * UNDER_WAY_MAX.0 <= t.lag_alarm.0);
    assert!(OVERLOAD_PATIENCE.0 > t.ack_overdue.0);
    assert!(RUN_LEAST.0 < UNDER_WAY_MAX.0);
};

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1000;

    /// A guest that dirties `dirty` bytes a second, up to `most` in an epoch, over links
    /// that carry `carried`; epochs follow each other as the primary would have them.
    struct Play {
        flow: Flow,
        now: u64,
        dirty: u64,
        most: u64,
        /// Whether the lane tells how it stands.
        told: bool,
        ran: u64,
        stood: u64,
    }

    impl Play {
        fn new(dirty: u64, most: u64, told: bool) -> Self {
            Self {
                flow: Flow::new(Micros::ZERO),
                now: 0,
                dirty,
                most,
                told,
                ran: 0,
                stood: 0,
            }
        }

        /// One epoch: how long it was under way, and the lag at its acknowledgement.
        fn epoch(&mut self, carried: u64, interval: u64) -> (u64, u64) {
            let begun = self.now;
            // Nothing is under way; the guest runs until its cut.
            let by = self.flow.cut_by().map_or(u64::MAX, |by| by.0);
            self.now = self.now.max((begun + interval).min(by)).max(begun + MS);
            let ran = self.flow.ran(Micros(self.now)).0;
            let bytes = (ran * self.dirty / 1_000_000).min(self.most) + 4096;
            let length = self.now - self.flow.running_since.0;
            self.ran += ran;
            self.now += 2 * MS;
            self.flow
                .cut_done(Micros(self.now - 2 * MS), bytes, Micros(self.now));
            let (cut, mut left) = (self.now, bytes);
            while left > 0 {
                if self.told {
                    let level = LaneLevel {
                        queued_bytes: left,
                        unacked_bytes: 0,
                        bytes_per_s: Some(carried),
                    };
                    self.flow.level(level, Micros(self.now));
                } else {
                    self.flow.level(LaneLevel::default(), Micros(self.now));
                }
                if self.flow.holds(Micros(self.now)) {
                    self.flow.hold(Micros(self.now));
                    self.stood += MS;
                } else {
                    self.flow.let_go(Micros(self.now));
                }
                self.now += MS;
                left = left.saturating_sub(carried / 1000);
            }
            self.flow.let_go(Micros(self.now));
            self.flow.acknowledged(Micros(self.now));
            (self.now - cut, self.now - cut + length)
        }
    }

    const MB: u64 = 1_000_000;

    #[test]
    fn a_guest_that_the_links_keep_up_with_is_never_held_back() {
        for told in [true, false] {
            let mut play = Play::new(50 * MB, u64::MAX, told);
            for _ in 0..200 {
                play.epoch(100 * MB, 50 * MS);
            }
            assert_eq!((play.stood, play.flow.limited()), (0, None));
        }
        // Nor one that touches little memory, however fast.
        let mut play = Play::new(900 * MB, 10 * MB, true);
        for _ in 0..200 {
            play.epoch(100 * MB, 50 * MS);
        }
        assert_eq!(play.stood, 0);
    }

    #[test]
    fn a_guest_that_dirties_more_than_the_links_carry_is_slowed_until_its_lag_is_bounded() {
        for told in [true, false] {
            for times in [2, 5, 20] {
                let mut play = Play::new(times * 20 * MB, u64::MAX, told);
                for _ in 0..20 {
                    play.epoch(20 * MB, 50 * MS);
                }
                let worst = (0..50).map(|_| play.epoch(20 * MB, 50 * MS).1).max();
                assert!(
                    worst < Some(900 * MS),
                    "{times} times, told {told}: {worst:?}"
                );
                let limited = play.flow.limited().expect("the links bound it");
                assert!(limited.held_permille > 300, "{limited:?}");
                // It lives all the same.
                assert!(play.ran * 40 > play.now, "ran {} of {}", play.ran, play.now);
            }
        }
    }

    #[test]
    fn what_waits_on_the_lane_is_acted_on_before_its_acknowledgement() {
        let mut play = Play::new(40 * MB, u64::MAX, true);
        for _ in 0..10 {
            play.epoch(100 * MB, 100 * MS);
        }
        assert_eq!(play.stood, 0);
        // The links collapse: the very epoch that finds them so holds the guest back.
        let (first, _) = play.epoch(2 * MB, 100 * MS);
        assert!(first > 1000 * MS && play.stood > 1000 * MS, "{first}");
        let (under_way, lag) = play.epoch(2 * MB, 100 * MS);
        assert!(
            under_way < 400 * MS && lag < first + 400 * MS,
            "{under_way} {lag}"
        );
    }

    #[test]
    fn links_that_recover_let_the_guest_go() {
        let mut play = Play::new(40 * MB, u64::MAX, true);
        for _ in 0..20 {
            play.epoch(4 * MB, 50 * MS);
        }
        assert!(play.flow.slow_since().is_some() && play.stood > 0);
        let since = play.now;
        while play.flow.slow_since().is_some() {
            play.epoch(400 * MB, 50 * MS);
            assert!(play.now < since + 5_000 * MS);
        }
        let stood = play.stood;
        for _ in 0..50 {
            play.epoch(400 * MB, 50 * MS);
        }
        assert_eq!((play.stood, play.flow.limited()), (stood, None));
    }

    #[test]
    fn a_long_interval_of_an_idle_link_is_no_overload() {
        let mut play = Play::new(MB / 10, u64::MAX, true);
        for _ in 0..20 {
            play.epoch(100 * MB, 10_000 * MS);
        }
        assert_eq!((play.stood, play.flow.limited()), (0, None));
    }

    #[test]
    fn a_link_that_dies_is_no_lack_of_capacity() {
        for told in [Some(100 * MB), None] {
            let mut flow = Flow::new(Micros::ZERO);
            flow.cut_done(Micros(50 * MS), MB, Micros(52 * MS));
            let level = LaneLevel {
                queued_bytes: 0,
                unacked_bytes: MB,
                bytes_per_s: told,
            };
            for ms in (52..1000).step_by(20) {
                flow.level(level, Micros(ms * MS));
                assert!(!flow.holds(Micros(ms * MS)));
            }
            // Sent again over another link.
            flow.level(LaneLevel::default(), Micros(1000 * MS));
            flow.acknowledged(Micros(1001 * MS));
            assert_eq!((flow.slow_since(), flow.limited()), (None, None));
        }
    }

    #[test]
    fn a_cut_behind_a_backlog_can_wait_for_it() {
        let mut flow = Flow::new(Micros::ZERO);
        assert_eq!(flow.backlog_until(), Micros::ZERO);
        let level = LaneLevel {
            queued_bytes: MB,
            unacked_bytes: 9 * MB,
            bytes_per_s: Some(10 * MB),
        };
        flow.level(level, Micros(5 * MS));
        assert_eq!(flow.backlog_until(), Micros(105 * MS));
        assert_eq!(flow.limited().unwrap().drains_in, Some(Micros(1000 * MS)));
        flow.level(
            LaneLevel {
                bytes_per_s: Some(0),
                ..level
            },
            Micros(5 * MS),
        );
        assert_eq!(flow.backlog_until(), Micros::ZERO);
    }
}
