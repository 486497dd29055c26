//! Whom this host hears, on which path, and since when not.
//!
//! A path is **healthy** while reports come, **suspect** after half of the silence that it is
//! lost by, **lost** after all of it ([`Timing`] argues the lengths). A host is heard while one
//! path is not lost.
//!
//! A host that stood still itself has heard nobody meanwhile, and would take all others for
//! dead: after a late tick it forgets when it heard whom, and judges nobody before it has
//! listened for as long as the longest silence.

use super::report::{Heard, Path, Report};
use super::sabotage::{Bug, sabotaged};
use super::time::Millis;
use super::timing::Timing;
use crate::pool::{HostId, Incarnation, POOL_HOSTS_MAX, Seq};
use std::collections::BTreeMap;

/// How a path to a host stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum PathVerdict {
    /// Reports come.
    Healthy,
    /// They are late.
    Suspect,
    /// They do not come, or never did.
    Lost,
}

/// What is known of another host.
#[derive(Clone, Debug)]
pub struct Contact {
    /// Its newest report of its newest life.
    pub report: Report,
    /// When that report came first.
    pub came: Millis,
    /// When something of that life was heard last, by path; empty after an own stall.
    pub paths: BTreeMap<Path, Millis>,
}

/// For how long this host has listened without standing still.
#[derive(Clone, Debug)]
pub struct Listening {
    timing: Timing,
    ticked: Millis,
    since: Millis,
}

impl Listening {
    /// It begins now.
    #[must_use]
    pub fn new(timing: Timing, now: Millis) -> Self {
        Self {
            timing,
            ticked: now,
            since: now,
        }
    }

    /// Time goes on; if this tick is late, how long the host stood still. It begins anew then.
    pub fn tick(&mut self, now: Millis) -> Option<Millis> {
        let stood = now.since(self.ticked);
        self.ticked = now;
        if stood <= self.timing.stall() || sabotaged(Bug::StallUnnoticed) {
            return None;
        }
        self.since = now;
        Some(stood)
    }

    /// Whether it was for long enough to say that another is silent.
    #[must_use]
    pub fn may_judge(&self, now: Millis) -> bool {
        now.since(self.since) >= self.timing.longest_silence()
            && now.since(self.ticked) <= self.timing.stall()
    }
}

/// All other hosts, as heard here.
#[derive(Clone, Debug)]
pub struct Contacts {
    timing: Timing,
    hosts: BTreeMap<HostId, Contact>,
    listening: Listening,
}

impl Contacts {
    /// Nobody was heard yet.
    #[must_use]
    pub fn new(timing: Timing, now: Millis) -> Self {
        Self {
            timing,
            hosts: BTreeMap::new(),
            listening: Listening::new(timing, now),
        }
    }

    /// A report came; whether it is the newest of its host. One of an earlier life, or from an
    /// impossible host, is nothing; an older one still tells that its path works.
    pub fn heard(&mut self, now: Millis, path: Path, report: Report) -> bool {
        if usize::from(report.host.0) >= POOL_HOSTS_MAX {
            return false;
        }
        let Some(contact) = self.hosts.get_mut(&report.host) else {
            let paths = BTreeMap::from([(path, now)]);
            let came = now;
            self.hosts.insert(
                report.host,
                Contact {
                    report,
                    came,
                    paths,
                },
            );
            return true;
        };
        let known = (contact.report.incarnation, contact.report.seq);
        if report.incarnation < known.0 {
            return false;
        }
        if report.incarnation > known.0 {
            contact.paths.clear();
        }
        contact.paths.insert(path, now);
        let newest = (report.incarnation, report.seq) > known;
        if newest {
            contact.report = report;
            contact.came = now;
        }
        newest
    }

    /// Time goes on; if this tick is late, how long the host stood still.
    pub fn tick(&mut self, now: Millis) -> Option<Millis> {
        let stood = self.listening.tick(now)?;
        for contact in self.hosts.values_mut() {
            contact.paths.clear();
        }
        Some(stood)
    }

    /// Whether this host has listened for long enough to say that another is silent.
    #[must_use]
    pub fn may_judge(&self, now: Millis) -> bool {
        self.listening.may_judge(now)
    }

    /// How a path to a host stands.
    #[must_use]
    pub fn path(&self, host: HostId, path: Path, now: Millis) -> PathVerdict {
        let last = self.hosts.get(&host).and_then(|c| c.paths.get(&path));
        last.map_or(PathVerdict::Lost, |last| {
            self.verdict(path, now.since(*last))
        })
    }

    fn verdict(&self, path: Path, silence: Millis) -> PathVerdict {
        let lost = match path {
            Path::Network(_) => self.timing.network_lost,
            Path::Storage(_) => self.timing.storage_lost,
        };
        if silence >= lost {
            PathVerdict::Lost
        } else if silence.0 * 2 >= lost.0 {
            PathVerdict::Suspect
        } else {
            PathVerdict::Healthy
        }
    }

    /// Whether any path to that life of a host is not lost.
    #[must_use]
    pub fn is_heard(&self, host: HostId, incarnation: Incarnation, now: Millis) -> bool {
        self.get(host).is_some_and(|contact| {
            contact.report.incarnation == incarnation
                && contact
                    .paths
                    .iter()
                    .any(|(path, last)| self.verdict(*path, now.since(*last)) < PathVerdict::Lost)
        })
    }

    /// What is known of a host, however old.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<&Contact> {
        self.hosts.get(&host)
    }

    /// The newest report heard of each host.
    #[must_use]
    pub fn newest(&self) -> BTreeMap<HostId, (Incarnation, Seq)> {
        self.hosts
            .iter()
            .map(|(host, contact)| (*host, (contact.report.incarnation, contact.report.seq)))
            .collect()
    }

    /// How long ago the newest report of each host came.
    #[must_use]
    pub fn report_ages(&self, now: Millis) -> BTreeMap<HostId, Millis> {
        let ages = self.hosts.iter();
        ages.map(|(host, contact)| (*host, now.since(contact.came)))
            .collect()
    }

    /// Whether this host has not stood still since then.
    #[must_use]
    pub fn listens_since(&self, then: Millis) -> bool {
        self.listening.since <= then
    }

    /// All that was ever heard.
    pub fn iter(&self) -> impl Iterator<Item = (HostId, &Contact)> {
        self.hosts.iter().map(|(host, contact)| (*host, contact))
    }

    /// What this host tells of the others.
    #[must_use]
    pub fn told(&self, now: Millis) -> BTreeMap<HostId, Heard> {
        self.hosts
            .iter()
            .map(|(host, contact)| {
                let ages = contact.paths.iter();
                let heard = Heard {
                    incarnation: contact.report.incarnation,
                    seq: contact.report.seq,
                    ages: ages.map(|(path, last)| (*path, now.since(*last))).collect(),
                };
                (*host, heard)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::report::RegistryView;

    const NET: Path = Path::Network(0);
    const DISK: Path = Path::Storage(0);
    const B: HostId = HostId(1);

    fn report(incarnation: u64, seq: u64) -> Report {
        Report {
            host: B,
            incarnation: Incarnation(incarnation),
            seq: Seq(seq),
            heard: BTreeMap::new(),
            gateway_age: None,
            registry: RegistryView::default(),
            storage_ok: true,
            standby_lag: None,
            weight: 0,
            watchdog: None,
            farewell: false,
        }
    }

    #[test]
    fn a_path_is_suspect_and_then_lost_and_one_path_is_enough() {
        let mut contacts = Contacts::new(Timing::DEFAULT, Millis(0));
        contacts.heard(Millis(0), NET, report(1, 1));
        contacts.heard(Millis(0), DISK, report(1, 1));
        let verdicts = [0, 999, 1000, 1999, 2000].map(|t| contacts.path(B, NET, Millis(t)));
        use PathVerdict::{Healthy, Lost, Suspect};
        assert_eq!(verdicts, [Healthy, Healthy, Suspect, Suspect, Lost]);
        assert!(contacts.is_heard(B, Incarnation(1), Millis(2499)));
        assert!(!contacts.is_heard(B, Incarnation(1), Millis(2500)));
        assert!(!contacts.is_heard(B, Incarnation(2), Millis(0)));
    }

    #[test]
    fn an_earlier_life_is_not_heard_and_an_older_report_only_shows_its_path() {
        let mut contacts = Contacts::new(Timing::DEFAULT, Millis(0));
        assert!(contacts.heard(Millis(0), NET, report(2, 5)));
        assert!(!contacts.heard(Millis(100), NET, report(1, 9)));
        assert!(!contacts.heard(Millis(100), DISK, report(2, 4)));
        assert_eq!(contacts.get(B).unwrap().report.seq, Seq(5));
        assert_eq!(contacts.path(B, DISK, Millis(100)), PathVerdict::Healthy);
        // The next life begins with no path of the former one.
        assert!(contacts.heard(Millis(200), NET, report(3, 1)));
        assert_eq!(contacts.path(B, DISK, Millis(200)), PathVerdict::Lost);
    }

    #[test]
    fn a_host_that_stood_still_listens_before_it_judges() {
        let mut contacts = Contacts::new(Timing::DEFAULT, Millis(0));
        for t in (500..=5000).step_by(500) {
            assert_eq!(contacts.tick(Millis(t)), None);
            contacts.heard(Millis(t), NET, report(1, t));
        }
        assert!(contacts.may_judge(Millis(5000)));
        assert_eq!(contacts.tick(Millis(25_000)), Some(Millis(20_000)));
        assert!(!contacts.is_heard(B, Incarnation(1), Millis(25_000)));
        assert!(!contacts.may_judge(Millis(27_999)));
        for t in (25_500..=28_000).step_by(500) {
            assert_eq!(contacts.tick(Millis(t)), None);
            assert_eq!(contacts.may_judge(Millis(t)), t >= 27_500, "{t}");
        }
        // Before a late tick is noticed nobody is judged either.
        assert!(!contacts.may_judge(Millis(40_000)));
    }
}
