//! The NBD server of one disk: a unix socket, a thread per connection, a few for slow I/O.
//!
//! Nothing a client sends can stop the server or reach beyond its disk; a client that does not
//! speak NBD is disconnected with a reason in the log.

use super::Disk;
use super::connection;
use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Connections at once. QEMU opens one (several with multi-conn); qemu-img beside it one more.
pub const CONNECTIONS_MAX: usize = 16;

/// Threads for reads that miss the page cache and for syncs: enough to keep a device's queue
/// busy, few enough to be free of cost when idle.
const SLOW_THREADS: usize = 4;

/// Slow I/Os waiting for a thread; beyond that the connection does them itself.
const SLOW_QUEUE_MAX: usize = 64;

/// Who may connect to a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Somebody listens there.
    #[error("{path} is in use by a running server: is this VM's disk served already?")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in the way.
    #[error("{path} exists and is not a socket: remove it, or choose another path")]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot {doing} the NBD socket {path}: {source}")]
    Socket {
        /// The step.
        doing: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A slow I/O, with the sending of its reply.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// An NBD server for one disk on one unix socket. Stops, disconnects and removes the socket when
/// dropped; the disk stays open.
pub struct DiskServer {
    path: PathBuf,
    listener: Arc<UnixListener>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    disk: Arc<Disk>,
    stopping: AtomicBool,
    /// Open connections, to disconnect them.
    open: Mutex<HashMap<u64, UnixStream>>,
}

impl DiskServer {
    /// Listen on `socket_path` (mode 0600, given to `owner`) and serve `disk` as the export with
    /// the empty name. A socket left behind by a dead server is replaced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(
        socket_path: &Path,
        owner: Option<Owner>,
        disk: Arc<Disk>,
    ) -> Result<Self, ServerError> {
        let path = socket_path.to_owned();
        let failed = |doing| {
            let path = path.clone();
            move |source| ServerError::Socket {
                doing,
                path,
                source,
            }
        };
        clear_stale_socket(&path)?;
        let listener = Arc::new(UnixListener::bind(&path).map_err(failed("bind"))?);
        if let Some(Owner { uid, gid }) = owner {
            std::os::unix::fs::chown(&path, Some(uid), Some(gid))
                .map_err(failed("change the owner of"))?;
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
            .map_err(failed("set the mode of"))?;
        let shared = Arc::new(Shared {
            disk,
            stopping: AtomicBool::new(false),
            open: Mutex::new(HashMap::new()),
        });
        let mut server = Self {
            path: path.clone(),
            listener: Arc::clone(&listener),
            shared,
            threads: Vec::new(),
        };
        // After `server`, so that on an early return the sender goes first and the threads end.
        let (jobs, queue) = sync_channel::<Job>(SLOW_QUEUE_MAX);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..SLOW_THREADS {
            let queue = Arc::clone(&queue);
            server
                .spawn("nbd-slow", move || run_jobs(&queue))
                .map_err(failed("start a thread of"))?;
        }
        let shared = Arc::clone(&server.shared);
        server
            .spawn("nbd-accept", move || accept(&listener, &shared, &jobs))
            .map_err(failed("start a thread of"))?;
        Ok(server)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads
            .push(thread::Builder::new().name(name.into()).spawn(run)?);
        Ok(())
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, SeqCst);
        // Wakes `accept` (unix(7): it fails with EINVAL on a socket that is shut down).
        let fd = self.listener.as_raw_fd();
        if let Err(error) = nix::sys::socket::shutdown(fd, nix::sys::socket::Shutdown::Both) {
            tracing::debug!(%error, "shutting down the NBD listener");
        }
        for stream in self
            .shared
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            // Fails only if the client is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..).rev() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn clear_stale_socket(path: &Path) -> Result<(), ServerError> {
    let Ok(there) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !there.file_type().is_socket() {
        return Err(ServerError::NotASocket {
            path: path.to_owned(),
        });
    }
    if UnixStream::connect(path).is_ok() {
        return Err(ServerError::InUse {
            path: path.to_owned(),
        });
    }
    std::fs::remove_file(path).map_err(|source| ServerError::Socket {
        doing: "replace",
        path: path.to_owned(),
        source,
    })
}

fn run_jobs(queue: &Mutex<Receiver<Job>>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

/// Hand a slow I/O to another thread, or do it here if they are all far behind.
pub(super) fn offload(jobs: &SyncSender<Job>, job: Job) {
    match jobs.try_send(job) {
        Ok(()) => {}
        Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job(),
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, jobs: &SyncSender<Job>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut last_id = 0;
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if shared.stopping.load(SeqCst) => break,
            Err(error) => {
                tracing::warn!(%error, "accepting an NBD connection failed");
                // Out of descriptors or memory: yield so that connections can end.
                thread::yield_now();
                continue;
            }
        };
        threads.retain(|thread| !thread.is_finished());
        let mut open = shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.stopping.load(SeqCst) {
            break;
        }
        if open.len() >= CONNECTIONS_MAX {
            tracing::warn!("NBD connection refused: {CONNECTIONS_MAX} are open already");
            continue;
        }
        let Ok(handle) = stream.try_clone() else {
            continue;
        };
        last_id += 1;
        let id: u64 = last_id;
        open.insert(id, handle);
        drop(open);
        let (ours, jobs) = (Arc::clone(shared), jobs.clone());
        let started = thread::Builder::new()
            .name("nbd-conn".into())
            .spawn(move || {
                if let Err(error) = connection::serve(stream, &ours.disk, &jobs) {
                    if ours.stopping.load(SeqCst) {
                        tracing::debug!(%error, "NBD connection closed while stopping");
                    } else {
                        tracing::warn!(%error, "NBD connection closed");
                    }
                }
                let mut open = ours.open.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(stream) = open.remove(&id) {
                    let _ = stream.shutdown(Shutdown::Both);
                }
            });
        match started {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                tracing::warn!(%error, "no thread for an NBD connection");
                shared
                    .open
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&id);
            }
        }
    }
    for thread in threads {
        // A panic has been reported by the panic hook.
        let _ = thread.join();
    }
}
