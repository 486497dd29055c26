//! Digests over all of a VM's memory or disk, kept incrementally.
