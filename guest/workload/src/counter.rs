//! The counter: every request gets the next number, and only after its record is flushed.
//!
//! Group commit: whoever finds nobody writing becomes the writer for all that wait. One
//! client alone therefore pays no change of thread, and many share one flush.

use crate::disk::{Buffer, Disk};
use crate::os;
use pollux_workload::layout::GROUP_RECORDS_MAX;
use pollux_workload::record::{RECORD_BYTES, ReadBlocks, Record, newest};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The counter. Without a disk it counts in memory alone.
pub struct Counter {
    disk: Option<Arc<Disk>>,
    boot: u64,
    state: Mutex<State>,
    committed: Condvar,
}

struct State {
    /// Number of the newest record that is flushed.
    durable: u64,
    /// Number of the newest request taken in.
    taken: u64,
    /// Requests not yet being written: (client, seq), numbered `taken - len + 1 ..= taken`.
    waiting: VecDeque<(u64, u64)>,
    /// The writer's buffer; absent while somebody writes.
    buffer: Option<Box<Buffer>>,
    /// After a failed write nothing is counted any more.
    failed: Option<String>,
}

impl Counter {
    /// Go on from what the disk holds.
    ///
    /// # Errors
    /// The disk's own.
    pub fn recover(disk: Option<Arc<Disk>>, boot: u64) -> io::Result<Self> {
        let mut buffer = Buffer::new();
        let number = match &disk {
            Some(disk) => newest(disk.as_ref(), &disk.layout, buffer.block())?,
            None => 0,
        };
        let state = State {
            durable: number,
            taken: number,
            waiting: VecDeque::new(),
            buffer: Some(buffer),
            failed: None,
        };
        Ok(Self {
            disk,
            boot,
            state: Mutex::new(state),
            committed: Condvar::new(),
        })
    }

    /// Number of the newest flushed record.
    pub fn number(&self) -> u64 {
        self.lock().durable
    }

    /// Count these requests of one client, in order. Returns the first one's number when all
    /// are on the disk; the others follow it without a gap.
    ///
    /// # Errors
    /// The disk's first error, for this and every later request.
    pub fn count(&self, requests: &[(u64, u64)]) -> Result<u64, String> {
        let mut state = self.lock();
        let first = state.taken + 1;
        state.taken += requests.len() as u64;
        let last = state.taken;
        state.waiting.extend(requests);
        loop {
            if let Some(reason) = &state.failed {
                return Err(reason.clone());
            }
            if state.durable >= last {
                return Ok(first);
            }
            state = match state.buffer.take() {
                Some(buffer) => self.write_group(state, buffer),
                None => self
                    .committed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn write_group<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        mut buffer: Box<Buffer>,
    ) -> MutexGuard<'a, State> {
        let after = state.durable;
        let size = state.waiting.len().min(buffer.0.len() / RECORD_BYTES);
        let group: Vec<_> = state.waiting.drain(..size).collect();
        drop(state);
        let written = self.write(after, &group, &mut buffer);
        let mut state = self.lock();
        match written {
            Ok(()) => state.durable = after + group.len() as u64,
            Err(error) => {
                let reason = format!("disk write failed: {error}");
                eprintln!("workload: counter stops: {reason}");
                state.failed = Some(reason);
            }
        }
        state.buffer = Some(buffer);
        self.committed.notify_all();
        state
    }

    /// Write and flush the records `after + 1 ..`, in one write unless the ring wraps.
    fn write(&self, after: u64, group: &[(u64, u64)], buffer: &mut Buffer) -> io::Result<()> {
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        let mono_ns = os::mono_ns();
        let slots = buffer.0.as_chunks_mut::<RECORD_BYTES>().0;
        for ((number, (client, seq)), slot) in (after + 1..).zip(group).zip(slots) {
            Record {
                number,
                client: *client,
                seq: *seq,
                boot: self.boot,
                mono_ns,
            }
            .encode(slot);
        }
        let start = disk.layout.record_offset(after + 1);
        let bytes = &buffer.0[..group.len() * RECORD_BYTES];
        let room = usize::try_from(disk.layout.records.end - start).unwrap_or(usize::MAX);
        let (here, wrapped) = bytes.split_at(bytes.len().min(room));
        disk.write(start, here)?;
        if !wrapped.is_empty() {
            disk.write(disk.layout.records.start, wrapped)?;
        }
        disk.flush()
    }

    /// Read every record back from the disk and check it: the newest ones that the ring
    /// holds, less one group (after a crash at the ring's end those may be the next lap's).
    /// Returns how many, or what is wrong.
    pub fn verify(&self) -> Result<u64, String> {
        let Some(disk) = &self.disk else { return Ok(0) };
        let newest = self.number();
        let count = newest.min(disk.layout.record_slots() - 2 * GROUP_RECORDS_MAX);
        let mut buffer = Buffer::new();
        let mut number = newest - count + 1;
        while number <= newest {
            let start = disk.layout.record_offset(number);
            let room =
                (disk.layout.records.end - start).min((newest - number + 1) * RECORD_BYTES as u64);
            let size = usize::try_from(room)
                .unwrap_or(usize::MAX)
                .min(buffer.0.len());
            let bytes = &mut buffer.0[..size];
            disk.read_blocks(start, bytes)
                .map_err(|error| format!("read at {start}: {error}"))?;
            for slot in bytes.as_chunks::<RECORD_BYTES>().0 {
                match Record::parse(slot) {
                    Ok(record) if record.number == number => {}
                    Ok(record) => return Err(format!("record {number}: holds {}", record.number)),
                    Err(reason) => {
                        return Err(format!("record {number}: {reason}"));
                    }
                }
                number += 1;
            }
        }
        Ok(count)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_workload::layout::{DISK_BYTES_MIN, Layout};
    use pollux_workload::record::list;
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::thread;

    struct Image {
        // Beside the test's program, not under /tmp: that may be a tmpfs without O_DIRECT.
        file: tempfile::NamedTempFile,
    }

    impl Image {
        fn new() -> Self {
            let program = std::env::current_exe().unwrap();
            let file = tempfile::NamedTempFile::new_in(program.parent().unwrap()).unwrap();
            file.as_file().set_len(DISK_BYTES_MIN).unwrap();
            Self { file }
        }

        fn counter(&self, boot: u64) -> Counter {
            let disk = Disk::open(self.file.path().to_str().unwrap()).unwrap();
            Counter::recover(Some(Arc::new(disk)), boot).unwrap()
        }

        fn raw(&self) -> &File {
            self.file.as_file()
        }
    }

    #[test]
    fn many_clients_get_every_number_once_and_the_disk_agrees() {
        const CLIENTS: u64 = 8;
        const REQUESTS: u64 = 40;
        let image = Image::new();
        let counter = image.counter(1);
        let seen = Mutex::new(BTreeSet::new());
        thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (counter, seen) = (&counter, &seen);
                scope.spawn(move || {
                    for seq in 0..REQUESTS {
                        let number = counter.count(&[(client, seq)]).unwrap();
                        assert!(seen.lock().unwrap().insert((number, client, seq)));
                    }
                });
            }
        });
        assert_eq!(counter.verify(), Ok(CLIENTS * REQUESTS));
        let listing = list(image.raw(), DISK_BYTES_MIN).unwrap();
        let on_disk: BTreeSet<_> = listing
            .records
            .iter()
            .map(|r| (r.number, r.client, r.seq))
            .collect();
        assert_eq!(on_disk, seen.into_inner().unwrap());
        assert_eq!(
            image.counter(2).number(),
            CLIENTS * REQUESTS,
            "a new boot goes on"
        );
    }

    #[test]
    fn a_batch_across_the_end_of_the_ring_is_whole() {
        let image = Image::new();
        let counter = image.counter(1);
        let slots = Layout::for_disk(DISK_BYTES_MIN).unwrap().record_slots();
        // Three first, so that no group ends at the ring's end by itself.
        assert_eq!(counter.count(&[(1, 0), (1, 1), (1, 2)]), Ok(1));
        let batch: Vec<_> = (3..slots + 50).map(|seq| (1, seq)).collect();
        assert_eq!(counter.count(&batch), Ok(4));
        assert_eq!(counter.verify(), Ok(slots - 2 * GROUP_RECORDS_MAX));
        assert_eq!(image.counter(2).number(), slots + 50);
    }

    #[test]
    fn verify_names_a_damaged_record() {
        let image = Image::new();
        let counter = image.counter(1);
        counter.count(&[(1, 1), (1, 2), (1, 3)]).unwrap();
        let layout = Layout::for_disk(DISK_BYTES_MIN).unwrap();
        image
            .raw()
            .write_all_at(b"x", layout.record_offset(2) + 100)
            .unwrap();
        let what = counter.verify().unwrap_err();
        assert!(what.contains("record 2"), "{what}");
    }

    #[test]
    fn without_a_disk_it_counts_in_memory() {
        let counter = Counter::recover(None, 1).unwrap();
        assert_eq!(counter.count(&[(1, 1), (1, 2)]), Ok(1));
        assert_eq!((counter.number(), counter.verify()), (2, Ok(0)));
    }
}
