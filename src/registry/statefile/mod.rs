//! x
pub mod paxos;
#[cfg(test)]
mod model;
