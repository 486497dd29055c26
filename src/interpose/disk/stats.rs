//! API sketch.
/// p50/p99/max of one kind of request, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct LatencySummary { /// median
 pub p50_us: u64, /// 99th percentile
 pub p99_us: u64, /// largest
 pub max_us: u64 }
/// Counters since the disk was opened.
#[derive(Clone, Debug, Default)]
pub struct DiskStats { /// requests
 pub reads: u64, /// requests
 pub writes: u64, /// requests
 pub flushes: u64, /// trims and zeroes
 pub trims: u64, /// bytes
 pub read_bytes: u64, /// bytes
 pub write_bytes: u64, /// held
 pub overlay_bytes: u64, /// epochs held, running one included
 pub overlay_epochs: u64, /// latency
 pub read_latency: LatencySummary, /// latency
 pub write_latency: LatencySummary, /// writes held back
 pub throttled: u64, /// last failure of the write-out
 pub write_error: Option<String> }
