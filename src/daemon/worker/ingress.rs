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
use interconnect::frame::Frame;
use interconnect::link::{EpochLane, LanePressure};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes before each frame: the NIC's index, little-endian, and [`EGRESS`].
const NIC_BYTES: usize = 2;
/// Set in the NIC's index of a frame that came from the guest.
const EGRESS: u16 = 1 << 15;
/// Most bytes of egress that travel with an epoch: a few hundred full-size frames; TCP sends
/// the rest again.
pub const EGRESS_BYTES_MAX: usize = 512 << 10;

/// Packets that may wait for the thread: what a guest takes in in a few ms; of the largest,
/// 16 MiB.
const WAITING_MAX: usize = 256;
/// Most packets of one frame: 100 KB of full-size Ethernet frames.
const BATCH_MAX: usize = 64;
/// Packets are not mirrored while the lane is behind by more than this: the standby could use
/// them for the open epoch only, and the epoch would come later for them.
const BEHIND: Duration = Duration::from_millis(20);
/// The same while nobody knows what the links carry.
const BEHIND_BYTES: u64 = 1 << 20;

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

/// A packet on its way to the standby.
#[derive(Debug)]
struct Delivered {
    epoch: Epoch,
    packet: Bytes,
}

/// The way to the lane of an attempt.
type Queue = SyncSender<Delivered>;

/// Where the ports tell what they delivered.
///
/// They only queue; a thread of its own puts what waits into as few lane frames as may be. A
/// packet that comes alone goes alone, at once; while it is on its way others gather.
pub struct IngressTap {
    vm: VmId,
    epoch: AtomicU64,
    queue: Mutex<Option<Queue>>,
}

impl IngressTap {
    /// One that tells nobody yet.
    pub const fn new(vm: VmId) -> Self {
        Self {
            vm,
            epoch: AtomicU64::new(0),
            queue: Mutex::new(None),
        }
    }

    /// Tell this lane from now on.
    pub fn open(&self, lane: Arc<EpochLane>, generation: Generation, running: Epoch) {
        self.epoch.store(running.0, Ordering::Release);
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let vm = self.vm;
        let put = move |frame| {
            if too_far_behind(&lane.pressure()) {
                return tracing::trace!("an ingress frame is not mirrored: the lane is behind");
            }
            if let Err(e) = lane.try_send(frame) {
                tracing::trace!("an ingress frame is not mirrored: {e}");
            }
        };
        let started = std::thread::Builder::new()
            .name("ingress".into())
            .spawn(move || gather(vm, generation, &waiting, put));
        match started {
            Ok(_) => *self.lock() = Some(queue),
            Err(e) => tracing::warn!("packets to the guest are not mirrored: no thread: {e}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Queue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch that runs now.
    pub fn running(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }

    /// Tell nobody any more.
    pub fn close(&self) {
        *self.lock() = None;
    }

    /// A port gave this frame to the guest.
    pub fn delivered(&self, nic: usize, frame: &[u8]) {
        let guard = self.lock();
        let (Some(queue), Ok(nic)) = (guard.as_ref(), u16::try_from(nic)) else {
            return;
        };
        let delivered = Delivered {
            epoch: Epoch(self.epoch.load(Ordering::Acquire)),
            packet: packet(nic, frame),
        };
        if queue.try_send(delivered).is_err() {
            tracing::trace!("an ingress frame is not mirrored: too many wait");
        }
    }
}

/// Whether mirrored packets would hold up the epochs on the lane: their sender has a timer,
/// an epoch has clients that wait for it.
fn too_far_behind(pressure: &LanePressure) -> bool {
    match pressure.drains_in() {
        Some(time) => time > BEHIND,
        None => pressure.queued_bytes > BEHIND_BYTES,
    }
}

/// Put what waits into frames, one epoch each, until nobody can queue any more.
fn gather(
    vm: VmId,
    generation: Generation,
    waiting: &Receiver<Delivered>,
    mut put: impl FnMut(Frame),
) {
    let mut next = waiting.recv().ok();
    while let Some(Delivered { epoch, packet }) = next.take() {
        let mut packets = vec![packet];
        while packets.len() < BATCH_MAX
            && let Ok(more) = waiting.try_recv()
        {
            if more.epoch != epoch {
                next = Some(more);
                break;
            }
            packets.push(more.packet);
        }
        match ingress_frames(vm, generation, epoch, &packets) {
            Ok(frames) => frames.into_iter().for_each(&mut put),
            Err(e) => tracing::trace!("ingress frames are not mirrored: {e}"),
        }
        next = next.or_else(|| waiting.recv().ok());
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
    use super::*;
    use interconnect::codec::decode_packets;
    use std::sync::mpsc::channel;

    const VM: VmId = VmId([7; 16]);

    fn delivered(epoch: u64, fill: u8) -> Delivered {
        Delivered {
            epoch: Epoch(epoch),
            packet: packet(0, &[fill; 60]),
        }
    }

    fn of(frame: &Frame) -> (u64, usize) {
        (frame.epoch.0, decode_packets(&frame.payload).unwrap().len())
    }

    #[test]
    fn what_waits_shares_a_frame_but_not_with_another_epoch() {
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let epochs = [(1, 10), (2, 1), (3, BATCH_MAX + 5)];
        for (epoch, packets) in epochs {
            (0..packets).for_each(|_| queue.send(delivered(epoch, 9)).unwrap());
        }
        drop(queue);
        let mut frames = Vec::new();
        gather(VM, Generation(1), &waiting, |frame| frames.push(of(&frame)));
        assert_eq!(frames, [(1, 10), (2, 1), (3, BATCH_MAX), (3, 5)]);
    }

    #[test]
    fn a_lone_packet_waits_for_no_other() {
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let (out, frames) = channel();
        std::thread::scope(|scope| {
            let put = move |frame: Frame| out.send(of(&frame)).unwrap();
            scope.spawn(move || gather(VM, Generation(1), &waiting, put));
            for epoch in 1..20 {
                queue.send(delivered(epoch, 1)).unwrap();
                assert_eq!(frames.recv().unwrap(), (epoch, 1));
            }
            drop(queue);
        });
    }

    #[test]
    fn packets_stand_back_for_epochs() {
        let of = |queued_bytes, capacity_bytes_per_s| {
            too_far_behind(&LanePressure {
                queued_bytes,
                unacked_bytes: 0,
                capacity_bytes_per_s,
            })
        };
        assert!(!of(0, None) && of(2 << 20, None));
        assert!(!of(2 << 20, Some(1_000_000_000)) && of(2 << 20, Some(10_000_000)));
    }

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
