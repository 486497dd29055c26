//! The failover planner: can every set of r failing hosts be survived, and where does each VM
//! restart? Pure.
//!
//! ```text
//! pool file -> model -> layout -> sets x pack -> Checker -> answer + certificate -> verify
//!                                                   |
//!                          largest, restart, whatif, advice (each asks the Checker)
//! ```
//!
//! [`model`] is what people write and scripts read; [`layout`] is the same in numbers; [`sets`]
//! lists what may fail together; [`pack`] answers for one such set; [`tolerance`] for all of
//! them; [`verify`] checks a certificate and shares nothing with the rest but the model.
//!
//! Must never: say `survives` where one set of failures is not survived. Where the budget of the
//! search is spent the answer is `unknown`, with the set that could not be decided.
//!
//! A VM that is lost is restarted on any survivor; running VMs are never moved for it. What a
//! surviving host has free therefore does not depend on which others failed, and each set of
//! failures is a vector packing problem of its own with bins of different sizes.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod advice;
pub mod answer;
pub mod certificate;
pub mod choose;
pub mod largest;
pub mod layout;
pub mod model;
pub mod pack;
pub mod random;
pub mod restart;
pub mod sets;
pub mod tolerance;
pub mod verify;
pub mod whatif;
