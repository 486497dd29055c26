//! What one host of the pair holds, and the file it is in. This module owns the file's layout:
//!
//! ```text
//! 0   magic   "pollxpai"
//! 8   u32 LE  version: 1 = first
//! 12  u32 LE  CRC-32 of the payload
//! 16  u64 LE  payload length
//! 24  payload: 16 bytes pool, u8 side (1 lower id, 2 higher), u8 standing (1 new, 2 joining,
//!              3 paired, 4 alone), u64 epoch, u64 seq, u8 1 if a prepared change follows;
//!              the change; then the entries as in the registry file (`format.rs`)
//! change:      u64 seq, u8 side, u64 life, u64 number (who asked for it), u16 key length, key,
//!              u64 version, u32 value length, value
//! ```

use super::super::Versioned;
use super::super::format::{
    BadRegistryFile, Cursor, Entries, FILE_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX, capped,
    put_entries, take_entries,
};
use std::sync::Arc;

const MAGIC: [u8; 8] = *b"pollxpai";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;
/// Bytes of a change besides its key and value.
const CHANGE_BYTES: usize = 8 + 1 + 8 + 8 + 2 + 8 + 4;
/// Longest file: the entries at their longest, one change, and what stands before them.
pub const COPY_BYTES_MAX: usize =
    FILE_BYTES_MAX + HEADER_BYTES + 64 + CHANGE_BYTES + KEY_BYTES_MAX + VALUE_BYTES_MAX;

/// Which host of the two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Side {
    /// The one with the lower id: it puts changes in order.
    Lower,
    /// The other.
    Higher,
}

impl Side {
    /// The partner's.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Lower => Self::Higher,
            Self::Higher => Self::Lower,
        }
    }
}

/// What a copy is worth.
///
/// ```text
///  New --copied--> Joining --in sync--> Paired --partner off--> Alone
///   `--copied to the partner, which holds it---> ^  <--partner holds the copy--'
///                     ^-------copied-----------  |   (Paired is overwritten, Alone never)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Standing {
    /// Never in a pair.
    New,
    /// Copied from the partner, which has not said yet that it counts on it: worth nothing.
    Joining,
    /// Of two: good together with the partner.
    Paired,
    /// Changed without the partner, whose copy is stale.
    Alone,
}

/// How often a host of this pair went on alone, was copied anew, or both.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Epoch(pub u64);

/// Number of a change, from 1.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChangeSeq(pub u64);

/// Who asked for a change: unique for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Origin {
    /// Whose client.
    pub side: Side,
    /// In which life of it.
    pub life: u64,
    /// Which of that life's.
    pub number: u64,
}

/// One key's next value.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Change {
    /// Its place in the order of all changes.
    pub seq: ChangeSeq,
    /// Who asked for it.
    pub origin: Origin,
    /// The key.
    pub key: String,
    /// The version that the key has with it.
    pub version: u64,
    /// The value.
    pub value: Vec<u8>,
}

/// All that one host holds.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct OwnCopy {
    /// What it is worth.
    pub standing: Standing,
    /// Its epoch.
    pub epoch: Epoch,
    /// The newest change in it.
    pub seq: ChangeSeq,
    /// The keys.
    pub entries: Arc<Entries>,
    /// A change that is held, and not known to be one yet. Only on the side of the higher id.
    pub prepared: Option<Change>,
}

impl OwnCopy {
    /// Of a host that was never in a pair.
    #[must_use]
    pub fn new() -> Self {
        Self {
            standing: Standing::New,
            epoch: Epoch(0),
            seq: ChangeSeq(0),
            entries: Arc::default(),
            prepared: None,
        }
    }

    /// Take a change in.
    pub(super) fn apply(&mut self, change: &Change) {
        self.seq = change.seq;
        let entry = Versioned {
            version: change.version,
            value: change.value.clone(),
        };
        Arc::make_mut(&mut self.entries).insert(change.key.clone(), entry);
    }
}

impl Default for OwnCopy {
    fn default() -> Self {
        Self::new()
    }
}

/// What is wrong with a copy.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCopy {
    /// Not such a file, not whole, or of another version.
    #[error(transparent)]
    File(#[from] BadRegistryFile),
    /// Of another pool.
    #[error("it is of pool {theirs}, this host is of pool {ours}")]
    Pool {
        /// In the file.
        theirs: uuid::Uuid,
        /// This host's.
        ours: uuid::Uuid,
    },
    /// Of the other host.
    #[error("it is the copy of the pair's other host; the ids of the two were exchanged")]
    Side,
}

/// Whose copy it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// The pool.
    pub pool: [u8; 16],
    /// Which host of it.
    pub side: Side,
}

const fn side_byte(side: Side) -> u8 {
    match side {
        Side::Lower => 1,
        Side::Higher => 2,
    }
}

pub(super) fn standing_byte(standing: Standing) -> u8 {
    match standing {
        Standing::New => 1,
        Standing::Joining => 2,
        Standing::Paired => 3,
        Standing::Alone => 4,
    }
}

pub(super) fn standing_of(byte: u8) -> Result<Standing, BadRegistryFile> {
    Ok(match byte {
        1 => Standing::New,
        2 => Standing::Joining,
        3 => Standing::Paired,
        4 => Standing::Alone,
        _ => return Err(BadRegistryFile::Nonsense("no such standing")),
    })
}

fn side_of(byte: u8) -> Result<Side, BadRegistryFile> {
    match byte {
        1 => Ok(Side::Lower),
        2 => Ok(Side::Higher),
        _ => Err(BadRegistryFile::Nonsense("no such side")),
    }
}

pub(super) fn put_key(out: &mut Vec<u8>, key: &str) {
    // Keys are checked where they come in; a longer one would be refused by who reads it.
    out.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(key.as_bytes());
}

pub(super) fn put_value(out: &mut Vec<u8>, value: &[u8]) {
    out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(value);
}

pub(super) fn take_key(from: &mut Cursor<'_>) -> Result<String, BadRegistryFile> {
    let length = u16::from_le_bytes(from.array()?).into();
    let bytes = from.take(capped("key length", length, KEY_BYTES_MAX)?)?;
    let key =
        std::str::from_utf8(bytes).map_err(|_| BadRegistryFile::Nonsense("a key is not UTF-8"))?;
    if key.is_empty() {
        return Err(BadRegistryFile::Nonsense("a key is empty"));
    }
    Ok(key.to_owned())
}

pub(super) fn take_value(from: &mut Cursor<'_>) -> Result<Vec<u8>, BadRegistryFile> {
    let length = u32::from_le_bytes(from.array()?).into();
    let bytes = from.take(capped("value length", length, VALUE_BYTES_MAX)?)?;
    Ok(bytes.to_vec())
}

pub(super) fn take_u64(from: &mut Cursor<'_>) -> Result<u64, BadRegistryFile> {
    Ok(u64::from_le_bytes(from.array()?))
}

pub(super) fn take_byte(from: &mut Cursor<'_>) -> Result<u8, BadRegistryFile> {
    Ok(from.array::<1>()?[0])
}

pub(super) fn put_change(out: &mut Vec<u8>, change: &Change) {
    out.extend_from_slice(&change.seq.0.to_le_bytes());
    out.push(side_byte(change.origin.side));
    out.extend_from_slice(&change.origin.life.to_le_bytes());
    out.extend_from_slice(&change.origin.number.to_le_bytes());
    put_key(out, &change.key);
    out.extend_from_slice(&change.version.to_le_bytes());
    put_value(out, &change.value);
}

pub(super) fn take_change(from: &mut Cursor<'_>) -> Result<Change, BadRegistryFile> {
    let seq = ChangeSeq(take_u64(from)?);
    let origin = Origin {
        side: side_of(take_byte(from)?)?,
        life: take_u64(from)?,
        number: take_u64(from)?,
    };
    let key = take_key(from)?;
    let version = take_u64(from)?;
    if version == 0 || seq.0 == 0 {
        return Err(BadRegistryFile::Nonsense("a change is numbered 0"));
    }
    Ok(Change {
        seq,
        origin,
        key,
        version,
        value: take_value(from)?,
    })
}

/// An optional change: a byte that says whether it follows.
pub(super) fn put_prepared(out: &mut Vec<u8>, prepared: Option<&Change>) {
    out.push(prepared.is_some().into());
    if let Some(change) = prepared {
        put_change(out, change);
    }
}

pub(super) fn take_prepared(from: &mut Cursor<'_>) -> Result<Option<Change>, BadRegistryFile> {
    match take_byte(from)? {
        0 => Ok(None),
        1 => take_change(from).map(Some),
        _ => Err(BadRegistryFile::Nonsense("neither a change nor none")),
    }
}

/// The file for this copy.
pub(super) fn encode(owner: Owner, copy: &OwnCopy) -> Result<Vec<u8>, BadCopy> {
    let mut payload = Vec::new();
    payload.extend_from_slice(&owner.pool);
    payload.push(side_byte(owner.side));
    payload.push(standing_byte(copy.standing));
    payload.extend_from_slice(&copy.epoch.0.to_le_bytes());
    payload.extend_from_slice(&copy.seq.0.to_le_bytes());
    put_prepared(&mut payload, copy.prepared.as_ref());
    put_entries(&mut payload, &copy.entries)?;
    let mut file = Vec::with_capacity(HEADER_BYTES + payload.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(&payload);
    Ok(file)
}

/// The copy in a file, if it is `owner`'s.
pub(super) fn decode(owner: Owner, bytes: &[u8]) -> Result<OwnCopy, BadCopy> {
    let mut head = Cursor::new(bytes);
    if head.array::<8>()? != MAGIC {
        return Err(BadRegistryFile::Magic.into());
    }
    let version = u32::from_le_bytes(head.array()?);
    if version != VERSION {
        return Err(BadRegistryFile::Version(version).into());
    }
    let said = u32::from_le_bytes(head.array()?);
    let length = capped("length", take_u64(&mut head)?, COPY_BYTES_MAX)?;
    let payload = head.take(length)?;
    head.at_end("bytes follow the end")?;
    let found = crc32fast::hash(payload);
    if found != said {
        return Err(BadRegistryFile::Crc { found, said }.into());
    }
    let mut body = Cursor::new(payload);
    let pool = body.array::<16>()?;
    if pool != owner.pool {
        return Err(BadCopy::Pool {
            theirs: uuid::Uuid::from_bytes(pool),
            ours: uuid::Uuid::from_bytes(owner.pool),
        });
    }
    if side_of(take_byte(&mut body)?)? != owner.side {
        return Err(BadCopy::Side);
    }
    let copy = OwnCopy {
        standing: standing_of(take_byte(&mut body)?)?,
        epoch: Epoch(take_u64(&mut body)?),
        seq: ChangeSeq(take_u64(&mut body)?),
        prepared: take_prepared(&mut body)?,
        entries: Arc::new(take_entries(&mut body)?),
    };
    body.at_end("bytes follow the last entry")?;
    let next = copy.seq.0.checked_add(1);
    if let Some(change) = &copy.prepared
        && (copy.standing != Standing::Paired || Some(change.seq.0) != next)
    {
        return Err(BadRegistryFile::Nonsense("a change is prepared that cannot be next").into());
    }
    if (copy.standing == Standing::New) != (copy.epoch.0 == 0) {
        return Err(BadRegistryFile::Nonsense("its epoch is not of its standing").into());
    }
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWNER: Owner = Owner {
        pool: [7; 16],
        side: Side::Higher,
    };

    fn sample() -> OwnCopy {
        let change = |seq, key: &str| Change {
            seq: ChangeSeq(seq),
            origin: Origin {
                side: Side::Lower,
                life: 77,
                number: seq,
            },
            key: key.to_owned(),
            version: 1,
            value: vec![7; 30],
        };
        let mut copy = OwnCopy::new();
        (copy.standing, copy.epoch) = (Standing::Paired, Epoch(3));
        copy.apply(&change(1, "vm/1"));
        copy.apply(&change(2, "vm/2"));
        copy.prepared = Some(change(3, "vm/3"));
        copy
    }

    #[test]
    fn a_copy_survives_its_own_file() {
        for copy in [sample(), OwnCopy::new()] {
            assert_eq!(decode(OWNER, &encode(OWNER, &copy).unwrap()), Ok(copy));
        }
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let file = encode(OWNER, &sample()).unwrap();
        for n in 0..file.len() {
            assert!(decode(OWNER, &file[..n]).is_err(), "cut at {n}");
            for bit in 0..8 {
                let mut bad = file.clone();
                bad[n] ^= 1 << bit;
                assert!(decode(OWNER, &bad).is_err(), "byte {n} bit {bit}");
            }
        }
    }

    #[test]
    fn the_copy_of_another_pool_or_host_is_refused_in_words() {
        let file = encode(OWNER, &sample()).unwrap();
        let other = Owner {
            pool: [8; 16],
            ..OWNER
        };
        assert!(matches!(decode(other, &file), Err(BadCopy::Pool { .. })));
        let other = Owner {
            side: Side::Lower,
            ..OWNER
        };
        assert_eq!(decode(other, &file), Err(BadCopy::Side));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_copy(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(OWNER, &bytes);
            // And with a header that lets them through to the contents.
            let payload: Vec<u8> = OWNER.pool.iter().copied().chain([2]).chain(bytes).collect();
            let mut file = MAGIC.to_vec();
            file.extend_from_slice(&VERSION.to_le_bytes());
            file.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
            file.extend_from_slice(&(payload.len() as u64).to_le_bytes());
            file.extend_from_slice(&payload);
            let _ = decode(OWNER, &file);
        }
    }
}
