//! The side that asks and measures, on a plain thread.

use super::wire::{Piece, Talk, TestId};
use super::{PROBE_VM, TEST_TIME_MAX, answer_frame};
use crate::frame::{Frame, FrameKind};
use crate::ids::{Epoch, Generation};
use crate::link::{EpochLane, Interconnect, LinkState, LinkStats, SendError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A piece of test traffic, bytes: about what a full batch of pages takes.
const PIECE: usize = 1 << 20;
/// Pieces between two that want an answer while goodput is measured.
const PIECES_PER_ANSWER: u64 = 4;
/// Pieces of one burst: what a mirrored VM's epoch may have to wait behind. 4 MiB are
/// 3.4 ms at 10 Gbit/s.
const BURST_PIECES: u64 = 4;
/// The pause after a burst or an epoch, times what it took: a quarter of the links at most.
const REST_FACTOR: u32 = 3;
/// A page.
const PAGE: usize = 4096;
/// Pages of a small and of a large epoch.
const SMALL_PAGES: usize = 16;
const LARGE_PAGES: usize = 1_000;
/// Samples of one kind: enough for a 99th percentile.
const SAMPLES_MAX: usize = 2_000;
/// Pause between two round trips, so that they see the link at many moments.
const PING_EVERY: Duration = Duration::from_millis(1);
/// Between two looks at the figures of the links.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// An answer that takes longer will not come.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Answers that may wait for the thread that measures.
const ANSWERS_MAX: usize = 1024;
/// Shares of the time, in percent: the four steps in their order.
const SHARES: [(Step, u32); 4] = [
    (Step::RoundTrips, 10),
    (Step::Goodput, 50),
    (Step::SmallEpochs, 15),
    (Step::LargeEpochs, 25),
];

/// How much of the links a test may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Share {
    /// Short bursts with pauses three times as long: mirrored VMs' epochs wait for at most
    /// one burst.
    Bursts,
    /// All there is.
    Full,
}

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long in all; at most [`super::TEST_TIME_MAX`].
    pub time: Duration,
    /// How much of the links to take.
    pub share: Share,
}

/// What a test does at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Questions and answers on the control lane.
    RoundTrips,
    /// As much as goes through.
    Goodput,
    /// Epochs of a few pages, one after the other.
    SmallEpochs,
    /// Epochs of a thousand pages, one after the other.
    LargeEpochs,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RoundTrips => "round trips",
            Self::Goodput => "goodput",
            Self::SmallEpochs => "small epochs",
            Self::LargeEpochs => "epochs of 1,000 pages",
        })
    }
}

/// Samples of all tested links together; times in microseconds.
#[derive(Clone, Debug, Default)]
pub struct PathSample {
    /// Round trips on the control lane.
    pub rtt_us: Vec<u64>,
    /// Payload bytes acknowledged a second.
    pub goodput_bytes_per_s: u64,
    /// Epochs of 16 pages, from the first byte handed over to the answer.
    pub small_epoch_us: Vec<u64>,
    /// Epochs of 1,000 pages likewise.
    pub large_epoch_us: Vec<u64>,
}

/// What one link did meanwhile.
#[derive(Clone, Debug, Default)]
pub struct LinkSample {
    /// Round trips as its connection measured them, microseconds.
    pub rtt_us: Vec<u64>,
    /// UDP payload sent while goodput was measured, bytes a second.
    pub sent_bytes_per_s: u64,
    /// Packets sent in the whole test.
    pub sent_packets: u64,
    /// Packets of those declared lost.
    pub lost_packets: u64,
    /// Its figures at the end.
    pub last: LinkStats,
}

/// What a test measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// How long it took.
    pub took: Duration,
    /// All links together.
    pub together: PathSample,
    /// Each link of the pair, in order.
    pub links: Vec<LinkSample>,
}

/// Why a test has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestError {
    /// The interconnect does not carry.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The partner's build does not know link tests.
    #[error(
        "the partner speaks protocol version 1, which has no link tests: bring both hosts to the same pollux version"
    )]
    OldPartner,
    /// The partner does not serve it.
    #[error("the partner refuses the test: {0}")]
    Refused(String),
    /// No answer came.
    #[error(
        "the partner did not answer a question within {} s: look at its log and at `pollux link show`",
        ANSWER_PATIENCE.as_secs()
    )]
    NoAnswer,
    /// No random number for the test.
    #[error("the kernel gives no random numbers: look at its log")]
    NoRandom,
    /// Told to end.
    #[error("the test was told to end")]
    Cancelled,
}

/// A test of one interconnect: made, run once on a thread, and told from others what the
/// partner answered or that it is to end.
pub struct Tester {
    settings: Settings,
    test: TestId,
    cancelled: AtomicBool,
    /// Wakes the thread that waits: an answer, or `None` when it is to look up.
    told: SyncSender<Option<Talk>>,
    heard: Mutex<Receiver<Option<Talk>>>,
}

impl std::fmt::Debug for Tester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tester({:x}, {:?})", self.test.0, self.settings)
    }
}

impl Tester {
    /// A test that has not begun.
    ///
    /// # Errors
    /// [`TestError::NoRandom`].
    pub fn new(settings: Settings) -> Result<Arc<Self>, TestError> {
        use ring::rand::SecureRandom;
        let mut bytes = [0; 8];
        ring::rand::SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| TestError::NoRandom)?;
        let (told, heard) = sync_channel(ANSWERS_MAX);
        Ok(Arc::new(Self {
            settings,
            test: TestId(u64::from_le_bytes(bytes)),
            cancelled: AtomicBool::new(false),
            told,
            heard: Mutex::new(heard),
        }))
    }

    /// The partner said this on the control lane. Never blocks; what is about another test
    /// is forgotten.
    pub fn answered(&self, talk: Talk) {
        if talk.test() == self.test {
            // Full means that thousands of answers wait: one more tells nothing new.
            let _ = self.told.try_send(Some(talk));
        }
    }

    /// End soon.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        let _ = self.told.try_send(None);
    }

    /// Measure; on a thread of its own, once. `progress` is told the step and how much of
    /// the whole is done, thousandths.
    ///
    /// # Errors
    /// [`TestError`].
    pub fn run(
        &self,
        interconnect: &Interconnect,
        progress: impl FnMut(Step, u64),
    ) -> Result<Measured, TestError> {
        if interconnect.stats().version == 1 {
            return Err(TestError::OldPartner);
        }
        let lane = interconnect.open_epoch_lane(PROBE_VM, Generation(self.test.0))?;
        let mut filling = vec![0; PIECE];
        // Not zeros: nobody between the hosts may make them small.
        let mut word = self.test.0 | 1;
        for byte in filling.chunks_exact_mut(8) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).rotate_left(17) ^ 0x9e37;
            byte.copy_from_slice(&word.to_le_bytes());
        }
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let mut run = Run {
            tester: self,
            interconnect,
            lane,
            heard,
            filling,
            question: 0,
            links: Links::new(interconnect),
            begun: Instant::now(),
            time: self.settings.time.min(TEST_TIME_MAX),
            progress,
        };
        run.all()
    }
}

/// A test under way.
struct Run<'a, P> {
    tester: &'a Tester,
    interconnect: &'a Interconnect,
    lane: EpochLane,
    heard: MutexGuard<'a, Receiver<Option<Talk>>>,
    filling: Vec<u8>,
    question: u64,
    links: Links,
    begun: Instant,
    time: Duration,
    progress: P,
}

impl<P: FnMut(Step, u64)> Run<'_, P> {
    fn all(&mut self) -> Result<Measured, TestError> {
        let mut together = PathSample::default();
        let mut percent_before = 0;
        for (step, percent) in SHARES {
            let from = self.time * percent_before / 100;
            percent_before += percent;
            let until = self.begun + self.time * percent_before / 100;
            // What an earlier step had left over is not this one's.
            let until = until.min(Instant::now() + (self.time * percent_before / 100 - from));
            match step {
                Step::RoundTrips => together.rtt_us = self.round_trips(until)?,
                Step::Goodput => together.goodput_bytes_per_s = self.goodput(until)?,
                Step::SmallEpochs => {
                    together.small_epoch_us = self.epochs(step, SMALL_PAGES, until)?;
                }
                Step::LargeEpochs => {
                    together.large_epoch_us = self.epochs(step, LARGE_PAGES, until)?;
                }
            }
        }
        Ok(Measured {
            took: self.begun.elapsed(),
            together,
            links: self.links.samples(self.interconnect),
        })
    }

    /// Whether `until` is over; tells of the progress and looks at the links by the way.
    fn over(&mut self, step: Step, until: Instant) -> Result<bool, TestError> {
        if self.tester.cancelled.load(Ordering::Acquire) {
            return Err(TestError::Cancelled);
        }
        let now = Instant::now();
        let done = now.duration_since(self.begun).as_millis() * 1000 / self.time.as_millis().max(1);
        (self.progress)(step, u64::try_from(done).unwrap_or(u64::MAX).min(1000));
        self.links.look(self.interconnect, now);
        Ok(now >= until)
    }

    fn ask(&mut self) -> u64 {
        self.question += 1;
        self.question
    }

    /// Wait for the answer to this question; gives the bytes it tells of.
    fn answer(&mut self, question: u64) -> Result<u64, TestError> {
        let end = Instant::now() + ANSWER_PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let talk = match self.heard.recv_timeout(left) {
                Ok(talk) => talk,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(self.silent());
                }
            };
            if self.tester.cancelled.load(Ordering::Acquire) {
                return Err(TestError::Cancelled);
            }
            match talk {
                Some(Talk::Pong { question: to, .. }) if to == question => return Ok(0),
                Some(Talk::Received {
                    question: to,
                    bytes,
                    ..
                }) if to == question => return Ok(bytes),
                Some(Talk::Refused { reason, .. }) => return Err(TestError::Refused(reason)),
                _ => {}
            }
        }
    }

    /// Why no answer came.
    fn silent(&self) -> TestError {
        if self.interconnect.session() == Some(self.lane.session()) {
            TestError::NoAnswer
        } else {
            SendError::LaneGone.into()
        }
    }

    fn send(&mut self, bytes: usize, question: Option<u64>) -> Result<(), TestError> {
        let piece = Piece {
            test: self.tester.test,
            question,
        };
        let sent = self.lane.send_blocking(Frame {
            kind: FrameKind::Probe,
            vm: PROBE_VM,
            generation: Generation(self.tester.test.0),
            epoch: Epoch(0),
            payload: piece.to_bytes(bytes, &self.filling),
        });
        sent.map_err(|error| match self.refusal() {
            // The partner ends the lane when it refuses: its words say more.
            Some(reason) => TestError::Refused(reason),
            None => error.into(),
        })
    }

    /// A refusal among what was said and not looked at yet.
    fn refusal(&mut self) -> Option<String> {
        while let Ok(talk) = self.heard.recv_timeout(Duration::from_millis(100)) {
            if let Some(Talk::Refused { reason, .. }) = talk {
                return Some(reason);
            }
        }
        None
    }

    /// Send `bytes` in pieces, the last of which wants an answer, and wait for it.
    fn exchange(&mut self, bytes: usize) -> Result<Duration, TestError> {
        let begun = Instant::now();
        let mut left = bytes;
        while left > PIECE {
            self.send(PIECE, None)?;
            left -= PIECE;
        }
        let question = self.ask();
        self.send(left, Some(question))?;
        self.answer(question)?;
        Ok(begun.elapsed())
    }

    /// Leave the links to others after having used them for `took`.
    fn rest(&self, took: Duration) {
        if self.tester.settings.share == Share::Bursts {
            std::thread::sleep(took * REST_FACTOR);
        }
    }

    fn round_trips(&mut self, until: Instant) -> Result<Vec<u64>, TestError> {
        let mut samples = Vec::new();
        self.over(Step::RoundTrips, until)?;
        while samples.is_empty()
            || samples.len() < SAMPLES_MAX && !self.over(Step::RoundTrips, until)?
        {
            let (begun, question) = (Instant::now(), self.ask());
            let test = self.tester.test;
            self.interconnect
                .control(answer_frame(&Talk::Ping { test, question }))?;
            self.answer(question)?;
            samples.push(micros(begun.elapsed()));
            std::thread::sleep(PING_EVERY);
        }
        Ok(samples)
    }

    fn goodput(&mut self, until: Instant) -> Result<u64, TestError> {
        self.links.goodput_begins(self.interconnect);
        let rate = match self.tester.settings.share {
            Share::Full => self.goodput_full(until),
            Share::Bursts => self.goodput_bursts(until),
        };
        self.links.goodput_ends(self.interconnect);
        rate
    }

    /// Keep the lane full; what was acknowledged from one answer to the last, over that time.
    fn goodput_full(&mut self, until: Instant) -> Result<u64, TestError> {
        // The first answer is where the clock starts: windows are open then.
        let question = self.ask();
        self.send(PIECE, Some(question))?;
        let first = self.answer(question)?;
        let begun = Instant::now();
        let (mut asked, mut answered) = (question, (question, first));
        while asked == question || !self.over(Step::Goodput, until)? {
            for _ in 1..PIECES_PER_ANSWER {
                self.send(PIECE, None)?;
            }
            asked = self.ask();
            self.send(PIECE, Some(asked))?;
            // Answers on the way are not waited for; a refusal among them counts.
            while let Ok(talk) = self.heard.try_recv() {
                match talk {
                    Some(Talk::Refused { reason, .. }) => return Err(TestError::Refused(reason)),
                    Some(Talk::Received {
                        question, bytes, ..
                    }) => answered = (question, bytes),
                    _ => {}
                }
            }
        }
        if answered.0 != asked {
            answered.1 = self.answer(asked)?;
        }
        Ok(per_second(
            answered.1.saturating_sub(first),
            begun.elapsed(),
        ))
    }

    /// Short bursts; the median of their rates, the round trip taken off.
    fn goodput_bursts(&mut self, until: Instant) -> Result<u64, TestError> {
        let bytes = PIECE * usize::try_from(BURST_PIECES).unwrap_or(1);
        let mut rates = Vec::new();
        while rates.is_empty() || !self.over(Step::Goodput, until)? {
            let test = self.tester.test;
            let (asked, question) = (Instant::now(), self.ask());
            self.interconnect
                .control(answer_frame(&Talk::Ping { test, question }))?;
            self.answer(question)?;
            let rtt = asked.elapsed();
            let took = self.exchange(bytes)?;
            rates.push(per_second(
                bytes as u64,
                took.saturating_sub(rtt).max(took / 2),
            ));
            self.rest(took);
        }
        rates.sort_unstable();
        Ok(rates[rates.len() / 2])
    }

    fn epochs(&mut self, step: Step, pages: usize, until: Instant) -> Result<Vec<u64>, TestError> {
        let mut samples = Vec::new();
        self.over(step, until)?;
        while samples.is_empty() || samples.len() < SAMPLES_MAX && !self.over(step, until)? {
            let took = self.exchange(pages * PAGE)?;
            samples.push(micros(took));
            self.rest(took);
        }
        Ok(samples)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / time.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Watches the links while a test runs.
struct Links {
    samples: Vec<LinkSample>,
    /// Counters when the test began.
    before: Vec<LinkStats>,
    looked: Instant,
    goodput_began: (Instant, Vec<u64>),
}

impl Links {
    fn new(interconnect: &Interconnect) -> Self {
        let before = interconnect.stats().links;
        Self {
            samples: vec![LinkSample::default(); before.len()],
            before,
            looked: Instant::now(),
            goodput_began: (Instant::now(), Vec::new()),
        }
    }

    fn look(&mut self, interconnect: &Interconnect, now: Instant) {
        if now.duration_since(self.looked) < LOOK_EVERY {
            return;
        }
        self.looked = now;
        for (sample, link) in self.samples.iter_mut().zip(interconnect.stats().links) {
            if link.state != LinkState::Down {
                sample.rtt_us.push(micros(link.rtt));
            }
        }
    }

    fn goodput_begins(&mut self, interconnect: &Interconnect) {
        let links = interconnect.stats().links;
        let sent = links.iter().map(|l| l.sent_bytes).collect();
        self.goodput_began = (Instant::now(), sent);
    }

    fn goodput_ends(&mut self, interconnect: &Interconnect) {
        let (began, before) = &self.goodput_began;
        let took = began.elapsed();
        let now = interconnect.stats().links;
        for ((sample, link), before) in self.samples.iter_mut().zip(now).zip(before) {
            sample.sent_bytes_per_s = per_second(link.sent_bytes.saturating_sub(*before), took);
        }
    }

    fn samples(&mut self, interconnect: &Interconnect) -> Vec<LinkSample> {
        let now = interconnect.stats().links;
        for ((sample, link), before) in self.samples.iter_mut().zip(now).zip(&self.before) {
            // A connection that was made anew counts from zero.
            let since = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
            sample.sent_packets = since(link.sent_packets, before.sent_packets);
            sample.lost_packets = since(link.lost_packets, before.lost_packets);
            sample.last = link;
        }
        std::mem::take(&mut self.samples)
    }
}

const _: () = assert!(PIECE <= FrameKind::Probe.payload_bytes_max());
