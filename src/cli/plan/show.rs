//! Answers of the planner as text for people.

use super::{Checked, Explained, Most};
use crate::plan::advice::{Step, Ways};
use crate::plan::answer::{Answer, Down, Word, fail};
use crate::plan::largest::Largest;
use crate::plan::model::{Bytes, Fails, HostState, Pool};
use crate::plan::restart::{By, RestartPlan};
use crate::plan::whatif::{Admission, WhatIf};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;

/// Rows of a table that are shown before the rest is counted.
const ROWS_MAX: usize = 20;

/// Print; whoever reads may have read enough.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn failures(pool: &Pool, r: u32) -> String {
    let what = match pool.fails {
        Fails::Host => "host",
        Fails::Domain => "domain",
    };
    match r {
        0 => "no further failure".into(),
        1 => format!("any one {what} failure"),
        n => format!("any {n} {what} failures"),
    }
}

/// The answer's first line: file, word, for what.
fn headline(out: &mut String, file: &str, answer: &Answer, pool: &Pool) {
    let what = failures(pool, answer.tolerate);
    let _ = match answer.answer {
        Word::Survives => writeln!(out, "{file}: SURVIVES {what}"),
        Word::Overcommitted => writeln!(out, "{file}: OVERCOMMITTED, not survived: {what}"),
        Word::Unknown => writeln!(out, "{file}: UNKNOWN whether it survives {what}"),
    };
}

fn capital(sentence: &str) -> String {
    let mut chars = sentence.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}

fn details(out: &mut String, answer: &Answer) {
    let _ = writeln!(out, "  {}.", capital(&answer.sentence()));
    match (&answer.failing, &answer.tightest) {
        (Some(failing), _) => {
            down(out, &failing.left_over);
            if !failing.fewest {
                out.push_str("  (another choice might leave fewer of them down)\n");
            }
        }
        (None, Some(tightest)) if answer.answer == Word::Survives => {
            let _ = writeln!(
                out,
                "  The tightest: if {}, {} % of what is free now is left.",
                fail(&tightest.failed),
                tightest.spare_percent
            );
        }
        _ => {}
    }
}

fn down(out: &mut String, left_over: &[Down]) {
    if left_over.is_empty() {
        return;
    }
    let width = (left_over.iter().map(|d| d.vm.len()))
        .max()
        .unwrap_or(0)
        .max(10);
    let _ = writeln!(
        out,
        "    {:<width$} {:>10}  {:<11} RAN ON",
        "STAYS DOWN", "MEMORY", "PRIORITY"
    );
    for d in left_over.iter().take(ROWS_MAX) {
        let _ = writeln!(
            out,
            "    {:<width$} {:>10}  {:<11} {}",
            d.vm,
            d.memory.to_string(),
            d.priority.word(),
            d.host
        );
    }
    if left_over.len() > ROWS_MAX {
        let _ = writeln!(out, "    and {} more", left_over.len() - ROWS_MAX);
    }
}

fn remarks(out: &mut String, remarks: &[String]) {
    for remark in remarks.iter().take(ROWS_MAX) {
        let _ = writeln!(out, "  NOTE {remark}");
    }
    if remarks.len() > ROWS_MAX {
        let _ = writeln!(out, "  NOTE and {} more", remarks.len() - ROWS_MAX);
    }
}

pub(super) fn checked(checked: &Checked, pool: &Pool) -> String {
    let mut out = String::new();
    headline(&mut out, &checked.file, &checked.answer, pool);
    let verified = if checked.verified == Some(true) {
        "; the proof was verified"
    } else {
        ""
    };
    let _ = writeln!(
        out,
        "  {} hosts, {} running VMs, {} sets of failures{verified}.",
        checked.hosts, checked.vms, checked.answer.sets
    );
    details(&mut out, &checked.answer);
    remarks(&mut out, &checked.remarks);
    if checked.answer.answer == Word::Overcommitted {
        let _ = writeln!(
            out,
            "  What to do about it: pollux plan explain --pool {}",
            checked.file
        );
    }
    out
}

pub(super) fn most(most: &Most, pool: &Pool) -> String {
    let mut out = format!("{}:\n", most.file);
    for class in &most.classes {
        one_class(&mut out, class, pool);
    }
    out
}

fn one_class(out: &mut String, largest: &Largest, pool: &Pool) {
    let what = match pool.fails {
        Fails::Host => "hosts",
        Fails::Domain => "domains",
    };
    let _ = match largest.survives {
        Some(r) => writeln!(
            out,
            "  {:<23} survives {r} of {} {what}",
            largest.class, largest.of
        ),
        None => writeln!(out, "  {:<23} is not whole even now", largest.class),
    };
    if let Some(next) = &largest.next {
        let _ = writeln!(
            out,
            "    with {}: {}",
            failures(pool, next.tolerate),
            next.sentence()
        );
        if let Some(failing) = &next.failing {
            down(out, &failing.left_over);
        }
    }
}

pub(super) fn restart(plan: &RestartPlan) -> String {
    let dead: Vec<String> = plan.dead.iter().map(ToString::to_string).collect();
    let mut out = format!(
        "dead: {}; {}\n",
        crate::plan::answer::list(&dead),
        match plan.by {
            By::Certificate => "placed by the proof",
            By::Search => "placed by a search of this moment",
        }
    );
    for vm in &plan.go_on {
        let _ = writeln!(
            out,
            "  {} goes on at its standby on {}, at once",
            vm.vm, vm.host
        );
    }
    for measure in &plan.measures {
        let _ = match measure.shrink_to {
            Some(to) => writeln!(
                out,
                "  LAST RESORT: shrink {} on {} to {to}",
                measure.vm, measure.host
            ),
            None => writeln!(
                out,
                "  LAST RESORT: stop {} on {}",
                measure.vm, measure.host
            ),
        };
    }
    if !plan.starts.is_empty() {
        let _ = writeln!(
            out,
            "  {:>3}  {:<20} {:<16} {:>7} {:>6}  {:<11} {:>5}",
            "#", "START", "ON", "AFTER", "BATCH", "PRIORITY", "ORDER"
        );
    }
    for (n, start) in plan.starts.iter().enumerate() {
        let _ = write!(
            out,
            "  {:>3}  {:<20} {:<16} {:>5} s {:>6}  {:<11} {:>5}",
            n + 1,
            start.vm,
            start.host.to_string(),
            start.after_s.0,
            start.batch,
            start.priority.word(),
            start.order
        );
        if start.reserved {
            out.push_str("  on its reservation");
        }
        if !start.after.is_empty() {
            let _ = write!(out, "  after {}", start.after.join(", "));
        }
        out.push('\n');
    }
    down(&mut out, &plan.left_over);
    if !plan.fewest {
        out.push_str("  (another choice might leave fewer of them down)\n");
    }
    for standby in &plan.standbys {
        let _ = match &standby.host {
            Some(host) => writeln!(out, "  then a new standby of {} on {host}", standby.vm),
            None => writeln!(
                out,
                "  no host has room for a new standby of {}; it stays without",
                standby.vm
            ),
        };
    }
    out
}

pub(super) fn whatif(what: &WhatIf) -> String {
    let word = match what.admission {
        Admission::Admitted => "ADMITTED",
        Admission::Warned => "ADMITTED, with a WARNING",
        Admission::Refused => "REFUSED",
    };
    let mut out = format!("{word}: {}.\n", what.reason);
    for detail in what.details.iter().take(ROWS_MAX) {
        let _ = writeln!(out, "  {detail}");
    }
    if let Some(failing) = what.after.as_ref().and_then(|after| after.failing.as_ref()) {
        down(&mut out, &failing.left_over);
    }
    out
}

/// What one host holds.
#[derive(Serialize)]
pub(super) struct HostLine {
    name: String,
    state: HostState,
    domain: Option<String>,
    /// For VMs.
    memory: Bytes,
    runs: usize,
    running: Bytes,
    standbys: Bytes,
    free: Bytes,
}

pub(super) fn host_lines(pool: &Pool) -> Vec<HostLine> {
    let line = |host: &crate::plan::model::Host| {
        let here = || {
            pool.vms
                .iter()
                .filter(|vm| vm.host.as_ref() == Some(&host.name))
        };
        let held = pool
            .vms
            .iter()
            .filter(|vm| vm.standby.as_ref() == Some(&host.name));
        let memory = host.memory.0 - host.overhead.0;
        let running: u64 = here().map(|vm| vm.memory.0).sum();
        let standbys: u64 = held.map(|vm| vm.memory.0).sum();
        HostLine {
            name: host.name.to_string(),
            state: host.state,
            domain: host.domain.clone(),
            memory: Bytes(memory),
            runs: here().count(),
            running: Bytes(running),
            standbys: Bytes(standbys),
            free: Bytes(memory.saturating_sub(running + standbys)),
        }
    };
    pool.hosts.iter().map(line).collect()
}

pub(super) fn explained(explained: &Explained, pool: &Pool) -> String {
    let mut out = String::new();
    headline(&mut out, &explained.file, &explained.answer, pool);
    details(&mut out, &explained.answer);
    let _ = writeln!(
        out,
        "  {:<16} {:<11} {:<10} {:>10} {:>4} {:>10} {:>10} {:>10}",
        "HOST", "STATE", "DOMAIN", "FOR VMS", "VMS", "RUNNING", "RESERVED", "FREE"
    );
    for host in &explained.hosts {
        let state = match host.state {
            HostState::Live => "live",
            HostState::Maintenance => "maintenance",
            HostState::Failed => "failed",
        };
        let _ = writeln!(
            out,
            "  {:<16} {state:<11} {:<10} {:>10} {:>4} {:>10} {:>10} {:>10}",
            host.name,
            host.domain.as_deref().unwrap_or("-"),
            host.memory.to_string(),
            host.runs,
            host.running.to_string(),
            host.standbys.to_string(),
            host.free.to_string()
        );
    }
    remarks(&mut out, &explained.remarks);
    if let Some(ways) = &explained.advice {
        advice(&mut out, ways, &explained.answer);
    }
    out
}

fn advice(out: &mut String, ways: &Ways, answer: &Answer) {
    out.push_str("  What makes it safe again, one of these:\n");
    for (what, advice) in [
        ("live moves", &ways.moves),
        ("changed protections", &ways.protections),
        ("VMs stopped", &ways.stops),
    ] {
        if advice.steps.is_empty() {
            let _ = writeln!(out, "  - {what}: none were found that are enough");
            continue;
        }
        let fewest = if advice.fewest {
            "no fewer are enough"
        } else {
            "fewer may be enough"
        };
        let _ = writeln!(out, "  - {what} ({}, {fewest}):", advice.steps.len());
        for step in &advice.steps {
            let _ = match step {
                Step::Move {
                    vm,
                    memory,
                    from,
                    to,
                } => {
                    writeln!(out, "      move {vm} ({memory}) from {from} to {to}")
                }
                Step::Restart { vm, memory } => writeln!(
                    out,
                    "      {vm}: protection = \"restart\"; gives {memory} back to its partner"
                ),
                Step::Stop { vm, memory } => writeln!(out, "      stop {vm} ({memory})"),
                Step::BestEffort { vm, memory } => writeln!(
                    out,
                    "      {vm}: priority = \"best-effort\"; its {memory} are restarted if room is left"
                ),
            };
        }
    }
    let lacking: u64 = (answer.failing.iter())
        .flat_map(|failing| &failing.left_over)
        .map(|d| d.memory.0)
        .sum();
    if lacking > 0 {
        let _ = writeln!(
            out,
            "  - more room: this failure alone lacks {} for what stays down; see `pollux plan whatif --add-host`",
            Bytes(lacking)
        );
    }
}
