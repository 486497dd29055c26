//! One attempt to mirror a VM: from asking the partner to the end of the mirroring.

use super::Peer;
use super::primary::PrimarySide;
use super::seeder::{self, SeedJob, Seeded};
use super::sender::{self, SenderConfig, SenderHandle};
use crate::daemon::clock::now_ns;
use crate::daemon::control::ControlMsg;
use crate::daemon::figures::{EncodeSample, EpochSample};
use crate::interpose::checkpoint::{CutTimings, capture_blocks_prefix};
use crate::interpose::memory::{Staging, Tracker};
use crate::mirror::{LaneLevel, PrimaryInput};
use crate::pool::{Epoch, Generation, HostName};
use interconnect::codec::{CodecVersion, EncodePolicy};
use interconnect::frame::{Frame, FrameKind, PAYLOAD_BYTES_MAX};
use interconnect::link::EpochLane;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An epoch that is cut and not yet acknowledged.
pub struct InFlight {
    /// Which.
    pub epoch: Epoch,
    /// When it began to run.
    pub began_ns: u64,
    /// When the guest ran again after its cut.
    pub resumed_ns: u64,
    /// Of its cut.
    pub timings: CutTimings,
    /// Of its collection.
    pub capture_us: u64,
    /// Dirty pages.
    pub pages: u64,
    /// Bytes on the wire, once sent.
    pub wire_bytes: u64,
    /// Its encoding, once sent.
    pub encode: Option<EncodeSample>,
}

impl InFlight {
    /// Its figures, acknowledged at `at_ns`.
    pub fn sample(&self, at_ns: u64) -> EpochSample {
        let since = |ns: u64| at_ns.saturating_sub(ns) / 1000;
        EpochSample {
            pause_us: self.timings.pause_us,
            stop_us: self.timings.stop_us,
            capture_us: self.capture_us,
            save_us: self.timings.save_us,
            cont_us: self.timings.cont_us,
            commit_us: since(self.resumed_ns),
            lag_us: since(self.began_ns),
            length_us: self.resumed_ns.saturating_sub(self.began_ns) / 1000,
            pages: self.pages,
            wire_bytes: self.wire_bytes,
            encode: self.encode,
        }
    }
}

/// One attempt.
pub struct Attempt {
    /// The partner.
    pub peer: Peer,
    /// Its generation.
    pub generation: Generation,
    /// Armed, unless the seeder has it.
    pub tracker: Option<Tracker>,
    /// The way to the sender, once seeding is done.
    pub sender: Option<SenderHandle>,
    /// Stagings that are free.
    pub spare: Vec<Staging>,
    /// Disk ranges that seeding left to the first epoch.
    pub base: Vec<Vec<Range<u64>>>,
    /// Cut and not acknowledged, oldest first.
    pub in_flight: VecDeque<InFlight>,
    lane: Option<Arc<EpochLane>>,
    abort: Arc<AtomicBool>,
}

impl Attempt {
    /// How the lane stands, once epochs go over it.
    pub fn level(&self) -> Option<LaneLevel> {
        self.sender.as_ref()?;
        let pressure = self.lane.as_ref()?.pressure();
        Some(LaneLevel {
            queued_bytes: pressure.queued_bytes,
            unacked_bytes: pressure.unacked_bytes,
            bytes_per_s: pressure.capacity_bytes_per_s,
        })
    }

    /// Tell the threads of this attempt to end.
    pub fn give_up(&self) {
        self.abort.store(true, Ordering::Relaxed);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl PrimarySide {
    /// Ask the partner for a standby.
    pub(super) fn prepare_standby(
        &mut self,
        partner: &HostName,
        generation: Generation,
    ) -> Option<PrimaryInput> {
        let Some(peer) = self.env.peer(partner) else {
            let reason = format!("no link to {partner} is known here");
            return Some(PrimaryInput::StandbyRefused { reason });
        };
        self.shared.reset_figures();
        self.shared.event(format!(
            "asks {partner} for a standby, generation {generation}"
        ));
        peer.say(
            self.config.spec.uuid,
            generation,
            &ControlMsg::Prepare {
                spec: self.config.spec.to_toml(),
                machine: self.config.machine.clone(),
                accel: format!("{:?}", self.config.accel).to_lowercase(),
                qemu: self.env.qemu_version.clone(),
            },
        );
        self.attempt = Some(Attempt {
            peer,
            generation,
            tracker: None,
            sender: None,
            spare: Vec::new(),
            base: Vec::new(),
            in_flight: VecDeque::new(),
            lane: None,
            abort: Arc::new(AtomicBool::new(false)),
        });
        None
    }

    /// Arm, open the lane, send the RAM blocks outside the RAM file, start the seeder.
    pub(super) fn begin_seeding(&mut self) -> Option<PrimaryInput> {
        match self.try_begin_seeding() {
            Ok(()) => None,
            Err(reason) => Some(PrimaryInput::SeedingFailed { reason }),
        }
    }

    /// How this attempt's content is encoded.
    fn policy(&self) -> Result<EncodePolicy, String> {
        let attempt = self
            .attempt
            .as_ref()
            .ok_or("there is no attempt to mirror")?;
        let spec = &self.config.spec;
        let version = attempt.peer.interconnect.stats().version;
        let policy = EncodePolicy::for_guest(
            spec.memory.get(),
            spec.mirror.codec,
            CodecVersion::of_protocol(version),
        );
        Ok(EncodePolicy {
            delta: spec.mirror.delta,
            ..policy
        })
    }

    fn try_begin_seeding(&mut self) -> Result<(), String> {
        let policy = self.policy()?;
        let spec = Arc::clone(&self.config.spec);
        let attempt = self
            .attempt
            .as_mut()
            .ok_or("there is no attempt to mirror")?;
        let lane = attempt
            .peer
            .interconnect
            .open_epoch_lane(spec.uuid, attempt.generation)
            .map_err(|e| e.to_string())?;
        let lane = Arc::new(lane);
        attempt.lane = Some(Arc::clone(&lane));
        // The guest stands still for this, 10 to 20 ms, once an attempt.
        self.resumed_ns = now_ns();
        self.checkpointer_stop()?;
        let prefix = capture_blocks_prefix(&mut self.control).map_err(|e| e.to_string());
        self.checkpointer_cont()?;
        let prefix = prefix?;
        let attempt = self
            .attempt
            .as_mut()
            .ok_or("there is no attempt to mirror")?;
        let mut rest = prefix;
        while !rest.is_empty() {
            let payload = rest.split_to(rest.len().min(PAYLOAD_BYTES_MAX));
            lane.send_blocking(Frame {
                kind: FrameKind::SeedBlocks,
                vm: spec.uuid,
                generation: attempt.generation,
                epoch: Epoch::default(),
                payload,
            })
            .map_err(|e| e.to_string())?;
        }
        let pid = i32::try_from(self.parts.qemu.pid()).map_err(|e| e.to_string())?;
        let tracker = Tracker::attach(pid, &self.parts.paths.ram_file, spec.memory.get())
            .map_err(|e| e.to_string())?;
        let pages = tracker.pages();
        for _ in 0..=crate::mirror::MAX_IN_FLIGHT {
            attempt
                .spare
                .push(Staging::new(pages, pages).map_err(|e| e.to_string())?);
        }
        for disk in &self.parts.disks {
            disk.begin_dirty_tracking();
        }
        let job = SeedJob {
            vm: spec.uuid,
            generation: attempt.generation,
            tracker,
            lane,
            disks: self.parts.disks.clone(),
            policy,
            pool: self.env.encode_pool.clone(),
            audit: spec.mirror.audit,
            abort: Arc::clone(&attempt.abort),
        };
        seeder::start(job, Arc::clone(&self.shared), self.inbox.clone()).map_err(|e| e.to_string())
    }

    /// The seeder has ended: take the tracker back, start the sender.
    pub(super) fn seeded(&mut self, seeded: Seeded) -> Option<PrimaryInput> {
        let policy = self.policy();
        let attempt = self
            .attempt
            .as_mut()
            .filter(|a| a.generation == seeded.generation)?;
        attempt.tracker = Some(seeded.tracker);
        attempt.base = seeded.base;
        if let Err(reason) = seeded.result {
            return Some(PrimaryInput::SeedingFailed { reason });
        }
        let policy = match policy {
            Ok(policy) => policy,
            Err(reason) => return Some(PrimaryInput::SeedingFailed { reason }),
        };
        let lane = attempt.lane.clone()?;
        self.parts
            .ingress
            .open(Arc::clone(&lane), attempt.generation, Epoch(1));
        let sender = sender::start(SenderConfig {
            vm: self.config.spec.uuid,
            generation: attempt.generation,
            policy,
            pool: self.env.encode_pool.clone(),
            lane,
            disks: self.parts.disks.clone(),
            audit: seeded.audit,
            inbox: self.inbox.clone(),
        });
        match sender {
            Ok(sender) => {
                attempt.sender = Some(sender);
                self.shared
                    .event("seeded; the first checkpoint follows".into());
                Some(PrimaryInput::SeedingConverged)
            }
            Err(e) => Some(PrimaryInput::SeedingFailed {
                reason: e.to_string(),
            }),
        }
    }
}
