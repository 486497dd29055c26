//! Link tests: what a pair's interconnect carries, measured with real frames on the real
//! session, and answered by the partner without anybody there.
//!
//! ```text
//!   Tester                                              Responder (at the partner)
//!    Ping  ---------------- control lane -------------->
//!          <--------------- control lane --------------- Pong
//!    Probe Probe Probe(answer me) -- epoch lane ------->  counts
//!          <--------------- control lane --------------- Received
//! ```
//!
//! - [`wire`]: the layout of both kinds of payload. Pure.
//! - [`Responder`]: answers, within limits, whatever a partner asks.
//! - [`Tester`]: asks and measures.
//!
//! What this must never do: hold more than one test's lane at a time, answer more or longer
//! than its limits, or delay the control and I/O lanes of mirrored VMs (test traffic is
//! epoch-lane traffic, which goes behind both).

mod responder;
mod tester;
pub mod wire;

pub use responder::Responder;
pub use tester::{LinkSample, Measured, PathSample, Settings, Share, Step, TestError, Tester};

use crate::frame::{Frame, FrameKind};
use crate::ids::{Epoch, Generation, VmId};
use std::time::Duration;

/// The VM id of test lanes: no uuid (its version bits say nothing), so no VM has it.
pub const PROBE_VM: VmId = VmId(*b"pollux link test");
/// Longest test, for both sides: a responder that has served a lane for longer ends it.
pub const TEST_TIME_MAX: Duration = Duration::from_secs(120);

/// What is said on the control lane, as a frame.
fn answer_frame(talk: &wire::Talk) -> Frame {
    Frame {
        kind: FrameKind::ProbeAck,
        vm: PROBE_VM,
        generation: Generation(talk.test().0),
        epoch: Epoch(0),
        payload: talk.to_bytes(),
    }
}

#[cfg(test)]
mod tests;
