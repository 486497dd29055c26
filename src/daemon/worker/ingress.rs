//! Tells the standby which frames the guest was given, so that it can give them again.
//!
//! A frame that reached the guest after the last committed checkpoint would be lost by a
//! failover, and its sender would wait for its own timer (225 ms against 79 ms measured,
//! QEMU.md section 8). Best effort: a frame that cannot be sent now is not sent.

use crate::pool::{Epoch, Generation, VmId};
use bytes::{BufMut, Bytes, BytesMut};
use interconnect::epoch::ingress_frames;
use interconnect::link::EpochLane;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes before each frame: the NIC's index, little-endian.
const NIC_BYTES: usize = 2;

/// Where the ports tell what they delivered.
pub struct IngressTap {
    vm: VmId,
    epoch: AtomicU64,
    lane: Mutex<Option<(Arc<EpochLane>, Generation)>>,
}

impl IngressTap {
    /// One that tells nobody yet.
    pub const fn new(vm: VmId) -> Self {
        Self {
            vm,
            epoch: AtomicU64::new(0),
            lane: Mutex::new(None),
        }
    }

    /// Tell this lane from now on.
    pub fn open(&self, lane: Arc<EpochLane>, generation: Generation, running: Epoch) {
        self.epoch.store(running.0, Ordering::Release);
        *self.lane.lock().unwrap_or_else(PoisonError::into_inner) = Some((lane, generation));
    }

    /// The epoch that runs now.
    pub fn running(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }

    /// Tell nobody any more.
    pub fn close(&self) {
        *self.lane.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// A port gave this frame to the guest.
    pub fn delivered(&self, nic: usize, frame: &[u8]) {
        let guard = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((lane, generation)) = guard.as_ref() else {
            return;
        };
        let Ok(nic) = u16::try_from(nic) else { return };
        let mut packet = BytesMut::with_capacity(NIC_BYTES + frame.len());
        packet.put_u16_le(nic);
        packet.put_slice(frame);
        let epoch = Epoch(self.epoch.load(Ordering::Acquire));
        match ingress_frames(self.vm, *generation, epoch, &[packet.freeze()]) {
            Ok(frames) => {
                for frame in frames {
                    if let Err(e) = lane.try_send(frame) {
                        tracing::trace!("an ingress frame is not mirrored: {e}");
                    }
                }
            }
            Err(e) => tracing::trace!("an ingress frame is not mirrored: {e}"),
        }
    }
}

/// NIC and frame of a mirrored packet; None if it is none.
pub fn split(mut packet: Bytes) -> Option<(usize, Bytes)> {
    if packet.len() <= NIC_BYTES {
        return None;
    }
    let frame = packet.split_off(NIC_BYTES);
    Some((
        usize::from(u16::from_le_bytes([packet[0], packet[1]])),
        frame,
    ))
}

#[cfg(test)]
mod tests {
    use super::split;
    use bytes::Bytes;

    #[test]
    fn packets_name_their_nic() {
        assert_eq!(
            split(Bytes::from_static(b"\x02\x01abc")),
            Some((258, Bytes::from_static(b"abc")))
        );
        assert_eq!(split(Bytes::from_static(b"\x02\x01")), None);
        assert_eq!(split(Bytes::new()), None);
    }
}
