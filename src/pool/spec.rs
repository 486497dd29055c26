//! The VM spec: TOML in, precise errors out.
