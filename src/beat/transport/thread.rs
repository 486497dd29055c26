//! The thread's loop.
//!
//! ```text
//!  take mail -> send a round if due -> wait (sockets, wake-up, next round)
//!      ^                                                      |
//!      +--- hand over <- answer whom became known <- drain <--+
//! ```

use super::super::gate::{Accepted, Addrs, Gate, Refused};
use super::super::packet::{NETWORKS_MAX, NetworkIndex, PACKET_BYTES_MAX, Sequence};
use super::counters::{NetworkCounters, PathCounters};
use super::inbox::{Queue, Received};
use super::{Event, Layout, Network, STALE_PERIODS, Shared, TransportConfig, lock, socket};
use crate::pool::HostName;
use interconnect::heartbeat::{boot_time, realtime};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Duration;

/// Datagrams read from one network in one period, whoever sends them: 63 peers send at most
/// five rounds in one. What floods in beyond that is left in the socket, so that it cannot take
/// the processor at this priority.
const DATAGRAMS_PER_PERIOD_MAX: u32 = 512;
/// How soon a lock that an ordinary thread held is tried again.
const RETRY: Duration = Duration::from_millis(1);
/// Rounds in a row that must go well before a failure is told to be over: one that comes and
/// goes is told once.
const WELL_ROUNDS: u32 = 3;
/// Rounds whose time of sending is remembered: at least 32 s at the default period.
const SENT_ROUNDS: usize = 256;

/// A failure that is told once.
#[derive(Default)]
struct Trouble {
    told: bool,
    well: u32,
}

impl Trouble {
    /// `Some(true)`: tell that it began, `Some(false)`: that it is over.
    fn turn(&mut self, fails: bool) -> Option<bool> {
        if fails {
            self.well = 0;
            return (!std::mem::replace(&mut self.told, true)).then_some(true);
        }
        self.well = self.well.saturating_add(1);
        (self.told && self.well >= WELL_ROUNDS).then(|| {
            self.told = false;
            false
        })
    }
}

struct Net {
    network: Network,
    counters: Arc<NetworkCounters>,
    socket: Option<UdpSocket>,
    /// What the kernel said when it could not be opened.
    error: Option<Errno>,
    budget: u32,
    fails: Trouble,
    flood: Trouble,
}

struct Path {
    addr: SocketAddr,
    counters: Arc<PathCounters>,
    fails: Trouble,
    /// Of the round that is being sent.
    error: Option<Errno>,
}

struct Host {
    name: HostName,
    paths: [Option<Path>; NETWORKS_MAX],
}

pub(super) struct Beat {
    shared: Arc<Shared>,
    wake: OwnedFd,
    period: Duration,
    gate: Gate,
    nets: [Option<Net>; NETWORKS_MAX],
    hosts: Vec<Host>,
    payload: Option<Vec<u8>>,
    /// When it was taken up, and whether it was sent.
    published: Duration,
    unsent: bool,
    stale: bool,
    sequence: Sequence,
    sent_at: Vec<(Sequence, Duration)>,
    last_round: Duration,
    next_period: Duration,
    outbox: Queue,
    packet: Vec<u8>,
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

const fn number(at: usize) -> NetworkIndex {
    // Below NETWORKS_MAX.
    #[expect(clippy::cast_possible_truncation)]
    NetworkIndex(at as u8)
}
const _: () = assert!(NETWORKS_MAX <= 256);

impl Beat {
    pub(super) fn new(config: &TransportConfig, wake: OwnedFd, shared: Arc<Shared>) -> Self {
        Self {
            gate: Gate::new(config.me.clone(), config.incarnation, &config.keys),
            shared,
            wake,
            period: config.period,
            nets: Default::default(),
            hosts: Vec::new(),
            payload: None,
            published: Duration::ZERO,
            unsent: false,
            stale: false,
            sequence: Sequence(0),
            sent_at: vec![(Sequence(0), Duration::ZERO); SENT_ROUNDS],
            last_round: Duration::ZERO,
            next_period: Duration::ZERO,
            outbox: Queue::default(),
            packet: Vec::with_capacity(PACKET_BYTES_MAX),
        }
    }

    pub(super) fn run(mut self) {
        let priority = realtime::raise_priority().err().map(|error| {
            format!("the pool's heartbeats run without real-time priority ({error}): a busy host may be taken for a dead one; start pollux with CAP_SYS_NICE")
        });
        let memory = realtime::lock_memory().err().map(|error| {
            format!("the memory of the pool's heartbeats is not locked ({error}): a swapping host may be taken for a dead one; start pollux with CAP_IPC_LOCK or a higher memlock limit")
        });
        *lock(&self.shared.warnings) = (priority, memory);
        while !self.shared.stop.load(Acquire) {
            let mut retry = !self.take_mail();
            let now = boot_time();
            if now >= self.next_period {
                self.new_period(now);
            }
            if now >= self.due() {
                self.round(now);
            }
            retry |= !self.shared.inbox.hand_over(&mut self.outbox);
            let until = self.due().min(self.next_period).saturating_sub(boot_time());
            self.wait(if retry { until.min(RETRY) } else { until });
            for host in self.drain() {
                self.answer(host);
            }
        }
        // What was heard last is handed over, too: nobody is in a hurry any more.
        while !self.shared.inbox.hand_over(&mut self.outbox) {
            std::thread::yield_now();
        }
    }

    /// When the next round is due: a new payload at once, but not sooner than a quarter of a
    /// period after the round before; the same one again if a period and a quarter brought no
    /// new one, so that who publishes each period does not send twice.
    fn due(&self) -> Duration {
        let quarter = self.period / 4;
        self.last_round
            + if self.unsent {
                quarter
            } else {
                self.period + quarter
            }
    }

    /// Without waiting: an ordinary thread may hold the lock and not be running. `false` if it
    /// is to be tried again.
    fn take_mail(&mut self) -> bool {
        let mail = match self.shared.mail.try_lock() {
            Ok(mut mail) => std::mem::take(&mut *mail),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => {
                std::mem::take(&mut *poisoned.into_inner())
            }
            Err(std::sync::TryLockError::WouldBlock) => return false,
        };
        if let Some(keys) = mail.keys {
            self.gate.set_keys(&keys);
        }
        if let Some(layout) = mail.layout {
            self.set_layout(layout);
        }
        if let Some(payload) = mail.payload {
            self.payload = Some(payload);
            self.published = boot_time();
            self.unsent = true;
            if std::mem::take(&mut self.stale) {
                self.outbox.event(Event::ReportFresh);
            }
        }
        true
    }

    fn set_layout(&mut self, layout: Layout) {
        let mut old = std::mem::take(&mut self.nets);
        for (index, (network, counters)) in layout.networks {
            let at = usize::from(index.0);
            let kept = old[at].take().filter(|net| net.network == network);
            self.nets[at] = Some(kept.unwrap_or(Net {
                network,
                counters,
                socket: None,
                error: None,
                budget: DATAGRAMS_PER_PERIOD_MAX,
                fails: Trouble::default(),
                flood: Trouble::default(),
            }));
        }
        // A socket's address is free before another network opens it.
        drop(old);
        self.nets.iter_mut().flatten().for_each(Net::open);

        let mut old = std::mem::take(&mut self.hosts);
        for (name, paths) in layout.peers {
            let before = old.iter().position(|host| host.name == name);
            let mut before = before.map(|at| old.swap_remove(at).paths);
            let mut host = Host {
                name,
                paths: Default::default(),
            };
            for (index, (addr, counters)) in paths {
                let at = usize::from(index.0);
                let kept = before.as_mut().and_then(|paths| paths[at].take());
                let kept = kept.filter(|path| path.addr == addr);
                host.paths[at] = Some(kept.unwrap_or(Path {
                    addr,
                    counters,
                    fails: Trouble::default(),
                    error: None,
                }));
            }
            self.hosts.push(host);
        }
        self.gate.set_peers(self.hosts.iter().map(|host| {
            let addrs: Addrs = std::array::from_fn(|at| host.paths[at].as_ref().map(|p| p.addr));
            (host.name.clone(), addrs)
        }));
    }

    fn new_period(&mut self, now: Duration) {
        self.next_period = now + self.period;
        for net in self.nets.iter_mut().flatten() {
            let exhausted = std::mem::replace(&mut net.budget, DATAGRAMS_PER_PERIOD_MAX) == 0;
            let network = net.network.index;
            if exhausted {
                net.counters.flooded.fetch_add(1, Relaxed);
            }
            match net.flood.turn(exhausted) {
                Some(true) => self.outbox.event(Event::Flooded { network }),
                Some(false) => self.outbox.event(Event::FloodOver { network }),
                None => {}
            }
        }
    }

    /// To all on all networks; and what failed before is tried anew.
    fn round(&mut self, now: Duration) {
        self.last_round = now;
        self.unsent = false;
        self.nets.iter_mut().flatten().for_each(Net::open);
        let age = now.saturating_sub(self.published);
        if self.payload.is_some() && age > self.period * STALE_PERIODS {
            self.payload = None;
            self.stale = true;
            self.outbox.event(Event::ReportStale);
        }
        let sending = self.payload.is_some();
        if sending {
            self.next_sequence(now);
            for host in 0..self.hosts.len() {
                self.send_to(host);
            }
        }
        self.judge_round(sending);
    }

    fn next_sequence(&mut self, now: Duration) {
        self.sequence.0 += 1;
        let at = self.place(self.sequence);
        self.sent_at[at] = (self.sequence, now);
    }

    fn place(&self, sequence: Sequence) -> usize {
        usize::try_from(sequence.0 % self.sent_at.len() as u64).unwrap_or(0)
    }

    /// A peer's life has become known: it waits for our echo to hear us.
    fn answer(&mut self, host: usize) {
        if self.payload.is_some() {
            self.next_sequence(boot_time());
            self.send_to(host);
        }
    }

    fn send_to(&mut self, host: usize) {
        let (Some(host), Some(payload)) = (self.hosts.get_mut(host), &self.payload) else {
            return;
        };
        for (at, path) in host.paths.iter_mut().enumerate() {
            let (Some(path), Some(net)) = (path, &self.nets[at]) else {
                continue;
            };
            let Some(socket) = &net.socket else {
                path.error = net.error;
                path.counters.send_failed.fetch_add(1, Relaxed);
                continue;
            };
            let packet = &mut self.packet;
            if !self
                .gate
                .seal(&host.name, number(at), self.sequence, payload, packet)
            {
                continue;
            }
            match socket.send_to(packet, path.addr) {
                Ok(_) => {
                    path.error = None;
                    path.counters.sent.fetch_add(1, Relaxed);
                }
                Err(error) => {
                    path.counters.send_failed.fetch_add(1, Relaxed);
                    // A full queue is no failure of the network; the silence tells.
                    let full = matches!(errno(&error), Errno::EAGAIN | Errno::ENOBUFS);
                    path.error = Some(errno(&error)).filter(|_| !full);
                }
            }
        }
    }

    /// What is to be told after a round, and which sockets are to be opened anew: one whose
    /// address or interface went and came back would stay bound to what is gone.
    fn judge_round(&mut self, sending: bool) {
        for (at, net) in self.nets.iter_mut().enumerate() {
            let Some(net) = net else { continue };
            let network = number(at);
            let paths = || self.hosts.iter().filter_map(|host| host.paths[at].as_ref());
            let failed = paths().filter(|path| path.error.is_some()).count();
            let all_failed = sending && failed != 0 && failed == paths().count();
            let error = match net.socket {
                None => net.error,
                Some(_) if all_failed => paths().find_map(|path| path.error),
                Some(_) => None,
            };
            if all_failed {
                net.socket = None;
                net.counters.open.store(false, Relaxed);
            }
            match (net.fails.turn(error.is_some()), error) {
                (Some(true), Some(error)) => {
                    self.outbox.event(Event::NetworkFails { network, error });
                }
                (Some(false), _) => self.outbox.event(Event::NetworkWorks { network }),
                _ => {}
            }
            if error.is_some() || net.fails.told || !sending {
                continue;
            }
            for host in &mut self.hosts {
                let Some(path) = &mut host.paths[at] else {
                    continue;
                };
                let peer = || host.name.clone();
                match (path.fails.turn(path.error.is_some()), path.error) {
                    (Some(true), Some(error)) => self.outbox.event(Event::PathFails {
                        network,
                        peer: peer(),
                        error,
                    }),
                    (Some(false), _) => self.outbox.event(Event::PathWorks {
                        network,
                        peer: peer(),
                    }),
                    _ => {}
                }
            }
        }
    }

    /// ppoll and not epoll: there are at most nine descriptors, they change now and then, and a
    /// network with its budget spent is left out by leaving it out.
    fn wait(&self, timeout: Duration) {
        let mut fds = Vec::with_capacity(NETWORKS_MAX + 1);
        fds.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        let open = self.nets.iter().flatten().filter(|net| net.budget > 0);
        fds.extend(
            open.filter_map(|net| net.socket.as_ref())
                .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
        );
        let timeout = nix::sys::time::TimeSpec::from_duration(timeout);
        // An interruption is as good as a time-out: the loop looks at everything.
        let _ = nix::poll::ppoll(&mut fds, Some(timeout), None);
        let mut counter = [0; 8];
        let _ = nix::unistd::read(&self.wake, &mut counter);
    }

    /// Read all that is there, within the budget; peers that wait for an answer.
    fn drain(&mut self) -> Vec<usize> {
        // One byte more than a packet: a longer datagram is cut and refused.
        let mut datagram = [0; PACKET_BYTES_MAX + 1];
        let mut waiting = Vec::new();
        for at in 0..NETWORKS_MAX {
            while let Some(net) = &mut self.nets[at] {
                let Some(socket) = net.socket.as_ref().filter(|_| net.budget > 0) else {
                    break;
                };
                let (length, from) = match socket.recv_from(&mut datagram) {
                    Ok(read) => read,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // An error of an earlier send: there may be more behind it.
                    Err(_) => {
                        net.budget -= 1;
                        continue;
                    }
                };
                net.budget -= 1;
                if let Some(host) = self.judge(at, from, &datagram[..length]) {
                    waiting.push(host);
                }
            }
        }
        waiting
    }

    /// The peer that waits for an answer, if this datagram made its life known.
    fn judge(&mut self, at: usize, from: SocketAddr, datagram: &[u8]) -> Option<usize> {
        let verdict = self.gate.accept(number(at), from, datagram);
        let sender = match &verdict {
            Ok(Accepted { sender, .. }) => Some(sender),
            Err(Refused { sender, .. }) => sender.as_ref(),
        };
        let host = sender.and_then(|name| self.hosts.iter().position(|host| host.name == *name));
        let path = host.and_then(|host| self.hosts[host].paths[at].as_ref());
        match verdict {
            Ok(accepted) => {
                let now = boot_time();
                if let Some(path) = path {
                    let counters = &path.counters;
                    counters.received.fetch_add(1, Relaxed);
                    counters.incarnation.store(accepted.incarnation.0, Relaxed);
                    counters.key_newest.store(accepted.key_newest.0, Relaxed);
                    counters.heard_ns.store(nanos(now), Relaxed);
                }
                let (echoed, sent_at) = self.sent_at[self.place(accepted.echo)];
                let known = echoed == accepted.echo && echoed != Sequence(0);
                self.outbox.report(Received {
                    network: number(at),
                    sender: accepted.sender,
                    incarnation: accepted.incarnation,
                    sequence: accepted.sequence,
                    at: now,
                    sent_after: known.then_some(sent_at),
                    payload: accepted.payload.to_vec(),
                });
                host.filter(|_| accepted.learned)
            }
            Err(refused) => {
                match (path, &self.nets[at]) {
                    (Some(path), _) => path.counters.refused.count(refused.reason),
                    (None, Some(net)) => net.counters.refused.count(refused.reason),
                    (None, None) => {}
                }
                host.filter(|_| refused.learned)
            }
        }
    }
}

impl Net {
    /// Open the socket if there is none.
    fn open(&mut self) {
        if self.socket.is_some() {
            return;
        }
        match socket::open(&self.network) {
            Ok(socket) => {
                self.socket = Some(socket);
                self.error = None;
            }
            Err(error) => self.error = Some(errno(&error)),
        }
        self.counters.open.store(self.socket.is_some(), Relaxed);
    }
}
