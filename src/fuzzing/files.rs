//! Files that people write, and what fence agents print.

use crate::daemon::config::HostConfig;
use crate::fence::config::{FenceConfig, TIMEOUT_S_MAX};
use crate::fence::metadata::actions;
use crate::pool::HostId;
use crate::sim::scenario::{Event, Expect, Scenario, Who};
use std::path::Path;

/// What an agent says it can do.
pub(super) fn fence_metadata(data: &[u8]) {
    let xml = String::from_utf8_lossy(data);
    let found = actions(&xml);
    assert!(found.len() <= xml.matches("<action").count());
    for action in found {
        assert!(xml.contains(&action) && !action.contains(['>', ' ', '\n']));
    }
}

/// How hosts are powered off.
pub(super) fn fence_config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(config) = FenceConfig::parse(&text) else {
        return;
    };
    for host in &config.hosts {
        assert_eq!(config.host(&host.name), Some(host), "each host once");
        for device in host.levels.iter().flat_map(|level| &level.devices) {
            assert!(device.verify && (1..=TIMEOUT_S_MAX).contains(&device.timeout().as_secs()));
            for (key, value) in &device.parameters {
                let line = format!("{key}={value}");
                assert!(!line.contains(char::is_control), "one line to the agent");
            }
        }
    }
}

/// A host's configuration, `[pool]` with it.
pub(super) fn host_config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let path = Path::new("/etc/pollux/host.toml");
    let Ok(config) = HostConfig::parse(&text, path) else {
        return;
    };
    let again = toml::to_string(&config).expect("what was read can be written");
    let back = HostConfig::parse(&again, path).unwrap_or_else(|e| panic!("{e}\n{again}"));
    assert_eq!(toml::to_string(&back).ok(), Some(again));
    let timing = config.timing();
    assert!(timing.claim_delay <= timing.detection);
    let Some(pool) = &config.pool else {
        return;
    };
    let own = pool.host(&config.name).expect("this host is in its pool");
    assert_eq!(pool.host_by_id(HostId(own.id)), Some(own));
    let addresses = pool.hosts.iter().flat_map(|host| host.addresses.values());
    for address in addresses {
        let _ = pool.socket(*address);
    }
    let timing = pool.timing.timing();
    assert!(timing.watchdog_bound(timing.watchdog) > timing.lease);
}

/// A file of cases.
pub(super) fn scenario(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(scenario) = Scenario::parse(&text, "fuzzed") else {
        return;
    };
    for case in &scenario.cases {
        let there = |who: &Who| !matches!(who, Who::Host(index) if *index >= case.hosts.0);
        assert!(case.hosts.0 >= 1 && case.hosts.0 <= case.hosts.1);
        assert!(case.events.is_sorted_by_key(|(at, ..)| *at));
        for (_, event, _) in &case.events {
            assert!(event.about().iter().all(there), "{event:?}");
            let _ = event.in_lab(case.registry);
            if let Event::Lose(permille) = event {
                assert!(*permille <= 1000);
            }
        }
        for (expect, _) in &case.expect {
            let about = match expect {
                Expect::MayRestart(who, _)
                | Expect::NoRestart(who)
                | Expect::Resets(who, _)
                | Expect::Stays(who)
                | Expect::GivenUp(who, _)
                | Expect::Proved(who, _) => *who,
                Expect::NobodyResets
                | Expect::NobodyElseResets
                | Expect::AnotherCoordinates(_)
                | Expect::AllMembers(_) => Who::All,
            };
            assert!(there(&about), "{expect:?}");
        }
    }
}
