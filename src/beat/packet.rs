//! The layout of everything that is sealed under a key of the pool: a heartbeat on a network,
//! and the same on storage. Pure. [docs/heartbeats.md](../../docs/heartbeats.md) has the reasons.
//!
//! All integers are little-endian:
//!
//! | offset | size | field | on a network | on storage |
//! |---|---|---|---|---|
//! | 0 | 4 | magic | `PLXP` | `PLXS` |
//! | 4 | 1 | version, 1 | | |
//! | 5 | 1 | path | number of the network | number of the disk |
//! | 6 | 2 | length n of the payload, at most 3,744 | | |
//! | 8 | 16 | pool | | |
//! | 24 | 4 | number of the key it is sealed with | | |
//! | 28 | 4 | highest number of a key its sender holds | | |
//! | 32 | 8 | incarnation of the sender | | |
//! | 40 | 8 | sequence number | | |
//! | 48 | 8 | echo | recipient's incarnation | number of the slot |
//! | 56 | 8 | echoed sequence | recipient's newest heard | zero |
//! | 64 | 64 | sender: length of its name, name, zeros | | |
//! | 128 | 64 | recipient, likewise | | zeros |
//! | 192 | n | payload | | |
//! | 192 + n | 32 | HMAC-SHA256 over all before | | |
//!
//! Versions:
//! - 1: first.

use crate::ha::report::{self, REPORT_BYTES_MAX};
/// 0 stands for "not known" on the wire.
pub use crate::pool::Incarnation;
use crate::pool::{HOST_NAME_BYTES_MAX, HostName, POOL_HOSTS_MAX};
use crate::registry::statefile::BEAT_BYTES_MAX;
use std::fmt;

/// Longest payload, in bytes: a report. Sealed, it fits a host's block of the statefile.
pub const PAYLOAD_BYTES_MAX: usize = REPORT_BYTES_MAX;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 192;
/// Bytes of the MAC (RFC 4231).
pub const MAC_BYTES: usize = 32;
/// Longest sealed packet, in bytes.
pub const PACKET_BYTES_MAX: usize = HEADER_BYTES + PAYLOAD_BYTES_MAX + MAC_BYTES;
const _: () = assert!(PACKET_BYTES_MAX <= BEAT_BYTES_MAX);
/// Most networks that carry heartbeats: storage, guests, management, a private cable.
pub const NETWORKS_MAX: usize = report::NETWORKS_MAX as usize;
/// Most hosts of a pool.
pub const HOSTS_MAX: usize = POOL_HOSTS_MAX;

const VERSION: u8 = 1;
const NAME_FIELD_BYTES: usize = 64;
const _: () = assert!(NAME_FIELD_BYTES == 1 + HOST_NAME_BYTES_MAX);
const SENDER_AT: usize = 64;
const RECIPIENT_AT: usize = SENDER_AT + NAME_FIELD_BYTES;
const _: () = assert!(RECIPIENT_AT + NAME_FIELD_BYTES == HEADER_BYTES);

/// Which pool: hosts of two pools may share a network or a disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub [u8; 16]);

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Number of a key of the pool; a newer key has the higher one. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyNumber(pub u32);

impl fmt::Display for KeyNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a sending, rising within an incarnation; the same on every path. 0: none yet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Sequence(pub u64);

/// Number of a network of the pool, the same on every host: below [`NETWORKS_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NetworkIndex(pub u8);

impl fmt::Display for NetworkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a packet is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Medium {
    Network,
    Storage,
}

impl Medium {
    const fn magic(self) -> [u8; 4] {
        match self {
            Self::Network => *b"PLXP",
            Self::Storage => *b"PLXS",
        }
    }
}

/// All of a packet but its payload and MAC.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) medium: Medium,
    pub(super) path: u8,
    pub(super) pool: PoolId,
    pub(super) key: KeyNumber,
    pub(super) key_newest: KeyNumber,
    pub(super) incarnation: Incarnation,
    pub(super) sequence: Sequence,
    pub(super) echo: u64,
    pub(super) echo_sequence: Sequence,
    pub(super) sender: HostName,
    /// `None` on storage, which every host reads.
    pub(super) recipient: Option<HostName>,
}

/// Why bytes are no packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NoPacket {
    /// Not one of ours, cut off, or with fields that cannot be.
    Malformed,
    /// Of another version.
    Version,
}

/// A packet in parts, nothing of which is authentic yet.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    pub(super) header: Header,
    pub(super) signed: &'a [u8],
    pub(super) payload: &'a [u8],
    pub(super) mac: &'a [u8],
    /// What follows the packet.
    pub(super) rest: &'a [u8],
}

fn name_field(name: Option<&HostName>) -> [u8; NAME_FIELD_BYTES] {
    let mut field = [0; NAME_FIELD_BYTES];
    if let Some(name) = name {
        let bytes = name.as_str().as_bytes();
        field[0] = u8::try_from(bytes.len()).unwrap_or(0);
        field[1..=bytes.len()].copy_from_slice(bytes);
    }
    field
}

/// The name in a field; `Some(None)` for the empty one, `None` if it holds none.
fn read_name(field: &[u8]) -> Option<Option<HostName>> {
    let (length, bytes) = field.split_first()?;
    let (name, zeros) = bytes.split_at_checked(usize::from(*length))?;
    if zeros.iter().any(|byte| *byte != 0) {
        return None;
    }
    if name.is_empty() {
        return Some(None);
    }
    let name = HostName::new(std::str::from_utf8(name).ok()?).ok()?;
    Some(Some(name))
}

impl Header {
    /// Header and payload into `out`, which is emptied first; the MAC is to follow. The caller
    /// has checked the payload's length.
    pub(super) fn write(&self, payload: &[u8], out: &mut Vec<u8>) {
        debug_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        out.clear();
        out.extend_from_slice(&self.medium.magic());
        out.extend_from_slice(&[VERSION, self.path]);
        let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&self.pool.0);
        out.extend_from_slice(&self.key.0.to_le_bytes());
        out.extend_from_slice(&self.key_newest.0.to_le_bytes());
        for word in [
            self.incarnation.0,
            self.sequence.0,
            self.echo,
            self.echo_sequence.0,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&name_field(Some(&self.sender)));
        out.extend_from_slice(&name_field(self.recipient.as_ref()));
        out.extend_from_slice(payload);
    }
}

/// Little-endian integer of at most 8 bytes.
fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

fn key_number(bytes: &[u8]) -> Result<KeyNumber, NoPacket> {
    match u32::try_from(word(bytes)) {
        Ok(number) if number != 0 => Ok(KeyNumber(number)),
        _ => Err(NoPacket::Malformed),
    }
}

/// Take bytes of any content apart. Allocates two names of at most 63 bytes.
pub(super) fn parse(medium: Medium, bytes: &[u8]) -> Result<Parts<'_>, NoPacket> {
    use NoPacket::Malformed;
    let (header, after) = bytes.split_at_checked(HEADER_BYTES).ok_or(Malformed)?;
    if header[..4] != medium.magic() {
        return Err(Malformed);
    }
    if header[4] != VERSION {
        return Err(NoPacket::Version);
    }
    let length = usize::try_from(word(&header[6..8])).map_err(|_| Malformed)?;
    if length > PAYLOAD_BYTES_MAX {
        return Err(Malformed);
    }
    let (payload, after) = after.split_at_checked(length).ok_or(Malformed)?;
    let (mac, rest) = after.split_at_checked(MAC_BYTES).ok_or(Malformed)?;
    let mut pool = [0; 16];
    pool.copy_from_slice(&header[8..24]);
    let sender = read_name(&header[SENDER_AT..RECIPIENT_AT])
        .flatten()
        .ok_or(Malformed)?;
    let recipient = read_name(&header[RECIPIENT_AT..]).ok_or(Malformed)?;
    let incarnation = Incarnation(word(&header[32..40]));
    if recipient.is_some() != (medium == Medium::Network) || incarnation.0 == 0 {
        return Err(Malformed);
    }
    Ok(Parts {
        header: Header {
            medium,
            path: header[5],
            pool: PoolId(pool),
            key: key_number(&header[24..28])?,
            key_newest: key_number(&header[28..32])?,
            incarnation,
            sequence: Sequence(word(&header[40..48])),
            echo: word(&header[48..56]),
            echo_sequence: Sequence(word(&header[56..64])),
            sender,
            recipient,
        },
        signed: &bytes[..HEADER_BYTES + length],
        payload,
        mac,
        rest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            medium: Medium::Network,
            path: 3,
            pool: PoolId(*b"0123456789abcdef"),
            key: KeyNumber(7),
            key_newest: KeyNumber(8),
            incarnation: Incarnation(0x0102_0304_0506_0708),
            sequence: Sequence(9),
            echo: 10,
            echo_sequence: Sequence(11),
            sender: HostName::new("a").unwrap(),
            recipient: Some(HostName::new("b".repeat(63)).unwrap()),
        }
    }

    fn written(header: &Header, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        header.write(payload, &mut bytes);
        bytes.extend_from_slice(&[0xee; MAC_BYTES]);
        bytes
    }

    #[test]
    fn the_layout_is_the_one_that_is_written_down() {
        let bytes = written(&header(), b"payload");
        assert_eq!(&bytes[..8], b"PLXP\x01\x03\x07\x00");
        assert_eq!(&bytes[8..24], b"0123456789abcdef");
        assert_eq!(&bytes[24..32], &[7, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(&bytes[32..40], &[8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!((bytes[40], bytes[48], bytes[56]), (9, 10, 11));
        assert_eq!(&bytes[64..67], b"\x01a\0");
        assert_eq!(&bytes[128..130], b"\x3fb");
        assert_eq!(&bytes[192..199], b"payload");
        assert_eq!(bytes.len(), 199 + MAC_BYTES);
    }

    #[test]
    fn what_is_written_is_read_again_and_nothing_shorter_is() {
        for payload in [&b""[..], b"x", &[7; PAYLOAD_BYTES_MAX]] {
            let mut bytes = written(&header(), payload);
            let parts = parse(Medium::Network, &bytes).unwrap();
            assert_eq!(parts.header, header());
            assert_eq!(parts.payload, payload);
            assert_eq!(parts.signed.len(), HEADER_BYTES + payload.len());
            assert_eq!((parts.mac, parts.rest), (&[0xee; MAC_BYTES][..], &[][..]));
            for length in 0..bytes.len() {
                assert!(
                    parse(Medium::Network, &bytes[..length]).is_err(),
                    "{length}"
                );
            }
            assert!(parse(Medium::Storage, &bytes).is_err(), "another medium");
            bytes[4] = 2;
            let error = parse(Medium::Network, &bytes).unwrap_err();
            assert_eq!(error, NoPacket::Version);
        }
    }

    #[test]
    fn fields_that_cannot_be_are_refused() {
        let good = written(&header(), b"payload");
        let bad = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            parse(Medium::Network, &bytes).unwrap_err()
        };
        for (at, value) in [
            (0, b'x'),
            (7, 0x0f),  // longer than the cap
            (24, 0),    // key number 0
            (28, 0),    // likewise
            (64, 0),    // no sender, but a letter behind
            (64, 64),   // a name past its field
            (65, b'A'), // no host's name
            (65, 0xff), // no text
            (66, b'b'), // letters behind the name
            (128, 0),   // no recipient
        ] {
            assert_eq!(bad(at, value), NoPacket::Malformed, "byte {at} = {value}");
        }
    }

    proptest! {
        #[test]
        fn bytes_of_any_content_are_taken_apart_or_refused(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..PACKET_BYTES_MAX + 10),
            storage in any::<bool>(),
            dressed in any::<bool>(),
        ) {
            let medium = if storage { Medium::Storage } else { Medium::Network };
            if dressed && bytes.len() >= HEADER_BYTES {
                let mut like = header();
                like.medium = medium;
                like.recipient = like.recipient.filter(|_| !storage);
                let valid = written(&like, &[]);
                // All but the length.
                bytes[..6].copy_from_slice(&valid[..6]);
                bytes[8..HEADER_BYTES].copy_from_slice(&valid[8..HEADER_BYTES]);
                bytes[7] &= 0x0f;
            }
            if let Ok(parts) = parse(medium, &bytes) {
                let mut again = Vec::new();
                parts.header.write(parts.payload, &mut again);
                prop_assert_eq!(&again[..], parts.signed);
                let whole = parts.signed.len() + parts.mac.len() + parts.rest.len();
                prop_assert_eq!(whole, bytes.len());
            }
        }
    }
}
