//! Tells the standby which packets were on their way, so that it can send them on.
//!
//! Ingress: a frame that reached the guest after the last committed checkpoint would be lost
//! by a failover, and its sender would wait for its own timer (225 ms against 79 ms measured,
//! QEMU.md section 8). Best effort: a frame that cannot be sent now is not sent.
//!
//! Egress: the frames an epoch held in the gate travel with the epoch. If the primary dies
//! after the commit and before the release, the standby lets them out; otherwise the guest's
//! own retransmission timer would have to. Only with a committed epoch: output-commit.

use crate::pool::{Epoch, Generation, VmId};
use bytes::{BufMut, Bytes, BytesMut};
use interconnect::epoch::ingress_frames;
use interconnect::link::EpochLane;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes before each frame: the NIC's index, little-endian, and [`EGRESS`].
const NIC_BYTES: usize = 2;
/// Set in the NIC's index of a frame that came from the guest.
const EGRESS: u16 = 1 << 15;
/// Most bytes of egress that travel with an epoch: a few hundred full-size frames; TCP sends
/// the rest again.
pub const EGRESS_BYTES_MAX: usize = 512 << 10;

/// A frame with what comes before it.
fn packet(head: u16, frame: &[u8]) -> Bytes {
    let mut packet = BytesMut::with_capacity(NIC_BYTES + frame.len());
    packet.put_u16_le(head);
    packet.put_slice(frame);
    packet.freeze()
}

/// A held frame of NIC `nic` as it travels; None beyond 32,767 NICs.
pub fn egress(nic: usize, frame: &[u8]) -> Option<Bytes> {
    let nic = u16::try_from(nic).ok().filter(|nic| nic & EGRESS == 0)?;
    Some(packet(nic | EGRESS, frame))
}

/// Which way a mirrored packet was going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

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
        let epoch = Epoch(self.epoch.load(Ordering::Acquire));
        match ingress_frames(self.vm, *generation, epoch, &[packet(nic, frame)]) {
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

/// Way, NIC and frame of a mirrored packet; None if it is none.
pub fn split(mut packet: Bytes) -> Option<(Way, usize, Bytes)> {
    if packet.len() <= NIC_BYTES {
        return None;
    }
    let frame = packet.split_off(NIC_BYTES);
    let head = u16::from_le_bytes([packet[0], packet[1]]);
    let way = if head & EGRESS == 0 {
        Way::In
    } else {
        Way::Out
    };
    Some((way, usize::from(head & !EGRESS), frame))
}

#[cfg(test)]
mod tests {
    use super::{Way, egress, packet, split};
    use bytes::Bytes;

    #[test]
    fn packets_name_their_nic_and_way() {
        let frame = Bytes::from_static(b"abc");
        assert_eq!(
            split(packet(258, b"abc")),
            Some((Way::In, 258, frame.clone()))
        );
        assert_eq!(
            split(egress(258, b"abc").unwrap()),
            Some((Way::Out, 258, frame))
        );
        assert_eq!(egress(1 << 15, b"abc"), None);
        assert_eq!(split(Bytes::from_static(b"\x02\x01")), None);
        assert_eq!(split(Bytes::new()), None);
    }
}
