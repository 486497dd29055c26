//! What a host that has lost every path does with its VMs until its watchdog resets it.
//! Pure: `left` is an argument, the order is the return value.
//!
//! The watchdog ends everything anyway; stopping first is kinder to disks and guests, and
//! ends the VMs sooner than the others may assume. [`IsolationResponse::Leave`] gains
//! nothing for a VM that can run elsewhere: the others will start it there, and a second
//! instance that lives up to the last instant is the risk this room exists against. For
//! one that cannot (its disk is in this host alone) it is the best there is: nobody will
//! start a second one, and the host may yet come back before its watchdog fires.

use crate::pool::VmId;
pub use crate::pool::spec::IsolationResponse;
use std::time::Duration;

/// A guest that has less than this to shut down is stopped at once: no guest's shutdown
/// is done sooner, and one cut in half is worse than a power loss.
pub const SHUTDOWN_MIN: Duration = Duration::from_secs(2);

/// A VM of the isolated host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsolatedVm {
    /// Which.
    pub vm: VmId,
    /// What is wanted for it.
    pub response: IsolationResponse,
    /// It can run on another host of the pool.
    pub runs_elsewhere: bool,
}

/// One thing to do, `after` the start of the isolation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// From the start of the isolation.
    pub after: Duration,
    /// Which VM.
    pub vm: VmId,
    /// What.
    pub act: Act,
}

/// What is done to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Ask the guest to shut down.
    Shutdown,
    /// End it now, if it still runs.
    Stop,
}

/// A response that is not allowed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "VM {0}: `leave` is only for a VM that cannot run elsewhere, and this one can; use `stop` or `shutdown`"
)]
pub struct LeaveRefused(pub VmId);

/// Whether `vm` may have its response; asked when it is configured.
///
/// # Errors
/// [`LeaveRefused`].
pub fn allowed(vm: &IsolatedVm) -> Result<(), LeaveRefused> {
    if vm.response == IsolationResponse::Leave && vm.runs_elsewhere {
        Err(LeaveRefused(vm.vm))
    } else {
        Ok(())
    }
}

/// What to do in order of time, with `left` until the watchdog fires. Stops come before
/// shutdowns of the same instant: they are what must not be late. A `leave` that is not
/// [`allowed`] (the VM has become movable since) is a stop.
#[must_use]
pub fn plan(vms: &[IsolatedVm], left: Duration) -> Vec<Step> {
    let half = left / 2;
    let mut steps = Vec::new();
    for vm in vms {
        let mut add = |after, act| {
            steps.push(Step {
                after,
                vm: vm.vm,
                act,
            });
        };
        match vm.response {
            IsolationResponse::Leave if !vm.runs_elsewhere => {}
            IsolationResponse::Shutdown if half >= SHUTDOWN_MIN => {
                add(Duration::ZERO, Act::Shutdown);
                add(half, Act::Stop);
            }
            _ => add(Duration::ZERO, Act::Stop),
        }
    }
    steps.sort_by_key(|s| (s.after, s.act != Act::Stop));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(n: u8, response: IsolationResponse, runs_elsewhere: bool) -> IsolatedVm {
        IsolatedVm {
            vm: VmId([n; 16]),
            response,
            runs_elsewhere,
        }
    }

    #[test]
    fn a_shutdown_gets_half_of_the_time_and_then_a_stop() {
        let left = Duration::from_secs(10);
        let vms = [
            vm(1, IsolationResponse::Shutdown, true),
            vm(2, IsolationResponse::Stop, true),
            vm(3, IsolationResponse::Leave, false),
        ];
        let steps: Vec<_> = plan(&vms, left)
            .iter()
            .map(|s| (s.after, s.vm, s.act))
            .collect();
        let zero = Duration::ZERO;
        assert_eq!(
            steps,
            [
                (zero, VmId([2; 16]), Act::Stop),
                (zero, VmId([1; 16]), Act::Shutdown),
                (left / 2, VmId([1; 16]), Act::Stop),
            ]
        );
    }

    #[test]
    fn without_time_to_shut_down_a_vm_is_stopped_at_once() {
        let steps = plan(
            &[vm(1, IsolationResponse::Shutdown, true)],
            Duration::from_secs(3),
        );
        assert_eq!(
            (steps.len(), steps[0].act, steps[0].after),
            (1, Act::Stop, Duration::ZERO)
        );
    }

    #[test]
    fn a_vm_that_can_run_elsewhere_is_never_left_running() {
        let movable = vm(1, IsolationResponse::Leave, true);
        assert_eq!(allowed(&movable), Err(LeaveRefused(VmId([1; 16]))));
        assert_eq!(plan(&[movable], Duration::from_secs(60))[0].act, Act::Stop);
        assert!(allowed(&vm(1, IsolationResponse::Leave, false)).is_ok());
    }
}
