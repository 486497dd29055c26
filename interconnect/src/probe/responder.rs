//! The side that is asked. It trusts the partner with no more than its limits.

use super::wire::{Piece, Talk, TestId};
use super::{TEST_TIME_MAX, answer_frame};
use crate::frame::{Frame, FrameKind};
use crate::link::Interconnect;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};

/// Answers a second, whatever is asked: an epoch of a few pages every 100 µs wants this
/// many, and as control frames they are 0.8 MB/s. What is asked beyond it is not answered.
const ANSWERS_PER_S: u32 = 10_000;
/// A lane on which nothing comes for so long is given up: its place may be wanted.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a test waits for the one before it: the end of a lane may be on its way when the
/// next is opened.
const TURN_WAIT: Duration = Duration::from_millis(500);

/// Answers a partner's tests on one interconnect: one at a time, within limits.
///
/// The interconnect lives as long as this does.
#[derive(Clone)]
pub struct Responder {
    inner: Arc<Inner>,
    /// Held while a test's lane is being read.
    turns: Arc<Semaphore>,
    runtime: tokio::runtime::Handle,
}

struct Inner {
    interconnect: Interconnect,
    answers: Mutex<Budget>,
}

/// So many answers in each second.
struct Budget {
    since: Instant,
    left: u32,
}

impl Budget {
    /// Whether one more answer may go out at `now`.
    fn take(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            *self = Self {
                since: now,
                left: ANSWERS_PER_S,
            };
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

impl std::fmt::Debug for Responder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Responder({:?})", self.inner.interconnect)
    }
}

impl Responder {
    /// A responder that serves nobody yet.
    #[must_use]
    pub fn new(interconnect: Interconnect, runtime: tokio::runtime::Handle) -> Self {
        let answers = Mutex::new(Budget {
            since: Instant::now(),
            left: ANSWERS_PER_S,
        });
        Self {
            inner: Arc::new(Inner {
                interconnect,
                answers,
            }),
            turns: Arc::new(Semaphore::new(1)),
            runtime,
        }
    }

    /// The partner opened a lane of [`super::PROBE_VM`]. Returns at once.
    pub fn lane(&self, rx: mpsc::Receiver<Frame>) {
        // Weakly: a test must not keep alive an interconnect that its host has done with.
        let (weak, turns) = (Arc::downgrade(&self.inner), Arc::clone(&self.turns));
        self.runtime.spawn(async move {
            let say = |talk: &Talk| match weak.upgrade() {
                Some(inner) => inner.say(talk),
                None => false,
            };
            match tokio::time::timeout(TURN_WAIT, turns.acquire()).await {
                Ok(Ok(_turn)) => serve(rx, say).await,
                _ => refuse(rx, say).await,
            }
        });
    }

    /// The partner asked something on the control lane. Never blocks.
    pub fn asked(&self, talk: &Talk) {
        if let Talk::Ping { test, question } = *talk {
            self.inner.say(&Talk::Pong { test, question });
        }
    }
}

impl Inner {
    /// Answer, if the budget and the control lane have room; false if the interconnect is
    /// no more.
    fn say(&self, talk: &Talk) -> bool {
        let may = self
            .answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(Instant::now());
        if may && let Err(error) = self.interconnect.control(answer_frame(talk)) {
            tracing::debug!("an answer to a link test was not sent: {error}");
        }
        true
    }
}

/// Read the next piece; `None` when the lane is over or silent.
async fn next(rx: &mut mpsc::Receiver<Frame>) -> Option<(Piece, u64)> {
    let frame = tokio::time::timeout(SILENCE_MAX, rx.recv()).await.ok()??;
    if frame.kind != FrameKind::Probe {
        return None;
    }
    let piece = Piece::parse(&frame.payload).ok()?;
    Some((piece, frame.payload.len() as u64))
}

/// Count what comes and answer what wants an answer. Dropping `rx` ends the lane.
async fn serve(mut rx: mpsc::Receiver<Frame>, say: impl Fn(&Talk) -> bool) {
    let begun = Instant::now();
    let mut serving: Option<TestId> = None;
    let mut bytes = 0;
    while let Some((piece, size)) = next(&mut rx).await {
        let test = *serving.get_or_insert(piece.test);
        bytes += size;
        let reason = if piece.test != test {
            "two tests came on one lane".to_owned()
        } else if begun.elapsed() > TEST_TIME_MAX {
            format!("a test may take {} s", TEST_TIME_MAX.as_secs())
        } else {
            if let Some(question) = piece.question
                && !say(&Talk::Received {
                    test,
                    question,
                    bytes,
                })
            {
                return;
            }
            continue;
        };
        say(&Talk::Refused { test, reason });
        return;
    }
}

/// Say that another test is under way.
async fn refuse(mut rx: mpsc::Receiver<Frame>, say: impl Fn(&Talk) -> bool) {
    if let Some((piece, _)) = next(&mut rx).await {
        say(&Talk::Refused {
            test: piece.test,
            reason: "another test of this pair is under way, wait for its end".to_owned(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_a_budget_that_comes_back() {
        let start = Instant::now();
        let mut budget = Budget {
            since: start,
            left: ANSWERS_PER_S,
        };
        let given = (0..2 * ANSWERS_PER_S)
            .filter(|_| budget.take(start))
            .count();
        assert_eq!(given, ANSWERS_PER_S as usize);
        assert!(budget.take(start + Duration::from_secs(1)));
    }
}
