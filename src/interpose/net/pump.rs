//! API sketch.
