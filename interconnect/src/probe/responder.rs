//! The side that is asked.

use super::wire::Talk;
use crate::frame::Frame;
use crate::link::Interconnect;
use tokio::sync::mpsc;

/// Answers a partner's tests on one interconnect: one at a time, within limits.
#[derive(Debug)]
pub struct Responder {}

impl Responder {
    /// A responder that serves nobody yet.
    #[must_use]
    pub fn new(_interconnect: &Interconnect, _runtime: tokio::runtime::Handle) -> Self {
        Self {}
    }

    /// The partner opened a lane of [`super::PROBE_VM`].
    pub fn lane(&self, _rx: mpsc::Receiver<Frame>) {}

    /// The partner asked something on the control lane.
    pub fn asked(&self, _talk: &Talk) {}
}
