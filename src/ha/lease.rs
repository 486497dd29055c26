//! Why a host may go on: its lease.
//!
//! A lease ends at a moment of the host's own clock. Without one it pets its watchdog no more
//! and stops its VMs. It is earned anew by
//!
//! - **an own read** of the registry that showed the host as a member: good for one lease time
//!   from when the read *began*;
//! - **a vouch**: a member's report says which of this host's reports it had heard before a
//!   registry read of its own began that showed this host as a member: good for one lease time
//!   from when this host *sent* that report;
//! - **a promise** of the one other host that may act: [`super::pact`] tells how.
//!
//! So a host that lost the registry goes on as long as any other tells that it is still a
//! member, over any path.
//!
//! # Why the watchdog bound is a proof
//! Let the ousting of H be committed at moment C (true time). A read that shows H as a member
//! began before C, as the registry is linearizable. An own read earns a lease from its begin,
//! before C. A vouch names a report heard before such a read began, so sent before C. Every
//! lease of H therefore ends, by H's clock, within one lease time after C; the watchdog, petted
//! last before that, resets H within its timeout. The ouster counts from when its
//! compare-and-set *returned*, after C, on its own clock; [`super::timing::Timing::watchdog_bound`]
//! adds what the two clocks may differ by.
//!
//! Must never: count from when an answer came, or take a vouch for another incarnation.

use super::time::Millis;
use crate::pool::Seq;
use std::collections::VecDeque;

/// Reports whose send time is remembered: at half a second each many times a lease.
const SENT_MAX: usize = 64;

/// The lease of this host.
#[derive(Clone, Debug)]
pub struct Lease {
    length: Millis,
    /// Reports of this incarnation with their send times, oldest first.
    sent: VecDeque<(Seq, Millis)>,
    until: Option<Millis>,
    /// Ousted: nothing earns a lease any more in this incarnation.
    revoked: bool,
}

impl Lease {
    /// None yet: a host begins without.
    #[must_use]
    pub fn new(length: Millis) -> Self {
        Self {
            length,
            sent: VecDeque::new(),
            until: None,
            revoked: false,
        }
    }

    /// Report `seq` is about to be sent.
    pub fn sent(&mut self, seq: Seq, now: Millis) {
        if self.sent.len() == SENT_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back((seq, now));
    }

    /// An own read, begun at `began`, showed this host as a member.
    pub fn own_read(&mut self, began: Millis) {
        self.earn(began);
    }

    /// A member vouches for report `seq` of this incarnation.
    pub fn vouched(&mut self, seq: Seq) {
        if let Some(at) = self.sent_at(seq) {
            self.earn(at);
        }
    }

    /// When report `seq` of this incarnation was sent, if that is still remembered.
    #[must_use]
    pub fn sent_at(&self, seq: Seq) -> Option<Millis> {
        let sent = self.sent.iter().find(|(sent, _)| *sent == seq);
        sent.map(|(_, at)| *at)
    }

    /// Until then nobody gives this host up, as the only one that may has promised.
    pub fn promised(&mut self, until: Millis) {
        self.earn(until);
    }

    /// From now on others may give this host up again: what was earned by a promise counts no more.
    /// If that makes it shorter, when it ends.
    pub fn curb(&mut self, now: Millis) -> Option<Millis> {
        let most = now + self.length;
        if self.until? <= most {
            return None;
        }
        self.until = Some(most);
        self.until
    }

    fn earn(&mut self, from: Millis) {
        if !self.revoked {
            self.until = self.until.max(Some(from + self.length));
        }
    }

    /// This host was ousted: it has no lease any more, for good.
    pub fn revoke(&mut self) {
        self.revoked = true;
        self.until = None;
    }

    /// When it ends; `None` if there never was one, or it was revoked.
    #[must_use]
    pub fn until(&self) -> Option<Millis> {
        self.until
    }

    /// Whether it is good at `now`.
    #[must_use]
    pub fn holds(&self, now: Millis) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Millis = Millis(3000);

    #[test]
    fn a_read_is_worth_a_lease_from_its_begin() {
        let mut lease = Lease::new(L);
        assert!(!lease.holds(Millis(0)));
        lease.own_read(Millis(1000));
        assert!(lease.holds(Millis(3999)) && !lease.holds(Millis(4000)));
        // An older read that came back late takes nothing away and adds nothing.
        lease.own_read(Millis(500));
        assert_eq!(lease.until(), Some(Millis(4000)));
    }

    #[test]
    fn a_vouch_counts_from_when_the_report_was_sent() {
        let mut lease = Lease::new(L);
        for n in 0..10 {
            lease.sent(Seq(n), Millis(n * 500));
        }
        lease.vouched(Seq(4));
        assert_eq!(lease.until(), Some(Millis(5000)));
        // Reports never sent, or too old to be remembered, earn nothing.
        lease.vouched(Seq(99));
        assert_eq!(lease.until(), Some(Millis(5000)));
        for n in 10..200 {
            lease.sent(Seq(n), Millis(n * 500));
        }
        lease.vouched(Seq(9));
        assert_eq!(lease.until(), Some(Millis(5000)));
        lease.vouched(Seq(199));
        assert_eq!(lease.until(), Some(Millis(199 * 500 + 3000)));
    }

    #[test]
    fn what_a_promise_earned_is_cut_and_what_a_read_earned_is_not() {
        let mut lease = Lease::new(L);
        lease.promised(Millis(30_000));
        assert_eq!(lease.until(), Some(Millis(33_000)));
        assert_eq!(lease.curb(Millis(10_000)), Some(Millis(13_000)));
        lease.own_read(Millis(11_000));
        assert_eq!(lease.curb(Millis(11_500)), None);
        assert_eq!(lease.until(), Some(Millis(14_000)));
    }

    #[test]
    fn what_was_revoked_stays_so() {
        let mut lease = Lease::new(L);
        lease.sent(Seq(1), Millis(100));
        lease.own_read(Millis(100));
        lease.revoke();
        lease.own_read(Millis(200));
        lease.vouched(Seq(1));
        assert!(!lease.holds(Millis(201)) && lease.until().is_none());
    }
}
