//! Two hosts in network namespaces with links between them.

use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// One of the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The sender's host.
    A,
    /// The receiver's.
    B,
}

/// What a link is like.
#[derive(Clone, Copy, Debug)]
pub struct LinkKind {
    /// MTU of its interfaces, in bytes.
    pub mtu_bytes: u16,
    /// Capped (token bucket) to so many Mbit/s in both directions; `None`: as fast as it goes.
    pub mbit_per_s: Option<u32>,
}

/// Queue of a token bucket, in ms of its rate: deep enough that only the sender's own
/// restraint keeps it short, as in a switch with large buffers.
const BUCKET_QUEUE_MS: u32 = 100;

/// Two namespaces and the links between them; removed when dropped.
#[derive(Debug)]
pub struct Net {
    names: [String; 2],
    links: usize,
}

/// Runs a command to its end.
///
/// # Errors
/// If it cannot be started or fails, with what it said.
pub fn run(words: &[&str]) -> Result<()> {
    let output = Command::new(words[0])
        .args(&words[1..])
        .output()
        .with_context(|| format!("start `{}`", words.join(" ")))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

impl Net {
    /// Makes both hosts with one link for each of `links`.
    ///
    /// # Errors
    /// If a command fails (needs root and iproute2); nothing is left behind then.
    pub fn new(links: &[LinkKind]) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |side| format!("plxwire-{}-{count}{side}", std::process::id());
        let net = Self {
            names: [name('a'), name('b')],
            links: links.len(),
        };
        for side in [Side::A, Side::B] {
            run(&["ip", "netns", "add", net.name(side)])?;
            net.ip(side, &["link", "set", "lo", "up"])?;
        }
        for (index, kind) in links.iter().enumerate() {
            let (mtu, dev) = (kind.mtu_bytes.to_string(), format!("wire{index}"));
            let [a, b] = &net.names;
            run(&[
                "ip", "link", "add", &dev, "mtu", &mtu, "netns", a, "type", "veth", "peer", "name",
                &dev, "mtu", &mtu, "netns", b,
            ])?;
            for side in [Side::A, Side::B] {
                let address = format!("{}/24", net.address(side, index));
                net.ip(side, &["addr", "add", &address, "dev", &dev])?;
                net.ip(side, &["link", "set", &dev, "up"])?;
                net.cap(side, index, kind.mbit_per_s)?;
            }
        }
        Ok(net)
    }

    /// Caps what `side` sends on a link, or lifts the cap.
    ///
    /// # Errors
    /// If `tc` fails.
    pub fn cap(&self, side: Side, link: usize, mbit_per_s: Option<u32>) -> Result<()> {
        let dev = format!("wire{link}");
        let ns = self.name(side);
        let Some(mbit) = mbit_per_s else {
            // There may be none to remove.
            let _ = run(&["tc", "-n", ns, "qdisc", "del", "dev", &dev, "root"]);
            return Ok(());
        };
        // The bucket must hold what one send may be (64 KiB) and a ms of its rate.
        let burst = (mbit * 125).max(128 << 10).to_string();
        run(&[
            "tc",
            "-n",
            ns,
            "qdisc",
            "replace",
            "dev",
            &dev,
            "root",
            "tbf",
            "rate",
            &format!("{mbit}mbit"),
            "burst",
            &burst,
            "latency",
            &format!("{BUCKET_QUEUE_MS}ms"),
        ])
    }

    /// Takes a link down or up again, on `side`.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn set_up(&self, side: Side, link: usize, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.ip(side, &["link", "set", &format!("wire{link}"), state])
    }

    /// Swallows everything `side` sends on a link from now on: a cable cut in the middle,
    /// which no interface notices.
    ///
    /// # Errors
    /// If `tc` fails.
    pub fn swallow(&self, side: Side, link: usize) -> Result<()> {
        let dev = format!("wire{link}");
        let ns = self.name(side);
        // A queue of one packet behind a bucket that never fills: nothing gets out.
        run(&[
            "tc", "-n", ns, "qdisc", "replace", "dev", &dev, "root", "tbf", "rate", "8bit",
            "burst", "1", "limit", "1",
        ])
    }

    fn ip(&self, side: Side, words: &[&str]) -> Result<()> {
        run(&[&["ip", "-n", self.name(side)], words].concat())
    }

    /// The namespace of a host.
    #[must_use]
    pub fn name(&self, side: Side) -> &str {
        match side {
            Side::A => &self.names[0],
            Side::B => &self.names[1],
        }
    }

    /// Address of a host on a link.
    #[must_use]
    pub fn address(&self, side: Side, link: usize) -> Ipv4Addr {
        let host = if side == Side::A { 1 } else { 2 };
        Ipv4Addr::new(10, 77, u8::try_from(link).unwrap_or(u8::MAX), host)
    }

    /// How many links there are.
    #[must_use]
    pub fn links(&self) -> usize {
        self.links
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // Interfaces go with their namespace.
        for name in &self.names {
            let _ = run(&["ip", "netns", "del", name]);
        }
    }
}
