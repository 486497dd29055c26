//! The first process of a host: pid 1 of its pid namespace. When it dies, the kernel
//! kills everything in the host at once.
//!
//! It makes the host's own network, mount and uts namespaces, waits until the keeper
//! has put the cables in, configures them, starts the daemon, and from then on reaps
//! orphans and does what the keeper asks. It must never produce output of its own: on
//! a frozen host it is the one process that still runs.
//!
//! Freezing is one `kill(-1, SIGSTOP)` from here (kill(2): every process of the
//! namespace but its init). The kernel walks the list under its task lock, and a fork
//! under way gets the signal too, so nothing slips through. It needs no cgroup, and
//! so leaves nothing behind. What it is not: the host's kernel part lives on, so a
//! frozen host still answers ARP and acknowledges TCP bytes; and as with any stop,
//! some system calls return EINTR after the thaw (signal(7)).

use super::clock::MonotonicNs;
use super::launch::{StepError, step};
use super::net;
use super::spec::{HostNet, LabPlan};
use super::wire::{DaemonState, InitReply, InitRequest, Process, receive, send};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long the processes of a host may take to stand still after SIGSTOP; one in an
/// uninterruptible wait stops only after it.
const FREEZE_SETTLE_MAX: Duration = Duration::from_secs(2);
/// Pause between two looks whether all of them do.
const FREEZE_LOOK_EVERY: Duration = Duration::from_micros(500);
/// Longest command line in a list of processes, bytes.
const COMMAND_BYTES_MAX: usize = 512;
/// Most processes listed.
const PROCESSES_MAX: usize = 1024;

/// The life of a host's init. Called in a fresh child of the keeper that is pid 1 of a
/// new pid namespace, has one thread and no descriptors but `channel` and the standard
/// three. Returns the exit status.
pub fn host_init_main(plan: &LabPlan, host: &HostNet, channel: &UnixStream) -> i32 {
    match run(plan, host, channel) {
        Ok(()) => 0,
        Err((step, message)) => {
            eprintln!("host {}: {step}: {message}", host.name);
            let _ = send(channel, &InitReply::Failed { step, message }, None);
            1
        }
    }
}

fn run(plan: &LabPlan, host: &HostNet, channel: &UnixStream) -> Result<(), StepError> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)
        .map_err(step("making the host's namespaces"))?;
    nix::unistd::sethostname(host.name.as_str()).map_err(step("setting the host's name"))?;
    mount_fresh("proc", Path::new("/proc"))?;
    // RAM files live in tmpfs, and these two are the host's own: gone with its power.
    mount_fresh("tmpfs", &host.run_dir)?;
    mount_fresh("tmpfs", Path::new("/dev/shm"))?;
    net::disable_ipv6();
    let say = |reply: InitReply| send(channel, &reply, None).map_err(step("answering the keeper"));
    say(InitReply::Born)?;
    match receive(channel).map_err(step("waiting for the cables"))?.0 {
        InitRequest::Wired => {}
        other => return Err(("waiting for the cables".into(), format!("got {other:?}"))),
    }
    let ip = net::find_ip().map_err(step("looking for ip"))?;
    net::ip_batch(&ip, &net::inside_script(host), false)
        .map_err(step("configuring the host's network"))?;

    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block().map_err(step("blocking SIGCHLD"))?;
    let children = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(step("signalfd"))?;
    let mut daemon = start_daemon(plan, host)?;
    say(InitReply::Done {
        at_ns: MonotonicNs::now(),
    })?;
    loop {
        let mut waiting = [
            PollFd::new(channel.as_fd(), PollFlags::POLLIN),
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(("waiting".into(), e.to_string())),
        }
        let asked = waiting[0].any().unwrap_or(false);
        while let Ok(Some(_)) = children.read_signal() {}
        reap(&mut daemon);
        if asked {
            let Ok((request, _)) = receive(channel) else {
                return Ok(()); // the keeper is gone, and this namespace with it
            };
            say(answer(&request, &daemon))?;
        }
    }
}

fn mount_fresh(kind: &str, at: &Path) -> Result<(), StepError> {
    let options = (kind == "tmpfs").then_some("mode=0755");
    let options = if at == Path::new("/dev/shm") {
        Some("mode=1777")
    } else {
        options
    };
    mount(
        Some(kind),
        at,
        Some(kind),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        options,
    )
    .map_err(step(format!("mounting {kind} on {}", at.display())))
}

fn start_daemon(plan: &LabPlan, host: &HostNet) -> Result<DaemonState, StepError> {
    let argv: Vec<String> = plan
        .daemon_argv
        .iter()
        .map(|arg| {
            arg.replace("{config}", &host.config_file.to_string_lossy())
                .replace("{host}", host.name.as_str())
        })
        .collect();
    let Some((program, args)) = argv.split_first() else {
        return Ok(DaemonState::None);
    };
    let log = File::options()
        .create(true)
        .append(true)
        .open(&host.daemon_log)
        .map_err(step(format!("opening {}", host.daemon_log.display())))?;
    let log2 = log.try_clone().map_err(step("opening the daemon's log"))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log2)
        .current_dir(&host.state_dir);
    let before_exec = || {
        // What the keeper and this init block for themselves is not the daemon's: SIGTERM
        // must reach it and its children.
        SigSet::empty().thread_set_mask()?;
        setsid()?;
        Ok(())
    };
    // SAFETY: setsid and sigprocmask are async-signal-safe and touch no memory of ours; this
    // process has one thread.
    unsafe { command.pre_exec(before_exec) };
    let child = command
        .spawn()
        .map_err(step(format!("starting {program}")))?;
    // Reaped by `reap` like every other child.
    Ok(DaemonState::Running(child.id()))
}

fn reap(daemon: &mut DaemonState) {
    loop {
        let (pid, status) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(_) => return,
            Ok(_) => continue,
        };
        if *daemon == DaemonState::Running(pid.as_raw().unsigned_abs()) {
            *daemon = DaemonState::Ended(status);
        }
    }
}

fn answer(request: &InitRequest, daemon: &DaemonState) -> InitReply {
    let failed = |step: &str, message: String| InitReply::Failed {
        step: step.into(),
        message,
    };
    let done = || InitReply::Done {
        at_ns: MonotonicNs::now(),
    };
    match request {
        InitRequest::Wired => failed("wiring", "the host is wired already".into()),
        InitRequest::Freeze => match signal_all(Signal::SIGSTOP) {
            Ok(at_ns) => match wait_still() {
                Ok(()) => InitReply::Done { at_ns },
                Err(running) => failed(
                    "freezing",
                    format!("still running after {FREEZE_SETTLE_MAX:?}: {running}"),
                ),
            },
            Err(e) => failed("freezing", e.to_string()),
        },
        InitRequest::Thaw => match signal_all(Signal::SIGCONT) {
            Ok(at_ns) => InitReply::Done { at_ns },
            Err(e) => failed("thawing", e.to_string()),
        },
        InitRequest::Kill(pid) => match i32::try_from(*pid) {
            // Pids are reaped by their parents inside; the caller has just read this one there.
            Ok(raw) if raw > 1 => match kill(Pid::from_raw(raw), Signal::SIGKILL) {
                Ok(()) => done(),
                Err(e) => failed(&format!("killing process {pid}"), e.to_string()),
            },
            _ => failed(
                &format!("killing process {pid}"),
                "not a process of the host; to kill its init, cut its power".into(),
            ),
        },
        InitRequest::Processes => InitReply::Processes(processes()),
        InitRequest::Daemon => InitReply::Daemon(daemon.clone()),
    }
}

/// Signal every process of the namespace but this one; none there is fine.
fn signal_all(signal: Signal) -> Result<MonotonicNs, Errno> {
    match kill(Pid::from_raw(-1), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(MonotonicNs::now()),
        Err(e) => Err(e),
    }
}

fn wait_still() -> Result<(), String> {
    let end = Instant::now() + FREEZE_SETTLE_MAX;
    loop {
        let running: Vec<String> = processes()
            .into_iter()
            .filter(|p| p.pid != 1 && !matches!(p.state, 'T' | 't' | 'Z' | 'X'))
            .map(|p| format!("{} ({}) {}", p.pid, p.state, p.command))
            .collect();
        if running.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(running.join(", "));
        }
        std::thread::sleep(FREEZE_LOOK_EVERY);
    }
}

fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(process)
        .take(PROCESSES_MAX)
        .collect()
}

/// One process from /proc/PID/stat and cmdline (proc(5)).
fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, state, parent) = parse_stat(&stat)?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text =
        String::from_utf8_lossy(&line[..line.len().min(COMMAND_BYTES_MAX)]).replace('\0', " ");
    let command = if text.trim().is_empty() {
        format!("[{name}]")
    } else {
        text.trim().to_owned()
    };
    Some(Process {
        pid,
        parent,
        state,
        command,
    })
}

/// "PID (NAME) STATE PARENT ..."; the name may hold blanks and brackets itself.
fn parse_stat(stat: &str) -> Option<(&str, char, u32)> {
    let (front, rest) = stat.rsplit_once(") ")?;
    let (_, name) = front.split_once(" (")?;
    let mut fields = rest.split(' ');
    Some((
        name,
        fields.next()?.chars().next()?,
        fields.next()?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_brackets_do_not_confuse_the_state() {
        assert_eq!(parse_stat("7 (a) S (b) T 3 7 7"), Some(("a) S (b", 'T', 3)));
        assert_eq!(parse_stat("7 (a"), None);
        let me = process(std::process::id()).unwrap();
        assert_ne!(me.parent, 0);
    }
}
