//! Keys of a pool: what a host needs to be heard by the others.
//!
//! A pool has an id and one secret, the same on every host. A change of the secret takes three
//! steps, each done on every host before the next begins; at no time is a host not heard:
//!
//! ```text
//!             begin, import          switch               finish
//!   {1 sends} --------> {1 sends, 2} ------> {1, 2 sends} ------> {2 sends}
//! ```
//!
//! Hosts one step apart accept each other's packets, in either direction; hosts two steps apart
//! do not. Packets carry the highest number their sender holds, so that a host can see when all
//! have taken a step.
//!
//! What seals a packet is not the secret but a key derived from it for one sender, one of its
//! incarnations and one medium (HKDF, RFC 5869): a packet cannot be sent back to its sender as
//! another's, and what is sealed for a network is nothing on a disk. Whoever has the secret can
//! derive all of them: members can speak in each other's name (docs/heartbeats.md argues why
//! that is enough).

use super::packet::{Incarnation, KeyNumber, Medium, PoolId};
use crate::pool::HostName;
use ring::rand::SecureRandom;
use ring::{aead, hkdf, hmac};
use std::fmt;
use std::str::FromStr;

/// Bytes of a secret: as many as the hash has, more would be hashed down (RFC 2104).
const SECRET_BYTES: usize = 32;
/// First word of the line: what it is, and version 1 of it.
const LINE_NAME: &str = "pollux-pool-1";
/// Longest line read: two keys with the longest numbers take 211 bytes.
pub const LINE_BYTES_MAX: usize = 256;
/// Separates these keys from any other use of the secret.
const LABEL: &[u8] = b"pollux beat 1";
/// The same of those that seal a stream.
const STREAM_LABEL: &[u8] = b"pollux session 1";

/// One secret with its number.
#[derive(Clone, PartialEq, Eq)]
struct PoolKey {
    number: KeyNumber,
    secret: [u8; SECRET_BYTES],
}

/// Keys of a pool as one host holds them: the one it sends with and, during a change, one more
/// that it accepts.
#[derive(Clone, PartialEq, Eq)]
pub struct PoolKeys {
    pool: PoolId,
    present: PoolKey,
    other: Option<PoolKey>,
}

/// Where a host is in a change of the pool's secret.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyStep {
    /// No change: one key.
    Settled,
    /// Accepts the next key, sends with the present one.
    Next(KeyNumber),
    /// Sends with the new key, still accepts the one before.
    Before(KeyNumber),
}

/// Why keys cannot be made, read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The system gives no random numbers.
    #[error("cannot make a pool key: the system gives no random numbers")]
    Random,
    /// Not the line that export prints.
    #[error(
        "this is not a pool key ({0}): paste the whole line that `pollux pool key export` prints"
    )]
    Line(&'static str),
    /// Keys of another pool.
    #[error(
        "the key is of pool {theirs}, this host is of pool {ours}: import a key of its own pool, or take the host out of its pool first"
    )]
    OtherPool {
        /// Pool of the line.
        theirs: PoolId,
        /// Pool of this host.
        ours: PoolId,
    },
    /// The same number with another secret.
    #[error(
        "key {0} of the line differs from key {0} of this host: two hosts began a change at once; give one of them up (`pollux pool key rotate --give-up`) and import the other's"
    )]
    Conflict(KeyNumber),
    /// The line is older than what this host has.
    #[error(
        "the line begins with key {theirs}, this host is further (from key {ours} on): export on a host that is as far"
    )]
    Older {
        /// Lowest number of the line.
        theirs: KeyNumber,
        /// Lowest number this host accepts.
        ours: KeyNumber,
    },
    /// A step out of order.
    #[error("cannot {what}: {why}")]
    Step {
        /// What was wanted.
        what: &'static str,
        /// Why not, and what to do.
        why: &'static str,
    },
}

fn random(bytes: &mut [u8]) -> Result<(), KeyError> {
    ring::rand::SystemRandom::new()
        .fill(bytes)
        .map_err(|_| KeyError::Random)
}

impl PoolKey {
    fn random(number: KeyNumber) -> Result<Self, KeyError> {
        let mut secret = [0; SECRET_BYTES];
        random(&mut secret)?;
        Ok(Self { number, secret })
    }
}

impl PoolKeys {
    /// Keys of a new pool.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn create() -> Result<Self, KeyError> {
        let mut id = [0; 16];
        random(&mut id)?;
        let id = uuid::Builder::from_random_bytes(id).into_uuid();
        Ok(Self {
            pool: PoolId(id.into_bytes()),
            present: PoolKey::random(KeyNumber(1))?,
            other: None,
        })
    }

    /// Which pool.
    #[must_use]
    pub const fn pool(&self) -> PoolId {
        self.pool
    }

    /// The key this host sends with.
    #[must_use]
    pub const fn present(&self) -> KeyNumber {
        self.present.number
    }

    /// How far a change is on this host.
    #[must_use]
    pub fn step(&self) -> KeyStep {
        match &self.other {
            None => KeyStep::Settled,
            Some(other) if other.number > self.present.number => KeyStep::Next(other.number),
            Some(other) => KeyStep::Before(other.number),
        }
    }

    /// A short digest of each key this host holds, the present one first: equal digests on two
    /// hosts mean equal keys, and nothing about the key can be told from it.
    #[must_use]
    pub fn digests(&self) -> Vec<(KeyNumber, String)> {
        let digest = |key: &PoolKey| {
            let hmac_key = hmac::Key::new(hmac::HMAC_SHA256, &key.secret);
            let tag = hmac::sign(&hmac_key, b"pollux beat 1 digest");
            (key.number, hex(&tag.as_ref()[..6]))
        };
        std::iter::once(&self.present)
            .chain(&self.other)
            .map(digest)
            .collect()
    }

    /// First step of a change: a next key, accepted from now on. The others are to import it.
    ///
    /// # Errors
    /// [`KeyError`] if a change is under way already.
    pub fn begin(&mut self) -> Result<KeyNumber, KeyError> {
        if self.other.is_some() {
            return Err(KeyError::Step {
                what: "begin a change of the pool key",
                why: "one is under way; `pollux pool key show` tells how far it is",
            });
        }
        let next = self.present.number.0.checked_add(1).map(KeyNumber);
        let next = PoolKey::random(next.ok_or(KeyError::Step {
            what: "begin a change of the pool key",
            why: "there is no higher number; make a new pool",
        })?)?;
        let number = next.number;
        self.other = Some(next);
        Ok(number)
    }

    /// Second step, once every host accepts the next key: send with it.
    ///
    /// # Errors
    /// [`KeyError::Step`] if there is no next key.
    pub fn switch(&mut self) -> Result<(), KeyError> {
        match &mut self.other {
            Some(other) if other.number > self.present.number => {
                std::mem::swap(&mut self.present, other);
                Ok(())
            }
            _ => Err(KeyError::Step {
                what: "switch to the next pool key",
                why: "this host has none; begin a change here, or import the line of the host that began",
            }),
        }
    }

    /// Third step, once every host sends with the new key: forget the one before.
    ///
    /// # Errors
    /// [`KeyError::Step`] if there is none.
    pub fn finish(&mut self) -> Result<(), KeyError> {
        self.drop_other(
            KeyStep::Before(self.present.number),
            "forget the pool key before",
        )
    }

    /// Undo the first step; only before any host has switched.
    ///
    /// # Errors
    /// [`KeyError::Step`] if this host has no next key.
    pub fn give_up(&mut self) -> Result<(), KeyError> {
        self.drop_other(
            KeyStep::Next(self.present.number),
            "give up the next pool key",
        )
    }

    fn drop_other(&mut self, like: KeyStep, what: &'static str) -> Result<(), KeyError> {
        if std::mem::discriminant(&self.step()) != std::mem::discriminant(&like) {
            let why = "this host is at another step; `pollux pool key show` tells which";
            return Err(KeyError::Step { what, why });
        }
        self.other = None;
        Ok(())
    }

    /// Take up another host's keys: those of the line, while the key this host sends with stays
    /// the same if the line has it.
    ///
    /// # Errors
    /// [`KeyError`] if it is another pool's, older, or the same number with another secret.
    pub fn import(&mut self, line: &Self) -> Result<(), KeyError> {
        if line.pool != self.pool {
            return Err(KeyError::OtherPool {
                theirs: line.pool,
                ours: self.pool,
            });
        }
        for ours in std::iter::once(&self.present).chain(&self.other) {
            for theirs in std::iter::once(&line.present).chain(&line.other) {
                if ours.number == theirs.number && ours.secret != theirs.secret {
                    return Err(KeyError::Conflict(ours.number));
                }
            }
        }
        let mut line = line.clone();
        if line.newest() < self.newest() || line.oldest() < self.oldest() {
            return Err(KeyError::Older {
                theirs: line.oldest(),
                ours: self.oldest(),
            });
        }
        if let Some(other) = &mut line.other
            && other.number == self.present.number
        {
            std::mem::swap(&mut line.present, other);
        }
        *self = line;
        Ok(())
    }

    fn newest(&self) -> KeyNumber {
        let other = self.other.as_ref().map(|other| other.number);
        other.map_or(self.present.number, |other| other.max(self.present.number))
    }

    fn oldest(&self) -> KeyNumber {
        let other = self.other.as_ref().map(|other| other.number);
        other.map_or(self.present.number, |other| other.min(self.present.number))
    }

    /// All of it as one line, for the other hosts and for the file. Holds the secrets.
    #[must_use]
    pub fn to_line(&self) -> String {
        let mut line = format!("{LINE_NAME}.{}", self.pool);
        for key in std::iter::once(&self.present).chain(&self.other) {
            line += &format!(".{}-{}", key.number, hex(&key.secret));
        }
        let check = crc32fast::hash(line.as_bytes());
        format!("{line}.{check:08x}")
    }
}

impl FromStr for PoolKeys {
    type Err = KeyError;
    fn from_str(line: &str) -> Result<Self, KeyError> {
        let bad = |why| Err(KeyError::Line(why));
        let line = line.trim();
        if line.len() > LINE_BYTES_MAX {
            return bad("it is too long");
        }
        if !line.starts_with(LINE_NAME) {
            return bad("it does not begin with pollux-pool-1");
        }
        let Some((body, check)) = line.rsplit_once('.') else {
            return bad("its end is missing");
        };
        if u32::from_str_radix(check, 16).ok() != Some(crc32fast::hash(body.as_bytes())) {
            return bad("its checksum does not hold: something is missing or changed");
        }
        let mut fields = body.split('.').skip(1);
        let pool = fields
            .next()
            .and_then(|id| uuid::Uuid::try_parse(id).ok())
            .ok_or(KeyError::Line("its pool id is none"))?;
        let keys = fields.map(pool_key).collect::<Option<Vec<_>>>();
        let (present, other) = match keys.as_deref() {
            Some([present]) => (present.clone(), None),
            Some([present, other]) if present.number != other.number => {
                (present.clone(), Some(other.clone()))
            }
            _ => return bad("it does not hold one or two keys"),
        };
        Ok(Self {
            pool: PoolId(pool.into_bytes()),
            present,
            other,
        })
    }
}

fn pool_key(text: &str) -> Option<PoolKey> {
    let (number, secret) = text.split_once('-')?;
    let number = number.parse().ok().filter(|number| *number != 0)?;
    Some(PoolKey {
        number: KeyNumber(number),
        secret: unhex(secret)?,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; SECRET_BYTES]> {
    if text.len() != 2 * SECRET_BYTES || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; SECRET_BYTES];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

impl fmt::Debug for PoolKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PoolKeys({}, {}, {:?})",
            self.pool,
            self.present(),
            self.step()
        )
    }
}

/// Keys ready for use: one step of the derivation is done.
#[derive(Clone)]
pub(super) struct Keyring {
    pub(super) pool: PoolId,
    present: (KeyNumber, hkdf::Prk),
    other: Option<(KeyNumber, hkdf::Prk)>,
}

impl Keyring {
    pub(super) fn new(keys: &PoolKeys) -> Self {
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, &keys.pool.0);
        let ready = |key: &PoolKey| (key.number, salt.extract(&key.secret));
        Self {
            pool: keys.pool,
            present: ready(&keys.present),
            other: keys.other.as_ref().map(ready),
        }
    }

    pub(super) const fn present(&self) -> KeyNumber {
        self.present.0
    }

    pub(super) fn newest(&self) -> KeyNumber {
        let other = self.other.as_ref().map(|other| other.0);
        other.map_or(self.present.0, |other| other.max(self.present.0))
    }

    pub(super) fn holds(&self, number: KeyNumber) -> bool {
        self.find(number).is_some()
    }

    fn find(&self, number: KeyNumber) -> Option<&hkdf::Prk> {
        std::iter::once(&self.present)
            .chain(&self.other)
            .find(|key| key.0 == number)
            .map(|key| &key.1)
    }

    /// The key `sender` seals with in one of its incarnations; `None` if this host does not
    /// hold the pool's key of that number.
    pub(super) fn sending_key(
        &self,
        number: KeyNumber,
        medium: Medium,
        sender: &HostName,
        incarnation: Incarnation,
    ) -> Option<hmac::Key> {
        let medium: &[u8] = match medium {
            Medium::Network => b" network ",
            Medium::Storage => b" storage ",
        };
        // All of fixed length but the name, which is last: no two inputs give the same bytes.
        let info = [
            LABEL,
            medium,
            &number.0.to_le_bytes(),
            &incarnation.0.to_le_bytes(),
            sender.as_str().as_bytes(),
        ];
        let okm = self.find(number)?.expand(&info, hmac::HMAC_SHA256).ok()?;
        Some(hmac::Key::from(okm))
    }

    /// The key for one direction of a stream: from whose greeting, to whose, and who; all of
    /// fixed length but the last. `None` if this host does not hold the pool's key of that number.
    pub(super) fn stream_key(
        &self,
        number: KeyNumber,
        direction: [&[u8]; 3],
    ) -> Option<aead::LessSafeKey> {
        let [from, to, sender] = direction;
        let number_bytes = number.0.to_le_bytes();
        let info = [STREAM_LABEL, &number_bytes, from, to, sender];
        let okm = self.find(number)?.expand(&info, &aead::AES_256_GCM).ok()?;
        Some(aead::LessSafeKey::new(okm.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_all_and_a_damaged_one_nothing() {
        let mut keys = PoolKeys::create().unwrap();
        for _ in 0..2 {
            let line = keys.to_line();
            assert!(line.len() <= LINE_BYTES_MAX && !line.contains(char::is_whitespace));
            assert_eq!(format!(" {line}\n").parse::<PoolKeys>().unwrap(), keys);
            for at in 0..line.len() {
                assert!(line[..at].parse::<PoolKeys>().is_err(), "cut at {at}");
                let mut bytes = line.clone().into_bytes();
                bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
                let damaged = String::from_utf8(bytes).unwrap();
                assert!(damaged.parse::<PoolKeys>().is_err(), "damaged at {at}");
            }
            if keys.step() == KeyStep::Settled {
                keys.begin().unwrap();
            }
        }
    }

    #[test]
    fn neither_debug_nor_digest_tells_a_secret() {
        let keys = PoolKeys::create().unwrap();
        let secret = hex(&keys.present.secret);
        let digests = keys.digests();
        assert_eq!(digests.len(), 1);
        for said in [format!("{keys:?}"), digests[0].1.clone()] {
            assert!(
                !secret.contains(&said) && !said.contains(&secret[..12]),
                "{said}"
            );
        }
    }

    #[test]
    fn a_change_takes_its_steps_in_order() {
        let mut keys = PoolKeys::create().unwrap();
        assert!(keys.switch().is_err() && keys.finish().is_err() && keys.give_up().is_err());
        let first = keys.clone();
        assert_eq!(keys.begin().unwrap(), KeyNumber(2));
        assert!(keys.begin().is_err() && keys.finish().is_err());
        assert_eq!(
            (keys.present(), keys.step()),
            (KeyNumber(1), KeyStep::Next(KeyNumber(2)))
        );
        let mut given_up = keys.clone();
        given_up.give_up().unwrap();
        assert_eq!(given_up, first);
        keys.switch().unwrap();
        assert!(keys.switch().is_err() && keys.begin().is_err() && keys.give_up().is_err());
        assert_eq!(
            (keys.present(), keys.step()),
            (KeyNumber(2), KeyStep::Before(KeyNumber(1)))
        );
        keys.finish().unwrap();
        assert_eq!(
            (keys.present(), keys.step()),
            (KeyNumber(2), KeyStep::Settled)
        );
    }

    #[test]
    fn an_import_takes_what_is_newer_and_goes_on_sending_with_the_key_it_knows() {
        let mut a = PoolKeys::create().unwrap();
        let start = a.clone();
        a.begin().unwrap();
        let mut b = start.clone();
        b.import(&a).unwrap();
        assert_eq!(b, a);
        a.switch().unwrap();
        b.import(&a).unwrap();
        assert_eq!(b.present(), KeyNumber(1), "switching is a step of its own");
        a.finish().unwrap();
        let mut late = start.clone();
        late.import(&a).unwrap();
        assert_eq!(late, a, "a host that was away");
        assert!(matches!(late.import(&start), Err(KeyError::Older { .. })));
        assert!(
            matches!(late.import(&b), Err(KeyError::Older { .. })),
            "a step back"
        );
        let (mut x, mut y) = (start.clone(), start.clone());
        x.begin().unwrap();
        y.begin().unwrap();
        assert!(matches!(
            x.import(&y),
            Err(KeyError::Conflict(KeyNumber(2)))
        ));
        let foreign = PoolKeys::create().unwrap();
        assert!(matches!(
            x.import(&foreign),
            Err(KeyError::OtherPool { .. })
        ));
    }

    #[test]
    fn every_part_of_a_derivation_counts() {
        let mut keys = PoolKeys::create().unwrap();
        keys.begin().unwrap();
        let ring = Keyring::new(&keys);
        let (a, b) = (HostName::new("a").unwrap(), HostName::new("b").unwrap());
        let tag = |ring: &Keyring, number, medium, name, incarnation| {
            let key = ring.sending_key(KeyNumber(number), medium, name, Incarnation(incarnation));
            hmac::sign(&key.unwrap(), b"x").as_ref().to_vec()
        };
        let base = tag(&ring, 1, Medium::Network, &a, 1);
        assert_eq!(tag(&ring.clone(), 1, Medium::Network, &a, 1), base);
        let foreign = Keyring::new(&PoolKeys::create().unwrap());
        for other in [
            tag(&ring, 2, Medium::Network, &a, 1),
            tag(&ring, 1, Medium::Storage, &a, 1),
            tag(&ring, 1, Medium::Network, &b, 1),
            tag(&ring, 1, Medium::Network, &a, 2),
            tag(&foreign, 1, Medium::Network, &a, 1),
        ] {
            assert_ne!(other, base);
        }
        let none = ring.sending_key(KeyNumber(3), Medium::Network, &a, Incarnation(1));
        assert!(none.is_none());
    }
}
