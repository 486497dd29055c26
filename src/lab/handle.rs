//! [`Lab`]: makes a lab, finds one that is up, and asks its keeper for things.

use super::clock::MonotonicNs;
use super::dir::{self, Found, TakenDown};
use super::spec::{HostNet, KeepPolicy, LabPlan, LabSpec, Place, check_name, default_dir};
use super::wire::{
    Addressed, LabStatus, LinkName, Process, Reply, Request, Wiring, kill_peer, receive, send,
};
use super::{EXEC_COMMAND, KEEPER_COMMAND, LabError, net};
use crate::pool::HostName;
use crate::registry::statefile::{self, Geometry};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// Starting a whole lab may take this long on a busy machine.
const UP_TIMEOUT: Duration = Duration::from_secs(60);
/// One request; powering a host on is the longest.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(45);
/// Of a host's value slots in the statefile: the records of some hundred VMs, and little to
/// write when a lab is made.
const STATEFILE_SLOT_BYTES: u64 = 64 << 10;
/// The same with the pool's state, its decisions and restarts, and the specs of VMs.
const POOL_SLOT_BYTES: u64 = 512 << 10;
/// After this a keeper that was told to end is killed.
const DOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// A lab that is up. Dropping the value of [`Lab::up`] takes a lab of
/// [`KeepPolicy::WithCreator`] down; dropping one of [`Lab::open`] does nothing.
pub struct Lab {
    plan: LabPlan,
    program: PathBuf,
    /// The keeper ends when this closes; only the maker of a `WithCreator` lab has it.
    life: Option<UnixStream>,
    launcher: Option<Child>,
}

impl Lab {
    /// Makes a lab and returns once every host's network stands and its daemon is
    /// started (not: ready). The remains of a crashed lab of that name are removed.
    ///
    /// # Errors
    /// [`LabError::NotRoot`], [`LabError::IpMissing`], [`LabError::NameTaken`],
    /// [`LabError::ForeignDir`], [`LabError::Spec`]; [`LabError::Keeper`] with the step
    /// that failed inside.
    pub fn up(spec: LabSpec) -> Result<Self, LabError> {
        let mut plan = spec.plan()?;
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        net::find_ip()?;
        let lock = dir::claim(&plan)?;
        format_statefile(&plan)?;
        super::pool::prepare(&plan, &spec.program)?;
        // Held until the keeper has them open.
        let _disks = attach_disks(&mut plan)?;
        for host in &plan.hosts {
            let text = (spec.host_config)(&host.name, host);
            fs::write(&host.config_file, text).map_err(LabError::io(format!(
                "writing {}",
                host.config_file.display()
            )))?;
        }
        let log = File::create(plan.keeper_log()).map_err(LabError::io(format!(
            "making {}",
            plan.keeper_log().display()
        )))?;
        let log2 = log
            .try_clone()
            .map_err(LabError::io("opening the keeper's log"))?;
        let (life, theirs) =
            UnixStream::pair().map_err(LabError::io("making the keeper's life line"))?;
        let mut launcher = Command::new(&spec.program)
            .arg(KEEPER_COMMAND)
            .stdin(OwnedFd::from(theirs))
            .stdout(log)
            .stderr(log2)
            .current_dir("/")
            .spawn()
            .map_err(LabError::io(format!(
                "starting the keeper, {}",
                spec.program.display()
            )))?;
        let started = life
            .set_read_timeout(Some(UP_TIMEOUT))
            .and_then(|()| send(&life, &plan, Some(lock.as_fd())))
            .and_then(|()| receive::<Reply>(&life));
        drop(lock);
        let problem = match started {
            Ok((Reply::Done { .. }, _)) => None,
            Ok((Reply::Failed { step, message }, _)) => Some((step, message)),
            Ok((other, _)) => Some(("starting".into(), format!("it said {other:?}"))),
            Err(e) => Some(("starting".into(), e.to_string())),
        };
        if let Some((step, message)) = problem {
            let _ = launcher.kill();
            let _ = launcher.wait();
            // The keeper goes with its launcher, a moment later; the name is free then.
            dir::wait_released(&plan.dir, DOWN_TIMEOUT);
            return Err(LabError::Keeper {
                lab: plan.name.clone(),
                step,
                message,
                log: plan.keeper_log(),
            });
        }
        let attached = plan.keep == KeepPolicy::WithCreator;
        Ok(Self {
            plan,
            program: spec.program,
            life: attached.then_some(life),
            launcher: Some(launcher),
        })
    }

    /// Finds the lab of this name in its default directory.
    ///
    /// # Errors
    /// [`LabError::NotUp`] if none lives.
    pub fn open(name: &str) -> Result<Self, LabError> {
        check_name(name)?;
        Self::open_at(&default_dir(name))
    }

    /// Finds the lab in this directory.
    ///
    /// # Errors
    /// [`LabError::NotUp`] if none lives there.
    pub fn open_at(dir: &Path) -> Result<Self, LabError> {
        let not_up = || LabError::NotUp {
            name: name_of(dir),
            dir: dir.to_owned(),
        };
        let plan = dir::read_plan(dir).map_err(|e| match e {
            LabError::Io { ref source, .. } if source.kind() == io::ErrorKind::NotFound => not_up(),
            other => other,
        })?;
        match UnixStream::connect(plan.socket()) {
            Ok(_) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) =>
            {
                return Err(not_up());
            }
            Err(source) => {
                return Err(LabError::Control {
                    lab: plan.name,
                    source,
                });
            }
        }
        let program = std::env::current_exe()
            .map_err(LabError::io("reading the path of the running program"))?;
        Ok(Self {
            plan,
            program,
            life: None,
            launcher: None,
        })
    }

    /// Names and addresses of everything in it.
    #[must_use]
    pub fn plan(&self) -> &LabPlan {
        &self.plan
    }

    /// One host's addresses and directories.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`].
    pub fn host(&self, host: &HostName) -> Result<&HostNet, LabError> {
        self.plan.host(host)
    }

    /// Ends the lab and removes its directory (unless it was made with `keep_files`).
    ///
    /// # Errors
    /// [`LabError::Io`] if the directory cannot be removed, or the keeper not be ended.
    pub fn down(mut self) -> Result<(), LabError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), LabError> {
        let told = self.request(&Request::Down);
        self.life = None;
        let ours = dir::read_plan(&self.plan.dir).is_ok_and(|there| there.id == self.plan.id);
        if ours && (told.is_err() || !dir::wait_released(&self.plan.dir, DOWN_TIMEOUT)) {
            // It hangs, or has died meanwhile.
            if let Ok(stream) = UnixStream::connect(self.plan.socket()) {
                kill_peer(&stream).map_err(LabError::io("killing the lab's keeper"))?;
            }
            dir::wait_released(&self.plan.dir, DOWN_TIMEOUT);
        }
        if let Some(mut launcher) = self.launcher.take() {
            let _ = launcher.wait();
        }
        if ours { clean(&self.plan) } else { Ok(()) }
    }

    /// What is on, what is cut, what became of the daemons.
    ///
    /// # Errors
    /// [`LabError::Control`] if the keeper does not answer.
    pub fn status(&self) -> Result<LabStatus, LabError> {
        match self.request(&Request::Status)?.0 {
            Reply::Status(status) => Ok(status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Prepares a program to run inside a place; the caller sets its standard streams
    /// and starts it. It is in the place's pid namespace: frozen, cut and ended with it,
    /// and killed if the started process is.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(&self, place: &Place, argv: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(EXEC_COMMAND)
            .arg(&self.plan.dir)
            .arg(place.to_string())
            .args(argv);
        command
    }

    /// Runs a program inside a place on the caller's own standard streams.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`]; [`LabError::Io`] if it cannot be started. The exit
    /// statuses are those of [`super::exec_main`].
    pub fn exec<S: AsRef<OsStr>>(&self, place: &Place, argv: &[S]) -> Result<ExitStatus, LabError> {
        if let Place::Host(host) = place {
            self.plan.host(host)?;
        }
        self.command(place, argv)
            .status()
            .map_err(LabError::io(format!("starting {}", self.program.display())))
    }

    /// A descriptor of the place for setns(2) (a pidfd), see [`super::in_network`].
    ///
    /// # Errors
    /// [`LabError::HostState`] if the host is off or frozen.
    pub fn place_fd(&self, place: &Place) -> Result<OwnedFd, LabError> {
        let host = match place {
            Place::Outside => None,
            Place::Host(host) => Some(self.plan.host(host)?.name.clone()),
        };
        match self.request(&Request::Enter(host))? {
            (Reply::Done { .. }, Some(fd)) => Ok(fd),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// Cuts a host's power: everything in it stops at the returned instant, nothing
    /// more leaves it, its RAM files are gone; its disks stay.
    ///
    /// # Errors
    /// [`LabError::HostState`] if it is off.
    pub fn power_cut(&self, host: &HostName) -> Result<MonotonicNs, LabError> {
        self.act(host, Request::PowerCut)
    }

    /// Gives a host power again: new namespaces, same disks, same addresses.
    ///
    /// # Errors
    /// [`LabError::HostState`] if it is on.
    pub fn power_on(&self, host: &HostName) -> Result<MonotonicNs, LabError> {
        self.act(host, Request::PowerOn)
    }

    /// Stops every process of a host at once, QEMU too. Its kernel part lives on: it
    /// still answers ARP and acknowledges TCP bytes that nobody reads.
    ///
    /// # Errors
    /// [`LabError::HostState`] if it is off or frozen.
    pub fn freeze(&self, host: &HostName) -> Result<MonotonicNs, LabError> {
        self.act(host, Request::Freeze)
    }

    /// Lets a frozen host go on.
    ///
    /// # Errors
    /// [`LabError::HostState`] if it is not frozen.
    pub fn thaw(&self, host: &HostName) -> Result<MonotonicNs, LabError> {
        self.act(host, Request::Thaw)
    }

    /// Kills one process inside a host, by its pid there. Not its init: that is [`Lab::power_cut`].
    ///
    /// # Errors
    /// [`LabError::Keeper`] if there is none; [`LabError::HostState`] if the host is off or frozen.
    pub fn kill_pid_in(&self, host: &HostName, pid: u32) -> Result<MonotonicNs, LabError> {
        self.act(host, |host| Request::Kill { host, pid })
    }

    /// The processes of a host; none if it is off. Works on a frozen host too.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`], [`LabError::Control`].
    pub fn processes(&self, host: &HostName) -> Result<Vec<Process>, LabError> {
        self.plan.host(host)?;
        match self.request(&Request::Processes(host.clone()))?.0 {
            Reply::Processes(list) => Ok(list),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Cuts private link `index` of two hosts: frames are lost in silence, both ways.
    ///
    /// # Errors
    /// [`LabError::Keeper`] if there is no such link.
    pub fn cut_link(&self, a: &HostName, b: &HostName, index: u8) -> Result<MonotonicNs, LabError> {
        self.set_private(a, b, index, Wiring::Silent)
    }

    /// Pulls the cable of private link `index` of two hosts: both lose their carrier.
    ///
    /// # Errors
    /// [`LabError::Keeper`] if there is no such link.
    pub fn unplug_link(
        &self,
        a: &HostName,
        b: &HostName,
        index: u8,
    ) -> Result<MonotonicNs, LabError> {
        self.set_private(a, b, index, Wiring::Unplugged)
    }

    /// Lets private link `index` of two hosts carry this many bytes a second each way, or
    /// all it can.
    ///
    /// # Errors
    /// [`LabError::Keeper`] if there is no such link, or `tc` refuses.
    pub fn shape_link(
        &self,
        a: &HostName,
        b: &HostName,
        index: u8,
        bytes_per_s: Option<u64>,
    ) -> Result<MonotonicNs, LabError> {
        self.plan.host(b)?;
        self.act(a, |a| Request::ShapeLink {
            link: LinkName::Private {
                a,
                b: b.clone(),
                index,
            },
            bytes_per_s,
        })
    }

    /// Heals it.
    ///
    /// # Errors
    /// [`LabError::Keeper`] if there is no such link.
    pub fn heal_link(
        &self,
        a: &HostName,
        b: &HostName,
        index: u8,
    ) -> Result<MonotonicNs, LabError> {
        self.set_private(a, b, index, Wiring::Well)
    }

    /// Cuts a host off the lan (its VMs and management address), private links stay.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`].
    pub fn cut_lan(&self, host: &HostName) -> Result<MonotonicNs, LabError> {
        self.act(host, |host| Request::SetLink {
            link: LinkName::Lan(host),
            wiring: Wiring::Silent,
        })
    }

    /// Heals it.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`].
    pub fn heal_lan(&self, host: &HostName) -> Result<MonotonicNs, LabError> {
        self.act(host, |host| Request::SetLink {
            link: LinkName::Lan(host),
            wiring: Wiring::Well,
        })
    }

    /// Takes a disk of the statefile from one host: what it reads there ends, what it writes finds
    /// no space. Only in a lab whose spec said so.
    ///
    /// # Errors
    /// [`LabError::NoSuchHost`]; [`LabError::Keeper`] if there is no such disk.
    pub fn take_disk(&self, host: &HostName, disk: usize) -> Result<MonotonicNs, LabError> {
        self.set_disk(host, disk, true)
    }

    /// Gives it back.
    ///
    /// # Errors
    /// As [`Lab::take_disk`].
    pub fn give_disk(&self, host: &HostName, disk: usize) -> Result<MonotonicNs, LabError> {
        self.set_disk(host, disk, false)
    }

    fn set_disk(&self, host: &HostName, disk: usize, taken: bool) -> Result<MonotonicNs, LabError> {
        self.act(host, |host| Request::Disk { host, disk, taken })
    }

    fn set_private(
        &self,
        a: &HostName,
        b: &HostName,
        index: u8,
        wiring: Wiring,
    ) -> Result<MonotonicNs, LabError> {
        self.plan.host(b)?;
        self.act(a, |a| Request::SetLink {
            link: LinkName::Private {
                a,
                b: b.clone(),
                index,
            },
            wiring,
        })
    }

    fn act(
        &self,
        host: &HostName,
        request: impl FnOnce(HostName) -> Request,
    ) -> Result<MonotonicNs, LabError> {
        self.plan.host(host)?;
        match self.request(&request(host.clone()))?.0 {
            Reply::Done { at_ns } => Ok(at_ns),
            other => Err(self.unexpected(&other)),
        }
    }

    fn request(&self, request: &Request) -> Result<(Reply, Option<OwnedFd>), LabError> {
        let asked = UnixStream::connect(self.plan.socket()).and_then(|stream| {
            stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
            send(
                &stream,
                &Addressed {
                    lab: self.plan.id,
                    request: request.clone(),
                },
                None,
            )?;
            receive(&stream)
        });
        match asked {
            Ok((Reply::OtherLab, _)) => Err(LabError::NotUp {
                name: self.plan.name.clone(),
                dir: self.plan.dir.clone(),
            }),
            Ok(answer) => Ok(answer),
            Err(source) => Err(LabError::Control {
                lab: self.plan.name.clone(),
                source,
            }),
        }
    }

    fn unexpected(&self, reply: &Reply) -> LabError {
        let (step, message) = match reply {
            Reply::HostState { host, is, todo } => {
                return LabError::HostState {
                    host: host.clone(),
                    is: is.text(),
                    todo: todo.clone(),
                };
            }
            Reply::Failed { step, message } => (step.clone(), message.clone()),
            other => ("asking the keeper".into(), format!("it said {other:?}")),
        };
        LabError::Keeper {
            lab: self.plan.name.clone(),
            step,
            message,
            log: self.plan.keeper_log(),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.life.is_some()
            && let Err(e) = self.end()
        {
            tracing::warn!("taking lab `{}` down: {e}", self.plan.name);
        }
    }
}

/// Takes down whatever is in this lab directory: a living lab, a crashed one's remains, or nothing.
///
/// # Errors
/// [`LabError::ForeignDir`] if it is no lab's directory; [`LabError::Io`] if it cannot be removed.
pub fn take_down(dir: &Path) -> Result<TakenDown, LabError> {
    match dir::look(dir)? {
        Found::Nothing => Ok(TakenDown::WasNotThere),
        Found::Stale(_lock) => dir::empty(dir, false).map(|()| TakenDown::WasStale),
        Found::Alive => Lab::open_at(dir)?.down().map(|()| TakenDown::WasUp),
    }
}

/// Give every host a loop device of its own for each disk of the statefile.
fn attach_disks(plan: &mut LabPlan) -> Result<Vec<File>, LabError> {
    let mut held = Vec::new();
    if !plan.takeable_disks {
        return Ok(held);
    }
    for disk in plan.hosts.iter_mut().flat_map(|host| &mut host.statefile) {
        let (device, path) = super::disk::attach(disk).map_err(LabError::io(format!(
            "making a loop device of {}",
            disk.display()
        )))?;
        held.push(device);
        *disk = path;
    }
    Ok(held)
}

/// Make the disks of the hosts' statefile, before a host can ask for them.
fn format_statefile(plan: &LabPlan) -> Result<(), LabError> {
    let Some(disks) = plan.hosts.first().map(|host| &host.statefile) else {
        return Ok(());
    };
    if disks.is_empty() {
        return Ok(());
    }
    let number = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    let geometry = Geometry {
        disks: number(disks.len()),
        slots: number(plan.hosts.len()),
        slot_bytes: if plan.hosts.iter().any(|host| host.pool.is_some()) {
            POOL_SLOT_BYTES
        } else {
            STATEFILE_SLOT_BYTES
        },
    };
    statefile::format(disks, geometry, uuid::Uuid::new_v4(), false).map_err(LabError::Statefile)
}

fn clean(plan: &LabPlan) -> Result<(), LabError> {
    if plan.keep_files {
        return Ok(());
    }
    match dir::look(&plan.dir)? {
        Found::Stale(_lock) => dir::empty(&plan.dir, false),
        // Removed by the keeper itself, or already another lab's.
        Found::Nothing | Found::Alive => Ok(()),
    }
}

fn name_of(dir: &Path) -> String {
    let last = dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    last.strip_prefix("pollux-lab-")
        .map_or(last.clone(), str::to_owned)
}
