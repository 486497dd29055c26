//! The one linearizable store of the pool: versioned keys, compare-and-set.
