//! HTTP+JSON on a unix socket: the one way to ask a daemon anything.
//!
//! [`types`] is what crosses it, [`client`] asks; the daemon answers. Whoever stands
//! outside a daemon (commands, lab, drills) knows this room and nothing of the daemon.

pub mod client;
pub mod links;
pub mod pool;
pub mod types;

/// Where a daemon listens unless its configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/pollux/api.sock";

/// Longest request or response body, in bytes: a status of a full host is far below.
pub const BODY_BYTES_MAX: usize = 8 << 20;
