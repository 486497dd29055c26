//! What the figures of a pair mean for mirroring, in numbers and in words. Pure.
//!
//! A mirrored VM sends one epoch after the other and lets the next begin when the last is
//! acknowledged, so what it can dirty for long is what goes through in large epochs, one at a
//! time with their round trips: never more than the goodput, and less on a long path.

use crate::api::links::{LARGE_EPOCH_PAGES, LinkFigures, Meaning, PathFigures, SMALL_EPOCH_PAGES};

/// A page, bytes.
const PAGE_BYTES: u64 = 4096;
/// Below this goodput mirroring is slow whatever the guest does: 1 Gbit/s.
const GOODPUT_LOW: u64 = 125_000_000;
/// UDP payload of a packet above which a link surely uses jumbo frames.
const JUMBO_BYTES: u16 = 8_000;
/// Lost packets that are worth a word: a private link loses none.
const LOST_MIN: u64 = 10;
/// One of so many.
const LOST_ONE_IN_MAX: u64 = 10_000;
/// Links that carry so many times what another one does are unequal.
const UNEQUAL_FACTOR: u64 = 2;
/// Heartbeats may be so much later than their period while links are full, microseconds:
/// what the product promises.
const HEARTBEAT_LATE_US: u64 = 5_000;
/// A round trip that is worth a word, microseconds: a cable takes 50 to 200.
const RTT_LONG_US: u64 = 2_000;

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate for people"
)]
fn scaled(bytes_per_s: u64, ratio: f64) -> u64 {
    (bytes_per_s as f64 * ratio) as u64
}

fn megabytes(bytes_per_s: u64) -> String {
    let tenths = bytes_per_s / 100_000;
    if tenths >= 1000 {
        format!("{} MB/s", tenths / 10)
    } else {
        format!("{}.{} MB/s", tenths / 10, tenths % 10)
    }
}

fn millis(us: u64) -> String {
    format!("{}.{:02} ms", us / 1000, us % 1000 / 10)
}

/// What `path` means; `ratio` is what the encoder makes of the VMs mirrored now.
pub(super) fn of(path: &PathFigures, ratio: Option<f64>) -> Meaning {
    let large_bytes = LARGE_EPOCH_PAGES * PAGE_BYTES;
    let in_epochs = (large_bytes * 1_000_000)
        .checked_div(path.large_epoch_us.p50)
        .unwrap_or(path.goodput_bytes_per_s);
    let dirty_bytes_per_s = in_epochs.min(path.goodput_bytes_per_s);
    let dirty_pages_per_s = dirty_bytes_per_s / PAGE_BYTES;
    // A ratio below one would be an encoder that makes pages larger: it sends those raw.
    let ratio = ratio.filter(|r| r.is_finite() && *r >= 1.0);
    let encoded = ratio.map(|r| scaled(dirty_bytes_per_s, r));
    let (small, large) = (path.small_epoch_us, path.large_epoch_us);
    // The oldest thing in an epoch is as old as the epoch is long when it is cut; epochs
    // are as long as the one before takes to be acknowledged.
    let (small_lag_us, large_lag_us) = (2 * small.p50, 2 * large.p50);
    let mut words = vec![format!(
        "A guest may dirty {dirty_pages_per_s} pages ({}) a second for long if every page goes as it is; beyond that it is slowed.",
        megabytes(dirty_bytes_per_s)
    )];
    words.push(match (ratio, encoded) {
        (Some(ratio), Some(encoded)) => format!(
            "The VMs mirrored now shrink to one part in {ratio:.1}: with that it is {}, as far as the encoder keeps up.",
            megabytes(encoded)
        ),
        _ => "What the encoder saves is known once a VM is mirrored.".into(),
    });
    words.push(format!(
        "What the guest sends waits for its epoch: {} here with {SMALL_EPOCH_PAGES} dirty pages (99 of 100 within {}), {} with {LARGE_EPOCH_PAGES} ({}); the pause of the checkpoint comes on top.",
        millis(small.p50),
        millis(small.p99),
        millis(large.p50),
        millis(large.p99)
    ));
    words.push(format!(
        "Replication lag to expect: from {} (small epochs) to {} (epochs of {LARGE_EPOCH_PAGES} pages), plus two pauses.",
        millis(small_lag_us),
        millis(large_lag_us)
    ));
    Meaning {
        dirty_pages_per_s,
        dirty_bytes_per_s,
        codec_ratio: ratio,
        encoded_dirty_bytes_per_s: encoded,
        small_latency_us: small,
        large_latency_us: large,
        small_lag_us,
        large_lag_us,
        words,
    }
}

/// What should be looked at.
pub(super) fn warnings(
    path: &PathFigures,
    links: &[LinkFigures],
    heartbeat_gap_us: u64,
    heartbeat_period_us: u64,
) -> Vec<String> {
    let mut out = Vec::new();
    if path.goodput_bytes_per_s < GOODPUT_LOW {
        out.push(format!(
            "the links carry {} together, less than 1 Gbit/s: mirror small VMs only, and set `compress = true` in their specs",
            megabytes(path.goodput_bytes_per_s)
        ));
    }
    if path.rtt_us.p50 > RTT_LONG_US {
        out.push(format!(
            "a round trip takes {}: every answer of a mirrored guest waits for one; a cable takes 0.05 to 0.20 ms",
            millis(path.rtt_us.p50)
        ));
    }
    for link in links {
        let (name, mtu) = (link.link, link.mtu_bytes);
        if link.sent_packets == 0 {
            out.push(format!(
                "link {name} ({} - {}) carried nothing: it is down, see `pollux link show`",
                link.local, link.peer
            ));
            continue;
        }
        if mtu < JUMBO_BYTES {
            out.push(format!(
                "link {name} sends packets of {mtu} bytes: with an MTU of 9000 on both hosts (and on a switch between them) each costs less CPU for its bytes"
            ));
        }
        if link.lost_packets >= LOST_MIN && link.lost_packets > link.sent_packets / LOST_ONE_IN_MAX
        {
            out.push(format!(
                "link {name} lost {} of {} packets: look at the cable, the ports' error counters, and the sizes of the socket buffers",
                link.lost_packets, link.sent_packets
            ));
        }
    }
    // What a link was given says little: one that is fast enough leaves nothing to the others.
    let known = || {
        links
            .iter()
            .filter_map(|l| Some((l.capacity_bytes_per_s?, l.link)))
    };
    if let (Some((most, best)), Some((least, worst))) = (known().max(), known().min())
        && most > UNEQUAL_FACTOR * least
    {
        out.push(format!(
            "links are unequal: link {best} carries {}, link {worst} {}; that works, but if the faster one fails mirrored guests are slowed to what the other carries",
            megabytes(most),
            megabytes(least)
        ));
    }
    if heartbeat_gap_us > heartbeat_period_us + HEARTBEAT_LATE_US {
        out.push(format!(
            "no heartbeat of the partner for {} while the links were full (one is sent every {}): its host or this one is short of CPU time",
            millis(heartbeat_gap_us),
            millis(heartbeat_period_us)
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Percentiles;

    fn all(us: u64) -> Percentiles {
        Percentiles {
            p50: us,
            p90: us,
            p99: us,
            max: us,
        }
    }

    fn path() -> PathFigures {
        PathFigures {
            rtt_us: all(100),
            goodput_bytes_per_s: 1_000_000_000,
            small_epoch_us: all(300),
            large_epoch_us: all(5_000),
        }
    }

    fn link(index: usize) -> LinkFigures {
        LinkFigures {
            link: index,
            local: "10.0.0.1:7443".parse().unwrap(),
            peer: "10.0.0.2:7443".parse().unwrap(),
            rtt_us: all(100),
            sent_bytes_per_s: 500_000_000,
            capacity_bytes_per_s: Some(500_000_000),
            sent_packets: 1_000_000,
            lost_packets: 0,
            mtu_bytes: 8_972,
        }
    }

    #[test]
    fn what_a_guest_may_dirty_is_what_goes_through_in_epochs() {
        let meaning = of(&path(), None);
        // 4,096,000 bytes every 5 ms.
        assert_eq!(meaning.dirty_bytes_per_s, 819_200_000);
        assert_eq!(meaning.dirty_pages_per_s, 200_000);
        assert_eq!((meaning.small_lag_us, meaning.large_lag_us), (600, 10_000));
        assert_eq!(meaning.encoded_dirty_bytes_per_s, None);
        // Never more than the links carry.
        let mut quick = path();
        quick.large_epoch_us = all(1);
        assert_eq!(of(&quick, None).dirty_bytes_per_s, 1_000_000_000);
        quick.large_epoch_us = all(0);
        assert_eq!(of(&quick, None).dirty_bytes_per_s, 1_000_000_000);
    }

    #[test]
    fn the_encoders_ratio_counts_once_it_is_known() {
        let meaning = of(&path(), Some(2.5));
        assert_eq!(meaning.encoded_dirty_bytes_per_s, Some(2_048_000_000));
        assert!(meaning.words.iter().any(|w| w.contains("one part in 2.5")));
        for nonsense in [0.5, f64::NAN, f64::INFINITY] {
            assert_eq!(of(&path(), Some(nonsense)).codec_ratio, None);
        }
    }

    #[test]
    fn a_good_pair_has_no_warnings() {
        let none = warnings(&path(), &[link(0), link(1)], 11_000, 10_000);
        assert_eq!(none, [""; 0]);
    }

    #[test]
    fn each_fault_is_told_with_what_to_do() {
        let told = |change: &dyn Fn(&mut PathFigures, &mut LinkFigures), gap| {
            let (mut path, mut second) = (path(), link(1));
            change(&mut path, &mut second);
            warnings(&path, &[link(0), second], gap, 10_000)
        };
        for (said, word) in [
            (
                told(&|p, _| p.goodput_bytes_per_s = 100_000_000, 0),
                "less than 1 Gbit/s",
            ),
            (told(&|p, _| p.rtt_us = all(3_000), 0), "3.00 ms"),
            (told(&|_, l| l.mtu_bytes = 1_472, 0), "MTU of 9000"),
            (told(&|_, l| l.lost_packets = 200, 0), "lost 200 of 1000000"),
            (
                told(&|_, l| l.capacity_bytes_per_s = Some(100_000_000), 0),
                "unequal",
            ),
            (told(&|_, l| l.sent_packets = 0, 0), "carried nothing"),
            (told(&|_, _| (), 16_000), "no heartbeat"),
        ] {
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].contains(word), "{said:?}");
        }
        // It was not needed, and nobody knows what it carries.
        let idle = |_: &mut PathFigures, l: &mut LinkFigures| {
            (l.sent_bytes_per_s, l.capacity_bytes_per_s) = (400_000, None);
        };
        assert!(told(&idle, 0).is_empty());
        // A handful of losses happens.
        assert!(told(&|_, l| l.lost_packets = 9, 0).is_empty());
    }
}
