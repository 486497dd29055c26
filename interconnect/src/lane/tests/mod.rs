//! The lane layer over a network in virtual time, and each part by itself.

mod cuts;
mod decisions;
mod net;
mod receiving;
mod sending;
mod speed;
mod wire;
