//! API sketch.
use super::announce::MacAddr;
use super::tap::{Tap, TapError};
use crate::interpose::disk::Owner;
use crate::pool::{Epoch, Generation};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
/// Where frames go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NetMode {
    /// Solo: frames pass at once.
    Direct,
    /// Mirrored primary: the guest's frames wait under the running epoch.
    Hold {
        /// The running epoch.
        epoch: Epoch,
    },
    /// Standby: both directions dropped.
    Standby,
    /// Deposed: both directions dropped, all held frames discarded.
    Stopped,
}
/// Calls out of a port; the first argument is the NIC's index. Called from the port's thread: must not block.
#[derive(Clone, Default)]
pub struct NetHooks {
    /// The first frame waits in the running epoch.
    pub on_output_waiting: Option<Arc<dyn Fn(usize) + Send + Sync>>,
    /// A frame was handed to the guest while mirrored.
    pub on_ingress: Option<Arc<dyn Fn(usize, &[u8]) + Send + Sync>>,
    /// The gate is half full; once per running epoch.
    pub on_pressure: Option<Arc<dyn Fn(usize) + Send + Sync>>,
}
/// The tap of a port.
pub enum TapSource {
    /// One made already.
    Ready(Tap),
    /// Make one.
    Create { /// interface name, at most 15 bytes
        name: String, /// bytes
        mtu: u32, /// join this bridge
        bridge: Option<String> },
}
/// What a port is made of.
pub struct NetPortConfig { /// index of the NIC in the VM
    pub nic: usize, /// the host side
    pub tap: TapSource, /// socket pollux binds (QEMU's remote.path)
    pub pollux_sock: PathBuf, /// socket QEMU binds (QEMU's local.path)
    pub qemu_sock: PathBuf, /// QEMU's uid/gid
    pub owner: Option<Owner>, /// the guest's address
    pub mac: MacAddr, /// first mode
    pub mode: NetMode, /// generation in force
    pub generation: Generation, /// calls out
    pub hooks: NetHooks }
/// Why a port failed.
#[derive(Debug, thiserror::Error)]
pub enum NetError { /// tap
    #[error(transparent)] Tap(#[from] TapError) }
/// Counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetStats { /// frames waiting
    pub held_packets: u64, /// bytes waiting
    pub held_bytes: u64, /// age of the oldest
    pub oldest_us: u64, /// dropped: gate full
    pub dropped_full: u64, /// dropped otherwise
    pub dropped_other: u64, /// guest to tap
    pub egress: u64, /// tap to guest
    pub ingress: u64 }
/// One NIC.
pub struct NetPort {}
#[allow(unused_variables, missing_docs, clippy::todo, clippy::missing_errors_doc)]
impl NetPort {
    pub fn start(config: NetPortConfig) -> Result<Self, NetError> { todo!() }
    /// Refused if `generation` is lower than the one in force. Direct releases what is held, in order; Stopped discards it.
    pub fn set_mode(&self, mode: NetMode, generation: Generation) -> Result<(), NetError> { todo!() }
    /// After QMP `stop`: take all frames of the running epoch from the socket, then tag what follows with `next`. Returns frames held in the ended epoch.
    pub fn cut(&self, next: Epoch) -> Result<usize, NetError> { todo!() }
    /// Send all frames of epochs <= `through`, in order, from this thread. Returns how many.
    pub fn release(&self, through: Epoch) -> usize { todo!() }
    /// Like `Disk::uncut`.
    pub fn uncut(&self, from: Epoch, running: Epoch) -> Result<(), NetError> { todo!() }
    /// Broadcast where the guest is now, now and a few times more.
    pub fn announce(&self) { todo!() }
    /// Hand these frames to the guest, before anything newer from the tap.
    pub fn inject(&self, frames: Vec<Bytes>) { todo!() }
    pub fn stats(&self) -> NetStats { todo!() }
}
