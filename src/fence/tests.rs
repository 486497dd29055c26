//! Power fencing with real processes: scripts that speak the API, and Debian's `fence_dummy`.

use super::agent::{Action, CAPTURE_BYTES_MAX, CallError, Cancel, call};
use super::config::FenceConfig;
use super::job::{Job, Outcome, Power, check};
use crate::pool::HostName;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;

/// Reads its parameters, and then behaves: the state of its switch is a file.
const GOOD: &str = r#"
case $action in
metadata) echo '<actions><action name="off"/></actions>';;
off) echo off > "$plug"; echo "off $plug" >> "$log";;
status) [ "$(cat "$plug" 2>/dev/null)" = off ] && exit 2; exit 0;;
esac
exit 0"#;

struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// An agent that has its parameters as shell variables.
    fn agent(&self, name: &str, body: &str) -> &Self {
        let read = "while IFS='=' read -r key value; do eval \"$key=\\$value\"; done\n";
        let path = self.dir.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{read}{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// A configuration: levels of agents; the plug of each is its name.
    fn config(&self, levels: &[&[&str]], more: &str) -> FenceConfig {
        let mut text = format!(
            "lab = true\nagents_dir = {:?}\n[[host]]\nname = 'a'\n",
            self.dir.path()
        );
        for level in levels {
            text.push_str("[[host.level]]\n");
            for agent in *level {
                text.push_str(&format!(
                    "[[host.level.device]]\nagent = '{agent}'\nretries = 0\n{more}\n\
                     parameters = {{ plug = {:?}, log = {:?} }}\n",
                    self.path(&format!("plug-{agent}")),
                    self.path("log")
                ));
            }
        }
        FenceConfig::parse(&text).unwrap()
    }

    fn off(&self, levels: &[&[&str]]) -> Outcome {
        Job::start(&self.config(levels, ""), &host())
            .unwrap()
            .wait()
    }
}

fn host() -> HostName {
    HostName::new("a").unwrap()
}

fn reasons(outcome: &Outcome) -> Vec<(usize, &str)> {
    match outcome {
        Outcome::Failed { reasons } => reasons.iter().map(|r| (r.level, r.why.as_str())).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_off_that_the_status_confirms_is_proof() {
    let bed = Bed::new();
    bed.agent("fence_good", GOOD);
    let outcome = bed.off(&[&["fence_good"]]);
    assert!(
        matches!(&outcome, Outcome::Confirmed { level: 1, agents, .. } if agents == &["fence_good"]),
        "{outcome:?}"
    );
}

#[test]
fn a_success_whose_status_still_says_on_is_no_proof() {
    let bed = Bed::new();
    bed.agent(
        "fence_liar",
        "[ $action = metadata ] && echo '<action name=\"off\"/>'; exit 0",
    );
    let outcome = bed.off(&[&["fence_liar"]]);
    assert!(
        reasons(&outcome)[0].1.contains("status says on"),
        "{outcome:?}"
    );
}

#[test]
fn an_agent_that_does_not_know_off_is_no_proof() {
    let bed = Bed::new();
    bed.agent(
        "fence_none",
        "case $action in status) exit 2;; metadata) echo '<action name=\"on\"/>';; esac",
    );
    let outcome = bed.off(&[&["fence_none"]]);
    assert!(
        reasons(&outcome)[0].1.contains("no action `off`"),
        "{outcome:?}"
    );
}

#[test]
fn the_second_level_confirms_when_the_first_fails() {
    let bed = Bed::new();
    bed.agent("fence_bad", "echo no route >&2; exit 1")
        .agent("fence_good", GOOD);
    let outcome = bed.off(&[&["fence_bad"], &["fence_good"]]);
    assert!(
        matches!(outcome, Outcome::Confirmed { level: 2, .. }),
        "{outcome:?}"
    );
}

#[test]
fn a_level_with_one_device_that_fails_does_not_count() {
    let bed = Bed::new();
    bed.agent("fence_bad", "echo no route >&2; exit 1")
        .agent("fence_good", GOOD);
    let outcome = bed.off(&[&["fence_bad", "fence_good"]]);
    let said = reasons(&outcome);
    assert_eq!(said.len(), 1, "{outcome:?}");
    assert!(said[0].1.contains("exit status 1: no route"), "{outcome:?}");
    // The other supply was switched off all the same.
    assert!(
        fs::read_to_string(bed.path("log"))
            .unwrap()
            .contains("fence_good")
    );
}

#[test]
fn other_exit_statuses_and_missing_agents_are_reasons_in_words() {
    let bed = Bed::new();
    bed.agent("fence_odd", "exit 7");
    let outcome = bed.off(&[&["fence_odd"], &["fence_missing"]]);
    let said = reasons(&outcome);
    assert!(
        said[0].0 == 1 && said[0].1.contains("exit status 7"),
        "{outcome:?}"
    );
    assert!(
        said[1].0 == 2 && said[1].1.contains("install the package"),
        "{outcome:?}"
    );
}

/// Ends when no process holds the pipe at `fifo` open for writing any more.
fn wait_for_writers_to_die(mut fifo: fs::File) {
    std::io::Read::read_to_end(&mut fifo, &mut Vec::new()).unwrap();
}

#[test]
fn a_hanging_agent_dies_at_its_deadline_with_all_its_children() {
    let bed = Bed::new();
    let fifo = bed.path("fifo");
    nix::unistd::mkfifo(Path::new(&fifo), nix::sys::stat::Mode::S_IRWXU).unwrap();
    // The child holds the pipe; it would outlive its parent by an hour.
    bed.agent("fence_hang", "sleep 3600 > \"$plug\" &\nsleep 3600");
    let mut config = bed.config(&[&["fence_hang"]], "timeout_s = 1");
    let device = &mut config.hosts[0].levels[0].devices[0];
    device.parameters.insert("plug".into(), fifo.clone());
    let reader = std::thread::spawn(move || fs::File::open(fifo).unwrap());
    let job = Job::start(&config, &host()).unwrap();
    let reader = reader.join().unwrap();
    let outcome = job.wait();
    assert!(
        reasons(&outcome)[0]
            .1
            .contains("no answer to `off` within 1s"),
        "{outcome:?}"
    );
    wait_for_writers_to_die(reader);
}

#[test]
fn a_cancelled_job_kills_its_agent_and_proves_nothing() {
    let bed = Bed::new();
    let fifo = bed.path("fifo");
    nix::unistd::mkfifo(Path::new(&fifo), nix::sys::stat::Mode::S_IRWXU).unwrap();
    bed.agent("fence_hang", "exec sleep 3600 > \"$plug\"");
    let mut config = bed.config(&[&["fence_hang"]], "timeout_s = 600");
    let device = &mut config.hosts[0].levels[0].devices[0];
    device.parameters.insert("plug".into(), fifo.clone());
    let mut job = Job::start(&config, &host()).unwrap();
    let reader = fs::File::open(fifo).unwrap();
    assert_eq!(job.poll(), None);
    job.cancel();
    assert_eq!(job.wait(), Outcome::Cancelled);
    wait_for_writers_to_die(reader);
}

#[test]
fn a_gigabyte_of_output_is_read_and_not_kept() {
    let bed = Bed::new();
    bed.agent("fence_loud", "head -c 1073741824 /dev/zero; exit 2");
    let config = bed.config(&[&["fence_loud"]], "timeout_s = 300");
    let device = &config.hosts[0].levels[0].devices[0];
    let answer = call(
        &config.agents_dir,
        device,
        Action::Status,
        &Cancel::new().unwrap(),
    )
    .unwrap();
    assert_eq!((answer.code, answer.stdout.len()), (2, CAPTURE_BYTES_MAX));
    assert!(answer.complaint().len() <= super::agent::REASON_BYTES_MAX);
}

#[test]
fn the_password_reaches_the_agent_and_nobody_else() {
    let bed = Bed::new();
    fs::write(bed.path("secret"), "hunter2\n").unwrap();
    // Says it aloud as a bad agent would, after looking whether it is where it must not be.
    bed.agent(
        "fence_talker",
        "tr '\\0' ' ' < /proc/$$/cmdline | grep -q hunter2 && exit 9\n\
         tr '\\0' ' ' < /proc/$$/environ | grep -q hunter2 && exit 9\n\
         [ \"$password\" = hunter2 ] || exit 8\necho wrong password $password >&2; exit 1",
    );
    let more = format!("password_file = {:?}", bed.path("secret"));
    let outcome = Job::start(&bed.config(&[&["fence_talker"]], &more), &host())
        .unwrap()
        .wait();
    let said = format!("{outcome:?}");
    assert!(said.contains("exit status 1: wrong password ***"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
    fs::write(bed.path("secret"), "\n").unwrap();
    let config = bed.config(&[&["fence_talker"]], &more);
    let device = &config.hosts[0].levels[0].devices[0];
    let refused = call(
        &config.agents_dir,
        device,
        Action::Off,
        &Cancel::new().unwrap(),
    );
    assert!(matches!(refused, Err(CallError::Password(_))));
}

#[test]
fn a_check_asks_every_level_and_switches_nothing() {
    let bed = Bed::new();
    bed.agent("fence_bad", "exit 1").agent("fence_good", GOOD);
    let checks = check(
        &bed.config(&[&["fence_bad"], &["fence_good"]], ""),
        &host(),
        true,
    )
    .unwrap();
    assert!(checks[0].problem.is_some());
    assert_eq!(
        (checks[1].power.clone(), &checks[1].problem),
        (Ok(Power::On), &None)
    );
    assert!(!Path::new(&bed.path("log")).exists());
}

#[test]
fn debians_dummy_rehearses_and_proves_nothing() {
    let bed = Bed::new();
    let text = format!(
        "lab = true\n[[host]]\nname = 'a'\n[[host.level]]\n[[host.level.device]]\n\
         agent = 'fence_dummy'\nparameters = {{ status_file = {:?} }}\n",
        bed.path("state")
    );
    fs::write(bed.path("state"), "on").unwrap();
    let config = FenceConfig::parse(&text).unwrap();
    let power = check(&config, &host(), true).unwrap().remove(0).power;
    assert_eq!(power, Ok(Power::On));
    let outcome = Job::start(&config, &host()).unwrap().wait();
    assert!(
        matches!(outcome, Outcome::Rehearsed { level: 1, .. }),
        "{outcome:?}"
    );
    assert_eq!(fs::read_to_string(bed.path("state")).unwrap(), "off");
}
