//! The same payload on storage: a block each host writes and all others read.
//!
//! A block is bound to its pool, disk, slot, writer and the writer's incarnation: copied to
//! another slot or disk, or from a network packet, it is refused. What a block cannot have is an
//! echo of each reader, so the first block a reader finds proves nothing about now; only one
//! that is newer than another that was read before does ([`News::Newer`]).

use super::gate::Reason;
use super::keys::{Keyring, PoolKeys};
use super::packet::{self, HOSTS_MAX, Header, Incarnation, Medium, PAYLOAD_BYTES_MAX, Sequence};
use crate::pool::HostName;
use ring::hmac;

/// Number of a disk of the pool that carries heartbeats, the same on every host; etcd counts as
/// one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskIndex(pub u8);

/// Number of a host's place on a disk: below [`HOSTS_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u16);

/// Most disks: the registry takes one to three files, etcd counts as one more.
pub const DISKS_MAX: usize = 4;

/// Why something cannot be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// More than a block takes.
    #[error("the report takes {0} bytes, a heartbeat takes at most {PAYLOAD_BYTES_MAX}")]
    TooLong(usize),
    /// No such place.
    #[error("there is no slot {} on disk {}: a pool has {HOSTS_MAX} slots on each of {DISKS_MAX} disks", slot.0, disk.0)]
    Place {
        /// The disk.
        disk: DiskIndex,
        /// The slot.
        slot: Slot,
    },
    /// The hash's library refused.
    #[error("cannot derive the key to seal with")]
    Derive,
}

fn place(disk: DiskIndex, slot: Slot) -> Option<(usize, usize)> {
    let (disk, slot) = (usize::from(disk.0), usize::from(slot.0));
    (disk < DISKS_MAX && slot < HOSTS_MAX).then_some((disk, slot))
}

/// Seals what one host writes.
pub struct Sealer {
    me: HostName,
    incarnation: Incarnation,
    keyring: Keyring,
}

impl Sealer {
    /// For one life of a host.
    #[must_use]
    pub fn new(me: HostName, incarnation: Incarnation, keys: &PoolKeys) -> Self {
        Self {
            me,
            incarnation,
            keyring: Keyring::new(keys),
        }
    }

    /// Seal with these keys from now on.
    pub fn set_keys(&mut self, keys: &PoolKeys) {
        self.keyring = Keyring::new(keys);
    }

    /// A sealed block, of at most [`packet::PACKET_BYTES_MAX`] bytes. The sequence number must
    /// rise from one to the next in a slot.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn seal(
        &self,
        disk: DiskIndex,
        slot: Slot,
        sequence: Sequence,
        payload: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(SealError::TooLong(payload.len()));
        }
        if place(disk, slot).is_none() {
            return Err(SealError::Place { disk, slot });
        }
        let number = self.keyring.present();
        let key = self
            .keyring
            .sending_key(number, Medium::Storage, &self.me, self.incarnation)
            .ok_or(SealError::Derive)?;
        let header = Header {
            medium: Medium::Storage,
            path: disk.0,
            pool: self.keyring.pool,
            key: number,
            key_newest: self.keyring.newest(),
            incarnation: self.incarnation,
            sequence,
            echo: slot.0.into(),
            echo_sequence: Sequence(0),
            sender: self.me.clone(),
            recipient: None,
        };
        let mut block = Vec::with_capacity(packet::PACKET_BYTES_MAX);
        header.write(payload, &mut block);
        let mac = hmac::sign(&key, &block);
        block.extend_from_slice(mac.as_ref());
        Ok(block)
    }
}

/// What a block says compared with the one read before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum News {
    /// The first read in this slot (of this writer): it may be from any time.
    First,
    /// Written after one that was read before.
    Newer,
    /// The one that was read before.
    Same,
}

/// A block that was authenticated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened<'a> {
    /// Who wrote it.
    pub sender: HostName,
    /// In which life.
    pub incarnation: Incarnation,
    /// Its number.
    pub sequence: Sequence,
    /// Whether it is proof of life.
    pub news: News,
    /// What it says.
    pub payload: &'a [u8],
}

/// Opens what all hosts write, and remembers the newest of each slot.
pub struct Opener {
    keyring: Keyring,
    /// By disk and slot.
    newest: Vec<Option<(HostName, Incarnation, Sequence)>>,
}

impl Opener {
    /// For one life of a reader.
    #[must_use]
    pub fn new(keys: &PoolKeys) -> Self {
        Self {
            keyring: Keyring::new(keys),
            newest: vec![None; DISKS_MAX * HOSTS_MAX],
        }
    }

    /// Accept these keys from now on.
    pub fn set_keys(&mut self, keys: &PoolKeys) {
        self.keyring = Keyring::new(keys);
    }

    /// Judge what was read from a slot: a sealed block, followed by nothing but zeros.
    ///
    /// # Errors
    /// Why it is refused: [`Reason::WrongNetwork`] if it was sealed for another disk,
    /// [`Reason::WrongAddress`] for another slot, [`Reason::Replayed`] if it is older than what
    /// was read there before; the others as on a network.
    pub fn open<'a>(
        &mut self,
        disk: DiskIndex,
        slot: Slot,
        block: &'a [u8],
    ) -> Result<Opened<'a>, Reason> {
        let parts = packet::parse(Medium::Storage, block)?;
        let header = parts.header;
        let (at_disk, at_slot) = place(disk, slot).ok_or(Reason::Malformed)?;
        if header.echo_sequence != Sequence(0) || parts.rest.iter().any(|byte| *byte != 0) {
            return Err(Reason::Malformed);
        }
        if header.pool != self.keyring.pool {
            return Err(Reason::ForeignPool);
        }
        if header.path != disk.0 {
            return Err(Reason::WrongNetwork);
        }
        if header.echo != u64::from(slot.0) {
            return Err(Reason::WrongAddress);
        }
        let key = self
            .keyring
            .sending_key(
                header.key,
                Medium::Storage,
                &header.sender,
                header.incarnation,
            )
            .ok_or(Reason::UnknownKey)?;
        hmac::verify(&key, parts.signed, parts.mac).map_err(|_| Reason::BadMac)?;

        let newest = &mut self.newest[at_disk * HOSTS_MAX + at_slot];
        let now = (header.incarnation, header.sequence);
        let news = match newest {
            Some((name, incarnation, sequence)) if *name == header.sender => {
                match now.cmp(&(*incarnation, *sequence)) {
                    std::cmp::Ordering::Less if now.0 < *incarnation => {
                        return Err(Reason::OldIncarnation);
                    }
                    std::cmp::Ordering::Less => return Err(Reason::Replayed),
                    std::cmp::Ordering::Equal => News::Same,
                    std::cmp::Ordering::Greater => News::Newer,
                }
            }
            _ => News::First,
        };
        *newest = Some((header.sender.clone(), now.0, now.1));
        Ok(Opened {
            sender: header.sender,
            incarnation: now.0,
            sequence: now.1,
            news,
            payload: parts.payload,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    #[test]
    fn only_a_newer_block_than_one_that_was_read_is_news() {
        let keys = PoolKeys::create().unwrap();
        let life = |number| Sealer::new(host("a"), Incarnation(number), &keys);
        let (first, second) = (life(1), life(2));
        let (disk, slot) = (DiskIndex(0), Slot(5));
        let mut reader = Opener::new(&keys);
        let mut read = |sealer: &Sealer, sequence| {
            let mut block = sealer.seal(disk, slot, Sequence(sequence), b"x").unwrap();
            block.resize(4096, 0);
            reader.open(disk, slot, &block).map(|opened| opened.news)
        };
        assert_eq!(read(&first, 7), Ok(News::First));
        assert_eq!(read(&first, 7), Ok(News::Same));
        assert_eq!(read(&first, 8), Ok(News::Newer));
        assert_eq!(read(&first, 7), Err(Reason::Replayed));
        assert_eq!(read(&second, 1), Ok(News::Newer), "a new life");
        assert_eq!(read(&first, 9), Err(Reason::OldIncarnation));
    }

    #[test]
    fn a_block_counts_in_its_own_slot_of_its_own_disk_alone() {
        let keys = PoolKeys::create().unwrap();
        let sealer = Sealer::new(host("a"), Incarnation(1), &keys);
        let payload = [7; PAYLOAD_BYTES_MAX];
        let block = sealer
            .seal(DiskIndex(1), Slot(2), Sequence(1), &payload)
            .unwrap();
        assert_eq!(block.len(), packet::PACKET_BYTES_MAX);
        let mut reader = Opener::new(&keys);
        let mut open = |disk, slot, bytes: &[u8]| {
            let opened = reader.open(DiskIndex(disk), Slot(slot), bytes);
            opened.map(|opened| (opened.sender.to_string(), opened.payload.to_vec()))
        };
        assert_eq!(open(1, 2, &block), Ok(("a".to_owned(), payload.to_vec())));
        assert_eq!(open(0, 2, &block), Err(Reason::WrongNetwork));
        assert_eq!(open(1, 3, &block), Err(Reason::WrongAddress));
        assert_eq!(open(9, 2, &block), Err(Reason::Malformed), "no such disk");
        // Told to be elsewhere, the MAC knows better.
        for (at, to) in [(5, 0), (48, 3)] {
            let mut moved = block.clone();
            moved[at] = to;
            let (disk, slot) = if at == 5 { (0, 2) } else { (1, 3) };
            assert_eq!(open(disk, slot, &moved), Err(Reason::BadMac));
        }
        let mut tail = block.clone();
        tail.extend_from_slice(&[0, 0, 1]);
        assert_eq!(open(1, 2, &tail), Err(Reason::Malformed));
        assert_eq!(
            open(1, 2, &[0; 4096]),
            Err(Reason::Malformed),
            "never written"
        );
        for at in 0..block.len() {
            let mut flipped = block.clone();
            flipped[at] ^= 0x10;
            assert!(open(1, 2, &flipped).is_err(), "bit of byte {at}");
        }
        let foreign = Opener::new(&PoolKeys::create().unwrap())
            .open(DiskIndex(1), Slot(2), &block)
            .map(|opened| opened.sequence);
        assert_eq!(foreign, Err(Reason::ForeignPool));
    }

    #[test]
    fn what_no_block_takes_is_not_sealed() {
        let sealer = Sealer::new(host("a"), Incarnation(1), &PoolKeys::create().unwrap());
        let long = sealer.seal(
            DiskIndex(0),
            Slot(0),
            Sequence(1),
            &[0; PAYLOAD_BYTES_MAX + 1],
        );
        assert!(matches!(long, Err(SealError::TooLong(_))));
        let place = sealer.seal(DiskIndex(0), Slot(64), Sequence(1), b"");
        assert!(matches!(place, Err(SealError::Place { .. })));
    }
}
