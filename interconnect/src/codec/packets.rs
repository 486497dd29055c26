//! Batches of packets delivered to the guest.
//!
//! All integers are little-endian:
//!
//! ```text
//! u16  count   1 ..= BATCH_PACKETS_MAX
//! u16  reserved, zero
//! u32  × count length of each packet in bytes
//! ...  the packets, one after the other
//! ```

use super::CodecError;
use super::cursor::{Cursor, cap};
use bytes::{BufMut, Bytes, BytesMut};

/// Most packets in one batch.
pub const BATCH_PACKETS_MAX: usize = 1024;
/// Largest packet: 64 KiB of IP with Ethernet and VLAN headers.
pub const PACKET_BYTES_MAX: usize = (64 << 10) + 22;

const HEAD_BYTES: usize = 4;
const _: () = assert!(
    HEAD_BYTES + BATCH_PACKETS_MAX * 4 + PACKET_BYTES_MAX <= crate::frame::INGRESS_BYTES_MAX
);
const _: () = assert!(BATCH_PACKETS_MAX <= u16::MAX as usize);

/// Encode packets from the front of `packets` until the batch is full; returns
/// how many were taken: at least one, unless `packets` is empty.
///
/// # Errors
/// [`CodecError::TooBig`] for a packet above [`PACKET_BYTES_MAX`].
pub fn encode_packets(packets: &[Bytes], out: &mut BytesMut) -> Result<usize, CodecError> {
    let mut taken = 0;
    let mut bytes = HEAD_BYTES;
    for packet in packets.iter().take(BATCH_PACKETS_MAX) {
        cap("packet", packet.len(), PACKET_BYTES_MAX)?;
        if bytes + 4 + packet.len() > crate::frame::INGRESS_BYTES_MAX {
            break;
        }
        bytes += 4 + packet.len();
        taken += 1;
    }
    if taken == 0 {
        return Ok(0);
    }
    out.reserve(bytes);
    out.put_u16_le(u16::try_from(taken).unwrap_or(u16::MAX));
    out.put_u16_le(0);
    for packet in &packets[..taken] {
        out.put_u32_le(u32::try_from(packet.len()).unwrap_or(u32::MAX));
    }
    for packet in &packets[..taken] {
        out.put_slice(packet);
    }
    Ok(taken)
}

/// Decode a batch of packets (slices of `batch`, no copy).
///
/// # Errors
/// [`CodecError`].
pub fn decode_packets(batch: &Bytes) -> Result<Vec<Bytes>, CodecError> {
    let mut cursor = Cursor::new(batch, "packet batch");
    let count = usize::from(cursor.u16()?);
    cap("packets in a batch", count, BATCH_PACKETS_MAX)?;
    let reserved = cursor.u16()?;
    cursor.reserved(u64::from(reserved))?;
    let mut table = Cursor::new(cursor.take(count * 4)?, "length table of a packet batch");
    let mut packets = Vec::with_capacity(count);
    for _ in 0..count {
        let bytes = table.u32()? as usize;
        cap("packet", bytes, PACKET_BYTES_MAX)?;
        let start = batch.len() - cursor.remaining();
        cursor.take(bytes)?;
        packets.push(batch.slice(start..start + bytes));
    }
    cursor.end()?;
    Ok(packets)
}
