//! Storage heartbeats on real files.

use super::super::device::hook::{self, Then};
use super::super::layout::BEAT_BYTES_MAX;
use super::super::paxos::HostSlot;
use super::super::{Beats, beats::BeatFault};
use super::{GEOMETRY, PATIENT, Set, damage};
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[test]
fn a_heartbeat_is_heard_by_the_others_with_the_disks_it_is_on() {
    let set = Set::new(3);
    let mut a = Beats::open(&set.options(0)).unwrap();
    let mut b = Beats::open(&set.options(1)).unwrap();
    assert_eq!(b.read_heartbeats(PATIENT).0, []);
    hook::set(&set.disks[1], |_| Err(io::Error::other("gone")));
    let told = a.write_heartbeat(b"one", PATIENT).unwrap();
    let well: Vec<bool> = told.iter().map(Result::is_ok).collect();
    assert_eq!(well, [true, false, true]);
    hook::clear(&set.disks[1]);
    let (heard, faults) = b.read_heartbeats(PATIENT);
    assert!(faults.iter().all(Option::is_none));
    assert_eq!(
        (heard[0].host, heard[0].disks.as_slice()),
        (HostSlot(0), [0, 2].as_slice())
    );
    assert_eq!(heard[0].payload, b"one");
    let first = heard[0].seq;
    a.write_heartbeat(&[7; BEAT_BYTES_MAX], PATIENT)
        .unwrap()
        .into_iter()
        .for_each(|r| r.unwrap());
    let (heard, _) = b.read_heartbeats(PATIENT);
    assert_eq!(heard[0].disks, [0, 1, 2]);
    assert!(heard[0].seq > first);
    // Also after a restart, and nothing too long is written.
    let second = heard[0].seq;
    drop(a);
    let mut a = Beats::open(&set.options(0)).unwrap();
    a.write_heartbeat(b"", PATIENT).unwrap();
    assert!(a.read_heartbeats(PATIENT).0[0].seq > second);
    assert_eq!(
        a.write_heartbeat(&[0; BEAT_BYTES_MAX + 1], PATIENT)
            .unwrap_err(),
        BEAT_BYTES_MAX + 1
    );
}

#[test]
fn a_damaged_heartbeat_is_left_out() {
    let set = Set::new(1);
    let mut a = Beats::open(&set.options(0)).unwrap();
    a.write_heartbeat(b"payload", PATIENT).unwrap();
    damage(&set.disks[0], GEOMETRY.beat_at(HostSlot(0)) + 50);
    assert_eq!(a.read_heartbeats(PATIENT).0, []);
    a.write_heartbeat(b"next", PATIENT).unwrap();
    assert_eq!(a.read_heartbeats(PATIENT).0[0].payload, b"next");
}

#[test]
fn a_hung_disk_gets_no_further_heartbeat_until_it_answers() {
    let set = Set::new(3);
    let mut a = Beats::open(&set.options(0)).unwrap();
    let (open, gate) = mpsc::channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    hook::set(&set.disks[0], move |_| {
        // Until the sender is gone.
        let _ = gate.lock().unwrap().recv();
        Ok(Then::Go)
    });
    for _ in 0..3 {
        let told = a.write_heartbeat(b"x", Duration::from_millis(300)).unwrap();
        assert!(matches!(told[0], Err(BeatFault::Waiting)));
    }
    drop(open);
    hook::clear(&set.disks[0]);
    // The answer that is owed comes first, then it is asked again.
    let mut told = a.write_heartbeat(b"y", PATIENT).unwrap();
    while told[0].is_err() {
        told = a.write_heartbeat(b"y", PATIENT).unwrap();
    }
    assert_eq!(a.read_heartbeats(PATIENT).0[0].disks, [0, 1, 2]);
}
