//! Reading QEMU's migration stream, as far as pollux must.
//!
//! Layout (QEMU docs/devel/migration.rst and migration/savevm.c, version 3): be32 magic
//! `QEVM`, be32 version, then sections. A section starts with its type; START and FULL
//! carry be32 id, a counted name, be32 instance, be32 version; PART and END only the id;
//! an optional footer 0x7e + be32 id closes each. A section's body has no length, so only
//! bodies whose layout is known here (`ram`, migration/ram.c) can be stepped over.
//!
//! Everything here is pure and bounded: bytes in, offsets out, no panic on any input.

/// `QEVM`.
const MAGIC: u32 = 0x5145_564d;
/// The only version any QEMU of this century writes.
const VERSION: u32 = 3;
/// Magic and version.
pub const HEADER_BYTES: usize = 8;

const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SECTION_FULL: u8 = 0x04;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

/// What [`StreamError::Truncated`] names if the stream ends between two sections.
pub(super) const SECTION_TYPE: &str = "a section type";

/// First device section of every stream: the clocks (QEMU softmmu/cpu-timers.c).
const FIRST_DEVICE: &[u8] = b"timer";
/// The one section that streams before the devices.
const RAM: &[u8] = b"ram";

/// Page of a RAM block in the stream (x86).
const PAGE_BYTES: usize = 4096;
/// The low bits of a page's address carry flags (migration/ram.c, `RAM_SAVE_FLAG_*`).
const FLAGS: u64 = PAGE_BYTES as u64 - 1;
const FLAG_ZERO: u64 = 0x02;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;
const FLAG_MULTIFD_FLUSH: u64 = 0x200;

/// A stream that is not what QEMU writes, or not one pollux can take apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The bytes end inside something.
    #[error("the stream ends at byte {at}, inside {what}")]
    Truncated {
        /// Where the missing bytes should be.
        at: usize,
        /// What they belong to.
        what: &'static str,
    },
    /// Not `QEVM` version 3.
    #[error("no QEMU stream: it begins with {magic:#010x}, version {version}")]
    NotAStream {
        /// The first four bytes.
        magic: u32,
        /// The next four.
        version: u32,
    },
    /// A configuration section, which the two sides' argv must switch off.
    #[error(
        "the stream has a configuration section; start QEMU with \
         -global migration.send-configuration=off"
    )]
    Configuration,
    /// Something this reader does not know.
    #[error("unknown {what} {value:#x} at byte {at}")]
    Unknown {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Where.
        at: usize,
    },
    /// Another section than the one that must be there.
    #[error("section `{name}` at byte {at} where `{expected}` belongs")]
    WrongSection {
        /// Its name.
        name: String,
        /// The right one.
        expected: &'static str,
        /// Where.
        at: usize,
    },
}

/// A cursor over the bytes; every step is checked.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], StreamError> {
        let end = self
            .at
            .checked_add(n)
            .filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            let at = self.bytes.len();
            return Err(StreamError::Truncated { at, what });
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StreamError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, StreamError> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(super) fn be32(&mut self, what: &'static str) -> Result<u32, StreamError> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    pub(super) fn be64(&mut self, what: &'static str) -> Result<u64, StreamError> {
        Ok(u64::from_be_bytes(self.array(what)?))
    }

    fn counted(&mut self, what: &'static str) -> Result<&'a [u8], StreamError> {
        let len = self.u8(what)?;
        self.take(usize::from(len), what)
    }

    fn skip_footer(&mut self) -> Result<(), StreamError> {
        if self.bytes.get(self.at) == Some(&FOOTER) {
            self.take(5, "a section footer")?;
        }
        Ok(())
    }
}

/// Checks magic and version.
fn header(cursor: &mut Cursor<'_>) -> Result<(), StreamError> {
    let magic = cursor.be32("the header")?;
    let version = cursor.be32("the header")?;
    if (magic, version) != (MAGIC, VERSION) {
        return Err(StreamError::NotAStream { magic, version });
    }
    Ok(())
}

/// Steps over the header and the head of section `timer`; the cursor of the result
/// stands on the section's body.
pub(super) fn at_timer_body(state: &[u8]) -> Result<Cursor<'_>, StreamError> {
    let mut cursor = Cursor::new(state);
    header(&mut cursor)?;
    let at = cursor.at;
    let kind = cursor.u8(SECTION_TYPE)?;
    if kind != SECTION_FULL {
        let (what, value) = ("section type", u64::from(kind));
        return Err(StreamError::Unknown { what, value, at });
    }
    timer_head(&mut cursor, at)?;
    Ok(cursor)
}

/// The rest of a FULL section's head, which must be that of `timer`.
fn timer_head(cursor: &mut Cursor<'_>, at: usize) -> Result<(), StreamError> {
    cursor.be32("a section id")?;
    let name = cursor.counted("a section name")?;
    if name != FIRST_DEVICE {
        return Err(StreamError::WrongSection {
            name: String::from_utf8_lossy(name).into_owned(),
            expected: "timer",
            at,
        });
    }
    cursor.be32("an instance id")?;
    cursor.be32("a section version")?;
    Ok(())
}

/// Where the device sections begin: the offset of the type byte of section `timer`.
/// Everything before it is the header and the RAM sections. `stream` may be longer or may
/// still be growing: [`StreamError::Truncated`] then means "not there yet".
///
/// # Errors
/// See [`StreamError`].
pub fn device_sections_at(stream: &[u8]) -> Result<usize, StreamError> {
    let mut cursor = Cursor::new(stream);
    header(&mut cursor)?;
    loop {
        let at = cursor.at;
        match cursor.u8(SECTION_TYPE)? {
            SECTION_START => {
                cursor.be32("a section id")?;
                let name = cursor.counted("a section name")?;
                if name != RAM {
                    return Err(StreamError::WrongSection {
                        name: String::from_utf8_lossy(name).into_owned(),
                        expected: "ram",
                        at,
                    });
                }
                cursor.be32("an instance id")?;
                cursor.be32("a section version")?;
                ram_body(&mut cursor)?;
                cursor.skip_footer()?;
            }
            SECTION_PART | SECTION_END => {
                // Only `ram` was let through above, so the body is RAM's.
                cursor.be32("a section id")?;
                ram_body(&mut cursor)?;
                cursor.skip_footer()?;
            }
            SECTION_FULL => {
                timer_head(&mut cursor, at)?;
                return Ok(at);
            }
            COMMAND => {
                cursor.take(2, "a command")?;
                let len = u16::from_be_bytes(cursor.array("a command's length")?);
                cursor.take(usize::from(len), "a command's data")?;
            }
            CONFIGURATION => return Err(StreamError::Configuration),
            kind => {
                let (what, value) = ("section type", u64::from(kind));
                return Err(StreamError::Unknown { what, value, at });
            }
        }
    }
}

/// Steps over one body of the RAM section: records until end-of-section. With
/// x-ignore-shared each block of the list carries its guest address besides its length.
fn ram_body(cursor: &mut Cursor<'_>) -> Result<(), StreamError> {
    loop {
        let at = cursor.at;
        let word = cursor.be64("a RAM record")?;
        let flags = word & FLAGS;
        let named = |cursor: &mut Cursor<'_>| -> Result<(), StreamError> {
            if flags & FLAG_CONTINUE == 0 {
                cursor.counted("a RAM block's name")?;
            }
            Ok(())
        };
        match flags & !FLAG_CONTINUE {
            FLAG_EOS => return Ok(()),
            FLAG_MULTIFD_FLUSH => {}
            FLAG_MEM_SIZE => {
                let total = word & !FLAGS;
                let mut listed = 0u64;
                while listed < total {
                    cursor.counted("a RAM block's name")?;
                    let length = cursor.be64("a RAM block's length")?;
                    cursor.be64("a RAM block's address")?;
                    if length == 0 {
                        let what = "RAM block length";
                        return Err(StreamError::Unknown { what, value: 0, at });
                    }
                    listed = listed.saturating_add(length);
                }
            }
            FLAG_ZERO => {
                named(cursor)?;
                cursor.u8("a zero page")?;
            }
            FLAG_PAGE => {
                named(cursor)?;
                cursor.take(PAGE_BYTES, "a page")?;
            }
            value => {
                let what = "RAM record";
                return Err(StreamError::Unknown { what, value, at });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn section(kind: u8, name: &[u8]) -> Vec<u8> {
        let len = u8::try_from(name.len()).expect("short");
        let mut bytes = vec![kind, 0, 0, 0, 2, len];
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 4]);
        bytes
    }

    /// A stream with one shared and one other block, as x-ignore-shared writes it.
    fn sample() -> (Vec<u8>, usize) {
        let mut bytes = b"QEVM\0\0\0\x03".to_vec();
        bytes.extend(section(SECTION_START, b"ram"));
        bytes.extend((0x3000 | FLAG_MEM_SIZE).to_be_bytes());
        for (name, length) in [(b"ram0", 0x1000u64), (b"rom0", 0x2000)] {
            bytes.push(4);
            bytes.extend(name);
            bytes.extend(length.to_be_bytes());
            bytes.extend(0xfee0_0000u64.to_be_bytes());
        }
        bytes.extend(FLAG_EOS.to_be_bytes());
        bytes.extend([FOOTER, 0, 0, 0, 2]);
        bytes.extend([SECTION_PART, 0, 0, 0, 2]);
        bytes.extend(FLAG_PAGE.to_be_bytes());
        bytes.extend(b"\x04rom0");
        // A page that looks like the head of section timer must not fool the reader.
        let mut page = section(SECTION_FULL, FIRST_DEVICE);
        page.resize(PAGE_BYTES, 0);
        bytes.extend(page);
        bytes.extend((0x1000 | FLAG_ZERO | FLAG_CONTINUE).to_be_bytes());
        bytes.push(0);
        bytes.extend(FLAG_EOS.to_be_bytes());
        bytes.extend([FOOTER, 0, 0, 0, 2]);
        bytes.extend([SECTION_END, 0, 0, 0, 2]);
        bytes.extend(FLAG_EOS.to_be_bytes());
        bytes.extend([FOOTER, 0, 0, 0, 2]);
        let at = bytes.len();
        bytes.extend(section(SECTION_FULL, FIRST_DEVICE));
        bytes.extend([0; 24]);
        (bytes, at)
    }

    #[test]
    fn the_device_sections_are_found_behind_ram() {
        let (bytes, at) = sample();
        assert_eq!(device_sections_at(&bytes), Ok(at));
    }

    #[test]
    fn a_stream_cut_anywhere_is_truncated_and_nothing_else() {
        let (bytes, at) = sample();
        for end in 0..bytes.len() - 24 {
            let result = device_sections_at(&bytes[..end]);
            let Err(StreamError::Truncated { what, .. }) = result else {
                panic!("cut at {end}: {result:?}");
            };
            assert_eq!(what == SECTION_TYPE && end == at, end == at);
        }
    }

    #[test]
    fn other_streams_are_named() {
        let error = device_sections_at(b"QEVM\0\0\0\x02").expect_err("old");
        assert!(matches!(error, StreamError::NotAStream { version: 2, .. }));
        let error = device_sections_at(b"QEVM\0\0\0\x03\x07").expect_err("configuration");
        assert!(error.to_string().contains("send-configuration=off"));
        let mut block = b"QEVM\0\0\0\x03".to_vec();
        block.extend(section(SECTION_START, b"block"));
        let error = device_sections_at(&block).expect_err("block");
        assert!(error.to_string().contains("`block`"), "{error}");
    }

    proptest! {
        #[test]
        fn no_input_panics(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
            let (mut bytes, _) = sample();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _ = device_sections_at(&bytes);
            let _ = at_timer_body(&bytes);
        }
    }
}
