//! The registry of a pair, wired into its host: networks, gateway and fence agent are the pool's.
//!
//! Must never: call a power-off confirmed that the fence agent has not confirmed anew.

use super::config::{HostConfig, PoolConfig};
use super::ha::read_fencing;
use crate::beat::{
    GATEWAY_PERIOD_DEFAULT, GatewayConfig, GatewayError, GatewayProbe, StateError, load_keys,
};
use crate::fence::config::FenceConfig;
use crate::fence::job::{Job, Outcome};
use crate::fence::watchdog::BootNs;
use crate::ha::time::Millis;
use crate::pool::HostName;
use crate::registry::pair::{
    CALL_WAIT, PairError, PairOptions, PairRegistry, Patience, Route, Side, Surroundings,
    WiresOptions,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A host that stood still for so long listens before it judges its partner: several looks of
/// the pair's thread, each of 0.1 s.
const STALL: Millis = Millis(1000);

/// When another host of the pool was last heard by a heartbeat: the membership notes it, and a
/// pair's registry calls no partner silent that is heard, whatever became of their connection.
#[derive(Clone, Default)]
pub struct LastHeard(Arc<AtomicU64>);

impl LastHeard {
    /// Heard now, in milliseconds since the boot.
    pub(super) fn note(&self, now: Millis) {
        self.0.fetch_max(now.0, Ordering::SeqCst);
    }

    fn age(&self, now: Millis) -> Option<Duration> {
        let at = Millis(self.0.load(Ordering::SeqCst));
        (at.0 > 0).then(|| Duration::from_millis(now.since(at).0))
    }
}

/// Why there is no such registry.
#[derive(Debug, thiserror::Error)]
pub(super) enum PairOpenError {
    /// The copy, or a thread.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// The keys.
    #[error(transparent)]
    Keys(#[from] StateError),
    /// No keys.
    #[error(
        "this host has no key of a pool: `pollux pool key create` on the first host, `pollux pool key import` on the other, with --state-dir {0}"
    )]
    NoKeys(std::path::PathBuf),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// How to fence.
    #[error("{0:#}")]
    Fencing(anyhow::Error),
    /// What the configuration should have been refused for.
    #[error("[pool] does not name this host and one partner")]
    NoPartner,
}

/// The lower id's host, the other, and what they have in common.
pub(super) fn open(
    config: &HostConfig,
    port: Option<u16>,
    heard: &LastHeard,
) -> Result<PairRegistry, PairOpenError> {
    let pool = config.pool.as_ref().ok_or(PairOpenError::NoPartner)?;
    let own = pool.host(&config.name).ok_or(PairOpenError::NoPartner)?;
    let partner = pool.hosts.iter().find(|host| host.name != config.name);
    let partner = partner.ok_or(PairOpenError::NoPartner)?;
    let gateway = pool.gateway.ok_or(PairOpenError::NoPartner)?;
    let keys = load_keys(&config.state_dir)?
        .ok_or_else(|| PairOpenError::NoKeys(config.state_dir.clone()))?;
    let side = if own.id < partner.id {
        Side::Lower
    } else {
        Side::Higher
    };
    let fencing = pool.fencing.as_ref().map(|path| read_fencing(path));
    let around = Around {
        gateway: GatewayProbe::start(GatewayConfig {
            gateway,
            local: None,
            device: None,
            period: GATEWAY_PERIOD_DEFAULT.min(Duration::from_millis(pool.timing.period_ms)),
        })?,
        fencing: fencing.transpose().map_err(PairOpenError::Fencing)?,
        partner: partner.name.clone(),
        heard: heard.clone(),
        job: None,
    };
    let options = PairOptions {
        pool: keys.pool().0,
        side,
        partner: partner.name.to_string(),
        dir: config.state_dir.clone(),
        patience: Patience {
            silence: Millis(pool.timing.network_lost_ms),
            hesitation: Millis(pool.timing.hesitation_ms),
            stall: STALL,
        },
        call_wait: CALL_WAIT,
    };
    let wires = WiresOptions {
        me: config.name.clone(),
        partner: partner.name.clone(),
        side,
        routes: routes(pool, &config.name, &partner.name, port),
        state_dir: config.state_dir.clone(),
    };
    Ok(PairRegistry::start(options, wires, Box::new(around))?)
}

/// All networks that both hosts are on, in the pool's order.
fn routes(pool: &PoolConfig, me: &HostName, partner: &HostName, port: Option<u16>) -> Vec<Route> {
    let port = port.unwrap_or_else(|| pool.port.saturating_add(1));
    let address = |host: &HostName, network: &String| {
        let address = pool.host(host)?.addresses.get(network)?;
        Some(SocketAddr::new(pool.socket(*address).ip(), port))
    };
    pool.networks
        .iter()
        .filter_map(|network| {
            Some(Route {
                local: address(me, network)?,
                peer: address(partner, network)?,
                device: pool.devices.get(network).cloned(),
            })
        })
        .collect()
}

struct Around {
    gateway: GatewayProbe,
    fencing: Option<FenceConfig>,
    partner: HostName,
    heard: LastHeard,
    job: Option<Job>,
}

impl Surroundings for Around {
    fn heard_age(&self) -> Option<Duration> {
        self.heard.age(Millis(BootNs::now().0 / 1_000_000))
    }

    fn gateway_age(&self) -> Option<Duration> {
        self.gateway.status().age
    }

    fn can_fence(&self) -> bool {
        self.fencing
            .as_ref()
            .is_some_and(|fencing| fencing.host(&self.partner).is_some())
    }

    fn fence(&mut self) -> Result<(), String> {
        let fencing = self.fencing.as_ref().ok_or("[pool] names no `fencing`")?;
        let job = Job::start(fencing, &self.partner).map_err(|e| e.to_string())?;
        self.job = Some(job);
        Ok(())
    }

    fn call_off(&mut self) {
        self.job = None;
    }

    fn fenced(&mut self) -> Option<bool> {
        let outcome = self.job.as_mut()?.poll()?.clone();
        self.job = None;
        let confirmed = matches!(outcome, Outcome::Confirmed { .. });
        if confirmed {
            tracing::warn!("the power of {} is off, and confirmed to be", self.partner);
        } else {
            tracing::error!(
                "the power of {} is not confirmed to be off: {outcome:?}",
                self.partner
            );
        }
        Some(confirmed)
    }
}
