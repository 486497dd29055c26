//! A cable between two sides of a test: a UDP relay on loopback that can swallow, lose,
//! hold up or slow down what crosses it.

use super::*;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Instant;
use tokio::net::UdpSocket as TokioSocket;

/// How the cable behaves, both ways.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Behaviour {
    /// Nothing crosses, and nobody is told.
    pub(super) swallow: bool,
    /// One packet of so many is lost; 0: none.
    pub(super) lose_one_in: u32,
    /// Everything is late by this.
    pub(super) delay: Duration,
    /// Bytes a second; 0: as fast as it can.
    pub(super) bytes_per_s: u64,
    /// Larger packets vanish; 0: none do.
    pub(super) bytes_max: usize,
}

/// Bytes that wait in front of a slow cable; more are lost, as in any switch.
const QUEUE_BYTES: usize = 1 << 20;

/// A relay in front of `to`; forwarding ends when it is dropped.
pub(super) struct Relay {
    pub(super) addr: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

impl Relay {
    pub(super) fn new(to: SocketAddr, runtime: &Runtime) -> Self {
        let behaviour = Arc::new(Mutex::new(Behaviour::default()));
        let (addr, tasks) = runtime.block_on(async {
            let near = Arc::new(TokioSocket::bind("127.0.0.1:0").await.unwrap());
            let far = Arc::new(TokioSocket::bind("127.0.0.1:0").await.unwrap());
            for socket in [&near, &far] {
                let bytes = 8 << 20;
                let _ = nix::sys::socket::setsockopt(
                    &**socket,
                    nix::sys::socket::sockopt::RcvBufForce,
                    &bytes,
                );
            }
            far.connect(to).await.unwrap();
            let dialler = Arc::new(Mutex::new(None));
            let out = tokio::spawn(carry(
                Arc::clone(&near),
                Arc::clone(&far),
                Arc::clone(&dialler),
                true,
                Arc::clone(&behaviour),
            ));
            let addr = near.local_addr().unwrap();
            let back = tokio::spawn(carry(far, near, dialler, false, Arc::clone(&behaviour)));
            (addr, vec![out, back])
        });
        Self {
            addr,
            behaviour,
            tasks,
        }
    }

    pub(super) fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    pub(super) fn swallow(&self, swallow: bool) {
        self.behaviour.lock().unwrap().swallow = swallow;
    }
}

async fn carry(
    from: Arc<TokioSocket>,
    to: Arc<TokioSocket>,
    dialler: Arc<Mutex<Option<SocketAddr>>>,
    outward: bool,
    behaviour: Arc<Mutex<Behaviour>>,
) {
    let mut buffer = vec![0; 65_536];
    let mut waiting: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let (mut waiting_bytes, mut free_at, mut count) = (0, Instant::now(), 0u32);
    loop {
        let due = waiting.front().map(|(at, _)| *at);
        let come = tokio::select! {
            biased;
            () = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            } => None,
            come = from.recv_from(&mut buffer) => Some(come),
        };
        let behaviour = *behaviour.lock().unwrap();
        if behaviour.swallow {
            waiting.clear();
            waiting_bytes = 0;
        }
        match come {
            None => {
                if let Some((_, packet)) = waiting.pop_front() {
                    waiting_bytes -= packet.len();
                    send(&to, &packet, &dialler, outward).await;
                }
            }
            // Nobody listens at the far end: as if the cable were cut.
            Some(Err(_)) => {}
            Some(Ok((bytes, source))) => {
                if outward {
                    *dialler.lock().unwrap() = Some(source);
                }
                count = count.wrapping_add(1);
                let lost = behaviour.lose_one_in > 0 && count % behaviour.lose_one_in == 0;
                let large = behaviour.bytes_max > 0 && bytes > behaviour.bytes_max;
                let full = waiting_bytes + bytes > QUEUE_BYTES;
                if behaviour.swallow || lost || large || full {
                    continue;
                }
                if behaviour.delay.is_zero() && behaviour.bytes_per_s == 0 && waiting.is_empty() {
                    send(&to, &buffer[..bytes], &dialler, outward).await;
                    continue;
                }
                let now = Instant::now();
                free_at = free_at.max(now);
                let nanos = bytes as u64 * 1_000_000_000;
                if let Some(nanos) = nanos.checked_div(behaviour.bytes_per_s) {
                    free_at += Duration::from_nanos(nanos);
                }
                waiting_bytes += bytes;
                waiting.push_back((free_at + behaviour.delay, buffer[..bytes].to_vec()));
            }
        }
    }
}

async fn send(to: &TokioSocket, packet: &[u8], dialler: &Mutex<Option<SocketAddr>>, outward: bool) {
    let _ = if outward {
        to.send(packet).await
    } else {
        let Some(dialler) = *dialler.lock().unwrap() else {
            return;
        };
        to.send_to(packet, dialler).await
    };
}
