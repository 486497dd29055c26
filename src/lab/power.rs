//! Giving a host power and taking it.
//!
//! A dead host says no goodbye: what the kernel would send for its dying sockets must
//! never reach anyone.

use super::clock::MonotonicNs;
use super::keeper::{Keeper, Running};
use super::launch::{StepError, become_init, step};
use super::net;
use super::wire::{InitReply, InitRequest, receive, send};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A host's init has this long to answer; starting a host on a busy machine is the longest.
pub(super) const INIT_TIMEOUT: Duration = Duration::from_secs(20);
/// Before a power cut the host is stopped; if its init does not do that in this time, the cut goes on.
const CUT_STOP_TIMEOUT: Duration = Duration::from_millis(500);

impl Keeper<'_> {
    /// New namespaces on the same disks.
    pub(super) fn power_on(&mut self, index: usize) -> Result<MonotonicNs, StepError> {
        let host = &self.plan.hosts[index];
        let (channel, theirs) = UnixStream::pair().map_err(step("making a channel"))?;
        channel
            .set_read_timeout(Some(INIT_TIMEOUT))
            .map_err(step("making a channel"))?;
        // The next child is pid 1 of a new namespace; the ones after it are ours again.
        unshare(CloneFlags::CLONE_NEWPID).map_err(step(format!(
            "making the pid namespace of host `{}`",
            host.name
        )))?;
        // SAFETY: the keeper has one thread, so the child may do anything.
        let forked = unsafe { fork() };
        if let Ok(ForkResult::Child) = forked {
            become_init(self.plan, host, theirs);
        }
        setns(&self.own_pid_namespace, CloneFlags::CLONE_NEWPID)
            .map_err(step("returning to the lab's pid namespace"))?;
        drop(theirs);
        let Ok(ForkResult::Parent { child }) = forked else {
            return Err((
                format!("forking the init of host `{}`", host.name),
                forked.err().map_or(String::new(), |e| e.to_string()),
            ));
        };
        let running = pidfd_open(child).map(|pidfd| Running {
            init: child,
            pidfd,
            channel,
            frozen: false,
        });
        self.hosts[index] = Some(running.map_err(step("opening a pidfd"))?);
        let wired = self.wire(index, child);
        if wired.is_err() {
            let _ = self.power_cut(index);
        }
        wired
    }

    fn wire(&self, index: usize, init: Pid) -> Result<MonotonicNs, StepError> {
        let host = &self.plan.hosts[index];
        let Some(running) = &self.hosts[index] else {
            return Err(("wiring".into(), "the host is off".into()));
        };
        let what = || format!("starting host `{}`", host.name);
        match receive::<InitReply>(&running.channel)
            .map_err(step(what()))?
            .0
        {
            InitReply::Born => {}
            InitReply::Failed { step, message } => {
                return Err((format!("host `{}`: {step}", host.name), message));
            }
            other => return Err((what(), format!("its init said {other:?}"))),
        }
        net::ip_batch(
            &self.ip,
            &net::wire_script(self.plan, host, init.as_raw()),
            false,
        )
        .map_err(step(what()))?;
        for port in net::ports(self.plan, host) {
            let plugging = || step(format!("plugging {} into {}", port.name, port.bridge));
            net::wire_port(&port, self.wiring(&port)).map_err(plugging())?;
            if let Some((_, rate)) = self.shaped.iter().find(|(p, _)| *p == port) {
                net::shape_port(&port, Some(*rate)).map_err(|e| plugging()(io::Error::other(e)))?;
            }
        }
        super::pool::start_watchdog(host, init)?;
        match ask(&running.channel, &InitRequest::Wired, INIT_TIMEOUT).map_err(step(what()))? {
            InitReply::Done { at_ns } => Ok(at_ns),
            InitReply::Failed { step, message } => {
                Err((format!("host `{}`: {step}", host.name), message))
            }
            other => Err((what(), format!("its init said {other:?}"))),
        }
    }

    /// A dead host says no goodbye: first all its processes stop, then its cables come
    /// off, and only then is it killed, so that no FIN, RST or ICMP of its dying
    /// sockets reaches anyone. The instant returned is the stop.
    pub(super) fn power_cut(&mut self, index: usize) -> Result<MonotonicNs, StepError> {
        let Some(running) = self.hosts[index].take() else {
            return Ok(MonotonicNs::now());
        };
        let stopped = ask(&running.channel, &InitRequest::Freeze, CUT_STOP_TIMEOUT);
        let at_ns = match stopped {
            Ok(InitReply::Done { at_ns }) => at_ns,
            _ => MonotonicNs::now(),
        };
        let host = &self.plan.hosts[index];
        for port in net::ports(self.plan, host) {
            // A port that is not there carries nothing either.
            let _ = net::set_port(&port, false);
        }
        let _ = kill(running.init, Signal::SIGKILL);
        // Returns once the kernel has ended and reaped everything in the namespace.
        while waitpid(running.init, None) == Err(Errno::EINTR) {}
        net::ip_batch(&self.ip, &net::unwire_script(self.plan, host), true)
            .map_err(step(format!("removing the cables of host `{}`", host.name)))?;
        Ok(at_ns)
    }

    pub(super) fn cut_all(&mut self) {
        for index in 0..self.hosts.len() {
            if let Err((step, message)) = self.power_cut(index) {
                eprintln!("keeper: {step}: {message}");
            }
        }
    }
}

/// One request to a host's init and its answer.
pub(super) fn ask(
    channel: &UnixStream,
    request: &InitRequest,
    limit: Duration,
) -> io::Result<InitReply> {
    channel.set_read_timeout(Some(limit))?;
    send(channel, request, None)?;
    receive(channel).map(|(reply, _)| reply)
}

/// A handle of our own process or of an unreaped child.
pub(super) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed. The pid is our own or an unreaped child's.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
