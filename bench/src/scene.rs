//! Two hosts of a lab and one VM, protected and unprotected at will.

use crate::load::{Load, options};
use anyhow::{Context, Result, bail};
use pollux::api::client::{Client, block};
use pollux::api::types::{CreateVm, Done, EpochFigures, Percentiles, Role, Start, VmStatus};
use pollux::drill::client::Mode;
use pollux::drill::env::{self, DrillEnv, Quantiles, Setting, VmView};
use pollux::drill::lab_env::{GUEST, Guest, LabEnv, VM_NAME};
use pollux::drill::{MonotonicNs, Service};
use pollux::lab::{HostNet, Lab};
use std::time::{Duration, Instant};

/// Starting hosts and booting the guest; TCG on a busy machine takes the longest.
const BOOT_MAX: Duration = Duration::from_secs(180);
/// Seeding, or a command.
const STEP_MAX: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// After protecting, before anything is measured: caches and pages of the seeding settle.
const SETTLE: Duration = Duration::from_secs(1);

/// Events and log lines of each host that explain a failure.
const EXPLAIN_LINES: usize = 30;

/// A lab with a VM.
pub struct Scene {
    /// The drill's environment.
    pub env: LabEnv,
    hosts: Vec<HostNet>,
}

impl Scene {
    /// Hosts up, guest answering, not protected, its workers idle.
    ///
    /// # Errors
    /// What could not be started.
    pub fn up(guest: Guest) -> Result<Self> {
        let name = format!("bench-{}", std::process::id());
        let mut env = LabEnv::new(name.clone(), guest);
        let load = env::Load {
            clients: 1,
            disk_iops: 0,
            mem_pages_s: 0,
            net: false,
        };
        let setting = Setting {
            load,
            service: Service::Counter,
            links: 1,
            audit: false,
        };
        let hosts = env
            .prepare(&setting, BOOT_MAX)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(Lab::open(&name)?.plan().hosts.clone()));
        match hosts {
            Ok(hosts) => Ok(Self { env, hosts }),
            Err(e) => {
                env.finish();
                Err(e)
            }
        }
    }

    /// One line to the guest, one back.
    ///
    /// # Errors
    /// What was not answered, or an answer that begins with ERR.
    pub fn ask(&self, line: &str) -> Result<String> {
        let answer = self.env.ask_guest(line)?;
        if answer.starts_with("ERR") {
            bail!("the guest answered `{line}` with `{answer}`");
        }
        Ok(answer)
    }

    /// The guest's workers: disk writes and dirtied pages per second, busy threads.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn workers(&self, disk_iops: u32, mem_pages_s: u32, cpu_threads: u32) -> Result<()> {
        self.ask(&format!("SET disk_iops {disk_iops}"))?;
        self.ask(&format!("SET mem_pages_s {mem_pages_s}"))?;
        self.ask(&format!("SET cpu_threads {cpu_threads}"))?;
        Ok(())
    }

    /// Status of the VM on each host that answers.
    #[must_use]
    pub fn statuses(&self) -> Vec<(HostNet, VmStatus)> {
        let ask = |net: &HostNet| {
            let status = block(Client::new(&net.api_socket).get(&format!("/v1/vms/{VM_NAME}")));
            status.ok().map(|s: VmStatus| (net.clone(), s))
        };
        self.hosts.iter().filter_map(ask).collect()
    }

    /// Status of the side with this role.
    ///
    /// # Errors
    /// If no host has it.
    pub fn side(&self, role: Role) -> Result<(HostNet, VmStatus)> {
        let found = self.statuses().into_iter().find(|(_, s)| s.role == role);
        found.with_context(|| format!("no host is the VM's {role:?}"))
    }

    fn command(&self, command: &str) -> Result<()> {
        let (net, _) = self.side(Role::Primary)?;
        let path = format!("/v1/vms/{VM_NAME}/{command}");
        let _: Done = block(Client::new(&net.api_socket).post(&path, &()))?;
        Ok(())
    }

    fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let end = Instant::now() + STEP_MAX;
        while !done(self) {
            if Instant::now() > end {
                bail!("{what}: not within {} s", STEP_MAX.as_secs());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Mirror the VM and let it settle. Its figures begin anew.
    ///
    /// # Errors
    /// If it is not mirrored in time.
    pub fn protect(&mut self) -> Result<VmView> {
        self.env.protect()?;
        let view = self.env.wait_mirrored(STEP_MAX)?;
        std::thread::sleep(SETTLE);
        Ok(view)
    }

    /// Mirror it no longer.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn unprotect(&mut self) -> Result<()> {
        self.command("unprotect")?;
        self.wait("unprotecting the VM", |s| {
            let all = s.statuses();
            all.iter().any(|(_, v)| v.state == "solo")
                && all.iter().all(|(_, v)| v.role != Role::Standby)
        })
    }

    /// Stop the VM, change its spec, start it again.
    ///
    /// # Errors
    /// What was refused.
    pub fn restart_with(&mut self, change: impl Fn(&str) -> String) -> Result<()> {
        let (net, _) = self.side(Role::Primary)?;
        self.command("stop")?;
        self.wait("stopping the VM", |s| {
            s.statuses().iter().all(|(_, v)| v.role == Role::Stopped)
        })?;
        let client = Client::new(&net.api_socket);
        let spec: String = block(client.get(&format!("/v1/vms/{VM_NAME}/spec")))?;
        let changed = change(&spec);
        if changed == spec {
            bail!("the spec could not be changed:\n{spec}");
        }
        let _: Done = block(client.delete(&format!("/v1/vms/{VM_NAME}")))?;
        let create = CreateVm {
            spec: changed,
            origin: "bench".into(),
        };
        let _: Done = block(client.post("/v1/vms", &create))?;
        let _: Done = block(client.post(&format!("/v1/vms/{VM_NAME}/start"), &Start::default()))?;
        self.wait("the guest to answer", |s| s.ask("PING").is_ok())
    }

    /// Clients outside, each answered once.
    ///
    /// # Errors
    /// If they cannot be started or are not answered.
    pub fn clients(&mut self, mode: Mode, clients: u16) -> Result<Load> {
        let pipes = self
            .env
            .spawn_client(&options(mode, GUEST, clients).args())?;
        let load = Load::new(pipes, clients)?;
        load.wait_answers(MonotonicNs(0), STEP_MAX)?;
        Ok(load)
    }

    /// What each host says of the VM, and the end of its daemon's log, to standard error.
    pub fn explain(&self) {
        for (net, status) in self.statuses() {
            eprintln!(
                "host {}: {:?}, {}, generation {}",
                net.name, status.role, status.state, status.generation
            );
            for event in status.events.iter().rev().take(EXPLAIN_LINES).rev() {
                eprintln!("  {} ms {}", event.at_ns / 1_000_000, event.what);
            }
        }
        for net in &self.hosts {
            let log = std::fs::read_to_string(&net.daemon_log).unwrap_or_default();
            eprintln!("log of host {}:", net.name);
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(EXPLAIN_LINES)..] {
                eprintln!("  {line}");
            }
        }
    }

    /// The running side's figures of the epochs since it was protected.
    ///
    /// # Errors
    /// If there are none.
    pub fn epochs(&self) -> Result<EpochFigures> {
        self.side(Role::Primary)?
            .1
            .epochs
            .context("no epoch was committed")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.env.finish();
    }
}

/// A status' percentiles as the drills show them.
#[must_use]
pub fn quantiles_of(p: Percentiles, count: u64) -> Quantiles {
    Quantiles {
        count,
        p50_us: p.p50,
        p90_us: p.p90,
        p99_us: p.p99,
        max_us: p.max,
    }
}
