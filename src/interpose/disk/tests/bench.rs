//! Measurements, run by hand: `cargo test --release --lib disk::tests::bench -- --ignored --nocapture`.

use super::super::*;
use super::nbd_clients::{Client, serve};
use super::{MIB, test_disk};
use crate::pool::{Epoch, Generation};
use bytes::BufMut;
use std::io::{Read, Write};
use std::time::Instant;

/// Requests a second of `command` at queue depth `depth`, 4 KiB each.
fn iops(client: &mut Client, command: u16, depth: u64, count: u64) -> f64 {
    let blocks = 64 * MIB / 4096;
    let began = Instant::now();
    let send = |client: &mut Client, cookie: u64| {
        let mut out = Vec::with_capacity(4200);
        let at = cookie.wrapping_mul(0x9e37_79b9) % blocks * 4096;
        Client::request(&mut out, command, 0, cookie, at, 4096);
        if command == 1 {
            out.put_bytes(7, 4096);
        }
        client.stream.write_all(&out).expect("sent");
    };
    for cookie in 0..depth {
        send(client, cookie);
    }
    let mut data = [0; 4096];
    for cookie in depth..count + depth {
        assert_eq!(client.reply().0, 0);
        if command == 0 {
            client.stream.read_exact(&mut data).expect("data");
        }
        if cookie < count {
            send(client, cookie);
        }
    }
    #[allow(clippy::cast_precision_loss)]
    let per_second = count as f64 / began.elapsed().as_secs_f64();
    per_second
}

#[test]
#[ignore = "a measurement"]
fn iops_by_mode_and_depth() {
    for mode in [Mode::Overlay { epoch: Epoch(1) }, Mode::Direct] {
        let test = test_disk(64 * MIB, |options| options.mode = mode);
        let server = serve(&test);
        let mut client = Client::go(server.path());
        for depth in [1, 16, 64] {
            let write = iops(&mut client, 1, depth, 40_000);
            let read = iops(&mut client, 0, depth, 40_000);
            println!("{mode:?} QD{depth}: write {write:.0}/s read {read:.0}/s");
        }
        println!("{:?}", test.disk.stats());
    }
}

#[test]
#[ignore = "a measurement"]
fn cost_of_a_cut() {
    let test = test_disk(64 * MIB, |_| {});
    for (epoch, writes) in [(2, 100), (3, 1000), (4, 10_000)] {
        for at in 0..writes {
            super::put(&test.disk, super::data(at * 4096, 1, 4096));
        }
        let began = Instant::now();
        let cut = test.disk.cut(Epoch(epoch)).expect("a cut");
        println!("cut of {} writes: {:?}", cut.writes.len(), began.elapsed());
    }
    let began = Instant::now();
    test.disk.go_direct(Generation(5)).expect("solo");
    println!(
        "going solo with {} MB held: {:?}",
        11_100 * 4096 / 1_000_000,
        began.elapsed()
    );
}
