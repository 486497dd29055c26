//! A drill's environment in the lab: real hosts, a real VM, the API.

use super::DrillKind;
use super::env::{
    AuditView, ClientPipes, DiskRecords, DrillEnv, EnvError, EventView, FailoverView, MonotonicNs,
    PauseView, Quantiles, Role, Service, Setting, VmView,
};
use crate::api::client::{Client, ClientError, block};
use crate::api::types::{
    self, CreateVm, Done, EpochFigures, Failover, HostStatus, Percentiles, Protect, VmStatus,
};
use crate::lab::daemons::{lab_up, wait_daemon};
use crate::lab::{HostNet, KeepPolicy, Lab, Place, in_network};
use crate::pool::HostName;
use pollux_workload::record;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
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

/// What the lab's VM is like.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Folder with `vmlinuz`, `initrd` and `initrd-redis`.
    pub images: PathBuf,
    /// Guest RAM, MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Machine type as in a spec.
    pub machine: String,
    /// More for the kernel's command line.
    pub cmdline: String,
}

impl Guest {
    /// The test guest in `images`: 512 MiB, one vCPU.
    #[must_use]
    pub fn new(images: &Path) -> Self {
        Self {
            images: images.into(),
            memory_mib: 512,
            vcpus: 1,
            machine: "auto".into(),
            cmdline: String::new(),
        }
    }

    /// The folder with the images: `POLLUX_GUEST`, else `target/guest/current` under the
    /// working folder or beside the running program.
    ///
    /// # Errors
    /// If there is none.
    pub fn find_images() -> Result<PathBuf, EnvError> {
        let beside = std::env::current_exe().ok().and_then(|exe| {
            let target = exe
                .ancestors()
                .find(|p| p.file_name().is_some_and(|n| n == "target"))?;
            Some(target.join("guest/current"))
        });
        let candidates = [
            std::env::var_os("POLLUX_GUEST").map(PathBuf::from),
            Some("target/guest/current".into()),
            beside,
        ];
        candidates
            .into_iter()
            .flatten()
            .find(|p| p.join("vmlinuz").exists())
            .and_then(|p| p.canonicalize().ok())
            .ok_or_else(|| {
                EnvError::new(
                    "finding the test guest",
                    "there is no target/guest/current here; run `make setup`, or name its folder in POLLUX_GUEST",
                )
            })
    }

    fn spec(&self, setting: &Setting) -> String {
        let (modes, initrd) = match setting.service {
            Service::Counter => ("counter,disk,memory,net,cpu", "initrd"),
            Service::Redis => ("counter,disk,memory,net,cpu,redis", "initrd-redis"),
        };
        let address = std::net::Ipv4Addr::from(GUEST);
        // Under TCG the guest's TSC is the host's, and a microvm has nothing to measure it by.
        let tsc = crate::interpose::checkpoint::ticks_per_second() / 1000;
        let load = &setting.load;
        let images = self.images.display();
        format!(
            r#"name = "{VM_NAME}"
uuid = "d0d0cafe-0000-4000-8000-00000000d111"
memory = "{} MiB"
vcpus = {}
machine = "{}"
accel = "tcg"
kernel = "{images}/vmlinuz"
initrd = "{images}/{initrd}"
cmdline = "console=ttyS0 quiet oops=panic reboot=t tsc=reliable no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1 tsc_early_khz={tsc} pollux.ip={address}/24 pollux.mode={modes} pollux.disk_iops={} pollux.mem_pages_s={} pollux.cpu_threads=0 {}"
[[disk]]
name = "data"
path = "{VM_NAME}.raw"
size = "{} MiB"
durability = "memory"
[[nic]]
name = "lan"
bridge = "{}"
[mirror]
audit = {}
"#,
            self.memory_mib,
            self.vcpus,
            self.machine,
            load.disk_iops,
            load.mem_pages_s,
            self.cmdline,
            DISK_BYTES >> 20,
            crate::lab::HOST_BRIDGE,
            setting.audit,
        )
    }
}

/// Two hosts in a lab of its own, and one VM.
pub struct LabEnv {
    name: String,
    guest: Guest,
    service: Service,
    lab: Option<Lab>,
    dark: Option<HostName>,
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
            lab: None,
            dark: None,
        }
    }

    fn lab(&self) -> Result<&Lab, EnvError> {
        self.lab
            .as_ref()
            .ok_or_else(|| EnvError::new("using the lab", "it is not up"))
    }

    fn hosts(&self) -> Result<Vec<HostNet>, EnvError> {
        Ok(self.lab()?.plan().hosts.clone())
    }

    fn client(&self, host: &HostName) -> Result<Client, EnvError> {
        let net = self
            .lab()?
            .host(host)
            .map_err(|e| EnvError::new("finding a host", e))?;
        Ok(Client::new(&net.api_socket))
    }

    fn status(&self, host: &HostName) -> Option<VmStatus> {
        if self.dark.as_ref() == Some(host) {
            return None;
        }
        let client = self.client(host).ok()?;
        block(client.get(&format!("/v1/vms/{VM_NAME}"))).ok()
    }

    fn wait<T>(
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
    fn primary(&mut self) -> Result<VmView, String> {
        let views = self.views().map_err(|e| e.to_string())?;
        let mut running = views
            .into_iter()
            .filter(|v| matches!(v.role, Role::Primary | Role::Solo));
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
        let hosts = ["a", "b"].map(|n| HostName::new(n).expect("both are valid names"));
        let lab = lab_up(&self.name, hosts.to_vec(), 1, KeepPolicy::WithCreator)
            .map_err(|e| EnvError::new("making the lab", format!("{e:#}")))?;
        let first = lab.plan().hosts.first().cloned();
        self.lab = Some(lab);
        let net = first.ok_or_else(|| EnvError::new("making the lab", "it has no hosts"))?;
        let image = net.state_dir.join("images").join(format!("{VM_NAME}.raw"));
        File::create(&image)
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
        let program = std::env::current_exe().map_err(|e| EnvError::new(step, e))?;
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
                let hosts = self.hosts()?;
                lab.cut_link(&hosts[0].name, &hosts[1].name, 0)
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

    fn wait_running(&mut self, generation: u64, limit: Duration) -> Result<VmView, EnvError> {
        self.wait("a side to run the VM", limit, |env| {
            let view = env.primary()?;
            if view.generation > generation && view.last_failover.is_some() {
                Ok(view)
            } else {
                Err(format!(
                    "host {} is {} in generation {}, it was {generation}",
                    view.host, view.state, view.generation
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
            DrillKind::CutLink => lab.heal_link(&hosts[0].name, &hosts[1].name, 0),
            DrillKind::KillQemu | DrillKind::Switchover => return Ok(()),
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
        let view = self.primary().map_err(|e| EnvError::new(step, e))?;
        let image = self
            .status(&view.host)
            .and_then(|s| s.disks.first().cloned())
            .ok_or_else(|| EnvError::new(step, "the image is not known"))?;
        // Stopping writes out what is committed and nothing else.
        let _: Done = block(
            self.client(&view.host)?
                .post(&format!("/v1/vms/{VM_NAME}/stop"), &()),
        )
        .map_err(refused("stopping the VM"))?;
        let host = view.host;
        self.wait("the VM to stop", Duration::from_secs(20), |env| {
            match env.status(&host) {
                Some(s) if s.role == types::Role::Stopped => Ok(()),
                Some(s) => Err(s.state),
                None => Err("the host does not answer".into()),
            }
        })?;
        let file = File::open(&image).map_err(|e| EnvError::new(format!("opening {image}"), e))?;
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
        if let Some(lab) = self.lab.take()
            && let Err(e) = lab.down()
        {
            eprintln!("the lab could not be taken down: {e}");
        }
    }
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

fn quantiles(p: Percentiles, count: u64) -> Quantiles {
    Quantiles {
        count,
        p50_us: p.p50,
        p90_us: p.p90,
        p99_us: p.p99,
        max_us: p.max,
    }
}

fn audit_view(f: &Failover) -> Option<AuditView> {
    Some(AuditView {
        memory_equal: f.memory_equal?,
        disks_equal: f.disks_equal?,
        audit_ms: f.audit_us / 1000,
    })
}

fn view(host: HostName, status: VmStatus) -> VmView {
    let e: EpochFigures = status.epochs.unwrap_or_default();
    let q = |p| quantiles(p, e.window);
    VmView {
        host,
        role: match (status.role, status.state.as_str()) {
            (types::Role::Primary, "solo") => Role::Solo,
            (types::Role::Primary, _) => Role::Primary,
            (types::Role::Standby, _) => Role::Standby,
            (types::Role::Stopped, _) => Role::None,
        },
        state: status.state,
        mirrored: status.mirrored,
        generation: status.generation,
        epoch: status.epoch,
        committed_epoch: status.committed,
        lag_us: e.lag_us.p50,
        pause: PauseView {
            total: q(e.pause_us),
            stop: q(e.stop_us),
            capture: q(e.capture_us),
            save: q(e.save_us),
            cont: q(e.cont_us),
        },
        commit: q(e.commit_us),
        epochs: e.committed,
        pages_per_epoch: e.pages.p50,
        bytes_per_epoch: e.wire_bytes.p50,
        qemu_pid: status.qemu_pid.and_then(|p| u32::try_from(p).ok()),
        last_failover: status.last_failover.as_ref().map(|f| FailoverView {
            suspected_at_ns: MonotonicNs(f.suspected_ns),
            claim_started_ns: MonotonicNs(f.claim_started_ns),
            claim_won_ns: MonotonicNs(f.claim_won_ns),
            promote_started_ns: MonotonicNs(f.promote_started_ns),
            running_ns: MonotonicNs(f.running_ns),
            from_epoch: f.from_epoch,
            audit: audit_view(f),
        }),
        events: status
            .events
            .into_iter()
            .map(|e| EventView {
                at_ns: MonotonicNs(e.at_ns),
                text: e.what,
            })
            .collect(),
    }
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
