//! What the fuzzers run of this room (`crate::fuzzing`): datagrams, blocks on storage, and the
//! line with the keys. The input's first byte says whether the MAC is mended first.

use super::gate::{Addrs, Gate, Reason};
use super::keys::{Keyring, PoolKeys};
use super::packet::{
    self, HEADER_BYTES, Incarnation, KeyNumber, MAC_BYTES, Medium, NetworkIndex, PAYLOAD_BYTES_MAX,
    Sequence,
};
use super::seal::{DiskIndex, News, Opener, Sealer, Slot};
use crate::pool::HostName;
use ring::hmac;
use std::net::SocketAddr;

/// The input's first byte: mend what is cheap to say and hard to guess.
const MEND: u8 = 1;
/// Its second bit: the MAC is spoilt afterwards.
const SPOIL: u8 = 2;
const POOL: [u8; 16] = *b"the fuzzed pool.";
const PLACE: (DiskIndex, Slot) = (DiskIndex(1), Slot(2));

fn host(name: &str) -> HostName {
    HostName::new(name).expect("a name")
}

/// Always the same.
fn pool_keys() -> PoolKeys {
    let secret = "5a".repeat(32);
    let pool = uuid::Uuid::from_bytes(POOL);
    checked(&format!("pollux-pool-1.{pool}.1-{secret}.2-{secret}"))
        .parse()
        .expect("keys")
}

fn checked(body: &str) -> String {
    format!("{body}.{:08x}", crc32fast::hash(body.as_bytes()))
}

/// Take apart, and put together the same.
fn parts(medium: Medium, bytes: &[u8]) {
    if let Ok(parts) = packet::parse(medium, bytes) {
        assert!(parts.payload.len() <= PAYLOAD_BYTES_MAX && parts.mac.len() == MAC_BYTES);
        let mut again = Vec::new();
        parts.header.write(parts.payload, &mut again);
        assert_eq!(again, parts.signed);
        assert_eq!(bytes.len(), again.len() + MAC_BYTES + parts.rest.len());
    }
}

/// Write the MAC that the sender it names would have written, and perhaps spoil it. `None`: as
/// it came, which may be authentic or not.
fn mend(medium: Medium, bytes: &mut Vec<u8>, how: u8) -> Option<bool> {
    if how & MEND == 0 {
        return None;
    }
    // Length, and behind the payload nothing but the MAC.
    let payload = bytes.len().checked_sub(HEADER_BYTES)?;
    bytes.truncate(HEADER_BYTES + payload.min(PAYLOAD_BYTES_MAX));
    let length = u16::try_from(bytes.len() - HEADER_BYTES).unwrap_or(0);
    bytes[6..8].copy_from_slice(&length.to_le_bytes());
    bytes[8..24].copy_from_slice(&POOL);
    bytes.extend_from_slice(&[0; MAC_BYTES]);
    let header = packet::parse(medium, bytes).ok()?.header;
    let keyring = Keyring::new(&pool_keys());
    let key = keyring.sending_key(header.key, medium, &header.sender, header.incarnation)?;
    let signed = bytes.len() - MAC_BYTES;
    let mac = hmac::sign(&key, &bytes[..signed]);
    bytes[signed..].copy_from_slice(mac.as_ref());
    if how & SPOIL != 0 {
        bytes[signed] ^= 1;
    }
    Some(how & SPOIL == 0)
}

/// A datagram, to a host that knows one peer.
pub(crate) fn network(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    let authentic = mend(Medium::Network, &mut bytes, *how);
    parts(Medium::Network, &bytes);
    let from: SocketAddr = ([192, 0, 2, 1], 7445).into();
    let mut gate = Gate::new(host("me"), Incarnation(7), &pool_keys());
    let addrs: Addrs = [Some(from); packet::NETWORKS_MAX];
    gate.set_peers([(host("peer"), addrs)]);
    let network = NetworkIndex(bytes.get(5).copied().unwrap_or(0) & 3);
    match gate.accept(network, from, &bytes) {
        Ok(accepted) => {
            assert!(authentic != Some(false) && accepted.sender == host("peer"));
            assert!(accepted.incarnation > Incarnation(0) && accepted.sequence > Sequence(0));
            let again = gate.accept(network, from, &bytes);
            let reason = again.map(drop).map_err(|refused| refused.reason);
            assert_eq!(reason, Err(Reason::Replayed), "heard once");
        }
        Err(refused) => {
            let proven = matches!(refused.reason, Reason::Unproven | Reason::Replayed);
            assert!(authentic != Some(false) || !(proven || refused.learned));
            assert!(authentic != Some(true) || refused.reason != Reason::BadMac);
        }
    }
}

/// A block on storage. With its first byte's bit 2: one that this pool sealed, of which bytes
/// are changed; three bytes a change.
pub(crate) fn storage(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let keys = pool_keys();
    let mut opener = Opener::new(&keys);
    let (disk, slot) = PLACE;
    if how & 4 != 0 {
        let sealer = Sealer::new(host("peer"), Incarnation(3), &keys);
        let (payload, changes) = bytes.split_at(usize::from(how >> 3).min(bytes.len()));
        let sealed = sealer
            .seal(disk, slot, Sequence(9), payload)
            .expect("it fits");
        let mut block = sealed.clone();
        for change in changes.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % block.len();
            block[at] ^= change[2];
        }
        let opened = opener.open(disk, slot, &block);
        assert_eq!(opened.is_ok(), block == sealed);
        return;
    }
    let mut bytes = bytes.to_vec();
    let authentic = mend(Medium::Storage, &mut bytes, *how);
    parts(Medium::Storage, &bytes);
    let opened = opener.open(disk, slot, &bytes).map(|opened| opened.news);
    if let Ok(news) = opened {
        assert!(authentic != Some(false) && news == News::First);
        let again = opener.open(disk, slot, &bytes).map(|opened| opened.news);
        assert_eq!(again, Ok(News::Same));
    }
    assert!(authentic != Some(true) || opened != Err(Reason::BadMac));
}

/// The line with the keys. The first byte mends the line's checksum.
pub(crate) fn keys(data: &[u8]) {
    let Some((how, text)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    let line = if how & MEND == 0 {
        text.into_owned()
    } else {
        checked(&text)
    };
    let Ok(mut keys) = line.parse::<PoolKeys>() else {
        return;
    };
    assert_eq!(
        keys.to_line().parse::<PoolKeys>().ok().as_ref(),
        Some(&keys)
    );
    assert!(keys.present() > KeyNumber(0));
    let own = keys.clone();
    assert!(keys.import(&own).is_ok() && keys == own);
    // Each step of a change leaves what can be written and read again.
    type Step = fn(&mut PoolKeys) -> bool;
    let steps: [Step; 4] = [
        |keys| keys.begin().is_ok(),
        |keys| keys.switch().is_ok(),
        |keys| keys.finish().is_ok(),
        |keys| keys.give_up().is_ok(),
    ];
    for step in steps {
        step(&mut keys);
        assert_eq!(
            keys.to_line().parse::<PoolKeys>().ok().as_ref(),
            Some(&keys)
        );
    }
}

/// Inputs to begin with, by name: one as it is sent, and one whose MAC is to be mended.
type Seeds = Vec<(&'static str, Vec<u8>)>;

fn both(whole: &[u8]) -> Seeds {
    let unsigned = &whole[..whole.len() - MAC_BYTES];
    vec![
        ("sealed", [&[0], whole].concat()),
        ("unsigned", [&[MEND], unsigned].concat()),
    ]
}

pub(crate) fn network_seeds() -> Seeds {
    let addr: SocketAddr = ([192, 0, 2, 1], 7445).into();
    let gate = |me: &str, life, peer: &str| {
        let mut gate = Gate::new(host(me), Incarnation(life), &pool_keys());
        gate.set_peers([(host(peer), [Some(addr); packet::NETWORKS_MAX])]);
        gate
    };
    let (me, mut peer) = (gate("me", 7, "peer"), gate("peer", 3, "me"));
    let (network, mut out) = (NetworkIndex(1), Vec::new());
    // It learns of this life, and echoes it.
    me.seal(&host("peer"), network, Sequence(1), b"", &mut out);
    let _ = peer.accept(network, addr, &out);
    peer.seal(&host("me"), network, Sequence(9), b"report", &mut out);
    both(&out)
}

pub(crate) fn storage_seeds() -> Seeds {
    let sealer = Sealer::new(host("peer"), Incarnation(3), &pool_keys());
    let block = sealer.seal(PLACE.0, PLACE.1, Sequence(9), b"report");
    let mut seeds = both(&block.expect("it fits"));
    seeds.push(("untouched", [&[4 | 6 << 3], &b"report"[..]].concat()));
    seeds.push((
        "changed",
        [&[4 | 6 << 3], &b"report\x20\0\x01"[..]].concat(),
    ));
    seeds
}

pub(crate) fn keys_seeds() -> Seeds {
    let line = pool_keys().to_line();
    let body = line.rsplit_once('.').map_or("", |(body, _)| body);
    vec![
        ("line", [&[0], line.as_bytes()].concat()),
        ("unchecked", [&[MEND], body.as_bytes()].concat()),
    ]
}
