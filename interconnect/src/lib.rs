//! The private QUIC interconnect of a host pair.

pub mod ids;
