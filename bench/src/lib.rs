//! Benches of pollux and what they share.
//!
//! - `cargo bench -p pollux-bench --bench numbers`: the promised numbers, measured on a real
//!   VM in a lab of two hosts, mirrored and unprotected side by side in one run. Needs root,
//!   QEMU and the test guest (`make setup`). Takes about five minutes and prints a table.
//! - `cargo bench -p pollux-bench --bench link`: the path between two hosts, in namespaces of
//!   its own: an epoch lane beside TLS over TCP, two links, a cut, loss, heartbeats, cost per
//!   GiB. Needs root. Takes about three minutes and prints a table.
//! - `cargo bench -p pollux-bench --bench decision`: the pool's decision when one of 64 hosts falls
//!   silent, a tick, and hearing a report (criterion). Pure code, half a minute.
//! - `cargo bench -p pollux-bench --bench parts`: the pieces of an epoch alone (criterion).
//!
//! How to read them: everything runs on one machine, so two hosts, the guest under TCG and
//! the clients share its cores; on a busy machine all times grow, mirrored and unprotected
//! alike. The load average is printed with the table. Compare ratios of one run, not
//! milliseconds of two.

pub mod figure;
pub mod load;
pub mod pages;
pub mod scene;
pub mod wire;
