//! Pages as a real guest dirties them: captured epoch by epoch from the test guest under
//! load, each dirty set with the content its pages had before.
//!
//! Never made up: random bytes compress to nothing and change all over, text compresses too
//! well; both say little of what a codec does to a guest.

pub mod capture;
pub mod guest;
pub mod pair;
pub mod xbzrle;

pub use capture::{Capture, Epoch};
