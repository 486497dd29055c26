//! Between the heartbeat thread, which must never wait, and whoever reads at its leisure.
//!
//! Bounded: of each sender the newest [`PER_SENDER_MAX`] reports are kept; one more replaces
//! the oldest of the same sender, so that no host can crowd out another.

use super::super::packet::{Incarnation, NETWORKS_MAX, NetworkIndex, Sequence};
use super::Event;
use crate::pool::HostName;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Most reports kept of one sender: two rounds over all networks. Only the newest of each path
/// says anything new.
pub const PER_SENDER_MAX: usize = 2 * NETWORKS_MAX;
/// Most events kept; they are told once each, more means that nobody reads.
const EVENTS_MAX: usize = 64;

/// A payload that was heard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// The network it came over.
    pub network: NetworkIndex,
    /// Who sent it.
    pub sender: HostName,
    /// In which life.
    pub incarnation: Incarnation,
    /// In which round; the same number on every network.
    pub sequence: Sequence,
    /// When it was read from the socket, time since boot.
    pub at: Duration,
    /// It was sent after this time since boot, provably: its sender had heard a packet this
    /// host sent then. Far behind `at` it was held up, or its sender does not hear this host.
    /// `None`: no such proof from the last 256 rounds.
    pub sent_after: Option<Duration>,
    /// What it says.
    pub payload: Vec<u8>,
}

/// What has gathered.
#[derive(Default, Debug)]
pub struct Batch {
    /// Reports, in the order they came.
    pub received: Vec<Received>,
    /// What is to be told to people.
    pub events: Vec<Event>,
}

/// What waits to be read.
#[derive(Default)]
pub(super) struct Queue {
    reports: BTreeMap<HostName, VecDeque<Received>>,
    events: VecDeque<Event>,
    /// Reports that were replaced by newer ones of the same sender.
    replaced: u64,
    closed: bool,
}

impl Queue {
    pub(super) fn report(&mut self, received: Received) {
        let of_sender = self.reports.entry(received.sender.clone()).or_default();
        if of_sender.len() >= PER_SENDER_MAX {
            of_sender.pop_front();
            self.replaced += 1;
        }
        of_sender.push_back(received);
    }

    pub(super) fn event(&mut self, event: Event) {
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn is_empty(&self) -> bool {
        self.reports.is_empty() && self.events.is_empty()
    }

    fn take(&mut self) -> Batch {
        let reports = std::mem::take(&mut self.reports);
        let mut received: Vec<_> = reports.into_values().flatten().collect();
        received.sort_by_key(|received| received.at);
        Batch {
            received,
            events: std::mem::take(&mut self.events).into(),
        }
    }

    fn append(&mut self, other: &mut Self) {
        let Batch { received, events } = other.take();
        received.into_iter().for_each(|report| self.report(report));
        events.into_iter().for_each(|event| self.event(event));
        self.replaced += std::mem::take(&mut other.replaced);
    }
}

#[derive(Default)]
pub(super) struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
}

impl Shared {
    /// Hand over what has gathered, without waiting: an ordinary thread may hold the lock and
    /// not be running. `false` if it is to be tried again.
    pub(super) fn hand_over(&self, outbox: &mut Queue) -> bool {
        if outbox.is_empty() {
            return true;
        }
        let mut queue = match self.queue.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        queue.append(outbox);
        drop(queue);
        self.ready.notify_one();
        true
    }

    pub(super) fn close(&self) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closed = true;
        self.ready.notify_all();
    }

    pub(super) fn replaced(&self) -> u64 {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replaced
    }
}

/// Where reports and events are read.
pub struct Inbox(pub(super) Arc<Shared>);

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inbox(..)")
    }
}

impl Inbox {
    /// Take all there is; wait for something for at most `patience`, then return nothing.
    /// `None` once the transport has stopped and all is read.
    #[must_use]
    pub fn wait(&self, patience: Duration) -> Option<Batch> {
        let deadline = Instant::now() + patience;
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.is_empty() {
            if queue.closed {
                return None;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            queue = self
                .0
                .ready
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Some(queue.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(sender: &str, at_ms: u64) -> Received {
        Received {
            network: NetworkIndex(0),
            sender: HostName::new(sender).unwrap(),
            incarnation: Incarnation(1),
            sequence: Sequence(at_ms),
            at: Duration::from_millis(at_ms),
            sent_after: None,
            payload: Vec::new(),
        }
    }

    #[test]
    fn at_the_limit_the_oldest_of_the_same_sender_goes() {
        let (shared, mut outbox) = (Arc::new(Shared::default()), Queue::default());
        let inbox = Inbox(Arc::clone(&shared));
        outbox.report(report("quiet", 0));
        let most = u64::try_from(PER_SENDER_MAX).unwrap();
        // Some gather in the outbox, the others behind those in the queue.
        for at in 1..=most + 3 {
            outbox.report(report("loud", at));
            if at == most || at == most + 3 {
                assert!(shared.hand_over(&mut outbox));
            }
        }
        for _ in 0..2 * EVENTS_MAX {
            outbox.event(Event::ReportFresh);
        }
        assert!(shared.hand_over(&mut outbox));
        let batch = inbox.wait(Duration::ZERO).unwrap();
        let numbers: Vec<_> = batch.received.iter().map(|r| r.sequence.0).collect();
        let expected: Vec<_> = std::iter::once(0).chain(4..=most + 3).collect();
        assert_eq!((numbers, shared.replaced()), (expected, 3));
        assert_eq!(batch.events.len(), EVENTS_MAX);
    }

    #[test]
    fn a_reader_that_holds_the_lock_does_not_hold_up_the_thread() {
        let (shared, mut outbox) = (Shared::default(), Queue::default());
        outbox.report(report("a", 1));
        let held = shared.queue.lock().unwrap();
        assert!(!shared.hand_over(&mut outbox));
        drop(held);
        assert!(shared.hand_over(&mut outbox));
    }

    #[test]
    fn what_was_heard_before_the_end_is_still_read() {
        let (shared, mut outbox) = (Arc::new(Shared::default()), Queue::default());
        let inbox = Inbox(Arc::clone(&shared));
        assert!(inbox.wait(Duration::ZERO).unwrap().received.is_empty());
        outbox.report(report("a", 1));
        shared.hand_over(&mut outbox);
        shared.close();
        assert_eq!(inbox.wait(Duration::MAX / 4).unwrap().received.len(), 1);
        assert!(inbox.wait(Duration::MAX / 4).is_none());
    }
}
