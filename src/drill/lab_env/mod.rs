//! A drill's environment in the lab: real hosts, a real VM, the API.
//!
//! One value may serve several drills in a row ([`LabEnv::stay_up`]): the lab stays, the
//! VM is made anew for each over the disk that the one before left behind.

mod guest;
mod view;

pub use guest::Guest;

use self::view::{audit_view, view};
use super::DrillKind;
use super::env::{
    AuditView, ClientPipes, DiskRecords, DrillEnv, EnvError, LinkHarm, MonotonicNs,
    SLOW_LINK_BYTES_PER_S, Service, Setting, VmView,
};
use crate::api::client::{Client, ClientError, block};
use crate::api::links::LinkHealth;
use crate::api::types::{self, CreateVm, Done, HostStatus, Protect, VmStatus};
use crate::lab::daemons::{daemon_spec, up_linked, wait_daemon};
use crate::lab::{HostNet, KeepPolicy, Lab, Place, in_network};
use crate::pool::HostName;
use pollux_workload::record;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The drilled VM's name.
pub const VM_NAME: &str = "drill";
/// Its address on the lab's network.
pub const GUEST: [u8; 4] = [10, 77, 0, 10];
/// Its disk: 64 MiB, of which the counter's ring of records takes a part.
const DISK_BYTES: u64 = 64 << 20;
/// Pause between two looks at a daemon.
const POLL: Duration = Duration::from_millis(10);
/// Longest wait for the guest's service to answer one request.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest wait for a VM that was told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Two hosts in a lab of its own, and one VM.
pub struct LabEnv {
    name: String,
    guest: Guest,
    service: Service,
    program: Option<PathBuf>,
    keep_files: bool,
    stay_up: bool,
    statefile_disks: u8,
    lab: Option<Lab>,
    /// Does not answer and is not asked.
    dark: Option<HostName>,
    /// Ran the VM last, and has the newest disk.
    home: Option<HostName>,
}

fn refused(step: &str) -> impl FnOnce(ClientError) -> EnvError + '_ {
    move |e| EnvError::new(step, e)
}

impl LabEnv {
    /// An environment whose lab will be called `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, guest: Guest) -> Self {
        Self {
            name: name.into(),
            guest,
            service: Service::Counter,
            program: None,
            keep_files: false,
            stay_up: false,
            statefile_disks: 1,
            lab: None,
            dark: None,
            home: None,
        }
    }

    /// The pollux binary for hosts and clients, where it is not the running program.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Leave the lab's directory (logs, disks) behind when it goes down.
    #[must_use]
    pub fn keep_files(mut self, keep: bool) -> Self {
        self.keep_files = keep;
        self
    }

    /// Keep the lab up between drills; it goes when this value does.
    #[must_use]
    pub fn stay_up(mut self) -> Self {
        self.stay_up = true;
        self
    }

    /// Disks of the hosts' statefile: 1 or 3, or 0 for a registry in a locked file.
    #[must_use]
    pub fn statefile_disks(mut self, disks: u8) -> Self {
        self.statefile_disks = disks;
        self
    }

    /// Another guest for the next drill of a lab that stays up.
    pub fn set_guest(&mut self, guest: Guest) {
        self.guest = guest;
    }

    /// The lab.
    ///
    /// # Errors
    /// If it is not up.
    pub fn lab(&self) -> Result<&Lab, EnvError> {
        self.lab
            .as_ref()
            .ok_or_else(|| EnvError::new("using the lab", "it is not up"))
    }

    fn hosts(&self) -> Result<Vec<HostNet>, EnvError> {
        Ok(self.lab()?.plan().hosts.clone())
    }

    fn pollux(&self) -> Result<PathBuf, EnvError> {
        match &self.program {
            Some(program) => Ok(program.clone()),
            None => {
                std::env::current_exe().map_err(|e| EnvError::new("finding the pollux binary", e))
            }
        }
    }

    /// The API of a host.
    ///
    /// # Errors
    /// If there is no such host, or no lab.
    pub fn client(&self, host: &HostName) -> Result<Client, EnvError> {
        let net = self
            .lab()?
            .host(host)
            .map_err(|e| EnvError::new("finding a host", e))?;
        Ok(Client::new(&net.api_socket))
    }

    /// What a host says of the VM; none if it does not answer or is dark.
    #[must_use]
    pub fn status(&self, host: &HostName) -> Option<VmStatus> {
        if self.dark.as_ref() == Some(host) {
            return None;
        }
        let client = self.client(host).ok()?;
        block(client.get(&format!("/v1/vms/{VM_NAME}"))).ok()
    }

    /// Look again and again until there is something to give back, or `limit` is over.
    ///
    /// # Errors
    /// What was waited for and what was seen last.
    pub fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<T, EnvError> {
        let begun = Instant::now();
        loop {
            match look(self) {
                Ok(found) => return Ok(found),
                Err(seen) if begun.elapsed() > limit => {
                    let step = format!("waiting {} s for {what}", limit.as_secs());
                    return Err(EnvError::new(
                        step,
                        format!("{seen}; logs in {}", self.log_dir()),
                    ));
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// Stop the VM on the host that runs it; its disk then holds what is committed and
    /// nothing else. Gives the host and the image.
    ///
    /// # Errors
    /// If nobody runs it or it does not stop.
    pub fn stop_vm(&mut self) -> Result<(HostName, PathBuf), EnvError> {
        let step = "stopping the VM";
        let view = self.primary().map_err(|e| EnvError::new(step, e))?;
        let image = self
            .status(&view.host)
            .and_then(|s| s.disks.first().cloned())
            .ok_or_else(|| EnvError::new(step, "its image is not known"))?;
        let _: Done = block(
            self.client(&view.host)?
                .post(&format!("/v1/vms/{VM_NAME}/stop"), &()),
        )
        .map_err(refused(step))?;
        for host in self.host_names()? {
            self.wait("the VM to stop", STOP_LIMIT, |env| {
                match env.status(&host) {
                    Some(s) if s.role == types::Role::Stopped => Ok(()),
                    Some(s) => Err(format!("on host {host} it is {}", s.state)),
                    None => Ok(()),
                }
            })?;
        }
        self.home = Some(view.host.clone());
        Ok((view.host, PathBuf::from(image)))
    }

    fn host_names(&self) -> Result<Vec<HostName>, EnvError> {
        Ok(self.hosts()?.into_iter().map(|h| h.name).collect())
    }

    /// The names of the two hosts.
    fn pair(&self) -> Result<(HostName, HostName), EnvError> {
        match &self.lab()?.plan().hosts[..] {
            [a, b] => Ok((a.name.clone(), b.name.clone())),
            _ => Err(EnvError::new(
                "naming the pair",
                "the lab has not two hosts",
            )),
        }
    }

    /// Make the lab, or see that the one that is up is free for another VM.
    fn begin(&mut self, links: u8) -> Result<HostNet, EnvError> {
        let step = "making the lab";
        if self.lab.is_none() {
            let hosts = ["a", "b"].map(|n| HostName::new(n).expect("both are valid names"));
            let spec = daemon_spec(&self.name, hosts.to_vec(), links, KeepPolicy::WithCreator);
            let mut spec = spec.map_err(|e| EnvError::new(step, e))?;
            spec.program = self.pollux()?;
            if let Some(program) = spec.daemon_argv.first_mut() {
                *program = spec.program.display().to_string();
            }
            spec.keep_files = self.keep_files;
            spec.statefile_disks = self.statefile_disks;
            self.lab = Some(up_linked(spec).map_err(|e| EnvError::new(step, format!("{e:#}")))?);
        }
        if self.primary().is_ok() {
            self.stop_vm()?;
        }
        for host in self.host_names()? {
            if self.status(&host).is_some() {
                let _: Done = block(self.client(&host)?.delete(&format!("/v1/vms/{VM_NAME}")))
                    .map_err(refused("forgetting the VM of the drill before"))?;
            }
        }
        let hosts = self.hosts()?;
        let home = hosts
            .iter()
            .find(|h| self.home.as_ref().is_none_or(|home| h.name == *home));
        home.cloned()
            .ok_or_else(|| EnvError::new(step, "it has no hosts"))
    }

    fn log_dir(&self) -> String {
        self.lab
            .as_ref()
            .map_or(String::new(), |l| l.plan().dir.display().to_string())
    }

    /// One line to the guest's service, one line back.
    ///
    /// # Errors
    /// What was not answered.
    pub fn ask_guest(&self, line: &str) -> Result<String, EnvError> {
        let step = format!("asking the guest `{line}`");
        let error = |e: &dyn std::fmt::Display| EnvError::new(step.clone(), e.to_string());
        let place = self
            .lab()?
            .place_fd(&Place::Outside)
            .map_err(|e| error(&e))?;
        let answer = in_network(place.as_fd(), || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from((GUEST, 7000)), ANSWER)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.write_all(format!("{line}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer.trim_end().to_owned())
        })
        .map_err(|e| error(&e))?;
        answer.map_err(|e| error(&e))
    }

    /// The host that runs the VM, and its view.
    ///
    /// # Errors
    /// If none does.
    pub fn primary(&mut self) -> Result<VmView, String> {
        let views = self.views().map_err(|e| e.to_string())?;
        let mut running = views.into_iter().filter(VmView::runs);
        match (running.next(), running.next()) {
            (Some(view), None) => Ok(view),
            (None, _) => Err("no host runs the VM".into()),
            (Some(a), Some(b)) => {
                let newest = if a.generation > b.generation { a } else { b };
                Ok(newest)
            }
        }
    }
}

impl DrillEnv for LabEnv {
    fn prepare(&mut self, setting: &Setting, limit: Duration) -> Result<(), EnvError> {
        self.service = setting.service;
        let net = self.begin(setting.links)?;
        let image = net.state_dir.join("images").join(format!("{VM_NAME}.raw"));
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&image)
            .and_then(|f| f.set_len(DISK_BYTES))
            .map_err(|e| EnvError::new(format!("making the disk {}", image.display()), e))?;
        let client = Client::new(&net.api_socket);
        let create = CreateVm {
            spec: self.guest.spec(setting),
            origin: "drill".into(),
        };
        let _: Done = block(client.post("/v1/vms", &create)).map_err(refused("creating the VM"))?;
        let _: Done = block(client.post(
            &format!("/v1/vms/{VM_NAME}/start"),
            &types::Start::default(),
        ))
        .map_err(refused("starting the VM"))?;
        self.wait("the guest to answer", limit, |env| {
            match env.ask_guest("PING") {
                Ok(answer) if answer == "PONG" => Ok(()),
                Ok(other) => Err(format!("it answered `{other}`")),
                Err(e) => Err(e.to_string()),
            }
        })
    }

    fn spawn_client(&mut self, args: &[OsString]) -> Result<ClientPipes, EnvError> {
        let step = "starting the clients outside";
        let program = self.pollux()?;
        let mut argv = vec![program.into_os_string()];
        argv.extend_from_slice(args);
        let mut command: Command = self.lab()?.command(&Place::Outside, &argv);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|e| EnvError::new(step, e))?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(ClientPipes {
                input: Box::new(input),
                output: Box::new(output),
                child: Some(child),
            }),
            _ => Err(EnvError::new(step, "it has no pipes")),
        }
    }

    fn protect(&mut self) -> Result<(), EnvError> {
        let view = self
            .primary()
            .map_err(|e| EnvError::new("protecting the VM", e))?;
        let _: Done = block(self.client(&view.host)?.post(
            &format!("/v1/vms/{VM_NAME}/protect"),
            &Protect { partner: None },
        ))
        .map_err(refused("protecting the VM"))?;
        Ok(())
    }

    fn wait_mirrored(&mut self, limit: Duration) -> Result<VmView, EnvError> {
        self.wait("the VM to be mirrored", limit, |env| {
            let view = env.primary()?;
            if view.mirrored {
                Ok(view)
            } else {
                let last = view.events.last().map_or("", |e| e.text.as_str());
                Err(format!(
                    "on host {} it is {}; last event: {last}",
                    view.host, view.state
                ))
            }
        })
    }

    fn views(&mut self) -> Result<Vec<VmView>, EnvError> {
        let names: Vec<HostName> = self.hosts()?.into_iter().map(|h| h.name).collect();
        let views: Vec<VmView> = names
            .into_iter()
            .filter_map(|name| self.status(&name).map(|status| view(name, status)))
            .collect();
        if views.is_empty() {
            return Err(EnvError::new("asking the hosts", "none answers"));
        }
        Ok(views)
    }

    fn inject(&mut self, kind: DrillKind, primary: &HostName) -> Result<MonotonicNs, EnvError> {
        let pid = self.status(primary).and_then(|s| s.qemu_pid);
        let step = format!("{} on host {primary}", kind.name());
        let lab = self.lab()?;
        let done = match kind {
            DrillKind::KillHost => lab.power_cut(primary),
            DrillKind::FreezeHost => lab.freeze(primary),
            DrillKind::CutLink => {
                let (a, b) = self.pair()?;
                let mut when = Ok(MonotonicNs::now());
                for link in 0..lab.plan().private_links {
                    when = when.and(lab.cut_link(&a, &b, link));
                }
                when
            }
            DrillKind::CutOneLink | DrillKind::SlowLink => {
                return Err(EnvError::new(step, "it is done link by link"));
            }
            DrillKind::KillQemu => {
                let pid = pid
                    .and_then(|p| u32::try_from(p).ok())
                    .ok_or_else(|| EnvError::new(step.clone(), "QEMU's process is not known"))?;
                lab.kill_pid_in(primary, pid)
            }
            DrillKind::Switchover => {
                let at = MonotonicNs::now();
                let _: Done = block(
                    self.client(primary)?
                        .post(&format!("/v1/vms/{VM_NAME}/switchover"), &()),
                )
                .map_err(|e| EnvError::new(step, e))?;
                return Ok(at);
            }
        };
        if matches!(kind, DrillKind::KillHost | DrillKind::FreezeHost) {
            self.dark = Some(primary.clone());
        }
        done.map_err(|e| EnvError::new(step, e))
    }

    fn harm_link(&mut self, link: u8, harm: LinkHarm) -> Result<MonotonicNs, EnvError> {
        let (a, b) = self.pair()?;
        let lab = self.lab()?;
        match harm {
            LinkHarm::Silent => lab.cut_link(&a, &b, link),
            LinkHarm::Unplugged => lab.unplug_link(&a, &b, link),
            LinkHarm::Slow => lab.shape_link(&a, &b, link, Some(SLOW_LINK_BYTES_PER_S)),
        }
        .map_err(|e| EnvError::new(format!("harming private link {link}"), e))
    }

    fn heal_link(&mut self, link: u8) -> Result<MonotonicNs, EnvError> {
        let (a, b) = self.pair()?;
        let lab = self.lab()?;
        lab.shape_link(&a, &b, link, None)
            .and_then(|_| lab.heal_link(&a, &b, link))
            .map_err(|e| EnvError::new(format!("healing private link {link}"), e))
    }

    fn link_carries(&mut self, link: u8) -> Result<Option<bool>, EnvError> {
        let hosts = host_statuses(self)?;
        let told: Option<Vec<bool>> = hosts
            .iter()
            .map(|host| link_up(host.partners.first()?, link))
            .collect();
        Ok(told.map(|all| all.iter().all(|up| *up)))
    }

    fn wait_running(&mut self, generation: u64, limit: Duration) -> Result<VmView, EnvError> {
        self.wait("a side to run the VM", limit, |env| {
            let host = env.primary()?.host;
            let status = env.status(&host).ok_or("the host does not answer")?;
            // What it came from tells this failover from the one before.
            let left = status.last_failover.as_ref().map(|f| f.from_generation);
            if status.generation > generation && left.is_some_and(|g| g >= generation) {
                Ok(view(host, status))
            } else {
                Err(format!(
                    "host {host} is {} in generation {}, it was {generation}",
                    status.state, status.generation
                ))
            }
        })
    }

    fn audit(&mut self, host: &HostName, _limit: Duration) -> Result<Option<AuditView>, EnvError> {
        // The audit is made between load and resume: it is in before the VM runs.
        let status = self.status(host).ok_or_else(|| {
            EnvError::new("reading the audit", format!("host {host} does not answer"))
        })?;
        Ok(status.last_failover.as_ref().and_then(audit_view))
    }

    fn repair(&mut self, kind: DrillKind, failed: &HostName) -> Result<(), EnvError> {
        let step = format!("repairing host {failed} after {}", kind.name());
        let hosts = self.hosts()?;
        let lab = self.lab()?;
        let done = match kind {
            DrillKind::KillHost => lab.power_on(failed),
            DrillKind::FreezeHost => lab.thaw(failed),
            DrillKind::CutLink => {
                let (a, b) = self.pair()?;
                let mut when = Ok(MonotonicNs::now());
                for link in 0..lab.plan().private_links {
                    when = when.and(lab.heal_link(&a, &b, link));
                }
                when
            }
            DrillKind::KillQemu
            | DrillKind::Switchover
            | DrillKind::CutOneLink
            | DrillKind::SlowLink => return Ok(()),
        };
        done.map_err(|e| EnvError::new(step.clone(), e))?;
        self.dark = None;
        if kind == DrillKind::KillHost
            && let Some(net) = hosts.iter().find(|h| h.name == *failed)
        {
            wait_daemon(&net.api_socket).map_err(|e| EnvError::new(step, format!("{e:#}")))?;
        }
        Ok(())
    }

    fn disk_records(&mut self) -> Result<Option<DiskRecords>, EnvError> {
        if self.service == Service::Redis {
            return Ok(None);
        }
        let step = "reading the records off the disk";
        let (_, image) = self.stop_vm()?;
        let file = File::open(&image)
            .map_err(|e| EnvError::new(format!("opening {}", image.display()), e))?;
        let listing = record::list(&file, DISK_BYTES).map_err(|e| EnvError::new(step, e))?;
        let layout = pollux_workload::layout::Layout::for_disk(DISK_BYTES)
            .map_err(|e| EnvError::new(step, e))?;
        let mut numbers: Vec<u64> = listing.records.iter().map(|r| r.number).collect();
        numbers.sort_unstable();
        let newest = numbers.last().copied().unwrap_or(0);
        Ok(Some(DiskRecords {
            ranges: ranges(&numbers),
            oldest_kept: (newest + 1).saturating_sub(layout.record_slots()),
            damaged: listing.bad.len() as u64,
        }))
    }

    fn finish(&mut self) {
        if self.stay_up {
            return;
        }
        if self.keep_files {
            eprintln!("the lab's logs and disks stay in {}", self.log_dir());
        }
        if let Some(lab) = self.lab.take()
            && let Err(e) = lab.down()
        {
            eprintln!("the lab could not be taken down: {e}");
        }
    }
}

/// Whether `partner`'s link carries, as this host says; none if it does not tell.
fn link_up(partner: &types::PartnerStatus, link: u8) -> Option<bool> {
    let health = partner.links.get(usize::from(link))?;
    Some(*health == LinkHealth::Up)
}

/// Ascending numbers as inclusive ranges.
fn ranges(numbers: &[u64]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &n in numbers {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            Some((_, end)) if *end == n => {}
            _ => ranges.push((n, n)),
        }
    }
    ranges
}

/// What every host of the lab says, for whoever looks closer than a drill.
///
/// # Errors
/// If no host answers.
pub fn host_statuses(env: &LabEnv) -> Result<Vec<HostStatus>, EnvError> {
    env.hosts()?
        .iter()
        .map(|h| {
            block(Client::new(&h.api_socket).get("/v1/status")).map_err(refused("asking a host"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn numbers_become_ranges() {
        assert_eq!(ranges(&[]), []);
        assert_eq!(ranges(&[1, 2, 3, 5, 5, 6, 9]), [(1, 3), (5, 6), (9, 9)]);
    }
}
