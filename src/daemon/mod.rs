//! Wiring of one host.
