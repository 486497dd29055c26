//! The registry file. This module owns its layout:
//!
//! ```text
//! 0   magic   "pollxreg"
//! 8   u32 LE  version: 1 = first
//! 12  u32 LE  CRC-32 of the payload
//! 16  u64 LE  payload length
//! 24  payload: u32 count, then per entry: u16 key length, key (UTF-8),
//!              u64 version, u32 value length, value; keys in byte order
//! ```

use super::Versioned;
use std::collections::BTreeMap;

/// Longest key: `vm/` and a uuid are 39.
pub const KEY_BYTES_MAX: usize = 256;
/// Longest value: a VM spec is a few KiB.
pub const VALUE_BYTES_MAX: usize = 64 * 1024;
/// Most keys: a few for each VM of a pool this registry is meant for.
pub const ENTRIES_MAX: usize = 4096;
/// Longest file. The whole file is written for each change, so it must stay small.
pub const FILE_BYTES_MAX: usize = 8 * 1024 * 1024;

const MAGIC: [u8; 8] = *b"pollxreg";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;

const _: () = assert!(VALUE_BYTES_MAX + KEY_BYTES_MAX < FILE_BYTES_MAX);

/// All keys with their values.
pub(super) type Entries = BTreeMap<String, Versioned<Vec<u8>>>;

/// What is wrong with a registry file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRegistryFile {
    /// Too short for what its header says.
    #[error("it ends after {have} bytes where {need} are needed")]
    Short {
        /// Bytes there.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// Does not begin like one.
    #[error("it does not begin like a registry file")]
    Magic,
    /// Written by another pollux.
    #[error("its format is version {0}, this pollux knows version {VERSION}")]
    Version(u32),
    /// The bytes are not those that were written.
    #[error("its checksum is {found:08x} where {said:08x} was written")]
    Crc {
        /// Of the bytes there.
        found: u32,
        /// In the header.
        said: u32,
    },
    /// Larger than any pollux writes.
    #[error("its {what} is {size}, the most is {max}")]
    TooBig {
        /// Which size.
        what: &'static str,
        /// What it says.
        size: u64,
        /// The limit.
        max: usize,
    },
    /// A key is not text, out of order, at version 0, or bytes follow the last entry.
    #[error("its contents make no sense: {0}")]
    Nonsense(&'static str),
}

/// The file for these entries.
pub(super) fn encode(entries: &Entries) -> Result<Vec<u8>, BadRegistryFile> {
    let mut payload = Vec::new();
    put_entries(&mut payload, entries)?;
    if HEADER_BYTES + payload.len() > FILE_BYTES_MAX {
        return Err(too_big("length", payload.len(), FILE_BYTES_MAX));
    }
    let mut file = Vec::with_capacity(HEADER_BYTES + payload.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    file.extend_from_slice(
        &u64::try_from(payload.len())
            .unwrap_or(u64::MAX)
            .to_le_bytes(),
    );
    file.extend_from_slice(&payload);
    Ok(file)
}

fn too_big(what: &'static str, size: usize, max: usize) -> BadRegistryFile {
    BadRegistryFile::TooBig {
        what,
        size: u64::try_from(size).unwrap_or(u64::MAX),
        max,
    }
}

/// The entries, as they stand in the payload.
pub(super) fn put_entries(payload: &mut Vec<u8>, entries: &Entries) -> Result<(), BadRegistryFile> {
    if entries.len() > ENTRIES_MAX {
        return Err(too_big("number of keys", entries.len(), ENTRIES_MAX));
    }
    let count = u32::try_from(entries.len())
        .map_err(|_| too_big("number of keys", entries.len(), ENTRIES_MAX))?;
    payload.extend_from_slice(&count.to_le_bytes());
    for (key, entry) in entries {
        let key_len = u16::try_from(key.len())
            .ok()
            .filter(|_| key.len() <= KEY_BYTES_MAX)
            .ok_or_else(|| too_big("key length", key.len(), KEY_BYTES_MAX))?;
        let value_len = u32::try_from(entry.value.len())
            .ok()
            .filter(|_| entry.value.len() <= VALUE_BYTES_MAX)
            .ok_or_else(|| too_big("value length", entry.value.len(), VALUE_BYTES_MAX))?;
        payload.extend_from_slice(&key_len.to_le_bytes());
        payload.extend_from_slice(key.as_bytes());
        payload.extend_from_slice(&entry.version.to_le_bytes());
        payload.extend_from_slice(&value_len.to_le_bytes());
        payload.extend_from_slice(&entry.value);
    }
    Ok(())
}

/// A reader over bytes that may be anything.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// That nothing follows.
    pub(super) fn at_end(&self, otherwise: &'static str) -> Result<(), BadRegistryFile> {
        if self.at == self.bytes.len() {
            return Ok(());
        }
        Err(BadRegistryFile::Nonsense(otherwise))
    }

    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], BadRegistryFile> {
        let need = self.at.saturating_add(n);
        let taken = self
            .bytes
            .get(self.at..need)
            .ok_or(BadRegistryFile::Short {
                have: self.bytes.len(),
                need,
            })?;
        self.at = need;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], BadRegistryFile> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
}

pub(super) fn capped(what: &'static str, size: u64, max: usize) -> Result<usize, BadRegistryFile> {
    usize::try_from(size)
        .ok()
        .filter(|size| *size <= max)
        .ok_or(BadRegistryFile::TooBig { what, size, max })
}

/// The entries of a file.
pub(super) fn decode(bytes: &[u8]) -> Result<Entries, BadRegistryFile> {
    let mut head = Cursor::new(bytes);
    if head.array::<8>()? != MAGIC {
        return Err(BadRegistryFile::Magic);
    }
    let version = u32::from_le_bytes(head.array()?);
    if version != VERSION {
        return Err(BadRegistryFile::Version(version));
    }
    let said = u32::from_le_bytes(head.array()?);
    let length = capped("length", u64::from_le_bytes(head.array()?), FILE_BYTES_MAX)?;
    let payload = head.take(length)?;
    head.at_end("bytes follow the end")?;
    let found = crc32fast::hash(payload);
    if found != said {
        return Err(BadRegistryFile::Crc { found, said });
    }
    let mut body = Cursor::new(payload);
    let entries = take_entries(&mut body)?;
    body.at_end("bytes follow the last entry")?;
    Ok(entries)
}

/// The entries, as they stand in a payload.
pub(super) fn take_entries(body: &mut Cursor<'_>) -> Result<Entries, BadRegistryFile> {
    let count = capped(
        "number of keys",
        u32::from_le_bytes(body.array()?).into(),
        ENTRIES_MAX,
    )?;
    let mut entries = Entries::new();
    for _ in 0..count {
        let key_len = capped(
            "key length",
            u16::from_le_bytes(body.array()?).into(),
            KEY_BYTES_MAX,
        )?;
        let key = std::str::from_utf8(body.take(key_len)?)
            .map_err(|_| BadRegistryFile::Nonsense("a key is not UTF-8"))?;
        let version = u64::from_le_bytes(body.array()?);
        let value_len = capped(
            "value length",
            u32::from_le_bytes(body.array()?).into(),
            VALUE_BYTES_MAX,
        )?;
        let value = body.take(value_len)?.to_vec();
        if version == 0 {
            return Err(BadRegistryFile::Nonsense("a key is at version 0"));
        }
        if entries
            .last_key_value()
            .is_some_and(|(last, _)| last.as_str() >= key)
        {
            return Err(BadRegistryFile::Nonsense("its keys are out of order"));
        }
        entries.insert(key.to_owned(), Versioned { version, value });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Entries {
        Entries::from([
            (
                "a".to_owned(),
                Versioned {
                    version: 1,
                    value: b"x".to_vec(),
                },
            ),
            (
                "b/c".to_owned(),
                Versioned {
                    version: 9,
                    value: vec![7; 300],
                },
            ),
        ])
    }

    #[test]
    fn entries_survive_their_own_file() {
        assert_eq!(decode(&encode(&sample()).unwrap()).unwrap(), sample());
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let file = encode(&sample()).unwrap();
        for n in 0..file.len() {
            assert!(decode(&file[..n]).is_err(), "cut at {n}");
            for bit in 0..8 {
                let mut bad = file.clone();
                bad[n] ^= 1 << bit;
                assert!(decode(&bad).is_err(), "byte {n} bit {bit}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_entries(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            // And with a header that lets them through to the entries.
            let mut file = MAGIC.to_vec();
            file.extend_from_slice(&VERSION.to_le_bytes());
            file.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            file.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            file.extend_from_slice(&bytes);
            let _ = decode(&file);
        }
    }
}
