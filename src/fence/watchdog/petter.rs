//! The thread that pets while it may.

use super::{BootNs, Watchdog, WatchdogError};
use interconnect::heartbeat::realtime;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// Pets per timeout: three may be late or lost before the fourth is too late.
const PETS_PER_TIMEOUT: u32 = 4;

/// Until when the host may live. The decisions write it, the petter reads it.
#[derive(Clone)]
pub struct Lease(Arc<AtomicU64>);

impl Lease {
    /// The host may live until `deadline`; an earlier one than before shortens it.
    pub fn set(&self, deadline: BootNs) {
        self.0.store(deadline.0, Ordering::Release);
    }

    /// What was set last.
    #[must_use]
    pub fn deadline(&self) -> BootNs {
        BootNs(self.0.load(Ordering::Acquire))
    }
}

/// What the petter did at its last turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PetState {
    /// It has petted.
    Petting = 0,
    /// The lease has run out: it held still.
    Expired = 1,
    /// The watchdog did not take the pet.
    Failing = 2,
}

/// A running petter. Dropping it stops the pets and leaves the watchdog armed.
pub struct Petter {
    lease: Lease,
    state: Arc<AtomicU8>,
    timeout: Duration,
    warning: Option<String>,
    farewell: SyncSender<SyncSender<Result<(), WatchdogError>>>,
}

impl Petter {
    /// Pet `watchdog` until `deadline`, or what [`Petter::lease`] is set to later.
    ///
    /// # Errors
    /// The kernel's, if it gives no thread; the watchdog stays armed then.
    pub fn start(watchdog: Box<dyn Watchdog>, deadline: BootNs) -> io::Result<Self> {
        let timeout = watchdog.timeout();
        let lease = Lease(Arc::new(AtomicU64::new(deadline.0)));
        let state = Arc::new(AtomicU8::new(PetState::Expired as u8));
        let (farewell, told) = sync_channel(1);
        let (tell_ready, ready) = sync_channel(1);
        let (its_lease, its_state) = (lease.clone(), Arc::clone(&state));
        std::thread::Builder::new()
            .name("watchdog".into())
            .stack_size(realtime::STACK_BYTES)
            .spawn(move || {
                let failed = [realtime::raise_priority(), realtime::lock_memory()];
                let words: Vec<_> = failed
                    .into_iter()
                    .filter_map(Result::err)
                    .map(|e| e.to_string())
                    .collect();
                let warning = (!words.is_empty()).then(|| {
                    format!(
                        "the watchdog's thread has no real-time priority or locked memory ({}); \
                         a busy host may reset itself: give CAP_SYS_NICE and CAP_IPC_LOCK",
                        words.join(", ")
                    )
                });
                let _ = tell_ready.send(warning);
                pet_while_allowed(watchdog, &its_lease, &its_state, &told);
            })?;
        let warning = ready.recv().unwrap_or_default();
        Ok(Self {
            lease,
            state,
            timeout,
            warning,
            farewell,
        })
    }

    /// Where the decisions write the deadline.
    #[must_use]
    pub fn lease(&self) -> Lease {
        self.lease.clone()
    }

    /// The real timeout: after the lease's deadline the host is dead within this.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// What the thread could not have, for the log.
    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// What it did last.
    #[must_use]
    pub fn state(&self) -> PetState {
        match self.state.load(Ordering::Acquire) {
            0 => PetState::Petting,
            2 => PetState::Failing,
            _ => PetState::Expired,
        }
    }

    /// Disarm: no VM runs here any more, and the others have been told.
    ///
    /// # Errors
    /// [`WatchdogError`]: it may still be counting, and the host die.
    pub fn farewell(self) -> Result<(), WatchdogError> {
        let gone = || WatchdogError::Io {
            on: "petter".into(),
            step: "farewell",
            source: io::Error::other("its thread is gone"),
        };
        let (answer, done) = sync_channel(1);
        self.farewell.send(answer).map_err(|_| gone())?;
        done.recv().map_err(|_| gone())?
    }
}

fn pet_while_allowed(
    mut watchdog: Box<dyn Watchdog>,
    lease: &Lease,
    state: &AtomicU8,
    told: &Receiver<SyncSender<Result<(), WatchdogError>>>,
) {
    let period = watchdog.timeout() / PETS_PER_TIMEOUT;
    loop {
        let now = BootNs::now();
        let did = if now >= lease.deadline() {
            PetState::Expired
        } else if watchdog.pet(now).is_ok() {
            PetState::Petting
        } else {
            PetState::Failing
        };
        state.store(did as u8, Ordering::Release);
        match told.recv_timeout(period) {
            Err(RecvTimeoutError::Timeout) => {}
            // Dropped without a farewell: the watchdog goes on counting.
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(answer) => {
                let _ = answer.send(watchdog.disarm());
                return;
            }
        }
    }
}
