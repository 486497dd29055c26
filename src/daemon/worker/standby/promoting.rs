//! From standby to running VM.

use super::StandbySide;
use super::say;
use crate::daemon::clock::now_ns;
use crate::daemon::worker::ingress::{self, Way};
use crate::daemon::worker::verify::audit;
use crate::interpose::checkpoint::{HookError, patch_state_clock, ticks_per_second};
use crate::interpose::disk::{Disk, Mode};
use crate::interpose::net::NetMode;
use crate::pool::{Epoch, Generation};
use crate::vm::qmp::Qmp;
use bytes::Bytes;
use std::sync::Arc;

/// From patching the guest's clock into its state until it runs with it: 1.2 to 3 ms
/// measured without an audit. Being wrong by a millisecond is less than a cut costs.
const LOAD_NS: u64 = 2_000_000;

/// What was applied as a standby may still be in the page cache; a solo VM's flushes
/// cover it, but a guest that never flushes should not depend on the kernel's mood.
fn sync_behind(disks: &[Arc<Disk>]) {
    let disks = disks.to_vec();
    let sync = move || {
        for disk in disks {
            if let Err(e) = disk.sync() {
                tracing::error!("a promoted disk cannot be synced: {e}");
            }
        }
    };
    if let Err(e) = std::thread::Builder::new()
        .name("disk-sync".into())
        .spawn(sync)
    {
        tracing::warn!("no thread to sync the promoted disks: {e}");
    }
}

impl StandbySide<'_> {
    pub(super) fn promote(&mut self, generation: Generation, epoch: Epoch) -> Result<Qmp, String> {
        let last = self
            .last
            .take()
            .filter(|l| l.epoch == epoch)
            .ok_or_else(|| format!("epoch {epoch} is not the newest applied one"))?;
        let prefix = self
            .blocks
            .take()
            .ok_or("the RAM blocks outside the RAM file never came")?;
        let incoming = self
            .incoming
            .take()
            .ok_or("this standby was promoted before")?;
        self.failover.promote_started_ns = now_ns();
        self.failover.from_epoch = epoch.0;
        self.failover.from_generation = self.generation.0;
        let mut state = last.device_state.to_vec();
        let advance_ns = now_ns().saturating_sub(last.arrived_ns) + LOAD_NS;
        patch_state_clock(&mut state, advance_ns, ticks_per_second()).map_err(say)?;
        let (parts, landing, failover) = (&self.parts, &self.landing, &mut self.failover);
        let mut hook = || -> Result<(), HookError> {
            if let Some(sums) = &last.audit {
                audit(landing, &parts.images, sums, failover);
            }
            for disk in &parts.disks {
                disk.set_mode(Mode::Direct, generation)?;
            }
            for port in &parts.ports {
                port.set_mode(NetMode::Direct, generation)?;
            }
            Ok(())
        };
        let (control, timings) = incoming.promote(&prefix, &state, &mut hook).map_err(say)?;
        self.failover.running_ns = now_ns();
        for port in &self.parts.ports {
            port.announce();
        }
        sync_behind(&self.parts.disks);
        self.failover.replayed = self.replay(last.ingress);
        self.shared
            .event(format!("promoted from epoch {epoch}: {timings:?}"));
        self.shared.failover(self.failover.clone());
        Ok(control)
    }

    /// Let out what the old primary held of the epoch this side goes on from, and give the
    /// guest again what it may have been given after its checkpoint: the open epoch's
    /// frames, and the last one's (a frame that reached QEMU while the guest stood still is
    /// in no checkpoint). Networks may repeat frames; TCP drops what it has.
    fn replay(&mut self, last: Vec<Bytes>) -> u64 {
        let mut ways = vec![(Vec::new(), Vec::new()); self.parts.ports.len()];
        for (way, nic, frame) in last.into_iter().filter_map(ingress::split) {
            match (way, ways.get_mut(nic)) {
                (Way::Out, Some((out, _))) => out.push(frame),
                (Way::In, Some((_, again))) => again.push(frame),
                (_, None) => {}
            }
        }
        // The open epoch was not committed: nothing of what its guest sent may leave.
        let open = self.landing.assembler().open_ingress();
        for (way, nic, frame) in open.into_iter().filter_map(ingress::split) {
            if let (Way::In, Some((_, again))) = (way, ways.get_mut(nic)) {
                again.push(frame);
            }
        }
        let mut replayed = 0;
        for (port, (out, again)) in self.parts.ports.iter().zip(ways) {
            replayed += (port.let_out(&out) + again.len()) as u64;
            port.inject(again);
        }
        replayed
    }
}
