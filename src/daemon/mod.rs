//! Wiring of one host: from the configuration file to running VMs.
//!
//! [`Host`] owns what a host has; each VM is owned by its [`worker`]; [`partner`] hands
//! over what comes from the other hosts. Nothing here decides who may run a VM: the
//! registry and the state machines of [`crate::mirror`] do.

mod claims;
mod clock;
pub mod config;
pub mod control;
mod figures;
mod ha;
mod host;
mod http;
mod keys;
mod linktest;
mod pair;
mod partner;
mod registry;
mod store;
pub mod worker;

pub use host::Host;
pub use worker::VmCommand;

use config::HostConfig;
use std::path::Path;
use std::sync::Arc;

/// Priority of the daemon's threads above the guests' vCPUs (setpriority(2)): what they
/// do inside a pause or for a held packet is short and must not wait for a core.
const NICE: libc::c_int = -12;

/// Run the daemon until it is told to end.
///
/// # Errors
/// What is missing and what to do about it.
pub fn run(config_path: &Path) -> anyhow::Result<()> {
    let config = HostConfig::read(config_path)?;
    // SAFETY: setpriority takes plain numbers; threads started later inherit it.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        tracing::warn!(
            "the daemon runs at ordinary priority: {}",
            std::io::Error::last_os_error()
        );
    }
    // Outside of CPU cgroups that number only counts within the session (autogroups,
    // sched(7)): weigh the session as a whole too, or any build in another one is our equal.
    if let Err(e) = std::fs::write("/proc/self/autogroup", NICE.to_string()) {
        tracing::debug!("no autogroup to weigh: {e}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("io")
        .enable_all()
        .build()?;
    let socket = config.api_socket.clone();
    let host = Host::start(config, runtime.handle().clone())?;
    runtime.block_on(serve(host, &socket))
}

async fn serve(host: Arc<Host>, socket: &Path) -> anyhow::Result<()> {
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!(
            "another daemon answers at {}; stop it first",
            socket.display()
        );
    }
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            anyhow::bail!("cannot replace the stale socket {}: {e}", socket.display());
        }
        _ => {}
    }
    // Only root may command a daemon: the folder's and the socket's mode say so.
    let listener = tokio::net::UnixListener::bind(socket)
        .map_err(|e| anyhow::anyhow!("cannot listen at {}: {e}", socket.display()))?;
    std::fs::set_permissions(socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let name = host.info().name;
    tracing::info!(host = %name, api = %socket.display(), "ready");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    axum::serve(listener, http::router(Arc::clone(&host)))
        .with_graceful_shutdown(end)
        .await?;
    tracing::info!(host = %name, "putting VMs away");
    tokio::task::spawn_blocking(move || host.put_away()).await?;
    let _ = std::fs::remove_file(socket);
    tracing::info!(host = %name, "ended");
    Ok(())
}
