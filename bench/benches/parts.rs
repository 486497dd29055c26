//! The pieces of an epoch alone.
fn main() {}
