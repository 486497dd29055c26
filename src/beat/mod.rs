//! Heartbeats of the pool: how the hosts' reports travel, and the keys that seal them.
//!
//! A report is a string of bytes here, at most [`PAYLOAD_BYTES_MAX`] of them; what it says and
//! what follows from it is the live set's. It goes to every host over every network
//! ([`Transport`]) and, sealed for one slot of one disk, through storage ([`Sealer`],
//! [`Opener`]). [docs/heartbeats.md](../../docs/heartbeats.md) argues format and keys, and says
//! what is protected against and what is not.
//!
//! ```text
//!   report --> Transport --seal--> sockets ~~~~> sockets --gate--> Inbox --> live set
//!          `-> Sealer --> statefile or etcd ~~~~~~~~~~~~~> Opener -------'
//!   gateway <-- GatewayProbe --> age of its newest answer, for the report
//! ```
//!
//! What this must never do: hand up what no member of the pool sealed for this host and this
//! path, or anything twice, or anything of an ended life; keep sending for a daemon that hangs;
//! wait for an ordinary thread.

pub(crate) mod fuzz;
mod gate;
mod gateway;
mod keys;
#[cfg(test)]
mod namespace;
mod packet;
mod seal;
mod session;
mod state;
mod transport;

pub use gate::{REASONS, Reason};
pub use gateway::{
    GATEWAY_PERIOD_DEFAULT, GatewayConfig, GatewayError, GatewayProbe, GatewayStatus,
};
pub use keys::{KeyError, KeyStep, LINE_BYTES_MAX, PoolKeys};
pub use packet::{
    HOSTS_MAX, Incarnation, KeyNumber, NETWORKS_MAX, NetworkIndex, PACKET_BYTES_MAX,
    PAYLOAD_BYTES_MAX, PoolId, Sequence,
};
pub use seal::{DISKS_MAX, DiskIndex, News, Opened, Opener, SealError, Sealer, Slot};
pub use session::{
    FIRST_FRAME_BYTES_MAX, FrameOpener, FrameSealer, GREETING_BYTES, LENGTH_BYTES, SessionError,
    SessionStart,
};
pub use state::{
    StateError, keys_path, load_keys, load_promised, next_incarnation, save_first_keys, save_keys,
    save_promised,
};
pub use transport::{
    Batch, Event, Inbox, Network, NetworkStatus, PER_SENDER_MAX, PERIOD_DEFAULT, PERIOD_MAX,
    PERIOD_MIN, PORT_DEFAULT, PathStatus, Peer, Received, STALE_PERIODS, Transport,
    TransportConfig, TransportError, TransportStatus,
};
