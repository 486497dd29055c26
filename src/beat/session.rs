//! Sealing of a byte stream between two hosts of a pool, for what is too long or too secret for
//! heartbeats. The bytes are the caller's to carry; there is no socket here.
//!
//! ```text
//!  greeting: 8 magic "pollxss1" | 16 pool | u32 LE number of the key it will seal with | 32 nonce
//!  frame:    u32 LE length of what follows | AES-256-GCM ciphertext and its tag of 16 bytes
//! ```
//!
//! Each side sends a greeting and seals with a key derived (HKDF, RFC 5869) from the pool's
//! secret, both greetings and its own name: a frame is good in its own session and direction
//! alone, as both nonces are in the key. A frame's place in its direction is its nonce, so that
//! none can be left out, repeated or moved; its length is authenticated with it. Whoever does not
//! have the secret is found out with the first frame, before which nothing is told to anybody and
//! nothing larger than [`FIRST_FRAME_BYTES_MAX`] need be read.
//!
//! Must never: use a key and a nonce twice.

use super::keys::{Keyring, PoolKeys};
use super::packet::{KeyNumber, PoolId};
use crate::pool::HostName;
use ring::aead;
use ring::rand::SecureRandom;

const MAGIC: [u8; 8] = *b"pollxss1";
const NONCE_BYTES: usize = 32;
/// Length of a greeting.
pub const GREETING_BYTES: usize = 8 + 16 + 4 + NONCE_BYTES;
/// What a frame begins with.
pub const LENGTH_BYTES: usize = 4;
const TAG_BYTES: usize = 16;
/// Longest first frame, which proves that its sender has the secret: it is empty.
pub const FIRST_FRAME_BYTES_MAX: usize = TAG_BYTES;

/// Why there is no session, or no more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// No random numbers, or the library refused.
    #[error("cannot seal: the system gives no random numbers or no keys")]
    Seal,
    /// Not pollux, or another version of it.
    #[error("the other end does not speak this version of pollux")]
    Greeting,
    /// Of another pool.
    #[error("the other end is of pool {0}")]
    Pool(PoolId),
    /// It seals with a key that this host does not have.
    #[error(
        "the other end seals with pool key {0}, which this host does not have; `pollux pool key show`"
    )]
    Key(KeyNumber),
    /// Longer than it may be.
    #[error("a frame of {0} bytes")]
    TooLong(usize),
    /// Not sealed by the partner for this place.
    #[error("a frame is not the partner's: it does not have the pool's key")]
    Forged,
}

/// One side's begin.
pub struct SessionStart {
    keyring: Keyring,
    me: HostName,
    greeting: [u8; GREETING_BYTES],
}

impl SessionStart {
    /// A session of `me` begins; its greeting is good for one.
    ///
    /// # Errors
    /// [`SessionError::Seal`].
    pub fn new(keys: &PoolKeys, me: &HostName) -> Result<Self, SessionError> {
        let keyring = Keyring::new(keys);
        let mut greeting = [0; GREETING_BYTES];
        greeting[..8].copy_from_slice(&MAGIC);
        greeting[8..24].copy_from_slice(&keyring.pool.0);
        greeting[24..28].copy_from_slice(&keyring.present().0.to_le_bytes());
        ring::rand::SystemRandom::new()
            .fill(&mut greeting[28..])
            .map_err(|_| SessionError::Seal)?;
        Ok(Self {
            keyring,
            me: me.clone(),
            greeting,
        })
    }

    /// What to send first.
    #[must_use]
    pub const fn greeting(&self) -> &[u8; GREETING_BYTES] {
        &self.greeting
    }

    /// With the greeting of `partner`, the two directions.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn finish(
        self,
        theirs: &[u8; GREETING_BYTES],
        partner: &HostName,
    ) -> Result<(FrameSealer, FrameOpener), SessionError> {
        if theirs[..8] != MAGIC {
            return Err(SessionError::Greeting);
        }
        let mut pool = [0; 16];
        pool.copy_from_slice(&theirs[8..24]);
        if PoolId(pool) != self.keyring.pool {
            return Err(SessionError::Pool(PoolId(pool)));
        }
        let mut number = [0; 4];
        number.copy_from_slice(&theirs[24..28]);
        let number = KeyNumber(u32::from_le_bytes(number));
        let key = |number, from: &[u8], to: &[u8], name: &HostName| {
            self.keyring
                .stream_key(number, [from, to, name.as_str().as_bytes()])
        };
        let own = key(self.keyring.present(), &self.greeting, theirs, &self.me);
        let partners = key(number, theirs, &self.greeting, partner);
        Ok((
            FrameSealer {
                key: own.ok_or(SessionError::Seal)?,
                sealed: 0,
            },
            FrameOpener {
                key: partners.ok_or(SessionError::Key(number))?,
                opened: 0,
            },
        ))
    }
}

fn nonce(place: u64) -> aead::Nonce {
    let mut bytes = [0; aead::NONCE_LEN];
    bytes[..8].copy_from_slice(&place.to_le_bytes());
    aead::Nonce::assume_unique_for_key(bytes)
}

/// Seals one direction.
pub struct FrameSealer {
    key: aead::LessSafeKey,
    sealed: u64,
}

impl FrameSealer {
    /// The next frame, with its length before it.
    ///
    /// # Errors
    /// [`SessionError`]; nothing more can be sent.
    pub fn seal(&mut self, payload: &[u8]) -> Result<Vec<u8>, SessionError> {
        let whole = payload.len() + TAG_BYTES;
        let length = u32::try_from(whole)
            .map_err(|_| SessionError::TooLong(whole))?
            .to_le_bytes();
        let mut frame = Vec::with_capacity(LENGTH_BYTES + whole);
        frame.extend_from_slice(&length);
        frame.extend_from_slice(payload);
        let at = self.sealed;
        self.sealed = at.checked_add(1).ok_or(SessionError::Seal)?;
        let tag = self
            .key
            .seal_in_place_separate_tag(
                nonce(at),
                aead::Aad::from(length),
                &mut frame[LENGTH_BYTES..],
            )
            .map_err(|_| SessionError::Seal)?;
        frame.extend_from_slice(tag.as_ref());
        Ok(frame)
    }
}

/// Opens the other direction.
pub struct FrameOpener {
    key: aead::LessSafeKey,
    opened: u64,
}

impl FrameOpener {
    /// How much follows a length, if that is no more than a payload of `payload_max` takes.
    /// Before the first frame is opened nothing but that frame is let through.
    ///
    /// # Errors
    /// [`SessionError::TooLong`], before anything is allocated.
    pub fn length(
        &self,
        length: [u8; LENGTH_BYTES],
        payload_max: usize,
    ) -> Result<usize, SessionError> {
        let most = if self.opened == 0 {
            FIRST_FRAME_BYTES_MAX
        } else {
            payload_max + TAG_BYTES
        };
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > most {
            return Err(SessionError::TooLong(length));
        }
        Ok(length)
    }

    /// What is in the next frame (without its length).
    ///
    /// # Errors
    /// [`SessionError::Forged`]; the session is over.
    pub fn open<'a>(&mut self, sealed: &'a mut [u8]) -> Result<&'a [u8], SessionError> {
        let length = u32::try_from(sealed.len())
            .map_err(|_| SessionError::TooLong(sealed.len()))?
            .to_le_bytes();
        let place = self.opened;
        let opened = self
            .key
            .open_in_place(nonce(place), aead::Aad::from(length), sealed)
            .map_err(|_| SessionError::Forged)?;
        self.opened = place.checked_add(1).ok_or(SessionError::Seal)?;
        Ok(opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    type Ends = ((FrameSealer, FrameOpener), (FrameSealer, FrameOpener));

    fn session(keys: &PoolKeys) -> Ends {
        let (a, b) = (host("a"), host("b"));
        let start_a = SessionStart::new(keys, &a).unwrap();
        let start_b = SessionStart::new(keys, &b).unwrap();
        let (from_a, from_b) = (*start_a.greeting(), *start_b.greeting());
        (
            start_a.finish(&from_b, &b).unwrap(),
            start_b.finish(&from_a, &a).unwrap(),
        )
    }

    fn open(opener: &mut FrameOpener, frame: &[u8]) -> Result<Vec<u8>, SessionError> {
        let (length, sealed) = frame.split_at(LENGTH_BYTES);
        let n = opener.length(length.try_into().unwrap(), 100)?;
        assert_eq!(n, sealed.len());
        opener.open(&mut sealed.to_vec()).map(<[u8]>::to_vec)
    }

    #[test]
    fn a_frame_is_good_once_in_its_place_its_direction_and_its_session() {
        let keys = PoolKeys::create().unwrap();
        let ((mut a, mut to_a), (mut b, mut to_b)) = session(&keys);
        let frames: Vec<Vec<u8>> = [&b""[..], b"one", b"two"]
            .map(|payload| a.seal(payload).unwrap())
            .to_vec();
        assert_eq!(
            open(&mut to_a, &frames[0]),
            Err(SessionError::Forged),
            "reflected"
        );
        assert_eq!(open(&mut to_b, &frames[0]), Ok(Vec::new()));
        assert_eq!(
            open(&mut to_b, &frames[0]),
            Err(SessionError::Forged),
            "repeated"
        );
        assert_eq!(
            open(&mut to_b, &frames[2]),
            Err(SessionError::Forged),
            "moved"
        );
        assert_eq!(open(&mut to_b, &frames[1]), Ok(b"one".to_vec()));
        for at in LENGTH_BYTES..frames[2].len() {
            let mut flipped = frames[2].clone();
            flipped[at] ^= 4;
            assert_eq!(
                open(&mut to_b, &flipped),
                Err(SessionError::Forged),
                "byte {at}"
            );
        }
        assert_eq!(open(&mut to_b, &frames[2]), Ok(b"two".to_vec()));
        assert_eq!(open(&mut to_a, &b.seal(b"").unwrap()), Ok(Vec::new()));
        let (_, (_, mut other)) = session(&keys);
        assert_eq!(
            open(&mut other, &frames[0]),
            Err(SessionError::Forged),
            "replayed"
        );
    }

    #[test]
    fn a_stranger_cannot_make_us_wait_for_much_and_a_partner_for_no_more_than_agreed() {
        let keys = PoolKeys::create().unwrap();
        let ((mut a, _), (_, mut to_b)) = session(&keys);
        let long = a.seal(b"x").unwrap();
        assert_eq!(open(&mut to_b, &long), Err(SessionError::TooLong(17)));
        let ((mut a, _), (_, mut to_b)) = session(&keys);
        open(&mut to_b, &a.seal(b"").unwrap()).unwrap();
        open(&mut to_b, &a.seal(&[0; 100]).unwrap()).unwrap();
        let long = a.seal(&[0; 101]).unwrap();
        assert_eq!(open(&mut to_b, &long), Err(SessionError::TooLong(117)));
    }

    #[test]
    fn another_pool_another_key_and_another_program_are_named() {
        let mut keys = PoolKeys::create().unwrap();
        let start = |keys: &PoolKeys| SessionStart::new(keys, &host("a")).unwrap();
        let foreign = *start(&PoolKeys::create().unwrap()).greeting();
        let refused = |keys: &PoolKeys, theirs| start(keys).finish(theirs, &host("b")).err();
        assert!(matches!(
            refused(&keys, &foreign),
            Some(SessionError::Pool(_))
        ));
        let noise = [7; GREETING_BYTES];
        assert_eq!(refused(&keys, &noise), Some(SessionError::Greeting));
        // Two hosts one step apart in a change of the key understand each other.
        let before = keys.clone();
        keys.begin().unwrap();
        let next = keys.clone();
        keys.switch().unwrap();
        let switched = *start(&keys).greeting();
        assert_eq!(refused(&next, &switched), None);
        assert_eq!(
            refused(&before, &switched),
            Some(SessionError::Key(KeyNumber(2)))
        );
    }
}
