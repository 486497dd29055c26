//! Pure state machines of the two sides of a mirrored VM.
