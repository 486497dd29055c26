//! What a host does with its VMs when the operator asks.

use super::{Host, VmEntry, lock, refused};
use crate::api::types::{ApiError, Done, Role, VmStatus};
use crate::daemon::ha::{put, spec_key};
use crate::daemon::worker::{self, Begin, Shared, VmCommand, WorkerConfig, WorkerEvent};
use crate::mirror::{ClaimOutcome, VmRecord};
use crate::pool::spec::{Boot, Protection, VmSpec};
use crate::pool::{HostName, VmId};
use crate::registry::Versioned;
use crate::vm::argv::Accel;
use crate::vm::{accel, probe};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

/// How long a VM's start may take before its caller is told to look at the status.
const START_DEADLINE: Duration = Duration::from_secs(25);
/// How long an operator's command may wait for its worker.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// How long the workers of an ending daemon may take to put their VMs away.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two looks at them.
const END_POLL: Duration = Duration::from_millis(10);

impl Host {
    /// Know a VM by its spec.
    pub(super) fn know(&self, spec: Arc<VmSpec>) -> Arc<Shared> {
        let mut vms = lock(&self.vms);
        let entry = vms.entry(spec.uuid).or_insert_with(|| VmEntry {
            shared: Arc::new(Shared::stopped(&spec)),
            spec: Arc::clone(&spec),
        });
        entry.spec = spec;
        Arc::clone(&entry.shared)
    }

    /// The daemon is told to end: mirrored VMs go on at their standbys, all others are
    /// powered off. Returns when no VM is left here.
    pub fn put_away(&self) {
        if let Some(membership) = self.membership.get() {
            membership.leave();
        }
        self.gate.close("this host's daemon was told to end");
        self.env.routes.send_all(|| WorkerEvent::DaemonEnds);
        let begun = Instant::now();
        while !self.env.routes.is_empty() && begun.elapsed() < END_DEADLINE {
            std::thread::sleep(END_POLL);
        }
        self.env.claims.leave();
    }

    fn find(&self, name: &str) -> Result<(Arc<VmSpec>, Arc<Shared>), ApiError> {
        let vms = lock(&self.vms);
        vms.values()
            .find(|e| e.spec.name.as_str() == name || e.spec.uuid.to_string() == name)
            .map(|e| (Arc::clone(&e.spec), Arc::clone(&e.shared)))
            .ok_or_else(|| {
                let known: Vec<_> = vms.values().map(|e| e.spec.name.as_str()).collect();
                let known = if known.is_empty() {
                    "none".into()
                } else {
                    known.join(", ")
                };
                refused(format!(
                    "host {} knows no VM `{name}`; it knows: {known}",
                    self.env.config.name
                ))
            })
    }

    /// One VM's status.
    ///
    /// # Errors
    /// If there is no such VM.
    pub fn vm_status(&self, name: &str) -> Result<VmStatus, ApiError> {
        Ok(self.find(name)?.1.snapshot())
    }

    /// One VM's spec, TOML with all defaults.
    ///
    /// # Errors
    /// If there is no such VM.
    pub fn vm_spec(&self, name: &str) -> Result<String, ApiError> {
        Ok(self.find(name)?.0.to_toml())
    }

    /// Take in a VM's spec.
    ///
    /// # Errors
    /// If the spec is wrong, or another VM has its name or uuid.
    pub fn vm_create(&self, text: &str, origin: &str) -> Result<Done, ApiError> {
        let (spec, notes) = VmSpec::parse_with_notes(text, origin).map_err(refused)?;
        if spec.protection == Protection::Mirrored {
            crate::vm::admission::check_spec(&spec).map_err(refused)?;
        }
        for entry in lock(&self.vms).values() {
            let (name, uuid) = (&entry.spec.name, entry.spec.uuid);
            if *name == spec.name || uuid == spec.uuid {
                return Err(refused(format!(
                    "VM `{name}` with uuid {uuid} is here already; `pollux vm delete {name}` first, or choose another name and uuid"
                )));
            }
        }
        if spec.protection == Protection::Restart {
            self.publish_spec(&spec)?;
        }
        self.store.put_spec(&spec).map_err(refused)?;
        self.know(Arc::new(spec));
        Ok(Done {
            notes: notes.iter().map(ToString::to_string).collect(),
        })
    }

    /// Forget a VM that does not run here. Its images stay.
    ///
    /// # Errors
    /// If there is no such VM or it is not stopped.
    pub fn vm_delete(&self, name: &str) -> Result<Done, ApiError> {
        let (spec, shared) = self.find(name)?;
        let role = shared.snapshot().role;
        if role != Role::Stopped {
            return Err(refused(format!(
                "VM `{name}` is {role:?} here; stop it first with `pollux vm stop {name}`"
            )));
        }
        if spec.protection == Protection::Restart && self.membership.get().is_some() {
            // Empty: no host starts it again.
            self.put_in_registry(&spec_key(spec.uuid), Vec::new())?;
        }
        self.store.delete_spec(&spec).map_err(refused)?;
        lock(&self.vms).remove(&spec.uuid);
        Ok(Done {
            notes: vec!["its disk images were left in place".into()],
        })
    }

    /// Start a VM here.
    ///
    /// # Errors
    /// If it runs, another host may run it, the registry cannot be reached, or QEMU does not start.
    pub fn vm_start(&self, name: &str, force: bool) -> Result<Done, ApiError> {
        let (spec, shared) = self.find(name)?;
        if shared.snapshot().role != Role::Stopped {
            return Err(refused(format!(
                "VM `{name}` is here already; see `pollux vm show {name}`"
            )));
        }
        let _permit = self
            .gate
            .permit()
            .map_err(|why| refused(format!("VM `{name}` cannot be started here: {why}")))?;
        self.start_worker(spec, shared, false, |spec| self.claim_start(spec, force))
    }

    /// Start a VM that this host may start: `claim` wins the right to. One that is tried `again`
    /// if it does not come up is left as one that is to run.
    fn start_worker(
        &self,
        spec: Arc<VmSpec>,
        shared: Arc<Shared>,
        again: bool,
        claim: impl FnOnce(&VmSpec) -> Result<Versioned<VmRecord>, ApiError>,
    ) -> Result<Done, ApiError> {
        let name = &spec.name;
        let partner = (spec.protection == Protection::Mirrored)
            .then(|| self.partner_for(&spec).ok())
            .flatten();
        let machines = &self.qemu.machines;
        let machine = probe::common_machine(&spec, machines, machines).map_err(refused)?;
        let accel = self.choose_accel(&spec, &shared)?;
        // Last: from here on the registry says that it runs here.
        let record = claim(&spec)?;
        let generation = record.value.generation;
        let config = WorkerConfig {
            spec: Arc::clone(&spec),
            machine,
            accel,
            partner,
        };
        let (tx, rx) = sync_channel(1);
        worker::start(
            Arc::clone(&self.env),
            config,
            Begin::Primary { record, again },
            shared,
            move |r| {
                let _ = tx.send(r);
            },
        )
        .map_err(refused)?;
        match rx.recv_timeout(START_DEADLINE) {
            Ok(Ok(())) => Ok(Done::default()),
            Ok(Err(reason)) => Err(refused(format!(
                "VM `{name}` did not start (generation {generation}): {reason}"
            ))),
            Err(_) => Err(refused(format!(
                "VM `{name}` is still starting after {} s; look at `pollux vm show {name}`",
                START_DEADLINE.as_secs()
            ))),
        }
    }

    /// Start a VM of a dead host, or an own one that ended, if its record is still the one that
    /// was looked at.
    pub(in crate::daemon) fn vm_restart(
        &self,
        spec: VmSpec,
        record: Versioned<VmRecord>,
        cause: &str,
    ) -> Result<(), String> {
        let _permit = self.gate.permit()?;
        self.store.put_spec(&spec).map_err(|e| e.to_string())?;
        let spec = Arc::new(spec);
        let shared = self.know(Arc::clone(&spec));
        shared.event(format!("started again: {cause}"));
        let me = self.env.config.name.clone();
        let claim = |spec: &VmSpec| {
            let value = VmRecord::started(me, Some(&record.value));
            match self
                .env
                .claims
                .claim_blocking(spec.uuid, Some(record.version), value)
            {
                ClaimOutcome::Won(record) => Ok(record),
                ClaimOutcome::Lost(now) => {
                    let by = now.map_or("somebody".into(), |now| now.value.owner.to_string());
                    Err(refused(format!("{by} has claimed it meanwhile")))
                }
                ClaimOutcome::Unreachable { reason } => Err(refused(reason)),
            }
        };
        self.start_worker(spec, shared, true, claim)
            .map(drop)
            .map_err(|e| e.error)
    }

    /// Whether something of a VM runs here.
    pub(in crate::daemon) fn has_worker(&self, vm: VmId) -> bool {
        self.env.routes.names().contains(&vm)
    }

    /// Put the spec where every host of the pool finds it.
    fn publish_spec(&self, spec: &VmSpec) -> Result<(), ApiError> {
        if self.membership.get().is_none() {
            return Err(refused(format!(
                "VM `{}` is to be restarted on other hosts, but host {} belongs to no pool: add a table [pool] to its configuration (docs/guide.md)",
                spec.name, self.env.config.name
            )));
        }
        self.put_in_registry(&spec_key(spec.uuid), spec.to_toml().into_bytes())
    }

    fn put_in_registry(&self, key: &str, value: Vec<u8>) -> Result<(), ApiError> {
        let (tell, told) = sync_channel(1);
        let key = key.to_owned();
        self.env.claims.work(move |registry| {
            let _ = tell.send(registry.and_then(|registry| put(registry, &key, &value)));
        });
        told.recv()
            .unwrap_or_else(|_| Err("the registry thread has ended".into()))
            .map_err(refused)
    }

    fn choose_accel(&self, spec: &VmSpec, shared: &Shared) -> Result<Accel, ApiError> {
        let mut kernels = accel::host_kernels();
        if let Boot::Kernel { kernel, .. } = &spec.boot {
            kernels.insert(0, kernel.clone());
        }
        let cache = &self.env.config.state_dir;
        let verdict =
            accel::choose_accel(spec.accel, &self.qemu, &kernels, cache).map_err(refused)?;
        shared.event(format!(
            "accelerator {:?}: {}",
            verdict.accel, verdict.reason
        ));
        Ok(verdict.accel)
    }

    /// Win the right to start.
    fn claim_start(&self, spec: &VmSpec, force: bool) -> Result<Versioned<VmRecord>, ApiError> {
        let me = &self.env.config.name;
        let previous = match self.env.claims.read_blocking(spec.uuid) {
            ClaimOutcome::Lost(found) => found,
            ClaimOutcome::Unreachable { reason } => return Err(refused(reason)),
            ClaimOutcome::Won(record) => Some(record),
        };
        let value = VmRecord::start(me, previous.as_ref().map(|p| &p.value), force)
            .map_err(|e| refused(format!("VM `{}`: {e}", spec.name)))?;
        match self
            .env
            .claims
            .claim_blocking(spec.uuid, previous.map(|p| p.version), value)
        {
            ClaimOutcome::Won(record) => Ok(record),
            ClaimOutcome::Lost(now) => {
                let by = now.map_or("somebody".into(), |n| n.value.owner.to_string());
                Err(refused(format!(
                    "{by} claimed VM `{}` at the same moment",
                    spec.name
                )))
            }
            ClaimOutcome::Unreachable { reason } => Err(refused(reason)),
        }
    }

    /// The spec's partner, unless that is this host itself (the roles were swapped); else
    /// the only one there is.
    fn partner_for(&self, spec: &VmSpec) -> Result<HostName, ApiError> {
        match &spec.mirror.partner {
            Some(partner) if *partner != self.env.config.name => Ok(partner.clone()),
            _ => self.only_partner(),
        }
    }

    fn only_partner(&self) -> Result<HostName, ApiError> {
        let partners = lock(&self.partners);
        let mut names = partners.keys();
        match (names.next(), names.next()) {
            (Some(only), None) => Ok(only.clone()),
            (None, _) => Err(refused(
                "this host has no partner; make a link with `pollux link create`",
            )),
            _ => Err(refused(
                "this host has several partners; name one with --partner",
            )),
        }
    }

    /// Mirror a running VM.
    ///
    /// # Errors
    /// If it does not run here or cannot be mirrored.
    pub fn vm_protect(&self, name: &str, partner: Option<HostName>) -> Result<Done, ApiError> {
        let (spec, _) = self.find(name)?;
        if let Some(reason) = &self.cannot_mirror {
            return Err(refused(format!(
                "host {} cannot mirror: {reason}",
                self.env.config.name
            )));
        }
        let partner = match partner {
            Some(partner) => partner,
            None => self.partner_for(&spec)?,
        };
        self.vm_command(name, VmCommand::Protect(partner))
    }

    /// Tell a VM's worker something.
    ///
    /// # Errors
    /// If it does not run here, or the worker refuses.
    pub fn vm_command(&self, name: &str, command: VmCommand) -> Result<Done, ApiError> {
        let (spec, _) = self.find(name)?;
        let (tx, rx) = tokio::sync::oneshot::channel();
        if !self
            .env
            .routes
            .send(spec.uuid, WorkerEvent::Command(command, tx))
        {
            return Err(refused(format!(
                "VM `{name}` does not run on host {}; `pollux vm start {name}`, or ask the host that runs it",
                self.env.config.name
            )));
        }
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(COMMAND_DEADLINE, rx).await });
        match answer {
            Ok(Ok(Ok(()))) => Ok(Done::default()),
            Ok(Ok(Err(reason))) => Err(refused(format!("VM `{name}`: {reason}"))),
            Ok(Err(_)) => Err(refused(format!("VM `{name}` ended while it was asked"))),
            Err(_) => Err(refused(format!(
                "VM `{name}` did not answer in {} s",
                COMMAND_DEADLINE.as_secs()
            ))),
        }
    }
}
