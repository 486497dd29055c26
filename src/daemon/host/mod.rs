//! One host: its identity, its partners, its VMs.

mod keys;
mod links;
mod meetings;
mod pool;
mod standbys;
mod vms;

use super::claims::Claims;
use super::clock::now_ns;
use super::config::HostConfig;
use super::ha::{Gate, Membership};
use super::keys::KeyChange;
use super::linktest::LinkTest;
use super::pair::LastHeard;
use super::partner::Partner;
use super::registry;
use super::store::Store;
use super::worker::{Env, Routes, Shared};
use crate::api::types::{ApiError, HostInfo, HostStatus, VmStatus};
use crate::pool::spec::VmSpec;
use crate::pool::{HostName, VmId};
use crate::vm::{kernel, probe};
use interconnect::epoch::EncodePool;
use interconnect::identity::{Identity, IdentityDir};
use meetings::Meeting;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A VM known to this host.
struct VmEntry {
    spec: Arc<VmSpec>,
    shared: Arc<Shared>,
}

/// The host.
pub struct Host {
    env: Arc<Env>,
    identity_dir: IdentityDir,
    /// The one in use.
    identity: Mutex<Arc<Identity>>,
    /// Its change. Held while what it decided is done, so that things happen in the order
    /// they were decided in.
    keys: Mutex<KeyChange>,
    /// The newest meeting with a host that is not known yet.
    meeting: Mutex<Option<Arc<Meeting>>>,
    /// The newest link test with each partner.
    tests: Mutex<BTreeMap<HostName, Arc<LinkTest>>>,
    tests_begun: AtomicU64,
    runtime: tokio::runtime::Handle,
    store: Store,
    qemu: probe::QemuBinary,
    cannot_mirror: Option<String>,
    vms: Mutex<BTreeMap<VmId, VmEntry>>,
    partners: Mutex<BTreeMap<HostName, Arc<Partner>>>,
    /// Whether VMs may be started here.
    gate: Gate,
    /// Of its pool, if it is to be of one.
    membership: OnceLock<Membership>,
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
        let identity_dir = IdentityDir::new(&config.state_dir.join("identity"));
        let identity = Arc::new(identity_dir.load_or_create()?);
        let next = identity_dir.next()?.map(|next| next.fingerprint());
        if let Some(next) = next {
            tracing::info!("a change of this host's key goes on: the next is {next}");
        }
        let keys = KeyChange::new(identity.fingerprint(), next);
        let heard = LastHeard::default();
        let claims = Claims::start(registry::open(&config, &runtime, &heard)?)?;
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
            identity_dir,
            identity: Mutex::new(identity),
            keys: Mutex::new(keys),
            meeting: Mutex::default(),
            tests: Mutex::default(),
            tests_begun: AtomicU64::new(0),
            runtime,
            store,
            qemu,
            cannot_mirror,
            vms: Mutex::default(),
            partners: Mutex::default(),
            gate: Gate::open(),
            membership: OnceLock::new(),
        });
        for spec in host.store.specs()? {
            host.know(Arc::new(spec));
        }
        if let Some(pool) = &host.env.config.pool {
            let membership = Membership::start(
                &host.env.config,
                pool,
                host.env.claims.clone(),
                host.gate.clone(),
                Arc::downgrade(&host),
                heard,
            )?;
            let _ = host.membership.set(membership);
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
            fingerprint: lock(&self.identity).fingerprint().to_string(),
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
}
