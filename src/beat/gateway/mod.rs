//! Whether the gateway answers: what a host that cannot reach it cannot do is serve clients.
//!
//! ICMP echo to one address, over one interface if told so; a thread of its own asks each
//! period and notes the newest answer. It judges nothing: reports carry the age.

mod echo;

use echo::{Echo, MESSAGE_BYTES};
use interconnect::heartbeat::{boot_time, realtime};
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recvfrom,
    sendto, setsockopt, socket, sockopt,
};
use ring::rand::SecureRandom;
use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Default time between requests.
pub const GATEWAY_PERIOD_DEFAULT: Duration = Duration::from_secs(1);
/// Shortest time between requests: gateways answer pings at their leisure, and slow down those
/// who ask too often.
const PERIOD_MIN: Duration = Duration::from_millis(100);
/// Messages read in one period: a raw socket gets a copy of every ICMP message that comes in,
/// and who floods the host with them must not take the processor.
const MESSAGES_PER_PERIOD_MAX: u32 = 256;
/// Longest IPv4 header (RFC 791): a raw socket hands it over before the message.
const IP_HEADER_BYTES_MAX: usize = 60;

/// What to ask, and how.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// The gateway. An address, not a name.
    pub gateway: IpAddr,
    /// Ask from this address.
    pub local: Option<IpAddr>,
    /// Ask through this interface and no other.
    pub device: Option<String>,
    /// Time between requests.
    pub period: Duration,
}

/// What is known of the gateway.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GatewayStatus {
    /// Age of the newest answer, counted from when its request was sent; `None`: never.
    pub age: Option<Duration>,
    /// Time that answer took.
    pub round_trip: Option<Duration>,
    /// Why nothing could be asked the last time, if so.
    pub failure: Option<String>,
    /// Asks through a raw socket; otherwise through a ping socket, which needs no privilege.
    pub raw: bool,
}

/// Why the probe cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// The configuration makes no sense.
    #[error("gateway {0}: {1}")]
    Config(IpAddr, &'static str),
    /// The thread could not be started.
    #[error("cannot start the thread that asks the gateway: {0}")]
    Thread(io::Error),
}

#[derive(Default)]
struct Known {
    stop: bool,
    answered: Option<Duration>,
    status: GatewayStatus,
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks until it is dropped.
pub struct GatewayProbe {
    known: Arc<Mutex<Known>>,
    wake: EventFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl GatewayProbe {
    /// Start to ask. That there is no way to the gateway (yet) is no error but a status.
    ///
    /// # Errors
    /// [`GatewayError`].
    pub fn start(config: GatewayConfig) -> Result<Self, GatewayError> {
        let bad = |why| Err(GatewayError::Config(config.gateway, why));
        if config.gateway.is_unspecified() || config.gateway.is_multicast() {
            return bad("this is no address of a gateway");
        }
        if config
            .local
            .is_some_and(|local| local.is_ipv4() != config.gateway.is_ipv4())
        {
            return bad("the address to ask from is of another family");
        }
        if config.period < PERIOD_MIN {
            return bad("the time between requests is below 100 ms");
        }
        let mut token = [0; 16];
        ring::rand::SystemRandom::new()
            .fill(&mut token)
            .map_err(|_| GatewayError::Thread(io::Error::other("no random numbers")))?;
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|error| GatewayError::Thread(error.into()))?;
        let known = Arc::new(Mutex::new(Known::default()));
        let asker = Asker {
            echo: Echo::new(config.gateway, token),
            config,
            socket: None,
            known: Arc::clone(&known),
            wake: wake
                .as_fd()
                .try_clone_to_owned()
                .map_err(GatewayError::Thread)?,
        };
        let thread = std::thread::Builder::new()
            .name("gateway-probe".to_owned())
            .stack_size(realtime::STACK_BYTES)
            .spawn(move || asker.run())
            .map_err(GatewayError::Thread)?;
        Ok(Self {
            known,
            wake,
            thread: Some(thread),
        })
    }

    /// What is known now.
    #[must_use]
    pub fn status(&self) -> GatewayStatus {
        let known = lock(&self.known);
        let age = known.answered.map(|at| boot_time().saturating_sub(at));
        GatewayStatus {
            age,
            ..known.status.clone()
        }
    }
}

impl Drop for GatewayProbe {
    fn drop(&mut self) {
        lock(&self.known).stop = true;
        // A full counter wakes the thread as well.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

struct Asker {
    config: GatewayConfig,
    echo: Echo,
    /// And whether it is a raw one.
    socket: Option<(OwnedFd, bool)>,
    known: Arc<Mutex<Known>>,
    wake: OwnedFd,
}

impl Asker {
    /// A ping socket where the kernel allows one (net.ipv4.ping_group_range, icmp(7)), else a
    /// raw one.
    fn open(&self) -> nix::Result<(OwnedFd, bool)> {
        let (family, protocol) = if self.config.gateway.is_ipv4() {
            (AddressFamily::Inet, SockProtocol::Icmp)
        } else {
            (AddressFamily::Inet6, SockProtocol::IcmpV6)
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (fd, raw) = match socket(family, SockType::Datagram, flags, protocol) {
            Ok(fd) => (fd, false),
            Err(_) => (socket(family, SockType::Raw, flags, protocol)?, true),
        };
        if let Some(device) = &self.config.device {
            setsockopt(&fd, sockopt::BindToDevice, &OsString::from(device))?;
        }
        if let Some(local) = self.config.local {
            let local = SockaddrStorage::from(SocketAddr::new(local, 0));
            bind(fd.as_raw_fd(), &local)?;
        }
        Ok((fd, raw))
    }

    fn ask(&mut self) -> nix::Result<()> {
        if self.socket.is_none() {
            self.socket = Some(self.open()?);
        }
        let Some((fd, _)) = &self.socket else {
            return Ok(());
        };
        let message = self.echo.request(boot_time());
        let to = SockaddrStorage::from(SocketAddr::new(self.config.gateway, 0));
        let sent = sendto(fd.as_raw_fd(), &message, &to, MsgFlags::empty());
        if sent.is_err() {
            // It may be bound to what is gone.
            self.socket = None;
        }
        sent.map(|_| ())
    }

    /// Read what is there, within the budget.
    fn drain(&mut self, budget: &mut u32) {
        // One byte more than can be an answer: longer ones are cut and no answer.
        let mut bytes = [0; IP_HEADER_BYTES_MAX + MESSAGE_BYTES + 1];
        while let Some((fd, raw)) = self.socket.as_ref().filter(|_| *budget > 0) {
            *budget -= 1;
            let (length, from) = match recvfrom::<SockaddrStorage>(fd.as_raw_fd(), &mut bytes) {
                Ok((length, Some(from))) => (length, from),
                Err(nix::errno::Errno::EAGAIN) => break,
                // An error of an earlier request: there may be more behind it.
                Ok((_, None)) | Err(_) => continue,
            };
            let from = match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
                (Some(v4), _) => IpAddr::V4(v4.ip()),
                (None, Some(v6)) => IpAddr::V6(v6.ip()),
                (None, None) => continue,
            };
            let mut message = bytes.get(..length).unwrap_or(&[]);
            if *raw && from.is_ipv4() {
                // Length of the IP header in words of 4 bytes: lower half of its first byte.
                let header = message
                    .first()
                    .map_or(0, |first| usize::from(first & 15) * 4);
                message = message.get(header..).unwrap_or(&[]);
            }
            self.echo.handle(boot_time(), from, message);
        }
    }

    fn run(mut self) {
        // Without it a busy host may take its gateway for silent; the heartbeats' status says
        // that the priority is missing.
        let _ = realtime::raise_priority();
        let mut next = boot_time();
        let mut budget = MESSAGES_PER_PERIOD_MAX;
        let mut failure = None;
        loop {
            let now = boot_time();
            if now >= next {
                failure = self.ask().err();
                budget = MESSAGES_PER_PERIOD_MAX;
                next = now + self.config.period;
            }
            {
                let mut known = lock(&self.known);
                if known.stop {
                    return;
                }
                known.answered = self.echo.answered();
                let gateway = self.config.gateway;
                known.status = GatewayStatus {
                    age: None,
                    round_trip: self.echo.round_trip(),
                    failure: failure.map(|error| {
                        format!("cannot ask the gateway {gateway}: {error}; check the host's address and route to it")
                    }),
                    raw: self.socket.as_ref().is_some_and(|socket| socket.1),
                };
            }
            let timeout = next.saturating_sub(boot_time());
            let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            if let Some((fd, _)) = self.socket.as_ref().filter(|_| budget > 0) {
                fds.push(PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            }
            let timeout = nix::sys::time::TimeSpec::from_duration(timeout);
            // An interruption is as good as a time-out: the loop looks at everything.
            let _ = nix::poll::ppoll(&mut fds, Some(timeout), None);
            let mut counter = [0; 8];
            let _ = nix::unistd::read(&self.wake, &mut counter);
            self.drain(&mut budget);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beat::namespace::{in_namespace, ip};

    /// Long: the machine may be busy; what is waited for comes by itself.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn config(gateway: &str) -> GatewayConfig {
        GatewayConfig {
            gateway: gateway.parse().unwrap(),
            local: None,
            device: None,
            period: PERIOD_MIN,
        }
    }

    fn until(probe: &GatewayProbe, what: &str, so: impl Fn(&GatewayStatus) -> bool) {
        let deadline = boot_time() + PATIENCE;
        while !so(&probe.status()) {
            assert!(boot_time() < deadline, "never {what}: {:?}", probe.status());
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_gateway_answers_goes_and_answers_again() {
        in_namespace(|| {
            ip("addr add 10.9.0.254/32 dev lo");
            let probe = GatewayProbe::start(config("10.9.0.254")).unwrap();
            until(&probe, "answered", |s| s.age.is_some());
            let status = probe.status();
            assert!(status.raw && status.failure.is_none() && status.round_trip.is_some());
            ip("addr del 10.9.0.254/32 dev lo");
            until(&probe, "failing", |s| s.failure.is_some());
            let failure = probe.status().failure.unwrap();
            assert!(failure.contains("ENETUNREACH"), "{failure}");
            let grown = probe.status().age.unwrap() + PERIOD_MIN * 3;
            until(&probe, "older", |s| s.age > Some(grown));
            ip("addr add 10.9.0.254/32 dev lo");
            until(&probe, "fresh", |s| {
                s.age < Some(grown) && s.failure.is_none()
            });
        });
    }

    #[test]
    fn a_host_that_may_not_open_raw_sockets_asks_through_a_ping_socket() {
        in_namespace(|| {
            // The namespace's own: /proc/sys/net shows that of the thread that opens it.
            std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
            for (gateway, local) in [("127.0.0.1", "127.0.0.2"), ("::1", "::1")] {
                let mut config = config(gateway);
                config.local = Some(local.parse().unwrap());
                let probe = GatewayProbe::start(config).unwrap();
                until(&probe, "answered", |s| s.age.is_some());
                assert!(!probe.status().raw, "{gateway}");
            }
        });
    }

    #[test]
    fn ipv6_is_asked_through_a_raw_socket_too() {
        in_namespace(|| {
            let probe = GatewayProbe::start(config("::1")).unwrap();
            until(&probe, "answered", |s| s.age.is_some());
            assert!(probe.status().raw);
        });
    }

    #[test]
    fn a_gateway_that_answers_another_way_does_not_count() {
        in_namespace(|| {
            ip("link add plug type veth peer name hole");
            ip("link set plug up");
            ip("link set hole up");
            ip("addr add 10.9.0.1/24 dev plug");
            let mut config = config("10.9.0.254");
            config.device = Some("plug".to_owned());
            // It answers, but not through the interface that was asked for.
            ip("addr add 10.9.0.254/32 dev lo");
            let probe = GatewayProbe::start(config).unwrap();
            let asked = boot_time() + PERIOD_MIN * 5;
            until(&probe, "asked", |_| boot_time() > asked);
            assert_eq!(probe.status().age, None);
        });
    }

    #[test]
    fn a_configuration_without_sense_is_refused() {
        assert!(GatewayProbe::start(config("0.0.0.0")).is_err());
        let mut other_family = config("10.0.0.254");
        other_family.local = Some("::1".parse().unwrap());
        assert!(GatewayProbe::start(other_family).is_err());
        let mut hasty = config("10.0.0.254");
        hasty.period = Duration::ZERO;
        assert!(GatewayProbe::start(hasty).is_err());
    }
}
