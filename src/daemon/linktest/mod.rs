//! A link test from this side: runs it on a thread, tells how it stands, says what the
//! figures mean.

mod meaning;

use super::partner::Partner;
use crate::api::links::{LinkFigures, PathFigures, TestReport, TestRequest, TestState, TestStatus};
use crate::api::types::{LinkConfig, Percentiles};
use interconnect::probe::{
    LinkSample, Measured, Settings, Share, Step, TEST_TIME_MAX, TestError, Tester,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Shortest test: each step needs some samples.
const TEST_S_MIN: u64 = 1;

/// What the host knows of the VMs mirrored over the tested pair.
#[derive(Debug, Clone, Copy, Default)]
pub struct MirroredNow {
    /// Whether there are any.
    pub any: bool,
    /// Bytes in for each byte out of their encoder, once known.
    pub codec_ratio: Option<f64>,
}

/// A test with one partner, under way or over.
pub struct LinkTest {
    status: Mutex<TestStatus>,
}

impl LinkTest {
    /// Begin test number `test`.
    ///
    /// # Errors
    /// Why it cannot be: the request, another test, the interconnect is down.
    pub fn start(
        test: u64,
        partner: &Arc<Partner>,
        request: &TestRequest,
        mirrored: MirroredNow,
        heartbeat_period: Duration,
    ) -> Result<Arc<Self>, String> {
        let name = &partner.name;
        let longest = TEST_TIME_MAX.as_secs();
        if !(TEST_S_MIN..=longest).contains(&request.seconds) {
            return Err(format!(
                "a test of {} s cannot be: give {TEST_S_MIN} to {longest} seconds",
                request.seconds
            ));
        }
        let status = partner.status();
        if !status.connected {
            let why = status.last_error.unwrap_or("no session so far".into());
            return Err(format!(
                "the interconnect to {name} is down ({why}): `pollux link show {name}` shows its links"
            ));
        }
        let share = if mirrored.any && !request.full {
            Share::Bursts
        } else {
            Share::Full
        };
        let settings = Settings {
            time: Duration::from_secs(request.seconds),
            share,
        };
        let tester = Tester::new(settings).map_err(|e| e.to_string())?;
        let Some(testing) = partner.begin_test(&tester) else {
            return Err(format!(
                "a test with {name} is under way already: wait for its end, or end it with `pollux link test {name} --cancel`"
            ));
        };
        let this = Arc::new(Self {
            status: Mutex::new(TestStatus {
                test,
                state: TestState::Running,
                step: Step::RoundTrips.to_string(),
                done_permille: 0,
                report: None,
                reason: None,
            }),
        });
        let (told, partner) = (Arc::clone(&this), Arc::clone(partner));
        partner.event(format!(
            "link test of {} s begins ({})",
            request.seconds,
            match share {
                Share::Full => "all the links carry",
                Share::Bursts => "short bursts beside mirrored VMs",
            }
        ));
        std::thread::Builder::new()
            .name("link-test".into())
            .spawn(move || {
                let testing = testing;
                let mut gap = Duration::ZERO;
                let measured = tester.run(&partner.interconnect, |step, permille| {
                    gap = gap.max(partner.last_heard().unwrap_or_default());
                    let mut status = told.lock();
                    status.step = step.to_string();
                    status.done_permille = permille;
                });
                // The partner may be tested again as soon as this one is seen to be over.
                drop(testing);
                let ends = measured.map(|measured| {
                    report(
                        &partner.config(),
                        &measured,
                        share,
                        mirrored,
                        gap,
                        heartbeat_period,
                    )
                });
                told.end(ends, &partner);
            })
            .map_err(|e| format!("no thread for the test: {e}"))?;
        Ok(this)
    }

    fn lock(&self) -> MutexGuard<'_, TestStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, result: Result<TestReport, TestError>, partner: &Partner) {
        let mut status = self.lock();
        match result {
            Ok(report) => {
                status.state = TestState::Done;
                status.done_permille = 1000;
                status.report = Some(report);
                partner.event("link test done".into());
            }
            Err(error) => {
                status.state = if matches!(error, TestError::Cancelled) {
                    TestState::Cancelled
                } else {
                    TestState::Failed
                };
                partner.event(format!("link test ended: {error}"));
                status.reason = Some(error.to_string());
            }
        }
    }

    /// How it stands.
    #[must_use]
    pub fn status(&self) -> TestStatus {
        self.lock().clone()
    }
}

fn report(
    config: &LinkConfig,
    measured: &Measured,
    share: Share,
    mirrored: MirroredNow,
    heartbeat_gap: Duration,
    heartbeat_period: Duration,
) -> TestReport {
    let of = |samples: &[u64]| Percentiles::of(&mut samples.to_vec());
    let path = &measured.together;
    let together = PathFigures {
        rtt_us: of(&path.rtt_us),
        goodput_bytes_per_s: path.goodput_bytes_per_s,
        small_epoch_us: of(&path.small_epoch_us),
        large_epoch_us: of(&path.large_epoch_us),
    };
    let figures = |(link, (addrs, sample)): (usize, (_, &LinkSample))| {
        let addrs: &crate::api::types::LinkAddrs = addrs;
        LinkFigures {
            link,
            local: addrs.local,
            peer: addrs.peer,
            rtt_us: of(&sample.rtt_us),
            sent_bytes_per_s: sample.sent_bytes_per_s,
            capacity_bytes_per_s: sample.last.capacity_bytes_per_s,
            sent_packets: sample.sent_packets,
            lost_packets: sample.lost_packets,
            mtu_bytes: sample.last.mtu_bytes,
        }
    };
    let links: Vec<_> = config
        .links
        .iter()
        .zip(&measured.links)
        .enumerate()
        .map(figures)
        .collect();
    let gap_us = super::partner::micros(heartbeat_gap);
    TestReport {
        partner: config.partner.clone(),
        took_ms: super::partner::micros(measured.took) / 1000,
        full: share == Share::Full,
        meaning: meaning::of(&together, mirrored.codec_ratio),
        warnings: meaning::warnings(
            &together,
            &links,
            gap_us,
            super::partner::micros(heartbeat_period),
        ),
        together,
        links,
        heartbeat_gap_us_max: gap_us,
    }
}
