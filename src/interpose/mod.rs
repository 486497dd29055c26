//! What stands between QEMU and the world: memory, disk, network, device state.

pub mod audit;
pub mod checkpoint;
pub mod disk;
pub mod memory;
pub mod net;
