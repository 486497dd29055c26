//! One host: its identity, its partners, its VMs.

mod standbys;
mod vms;

use super::claims::Claims;
use super::clock::now_ns;
use super::config::HostConfig;
use super::partner::{OnUnrouted, Partner, PartnerSetup};
use super::store::Store;
use super::worker::{Env, Routes, Shared};
use crate::api::types::{ApiError, Done, HostInfo, HostStatus, LinkConfig, Role, VmStatus};
use crate::pool::spec::VmSpec;
use crate::pool::{HostName, VmId};
use crate::registry::{FileRegistry, FileRegistryOptions};
use crate::vm::{kernel, probe};
use interconnect::epoch::EncodePool;
use interconnect::identity::Identity;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    ApiError {
        error: error.to_string(),
    }
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
        let identity = Arc::new(Identity::load_or_create(
            &config.state_dir.join("identity"),
        )?);
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
            encode_pool: EncodePool::start(EncodePool::default_threads())?,
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
        let shared: Vec<_> = lock(&self.vms)
            .values()
            .map(|e| Arc::clone(&e.shared))
            .collect();
        let mut vms: Vec<VmStatus> = shared.iter().map(|s| s.snapshot()).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        HostStatus {
            host: self.info(),
            partners: partners.iter().map(|p| p.status()).collect(),
            vms,
        }
    }

    /// The pinned links.
    #[must_use]
    pub fn links(&self) -> Vec<LinkConfig> {
        lock(&self.partners)
            .values()
            .map(|p| p.config.clone())
            .collect()
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
        let in_use = self
            .status()
            .vms
            .into_iter()
            .find(|vm| vm.role != Role::Stopped && vm.partner.as_ref() == Some(&name));
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
}
