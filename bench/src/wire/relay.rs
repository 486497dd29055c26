//! Passes datagrams on between two addresses, late and not all: a path with delay and random
//! loss, in user space because not every kernel has `netem`.

use super::peer::{Report, say_ready};
use anyhow::Result;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Bytes under way in one direction at most; more is dropped, as a full queue does.
const UNDER_WAY_BYTES_MAX: usize = 64 << 20;
/// Socket buffers, in bytes: the only losses shall be the ones asked for.
const SOCKET_BUFFER_BYTES: usize = 32 << 20;
/// Bytes that one message may hold.
const MESSAGE_BYTES: usize = 1 << 16;
/// Messages taken at a time.
const MESSAGES: usize = if BATCH_SIZE < 4 { BATCH_SIZE } else { 4 };

/// What is passed on, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The relay's own addresses, towards the first end and towards the second.
    pub own: [SocketAddr; 2],
    /// The ends.
    pub ends: [SocketAddr; 2],
    /// Delay each way, in µs.
    pub delay_us: u64,
    /// Datagrams lost each way, in parts of a million.
    pub lost_ppm: u32,
    /// Decides which.
    pub seed: u64,
}

/// Some datagrams of one size (the last may be shorter) on their way.
struct Parcel {
    due: Instant,
    bytes: Vec<u8>,
    stride: usize,
}

/// One direction.
#[derive(Default)]
struct Way {
    parcels: VecDeque<Parcel>,
    bytes: usize,
    passed: u64,
    lost: u64,
}

/// xorshift64*, Vigna 2016: good enough to choose packets, and repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        // Below 2^32 after the shift.
        u32::try_from((high * u64::from(limit)) >> 32).unwrap_or(0)
    }
}

impl Way {
    fn take(&mut self, message: &[u8], stride: usize, plan: &Plan, random: &mut Random) {
        let mut bytes = Vec::with_capacity(message.len());
        for datagram in message.chunks(stride.max(1)) {
            let lost = plan.lost_ppm > 0 && random.below(1_000_000) < plan.lost_ppm;
            if lost || self.bytes > UNDER_WAY_BYTES_MAX {
                self.lost += 1;
                // A shorter one cannot be followed by others in one send: it ends it anyway.
                continue;
            }
            self.passed += 1;
            bytes.extend_from_slice(datagram);
        }
        if bytes.is_empty() {
            return;
        }
        self.bytes += bytes.len();
        self.parcels.push_back(Parcel {
            due: Instant::now() + Duration::from_micros(plan.delay_us),
            bytes,
            stride,
        });
    }

    /// Sends what is due; the time of the next one.
    fn pass_on(
        &mut self,
        socket: &UdpSocket,
        state: &UdpSocketState,
        to: SocketAddr,
    ) -> Result<Option<Instant>> {
        while let Some(parcel) = self.parcels.front() {
            let now = Instant::now();
            if parcel.due > now {
                return Ok(Some(parcel.due));
            }
            let several = parcel.bytes.len() > parcel.stride;
            let transmit = Transmit {
                destination: to,
                ecn: None,
                contents: &parcel.bytes,
                segment_size: several.then_some(parcel.stride),
                src_ip: None,
            };
            match state.send(socket.into(), &transmit) {
                Ok(()) => {}
                // The queue behind the socket is full: a little later.
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    return Ok(Some(now + Duration::from_micros(50)));
                }
                Err(e) => return Err(e.into()),
            }
            self.bytes -= parcel.bytes.len();
            self.parcels.pop_front();
        }
        Ok(None)
    }
}

/// Passes on until its input ends.
///
/// # Errors
/// Of the sockets.
pub fn run(plan: &Plan) -> Result<Report> {
    // Timers of a thread are late by up to 50 µs otherwise (PR_SET_TIMERSLACK, prctl(2)).
    let _ = nix::sys::prctl::set_timerslack(1);
    let sockets = [UdpSocket::bind(plan.own[0])?, UdpSocket::bind(plan.own[1])?];
    let mut states = Vec::new();
    for socket in &sockets {
        use nix::sys::socket::{setsockopt, sockopt};
        setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES)?;
        setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES)?;
        states.push(UdpSocketState::new(socket.into())?);
    }
    let mut ways = [Way::default(), Way::default()];
    let mut random = Random(plan.seed | 1);
    let mut buffers = vec![[0; MESSAGE_BYTES]; MESSAGES];
    say_ready()?;
    let input = std::io::stdin();
    loop {
        let mut next: Option<Instant> = None;
        for side in 0..2 {
            // What comes in on one side goes out on the other.
            let due =
                ways[side].pass_on(&sockets[1 - side], &states[1 - side], plan.ends[1 - side])?;
            next = match (next, due) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        let wait = next.map(|at| TimeSpec::from(at.saturating_duration_since(Instant::now())));
        let mut polled = [
            PollFd::new(sockets[0].as_fd(), PollFlags::POLLIN),
            PollFd::new(sockets[1].as_fd(), PollFlags::POLLIN),
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
        ];
        ppoll(&mut polled, wait, None)?;
        if polled[2].any().unwrap_or(false) {
            break;
        }
        for side in 0..2 {
            if !polled[side].any().unwrap_or(false) {
                continue;
            }
            let mut metas = [RecvMeta::default(); MESSAGES];
            let mut slices: Vec<IoSliceMut> =
                buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
            let count = match states[side].recv((&sockets[side]).into(), &mut slices, &mut metas) {
                Ok(count) => count,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
                // The end behind it is not there (yet): its datagrams are lost.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => continue,
                Err(e) => return Err(e.into()),
            };
            for (meta, buffer) in metas.iter().zip(&buffers).take(count) {
                ways[side].take(&buffer[..meta.len], meta.stride, plan, &mut random);
            }
        }
    }
    let notes = ways
        .iter()
        .enumerate()
        .flat_map(|(side, way)| {
            [
                (format!("passed{side}"), way.passed as f64),
                (format!("lost{side}"), way.lost as f64),
            ]
        })
        .collect();
    Ok(Report {
        notes,
        ..Report::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_loses_as_many_as_asked() {
        let plan = Plan {
            own: [([127, 0, 0, 1], 1).into(); 2],
            ends: [([127, 0, 0, 1], 2).into(); 2],
            delay_us: 0,
            lost_ppm: 10_000,
            seed: 7,
        };
        let (mut way, mut random) = (Way::default(), Random(plan.seed));
        for _ in 0..1000 {
            way.take(&[0; 1000], 10, &plan, &mut random);
            way.bytes = 0;
        }
        assert_eq!(way.lost + way.passed, 100_000);
        assert!((800..1200).contains(&way.lost), "{} lost", way.lost);
        assert!(way.parcels.iter().all(|p| p.bytes.len() % 10 == 0));
    }
}
