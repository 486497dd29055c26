//! One host: its identity, its partners, its VMs.

use super::claims::Claims;
use super::clock::now_ns;
use super::config::{HostConfig, LinkConfig};
use super::control::ControlMsg;
use super::partner::{OnUnrouted, Partner, PartnerSetup};
use super::store::Store;
use super::worker::{self, Begin, Env, Routes, Shared, VmCommand, WorkerConfig, WorkerEvent};
use crate::api::types::{ApiError, Done, HostInfo, HostStatus, Role, VmStatus};
use crate::mirror::{ClaimOutcome, VmRecord};
use crate::pool::spec::{Boot, Protection, VmSpec};
use crate::pool::{Generation, HostName, VmId};
use crate::registry::{FileRegistry, FileRegistryOptions, Versioned};
use crate::vm::argv::Accel;
use crate::vm::{accel, kernel, probe};
use interconnect::identity::Identity;
use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a VM's start may take before its caller is told to look at the status.
const START_DEADLINE: Duration = Duration::from_secs(25);
/// How long an operator's command may wait for its worker.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// A VM known to this host.
struct VmEntry {
    spec: Arc<VmSpec>,
    shared: Arc<Shared>,
}

/// The host.
pub struct Host {
    env: Arc<Env>,
    identity: Arc<Identity>,
    runtime: tokio::runtime::Handle,
    store: Store,
    qemu: probe::QemuBinary,
    cannot_mirror: Option<String>,
    vms: Mutex<BTreeMap<VmId, VmEntry>>,
    partners: Mutex<BTreeMap<HostName, Arc<Partner>>>,
}

fn refused(error: impl std::fmt::Display) -> ApiError {
    ApiError { error: error.to_string() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Bring the host up: identity, registry, QEMU, known VMs and links.
    ///
    /// # Errors
    /// What is missing and what to do about it.
    pub fn start(config: HostConfig, runtime: tokio::runtime::Handle) -> anyhow::Result<Arc<Self>> {
        let cannot_mirror = match kernel::check_host() {
            Ok(()) => None,
            Err(e @ kernel::HostError::NotRoot { .. }) => return Err(e.into()),
            Err(e) => Some(e.to_string()),
        };
        if let Some(reason) = &cannot_mirror {
            tracing::warn!("this host cannot mirror: {reason}");
        }
        let qemu = probe::find_qemu(&config.qemu)?;
        tracing::info!(version = %qemu.version, "QEMU is {}", qemu.program.display());
        let identity = Arc::new(Identity::load_or_create(&config.state_dir.join("identity"))?);
        let registry = FileRegistry::new(&config.registry_dir, FileRegistryOptions::default());
        let claims = Claims::start(Box::new(registry))?;
        let store = Store::open(&config.state_dir)?;
        let routes = Routes::default();
        let env = Arc::new(Env {
            qemu: qemu.program.clone(),
            qemu_version: qemu.version.to_string(),
            timing: config.timing(),
            claims,
            routes,
            peers: Mutex::default(),
            config,
        });
        let host = Arc::new(Self {
            env,
            identity,
            runtime,
            store,
            qemu,
            cannot_mirror,
            vms: Mutex::default(),
            partners: Mutex::default(),
        });
        for spec in host.store.specs()? {
            host.know(Arc::new(spec));
        }
        for link in host.store.links()? {
            if let Err(e) = host.connect(link) {
                tracing::error!("{e}");
            }
        }
        Ok(host)
    }

    fn know(&self, spec: Arc<VmSpec>) -> Arc<Shared> {
        let mut vms = lock(&self.vms);
        let entry = vms.entry(spec.uuid).or_insert_with(|| VmEntry {
            shared: Arc::new(Shared::stopped(&spec)),
            spec: Arc::clone(&spec),
        });
        entry.spec = spec;
        Arc::clone(&entry.shared)
    }

    /// Who this host is.
    #[must_use]
    pub fn info(&self) -> HostInfo {
        HostInfo {
            name: self.env.config.name.clone(),
            fingerprint: self.identity.fingerprint().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            qemu: self.qemu.version.to_string(),
            cannot_mirror: self.cannot_mirror.clone(),
            now_ns: now_ns(),
        }
    }

    /// Everything this host knows of itself.
    #[must_use]
    pub fn status(&self) -> HostStatus {
        let partners: Vec<_> = lock(&self.partners).values().cloned().collect();
        let shared: Vec<_> = lock(&self.vms).values().map(|e| Arc::clone(&e.shared)).collect();
        let mut vms: Vec<VmStatus> = shared.iter().map(|s| s.snapshot()).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        HostStatus {
            host: self.info(),
            partners: partners.iter().map(|p| p.status()).collect(),
            vms,
        }
    }

    fn find(&self, name: &str) -> Result<(Arc<VmSpec>, Arc<Shared>), ApiError> {
        let vms = lock(&self.vms);
        vms.values()
            .find(|e| e.spec.name.as_str() == name || e.spec.uuid.to_string() == name)
            .map(|e| (Arc::clone(&e.spec), Arc::clone(&e.shared)))
            .ok_or_else(|| {
                let known: Vec<_> = vms.values().map(|e| e.spec.name.as_str()).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
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
        self.store.put_spec(&spec).map_err(refused)?;
        self.know(Arc::new(spec));
        Ok(Done { notes: notes.iter().map(ToString::to_string).collect() })
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
        self.store.delete_spec(&spec).map_err(refused)?;
        lock(&self.vms).remove(&spec.uuid);
        Ok(Done { notes: vec!["its disk images were left in place".into()] })
    }

    /// Start a VM here.
    ///
    /// # Errors
    /// If it runs, another host may run it, the registry cannot be reached, or QEMU does not start.
    pub fn vm_start(&self, name: &str) -> Result<Done, ApiError> {
        let (spec, shared) = self.find(name)?;
        if shared.snapshot().role != Role::Stopped {
            return Err(refused(format!("VM `{name}` is here already; see `pollux vm show {name}`")));
        }
        let record = self.claim_start(&spec)?;
        let generation = record.value.generation;
        let partner = (spec.protection == Protection::Mirrored)
            .then(|| spec.mirror.partner.clone().or_else(|| self.only_partner().ok()))
            .flatten();
        let machines = &self.qemu.machines;
        let machine = probe::common_machine(&spec, machines, machines).map_err(refused)?;
        let accel = self.choose_accel(&spec, &shared)?;
        let config = WorkerConfig { spec: Arc::clone(&spec), machine, accel, partner };
        let (tx, rx) = sync_channel(1);
        worker::start(Arc::clone(&self.env), config, Begin::Primary { record }, shared, move |r| {
            let _ = tx.send(r);
        })
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

    fn choose_accel(&self, spec: &VmSpec, shared: &Shared) -> Result<Accel, ApiError> {
        let mut kernels = accel::host_kernels();
        if let Boot::Kernel { kernel, .. } = &spec.boot {
            kernels.insert(0, kernel.clone());
        }
        let cache = &self.env.config.state_dir;
        let verdict = accel::choose_accel(spec.accel, &self.qemu, &kernels, cache).map_err(refused)?;
        shared.event(format!("accelerator {:?}: {}", verdict.accel, verdict.reason));
        Ok(verdict.accel)
    }

    /// Win the right to start: nobody else may be running it.
    fn claim_start(&self, spec: &VmSpec) -> Result<Versioned<VmRecord>, ApiError> {
        let me = &self.env.config.name;
        let previous = match self.env.claims.read_blocking(spec.uuid) {
            ClaimOutcome::Lost(found) => found,
            ClaimOutcome::Unreachable { reason } => return Err(refused(reason)),
            ClaimOutcome::Won(record) => Some(record),
        };
        if let Some(Versioned { value, .. }) = &previous
            && value.running
            && value.owner != *me
        {
            return Err(refused(format!(
                "host {} may be running VM `{}` (generation {}); stop it there first",
                value.owner, spec.name, value.generation
            )));
        }
        if let Some(Versioned { value, .. }) = &previous
            && value.running
            && let Some(standby) = &value.standby
        {
            return Err(refused(format!(
                "{standby} holds the standby of VM `{}` (generation {}) and may take over at any moment; if it does not, that host must be asked or its record cleared first",
                spec.name, value.generation
            )));
        }
        let value = VmRecord::started(me.clone(), previous.as_ref().map(|p| &p.value));
        match self.env.claims.claim_blocking(spec.uuid, previous.map(|p| p.version), value) {
            ClaimOutcome::Won(record) => Ok(record),
            ClaimOutcome::Lost(now) => {
                let by = now.map_or("somebody".into(), |n| n.value.owner.to_string());
                Err(refused(format!("{by} claimed VM `{}` at the same moment", spec.name)))
            }
            ClaimOutcome::Unreachable { reason } => Err(refused(reason)),
        }
    }

    fn only_partner(&self) -> Result<HostName, ApiError> {
        let partners = lock(&self.partners);
        let mut names = partners.keys();
        match (names.next(), names.next()) {
            (Some(only), None) => Ok(only.clone()),
            (None, _) => Err(refused("this host has no partner; make a link with `pollux link create`")),
            _ => Err(refused("this host has several partners; name one with --partner")),
        }
    }

    /// Mirror a running VM.
    ///
    /// # Errors
    /// If it does not run here or cannot be mirrored.
    pub fn vm_protect(&self, name: &str, partner: Option<HostName>) -> Result<Done, ApiError> {
        let (spec, _) = self.find(name)?;
        if let Some(reason) = &self.cannot_mirror {
            return Err(refused(format!("host {} cannot mirror: {reason}", self.env.config.name)));
        }
        let partner = match partner.or_else(|| spec.mirror.partner.clone()) {
            Some(partner) => partner,
            None => self.only_partner()?,
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
        if !self.env.routes.send(spec.uuid, WorkerEvent::Command(command, tx)) {
            return Err(refused(format!(
                "VM `{name}` does not run on host {}; `pollux vm start {name}`, or ask the host that runs it",
                self.env.config.name
            )));
        }
        let answer = self.runtime.block_on(async { tokio::time::timeout(COMMAND_DEADLINE, rx).await });
        match answer {
            Ok(Ok(Ok(()))) => Ok(Done::default()),
            Ok(Ok(Err(reason))) => Err(refused(format!("VM `{name}`: {reason}"))),
            Ok(Err(_)) => Err(refused(format!("VM `{name}` ended while it was asked"))),
            Err(_) => Err(refused(format!("VM `{name}` did not answer in {} s", COMMAND_DEADLINE.as_secs()))),
        }
    }

    /// The pinned links.
    #[must_use]
    pub fn links(&self) -> Vec<LinkConfig> {
        lock(&self.partners).values().map(|p| p.config.clone()).collect()
    }

    /// Pin a partner and connect to it.
    ///
    /// # Errors
    /// If it is pinned already, or an address cannot be used.
    pub fn link_create(self: &Arc<Self>, link: LinkConfig) -> Result<Done, ApiError> {
        if link.partner == self.env.config.name {
            return Err(refused("a host cannot be its own partner"));
        }
        if lock(&self.partners).contains_key(&link.partner) {
            return Err(refused(format!(
                "a link to {} is pinned already; `pollux link remove {}` first",
                link.partner, link.partner
            )));
        }
        self.connect(link.clone()).map_err(refused)?;
        self.store.put_link(&link).map_err(refused)?;
        Ok(Done::default())
    }

    /// Forget a partner.
    ///
    /// # Errors
    /// If it is not known, or a VM is mirrored with it.
    pub fn link_remove(&self, partner: &str) -> Result<Done, ApiError> {
        let name = HostName::new(partner).map_err(refused)?;
        let in_use = self.status().vms.into_iter().find(|vm| {
            vm.role != Role::Stopped && vm.partner.as_ref() == Some(&name)
        });
        if let Some(vm) = in_use {
            return Err(refused(format!(
                "VM `{}` is mirrored with {name}; `pollux vm unprotect {}` first",
                vm.name, vm.name
            )));
        }
        if lock(&self.partners).remove(&name).is_none() {
            return Err(refused(format!("no link to {name} is known here")));
        }
        lock(&self.env.peers).remove(&name);
        self.store.delete_link(&name).map_err(refused)?;
        Ok(Done::default())
    }

    fn connect(self: &Arc<Self>, link: LinkConfig) -> Result<(), String> {
        let weak = Arc::downgrade(self);
        let on_unrouted: OnUnrouted = Arc::new(move |from, vm, generation, message| {
            if let Some(host) = weak.upgrade() {
                host.unrouted(from, vm, generation, message);
            }
        });
        let partner = Partner::start(PartnerSetup {
            config: link,
            identity: Arc::clone(&self.identity),
            me: self.env.config.name.clone(),
            period: Duration::from_millis(self.env.config.heartbeat_ms),
            detection: Duration::from_millis(self.env.config.detection_ms),
            runtime: self.runtime.clone(),
            routes: self.env.routes.clone(),
            on_unrouted,
        })?;
        let name = partner.config.partner.clone();
        lock(&self.env.peers).insert(name.clone(), partner.peer());
        lock(&self.partners).insert(name, Arc::new(partner));
        Ok(())
    }

    /// A partner speaks of a VM that has no worker here.
    fn unrouted(self: &Arc<Self>, from: &HostName, vm: VmId, generation: Generation, message: ControlMsg) {
        match message {
            ControlMsg::Prepare { .. } => self.prepare(from, vm, generation, message),
            ControlMsg::StandbyHere => {
                if let Some(peer) = self.env.peer(from) {
                    let reason = format!("VM {vm} does not run on {}", self.env.config.name);
                    peer.say(vm, generation, &ControlMsg::PrimaryGone { reason });
                }
            }
            other => tracing::info!(partner = %from, %vm, ?other, "a message for a VM that is not here"),
        }
    }

    /// A partner asks for a standby.
    fn prepare(self: &Arc<Self>, from: &HostName, vm: VmId, generation: Generation, message: ControlMsg) {
        let host = Arc::clone(self);
        let from = from.clone();
        // Reading the registry may take a while; the partner's other messages must not wait.
        self.runtime.spawn_blocking(move || {
            if let Err(reason) = host.try_prepare(&from, vm, generation, message) {
                tracing::warn!(%vm, partner = %from, "no standby: {reason}");
                if let Some(peer) = host.env.peer(&from) {
                    peer.say(vm, generation, &ControlMsg::Refused { reason });
                }
            }
        });
    }

    fn try_prepare(
        &self,
        from: &HostName,
        vm: VmId,
        generation: Generation,
        message: ControlMsg,
    ) -> Result<(), String> {
        let ControlMsg::Prepare { spec, machine, accel, qemu } = message else {
            return Err("not a request for a standby".into());
        };
        let me = &self.env.config.name;
        if let Some(reason) = &self.cannot_mirror {
            return Err(format!("host {me} cannot mirror: {reason}"));
        }
        let spec = VmSpec::parse(&spec, &format!("spec from {from}")).map_err(|e| e.to_string())?;
        if spec.uuid != vm {
            return Err(format!("the spec is of VM {}, the request of {vm}", spec.uuid));
        }
        let ours = self.qemu.version.to_string();
        if ours != qemu {
            tracing::warn!("{from} runs QEMU {qemu}, {me} has {ours}; machine type {machine} must be known to both");
        }
        if !self.qemu.machines.contains(&machine) {
            return Err(format!(
                "QEMU {ours} of {me} has no machine type {machine}; set `machine` in the spec to one that both hosts have"
            ));
        }
        let accel = match accel.as_str() {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            other => return Err(format!("accelerator `{other}` is not known")),
        };
        self.check_record(from, vm, generation)?;
        let spec = Arc::new(spec);
        let shared = self.know(Arc::clone(&spec));
        if shared.snapshot().role != Role::Stopped {
            return Err(format!("VM `{}` is still here on {me}; it is being put away", spec.name));
        }
        self.store.put_spec(&spec).map_err(|e| e.to_string())?;
        let config = WorkerConfig { spec, machine, accel, partner: Some(from.clone()) };
        let begin = Begin::Standby { primary: from.clone(), generation };
        worker::start(Arc::clone(&self.env), config, begin, shared, |_| {}).map_err(|e| e.to_string())
    }

    /// Only the owner may have a standby, and only of its own attempt: the copy that is
    /// here is overwritten.
    fn check_record(&self, from: &HostName, vm: VmId, generation: Generation) -> Result<(), String> {
        match self.env.claims.read_blocking(vm) {
            ClaimOutcome::Lost(Some(Versioned { value, .. })) | ClaimOutcome::Won(Versioned { value, .. }) => {
                if value.owner != *from || value.generation != generation {
                    return Err(format!(
                        "the registry says that {} runs VM {vm} in generation {}, not {from} in {generation}",
                        value.owner, value.generation
                    ));
                }
                Ok(())
            }
            ClaimOutcome::Lost(None) => Err(format!("the registry has no record of VM {vm}")),
            ClaimOutcome::Unreachable { reason } => Err(reason),
        }
    }
}
