//! Model check of the claim protocol: every order in which what happens to a mirrored pair can
//! happen, up to a budget of faults, driven through the very machines that run in production.
//!
//! The world is two hosts, each with [`Primary`](super::Primary), [`Standby`](super::Standby)
//! or nothing; lanes between them that overtake each other; and the record behind a
//! linearizable compare-and-set. Time goes in ticks of 50 ms. What is on its way arrives within
//! the tick, in any order, unless a fault of the budget holds it up, loses it, answers nothing,
//! freezes or crashes a host between any two actions, cuts the link or the heartbeats. States
//! are the same if their future is (`view.rs` of either machine), so time itself needs no
//! bound: a case is explored to its end.
//!
//! Checked in every state, by the names of docs/ARCHITECTURE.md:
//!
//! - **one-life**: at most one instance has its output ungated, and only one that the record
//!   names as owner with no standby; only the owner by the record is promoted.
//! - **output-commit**: what is released is whole on a standby that the record has named.
//! - **no-ghost-write**: nothing leaves a side once the other has come to life.
//! - **whole-epoch**, **nothing-lost**: a promoted guest is one checkpoint, and not older than
//!   what was released; no side gives up what the record counts on.
//! - **liveness**: were the faults over now, the pair would settle so that one side has effect
//!   again, unless all whom the record counts on came to harm.
//!
//! That it can fail is shown by putting bugs back ([`super::sabotage`]); what is found comes
//! with the shortest way there, in words. `make test` explores the narrow pairs of what can
//! happen, `make soak` all of them.

mod check;
mod event;
mod explore;
mod shell;
mod step;
#[cfg(test)]
mod tests;
mod words;
mod world;

pub(in crate::mirror) use world::Frame;
