//! Scenario files: TOML with sentences in it.

use super::words::{self, BadWords, duration};
use super::{Event, Expect};
use crate::ha::time::Millis;
use crate::pool::POOL_HOSTS_MAX;
use serde::Deserialize;

/// Largest file, bytes.
const FILE_BYTES_MAX: usize = 1 << 20;

/// A file of cases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// What it is about.
    pub about: String,
    /// The cases.
    pub cases: Vec<Case>,
}

/// What the hosts agree by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegistryKind {
    /// A statefile of one or three disks.
    Statefile {
        /// How many.
        disks: u8,
    },
    /// etcd.
    Etcd,
}

/// Faults drawn from the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random {
    /// How many.
    pub faults: u64,
    /// Within this time.
    pub within: Millis,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its name, unique in the file.
    pub name: String,
    /// Least and most hosts; the seed chooses.
    pub hosts: (usize, usize),
    /// The registry.
    pub registry: RegistryKind,
    /// Whether hosts have watchdogs.
    pub watchdog: bool,
    /// How long a fence agent takes, if there is one.
    pub fencing: Option<Millis>,
    /// Hosts that stand still for up to so long, some times a minute.
    pub stalls: Option<Millis>,
    /// What happens when, in order; and the sentence.
    pub events: Vec<(Millis, Event, String)>,
    /// Faults besides.
    pub random: Option<Random>,
    /// Sum of the weights of each host's VMs; 1 where none is said.
    pub weights: Vec<u32>,
    /// How long it is watched after the last event.
    pub run: Millis,
    /// It is run with no more seeds than this: long cases say so.
    pub seeds_max: Option<u64>,
    /// What must come of it, and the sentence.
    pub expect: Vec<(Expect, String)>,
    /// What XenServer's daemon was measured to do.
    pub xenserver: Option<String>,
}

/// A file that is no scenario.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct BadScenario {
    origin: String,
    what: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    about: String,
    case: Vec<RawCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCase {
    name: String,
    hosts: RawHosts,
    #[serde(default = "default_registry")]
    registry: String,
    #[serde(default = "yes")]
    watchdog: bool,
    fencing: Option<String>,
    stalls: Option<String>,
    #[serde(default)]
    events: Vec<String>,
    random: Option<RawRandom>,
    #[serde(default)]
    weights: Vec<u32>,
    #[serde(default = "default_run")]
    run: String,
    seeds_max: Option<u64>,
    #[serde(default)]
    expect: Vec<String>,
    xenserver: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawHosts {
    Exactly(usize),
    Between([usize; 2]),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRandom {
    faults: u64,
    within: String,
}

fn default_registry() -> String {
    "statefile".into()
}
const fn yes() -> bool {
    true
}
fn default_run() -> String {
    "60 s".into()
}

const KEYS: [&str; 17] = [
    "weights",
    "seeds_max",
    "about",
    "case",
    "name",
    "hosts",
    "registry",
    "watchdog",
    "fencing",
    "stalls",
    "events",
    "random",
    "run",
    "expect",
    "xenserver",
    "faults",
    "within",
];

impl Scenario {
    /// Read a file's text; `origin` is named in errors.
    ///
    /// # Errors
    /// [`BadScenario`]: where, what, and what to write instead.
    pub fn parse(text: &str, origin: &str) -> Result<Self, BadScenario> {
        let bad = |what: String| BadScenario {
            origin: origin.to_owned(),
            what,
        };
        if text.len() > FILE_BYTES_MAX {
            return Err(bad(format!("larger than {FILE_BYTES_MAX} bytes")));
        }
        let raw: RawFile = toml::from_str(text).map_err(|e| bad(explain(text, &e)))?;
        let mut cases: Vec<Case> = Vec::new();
        for raw in raw.case {
            let at = format!("case `{}`", raw.name);
            if cases.iter().any(|case| case.name == raw.name) {
                return Err(bad(format!("{at} is there twice")));
            }
            cases.push(raw.read().map_err(|e| bad(format!("{at}: {e}")))?);
        }
        if cases.is_empty() {
            return Err(bad("it has no [[case]]".into()));
        }
        Ok(Self {
            about: raw.about,
            cases,
        })
    }
}

impl RawCase {
    fn read(self) -> Result<Case, BadWords> {
        let hosts = match self.hosts {
            RawHosts::Exactly(n) => (n, n),
            RawHosts::Between([least, most]) => (least, most),
        };
        if hosts.0 < 1 || hosts.1 < hosts.0 || hosts.1 > POOL_HOSTS_MAX {
            return Err(BadWords(format!(
                "hosts: a pool has 1 to {POOL_HOSTS_MAX}; write a number, or [least, most]"
            )));
        }
        let registry = match self.registry.as_str() {
            "statefile" => RegistryKind::Statefile { disks: 1 },
            "statefile-3" => RegistryKind::Statefile { disks: 3 },
            "etcd" => RegistryKind::Etcd,
            other => {
                return Err(BadWords(format!(
                    "registry `{other}`: use \"statefile\", \"statefile-3\" or \"etcd\""
                )));
            }
        };
        let mut events = Vec::new();
        for text in &self.events {
            let (at, what) = text
                .split_once(':')
                .ok_or_else(|| BadWords(format!("event `{text}`: write \"TIME: what happens\"")))?;
            let event = words::event(what.trim(), hosts.0)?;
            let etcd = registry == RegistryKind::Etcd;
            match event {
                Event::TakeDisk(..) | Event::GiveDisk(..) if etcd => {
                    return Err(BadWords(format!(
                        "event `{text}`: etcd has no disks to take"
                    )));
                }
                Event::StopLeader if !etcd => {
                    return Err(BadWords(format!("event `{text}`: only etcd has a leader")));
                }
                Event::FenceAgents(_) if self.fencing.is_none() => {
                    return Err(BadWords(format!(
                        "event `{text}`: there are no fence agents; set `fencing`"
                    )));
                }
                _ => {}
            }
            events.push((duration(at)?, event, what.trim().to_owned()));
        }
        if !events.is_sorted_by_key(|(at, ..)| *at) {
            return Err(BadWords(
                "events: write them in the order of their times".into(),
            ));
        }
        let expect = self
            .expect
            .iter()
            .map(|text| Ok((words::expect(text, hosts.0)?, text.clone())))
            .collect::<Result<_, BadWords>>()?;
        let time = |text: Option<&String>| text.map(|text| duration(text)).transpose();
        let random = self
            .random
            .map(|random| {
                Ok(Random {
                    faults: random.faults,
                    within: duration(&random.within)?,
                })
            })
            .transpose()?;
        Ok(Case {
            hosts,
            registry,
            watchdog: self.watchdog,
            fencing: time(self.fencing.as_ref())?,
            stalls: time(self.stalls.as_ref())?,
            events,
            random,
            weights: self.weights,
            run: duration(&self.run)?,
            seeds_max: self.seeds_max,
            expect,
            xenserver: self.xenserver,
            name: self.name,
        })
    }
}

fn explain(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(1, |span| {
        text.get(..span.start)
            .map_or(1, |before| before.matches('\n').count() + 1)
    });
    let message = error.message();
    let unknown = message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split('`').next());
    match unknown {
        Some(key) => {
            let near = KEYS
                .iter()
                .min_by_key(|known| strsim::damerau_levenshtein(known, key))
                .unwrap_or(&"");
            format!("line {line}: there is no key `{key}`; did you mean `{near}`?")
        }
        None => format!("line {line}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Who;
    use super::*;

    const GOOD: &str = "\
about = \"x\"
[[case]]
name = \"one\"
hosts = [2, 4]
registry = \"etcd\"
fencing = \"1 s\"
events = [\"5 s: crash b\", \"9 s: stop the leader of etcd\"]
expect = [\"the VMs of b may restart within 5 s\", \"all stay\"]
random = { faults = 3, within = \"1 min\" }
";

    #[test]
    fn a_file_is_read() {
        let read = Scenario::parse(GOOD, "x.toml").unwrap();
        let case = &read.cases[0];
        assert_eq!((case.hosts, case.registry), ((2, 4), RegistryKind::Etcd));
        assert_eq!(case.events[0].1, Event::Crash(Who::Host(1)));
        assert_eq!(case.fencing, Some(Millis(1000)));
        assert_eq!(case.random.unwrap().within, Millis(60_000));
        assert!(case.watchdog && case.run == Millis(60_000));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place_and_remedy() {
        for (from, to, says) in [
            (
                "fencing",
                "fenzing",
                "line 6: there is no key `fenzing`; did you mean `fencing`?",
            ),
            ("[2, 4]", "65", "1 to 64"),
            ("\"etcd\"", "\"zk\"", "registry `zk`"),
            ("\"etcd\"", "\"statefile\"", "only etcd has a leader"),
            ("5 s: crash b", "crash b", "write \"TIME: what happens\""),
            (
                "5 s: crash b",
                "10 s: crash b",
                "in the order of their times",
            ),
            ("crash b", "crash c", "no host `c`: the case has 2"),
            ("all stay", "all flee", "no expectation that is known"),
        ] {
            let told = Scenario::parse(&GOOD.replacen(from, to, 1), "x.toml")
                .unwrap_err()
                .to_string();
            assert!(
                told.starts_with("x.toml: ") && told.contains(says),
                "{told}"
            );
        }
        let twice = format!("{GOOD}[[case]]\nname = \"one\"\nhosts = 2\n");
        assert!(
            Scenario::parse(&twice, "x")
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }
}
