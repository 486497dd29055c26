//! Heartbeats through the statefile: writes this host's newest report, reads the others'.
//!
//! A thread of its own, because a disk may take its time. The same sealed block goes to every
//! disk of the statefile, which counts as one place: a block is bound to the pool, to its slot
//! and to its writer. Only a block that is newer than one read before tells that its host lives.

use super::Event;
use crate::beat::{DiskIndex, News, Opener, PoolKeys, Sealer, Sequence, Slot};
use crate::ha::report::{Path, Report, STORAGES_MAX};
use crate::pool::{HostName, Incarnation};
use crate::registry::statefile::StatefileOptions;
use crate::registry::statefile::{Beats, HeardBeat};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// All disks of the statefile are one place to the sealer.
const PLACE: DiskIndex = DiskIndex(0);
/// A statefile that could not be opened is tried again after this many periods.
const OPEN_AGAIN_PERIODS: u32 = 10;

/// What the thread needs.
pub(super) struct Setup {
    pub(super) options: StatefileOptions,
    pub(super) me: HostName,
    pub(super) incarnation: Incarnation,
    pub(super) keys: Arc<Mutex<PoolKeys>>,
    pub(super) period: Duration,
    pub(super) tell: Sender<Event>,
}

/// The way to the thread; it ends when this is dropped.
pub(super) struct StorageBeats(SyncSender<Vec<u8>>);

impl StorageBeats {
    /// Start the thread.
    ///
    /// # Errors
    /// If there is none to be had.
    pub(super) fn start(setup: Setup) -> std::io::Result<Self> {
        let (send, reports) = sync_channel(1);
        std::thread::Builder::new()
            .name("pool-storage".into())
            .spawn(move || run(&setup, &reports))?;
        Ok(Self(send))
    }

    /// This is the newest report. If the disks have not taken the last one yet, this one is
    /// left out.
    pub(super) fn publish(&self, report: &[u8]) {
        match self.0.try_send(report.to_vec()) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

fn run(setup: &Setup, reports: &Receiver<Vec<u8>>) {
    let mut told = String::new();
    loop {
        match Beats::open(&setup.options) {
            Ok(beats) => return serve(setup, beats, reports),
            Err(e) => {
                let reason = e.to_string();
                if reason != told {
                    tracing::error!("no heartbeats through storage: {reason}; tried again");
                    told = reason;
                }
            }
        }
        for _ in 0..OPEN_AGAIN_PERIODS {
            match reports.recv_timeout(setup.period) {
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

fn now(keys: &Mutex<PoolKeys>) -> PoolKeys {
    keys.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn serve(setup: &Setup, mut beats: Beats, reports: &Receiver<Vec<u8>>) {
    let mut keys = now(&setup.keys);
    let mut sealer = Sealer::new(setup.me.clone(), setup.incarnation, &keys);
    let mut opener = Opener::new(&keys);
    let slot = setup.options.slot;
    let mut sequence = 0;
    let mut faults = BTreeMap::new();
    while let Ok(report) = reports.recv() {
        sequence += 1;
        let newest = now(&setup.keys);
        if newest != keys {
            sealer.set_keys(&newest);
            opener.set_keys(&newest);
            keys = newest;
        }
        match sealer.seal(PLACE, Slot(slot.0), Sequence(sequence), &report) {
            Ok(block) => {
                // What a disk says is told by the read below, or by the other hosts.
                let _ = beats.write_heartbeat(&block, setup.period);
            }
            Err(e) => tracing::error!("a report cannot be sealed for storage: {e}"),
        }
        let (heard, faulty) = beats.read_heartbeats(setup.period);
        for (disk, fault) in faulty.iter().enumerate() {
            note(&mut faults, disk, fault.as_ref().map(ToString::to_string));
        }
        for beat in heard.iter().filter(|beat| beat.host != slot) {
            for heard in take_in(&mut opener, beat) {
                if setup.tell.send(heard).is_err() {
                    return;
                }
            }
        }
    }
}

/// Tell a disk's fault when it begins and when it ends.
fn note(faults: &mut BTreeMap<usize, String>, disk: usize, fault: Option<String>) {
    match fault {
        Some(fault) => {
            if faults.insert(disk, fault.clone()).as_ref() != Some(&fault) {
                tracing::warn!("heartbeats through disk {disk} of the statefile fail: {fault}");
            }
        }
        None => {
            if faults.remove(&disk).is_some() {
                tracing::info!("heartbeats through disk {disk} of the statefile work again");
            }
        }
    }
}

fn take_in(opener: &mut Opener, beat: &HeardBeat) -> Vec<Event> {
    let slot = Slot(beat.host.0);
    let opened = match opener.open(PLACE, slot, &beat.payload) {
        Ok(opened) => opened,
        Err(reason) => {
            tracing::debug!(
                slot = slot.0,
                "a heartbeat on storage is refused: {}",
                reason.as_str()
            );
            return Vec::new();
        }
    };
    if opened.news != News::Newer {
        return Vec::new();
    }
    let report = match Report::decode(opened.payload) {
        Ok(report) => report,
        Err(e) => {
            tracing::warn!(host = %opened.sender, "on storage: {e}");
            return Vec::new();
        }
    };
    let disks = beat
        .disks
        .iter()
        .filter_map(|disk| u8::try_from(*disk).ok());
    disks
        .filter(|disk| *disk < STORAGES_MAX)
        .map(|disk| Event::Heard {
            path: Path::Storage(disk),
            sender: opened.sender.clone(),
            incarnation: opened.incarnation,
            report: report.clone(),
        })
        .collect()
}
