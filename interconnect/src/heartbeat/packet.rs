//! One heartbeat on the wire: fixed size, authenticated, safe against replay.
//!
//! All integers are little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXB` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | reserved, zero |
//! | 6 | 2 | index of the link it was sent on |
//! | 8 | 8 | incarnation of the sender's daemon |
//! | 16 | 8 | sequence number, rising with each datagram |
//! | 24 | 32 | HMAC-SHA256 over bytes 0..24 |
//!
//! Versions:
//! - 1: first.

use super::HeartbeatKey;
use ring::hmac;

const MAGIC: [u8; 4] = *b"PLXB";
const VERSION: u8 = 1;
const SIGNED_BYTES: usize = 24;
/// Size of a heartbeat, in bytes.
pub(super) const PACKET_BYTES: usize = SIGNED_BYTES + 32;
/// Most links of a pair: hosts have few private cables to one partner.
pub const LINKS_MAX: usize = 8;

/// A heartbeat that was authenticated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Heard {
    pub(super) incarnation: u64,
}

/// One key with what was heard under it. A key belongs to one QUIC session and so
/// to one incarnation of either daemon: another incarnation under it is a replay.
struct KeySlot {
    send: hmac::Key,
    receive: hmac::Key,
    incarnation: Option<u64>,
    /// Newest sequence number on each link: links may overtake each other.
    sequence: [u64; LINKS_MAX],
}

impl KeySlot {
    fn new(key: &HeartbeatKey) -> Self {
        Self {
            send: hmac::Key::new(hmac::HMAC_SHA256, &key.send),
            receive: hmac::Key::new(hmac::HMAC_SHA256, &key.receive),
            incarnation: None,
            sequence: [0; LINKS_MAX],
        }
    }

    fn accept(&mut self, datagram: &[u8; PACKET_BYTES]) -> Option<Heard> {
        let (signed, tag) = datagram.split_at(SIGNED_BYTES);
        hmac::verify(&self.receive, signed, tag).ok()?;
        // Authentic from here on, but perhaps from a newer build.
        if signed[..4] != MAGIC || signed[4] != VERSION || signed[5] != 0 {
            return None;
        }
        let link = usize::from(u16::from_le_bytes([signed[6], signed[7]]));
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&signed[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (incarnation, sequence) = (word(8), word(16));
        let newest = self.sequence.get_mut(link)?;
        if self.incarnation.is_some_and(|known| known != incarnation) || sequence <= *newest {
            return None;
        }
        *newest = sequence;
        self.incarnation = Some(incarnation);
        Some(Heard { incarnation })
    }
}

/// The two newest keys: a reconnect of QUIC leaves no gap in the heartbeats.
#[derive(Default)]
pub(super) struct Keys {
    newest: Option<KeySlot>,
    before: Option<KeySlot>,
}

impl Keys {
    pub(super) fn add(&mut self, key: &HeartbeatKey) {
        self.before = self.newest.replace(KeySlot::new(key));
    }

    /// Check a datagram of any content.
    pub(super) fn accept(&mut self, datagram: &[u8]) -> Option<Heard> {
        let datagram = datagram.try_into().ok()?;
        let slots = [&mut self.newest, &mut self.before];
        slots
            .into_iter()
            .flatten()
            .find_map(|slot| slot.accept(datagram))
    }

    /// A signed heartbeat under the newest key (or the one before it); `None`
    /// without such a key.
    pub(super) fn sign(
        &self,
        newest: bool,
        link: u16,
        incarnation: u64,
        sequence: u64,
    ) -> Option<[u8; PACKET_BYTES]> {
        let slot = if newest { &self.newest } else { &self.before };
        let slot = slot.as_ref()?;
        let mut out = [0; PACKET_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[6..8].copy_from_slice(&link.to_le_bytes());
        out[8..16].copy_from_slice(&incarnation.to_le_bytes());
        out[16..24].copy_from_slice(&sequence.to_le_bytes());
        let tag = hmac::sign(&slot.send, &out[..SIGNED_BYTES]);
        out[SIGNED_BYTES..].copy_from_slice(tag.as_ref());
        Some(out)
    }
}

/// A script of datagrams of any content, and of signed ones that are damaged or repeated:
/// only what was signed is accepted, and only once.
pub(crate) fn fuzz(data: &[u8]) {
    let mut script = crate::fuzzing::Script(data);
    let key = |number: u8| HeartbeatKey {
        send: [number; 32],
        receive: [number.wrapping_add(1); 32],
    };
    let (mut ours, mut theirs) = (Keys::default(), Keys::default());
    let mut accepted = std::collections::BTreeSet::new();
    let mut keys = 0_u8;
    while !script.is_empty() {
        match script.u8() % 4 {
            0 => {
                let bytes = usize::from(script.u8());
                assert_eq!(ours.accept(script.take(bytes)), None);
            }
            1 if keys < 100 => {
                keys += 1;
                ours.add(&key(2 * keys));
                let HeartbeatKey { send, receive } = key(2 * keys);
                let mirrored = HeartbeatKey {
                    send: receive,
                    receive: send,
                };
                theirs.add(&mirrored);
            }
            how => {
                let (link, incarnation) = (u16::from(script.u8()), u64::from(script.u8() & 1));
                let sequence = u64::from(script.u8());
                let (at, flip) = (usize::from(script.u8()), script.u8());
                let Some(mut datagram) = theirs.sign(how == 2, link, incarnation, sequence) else {
                    continue;
                };
                datagram[at % PACKET_BYTES] ^= flip;
                let heard = ours.accept(&datagram);
                if let Some(heard) = heard {
                    assert!(flip == 0 && usize::from(link) < LINKS_MAX);
                    assert_eq!(heard.incarnation, incarnation);
                    let slot = if how == 2 { keys } else { keys - 1 };
                    assert!(accepted.insert((slot, link, sequence)), "a replay");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(n: u8) -> (HeartbeatKey, HeartbeatKey) {
        let (a, b) = ([n; 32], [n ^ 0xff; 32]);
        (
            HeartbeatKey {
                send: a,
                receive: b,
            },
            HeartbeatKey {
                send: b,
                receive: a,
            },
        )
    }

    fn keys(list: &[&HeartbeatKey]) -> Keys {
        let mut keys = Keys::default();
        list.iter().for_each(|key| keys.add(key));
        keys
    }

    #[test]
    fn a_heartbeat_is_heard_once_on_each_link() {
        let (a, b) = pair(1);
        let (sender, mut receiver) = (keys(&[&a]), keys(&[&b]));
        let first = sender.sign(true, 0, 9, 5).unwrap();
        assert_eq!(receiver.accept(&first), Some(Heard { incarnation: 9 }));
        assert_eq!(receiver.accept(&first), None, "replayed");
        assert_eq!(
            receiver.accept(&sender.sign(true, 0, 9, 4).unwrap()),
            None,
            "older"
        );
        assert!(
            receiver
                .accept(&sender.sign(true, 1, 9, 4).unwrap())
                .is_some(),
            "another link"
        );
        assert_eq!(
            receiver.accept(&sender.sign(true, 0, 8, 99).unwrap()),
            None,
            "another life"
        );
        assert_eq!(
            receiver.accept(&sender.sign(true, 8, 9, 99).unwrap()),
            None,
            "no such link"
        );
    }

    #[test]
    fn damaged_foreign_and_reflected_heartbeats_are_refused() {
        let (a, b) = pair(1);
        let (mut sender, mut receiver) = (keys(&[&a]), keys(&[&b]));
        let good = sender.sign(true, 0, 9, 5).unwrap();
        assert_eq!(sender.accept(&good), None, "reflected");
        for at in 0..PACKET_BYTES {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(receiver.accept(&bad), None, "byte {at}");
        }
        assert_eq!(receiver.accept(&good[..PACKET_BYTES - 1]), None);
        assert_eq!(receiver.accept(&[]), None);
        assert_eq!(receiver.accept(&[0; 200]), None);
        assert_eq!(Keys::default().accept(&good), None, "no key yet");
        assert_eq!(keys(&[&pair(2).1]).accept(&good), None);
        assert!(receiver.accept(&good).is_some());
    }

    #[test]
    fn the_two_newest_keys_are_accepted() {
        let ((a1, b1), (a2, b2), (_, b3)) = (pair(1), pair(2), pair(3));
        let old = keys(&[&a1]).sign(true, 0, 9, 5).unwrap();
        assert!(keys(&[&b1, &b2]).accept(&old).is_some());
        assert!(keys(&[&b1, &b2, &b3]).accept(&old).is_none());
        let both = keys(&[&a1, &a2]);
        assert_eq!(both.sign(false, 0, 9, 5), Some(old));
        assert!(
            keys(&[&b2])
                .accept(&both.sign(true, 0, 9, 6).unwrap())
                .is_some()
        );
    }
}
