//! Heartbeats of the pool.
mod gate;
mod keys;
mod packet;
mod seal;
mod state;
mod transport;

pub use gate::{REASONS, Reason};
pub use keys::{KeyError, KeyStep, LINE_BYTES_MAX, PoolKeys};
pub use packet::{
    HOSTS_MAX, Incarnation, KeyNumber, NETWORKS_MAX, NetworkIndex, PACKET_BYTES_MAX,
    PAYLOAD_BYTES_MAX, PoolId, Sequence,
};
pub use seal::{DISKS_MAX, DiskIndex, News, Opened, Opener, SealError, Sealer, Slot};
pub use state::{StateError, keys_path, load_keys, next_incarnation, save_first_keys, save_keys};
pub use transport::{
    Batch, Event, Inbox, Network, NetworkStatus, PER_SENDER_MAX, PERIOD_DEFAULT, PERIOD_MAX,
    PERIOD_MIN, PORT_DEFAULT, PathStatus, Peer, Received, STALE_PERIODS, Transport,
    TransportConfig, TransportError, TransportStatus,
};
