//! Measures the pause of a real QEMU by machine and transport. Proves nothing, prints:
//! `cargo test --lib checkpoint::measure -- --ignored --nocapture`, on a quiet host.

use super::CutTimings;
use super::testbed::{CopyAll, TestVm};
use std::time::Duration;

/// Device models of the pause measurement.
fn devices(transport: &str, serial: bool) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let (bus, tail) = match transport {
        "mmio" => ("device", ""),
        "legacy" => ("pci", ",disable-modern=on"),
        "modern" => ("pci", ""),
        _ => return args,
    };
    args.extend([
        "-netdev".into(),
        "dgram,id=n0,local.type=unix,local.path=net.qemu,remote.type=unix,remote.path=net.pollux"
            .into(),
        "-device".into(),
        format!("virtio-net-{bus},netdev=n0,mac=52:54:00:00:00:01{tail}"),
        "-blockdev".into(),
        "driver=null-co,node-name=d0,size=67108864,read-zeroes=on".into(),
        "-device".into(),
        format!("virtio-blk-{bus},drive=d0{tail}"),
    ]);
    if serial {
        args.extend(["-serial".into(), "file:serial.log".into()]);
    }
    args
}

/// Not a test of anything: prints the parts of the pause by machine and transport.
#[test]
#[ignore = "a measurement; run alone with --ignored --nocapture"]
fn pause_by_machine() {
    const CUTS: usize = 300;
    for (machine, transport, serial) in [
        ("microvm,isa-serial=off", "mmio", false),
        ("microvm,isa-serial=on", "mmio", true),
        ("q35", "legacy", false),
        ("q35", "legacy", true),
        ("q35", "modern", false),
        ("pc", "legacy", false),
        ("pc", "legacy", true),
    ] {
        let args = devices(transport, serial);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let vm = TestVm::idle(machine, &args);
        let mut checkpointer = vm.checkpointer(true);
        let mut hooks = CopyAll::of(&vm);
        hooks.copy = false;
        let mut all: Vec<CutTimings> = Vec::new();
        let mut bytes = 0;
        for _ in 0..CUTS {
            std::thread::sleep(Duration::from_millis(10));
            let cut = checkpointer.cut(&mut hooks).expect("cut");
            bytes = cut.device_state.len();
            all.push(cut.timings);
        }
        let part = |of: fn(&CutTimings) -> u64| {
            let mut values: Vec<u64> = all.iter().map(of).collect();
            values.sort_unstable();
            (values[CUTS / 2], values[CUTS * 9 / 10])
        };
        eprintln!(
            "{machine} {transport} serial={serial}: {bytes} bytes; µs p50/p90: \
             stop {:?} save {:?} cont {:?} pause {:?}; clock {:?}",
            part(|t| t.stop_us),
            part(|t| t.save_us),
            part(|t| t.cont_us),
            part(|t| t.pause_us),
            checkpointer.clock_status(),
        );
    }
}
