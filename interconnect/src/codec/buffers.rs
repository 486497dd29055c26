//! Buffers that are used again: in the steady state encoding and decoding allocate
//! nothing for a batch.
//!
//! A frame's payload is given away and comes back, from whatever thread drops it last, when
//! the interconnect needs it no more. Their number is bounded: what comes back beyond
//! [`KEPT_MAX`] is freed.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers kept for reuse. Encoder, lane queue and unacknowledged frames together hold
/// some MiB, that is a few batches of 1 MiB.
pub const KEPT_MAX: usize = 16;
/// A buffer above this is freed and not kept: a large device state must not stay for ever.
/// A full batch of pages fits.
pub const KEPT_BYTES_MAX: usize = 2 << 20;

/// Whatever is used again.
pub(crate) trait Reusable: Default + Send + 'static {
    /// Bytes of memory it takes while it is kept.
    fn kept_bytes(&self) -> usize;
}

impl Reusable for Vec<u8> {
    fn kept_bytes(&self) -> usize {
        self.capacity()
    }
}

/// A bounded store of buffers. Clones share it.
#[derive(Debug)]
pub(crate) struct Buffers<T: Reusable>(Arc<Mutex<Vec<T>>>);

impl<T: Reusable> Clone for Buffers<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Reusable> Default for Buffers<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Reusable> Buffers<T> {
    /// A buffer, with whatever it held last.
    pub(crate) fn take(&self) -> Lent<T> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Lent {
            buffer: kept.pop().unwrap_or_default(),
            home: self.clone(),
        }
    }

    fn give_back(&self, buffer: T) {
        if buffer.kept_bytes() > KEPT_BYTES_MAX {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(buffer);
        }
    }

    #[cfg(test)]
    pub(crate) fn kept(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// A buffer that goes home when it is dropped.
#[derive(Debug)]
pub(crate) struct Lent<T: Reusable> {
    buffer: T,
    home: Buffers<T>,
}

impl<T: Reusable> std::ops::Deref for Lent<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.buffer
    }
}

impl<T: Reusable> std::ops::DerefMut for Lent<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.buffer
    }
}

impl<T: Reusable> Drop for Lent<T> {
    fn drop(&mut self) {
        self.home.give_back(std::mem::take(&mut self.buffer));
    }
}

impl AsRef<[u8]> for Lent<Vec<u8>> {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Lent<Vec<u8>> {
    /// As a payload, without a copy; the buffer goes home when the last clone is dropped.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_comes_home_when_its_last_clone_goes() {
        let buffers: Buffers<Vec<u8>> = Buffers::default();
        let mut buffer = buffers.take();
        buffer.extend_from_slice(b"page");
        let at = buffer.as_ptr();
        let payload = buffer.freeze();
        let part = payload.slice(1..3);
        drop(payload);
        assert_eq!((buffers.kept(), &part[..]), (0, &b"ag"[..]));
        drop(part);
        assert_eq!(buffers.kept(), 1);
        assert_eq!(buffers.take().as_ptr(), at);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let buffers: Buffers<Vec<u8>> = Buffers::default();
        let many: Vec<_> = (0..KEPT_MAX + 5).map(|_| buffers.take()).collect();
        drop(many);
        assert_eq!(buffers.kept(), KEPT_MAX);
        for _ in 0..KEPT_MAX {
            let mut big = buffers.take();
            big.reserve(KEPT_BYTES_MAX + 1);
            let small = std::mem::take(&mut *big);
            drop(small);
            big.reserve(KEPT_BYTES_MAX + 1);
            drop(big);
        }
        assert_eq!(buffers.kept(), 0, "large ones are freed");
    }
}
