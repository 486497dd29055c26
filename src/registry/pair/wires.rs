//! The two hosts' connection: TCP between their heartbeat addresses, sealed with the pool's key
//! ([`crate::beat::SessionStart`]). The lower side connects, over one network after the other;
//! the higher one listens on all of its own. Two threads a connection, one a listening address.
//!
//! An empty frame is sent when there is nothing else to send, by the thread that writes: a host
//! whose disk is slow is there all the same. Whoever hears nothing for [`LOST_AFTER`] ends the
//! connection, and the next one goes over the next network.
//!
//! Must never: hand up a message before the partner has proved that it has the pool's key.

use super::Owned;
use super::copy::Side;
use super::core::SessionId;
use super::message::{MESSAGE_BYTES_MAX, Message};
use super::shell::{Connection, Event};
use crate::beat::{
    FrameOpener, FrameSealer, GREETING_BYTES, LENGTH_BYTES, SessionStart, load_keys,
};
use crate::pool::HostName;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Between two frames when there is nothing to say.
const ALIVE_EVERY: Duration = Duration::from_millis(200);
/// Silence after which a connection is ended: four frames that did not come, and time left to try
/// another network before the partner counts as silent.
const LOST_AFTER: Duration = Duration::from_millis(900);
/// For a connection to be made, over a network where nobody answers.
const CONNECT_WITHIN: Duration = Duration::from_millis(400);
/// Between two rounds over all networks.
const ROUND_PAUSE: Duration = Duration::from_millis(200);
/// Between two tries to listen at an address that the host does not have yet.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);
/// Messages on their way out: many times what two hosts have under way.
const OUT_MAX: usize = 4096;
/// Strangers that are listened to at once; each has [`LOST_AFTER`] to prove itself.
const GREETING_MAX: usize = 8;

/// One network.
#[derive(Clone, Debug)]
pub struct Route {
    /// This host's address there.
    pub local: SocketAddr,
    /// The partner's.
    pub peer: SocketAddr,
    /// The interface to bind to, if routes alone do not tell.
    pub device: Option<String>,
}

/// Between which hosts, and how.
#[derive(Clone, Debug)]
pub struct WiresOptions {
    /// This host.
    pub me: HostName,
    /// The partner.
    pub partner: HostName,
    /// Which side this host is.
    pub side: Side,
    /// All networks that both are on.
    pub routes: Vec<Route>,
    /// Where the pool's keys are; read anew for each connection.
    pub state_dir: PathBuf,
}

/// What its threads share.
struct Wires {
    options: WiresOptions,
    tell: Sender<Event>,
    /// Gone with the last handle on the registry; then these threads end.
    used: Weak<Owned>,
    ids: AtomicU64,
    greeting: AtomicUsize,
}

/// Begin to be connected.
pub(super) fn start(
    options: WiresOptions,
    tell: Sender<Event>,
    used: Weak<Owned>,
) -> io::Result<()> {
    let wires = Arc::new(Wires {
        options,
        tell,
        used,
        ids: AtomicU64::new(0),
        greeting: AtomicUsize::new(0),
    });
    let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
    match wires.options.side {
        Side::Lower => named("pair-dial").spawn(move || wires.dial()).map(drop),
        Side::Higher => {
            for route in wires.options.routes.clone() {
                let wires = Arc::clone(&wires);
                named("pair-listen").spawn(move || wires.listen(&route))?;
            }
            Ok(())
        }
    }
}

fn open_socket(route: &Route) -> io::Result<OwnedFd> {
    let family = if route.local.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(device) = &route.device {
        setsockopt(&fd, sockopt::BindToDevice, &OsString::from(device))?;
    }
    Ok(fd)
}

fn listener(route: &Route) -> io::Result<TcpListener> {
    let fd = open_socket(route)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    // Also the time limit of accept (socket(7), SO_RCVTIMEO).
    setsockopt(&fd, sockopt::ReceiveTimeout, &time_val(LISTEN_PAUSE))?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(route.local))?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(TcpListener::from(fd))
}

fn time_val(time: Duration) -> TimeVal {
    let micros = i64::from(time.subsec_micros());
    TimeVal::new(i64::try_from(time.as_secs()).unwrap_or(i64::MAX), micros)
}

fn connected(route: &Route) -> io::Result<TcpStream> {
    let fd = open_socket(route)?;
    // Also the time limit of connect (socket(7), SO_SNDTIMEO).
    setsockopt(&fd, sockopt::SendTimeout, &time_val(CONNECT_WITHIN))?;
    let own = SocketAddr::new(route.local.ip(), 0);
    bind(fd.as_raw_fd(), &SockaddrStorage::from(own))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(route.peer))?;
    Ok(TcpStream::from(fd))
}

impl Wires {
    fn is_used(&self) -> bool {
        self.used.strong_count() > 0
    }

    /// Until nobody uses the registry any more.
    fn dial(self: &Arc<Self>) {
        while self.is_used() {
            for route in &self.options.routes {
                let stream = match connected(route) {
                    Ok(stream) => stream,
                    Err(e) => {
                        tracing::trace!("{}: {e}", route.peer);
                        continue;
                    }
                };
                match self.meet(stream) {
                    // It ends by itself; until then there is no need for another.
                    Ok(Some(reader)) => {
                        let _ = reader.join();
                    }
                    Ok(None) => return,
                    Err(e) => tracing::debug!("{}: {e}", route.peer),
                }
            }
            std::thread::sleep(ROUND_PAUSE);
        }
    }

    fn listen(self: &Arc<Self>, route: &Route) {
        let mut told = false;
        let listener = loop {
            match listener(route) {
                Ok(listener) => break listener,
                Err(e) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::error!("cannot listen for the partner at {}: {e}", route.local);
                    }
                    std::thread::sleep(LISTEN_PAUSE);
                    if !self.is_used() {
                        return;
                    }
                }
            }
        };
        while self.is_used() {
            let (stream, from) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => {
                    tracing::warn!("{}: {e}", route.local);
                    std::thread::sleep(LISTEN_PAUSE);
                    continue;
                }
            };
            if self.greeting.fetch_add(1, Ordering::SeqCst) >= GREETING_MAX {
                self.greeting.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let wires = Arc::clone(self);
            let spawned = std::thread::Builder::new()
                .name("pair-greet".into())
                .spawn(move || {
                    if let Err(e) = wires.meet(stream) {
                        tracing::debug!("{from}: {e}");
                    }
                    wires.greeting.fetch_sub(1, Ordering::SeqCst);
                });
            if spawned.is_err() {
                self.greeting.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Whether the other end is the partner; if so its reader, or `None` if nobody listens here.
    fn meet(
        self: &Arc<Self>,
        mut stream: TcpStream,
    ) -> anyhow::Result<Option<std::thread::JoinHandle<()>>> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOST_AFTER))?;
        stream.set_write_timeout(Some(LOST_AFTER))?;
        let keys = load_keys(&self.options.state_dir)?
            .ok_or_else(|| anyhow::anyhow!("this host has no key of a pool"))?;
        let start = SessionStart::new(&keys, &self.options.me)?;
        stream.write_all(start.greeting())?;
        let mut theirs = [0; GREETING_BYTES];
        stream.read_exact(&mut theirs)?;
        let (mut sealer, mut opener) = start.finish(&theirs, &self.options.partner)?;
        stream.write_all(&sealer.seal(&[])?)?;
        read_frame(&mut stream, &mut opener)?;

        let id = SessionId(self.ids.fetch_add(1, Ordering::SeqCst) + 1);
        let (out, messages) = sync_channel(OUT_MAX);
        let (writes, cuts) = (stream.try_clone()?, stream.try_clone()?);
        let writer = std::thread::Builder::new()
            .name("pair-write".into())
            .spawn(move || {
                if let Err(e) = write(&writes, &mut sealer, &messages) {
                    tracing::debug!("to the partner: {e}");
                }
                // Ends the reader as well, once the partner has done the same.
                let _ = writes.shutdown(Shutdown::Write);
            })?;
        let connection = Connection {
            id,
            out,
            writer,
            cut: Box::new(move || {
                let _ = cuts.shutdown(Shutdown::Both);
            }),
        };
        if self.tell.send(Event::Up(connection)).is_err() {
            return Ok(None);
        }
        let wires = Arc::clone(self);
        let reader = std::thread::Builder::new()
            .name("pair-read".into())
            .spawn(move || {
                if let Err(e) = wires.read(&mut stream, &mut opener, id) {
                    tracing::debug!("from the partner: {e}");
                }
                let _ = stream.shutdown(Shutdown::Both);
                let _ = wires.tell.send(Event::Down(id));
            })?;
        Ok(Some(reader))
    }

    fn read(
        &self,
        stream: &mut TcpStream,
        opener: &mut FrameOpener,
        id: SessionId,
    ) -> anyhow::Result<()> {
        loop {
            let bytes = read_frame(stream, opener)?;
            let message = match &bytes[..] {
                [] => None,
                bytes => Some(Message::decode(bytes)?),
            };
            if self.tell.send(Event::Heard(id, message)).is_err() {
                return Ok(());
            }
        }
    }
}

fn read_frame(stream: &mut TcpStream, opener: &mut FrameOpener) -> anyhow::Result<Vec<u8>> {
    let mut length = [0; LENGTH_BYTES];
    stream.read_exact(&mut length)?;
    let mut sealed = vec![0; opener.length(length, MESSAGE_BYTES_MAX)?];
    stream.read_exact(&mut sealed)?;
    let opened = opener.open(&mut sealed)?.len();
    sealed.truncate(opened);
    Ok(sealed)
}

fn write(
    mut stream: &TcpStream,
    sealer: &mut FrameSealer,
    messages: &Receiver<Message>,
) -> anyhow::Result<()> {
    loop {
        let bytes = match messages.recv_timeout(ALIVE_EVERY) {
            Ok(message) => message.encode()?,
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        stream.write_all(&sealer.seal(&bytes)?)?;
    }
}
