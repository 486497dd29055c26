//! Dirty tracking, capture, apply.
