//! The pool and its decisions as text for people.

use crate::api::pool::{DecisionView, PoolHostView, PoolStatus, RestartView};
use serde::Serialize;
use std::fmt::Write;

/// Alerts shown by the status.
const ALERTS_SHOWN: usize = 8;

/// Milliseconds as a person reads them.
fn millis(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => format!("{} s", ms / 1000),
    }
}

fn age(ms: Option<u64>) -> String {
    ms.map_or("never".into(), |ms| format!("{} ago", millis(ms)))
}

pub(super) fn status(s: &PoolStatus) -> String {
    let mut out = String::new();
    let lease = s
        .lease_ms
        .map_or(String::new(), |ms| format!(", lease {} more", millis(ms)));
    let listens = match s.phase.as_str() {
        "member" if !s.judges => " that judges nobody yet",
        _ => "",
    };
    let _ = writeln!(
        out,
        "host {} (number {}, life {}): {}{listens}{lease}, as of {} ago",
        s.host,
        s.id,
        s.incarnation,
        s.phase,
        millis(s.age_ms)
    );
    if let Some(why) = &s.why {
        let _ = writeln!(out, "  because {why}");
    }
    match &s.watchdog.place {
        Some(place) => {
            let timeout = s.watchdog.timeout_ms.map_or(String::new(), |ms| {
                format!(", resets this host after {}", millis(ms))
            });
            let _ = writeln!(out, "watchdog     {}{timeout} ({place})", s.watchdog.state);
        }
        None => out.push_str("watchdog     none: only fencing can prove this host dead\n"),
    }
    let accepts: Vec<_> = s.keys.accepts.iter().map(u32::to_string).collect();
    let _ = writeln!(
        out,
        "keys         sends with {}, accepts {}",
        s.keys.sends,
        accepts.join(" and ")
    );
    match &s.gateway {
        Some(gateway) => {
            let failure = gateway
                .failure
                .as_ref()
                .map_or(String::new(), |why| format!("; {why}"));
            let _ = writeln!(
                out,
                "gateway      {} answered {}{failure}",
                gateway.address,
                age(gateway.age_ms)
            );
        }
        None => out.push_str("gateway      none is configured\n"),
    }
    let error = s
        .registry_error
        .as_ref()
        .map_or(String::new(), |why| format!("\n  WARNING {why}"));
    let _ = writeln!(out, "registry     read {}{error}", age(s.registry_age_ms));
    let coordinator = s
        .coordinator
        .as_ref()
        .map_or("nobody", |host| host.as_str());
    let version = s.state_version.unwrap_or(0);
    let _ = writeln!(
        out,
        "coordinator  {coordinator}, term {}, state {version}\n",
        s.term
    );
    out.push_str(&hosts(s));
    if !s.restarts.is_empty() {
        out.push_str("\nVMs of dead hosts:\n");
        for restart in &s.restarts {
            out.push_str(&restart_line(restart));
        }
    }
    if !s.alerts.is_empty() {
        out.push_str("\nalerts:\n");
        for alert in s.alerts.iter().rev().take(ALERTS_SHOWN).rev() {
            let _ = writeln!(out, "  {} ago: {}", millis(alert.age_ms), alert.text);
        }
    }
    out.push_str("\nwhat was decided and why: pollux why\n");
    out
}

fn hosts(s: &PoolStatus) -> String {
    let mut out = format!(
        "{:<12} {:<8} {:<10} {:<10} {:<10} {:>6} PATHS\n",
        "HOST", "IS", "REGISTRY", "GATEWAY", "WATCHDOG", "WEIGHT"
    );
    for host in &s.hosts {
        let (registry, gateway, watchdog, weight) = columns(s, host);
        let paths = if host.is_self {
            "this host".to_owned()
        } else {
            let path = |p: &crate::api::pool::PathView| {
                format!("{} {} ({})", p.path, p.verdict, age(p.age_ms))
            };
            host.paths.iter().map(path).collect::<Vec<_>>().join(", ")
        };
        let _ = writeln!(
            out,
            "{:<12} {:<8} {registry:<10} {gateway:<10} {watchdog:<10} {weight:>6} {paths}",
            host.name.as_str(),
            host.standing
        );
        if let Some(proof) = &host.proof {
            let _ = writeln!(out, "  {proof}");
        }
        if host.standing == "in" && !host.votes {
            out.push_str("  has just joined: it does not vote yet\n");
        }
        if host.unbound {
            out.push_str(
                "  may run although it is silent: its partner died without the registry. No watchdog bound proves its death; its power being off does\n",
            );
        }
        if host.report.as_ref().is_some_and(|said| !said.storage_ok) {
            out.push_str("  the storage of its VMs does not answer\n");
        }
    }
    out
}

fn columns(s: &PoolStatus, host: &PoolHostView) -> (String, String, String, String) {
    let short = |ms: Option<u64>| ms.map_or("no".into(), millis);
    if host.is_self {
        let gateway = s.gateway.as_ref().and_then(|gateway| gateway.age_ms);
        return (
            short(s.registry_age_ms),
            short(gateway),
            short(s.watchdog.timeout_ms),
            "-".into(),
        );
    }
    match &host.report {
        Some(report) => (
            short(report.registry_age_ms),
            short(report.gateway_age_ms),
            short(report.watchdog_ms),
            report.weight.to_string(),
        ),
        None => ("-".into(), "-".into(), "-".into(), "-".into()),
    }
}

fn restart_line(restart: &RestartView) -> String {
    let to = restart
        .to
        .as_ref()
        .map_or("nowhere".to_owned(), Clone::clone);
    format!(
        "  {} from {} to {to}: {}\n",
        restart.vm, restart.from, restart.state
    )
}

/// What is known about something.
#[derive(Debug, Serialize)]
pub(super) struct Found<'a> {
    decisions: Vec<&'a DecisionView>,
    restarts: Vec<&'a RestartView>,
}

impl Found<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.decisions.is_empty() && self.restarts.is_empty()
    }
}

/// All decisions about `about`.
pub(super) fn about<'a>(s: &'a PoolStatus, about: Option<&str>) -> Found<'a> {
    let Some(about) = about else {
        return Found {
            decisions: s.decisions.iter().collect(),
            restarts: s.restarts.iter().collect(),
        };
    };
    let number = about.trim_start_matches('#').parse::<u64>().ok();
    let decided = |d: &&DecisionView| d.about == about || Some(d.number) == number;
    let restarted = |r: &&RestartView| {
        r.vm == about || r.uuid == about || (number.is_none() && r.from == about)
    };
    Found {
        decisions: s.decisions.iter().filter(decided).collect(),
        restarts: s.restarts.iter().filter(restarted).collect(),
    }
}

pub(super) fn why(s: &PoolStatus, about: Option<&str>, found: &Found<'_>) -> String {
    let mut out = String::new();
    for d in &found.decisions {
        let _ = writeln!(
            out,
            "#{} {} decided: {} {}\n     {}",
            d.number, d.by, d.about, d.what, d.cause
        );
    }
    for r in &found.restarts {
        out.push_str(&restart_line(r));
        let _ = writeln!(out, "     {}", r.cause);
    }
    if found.is_empty() {
        let about = about.unwrap_or("anything");
        let oldest = s.decisions.first().map_or(0, |d| d.number);
        let _ = writeln!(
            out,
            "nothing is known about `{about}`: no host or VM of the pool had anything decided about it since decision #{oldest}, the oldest that is kept"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::HostName;

    fn pool() -> PoolStatus {
        let text = serde_json::json!({
            "host": "a", "id": 0, "incarnation": 7, "phase": "member", "why": null,
            "judges": false, "lease_ms": 2600,
            "watchdog": {"place": "/dev/watchdog", "timeout_ms": 5000, "state": "petting"},
            "gateway": {"address": "10.0.0.1", "age_ms": null, "failure": "no route"},
            "keys": {"sends": 1, "accepts": [1, 2]},
            "registry_age_ms": 300, "registry_error": null, "state_version": 12, "term": 2,
            "coordinator": "a",
            "hosts": [{
                "name": "b", "id": 1, "standing": "dead", "proof": "its power is off",
                "incarnation": 3, "is_self": false, "report": {
                    "incarnation": 3, "seq": 9, "hears": [], "gateway_age_ms": null,
                    "registry_age_ms": null, "storage_ok": false, "standby_lag_ms": null,
                    "weight": 1, "watchdog_ms": null, "farewell": false
                },
                "paths": [{"path": "management", "verdict": "lost", "age_ms": 12_300}]
            }],
            "decisions": [
                {"number": 4, "by": "a", "about": "b", "what": "ousted", "cause": "nobody hears it"},
                {"number": 5, "by": "a", "about": "b", "what": "dead", "cause": "its power is off"}
            ],
            "restarts": [{
                "vm": "orders", "uuid": "6f1c", "from": "b", "to": null, "state": "left",
                "cause": "it fits nowhere"
            }],
            "alerts": [], "age_ms": 40
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn the_status_says_what_is_known_and_how_old_it_is() {
        let text = status(&pool());
        for part in [
            "host a (number 0, life 7): member that judges nobody yet, lease 2.6 s more",
            "sends with 1, accepts 1 and 2",
            "answered never; no route",
            "management lost (12 s ago)",
            "the storage of its VMs does not answer",
            "orders from b to nowhere: left",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn why_finds_hosts_vms_and_numbers() {
        let pool = pool();
        assert_eq!(pool.host, HostName::new("a").unwrap());
        let counts = |name: Option<&str>| {
            let found = about(&pool, name);
            (found.decisions.len(), found.restarts.len())
        };
        assert_eq!(counts(Some("b")), (2, 1));
        assert_eq!(counts(Some("#5")), (1, 0));
        assert_eq!(counts(Some("orders")), (0, 1));
        assert_eq!(counts(None), (2, 1));
        let none = about(&pool, Some("x"));
        assert!(why(&pool, Some("x"), &none).contains("nothing is known about `x`"));
        let text = why(&pool, Some("b"), &about(&pool, Some("b")));
        assert!(
            text.contains("#4 a decided: b ousted\n     nobody hears it"),
            "{text}"
        );
    }
}
