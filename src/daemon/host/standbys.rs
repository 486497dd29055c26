//! What a host does when a partner speaks of a VM: be its standby, or say that it is not here.

use super::Host;
use crate::api::types::Role;
use crate::daemon::control::ControlMsg;
use crate::daemon::worker::{self, Begin, WorkerConfig};
use crate::daemon::worker::{Shared, WorkerEvent};
use crate::mirror::ClaimOutcome;
use crate::pool::spec::VmSpec;
use crate::pool::{Generation, HostName, VmId};
use crate::registry::Versioned;
use crate::vm::argv::Accel;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a new standby waits for what is left of the VM here: a deposed primary writes
/// out its disks, an older standby gives back its memory. Well within the primary's
/// [`crate::mirror::Timing::prepare_patience`], and far cheaper than its asking again.
const PUT_AWAY_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether it is gone.
const PUT_AWAY_LOOK_EVERY: Duration = Duration::from_millis(10);

impl Host {
    /// A partner speaks of a VM that has no worker here.
    pub(super) fn unrouted(
        self: &Arc<Self>,
        from: &HostName,
        vm: VmId,
        generation: Generation,
        message: ControlMsg,
    ) {
        match message {
            ControlMsg::Prepare { .. } => self.prepare(from, vm, generation, message),
            ControlMsg::StandbyHere => {
                if let Some(peer) = self.env.peer(from) {
                    let reason = format!("VM {vm} does not run on {}", self.env.config.name);
                    peer.say(vm, generation, &ControlMsg::PrimaryGone { reason });
                }
            }
            other => {
                tracing::info!(partner = %from, %vm, ?other, "a message for a VM that is not here")
            }
        }
    }

    /// A partner asks for a standby.
    fn prepare(
        self: &Arc<Self>,
        from: &HostName,
        vm: VmId,
        generation: Generation,
        message: ControlMsg,
    ) {
        let host = Arc::clone(self);
        let from = from.clone();
        // Reading the registry may take a while; the partner's other messages must not wait.
        self.runtime.spawn_blocking(move || {
            if let Err(reason) = host.try_prepare(&from, vm, generation, message) {
                tracing::warn!(%vm, partner = %from, "no standby: {reason}");
                if let Some(peer) = host.env.peer(&from) {
                    peer.say(vm, generation, &ControlMsg::Refused { reason });
                }
            }
        });
    }

    fn try_prepare(
        &self,
        from: &HostName,
        vm: VmId,
        generation: Generation,
        message: ControlMsg,
    ) -> Result<(), String> {
        let ControlMsg::Prepare {
            spec,
            machine,
            accel,
            qemu,
        } = message
        else {
            return Err("not a request for a standby".into());
        };
        let me = &self.env.config.name;
        let _permit = self.gate.permit()?;
        if let Some(reason) = &self.cannot_mirror {
            return Err(format!("host {me} cannot mirror: {reason}"));
        }
        let spec = VmSpec::parse(&spec, &format!("spec from {from}")).map_err(|e| e.to_string())?;
        if spec.uuid != vm {
            return Err(format!(
                "the spec is of VM {}, the request of {vm}",
                spec.uuid
            ));
        }
        let ours = self.qemu.version.to_string();
        if ours != qemu {
            tracing::warn!(
                "{from} runs QEMU {qemu}, {me} has {ours}; machine type {machine} must be known to both"
            );
        }
        if !self.qemu.machines.contains(&machine) {
            return Err(format!(
                "QEMU {ours} of {me} has no machine type {machine}; set `machine` in the spec to one that both hosts have"
            ));
        }
        let accel = match accel.as_str() {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            other => return Err(format!("accelerator `{other}` is not known")),
        };
        self.check_record(from, vm, generation)?;
        let spec = Arc::new(spec);
        let shared = self.know(Arc::clone(&spec));
        self.make_room(from, vm, generation, &shared)?;
        // Time has passed, and the attempt may be over.
        let ready = self
            .check_record(from, vm, generation)
            .and_then(|()| self.store.put_spec(&spec).map_err(|e| e.to_string()));
        if let Err(reason) = ready {
            shared.ended();
            return Err(reason);
        }
        let config = WorkerConfig {
            spec,
            machine,
            accel,
            partner: Some(from.clone()),
        };
        let begin = Begin::Standby {
            primary: from.clone(),
            generation,
        };
        worker::start(
            Arc::clone(&self.env),
            config,
            begin,
            Arc::clone(&shared),
            |_| {},
        )
        .map_err(|e| {
            shared.ended();
            e.to_string()
        })
    }

    /// Wait until nothing of the VM is left here, and take its place. The registry has said
    /// that any standby of an older attempt is of no use; it may not have heard.
    fn make_room(
        &self,
        from: &HostName,
        vm: VmId,
        generation: Generation,
        shared: &Shared,
    ) -> Result<(), String> {
        let end = Instant::now() + PUT_AWAY_PATIENCE;
        while !shared.begin_standby(generation) {
            let there = shared.snapshot();
            if Instant::now() >= end {
                return Err(format!(
                    "VM `{}` is still {} here on {} after {} s of being put away",
                    there.name,
                    there.state,
                    self.env.config.name,
                    PUT_AWAY_PATIENCE.as_secs()
                ));
            }
            if there.role == Role::Standby {
                let _ = self.env.routes.send(
                    vm,
                    WorkerEvent::Control {
                        from: from.clone(),
                        generation,
                        message: ControlMsg::Dismiss,
                    },
                );
            }
            std::thread::sleep(PUT_AWAY_LOOK_EVERY);
        }
        Ok(())
    }

    /// Only the owner may have a standby, and only of its own attempt: the copy that is
    /// here is overwritten.
    fn check_record(
        &self,
        from: &HostName,
        vm: VmId,
        generation: Generation,
    ) -> Result<(), String> {
        match self.env.claims.read_blocking(vm) {
            ClaimOutcome::Lost(Some(Versioned { value, .. }))
            | ClaimOutcome::Won(Versioned { value, .. }) => {
                if value.owner != *from || value.generation != generation {
                    return Err(format!(
                        "the registry says that {} runs VM {vm} in generation {}, not {from} in {generation}",
                        value.owner, value.generation
                    ));
                }
                Ok(())
            }
            ClaimOutcome::Lost(None) => Err(format!("the registry has no record of VM {vm}")),
            ClaimOutcome::Unreachable { reason } => Err(reason),
        }
    }
}
