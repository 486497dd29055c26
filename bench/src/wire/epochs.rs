//! A stream of epochs as a mirrored VM makes it: one is sent, acknowledged on the control
//! lane, then the next. Tells how long each took and whether any was lost, repeated or out
//! of order.

use super::lanes::{End, GENERATION, Running, VM};
use super::peer::{Report, say, say_ready};
use anyhow::{Context, Result};
use bytes::Bytes;
use interconnect::frame::{Frame, FrameKind};
use interconnect::ids::Epoch;
use interconnect::link::{LinkEvent, LinkState};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
/// Pages in one frame.
const BATCH_PAGES: usize = 250;
/// An epoch not acknowledged after this time is lost.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// Between two looks at the links.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What is sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// This end.
    pub end: End,
    /// Pages of one epoch.
    pub pages: usize,
    /// For how long, in s.
    pub seconds: f64,
}

/// Now on the clock that all processes of a host share, in s.
///
/// # Errors
/// If the kernel has no such clock.
pub fn now_s() -> Result<f64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(Duration::from(now).as_secs_f64())
}

/// The content of frame `index` of `epoch`: says which it is, the rest does not compress.
fn fill(epoch: u64, index: u64, noise: &[u8]) -> Bytes {
    let mut bytes = noise.to_vec();
    bytes[..8].copy_from_slice(&epoch.to_le_bytes());
    bytes[8..16].copy_from_slice(&index.to_le_bytes());
    bytes.into()
}

/// Acknowledges whole epochs; tells how many frames were not the next one.
///
/// # Errors
/// If the pair does not come up.
pub fn receive(plan: &Plan) -> Result<Report> {
    let mut running = Running::start(&plan.end, None)?;
    say_ready()?;
    running.wait_up()?;
    let mut lane = running.wait_lane()?;
    // What links do is told on the events: somebody has to take them.
    let pair = running.pair.clone();
    let mut events = std::mem::replace(&mut running.events, tokio::sync::mpsc::channel(1).1);
    let drain = std::thread::spawn(move || while events.blocking_recv().is_some() {});
    let (mut wrong, mut epochs) = (0_u64, 0_u64);
    let mut expected = (1_u64, 0_u64);
    while let Some(frame) = lane.blocking_recv() {
        if frame.kind == FrameKind::EpochEnd {
            let frames = u64::try_from(plan.pages.div_ceil(BATCH_PAGES))?;
            if (frame.epoch.0, frames) != expected {
                wrong += 1;
            }
            epochs += 1;
            expected = (frame.epoch.0 + 1, 0);
            // Gone if there is no session; the sender finds out.
            let _ = pair.control(Frame::empty(
                FrameKind::EpochAck,
                VM,
                GENERATION,
                frame.epoch,
            ));
            continue;
        }
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&frame.payload[at..at + 8]);
            u64::from_le_bytes(word)
        };
        if (word(0), word(8)) != expected || frame.epoch.0 != expected.0 {
            wrong += 1;
        }
        expected.1 += 1;
    }
    drop(pair);
    drop(running);
    let _ = drain.join();
    Ok(Report {
        notes: vec![
            ("wrong".to_owned(), wrong as f64),
            ("epochs".to_owned(), epochs as f64),
        ],
        ..Report::default()
    })
}

/// Sends epochs for the time of the plan; `times_us` are those from the first frame to the
/// acknowledgement. Notes: `lost` epochs, `down_at_s` of a link by the shared clock.
///
/// # Errors
/// If the pair does not come up.
pub fn send(plan: &Plan) -> Result<Report> {
    let (acks, acked) = mpsc::channel();
    let on_ack = move |frame: Frame| {
        let _ = acks.send(frame.epoch.0);
    };
    let mut running = Running::start(&plan.end, Some(Arc::new(on_ack)))?;
    running.wait_up()?;
    let mut events = std::mem::replace(&mut running.events, tokio::sync::mpsc::channel(1).1);
    let drain = std::thread::spawn(move || {
        while let Some(event) = events.blocking_recv() {
            if matches!(event, LinkEvent::Down { .. }) {
                break;
            }
        }
    });
    let going = AtomicBool::new(true);
    let mut report = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&running, &going));
        let sent = stream(plan, &running, &acked);
        going.store(false, Ordering::Relaxed);
        let mut report = sent?;
        report.notes.extend(watcher.join().unwrap_or_default());
        Ok::<_, anyhow::Error>(report)
    })?;
    report.notes.extend(running.notes());
    drop(running);
    let _ = drain.join();
    Ok(report)
}

/// When a link first did not stand any more, by the shared clock.
fn watch(running: &Running, going: &AtomicBool) -> Vec<(String, f64)> {
    let mut stood = Vec::new();
    let mut notes: Vec<(String, f64)> = Vec::new();
    while going.load(Ordering::Relaxed) {
        let states: Vec<_> = running.pair.stats().links.iter().map(|l| l.state).collect();
        for (index, state) in states.iter().enumerate() {
            let was_up = stood.get(index) == Some(&LinkState::Up);
            let name = match state {
                LinkState::Suspect => format!("suspect_at_s{index}"),
                LinkState::Down => format!("down_at_s{index}"),
                LinkState::Up => continue,
            };
            let known = notes.iter().any(|n| n.0 == name);
            if (was_up || *state == LinkState::Down && !stood.is_empty())
                && !known
                && let Ok(now) = now_s()
            {
                notes.push((name, now));
            }
        }
        stood = states;
        std::thread::sleep(LOOK_EVERY);
    }
    notes
}

fn stream(plan: &Plan, running: &Running, acked: &mpsc::Receiver<u64>) -> Result<Report> {
    let lane = running.pair.open_epoch_lane(VM, GENERATION)?;
    // Bytes that no layer could shorten: a linear congruence's high byte.
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    })
    .take(BATCH_PAGES * PAGE_BYTES)
    .collect();
    let mut report = Report::default();
    let mut lost = 0;
    let start = Instant::now();
    say("streaming")?;
    let mut epoch = 0;
    while start.elapsed().as_secs_f64() < plan.seconds {
        epoch += 1;
        let began = Instant::now();
        let mut left = plan.pages;
        let mut index = 0;
        let frame = |kind, payload| Frame {
            kind,
            vm: VM,
            generation: GENERATION,
            epoch: Epoch(epoch),
            payload,
        };
        let mut sent = true;
        while left > 0 && sent {
            let pages = left.min(BATCH_PAGES);
            let payload = fill(epoch, index, &noise[..pages * PAGE_BYTES]);
            report.bytes += payload.len() as u64;
            sent = lane.send_blocking(frame(FrameKind::Pages, payload)).is_ok();
            left -= pages;
            index += 1;
        }
        sent = sent
            && lane
                .send_blocking(frame(FrameKind::EpochEnd, Bytes::new()))
                .is_ok();
        if !sent || acked.recv_timeout(LOST_AFTER) != Ok(epoch) {
            lost += 1;
            break;
        }
        report.times_us.push(began.elapsed().as_secs_f64() * 1e6);
    }
    report.seconds = start.elapsed().as_secs_f64();
    report.notes.push(("lost".to_owned(), f64::from(lost)));
    report.notes.push((
        "session_ended".to_owned(),
        f64::from(u8::from(!lane.is_open())),
    ));
    drop(lane);
    Ok(report)
}

/// What of a stream is needed by whoever judges it: the usual time and the longest, in ms.
///
/// # Errors
/// If there were no epochs.
pub fn usual_and_worst_ms(times_us: &[f64]) -> Result<(f64, f64)> {
    let mut sorted = times_us.to_vec();
    sorted.sort_by(f64::total_cmp);
    let worst = sorted.last().context("no epoch was acknowledged")?;
    Ok((sorted[sorted.len() / 2] / 1e3, worst / 1e3))
}
