//! pair
pub mod copy;
pub mod core;
pub mod message;
#[cfg(test)]
mod model;
