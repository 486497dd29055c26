//! Payloads of link tests, little-endian. This file alone owns their layout.
//!
//! `ProbeAck` (control lane), 32 bytes and the text:
//!
//! ```text
//! u8   version, 1        u8  kind: 0 invalid, 1 ping, 2 pong, 3 received, 4 refused
//! u16  bytes of the text
//! u32  reserved, zero
//! u64  test              u64 number of the question
//! u64  received: payload bytes of this test so far
//! ...  refused: why, UTF-8
//! ```
//!
//! `Probe` (epoch lane), 24 bytes and filling:
//!
//! ```text
//! u8   version, 1        u8  1 if an answer is wanted, else 0
//! u16  reserved, zero    u32 reserved, zero
//! u64  test              u64 number of the question
//! ...  filling, not looked at
//! ```
//!
//! Versions:
//! - 1: first.

use bytes::{BufMut, Bytes, BytesMut};

const VERSION: u8 = 1;
/// Bytes of a `ProbeAck` before the text.
const TALK_BYTES: usize = 32;
/// Bytes of a `Probe` before the filling.
pub const PIECE_BYTES: usize = 24;
/// Longest reason of a refusal, bytes.
const TEXT_BYTES_MAX: usize = 512;

/// Number a tester gives its test, drawn at random: answers to an older one are told apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct TestId(pub u64);

/// What the two sides say on the control lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Talk {
    /// Answer this at once.
    Ping {
        /// The test.
        test: TestId,
        /// Its question.
        question: u64,
    },
    /// The answer to a ping.
    Pong {
        /// The test.
        test: TestId,
        /// The ping's question.
        question: u64,
    },
    /// The answer to a piece that wanted one.
    Received {
        /// The test.
        test: TestId,
        /// The piece's question.
        question: u64,
        /// Payload bytes of this test received so far.
        bytes: u64,
    },
    /// This test is not served, or not any more.
    Refused {
        /// The test.
        test: TestId,
        /// Why, for a person.
        reason: String,
    },
}

/// Bytes that are no payload of a link test.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a link test's {what} is not understood: run the same pollux version on both hosts")]
pub struct BadProbe {
    what: &'static str,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl Talk {
    /// The test it is about.
    #[must_use]
    pub const fn test(&self) -> TestId {
        match self {
            Self::Ping { test, .. }
            | Self::Pong { test, .. }
            | Self::Received { test, .. }
            | Self::Refused { test, .. } => *test,
        }
    }

    /// As the payload of a `ProbeAck` frame.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let (kind, test, question, received, text) = match self {
            Self::Ping { test, question } => (1, test, *question, 0, ""),
            Self::Pong { test, question } => (2, test, *question, 0, ""),
            Self::Received {
                test,
                question,
                bytes,
            } => (3, test, *question, *bytes, ""),
            Self::Refused { test, reason } => (4, test, 0, 0, reason.as_str()),
        };
        let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        let mut out = BytesMut::with_capacity(TALK_BYTES + text.len());
        out.put_u8(VERSION);
        out.put_u8(kind);
        out.put_u16_le(u16::try_from(text.len()).unwrap_or_default());
        out.put_u32_le(0);
        out.put_u64_le(test.0);
        out.put_u64_le(question);
        out.put_u64_le(received);
        out.put_slice(text.as_bytes());
        out.freeze()
    }

    /// From the payload of a `ProbeAck` frame.
    ///
    /// # Errors
    /// [`BadProbe`].
    pub fn parse(payload: &[u8]) -> Result<Self, BadProbe> {
        let bad = |what| BadProbe { what };
        if payload.len() < TALK_BYTES || payload[0] != VERSION {
            return Err(bad("message"));
        }
        let text_bytes = usize::from(u16::from_le_bytes([payload[2], payload[3]]));
        if text_bytes != payload.len() - TALK_BYTES
            || text_bytes > TEXT_BYTES_MAX
            || payload[4..8] != [0; 4]
        {
            return Err(bad("message length"));
        }
        let (test, question) = (TestId(u64_at(payload, 8)), u64_at(payload, 16));
        Ok(match payload[1] {
            1 => Self::Ping { test, question },
            2 => Self::Pong { test, question },
            3 => Self::Received {
                test,
                question,
                bytes: u64_at(payload, 24),
            },
            4 => Self::Refused {
                test,
                reason: String::from_utf8_lossy(&payload[TALK_BYTES..]).into_owned(),
            },
            _ => return Err(bad("message kind")),
        })
    }
}

/// The head of a piece of test traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The test.
    pub test: TestId,
    /// The question to answer, if an answer is wanted.
    pub question: Option<u64>,
}

impl Piece {
    /// As the payload of a `Probe` frame of `bytes` bytes in all, filled up from `filling`
    /// (as far as it reaches, with zeros beyond).
    #[must_use]
    pub fn to_bytes(&self, bytes: usize, filling: &[u8]) -> Bytes {
        let bytes = bytes.max(PIECE_BYTES);
        let mut out = BytesMut::with_capacity(bytes);
        out.put_u8(VERSION);
        out.put_u8(u8::from(self.question.is_some()));
        out.put_bytes(0, 6);
        out.put_u64_le(self.test.0);
        out.put_u64_le(self.question.unwrap_or_default());
        let fill = bytes - PIECE_BYTES;
        let from_filling = fill.min(filling.len());
        out.put_slice(&filling[..from_filling]);
        out.put_bytes(0, fill - from_filling);
        out.freeze()
    }

    /// From the payload of a `Probe` frame.
    ///
    /// # Errors
    /// [`BadProbe`].
    pub fn parse(payload: &[u8]) -> Result<Self, BadProbe> {
        let bad = BadProbe { what: "piece" };
        if payload.len() < PIECE_BYTES
            || payload[0] != VERSION
            || payload[1] > 1
            || payload[2..8] != [0; 6]
        {
            return Err(bad);
        }
        Ok(Self {
            test: TestId(u64_at(payload, 8)),
            question: (payload[1] == 1).then(|| u64_at(payload, 16)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FrameKind;

    #[test]
    fn what_is_said_comes_back() {
        let test = TestId(u64::MAX - 1);
        for talk in [
            Talk::Ping { test, question: 7 },
            Talk::Pong { test, question: 7 },
            Talk::Received {
                test,
                question: 8,
                bytes: 1 << 60,
            },
            Talk::Refused {
                test,
                reason: "another test runs".to_owned(),
            },
        ] {
            assert_eq!(Talk::parse(&talk.to_bytes()), Ok(talk.clone()));
            assert_eq!(talk.test(), test);
        }
        let long = Talk::Refused {
            test,
            reason: "ä".repeat(4000),
        };
        let bytes = long.to_bytes();
        assert!(bytes.len() <= FrameKind::ProbeAck.payload_bytes_max());
        assert!(Talk::parse(&bytes).is_ok());
    }

    #[test]
    fn pieces_come_back_at_any_size() {
        for question in [None, Some(3)] {
            let piece = Piece {
                test: TestId(5),
                question,
            };
            for bytes in [0, PIECE_BYTES, 1000, 1 << 20] {
                let payload = piece.to_bytes(bytes, &[1; 500]);
                assert_eq!(payload.len(), bytes.max(PIECE_BYTES));
                assert_eq!(Piece::parse(&payload), Ok(piece));
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let talk = Talk::Refused {
            test: TestId(1),
            reason: "no".to_owned(),
        };
        let piece = Piece {
            test: TestId(1),
            question: Some(2),
        };
        let (talk, piece) = (talk.to_bytes(), piece.to_bytes(40, &[]));
        for cut in 0..talk.len() {
            assert!(Talk::parse(&talk[..cut]).is_err(), "{cut} bytes");
        }
        for cut in 0..PIECE_BYTES {
            assert!(Piece::parse(&piece[..cut]).is_err(), "{cut} bytes");
        }
        for at in 0..8 {
            let (mut talk, mut piece) = (talk.to_vec(), piece.to_vec());
            talk[at] ^= 0x40;
            piece[at] ^= 0x40;
            assert!(Talk::parse(&talk).is_err(), "byte {at}");
            assert!(Piece::parse(&piece).is_err(), "byte {at}");
        }
    }
}
