//! The keeper: holds the `outside` namespace and every host of one lab, and does what
//! the lab's users ask over `keeper.sock`.
//!
//! One thread, one loop: life line, requests, dead children. It must never hand the
//! directory's lock to a child (the lock means "the keeper lives"), and never outlive
//! its launcher: the launcher is the only process of the lab outside of its pid
//! namespace, and its death kills the keeper, and so the lab.

use super::clock::MonotonicNs;
use super::dir;
use super::disk::Disks;
use super::launch::{StepError, step};
use super::net::{self, Port};
use super::power::{INIT_TIMEOUT, ask, pidfd_open};
use super::spec::{KeepPolicy, LabPlan, OUTSIDE};
use super::wire::{
    Addressed, DaemonState, HostPower, HostStatus, InitReply, InitRequest, LabStatus, LinkName,
    LinkStatus, Reply, Request, Wiring, receive, send,
};
use crate::pool::HostName;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A user of the lab has this long to state its request or take the answer.
const USER_TIMEOUT: Duration = Duration::from_secs(2);

/// One host while it has power.
pub(super) struct Running {
    pub(super) init: Pid,
    pub(super) pidfd: OwnedFd,
    pub(super) channel: UnixStream,
    pub(super) frozen: bool,
}

pub(super) struct Keeper<'a> {
    pub(super) plan: &'a LabPlan,
    pub(super) ip: PathBuf,
    pub(super) hosts: Vec<Option<Running>>,
    /// Ports that were cut on purpose, and how; a power cycle does not heal them.
    pub(super) cut: Vec<(Port, Wiring)>,
    /// Ports that carry no more than this many bytes a second, likewise.
    pub(super) shaped: Vec<(Port, u64)>,
    /// Hosts that were reset by their watchdogs, and when they have power again.
    boots: Vec<(usize, Instant)>,
    disks: Disks,
    own_pidfd: OwnedFd,
    pub(super) own_pid_namespace: File,
}

pub(super) fn keep(
    plan: &LabPlan,
    life: &UnixStream,
    lock: &File,
    launcher: &io::PipeReader,
) -> Result<(), StepError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("tying the keeper to its launcher"))?;
    let mut gone = [PollFd::new(launcher.as_fd(), PollFlags::POLLIN)];
    if poll(&mut gone, PollTimeout::ZERO).map_err(step("looking for the launcher"))? > 0 {
        return Err(("starting".into(), "the launcher died first".into()));
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)
        .map_err(step("making the namespaces of `outside`"))?;
    nix::unistd::sethostname(OUTSIDE).map_err(step("setting the name of `outside`"))?;
    // Nothing we mount may reach the machine's own mount namespace.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .map_err(step("making mounts private"))?;
    mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        None::<&str>,
    )
    .map_err(step("mounting proc on /proc"))?;
    net::disable_ipv6();
    let ip = net::find_ip().map_err(step("looking for ip"))?;
    net::ip_batch(&ip, &net::outside_script(plan), false).map_err(step("making the switches"))?;

    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block().map_err(step("blocking signals"))?;
    let arrived = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(step("signalfd"))?;
    let listener = UnixListener::bind(plan.socket())
        .map_err(step(format!("binding {}", plan.socket().display())))?;
    let mut keeper = Keeper {
        plan,
        ip,
        hosts: plan.hosts.iter().map(|_| None).collect(),
        cut: Vec::new(),
        shaped: Vec::new(),
        boots: Vec::new(),
        disks: Disks::open(plan)?,
        own_pidfd: pidfd_open(nix::unistd::getpid()).map_err(step("opening the keeper's pidfd"))?,
        own_pid_namespace: File::open("/proc/self/ns/pid")
            .map_err(step("opening the lab's pid namespace"))?,
    };
    for index in 0..plan.hosts.len() {
        keeper.power_on(index)?;
    }
    send(
        life,
        &Reply::Done {
            at_ns: MonotonicNs::now(),
        },
        None,
    )
    .map_err(step("telling the creator"))?;
    let detached = plan.keep == KeepPolicy::Detached;
    loop {
        let mut waiting = vec![
            PollFd::new(arrived.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        if !detached {
            waiting.push(PollFd::new(life.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut waiting, keeper.next_boot()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(("waiting".into(), e.to_string())),
        }
        let asked = waiting[1].any().unwrap_or(false);
        let creator_gone = waiting.get(2).and_then(PollFd::any).unwrap_or(false);
        let mut told_to_end = false;
        while let Ok(Some(info)) = arrived.read_signal() {
            told_to_end |= info.ssi_signo != Signal::SIGCHLD as u32;
        }
        keeper.reap();
        keeper.boot();
        if creator_gone || told_to_end {
            keeper.cut_all();
            if !plan.keep_files
                && let Err(e) = dir::empty(&plan.dir, false)
            {
                eprintln!("keeper: {e}");
            }
            return Ok(());
        }
        if asked && let Ok((user, _)) = listener.accept() {
            match keeper.serve(&user) {
                Ok(true) => {
                    // The lock goes with this process; whoever asked removes the directory.
                    let _ = lock;
                    return Ok(());
                }
                Ok(false) => {}
                Err(e) => eprintln!("keeper: a user went away: {e}"),
            }
        }
    }
}

impl Keeper<'_> {
    /// True if the lab is to end.
    fn serve(&mut self, user: &UnixStream) -> io::Result<bool> {
        user.set_read_timeout(Some(USER_TIMEOUT))?;
        user.set_write_timeout(Some(USER_TIMEOUT))?;
        let (Addressed { lab, request }, _) = receive(user)?;
        let reply = match request {
            _ if lab != self.plan.id => Reply::OtherLab,
            Request::Down => {
                self.cut_all();
                send(
                    user,
                    &Reply::Done {
                        at_ns: MonotonicNs::now(),
                    },
                    None,
                )?;
                return Ok(true);
            }
            Request::Enter(place) => {
                let entered = match &place {
                    None => Ok(&self.own_pidfd),
                    Some(host) => self.on(host).map(|index| {
                        self.hosts[index]
                            .as_ref()
                            .map_or(&self.own_pidfd, |r| &r.pidfd)
                    }),
                };
                match entered {
                    Ok(fd) => {
                        return send(
                            user,
                            &Reply::Done {
                                at_ns: MonotonicNs::now(),
                            },
                            Some(fd.as_fd()),
                        )
                        .map(|()| false);
                    }
                    Err(refused) => refused,
                }
            }
            other => self.obey(&other).unwrap_or_else(|refused| refused),
        };
        send(user, &reply, None)?;
        Ok(false)
    }

    fn obey(&mut self, request: &Request) -> Result<Reply, Reply> {
        let failed = |(step, message): StepError| Reply::Failed { step, message };
        let at = |at_ns| Reply::Done { at_ns };
        match request {
            Request::Status => Ok(Reply::Status(self.status())),
            Request::PowerCut(host) => {
                let index = self.index(host)?;
                // Who cuts the power of a host that boots keeps it off.
                self.boots.retain(|(booting, _)| *booting != index);
                if self.hosts[index].is_none() {
                    return Err(refused(host, HostPower::Off, "power it on first"));
                }
                self.power_cut(index).map(at).map_err(failed)
            }
            Request::PowerOn(host) => {
                let index = self.index(host)?;
                self.boots.retain(|(booting, _)| *booting != index);
                if let Some(running) = &self.hosts[index] {
                    return Err(refused(host, running.power(), "cut its power first"));
                }
                self.power_on(index).map(at).map_err(failed)
            }
            Request::SetLink { link, wiring } => self.set_link(link, *wiring).map(at),
            Request::Disk { host, disk, taken } => {
                let index = self.index(host)?;
                self.disks.set(index, *disk, *taken)?;
                Ok(at(MonotonicNs::now()))
            }
            Request::ShapeLink { link, bytes_per_s } => self.shape_link(link, *bytes_per_s).map(at),
            Request::Freeze(host) => {
                let index = self.on(host)?;
                let at_ns = self.ask_done(index, &InitRequest::Freeze)?;
                if let Some(running) = &mut self.hosts[index] {
                    running.frozen = true;
                }
                Ok(at(at_ns))
            }
            Request::Thaw(host) => {
                let index = self.index(host)?;
                match &self.hosts[index] {
                    Some(running) if running.frozen => {}
                    Some(_) => {
                        return Err(refused(host, HostPower::On, "only a frozen host can thaw"));
                    }
                    None => return Err(refused(host, HostPower::Off, "power it on instead")),
                }
                let at_ns = self.ask_done(index, &InitRequest::Thaw)?;
                if let Some(running) = &mut self.hosts[index] {
                    running.frozen = false;
                }
                Ok(at(at_ns))
            }
            Request::Kill { host, pid } => {
                let index = self.on(host)?;
                self.ask_done(index, &InitRequest::Kill(*pid)).map(at)
            }
            Request::Processes(host) => {
                let index = self.index(host)?;
                if self.hosts[index].is_none() {
                    return Ok(Reply::Processes(Vec::new()));
                }
                match self.ask(index, &InitRequest::Processes).map_err(failed)? {
                    InitReply::Processes(list) => Ok(Reply::Processes(list)),
                    other => Err(unexpected(&other)),
                }
            }
            Request::Enter(_) | Request::Down => {
                Err(failed(("obeying".into(), "not a request for here".into())))
            }
        }
    }

    fn index(&self, host: &HostName) -> Result<usize, Reply> {
        self.plan
            .hosts
            .iter()
            .position(|h| h.name == *host)
            .ok_or_else(|| Reply::Failed {
                step: format!("looking for host `{host}`"),
                message: "the lab has no such host".into(),
            })
    }

    /// The index of a host that is on and not frozen.
    fn on(&self, host: &HostName) -> Result<usize, Reply> {
        let index = self.index(host)?;
        match &self.hosts[index] {
            None => Err(refused(host, HostPower::Off, "power it on first")),
            Some(running) if running.frozen => {
                Err(refused(host, HostPower::Frozen, "thaw it first"))
            }
            Some(_) => Ok(index),
        }
    }

    fn ask(&self, index: usize, request: &InitRequest) -> Result<InitReply, StepError> {
        let name = &self.plan.hosts[index].name;
        let Some(running) = &self.hosts[index] else {
            return Err((format!("asking host `{name}`"), "it is off".into()));
        };
        ask(&running.channel, request, INIT_TIMEOUT)
            .map_err(step(format!("asking the init of host `{name}`")))
    }

    /// One request to a host's init and its answer.
    pub(super) fn ask_done(
        &self,
        index: usize,
        request: &InitRequest,
    ) -> Result<MonotonicNs, Reply> {
        match self
            .ask(index, request)
            .map_err(|(step, message)| Reply::Failed { step, message })?
        {
            InitReply::Done { at_ns } => Ok(at_ns),
            other => Err(unexpected(&other)),
        }
    }

    fn set_link(&mut self, link: &LinkName, wiring: Wiring) -> Result<MonotonicNs, Reply> {
        for port in self.link_ports(link)? {
            self.cut.retain(|(p, _)| *p != port);
            if wiring != Wiring::Well {
                self.cut.push((port.clone(), wiring));
            }
            match net::wire_port(&port, wiring) {
                Ok(()) => {}
                // The host is off: remembered, and done when it comes back.
                Err(e)
                    if e.raw_os_error() == Some(libc::ENODEV)
                        || e.raw_os_error() == Some(libc::ENXIO) => {}
                Err(e) => {
                    return Err(Reply::Failed {
                        step: format!("port {} of {}", port.name, port.bridge),
                        message: e.to_string(),
                    });
                }
            }
        }
        Ok(MonotonicNs::now())
    }

    fn shape_link(
        &mut self,
        link: &LinkName,
        bytes_per_s: Option<u64>,
    ) -> Result<MonotonicNs, Reply> {
        for port in self.link_ports(link)? {
            let was = self.shaped.iter().any(|(p, _)| *p == port);
            self.shaped.retain(|(p, _)| *p != port);
            self.shaped
                .extend(bytes_per_s.map(|rate| (port.clone(), rate)));
            // A host that is off: remembered, and done when it comes back.
            if nix::net::if_::if_nametoindex(port.name.as_str()).is_err()
                || (bytes_per_s.is_none() && !was)
            {
                continue;
            }
            net::shape_port(&port, bytes_per_s).map_err(|message| Reply::Failed {
                step: format!("port {} of {}", port.name, port.bridge),
                message,
            })?;
        }
        Ok(MonotonicNs::now())
    }

    /// Both ends of a private link; the host's end of its lan cable.
    fn link_ports(&self, link: &LinkName) -> Result<Vec<Port>, Reply> {
        match link {
            LinkName::Lan(host) => Ok(vec![net::lan_port(&self.plan.hosts[self.index(host)?])]),
            LinkName::Private { a, b, index } => {
                let (a_index, b_index) = (self.index(a)?, self.index(b)?);
                let end = |from: usize, to: usize| {
                    net::private_ports(self.plan, &self.plan.hosts[from])
                        .into_iter()
                        .find(|(_, partner, place)| {
                            *partner == to && self.plan.hosts[from].links[*place].index == *index
                        })
                        .map(|(port, _, _)| port)
                };
                end(a_index, b_index)
                    .zip(end(b_index, a_index))
                    .map(|(x, y)| vec![x, y])
                    .ok_or_else(|| Reply::Failed {
                        step: format!("looking for private link {index} of `{a}` and `{b}`"),
                        message: format!(
                            "there are {} (from 0) between each two hosts",
                            self.plan.private_links
                        ),
                    })
            }
        }
    }

    /// How a port is meant to be plugged in.
    pub(super) fn wiring(&self, port: &Port) -> Wiring {
        let cut = self.cut.iter().find(|(p, _)| p == port);
        cut.map_or(Wiring::Well, |(_, wiring)| *wiring)
    }

    fn status(&self) -> LabStatus {
        let hosts = self.plan.hosts.iter().enumerate().map(|(index, host)| {
            let power = self.hosts[index]
                .as_ref()
                .map_or(HostPower::Off, Running::power);
            let daemon = match (power, self.ask(index, &InitRequest::Daemon)) {
                (HostPower::On, Ok(InitReply::Daemon(daemon))) => daemon,
                _ => DaemonState::Unknown,
            };
            HostStatus {
                name: host.name.clone(),
                power,
                daemon,
                management: host.management,
                api_socket: host.api_socket.clone(),
                daemon_log: host.daemon_log.clone(),
            }
        });
        let mut links = Vec::new();
        for host in &self.plan.hosts {
            for (port, partner, place) in net::private_ports(self.plan, host)
                .into_iter()
                .filter(|p| host.index < p.1)
            {
                links.push(LinkStatus {
                    a: host.name.clone(),
                    b: self.plan.hosts[partner].name.clone(),
                    index: host.links[place].index,
                    cut: self.wiring(&port) != Wiring::Well,
                    wiring: self.wiring(&port),
                    bytes_per_s: self.shaped.iter().find(|(p, _)| *p == port).map(|s| s.1),
                });
            }
        }
        LabStatus {
            name: self.plan.name.clone(),
            dir: self.plan.dir.clone(),
            hosts: hosts.collect(),
            links,
        }
    }

    /// How long to wait for the next host that boots.
    fn next_boot(&self) -> PollTimeout {
        let next = self.boots.iter().map(|(_, at)| *at).min();
        next.map_or(PollTimeout::NONE, |at| {
            // Rounded up, so that the last millisecond is not spun through.
            let wait = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        })
    }

    /// Give power to the hosts whose time has come.
    fn boot(&mut self) {
        let now = Instant::now();
        let due: Vec<usize> = self
            .boots
            .extract_if(.., |(_, at)| *at <= now)
            .map(|(index, _)| index)
            .collect();
        for index in due {
            if self.hosts[index].is_none()
                && let Err((step, message)) = self.power_on(index)
            {
                eprintln!("keeper: {step}: {message}");
            }
        }
    }

    /// Collect dead children: inits that died by themselves, orphans of `exec`.
    fn reap(&mut self) {
        loop {
            let pid = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            for (slot, host) in self.hosts.iter_mut().zip(&self.plan.hosts) {
                if slot.as_ref().is_some_and(|r| r.init == pid) {
                    *slot = None;
                    eprintln!("keeper: the init of host `{}` died", host.name);
                    if host
                        .pool
                        .as_ref()
                        .is_some_and(|pool| pool.watchdog.is_some())
                    {
                        self.boots
                            .push((host.index, Instant::now() + super::pool::BOOT_TIME));
                    }
                    let _ = net::ip_batch(&self.ip, &net::unwire_script(self.plan, host), true);
                }
            }
        }
    }
}

impl Running {
    fn power(&self) -> HostPower {
        if self.frozen {
            HostPower::Frozen
        } else {
            HostPower::On
        }
    }
}

fn refused(host: &HostName, is: HostPower, todo: &str) -> Reply {
    Reply::HostState {
        host: host.clone(),
        is,
        todo: todo.into(),
    }
}

fn unexpected(reply: &InitReply) -> Reply {
    match reply {
        InitReply::Failed { step, message } => Reply::Failed {
            step: step.clone(),
            message: message.clone(),
        },
        other => Reply::Failed {
            step: "asking the host's init".into(),
            message: format!("it said {other:?}"),
        },
    }
}
