//! pollux keeps a virtual machine running when its host dies.
//!
//! Every folder is one room with one owner and one job; docs/ARCHITECTURE.md
//! draws them. State flows one way: guest -> [`interpose`] -> [`mirror`] ->
//! `interconnect` -> standby. [`mirror`], [`plan`], [`pool`] and the codecs are pure: no
//! clock, no thread, no file, no socket.

pub mod api;
pub mod beat;
pub mod cli;
pub mod daemon;
pub mod drill;
pub mod fence;
pub mod fuzzing;
pub mod ha;
pub mod interpose;
pub mod lab;
pub mod mirror;
pub mod plan;
pub mod pool;
pub mod registry;
pub mod sim;
pub mod vm;
