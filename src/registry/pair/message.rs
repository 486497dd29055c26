//! What the two hosts of a pair say to each other. This module owns the bytes of a message;
//! sealing and framing are the transport's.
//!
//! Version 1: one byte that says which, then its fields, little-endian, sized fields capped
//! before anything is allocated.

use super::super::Versioned;
use super::super::format::{BadRegistryFile, Cursor, Entries, put_entries, take_entries};
use super::copy::{
    COPY_BYTES_MAX, Change, ChangeSeq, Epoch, Standing, put_change, put_key, put_prepared,
    put_value, standing_byte, standing_of, take_byte, take_change, take_key, take_prepared,
    take_u64, take_value,
};
use std::sync::Arc;

/// Longest message: a copy.
pub const MESSAGE_BYTES_MAX: usize = COPY_BYTES_MAX;

/// Why the lower side did not do what was asked.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Refusal {
    /// The key is at another version; holds what is there.
    Lost(Option<Versioned<Vec<u8>>>),
    /// The registry is full.
    Full,
}

/// From one host to the other. Within a session they arrive in order, or not at all from some
/// point on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Message {
    /// First in a session: what the sender holds.
    Hello {
        /// What its copy is worth.
        standing: Standing,
        /// The copy's epoch.
        epoch: Epoch,
        /// The newest change in it.
        seq: ChangeSeq,
        /// It has been in sync in this life, or is alone: it serves.
        live: bool,
        /// What it holds prepared.
        prepared: Option<Change>,
    },
    /// Lower to higher, both live: changes up to this one count.
    Resume {
        /// The newest.
        seq: ChangeSeq,
    },
    /// To a host that is not live: hold this instead of what you have.
    Copy {
        /// The epoch it will have.
        epoch: Epoch,
        /// The newest change in it.
        seq: ChangeSeq,
        /// The keys.
        entries: Arc<Entries>,
    },
    /// The copy is held, durably.
    Held,
    /// The copy that you hold counts.
    InSync,
    /// Higher to lower: a change that a client asks for.
    Request {
        /// Its number in this life of the higher side.
        number: u64,
        /// In which life.
        life: u64,
        /// The key.
        key: String,
        /// The version it must be at.
        expected: Option<u64>,
        /// The value.
        value: Vec<u8>,
    },
    /// Lower to higher: that request did nothing.
    Refused {
        /// Which.
        number: u64,
        /// Why.
        why: Refusal,
    },
    /// Lower to higher: are you there?
    Probe,
    /// I am.
    Present,
    /// Lower to higher: hold this.
    Prepare(Change),
    /// It is held, durably.
    Prepared {
        /// Which.
        seq: ChangeSeq,
    },
    /// Lower to higher: it counts.
    Commit {
        /// Which.
        seq: ChangeSeq,
    },
    /// The sender serves nothing any more in this life: as good as its power being off.
    Farewell,
}

fn put_u64(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(&n.to_le_bytes());
}

fn put_version(out: &mut Vec<u8>, version: Option<u64>) {
    out.push(version.is_some().into());
    put_u64(out, version.unwrap_or(0));
}

fn take_flag(from: &mut Cursor<'_>) -> Result<bool, BadRegistryFile> {
    match take_byte(from)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(BadRegistryFile::Nonsense("neither yes nor no")),
    }
}

fn take_version(from: &mut Cursor<'_>) -> Result<Option<u64>, BadRegistryFile> {
    let there = take_flag(from)?;
    let version = take_u64(from)?;
    Ok(there.then_some(version))
}

impl Message {
    /// As bytes.
    ///
    /// # Errors
    /// If the entries are more than a registry takes.
    pub fn encode(&self) -> Result<Vec<u8>, BadRegistryFile> {
        let mut out = Vec::new();
        match self {
            Self::Hello {
                standing,
                epoch,
                seq,
                live,
                prepared,
            } => {
                out.extend_from_slice(&[1, standing_byte(*standing)]);
                put_u64(&mut out, epoch.0);
                put_u64(&mut out, seq.0);
                out.push((*live).into());
                put_prepared(&mut out, prepared.as_ref());
            }
            Self::Resume { seq } => {
                out.push(2);
                put_u64(&mut out, seq.0);
            }
            Self::Copy {
                epoch,
                seq,
                entries,
            } => {
                out.push(3);
                put_u64(&mut out, epoch.0);
                put_u64(&mut out, seq.0);
                put_entries(&mut out, entries)?;
            }
            Self::Held => out.push(4),
            Self::InSync => out.push(5),
            Self::Request {
                number,
                life,
                key,
                expected,
                value,
            } => {
                out.push(6);
                put_u64(&mut out, *number);
                put_u64(&mut out, *life);
                put_key(&mut out, key);
                put_version(&mut out, *expected);
                put_value(&mut out, value);
            }
            Self::Refused { number, why } => {
                out.push(7);
                put_u64(&mut out, *number);
                match why {
                    Refusal::Full => out.push(1),
                    Refusal::Lost(None) => out.push(2),
                    Refusal::Lost(Some(found)) => {
                        out.push(3);
                        put_u64(&mut out, found.version);
                        put_value(&mut out, &found.value);
                    }
                }
            }
            Self::Probe => out.push(8),
            Self::Present => out.push(9),
            Self::Prepare(change) => {
                out.push(10);
                put_change(&mut out, change);
            }
            Self::Prepared { seq } => {
                out.push(11);
                put_u64(&mut out, seq.0);
            }
            Self::Commit { seq } => {
                out.push(12);
                put_u64(&mut out, seq.0);
            }
            Self::Farewell => out.push(13),
        }
        Ok(out)
    }

    /// From bytes that may be anything.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRegistryFile> {
        let mut from = Cursor::new(bytes);
        let message = match take_byte(&mut from)? {
            1 => Self::Hello {
                standing: standing_of(take_byte(&mut from)?)?,
                epoch: Epoch(take_u64(&mut from)?),
                seq: ChangeSeq(take_u64(&mut from)?),
                live: take_flag(&mut from)?,
                prepared: take_prepared(&mut from)?,
            },
            2 => Self::Resume {
                seq: ChangeSeq(take_u64(&mut from)?),
            },
            3 => Self::Copy {
                epoch: Epoch(take_u64(&mut from)?),
                seq: ChangeSeq(take_u64(&mut from)?),
                entries: Arc::new(take_entries(&mut from)?),
            },
            4 => Self::Held,
            5 => Self::InSync,
            6 => Self::Request {
                number: take_u64(&mut from)?,
                life: take_u64(&mut from)?,
                key: take_key(&mut from)?,
                expected: take_version(&mut from)?,
                value: take_value(&mut from)?,
            },
            7 => Self::Refused {
                number: take_u64(&mut from)?,
                why: match take_byte(&mut from)? {
                    1 => Refusal::Full,
                    2 => Refusal::Lost(None),
                    3 => Refusal::Lost(Some(Versioned {
                        version: take_u64(&mut from)?,
                        value: take_value(&mut from)?,
                    })),
                    _ => return Err(BadRegistryFile::Nonsense("no such refusal")),
                },
            },
            8 => Self::Probe,
            9 => Self::Present,
            10 => Self::Prepare(take_change(&mut from)?),
            11 => Self::Prepared {
                seq: ChangeSeq(take_u64(&mut from)?),
            },
            12 => Self::Commit {
                seq: ChangeSeq(take_u64(&mut from)?),
            },
            13 => Self::Farewell,
            _ => return Err(BadRegistryFile::Nonsense("no such message")),
        };
        from.at_end("bytes follow the message")?;
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::super::copy::{Origin, Side};
    use super::*;
    use proptest::prelude::*;

    fn versioned() -> impl Strategy<Value = Versioned<Vec<u8>>> {
        (1..u64::MAX, proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(version, value)| Versioned { version, value })
    }

    fn change() -> impl Strategy<Value = Change> {
        let lower = any::<bool>();
        (
            lower,
            1..u64::MAX,
            any::<(u64, u64)>(),
            "[a-z/]{1,20}",
            versioned(),
        )
            .prop_map(|(lower, seq, (life, number), key, entry)| Change {
                seq: ChangeSeq(seq),
                origin: Origin {
                    side: if lower { Side::Lower } else { Side::Higher },
                    life,
                    number,
                },
                key,
                version: entry.version,
                value: entry.value,
            })
    }

    fn message() -> impl Strategy<Value = Message> {
        let entries = proptest::collection::btree_map("[a-z]{1,9}", versioned(), 0..5);
        let hello = (
            0..4u8,
            any::<(u64, u64, bool)>(),
            proptest::option::of(change()),
        );
        let value = proptest::collection::vec(any::<u8>(), 0..40);
        prop_oneof![
            hello.prop_map(|(standing, (epoch, seq, live), prepared)| Message::Hello {
                standing: standing_of(standing + 1).unwrap(),
                epoch: Epoch(epoch),
                seq: ChangeSeq(seq),
                live,
                prepared,
            }),
            (any::<(u64, u64)>(), entries).prop_map(|((epoch, seq), entries)| Message::Copy {
                epoch: Epoch(epoch),
                seq: ChangeSeq(seq),
                entries: Arc::new(entries),
            }),
            (any::<(u64, u64, Option<u64>)>(), "[a-z]{1,9}", value).prop_map(
                |((number, life, expected), key, value)| Message::Request {
                    number,
                    life,
                    key,
                    expected,
                    value,
                }
            ),
            (any::<u64>(), proptest::option::of(versioned())).prop_map(|(number, found)| {
                Message::Refused {
                    number,
                    why: Refusal::Lost(found),
                }
            }),
            change().prop_map(Message::Prepare),
            any::<u64>().prop_map(|seq| Message::Commit {
                seq: ChangeSeq(seq)
            }),
            any::<u64>().prop_map(|seq| Message::Prepared {
                seq: ChangeSeq(seq)
            }),
            any::<u64>().prop_map(|seq| Message::Resume {
                seq: ChangeSeq(seq)
            }),
            any::<u64>().prop_map(|number| Message::Refused {
                number,
                why: Refusal::Full,
            }),
            proptest::sample::select(vec![
                Message::Held,
                Message::InSync,
                Message::Probe,
                Message::Present,
                Message::Farewell,
            ]),
        ]
    }

    proptest! {
        #[test]
        fn a_message_survives_its_bytes_and_no_cut_of_them(message in message()) {
            let bytes = message.encode().unwrap();
            prop_assert_eq!(Message::decode(&bytes), Ok(message));
            for cut in 0..bytes.len() {
                prop_assert!(Message::decode(&bytes[..cut]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_an_error_or_a_message_of_those_bytes(
            kind in 0..15u8,
            rest in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes: Vec<u8> = std::iter::once(kind).chain(rest).collect();
            if let Ok(message) = Message::decode(&bytes) {
                let again = message.encode().unwrap();
                prop_assert_eq!(Message::decode(&again), Ok(message));
            }
        }
    }

    #[test]
    fn a_size_beyond_its_limit_is_refused_before_it_is_allocated() {
        let mut bytes = vec![6];
        bytes.extend_from_slice(&[0; 16]);
        bytes.extend_from_slice(&[1, 0, b'k', 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        let refused = Message::decode(&bytes).unwrap_err();
        assert!(
            matches!(
                refused,
                BadRegistryFile::TooBig {
                    what: "value length",
                    ..
                }
            ),
            "{refused}"
        );
    }
}
