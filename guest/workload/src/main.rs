//! The test guest's only program: process 1 after `/init` has loaded the drivers.
//!
//! It serves a counter whose every answer is backed by a flushed record, and runs workers
//! that check their own disk blocks and memory pages. It must never hide a fault: what cannot
//! go on panics, and a panic of process 1 is a kernel panic on the console.

mod counter;
mod disk;
mod os;
mod service;
mod settings;
mod workers;

use counter::Counter;
use disk::{Buffer, Disk};
use pollux_workload::layout::BOOT_BLOCK_OFFSET;
use pollux_workload::record::ReadBlocks;
use service::{COUNTER_PORT, ECHO_PORT, Service};
use settings::Settings;
use std::io;
use std::sync::Arc;
use std::thread;
use workers::Workers;

const DISK: &str = "/dev/vda";

fn main() -> io::Result<()> {
    let (settings, bad) = Settings::parse(&std::fs::read_to_string("/proc/cmdline")?);
    for error in bad {
        eprintln!("workload: {error}");
    }
    let disk = match Disk::open(DISK) {
        Ok(disk) => Some(Arc::new(disk)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => panic!("{DISK}: {error}"),
    };
    let boot = disk.as_deref().map_or(Ok(1), count_boot)?;
    let workers = Workers::start(&settings, disk.as_ref());
    if settings.counter {
        let on_disk = disk.is_some();
        let counter = Counter::recover(disk, boot)?;
        let service = Service {
            counter,
            workers,
            boot,
            on_disk,
        };
        service::listen(COUNTER_PORT, move |stream| service.serve(stream))?;
    }
    if settings.net {
        service::listen(ECHO_PORT, service::echo)?;
    }
    println!(
        "workload: ready, boot {boot}, {} ms after power-on",
        os::mono_ns() / 1_000_000
    );
    loop {
        thread::park();
    }
}

/// Raise the number of boots on the disk and return it.
fn count_boot(disk: &Disk) -> io::Result<u64> {
    let mut buffer = Buffer::new();
    disk.read_blocks(BOOT_BLOCK_OFFSET, &mut buffer.block()[..])?;
    let boots = pollux_workload::boot::parse(buffer.block()).unwrap_or(0) + 1;
    pollux_workload::boot::encode(boots, buffer.block());
    disk.write(BOOT_BLOCK_OFFSET, &buffer.block()[..])?;
    disk.flush()?;
    Ok(boots)
}
