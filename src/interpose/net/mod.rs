//! A VM's network: egress gate, tap, RARP, replay of ingress.
//!
//! QEMU sends and receives one datagram per Ethernet frame over unix sockets; [`NetPort`] stands
//! between those and a tap on the host's bridge. While the VM is mirrored, what the guest sends
//! waits in the [`Gate`] until its epoch is committed.
//!
//! What it must never do: let a frame of an uncommitted epoch leave (output-commit), change the
//! order of frames or send one twice, or pass anything for a generation that has been passed.

mod announce;
mod config;
mod gate;
mod port;
mod pump;
mod socket;
mod tap;
#[cfg(test)]
mod tests;

pub use announce::{MacAddr, rarp_frame};
pub use config::{
    FrameHook, NetError, NetHooks, NetMode, NetPortConfig, NetStats, NicHook, TapSource,
};
pub use gate::{FRAME_BYTES_MAX, GATE_BYTES_MAX, GATE_PACKETS_MAX, Gate, GateFull, Held, Pushed};
pub use port::NetPort;
pub use tap::{Tap, TapError};
