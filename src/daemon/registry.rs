//! Opens the registry that the host's configuration names.

use super::config::{HostConfig, RegistryConfig};
use super::pair::{self, LastHeard, PairOpenError};
use crate::registry::etcd::{EtcdClientCertificate, EtcdConfigError, EtcdTls};
use crate::registry::statefile::paxos::HostSlot;
use crate::registry::statefile::{CALL_WAIT, OpenError, Statefile, StatefileOptions};
use crate::registry::{
    EtcdOptions, EtcdRegistry, FileRegistry, FileRegistryOptions, Registry, RegistryError,
};
use std::path::PathBuf;
use tokio::runtime::Handle;

/// Read once at the start, so that what is set up wrongly shows at once and not at the first
/// takeover. Whether there is such a key does not matter.
const PROBE_KEY: &str = "pool/state";

/// Why there is no registry.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistryOpenError {
    /// The statefile.
    #[error("statefile: {0}")]
    Statefile(#[from] OpenError),
    /// etcd's settings.
    #[error("etcd: {0}")]
    Etcd(#[from] EtcdConfigError),
    /// The pair's.
    #[error("[registry] kind = \"pair\": {0}")]
    Pair(#[from] PairOpenError),
    /// A certificate without its key, or TLS settings that lack the authority.
    #[error("[registry]: {0}")]
    Tls(&'static str),
}

/// The registry of the host's pool. One that cannot be reached now is no error: VMs that run
/// go on without it, and it is asked again with every call.
///
/// # Errors
/// If its settings cannot be used, or the statefile cannot be taken up; names the disk and what
/// to do.
pub(super) fn open(
    config: &HostConfig,
    runtime: &Handle,
    heard: &LastHeard,
) -> Result<Box<dyn Registry>, RegistryOpenError> {
    let mut registry: Box<dyn Registry> = match config.registry() {
        RegistryConfig::File { dir } => {
            Box::new(FileRegistry::new(dir, FileRegistryOptions::default()))
        }
        RegistryConfig::Statefile { disks, slot } => Box::new(statefile(config, disks, *slot)?),
        RegistryConfig::Etcd {
            endpoints,
            pool,
            ca,
            certificate,
            key,
            allow_plain_http,
        } => {
            let options = EtcdOptions {
                tls: tls(ca.as_ref(), certificate.as_ref(), key.as_ref())?,
                allow_plain_http: *allow_plain_http,
                ..EtcdOptions::new(pool, endpoints.clone())
            };
            Box::new(EtcdRegistry::new(&options, runtime.clone())?)
        }
        // It answers once its partner is there; that is told when it happens.
        RegistryConfig::Pair { port, .. } => {
            return Ok(Box::new(pair::open(config, *port, heard)?));
        }
    };
    if let Err(e @ (RegistryError::NotDone { .. } | RegistryError::Unknown { .. })) =
        registry.read(PROBE_KEY)
    {
        tracing::error!("the registry does not answer; no VM can be started or taken over: {e}");
    }
    Ok(registry)
}

fn statefile(config: &HostConfig, disks: &[PathBuf], slot: u16) -> Result<Statefile, OpenError> {
    let statefile = Statefile::open(StatefileOptions {
        disks: disks.to_vec(),
        pool: None,
        slot: HostSlot(slot),
        name: config.name.to_string(),
        take_slot: false,
        call_wait: CALL_WAIT,
    })?;
    for (disk, fault) in disks.iter().zip(statefile.faults()) {
        if let Some(fault) = fault {
            let disk = disk.display();
            tracing::error!(%disk, "statefile: {fault}; {}", fault.remedy());
        }
    }
    tracing::info!(pool = %statefile.pool(), slot, disks = disks.len(), "statefile taken up");
    Ok(statefile)
}

fn tls(
    ca: Option<&PathBuf>,
    certificate: Option<&PathBuf>,
    key: Option<&PathBuf>,
) -> Result<Option<EtcdTls>, RegistryOpenError> {
    let client = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(EtcdClientCertificate {
            certificate: certificate.clone(),
            key: key.clone(),
        }),
        (None, None) => None,
        _ => {
            return Err(RegistryOpenError::Tls(
                "`certificate` and `key` belong together; give both or none",
            ));
        }
    };
    let ca = ca.cloned();
    match (ca, client) {
        (Some(ca), client) => Ok(Some(EtcdTls { ca, client })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(RegistryOpenError::Tls(
            "`certificate` is given, but no `ca`: name the authority that signed etcd's certificates",
        )),
    }
}
