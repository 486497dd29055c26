//! Rehearsed failures with measurements.
