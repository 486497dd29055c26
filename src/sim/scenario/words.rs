//! Events and expectations as sentences.

use super::{Event, Expect, Network, ProofKind, Who};
use crate::ha::time::Millis;
use crate::pool::POOL_HOSTS_MAX;

/// A sentence that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadWords(pub String);

/// Every sentence there is, for errors and documentation. Upper case stands for a host, a time,
/// a number or a network.
pub(super) const EVENTS: [&str; 17] = [
    "crash HOST",
    "power HOST on",
    "freeze HOST for TIME",
    "cut HOST from HOST",
    "cut HOST to HOST one way",
    "cut the NETWORK network of HOST",
    "heal the networks",
    "lose NUMBER percent of all packets",
    "take the registry from HOST",
    "give the registry back to HOST",
    "take disk NUMBER from HOST",
    "give disk NUMBER back to HOST",
    "take the gateway from HOST",
    "give the gateway back to HOST",
    "stop the leader of etcd",
    "the fence agents fail",
    "the fence agents work",
];

/// The same of expectations.
pub(super) const EXPECTATIONS: [&str; 12] = [
    "the VMs of HOST may restart within TIME",
    "the VMs of HOST are not restarted",
    "nobody resets",
    "nobody else resets",
    "HOST resets within TIME",
    "HOST stays",
    "HOST is given up within TIME",
    "another host coordinates within TIME",
    "all are members within TIME",
    "HOST is proved dead by the watchdog",
    "HOST is proved dead by its power",
    "HOST is proved dead by its farewell",
];

/// What stood where the pattern has a word in upper case.
enum Slot {
    Host(Who),
    Time(Millis),
    Number(u64),
    Network(Network),
}

/// Longest time, a year: sums of several stay far from the end of numbers.
const TIME_MS_MAX: u64 = 365 * 24 * 3_600_000;

/// A length of time: a number and `ms`, `s`, `min` or `h`.
///
/// # Errors
/// If it is none.
pub fn duration(text: &str) -> Result<Millis, BadWords> {
    let bad = || {
        BadWords(format!(
            "`{text}` is no time; write a number and ms, s, min or h, like \"20 s\", of at most a year"
        ))
    };
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .ok_or_else(bad)?;
    let (number, unit) = text.split_at(end);
    let scale: u64 = match unit.trim() {
        "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(bad()),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let mut millis = whole.checked_mul(scale).ok_or_else(bad)?;
    if !part.is_empty() {
        let digits: u64 = part.parse().map_err(|_| bad())?;
        let ten = 10_u64
            .checked_pow(u32::try_from(part.len()).map_err(|_| bad())?)
            .ok_or_else(bad)?;
        let part = digits.checked_mul(scale).ok_or_else(bad)? / ten;
        millis = millis.checked_add(part).ok_or_else(bad)?;
    }
    if millis > TIME_MS_MAX {
        return Err(bad());
    }
    Ok(Millis(millis))
}

/// The name of a host by index: `a` to `z`, then `a1`, `b1`, …
#[must_use]
pub fn host_name(index: usize) -> String {
    let letter = char::from(b'a' + u8::try_from(index % 26).unwrap_or(0));
    match index / 26 {
        0 => letter.to_string(),
        round => format!("{letter}{round}"),
    }
}

fn host(words: &[&str], hosts: usize) -> Result<Option<(Who, usize)>, BadWords> {
    let who = match words {
        ["the", "coordinator", ..] => (Who::Coordinator, 2),
        ["another", "host", ..] => (Who::Another, 2),
        ["all" | "everybody", ..] => (Who::All, 1),
        [name, ..] => match (0..POOL_HOSTS_MAX).find(|index| host_name(*index) == *name) {
            Some(index) if index < hosts => (Who::Host(index), 1),
            Some(_) => {
                return Err(BadWords(format!(
                    "there is no host `{name}`: the case has {hosts}, a to {}",
                    host_name(hosts.saturating_sub(1))
                )));
            }
            None => return Ok(None),
        },
        [] => return Ok(None),
    };
    Ok(Some(who))
}

/// Match a sentence against a pattern.
fn matches(pattern: &str, text: &str, hosts: usize) -> Result<Option<Vec<Slot>>, BadWords> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut at = 0;
    let mut slots = Vec::new();
    for expected in pattern.split(' ') {
        let rest = &words[at.min(words.len())..];
        let taken = match expected {
            "HOST" => match host(rest, hosts)? {
                Some((who, taken)) => {
                    slots.push(Slot::Host(who));
                    taken
                }
                None => return Ok(None),
            },
            "TIME" => {
                // "20 s" or "20s".
                let two = rest.get(..2).map(|two| two.join(" "));
                match two.as_deref().map(duration) {
                    Some(Ok(time)) => {
                        slots.push(Slot::Time(time));
                        2
                    }
                    _ => match rest.first().map(|one| duration(one)) {
                        Some(Ok(time)) => {
                            slots.push(Slot::Time(time));
                            1
                        }
                        _ => return Ok(None),
                    },
                }
            }
            "NUMBER" => match rest.first().and_then(|word| word.parse().ok()) {
                Some(number) => {
                    slots.push(Slot::Number(number));
                    1
                }
                None => return Ok(None),
            },
            "NETWORK" => {
                let network = match rest.first() {
                    Some(&"management") => Network::Management,
                    Some(&"interconnect") => Network::Interconnect,
                    _ => return Ok(None),
                };
                slots.push(Slot::Network(network));
                1
            }
            word if rest.first() == Some(&word) => 1,
            _ => return Ok(None),
        };
        at += taken;
    }
    Ok((at == words.len()).then_some(slots))
}

/// The first pattern that fits, by its index.
fn find(
    patterns: &[&str],
    text: &str,
    hosts: usize,
    what: &str,
) -> Result<(usize, Vec<Slot>), BadWords> {
    for (index, pattern) in patterns.iter().enumerate() {
        if let Some(slots) = matches(pattern, text, hosts)? {
            return Ok((index, slots));
        }
    }
    let near = patterns
        .iter()
        .min_by_key(|pattern| strsim::damerau_levenshtein(pattern, text))
        .unwrap_or(&"");
    Err(BadWords(format!(
        "`{text}` is no {what} that is known; the nearest is \"{near}\". HOST is a letter, \"the coordinator\", \"another host\" or \"all\""
    )))
}

/// Read one event.
pub(super) fn event(text: &str, hosts: usize) -> Result<Event, BadWords> {
    let (index, slots) = find(&EVENTS, text, hosts, "event")?;
    Ok(match (index, slots.as_slice()) {
        (0, [Slot::Host(who)]) => Event::Crash(*who),
        (1, [Slot::Host(who)]) => Event::PowerOn(*who),
        (2, [Slot::Host(who), Slot::Time(time)]) => Event::Freeze(*who, *time),
        (3, [Slot::Host(a), Slot::Host(b)]) => Event::Cut(*a, *b),
        (4, [Slot::Host(a), Slot::Host(b)]) => Event::CutOneWay(*a, *b),
        (5, [Slot::Network(network), Slot::Host(who)]) => Event::CutNetwork(*network, *who),
        (6, []) => Event::HealNetworks,
        (7, [Slot::Number(percent)]) if *percent <= 100 => Event::Lose(percent * 10),
        (8, [Slot::Host(who)]) => Event::TakeRegistry(*who),
        (9, [Slot::Host(who)]) => Event::GiveRegistry(*who),
        (10, [Slot::Number(disk), Slot::Host(who)]) if *disk < 3 => {
            Event::TakeDisk(u8::try_from(*disk).unwrap_or(0), *who)
        }
        (11, [Slot::Number(disk), Slot::Host(who)]) if *disk < 3 => {
            Event::GiveDisk(u8::try_from(*disk).unwrap_or(0), *who)
        }
        (12, [Slot::Host(who)]) => Event::TakeGateway(*who),
        (13, [Slot::Host(who)]) => Event::GiveGateway(*who),
        (14, []) => Event::StopLeader,
        (15, []) => Event::FenceAgents(false),
        (16, []) => Event::FenceAgents(true),
        _ => return Err(BadWords(format!("`{text}`: the number is too large"))),
    })
}

/// Read one expectation.
pub(super) fn expect(text: &str, hosts: usize) -> Result<Expect, BadWords> {
    let text = match text {
        "all stay" => "all stays",
        other => other,
    };
    let (index, slots) = find(&EXPECTATIONS, text, hosts, "expectation")?;
    Ok(match (index, slots.as_slice()) {
        (0, [Slot::Host(who), Slot::Time(time)]) => Expect::MayRestart(*who, *time),
        (1, [Slot::Host(who)]) => Expect::NoRestart(*who),
        (2, []) => Expect::NobodyResets,
        (3, []) => Expect::NobodyElseResets,
        (4, [Slot::Host(who), Slot::Time(time)]) => Expect::Resets(*who, *time),
        (5, [Slot::Host(who)]) => Expect::Stays(*who),
        (6, [Slot::Host(who), Slot::Time(time)]) => Expect::GivenUp(*who, *time),
        (7, [Slot::Time(time)]) => Expect::AnotherCoordinates(*time),
        (8, [Slot::Time(time)]) => Expect::AllMembers(*time),
        (9, [Slot::Host(who)]) => Expect::Proved(*who, ProofKind::Watchdog),
        (10, [Slot::Host(who)]) => Expect::Proved(*who, ProofKind::Power),
        (11, [Slot::Host(who)]) => Expect::Proved(*who, ProofKind::Farewell),
        _ => return Err(BadWords(format!("`{text}` is not understood"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_is_understood() {
        let fill = |pattern: &str| {
            pattern
                .replacen("HOST", "a", 1)
                .replacen("HOST", "the coordinator", 1)
                .replace("TIME", "20 s")
                .replace("NUMBER", "1")
                .replace("NETWORK", "management")
        };
        for pattern in EVENTS {
            assert!(event(&fill(pattern), 3).is_ok(), "{pattern}");
        }
        for pattern in EXPECTATIONS {
            assert!(expect(&fill(pattern), 3).is_ok(), "{pattern}");
        }
        assert_eq!(
            event("freeze the coordinator for 20 s", 3),
            Ok(Event::Freeze(Who::Coordinator, Millis(20_000)))
        );
        assert_eq!(expect("all stay", 3), Ok(Expect::Stays(Who::All)));
        assert_eq!(
            event("take disk 2 from c", 3),
            Ok(Event::TakeDisk(2, Who::Host(2)))
        );
    }

    #[test]
    fn what_is_not_understood_is_named_with_the_nearest_sentence() {
        let told = event("frees a for 20 s", 3).unwrap_err().to_string();
        assert!(told.contains("freeze HOST for TIME"), "{told}");
        let told = event("crash d", 3).unwrap_err().to_string();
        assert!(
            told.contains("no host `d`") && told.contains("a to c"),
            "{told}"
        );
        assert!(expect("b resets soon", 3).is_err());
        assert!(event("lose 101 percent of all packets", 3).is_err());
    }

    #[test]
    fn times_have_units() {
        for (text, ms) in [
            ("20 s", 20_000),
            ("100ms", 100),
            ("1.5 s", 1500),
            ("2 min", 120_000),
            ("1 h", 3_600_000),
        ] {
            assert_eq!(duration(text), Ok(Millis(ms)), "{text}");
        }
        for bad in [
            "20",
            "s",
            "20 m",
            "1.2.3 s",
            "-1 s",
            "",
            "8761 h",
            "18446744073709551615.9 ms",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
