//! Partners of other versions.

use super::links::{cabled_with, stream};
use super::*;

#[test]
fn with_a_partner_capped_to_version_1_one_link_is_used_and_frames_cross() {
    for capped in ["castor", "pollux"] {
        let cap = |config: &mut PairConfig| {
            if config.me == capped {
                config.settings.version_max = 1;
            }
        };
        let mut cabled = cabled_with(2, cap);
        assert_eq!(cabled.one.up().1.version, 1);
        assert_eq!(cabled.two.up().1.version, 1);
        stream(&mut cabled, 10, 200_000, |_, _| {});
        for side in [&cabled.one, &cabled.two] {
            let stats = side.interconnect.stats();
            assert_eq!((stats.version, stats.session), (1, Some(SessionId(1))));
            let up = stats.links.iter().filter(|l| l.state == LinkState::Up);
            assert_eq!(up.count(), 1, "{stats:#?}");
        }
        // That link dies: the other takes over, with a new session.
        let link = *cabled.one.standing.first().unwrap();
        cabled.relays[link].swallow(true);
        cabled.one.down();
        assert_eq!(cabled.one.up().0, SessionId(2));
        cabled.one.links_up(&[1 - link]);
    }
}

/// A hello that offers these versions.
async fn say_hello(raw: &Raw, to: SocketAddr, me: &str, low: u16, high: u16) -> quinn::Connection {
    let connection = raw.connect(to).await;
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let mut hello = b"PLXH".to_vec();
    hello.extend(low.to_le_bytes());
    hello.extend(high.to_le_bytes());
    hello.extend([u8::try_from(me.len()).unwrap(), 2]);
    hello.extend(me.as_bytes());
    hello.extend(b"b9");
    send.write_all(&hello).await.unwrap();
    let _ = connection.closed().await;
    connection
}

#[test]
fn a_partner_too_new_is_refused_naming_both_ranges() {
    let runtime = runtime();
    let (a, b) = sides(1);
    let mut two = start(b.config(&a), &runtime);
    let raw = a.raw_endpoint(&b, &runtime);
    let connection = runtime.block_on(say_hello(&raw, b.links[0], a.name, 7, 9));
    let told = connection.close_reason().unwrap().to_string();
    for reason in [two.refused(), told] {
        assert!(
            reason.contains("7 to 9") && reason.contains("1 to 2"),
            "{reason}"
        );
    }
}
