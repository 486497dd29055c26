//! Reading fixed-width little-endian fields from bytes that may end anywhere.

use super::CodecError;

/// A position in bytes that came from outside.
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    /// `what` names the layout in errors.
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// The next `n` bytes.
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], CodecError> {
        let Some((front, rest)) = self.rest.split_at_checked(n) else {
            return Err(CodecError::Length {
                what: self.what,
                have: self.rest.len() as u64,
                need: n as u64,
            });
        };
        self.rest = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, CodecError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, CodecError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, CodecError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, CodecError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Bytes not yet read.
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Refuse bytes after the end.
    pub(crate) fn end(self) -> Result<(), CodecError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(CodecError::Length {
                what: self.what,
                have: self.rest.len() as u64,
                need: 0,
            })
        }
    }

    /// Refuse a reserved field that is not zero.
    pub(crate) fn reserved(&self, value: u64) -> Result<(), CodecError> {
        if value == 0 {
            Ok(())
        } else {
            Err(CodecError::Unknown {
                what: self.what,
                value,
            })
        }
    }
}

/// Refuse a count or size above its cap.
pub(crate) fn cap(what: &'static str, value: usize, max: usize) -> Result<(), CodecError> {
    if value <= max {
        Ok(())
    } else {
        Err(CodecError::TooBig {
            what,
            value: value as u64,
            max: max as u64,
        })
    }
}
