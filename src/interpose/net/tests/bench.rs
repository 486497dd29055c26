//! Measurements, run by hand: `cargo test --release --lib net::tests::bench -- --ignored --nocapture`.

use super::super::*;
use super::{Outside, TEST_TYPE, epoch, frame, in_namespace, number, test_port};
use std::io::Write;
use std::time::{Duration, Instant};

const ROUNDS: u32 = 20_000;

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    format!("p50 {:?} p99 {:?}", at(50), at(99))
}

#[test]
#[ignore = "a measurement"]
fn latency_of_a_port() {
    in_namespace(|| {
        let outside_direct = |test: &super::TestPort, outside: &Outside, n: u32| {
            let began = Instant::now();
            test.guest_sends(&frame(n));
            assert_eq!(number(&outside.receive()), n);
            began.elapsed()
        };
        {
            let tap = Tap::create("tap0", 1500, Some("br0")).expect("a tap");
            let outside = Outside::on("br0", TEST_TYPE);
            let times = (0..ROUNDS).map(|n| {
                let began = Instant::now();
                let _ = tap.file().write(&frame(n)).expect("written");
                assert_eq!(number(&outside.receive()), n);
                began.elapsed()
            });
            println!("tap alone: {}", percentiles(times.collect()));
        }
        {
            let test = test_port(NetMode::Direct);
            let outside = Outside::on("br0", TEST_TYPE);
            let times = (0..ROUNDS).map(|n| outside_direct(&test, &outside, n));
            println!("guest to outside, direct: {}", percentiles(times.collect()));
            let times = (0..ROUNDS).map(|n| {
                let began = Instant::now();
                outside.send(&frame(n));
                assert_eq!(number(&test.guest_receives()), n);
                began.elapsed()
            });
            println!("outside to guest, direct: {}", percentiles(times.collect()));
        }
        let test = test_port(NetMode::Hold { epoch: epoch(1) });
        let outside = Outside::on("br0", TEST_TYPE);
        let (mut cuts, mut releases) = (Vec::new(), Vec::new());
        for n in 0..ROUNDS {
            test.guest_sends(&frame(n));
            let began = Instant::now();
            assert_eq!(test.port.cut(epoch(u64::from(n) + 2)).expect("a cut"), 1);
            cuts.push(began.elapsed());
            let began = Instant::now();
            assert_eq!(test.port.release(epoch(u64::from(n) + 1)), 1);
            assert_eq!(number(&outside.receive()), n);
            releases.push(began.elapsed());
        }
        println!("cut: {}", percentiles(cuts));
        println!(
            "release of one frame to outside, calling thread: {}",
            percentiles(releases)
        );
    });
}
