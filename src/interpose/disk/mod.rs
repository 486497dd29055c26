//! NBD server, write overlay, raw images.
