//! Runs the tasks that drive QUIC, and lets what they send gather before it goes out.
//!
//! ```text
//!  poll: [ driver -> packets -> BurstSocket holds them ]* -> release -> one send of 64 KiB
//! ```
//!
//! The library makes at most 10 packets for each send: 14 KiB at 1,472-byte packets, while
//! the kernel takes 64 KiB (UDP_SEGMENT, udp(7)) and its cost for one send, and for the way
//! through both hosts, hardly depends on the size. So the driver of a connection is polled
//! again while it has more and the burst has room, and only then is the burst released.
//! Nothing waits for time: a burst is released before the driver's poll returns.
//!
//! What this must never do: leave a burst unsent when no poll follows, or keep one task at
//! work for ever.

use super::socket::{BurstSocket, Released};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Polls of a driver in one poll of its task: each makes some 20 packets (quinn's
/// `MAX_TRANSMIT_DATAGRAMS`), so this is about four full bursts, 150 µs of work.
const POLLS_MAX: usize = 8;

/// Runs drivers on the tokio runtime of whoever calls, with the socket they send on.
#[derive(Debug)]
pub(super) struct Drivers {
    socket: Arc<BurstSocket>,
}

impl Drivers {
    pub(super) fn new(socket: Arc<BurstSocket>) -> Self {
        Self { socket }
    }
}

impl Runtime for Drivers {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, driver: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(Gather {
            driver,
            socket: Arc::clone(&self.socket),
            writable: Arc::clone(&self.socket).create_io_poller(),
            again: Arc::default(),
            waker: None,
        });
    }

    fn wrap_udp_socket(
        &self,
        socket: std::net::UdpSocket,
    ) -> std::io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }
}

/// Ends its thread when dropped.
#[derive(Debug)]
pub(super) struct OwnThread {
    _stop: oneshot::Sender<Infallible>,
}

/// A thread with a runtime of its own for all tasks of one pair, for as long as the guard and
/// the caller's runtime live. On a shared runtime of two workers the drivers, the lanes and
/// their locks hop between cores: measured, a third of all time went into waking threads up.
/// Here a piece goes from the socket to its frame within one core's cache, and nothing else
/// the daemon does stands in its way.
///
/// # Errors
/// If the runtime or the thread cannot be made.
pub(super) fn own_thread(peer: &str, caller: &Handle) -> std::io::Result<(Handle, OwnThread)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    // Nothing is ever sent on these: what counts is that an end is dropped.
    let (stop, stopped) = oneshot::channel::<Infallible>();
    let (alive, caller_gone) = oneshot::channel::<Infallible>();
    // Linux takes 15 bytes of a thread's name.
    let name = format!("wire-{peer}").chars().take(15).collect();
    std::thread::Builder::new().name(name).spawn(move || {
        let _ = runtime.block_on(caller_gone);
        // What still runs is dropped as it stands, as with any runtime that ends.
    })?;
    caller.spawn(async move {
        let _ = stopped.await;
        drop(alive);
    });
    Ok((handle, OwnThread { _stop: stop }))
}

/// A driver whose sends are gathered.
struct Gather {
    driver: Pin<Box<dyn Future<Output = ()> + Send>>,
    socket: Arc<BurstSocket>,
    /// For a burst that the socket had no room for.
    writable: Pin<Box<dyn UdpPoller>>,
    again: Arc<Again>,
    /// Made from `again`, kept while the task's own waker stays the same.
    waker: Option<Waker>,
}

/// Wakes the task, or, while the driver is being polled, notes that it wants more.
#[derive(Debug, Default)]
struct Again {
    polling: AtomicBool,
    wanted: AtomicBool,
    task: std::sync::Mutex<Option<Waker>>,
}

impl Wake for Again {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Both orders are safe: `poll` looks at `wanted` after it took `polling` back.
        self.wanted.store(true, Ordering::SeqCst);
        if !self.polling.load(Ordering::SeqCst) {
            self.wake_task();
        }
    }
}

impl Again {
    fn wake_task(&self) {
        let task = self
            .task
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone();
        if let Some(task) = task {
            task.wake();
        }
    }

    fn set_task(&self, waker: &Waker) {
        let mut task = self
            .task
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if !task.as_ref().is_some_and(|task| task.will_wake(waker)) {
            *task = Some(waker.clone());
        }
    }
}

impl Future for Gather {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.again.set_task(cx.waker());
        let waker = this
            .waker
            .get_or_insert_with(|| Waker::from(Arc::clone(&this.again)));
        let mut inner = Context::from_waker(waker);
        let held = this.socket.hold();
        this.again.polling.store(true, Ordering::SeqCst);
        let mut polls = 0;
        let result = loop {
            this.again.wanted.store(false, Ordering::SeqCst);
            let result = this.driver.as_mut().poll(&mut inner);
            polls += 1;
            let more = this.again.wanted.load(Ordering::SeqCst) && this.socket.has_room();
            if result.is_ready() || !more || polls >= POLLS_MAX {
                break result;
            }
        };
        this.again.polling.store(false, Ordering::SeqCst);
        drop(held);
        // An error is the socket's; the driver meets it with its next send.
        while this.socket.release() == Released::Blocked
            && this.writable.as_mut().poll_writable(cx).is_ready()
        {}
        if this.again.wanted.swap(false, Ordering::SeqCst) && result.is_pending() {
            cx.waker().wake_by_ref();
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::socket;
    use quinn::udp::Transmit;
    use std::net::SocketAddr;
    use tokio::sync::watch;

    const PACKET: usize = 1000;

    /// Sends a packet at each poll and wants to go on, `left` times.
    struct Sends {
        socket: Arc<BurstSocket>,
        to: SocketAddr,
        left: u8,
    }

    impl Future for Sends {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            if self.left == 0 {
                return Poll::Ready(());
            }
            let contents = [self.left; 2 * PACKET];
            let transmit = Transmit {
                destination: self.to,
                ecn: None,
                contents: &contents,
                segment_size: Some(PACKET),
                src_ip: None,
            };
            let mut writable = Arc::clone(&self.socket).create_io_poller();
            if writable.as_mut().poll_writable(cx).is_ready()
                && self.socket.try_send(&transmit).is_ok()
            {
                self.left -= 1;
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    #[test]
    fn whatever_a_driver_sends_leaves_and_it_gets_to_its_end() {
        let caller = tokio::runtime::Runtime::new().unwrap();
        let (runtime, _thread) = own_thread("x", caller.handle()).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        // With a buffer that holds all of it.
        let receiver = socket::bind(0, any).unwrap();
        let _entered = runtime.enter();
        let bound = socket::bind(0, any).unwrap();
        let socket = socket::for_quic(bound, 1000, 1000, watch::Sender::new(())).unwrap();
        let drivers = Drivers::new(Arc::clone(&socket));
        drivers.spawn(Box::pin(Sends {
            socket,
            to: receiver.local_addr().unwrap(),
            left: 100,
        }));
        let patience = std::time::Duration::from_secs(10);
        receiver.set_read_timeout(Some(patience)).unwrap();
        let mut buffer = [0; 2 * PACKET];
        for packet in (1..=100).rev().flat_map(|n| [n, n]) {
            assert_eq!(receiver.recv(&mut buffer).unwrap(), PACKET);
            assert_eq!(buffer[0], packet);
        }
    }

    #[test]
    fn a_pair_s_thread_ends_with_the_caller_or_with_its_guard() {
        let patience = std::time::Duration::from_secs(10);
        for caller_ends in [true, false] {
            let caller = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .build()
                .unwrap();
            let (runtime, thread) =
                own_thread("a partner with a long name", caller.handle()).unwrap();
            let (alive, ended) = std::sync::mpsc::channel::<()>();
            runtime.spawn(async move {
                let _alive = alive;
                std::future::pending::<()>().await;
            });
            if caller_ends {
                caller.shutdown_background();
            } else {
                drop(thread);
            }
            let error = ended.recv_timeout(patience);
            assert_eq!(error, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
        }
    }
}
