//! One NIC of a VM: QEMU's datagram socket on one side, a tap on the other, the gate between.
//!
//! ```text
//!            recv            Direct                    write
//!   QEMU ───────────> port ─────────────────────────────────> tap ──> bridge
//!    ^                  └── Hold ──> gate ── release(n) ──────^
//!    └──────────── send, on_ingress ──────────────────────── tap
//! ```
//!
//! A thread (see `pump`) moves frames; [`NetPort::cut`] and [`NetPort::release`] do their work in
//! the caller's thread, because a hand-over costs a wake-up in the middle of the pause or of the
//! release. Two locks keep the order: `order` is held by whoever writes to the tap, `state` by
//! whoever reads from QEMU's socket or touches the gate; always in this sequence. A cut takes
//! only `state`, so it never waits for a long release.
//!
//! What the guest sends is untrusted: frames over 65,535 bytes are dropped, and nothing in them is
//! interpreted. Its source address is not enforced; who must not spoof belongs on a bridge that
//! filters.

use super::announce::{MacAddr, rarp_frame};
use super::config::{NetError, NetHooks, NetMode, NetPortConfig, NetStats, TapSource};
use super::gate::{FRAME_BYTES_MAX, GATE_BYTES_MAX, GATE_PACKETS_MAX, Gate};
use super::pump;
use super::socket::bind;
use super::tap::Tap;
use crate::pool::{Epoch, Generation};
use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Frames taken out of the gate under one lock.
const RELEASE_BATCH: usize = 256;

/// Most frames a cut takes from the socket. The guest stands still, so the socket holds at most
/// its queue (`net.unix.max_dgram_qlen`, 10 to 512); a QEMU that goes on sending is not waited
/// for: what is left counts to the next epoch, which is safe, only later.
const CUT_FRAMES_MAX: usize = 8192;

/// Most frames waiting to be injected: as many as a gate holds.
const INJECT_FRAMES_MAX: usize = super::gate::GATE_PACKETS_MAX;

/// One NIC. Its thread, sockets and tap go when it is dropped.
pub struct NetPort {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub(super) struct Shared {
    pub nic: usize,
    pub mac: MacAddr,
    pub hooks: NetHooks,
    pub tap: Tap,
    /// Bound at the port's path, not connected, so that a restarted QEMU is heard at once.
    pub from_qemu: UnixDatagram,
    pollux_sock: PathBuf,
    pub qemu_sock: PathBuf,
    /// Something in `state` needs the thread.
    pub wake: EventFd,
    pub clock: Instant,
    pub dropped_full: AtomicU64,
    pub dropped_other: AtomicU64,
    pub egress: AtomicU64,
    pub ingress: AtomicU64,
    order: Mutex<()>,
    state: Mutex<State>,
}

pub(super) struct State {
    pub mode: NetMode,
    pub generation: Generation,
    pub gate: Gate,
    /// To be handed to the guest before anything newer from the tap.
    pub inject: VecDeque<Bytes>,
    /// When announcing began and how many repetitions are done.
    pub announcing: Option<(Instant, usize)>,
    pub stop: bool,
}

/// What taking frames from QEMU's socket brought about.
#[derive(Clone, Copy, Default)]
pub(super) struct Taken {
    pub frames: usize,
    /// Nothing is left in the socket.
    pub empty: bool,
    pub first: bool,
    pub pressure: bool,
}

impl Shared {
    pub fn lock_order(&self) -> MutexGuard<'_, ()> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn lock_state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Write one frame to the tap; `order` must be held. A frame the kernel does not take (too
    /// short, interface down) is dropped and counted.
    #[allow(clippy::unused_io_amount)] // A tap takes a frame whole or not at all.
    pub fn to_tap(&self, frame: &[u8]) {
        match self.tap.file().write(frame) {
            Ok(_) => self.egress.fetch_add(1, Relaxed),
            Err(error) => {
                tracing::trace!(nic = self.nic, %error, "frame not taken by the tap");
                self.dropped_other.fetch_add(1, Relaxed)
            }
        };
    }

    /// Take up to `most` frames from QEMU's socket and do with them what the mode says. In mode
    /// Direct `order` must be held.
    pub fn take_from_qemu(&self, state: &mut State, most: usize, buf: &mut [u8]) -> Taken {
        let mut taken = Taken::default();
        while taken.frames < most {
            // MSG_TRUNC: the true length, so that a frame over the limit is noticed, not clipped.
            let got = nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(&self.from_qemu),
                buf,
                nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_TRUNC,
            );
            let len = match got {
                Ok(len) => len,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(nix::errno::Errno::EAGAIN) => {
                    taken.empty = true;
                    break;
                }
                Err(error) => {
                    tracing::debug!(nic = self.nic, %error, "receiving from QEMU failed");
                    taken.empty = true;
                    break;
                }
            };
            taken.frames += 1;
            let frame = buf
                .get(..len)
                .filter(|frame| frame.len() <= FRAME_BYTES_MAX);
            match (state.mode, frame) {
                (NetMode::Direct, Some(frame)) => self.to_tap(frame),
                (NetMode::Hold { epoch }, Some(frame)) => {
                    let frame = Bytes::copy_from_slice(frame);
                    match state.gate.push(epoch, frame, self.clock.elapsed()) {
                        Ok(pushed) => {
                            taken.first |= pushed.first;
                            taken.pressure |= pushed.pressure;
                        }
                        Err(full) => {
                            tracing::trace!(nic = self.nic, %full);
                            self.dropped_full.fetch_add(1, Relaxed);
                        }
                    }
                }
                (NetMode::Standby | NetMode::Stopped, _) | (_, None) => {
                    self.dropped_other.fetch_add(1, Relaxed);
                }
            }
        }
        taken
    }

    pub fn wake_thread(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::debug!(nic = self.nic, %error, "waking the port's thread failed");
        }
    }
}

impl NetPort {
    /// Set up the tap, bind the socket, start the thread.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left behind then.
    pub fn start(config: NetPortConfig) -> Result<Self, NetError> {
        let tap = match config.tap {
            TapSource::Ready(tap) => tap,
            TapSource::Create { name, mtu, bridge } => Tap::create(&name, mtu, bridge.as_deref())?,
        };
        let path = config.pollux_sock;
        let step = |doing: &'static str, source: io::Error| NetError::Step {
            doing,
            path: path.clone(),
            source,
        };
        let from_qemu = bind(&path, config.owner)?;
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| step("make an eventfd", e.into()))?;
        let shared = Arc::new(Shared {
            nic: config.nic,
            mac: config.mac,
            hooks: config.hooks,
            tap,
            from_qemu,
            pollux_sock: path.clone(),
            qemu_sock: config.qemu_sock,
            wake,
            clock: Instant::now(),
            dropped_full: AtomicU64::new(0),
            dropped_other: AtomicU64::new(0),
            egress: AtomicU64::new(0),
            ingress: AtomicU64::new(0),
            order: Mutex::new(()),
            state: Mutex::new(State {
                mode: config.mode,
                generation: config.generation,
                gate: Gate::with_limits(
                    config.held_packets_max.min(GATE_PACKETS_MAX),
                    GATE_BYTES_MAX,
                ),
                inject: VecDeque::new(),
                announcing: None,
                stop: false,
            }),
        });
        let pump =
            pump::Pump::new(Arc::clone(&shared)).map_err(|e| step("make an epoll set", e))?;
        let thread = thread::Builder::new()
            .name(format!("nic{}", config.nic))
            .spawn(move || pump.run())
            .map_err(|e| step("start a thread", e))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The mode in force.
    #[must_use]
    pub fn mode(&self) -> NetMode {
        self.shared.lock_state().mode
    }

    /// The generation in force.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.shared.lock_state().generation
    }

    /// Change mode; answers when no frame of the old mode is under way. `Direct` releases all
    /// held frames, in order, before any newer one; `Standby` and `Stopped` discard them. To the
    /// same mode: only raises the generation.
    ///
    /// # Errors
    /// A lower generation; from `Stopped` to `Direct` or `Hold` without a higher one; from `Hold`
    /// to another running epoch. Nothing has changed then.
    pub fn set_mode(&self, mode: NetMode, generation: Generation) -> Result<(), NetError> {
        let shared = &*self.shared;
        let _order = shared.lock_order();
        let mut state = shared.lock_state();
        let (nic, in_force) = (shared.nic, state.generation);
        if generation < in_force {
            return Err(NetError::StaleGeneration {
                nic,
                given: generation,
                in_force,
            });
        }
        match (state.mode, mode) {
            (NetMode::Stopped, NetMode::Direct | NetMode::Hold { .. })
                if generation == in_force =>
            {
                let step = "run again under the same generation";
                return Err(NetError::WrongMode {
                    nic,
                    step,
                    mode: state.mode,
                });
            }
            (NetMode::Hold { epoch: running }, NetMode::Hold { epoch: given })
                if given != running =>
            {
                return Err(NetError::Epoch {
                    nic,
                    given,
                    running,
                });
            }
            _ => {}
        }
        match mode {
            NetMode::Direct => {
                let all = state.gate.packets();
                for held in state.gate.release(Epoch(u64::MAX), all) {
                    shared.to_tap(&held.frame);
                }
            }
            NetMode::Standby | NetMode::Stopped => {
                let lost = state.gate.discard() + state.inject.len();
                shared.dropped_other.fetch_add(lost as u64, Relaxed);
                state.inject.clear();
                state.announcing = None;
            }
            NetMode::Hold { .. } => {}
        }
        state.mode = mode;
        state.generation = generation;
        Ok(())
    }

    /// End the running epoch: called after QMP `stop` has returned. Takes what the guest sent
    /// until then from the socket into the ended epoch; what follows belongs to `next`. Answers
    /// how many frames the ended epoch holds.
    ///
    /// # Errors
    /// Not in mode Hold, or `next` is not higher than the running epoch.
    pub fn cut(&self, next: Epoch) -> Result<usize, NetError> {
        let shared = &*self.shared;
        let mut buf = vec![0; FRAME_BYTES_MAX + 1];
        let mut state = shared.lock_state();
        let running = hold_epoch(shared, &state, "end an epoch")?;
        if next <= running {
            return Err(NetError::Epoch {
                nic: shared.nic,
                given: next,
                running,
            });
        }
        shared.take_from_qemu(&mut state, CUT_FRAMES_MAX, &mut buf);
        let held = state.gate.packets_of(running);
        state.gate.epoch_begins();
        state.mode = NetMode::Hold { epoch: next };
        Ok(held)
    }

    /// Epochs up to `through` are committed: send their frames, in order, from this thread.
    /// Never sends a frame of the running epoch. Answers how many were sent.
    pub fn release(&self, through: Epoch) -> usize {
        let shared = &*self.shared;
        let _order = shared.lock_order();
        let mut sent = 0;
        loop {
            let batch: Vec<_> = {
                let mut state = shared.lock_state();
                let NetMode::Hold {
                    epoch: Epoch(running),
                } = state.mode
                else {
                    return sent;
                };
                let Some(newest_cut) = running.checked_sub(1) else {
                    return sent;
                };
                state
                    .gate
                    .release(through.min(Epoch(newest_cut)), RELEASE_BATCH)
                    .collect()
            };
            for held in &batch {
                shared.to_tap(&held.frame);
            }
            sent += batch.len();
            if batch.len() < RELEASE_BATCH {
                return sent;
            }
        }
    }

    /// Frames of epochs from `from` on go back into the running one, which has the number
    /// `running` from now; see `Disk::uncut`. Calls `on_output_waiting` if there are any.
    ///
    /// # Errors
    /// Not in mode Hold, or the numbers do not fit.
    pub fn uncut(&self, from: Epoch, running: Epoch) -> Result<(), NetError> {
        let shared = &*self.shared;
        let mut state = shared.lock_state();
        let current = hold_epoch(shared, &state, "take an epoch back")?;
        if running > current || running < from {
            return Err(NetError::Epoch {
                nic: shared.nic,
                given: running,
                running: current,
            });
        }
        let waiting = state.gate.uncut(from, running);
        state.mode = NetMode::Hold { epoch: running };
        drop(state);
        if waiting && let Some(hook) = &shared.hooks.on_output_waiting {
            hook(shared.nic);
        }
        Ok(())
    }

    /// Tell the network where the guest is: a RARP broadcast now and a few more in the following
    /// second, unless the port leaves service.
    pub fn announce(&self) {
        let shared = &*self.shared;
        let _order = shared.lock_order();
        let mut state = shared.lock_state();
        if matches!(state.mode, NetMode::Standby | NetMode::Stopped) {
            return;
        }
        shared.to_tap(&rarp_frame(shared.mac));
        state.announcing = Some((Instant::now(), 0));
        drop(state);
        shared.wake_thread();
    }

    /// What is held of `epoch`, the newest `bytes_max` bytes, in order: for the standby, which
    /// lets it out if this side dies between commit and release.
    #[must_use]
    pub fn held_of(&self, epoch: Epoch, bytes_max: usize) -> Vec<Bytes> {
        self.shared.lock_state().gate.newest_of(epoch, bytes_max)
    }

    /// Let out, in order, what the old primary held of the epoch this side was promoted from.
    /// It may have let it out before it died: networks may repeat frames. Only in mode Direct.
    /// Answers how many.
    pub fn let_out(&self, frames: &[Bytes]) -> usize {
        let shared = &*self.shared;
        let _order = shared.lock_order();
        if shared.lock_state().mode != NetMode::Direct {
            return 0;
        }
        for frame in frames {
            shared.to_tap(frame);
        }
        frames.len()
    }

    /// Hand these frames to the guest, in order, before anything newer from the tap: the replay
    /// of what the last primary's guest had been given since the last commit. Call once QEMU
    /// runs. Frames beyond a gate's worth are dropped.
    pub fn inject(&self, frames: Vec<Bytes>) {
        let shared = &*self.shared;
        let mut state = shared.lock_state();
        let room = INJECT_FRAMES_MAX.saturating_sub(state.inject.len());
        let lost = frames.len().saturating_sub(room);
        shared.dropped_other.fetch_add(lost as u64, Relaxed);
        state.inject.extend(frames.into_iter().take(room));
        drop(state);
        shared.wake_thread();
    }

    /// Counters and what is held.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        let shared = &*self.shared;
        let state = shared.lock_state();
        let now = shared.clock.elapsed();
        let age = state
            .gate
            .oldest()
            .map_or(Duration::ZERO, |at| now.saturating_sub(at));
        NetStats {
            held_packets: state.gate.packets() as u64,
            held_bytes: state.gate.bytes() as u64,
            oldest_us: u64::try_from(age.as_micros()).unwrap_or(u64::MAX),
            dropped_full: shared.dropped_full.load(Relaxed),
            dropped_other: shared.dropped_other.load(Relaxed),
            egress: shared.egress.load(Relaxed),
            ingress: shared.ingress.load(Relaxed),
        }
    }
}

impl Drop for NetPort {
    fn drop(&mut self) {
        self.shared.lock_state().stop = true;
        self.shared.wake_thread();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.shared.pollux_sock);
    }
}

fn hold_epoch(shared: &Shared, state: &State, step: &'static str) -> Result<Epoch, NetError> {
    match state.mode {
        NetMode::Hold { epoch } => Ok(epoch),
        mode => Err(NetError::WrongMode {
            nic: shared.nic,
            step,
            mode,
        }),
    }
}
