//! Pairs and links as text for people.

use crate::api::links::{LaneStatus, LinkHealth, LinkStatus, PairStatus};
use crate::api::types::{LinkConfig, PartnerStatus};
use crate::cli::show::micros;
use serde::Serialize;
use std::fmt::Write;

/// Events shown of a pair.
const EVENTS_SHOWN: usize = 12;

/// One line of `pollux link list`.
#[derive(Serialize)]
pub(super) struct Entry {
    /// As pinned.
    #[serde(flatten)]
    config: LinkConfig,
    /// Whether a session stands.
    connected: bool,
    /// Smoothed round-trip time, microseconds.
    rtt_us: Option<u64>,
    /// State of each link.
    states: Vec<LinkHealth>,
    /// Why there is no session.
    last_error: Option<String>,
}

pub(super) fn entries(links: Vec<LinkConfig>, partners: &[PartnerStatus]) -> Vec<Entry> {
    links
        .into_iter()
        .map(|config| {
            let status = partners.iter().find(|p| p.name == config.partner);
            let connected = status.is_some_and(|p| p.connected);
            Entry {
                connected,
                rtt_us: status.filter(|_| connected).and_then(|p| p.rtt_us),
                states: status.map(|p| p.links.clone()).unwrap_or_default(),
                last_error: status
                    .filter(|_| !connected)
                    .and_then(|p| p.last_error.clone()),
                config,
            }
        })
        .collect()
}

const fn health(state: LinkHealth) -> &'static str {
    match state {
        LinkHealth::Down => "down",
        LinkHealth::Suspect => "suspect",
        LinkHealth::Up => "up",
    }
}

/// Bytes a second as a person reads them.
pub(super) fn rate(bytes_per_s: u64) -> String {
    match bytes_per_s {
        0..10_000 => format!("{bytes_per_s} B/s"),
        10_000..1_000_000 => format!("{} kB/s", bytes_per_s / 1_000),
        1_000_000..100_000_000 => format!(
            "{}.{} MB/s",
            bytes_per_s / 1_000_000,
            bytes_per_s / 100_000 % 10
        ),
        100_000_000..10_000_000_000 => format!("{} MB/s", bytes_per_s / 1_000_000),
        _ => format!("{} GB/s", bytes_per_s / 1_000_000_000),
    }
}

/// Bytes as a person reads them.
fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{} KiB", bytes >> 10),
        10_485_760..10_737_418_240 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

/// A part of a whole, in percent.
fn percent(part: u64, whole: u64) -> String {
    if part == 0 {
        return "0 %".into();
    }
    let hundredths = u128::from(part) * 10_000 / u128::from(whole.max(1));
    if hundredths == 0 {
        "< 0.01 %".into()
    } else {
        format!("{}.{:02} %", hundredths / 100, hundredths % 100)
    }
}

fn or_dash<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".into(), show)
}

pub(super) fn list(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "no partners; make a link with `pollux link create`\n".into();
    }
    let mut out = format!(
        "{:<16} {:<13} {:>9}  {}\n",
        "PARTNER", "SESSION", "RTT", "LINKS"
    );
    for entry in entries {
        let session = if entry.connected { "connected" } else { "down" };
        let links: Vec<_> = entry
            .config
            .links
            .iter()
            .enumerate()
            .map(|(i, link)| {
                let state = entry.states.get(i).map_or("unknown", |s| health(*s));
                format!("{} - {} {state}", link.local, link.peer)
            })
            .collect();
        let _ = writeln!(
            out,
            "{:<16} {session:<13} {:>9}  {}",
            entry.config.partner.as_str(),
            or_dash(entry.rtt_us, micros),
            links.join(", ")
        );
        if let Some(error) = &entry.last_error {
            let _ = writeln!(out, "  {error}");
        }
    }
    out
}

pub(super) fn pair(pair: &PairStatus) -> String {
    let mut out = format!("partner      {}\n", pair.partner);
    let session = if pair.connected {
        format!("connected, protocol version {}", pair.version)
    } else {
        let why = pair.last_error.as_deref().unwrap_or("no session so far");
        format!("down: {why}")
    };
    let _ = writeln!(out, "session      {session}");
    let heard = pair.heard_us_ago.map_or("never heard".into(), |us| {
        format!("heard {} ago", micros(us))
    });
    let _ = writeln!(out, "heartbeats   {}, {heard}", pair.verdict);
    if !pair.realtime {
        out.push_str("  WARNING heartbeats run without real-time priority\n");
    }
    for (i, pin) in pair.pinned.iter().enumerate() {
        let what = if i == 0 {
            "pinned      "
        } else {
            "and, to come"
        };
        let _ = writeln!(out, "{what} {pin}");
    }
    links(&mut out, &pair.links);
    lanes(&mut out, &pair.lanes);
    for vm in &pair.encoding {
        let f = &vm.figures;
        let ratio = or_dash(f.ratio(), |r| format!("1 : {r:.1}"));
        let _ = writeln!(
            out,
            "\nencoding of {}: {} -> {} ({ratio}), {} an epoch (p99 {})\n  pages: {} zero, {} unchanged, {} delta, {} compressed, {} raw",
            vm.vm,
            size(f.raw_bytes),
            size(f.encoded_bytes),
            micros(f.encode_us.p50),
            micros(f.encode_us.p99),
            f.pages_zero,
            f.pages_unchanged,
            f.pages_delta,
            f.pages_compressed,
            f.pages_raw,
        );
    }
    if !pair.events.is_empty() {
        out.push_str("\nevents (seconds since the host's start)\n");
    }
    let skip = pair.events.len().saturating_sub(EVENTS_SHOWN);
    for event in &pair.events[skip..] {
        let ms = event.at_ns / 1_000_000;
        let _ = writeln!(out, "  {:>8}.{:03}  {}", ms / 1000, ms % 1000, event.what);
    }
    out
}

fn links(out: &mut String, links: &[LinkStatus]) {
    let _ = writeln!(
        out,
        "\n{:<4} {:<8} {:>9} {:>9} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9} {:>5} {:>5}  ADDRESSES",
        "LINK",
        "STATE",
        "FOR",
        "RTT",
        "CAPACITY",
        "OUT",
        "IN",
        "LOSS",
        "RESENT",
        "IN FLIGHT",
        "FLAPS",
        "MTU"
    );
    for l in links {
        let _ = writeln!(
            out,
            "{:<4} {:<8} {:>9} {:>9} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9} {:>5} {:>5}  {} - {}",
            l.link,
            health(l.state),
            micros(l.since_us),
            or_dash(l.rtt_us, micros),
            or_dash(l.capacity_bytes_per_s, rate),
            or_dash(l.sent_bytes_per_s, rate),
            or_dash(l.received_bytes_per_s, rate),
            percent(l.lost_packets, l.sent_packets),
            size(l.resent_bytes),
            size(l.in_flight_bytes),
            l.flaps,
            l.mtu_bytes,
            l.local,
            l.peer
        );
        if let Some(error) = l.last_error.as_ref().filter(|_| l.state != LinkHealth::Up) {
            let _ = writeln!(out, "     {error}");
        }
    }
}

fn lanes(out: &mut String, lanes: &[LaneStatus]) {
    if lanes.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "\n{:<8} {:<4} {:<36} {:>4} {:>9} {:>9} {:>10} {:>9} {:>9} {:>9} {:>7}",
        "LANE",
        "WAY",
        "VM",
        "GEN",
        "FRAMES",
        "BYTES",
        "LATELY",
        "QUEUED",
        "UNACKED",
        "REPEATED",
        "EXPIRED"
    );
    for l in lanes {
        let _ = writeln!(
            out,
            "{:<8} {:<4} {:<36} {:>4} {:>9} {:>9} {:>10} {:>9} {:>9} {:>9} {:>7}",
            l.kind,
            if l.outgoing { "out" } else { "in" },
            l.vm.as_deref().unwrap_or("-"),
            l.generation,
            l.frames,
            size(l.bytes),
            or_dash(l.bytes_per_s, rate),
            size(l.queued_bytes),
            size(l.unacked_bytes),
            size(l.repeated_bytes),
            l.expired_frames
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::LinkAddrs;
    use crate::pool::HostName;

    #[test]
    fn numbers_read_well() {
        let rates: Vec<_> = [0, 9_999, 10_000, 1_250_000, 125_000_000, 12_500_000_000]
            .map(rate)
            .into();
        assert_eq!(
            rates,
            [
                "0 B/s", "9999 B/s", "10 kB/s", "1.2 MB/s", "125 MB/s", "12 GB/s"
            ]
        );
        assert_eq!(size(4096), "4096 B");
        assert_eq!(size(16 << 20), "16 MiB");
        assert_eq!(percent(0, 0), "0 %");
        assert_eq!(percent(1, 1_000_000), "< 0.01 %");
        assert_eq!(percent(1, 100), "1.00 %");
        assert_eq!(percent(50, 100), "50.00 %");
    }

    #[test]
    fn a_pair_is_one_line_with_the_state_of_each_link() {
        let link = |a: &str, b: &str| LinkAddrs {
            local: a.parse().unwrap(),
            peer: b.parse().unwrap(),
        };
        let name = HostName::new("b").unwrap();
        let config = LinkConfig {
            partner: name.clone(),
            fingerprint: "sha256:00".into(),
            next_fingerprint: None,
            links: vec![
                link("10.0.0.1:7443", "10.0.0.2:7443"),
                link("10.0.1.1:7443", "10.0.1.2:7443"),
            ],
        };
        let status = PartnerStatus {
            name,
            connected: true,
            verdict: "alive".into(),
            heard_us_ago: None,
            rtt_us: Some(120),
            last_error: Some("old".into()),
            realtime: true,
            link: None,
            links: vec![LinkHealth::Up, LinkHealth::Suspect],
        };
        let text = list(&entries(vec![config.clone()], &[status]));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[1].contains("10.0.0.2:7443 up") && lines[1].contains("10.0.1.2:7443 suspect"),
            "{text}"
        );
        // Not known is not down.
        let text = list(&entries(vec![config], &[]));
        assert!(text.contains("unknown"), "{text}");
    }
}
