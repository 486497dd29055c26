//! The thread of a port: moves frames between QEMU's socket, the gate and the tap.

use super::announce::{ANNOUNCE_AT, rarp_frame};
use super::config::NetMode;
use super::gate::FRAME_BYTES_MAX;
use super::port::{Shared, State};
use super::socket::raise_buffers;
use bytes::Bytes;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::io::{self, Read};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Frames moved in one direction before the other gets its turn.
const BATCH: usize = 64;

/// What an epoll event is about.
const FROM_QEMU: u64 = 0;
const FROM_TAP: u64 = 1;
const WAKE: u64 = 2;
const TO_QEMU: u64 = 3;

/// See the module's text.
pub(super) struct Pump {
    shared: Arc<Shared>,
    epoll: Epoll,
    /// Connected to QEMU's socket, so that epoll tells when it takes frames again. Not the bound
    /// one: a socket that is connected hears only that peer, and would be deaf to a new QEMU.
    to_qemu: Option<UnixDatagram>,
    /// A frame QEMU had no room for; nothing is read from the tap until it is gone.
    stuck: Option<Bytes>,
    buf: Vec<u8>,
}

/// What became of a frame for the guest.
enum Delivery {
    Done,
    NoRoom,
    Dropped,
}

impl Pump {
    pub fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let input = |what| EpollEvent::new(EpollFlags::EPOLLIN, what);
        epoll.add(&shared.from_qemu, input(FROM_QEMU))?;
        epoll.add(shared.tap.file(), input(FROM_TAP))?;
        epoll.add(&shared.wake, input(WAKE))?;
        Ok(Self {
            shared,
            epoll,
            to_qemu: None,
            stuck: None,
            buf: vec![0; FRAME_BYTES_MAX + 1],
        })
    }

    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); 4];
        loop {
            let timeout = self.announce_due();
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(nic = self.shared.nic, %error, "the port's epoll failed");
                    return;
                }
            };
            for event in &events[..ready] {
                match event.data() {
                    FROM_QEMU => self.pump_egress(),
                    FROM_TAP => self.pump_ingress(),
                    TO_QEMU => self.unstick(),
                    _ => {
                        // Reading resets it; it cannot fail while readable.
                        let _ = self.shared.wake.read();
                        if self.shared.lock_state().stop {
                            return;
                        }
                        self.inject();
                    }
                }
            }
        }
    }

    /// Guest to gate or tap.
    fn pump_egress(&mut self) {
        let shared = Arc::clone(&self.shared);
        // Direct frames are written under `order`; it must be taken first, so look, take, look.
        let direct = shared.lock_state().mode == NetMode::Direct;
        let order = direct.then(|| shared.lock_order());
        let mut state = shared.lock_state();
        if state.mode == NetMode::Direct && order.is_none() {
            // Just changed; the socket is still readable, so epoll comes back.
            return;
        }
        let taken = shared.take_from_qemu(&mut state, BATCH, &mut self.buf);
        drop(state);
        drop(order);
        if taken.first
            && let Some(hook) = &shared.hooks.on_output_waiting
        {
            hook(shared.nic);
        }
        if taken.pressure
            && let Some(hook) = &shared.hooks.on_pressure
        {
            hook(shared.nic);
        }
    }

    /// Tap to guest.
    fn pump_ingress(&mut self) {
        let shared = Arc::clone(&self.shared);
        for _ in 0..BATCH {
            // Injected frames are older.
            if self.stuck.is_some() || !shared.lock_state().inject.is_empty() {
                return self.inject();
            }
            let mut buf = std::mem::take(&mut self.buf);
            let got = shared.tap.file().read(&mut buf);
            if let Ok(len @ 1..=FRAME_BYTES_MAX) = got {
                self.deliver(&buf[..len]);
            }
            self.buf = buf;
            match got {
                Ok(1..) => {}
                // Also EIO while the interface is down: epoll tells when there is more.
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Hand on what waits in the injection queue, as far as QEMU takes it.
    fn inject(&mut self) {
        while self.stuck.is_none() {
            let Some(frame) = self.shared.lock_state().inject.pop_front() else {
                return;
            };
            self.deliver(&frame);
        }
    }

    /// QEMU takes frames again.
    fn unstick(&mut self) {
        let Some(frame) = self.stuck.take() else {
            return;
        };
        self.watch_room(false);
        self.deliver(&frame);
        self.inject();
    }

    /// Hand one frame to the guest if the mode allows; keeps it if QEMU has no room.
    fn deliver(&mut self, frame: &[u8]) {
        let shared = Arc::clone(&self.shared);
        let state = shared.lock_state();
        let mode = state.mode;
        let delivery = match mode {
            NetMode::Direct | NetMode::Hold { .. } => self.send(frame),
            NetMode::Standby | NetMode::Stopped => Delivery::Dropped,
        };
        drop(state);
        match delivery {
            Delivery::Done => {
                shared.ingress.fetch_add(1, Relaxed);
                if matches!(mode, NetMode::Hold { .. })
                    && let Some(hook) = &shared.hooks.on_ingress
                {
                    hook(shared.nic, frame);
                }
            }
            Delivery::NoRoom => {
                self.stuck = Some(Bytes::copy_from_slice(frame));
                self.watch_room(true);
            }
            Delivery::Dropped => {
                shared.dropped_other.fetch_add(1, Relaxed);
            }
        }
    }

    /// Send to QEMU, connecting (again) if need be.
    fn send(&mut self, frame: &[u8]) -> Delivery {
        for _ in 0..2 {
            if self.to_qemu.is_none() {
                self.to_qemu = self.connect();
            }
            let Some(socket) = &self.to_qemu else {
                return Delivery::Dropped;
            };
            match socket.send(frame) {
                Ok(_) => return Delivery::Done,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Delivery::NoRoom,
                // QEMU was restarted, or is gone.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::ENOTCONN | libc::EPIPE)
                    ) =>
                {
                    self.to_qemu = None;
                }
                Err(error) => {
                    tracing::trace!(nic = self.shared.nic, %error, "QEMU did not take a frame");
                    return Delivery::Dropped;
                }
            }
        }
        Delivery::Dropped
    }

    fn connect(&self) -> Option<UnixDatagram> {
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_nonblocking(true).ok()?;
        socket.connect(&self.shared.qemu_sock).ok()?;
        raise_buffers(&socket);
        Some(socket)
    }

    /// While QEMU has no room: listen for room, not for the tap, whose queue holds the rest.
    fn watch_room(&self, on: bool) {
        let tap_events = if on {
            EpollFlags::empty()
        } else {
            EpollFlags::EPOLLIN
        };
        let mut tap_event = EpollEvent::new(tap_events, FROM_TAP);
        let tap = self.epoll.modify(self.shared.tap.file(), &mut tap_event);
        let room = match &self.to_qemu {
            Some(socket) if on => self
                .epoll
                .add(socket, EpollEvent::new(EpollFlags::EPOLLOUT, TO_QEMU)),
            Some(socket) => self.epoll.delete(socket),
            None => Ok(()),
        };
        if let Err(error) = tap.and(room) {
            tracing::error!(nic = self.shared.nic, %error, "changing the port's epoll set failed");
        }
    }

    /// Send the announcement that is due; answers when the next one is.
    fn announce_due(&mut self) -> EpollTimeout {
        let shared = Arc::clone(&self.shared);
        if shared.lock_state().announcing.is_none() {
            return EpollTimeout::NONE;
        }
        let _order = shared.lock_order();
        let mut state = shared.lock_state();
        let left = next_announcement(&mut state, Instant::now(), || {
            shared.to_tap(&rarp_frame(shared.mac));
        });
        let Some(left) = left else {
            return EpollTimeout::NONE;
        };
        // Rounded up, so that it is due when the wait ends.
        EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::ZERO)
    }
}

/// Advance the schedule of announcements; calls `send` for each that is due, answers the time to
/// the next.
fn next_announcement(state: &mut State, now: Instant, mut send: impl FnMut()) -> Option<Duration> {
    loop {
        let (began, done) = state.announcing?;
        let Some(at) = ANNOUNCE_AT.get(done) else {
            state.announcing = None;
            return None;
        };
        let left = (began + *at).saturating_duration_since(now);
        if !left.is_zero() {
            return Some(left);
        }
        send();
        state.announcing = Some((began, done + 1));
    }
}
