//! What the pool's heartbeats cost: sealing and opening one packet by the means there are, and
//! the share of a processor that the thread of one host takes in a pool of the largest size.
//!
//! `cargo bench -p pollux-bench --bench beat`; docs/heartbeats.md holds the numbers. All hosts
//! run in this process on loopback addresses; only one of them, which has all others as peers,
//! is measured, by the time its thread was on a processor (/proc/PID/task/TID/schedstat).

use anyhow::{Context, Result};
use pollux::beat::{
    HOSTS_MAX, Incarnation, Network, NetworkIndex, PACKET_BYTES_MAX, PAYLOAD_BYTES_MAX,
    PERIOD_DEFAULT, Peer, PoolKeys, Transport, TransportConfig,
};
use pollux::pool::HostName;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use ring::{hkdf, hmac};
use std::hint::black_box;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Repetitions of one operation.
const TIMES: u32 = 2_000;
/// How long the thread is watched.
const WATCH: Duration = Duration::from_secs(20);
/// Networks of the load.
const NETWORKS: u8 = 4;
/// Port of the load.
const PORT: u16 = 27_445;

fn micros(what: &str, mut operation: impl FnMut()) {
    for _ in 0..TIMES / 10 {
        operation();
    }
    let start = Instant::now();
    for _ in 0..TIMES {
        operation();
    }
    let each = start.elapsed() / TIMES;
    println!("{what:<44} {:>8.2} us", each.as_secs_f64() * 1e6);
}

fn operations() -> Result<()> {
    let random = ring::rand::SystemRandom::new();
    let pair = Ed25519KeyPair::generate_pkcs8(&random)
        .and_then(|document| Ok(Ed25519KeyPair::from_pkcs8(document.as_ref())?))
        .ok()
        .context("an ed25519 key")?;
    let public = UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref());
    let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[7; 16]).extract(&[7; 32]);
    micros("derive a sending key (HKDF)", || {
        let okm = prk.expand(&[b"some", b"info"], hmac::HMAC_SHA256);
        black_box(okm.map(hmac::Key::from)).ok();
    });
    for bytes in [1_200, PACKET_BYTES_MAX] {
        let packet = vec![7; bytes];
        let (mac, signature) = (hmac::sign(&key, &packet), pair.sign(&packet));
        micros(&format!("HMAC-SHA256, {bytes} bytes: seal"), || {
            black_box(hmac::sign(&key, &packet));
        });
        micros(&format!("HMAC-SHA256, {bytes} bytes: check"), || {
            black_box(hmac::verify(&key, &packet, mac.as_ref())).ok();
        });
        micros(&format!("Ed25519, {bytes} bytes: sign"), || {
            black_box(pair.sign(&packet));
        });
        micros(&format!("Ed25519, {bytes} bytes: verify"), || {
            black_box(public.verify(&packet, signature.as_ref())).ok();
        });
    }
    Ok(())
}

/// Time the heartbeat thread that runs was on a processor.
fn on_processor(task: &str) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{task}/schedstat"))?;
    let first = text.split(' ').next().context("a figure")?;
    Ok(Duration::from_nanos(first.parse()?))
}

fn thread() -> Result<String> {
    for _ in 0..1_000 {
        for entry in std::fs::read_dir("/proc/self/task")? {
            let path = entry?.path();
            if std::fs::read_to_string(path.join("comm"))?.trim() == "pool-beat" {
                let name = path.file_name().context("a name")?;
                return Ok(name.to_string_lossy().into_owned());
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    anyhow::bail!("the heartbeat thread never ran")
}

fn name(host: usize) -> Result<HostName> {
    Ok(HostName::new(format!("host-{host}"))?)
}

fn addr(host: usize, network: u8) -> Result<SocketAddr> {
    let last = u8::try_from(host + 1)?;
    Ok(SocketAddr::from(([127, 1, network, last], PORT)))
}

fn peer(host: usize) -> Result<Peer> {
    let addrs = (0..NETWORKS).map(|n| Ok((NetworkIndex(n), addr(host, n)?)));
    Ok(Peer {
        name: name(host)?,
        addrs: addrs.collect::<Result<_>>()?,
    })
}

fn load(payload_bytes: usize) -> Result<()> {
    let keys = PoolKeys::create()?;
    let start = |host: usize, peers: Vec<Peer>| -> Result<_> {
        let networks = (0..NETWORKS).map(|n| {
            Ok(Network {
                index: NetworkIndex(n),
                local: addr(host, n)?,
                device: None,
            })
        });
        Ok(Transport::start(TransportConfig {
            me: name(host)?,
            incarnation: Incarnation(1),
            keys: keys.clone(),
            networks: networks.collect::<Result<_>>()?,
            peers,
            period: PERIOD_DEFAULT,
        })?)
    };
    let all = (1..HOSTS_MAX).map(peer).collect::<Result<Vec<_>>>()?;
    let all_peers = all.len() as u128;
    let measured = start(0, all)?;
    let task = thread()?;
    let mut hosts = vec![measured];
    for host in 1..HOSTS_MAX {
        hosts.push(start(host, vec![peer(0)?])?);
    }
    let beat = |duration: Duration| -> Result<()> {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            let next = Instant::now() + PERIOD_DEFAULT;
            for (transport, _) in &hosts {
                transport.publish(vec![7; payload_bytes])?;
            }
            for (_, inbox) in &hosts {
                black_box(inbox.wait(Duration::ZERO));
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        Ok(())
    };
    let packets = || {
        let paths = hosts[0].0.status().paths;
        let sent: u64 = paths.iter().map(|path| path.sent).sum();
        let received: u64 = paths.iter().map(|path| path.received).sum();
        (sent, received)
    };
    beat(PERIOD_DEFAULT * 6)?;
    let (before, packets_before) = (on_processor(&task)?, packets());
    let start = Instant::now();
    beat(WATCH)?;
    let (watched, used) = (start.elapsed(), on_processor(&task)? - before);
    let (sent, received) = packets();
    let (sent, received) = (sent - packets_before.0, received - packets_before.1);
    let expected =
        u128::from(NETWORKS) * all_peers * watched.as_millis() / PERIOD_DEFAULT.as_millis();
    println!(
        "{HOSTS_MAX} hosts, {NETWORKS} networks, {payload_bytes} bytes each {PERIOD_DEFAULT:?}: {:.2} % of one processor; sent {sent}, received {received}, of {expected} each",
        used.as_secs_f64() / watched.as_secs_f64() * 100.0
    );
    Ok(())
}

/// A stranger sends as much as it can on all networks, from the address of a peer: packets of
/// the largest size in which all is right but the MAC.
fn flood() -> Result<()> {
    let keys = PoolKeys::create()?;
    let start = |host: usize, other: usize| -> Result<_> {
        let networks = (0..NETWORKS).map(|n| {
            Ok(Network {
                index: NetworkIndex(n),
                local: addr(host, n)?,
                device: None,
            })
        });
        Ok(Transport::start(TransportConfig {
            me: name(host)?,
            incarnation: Incarnation(1),
            keys: keys.clone(),
            networks: networks.collect::<Result<_>>()?,
            peers: vec![peer(other)?],
            period: PERIOD_DEFAULT,
        })?)
    };
    // One real packet on each network shows how they look.
    let taps = (0..NETWORKS)
        .map(|n| Ok(UdpSocket::bind(addr(0, n)?)?))
        .collect::<Result<Vec<_>>>()?;
    let (transport, _inbox) = start(1, 0)?;
    transport.publish(vec![7; PAYLOAD_BYTES_MAX])?;
    let mut forged = Vec::new();
    for tap in &taps {
        let mut packet = vec![0; PACKET_BYTES_MAX];
        tap.recv(&mut packet)?;
        packet[PACKET_BYTES_MAX - 1] ^= 1;
        forged.push(packet);
    }
    drop((taps, transport));
    let (transport, _inbox) = start(0, 1)?;
    let task = thread()?;
    let stop = AtomicBool::new(false);
    let strangers = (0..NETWORKS)
        .map(|n| Ok((UdpSocket::bind(addr(1, n)?)?, addr(0, n)?)))
        .collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        for ((socket, to), packet) in strangers.iter().zip(&forged) {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = socket.send_to(packet, to);
                }
            });
        }
        std::thread::sleep(PERIOD_DEFAULT * 4);
        let (before, start) = (on_processor(&task), Instant::now());
        std::thread::sleep(WATCH / 2);
        let (after, watched) = (on_processor(&task), start.elapsed());
        stop.store(true, Ordering::Relaxed);
        let used = after? - before?;
        let status = transport.status();
        let refused: u64 = status
            .paths
            .iter()
            .flat_map(|path| path.refused.iter().map(|refused| refused.1))
            .sum();
        println!(
            "flooded on {NETWORKS} networks: {:.2} % of one processor; {refused} refused, periods cut short: {}",
            used.as_secs_f64() / watched.as_secs_f64() * 100.0,
            status
                .networks
                .iter()
                .map(|network| network.flooded)
                .sum::<u64>(),
        );
        Ok(())
    })
}

fn main() -> Result<()> {
    operations()?;
    flood()?;
    for bytes in [1_000, PAYLOAD_BYTES_MAX] {
        load(bytes)?;
    }
    Ok(())
}
