//! What the clients' answers prove. Pure.
//!
//! The service hands out every number once, in order. So among all answers: a number
//! twice means that something was done again after it was acknowledged; a number that
//! nobody got means that an acknowledged (or at least done) request was forgotten; and
//! an answer may not be lower than one that was in a client's hands before its request
//! was sent, or the service has lived through the same time twice.

use super::MonotonicNs;
use super::env::DiskRecords;
use super::log::{Answer, ClientLog};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// How many offenders are named.
const EXAMPLES_MAX: usize = 5;

/// The verdict on the numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NumberCheck {
    /// Answers looked at.
    pub answers: u64,
    /// Numbers nobody got, beyond the allowed.
    pub lost: u64,
    /// Numbers somebody got a second time.
    pub repeated: u64,
    /// Answers lower than one already received before their request was sent.
    pub went_back: u64,
    /// Some of the offenders.
    pub examples: Vec<u64>,
}

/// Look at all answers of all clients. A hole is allowed for each request whose
/// connection broke or that was still open at the end: it may have been done and its
/// answer not read.
#[must_use]
pub fn check_numbers(log: &ClientLog) -> NumberCheck {
    let mut numbers: Vec<u64> = log.answers.iter().map(|a| a.number).collect();
    numbers.sort_unstable();
    let mut check = NumberCheck {
        answers: numbers.len() as u64,
        ..NumberCheck::default()
    };
    let mut holes = 0;
    for pair in numbers.windows(2) {
        let (before, number) = (pair[0], pair[1]);
        if number == before {
            check.repeated += 1;
            example(&mut check.examples, number);
        } else if number - before > 1 {
            holes += number - before - 1;
            example(&mut check.examples, before + 1);
        }
    }
    check.lost = holes.saturating_sub((log.broken.len() + log.open.len()) as u64);
    check.went_back = went_back(&log.answers, &mut check.examples);
    if check.lost == 0 && check.repeated == 0 && check.went_back == 0 {
        check.examples.clear();
    }
    check
}

fn example(examples: &mut Vec<u64>, number: u64) {
    if examples.len() < EXAMPLES_MAX && !examples.contains(&number) {
        examples.push(number);
    }
}

fn went_back(answers: &[Answer], examples: &mut Vec<u64>) -> u64 {
    let mut by_answer: Vec<&Answer> = answers.iter().collect();
    by_answer.sort_unstable_by_key(|a| a.answered_ns);
    let mut by_send = by_answer.clone();
    by_send.sort_unstable_by_key(|a| a.sent_ns);
    let mut received = by_answer.iter().peekable();
    let mut highest = 0;
    let mut count = 0;
    for answer in by_send {
        while let Some(earlier) = received.next_if(|e| e.answered_ns < answer.sent_ns) {
            highest = highest.max(earlier.number);
        }
        if answer.number < highest {
            count += 1;
            example(examples, answer.number);
        }
    }
    count
}

/// Acknowledged numbers that are in none of the disk's records.
#[must_use]
pub fn missing_on_disk(log: &ClientLog, disk: &DiskRecords) -> Vec<u64> {
    let on_disk = |number: u64| {
        let after = disk.ranges.partition_point(|&(first, _)| first <= number);
        after > 0 && disk.ranges[after - 1].1 >= number
    };
    let missing: BTreeSet<u64> = log
        .answers
        .iter()
        .map(|a| a.number)
        .filter(|&n| n >= disk.oldest_kept && !on_disk(n))
        .collect();
    missing.into_iter().collect()
}

/// The longest time one client waited from an answer to its next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The answer before it.
    pub from_ns: MonotonicNs,
    /// The answer after it.
    pub to_ns: MonotonicNs,
}

impl Gap {
    /// How long.
    #[must_use]
    pub fn us(self) -> u64 {
        self.to_ns.0.saturating_sub(self.from_ns.0) / 1000
    }
}

/// Per client the longest gap that has part of `[from, to]` in it; of these the longest.
/// A client that has no answer after `to` waits at least until `to`. None if no client
/// had an answer before `to`.
#[must_use]
pub fn longest_gap(answers: &[Answer], from: MonotonicNs, to: MonotonicNs) -> Option<Gap> {
    let mut longest: Option<Gap> = None;
    for times in answer_times(answers).values() {
        let ends = times.iter().copied().skip(1).chain([to]);
        for (from_ns, to_ns) in times.iter().copied().zip(ends) {
            let gap = Gap { from_ns, to_ns };
            if to_ns > from && from_ns < to && longest.is_none_or(|l| gap.us() > l.us()) {
                longest = Some(gap);
            }
        }
    }
    longest
}

/// The longest gap of any client that begins and ends in `[from, to]`.
#[must_use]
pub fn longest_gap_within(answers: &[Answer], from: MonotonicNs, to: MonotonicNs) -> Option<Gap> {
    let times = answer_times(answers);
    let gaps = times.values().flat_map(|t| t.windows(2)).map(|w| Gap {
        from_ns: w[0],
        to_ns: w[1],
    });
    gaps.filter(|g| g.from_ns >= from && g.to_ns <= to)
        .max_by_key(|g| g.us())
}

/// Clients that have no answer to a request of theirs after this instant.
#[must_use]
pub fn silent_since(answers: &[Answer], clients: u16, since: MonotonicNs) -> u64 {
    let heard: BTreeSet<u16> = answers
        .iter()
        .filter(|a| a.answered_ns > since)
        .map(|a| a.client)
        .collect();
    u64::from(clients).saturating_sub(heard.len() as u64)
}

fn answer_times(answers: &[Answer]) -> BTreeMap<u16, Vec<MonotonicNs>> {
    let mut times: BTreeMap<u16, Vec<MonotonicNs>> = BTreeMap::new();
    for answer in answers {
        times
            .entry(answer.client)
            .or_default()
            .push(answer.answered_ns);
    }
    times.values_mut().for_each(|t| t.sort_unstable());
    times
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `clients` clients in turn, an answer each millisecond that took half of one.
    pub(crate) fn healthy(clients: u16, answers: u64) -> ClientLog {
        let answers = (0..answers).map(|i| Answer {
            client: u16::try_from(i % u64::from(clients)).unwrap(),
            seq: i / u64::from(clients),
            sent_ns: MonotonicNs(i * 1_000_000),
            answered_ns: MonotonicNs(i * 1_000_000 + 500_000),
            number: 100 + i,
        });
        ClientLog {
            clients,
            answers: answers.collect(),
            ups: clients.into(),
            ended: true,
            ..ClientLog::default()
        }
    }

    #[test]
    fn a_healthy_log_is_clean_in_any_order() {
        let mut log = healthy(4, 100);
        log.answers.reverse();
        let check = check_numbers(&log);
        assert_eq!(
            check,
            NumberCheck {
                answers: 100,
                ..NumberCheck::default()
            }
        );
        assert_eq!(check_numbers(&ClientLog::default()), NumberCheck::default());
    }

    #[test]
    fn a_lost_answer_is_seen_unless_its_connection_broke() {
        let mut log = healthy(1, 100);
        log.answers.remove(50);
        assert_eq!(
            (check_numbers(&log).lost, check_numbers(&log).examples),
            (1, vec![150])
        );
        log.broken.push((0, MonotonicNs(1), 50, "reset".into()));
        assert_eq!(check_numbers(&log).lost, 0);
        log.answers.remove(60);
        assert_eq!(check_numbers(&log).lost, 1, "one break excuses one hole");
    }

    #[test]
    fn a_repeated_number_is_seen() {
        let mut log = healthy(2, 100);
        log.answers[60].number = log.answers[59].number;
        let check = check_numbers(&log);
        assert_eq!((check.repeated, check.lost), (1, 1));
    }

    #[test]
    fn a_service_that_lives_twice_is_seen() {
        // After answer 159 it starts over from 140; what was 160.. never happens.
        let mut log = healthy(1, 80);
        for (i, answer) in log.answers[60..].iter_mut().enumerate() {
            answer.number = 140 + i as u64;
        }
        let check = check_numbers(&log);
        assert_eq!(
            (check.repeated, check.went_back),
            (20, 19),
            "140 to 158 are below 159"
        );
        // Without any number twice it is still seen: two answers swapped in time.
        let mut log = healthy(1, 80);
        (log.answers[60].number, log.answers[61].number) = (161, 160);
        assert_eq!(
            (check_numbers(&log).repeated, check_numbers(&log).went_back),
            (0, 1)
        );
    }

    #[test]
    fn overlapping_requests_may_be_served_in_any_order() {
        let at = |client, sent, answered, number| Answer {
            client,
            seq: 0,
            sent_ns: MonotonicNs(sent),
            answered_ns: MonotonicNs(answered),
            number,
        };
        let log = ClientLog {
            answers: vec![at(0, 1, 5, 2), at(1, 2, 9, 1)],
            ..ClientLog::default()
        };
        assert_eq!(check_numbers(&log).went_back, 0);
    }

    #[test]
    fn an_acknowledged_record_that_is_not_on_the_disk_is_named() {
        let log = healthy(1, 10);
        let disk = |ranges: &[(u64, u64)]| DiskRecords {
            ranges: ranges.to_vec(),
            oldest_kept: 0,
            damaged: 0,
        };
        assert!(missing_on_disk(&log, &disk(&[(0, 50), (99, 200)])).is_empty());
        assert_eq!(
            missing_on_disk(&log, &disk(&[(100, 103), (105, 108)])),
            [104, 109]
        );
        assert_eq!(missing_on_disk(&log, &disk(&[])).len(), 10);
        let round = DiskRecords {
            oldest_kept: 105,
            ..disk(&[(105, 108)])
        };
        assert_eq!(missing_on_disk(&log, &round), [109]);
    }

    #[test]
    fn the_gap_is_the_worst_client_s_and_a_silent_one_counts() {
        let mut log = healthy(2, 100);
        // Client 1 hears nothing from 51.5 ms to 81.5 ms.
        log.answers
            .retain(|a| a.client == 0 || !(52_000_000..81_000_000).contains(&a.answered_ns.0));
        let gap = longest_gap(
            &log.answers,
            MonotonicNs(50_000_000),
            MonotonicNs(90_000_000),
        )
        .unwrap();
        assert_eq!((gap.from_ns.0, gap.us()), (51_500_000, 30_000));
        let before = longest_gap_within(
            &log.answers,
            MonotonicNs(10_000_000),
            MonotonicNs(50_000_000),
        )
        .unwrap();
        assert_eq!(before.us(), 2_000);
        log.answers
            .retain(|a| a.client == 0 || a.answered_ns.0 < 20_000_000);
        let gap = longest_gap(
            &log.answers,
            MonotonicNs(50_000_000),
            MonotonicNs(90_000_000),
        )
        .unwrap();
        assert_eq!(
            gap.us(),
            70_500,
            "from 19.5 ms on, and still waiting at 90 ms"
        );
        assert_eq!(silent_since(&log.answers, 2, MonotonicNs(50_000_000)), 1);
        assert_eq!(longest_gap(&[], MonotonicNs(0), MonotonicNs(9)), None);
    }
}
