//! Output-commit, order, exactly once, ingress, replay, modes.

use super::super::*;
use super::{Outside, TEST_TYPE, epoch, frame, in_namespace, number, test_port};
use crate::pool::Generation;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering::SeqCst;

#[test]
fn nothing_leaves_before_its_release_then_all_in_order_once() {
    in_namespace(|| {
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        let outside = Outside::on("br0", TEST_TYPE);
        for n in 0..5 {
            test.guest_sends(&frame(n));
        }
        assert_eq!(
            test.port.cut(epoch(2)).expect("a cut"),
            5,
            "all of the epoch are in it"
        );
        for n in 5..8 {
            test.guest_sends(&frame(n));
        }
        test.until(|stats| stats.held_packets == 8);
        assert_eq!(test.port.stats().egress, 0, "output-commit");
        assert_eq!(test.port.release(epoch(1)), 5);
        assert_eq!(test.port.release(epoch(1)), 0, "once");
        assert_eq!(test.port.release(epoch(99)), 0, "never the running epoch");
        // The checkpoint of epoch 2 fails and its frames wait for the next.
        assert_eq!(test.port.cut(epoch(3)).expect("a cut"), 3);
        let told = test.waiting.load(SeqCst);
        test.port.uncut(epoch(2), epoch(2)).expect("taken back");
        assert_eq!(test.waiting.load(SeqCst), told + 1, "output still waits");
        assert_eq!(test.port.release(epoch(2)), 0);
        test.guest_sends(&frame(8));
        assert_eq!(test.port.cut(epoch(3)).expect("a cut"), 4);
        assert!(test.port.cut(epoch(3)).is_err(), "not higher");
        assert_eq!(test.port.release(epoch(2)), 4);
        // Solo: what waits goes first, then everything at once.
        test.guest_sends(&frame(9));
        test.until(|stats| stats.held_packets == 1);
        test.port
            .set_mode(NetMode::Direct, Generation(5))
            .expect("solo");
        test.guest_sends(&frame(10));
        for n in 0..11 {
            assert_eq!(number(&outside.receive()), n);
        }
        let stats = test.port.stats();
        assert_eq!(
            (stats.egress, stats.held_packets, stats.dropped_other),
            (11, 0, 0)
        );
    });
}

/// The port's thread is stopped, so what the cut does not take itself would be missing.
#[test]
fn a_cut_takes_what_is_still_in_the_socket() {
    in_namespace(|| {
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        let stopped = test.thread_stop.lock().expect("no panic");
        test.guest_sends(&frame(0));
        while test.waiting.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        for n in 1..5 {
            test.guest_sends(&frame(n));
        }
        let held = test.port.cut(epoch(2));
        drop(stopped);
        assert_eq!(held.expect("a cut"), 5);
    });
}

#[test]
fn output_is_told_once_an_epoch() {
    in_namespace(|| {
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        for n in 0..3 {
            test.guest_sends(&frame(n));
            test.until(|stats| stats.held_packets == u64::from(n) + 1);
        }
        while test.waiting.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        test.port.cut(epoch(2)).expect("a cut");
        test.guest_sends(&frame(3));
        while test.waiting.load(SeqCst) < 2 {
            std::thread::yield_now();
        }
        assert_eq!(test.waiting.load(SeqCst), 2);
    });
}

#[test]
fn frames_for_a_guest_that_stands_still_wait_in_order() {
    in_namespace(|| {
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        let outside = Outside::on("br0", TEST_TYPE);
        // Far more than a datagram socket queues; the guest reads none of it yet.
        for n in 0..300 {
            outside.send(&frame(n));
        }
        for n in 0..300 {
            assert_eq!(number(&test.guest_receives()), n);
        }
        test.until(|stats| stats.ingress >= 300);
        while test.ingress.load(SeqCst) < 300 {
            std::thread::yield_now();
        }
        assert_eq!(test.port.stats().dropped_other, 0);
    });
}

#[test]
fn injected_frames_reach_a_restarted_qemu_in_order() {
    in_namespace(|| {
        let mut test = test_port(NetMode::Direct);
        let outside = Outside::on("br0", TEST_TYPE);
        outside.send(&frame(1));
        assert_eq!(number(&test.guest_receives()), 1);
        let path = test.folder.path().join("qemu");
        std::fs::remove_file(&path).expect("removed");
        test.qemu = UnixDatagram::bind(&path).expect("a new QEMU");
        test.port
            .inject((100..150).map(|n| frame(n).into()).collect());
        for n in 100..150 {
            assert_eq!(number(&test.guest_receives()), n);
        }
        // The new QEMU is heard at once.
        test.guest_sends(&frame(7));
        loop {
            if number(&outside.receive()) == 7 {
                break;
            }
        }
        assert_eq!(
            test.ingress.load(SeqCst),
            0,
            "no replay log while not mirrored"
        );
    });
}

#[test]
fn a_deposed_port_passes_nothing_and_forgets_what_it_held() {
    in_namespace(|| {
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        test.guest_sends(&frame(1));
        test.port.cut(epoch(2)).expect("a cut");
        assert!(
            test.port.set_mode(NetMode::Direct, Generation(4)).is_err(),
            "stale"
        );
        assert_eq!(test.port.mode(), NetMode::Hold { epoch: epoch(2) });
        test.port
            .set_mode(NetMode::Stopped, Generation(6))
            .expect("deposed");
        assert_eq!(test.port.release(epoch(1)), 0);
        assert!(test.port.cut(epoch(3)).is_err());
        assert!(
            test.port.set_mode(NetMode::Direct, Generation(6)).is_err(),
            "needs a higher one"
        );
        test.guest_sends(&frame(2));
        test.until(|stats| stats.dropped_other >= 2);
        assert_eq!(
            (test.port.stats().egress, test.port.stats().held_packets),
            (0, 0)
        );
    });
}

#[test]
fn bad_frames_are_dropped_and_counted() {
    in_namespace(|| {
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        test.guest_sends(&vec![0; FRAME_BYTES_MAX + 1]);
        test.guest_sends(&[1, 2, 3]);
        test.guest_sends(&[]);
        test.until(|stats| stats.dropped_other == 1 && stats.held_packets == 2);
        test.port.cut(epoch(2)).expect("a cut");
        test.port.release(epoch(1));
        assert_eq!(test.port.stats().egress, 0, "the tap takes no runts");
    });
}
