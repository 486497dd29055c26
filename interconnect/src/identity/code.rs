//! The short code two people compare when two hosts meet for the first time. Pure.
//!
//! The hosts show each other their certificates over a TLS connection that trusts anybody,
//! and this exchange runs inside it:
//!
//! ```text
//!  dialler                                               acceptor
//!    Commit { H(dialler, acceptor, Nd) }  ------------->
//!                 <-------------------------------------   Answer { Na }
//!    Reveal { Nd }  ----------------------------------->   checks the commitment
//!    code = H(dialler, acceptor, Nd, Na) mod 10^8          the same
//! ```
//!
//! `dialler` and `acceptor` are fingerprint and name of each as that side sees them: the
//! own identity, and the certificate the handshake showed. Both people read the code aloud;
//! each pins only what a person confirmed.
//!
//! Why eight digits are enough. A man in the middle holds one exchange with each host and
//! shows both a certificate of his own, so the two codes come from different inputs; he wins
//! only if they are equal. With the dialler his last choice is the `Na` he answers, made
//! before `Nd` is revealed: the commitment binds the dialler and hides its 256 random bits.
//! With the acceptor his last choice is the `Nd` he commits to, made before the acceptor's
//! fresh `Na` is seen. So whichever exchange he finishes last ends with 256 random bits of
//! an honest host that he could not see when he made his last choice, and its code is
//! uniform to him: he can compute codes but not search for a pair that is equal. One attempt
//! succeeds with probability 10^-8 (plus the bias of a 64-bit number modulo 10^8, below
//! 10^-11, and finding a second preimage of SHA-256, which counts as nothing).
//!
//! That holds for one attempt. He knows both codes before the people do and could break off
//! and begin again until they are equal; therefore [`Exchange::counts`]: once this side's
//! nonce is out, the meeting is over whatever comes of it, and only a person starts another.
//! (The scheme is that of short authenticated strings: Vaudenay, CRYPTO 2005, section 4;
//! Bluetooth Core 5.4, Vol 2 Part H 7.2.1, "numeric comparison".)
//!
//! Message, little-endian, 40 bytes and the name:
//!
//! ```text
//! 4    magic `PLXM`
//! u8   version, 1        u8  kind: 0 invalid, 1 commit, 2 answer, 3 reveal
//! u8   bytes of the name u8  reserved, zero
//! 32   commitment or nonce
//! ...  name of the sender, UTF-8
//! ```

use super::Fingerprint;
use ring::digest::{Context, SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;

/// Bytes of a message before the name.
pub const MESSAGE_FIXED_BYTES: usize = 40;
/// Longest name of a host, in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Digits of a code.
const DIGITS: usize = 8;
/// One more than the largest code.
const CODES: u64 = 100_000_000;
const MAGIC: [u8; 4] = *b"PLXM";
const VERSION: u8 = 1;
const _: () = assert!(NAME_BYTES_MAX <= u8::MAX as usize);

/// What two people compare: eight digits, shown as `1234 5678`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Code(u32);

/// Text that is not a code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a code: it has eight digits, like 1234 5678, as `pollux link create` shows it on the partner"
)]
pub struct BadCode(pub String);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04} {:04}", self.0 / 10_000, self.0 % 10_000)
    }
}

impl std::str::FromStr for Code {
    type Err = BadCode;
    /// Blanks and dashes between the digits do not count.
    fn from_str(text: &str) -> Result<Self, BadCode> {
        let bad = || BadCode(text.chars().take(40).collect());
        let mut value = 0;
        let mut digits = 0;
        for c in text.trim().chars().filter(|c| !matches!(c, ' ' | '-')) {
            let digit = c.to_digit(10).ok_or_else(bad)?;
            digits += 1;
            if digits > DIGITS {
                return Err(bad());
            }
            value = value * 10 + digit;
        }
        if digits == DIGITS {
            Ok(Self(value))
        } else {
            Err(bad())
        }
    }
}

/// Fresh random bytes of one meeting.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 32]);

impl Nonce {
    /// From the kernel.
    ///
    /// # Errors
    /// [`MeetingError::NoRandom`].
    pub fn random() -> Result<Self, MeetingError> {
        let mut bytes = [0; 32];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| MeetingError::NoRandom)?;
        Ok(Self(bytes))
    }
}

/// One of the two hosts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Party {
    /// Of its certificate.
    pub fingerprint: Fingerprint,
    /// What it calls itself; at most [`NAME_BYTES_MAX`] bytes count.
    pub name: String,
}

/// Why two hosts did not get to know each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MeetingError {
    /// Not a message of this exchange.
    #[error(
        "the peer's message is not understood ({0}): run the same pollux version on both hosts"
    )]
    Message(&'static str),
    /// A message at the wrong time.
    #[error("the peer does not keep to the order of the exchange: begin again on both hosts")]
    Order,
    /// The revealed nonce is not the one committed to.
    #[error(
        "the peer's nonce is not the one it had committed to: somebody may be between the hosts; check the cable, then begin again on both hosts"
    )]
    Commitment,
    /// The peer shows this host's own identity.
    #[error("the peer shows this host's own identity: give the partner's address, not this host's")]
    Own,
    /// No random numbers.
    #[error("the kernel gives no random numbers: look at its log")]
    NoRandom,
}

/// A message of the exchange.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    kind: Kind,
    value: [u8; 32],
    name: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Kind {
    Commit = 1,
    Answer = 2,
    Reveal = 3,
}

impl Message {
    /// As sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let name = short(&self.name);
        let mut out = Vec::with_capacity(MESSAGE_FIXED_BYTES + name.len());
        out.extend_from_slice(&MAGIC);
        out.push(VERSION);
        out.push(self.kind as u8);
        out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        out.push(0);
        out.extend_from_slice(&self.value);
        out.extend_from_slice(name.as_bytes());
        out
    }

    /// How many bytes of name follow the first [`MESSAGE_FIXED_BYTES`].
    ///
    /// # Errors
    /// [`MeetingError::Message`] if they are no message of this version.
    pub fn name_bytes(fixed: &[u8; MESSAGE_FIXED_BYTES]) -> Result<usize, MeetingError> {
        if fixed[..4] != MAGIC {
            return Err(MeetingError::Message("no magic"));
        }
        if fixed[4] != VERSION {
            return Err(MeetingError::Message("another version"));
        }
        let name = usize::from(fixed[6]);
        if name > NAME_BYTES_MAX || fixed[7] != 0 {
            return Err(MeetingError::Message("lengths"));
        }
        Ok(name)
    }

    /// From the fixed part and the name's bytes.
    ///
    /// # Errors
    /// [`MeetingError::Message`].
    pub fn parse(fixed: &[u8; MESSAGE_FIXED_BYTES], name: &[u8]) -> Result<Self, MeetingError> {
        if Self::name_bytes(fixed)? != name.len() {
            return Err(MeetingError::Message("length of the name"));
        }
        let kind = match fixed[5] {
            1 => Kind::Commit,
            2 => Kind::Answer,
            3 => Kind::Reveal,
            _ => return Err(MeetingError::Message("kind")),
        };
        let mut value = [0; 32];
        value.copy_from_slice(&fixed[8..]);
        Ok(Self {
            kind,
            value,
            name: std::str::from_utf8(name)
                .map_err(|_| MeetingError::Message("name"))?
                .to_owned(),
        })
    }
}

/// At most [`NAME_BYTES_MAX`] bytes of a name, as sent and as hashed.
fn short(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME_BYTES_MAX)]
}

/// How far an exchange is.
///
/// ```text
///  dialler:  Begin -> Committed -> Done        acceptor:  Begin -> Answered -> Done
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Nothing was said.
    Begin,
    /// Dialler: the commitment is out, the nonce is not.
    Committed,
    /// Acceptor: the nonce is out; this is what the dialler is bound to.
    Answered([u8; 32]),
    /// There is a code, or there will never be one.
    Done,
}

/// One side of the exchange on one connection.
pub struct Exchange {
    dials: bool,
    me: Party,
    /// The peer's certificate; its name comes with its first message.
    peer: Party,
    nonce: Nonce,
    step: Step,
}

/// What a message led to.
#[derive(Clone, PartialEq, Eq)]
pub struct Progress {
    /// To be sent to the peer.
    pub send: Option<Message>,
    /// Who the peer says it is, and the code to compare: the exchange is over.
    pub code: Option<(Party, Code)>,
}

impl Exchange {
    /// A side with a nonce nobody has seen.
    ///
    /// # Errors
    /// [`MeetingError::Own`].
    pub fn new(
        dials: bool,
        me: Party,
        peer: Fingerprint,
        nonce: Nonce,
    ) -> Result<Self, MeetingError> {
        if me.fingerprint == peer {
            return Err(MeetingError::Own);
        }
        let peer = Party {
            fingerprint: peer,
            name: String::new(),
        };
        Ok(Self {
            dials,
            me,
            peer,
            nonce,
            step: Step::Begin,
        })
    }

    /// What the dialler says first; `None` for the acceptor.
    pub fn begin(&mut self) -> Option<Message> {
        if !self.dials || self.step != Step::Begin {
            return None;
        }
        self.step = Step::Committed;
        let value = commitment(&self.me, self.peer.fingerprint, &self.nonce);
        Some(self.message(Kind::Commit, value))
    }

    fn message(&self, kind: Kind, value: [u8; 32]) -> Message {
        Message {
            kind,
            value,
            name: self.me.name.clone(),
        }
    }

    /// Whether this side's nonce is out: no second exchange without a person's wish.
    #[must_use]
    pub fn counts(&self) -> bool {
        matches!(self.step, Step::Answered(_) | Step::Done)
    }

    /// Take the peer's message. After an error the exchange is over.
    ///
    /// # Errors
    /// [`MeetingError`].
    pub fn handle(&mut self, message: Message) -> Result<Progress, MeetingError> {
        let step = std::mem::replace(&mut self.step, Step::Done);
        match (step, message.kind) {
            (Step::Begin, Kind::Commit) if !self.dials => {
                self.peer.name = message.name;
                self.step = Step::Answered(message.value);
                Ok(Progress {
                    send: Some(self.message(Kind::Answer, self.nonce.0)),
                    code: None,
                })
            }
            (Step::Committed, Kind::Answer) => {
                self.peer.name = message.name;
                let code = code(&self.me, &self.peer, &self.nonce, &Nonce(message.value));
                Ok(Progress {
                    send: Some(self.message(Kind::Reveal, self.nonce.0)),
                    code: Some((self.peer.clone(), code)),
                })
            }
            (Step::Answered(bound), Kind::Reveal) => {
                let revealed = Nonce(message.value);
                let expected = commitment(&self.peer, self.me.fingerprint, &revealed);
                if expected != bound || message.name != self.peer.name {
                    return Err(MeetingError::Commitment);
                }
                let code = code(&self.peer, &self.me, &revealed, &self.nonce);
                Ok(Progress {
                    send: None,
                    code: Some((self.peer.clone(), code)),
                })
            }
            _ => Err(MeetingError::Order),
        }
    }
}

/// A hash of parts, each with its length so that no two lists of parts look alike.
fn hash(label: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in [label.as_bytes()].iter().chain(parts) {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

fn commitment(dialler: &Party, acceptor: Fingerprint, nonce: &Nonce) -> [u8; 32] {
    hash(
        "pollux meeting commitment 1",
        &[
            &dialler.fingerprint.0,
            short(&dialler.name).as_bytes(),
            &acceptor.0,
            &nonce.0,
        ],
    )
}

fn code(dialler: &Party, acceptor: &Party, from_dialler: &Nonce, from_acceptor: &Nonce) -> Code {
    let digest = hash(
        "pollux meeting code 1",
        &[
            &dialler.fingerprint.0,
            short(&dialler.name).as_bytes(),
            &acceptor.fingerprint.0,
            short(&acceptor.name).as_bytes(),
            &from_dialler.0,
            &from_acceptor.0,
        ],
    );
    let mut word = [0; 8];
    word.copy_from_slice(&digest[..8]);
    Code(u32::try_from(u64::from_le_bytes(word) % CODES).unwrap_or_default())
}

#[cfg(test)]
mod tests;
